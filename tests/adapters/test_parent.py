"""Training that continues from another adapter, and the comparison with it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.commands import run, write
from support.general_text import use_general_text
from support.models import SUITE, declared, model_in

from lora_domains.adapters import versions
from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.parent import load_parent
from lora_domains.adapters.peft import new_adapter
from lora_domains.analysis.scale_curve import check_adapter
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.modeling.base import Base, load_base
from lora_domains.report.card import Card, ParentRecord, read_items
from lora_domains.report.report import rebuild
from lora_domains.training import fit
from lora_domains.training.plan import make_plan


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, device="cpu")


def narrower(seed: int = 5, count: int = 100) -> list[dict[str, Any]]:
    return [row | {"text": row["text"] + " stone"} for row in make_rows(count, seed=seed)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A folder with the adapter ``health``, of rank 4 on two kinds of linears."""
    folder = tmp_path_factory.mktemp("health")
    made = declared(make_rows(100), "health", retention="none", rank=4, alpha=8,
                    targets=("q_proj", "down_proj"))  # fmt: skip
    model_in(folder, tiny_base).fit(made)
    return folder


@pytest.fixture
def health(trained: Path, tmp_path: Path) -> Path:
    """A copy of that folder for one test."""
    return Path(shutil.copytree(trained, tmp_path, dirs_exist_ok=True))


def cancer(name: str = "cancer", **settings: Any) -> Domain:
    plain = {"retention": "none", "epochs": 1, "rank": None}
    return declared(narrower(), name, **(plain | settings))


def test_training_continues_from_the_weights_of_the_parent(health: Path, tiny_base: Path) -> None:
    model = model_in(health, tiny_base)
    parent = load_parent(health / "health", model.base)
    dataset = model.dataset(cancer())
    dataset = replace(dataset, parent=parent)
    plan = make_plan(model.base, dataset)
    run = fit.make_run(model.bank, dataset, plan, model.out, model.display)
    assert (plan.rank, plan.alpha) == (4, 8)
    assert any("those of health" in reason for reason in plan.reasons)
    weights = run.bank.weights(run.adapter_name)
    assert weights.keys() == parent.adapter.weights.keys()
    assert {name.rsplit(".", 1)[-1] for name in weights} == {"q_proj", "down_proj"}
    for linear, (a, b) in weights.items():
        assert torch.equal(a, parent.adapter.weights[linear][0])
        assert torch.equal(b, parent.adapter.weights[linear][1])
        assert b.abs().max() > 0
    assert run.adapter.config.r == 4


