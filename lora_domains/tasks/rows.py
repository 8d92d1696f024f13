"""Rows as read, examples as scored, and the prompt templates that lead from one to the other."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from lora_domains.errors import DataError, DomainError, did_you_mean, listed


@dataclass(frozen=True)
class Row:
    """One row as read: its values, and its location for messages (never its text)."""

    values: Mapping[str, Any]
    split: str
    number: int
    """Position in its split, from 0."""
    place: str
    """Location for a reader: ``train.csv, line 17``."""

    @property
    def id(self) -> str:
        """Stable, and independent of the row's contents: a column ``id`` may name a patient."""
        return f"{self.split}:{self.number}"


@dataclass(frozen=True)
class Example:
    """A prompt and its answer.

    ``answer`` and ``choices`` start with the space that separates them from the prompt. ``target``
    is the index of the correct choice, -1 for a free-text answer.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    target: int = -1
    group: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict)
    place: str = ""


def is_null(value: object) -> bool:
    """True for None, NaN and the null values of pandas (recognised without importing pandas)."""
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or type(value).__name__ in {"NAType", "NaTType"}


def shown(label: str) -> str:
    """A label for a message. A long one may be text from the wrong column: only its length."""
    return repr(label) if len(label) <= 40 else f"a text of {len(label)} characters"


def text_of(row: Row, column: str) -> str:
    """The text in ``column``. Raises DataError when it is missing, null or only whitespace."""
    if column not in row.values:
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected=f"a column named {column!r}",
            found="columns " + listed(row.values),
            hint=did_you_mean(column, row.values),
        )
    value = row.values[column]
    text = "" if is_null(value) else str(value)
    if not text.strip():
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="text",
            found="null" if is_null(value) else "only whitespace" if text else "''",
            hint="Fill the cell or delete the row.",
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="text that can be encoded as UTF-8",
            found="an unpaired surrogate, such as a truncated emoji leaves",
            hint="Remove it, or export the rows again.",
        )
    return text


def fill(template: str, row: Row) -> str:
    """``template`` with each ``{column}`` replaced by the row's text in that column."""
    return "".join(
        literal + (text_of(row, name).strip() if name else "")
        for literal, name, _, _ in Formatter().parse(template)
    )


def columns_in(template: str) -> tuple[str, ...]:
    """The columns named by a prompt template, in order. Raises DomainError if it is malformed."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if "" in names:
            raise ValueError("an empty placeholder: {}")
        return tuple(names)
    except ValueError as error:
        raise DomainError(
            where=f"prompt {template!r}",
            expected="text with {column} placeholders; literal braces are doubled",
            found=str(error),
            hint="Write {{ and }} for literal braces.",
        ) from None


def prompt_from(columns: tuple[str, ...], answer: str) -> str:
    """The default template: a line ``column: {column}`` for each column, then ``answer:``."""
    return "\n".join(f"{column}: {{{column}}}" for column in columns) + f"\n{answer}:"
