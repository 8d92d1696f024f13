"""Several labels for a row, or none: topics of a text, findings in a report."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

from lora_domains.errors import DataError, DomainError, EmptyCell, did_you_mean, listed
from lora_domains.tasks.base import ScoredBy, register
from lora_domains.tasks.classification import MOST_NAMED, TextTask, spellings
from lora_domains.tasks.number import GROUPED, THOUSANDS
from lora_domains.tasks.rows import (
    Example,
    Row,
    check_encodable,
    is_null,
    parsed,
    plain_text,
    shown,
    text_of,
)

SEPARATORS = (";", "|", ",")
"""What is looked for between the labels of a cell. A comma may also be part of a single label."""
NONE = "none"
"""The answer to a text without a label, where labels are answered as text."""


@register
@dataclass(frozen=True)
class MultiLabel(TextTask):
    """Rows with any number of labels; the cell of a row without one is empty.

    With ``head`` a linear layer gives the log-odds of each label for itself, from the text's last
    hidden state: every label has a probability, and one pass over the text gives all of them. A
    label is predicted from a probability of one half, or with ``tune_thresholds`` from one that is
    chosen for it on validation rows. Without a head the labels are the answer to the prompt, in the
    order of ``labels`` and joined by the separator: one generated text instead of a yes-or-no
    question for each label, which would read the text as often as there are labels. It has no
    probabilities.

    A cell holds the labels joined by ``separator``, a list, or the JSON of a list. A separator with
    spaces on both sides (" - ") stands only between spaces: "x-ray" is one label. ``labels`` is
    read from the training rows unless given. ``text`` names one column or several. ``chat`` and
    ``instruction`` are those of a classification.
    """

    text: str | tuple[str, ...] = "text"
    label: str = "labels"
    labels: tuple[str, ...] | None = None
    separator: str = ";"
    prompt: str | None = None
    head: bool = False
    tune_thresholds: bool = False
    max_new_tokens: int = 64
    chat: bool | None = None
    instruction: str | None = None

    kind = "multi_label"
    loss_unit = "label cross-entropy"
    outputs = "labels"
    has_labels = True
    metric = "micro_f1"

    def __post_init__(self) -> None:
        for holds, expected, found, hint in (
            (self.separator.strip(), "a separator of labels", repr(self.separator), "Use ';'."),
            (not (self.head and (self.chat or self.instruction)),
             "a head, which reads the text alone, or a chat template", "both",
             "Leave out head=True (--head), or chat=True and the instruction."),
        ):  # fmt: skip
            if not holds:
                raise DomainError(where="multi-label", expected=expected, found=found, hint=hint)

    @classmethod
    def from_cells(cls, rows: Sequence[Row], label: str) -> tuple[Self, str] | None:
        """Where cells are lists, or texts whose parts occur in several cells."""
        cells = [row.values[label] for row in rows if not is_null(row.values.get(label))]
        if 2 * sum(map(_is_list, cells)) >= max(1, len(cells)):
            return cls(label=label), f"{label} holds lists"
        texts = [text for cell in cells if (text := (plain_text(cell) or "").strip())]
        for separator in SEPARATORS:
            if _separates(separator, texts):
                why = f"{label} holds several labels, separated by {separator!r}"
                return cls(label=label, separator=separator), why
        return None

    # ── Columns and prompt ──────────────────────────────────────────────────────────────────────

    @property
    def answer_column(self) -> str:
        return self.label

    @property
    def scored_by(self) -> ScoredBy:
        return "choices" if self.head else "text"

    @property
    def score_keys(self) -> frozenset[str]:
        if self.head:
            return frozenset({"predicted", "probabilities", "confidence", "nll", "brier"})
        return frozenset({"predicted", "nats", "tokens"})

    @property
    def tuned(self) -> bool:
        return self.tune_thresholds

    @cached_property
    def question(self) -> str:
        """The instruction that names the labels."""
        labels = self.labels or ()
        named = f" of {', '.join(labels)}" if 0 < len(labels) <= MOST_NAMED else ""
        return (
            f"Which{named} apply to the text below? Answer with these labels, separated by "
            f"{self.separator!r}, or with {NONE!r}."
        )

    # ── Labels ──────────────────────────────────────────────────────────────────────────────────

    def row_labels(self, row: Row) -> tuple[str, ...]:
        try:
            return labels_in(row, self.label, self.separator)
        except DataError:
            return ()

    def respelled(self, row: Row, spelling: Mapping[str, str]) -> Row:
        labels = [spelling.get(label, label) for label in self.row_labels(row)]
        return replace(row, values={**row.values, self.label: labels})

    def joined(self, labels: Sequence[str]) -> str:
        cell = self.separator.join(labels)
        if _parts(cell, self.separator) == list(labels):
            return cell
        return json.dumps(labels, ensure_ascii=False)

    def with_labels(self, rows: Sequence[Row]) -> Self:
        """This task with its labels known. Raises DataError for fewer than two."""
        labels = self.labels
        if labels is None:
            labels = tuple(sorted({label for row in rows for label in self.row_labels(row)}))
        where = f"{rows[0].place.rsplit(', ', 1)[0]}, column {self.label!r}" if rows else self.label
        if len(labels) < 2:
            for row in rows:
                with suppress(EmptyCell):
                    labels_in(row, self.label, self.separator)  # raises where none can be read
            raise DataError(
                where=where,
                expected="at least two labels",
                found=f"only {listed(map(shown, labels))}" if labels else "none",
                hint=f"Name the column that holds the labels, separated by {self.separator!r} "
                "(--separator), or use a classification for one label.",
            )
        if self.tune_thresholds and not self.head:
            raise DomainError(
                where="multi-label",
                expected="a head, whose probabilities have thresholds",
                found="tune_thresholds without one",
                hint="Give head=True (--head), or leave --tune-thresholds out.",
            )
        joined = [
            one
            for one in labels
            if one.casefold() == NONE or separated(one, self.separator) != [one]
        ]
        if joined and not self.head:
            raise DataError(
                where=where,
                expected=f"labels other than {NONE!r} and without {self.separator!r}, since they "
                "are answered as text",
                found=listed(map(shown, joined)),
                hint="Use a head (--head), or rename them.",
            )
        return replace(self, labels=labels)

    def with_default_labels(self, labels: tuple[str, ...] | None) -> Self:
        return replace(self, labels=labels) if self.labels is None and labels else self

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels or ())}

    # ── Examples ────────────────────────────────────────────────────────────────────────────────

    def example(self, row: Row) -> Example:
        labels = labels_in(row, self.label, self.separator)
        known = self.labels or ()
        for label in labels:
            if label not in self._numbers:
                raise DataError(
                    where=f"{row.place}, column {self.label!r}",
                    expected="labels among " + listed(known),
                    found=shown(label),
                    hint=did_you_mean(label, known),
                )
        named = [label for label in known if label in labels]
        truth = tuple(int(label in labels) for label in known)
        answer = f"{self.separator.rstrip()} ".join(named) or NONE
        return replace(self.unlabelled(row), answer=f" {answer}", truth=truth)

    def score_text(self, text: str, reference: str) -> dict[str, Any]:
        """``predicted``: 1 or 0 for each label, as the first line of ``text`` names them."""
        return {"predicted": self.named_in(self.answer_in(text))}

    def named_in(self, text: str) -> list[int]:
        """1 for each label that the first line of ``text`` names, else 0; what is no label counts
        for nothing."""
        known = self.labels or ()
        line = text.strip().split("\n")[0]
        ends = line, line.rstrip(" .!")  # a sentence may end with them, and so may a label
        parts = [part for one in ends for part in separated(one, self.separator)]
        named = {*spellings(parts, known).values()}
        return [int(label in named) for label in known]


def labels_in(row: Row, column: str, separator: str) -> tuple[str, ...]:
    """The labels in a cell, each once, in order: a list, the JSON of one, or a joined text.

    A cell that is empty, or an empty list, says that the row has none. Raises EmptyCell for a
    missing cell (null), DataError for a missing column or a cell of another form.
    """
    if column not in row.values:
        text_of(row, column)  # raises
    value, where = row.values[column], f"{row.place}, column {column!r}"
    if is_null(value):
        raise EmptyCell(
            where=where,
            expected="labels, or an empty text or list for none",
            found="null",
            hint="Write '' or [] where no label applies, or delete the row (--drop-empty).",
        )
    parts = _parts(value, separator)
    texts = None if parts is None else [plain_text(part) for part in parts]
    if texts is None or not all(isinstance(part, str) and part.strip() for part in texts):
        raise DataError(
            where=where,
            expected=f"labels separated by {separator!r}, or a list of them",
            found="a list with something else in it" if texts else type(value).__name__,
            hint=f'Write "a{separator}b" or ["a", "b"].',
        )
    labels = tuple(dict.fromkeys(text.strip() for text in texts if text))
    for label in labels:
        check_encodable(label, where)
    return labels


def _separates(separator: str, texts: Sequence[str]) -> bool:
    """Whether labels are joined by ``separator`` in several of ``texts``, and recur.

    A few such texts are enough where each of their labels is a text of its own too. A comma
    ("Portland, Oregon", "3,5") must have labels behind it that begin other texts, or are ones.
    """
    cells = [separated(text, separator) for text in texts]
    joined = [parts for parts in cells if len(parts) > 1]
    alone = {parts[0] for parts in cells if len(parts) == 1}
    known = all(part in alone for parts in joined for part in parts)
    counts = Counter(part for parts in cells for part in parts)
    rare = sum(count == 1 for count in counts.values())
    enough = len(joined) >= (2 if known else max(2, len(texts) / 20))
    if not enough or 4 * rare > len(counts):
        return False
    first, later = {parts[0] for parts in cells}, {part for parts in cells for part in parts[1:]}
    with_commas = (text for text in texts if "," in text)
    numbers = all(GROUPED.fullmatch(text) or THOUSANDS.fullmatch(text) for text in with_commas)
    return separator != "," or (2 * len(later & first) >= len(later) and not numbers)


def _is_list(value: Any) -> bool:
    parts = _parts(value, ";") if isinstance(value, list | tuple | str) else None
    return parts is not None and not (isinstance(value, str) and not value.strip().startswith("["))


def _parts(value: Any, separator: str) -> list[Any] | None:
    """The entries of a cell; None where it is neither a text nor a list."""
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "ndarray":
        return sorted(value, key=str) if isinstance(value, set | frozenset) else list(value)
    text = plain_text(value)
    if text is None:
        return None
    if text.strip()[:1] == "[" and isinstance(entries := parsed(text), list):
        return entries
    return [part for part in separated(text, separator) if part]


def separated(text: str, separator: str) -> list[str]:
    """What stands before, between and behind the separators in ``text``, without spaces around it.

    One with spaces on both sides stands between spaces, or at an end of the text.
    """
    bare = separator.strip()
    if separator[0].isspace() and separator[-1].isspace():
        parts = re.split(rf"(?<!\S){re.escape(bare)}(?!\S)", text)
    else:
        parts = text.split(bare)
    return [part.strip() for part in parts]
