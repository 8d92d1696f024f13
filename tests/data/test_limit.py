"""A limit reads no further than its sample needs, and says so where the rows are sorted."""

import gzip
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.tables import SPAM, refused, table, write

from lora_domains.data.prepare import prepare
from lora_domains.data.readers import read_noted
from lora_domains.data.source import FEWEST_READ, READ_PER_SAMPLED, Data, Hub, Reading
from lora_domains.errors import DataError, LoraDomainsError
from lora_domains.tasks import Classification

ROWS = [{"text": f"line {n}", "label": "good" if n % 2 else "bad"} for n in range(60)]
BROKEN = b'\n"\xff not closed, {\n'
"""A line that no reader of text takes."""


def csv_of(rows: list[dict[str, str]]) -> bytes:
    lines = ["text,label", *(f'"{row["text"]}",{row["label"]}' for row in rows)]
    return "\n".join(lines).encode()


def json_lines(rows: list[dict[str, str]]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def parquet(path: Path, rows: list[dict[str, str]]) -> None:
    """Rows in groups of 10, of which the last is damaged."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    group = parquet.read_metadata(path).row_group(len(rows) // 10 - 1)
    start = group.column(0).dictionary_page_offset or group.column(0).data_page_offset
    raw = bytearray(path.read_bytes())
    raw[start : start + 40] = b"\xff" * 40
    path.write_bytes(raw)


def arrow(path: Path, rows: list[dict[str, str]]) -> None:
    """A stream of batches of 10 rows that is cut off in the last one."""
    pyarrow = pytest.importorskip("pyarrow")
    whole = pyarrow.Table.from_pylist(rows)
    with pyarrow.ipc.new_stream(path, whole.schema) as stream:
        stream.write_table(whole, max_chunksize=10)
    path.write_bytes(path.read_bytes()[:-150])


def shards(folder: Path, rows: list[dict[str, str]]) -> None:
    folder.mkdir()
    write(folder / "train-0.jsonl", json_lines(rows[:30]))
    write(folder / "train-1.jsonl", BROKEN)


def saved(folder: Path, rows: list[dict[str, str]]) -> None:
    """A folder of ``save_to_disk`` whose second shard is missing."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows).save_to_disk(folder, num_shards=2)
    next(folder.glob("data-00001*")).unlink()


def text(content: Callable[[list[dict[str, str]]], bytes]) -> Callable[[Path, Any], None]:
    def make(path: Path, rows: list[dict[str, str]]) -> None:
        write(path, content(rows) + BROKEN)

    return make


def zipped(path: Path, rows: list[dict[str, str]]) -> None:
    """A stream of gzip that is cut off."""
    noise = random.Random(0).randbytes(100_000)  # more than one buffer of the reader
    write(path, gzip.compress(csv_of(rows) + BROKEN + noise)[:-50_000])


FORMS: dict[str, Callable[[Path, Any], None]] = {
    "rows.csv": text(csv_of),
    "rows.tsv": text(lambda rows: csv_of(rows).replace(b",", b"\t")),
    "rows.jsonl": text(json_lines),
    "lines.json": text(json_lines),
    "list.json": text(lambda rows: json.dumps(rows)[:-1].encode()),
    "list.jsonl": text(lambda rows: json.dumps(rows, indent=1)[:-1].encode()),
    "rows.csv.gz": zipped,
    "rows.parquet": parquet,
    "rows.arrow": arrow,
    "shards": shards,
    "saved": saved,
}


@pytest.mark.parametrize("name", FORMS)
def test_what_follows_the_rows_that_are_read_is_not_read(tmp_path: Path, name: str) -> None:
    FORMS[name](tmp_path / name, ROWS)
    refused(lambda: read_noted(tmp_path / name, "train"))
    found = read_noted(tmp_path / name, "train", Reading(most=20))
    assert [row.values for row in found.rows] == ROWS[:20]
    assert found.more


@pytest.mark.parametrize("most", [1, 30, 59, 60, 61, 200])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "list.json", "rows.txt"])
def test_as_many_rows_are_read_as_are_wanted(tmp_path: Path, name: str, most: int) -> None:
    whole = {
        "rows.csv": csv_of(ROWS), "rows.jsonl": json_lines(ROWS),
        "list.json": json.dumps(ROWS).encode(), "rows.txt": b"\n\n".join(b"a%d" % n for n in
                                                                         range(60)),
    }  # fmt: skip
    path = write(tmp_path / name, whole[name])
    found, every = read_noted(path, "train", Reading(most=most)), read_noted(path, "train")
    assert found.rows == every.rows[:most]
    assert (found.more, every.more) == (most < 60, False)


def test_the_lines_of_quoted_cells_are_no_rows(tmp_path: Path) -> None:
    rows = [{"text": f'one,\n\n"two" {n}\n', "label": "a"} for n in range(30)]
    out = io.StringIO(newline="")
    import csv

    writer = csv.DictWriter(out, ["text", "label"])
    writer.writeheader()
    writer.writerows(rows)
    path = write(tmp_path / "rows.csv", b"sep=,\n" + out.getvalue().encode() + BROKEN)
    found = read_noted(path, "train", Reading(most=12))
    assert [row.values for row in found.rows] == rows[:12]


