"""Which labels are one and the same to a reader."""

import unicodedata

import pytest

from lora_domains.tasks import Classification, labels, merged, spelling, spellings, twins
from lora_domains.tasks.labels import label_key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Bad", "bad"), ("very  bad", "Very bad"), ("réglé", unicodedata.normalize("NFD", "réglé")),
        ("réglé", "regle"), ("1", "1.0"), ("0", "-0.0"), ("01", "1"), ("+1", "1"), ("1.", "1"),
        ("STRASSE", "straße"), ("ｂａｄ", "bad"), ("not paid", "notpaid"),
    ],
)  # fmt: skip
def test_spellings_of_one_label(one: str, other: str) -> None:
    assert label_key(one) == label_key(other)
    assert twins([one, "x", other]) == [[one, other]]


@pytest.mark.parametrize(
    ("one", "other"),
    [("1", "-1"), ("1", "10"), ("250.1", "250.10"), ("card", "card_arrival"), ("и", "й"),
     ("か", "が"), ("C", "C#"), ("+", "-"), ("1.0", "1.05"), ("कि", "की")],
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
    monkeypatch.setattr(labels, "label_key", lambda one: compared.append(one) or label_key(one))
    known = [f"topic {n}" for n in range(200)]
    assert spellings([one.upper() for one in known], known) == {one.upper(): one for one in known}
    assert len(compared) == 400
