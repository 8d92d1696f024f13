"""Rows of a table, made for one test."""

from typing import Any

from lora_domains.tasks import Row

SECRET = "zq-hush-93"
"""A text that no message may quote."""


def row(number: int = 0, **values: Any) -> Row:
    """A row of "a, b.csv" with ``values`` by column."""
    return Row(values, "train", number, f"a, b.csv, line {number + 2}")
