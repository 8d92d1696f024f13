"""Sizes and durations as people read them."""

from lora_domains.console import format_bytes, format_duration


def test_sizes_and_durations_have_fitting_units() -> None:
    assert [format_bytes(n) for n in (900, 2.5e6, 1.4e9)] == ["0.9 kB", "2.5 MB", "1.4 GB"]
    assert [format_duration(s) for s in (4.4, 59.6, 200, 7500)] == [
        "4 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"
    ]  # fmt: skip
