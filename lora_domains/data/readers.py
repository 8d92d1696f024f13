"""Reading rows from files, the Hub or memory, each with its location. No torch.

No message quotes the text of a row: it names the file, the line and the column.
"""

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lora_domains.data.source import Hub, Source
from lora_domains.errors import DataError
from lora_domains.tasks import Row

SHOWN = 5
"""The most locations that one error names; the others are counted."""
FORMS = (
    "a path ending in .csv, .tsv, .jsonl, .ndjson, .json, .parquet or .txt, 'embedded:NAME', "
    "'hub:OWNER/NAME@REVISION/SPLIT', or a list of rows"
)

Located = tuple[int | str, Any]
"""A line ("line 17") or an index, and the values there."""


def read(source: Source, split: str) -> list[Row]:
    """The rows of ``source``, in order. Raises DataError when it cannot be read completely."""
    if isinstance(source, str) and source.startswith("embedded:"):
        from lora_domains.embedded.world import domain_rows

        return _numbered(source, split, enumerate(domain_rows(source[9:], split)))
    if isinstance(source, str) and source.startswith("hub:"):
        source = _hub(source)
    if isinstance(source, Hub):
        name = f"{source.id}@{source.revision}/{source.split}"
        return _numbered(name, split, enumerate(_hub_rows(source, name)))
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        return _numbered(path.name, split, _file_reader(path)(path), str(path))
    if not isinstance(source, Sequence):
        raise DataError(
            where=split,
            expected=FORMS,
            found=type(source).__name__,
            hint='Pass a pandas table as table.to_dict("records").',
        )
    return _numbered(f"{split} rows in memory", split, enumerate(source))


def _numbered(
    name: str, split: str, items: Iterable[Located], where: str | None = None
) -> list[Row]:
    """Rows with their locations: a line of a file ("line 17"), or an index from 0."""
    rows, wrong = [], []
    for number, (at, values) in enumerate(items):
        place = f"{name}, {at if isinstance(at, str) else f'index {at}'}"
        rows.append(Row(values, split, number, place))
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            wrong.append(place)
    if wrong or not rows:
        raise DataError(
            where=where or name,
            expected="rows, each an object with named columns" if wrong else "at least one row",
            found=_places(wrong, "row") if wrong else "none",
            hint='Write {"text": "…", "label": "…"} for each row.' if wrong else "Add rows.",
        )
    return rows


def file_of(place: str) -> str:
    """The file or source in the ``place`` of a row, without the line."""
    return place.rsplit(", ", 1)[0]


def _places(places: Sequence[str], what: str) -> str:
    count = f"1 invalid {what}" if len(places) == 1 else f"{len(places)} invalid {what}s"
    return f"{count}: {'; '.join(places[:SHOWN])}" + ("; …" if len(places) > SHOWN else "")


def _file_reader(path: Path) -> Callable[[Path], list[Located]]:
    reader = {
        ".csv": _csv,
        ".tsv": _csv,
        ".jsonl": _jsonl,
        ".ndjson": _jsonl,
        ".json": _json,
        ".parquet": _parquet,
        ".txt": _txt,
    }.get(path.suffix.lower())
    if reader is not None and path.is_file():
        return reader
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = [str(folder / name) for name in get_close_matches(path.name, names)]
    if path.is_dir():
        found = "a folder"
    elif path.is_file():
        found = f"a file ending in {path.suffix!r}"
    elif reader is None:
        found = "something else"
    else:
        found = "no such file" if folder.is_dir() else f"no folder {str(folder)!r}"
    raise DataError(
        where=str(path),
        expected=FORMS,
        found=found,
        hint="Did you mean " + " or ".join(map(repr, near)) + "?" if near else "Check the path.",
    )


