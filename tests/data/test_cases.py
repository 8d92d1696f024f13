"""Inputs on which the product was wrong once, each with what is right: one kind of fault a test."""

import csv
import gzip
import io
import json
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.tables import refused, write

from lora_domains.data.leaks import find_leaks
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.source import Data
from lora_domains.errors import LeakError, UsageError
from lora_domains.tasks import Classification

Rows = Sequence[Mapping[str, Any]]
ENDS = (("and it works well", "good"), ("but it is broken", "bad"))
ROWS = [{"text": f"the parcel came back no {n} {ENDS[n % 2][0]}", "label": ENDS[n % 2][1]}
        for n in range(240)]  # fmt: skip


def relabelled(*labels: Any, rows: Rows = ROWS) -> list[dict[str, Any]]:
    """``rows`` with ``labels`` in turn."""
    return [{**row, "label": labels[n % len(labels)]} for n, row in enumerate(rows)]


def comma(rows: Rows) -> str:
    out = io.StringIO(newline="")
    writer = csv.writer(out)
    writer.writerow(list(rows[0]))
    writer.writerows([row.values() for row in rows])
    return out.getvalue()


def lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prepared(path: Path, text: str = "text", **data: Any) -> Prepared:
    return prepare(Classification(text), Data(path, **data))


# ── A value's storage form is no meaning ────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "content", "named", "labels"),
    [
        ("case.csv", comma(relabelled("Bad", "bad", "good", "bad")), "'Bad' (60) and 'bad' (120)",
         ("bad", "good")),
        ("accent.csv", comma(relabelled("réglé", unicodedata.normalize("NFD", "réglé"), "bad")),
         "'regle\\u0301' (80) and 'r\\xe9gl\\xe9' (80)", None),
        ("number.jsonl", lines(relabelled(0, 0.0, "1", 1, 1)), "'0' (48) and '0.0' (48)",
         ("0", "1")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("head", [False, True])
def test_one_label_in_two_spellings_is_refused_by_name_or_merged(
    tmp_path: Path, name: str, content: str, named: str, labels: tuple[str, ...] | None, head: bool
) -> None:
    path = write(tmp_path / name, content)
    task = Classification(head=head)
    message = refused(lambda: prepare(task, Data(path)), "column 'label'", "--merge-labels")
    if name != "accent.csv":
        assert named in message
    else:
        assert "u0301" in message  # the two look the same: by their code points
    merged = prepare(task, Data(path, merge_labels=True)).task.labels
    assert merged is not None
    assert len(merged) == 2
    assert labels in (None, merged)


@pytest.mark.parametrize("spelled", ["Urgent", "URGENT", "urgent "])
def test_a_positive_class_is_found_in_another_spelling(tmp_path: Path, spelled: str) -> None:
    path = write(tmp_path / "rows.csv", comma(relabelled("urgent", "routine")))
    assert prepare(Classification(positive=spelled), Data(path)).task.positive == "urgent"


def test_the_header_of_a_second_file_is_no_row(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", comma(ROWS[:120]) + comma(ROWS[120:]))
    refused(lambda: prepared(path), "rows.csv, line 122", "the header again. ")
    path.write_text(path.read_text() + comma(ROWS[:1]), newline="")
    refused(lambda: prepared(path), "rows.csv, line 122", "the header again, and on line 243")


def test_messages_are_read_as_a_chat(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": row["text"]},
                      {"role": "assistant", "content": "ok"}], "label": row["label"]}
        for row in ROWS
    ]  # fmt: skip
    read = prepared(write(tmp_path / "rows.jsonl", lines(rows)), "messages")
    assert read.train[0].text.startswith("user: the parcel came back no ")
    assert read.train[0].text.endswith("\nassistant: ok")


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [("label", ["bad"], "list"), ("text", ["a", "b"], "list"), ("text", {"a": 1}, "dict"),
     ("label", {"name": "bad"}, "dict")],
)  # fmt: skip
def test_a_value_that_is_no_text_is_refused_with_its_type(
    tmp_path: Path, column: str, value: Any, kind: str
) -> None:
    path = write(tmp_path / "rows.jsonl", lines([{**row, column: value} for row in ROWS]))
    refused(lambda: prepared(path), f"column '{column}'", f"type {kind}")


def parquet(path: Path, columns: Mapping[str, Any]) -> Path:
    pyarrow, parquet_files = (pytest.importorskip(m) for m in ("pyarrow", "pyarrow.parquet"))
    parquet_files.write_table(pyarrow.table(dict(columns)), path)
    return path


def test_bytes_are_no_text(tmp_path: Path) -> None:
    columns = {"text": [row["text"].encode() for row in ROWS], "label": ["a", "b"] * 120}
    path = parquet(tmp_path / "rows.parquet", columns)
    refused(lambda: prepared(path), "column 'text'", "type bytes")


def test_text_in_another_encoding_is_refused_with_its_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"Größe {n}".encode("latin-1") for n in range(240)]
    columns = {"text": pyarrow.array(texts).view(pyarrow.string()), "label": ["a", "b"] * 120}
    refused(lambda: prepared(parquet(tmp_path / "rows.parquet", columns)), "column 'text'", "UTF-8")


