"""Validation of epochs: which one is kept, at which scale, and how it is described."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sklearn import metrics as oracle
from support.models import declared, fixed, forgetful, make_run

from lora_domains.adapters.folder import WEIGHTS
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.loop import Run
from lora_domains.training.validation import (
    Validation,
    collapse_warning,
    observe,
    scale_down,
    validation_figures,
)

OVERFITTING = "overfitting: validation loss rises while training loss falls"
UNSTABLE = "unstable: both losses rise; a lower learning rate may help"


def test_the_best_epoch_is_kept_not_the_last(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=4, patience=2)
    figures = fixed(2.0, 1.0, 3.0, 4.0)
    seen: list[dict[str, Any]] = []

    def recording(run: Run) -> dict[str, Any]:
        seen.append(run.bank.weights(run.adapter_name))
        return figures(run)

    run = make_run(tmp_path, tiny_base, spam, recording)
    trained = run.fit()
    assert (trained.record["best_epoch"], trained.record["epochs"]) == (2, 4)
    for linear, (a, b) in trained.adapter.weights.items():
        assert torch.equal(a, seen[1][linear][0])
        assert torch.equal(b, seen[1][linear][1])
        assert not torch.equal(b, seen[3][linear][1])
    assert run.adapter_name not in run.bank


def test_a_better_score_does_not_make_up_for_lost_knowledge(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    kl = [0.1, 0.2, 0.36, 5.0]
    figures = fixed(*[1.0] * 4, scores=[0.5, 0.6, 0.8, 0.9])

    def drifting(run: Run) -> dict[str, Any]:
        return figures(run) | {"general_kl": kl[run.state.epoch], "general_nats": 1.0}

    def best(**settings: Any) -> tuple[int, list[str]]:
        run = make_run(tmp_path, tiny_base, declared(rows[:60], epochs=4, **settings), drifting)
        run.validation.monitored = ()  # the figures hold the drift
        record = run.fit().record
        return record["best_epoch"], [h["observation"] for h in record["history"]]

    epoch, observations = best(drift=0.35)
    assert epoch == 2
    lost = "general knowledge is being lost"
    assert observations[2:] == [f"{lost}: KL {k:.2f}, limit 0.35" for k in (0.36, 5.0)]
    assert best(drift=0.36)[0] == 3
    epoch, observations = best(drift=0.35, retention="none")
    assert epoch == 4
    assert not any(lost in observation for observation in observations)


def test_equal_scores_are_ranked_by_loss(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    figures = fixed(3.0, 1.0, 2.0, scores=[0.9, 0.9, 0.9])
    record = make_run(tmp_path, tiny_base, declared(rows[:60], epochs=3), figures).fit().record
    assert record["best_epoch"] == 2


def test_a_smaller_scale_is_kept_where_no_epoch_stays_within_the_limit(
    tmp_path: Path, tiny_base: Path
) -> None:
    """KL with almost no weight trains like no retention, but its epochs have a drift limit."""
    settings = {"retention": "kl", "kl": 1e-9}
    whole = forgetful(tmp_path / "whole", tiny_base, **settings, drift=1e9)
    lost = min(h["general_kl"] for h in whole["history"])
    assert whole["scale"] == 1.0
    kept = forgetful(tmp_path / "kept", tiny_base, **settings, drift=lost / 3)
    assert kept["scale"] < 1
    assert [h["general_kl"] for h in kept["history"]] == [h["general_kl"] for h in whole["history"]]
    a, b = (load_file(tmp_path / name / "spam" / WEIGHTS) for name in ("whole", "kept"))
    assert kept["best_epoch"] == whole["best_epoch"]
    for name in a:
        share = kept["scale"] if "lora_B" in name else 1.0
        torch.testing.assert_close(b[name], a[name] * share)


def test_dora_is_not_scaled(tmp_path: Path, tiny_base: Path) -> None:
    """Magnitudes are not in proportion to B: at scale 0 the adapter would not be the base."""
    record = forgetful(tmp_path, tiny_base, retention="kl", kl=1e-9, drift=1e-9, dora=True)
    assert record["scale"] == 1.0


def test_a_smaller_scale_must_rank_higher() -> None:
    def evaluate(scale: float) -> dict[str, Any]:
        return {"score": scale, "general_kl": scale}

    best = {"epoch": 2, "score": 1.0, "general_kl": 1.0, "validation_loss": 0.1,
            "higher_is_better": True}  # fmt: skip
    assert scale_down(best, evaluate, 0.5) == best | {"scale": 0.4, "score": 0.4, "general_kl": 0.4}
    assert scale_down(best, evaluate, 0.1) == best


def test_exceeding_the_drift_limit_at_every_scale_is_warned_about(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    model.fit(declared(rows[:200], epochs=1, lr=0.02, retention="kl", kl=1e-9, drift=1e-9))
    assert "no epoch at any scale stays within the drift limit" in " ".join(
        "".join(capsys.readouterr()).split()
    )


def test_validation_uses_no_dropout(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, declared(rows[:100], epochs=1, dropout=0.5))
    figures = run.validation.figures
    seen: list[dict[str, Any]] = []

    def twice() -> dict[str, Any]:
        seen.extend([figures(), figures()])
        return seen[0]

    run.validation.figures = twice  # type: ignore[method-assign]
    run.fit()
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([(1.0, 1.0)], "first epoch"),
        ([(1.0, 1.0), (0.8, 0.9)], "still improving"),
        ([(1.0, 1.0), (0.8, 0.99)], "converging"),
        ([(1.0, 1.0), (0.8, 1.01)], "converging"),
        ([(1.0, 1.0), (0.8, 1.03)], OVERFITTING),
        ([(1.0, 1.0), (1.2, 1.03)], UNSTABLE),
        # Compared with the best epoch so far, not with the previous one.
        ([(1.0, 0.5), (0.9, 1.0), (0.8, 0.9)], OVERFITTING),
    ],
)
def test_observations_follow_from_the_figures(
    history: list[tuple[float, float]], words: str
) -> None:
    records = [{"training_loss": t, "validation_loss": v} for t, v in history]
    assert observe(records) == words


@pytest.mark.parametrize(
    ("truth", "predicted", "collapsed"),
    [([0, 1, 1], [0, 0, 0], True), ([0, 1, 1], [0, 0, 1], False), ([0, 0, 0], [0, 0, 0], False)],
)
def test_one_label_for_all_rows_is_said(
    truth: list[int], predicted: list[int], collapsed: bool
) -> None:
    """As MiniLM with a random head gave after six epochs on 295 rows at a rate of .0018."""
    spam = Domain("spam", Classification(labels=("a", "b"), positive="b"), Data("x.csv"))
    examples = [EncodedExample(f"{n}", (1,), (), ((2,), (3,)), t) for n, t in enumerate(truth)]
    records = [{"prediction": int(p)} for p in predicted]
    record = {"training_loss": 1.0, "validation_loss": 1.0,
              **validation_figures(spam, examples, records, 1.0)}  # fmt: skip
    assert observe([record]) == "first epoch"
    said = "one label for all rows: a lower learning rate may help"
    assert (observe([record, record]) == said) is collapsed
    warning = collapse_warning(record, 0.0018)
    assert ("--lr 0.0006" in warning) if warning else not collapsed


def test_a_run_that_collapsed_ends_in_a_warning(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    figures = {"score": 0.0, "higher_is_better": True, "accuracy": 0.5, "validation_loss": 1.0}
    monkeypatch.setattr(Validation, "evaluate", lambda _: {**figures, "one_label": True})
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=Display())
    model.fit(declared(rows[:60], epochs=1, retention="none"))
    assert "all validation rows the same label" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize(
    ("metric", "higher"), [("mcc", True), ("balanced_accuracy", True), ("loss", False)]
)
def test_epochs_are_ranked_by_the_metric_of_the_domain(metric: str, higher: bool) -> None:
    """A metric of likelihoods ranks by the loss, which needs no second pass over the rows."""
    declared = Domain("spam", Classification(labels=("a", "b")), Data("x.csv"), metric=metric)
    truth, predicted = [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]
    examples = [EncodedExample(f"{n}", (1,), (), ((2,), (3,)), t) for n, t in enumerate(truth)]
    records = [{"prediction": int(p)} for p in predicted]
    figures = validation_figures(declared, examples, records, 1.25)
    expected = {"mcc": oracle.matthews_corrcoef(truth, predicted), "loss": 1.25,
                "balanced_accuracy": oracle.balanced_accuracy_score(truth, predicted)}  # fmt: skip
    assert figures["score"] == pytest.approx(expected[metric])
    assert (figures["higher_is_better"], figures["accuracy"]) == (higher, 0.8)
