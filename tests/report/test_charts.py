"""Charts: round ticks, and nothing outside the picture."""

import re

from hypothesis import example, given
from hypothesis import strategies as st

from lora_domains.report import charts

finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(finite, st.floats(1e-6, 1e6))
def test_ticks_are_within_the_range(low: float, width: float) -> None:
    found = charts.ticks(low, low + width)
    step = width * 1e-6
    assert all(low - step <= t <= low + width + step for t in found)
    assert 1 <= len(found) <= 6


@given(st.lists(finite, min_size=3, max_size=3), finite, st.booleans())
@example([5e-324] * 3, 5e-324, True)
@example([0.0, 0.0, 1e-310], 0.0, True)
def test_bars_stay_within_the_picture(values: list[float], limit: float, bounded: bool) -> None:
    low, middle, high = sorted(values)
    fields: dict[str, float | None] = {"difference": middle, "lower": low, "upper": high}
    domain = charts.span([low, high, limit])
    if not bounded:
        fields |= {"lower": None, "upper": None}
    drawn = charts.bar(fields, domain, limit, "pass")
    found = {k: float(v) for k, v in re.findall(r' (x1|x2|cx)="([-\d.e]+)"', drawn)}
    assert all(4 <= v <= 156 for v in found.values())
    bounds = re.search(r'class="bounds" x1="([\d.]+)" x2="([\d.]+)"', drawn)
    assert bounds
    assert float(bounds[1]) <= found["cx"] <= float(bounds[2])
