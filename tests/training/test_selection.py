"""Which epoch is kept, at which scale, and what is said of each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fits import WEIGHTS, clear_rows, domain, forgetful, judged, make_run

from lora_domains.console import Display
from lora_domains.model import DomainModel
from lora_domains.training import loop as training
from lora_domains.training.loop import Run, observe


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return clear_rows()


def test_the_best_epoch_is_kept_not_the_last(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    declared = domain(rows[:100], epochs=4, patience=2)
    run = make_run(tmp_path, tiny_base, declared, judged(2.0, 1.0, 3.0, 4.0))
    seen: list[dict[str, Any]] = []
    judge = run.judge

    def keeping(run: Run) -> dict[str, Any]:
        seen.append(run.bank.weights(run.slot))
        return judge(run)

    run.judge = keeping
    trained = run.fit()
    assert (trained.record["best_epoch"], trained.record["epochs"]) == (2, 4)
    for linear, (a, b) in trained.adapter.weights.items():
        assert torch.equal(a, seen[1][linear][0])
        assert torch.equal(b, seen[1][linear][1])
        assert not torch.equal(b, seen[3][linear][1])
    assert run.slot not in run.bank


def test_a_better_score_does_not_buy_forgotten_knowledge(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    kl = [0.1, 0.2, 0.36, 5.0]
    judge = judged(*[1.0] * 4, scores=[0.5, 0.6, 0.8, 0.9])

    def watched(run: Run) -> dict[str, Any]:
        return judge(run) | {"general_kl": kl[run.state.epoch], "general_nats": 1.0}

    def best(**settings: Any) -> tuple[int, list[str]]:
        run = make_run(tmp_path, tiny_base, domain(rows[:60], epochs=4, **settings), watched)
        run.watched = ()  # the judge says what is watched
        record = run.fit().record
        return record["best_epoch"], [h["observation"] for h in record["history"]]

    epoch, said = best(drift=0.35)
    assert epoch == 2
    assert said[2:] == [f"general knowledge is going: KL {k:.2f}, limit 0.35" for k in (0.36, 5.0)]
    assert best(drift=0.36)[0] == 3
    epoch, said = best(drift=0.35, retention="none")
    assert epoch == 4
    assert not any("going" in words for words in said)


def test_equal_scores_are_ranked_by_loss(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    judge = judged(3.0, 1.0, 2.0, scores=[0.9, 0.9, 0.9])
    record = make_run(tmp_path, tiny_base, domain(rows[:60], epochs=3), judge).fit().record
    assert record["best_epoch"] == 2


def test_where_no_epoch_keeps_a_smaller_scale_does(tmp_path: Path, tiny_base: Path) -> None:
    plain = forgetful(tmp_path / "plain", tiny_base, retention="none")
    lost = min(h["general_kl"] for h in plain["history"])
    assert plain["scale"] == 1.0
    kept = forgetful(tmp_path / "kept", tiny_base, retention="scale", drift=lost / 3)
    assert kept["scale"] < 1
    assert [h["general_kl"] for h in kept["history"]] == [h["general_kl"] for h in plain["history"]]
    a, b = (load_file(tmp_path / name / "spam" / WEIGHTS) for name in ("plain", "kept"))
    epochs = {record["best_epoch"] for record in (plain, kept)}
    assert len(epochs) == 1
    for name in a:
        share = kept["scale"] if "lora_B" in name else 1.0
        torch.testing.assert_close(b[name], a[name] * share)


def test_what_cannot_be_kept_is_said(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    model.fit(domain(rows[:200], epochs=1, lr=0.02, retention="scale", drift=1e-9))
    assert "no epoch and no scale stays within the drift limit" in " ".join(
        "".join(capsys.readouterr()).split()
    )


def test_validation_sees_no_dropout(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, domain(rows[:100], epochs=1, dropout=0.5), None)
    seen: list[dict[str, Any]] = []

    def twice(run: Run) -> dict[str, Any]:
        seen.extend([training.validate(run), training.validate(run)])
        return seen[0]

    run.judge = twice
    run.fit()
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([(1.0, 1.0)], "the first epoch"),
        ([(1.0, 1.0), (0.8, 0.9)], "still improving"),
        ([(1.0, 1.0), (0.8, 0.99)], "converging"),
        ([(1.0, 1.0), (0.8, 1.01)], "converging"),
        ([(1.0, 1.0), (0.8, 1.03)], "validation loss rises: overfitting begins"),
        ([(1.0, 1.0), (1.2, 1.03)], "both losses rise: unstable, a lower learning rate may help"),
        # Against the best epoch so far, not the one before.
        ([(1.0, 0.5), (0.9, 1.0), (0.8, 0.9)], "validation loss rises: overfitting begins"),
    ],
)
def test_observations_follow_from_the_figures(
    history: list[tuple[float, float]], words: str
) -> None:
    records = [{"training_loss": t, "validation_loss": v} for t, v in history]
    assert observe(records) == words
