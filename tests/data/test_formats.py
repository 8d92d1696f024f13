"""File forms: delimiters, encodings, quotes, JSON, folders, Arrow, workbooks and tables."""

import codecs
import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from support.rows import SECRET
from support.tables import refused, write

from lora_domains.data.prepare import prepare
from lora_domains.data.readers import read, read_noted
from lora_domains.data.source import Data, Reading, runs
from lora_domains.errors import DataError, UsageError
from lora_domains.tasks import (
    Chat,
    Classification,
    MultiLabel,
    MultipleChoice,
    Preference,
    Task,
)
from lora_domains.tasks.rows import Row

ROWS = [{"text": f"Größe {n}, très cher; naïve", "label": "good" if n % 2 else "bad"}
        for n in range(12)]  # fmt: skip


def table(delimiter: str, rows: list[dict[str, str]] = ROWS, lines: str = "\r\n") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=lines)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def values(path: Path | str, **reading: str) -> list[dict[str, Any]]:
    return [dict(row.values) for row in read(path, "train", Reading(**reading))]


# ── Delimiters ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("lines", ["\n", "\r\n"])
def test_the_delimiter_is_found(tmp_path: Path, delimiter: str, lines: str) -> None:
    path = write(tmp_path / "rows.csv", table(delimiter, lines=lines))
    assert values(path) == ROWS
    notes = " ".join(read_noted(path, "train").notes)
    assert ("detected" in notes) == (delimiter != ",")


def test_a_tsv_that_is_separated_by_commas_is_read(tmp_path: Path) -> None:
    assert values(write(tmp_path / "rows.tsv", table(","))) == ROWS


@pytest.mark.parametrize(
    "content",
    [
        'sep=;\r\ntext;label\r\n"a;b";x\r\nc;y\r\n',
        '"text";"label"\n"a;b";"x"\n"c";"y"\n',
        '\ufefftext;label\n"a;b";x\n\'c;y\n',
    ],
)
def test_what_european_excel_writes_is_read(tmp_path: Path, content: str) -> None:
    first, second = values(write(tmp_path / "rows.csv", content))
    assert first == {"text": "a;b", "label": "x"}
    assert second["label"] == "y"


def test_decimal_commas_do_not_hide_semicolons(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text;price\nan apple, red;1,5\na pear;2,7\n")
    assert values(path)[0] == {"text": "an apple, red", "price": "1,5"}


def test_a_comma_table_whose_name_holds_a_semicolon_stays_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text; free,label\na,b\nc; d,e\n")
    assert values(path) == [{"text; free": "a", "label": "b"}, {"text; free": "c; d", "label": "e"}]


def test_one_column_stays_one_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'text\na; b\n"c, d"\n')
    assert values(path) == [{"text": "a; b"}, {"text": "c, d"}]


def test_two_delimiters_that_fit_are_reported_and_one_can_be_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text;size, m\nfoo;1,5\nbar;2,7\n")
    assert "semicolons would fit too" in read_noted(path, "train").notes[0]
    assert values(path, delimiter=";")[0] == {"text": "foo", "size, m": "1,5"}


def test_ragged_semicolon_rows_are_listed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text;label\na;b\n{SECRET};c;d\n")
    refused(lambda: read(path, "train"), "2 columns separated by semicolons", "line 3 has 3")


def test_a_second_header_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", table(",", lines="\n") + "\ufeff" + table(",", lines="\n"))
    refused(lambda: read(path, "train"), "line 14", "the header again")


# ── Quotes ──────────────────────────────────────────────────────────────────────────────────────


def stray(rows: int, delimiter: str = "\t") -> str:
    lines = [f"{'bad' if n % 3 else 'good'}{delimiter}the lamp number {n} arrived" for n in
             range(rows)]  # fmt: skip
    lines[1] = lines[1].replace("the", '"the')
    lines[5] += '"'
    return "\n".join([f"label{delimiter}text", *lines]) + "\n"


@pytest.mark.parametrize("delimiter", ["\t", ","])
def test_a_stray_quote_swallows_no_rows(tmp_path: Path, delimiter: str) -> None:
    path = write(tmp_path / ("t.tsv" if delimiter == "\t" else "t.csv"), stray(60, delimiter))
    found = read_noted(path, "train")
    assert len(found.rows) == 60
    assert "quotes are read as text" in found.notes[0]
    assert found.rows[1].values["text"].startswith('"the')


