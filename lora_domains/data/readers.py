"""Reading rows from files, folders, the Hub or memory, each with its location. No torch.

No message quotes the text of a row: it names the file, the line and the column.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from lora_domains.data.delimited import read_delimited, read_lines
from lora_domains.data.source import (
    COMMAS,
    DETECTED,
    SPLITS,
    Dialect,
    File,
    Hub,
    Located,
    Reading,
    Source,
    Table,
    classes_in,
    first_cells,
    first_rows,
    in_memory,
    places,
    with_class_names,
)
from lora_domains.data.structured import (
    ABOUT_ROWS,
    first_objects,
    read_arrow,
    read_json,
    read_json_lines,
    read_parquet,
    read_workbook,
)
from lora_domains.errors import DataError
from lora_domains.tasks import Row

FORMS = (
    "a path ending in .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .arrow, .feather, .xlsx or "
    ".txt (also .gz), a folder of such files or of save_to_disk, 'embedded:NAME', "
    "'hub:OWNER/NAME@REVISION/SPLIT', or a list of rows"
)
READERS: dict[str, Callable[[File], Table]] = {
    ".csv": read_delimited,
    ".tsv": read_delimited,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
    ".xlsx": read_workbook,
    ".xlsm": read_workbook,
    ".txt": read_lines,
}
BEGINNINGS: dict[str, Callable[[BinaryIO, int], bytes]] = {
    ".csv": first_cells,
    ".tsv": first_cells,
    ".jsonl": first_objects,
    ".ndjson": first_objects,
    ".json": first_objects,
    ".txt": first_rows,
}
"""The bytes that hold the first rows of a form of text."""
HINTS = {
    ".xls": "Save it as .xlsx or CSV.",
    ".ods": "Save it as .xlsx or CSV.",
    ".zip": "Unpack it, and name a file in it.",
    ".zst": "Unpack it: unzstd.",
    ".bz2": "Unpack it: bunzip2.",
    ".xz": "Unpack it: unxz.",
    ".yaml": "Settings are flags here, or a recipe, which lora-domains init ROWS writes.",
    ".yml": "Settings are flags here, or a recipe, which lora-domains init ROWS writes.",
}


@dataclass(frozen=True)
class RowsRead:
    """Rows in order, and notes on what was detected in their files."""

    rows: list[Row]
    notes: tuple[str, ...] = ()
    more: bool = False
    """Whether the rows go on and were not read, as ``Reading.most`` wanted."""
    dialect: Dialect = COMMAS
    """How a table of answers to them is written; rows that are read in blocks have it."""


def read(source: Source, split: str, reading: Reading = DETECTED) -> list[Row]:
    """The rows of ``source``, in order. Raises DataError when it cannot be read completely."""
    return read_noted(source, split, reading).rows


def read_noted(source: Source, split: str, reading: Reading = DETECTED) -> RowsRead:
    """The rows of ``source`` with notes, at most ``reading.most`` of a file or of the Hub.

    Raises DataError when it cannot be read so far.
    """
    if isinstance(source, str) and source.startswith("embedded:"):
        from lora_domains.embedded.world import domain_rows

        return RowsRead(numbered(source, split, enumerate(domain_rows(source[9:], split))))
    if isinstance(source, str) and source.startswith("hub:"):
        source = _hub(source)
    if not isinstance(source, str | Path | Hub):
        rows = enumerate(map(_without_arrays, _in_memory(source, split)))
        return RowsRead(numbered(f"{split} rows in memory", split, rows))
    most = reading.most
    if most is not None:
        reading = replace(reading, most=most + 1)  # one more shows that there are more
    if isinstance(source, Hub):
        name = f"{source.id}@{source.revision}/{source.split}"
        found = RowsRead(numbered(name, split, enumerate(_hub_rows(source, name, reading.most))))
    else:
        found = _read_path(Path(source).expanduser(), str(source), split, reading)
    return replace(found, rows=found.rows[:most], more=most is not None and len(found.rows) > most)


def _in_memory(source: Any, split: str) -> Sequence[Any]:
    rows = in_memory(source)
    if not isinstance(rows, Sequence):
        raise DataError(
            where=split,
            expected=FORMS,
            found=type(source).__name__,
            hint="Pass a list of dicts, or a pandas, polars, pyarrow or datasets table.",
        )
    return rows


def _without_arrays(value: Any) -> Any:
    """``value`` with the arrays in it, which pandas has for lists, as lists."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(part) for key, part in value.items()}
    if type(value).__name__ == "ndarray" and value.ndim:
        return [_without_arrays(part) for part in value.tolist()]
    return value


def numbered(
    name: str, split: str, items: Iterable[Located], where: str | None = None, start: int = 0
) -> list[Row]:
    """Rows with their locations: a line of a file ("line 17"), or an index from 0."""
    rows, wrong = [], []
    for number, (at, values) in enumerate(items, start):
        place = f"{name}, {at if isinstance(at, str) else f'index {at}'}"
        rows.append(Row(values, split, number, place))
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            wrong.append(place)
    if wrong or not rows:
        raise DataError(
            where=where or name,
            expected="rows, each an object with named columns" if wrong else "at least one row",
            found=places(wrong, "row") if wrong else "none",
            hint='Write {"text": "…", "label": "…"} for each row.' if wrong else "Add rows.",
        )
    return rows


# ── Files ───────────────────────────────────────────────────────────────────────────────────────


