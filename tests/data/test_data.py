"""Reading, checking, splitting and leaks: one test per bad input, properties for the rest."""

import csv
import io
import json
import random
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_domains.data.identity import digest_key, identity, keyed_digest, normalise
from lora_domains.data.leaks import contained, find_leaks
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.readers import read
from lora_domains.data.source import Data, Hub
from lora_domains.errors import AdapterError, DataError, LeakError, LoraDomainsError, UsageError
from lora_domains.tasks import (
    Classification,
    Example,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Task,
)

SECRET = "zq-hush-93"
SPAM = Classification(positive="spam")
REAL = Path(__file__).parents[3] / "shared" / "data"

quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def table(n: int, spam_every: int = 3, start: int = 0) -> list[dict[str, str]]:
    return [
        {"text": f"message number {i}", "label": "spam" if i % spam_every == 0 else "ham"}
        for i in range(start, start + n)
    ]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(
    step: Callable[[], object], *parts: str, kind: type[LoraDomainsError] = DataError
) -> str:
    """The message of the error ``step`` raises: it holds the parts and never the secret."""
    with pytest.raises(kind) as caught:
        step()
    message = str(caught.value)
    assert SECRET not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def refuses(rows: Iterable[dict[str, Any]], *parts: str, task: Task = SPAM, **data: Any) -> str:
    return refused(lambda: prepare(task, Data(list(rows), **data)), *parts)


# ---- files


def test_missing_file_suggests_a_near_one(tmp_path: Path) -> None:
    write(tmp_path / "train.csv", "text,label\na,b\n")
    refused(lambda: read(tmp_path / "trian.csv", "train"), "trian.csv", "no such file", "train.csv")


def test_missing_folder_is_named(tmp_path: Path) -> None:
    refused(lambda: read(tmp_path / "nowhere" / "a.csv", "train"), "no folder", "nowhere")


def test_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").mkdir()
    refused(lambda: read(str(tmp_path / "rows.csv"), "train"), "found a folder")


@pytest.mark.parametrize("source", ["medical", "rows.xlsx", "http://example.org/rows"])
def test_other_strings_are_told_the_forms(source: str) -> None:
    refused(lambda: read(source, "train"), ".parquet", "embedded:NAME", "hub:OWNER/NAME@REV")


def test_a_table_object_is_told_how(tmp_path: Path) -> None:
    refused(lambda: read({SECRET}, "train"), "set", 'to_dict("records")')  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "tsv"])
@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
def test_empty_file(tmp_path: Path, ending: str, content: str) -> None:
    path = write(tmp_path / f"rows.{ending}", content)
    refused(lambda: read(path, "train"), path.name, "empty file")


def test_header_only(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "text,label\n")
    refused(lambda: read(path, "train"), "rows.csv", "only the header")


def test_no_rows_in_memory() -> None:
    refused(lambda: read([], "train"), "train rows in memory", "found none")


def test_ragged_lines_are_gathered_by_physical_line(tmp_path: Path) -> None:
    bad = "".join(f"a,{SECRET},c\n" for _ in range(7))
    path = write(tmp_path / "rows.csv", f'text,label\n"two\nlines",x\n{bad}{SECRET}\n')
    message = refused(lambda: read(path, "train"), "2 columns", "8 other rows", "line 4 has 3", "…")
    assert "line 9" not in message


def test_open_quote_names_the_line_it_begins_on(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f'text,label\na,b\n"{SECRET},c\nd,e\n')
    refused(lambda: read(path, "train"), "the row beginning on line 3", "closed")


def test_text_after_a_quote(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f'text,label\n"a" {SECRET},b\n')
    refused(lambda: read(path, "train"), "line 2", "doubled")