def test_a_workbook_is_read_as_far_as_its_rows_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for line in (["text", "label"], *(list(row.values()) for row in ROWS)):
        book.active.append(line)
    book.save(tmp_path / "rows.xlsx")
    from openpyxl.worksheet._reader import WorkSheetParser

    parsed: list[Any] = []
    parse = WorkSheetParser.parse_row
    monkeypatch.setattr(
        WorkSheetParser, "parse_row", lambda self, row: parsed.append(row) or parse(self, row)
    )
    found = read_noted(tmp_path / "rows.xlsx", "train", Reading(most=20))
    assert [row.values for row in found.rows] == ROWS[:20]
    assert len(parsed) == 22  # the header, and one row that shows that there are more


# ── The Hub ─────────────────────────────────────────────────────────────────────────────────────


def test_rows_of_the_hub_are_streamed(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train-0.jsonl", json_lines(ROWS))
    write(tmp_path / "train-1.jsonl", BROKEN)
    found = read_noted(Hub(str(tmp_path), "train", "main"), "train", Reading(most=20))
    assert [row.values for row in found.rows] == ROWS[:20]
    assert found.more


def test_the_local_cache_is_read_where_nothing_can_be_streamed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import sys
    import types

    taken: list[int] = []

    class Cached(list[dict[str, str]]):
        features = None

        def __iter__(self) -> Any:
            for n, row in enumerate(super().__iter__()):
                taken.append(n)
                yield row

    def load(*names: Any, streaming: bool = False, **options: Any) -> Cached:
        if streaming:
            raise ConnectionError("no network")
        return Cached(ROWS)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    found = read_noted(Hub("me/mails", "train", "abc"), "train", Reading(most=20))
    assert [row.values for row in found.rows] == ROWS[:20]
    assert len(taken) == 21


# ── The sample ──────────────────────────────────────────────────────────────────────────────────


def file_of(folder: Path, rows: list[dict[str, str]]) -> Path:
    return write(folder / "rows.jsonl", json_lines(rows))


def test_a_sample_is_drawn_from_the_first_rows_of_a_file(tmp_path: Path) -> None:
    count = READ_PER_SAMPLED * 150
    path = file_of(tmp_path, table(count + 500))
    prepared = prepare(SPAM, Data(path, limit=150))
    assert prepared.row_counts.read == count > FEWEST_READ
    assert "first rows, because of the limit" in prepared.stages[0].what
    whole = prepare(SPAM, Data(table(count), limit=150))
    assert {part: len(getattr(prepared, part)) for part in ("train", "validation", "test")} == {
        "train": 150, "validation": 120, "test": 150
    }  # fmt: skip
    assert prepared.digests == whole.digests
    assert not any("sorted" in warning for warning in prepared.warnings)


def test_a_file_that_is_read_whole_gives_the_sample_of_all_its_rows(tmp_path: Path) -> None:
    rows = sorted(table(FEWEST_READ), key=lambda row: row["label"])
    prepared = prepare(SPAM, Data(file_of(tmp_path, rows), limit=10))
    assert prepared.digests == prepare(SPAM, Data(rows, limit=10)).digests
    assert "limit" not in prepared.stages[0].what
    assert not any("sorted" in warning for warning in prepared.warnings)


def test_a_file_sorted_by_label_is_warned_of(tmp_path: Path) -> None:
    labels = [f"topic {n:02}" for n in range(40)]
    rows = [{"text": f"mail {n} of {label}", "label": label} for label in labels for n in range(50)]
    prepared = prepare(Classification(), Data(file_of(tmp_path, rows), limit=30))
    (warning,) = [one for one in prepared.warnings if "sorted" in one]
    assert "rows.jsonl, column 'label': the label changes 19 times in the first 1000" in warning
    assert "shuffle the file" in warning
    random.Random(0).shuffle(rows)
    shuffled = prepare(Classification(), Data(file_of(tmp_path, rows), limit=30)).warnings
    assert not any("sorted" in one for one in shuffled)


@pytest.mark.parametrize("every", [3, 50, 200])
def test_shuffled_rows_with_a_rare_class_are_not_taken_for_sorted(
    tmp_path: Path, every: int
) -> None:
    for seed in range(5):
        rows = table(1500, spam_every=every)
        random.Random(seed).shuffle(rows)
        warnings = prepare(SPAM, Data(file_of(tmp_path, rows), limit=50)).warnings
        assert not any("sorted" in warning for warning in warnings)


def test_one_class_in_the_rows_that_are_read_is_an_error_that_names_the_limit(
    tmp_path: Path,
) -> None:
    path = file_of(tmp_path, sorted(table(3000), key=lambda row: row["label"]))
    refused(lambda: prepare(SPAM, Data(path, limit=50)), "two classes", "shuffle the file")
    rows = [row for row in table(3000) if row["label"] == "ham"]
    only = file_of(tmp_path, rows)
    data = Data(table(100, start=9000), test=only, limit=50)
    assert any("changes 0 times" in warning for warning in prepare(SPAM, data).warnings)


def test_an_error_in_the_rows_that_are_read_is_raised(tmp_path: Path) -> None:
    rows = [{"text": "", "label": "a"}, *table(2000)]
    path = file_of(tmp_path, rows)
    with pytest.raises(LoraDomainsError, match="line 1") as caught:
        prepare(Classification(), Data(path, limit=10))
    assert isinstance(caught.value, DataError)
