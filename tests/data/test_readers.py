"""Reading files, the Hub and rows in memory: one test per kind of bad input, and round trips."""

import csv
import io
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import SECRET
from support.tables import cells, quick, refused, write

from lora_domains.data.readers import read
from lora_domains.data.source import Data, Hub, stored_classes
from lora_domains.errors import DataError


def test_a_missing_file_suggests_a_similar_name(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,b\n")
    message = refused(
        lambda: read(tmp_path / "trian.csv", "train"), "trian.csv", "no such file", "train.csv"
    )
    assert "hub:" not in message  # the forms are not what is wrong


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    refused(lambda: read(tmp_path / "nowhere" / "a.csv", "train"), "no folder", "nowhere")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").mkdir()
    refused(lambda: read(str(tmp_path / "rows.csv"), "train"), "found a folder")


@pytest.mark.parametrize("source", ["medical", "rows.pdf", "http://example.org/rows"])
def test_other_strings_are_refused_with_the_accepted_forms(source: str) -> None:
    refused(lambda: read(source, "train"), ".parquet", "embedded:NAME", "hub:OWNER/NAME@REV")


def test_a_table_object_is_refused_with_the_way_to_convert_it(tmp_path: Path) -> None:
    refused(lambda: read({SECRET}, "train"), "set", "a list of dicts")  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "tsv"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, ending: str, content: str) -> None:
    path = write(tmp_path / f"rows.{ending}", content)
    refused(lambda: read(path, "train"), path.name, "empty file")


def test_a_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\n")
    refused(lambda: read(path, "train"), "rows.csv", "only the header")


def test_an_empty_list_is_refused() -> None:
    refused(lambda: read([], "train"), "train rows in memory", "found none")


def test_ragged_rows_are_listed_by_physical_line(tmp_path: Path) -> None:
    bad = "".join(f"a,{SECRET},c\n" for _ in range(7))
    path = write(tmp_path / "rows.csv", f'text,label\n"two\nlines",x\n{bad}{SECRET}\n')
    message = refused(
        lambda: read(path, "train"), "2 columns", "8 invalid rows", "line 4 has 3", "…"
    )
    assert "line 9" not in message


def test_an_open_quote_is_refused_with_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f'text,label\na,b\n"{SECRET},c\nd,e\n')
    refused(lambda: read(path, "train"), "the row beginning on line 3", "closed")


def test_text_after_a_closing_quote_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f'text,label\n"a" {SECRET},b\n')
    refused(lambda: read(path, "train"), "line 2", "doubled")


def test_duplicate_column_names_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text,label,text\n{SECRET},b,c\n")
    refused(lambda: read(path, "train"), "line 1", "1 of 3 names more than once")


def test_the_byte_of_a_wrong_encoding_counts_the_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbfab\xff")
    refused(lambda: read(path, "train"), "line 1, byte 5")


def test_nul_bytes_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\0' + SECRET.encode())
    refused(lambda: read(path, "train"), "line 2, byte 9", "NUL")


