"""Regression: a number for a text, such as a rating, a price or a score."""

import math
import numbers
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Self

from lora_domains.errors import DataError, DomainError, EmptyCell
from lora_domains.tasks.base import register
from lora_domains.tasks.classification import TextTask
from lora_domains.tasks.rows import (
    Example,
    Row,
    plain_text,
    text_of,
)

PLAIN = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
"""A number as most programs write it."""
GROUPED = re.compile(r"[+-]?((\d+(,\d+)?|[.,]\d+)([eE][+-]?\d+)?|[1-9]\d{0,2}(\.\d{3})+(,\d+)?)")
"""One with a decimal comma, and points between thousands. 1e3 and .5 have no other meaning;
1.5 and 1.234e3 may have."""
DOTTED = re.compile(r"[+-]?[1-9]\d{0,2}(\.\d{3})+")
"""One with points that may be between thousands."""
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
"""One with commas that may be between thousands."""
ENGLISH = re.compile(r"[+-]?\d{1,3}(,\d{3})+\.\d+")
UNIT = re.compile(r"[^\d\s.,+-]{1,4}\s*[+-]?[\d.,]*\d|[+-]?[\d.,]*\d\s*[^\d\s.,]{1,4}")
"""A number with a few other characters before or behind it: $12, 12 %, 3.5 kg."""
DECIMALS = {".": PLAIN, ",": GROUPED}
DISTINCT, SHARE = 20, 0.2
"""A column of more distinct numbers than the first is proposed for regression, if some have
fractions, or if the numbers are more than this share of the rows."""


@register
@dataclass(frozen=True)
class Number(TextTask):
    """Rows with a number, predicted by a linear layer on the text's last hidden state.

    Training standardises the numbers: ``mean`` and ``sd`` are those of the training rows unless
    given, and the head predicts how many standard deviations a number is from the mean. Predictions
    are in the unit of the rows. ``decimal`` is the decimal sign, "." or ",". ``text`` names one
    column or several.
    """

    text: str | tuple[str, ...] = "text"
    label: str = "label"
    decimal: str = "."
    prompt: str | None = None
    head: bool = True
    mean: float | None = None
    sd: float | None = None

    kind = "number"
    loss_unit = "half the squared error in standard deviations"
    outputs = "value"
    metric = "mae"

    def __post_init__(self) -> None:
        for holds, expected, found, hint in (
            (self.head, "a head, which numbers are predicted by", "head=False", "Leave it out."),
            (self.decimal in DECIMALS, "the decimal sign '.' or ','", repr(self.decimal),
             "For example --decimal ,"),
            (self.sd is None or self.sd > 0, "a standard deviation above 0", f"{self.sd}",
             "Leave it out."),
        ):  # fmt: skip
            if not holds:
                raise DomainError(where="number", expected=expected, found=found, hint=hint)

    @property
    def answer_column(self) -> str:
        return self.label

    @property
    def head_classes(self) -> int:
        return 1

    @property
    def score_keys(self) -> frozenset[str]:
        return frozenset({"value", "nll"})

    @property
    def scale(self) -> tuple[float, float] | None:
        return None if self.mean is None or self.sd is None else (self.mean, self.sd)

    def with_scale(self, scale: tuple[float, float] | None) -> Self:
        return self if self.scale is not None or scale is None else self._scaled_by(*scale)

    def _scaled_by(self, mean: float, sd: float) -> Self:
        """This task with ``mean`` and ``sd`` where they are not given."""
        given = self.mean, self.sd
        return replace(self, mean=mean if given[0] is None else given[0], sd=given[1] or sd)

    def fitted_to(self, examples: Sequence[Example]) -> Self:
        if self.scale is not None or not examples:
            return self
        values = [value for example in examples for value in example.truth]
        mean = sd = math.inf
        with suppress(OverflowError):  # of numbers near the largest
            mean = math.fsum(values) / len(values)
            sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
        if not 0 < sd < math.inf:
            raise DataError(
                where=f"{examples[0].place.rsplit(', ', 1)[0]}, column {self.label!r}",
                expected="numbers that differ",
                found="the same number in every training row" if sd == 0 else "a spread of "
                f"{sd}",
                hint="Name the column that holds the numbers.",
            )  # fmt: skip
        return self._scaled_by(mean, sd)

    @classmethod
    def from_cells(
        cls, rows: Sequence[Row], label: str, decimal: str | None = None
    ) -> tuple[Self, str] | None:
        """Where all cells that are not empty are numbers, and many of them are different.

        Without a ``decimal`` sign, commas are taken for one where one of them cannot stand between
        thousands.
        """
        cells = [] if decimal else [row.values.get(label) for row in rows]
        points = _have_points_between_thousands(cells)
        commas = points or any(map(_has_decimal_comma, cells)) or decimal == ","
        task, values = cls(label=label, decimal="," if commas else "."), []
        for row in rows:
            try:
                values.append(number_in(row, label, task.decimal))
            except EmptyCell:
                continue
            except DataError:
                return None
        distinct = len(set(values))
        whole = all(value.is_integer() for value in values)
        if distinct <= DISTINCT or (whole and distinct <= SHARE * len(values)):
            return None
        signs = ", with decimal commas" if commas and not points else ""
        signs = ", with points between thousands" if points else signs
        return task, f"{label} holds {distinct} different numbers in {len(values)} rows{signs}"

    def example(self, row: Row) -> Example:
        value = number_in(row, self.label, self.decimal)
        return replace(self.unlabelled(row), answer=f" {value:.15g}", truth=(value,))


