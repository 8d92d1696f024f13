"""Where a domain's rows come from: a declaration that a recipe writes down."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Hub:
    """Rows from the Hub, read with ``datasets.load_dataset`` at one pinned revision."""

    id: str
    split: str
    revision: str
    config: str | None = None


Source = str | Path | Hub | Sequence[Mapping[str, Any]]
"""A file, ``embedded:NAME``, a data set on the Hub, or rows in memory."""


@dataclass(frozen=True)
class Data:
    """Where a domain's rows come from. A split that is not given is taken from ``train``."""

    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    general: Source | None = None
    """General text to regularise training on, in a column ``text``; by default the embedded one."""
    group: str | None = None
    """Column that says which rows belong together (a patient, a thread). A group is never split."""
    slices: tuple[str, ...] = ()
    """Columns whose values get scores of their own."""
    drop_leaks: bool = False
    """Whether training and validation rows that are also test rows are dropped or an error."""
    limit: int | None = None
    """The most rows of each split, sampled with the seed, classes in proportion."""
    row: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """A pure function from a row as read to the columns that the task names."""

    @staticmethod
    def embedded(name: str) -> "Data":
        """The rows written for the embedded base: ``medical``, ``spam``, …"""
        source = f"embedded:{name}"
        return Data(source, source, source)
