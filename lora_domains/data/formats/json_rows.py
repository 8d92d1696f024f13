"""Rows in JSON: one object on each line, a list of objects, or an object that holds such a list."""

import json
from collections.abc import Mapping
from typing import Any

from lora_domains.data.formats.located import File, Located, Table, places
from lora_domains.data.formats.text import decode
from lora_domains.errors import DataError


def read_json(file: File) -> Table:
    """The rows of a ``.json`` file; JSON lines are read as such."""
    text, notes = decode(file)
    rows, found = _whole(text)
    if found and "\n" in text.strip():
        lines, broken = _lines(text)
        if not broken and all(isinstance(row, Mapping) for _, row in lines):
            return Table(lines, [*notes, "one object on each line"])
    if isinstance(rows, Mapping):
        rows, key = _list_in(rows)
        notes += [f"the list under {key!r}"] if key else []
    if not isinstance(rows, list):
        raise DataError(
            where=str(file.path),
            expected='a JSON list of objects, {"data": [objects]}, or one object on each line',
            found=found or f"a JSON {'dict' if isinstance(rows, Mapping) else type(rows).__name__}",
            hint='Write a list of rows (in pandas orient="records"), or one object on each line '
            "of a file named .jsonl.",
        )
    return Table(list(enumerate(rows)), notes)


def read_json_lines(file: File) -> Table:
    """The rows of a ``.jsonl`` file; a JSON list is read as such."""
    text, notes = decode(file)
    rows, broken = _lines(text)
    if broken or (len(rows) == 1 and isinstance(rows[0][1], list)):
        whole, _ = _whole(text)
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


def _lines(text: str) -> tuple[list[Located], list[str]]:
    """(rows, what is wrong with each line that is none)."""
    rows: list[Located] = []
    broken = []
    # Not splitlines(): a JSON string may contain U+2028 and similar characters.
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            if line.strip():
                rows.append((f"line {number}", json.loads(line)))
        except json.JSONDecodeError as error:
            broken.append(f"line {number}, character {error.colno}: {error.msg}")
        except (ValueError, RecursionError):
            broken.append(f"line {number}: too long a number, or nested too deeply")
    return rows, broken


def _whole(text: str) -> tuple[Any, str]:
    """(the value, what is wrong with the text)."""
    try:
        return json.loads(text), ""
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