def _read_path(path: Path, given: str, split: str, reading: Reading) -> RowsRead:
    rows: list[Row] = []
    notes: dict[str, None] = {}
    files = files_in(path, split) if path.is_dir() else [path]
    for file in files:
        left = None if reading.most is None else reading.most - len(rows)
        if left is not None and left <= 0:
            break
        table = _read_file(file, given, replace(reading, most=left))
        rows += numbered(file.name, split, table.rows, str(file), len(rows))
        notes |= dict.fromkeys(table.notes)
    return RowsRead(rows, ((f"{len(files)} files",) if len(files) > 1 else ()) + tuple(notes))


def _suffix(path: Path) -> str:
    return File(path, b"").suffix


def _read_file(path: Path, given: str, reading: Reading) -> Table:
    beginning, most = BEGINNINGS.get(_suffix(path)), reading.most
    with opened(path, given) as stream:
        reader = READERS[_suffix(path)]
        if beginning is None:
            return reader(File(path, b"", reading, stream))
        raw = stream.read() if most is None else beginning(stream, most)
    return reader(File(path, raw, reading))


@contextmanager
def opened(path: Path, given: str) -> Iterator[BinaryIO]:
    """The bytes of a file of rows, unpacked, to read and to seek in.

    Raises DataError where there is no such file, or none of a form that is known.
    """
    reader = READERS.get(_suffix(path))
    if reader is None or not path.is_file():
        raise _no_file(path, given, reader is not None)
    try:
        with path.open("rb") as stream:
            if path.suffix.lower() != ".gz":
                yield stream
            else:
                with gzip.open(stream) as packed:
                    text: Any = packed
                    yield text if _suffix(path) in BEGINNINGS else BytesIO(packed.read())
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(
            where=str(path),
            expected="a complete file compressed by gzip",
            found="another file, or a part of one",
            hint="Compress it again, or unpack it.",
        ) from None
    except OSError as error:
        raise DataError(
            where=str(path),
            expected="a file that can be read",
            found=error.strerror or type(error).__name__,
            hint="Check its permissions.",
        ) from None


def _no_file(path: Path, given: str, known: bool) -> DataError:
    folder = path.parent
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = [str(folder / name) for name in get_close_matches(path.name, names) if name != path.name]
    hint = "Did you mean " + " or ".join(map(repr, near)) + "?" if near else "Check the path."
    if path.is_file():
        found = f"a file ending in {path.suffix!r}" if path.suffix else "a file without an ending"
        hint = HINTS.get(path.suffix.lower(), hint)
    elif re.match(r"(https?|ftp|s3|gs)://", given):
        found = "an address"
        hint = f"Download it first: curl -LO {given}"
    elif known:
        found = "no such file" if folder.is_dir() else f"no folder {str(folder)!r}"
    else:
        found = "something else"
    missing = known and not path.exists()
    return DataError(where=given if "://" in given else str(path), found=found, hint=hint,
                     expected="a file of rows" if missing else FORMS)  # fmt: skip


# ── Folders ─────────────────────────────────────────────────────────────────────────────────────


def files_in(folder: Path, split: str) -> list[Path]:
    """The files of ``split`` in a folder: of ``save_to_disk``, or shards of one kind, by name.

    Where files are named after splits (``train-00000-of-00002.parquet``), only those of this one.
    """
    if (folder / "dataset_dict.json").is_file():
        if not (folder / split / "state.json").is_file():
            raise _no_shards(folder, f"a dataset without a split {split!r}", f"{folder}/SPLIT")
        folder = folder / split
    if (folder / "state.json").is_file():
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            return [folder / Path(file["filename"]).name for file in state["_data_files"]]
        except (ValueError, KeyError, TypeError, OSError):
            raise _no_shards(folder, "a state.json that cannot be read", "the files") from None
    files = sorted(p for p in folder.iterdir() if p.is_file() and _suffix(p) in READERS)
    files = [p for p in files if p.name not in ABOUT_ROWS]
    ofsplit = {s: [p for p in files if re.match(rf"{s}\b", p.name)] for s in SPLITS}
    if any(ofsplit.values()):
        files = ofsplit.get(split, [])
        if not files:
            raise _no_shards(folder, f"files of other splits than {split!r}", "the files")
    kinds = sorted({_suffix(file) for file in files})
    if len(kinds) != 1:
        found = f"a folder of {' and '.join(kinds)} files" if kinds else "a folder without files"
        raise _no_shards(folder, found, "one file")
    return files


def _no_shards(folder: Path, found: str, name: str) -> DataError:
    return DataError(
        where=str(folder),
        expected="a folder with files of one form, or one that save_to_disk wrote",
        found=found,
        hint=f"Name {name}.",
    )


# ── The Hub ─────────────────────────────────────────────────────────────────────────────────────


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


def _hub_rows(hub: Hub, name: str, most: int | None) -> list[Any]:
    """The rows of ``hub``, the names of classes for their numbers: a model reads words.

    With ``most`` they are streamed, so that no more are downloaded, or read from the local cache,
    which cannot be streamed.
    """
    failure = ""
    for streaming in (True, False) if most is not None else (False,):
        try:
            return _loaded(hub, most, {"streaming": True} if streaming else {})
        except Exception as error:  # loaders share no error tree
            failure = type(error).__name__
    raise DataError(
        where=name,
        expected="a data set on the Hub, or already in the local cache",
        found=f"{failure} from datasets.load_dataset",
        hint="Check the network and the name, or download it and pass a local file.",
    )


def _loaded(hub: Hub, most: int | None, options: Mapping[str, Any]) -> list[Any]:
    from datasets import load_dataset

    table = load_dataset(hub.id, hub.config, split=hub.split, revision=hub.revision, **options)
    return with_class_names(islice(table, most), classes_in(table.features))
