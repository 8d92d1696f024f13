"""One evaluation: every contender on the same items, the card, the ledger and the threshold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from support.models import SUITE, Fitted, declared, model_in

from lora_domains.analysis.trace import trace
from lora_domains.console import Display
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import AdapterError, DomainError, UsageError
from lora_domains.evaluation.baselines import SHOTS
from lora_domains.evaluation.verdict_run import validation_scores
from lora_domains.inference.predict import Prediction
from lora_domains.report.card import Card, read_items
from lora_domains.report.report import rebuild
from lora_domains.tasks import Classification, LanguageModelling
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.ledger import level


def test_every_contender_is_scored_on_identical_items(fitted: Fitted, spam: Domain) -> None:
    model, evaluation = fitted
    items = read_items(model.out / "spam")
    by_set: dict[str, list[dict[str, Any]]] = {}
    for item in items:
        by_set.setdefault(item["set"], []).append(item)
    assert len(by_set["test"]) == len(spam.data.test)  # type: ignore[arg-type]
    names = ["base", "adapter", "majority", "tfidf", f"{SHOTS}_shot"]
    assert all(list(item["scores"]) == names for item in by_set["test"])
    assert len({item["id"] for item in by_set["test"]}) == len(by_set["test"])
    assert [list(item["scores"]) for item in by_set["general"]] == [["base", "adapter"]] * 20
    assert len(by_set["text"]) == 12
    assert all(list(i["scores"]) == ["base", "adapter", "majority", "tfidf"]
               for i in by_set["train"])  # fmt: skip
    entry_positives = evaluation.entry.per_class["spam"]["support"]  # recall is over these
    for fields in evaluation.entry.domain_scores.values():
        assert fields["n"] in (len(by_set["test"]), entry_positives)
    assert evaluation.entry.domain_scores["accuracy"]["baselines"].keys() == set(names[2:])
    assert evaluation.entry.domain_scores["accuracy"]["adapter"] >= 0.95
    assert {g["name"] for g in evaluation.entry.gates} == {
        "gain", "retention", "drift", "recall", "precision", "overfit", "memorisation",
        "calibration", "evaluations", "leaks", "frozen", "effect",
    }  # fmt: skip
    overfit = next(g for g in evaluation.entry.gates if g["name"] == "overfit")
    assert " That of TF-IDF is " in overfit["why"]
    assert "Verdict" in str(evaluation)


def test_the_card_is_complete_and_rebuilt_from_items(fitted: Fitted) -> None:
    model, evaluation = fitted
    card = Card.read(model.out / "spam")
    assert card == Card.from_json(json.loads(evaluation.card.dumps()), "")
    assert rebuild(model.out / "spam") == card
    written = card.to_json()
    assert written.keys() == {"schema", "base", "environment", "adapters"}
    assert written["adapters"][0].keys() >= {
        "domain", "path", "sha256", "recipe_digest", "parent", "training", "ledger", "leaks",
        "domain_scores", "general", "slices", "calibration", "confusion", "per_class", "gates",
        "verdict",
    }  # fmt: skip
    assert (model.out / "spam" / "README.md").read_text().count(evaluation.verdict) >= 1


def test_a_rebuild_sees_changed_items(fitted: Fitted, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(fitted[0].out / "spam", tmp_path / "spam")
    items = read_items(folder)
    for item in items:
        if item["set"] == "test":
            item["scores"]["adapter"]["prediction"] = 0
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in items))
    entry = rebuild(folder).adapter
    assert entry.domain_scores["recall"]["adapter"] == 0.0
    assert entry.verdict == "fail"


def test_an_adapter_loaded_in_a_new_model_scores_the_same(
    fitted: Fitted, tiny_base: Path, spam: Domain, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(fitted[0].out / "spam", tmp_path / "spam")
    settings = Card.read(folder).adapter.settings
    fresh = model_in(tmp_path, tiny_base)
    # The settings of the training stay in the card, whatever the domain says at evaluation.
    again = fresh.evaluate(with_settings(spam, epochs=7), suite=SUITE)
    assert again.entry.domain_scores == fitted[1].entry.domain_scores
    assert Card.read(folder).adapter.settings == settings
    assert fresh.domains == ("spam",)


def test_evaluate_needs_an_adapter_and_a_domain(tiny_base: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="a domain fitted in this process"):
        model.dataset("spam")
    with pytest.raises(AdapterError, match="Train one first"):
        model.evaluate("spam")
    with pytest.raises(AdapterError, match="Train one first"):
        model.evaluate(declared(make_rows(60)))


@pytest.mark.slow
@pytest.mark.usefixtures("small_suite")
def test_rows_are_cut_and_prompted_as_in_training(tiny_base: Path, tmp_path: Path) -> None:
    """At the length and with the prompt in the card, whatever was fitted since."""
    rows = [row | {"text": row["text"] + " stone river" * 16} for row in make_rows(100)]
    model = model_in(tmp_path, tiny_base)
    made = declared(rows, epochs=1, retention="none", max_length=32)
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    warnings: list[str] = []
    model = model_in(tmp_path, tiny_base)
    model.display = Display(quiet=True)
    model.display.warn = warnings.append  # type: ignore[method-assign]
    model.evaluate(made, suite=SUITE)
    assert any("of 20 test rows are longer than 32 tokens" in line for line in warnings)
    shortened = f"with {SHOTS} examples in its prompt reads a shorter text in 20 of 20"
    assert any(shortened in line for line in warnings)
    test = made.data.test
    assert isinstance(test, list)
    texts = [row["text"] for row in test]
    judged = [i for i in read_items(tmp_path / "spam") if i["set"] == "test"]
    said = model.predict(texts, domain="spam")
    for one, item in zip(said, judged, strict=True):
        assert isinstance(one, Prediction)
        assert one.probability == pytest.approx(item["scores"]["adapter"]["confidence"], abs=1e-5)
    traced = trace(model, texts[0], "spam")
    assert traced.cut
    assert len(traced.before) + len(traced.after) <= 32
    other = Classification(positive="spam", prompt="read {text} and say the kind")
    model.fit(replace(made, task=other), dry_run=True)
    assert model.predict(texts, domain="spam") == said
    most = model.base.context
    with pytest.raises(DomainError, match=f"at most {most}, the context"):
        model.fit(with_settings(made, max_length=most + 1))


@pytest.mark.slow
def test_windows_of_one_text_form_a_group(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"]} for row in make_rows(60)]
    rows[-1]["text"] = "red river stone " * 90
    model = model_in(tmp_path, tiny_base)
    made = declared(rows, "prose", LanguageModelling(), epochs=1, retention="none")
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    items = [i for i in read_items(tmp_path / "prose") if i["set"] == "test"]
    grouped = [i["group"] for i in items if "group" in i]
    assert len(grouped) >= 3
    assert len(set(grouped)) == 1
    assert len(items) == 11 + len(grouped)
    with pytest.raises(UsageError, match="rows of at most 128 tokens, as it was trained"):
        model.evaluate(with_settings(made, max_length=100), suite=SUITE)


# ── The test set ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_each_adapter_tried_on_a_test_set_is_charged_to_its_budget(
    tiny_base: Path, tmp_path: Path, project: Path
) -> None:
    made = declared(make_rows(120), epochs=1)
    model = model_in(tmp_path, tiny_base)
    found = []
    for seed in (0, 0, 1):
        model.fit(made, lr=0.01 + seed / 1000)  # the rows, and so the test set, stay
        found.append(model.evaluate(made, suite=SUITE).entry)
    evaluations = [entry.evaluations for entry in found]
    # The first one was trained and evaluated twice with the same bytes: one adapter.
    assert [one["number"] for one in evaluations] == [1, 1, 2]
    assert {one["level"] for one in evaluations} == {level(5)}
    assert found[0].sha256 == found[1].sha256 != found[2].sha256
    assert rebuild(tmp_path / "spam").adapter.to_json() == json.loads(
        json.dumps(found[2].to_json())
    )
    ledger = project / ".lora-domains" / "evaluations.jsonl"
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    assert [line["verdict"] for line in lines if "verdict" in line] == [e.verdict for e in found]
    assert [line["test_set"] for line in lines if "adapter" in line] == [
        evaluations[0]["test_set"]
    ] * 3
    ledger.write_text("")
    entry = model.evaluate(made, suite=SUITE).entry
    assert entry.verdict == "fail"
    assert {g["name"]: g["verdict"] for g in entry.gates}["evaluations"] == "fail"


@pytest.mark.slow
def test_an_evaluation_uses_the_gates_of_its_domain(tiny_base: Path, tmp_path: Path) -> None:
    made = declared(make_rows(120), epochs=1)
    model = model_in(tmp_path, tiny_base)
    model.fit(made, lr=0.01)
    scores = validation_scores(model.bank, model.dataset(made), model.out, model.display)
    validation = read_items(tmp_path / "spam")
    first = model.evaluate(made, suite=SUITE).entry
    # The scores on validation rows stay with the adapter, beside those of the evaluation.
    kept = [item for item in read_items(tmp_path / "spam") if item["set"] == "validation"]
    assert kept == validation
    assert len(kept) == scores["accuracy"]["n"] > 0
    found = model.evaluate(replace(made, gates=Gates(recall=0.999)), suite=SUITE).entry
    assert {g["name"]: g["threshold"] for g in found.gates}["recall"] == 0.999
    # Declared after the first evaluation, they are marked, and charged to no one.
    assert (found.evaluations["post_hoc"], found.evaluations["number"]) == (True, 1)
    assert found.evaluations["declared_verdict"] == first.verdict
    gates = {g["name"]: g for g in found.gates}
    assert "Post hoc" in gates["evaluations"]["why"]
    assert (gates["evaluations"]["verdict"] == "pass") == (first.verdict == "pass")
    fewer = replace(made, data=replace(made.data, train=make_rows(120)[:40]))
    with pytest.raises(UsageError, match="the train rows of its training"):
        model.evaluate(fewer, suite=SUITE)


@pytest.mark.slow
def test_a_threshold_is_tuned_on_validation_rows_and_used_everywhere(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = make_rows(400)
    made = declared(rows, task=Classification(positive="spam", target_recall=0.95), epochs=2)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    early = model.predict(rows[0]["text"], domain="spam")[0]
    assert isinstance(early, Prediction)  # before it is chosen the likeliest label is named
    assert early.probability == max(early.probabilities.values())
    entry = model.evaluate(made, suite=SUITE).entry
    items = read_items(tmp_path / "spam")
    by_set = {name: [i for i in items if i["set"] == name] for name in ("validation", "test")}
    assert isinstance(made.data.validation, list)
    assert len(by_set["validation"]) == len(made.data.validation)
    threshold = entry.judged["threshold"]["threshold"]
    assert entry.curve["threshold"] == threshold
    assert entry.curve["targets"] == {"recall": 0.95}
    spam = entry.judged["labels"].index("spam")
    hits = [i["scores"]["adapter"]["prediction"] == spam for i in by_set["validation"]
            if i["target"] == spam]  # fmt: skip
    assert np.mean(hits) >= 0.95
    for item in by_set["test"]:
        one = item["scores"]["adapter"]
        assert (one["prediction"] == spam) == (one["positive"] >= threshold)
        assert "other" not in one
        # Each contender has a threshold of its own, so that none has an advantage.
        assert "positive" in item["scores"]["base"]
    test = made.data.test
    assert isinstance(test, list)
    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter("spam")
    for user in (model, fresh):
        said = user.predict([row["text"] for row in test], domain="spam")
        labels = [p.label for p in said if isinstance(p, Prediction)]
        assert labels == [entry.judged["labels"][i["scores"]["adapter"]["prediction"]]
                          for i in by_set["test"]]  # fmt: skip
    ids = {row["id"] for row in by_set["validation"]}
    assert not ids & {row["id"] for row in by_set["test"]}
    assert rebuild(tmp_path / "spam") == Card.read(tmp_path / "spam")
