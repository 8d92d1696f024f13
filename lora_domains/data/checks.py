"""From rows as read to examples, checked against what the domain declares. No torch.

Bad rows of all files come in one error, with their places. No message quotes the text of a row: it
names the file, the line and the column.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from lora_domains.data.source import SHOWN, Data, file_of, runs
from lora_domains.errors import DataError, EmptyCell, UsageError, did_you_mean, listed
from lora_domains.tasks import (
    Example,
    Row,
    Task,
    merged,
    plain_text,
    shown,
    spellings,
    text_of,
    twins,
)
from lora_domains.tasks.messages import columns_beside

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
        values = function(dict(row.values))  # what it changes in place stays as read
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
    if task.answer_column is not None and task.answer_column in task.input_columns:
        raise UsageError(
            where=f"column {task.answer_column!r}",
            expected="a prompt without the column of the answer",
            found="the answer among the columns of the text",
            hint="Leave it out of --text, or name another --label.",
        )
    beside = columns_beside(task)
    if beside:  # of a column that no split has, the name is wrong
        beside &= {name for rows in given.values() for row in rows for name in row.values}
    for split, rows in given.items():
        named = [*task.columns, *([data.group] if data.group else [])]
        named = [name for name in named if name not in beside]
        needed = list(dict.fromkeys([*named, *(data.slices if split == scored else ())]))
        check_present(needed, rows)
    for column in data.slices:
        values = Counter(_slice(row, column) for row in given[scored])
        if len(values) > MOST_SLICES or len(values) > max(8, len(given[scored]) / 2):
            raise DataError(
                where=f"{file_of(given[scored][0].place)}, column {column!r}",
                expected=f"a slice column with at most {MOST_SLICES} values, each in several rows",
                found=f"{len(values)} values in {len(given[scored])} rows",
                hint="Slice by a column of categories; its values are printed in reports.",
            )


def check_present(needed: Sequence[str], rows: Sequence[Row]) -> None:
    """Raise DataError for a column that none of ``rows`` has."""
    present = list(dict.fromkeys(name for row in rows for name in row.values))
    for column in needed:
        if column not in present:
            raise _missing(column, needed, present, file_of(rows[0].place))


def _missing(column: str, needed: Sequence[str], present: Sequence[str], file: str) -> DataError:
    same = [name for name in present if name.strip().casefold() == column.casefold()]
    # If no needed name is present or close, the "names" may be a row: a table without a header.
    if same or get_close_matches(column, present) or any(name in present for name in needed):
        found = "columns " + listed(map(repr, present))
        hint = f"Did you mean {same[0]!r}?" if same else did_you_mean(column, present)
    else:
        count = f"{len(present)} columns" if len(present) > 1 else "1 column"
        found = f"{count}, none named in the domain"
        hint = "Is the first line a header? Use its column names (--text COLUMN, --label COLUMN)."
    return DataError(where=file, expected=f"the column {column!r}", found=found, hint=hint)


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


def with_labels(task: Task, given: Given) -> Task:
    """The task with its labels, from the rows that have one; ``to_examples`` reports the others.

    Raises DataError where there are too few rows or classes to train on.
    """
    rows = given.get("train") or given["test"]
    if task.has_labels:
        labelled = [row for row in rows if task.row_labels(row)]
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
            hint="Add rows" + (", or name the column that holds the labels." if classes else ".")
            + (" Free answers are --task generation, numbers --task number."
               if classes and 2 * len(classes) > rows >= FEWEST else ""),
        )  # fmt: skip


def _check_labels(task: Task, rows: Sequence[Row]) -> None:
    """Raise DataError where most labels are unknown: it is the wrong column, not to be quoted."""
    known, labels = {*(task.labels or ())}, _labels(task, rows)
    unknown = sum(label not in known for label in labels)
    if unknown > max(SHOWN, max(len(rows), len(labels)) / 2):
        raise DataError(
            where=f"{file_of(rows[0].place)}, column {task.answer_column!r}",
            expected="one of the labels " + listed(task.labels or ()),
            found=f"something else in {unknown} of {max(len(rows), len(labels))} "
            + ("rows" if task.outputs == "classes" else "labels"),
            hint="Name the column that holds the labels.",
        )


def check_order(task: Task, rows: Sequence[Row]) -> list[str]:
    """A warning where the first rows of a file seem to be sorted by label: others may follow.

    In random order, neighbours have different labels as often as two rows drawn at random. Raises
    DataError where the labels are to be learned from ``rows`` and there is one only.
    """
    one_each = task.has_labels and task.outputs == "classes"
    labels = _labels(task, rows) if one_each else []
    counts = Counter(labels)
    usual = len(labels) - sum(n * n for n in counts.values()) / max(1, len(labels))
    changes = sum(a != b for a, b in pairwise(labels))
    if not labels or (len(counts) > 1 and changes >= usual / 4):
        return []
    where = f"{file_of(rows[0].place)}, column {task.answer_column!r}"
    found = f"the label changes {changes} times in the first {len(rows)} rows"
    hint = "With --limit only these are read: shuffle the file, or leave --limit out."
    if len(counts) == 1 and task.labels is None and rows[0].split == "train":
        expected = "rows of at least two classes"
        raise DataError(where=where, expected=expected, found=found, hint=hint)
    return [f"{where}: {found}, about {usual:.0f} times if they were shuffled. They seem to be "
            f"sorted by label, so that classes are missing. {hint}"]  # fmt: skip


def check_spellings(task: Task, given: Given) -> None:
    """Raise DataError where labels differ only by case, accents, spaces or number form.

    Declared labels are distinct because the recipe says so.
    """
    rows = given.get("train") or given["test"]
    if not task.has_labels or task.labels is not None:
        return
    counts = Counter(_labels(task, rows))
    if pairs := twins(sorted(counts)):
        named = "; ".join(
            " and ".join(f"{name} ({counts[label]})" for label, name in _told_apart(pair))
            for pair in pairs[:8]
        )
        raise DataError(
            where=f"{file_of(rows[0].place)}, column {task.answer_column!r}",
            expected="labels that differ by more than case, accents, spaces or number form",
            found=named + (f"; and {len(pairs) - 8} more" if len(pairs) > 8 else ""),
            hint="Merge them with --merge-labels (Data(merge_labels=True)), correct the rows, or "
            "declare every class: --set 'task.labels=[…]' with the names as a JSON list, or "
            "labels=(…) in a recipe.",
        )


def _told_apart(labels: Sequence[str]) -> list[tuple[str, str]]:
    """Each label as a message shows it; those that look the same, by their code points."""
    same = len({unicodedata.normalize("NFC", label) for label in labels}) < len(labels)
    return [(label, ascii(label) if same else shown(label)) for label in labels]


def with_merged_labels(task: Task, given: Given) -> tuple[Given, str]:
    """The rows with one spelling for each label, and a note of what was merged.

    The spelling is that of the declared labels, or the most frequent one of the training rows.
    """
    if not task.has_labels or task.answer_column is None:
        return given, ""
    every = Counter(label for rows in given.values() for label in _labels(task, rows))
    if task.labels is not None:
        to = spellings(every, task.labels)
    else:
        first = Counter(_labels(task, given.get("train") or given["test"]))
        to = merged({label: first[label] for label in every})
    changed = {label: kept for label, kept in to.items() if label != kept}
    if not changed:
        return given, ""

    def spelled(row: Row) -> Row:
        return task.respelled(row, changed) if changed.keys() & {*task.row_labels(row)} else row

    note = listed(f"{shown(label)} → {shown(kept)} ({every[label]})" for label, kept in
                  changed.items())  # fmt: skip
    return {split: [spelled(row) for row in rows] for split, rows in given.items()}, note


def _labels(task: Task, rows: Iterable[Row]) -> list[str]:
    """The labels of the rows that have one."""
    return [label for row in rows for label in task.row_labels(row)]


# ── Examples ────────────────────────────────────────────────────────────────────────────────────


def to_examples(
    task: Task, data: Data, given: Given
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """The examples of each split, and the number of rows dropped for an empty cell.

    Raises one DataError for all bad rows of all files; with ``data.drop_empty`` those with an empty
    cell are dropped instead.
    """
    examples: dict[str, list[Example]] = {split: [] for split in given}
    errors: list[DataError] = []
    dropped: dict[str, int] = {}
    for split, rows in given.items():
        if task.has_labels:
            _check_labels(task, rows)
        known = [name for name in task.columns if any(name in row.values for row in rows)]
        for row in (_filled(row, known) for row in rows):
            try:
                group = text_of(row, data.group).strip() if data.group else None
                slices = {c: _slice(row, c) for c in data.slices}
                example = task.example(row)
                if group or slices:
                    example = replace(example, group=group, slices=slices)
                examples[split].append(example)
            except EmptyCell as error:
                if data.drop_empty:
                    dropped[split] = dropped.get(split, 0) + 1
                else:
                    errors.append(error)
            except DataError as error:
                errors.append(error)
    if errors:
        raise all_errors(errors)
    if empty := [split for split, rows in examples.items() if not rows]:
        raise DataError(
            where=empty[0],
            expected="at least one row without an empty cell",
            found=f"{dropped.get(empty[0], 0)} rows, each with one",
            hint="Name the columns of the text and the label, or fill the cells.",
        )
    return examples, dropped


def _filled(row: Row, known: Sequence[str]) -> Row:
    """``row`` with empty cells in the ``known`` columns that it lacks, as a record of JSON may."""
    lacks = dict.fromkeys(name for name in known if name not in row.values)
    return replace(row, values={**row.values, **lacks}) if lacks else row


def all_errors(errors: Sequence[DataError]) -> DataError:
    """One error for all of ``errors``; empty cells are listed by file, column and line."""
    if len(errors) == 1:
        return errors[0]
    empty = [error for error in errors if isinstance(error, EmptyCell)]
    others = [error for error in errors if not isinstance(error, EmptyCell)]
    found = _listed_cells(empty)
    found += [f"{error.where}: {error.found}" for error in others[:SHOWN]]
    found += [f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
    named = [*empty[:1], *others[:SHOWN]]
    kind = EmptyCell if not others else DataError
    return kind(
        where=f"{len(errors)} rows",
        expected="; ".join(dict.fromkeys(error.expected for error in named)),
        found="; ".join(found),
        hint=" ".join(dict.fromkeys(error.hint for error in named)),
    )


def _listed_cells(errors: Sequence[EmptyCell]) -> list[str]:
    """Where the empty cells are: ``train.csv, column 'text', 3 empty: line 4, 7–8``."""
    cells: dict[tuple[str, str, str], list[int]] = {}
    for error in errors:
        place, comma, column = error.where.rpartition(", column")  # or columns, whose cells agree
        file, _, at = place.rpartition(", ")
        word, _, number = at.rpartition(" ")
        key = file, f"{comma}{column}", word
        cells.setdefault(key, []).append(int(number) if number.isdigit() else 0)
    return [
        f"{file}{column}, {len(numbers)} {'alike' if column.startswith(', columns') else 'empty'}: "
        f"{word} {runs(numbers)}"
        for (file, column, word), numbers in cells.items()
    ]


def left_empty(task: Task, given: Given) -> list[str]:
    """Warnings for columns of the text that are empty in some rows, which do without them."""
    warnings, beside = [], columns_beside(task)
    for column in dict.fromkeys(name for name in task.input_columns if name not in beside):
        rows = [row for rows in given.values() for row in rows]
        texts = [plain_text(row.values.get(column)) for row in rows]  # None of a list
        empty = sum(text is not None and not text.strip() for text in texts)
        if empty and len(set(task.input_columns)) > 1:
            warnings.append(
                f"column {column!r} is empty in {empty} of {len(rows)} rows: their prompts do "
                "without it"
            )
    return warnings


def with_own_label(task: Task, rows: Sequence[Example]) -> list[str]:
    """A warning where nearly all texts contain their own label: the answer may be in the text."""
    if not task.has_labels or task.outputs != "classes" or not rows:
        return []
    own = {
        label: re.compile(rf"(?<!\w){re.escape(label.strip())}(?!\w)", re.IGNORECASE)
        for label in {row.answer for row in rows}
    }
    containing = sum(own[row.answer].search(row.text) is not None for row in rows)
    if containing < 0.9 * len(rows):
        return []
    return [f"{containing} of {len(rows)} training texts contain their own label: is it in the "
            "columns of the text?"]  # fmt: skip


def _slice(row: Row, column: str) -> str:
    text = plain_text(row.values.get(column))
    if text is None:
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="a category",
            found=f"a value of type {type(row.values.get(column)).__name__}",
            hint="Slice by a column of text or numbers.",
        )
    return text.strip() or "(missing)"
