"""Forms of a file of answers: tables of cells, JSON lines, Parquet, and lines to read. No torch."""

import codecs
import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol, Self

from lora_domains.atomic import new_file
from lora_domains.data.source import COMMAS, Dialect
from lora_domains.errors import UsageError
from lora_domains.tasks import Task, is_null


class Labelled(Protocol):
    """A predicted label, or several, with their probabilities."""

    @property
    def cells(self) -> Mapping[str, Any]: ...

    @property
    def record(self) -> dict[str, Any]: ...

    @property
    def line(self) -> tuple[str, str]: ...


Answer = Labelled | float | str
"""What is predicted of a text (``inference.predict``)."""
Answered = tuple[Mapping[str, Any], Answer | None]
"""The values of a row, and its answer; None where it has no text."""


# ── Forms ───────────────────────────────────────────────────────────────────────────────────────


class Lines:
    """An object a line: the row, the answer and the probability of each label."""

    suffix = ".jsonl"

    @property
    def record(self) -> dict[str, Any]:
        """What rows that are appended later have to share with the first ones."""
        return {}

    def begun(self, record: Mapping[str, Any]) -> Self:
        """This form for a file that was begun by one with ``record``."""
        return self

    def head(self) -> bytes:
        """The bytes before the first row."""
        return b""

    def rows(self, block: Iterable[Answered]) -> bytes:
        """The bytes of some rows."""
        return b"".join(_line({**_plain(values), **_record(answer)}) for values, answer in block)

    def finish(self, partial: Path, output: Path) -> None:
        """Make ``output`` of all rows."""
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, output)


