"""From rows as read to examples, checked against what the domain declares. No torch.

Bad rows of all files come in one error, with their places. No message quotes the text of a row: it
names the file, the line and the column.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from lora_domains.data.readers import SHOWN, file_of
from lora_domains.data.source import Data
from lora_domains.errors import DataError, UsageError, did_you_mean, listed
from lora_domains.tasks import Example, Row, Task, is_null, text_of

FEWEST = 8
"""The fewest rows to train on."""
MOST_SLICES = 50

Given = Mapping[str, Sequence[Row]]
"""The rows of each split that is given."""


def check_declared(data: Data) -> None:
    """Raise DataError without training and test rows, UsageError for a limit below 1."""
    if data.train is None and data.test is None:
        raise DataError(
            where="data",
            expected="training rows, or test rows alone for a probe",
            found="neither",
            hint="Give Data(train=…) or --train.",
        )
    if data.limit is not None and data.limit < 1:
        raise UsageError(
            where="limit", expected="at least 1 row", found=str(data.limit), hint="Leave it out."
        )


def mapped(row: Row, function: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Row:
    """``row`` through the recipe's row function. Raises DataError if that fails."""
    try:
        values = function(row.values)
    except Exception as error:  # whatever a recipe's function raises; its message may quote text
        raise DataError(
            where=row.place,
            expected="a row that the recipe's row function can read",
            found=type(error).__name__,
            hint="Check the columns it uses.",
        ) from None
    if not isinstance(values, Mapping):
        raise DataError(
            where=row.place,
            expected="a row from the recipe's row function, with named columns",
            found=type(values).__name__,
            hint='Return a dict: {**row, "text": …}.',
        )
    return replace(row, values=values)


# ── Columns ─────────────────────────────────────────────────────────────────────────────────────


def check_columns(task: Task, data: Data, given: Given) -> None:
    """Raise DataError where a split lacks a column, or a slice column holds no categories.

    Slice columns are needed in the rows that are scored.
    """
    scored = "test" if "test" in given else "train"
    for split, rows in given.items():
        named = [*task.columns, *([data.group] if data.group else [])]
        needed = list(dict.fromkeys([*named, *(data.slices if split == scored else ())]))
        present = list(dict.fromkeys(name for row in rows for name in row.values))
        for column in needed:
            if column not in present:
                raise _missing(column, needed, present, file_of(rows[0].place))
    for column in data.slices:
        values = Counter(str(row.values.get(column)) for row in given[scored])
        if len(values) > MOST_SLICES or len(values) > max(8, len(given[scored]) / 2):
            raise DataError(
                where=f"{file_of(given[scored][0].place)}, column {column!r}",
                expected=f"a slice column with at most {MOST_SLICES} values, each in several rows",
                found=f"{len(values)} values in {len(given[scored])} rows",
                hint="Slice by a column of categories; its values are printed in reports.",
            )


def _missing(column: str, needed: Sequence[str], present: Sequence[str], file: str) -> DataError:
    same = [name for name in present if name.strip().casefold() == column.casefold()]
    # If no needed name is present or close, the "names" may be a row: a table without a header.
    if same or get_close_matches(column, present) or any(name in present for name in needed):
        found = "columns " + listed(present)
        hint = f"Did you mean {same[0]!r}?" if same else did_you_mean(column, present)
    else:
        found = f"{len(present)} columns, none of them named in the domain"
        hint = "Is the first line a header? Use its column names."
    return DataError(where=file, expected=f"the column {column!r}", found=found, hint=hint)


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


def with_labels(task: Task, given: Given) -> Task:
    """The task with its labels, from the rows that have one; ``to_examples`` reports the others.

    Raises DataError where there are too few rows or classes to train on.
    """
    rows = given.get("train") or given["test"]
    if task.has_labels:
        labelled = [row for row in rows if _labels(task, [row])]
        classes = Counter(_labels(task, labelled))
        # A single class is left to with_labels, which names it.
        if "train" in given and (len(classes) != 1 or task.labels):
            check_enough(rows[0].place, len(rows), classes)
        return task.with_labels(labelled or rows)
    if "train" in given:
        check_enough(rows[0].place, len(rows), None)
    return task


def check_enough(place: str, rows: int, classes: Counter[str] | None) -> None:
    """Raise DataError for too few training rows.

    There must be ``FEWEST`` rows and, with labels, at least two classes with two rows, and two rows
    of a class on average; a class with one row is left to a warning. The error names no label: the
    column may hold text by mistake.
    """
    usual = [label for label, n in (classes or {}).items() if n > 1]
    if rows < FEWEST or (classes and (len(usual) < 2 or 2 * len(classes) > rows)):
        sizes = f", {len(classes)} classes, {len(usual)} with 2 or more" if classes else ""
        raise DataError(
            where=file_of(place),
            expected=f"at least {FEWEST} training rows"
            + (", and 2 rows of each of at least 2 classes" if classes else ""),
            found=f"{rows} rows{sizes}",
            hint="Add rows" + (", or name the column that holds the labels." if classes else "."),
        )


def _check_labels(task: Task, rows: Sequence[Row]) -> None:
    """Raise DataError where most labels are unknown: it is the wrong column, not to be quoted."""
    unknown = sum(label not in (task.labels or ()) for label in _labels(task, rows))
    if unknown > max(SHOWN, len(rows) / 2):
        raise DataError(
            where=f"{file_of(rows[0].place)}, column {task.answer_column!r}",
            expected="one of the labels " + listed(task.labels or ()),
            found=f"something else in {unknown} of {len(rows)} rows",
            hint="Name the column that holds the labels.",
        )


def _labels(task: Task, rows: Iterable[Row]) -> list[str]:
    """The labels of the rows that have one."""
    values = (row.values.get(task.answer_column or "") for row in rows)
    return [label for value in values if not is_null(value) and (label := str(value).strip())]


# ── Examples ────────────────────────────────────────────────────────────────────────────────────


def to_examples(task: Task, data: Data, given: Given) -> dict[str, list[Example]]:
    """The examples of each split; raises one DataError for all bad rows of all files."""
    examples: dict[str, list[Example]] = {split: [] for split in given}
    errors: list[DataError] = []
    for split, rows in given.items():
        if task.has_labels:
            _check_labels(task, rows)
        for row in rows:
            try:
                group = text_of(row, data.group).strip() if data.group else None
                slices = {c: _slice(row.values.get(c)) for c in data.slices}
                examples[split].append(replace(task.example(row), group=group, slices=slices))
            except DataError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        first = errors[:SHOWN]
        raise DataError(
            where=f"{len(errors)} rows",
            expected="; ".join(dict.fromkeys(error.expected for error in first)),
            found="; ".join(f"{e.where}: {e.found}" for e in first)
            + (f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""),
            hint=" ".join(dict.fromkeys(error.hint for error in first)),
        )
    return examples


def _slice(value: object) -> str:
    text = "" if is_null(value) else str(value).strip()
    return text or "(missing)"
