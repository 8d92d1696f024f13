"""Training with a head: what it learns, keeps and refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from safetensors.torch import load_file
from support.heads import headed_domain
from support.models import make_run, model_in

from lora_domains.adapters.folder import WEIGHTS
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import AdapterError
from lora_domains.model import DomainModel
from lora_domains.report.card import read_items
from lora_domains.tasks import Classification, Generation
from lora_domains.training.loop import Run


@pytest.mark.slow
@pytest.mark.usefixtures("small_suite")
def test_heads_are_trained_evaluated_and_used_beside_a_generator(
    tmp_path: Path, tiny_base: Path
) -> None:
    model = model_in(tmp_path, tiny_base)
    digest = model.base.state_digest()
    card = model.fit(headed_domain(epochs=6))
    model.fit(headed_domain("colours", 5, epochs=6))
    answers = [{"question": row["text"], "answer": row["label"]} for row in make_rows(60)]
    model.fit(
        with_settings(
            Domain("words", Generation(), Data(answers)), epochs=1, retention="none", rank=4
        )
    )
    assert model.domains == ("spam", "colours", "words")
    assert model.base.state_digest() == digest
    texts = ["alpha red blue", "beta red blue"]
    predictions = model.predict(texts, domain="spam")
    assert [set(p.probabilities) for p in predictions] == [{"ham", "spam"}] * 2  # type: ignore[union-attr]
    (colour,) = model.predict("alpha gamma stone", domain="colours")
    assert sum(colour.probabilities.values()) == pytest.approx(1)  # type: ignore[union-attr]
    assert len(colour.probabilities) == 5  # type: ignore[union-attr]
    assert isinstance(model.generate("red", "words", max_new_tokens=2), str)
    entry = model.evaluate("colours").entry
    scores = entry.domain_scores["macro_f1"]
    assert set(scores["baselines"]) == {"majority", "tfidf"}
    assert scores["adapter"] > 0.9
    assert entry.domain_scores["accuracy"]["base"] > scores["baselines"]["majority"]
    assert {gate["name"] for gate in entry.gates} >= {"gain", "retention", "drift", "effect"}
    assert entry.judged["knowledge"] == "questions"
    assert entry.general["kl"]["general"] > 0
    assert not entry.judged["base_changed"]
    # The adapter alone on a new base gives the same predictions.
    fresh = model_in(tmp_path, tiny_base)
    assert fresh.predict(texts, fresh.load_adapter("spam")) == predictions
    assert card.adapter.task["head"] is True
    readme = (tmp_path / "colours" / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained(base, num_labels=5)" in readme
    assert "pipeline_tag: text-classification" in readme


@pytest.mark.slow
def test_the_head_of_the_best_epoch_is_kept(tmp_path: Path, tiny_base: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    def worse_and_worse(run: Run) -> dict[str, Any]:
        seen.append(run.tensors()["head"])
        return {"validation_loss": float(len(seen)), "accuracy": 0.5, "score": -len(seen),
                "higher_is_better": True}  # fmt: skip

    domain = headed_domain(epochs=2, retention="none")
    head = make_run(tmp_path, tiny_base, domain, worse_and_worse).fit().adapter.head
    assert head is not None
    assert torch.equal(head.weights["score.weight"], seen[0]["score.weight"])
    assert not torch.equal(seen[0]["score.weight"], seen[1]["score.weight"])


@pytest.mark.slow
def test_a_head_keeps_the_labels_it_was_trained_on(tmp_path: Path, tiny_base: Path) -> None:
    """Fitted, then evaluated with another domain of the same name."""
    model = model_in(tmp_path, tiny_base)
    declared = headed_domain(epochs=1, retention="none")
    model.fit(declared)
    before = model.predict("alpha red", "spam")
    for task in (Classification(), Classification(head=True, labels=("spam", "ham")),
                 Classification(head=True, labels=("eggs", "ham", "spam"))):  # fmt: skip
        fresh = model_in(tmp_path, tiny_base)
        with pytest.raises(AdapterError, match="one over ham, spam"):
            fresh.evaluate(replace(declared, task=task))
        assert fresh.predict("alpha red", "spam") == before


@pytest.mark.usefixtures("small_suite")
def test_a_second_stage_keeps_the_classes_of_its_head(tmp_path: Path, tiny_base: Path) -> None:
    """The new rows lack one label; other labels, or no head, are refused before training."""
    model = model_in(tmp_path, tiny_base)
    wide = headed_domain("wide", classes=3, epochs=1, retention="none")
    model.fit(wide)
    data = wide.data
    narrow = Data(*([row for row in part if row["label"] != "red"]  # type: ignore[union-attr]
                    for part in (data.train, data.validation, data.test)))  # fmt: skip
    card = model.fit(replace(wide, name="narrow", data=narrow), init_from="wide")
    assert card.adapter.task["labels"] == ["blue", "green", "red"]
    head = model.bank["narrow"].head
    assert head is not None
    assert head.classes == 3
    fresh = model_in(tmp_path, tiny_base)
    entry = fresh.evaluate(replace(wide, name="narrow", data=narrow)).entry
    assert entry.judged["labels"] == ["blue", "green", "red"]
    targets = {item["target"] for item in read_items(tmp_path / "narrow") if item["set"] == "test"}
    assert targets == {0, 1}
    for task in (Classification(), Classification(head=True, labels=("blue", "green"))):
        with pytest.raises(AdapterError, match=r"wide, to continue from"):
            model.fit(replace(wide, name="other", task=task), init_from="wide")
    model.fit(replace(wide, name="plain", task=Classification()), rank=4)
    with pytest.raises(AdapterError, match="an adapter without one"):
        model.fit(replace(wide, name="other"), init_from="plain")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_drift_beyond_the_limit_is_reported_for_a_head(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=Display(), device="cpu")
    model.fit(headed_domain(epochs=1, lr=0.05, drift=1e-9))
    assert "no epoch stays within the drift limit of 1e-09" in capsys.readouterr().out


@pytest.mark.slow
def test_a_head_resumes_exactly(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = headed_domain(dropout=0.1)
    whole = model_in(tmp_path / "a", tiny_base)
    whole.fit(declared)
    step, steps = Run.train_step, 0

    def dying(run: Run, batch: Any) -> None:
        nonlocal steps
        step(run, batch)
        steps += 1
        run.save()
        if steps == 10:  # in the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "train_step", dying)
    other = model_in(tmp_path / "b", tiny_base)
    with pytest.raises(KeyboardInterrupt):
        other.fit(declared)
    monkeypatch.setattr(Run, "train_step", step)
    again = model_in(tmp_path / "b", tiny_base)
    again.fit(declared, resume=True)
    files = [(tmp_path / part / "spam" / WEIGHTS).read_bytes() for part in "ab"]
    assert files[0] == files[1]
    assert "base_model.model.score.weight" in load_file(tmp_path / "a" / "spam" / WEIGHTS)