def test_duplicate_header(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text,label,text\n{SECRET},b,c\n")
    refused(lambda: read(path, "train"), "line 1", "1 of 3 names more than once")


def test_semicolons_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text;label\n{SECRET};b\n")
    refused(lambda: read(path, "train"), "semicolons")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_wrong_encoding_names_byte_line_and_cure(tmp_path: Path, encoding: str) -> None:
    text = f"text,label\nplain,x\n{SECRET} é,y\n"
    path = write(tmp_path / "rows.csv", text.encode(encoding))
    message = refused(lambda: read(path, "train"), "another encoding", "iconv -f", "UTF-8")
    at = text.encode("latin-1").index(b"\xe9")
    assert ("UTF-16" in message) if encoding == "utf-16" else (f"line 3, byte {at}" in message)


def test_wrong_encoding_after_a_byte_order_mark_counts_it(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", b"\xef\xbb\xbfab\xff")
    refused(lambda: read(path, "train"), "line 1, byte 5")


def test_nul_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b'{"a": 1}\n\0' + SECRET.encode())
    refused(lambda: read(path, "train"), "line 2, byte 9", "NUL")


def test_broken_json_lines_are_gathered(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n\n{{"a": {SECRET}}}\n{{"b": "{SECRET}\n')
    refused(lambda: read(path, "train"), "2 other lines", "line 3, character 7", "line 4, char")


def test_json_lines_that_are_not_objects(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", f'{{"a": 1}}\n["{SECRET}"]\n"{SECRET}"\n')
    refused(lambda: read(path, "train"), "2 other rows", "line 2", "line 3", "named columns")


def test_endless_nesting_and_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "[" * 200_000 + "\n" + "9" * 5000 + "\n")
    refused(lambda: read(path, "train"), "line 1", "line 2", "too deep")


@pytest.mark.parametrize(
    ("content", "part"),
    [(f'{{"{SECRET}": 1}}', "a JSON dict"), (f'[{{"a": {SECRET}}}]', "line 1, character 8")],
)
def test_json_that_is_not_a_list(tmp_path: Path, content: str, part: str) -> None:
    refused(lambda: read(write(tmp_path / "rows.json", content), "train"), part, ".jsonl")


def test_broken_parquet(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", f"PAR1 {SECRET} PAR1")
    refused(lambda: read(path, "train"), "pyarrow does not read")


def test_reading_keeps_places(tmp_path: Path) -> None:
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


def test_very_long_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"text,label\n{'x' * 300_000},a\n")
    assert len(read(path, "train")[0].values["text"]) == 300_000


# ---- the Hub and the embedded rows


def stub(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))


class Table(list[dict[str, Any]]):
    @property
    def features(self) -> dict[str, Any]:
        return {"label": types.SimpleNamespace(names=["ham", "spam"]), "text": None}


def test_hub_rows_have_label_names_and_a_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(*names: Any, **options: Any) -> Table:
        calls.append((names, options))
        return Table([{"text": "a", "label": 1}, {"text": "b", "label": -1}])

    stub(monkeypatch, load)
    by_name = read("hub:me/sms@refs/convert/parquet/train", "train")
    assert by_name == read(Hub("me/sms", "train", "refs/convert/parquet"), "train")
    assert [row.values["label"] for row in by_name] == ["spam", None]
    assert calls[0] == (("me/sms", None), {"split": "train", "revision": "refs/convert/parquet"})


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*names: Any, **options: Any) -> Table:
        raise ConnectionError(SECRET)

    stub(monkeypatch, load)
    refused(lambda: read("hub:me/sms@abc/train", "train"), "ConnectionError", "local file")


def test_hub_without_revision() -> None:
    refused(lambda: read("hub:me/sms/train", "train"), "hub:OWNER/NAME@REVISION/SPLIT", "Pin")


def test_embedded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def domain_rows(name: str, split: str) -> list[dict[str, str]]:
        assert name == "medical"
        return table(200, start={"train": 0, "validation": 300, "test": 600}[split])

    world = types.SimpleNamespace(domain_rows=domain_rows)
    monkeypatch.setitem(sys.modules, "lora_domains.embedded.world", world)
    done = prepare(SPAM, Data.embedded("medical"))
    assert (len(done.train), len(done.validation), len(done.test)) == (200, 200, 200)
    assert done.train[3].place == "embedded:medical, index 3"
    assert done.warnings == ()


# ---- rows that cannot be used


def test_neither_train_nor_test() -> None:
    refused(lambda: prepare(SPAM, Data(validation=table(9))), "training rows", "found neither")


def test_missing_column_is_suggested() -> None:
    rows = [{"text": SECRET, "lable": "x"}] * 20
    refuses(rows, "the column 'label'", "columns text, lable", "Did you mean 'lable'?")


def test_column_in_other_case_is_suggested() -> None:
    refuses([{"TEXT": SECRET, "LABEL": "x"}] * 20, "Did you mean 'TEXT'?")


def test_a_row_taken_for_the_header_is_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"{SECRET},urgent\nmore,calm\n")
    refused(
        lambda: prepare(SPAM, Data(path)), "2 columns, none of them named", "first line a header"
    )


@pytest.mark.parametrize("role", ["group", "slices"])
def test_missing_group_or_slice_column(role: str) -> None:
    rows = [row | {"patient": SECRET} for row in table(30)]
    value: Any = "pateint" if role == "group" else ("pateint",)
    refuses(rows, "the column 'pateint'", "Did you mean 'patient'?", **{role: value})


def test_slices_are_only_needed_where_rows_are_scored() -> None:
    test = [row | {"site": "a", "text": row["text"] + "!?"} for row in table(30, start=90)]
    done = prepare(SPAM, Data(table(60), test=test, slices=("site",)))
    assert done.test[0].slices == {"site": "a"}
    assert done.train[0].slices == {"site": "(missing)"}


def test_a_slice_column_of_texts_is_refused() -> None:
    rows = [row | {"note": f"{SECRET} {i}"} for i, row in enumerate(table(60))]
    refuses(rows, "column 'note'", "60 values in 60 rows", slices=("note",))


@pytest.mark.parametrize(
    ("value", "word"),
    [("", "found ''"), (None, "null"), (" \n", "only whitespace"), (float("nan"), "null")],
)
@pytest.mark.parametrize("column", ["text", "label", "who"])
def test_one_bad_cell(value: Any, word: str, column: str) -> None:
    rows: list[dict[str, Any]] = [row | {"who": "me", "note": SECRET} for row in table(30)]
    rows[17][column] = value
    refuses(rows, "index 17", f"column {column!r}", word, group="who")


def test_bad_rows_of_all_splits_come_in_one_error() -> None:
    train, test = table(40), table(20, start=50)
    for i in range(3, 9):
        train[i]["text"] = " "
    test[5]["label"] = train[4]["label"] = "span"
    train[4]["text"] = "good"
    parts = ("7 rows", "text; one of the labels", "train rows in memory, index 3", "and 2 more")
    task = Classification(labels=("ham", "spam"))
    message = refuses(train, *parts, task=task, test=test)
    assert "index 8" not in message


def test_unknown_label_is_named_and_suggested() -> None:
    rows = table(40)
    rows[7]["label"] = "span"
    task = Classification(labels=("ham", "spam"))
    refuses(rows, "index 7, column 'label'", "'span'", "Did you mean 'spam'", task=task)


@pytest.mark.parametrize(
    ("labels", "different"), [(None, 40), (("ham", "spam"), 40), (("ham", "spam"), 10)]
)
def test_a_label_column_that_holds_text_is_not_quoted(
    labels: tuple[str, ...] | None, different: int
) -> None:
    rows = [{"text": "a", "label": f"{SECRET} {i % different}"} for i in range(40)]
    refuses(rows, "label", task=Classification(labels=labels, positive="spam"))


@pytest.mark.parametrize("labels", [None, ("ham", "spam")])
def test_one_class(labels: tuple[str, ...] | None) -> None:
    rows = [{"text": f"{SECRET} {i}", "label": "ham"} for i in range(40)]
    refuses(rows, "classes", task=Classification(labels=labels))


def test_every_label_null() -> None:
    refuses([{"text": SECRET, "label": None}] * 30, "column 'label'", "null")


def test_two_rows_are_too_few() -> None:
    refuses(table(2), "at least 8 training rows", "found 2 rows")
    refuses(table(2), "at least 8 training rows", "found 2 rows", task=LanguageModelling())


def test_a_class_of_one_row_among_two() -> None:
    refuses(table(30, spam_every=30), "2 rows of each of at least 2 classes", "1 with 2 or more")


def test_a_class_of_one_row_among_many_is_a_warning() -> None:
    rows = [{"text": f"row {i}", "label": f"c{i % 10}"} for i in range(200)]
    rows.append({"text": "the odd one", "label": "rare"})
    done = prepare(Classification(), Data(rows))
    assert any("rare" in warning for warning in done.warnings)
    assert any(row.answer == " rare" for row in done.train)


def test_limit_of_nothing() -> None:
    refused(lambda: prepare(SPAM, Data(table(30), limit=0)), "at least 1", kind=UsageError)


def test_too_little_is_said() -> None:
    words = " ".join(prepare(SPAM, Data(table(40), test=table(12, start=60))).warnings)
    assert "training rows" in words
    assert "only 12 test rows" in words
    assert "only 4 test rows are 'spam'" in words


# ---- splitting


def everyone(done: Prepared) -> list[Example]:
    return [*done.train, *done.validation, *done.test]


@pytest.mark.parametrize(
    ("n", "validation", "test"), [(8, 1, 1), (100, 16, 20), (1000, 80, 200), (9000, 500, 1800)]
)
def test_sizes(n: int, validation: int, test: int) -> None:
    done = prepare(SPAM, Data(table(n)))
    assert (len(done.validation), len(done.test)) == (validation, test)
    assert sorted(row.id for row in everyone(done)) == sorted(f"train:{i}" for i in range(n))
    if n >= 1000:
        assert len({row.id[-1] for row in done.test}) == 10
    for rows in (done.validation, done.test):
        spam = sum(row.answer == " spam" for row in rows)
        assert abs(spam - len(rows) / 3) <= 1


def test_given_splits_are_kept_in_order() -> None:
    done = prepare(SPAM, Data(table(50), table(20, start=100), table(20, start=200)))
    assert [row.id for row in done.validation] == [f"validation:{i}" for i in range(20)]
    assert [row.id for row in done.train] == [f"train:{i}" for i in range(50)]
    assert done.row_counts.read == 90
    assert [stage.rows_out for stage in done.stages] == [90] * 4


def test_splits_follow_the_seed_and_no_hash(tmp_path: Path) -> None:
    code = (
        "from lora_domains.data.prepare import *; from lora_domains.tasks import *\n"
        "rows = [{'text': f'a{i} b c d e f g{i % 40}', 'label': 'xy'[i % 2], 'who': str(i % 31)}"
        " for i in range(200)]\n"
        "d = prepare(Classification(), Data(rows, group='who', limit=90), seed=3)\n"
        "print(sorted(d.digests.items()), d.leaks, d.warnings)"
    )
    outs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outs) == 1
    one, other = (prepare(SPAM, Data(table(100)), seed=seed).digests for seed in (0, 1))
    assert one != other


