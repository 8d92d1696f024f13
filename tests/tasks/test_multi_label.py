"""Rows with several labels: cells, labels, and a fit from rows to predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from support.models import SUITE, declared, model_in
from support.rows import SECRET, row
from transformers import AutoModelForSequenceClassification

from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.errors import DataError, DomainError, EmptyCell, UsageError
from lora_domains.inference.predict import Labels
from lora_domains.modeling.base import load_base
from lora_domains.modeling.heads import features, head_logits, head_nats, new_head, own_layout
from lora_domains.report.card import Card, read_items
from lora_domains.report.report import rebuild
from lora_domains.tasks import MultiLabel
from lora_domains.tasks.multi_label import labels_in
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.verdict.gates import Gates

LABELS = ("alarm", "belt", "pump")
names = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8)


def several(count: int) -> list[dict[str, Any]]:
    """Rows with the labels "alarm", "belt" and, rarely, "pump", each said by a word."""
    rows = []
    for n, made in enumerate(make_rows(count)):
        said = {"alarm": "alpha" * (n % 2 == 0), "belt": "beta" * (n % 3 == 0),
                "pump": "gamma" * (n % 20 == 0)}  # fmt: skip
        words = " ".join(f"{word} {word}" for word in said.values() if word)
        labels = ";".join(label for label, word in said.items() if word)
        rows.append({"text": f"{made['text']} {words}".strip(), "labels": labels})
    return rows


# ── Cells ───────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=50)
@given(st.lists(names, max_size=5))
def test_every_form_of_a_cell_holds_the_same_labels(labels: list[str]) -> None:
    """Joined with and without spaces, a list, its JSON, and a list as pandas writes it."""
    expected = tuple(dict.fromkeys(labels))
    for cell in (";".join(labels), " ; ".join(labels), labels, tuple(labels), json.dumps(labels),
                 repr(labels), ";".join([*labels, ""])):  # fmt: skip
        assert labels_in(row(labels=cell), "labels", ";") == expected


@settings(max_examples=50)
@given(st.lists(names, min_size=1, max_size=4), st.sampled_from([";", "|", ",", " - "]))
def test_a_cell_that_predict_writes_is_read_back(labels: list[str], separator: str) -> None:
    task = MultiLabel(separator=separator, head=True)
    cell = task.joined(labels)
    assert labels_in(row(labels=cell), "labels", separator) == tuple(dict.fromkeys(labels))
    with_separator = [f"a{separator}b", "c"]
    assert labels_in(row(labels=task.joined(with_separator)), "labels", separator) == (
        f"a{separator}b", "c",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("separator", "cell", "labels"),
    [(" - ", "x-ray - lung", ("x-ray", "lung")), (" / ", "and/or /  km/h /", ("and/or", "km/h")),
     (" - ", "x-ray", ("x-ray",)), (" and ", "sand and gold", ("sand", "gold")),
     ("; ", "a;b; c", ("a", "b", "c"))],
)  # fmt: skip
def test_a_separator_between_spaces_is_not_looked_for_in_words(
    separator: str, cell: str, labels: tuple[str, ...]
) -> None:
    task = MultiLabel(separator=separator).with_labels([row(labels=[*labels, "other"])])
    assert labels_in(row(labels=cell), "labels", separator) == labels
    assert task.named_in(cell) == [int(label in labels) for label in task.labels or ()]
    assert labels_in(row(labels=task.joined(labels)), "labels", separator) == labels
    assert task.joined(labels) == separator.join(labels)  # not as JSON


def test_an_empty_cell_says_no_label_and_a_missing_one_nothing() -> None:
    for cell in ("", "  ", [], "[]"):
        assert labels_in(row(labels=cell), "labels", ";") == ()
    for cell in (None, float("nan")):
        with pytest.raises(EmptyCell, match=r"line 2, column 'labels'.*found null"):
            labels_in(row(labels=cell), "labels", ";")
    with pytest.raises(DataError, match="a column named 'labels'"):
        labels_in(row(text="x"), "labels", ";")


@pytest.mark.parametrize(
    "cell", [{"a": 1}, b"a;b", [["a"]], ["a", None], ["a", " "], '["a", 3.5, {}]']
)
def test_a_cell_of_another_form_is_refused(cell: object) -> None:
    with pytest.raises(DataError, match=r"labels separated by ';', or a list of them"):
        labels_in(row(labels=cell), "labels", ";")


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


def test_labels_are_read_from_the_rows_and_unknown_ones_refused() -> None:
    task = MultiLabel().with_labels([row(labels="b; a"), row(labels=""), row(labels=["c", "a"])])
    assert task.labels == ("a", "b", "c")
    example = task.example(row(text="x", labels="c;a"))
    assert (example.target, example.truth, example.labels) == (-1, (1, 0, 1), (0, 2))
    assert example.answer == " a; c"  # in the order of the labels
    assert task.example(row(text="x", labels="")).answer == " none"
    with pytest.raises(DataError, match=r"line 2, column 'labels'.*a, b, c.*'d'"):
        task.example(row(text="x", labels="a;d"))


def test_labels_that_differ_by_case_are_refused_or_merged() -> None:
    rows = several(60)
    rows[3]["labels"] = "Alarm;BELT"
    domain = declared(rows, "parts", MultiLabel())
    with pytest.raises(DataError, match=r"'Alarm' \(1\) and 'alarm'"):
        prepare(domain.task, domain.data)
    merged = prepare(domain.task, Data(rows, merge_labels=True, test=None))
    assert merged.task.labels == LABELS
    assert any("merged" in stage.what for stage in merged.stages)


def test_how_many_rows_have_no_label_is_said() -> None:
    rows = several(60)
    prepared = prepare(MultiLabel(), Data(rows))
    none = sum(not one["labels"] for one in rows)
    (check,) = [stage.what for stage in prepared.stages if stage.name == "check"]
    assert (
        f"up to 3 of 3 labels: 'alarm' 30, 'belt' 20, 'pump' 3; {none} rows have no label" in check
    )


@pytest.mark.parametrize(
    ("task", "labels", "message"),
    [(MultiLabel(), ["a"], "at least two labels"),
     (MultiLabel(), [[["a"]], [["b"]]], "column 'labels': .*found a list with something else"),
     (MultiLabel(), [["a;b"], "c"], "since they are answered as text"),
     (MultiLabel(), ["none;c"], "labels other than 'none'")],
)  # fmt: skip
def test_labels_that_cannot_be_told_apart_are_refused(
    task: MultiLabel, labels: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        task.with_labels([row(labels=cell) for cell in labels])


@pytest.mark.parametrize("options", [{"separator": " "}, {"head": True, "chat": True}])
def test_settings_that_exclude_each_other_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(DomainError):
        MultiLabel(**options)
    with pytest.raises(DomainError, match="tune_thresholds without one"):
        MultiLabel(tune_thresholds=True).with_labels([row(labels="a;b")])


def test_labels_in_a_generated_text() -> None:
    task = MultiLabel(labels=LABELS)
    assert task.score_text(" Pump; alarm\nbelt", "")["predicted"] == [1, 0, 1]
    assert task.named_in("none") == task.named_in("something; else") == [0, 0, 0]
    assert task.named_in("pump; alarm.") == task.named_in("pump; alarm!") == [1, 0, 1]
    assert MultiLabel(labels=("etc.", "pump")).named_in("pump; etc.") == [1, 1]


def test_an_array_of_numpy_in_a_table_holds_its_labels() -> None:
    import numpy as np

    for labels in (
        ["pump", "valve"],
        ["pump"],
        ["it's", "a b", "x"],
        [f"label {n}" for n in range(40)],
    ):
        for cell in (str(np.array(labels)), str(labels)):
            assert labels_in(row(labels=cell), "labels", ";") == tuple(labels)


@pytest.mark.parametrize("name", ["none", "None", "NONE"])
def test_a_label_that_is_called_none_is_refused_as_text(name: str) -> None:
    rows = [row(labels=cell) for cell in ("pump;valve", name, "")]
    with pytest.raises(DataError, match="answered as text"):
        MultiLabel().with_labels(rows)
    assert name in (MultiLabel(head=True).with_labels(rows).labels or ())


def test_cells_propose_the_task() -> None:
    joined = [row(label=one["labels"]) for one in several(60)]
    task, why = MultiLabel.from_cells(joined, "label") or (None, "")
    assert task == MultiLabel(label="label")
    assert why == "label holds several labels, separated by ';'"
    lists = [row(label=["a", "b"]), row(label=[])]
    assert MultiLabel.from_cells(lists, "label") == (MultiLabel(label="label"), "label holds lists")
    few = [row(label=cell) for cell in ("a", "b", "c") * 30] + [row(label="a;c"), row(label="c;b")]
    assert (MultiLabel.from_cells(few, "label") or (None,))[0] == MultiLabel(label="label")
    sentences = [row(label=f"first {n}; then {n}") for n in range(40)]
    for cells in (sentences, [row(label="spam"), row(label="ham")], [row(label=3)]):
        assert MultiLabel.from_cells(cells, "label") is None


CITIES = ["Portland, Oregon", "Salem, Oregon", "Austin, Texas", "Dallas, Texas"]


@pytest.mark.parametrize(
    ("cells", "several"),
    [(["red, hot", "hot", "cold,red", "cold, hot, red"], True), (["pump, valve", "valve"], True),
     (["3,27,5", "27", "5,27", "3"], True), (["food, drink", "sport"], False), (CITIES, False),
     (["fracture, left", "fracture, right", "burn, left", "burn, right"], False),
     (["1,5", "5,1", "1,1", "5"], False), (["1,200", "200,200", "200,100"], False)],
)  # fmt: skip
def test_a_comma_between_labels_is_told_from_one_within(cells: list[str], several: bool) -> None:
    found = MultiLabel.from_cells([row(label=cell) for cell in cells * 20], "label")
    assert (found and found[0]) == (MultiLabel(label="label", separator=",") if several else None)


# ── The head ────────────────────────────────────────────────────────────────────────────────────


def test_the_loss_of_a_head_is_the_cross_entropy_of_every_label(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    head = new_head(base, own_layout(base), 3)
    truth = [(1, 0, 1), (0, 0, 0)]
    rows = [EncodedExample(str(n), (5, 9, 20 + n), (), truth=one) for n, one in enumerate(truth)]
    task = MultiLabel(labels=LABELS, head=True)
    with torch.no_grad():
        found = head_nats(base.model, head, rows, 0, task)
        odds = head_logits(head, features(base.model, rows, 0))
    expected = F.binary_cross_entropy(odds.sigmoid(), torch.tensor(truth).float(), reduction="sum")
    torch.testing.assert_close(found, expected)


def test_a_head_is_fitted_evaluated_and_loaded_by_plain_peft(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = several(200)
    task = MultiLabel(head=True, tune_thresholds=True)
    gates = Gates(floors={"alarm": 0.2})
    domain = declared(rows, "parts", task, epochs=3, retention="none")
    domain = Domain("parts", task, domain.data, domain.lora, domain.training, gates)
    model = model_in(tmp_path, tiny_base)
    history = model.fit(domain).adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]
    assert history[-1]["score"] > 0.5

    entry = model.evaluate(domain, suite=SUITE).entry
    scores = entry.domain_scores
    assert scores.keys() == {"micro_f1", "label_macro_f1", "micro_precision", "micro_recall",
                             "row_f1", "subset_accuracy", "loss"}  # fmt: skip
    assert scores["micro_f1"]["baselines"].keys() == {"frequent_labels", "tfidf"}
    assert list(entry.per_class) == list(LABELS)
    assert {gate["name"] for gate in entry.gates} >= {"gain", "floors", "calibration"}
    assert not entry.confusion
    assert rebuild(tmp_path / "parts") == Card.read(tmp_path / "parts")
    chosen = entry.judged["threshold"]["by_label"]
    assert all(0 < threshold < 1 for threshold in chosen.values())
    assert [row["threshold"] for row in entry.per_class.values()] == [*chosen.values()]
    assert {item["set"] for item in read_items(tmp_path / "parts")} >= {"validation", "test"}

    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter(tmp_path / "parts")
    texts = [one["text"] for one in rows[:5]]
    answers = fresh.predict(texts, domain="parts")
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3)
    theirs = PeftModel.from_pretrained(classifier, tmp_path / "parts").eval()
    for text, answer in zip(texts, answers, strict=True):
        assert isinstance(answer, Labels)
        ids = torch.tensor([[*fresh.tokenizer(text)["input_ids"]]])
        with torch.no_grad():
            chances = theirs(input_ids=ids).logits[0].sigmoid().tolist()
        assert list(answer.probabilities.values()) == pytest.approx(chances, abs=1e-5)
        named = tuple(n for n, p in answer.probabilities.items() if p >= chosen[n])
        assert answer.labels == named
    with pytest.raises(UsageError, match="one label a row"):
        fresh.predict(texts, domain="parts", refer_below=0.5)
    fresh.fit(domain, init_from="parts", name="more")


def test_a_floor_of_an_unknown_label_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    domain = declared(several(60), "parts", MultiLabel(head=True), floors={"pmup": 0.8})
    with pytest.raises(DomainError, match=r"'pmup'.*'pump'"):
        model_in(tmp_path, tiny_base).fit(domain)


def test_labels_are_answered_as_text_without_a_head(tiny_base: Path, tmp_path: Path) -> None:
    rows = several(120)
    domain = declared(rows, "parts", MultiLabel(max_new_tokens=8), epochs=2)
    model = model_in(tmp_path, tiny_base)
    model.fit(domain)
    entry = model.evaluate(domain, suite=SUITE).entry
    assert {"micro_f1", "nats_per_token"} <= entry.domain_scores.keys()
    assert "tfidf" in entry.domain_scores["micro_f1"]["baselines"]
    assert "calibration" not in {gate["name"] for gate in entry.gates}
    assert rebuild(tmp_path / "parts") == Card.read(tmp_path / "parts")
    (answer,) = model.predict(rows[0]["text"], domain="parts")
    assert isinstance(answer, Labels)
    assert {*answer.labels} <= {*LABELS}
    assert not answer.probabilities


def test_no_message_quotes_a_text() -> None:
    rows = [row(n, text=SECRET, labels=cell) for n, cell in enumerate(["a;b", {"x": SECRET}])]
    task = MultiLabel(labels=("a", "b"))
    with pytest.raises(DataError) as caught:
        task.example(rows[1])
    assert SECRET not in str(caught.value)
