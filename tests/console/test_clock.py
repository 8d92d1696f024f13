"""One clock for each phase, and durations estimated from parts."""

from types import SimpleNamespace

import pytest

from lora_domains.console import Clock, estimated_phases, phases_in_words, spread
from lora_domains.console import clock as clocks


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that clocks see, which the test advances."""
    seen = [100.0]
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: seen[0]))
    return seen


def test_a_phase_inside_another_is_not_counted_twice(now: list[float]) -> None:
    seconds: dict[str, float] = {"steps": 1.0}  # of a run that is resumed
    clock = Clock(seconds)
    with clock.phase("steps"):
        now[0] += 2
        with clock.phase("general_text"):
            now[0] += 30
        now[0] += 3
    now[0] += 1000  # between phases

    def fail() -> None:
        with clock.phase("validation"):
            now[0] += 4
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seconds == {"steps": 6.0, "general_text": 30.0, "validation": 4.0}
    assert phases_in_words({"steps": 362.0, "general_text": 41.0, "validation": 0.1}) == (
        "steps 6 min 2 s, general text 41 s"
    )


@pytest.mark.parametrize(("count", "each", "most"), [(1000, 0.1, 32), (5, 0.001, 5), (0, 1, 0)])
def test_parts_grow_until_they_take_long_enough(
    now: list[float], count: int, each: float, most: int
) -> None:
    parts: list[int] = []

    def run(part: list[int], clock: Clock) -> None:
        parts.append(len(part))
        with clock.phase("steps"):
            now[0] += each * sum(part)

    items = [size % 7 + 1 for size in range(count)]
    found = estimated_phases(sorted(items), run, sum)
    assert found.get("steps", 0.0) == pytest.approx(each * sum(items), rel=0.02)
    assert max(parts, default=0) <= most


def test_parts_are_spread_over_all() -> None:
    assert spread(range(100), 4) == [12, 37, 62, 87]
    assert spread([1, 2], 4) == [1, 2]
