"""Rows in JSON, in columns (Parquet, the Arrow files of ``save_to_disk``), and in workbooks."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, BinaryIO

from lora_domains.data.delimited import decode
from lora_domains.data.source import (
    File,
    Located,
    Table,
    class_name,
    first_rows,
    places,
    stored_classes,
)
from lora_domains.errors import DataError, check_installed, listed
from lora_domains.tasks.messages import CONVERSATIONS, are_messages

BATCH = 10_000
"""Rows of columns that are read at once."""
CHUNK = 1 << 20
"""Bytes of a JSON list that are read at once."""
ABOUT_ROWS = ("dataset_info.json", "dataset_infos.json")
"""Files that describe the files of rows beside them."""
BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)
"""A string, which may have brackets in it and lack its end, or a bracket."""

ARROW_FILE = b"ARROW1"
"""The first bytes of an Arrow file; a stream has none of its own."""

# ── JSON ────────────────────────────────────────────────────────────────────────────────────────


def first_objects(stream: BinaryIO, most: int) -> bytes:
    """The JSON of the first ``most`` rows, if they are a list or lines; else all of ``stream``."""
    start = stream.read(64).removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    stream.seek(0)
    if start == b"[":
        return _first_of_list(stream, most)
    try:
        lines = isinstance(json.loads(stream.readline()), Mapping)
    except (ValueError, RecursionError):
        lines = False
    stream.seek(0)
    return first_rows(stream, most) if lines else stream.read()


def _first_of_list(stream: BinaryIO, most: int) -> bytes:
    """A list of the first ``most`` objects of the list in ``stream``."""
    raw = b""
    while chunk := stream.read(max(CHUNK, len(raw))):
        raw += chunk
        depth = objects = 0
        for bracket in BRACKETS.finditer(raw):
            depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(bracket[0], 0)
            objects += depth == 1 and bracket[0] == b"}"
            if objects == most:
                return raw[: bracket.end()] + b"]"
    return raw


def read_json(file: File) -> Table:
    """The rows of a ``.json`` file; JSON lines are read as such."""
    text, notes = decode(file)
    rows, found = _whole(file, text)
    if found and "\n" in text.strip():
        lines, broken = _lines(file, text)
        if not broken and all(isinstance(row, Mapping) for _, row in lines):
            return Table(lines, [*notes, "one object on each line"])
    if isinstance(rows, Mapping) and any(are_messages(rows.get(name)) for name in CONVERSATIONS):
        rows = [rows]  # one conversation
    elif isinstance(rows, Mapping):
        rows, key = _list_in(rows)
        notes += [f"the list under {key!r}"] if key else []
    if not isinstance(rows, list):
        raise DataError(
            where=str(file.path),
            expected='a JSON list of objects, {"data": [objects]}, or one object on each line',
            found=found or f"a JSON {'dict' if isinstance(rows, Mapping) else type(rows).__name__}",
            hint="It describes files of rows: name one of them."
            if file.path.name in ABOUT_ROWS
            else 'Write a list of rows (in pandas orient="records"), or one object on each line '
            "of a file named .jsonl.",
        )
    return Table(list(enumerate(rows)), notes)


def read_json_lines(file: File) -> Table:
    """The rows of a ``.jsonl`` file; a JSON list is read as such."""
    text, notes = decode(file)
    rows, broken = _lines(file, text)
    if broken or (len(rows) == 1 and isinstance(rows[0][1], list)):
        whole, _ = _whole(file, text)
        if isinstance(whole, list) and all(isinstance(row, Mapping) for row in whole):
            return Table(list(enumerate(whole)), [*notes, "a JSON list"])
    if broken:
        raise DataError(
            where=str(file.path),
            expected="one JSON object on each line",
            found=places(broken, "line"),
            hint="Name a table .csv, and a JSON list of objects .json.",
        )
    return Table(rows, notes)


class Repeated(ValueError):
    """A JSON object has a key more than once: which value is meant?"""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values; raises Repeated."""
    values = dict(pairs)
    if len(values) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise Repeated(repr(next(key for key in counts if counts[key] > 1)))
    return values