def test_a_stray_quote_beside_quoted_cells_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", stray(60) + f'bad\t"{SECRET} ""quoted"""\n')
    refused(lambda: read(path, "train"), "line 3", "joins lines 3 to 7")


def test_quoted_line_breaks_are_kept(tmp_path: Path) -> None:
    rows = [{"text": "hello, \nworld", "label": "bad"}, *ROWS, {"text": "a,b\nc,d", "label": "x"}]
    assert values(write(tmp_path / "rows.csv", table(",", rows))) == rows


# ── Encodings ───────────────────────────────────────────────────────────────────────────────────

LANGUAGES = {
    "cp1252": ["Sehr schön, gerne wieder!", "Die Größe stimmt nicht", "Ça marche à merveille",
               "J’ai payé 30 € c’est trop", "El niño está triste mañana"],
    "cp1251": ["Посылка пришла поздно и была повреждена", "Отличное обслуживание, спасибо"],
    "cp932": ["荷物が遅れて届きました。壊れていました。", "とても良いサービスでした。"],
}  # fmt: skip


@pytest.mark.parametrize("encoding", LANGUAGES)
def test_an_encoding_is_found_and_reported(tmp_path: Path, encoding: str) -> None:
    texts = LANGUAGES[encoding] * 3
    rows = [{"text": text, "label": str(n)} for n, text in enumerate(texts)]
    path = write(tmp_path / "rows.csv", table(";", rows).encode(encoding))
    assert values(path) == rows
    assert read_noted(path, "train").notes[0] == f"encoding {encoding}, detected"


@pytest.mark.parametrize("text", LANGUAGES["cp1252"])
def test_a_single_short_western_text_is_not_taken_for_another_script(
    tmp_path: Path, text: str
) -> None:
    path = write(tmp_path / "rows.csv", f"text;label\n{text};a\n".encode("cp1252"))
    assert values(path)[0]["text"] == text


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_byte_order_marks(tmp_path: Path, encoding: str, suffix: str) -> None:
    mark = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}.get(encoding, b"")
    lines = "\n".join(map(json.dumps, ROWS)) if suffix == "jsonl" else table(",")
    path = write(tmp_path / f"rows.{suffix}", mark + lines.encode(encoding))
    assert values(path) == ROWS


def test_a_broken_byte_in_utf8_is_no_other_encoding(tmp_path: Path) -> None:
    content = table(",", lines="\n").encode() + b"caf\xe9,bad\n"
    path = write(tmp_path / "rows.csv", content)
    refused(lambda: read(path, "train"), f"line 14, byte {content.index(b'caf') + 3}", "--encoding")
    assert len(values(path, encoding="cp1252")) == 13


def test_a_named_encoding_that_is_wrong_or_unknown_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\né,b\n".encode("cp1252"))
    refused(lambda: values(path, encoding="utf-8"), "line 2", "not utf-8")
    refused(lambda: values(path, encoding="latin-99"), "unknown encoding")


# ── Compressed files, JSON ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["rows.csv.gz", "rows.jsonl.gz", "rows.JSON.GZ"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    form = name.lower().split(".")[1]
    content = {"csv": table(";"), "jsonl": "\n".join(map(json.dumps, ROWS)),
               "json": json.dumps(ROWS)}[form]  # fmt: skip
    raw = gzip.compress(content.encode())
    assert values(write(tmp_path / name, raw)) == ROWS
    refused(lambda: read(write(tmp_path / name, raw[:-9]), "train"), "gzip")
    refused(lambda: read(write(tmp_path / name, content.encode()), "train"), "gzip")


def test_json_in_other_shapes(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    contents = {"a.json": lines, "b.json": json.dumps({"version": 1, "data": ROWS}),
                "c.json": json.dumps({"rows": ROWS}), "d.jsonl": json.dumps(ROWS),
                "e.jsonl": json.dumps(ROWS, indent=1), "f.json": "\ufeff" + lines}  # fmt: skip
    for name, content in contents.items():
        assert values(write(tmp_path / name, content)) == ROWS, name
    columns = json.dumps({"text": {"0": SECRET}, "label": {"0": "b"}})
    refused(lambda: read(write(tmp_path / "g.json", columns), "train"), 'orient="records"')


@pytest.mark.parametrize(
    ("name", "hint"), [("rows.zip", "Unpack"), ("rows.xls", ".xlsx"), ("rows.zst", "unzstd")]
)
def test_other_files_are_refused_with_what_to_do(tmp_path: Path, name: str, hint: str) -> None:
    refused(lambda: read(write(tmp_path / name, b"x"), "train"), f"ending in {name[4:]!r}", hint)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (gzip.compress(b"text,label\na,b\n", mtime=0), "compressed by gzip"),
        (b"PK\x03\x04" + bytes(20), "a zip file or a workbook"), (b"PAR1" + bytes(20), "Parquet"),
        (b"\n <!DOCTYPE html>\n<p>log in</p>", "an HTML page"),
        (b"<html><body>404</body></html>", "an HTML page"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.json"])
def test_a_file_of_another_kind_than_its_name_says_is_named(
    tmp_path: Path, name: str, content: bytes, kind: str
) -> None:
    path = write(tmp_path / name, content)
    refused(lambda: read(path, "train"), f"as the name says ({path.suffix})", kind)


def test_a_file_without_an_ending(tmp_path: Path) -> None:
    refused(lambda: read(write(tmp_path / "rows", "a"), "train"), "a file without an ending")


def test_lines_above_the_header_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"# {SECRET}\ntext,label\na,b\n")
    refused(lambda: read(path, "train"), "expected 1 column ", "lines above the header")


def test_an_address_is_refused_with_what_to_do() -> None:
    refused(lambda: read("https://example.org/train.csv", "train"), "an address", "curl -LO")


# ── Parquet, Arrow, folders ─────────────────────────────────────────────────────────────────────


def test_a_folder_of_shards(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for split, rows in (("train", ROWS[:8]), ("test", ROWS[8:])):
        for n in range(2):
            part = pyarrow.Table.from_pylist(rows[n * len(rows) // 2 : (n + 1) * len(rows) // 2])
            parquet.write_table(part, tmp_path / f"{split}-0000{n}-of-00002.parquet")
    assert values(tmp_path) == ROWS[:8]
    test = read(tmp_path, "test")
    assert [dict(row.values) for row in test] == ROWS[8:]
    assert [row.id for row in test] == [f"test:{n}" for n in range(4)]
    assert test[3].place == "test-00001-of-00002.parquet, index 1"
    refused(lambda: read(tmp_path, "validation"), "other splits")


def test_a_folder_without_rows_or_of_two_forms_is_refused(tmp_path: Path) -> None:
    refused(lambda: read(tmp_path, "train"), "a folder without files")
    write(tmp_path / "a.csv", "a,b\n1,2\n")
    write(tmp_path / "b.jsonl", "{}")
    refused(lambda: read(tmp_path, "train"), ".csv and .jsonl")


def saved(tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["good", "bad"])
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": label, "labels": datasets.Sequence(label)}
    )
    rows = [{"text": f"one {n}", "label": n % 2, "labels": [*range(n % 3)]} for n in range(6)]
    return datasets, datasets.Dataset.from_list(rows, features=features)


NAMED = [{"text": f"one {n}", "label": "bad" if n % 2 else "good",
          "labels": ["good", "bad"][: n % 3]} for n in range(6)]  # fmt: skip


def test_class_labels_are_read_by_name_wherever_they_are_stored(tmp_path: Path) -> None:
    datasets, dataset = saved(tmp_path)
    dataset.to_parquet(str(tmp_path / "t.parquet"))
    assert values(tmp_path / "t.parquet") == NAMED
    dataset.save_to_disk(str(tmp_path / "one"))
    assert values(tmp_path / "one") == NAMED
    split = datasets.DatasetDict({"train": dataset, "test": dataset.select([1, 3])})
    split.save_to_disk(str(tmp_path / "two"))
    assert values(tmp_path / "two") == NAMED
    assert [row.values for row in read(tmp_path / "two", "test")] == [NAMED[1], NAMED[3]]
    refused(lambda: read(tmp_path / "two", "validation"), "without a split 'validation'")
    for table in (dataset, dataset.with_format("numpy"), dataset.data.table):
        assert [row.values for row in read(table, "train")] == NAMED


def test_text_that_is_not_utf8_in_a_parquet_file_is_refused_with_its_column(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    array = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"note": array}), tmp_path / "t.parquet")
    refused(lambda: read(tmp_path / "t.parquet", "train"), "column 'note'", "UTF-8")


def test_an_arrow_file(tmp_path: Path) -> None:
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    for name in ("rows.feather", "rows.arrow"):
        feather.write_feather(pyarrow.Table.from_pylist(ROWS), tmp_path / name, chunksize=5)
        assert values(tmp_path / name) == ROWS
    refused(lambda: read(write(tmp_path / "x.feather", b"ARROW1"), "train"), "pyarrow cannot read")


def test_the_sheet_that_was_read_is_named_where_another_may_be_meant(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.title = "info"
    book.active.append(["note"])
    book.active.append([SECRET])
    sheet = book.create_sheet("data")
    sheet.append(["text", "label"])
    sheet.append(["a", "b"])
    book.save(tmp_path / "rows.xlsx")
    assert read(tmp_path / "rows.xlsx", "train")[0].place == "rows.xlsx, sheet 'info', row 2"
    refused(
        lambda: prepare(Classification(), Data(tmp_path / "rows.xlsx")),
        "rows.xlsx, sheet 'info'", "1 column, none named",
    )  # fmt: skip


def test_a_workbook(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["text", "label", None])
    book.active.append(["a\nb", 1, None])
    book.active.append([])
    book.active.append(["c", 2.5, None])
    book.save(tmp_path / "rows.xlsx")
    rows = read(tmp_path / "rows.xlsx", "train")
    assert [row.values for row in rows] == [
        {"text": "a\nb", "label": 1},
        {"text": "c", "label": 2.5},
    ]
    assert [row.place for row in rows] == ["rows.xlsx, row 2", "rows.xlsx, row 4"]
    refused(lambda: read(write(tmp_path / "x.xlsx", b"PK"), "train"), "openpyxl cannot read")


def test_a_workbook_without_openpyxl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UsageError, match=r"x\.xlsx.*lora-domains\[excel\]'.*as CSV"):
        read(write(tmp_path / "x.xlsx", b"PK"), "train")


# ── Tables in memory ────────────────────────────────────────────────────────────────────────────


def test_tables_in_memory_are_taken_as_rows() -> None:
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for source in (pandas.DataFrame(ROWS), pyarrow.Table.from_pylist(ROWS)):
        data = Data(source, test=source)
        assert data.train == data.test == ROWS
        assert data == Data(source, test=source)
        assert [row.values for row in read(source, "train")] == ROWS


@pytest.mark.parametrize("task", [Chat(), MultipleChoice(), MultiLabel(), Preference()])
def test_lists_in_a_table_of_pandas_are_lists(task: Task, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")

    def turn(role: str, text: str) -> list[dict[str, Any]]:
        return [{"role": role, "content": [{"type": "text", "text": text}]}]

    asked, answer = turn("user", "why"), turn("assistant", "so")
    rows = [
        {"messages": asked + answer, "question": "why", "choices": ["a", "b"], "answer": 1,
         "text": f"why {n}", "labels": ["x", "y"][: n % 3], "prompt": asked, "chosen": answer,
         "rejected": turn("assistant", "no")}
        for n in range(6)
    ]  # fmt: skip
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    table = pandas.read_parquet(tmp_path / "rows.parquet")  # with arrays for the lists
    task = task.with_labels([Row(row, "train", n, f"index {n}") for n, row in enumerate(rows)])
    for source in (table, table.to_dict("records")):
        made = [task.example(row) for row in read(source, "train")]
        assert made == [task.example(row) for row in read(rows, "train")]


def test_a_table_with_a_name_twice_is_refused() -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(DataError, match="1 names more than once"):
        Data(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


# ── Locations ────────────────────────────────────────────────────────────────────────────────────


def test_runs_of_lines_are_joined_and_the_rest_counted() -> None:
    assert runs([3, 7, 8, 9, 12]) == "3, 7–9, 12"
    assert runs([1, 3, 5, 6], most=2) == "1, 3 and 2 more"
