"""How rows become prompts and answers."""

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks import (
    Classification,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Row,
    columns_in,
    fill,
    last_number,
    shown,
    text_of,
)

SECRET = "zq-hush-93"


def row(number: int = 0, **values: Any) -> Row:
    return Row(values, "train", number, f"a, b.csv, line {number + 2}")


def test_row_ids_hold_position_only() -> None:
    assert row(17, id=SECRET).id == "train:17"


def test_classification_scores_labels_as_text() -> None:
    task = Classification(text="note", label="triage", labels=("calm", "urgent"))
    item = task.example(row(note=" chest pain\n", triage=" urgent "))
    assert item.prompt == "note: chest pain\ntriage:"
    assert (item.answer, item.choices, item.target) == (" urgent", (" calm", " urgent"), 1)
    assert item.choices[item.target] == item.answer
    assert item.place == "a, b.csv, line 2"
    assert task.loss_unit == "label cross-entropy"


def test_several_texts_and_wording() -> None:
    task = Classification(text=("q", "c"), labels=("y", "n"), wording={"y": "yes indeed"})
    item = task.example(row(q="why", c="so", label="y"))
    assert item.prompt == "q: why\nc: so\nlabel:"
    assert item.answer == " yes indeed"
    assert task.columns == ("q", "c", "label")


def test_own_prompt_with_literal_braces() -> None:
    task = Classification(prompt="{{json}} {a} then {b}\n", labels=("y", "n"))
    assert task.example(row(a="{b}", b="2", label="n")).prompt == "{json} {b} then 2\n"
    assert task.columns == ("a", "b", "label")


@given(st.text().filter(str.strip))
def test_nothing_of_a_text_is_cut(text: str) -> None:
    assert fill("<{t}>", row(t=text)) == f"<{text.strip()}>"
    assert LanguageModelling().example(row(text=text)).answer == text


@pytest.mark.parametrize("template", ["{open", "close}", "{}", "{a} and {}"])
def test_unreadable_prompts_are_refused(template: str) -> None:
    with pytest.raises(DomainError, match="column"):
        columns_in(template)


def test_metric_follows_the_positive_class() -> None:
    assert Classification().metric == "macro_f1"
    assert Classification(positive="spam").metric == "f1"


def test_labels_are_read_sorted() -> None:
    rows = [row(label=label) for label in ("b ", "a", "b", 3)]
    assert Classification().with_labels(rows).labels == ("3", "a", "b")


def test_given_labels_keep_their_order() -> None:
    assert Classification(labels=("z", "a")).with_labels([]).labels == ("z", "a")


def test_one_class_is_refused_with_its_file() -> None:
    with pytest.raises(DataError, match=r"^a, b\.csv, column 'label': .*only 'a'"):
        Classification().with_labels([row(label="a")] * 3)


@pytest.mark.parametrize(
    "task", [Classification(positive="urgnt"), Classification(wording={"urgnt": "x"})]
)
def test_unknown_class_in_the_declaration(task: Classification) -> None:
    with pytest.raises(DataError, match="Did you mean 'urgent'"):
        task.with_labels([row(label="urgent"), row(label="calm")])


def test_unknown_label_is_suggested_and_a_long_one_is_not_quoted() -> None:
    task = Classification(labels=("ham", "spam"))
    with pytest.raises(DataError, match=r"line 2, column 'label'.*'span'.*Did you mean 'spam'"):
        task.example(row(text="x", label="span"))
    with pytest.raises(DataError, match="a text of 60 characters") as caught:
        task.example(row(text="x", label=SECRET * 6))
    assert SECRET not in str(caught.value)
    assert shown("ham") == "'ham'"


@pytest.mark.parametrize(
    ("value", "found"), [(None, "null"), (float("nan"), "null"), ("", "''"), (" \t", "whitespace")]
)
def test_empty_cells(value: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        text_of(row(text=value, other=SECRET), "text")


def test_pandas_nulls_are_null() -> None:
    pandas = pytest.importorskip("pandas")
    for value in (pandas.NA, pandas.NaT):
        with pytest.raises(DataError, match="null"):
            text_of(row(text=value), "text")


def test_zero_and_false_are_text() -> None:
    assert text_of(row(n=0), "n") == "0"
    assert text_of(row(n=False), "n") == "False"


def test_unlabelled_items_need_no_label() -> None:
    item = Classification(labels=("a", "b")).unlabelled(row(text="x"))
    assert (item.prompt, item.answer, item.target) == ("text: x\nlabel:", "", -1)
    assert Generation().unlabelled(row(question="x")).prompt == "question: x\nanswer:"


@pytest.mark.parametrize(
    ("answer", "target"), [(2, 2), ("2", 2), ("C", 2), ("c", 2), ("ox", 2), ("answer3", 2), (0, 0)]
)
@pytest.mark.parametrize(
    "choices",
    [["cat", "dog", " ox"], '["cat", "dog", "ox"]', {"A": "cat", "B": "dog", "C": "ox"}],
)
def test_multiple_choice(answer: object, target: int, choices: object) -> None:
    item = MultipleChoice().example(row(question="Which?", choices=choices, answer=answer))
    assert item.prompt == "Question: Which?\nAnswer:"
    assert item.choices == (" cat", " dog", " ox")
    assert item.target == target
    assert item.answer == item.choices[target]


@pytest.mark.parametrize(
    "answer", [3, -1, "D", "answer0", "answer4", "ß", "²", "answer²", None, SECRET]
)
def test_multiple_choice_answers_out_of_range(answer: object) -> None:
    with pytest.raises(DataError, match="index") as caught:
        MultipleChoice().example(row(question="q", choices=["a", "b", "c"], answer=answer))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("choices", [None, SECRET, f'["{SECRET}"]', [SECRET], 7, "{"])
def test_multiple_choice_without_candidates(choices: object) -> None:
    with pytest.raises(DataError, match="two candidate answers") as caught:
        MultipleChoice().example(row(question="q", choices=choices, answer=0))
    assert SECRET not in str(caught.value)


def test_generation() -> None:
    task = Generation(text=("context", "question"), answer="reply")
    item = task.example(row(context="c", question="q", reply=" because "))
    assert (item.prompt, item.answer) == ("context: c\nquestion: q\nreply:", " because")
    assert (item.choices, item.target, task.metric) == ((), -1, "token_f1")
    assert (
        Generation(prompt="Q {question} A").example(row(question="q", answer="a")).prompt == "Q q A"
    )


def test_tasks_and_examples_travel_to_workers() -> None:
    task = Classification(labels=("a", "b"), wording={"a": "x"})
    item = task.example(row(text="t", label="a"))
    assert pickle.loads(pickle.dumps((task, item))) == (task, item)


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc .,"))
def test_the_last_number_is_found_after_any_words(number: int, words: str) -> None:
    assert last_number(f"first 3 {words} x {number:,}") == number
