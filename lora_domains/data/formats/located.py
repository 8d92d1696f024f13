"""What every file form gives: rows with their locations, and notes on how the file was read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHOWN = 5
"""The most locations that one error names; the others are counted."""

Located = tuple[int | str, Any]
"""A line ("line 17") or an index, and the values there."""


@dataclass(frozen=True)
class Reading:
    """How a file is to be read; None is detected."""

    delimiter: str | None = None
    encoding: str | None = None


DETECTED = Reading()
"""Everything is detected."""


@dataclass(frozen=True)
class File:
    """The bytes of a file and how to read them. ``path`` is for messages: it may be compressed."""

    path: Path
    raw: bytes
    reading: Reading = DETECTED

    @property
    def suffix(self) -> str:
        """The suffix that says what the bytes are: ``.csv`` of ``rows.csv.gz``."""
        path = self.path
        return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


@dataclass
class Table:
    """The rows of a file, and what was detected in it."""

    rows: list[Located]
    notes: list[str] = field(default_factory=list)


def places(found: Sequence[str], what: str) -> str:
    """``found`` counted and the first ``SHOWN`` listed."""
    count = f"1 invalid {what}" if len(found) == 1 else f"{len(found)} invalid {what}s"
    return f"{count}: {'; '.join(found[:SHOWN])}" + ("; …" if len(found) > SHOWN else "")


def runs(numbers: Iterable[int], most: int = 40) -> str:
    """Ascending numbers, runs joined: ``3, 7, 12–15``; those after ``most`` runs are counted."""
    joined: list[tuple[int, int]] = []
    for number in numbers:
        if joined and number == joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], number)
        else:
            joined.append((number, number))
    text = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in joined[:most])
    rest = sum(b - a + 1 for a, b in joined[most:])
    return text + (f" and {rest} more" if rest else "")