def test_training_continues_from_the_magnitudes_of_the_parent(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_in(tmp_path, tiny_base)
    made = declared(make_rows(60), "health", retention="none", rank=4, dora=True, epochs=1)
    model.fit(made)
    parent = load_parent(tmp_path / "health", model.base)
    assert parent.adapter.config.use_dora
    fresh = new_adapter(model.base, "fresh", made.lora, 4, 32, 0).magnitudes
    for linear, magnitude in parent.adapter.magnitudes.items():
        assert (magnitude - fresh[linear]).abs().max() > 1e-3  # they are trained
    before = model.predict([row["text"] for row in make_rows(9)], domain="health")
    dataset = replace(model.dataset(cancer()), parent=parent)
    run = fit.make_run(
        model.bank, dataset, make_plan(model.base, dataset), model.out, model.display
    )
    magnitudes = run.bank.magnitudes(run.adapter_name)
    assert magnitudes.keys() == run.adapter.weights.keys()
    for linear, magnitude in magnitudes.items():
        assert torch.equal(magnitude, parent.adapter.magnitudes[linear])
    again = model_in(tmp_path, tiny_base)
    again.load_adapter("health")
    assert again.predict([row["text"] for row in make_rows(9)], domain="health") == before
    with pytest.raises(UsageError, match="found one with DoRA"):
        check_adapter(again.bank["health"])


def test_the_card_names_the_parent_and_scores_against_it(health: Path, tiny_base: Path) -> None:
    model = model_in(health, tiny_base)
    before = fingerprint(health / "health")
    model.fit(cancer(), init_from="health")
    evaluation = model.evaluate(cancer(), suite=SUITE)
    entry = evaluation.entry
    assert entry.parent == ParentRecord("health", before)
    config = json.loads((health / "cancer" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    test = [i for i in read_items(health / "cancer") if i["set"] == "test"]
    assert all({"base", "adapter", "parent", "tfidf"} <= i["scores"].keys() for i in test)
    for metric, fields in entry.domain_scores.items():
        assert fields["baselines"]["parent"] == entry.over_parent[metric]["parent"]
    # These are the parent's predictions, not the base's or the child's.
    alone = model_in(health, tiny_base)
    alone.load_adapter("health")
    predictions = alone.predict([r["text"] for r in narrower()[80:]], domain="health")
    for prediction, item in zip(predictions, test, strict=True):
        confidence = item["scores"]["parent"]["confidence"]
        assert prediction.probability == pytest.approx(confidence, abs=1e-5)  # type: ignore[union-attr]
    assert any(i["scores"]["parent"]["nats"] != i["scores"]["adapter"]["nats"] for i in test)
    assert "Parent health: F1" in str(evaluation)
    assert set(model.domains) == {"cancer"}
    assert rebuild(health / "cancer") == Card.read(health / "cancer")
    assert fingerprint(health / "health") == before


def test_a_parent_of_the_same_name_is_kept_as_a_version(health: Path, tiny_base: Path) -> None:
    before = fingerprint(health / "health")
    model = model_in(health, tiny_base)
    model.fit(cancer("health"), init_from=health / "health")
    assert fingerprint(health / "health") != before
    assert [fingerprint(p) for p in versions.versions(health / "health")] == [before]
    # A new process finds it there.
    fresh = model_in(health, tiny_base)
    entry = fresh.evaluate(cancer("health"), suite=SUITE).entry
    assert entry.parent == ParentRecord("health", before)
    assert "parent" in entry.domain_scores["f1"]["baselines"]


def test_a_missing_parent_is_reported(
    health: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_domains.console import Display

    model_in(health, tiny_base).fit(cancer(), init_from="health")
    shutil.rmtree(health / "health")
    fresh = model_in(health, tiny_base)
    fresh.display = Display()
    entry = fresh.evaluate(cancer(), suite=SUITE).entry
    assert not entry.over_parent
    assert "health, which cancer continues from, was not found" in capsys.readouterr().out


@pytest.mark.usefixtures("small_suite")
def test_a_rank_other_than_the_parents_is_reported(
    health: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lora_domains.console import Display

    model = model_in(health, tiny_base)
    model.display = Display()
    made = cancer(rank=8, targets=("q_proj", "v_proj"), rslora=True,
                  dora=True, top_layers=1)  # fmt: skip
    model.fit(made, init_from="health", dry_run=True)
    output = " ".join(capsys.readouterr().out.split())
    assert "rank 8 is ignored: an adapter keeps the rank of its parent, 4" in output
    assert "target modules ['q_proj', 'v_proj'] is ignored" in output
    assert "rslora True is ignored: an adapter keeps the rslora of its parent, False" in output
    assert "dora True is ignored: an adapter keeps the dora of its parent, False" in output
    assert "top_layers 1 is ignored: an adapter keeps the top_layers of its parent, None" in output
    model.fit(cancer(), init_from="health", dry_run=True)
    assert "is ignored" not in capsys.readouterr().out


def test_an_interrupted_second_stage_resumes_from_the_same_parent(
    health: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then its best epoch has replaced the parent."""
    from lora_domains.errors import TrainingInterrupted
    from lora_domains.training.loop import Run

    whole = model_in(health / "whole", tiny_base)
    shutil.copytree(health / "health", health / "whole" / "health")
    whole.fit(cancer("health", epochs=2), init_from="health")
    model = model_in(health, tiny_base)
    make_run = fit.make_run

    def stopped(*arguments: Any) -> Run:
        run = make_run(*arguments)
        step: Callable[[Any], None] = run.train_step

        def counting(items: Any) -> None:
            step(items)
            if run.state.total_steps == 7:
                run.signals.received = 2

        run.train_step = counting  # type: ignore[method-assign]
        return run

    monkeypatch.setattr(fit, "make_run", stopped)
    with pytest.raises(TrainingInterrupted, match="epoch 2, step 2"):
        model.fit(cancer("health", epochs=2), init_from="health")
    monkeypatch.undo()
    assert Card.read(health / "health").adapter.parent is not None
    fresh = model_in(health, tiny_base)
    fresh.fit(cancer("health", epochs=2), init_from="health", resume=True)
    assert fingerprint(health / "health") == fingerprint(health / "whole" / "health")


def test_a_finished_second_stage_is_not_its_own_parent(health: Path, tiny_base: Path) -> None:
    """The same command resumes a run that stopped after saving, such as in its evaluation."""
    made = cancer("health")
    model_in(health, tiny_base).fit(made, init_from="health")
    finished = fingerprint(health / "health")
    model_in(health, tiny_base).fit(made, init_from="health", resume=True)
    assert fingerprint(health / "health") == finished
    # Another declaration continues from the adapter that is there.
    model_in(health, tiny_base).fit(cancer("health", seed=1), init_from="health", resume=True)
    entry = Card.read(health / "health").adapter
    assert entry.parent.sha256 == finished


def test_a_second_stage_is_repeated_from_its_card(
    health: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Its parent of the same name is found by its digest among the versions."""
    monkeypatch.setattr("lora_domains.probes.suite.default_suite", lambda *_: SUITE)
    use_general_text(monkeypatch)
    write(health / "narrow.csv", narrower())
    out = ("--base", str(tiny_base), "--out", str(health))
    assert run("fit", "--name", "health", "--train", str(health / "narrow.csv"), "--epochs", "1",
               "--init-from", "health", *out) in (0, 1, 3)  # fmt: skip
    made = fingerprint(health / "health")
    monkeypatch.chdir(health)
    again = ("fit", "--from-card", str(health / "health"), "--train", str(health / "narrow.csv"))
    assert run(*again, *out[:2], "--out", "again") in (0, 1, 3)
    assert "The adapter is the same to the byte" in capsys.readouterr().out
    assert fingerprint(health / "again" / "health") == made
    shutil.rmtree(health / ".versions")
    assert run(*again, *out[:2], "--out", "again") == 2
    assert "Give it: --init-from" in capsys.readouterr().err


def test_the_checkpoint_of_another_parent_is_refused(health: Path, tiny_base: Path) -> None:
    from lora_domains.training.checkpoints import check_same_run

    stored = {"run": {"parent": "a", "base": "b"}}
    with pytest.raises(UsageError, match="another parent"):
        check_same_run(health / "x", stored, {"parent": None, "base": "b"})
