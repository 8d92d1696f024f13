"""Rows in blocks: those of a whole reading, in memory that does not grow with their number."""

import csv
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_domains.console import rows
from lora_domains.console.rows import read_blocks
from lora_domains.data.readers import read_noted

NOTE = 'Größe: 1,70 m; "stabil"\r\nkein Fieber'
BLOCK = 50


def hospital(count: int) -> list[dict[str, Any]]:
    """Notes of several lines with semicolons, quotes and umlauts, some of them empty."""
    return [
        {"Fall": str(n), "Befund": f"{NOTE} {n}" if n % 5 else "", "Ort": f"Haus {n % 3}"}
        for n in range(count)
    ]


def semicolons(path: Path, count: int, encoding: str) -> None:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, ["Fall", "Befund", "Ort"], delimiter=";")
        writer.writeheader()
        writer.writerows(hospital(count))


def parquet(path: Path, count: int) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(hospital(count)), path, row_group_size=BLOCK)


def json_lines(path: Path, count: int) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in hospital(count)), encoding="utf-8")


FORMS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "cp1252": ("rows.csv", lambda path, count: semicolons(path, count, "cp1252")),
    "BOM": ("rows.csv", lambda path, count: semicolons(path, count, "utf-8-sig")),
    "UTF-16": ("rows.csv", lambda path, count: semicolons(path, count, "utf-16")),
    "JSON lines": ("rows.jsonl", json_lines),
    "JSON lines called .json": ("rows.json", json_lines),
    "Parquet": ("rows.parquet", parquet),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "ROWS", BLOCK)
    monkeypatch.setattr(rows, "DETECTED_BYTES", 10_000)
    monkeypatch.setattr("lora_domains.data.structured.BATCH", BLOCK)


@pytest.mark.parametrize(("name", "make"), FORMS.values(), ids=FORMS)
def test_blocks_have_the_rows_of_the_file(
    tmp_path: Path, name: str, make: Callable[[Path, int], None]
) -> None:
    make(tmp_path / name, 310)
    blocks = list(read_blocks(tmp_path / name, "input"))
    whole = read_noted(tmp_path / name, "input")
    assert [len(block.rows) for block in blocks] == [BLOCK] * 6 + [10]
    assert [row for block in blocks for row in block.rows] == whole.rows
    assert [row.values for row in whole.rows] == hospital(310)
    assert blocks[0].notes == whole.notes
    assert not any(block.notes for block in blocks[1:])


@pytest.mark.parametrize(("name", "make"), FORMS.values(), ids=FORMS)
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, name: str, make: Callable[[Path, int], None]
) -> None:
    def peak(count: int) -> int:
        make(tmp_path / name, count)
        for _ in read_blocks(tmp_path / name, "input"):  # imports and caches
            break
        tracemalloc.start()
        read = sum(len(block.rows) for block in read_blocks(tmp_path / name, "input"))
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert read == count
        return used

    few, many = peak(400), peak(6000)
    assert many < few + 200_000  # 6,000 rows take some 5 MB


def test_a_table_whose_quotes_are_text_is_read_as_a_whole(tmp_path: Path) -> None:
    lines = ["text\tlabel", *(f'{n} " {n}\tgood' for n in range(60)), '"open\tgood', "x\tgood"]
    (tmp_path / "rows.tsv").write_text("\n".join(lines))
    blocks = list(read_blocks(tmp_path / "rows.tsv", "input"))
    assert [len(block.rows) for block in blocks] == [62]
    assert "quotes are read as text" in blocks[0].notes[0]
