"""The rows of a source in blocks, so that memory does not grow with their number. No torch.

They are what ``data.readers.read`` gives. Lines (CSV, TSV, JSON lines, text) and columns (Parquet,
Arrow) are read in blocks. Other forms are read at once, and so is a table whose rows do not fit its
header, or whose quotes may be text: all of it decides what is wrong, or how it is meant.
"""

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lora_domains.data.delimited import (
    DETECTED_BYTES,
    MARKS,
    NAMES,
    Parsed,
    Record,
    chosen,
    declared_delimiter,
    decodes,
    guess_encoding,
    mostly_utf8,
    records,
)
from lora_domains.data.readers import (
    READERS,
    RowsRead,
    files_in,
    numbered,
    opened,
    read_noted,
)
from lora_domains.data.source import (
    DETECTED,
    Dialect,
    File,
    Located,
    Reading,
    Source,
    check_kind,
)
from lora_domains.data.structured import STRICT, arrow_blocks, parquet_blocks, read_workbook

ROWS = 4096
"""Rows of a block at most."""
BEGINNING = 1 << 16
"""Bytes from which the form of a stream is detected."""
MOST_VALUES, MOST_SPANS = 1000, 1000
"""Values that the cells of a column repeat, and quoted rows that could be several, at most: where
there are more, a table is read at once."""

WORKBOOKS = [suffix for suffix, read in READERS.items() if read is read_workbook]


class Blocks(NamedTuple):
    """Notes on what was detected, and the rows."""

    notes: list[str]
    rows: Iterator[list[Located]]
    delimiter: str = ","


def read_blocks(source: Source, split: str, reading: Reading = DETECTED) -> Iterator[RowsRead]:
    """The rows of ``source`` in order, in blocks, the first with notes of what was detected.

    Raises DataError where ``read`` raises it.
    """
    named = isinstance(source, str) and source.startswith(("embedded:", "hub:"))
    if named or not isinstance(source, str | Path):
        yield read_noted(source, split, reading)
        return
    path, number = Path(source).expanduser(), 0
    files = files_in(path, split) if path.is_dir() else [path]
    notes = [f"{len(files)} files"] if len(files) > 1 else []
    for file in files:
        with opened(file, str(source)) as stream:
            found_file = File(file, b"", reading, stream)
            for noted, rows, dialect in _blocks(found_file, found_file.suffix):
                found = numbered(file.name, split, rows, str(file), number)
                number += len(found)
                yield RowsRead(found, (*notes, *noted), dialect=dialect)
                notes = []


def read_stream(
    stream: BinaryIO, split: str, columns: Sequence[str], reading: Reading = DETECTED
) -> Iterator[RowsRead]:
    """The rows of a seekable stream in blocks: of JSON, of a table with ``columns``, or of lines.

    Raises DataError for rows that cannot be read.
    """
    file, number = File(Path("standard input"), b"", reading, stream), 0
    form, note = _form(file, columns)
    notes = [note] if note else []
    for noted, rows, dialect in _blocks(file, form):
        if form == ".txt":
            rows = [(at, {columns[0]: row["text"]}) for at, row in rows]
        found = numbered(file.path.name, split, rows, start=number)
        number += len(found)
        yield RowsRead(found, (*notes, *noted), dialect=dialect)
        notes = []


def _form(file: File, columns: Sequence[str]) -> tuple[str, str]:
    """(the suffix of the form of a stream, a note of it)."""
    file.stream.seek(0)
    raw = file.stream.read(BEGINNING)
    if raw.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"["):
        return (".json", "JSON") if _is_json(raw, file.stream) else (".txt", "")
    mark = next((mark for mark in MARKS if raw.startswith(mark)), b"")
    text = raw.decode(MARKS.get(mark, "cp1252" if b"\0" not in raw else "utf-16"), "replace")
    text = text.removeprefix("\ufeff").removeprefix("ï»¿")
    lines = text.lstrip().splitlines(keepends=True)
    lines = lines[declared_delimiter(text)[0] :]
    delimiters = [file.reading.delimiter] if file.reading.delimiter else list(NAMES)
    headers = [next(csv.reader(lines, delimiter=one), []) for one in delimiters]
    if any({*columns} <= {cell.strip() for cell in header} for header in headers):
        return ".csv", "a table with a header"
    if len({*columns}) > 1:
        return ".csv", ""  # lines hold one text each: let the missing column be named
    return ".txt", ""


