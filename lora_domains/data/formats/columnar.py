"""Rows in columns: Parquet files, the Arrow files of ``save_to_disk``, and Excel workbooks."""

import json
from collections.abc import Mapping
from io import BytesIO
from typing import Any

from lora_domains.data.formats.located import File, Located, Table
from lora_domains.data.source import class_name
from lora_domains.errors import DataError


def read_parquet(file: File) -> Table:
    """The rows of a Parquet file, with the names of ``datasets`` class labels."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(BytesIO(file.raw))
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "a Parquet file", error, "table.to_parquet(…)") from None
    return Table(list(enumerate(_rows(file, table))))


def read_arrow(file: File) -> Table:
    """The rows of an Arrow stream, as ``datasets`` saves them."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.ipc.open_stream(BytesIO(file.raw)) as stream:
            table = stream.read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(file, "an Arrow stream", error, "dataset.save_to_disk(…)") from None
    return Table(list(enumerate(_rows(file, table))))


def _unreadable(file: File, what: str, error: Exception, write: str) -> DataError:
    return DataError(
        where=str(file.path),
        expected=what,
        found=f"a file that pyarrow cannot read ({type(error).__name__})",
        hint=f"Write it again: {write}.",
    )


def _rows(file: File, table: Any) -> list[dict[str, Any]]:
    """The rows of ``table``. Raises DataError for a column whose text is not UTF-8."""
    columns: dict[str, list[Any]] = {}
    names = label_names(table.schema.metadata)
    for name, column in zip(table.column_names, table.columns, strict=True):
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
            [class_name(value, names[name]) for value in values] if name in names else values
        )
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def label_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """column → names of its classes, from what ``datasets`` stores beside a table."""
    try:
        stored = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features") or {}
        return {
            column: list(feature["names"])
            for column, feature in features.items()
            if isinstance(feature, Mapping) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, KeyError, TypeError):
        return {}


def read_workbook(file: File) -> Table:
    """The rows of the first sheet that has any; its first row is the header."""
    try:
        import openpyxl
    except ModuleNotFoundError:
        raise DataError(
            where=str(file.path),
            expected="openpyxl, to read a workbook",
            found="no such package",
            hint="pip install 'lora-domains[excel]', or save the sheet as CSV.",
        ) from None
    try:
        book = openpyxl.load_workbook(BytesIO(file.raw), read_only=True, data_only=True)
        sheets = {sheet.title: list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets}
    except Exception as error:  # zip, XML and openpyxl's own errors
        raise DataError(
            where=str(file.path),
            expected="an Excel workbook (.xlsx)",
            found=f"a file that openpyxl cannot read ({type(error).__name__})",
            hint="Save it again as .xlsx without a password, or as CSV.",
        ) from None
    filled = {title: rows for title, rows in sheets.items() if _filled(rows)}
    if not filled:
        raise DataError(
            where=str(file.path), expected="rows", found="empty sheets", hint="Check the export."
        )
    title, rows = next(iter(filled.items()))
    others = f" of {len(filled)}" if len(filled) > 1 else ""
    return Table(_under_header(file, title, rows), [f"sheet {title!r}{others}"] if others else [])


def _filled(rows: list[tuple[Any, ...]]) -> list[tuple[int, tuple[Any, ...]]]:
    """The rows with a value, and their numbers in the sheet."""
    return [(n, row) for n, row in enumerate(rows, 1) if any(cell is not None for cell in row)]


def _under_header(file: File, title: str, rows: list[tuple[Any, ...]]) -> list[Located]:
    (_, head), *rest = _filled(rows)
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