def test_broken_json_lines_are_listed_together(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n\n{{"a": {SECRET}}}\n{{"b": "{SECRET}\n')
    refused(lambda: read(path, "train"), "2 invalid lines", "line 3, character 7", "line 4, char")


def test_json_lines_that_are_not_objects_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n["{SECRET}"]\n"{SECRET}"\n')
    refused(lambda: read(path, "train"), "2 invalid rows", "line 2", "line 3", "named columns")


def test_deep_nesting_and_very_long_numbers_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "[" * 200_000 + "\n" + "9" * 5000 + "\n")
    refused(lambda: read(path, "train"), "line 1", "line 2", "too deep")


@pytest.mark.parametrize(
    ("content", "part"),
    [(f'{{"{SECRET}": 1}}', "a JSON dict"), (f'[{{"a": {SECRET}}}]', "line 1, character 8")],
)
def test_json_that_is_not_a_list_is_refused(tmp_path: Path, content: str, part: str) -> None:
    refused(lambda: read(write(tmp_path / "rows.json", content), "train"), part, ".jsonl")


def test_settings_of_other_tools_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("learning_rate: 1.0e-4\n")
    with pytest.raises(DataError, match="Settings are flags here, or a recipe"):
        read(str(tmp_path / "sft.yaml"), "train")


def test_a_description_of_files_of_rows_is_no_file_of_rows(tmp_path: Path) -> None:
    about = tmp_path / "dataset_info.json"
    about.write_text('{"mine": {"file_name": "rows.json"}}')
    with pytest.raises(DataError, match="It describes files of rows: name one of them"):
        read(str(about), "train")
    (tmp_path / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    assert [row.values["output"] for row in read(str(tmp_path), "train")] == ["b"]


def test_a_broken_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", f"PAR1 {SECRET} PAR1")
    refused(lambda: read(path, "train"), "pyarrow cannot read")


def test_rows_know_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", '\ufefftext,label\n"a\nb",x\n\nc,"y, ""z"""\n')
    rows = read(path, "train")
    assert [dict(row.values) for row in rows] == [
        {"text": "a\nb", "label": "x"},
        {"text": "c", "label": 'y, "z"'},
    ]
    assert [row.place for row in rows] == ["rows.csv, line 2", "rows.csv, line 5"]
    assert [row.id for row in rows] == ["train:0", "train:1"]


@quick
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=8), st.sampled_from([",", "\t"]))
def test_csv_round_trip(tmp_path: Path, rows: list[tuple[str, str]], delimiter: str) -> None:
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([("one", "two"), *rows])
    path = write(tmp_path / ("t.csv" if delimiter == "," else "t.tsv"), out.getvalue())
    assert [(r.values["one"], r.values["two"]) for r in read(path, "train")] == rows


@quick
@given(st.lists(st.dictionaries(cells, cells, min_size=1), min_size=1, max_size=8), st.booleans())
def test_json_round_trip(tmp_path: Path, rows: list[dict[str, str]], ascii_only: bool) -> None:
    lines = "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows)
    whole = json.dumps(rows, ensure_ascii=ascii_only)
    for name, content in (("t.jsonl", lines), ("t.ndjson", lines + "\r\n"), ("t.json", whole)):
        assert [row.values for row in read(write(tmp_path / name, content), "train")] == rows


def test_parquet_round_trip(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "ä\n", "choices": ["a", "b"]}, {"text": None, "choices": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = read(tmp_path / "t.parquet", "test")
    assert [row.values for row in found] == rows
    assert found[1].place == "t.parquet, index 1"


def test_very_long_cells_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text,label\n{'x' * 300_000},a\n")
    assert len(read(path, "train")[0].values["text"]) == 300_000


def stub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


class Table(list[dict[str, Any]]):
    @property
    def features(self) -> dict[str, Any]:
        label = types.SimpleNamespace(names=["ham", "spam"])
        return {"label": label, "labels": types.SimpleNamespace(feature=label), "text": None}


def test_hub_rows_have_label_names_and_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Table:
        calls.append((names, options))
        return Table([{"text": "a", "label": 1, "labels": [0, 1]},
                      {"text": "b", "label": -1, "labels": []}])  # fmt: skip

    stub(monkeypatch, load)
    by_name = read("hub:me/sms@refs/convert/parquet/train", "train")
    assert by_name == read(Hub("me/sms", "train", "refs/convert/parquet"), "train")
    assert [row.values["label"] for row in by_name] == ["spam", None]
    assert [row.values["labels"] for row in by_name] == [["ham", "spam"], []]
    assert calls[0] == (("me/sms", None), {"split": "train", "revision": "refs/convert/parquet"})


LISTS = '{{"feature": {}, "_type": "List"}}', "[{}]", '{{"feature": [{}], "_type": "Sequence"}}'


@pytest.mark.parametrize("form", LISTS)
def test_classes_in_lists_have_names_in_every_form_that_is_stored(form: str) -> None:
    feature = form.format('{"names": ["a", "b"], "_type": "ClassLabel"}')
    stored = f'{{"info": {{"features": {{"x": {feature}, "y": {{"names": [{feature}]}}}}}}}}'
    assert stored_classes({b"huggingface": stored.encode()}) == {"x": ["a", "b"]}


def test_a_failed_download_is_an_error_without_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: Any, **options: Any) -> Table:
        raise ConnectionError(SECRET)

    stub(monkeypatch, load)
    refused(lambda: read("hub:me/sms@abc/train", "train"), "ConnectionError", "local file")


def test_the_hub_needs_a_revision() -> None:
    refused(lambda: read("hub:me/sms/train", "train"), "hub:OWNER/NAME@REVISION/SPLIT", "Pin")


@pytest.mark.parametrize(("name", "content", "where"), [
    ("a.jsonl", '{"text": "a"}\n{"text": "zanzibar", "n": 1, "text": "b"}\n',
     "line 2, the key 'text'"),
    ("b.json", '[{"text": "a"}, {"text": "zanzibar", "text": "b"}]', "the key 'text'"),
    ("c.json", '{"text": "a"}\n{"turns": [{"role": "user", "role": "zanzibar"}]}',
     "line 2, the key 'role'"),
])  # fmt: skip
def test_a_key_that_occurs_twice_is_refused(
    tmp_path: Path, name: str, content: str, where: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=where) as caught:
        read(tmp_path / name, "train")
    assert "zanzibar" not in str(caught.value)


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table([["a"], ["b"]], names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", table):
        with pytest.raises(DataError, match="distinct names"):
            Data(source) if source is table else read(source, "train")


def test_a_file_of_one_conversation_is_one_row(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "so"}]
    for name, value, count in (("one", {"messages": messages, "tools": []}, 1),
                               ("several", {"data": [{"messages": messages}] * 3}, 3),
                               ("columns", {"data": messages}, 2)):  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(value, indent=1), encoding="utf-8")
        assert len(read(path, "train")) == count
