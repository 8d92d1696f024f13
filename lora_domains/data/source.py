"""Where a domain's rows come from, and what every file form gives: rows with their locations."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from lora_domains.errors import DataError, UsageError

SPLITS = ("train", "validation", "test")
IN_MEMORY = " rows in memory"
"""What records say of rows in memory, after their number."""
READ_PER_SAMPLED, FEWEST_READ = 10, 1000
"""A sample of n rows is drawn from at most this many times n rows of a file, or from this many."""


@dataclass(frozen=True)
class Hub:
    """Rows from the Hub, read with ``datasets.load_dataset`` at one pinned revision."""

    id: str
    split: str
    revision: str
    config: str | None = None


Source = str | Path | Hub | Sequence[Mapping[str, Any]]
"""A file or folder, ``embedded:NAME``, a data set on the Hub, or rows in memory. A table of pandas,
polars, pyarrow or datasets is turned into its rows."""


def in_memory(source: Any) -> Any:
    """The rows of a table of pandas, polars, pyarrow or datasets; anything else as it is.

    Raises DataError for a table with two columns of one name.
    """
    if isinstance(source, str | Path | Hub | Sequence) or source is None:
        return source
    module = type(source).__module__.split(".")[0]
    named = {"pandas": "columns", "pyarrow": "column_names"}.get(module, "")
    names = [str(name) for name in getattr(source, named, ())] if named else []
    if len(set(names)) < len(names):
        raise DataError(
            where="rows in memory",
            expected="columns of distinct names",
            found=f"{len(names) - len(set(names))} names more than once",
            hint="Rename the columns.",
        )
    if module == "pandas":
        return source.to_dict("records") if hasattr(source, "columns") else source
    if module == "polars" and hasattr(source, "to_dicts"):
        return source.to_dicts()
    if module == "pyarrow" and hasattr(source, "to_pylist"):
        return with_class_names(source.to_pylist(), stored_classes(source.schema.metadata))
    if module == "datasets" and hasattr(source, "column_names"):
        return with_class_names(source, classes_in(getattr(source, "features", None)))
    return source


def index_of(source: Any) -> Any:
    """The index of a table or column of pandas; None for anything else."""
    return source.index if type(source).__module__.split(".")[0] == "pandas" else None


def class_name(value: Any, names: Sequence[str]) -> Any:
    """The name of a class that ``datasets`` stores as a number, or those in a list; None for -1."""
    value = value.tolist() if hasattr(value, "tolist") else value  # of numpy or torch
    if isinstance(value, list | tuple):
        return [class_name(one, names) for one in value]
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


Classes = Mapping[str, Sequence[str]]
"""The names of classes by column."""


def classes_in(features: Mapping[str, Any] | None) -> Classes:
    """The classes of ``features`` of ``datasets``, or of their JSON."""
    return {c: names for c, one in (features or {}).items() if (names := _classes_of(one))}


def _classes_of(feature: Any) -> Sequence[str]:
    """The names of a feature, or of that of its lists; empty if it has none."""
    if isinstance(feature, list):
        return _classes_of(feature[0]) if feature else ()
    parts = feature if isinstance(feature, Mapping) else getattr(feature, "__dict__", {})
    names, entries = parts.get("names"), parts.get("feature")
    if isinstance(names, list) and all(isinstance(name, str) for name in names):
        return names
    return () if entries is None else _classes_of(entries)


def stored_classes(metadata: Mapping[bytes, bytes] | None) -> Classes:
    """The classes in what ``datasets`` stores beside a table of pyarrow."""
    try:
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        return classes_in(stored.get("info", {}).get("features"))
    except (ValueError, AttributeError, RecursionError):
        return {}


def with_class_names(rows: Iterable[Mapping[str, Any]], classes: Classes) -> list[dict[str, Any]]:
    return [
        {c: class_name(cell, classes[c]) if c in classes else cell for c, cell in row.items()}
        for row in rows
    ]


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
    """Drop training and validation rows that are also test rows; if False, they are an error."""
    limit: int | None = None
    """The most rows of each split, sampled with the seed, classes in proportion. Of a file, the
    sample is drawn from the first rows (``reading``); the rest is not read."""
    row: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """A pure function from a row as read to the columns that the task names."""
    delimiter: str | None = None
    """What separates the cells of CSV files; detected if None."""
    encoding: str | None = None
    """How text files are encoded; detected if None."""
    drop_empty: bool = False
    """Whether to drop rows with an empty cell where text or a label belongs, not to refuse them."""
    drop_long: bool = False
    """Whether to drop rows whose answer is longer than the base can read, not to refuse them."""
    merge_labels: bool = False
    """Whether labels that differ only by case, accents, spaces or number form are one label."""
    seed: int | None = None
    """Seed of splits and samples; None is that of the training."""

    def __post_init__(self) -> None:
        for name in (*SPLITS, "general"):
            object.__setattr__(self, name, in_memory(getattr(self, name)))

    def __repr__(self) -> str:
        """Without the text of rows in memory, and without what is as by default."""
        given = {
            part.name: value for part in fields(self)
            if (value := getattr(self, part.name)) != part.default
        }  # fmt: skip
        for name in (*SPLITS, "general"):
            if name in given and not isinstance(given[name], str | Path | Hub):
                given[name] = f"{len(given[name])}{IN_MEMORY}"
        return f"Data({', '.join(f'{name}={value!r}' for name, value in given.items())})"

    @property
    def reading(self) -> "Reading":
        """How its files are read: with a limit, no further than a sample needs.

        A sample is drawn from many more rows than it keeps, because neighbours in a file are often
        alike.
        """
        limit = self.limit
        most = None if limit is None else max(FEWEST_READ, READ_PER_SAMPLED * limit)
        return Reading(self.delimiter, self.encoding, most)

    @staticmethod
    def embedded(name: str) -> "Data":
        """The rows written for the embedded base: ``medical``, ``spam``, …"""
        source = f"embedded:{name}"
        return Data(source, source, source)


READING = ("delimiter", "encoding", "drop_empty", "drop_long", "merge_labels", "seed")
"""Settings of how rows are read, which are dropped, and how they are split."""


def data_record(data: Data, place: Callable[[str | Path], str]) -> dict[str, Any]:
    """``data`` as JSON; ``place`` says how the path of a file is written."""
    return {
        "train": _source_record(data.train, place),
        "validation": _source_record(data.validation, place),
        "test": _source_record(data.test, place),
        "general": _source_record(data.general, place),
        "group": data.group,
        "slices": list(data.slices),
        "drop_leaks": data.drop_leaks,
        "limit": data.limit,
        "row": None if data.row is None else data.row.__qualname__,
        # Later settings are stored where they are set, so that older digests stay.
        **{k: v for k in READING if (v := getattr(data, k)) is not None and v is not False},
    }


def _source_record(source: Source | None, place: Callable[[str | Path], str]) -> Any:
    if source is None:
        return None
    if isinstance(source, Hub):
        return {
            "id": source.id,
            "split": source.split,
            "revision": source.revision,
            "config": source.config,
        }
    if isinstance(source, str) and source.startswith(("hub:", "embedded:")):
        return source
    if isinstance(source, str | Path):
        return place(source)
    return f"{len(source)}{IN_MEMORY}"


def data_of(
    record: Mapping[str, Any] | None, where: str, given: Mapping[str, Source | None] | None = None
) -> Data:
    """The data of a ``data_record``, with the sources ``given`` in place of those that it has.

    Raises UsageError for rows to which neither leads.
    """
    given = given or {}
    if record is None:
        expected = "a card that says where its rows are"
        found = "one of an older version, which does not"
        hint = "Run the recipe, or lora-domains fit with the same flags."
    elif record["row"] is not None:
        expected = "rows that are used as they are read"
        found = f"rows transformed by the function {record['row']} of a recipe"
        hint = "Run the recipe with the same flags, since a card holds no code."
    else:
        train, validation, test, general = (
            _source(record.get(split), where, given.get(split)) for split in (*SPLITS, "general")
        )
        return Data(
            train, validation, test, general, record["group"], tuple(record["slices"]),
            record["drop_leaks"], record["limit"],
            **{name: record[name] for name in READING if name in record},
        )  # fmt: skip
    raise UsageError(where=where, expected=expected, found=found, hint=hint)


def _source(record: Any, where: str, given: Source | None) -> Source | None:
    if record is not None and given is not None:
        return given
    if isinstance(record, Mapping):
        # Older cards name the class under "is".
        return Hub(**{key: part for key, part in record.items() if key != "is"})
    if isinstance(record, str) and record.endswith(IN_MEMORY):
        raise UsageError(
            where=where,
            expected="rows from a file, the Hub or the embedded data",
            found=f"{record}, which are not in the card",
            hint="Declare a Domain with those rows, or call model.fit with them again.",
        )
    source: str | None = record
    return source


# ── What a file gives ────────────────────────────────────────────────────────────────────────────

SHOWN = 5
"""The most locations that one error names; the others are counted."""

Located = tuple[int | str, Any]
"""A line ("line 17") or an index, and the values there."""


@dataclass(frozen=True)
class Reading:
    """How a file is to be read; None is detected."""

    delimiter: str | None = None
    encoding: str | None = None
    most: int | None = None
    """The most rows to read; those after them are neither read nor checked. None reads all."""


DETECTED = Reading()
"""Everything is detected."""


@dataclass(frozen=True)
class File:
    """A file and how to read it. ``path`` is for messages: it may be compressed."""

    path: Path
    raw: bytes
    """The bytes of a text, as far as its rows are to be read; a binary form reads ``stream``."""
    reading: Reading = DETECTED
    stream: BinaryIO = field(default_factory=BytesIO)

    @property
    def suffix(self) -> str:
        """The suffix that says what the bytes are: ``.csv`` of ``rows.csv.gz``."""
        path = self.path
        return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


KINDS = {
    b"\x1f\x8b": ("a file compressed by gzip", "Add .gz to its name, or unpack it."),
    b"PK\x03\x04": ("a zip file or a workbook", "Unpack it, or name a workbook .xlsx."),
    b"PAR1": ("a Parquet file", "Name it .parquet."),
    b"ARROW1": ("an Arrow file", "Name it .arrow."),
    b"\xd0\xcf\x11\xe0": ("an old Excel workbook", "Save it as .xlsx or CSV."),
    b"\x28\xb5\x2f\xfd": ("a file compressed by Zstandard", "Unpack it: unzstd."),
}
"""Kinds of file that are no text, by their first bytes, each with a hint."""
PAGE = "an HTML page", "Download the file again: this may be an error, or a page to log in."


def check_kind(file: File) -> None:
    """Raise DataError where the bytes of a text are another kind of file than its name says."""
    kind = next((kind for start, kind in KINDS.items() if file.raw.startswith(start)), None)
    beginning = file.raw[:200].lstrip()[:14].lower()
    if (
        kind is None
        and file.suffix != ".txt"
        and beginning.startswith((b"<!doctype html", b"<html"))
    ):
        kind = PAGE
    if kind is not None:
        raise DataError(
            where=str(file.path), expected=f"text, as the name says ({file.suffix or 'rows'})",
            found=kind[0], hint=kind[1],
        )  # fmt: skip


@dataclass(frozen=True)
class Dialect:
    """How a table is written in UTF-8."""

    delimiter: str = ","
    mark: bool = False
    """Whether a byte order mark comes first, without which Excel takes it for another encoding."""
    decimal: str = "."


COMMAS = Dialect()


@dataclass
class Table:
    """The rows of a file, and what was detected in it."""

    rows: list[Located]
    notes: list[str] = field(default_factory=list)
    delimiter: str = ","


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


def file_of(place: str) -> str:
    """The file or source in the ``place`` of a row, without the line."""
    return place.rsplit(", ", 1)[0]


# ── The beginning of a file ──────────────────────────────────────────────────────────────────────


def first_rows(stream: BinaryIO, most: int, *, quoted: bool = False) -> bytes:
    """The lines of ``stream`` that hold its first ``most`` rows; all of a text in UTF-16.

    A blank line is no row. With ``quoted``, neither is one that leaves a quoted cell open.
    """
    lines: list[bytes] = []
    rows = quotes = 0
    for line in stream:
        lines.append(line)
        if len(lines) == 1 and b"\0" in line:
            return line + stream.read()
        quotes += line.count(b'"') if quoted else 0
        rows += quotes % 2 == 0 and bool(line.strip())
        if rows == most:
            break
    return b"".join(lines)


def first_cells(stream: BinaryIO, most: int) -> bytes:
    """``first_rows`` of a table, with the line of its header and one before it (``sep=;``)."""
    return first_rows(stream, most + 2, quoted=True)