rows_with_groups = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, 12), st.sampled_from("ab")),
    min_size=12,
    max_size=80,
).filter(lambda rows: all(Counter(label for _, _, label in rows)[c] > 3 for c in "ab"))


def hang_together(rows: list[tuple[int, int, str]]) -> int:
    """How many bundles the rows form when shared texts and groups link them."""
    bundles: list[set[str]] = []
    for t, g, _ in rows:
        linked = {f"t{t}", f"g{g}"}
        apart = [bundle for bundle in bundles if not bundle & linked]
        bundles = [*apart, linked.union(*(b for b in bundles if b & linked))]
    return len(bundles)


@quick
@given(rows_with_groups, st.integers(0, 5))
def test_no_group_or_text_spans_splits(rows: list[tuple[int, int, str]], seed: int) -> None:
    table_ = [{"text": f"No. {t}", "label": c, "who": f"p{g}"} for t, g, c in rows]
    task, data = Classification(labels=("a", "b")), Data(table_, group="who")
    if hang_together(rows) < 3:  # the test set takes one bundle, validation another
        refused(lambda: prepare(task, data, seed), "at least 3 groups")
        return
    done = prepare(task, data, seed)
    assert sorted(row.id for row in everyone(done)) == sorted(
        f"train:{i}" for i in range(len(rows))
    )
    parts = (done.train, done.validation, done.test)
    assert all(parts)
    for mine in ({row.group for row in part} for part in parts):
        assert sum(bool(mine & {row.group for row in part}) for part in parts) == 1
    for texts in ({identity(row) for row in part} for part in parts):
        assert sum(bool(texts & {identity(row) for row in part}) for part in parts) == 1
    assert done.leaks.exact == 0