def _decode(path: Path) -> str:
    """The file's text. Raises DataError with the line and byte of the first that is not UTF-8."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            where=str(path),
            expected="a file that can be read",
            found=error.strerror or type(error).__name__,
            hint="Check its permissions.",
        ) from None
    start = len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    try:
        text = raw[start:].decode("utf-8")
        offset, found = raw.find(b"\0"), "a NUL byte"
    except UnicodeDecodeError as error:
        text, offset, found = "", start + error.start, "another encoding"
    if offset >= 0:
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or found == "a NUL byte"
        raise DataError(
            where=f"{path}, line {raw.count(bytes([10]), 0, offset) + 1}, byte {offset}",
            expected="text in UTF-8",
            found=found + (" (UTF-16, or not a text file)" if wide else ""),
            hint=f"Save it as UTF-8, or: iconv -f {'UTF-16' if wide else 'WINDOWS-1252'} "
            f"-t UTF-8 {path.name} > {path.stem}-utf8{path.suffix}",
        )
    if not text.strip():
        raise DataError(
            where=str(path), expected="rows", found="an empty file", hint="Check the export."
        )
    return text


def _csv(path: Path) -> list[Located]:
    """Rows with the line on which each begins: a quoted cell may contain line breaks."""
    tab = path.suffix.lower() == ".tsv"
    text = _decode(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))
    lines = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if tab else ",", strict=True)
    rows: list[Located] = []
    ragged: list[str] = []
    header: list[str] = []
    begins = 1
    try:
        for cells in lines:
            if cells and not header:
                header = _header(path, cells, tab)
            elif cells and len(cells) != len(header):
                ragged.append(f"line {begins} has {len(cells)}")
            elif cells:
                rows.append((f"line {begins}", dict(zip(header, cells, strict=True))))
            begins = lines.line_num + 1
    except csv.Error as error:
        raise DataError(
            where=f"{path}, the row beginning on line {begins}",
            expected="quoted cells that are closed, with the quotes inside them doubled",
            found=str(error),  # csv's messages name the broken rule, never the cell
            hint='Write "a ""quoted"" word", or export the table again.',
        ) from None
    if ragged or not rows:
        raise DataError(
            where=str(path),
            expected=f"{len(header)} columns in every row" if ragged else "rows under the header",
            found=_places(ragged, "row") if ragged else "only the header: no rows",
            hint="Quote cells that contain the separator." if ragged else "Check the export.",
        )
    return rows


def _header(path: Path, cells: list[str], tab: bool) -> list[str]:
    names = [cell.strip() for cell in cells]
    other = next((c for c in (";", "\t", ",") if len(names) == 1 and c in names[0]), None)
    twice = [name for name, n in Counter(names).items() if name and n > 1]
    if other or twice:
        name = {";": "semicolons", "\t": "tabs", ",": "commas", None: ""}[other]
        raise DataError(
            where=f"{path}, line 1",
            expected=f"a header of distinct names separated by {'tabs' if tab else 'commas'}",
            found=name or f"{len(twice)} of {len(names)} names more than once",
            hint="Rename the columns." if twice else "Save it again, or name it .csv or .tsv.",
        )
    return names


def _jsonl(path: Path) -> list[Located]:
    rows: list[Located] = []
    broken = []
    # Not splitlines(): a JSON string may contain U+2028 and similar characters.
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        try:
            if line.strip():
                rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            broken.append(f"line {number}, character {error.colno}: {error.msg}")
        except (ValueError, RecursionError):
            broken.append(f"line {number}: too long a number, or nested too deeply")
    if broken:
        raise DataError(
            where=str(path),
            expected="one JSON object on each line",
            found=_places(broken, "line"),
            hint="Name a table .csv, and a JSON list of objects .json.",
        )
    return rows


def _txt(path: Path) -> list[Located]:
    """Each line that is not blank, as a row with the column ``text``."""
    lines = enumerate(_decode(path).splitlines(), 1)
    return [(f"line {number}", {"text": line}) for number, line in lines if line.strip()]


def _json(path: Path) -> list[Located]:
    try:
        rows, found = json.loads(_decode(path)), ""
    except json.JSONDecodeError as error:
        rows, found = None, f"line {error.lineno}, character {error.colno}: {error.msg}"
    except (ValueError, RecursionError):
        rows, found = None, "too long a number, or nested too deeply"
    if not isinstance(rows, list):
        raise DataError(
            where=str(path),
            expected="a JSON list of objects",
            found=found or f"a JSON {type(rows).__name__}",
            hint="Name a file with one object on each line .jsonl.",
        )
    return list(enumerate(rows))


def _parquet(path: Path) -> list[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(enumerate(pyarrow.parquet.read_table(path).to_pylist()))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            where=str(path),
            expected="a Parquet file",
            found=f"a file that pyarrow cannot read ({type(error).__name__})",
            hint="Write it again: table.to_parquet(…).",
        ) from None


def _hub(source: str) -> Hub:
    match = re.fullmatch(r"hub:([\w.-]+(?:/[\w.-]+)?)@(.+)/([^/]+)", source)
    if match is None:
        raise DataError(
            where=source,
            expected="hub:OWNER/NAME@REVISION/SPLIT",
            found="another form",
            hint="Pin the revision (a commit of the data set) so that the rows cannot change.",
        )
    return Hub(match[1], match[3], match[2])


def _hub_rows(hub: Hub, name: str) -> Iterable[Mapping[str, Any]]:
    from datasets import load_dataset

    try:
        table = load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision)
        # Labels stored as numbers are replaced by their names: a model reads words.
        named = {c: f.names for c, f in (table.features or {}).items() if hasattr(f, "names")}
        rows = [dict(row) for row in table]
    except Exception as error:  # loaders share no error tree
        raise DataError(
            where=name,
            expected="a data set on the Hub, or already in the local cache",
            found=f"{type(error).__name__} from datasets.load_dataset",
            hint="Check the network and the name, or download it and pass a local file.",
        ) from None
    for row in rows:
        for column, names in named.items():
            value = row[column]
            row[column] = names[value] if isinstance(value, int) and value >= 0 else None
    return rows