def _is_json(raw: bytes, rest: BinaryIO) -> bool:
    """Whether ``raw``, which goes on in ``rest``, begins with an object, or a list of them."""
    for more in (b"", rest.read()):
        text = (raw + more).decode("utf-8-sig", "replace").lstrip()
        try:
            value, _ = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            continue
        return isinstance(value[0] if isinstance(value, list) and value else value, Mapping)
    return False


def _blocks(file: File, form: str) -> Iterator[tuple[list[str], list[Located], Dialect]]:
    """Notes and rows of each block of a file of ``form``, and the dialect of a table of answers.

    That has the delimiter of a ``.csv``, and a byte order mark where the file has one, is not UTF-8
    or is a workbook: where it comes from Excel, it goes there again.
    """
    file.stream.seek(0)
    file = replace(file, raw=file.stream.read(BEGINNING))
    found, dialect = None, Dialect(mark=form in WORKBOOKS)
    if form in LINES:
        check_kind(file)
        encoded = encoding_of(file)
        marked = file.raw.startswith(tuple(MARKS)) or (encoded and encoded[0] not in UTF8)
        dialect = Dialect(mark=bool(marked))
        try:
            found = encoded and LINES[form](file, *encoded)
        except (UnicodeError, LookupError):
            found = None
    file.stream.seek(0)
    if form in COLUMNS:
        number = 0
        for rows in COLUMNS[form](file):
            yield [], list(enumerate(rows, number)), dialect
            number += len(rows)
    elif found:
        notes, blocks, delimiter = found
        dialect = replace(dialect, delimiter=delimiter if form == ".csv" else ",")
        for block in blocks:
            yield notes, block, dialect
            notes = []
    else:
        table = READERS[form](replace(file, raw=file.stream.read() if form in LINES else b""))
        dialect = replace(dialect, delimiter=table.delimiter if form == ".csv" else ",")
        yield table.notes, table.rows, dialect


def in_blocks(rows: Iterable[Located]) -> Iterator[list[Located]]:
    rows = iter(rows)
    while block := list(islice(rows, ROWS)):
        yield block


# ── Text ────────────────────────────────────────────────────────────────────────────────────────

UTF8 = ("utf-8", "utf-8-sig", "ascii")


def encoding_of(file: File) -> tuple[str, list[str]] | None:
    """The encoding of all that ``file.stream`` has, and a note where it is not UTF-8.

    None where ``delimited.decode`` has to say what is wrong.
    """
    mark = next((mark for mark in MARKS if file.raw.startswith(mark)), b"")
    given = file.reading.encoding or (MARKS[mark] if mark and mark != codecs.BOM_UTF8 else None)
    if given:
        notes = [] if file.reading.encoding else [given.upper()]
        return "utf-8-sig" if given.lower() == "utf-8" else given, notes
    file.stream.seek(0)
    sample, utf8 = bytearray(), True
    for line in file.stream:
        if b"\0" in line:
            return None
        if not line.isascii():
            utf8 = utf8 and decodes(line, "utf-8")
            sample += line if len(sample) < DETECTED_BYTES else b""
    if utf8:
        return "utf-8-sig", []
    guess = None if mark or mostly_utf8(bytes(sample)) else guess_encoding(bytes(sample))
    return (guess, [f"encoding {guess}, detected"]) if guess else None


def lines_of(file: File, encoding: str) -> Iterator[str]:
    """The lines of ``file.stream`` from its start, with their ends; raises UnicodeError."""
    file.stream.seek(0)
    text = io.TextIOWrapper(file.stream, encoding, newline="")
    try:
        for number, line in enumerate(text):
            yield line if number else line.removeprefix("\ufeff")
    finally:
        text.detach()  # or the stream would be closed with it


def text_lines(file: File, encoding: str, notes: list[str]) -> Blocks | None:
    """What ``read_lines`` gives. None without any text, or where a line cannot be decoded."""
    lines = (part for line in lines_of(file, encoding) for part in line.splitlines())
    filled, count = 0, 0
    for line in lines:
        count += 1
        filled += bool(line.strip())
    if not filled:
        return None
    notes += [f"{count - filled} blank lines left out"] if count > filled else []

    def rows() -> Iterator[Located]:
        again = (part for line in lines_of(file, encoding) for part in line.splitlines())
        for number, line in enumerate(again, 1):
            if line.strip():
                yield f"line {number}", {"text": line}

    return Blocks(notes, in_blocks(rows()))