def test_whole_groups_come_near_the_size() -> None:
    rows = [row | {"who": str(i // 5)} for i, row in enumerate(table(1000))]
    done = prepare(SPAM, Data(rows, group="who"))
    assert abs(len(done.test) - 200) <= 10
    assert abs(len(done.validation) - 80) <= 10


def test_one_group_cannot_be_split() -> None:
    refuses(
        [row | {"who": SECRET} for row in table(30)],
        "at least 3 groups",
        "found 1",
        "--test",
        group="who",
    )


def test_shared_groups_are_counted() -> None:
    train = [row | {"who": str(i)} for i, row in enumerate(table(60))]
    test = [row | {"who": str(i + 50)} for i, row in enumerate(table(30, start=100))]
    done = prepare(SPAM, Data(train, table_with(train, 200), test, group="who"))
    assert "10 groups have rows in both train and test" in done.warnings


def table_with(rows: list[dict[str, str]], start: int) -> list[dict[str, str]]:
    return [row | {"text": f"other {start + i}", "who": f"v{i}"} for i, row in enumerate(rows)]


@pytest.mark.parametrize("limit", [2, 10, 31, 1000])
def test_limit_samples_every_class(limit: int) -> None:
    rows = sorted(table(300, spam_every=10), key=lambda row: row["label"])
    done = prepare(SPAM, Data(rows, test=table(50, start=500), limit=limit))
    assert len(done.train) == min(limit, 270)
    assert len(done.test) == min(limit, 50)
    assert {row.answer for row in done.train} == {" ham", " spam"}
    assert [row.id for row in done.train] != [f"train:{i}" for i in range(len(done.train))]
    assert (done.stages[-1].name, done.stages[-1].rows_out) == ("limit", len(everyone(done)))


def test_test_rows_alone() -> None:
    done = prepare(Generation(), Data(test=[{"question": "why", "answer": "so"}]))
    assert (done.train, done.validation, len(done.test)) == ((), (), 1)


# ---- duplicates and leaks


def test_duplicates_are_counted_and_kept() -> None:
    rows = [*table(60), {"text": "Message  NUMBER 3", "label": "ham"}]
    done = prepare(SPAM, Data(rows, test=table(20, start=90)))
    assert done.row_counts.duplicates == 1
    assert len(done.train) + len(done.validation) == 61
    assert "1 training texts have more than one label" in done.warnings


def test_repeated_test_rows_are_said() -> None:
    test = table(20, start=90)
    done = prepare(SPAM, Data(table(60), test=[*test, test[0], test[0]]))
    assert any(line.startswith("2 test rows repeat another test row") for line in done.warnings)
    assert done.row_counts.duplicates == 0


@pytest.mark.parametrize("value", [None, 3, ["text"]])
def test_a_row_function_gives_a_row(value: Any) -> None:
    data = Data(table(60), row=lambda row: value)
    refused(
        lambda: prepare(SPAM, data), "index 0", f"found {type(value).__name__}", "Return a dict"
    )


def test_columns_have_names() -> None:
    rows: list[Any] = [{0: SECRET, 1: "spam"}] * 40
    refused(lambda: prepare(SPAM, Data(rows)), "40 other rows", "named columns")


def test_half_a_surrogate_pair_is_refused_with_its_place(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in table(40)]
    lines[7] = json.dumps({"text": f"{SECRET} \ud83d", "label": "spam"})
    path = write(tmp_path / "cut.jsonl", "\n".join(lines))
    refused(lambda: prepare(SPAM, Data(str(path))), "line 8, column 'text'", "surrogate")


def test_the_key_of_the_digests_is_whole_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = digest_key(tmp_path / "out")
    assert len(key) == 32
    assert digest_key(tmp_path / "out") == key
    path = tmp_path / "out" / ".digest-key"
    assert path.stat().st_mode & 0o077 == 0
    for broken in ("", "abcd", "no key at all"):
        path.write_text(broken)
        with pytest.raises(AdapterError, match="a key of 32 bytes"):
            digest_key(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_domains.atomic.os.fsync", full)
    with pytest.raises(AdapterError, match="No space left"):
        digest_key(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_exact_leaks_stop_with_places_and_no_text() -> None:
    test = table(20, start=100)
    test[4]["text"] = f" {SECRET.upper()}."
    train = [*table(40), {"text": SECRET, "label": "ham"}]
    data = Data(train, validation=table(20, start=200), test=test)
    parts = ("found 1:", "train:40", "test:4", "index 40", "--drop-leaks")
    refused(lambda: prepare(SPAM, data), *parts, kind=LeakError)


def test_dropped_leaks_are_counted_and_never_from_test() -> None:
    train, validation = table(40), table(20, start=200)
    test = [*table(20, start=100), train[3], validation[5], train[3]]
    done = prepare(SPAM, Data(train, validation, test, drop_leaks=True))
    assert (len(done.train), len(done.validation), len(done.test)) == (39, 19, 23)
    assert (done.row_counts.refused, done.leaks.exact) == (2, 0)
    assert "2 rows dropped" in done.stages[-1].what
    assert done.stages[-1].rows_in - done.stages[-1].rows_out == 2


def test_the_test_file_given_as_train() -> None:
    data = Data(table(40), test=table(40), validation=table(20, start=90), drop_leaks=True)
    refused(lambda: prepare(SPAM, data), "train without the rows of test", "found 0 rows")


def test_validation_rows_that_are_training_rows_warn() -> None:
    done = prepare(SPAM, Data(table(40), table(25, start=35), table(20, start=90)))
    assert any(warning.startswith("5 validation rows") for warning in done.warnings)


def examples(texts: Iterable[str], split: str) -> list[Example]:
    return [Example(f"{split}:{i}", text, " x") for i, text in enumerate(texts)]


def test_planted_leaks_in_template_rows() -> None:
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(900)]
    places = ["".join(draw.choices("klmnopqrst", k=6)) for _ in range(900)]

    def row() -> str:
        words = [draw.choice(names), draw.choice(places), draw.choice(names), draw.choice(places)]
        return (
            f"the patient {words[0]} {words[1]} was seen at the clinic in {words[2]} near "
            f"{words[3]} and denies pain since {draw.choice(names)} came {draw.choice(places)}"
        )

    train = [row() for _ in range(1000)]
    clean = [row() for _ in range(450)]
    exact = [text.upper().replace(" ", "  ") + "." for text in train[:25]]
    near = [text.replace("denies", "reports", 1) + " again" for text in train[25:50]]
    leaks = find_leaks(examples(train, "train"), examples([*clean, *exact, *near], "test"))
    assert leaks.exact == 25
    assert all(a == f"train:{int(b[5:]) - 450}" for a, b, _ in leaks.pairs if int(b[5:]) >= 450)
    false = sum(int(b[5:]) < 450 for _, b, _ in leaks.pairs)
    assert false <= 2
    assert leaks.near - false >= 18


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_text_holds_what_stands_in_it_and_nothing_else(seed: int) -> None:
    """A question with its answer, and a row without its template; neither when one word differs."""
    draw = random.Random(seed)

    def words(count: int) -> list[str]:
        return ["".join(draw.choices("abcdefghij", k=7)) for _ in range(count)]

    asked = [
        Example(f"q:{n}", f"The {' '.join(words(draw.randint(1, 4)))} is", f" {words(1)[0]}")
        for n in range(6)
    ]
    rows = [
        Example(f"t:{n}", f"text: {' '.join(words(draw.randint(8, 20)))}\nlabel:", " yes")
        for n in range(6)
    ]
    texts = [
        Example(
            f"g:{n}", "",
            f"{' '.join(words(5))}. {asked[n].prompt.upper()}{asked[n].answer}! "
            f"{' '.join(words(9))}; {rows[n].prompt[6:-7]}, {' '.join(words(3))}",
        )
        for n in range(3)
    ]  # fmt: skip
    for kind in (asked, rows):
        assert contained(texts, kind) == [(f"g:{n}", kind[n].id) for n in range(3)]
    assert contained(texts, [replace(one, answer=" another") for one in asked]) == []
    longer = [replace(row, prompt=row.prompt.replace("\n", f" {row.id}\n")) for row in rows]
    assert contained(texts, longer) == []


@settings(max_examples=100)
@given(
    texts=st.lists(st.text("ab ", max_size=30), max_size=4),
    rows=st.lists(st.text("ab ", max_size=40), max_size=4),
)
def test_runs_are_found_as_by_looking_at_every_place(texts: list[str], rows: list[str]) -> None:
    plain = [Example(f"g:{n}", "", text) for n, text in enumerate(texts)]
    other = [Example(f"t:{n}", "", row) for n, row in enumerate(rows)]
    found = contained(plain, other)
    for text in plain:
        for row in other:
            one, two = text.answer.split(), row.answer.split()
            within = len(two) >= 8 and any(
                one[at : at + len(two)] == two for at in range(len(one) - len(two) + 1)
            )
            same = len(two) >= 3 and one == two
            assert ((text.id, row.id) in found) == (within or same)


def test_a_short_row_is_held_where_it_is_the_whole_text() -> None:
    rows = [Example(f"t:{n}", f"text: {text}\nlabel:", " ham") for n, text in
            enumerate(["Ok, see you!", "call me later today", "France", "!!!"])]  # fmt: skip
    texts = [Example(f"g:{n}", "", text) for n, text in
             enumerate(["ok see you", "please call me later today", "France", "..."])]  # fmt: skip
    assert contained(texts, rows) == [("g:0", "t:0")]


def test_rows_that_begin_alike_cost_no_more() -> None:
    """20,000 of them in 300 texts that begin so too: looked up, not compared one by one."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(count))

    rows = [Example(f"t:{n}", "", f"The patient was admitted with {words(30)}")
            for n in range(20_000)]  # fmt: skip
    texts = [Example(f"g:{n}", "", f"The patient was admitted with {words(100)}")
             for n in range(300)]  # fmt: skip
    texts.append(replace(rows[77], id="copy"))
    assert contained(texts, rows) == [("copy", "t:77")]


def test_short_rows_are_never_near() -> None:
    train, other = examples(["z a b c d e"], "train"), examples(["a b c d e"], "test")
    assert find_leaks(train, other).near == 0


def test_repeated_rows_do_not_hide_a_near_leak() -> None:
    text = "one two three four five six seven eight nine ten"
    other = examples([text + " eleven"] * 5, "test")
    assert find_leaks(examples([text] * 9, "train"), other).near == 5


def test_what_a_template_repeats_is_not_near() -> None:
    rows = [f"{i} was seen at the clinic in the morning by the same doctor {i}" for i in range(20)]
    assert find_leaks(examples(rows[:18], "train"), examples(rows[18:], "test")).near == 0


def test_an_exact_copy_counts_once_among_the_rows_of_an_n_gram() -> None:
    text = "one two three four five six seven eight nine ten"
    other = examples([text, text + " eleven", text + " twelve"], "test")
    leaks = find_leaks(examples([text], "train"), other)
    assert (leaks.exact, leaks.near) == (1, 2)


def test_same_question_with_other_candidates_is_no_leak() -> None:
    def row(id_: str, *choices: str) -> Example:
        return Example(id_, "Which is true?", choices[0], choices, 0)

    train = [row("train:0", " a", " b"), row("train:1", " c", " d")]
    other = [row("test:0", " e", " f"), row("test:1", " d", " c")]
    assert find_leaks(train, other).pairs == (("train:1", "test:1", "exact"),)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is the top-up limit?", "what is the TOP UP limit", True),
        ("costs of$14", "costs of $14", True),
        ("ﬁne\u00a0print", "fine print", True),
        ("3 * 4", "3 / 4", False),
        ("C#", "C", False),
        ("is -5 small", "is 5 small", False),
        ("great 👍", "great 👎", False),
        ("की", "का", False),
    ],
)
def test_what_makes_two_rows_the_same(one: str, other: str, same: bool) -> None:
    a, b = examples([one, other], "t")
    assert (identity(a) == identity(b)) is same


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text}\n") == normalise(text)


def test_keyed_digest_needs_the_key() -> None:
    assert keyed_digest("a", b"k") != keyed_digest("a", b"l")
    assert keyed_digest("a", b"k") != keyed_digest("b", b"k")
    assert keyed_digest("a", b"k") == keyed_digest("a", b"k")
    assert len(keyed_digest("\ud800", b"")) == 64


def test_digests_follow_rows_and_order() -> None:
    rows = table(60)
    parts = {"validation": table(20, start=100), "test": table(20, start=200)}
    one = prepare(SPAM, Data(rows, **parts)).digests  # type: ignore[arg-type]
    two = prepare(SPAM, Data(rows[::-1], **parts)).digests  # type: ignore[arg-type]
    assert one["train"] != two["train"]
    assert one["test"] == two["test"]


def test_large_sets_take_seconds() -> None:
    from time import process_time

    draw = random.Random(1)
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(13_000)]
    start = process_time()
    assert find_leaks(examples(texts[:10_000], "a"), examples(texts[10_000:], "b")).near == 0
    assert process_time() - start < 5


def test_importing_is_light() -> None:
    heavy = "{'torch', 'datasets', 'pandas', 'pyarrow', 'sklearn', 'numpy', 'evaluate'}"
    code = f"import sys, lora_domains.domain; print({heavy} & set(sys.modules))"
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, check=True
    )
    assert done.stdout.strip() == b"set()"


# ---- the real sets, where the checkout has them


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not beside this checkout")
@pytest.mark.parametrize(
    ("name", "task", "exact"),
    [
        ("banking77", Classification(), 25),
        ("twitter_financial_news", Classification(), 12),
        ("bitext_support", Classification(), 13),
        ("medquad", Generation(), 46),
        ("sms_spam", SPAM, 0),
    ],
)
def test_known_leaks_of_public_sets(name: str, task: Task, exact: int) -> None:
    data = Data(REAL / name / "train.jsonl", test=REAL / name / "test.jsonl")
    if exact:
        with pytest.raises(LeakError, match=f"found {exact}:"):
            prepare(task, data)
    else:
        assert prepare(task, data).leaks.exact == 0


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is not beside this checkout")
def test_multiple_choice_probe() -> None:
    done = prepare(MultipleChoice(), Data(test=REAL / "probe_openbookqa" / "test.jsonl"))
    assert len(done.test) == 500