class Cells(Lines):
    """A table of delimited cells: the columns of the rows, then those of the answers."""

    def __init__(
        self, columns: Sequence[str], answers: Sequence[str], dialect: Dialect = COMMAS
    ) -> None:
        self.columns, self.answers, self.dialect = columns, answers, dialect

    @property
    def record(self) -> dict[str, Any]:
        return asdict(self.dialect)

    def begun(self, record: Mapping[str, Any]) -> Self:
        return type(self)(self.columns, self.answers, Dialect(**record))

    def head(self) -> bytes:
        mark = codecs.BOM_UTF8 if self.dialect.mark else b""
        return mark + self._lines([[*self.columns, *self.answers]])

    def rows(self, block: Iterable[Answered]) -> bytes:
        return self._lines(
            [
                *[_cell(values.get(name)) for name in self.columns],
                *[self._figure(name, cells.get(name)) for name in self.answers],
            ]
            for values, answer in block
            for cells in [_cells(answer)]
        )

    def _lines(self, rows: Iterable[Sequence[str]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=self.dialect.delimiter, lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8", "replace")

    def _figure(self, name: str, cell: Any) -> str:
        """A cell of an answer: a text, a predicted number in six digits, or a probability."""
        if cell is None or isinstance(cell, str):
            return cell or ""
        figure = f"{cell:.6g}" if name == "prediction" else f"{cell:.6f}"
        return figure.replace(".", self.dialect.decimal)


class Columns(Lines):
    """Parquet. Its rows wait in an Arrow stream, since a Parquet file has its index at its end.

    ``types`` are those of the columns of the rows; where one has none, its values are text.
    """

    def __init__(self, types: Mapping[str, Any], answers: Sequence[str], numeric: bool) -> None:
        import pyarrow

        self.types = types
        fields = [(name, kind or pyarrow.string()) for name, kind in types.items()]
        for name in answers:
            text = name == "prediction" and not numeric
            fields.append((name, pyarrow.string() if text else pyarrow.float64()))
        self.answers, self.schema = answers, pyarrow.schema(fields)

    def head(self) -> bytes:
        return bytes(self.schema.serialize())

    def rows(self, block: Iterable[Answered]) -> bytes:
        import pyarrow

        rows = [(values, _cells(answer)) for values, answer in block]
        columns: list[list[Any]] = [
            [values.get(name) if kind is not None else _cell(values.get(name))
             for values, _ in rows]
            for name, kind in self.types.items()
        ]  # fmt: skip
        columns += [[cells.get(name) for _, cells in rows] for name in self.answers]
        arrays = [
            pyarrow.array([_valid(value) for value in column], field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        return bytes(pyarrow.record_batch(arrays, schema=self.schema).serialize())

    def finish(self, partial: Path, output: Path) -> None:
        import pyarrow.ipc
        from pyarrow import parquet

        with (
            partial.open("rb") as stream,
            pyarrow.ipc.open_stream(stream) as batches,
            new_file(output) as file,
            parquet.ParquetWriter(file, self.schema) as table,
        ):
            for group in _groups(batches, ROWS_OF_GROUP):
                table.write_table(pyarrow.Table.from_batches(group, self.schema))
        partial.unlink()


class Printed(Lines):
    """A line for each answer, to read: the label and its probability."""

    def rows(self, block: Iterable[Answered]) -> bytes:
        return "".join(_printed(answer) + "\n" for _, answer in block).encode()


ROWS_OF_GROUP = 16_384
"""Rows of a group of a Parquet file, which is held in memory."""


def _groups(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        group.append(batch)
        if sum(one.num_rows for one in group) >= size:
            yield group
            group = []
    if group:
        yield group


class Types:
    """The Arrow types of the columns of rows that are seen in blocks."""

    def __init__(self) -> None:
        self._seen: dict[str, set[Any]] = {}

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow

        for name in dict.fromkeys(name for row in rows for name in row):
            values = [None if is_null(row.get(name)) else row.get(name) for row in rows]
            try:
                kind = pyarrow.infer_type(values)
            except (pyarrow.ArrowException, OverflowError):
                kind = None  # values of several types
            self._seen.setdefault(name, set()).add(kind)

    def of(self, name: str) -> Any:
        """The type of all values of a column; None where they have none in common."""
        import pyarrow

        kinds = self._seen.get(name, set()) - {pyarrow.null()}
        if kinds == {pyarrow.int64(), pyarrow.float64()}:
            return pyarrow.float64()
        return next(iter(kinds)) if len(kinds) == 1 else None


class Decimals:
    """The decimal sign of the numbers in a table, whose rows are seen in blocks.

    A table of semicolons has a comma, as Excel has in the countries where it writes semicolons
    (it would read 0.912345 as 912345), unless more of its cells are numbers with a point.
    """

    def __init__(self) -> None:
        self._points = 0
        """How many more numbers have a point than a comma."""

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for values in rows:
            for value in values.values():
                if isinstance(value, str) and (found := _DECIMAL.fullmatch(value)):
                    self._points += 1 if found[1] == "." else -1

    def of(self, delimiter: str) -> str:
        return "," if delimiter == ";" and self._points <= 0 else "."


_DECIMAL = re.compile(r"\s*[+-]?\d+([.,])\d+\s*")


def dialect_for(suffix: str, dialect: Dialect) -> Dialect:
    """The dialect of a table that ends in ``suffix``, of rows that have ``dialect``."""
    return replace(dialect, delimiter="\t") if suffix == ".tsv" else dialect


FORMS = (".csv", ".tsv", ".jsonl", ".parquet")
"""The endings of a file of answers."""


def check_form(output: str) -> str:
    """The ending of a file of answers; raises UsageError for another one."""
    suffix = Path(output).suffix.lower()
    if suffix not in FORMS:
        raise UsageError(
            where=f"--output {output}",
            expected="a file ending in .csv, .tsv, .jsonl or .parquet, or - for the standard "
            "output",
            found=repr(suffix),
            hint="For example --output answers.csv",
        )
    return suffix


# ── Cells ───────────────────────────────────────────────────────────────────────────────────────


def answer_columns(tasks: Sequence[Task], suffix: str) -> list[str]:
    """The columns that answers have: a label's probability is that of any task with this label."""
    answered: dict[str, None] = {}
    for task in tasks:
        labels = (task.labels or ()) if task.head or task.outputs == "classes" else ()
        answered |= {f"probability_{label}": None for label in labels}
    one_of = any(task.own_choices or (task.outputs == "classes" and task.labels) for task in tasks)
    named = ["prediction", *(["probability"] if one_of else [])]
    return [*named, *(["probabilities"] if answered and suffix == ".jsonl" else answered)]


def _cells(answer: Answer | None) -> Mapping[str, Any]:
    """What a table holds of an answer, by column."""
    if answer is None or isinstance(answer, str | float):
        return {"prediction": answer}
    return answer.cells


def _record(answer: Answer | None) -> Mapping[str, Any]:
    if answer is None or isinstance(answer, str | float):
        return {"prediction": answer}
    return answer.record


def _cell(value: Any) -> str:
    """A value of a row in a table: "" for null, and JSON for a list or an object."""
    if is_null(value):
        return ""
    if isinstance(value, list | dict):
        return json.dumps(_plain(value), ensure_ascii=False, default=str)
    return str(value)


def _line(record: Mapping[str, Any]) -> bytes:
    line = json.dumps(record, ensure_ascii=False, default=str) + "\n"
    try:
        return line.encode("utf-8")
    except UnicodeEncodeError:  # half a character, which only an escape can write
        return (json.dumps(record, default=str) + "\n").encode("ascii")


def _valid(value: Any) -> Any:
    """``value`` for Arrow, which takes no half characters."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return None if is_null(value) else value


def _plain(value: Any) -> Any:
    """``value`` with null for what JSON has no form for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if is_null(value) or (isinstance(value, float) and math.isinf(value)) else value


def _printed(answer: Answer | None) -> str:
    """The answer on one line."""
    if answer is None:
        return ""
    if isinstance(answer, str | float):
        return _one_line(answer if isinstance(answer, str) else f"{answer:.6g}")
    named, chance = answer.line
    return f"{_one_line(named)}\t{chance}".rstrip("\t")


def _one_line(text: str) -> str:
    """``text`` with its line breaks written as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", r"\n")