STRICT = json.JSONDecoder(object_pairs_hook=_once)
"""Decodes JSON whose objects have each key once."""


def _repeated(file: File, found: list[str]) -> DataError:
    return DataError(
        where=str(file.path),
        expected="objects with each key once",
        found=places(found, "object"),
        hint="Rename or remove one of them: only the last value would be read.",
    )


def _lines(file: File, text: str) -> tuple[list[Located], list[str]]:
    """(rows, what is wrong with each line that is none); raises DataError for repeated keys."""
    rows: list[Located] = []
    broken: list[str] = []
    repeated: list[str] = []
    # Not splitlines(): a JSON string may contain U+2028 and similar characters.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append((f"line {number}", STRICT.decode(line)))
        except json.JSONDecodeError as error:
            broken.append(f"line {number}, character {error.colno}: {error.msg}")
        except Repeated as error:
            repeated.append(f"line {number}, the key {error}")
        except (ValueError, RecursionError):
            broken.append(f"line {number}: too long a number, or nested too deeply")
    if repeated and not broken:
        raise _repeated(file, repeated)
    return rows, broken


def _whole(file: File, text: str) -> tuple[Any, str]:
    """(the value, what is wrong with the text); raises DataError for repeated keys."""
    try:
        return STRICT.decode(text), ""
    except Repeated as error:
        raise _repeated(file, [f"the key {error}"]) from None
    except json.JSONDecodeError as error:
        return None, f"line {error.lineno}, character {error.colno}: {error.msg}"
    except (ValueError, RecursionError):
        return None, "too long a number, or nested too deeply"


def _list_in(value: Mapping[str, Any]) -> tuple[Any, str]:
    """The list of objects in ``value`` and its key: ``data``, or the only one; else ``value``."""
    lists = [
        key
        for key, part in value.items()
        if isinstance(part, list) and part and all(isinstance(row, Mapping) for row in part)
    ]
    key = "data" if "data" in lists else lists[0] if len(lists) == 1 else ""
    return (value[key], key) if key else (value, "")


# ── Columns ─────────────────────────────────────────────────────────────────────────────────────


def read_parquet(file: File) -> Table:
    """The rows of a Parquet file, with the names of ``datasets`` class labels."""
    return _in_one(file, parquet_blocks(file))


def parquet_blocks(file: File) -> Iterator[list[dict[str, Any]]]:
    """The rows of ``read_parquet``, ``BATCH`` at once."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.stream, buffer_size=CHUNK)
        batches = table.iter_batches(min(BATCH, file.reading.most or BATCH))
        yield from _rows(file, table.schema_arrow, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "a Parquet file", error, "table.to_parquet(…)") from None


def read_arrow(file: File) -> Table:
    """The rows of an Arrow stream, as ``datasets`` saves them, or of an Arrow file (Feather)."""
    return _in_one(file, arrow_blocks(file))


def arrow_blocks(file: File) -> Iterator[list[dict[str, Any]]]:
    """The rows of ``read_arrow``, in the batches in which they were written."""
    import pyarrow
    import pyarrow.ipc

    whole = file.stream.read(len(ARROW_FILE)) == ARROW_FILE
    file.stream.seek(0)
    try:
        if whole:
            with pyarrow.ipc.open_file(file.stream) as table:
                parts = (table.get_batch(n) for n in range(table.num_record_batches))
                yield from _rows(file, table.schema, parts)
        else:
            with pyarrow.ipc.open_stream(file.stream) as stream:
                yield from _rows(file, stream.schema, stream)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "an Arrow stream or file", error, "table.to_feather(…)") from None


def _in_one(file: File, blocks: Iterable[list[dict[str, Any]]]) -> Table:
    """The rows of ``blocks``, as many as are to be read."""
    rows: list[Located] = []
    for block in blocks:
        rows += enumerate(block, len(rows))
        if file.reading.most is not None and len(rows) >= file.reading.most:
            return Table(rows[: file.reading.most])
    return Table(rows)


def _unreadable(file: File, what: str, error: Exception, write: str) -> DataError:
    return DataError(
        where=str(file.path),
        expected=what,
        found=f"a file that pyarrow cannot read ({type(error).__name__})",
        hint=f"Write it again: {write}.",
    )


def _rows(file: File, schema: Any, batches: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each batch. Raises DataError for a column whose text is not UTF-8."""
    _check_names(file, schema.names)
    classes = stored_classes(schema.metadata)
    parts = (b.slice(at, BATCH) for b in batches for at in range(0, b.num_rows, BATCH))
    for part in parts:
        columns: dict[str, list[Any]] = {}
        for name, column in zip(schema.names, part.columns, strict=True):
            try:
                values = column.to_pylist()
            except UnicodeDecodeError:
                raise DataError(
                    where=f"{file.path}, column {name!r}",
                    expected="text in UTF-8",
                    found="bytes in another encoding",
                    hint="Write the table again from text that was decoded.",
                ) from None
            columns[name] = (
                [class_name(value, classes[name]) for value in values]
                if name in classes
                else values
            )
        cells = zip(*columns.values(), strict=True)
        yield [dict(zip(columns, row, strict=True)) for row in cells]


