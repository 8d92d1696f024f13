"""Rows with one of a few labels, and which labels are one and the same to a reader."""

import unicodedata
from dataclasses import replace

import pytest
from support.rows import SECRET, row

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks import (
    Classification,
    classification,
    merged,
    shown,
    spelling,
    spellings,
    task_from_record,
    task_record,
    twins,
)
from lora_domains.tasks.classification import label_key


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


@pytest.mark.parametrize(
    ("task", "found"),
    [
        (Classification(labels=("a", "b", "c")), "Is the text below a, b or c?\n\nhi"),
        (Classification(labels=("ham", "spam")), "Is the text below ham or spam?\n\nhi"),
        (Classification(label="priority", labels=("low", "top"), wording={"top": "highest"}),
         "Is the priority of the text below low or highest?\n\nhi"),
        (Classification(labels=tuple(map(str, range(40)))),
         "What is the label of the text below? Answer with the label.\n\nhi"),
        (Classification(labels=("a", "b"), instruction="Which?"), "Which?\n\nhi"),
        (Classification(labels=("a", "b"), instruction="Which?", text=("text", "more")),
         "Which?\n\ntext: hi\nmore: so"),
        (Classification(labels=("a", "b"), prompt="{text}!", chat=True), "hi!"),
    ],
)  # fmt: skip
def test_the_turn_of_the_user_in_a_chat_template(task: Classification, found: str) -> None:
    values = {"text": "hi", "more": "so", task.label: (task.labels or ("",))[0]}
    assert task.example(row(**values)).messages == ({"role": "user", "content": found},)
    assert task.unlabelled(row(**values)).messages[0]["content"] == found
    assert replace(task, chat=False).example(row(**values)).messages == ()
    assert replace(task, chat=None, instruction=None, head=True).turns(row(**values)) == ()
    with pytest.raises(DomainError, match="a head, which reads the text alone"):
        replace(task, chat=True, head=True)


# ── Spellings of labels ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Bad", "bad"), ("very  bad", "Very bad"), ("réglé", unicodedata.normalize("NFD", "réglé")),
        ("réglé", "regle"), ("1", "1.0"), ("0", "-0.0"), ("01", "1"), ("+1", "1"), ("1.", "1"),
        ("STRASSE", "straße"), ("ｂａｄ", "bad"), ("not paid", "notpaid"),
        ("not_paid", "not paid"), ("sci–fi", "sci-fi"), ("can’t", "can't"), ("b\u200bad", "bad"),
        ("be\u00adzahlt", "bezahlt"), ("❤\ufe0f", "❤"),
    ],
)  # fmt: skip
def test_spellings_of_one_label(one: str, other: str) -> None:
    assert label_key(one) == label_key(other)
    assert twins([one, "x", other]) == [[one, other]]


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "-1"), ("1", "10"), ("250.1", "250.10"), ("card", "card_arrival"), ("и", "й"),
     ("か", "が"), ("C", "C#"), ("+", "-"), ("1.0", "1.05"), ("कि", "की"),
     ("👍", "👎"), ("👍🏽", "👍🏿"), ("e-mail", "email"),
     ("🏴\U000e0067\U000e0065", "🏴\U000e0067\U000e0073")],
)  # fmt: skip
def test_labels_that_differ(one: str, other: str) -> None:
    assert label_key(one) != label_key(other)


def test_the_most_frequent_spelling_is_kept() -> None:
    assert merged({"Bad": 3, "bad": 9, "BAD": 1, "good": 2}) == dict.fromkeys(
        ("BAD", "Bad", "bad"), "bad"
    )
    assert spelling("BAD", ["bad", "good"]) == "bad"
    assert spelling("BAD", ["bad", "Bad"]) == "BAD"


def test_a_positive_class_is_found_in_another_spelling() -> None:
    task = Classification(positive="Urgent").with_default_labels(("routine", "urgent"))
    assert (task.positive, task.positive_index) == ("urgent", 1)


def test_each_label_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[str] = []
    monkeypatch.setattr(
        classification, "label_key", lambda one: compared.append(one) or label_key(one)
    )
    known = [f"topic {n}" for n in range(200)]
    assert spellings([one.upper() for one in known], known) == {one.upper(): one for one in known}
    assert len(compared) == 400
