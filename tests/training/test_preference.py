"""Training on pairs: the loss and gradients of TRL, the base as the reference, the win rate."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from support.adapters import strong
from support.models import SUITE, declared, make_run, model_in

from lora_domains.inference.likelihoods import answer_nll, tail_logits
from lora_domains.modeling.batching import collate
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.tasks import Preference
from lora_domains.training.loop import Run

PAIRS = [
    {"prompt": r["text"], "chosen": "blue stone " * (1 + n % 3), "rejected": f"red {r['label']}"}
    for n, r in enumerate(make_rows(80))
]


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Run:
    """A run whose adapter is far from the base."""
    task = Preference(beta=0.3)
    run = make_run(tmp_path, tiny_base, declared(PAIRS, "pairs", task, retention="none"))
    weights = strong(run.bank.base, "strong", rank=8).weights
    run.bank.set_weights(run.adapter_name, {n: (a, 0.1 * b) for n, (a, b) in weights.items()})
    run.validation.compare_with_base(run.gradients.pairs, run.train)
    return run


def answer_logps(run: Run, route: str | None, number: int) -> torch.Tensor:
    """The log-probability of one answer of each row, as TRL computes it: its tokens' sum."""
    rows = [row.__class__(row.id, row.prompt, row.choices[number]) for row in run.train[:8]]
    batch = collate(rows, run.bank.base.pad)
    with run.bank.routed(route):
        return -answer_nll(tail_logits(run.model, batch), batch).sum(1)


def test_loss_and_gradients_are_those_of_trl(run: Run) -> None:
    """trl/trainer/dpo_trainer.py, ``dpo_loss`` with loss_type="sigmoid"."""
    policy = [answer_logps(run, run.adapter_name, n) for n in (0, 1)]
    with torch.no_grad():
        reference = [answer_logps(run, None, n) for n in (0, 1)]
    logratios = policy[0] - policy[1]
    ref_logratios = reference[0] - reference[1]
    logits = logratios - ref_logratios
    losses = -F.logsigmoid(0.3 * logits)
    assert logits.abs().max() > 0.1
    expected = torch.autograd.grad(losses.mean(), run.parameters, allow_unused=True)
    rows = run.train[:8]
    assert run.gradients.units(rows) == 8
    total = run.gradients.compute(rows, 8)
    assert float(total) / 8 == pytest.approx(losses.mean().item(), abs=1e-5)
    compared = 0
    for own, gradient in zip(run.parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(own.grad, gradient, atol=1e-5, rtol=1e-3)
            compared += bool(gradient.abs().max() > 1e-4)
    assert compared > 4


def test_both_answers_end_and_count(run: Run) -> None:
    for row in run.train:
        chosen, rejected = row.choices
        assert chosen == row.answer
        assert chosen[-1] == rejected[-1] == run.bank.base.tokenizer.eos_token_id


def test_validation_has_the_dpo_loss_and_the_win_rate(run: Run) -> None:
    figures = run.validation.figures()
    with torch.no_grad():
        run.train = run.validation.rows
        moved = (
            answer_logps(run, run.adapter_name, 0) - answer_logps(run, run.adapter_name, 1)
            - answer_logps(run, None, 0) + answer_logps(run, None, 1)
        ).numpy()  # fmt: skip
    assert len(run.validation.rows) == len(moved) == 8
    assert figures["validation_loss"] == pytest.approx(np.log1p(np.exp(-0.3 * moved)).mean(), 1e-4)
    assert figures["score"] == (moved > 0).mean()
    assert figures["higher_is_better"]


@pytest.mark.parametrize("metric", ["ranked", "margin", "nats_per_token"])
def test_epochs_are_ranked_by_the_metric_of_the_domain(
    tiny_base: Path, tmp_path: Path, metric: str
) -> None:
    pairs = declared(PAIRS, "pairs", Preference(), metric=metric, retention="none")
    run = make_run(tmp_path, tiny_base, pairs)
    weights = strong(run.bank.base, "strong", rank=8).weights
    run.bank.set_weights(run.adapter_name, {n: (a, 0.1 * b) for n, (a, b) in weights.items()})
    run.validation.compare_with_base(run.gradients.pairs, run.train)
    figures = run.validation.figures()
    with torch.no_grad():
        run.train = run.validation.rows
        chosen, rejected = (answer_logps(run, run.adapter_name, n) for n in (0, 1))
    expected = {
        "ranked": float((chosen > rejected).float().mean()),
        "margin": float((chosen - rejected).mean()),
        "nats_per_token": float(-chosen.sum() / sum(len(row.answer) for row in run.train)),
    }[metric]
    assert figures["score"] == pytest.approx(expected, 1e-4)
    assert figures["higher_is_better"] is (metric != "nats_per_token")


@pytest.mark.long
@pytest.mark.usefixtures("small_suite")
def test_preferences_are_learned_and_judged_by_their_win_rate(
    tiny_base: Path, tmp_path: Path
) -> None:
    domain = declared(PAIRS, "pairs", Preference(), epochs=3, retention="none")
    model = model_in(tmp_path, tiny_base)
    model.fit(domain, dry_run=True)
    card = model.fit(domain)
    history: list[dict[str, Any]] = card.adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"] < 0.75  # log 2 at first
    assert history[-1]["score"] > 0.5
    entry = model.evaluate(domain, suite=SUITE).entry
    assert entry.judged["metric"] == "win_rate"
    won = entry.domain_scores["win_rate"]
    assert won["base"] == 0.5
    assert won["difference"] >= won["lower"] > 0
    assert entry.domain_scores["margin"]["lower"] > 0
    assert set(entry.domain_scores) == {"win_rate", "ranked", "margin", "nats_per_token"}
    assert rebuild(tmp_path / "pairs") == Card.read(tmp_path / "pairs")
    report = model.benchmark(SUITE, [domain], tmp_path / "reports").report
    assert report.adapters[0].domain_scores["win_rate"] == won
    assert isinstance(model.predict("red stone", domain="pairs")[0], str)


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bytes(tiny_base: Path, tmp_path: Path) -> None:
    from support.models import stopped_after

    domain = declared(PAIRS, "pairs", Preference(), epochs=2, retention="none")
    whole = model_in(tmp_path / "whole", tiny_base).fit(domain)
    stopped_after(5, domain, tmp_path / "cut", tiny_base)
    resumed = model_in(tmp_path / "cut", tiny_base).fit(domain, resume=True)
    assert resumed.adapter.sha256 == whole.adapter.sha256


def test_a_dry_run_keeps_no_log_odds_of_the_base_and_a_run_does(
    tiny_base: Path, tmp_path: Path, cache: Path
) -> None:
    domain = declared(PAIRS[:40], "pairs", Preference(), retention="none", epochs=1)
    model_in(tmp_path, tiny_base).fit(domain, dry_run=True)
    assert not cache.exists()
    run = make_run(tmp_path, tiny_base, domain)
    run.validation.compare_with_base(run.gradients.pairs, run.train)
    assert len([*(cache / "pairs").iterdir()]) == 1
