"""Rows with one of a few labels."""

import pytest
from support.rows import SECRET, row

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks import (
    Classification,
    shown,
    task_from_record,
    task_record,
)


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


def test_a_target_needs_a_positive_class_and_is_one() -> None:
    task = Classification(positive="urgent", target_recall=0.9)
    assert task.targets == {"recall": 0.9}
    assert task_from_record(task_record(task)) == task
    assert Classification(positive="urgent").targets == {}
    for wrong in (
        {"target_recall": 0.9},
        {"positive": "urgent", "target_recall": 0.9, "target_precision": 0.9},
        {"positive": "urgent", "target_precision": 1.0},  # which no number of rows shows
        {"positive": "urgent", "target_recall": 0.0},
    ):
        with pytest.raises(DomainError, match="one target recall or precision"):
            Classification(**wrong)  # type: ignore[arg-type]


def test_options_replace_what_depends_on_them() -> None:
    task = Classification(positive="a", prompt="{text}", target_recall=0.9)
    assert task.with_options(head=True) == Classification(
        positive="a", prompt="{text}", target_recall=0.9, head=True
    )
    assert task.with_options(label="kind").prompt is None
    assert task.with_options(positive="b").targets == {"recall": 0.9}
    assert task.with_options(positive=None).targets == {}
    assert task.with_options(target_precision=0.8).targets == {"precision": 0.8}
    with pytest.raises(DomainError, match="a positive class"):
        task.with_options(positive=None, target_recall=0.9)
