"""Adapters that plain PEFT trained: judged on the same rows, and honest about what is unknown."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from support.models import SUITE, clear_rows, declared, model_in, use_small_suite
from support.peft_folders import peft_logits, peft_trained

from lora_domains.analysis.compare import compare_adapters
from lora_domains.analysis.reproduce import domain_of
from lora_domains.analysis.scale_curve import check_adapter
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, UsageError
from lora_domains.model import DomainModel
from lora_domains.report.card import Card
from lora_domains.report.conclusion import conclusion
from lora_domains.report.report import combine, rebuild
from lora_domains.tasks import Classification
from lora_domains.verdict.rules import Verdict

ROWS = clear_rows(600)
TRAIN, TEST = ROWS[:400], ROWS[400:]
TASK = Classification(positive="spam")
UNKNOWN = {"leaks", "overfit", "memorisation", "identity"}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    return peft_trained(tiny_base, tmp_path_factory.mktemp("downloads") / "theirs", TRAIN)


@pytest.fixture
def model(theirs: Path, tmp_path: Path, tiny_base: Path) -> DomainModel:
    model = model_in(tmp_path / "adapters", tiny_base)
    model.load_adapter(theirs)
    return model


def on(test: list[dict[str, Any]], name: str = "theirs", **rows: Any) -> Domain:
    return Domain(name, TASK, Data(test=test, **rows))


def verdicts(gates: list[dict[str, Any]]) -> dict[str, Verdict]:
    return {gate["name"]: gate["verdict"] for gate in gates}


def content(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_without_training_rows_the_base_alone_is_compared(
    model: DomainModel, theirs: Path, tmp_path: Path
) -> None:
    before = content(theirs)
    entry = model.evaluate(on(TEST), suite=SUITE).entry
    found = verdicts(entry.gates)
    assert {name for name, verdict in found.items() if verdict == "not applicable"} == UNKNOWN
    assert (found["gain"], found["recall"], found["evaluations"]) == ("pass", "pass", "pass")
    assert entry.domain_scores["f1"]["baselines"] == {}
    assert entry.domain_scores["f1"]["adapter"] > 0.95
    sentence = conclusion(entry)
    assert sentence.startswith("theirs beats the base (F1 ")
    assert (
        "leaks into its training rows and whether it was made on this base were not checked"
        in sentence
    )
    assert content(theirs) == before


def test_its_training_rows_give_baselines_and_are_searched_for_leaks(model: DomainModel) -> None:
    domain = on(TEST, train=TRAIN)
    entry = model.evaluate(domain, suite=SUITE).entry
    found = verdicts(entry.gates)
    assert {name for name, verdict in found.items() if verdict == "not applicable"} == {"identity"}
    assert {"majority", "tfidf"} <= set(entry.domain_scores["f1"]["baselines"])
    assert found["leaks"] == "pass"
    assert {"overfit", "memorisation"} <= set(found)
    assert "cannot be verified" in next(g["why"] for g in entry.gates if g["name"] == "leaks")


def test_training_rows_that_are_dropped_count_as_leaks(model: DomainModel) -> None:
    leaking = on(TEST, train=[*TRAIN, *TEST[:7]], drop_leaks=True)
    entry = model.evaluate(leaking, suite=SUITE).entry
    assert entry.leaks["exact"] == 7
    assert entry.verdict == "fail"
    assert "Evaluate it on rows that it was not trained on" in conclusion(entry)


def test_the_evaluation_is_a_whole_adapter_of_its_own(
    model: DomainModel, theirs: Path, tmp_path: Path, tiny_base: Path
) -> None:
    card = model.evaluate(on(TEST), suite=SUITE).card
    saved = tmp_path / "adapters" / "theirs"
    assert rebuild(saved) == Card.read(saved) == card
    assert combine([saved]).adapters[0].verdict == card.adapter.verdict
    assert torch.equal(peft_logits(tiny_base, saved), peft_logits(tiny_base, theirs))
    again = model_in(tmp_path / "adapters", tiny_base)
    again.load_adapter(saved)
    assert "cannot be verified" in again.bank["theirs"].notes[0]
    (predicted,) = again.predict([TEST[0]["text"]], "theirs")
    assert not isinstance(predicted, str)
    assert predicted.label == TEST[0]["label"]
    repeated = again.evaluate(on(TEST), suite=SUITE).entry
    assert repeated.domain_scores == card.adapter.domain_scores
    assert repeated.trained_elsewhere
    text = (saved / "items.jsonl").read_text() + (saved / "README.md").read_text()
    assert TEST[0]["text"] not in text


def test_another_base_is_not_refused_but_said(
    model: DomainModel, tmp_path: Path, tiny_base: Path
) -> None:
    model.evaluate(on(TEST), suite=SUITE)
    other = model_in(tmp_path / "adapters", make_base(tmp_path / "other", seed=3))
    other.load_adapter("theirs")
    note = other.bank["theirs"].notes[0]
    assert "cannot be verified that it was made on other" in note
    assert f"its config names {tiny_base.name}" in note


def test_in_the_output_folder_only_card_and_items_are_added(
    theirs: Path, tmp_path: Path, tiny_base: Path
) -> None:
    place = Path(shutil.copytree(theirs, tmp_path / "adapters" / "theirs"))
    (place / "training_args.json").write_text("{}")
    before = content(place)
    model = model_in(tmp_path / "adapters", tiny_base)
    model.load_adapter("theirs")
    model.evaluate(on(TEST), suite=SUITE)
    after = content(place)
    assert after.keys() - before.keys() == {"card.json", "items.jsonl"}
    assert {name: after[name] for name in before} == before
    assert rebuild(place).adapter.verdict


def test_an_adapter_of_the_same_name_is_never_replaced(
    theirs: Path, tmp_path: Path, tiny_base: Path
) -> None:
    model = model_in(tmp_path / "adapters", tiny_base)
    model.fit(declared(ROWS[:100], "mine", epochs=1))
    before = content(tmp_path / "adapters" / "mine")
    model.load_adapter(theirs, "mine")
    with pytest.raises(AdapterError, match="another adapter, which was trained here"):
        model.evaluate(on(TEST, "mine"), suite=SUITE)
    assert content(tmp_path / "adapters" / "mine") == before


def test_what_needs_its_training_is_refused(model: DomainModel, tmp_path: Path) -> None:
    card = model.evaluate(on(TEST), suite=SUITE).card
    with pytest.raises(UsageError, match="an adapter that was trained here"):
        domain_of(card)
    model.load_adapter(tmp_path / "adapters" / "theirs")
    with pytest.raises(AdapterError, match="an adapter trained here, with a card"):
        check_adapter(model.bank["theirs"])


def test_it_is_compared_with_adapters_trained_here(model: DomainModel, tmp_path: Path) -> None:
    model.evaluate(on(TEST), suite=SUITE)
    mine = replace(declared(TRAIN[:100], "mine", epochs=1), data=Data(TRAIN[:100], test=TEST))
    model.fit(mine)
    model.evaluate(mine, suite=SUITE)
    compared = compare_adapters(*(tmp_path / "adapters" / name for name in ("mine", "theirs")))
    assert compared["scores"]["f1"]["n"] == len(TEST)
    assert compared["scores"]["f1"]["adapter"] > 0.95


def test_a_threshold_needs_validation_rows(model: DomainModel) -> None:
    domain = replace(on(TEST), task=replace(TASK, target_recall=0.9))
    with pytest.raises(UsageError, match="validation rows, which choose the threshold"):
        model.evaluate(domain, suite=SUITE)


# ── Heads ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def headed(tmp_path: Path, tiny_base: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"],
                        init_lora_weights=False)  # fmt: skip
    get_peft_model(classifier, config).save_pretrained(tmp_path / "headed")
    return tmp_path / "headed"


def test_a_head_needs_its_labels_in_order_and_training_rows(
    headed: Path, tmp_path: Path, tiny_base: Path
) -> None:
    model = model_in(tmp_path / "adapters", tiny_base)
    model.load_adapter(headed)
    task = Classification(head=True)
    with pytest.raises(UsageError, match="labels of its 2 classes, in the order of its head"):
        model.evaluate(Domain("headed", task, Data(test=TEST)), suite=SUITE)
    task = replace(task, labels=("spam", "ham"))
    with pytest.raises(UsageError, match="--train FILE"):
        model.evaluate(Domain("headed", task, Data(test=TEST)), suite=SUITE)
    with pytest.raises(AdapterError, match="expected no head"):
        model.evaluate(Domain("headed", TASK, Data(test=TEST)), suite=SUITE)
    domain = Domain("headed", task, Data(train=TRAIN[:80], test=TEST))
    entry = model.evaluate(domain, suite=SUITE).entry
    assert entry.judged["labels"] == ["spam", "ham"]
    assert {"base", "tfidf"} <= {"base", *entry.domain_scores["macro_f1"]["baselines"]}


# ── Benchmark ───────────────────────────────────────────────────────────────────────────────────


def test_a_benchmark_judges_it_on_a_domain(
    model: DomainModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_suite(monkeypatch)
    with pytest.raises(UsageError, match="pass its recipe with --domains"):
        model.benchmark(SUITE, out=tmp_path / "reports")
    spam = Domain("spam", TASK, Data(train=TRAIN, test=TEST))
    report = model.benchmark(SUITE, [spam], tmp_path / "reports").report
    (entry,) = report.adapters
    assert (entry.path, entry.domain, entry.trained_elsewhere) == ("theirs", "spam", True)
    assert entry.domain_scores["f1"]["adapter"] > 0.95
    own = model.evaluate(on(TEST, train=TRAIN), suite=SUITE).entry
    assert own.domain_scores["f1"] == entry.domain_scores["f1"]
    assert verdicts(own.gates) == verdicts(entry.gates)
    assert json.loads(json.dumps(report.to_json()))