def _check_names(file: File, names: Sequence[str]) -> None:
    """Raise DataError for two columns of one name."""
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(
            where=str(file.path),
            expected="columns of distinct names",
            found=f"{listed(map(repr, repeated))} more than once",
            hint="Rename the columns.",
        )


def read_workbook(file: File) -> Table:
    """The rows of the first sheet that has any; its first row is the header."""
    check_installed(str(file.path), "openpyxl, which reads workbooks", "excel", ["openpyxl"],
                    instead="save the sheet as CSV")  # fmt: skip
    import openpyxl

    most = file.reading.most
    try:
        book = openpyxl.load_workbook(file.stream, read_only=True, data_only=True)
        sheets = {sheet.title: _first_filled(sheet) for sheet in book.worksheets}
        filled = {name: part for name, part in sheets.items() if part is not None}
        title = next(iter(filled), "")
        rows = list(islice(filled.get(title, ()), most and most + 1))
    except Exception as error:  # zip, XML and openpyxl's own errors
        raise DataError(
            where=str(file.path),
            expected="an Excel workbook (.xlsx)",
            found=f"a file that openpyxl cannot read ({type(error).__name__})",
            hint="Save it again as .xlsx without a password, or as CSV.",
        ) from None
    if not rows:
        raise DataError(
            where=str(file.path), expected="rows", found="empty sheets", hint="Check the export."
        )
    if len(filled) == 1:
        return Table(_under_header(file, title, rows))
    # Another sheet may have been meant: every message names this one.
    found = _under_header(file, title, rows)
    located: list[Located] = [(f"sheet {title!r}, {at}", row) for at, row in found]
    return Table(located, [f"sheet {title!r}, the first of {len(filled)}"])


Filled = tuple[int, tuple[Any, ...]]
"""The number of a row in its sheet, and its cells."""


def _first_filled(sheet: Any) -> Iterator[Filled] | None:
    """The rows of ``sheet`` with a value, read as they are taken; None if there are none."""
    rows = ((n, row) for n, row in enumerate(sheet.iter_rows(values_only=True), 1)
            if any(cell is not None for cell in row))  # fmt: skip
    first = next(rows, None)
    return None if first is None else chain([first], rows)


def _under_header(file: File, title: str, rows: list[Filled]) -> list[Located]:
    (_, head), *rest = rows
    names = ["" if cell is None else str(cell).strip() for cell in head]
    kept = [name for name in names if name]
    if len(set(kept)) < len(kept) or not rest:
        raise DataError(
            where=f"{file.path}, sheet {title!r}",
            expected="a header of distinct names, and rows under it",
            found="a name more than once" if rest else "only the header: no rows",
            hint="Rename the columns." if rest else "Check the export.",
        )
    return [
        (f"row {n}", {name: value for name, value in zip(names, row, strict=False) if name})
        for n, row in rest
    ]
