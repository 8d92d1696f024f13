"""Checks of rows against the domain: one test per kind of row that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.rows import SECRET
from support.tables import SPAM, refused, refuses, table, write

from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.errors import DataError, UsageError
from lora_domains.tasks import Chat, Classification, LanguageModelling, MultipleChoice, Preference


def test_data_without_training_and_test_rows_is_refused() -> None:
    refused(lambda: prepare(SPAM, Data(validation=table(9))), "training rows", "found neither")


def test_a_limit_below_1_is_refused() -> None:
    refused(lambda: prepare(SPAM, Data(table(30), limit=0)), "at least 1", kind=UsageError)


def test_a_missing_column_suggests_a_similar_one() -> None:
    rows = [{"text": SECRET, "lable": "x"}] * 20
    refuses(rows, "the column 'label'", "columns 'text', 'lable'", "Did you mean 'lable'?")


def test_names_of_columns_are_quoted_since_they_may_hold_commas() -> None:
    rows = [{"Comment, if any": SECRET, "label": "x"}] * 20
    refuses(rows, "columns 'Comment, if any', 'label'", "Known: 'Comment, if any', 'label'.")


def test_a_missing_column_suggests_one_in_another_case() -> None:
    refuses([{"TEXT": SECRET, "LABEL": "x"}] * 20, "Did you mean 'TEXT'?")


def test_a_file_without_a_header_is_recognised_and_not_quoted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", f"{SECRET},urgent\nmore,calm\n")
    refused(lambda: prepare(SPAM, Data(path)), "2 columns, none named", "first line a header")


@pytest.mark.parametrize("role", ["group", "slices"])
def test_a_missing_group_or_slice_column_is_refused(role: str) -> None:
    rows = [row | {"patient": SECRET} for row in table(30)]
    value: Any = "pateint" if role == "group" else ("pateint",)
    refuses(rows, "the column 'pateint'", "Did you mean 'patient'?", **{role: value})


def test_columns_beside_a_chat_are_needed_in_one_split() -> None:
    task = Chat(user="q", assistant="a", history="history")
    rows = [{"q": f"question {n}", "a": f"answer {n}", "history": []} for n in range(30)]
    test = [{"q": f"other {n}", "a": f"reply {n}"} for n in range(10)]
    prepared = prepare(task, Data(rows, test=test))
    assert len(prepared.test) == 10
    assert not [warning for warning in prepared.warnings if "history" in warning]
    with pytest.raises(DataError, match="column 'history'"):
        prepare(task, Data([{"q": row["q"], "a": row["a"]} for row in rows], test=test))


def test_slice_columns_are_needed_in_scored_rows_only() -> None:
    test = [row | {"site": "a", "text": row["text"] + "!?"} for row in table(30, start=90)]
    prepared = prepare(SPAM, Data(table(60), test=test, slices=("site",)))
    assert prepared.test[0].slices == {"site": "a"}
    assert prepared.train[0].slices == {"site": "(missing)"}


def test_a_slice_column_of_texts_is_refused() -> None:
    rows = [row | {"note": f"{SECRET} {i}"} for i, row in enumerate(table(60))]
    refuses(rows, "column 'note'", "60 values in 60 rows", slices=("note",))


@pytest.mark.parametrize(
    ("value", "word"),
    [("", "found ''"), (None, "null"), (" \n", "only whitespace"), (float("nan"), "null")],
)
@pytest.mark.parametrize("column", ["text", "label", "who"])
def test_an_empty_cell_is_refused_with_its_location(value: Any, word: str, column: str) -> None:
    rows: list[dict[str, Any]] = [row | {"who": "me", "note": SECRET} for row in table(30)]
    rows[17][column] = value
    refuses(rows, "index 17", f"column {column!r}", word, group="who")


def test_bad_rows_of_all_splits_come_in_one_error() -> None:
    train, test = table(40), table(20, start=50)
    for i in range(3, 9):
        train[i]["text"] = " "
    test[5]["label"] = train[4]["label"] = "span"
    train[4]["text"] = "good"
    parts = ("7 rows", "text; one of the labels", "column 'text', 5 empty: index 3, 5–8",
             "test rows in memory, index 5, column 'label': 'span'")  # fmt: skip
    refuses(train, *parts, task=Classification(labels=("ham", "spam")), test=test)


def test_an_unknown_label_suggests_a_similar_one() -> None:
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
def test_a_single_class_is_refused(labels: tuple[str, ...] | None) -> None:
    rows = [{"text": f"{SECRET} {i}", "label": "ham"} for i in range(40)]
    refuses(rows, "classes", task=Classification(labels=labels))


def test_a_label_column_of_nulls_is_refused() -> None:
    refuses([{"text": SECRET, "label": None}] * 30, "column 'label'", "null")


def test_two_rows_are_too_few_to_train_on() -> None:
    refuses(table(2), "at least 8 training rows", "found 2 rows")
    refuses(table(2), "at least 8 training rows", "found 2 rows", task=LanguageModelling())


def test_two_classes_need_two_rows_each() -> None:
    refuses(table(30, spam_every=30), "2 rows of each of at least 2 classes", "1 with 2 or more")


@pytest.mark.parametrize("value", [None, 3, ["text"]])
def test_a_row_function_must_return_a_row(value: Any) -> None:
    data = Data(table(60), row=lambda row: value)
    refused(
        lambda: prepare(SPAM, data), "index 0", f"found {type(value).__name__}", "Return a dict"
    )


def test_columns_must_have_names() -> None:
    rows: list[Any] = [{0: SECRET, 1: "spam"}] * 40
    refused(lambda: prepare(SPAM, Data(rows)), "40 invalid rows", "named columns")


def test_an_unpaired_surrogate_is_refused_with_its_location(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in table(40)]
    lines[7] = json.dumps({"text": f"{SECRET} \ud83d", "label": "spam"})
    path = write(tmp_path / "cut.jsonl", "\n".join(lines))
    refused(lambda: prepare(SPAM, Data(str(path))), "line 8, column 'text'", "surrogate")


# ── Labels, empty cells, columns ────────────────────────────────────────────────────────────────


def spelled(*labels: str) -> list[dict[str, Any]]:
    return [row | {"label": labels[n % len(labels)]} for n, row in enumerate(table(60))]


def test_labels_that_differ_in_spelling_only_are_refused_or_merged() -> None:
    rows = spelled("bad", "good", "bad", "Good", "bad ", "BAD")
    message = refuses(rows, "'BAD' (10) and 'bad' (30)", "'Good' (10) and 'good' (10)",
                      "--merge-labels", task=Classification())  # fmt: skip
    assert "'bad ' " not in message
    merged = prepare(Classification(positive="Bad"), Data(rows, merge_labels=True))
    assert merged.task.labels == ("Good", "bad")
    assert merged.task.positive == "bad"
    assert any("'BAD' → 'bad' (10)" in stage.what for stage in merged.stages)
    declared = Classification(labels=("bad", "good", "Good", "BAD"))
    assert prepare(declared, Data(rows)).task.labels == declared.labels


def test_test_labels_are_merged_into_those_of_training() -> None:
    train, test = spelled("bad", "good"), [row | {"label": "GOOD"} for row in table(30, start=80)]
    refuses(train, "one of the labels bad, good", task=Classification(), test=test)
    prepared = prepare(Classification(), Data(train, test=test, merge_labels=True))
    assert prepared.task.labels == ("bad", "good")
    assert {row.target for row in prepared.test} == {1}


def test_the_rows_of_each_label_are_counted() -> None:
    stages = prepare(Classification(), Data(spelled("bad", "good", "bad"))).stages
    assert "2 labels: 'bad' 40, 'good' 20" in next(s.what for s in stages if s.name == "check")


def test_empty_cells_are_all_listed_or_dropped() -> None:
    rows = spelled("bad", "good")
    for n in (3, 10, 11, 12, 13, 14, 20):
        rows[n]["text"] = "" if n % 2 else None
    rows[30]["label"] = " "
    refuses(rows, "column 'text', 7 empty: index 3, 10–14, 20", "column 'label', 1 empty: index 30",
            "--drop-empty", task=Classification())  # fmt: skip
    prepared = prepare(Classification(), Data(rows, drop_empty=True))
    assert (prepared.row_counts.read, prepared.row_counts.empty) == (60, 8)
    assert len(prepared.train) + len(prepared.validation) + len(prepared.test) == 52
    assert any("8 train rows dropped for an empty cell" in s.what for s in prepared.stages)


def test_pairs_of_equal_answers_are_listed_with_other_empty_cells() -> None:
    """A dataset of preferences often has some."""
    rows = [{"prompt": f"p{n}", "chosen": "" if n == 5 else "good",
             "rejected": "good" if n in (1, 2, 8) else "bad"} for n in range(12)]  # fmt: skip
    refuses(rows, "columns 'chosen' and 'rejected', 3 alike: index 1–2, 8;",
            "column 'chosen', 1 empty: index 5", task=Preference())  # fmt: skip


def test_an_optional_column_may_be_empty_and_is_counted() -> None:
    rows = [row | {"input": "more" if n % 3 else None} for n, row in enumerate(spelled("a", "b"))]
    prepared = prepare(Classification(("text", "input")), Data(rows))
    assert any("'input' is empty in 20 of 60 rows" in warning for warning in prepared.warnings)
    assert {"input:" in row.prompt for row in prepared.train} == {True, False}


def test_the_label_is_no_column_of_the_text() -> None:
    with pytest.raises(UsageError, match="the answer among the columns of the text"):
        prepare(Classification(("text", "label")), Data(table(40)))


def test_texts_that_contain_their_own_label_warn() -> None:
    rows = [row | {"text": f"{row['text']} ({row['label'].upper()})"} for row in table(40)]
    warned = "training texts contain their own label"
    assert any(warned in warning for warning in prepare(SPAM, Data(rows)).warnings)
    assert not any(warned in warning for warning in prepare(SPAM, Data(table(40))).warnings)


def test_a_list_is_no_empty_text() -> None:
    rows = [{"question": f"q {n}", "choices": ["a", "b"], "answer": n % 2} for n in range(30)]
    prepared = prepare(MultipleChoice(), Data(rows))
    assert not any("is empty in" in warning for warning in prepared.warnings)
    rows = [{"instruction": f"q {n}", "input": "", "output": "a"} for n in range(30)]
    prepared = prepare(Chat(user=("instruction", "input"), assistant="output"), Data(rows))
    assert any("'input' is empty in 30 of 30 rows" in warning for warning in prepared.warnings)


def test_labels_that_are_free_answers_get_a_hint() -> None:
    answers = [{"text": f"q {n}", "label": f"answer {n // 2 if n < 6 else n}"} for n in range(40)]
    assert "--task generation" in refuses(answers, "classes")
    few = [{"text": f"q {n}", "label": "ab"[n % 2]} for n in range(6)]
    assert "--task" not in refuses(few, "at least 8 training rows")


def test_a_record_without_a_column_that_others_have_is_an_empty_cell() -> None:
    rows: list[dict[str, Any]] = [{"text": f"word {n}", "label": "ab"[n % 2]} for n in range(60)]
    del rows[3]["label"], rows[7]["text"]
    refuses(rows, "column 'label', 1 empty: index 3", "column 'text', 1 empty: index 7",
            "--drop-empty", task=Classification())  # fmt: skip
    assert prepare(Classification(), Data(rows, drop_empty=True)).row_counts.empty == 2
    for row in rows:
        row.pop("label", None)
    refuses(rows, "expected the column 'label'", "Known: 'text'", task=Classification(),
            drop_empty=True)  # fmt: skip
