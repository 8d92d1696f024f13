"""What every kind of task has in common, and tasks in cards."""

import json
import pickle
from typing import Any

import pytest
from support.rows import row

from lora_domains.errors import DomainError, UsageError
from lora_domains.tasks import (
    KINDS,
    Classification,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Task,
    positive_index,
    register,
    task_from_record,
    task_record,
    upgraded_record,
)
from lora_domains.verdict.metrics import METRICS


def test_unlabelled_items_need_no_label() -> None:
    item = Classification(labels=("a", "b")).unlabelled(row(text="x"))
    assert (item.prompt, item.answer, item.target) == ("text: x\nlabel:", "", -1)
    assert Generation().unlabelled(row(question="x")).prompt == "question: x\nanswer:"


def test_tasks_and_examples_travel_to_workers() -> None:
    task = Classification(labels=("a", "b"), wording={"a": "x"})
    item = task.example(row(text="t", label="a"))
    assert pickle.loads(pickle.dumps((task, item))) == (task, item)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_back_from_its_record(kind: str) -> None:
    task = KINDS[kind]()
    assert task.metric in METRICS
    inputs = len(task.input_columns)
    assert task.columns[:inputs] == task.input_columns
    assert task.columns[inputs : inputs + 1] in ((), (task.answer_column,))
    assert task_from_record(json.loads(json.dumps(task_record(task)))) == task


def test_records_of_older_cards_are_upgraded() -> None:
    older = {"kind": "classification", "positive": "a", "labels": ["a", "b"],
             "wanted_recall": 0.9, "wanted_precision": None,
             "loss_unit": "label cross-entropy"}  # fmt: skip
    task = Classification(positive="a", labels=("a", "b"), target_recall=0.9, chat=False)
    assert task_from_record(older) == task
    assert upgraded_record(older).keys() <= task_record(task).keys()


@pytest.mark.parametrize("record", [
    {"kind": "unheard-of"}, {}, {"kind": "generation", "from_the_future": 1}
])  # fmt: skip
def test_a_kind_or_field_of_another_version_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(DomainError, match="a task of kind chat, classification"):
        task_from_record(record)


def test_two_kinds_of_one_name_are_refused() -> None:
    class Other(Classification):
        """Another class of the same name."""

    with pytest.raises(DomainError, match="a name that no other kind has"):
        register(Other)
    assert KINDS["classification"] is Classification


def test_the_position_of_the_positive_class() -> None:
    assert positive_index(["a", "b"], "b") == 1
    assert positive_index(["a", "b"], None) is None
    assert Classification(positive="b", labels=("a", "b")).positive_index == 1
    assert Classification(positive="b").positive_index is None  # labels are not known yet
    assert Generation().positive_index is None


def test_what_to_predict_is_a_text_or_a_row() -> None:
    task = Classification(text=("q", "c"), labels=("a", "b"))
    assert task.to_predict({"q": "why", "c": "so"}, 3).id == "input:3"
    with pytest.raises(UsageError, match="columns q, c"):
        task.to_predict("why", 0)
    assert Generation().to_predict("why", 0).prompt == "question: why\nanswer:"
    with pytest.raises(UsageError, match=r"generate\(\) instead"):
        LanguageModelling().to_predict("why", 0)
    with pytest.raises(UsageError, match="columns question, choices"):
        MultipleChoice().to_predict("why", 0)
    asked = MultipleChoice().to_predict({"question": "why", "choices": ["so", "no"]}, 0)
    assert (asked.choices, asked.target, asked.answer) == ((" so", " no"), -1, "")


@pytest.mark.parametrize("task", [MultipleChoice(), Generation(), LanguageModelling()])
def test_options_of_labels_need_a_classification(task: Task) -> None:
    with pytest.raises(UsageError, match=f"a setting of a {task.kind.replace('_', ' ')} task"):
        task.with_options(positive="a")