def test_class_labels_have_their_stored_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["good", "bad"])}
    )
    rows = relabelled(0, 1)
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    task = prepare(Classification(positive="bad"), Data(tmp_path / "rows.parquet")).task
    assert task.labels == ("bad", "good")


def test_integer_labels_may_begin_one_another(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", comma(relabelled(*range(12))))
    labels = prepared(path).task.labels
    assert labels is not None
    assert {*labels} == {str(n) for n in range(12)}


def test_na_and_none_are_labels_of_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", comma(relabelled("NA", "None", "null")))
    assert prepared(path).task.labels == ("NA", "None", "null")


# ── Several conventions ─────────────────────────────────────────────────────────────────────────


def test_no_row_is_swallowed_by_stray_quotes(tmp_path: Path) -> None:
    texts = [f'"{row["text"]}' if n % 3 == 0 else row["text"] for n, row in enumerate(ROWS)]
    content = "label\ttext\n" + "".join(
        f"{row['label']}\t{text}\n" for row, text in zip(ROWS, texts, strict=True)
    )
    assert prepared(write(tmp_path / "rows.tsv", content)).row_counts.read == 240


@pytest.mark.parametrize(
    "column",
    ["Comment: in your own words", "Any problems?!", "Reply {free text}", "Comment, if any",
     "100 %", "a{", "}", "{{x}}", "{}", "a\nb", "text!r", "x[0]", "x.y", '"quoted"'],
)  # fmt: skip
def test_any_name_of_a_column_can_be_the_text(tmp_path: Path, column: str) -> None:
    rows = [{column: row["text"], "label": row["label"]} for row in ROWS]
    read = prepared(write(tmp_path / "rows.csv", comma(rows)), column)
    assert read.row_counts.read == 240
    assert read.train[0].text in {row["text"] for row in ROWS}


MORE = {"version": 1, "data": ROWS}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("semicolons.csv", "\ufeff" + comma(ROWS).replace(",", ";")),
        ("train.jsonl.gz", gzip.compress(lines(ROWS).encode())),
        ("lines.json", lines(ROWS)), ("nested.json", json.dumps(MORE)),
        ("bom.jsonl", "\ufeff" + lines(ROWS)),
    ],
)  # fmt: skip
def test_the_forms_that_people_have_are_read(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    read = prepared(write(tmp_path / name, content))
    assert read.row_counts.read == 240
    assert read.task.labels == ("bad", "good")


# ── Normalised too far, or not enough ───────────────────────────────────────────────────────────


def test_emoticons_tell_texts_apart() -> None:
    texts = [f"the train was late again and the sun is out {n}" for n in range(60)]
    faces = [(":)", "happy"), (":(", "sad"), (";-)", "happy"), (":-/", "sad"), ("<3", "happy")]

    def rows(turn: int) -> list[dict[str, str]]:
        made = []
        for n, text in enumerate(texts):
            face, label = faces[(n + turn) % len(faces)]
            made.append({"text": f"{text} {face}", "label": label})
        return made

    read = prepare(Classification(), Data(rows(0), test=rows(1)))
    assert read.leaks.exact == 0


HIDDEN: dict[str, Callable[[str], str]] = {
    "soft hyphen": lambda text: text.replace("parcel", "par\u00adcel"),
    "zero-width space": lambda text: text.replace(" came", "\u200b came"),
    "joiner": lambda text: text.replace("parcel", "par\u200dcel"),
    "tag in a word": lambda text: text.replace("parcel", "par<i>cel</i>"),
    "entity": lambda text: text.replace("&", "&amp;").replace("parcel", "p&#97;rcel"),
    "break": lambda text: text + "<br />",
    "tag": lambda text: f"<b>{text}</b>",
    "attributes": lambda text: f"<p class='x'>{text}</p>",
    "no-break space": lambda text: text.replace(" ", "\u00a0"),
}


@pytest.mark.parametrize("change", HIDDEN.values(), ids=HIDDEN)
def test_a_copied_row_hides_behind_nothing(change: Callable[[str], str]) -> None:
    rows = [{**row, "text": row["text"].replace(" and ", " & ")} for row in ROWS]
    train = prepare(Classification(), Data(rows)).train
    text = train[0].text
    changed = change(text)
    assert changed != text
    test = [{"text": changed, "label": "bad"}, {"text": "another one", "label": "good"}]
    leaks = find_leaks(train, prepare(Classification(), Data(test=test)).test)
    assert [(own, other) for own, other, _ in leaks.pairs] == [(train[0].id, "test:0")]


# ── Traps ───────────────────────────────────────────────────────────────────────────────────────


def test_the_label_is_no_column_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", comma(ROWS))
    with pytest.raises(UsageError, match="the answer among the columns of the text"):
        prepare(Classification(("text", "label")), Data(path))


def test_a_copy_of_a_test_row_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", comma(ROWS))
    refused(lambda: prepare(Classification(), Data(path, test=ROWS[:3])), "3: ", kind=LeakError)