def _has_decimal_comma(cell: Any) -> bool:
    """Whether a cell is a number whose comma cannot be one between thousands."""
    text = (plain_text(cell) or "").strip()
    return bool("," in text and GROUPED.fullmatch(text)) and not THOUSANDS.fullmatch(text)


def _have_points_between_thousands(cells: Sequence[object]) -> bool:
    """Whether all ``cells`` with a point have three digits behind each, and others, whole numbers
    below 1,000, are written without: 985 beside 1.015. With three decimals it would be 985.000."""
    texts = [str(cell).strip() for cell in cells if isinstance(cell, str)]
    pointed = [text for text in texts if "." in text]
    whole = [text for text in texts if text and "." not in text]
    return bool(pointed and whole) and all(map(DOTTED.fullmatch, pointed)) and all(
        re.fullmatch(r"[+-]?\d{1,3}", text) for text in whole
    )  # fmt: skip


def number_in(row: Row, column: str, decimal: str = ".") -> float:
    """The number in a cell, which may be text with this ``decimal`` sign.

    Raises EmptyCell for none, DataError for a text that is no number, and for NaN and infinity.
    """
    value: Any = row.values.get(column)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # a number of numpy
    text = text_of(row, column).strip() if plain_text(value) is not None else ""
    text = text.replace("\u2212", "-")  # the minus sign
    number, found, hint = math.nan, "something else", "Correct it or delete the row."
    if isinstance(value, bool):
        found, hint = "a truth value", "Use a classification, or write numbers."
    elif isinstance(value, numbers.Real | Decimal):
        with suppress(OverflowError, ValueError):  # a whole number of 400 digits, Decimal("sNaN")
            number = float(value)
            found = str(number)
    elif DECIMALS[decimal].fullmatch(text):
        # A point behind a digit stands between thousands.
        plain = re.sub(r"(?<=\d)\.", "", text).replace(",", ".") if decimal == "," else text
        number = float(plain)
        found = str(number)
    elif decimal == "." and "," in text and GROUPED.fullmatch(text):
        found = "a comma"
        hint = "Say that it is the decimal sign (--decimal ,), or remove it between thousands."
        if THOUSANDS.fullmatch(text):  # 1,489, rather than 12,5
            hint = "Remove it between thousands, or say that it is the decimal sign (--decimal ,)."
    elif decimal == "." and ENGLISH.fullmatch(text):
        hint = "Remove the commas between thousands."
    elif UNIT.fullmatch(text):
        hint = "Write the number without its unit."
    if not math.isfinite(number):
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="a finite number",
            found=found,
            hint=hint,
        )
    return number