def json_lines(file: File, encoding: str, notes: list[str]) -> Blocks | None:
    """What ``read_json_lines`` gives. None unless every line that is not blank has an object."""

    def rows() -> Iterator[Located]:
        # A JSON string may contain U+2028 and similar characters, but no line break.
        for number, line in enumerate(lines_of(file, encoding), 1):
            if line.strip():
                yield f"line {number}", STRICT.decode(line)

    count = 0
    try:
        for _, value in rows():
            if not isinstance(value, Mapping):
                return None
            count += 1
    except (ValueError, RecursionError):  # UnicodeError is one
        return None
    if count < 2:  # one object may hold a list of rows
        return None
    notes += ["one object on each line"] if file.suffix == ".json" else []
    return Blocks(notes, in_blocks(rows()))


# ── Tables ──────────────────────────────────────────────────────────────────────────────────────


def table(file: File, encoding: str, notes: list[str]) -> Blocks | None:
    """What ``read_delimited`` gives. None where it has to look at all of the table."""
    csv.field_size_limit(max(csv.field_size_limit(), (1 << 31) - 1))
    start = list(islice(lines_of(file, encoding), 2))
    first, declared = declared_delimiter("".join(start))
    surveys: dict[str, _Survey] = {}

    def parse(delimiter: str) -> Parsed:
        surveys[delimiter] = _Survey(delimiter)
        return surveys[delimiter].read(lines_of(file, encoding), first)

    parsed, noted = chosen(file, "".join(start[first : first + 1]), declared, parse)
    survey = surveys[parsed.delimiter]
    named = [name for name in parsed.header if name]
    if survey.doubtful or not parsed.records or len({*named}) < len(named):
        return None
    if survey.maybe:
        noted.append(f"{survey.maybe} quoted rows of several lines, each of which has all columns")

    def rows() -> Iterator[Located]:
        again = Parsed(parsed.delimiter)
        for line, _, cells in records(lines_of(file, encoding), again, first):
            yield f"line {line}", dict(zip(parsed.header, cells, strict=True))

    return Blocks(notes + noted, in_blocks(rows()), parsed.delimiter)


class _Survey:
    """What is known of a table after one pass: whether its rows fit, and its quotes are quotes.

    As in ``read_delimited``, a quoted row of several lines, each of which has all columns, may be
    several rows, if one column of each line has a value that other rows repeat.
    """

    def __init__(self, delimiter: str) -> None:
        self.parsed = Parsed(delimiter)
        self._values: list[set[str] | None] = []
        """The values of each column; None of a column that has more than ``MOST_VALUES``."""
        self._single = 0
        self._spans: list[list[list[str]]] = []
        self._again = False

    def read(self, lines: Iterable[str], first: int) -> Parsed:
        since: list[str] = []

        def passed() -> Iterator[str]:
            for line in lines:
                since.append(line)
                yield line

        parsed = self.parsed
        for record in records(passed(), parsed, first):
            if not parsed.records:
                parsed.records.append(record)
                self._values = [set() for _ in parsed.header]
            self._see(record, since[record[0] - record[1] - 1 :])
            since.clear()
            if len(parsed.ragged) > 1 or len(self._spans) > MOST_SPANS:
                break
        return parsed

    def _see(self, record: Record, lines: Sequence[str]) -> None:
        begin, end, cells = record
        width = len(cells)
        if width > 1 and [cell.strip("\ufeff \t") for cell in cells] == self.parsed.header:
            self._again = True
        if begin == end:
            self._single += 1
            for at, cell in enumerate(cells):
                values = self._values[at]
                if values is not None and cell:
                    values.add(cell)
                    if len(values) > MOST_VALUES:
                        self._values[at] = None
        elif width > 1:
            apart = [line.rstrip("\r\n").split(self.parsed.delimiter) for line in lines]
            if all(len(parts) == width for parts in apart):
                self._spans.append(apart)

    @property
    def doubtful(self) -> bool:
        """Whether all of the table decides what is wrong with it, or what its quotes are."""
        repeated = [
            (at, values)
            for at, values in enumerate(self._values)
            if values is not None and self._single >= 8 and 2 * len(values) <= self._single
        ]
        joined = any(
            all(cells[at] in values for cells in span)
            for span in self._spans
            for at, values in repeated
        )
        return not self.parsed.whole or self._again or joined or len(self._spans) > MOST_SPANS

    @property
    def maybe(self) -> int:
        return len(self._spans)


LINES: dict[str, Callable[[File, str, list[str]], Blocks | None]] = {
    ".csv": table,
    ".tsv": table,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_lines,
    ".txt": text_lines,
}
COLUMNS: dict[str, Callable[[File], Iterator[list[dict[str, Any]]]]] = {
    ".parquet": parquet_blocks,
    ".arrow": arrow_blocks,
    ".feather": arrow_blocks,
}
