"""Training: it learns, stops when it should, and changes nothing else."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import declared, fixed, make_run, model_in

from lora_domains.adapters.folder import fingerprint
from lora_domains.errors import LossExploded
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.report.card import Card
from lora_domains.training import gradients, validation
from lora_domains.training.loop import Run


def test_it_learns_and_changes_neither_the_random_state_nor_the_base(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    model = model_in(tmp_path, tiny_base)
    spam = declared(rows, epochs=6)
    test = spam.data.test
    assert isinstance(test, list)
    base = model.base.state_digest()
    flags = [(m.training, n) for n, m in model.base.model.named_modules() if "lora" not in n]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    card = model.fit(spam)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.base.state_digest() == base
    assert not any(training for training, _ in flags)
    assert not any(m.training for _, m in model.base.model.named_modules())
    assert not any(p.requires_grad for p in model.base.model.parameters())
    assert model.domains == ("spam",)
    predictions = model.predict([row["text"] for row in test], domain="spam")
    right = [p.label == row["label"] for p, row in zip(predictions, test, strict=True)]  # type: ignore[union-attr]
    assert sum(right) / len(right) >= 0.95
    record = card.adapter.training
    assert record["history"][-1]["training_loss"] < record["history"][0]["training_loss"]
    assert record["steps"] == record["epochs"] * math.ceil(301 / 16)
    assert card.adapter.ledger["supervised_tokens"] > 0
    assert not list(tmp_path.glob(".spam*"))  # no checkpoint is left


def test_patience_stops_the_run(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=8, patience=2)
    record = make_run(tmp_path, tiny_base, spam, fixed(1.0, *[2.0] * 7)).fit().record
    assert (record["epochs"], record["best_epoch"]) == (3, 1)


def test_the_rate_rises_then_falls_to_zero(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, declared(rows, epochs=4, warmup=0.1), None)
    rates = []
    for done in range(run.plan.steps + 1):
        run.state.total_steps = done
        run._set_rate()
        rates.append(run.optimizer.param_groups[0]["lr"])
    top = round(0.1 * run.plan.steps)
    assert max(rates) == pytest.approx(0.01)
    assert rates[: top - 1] == sorted(rates[: top - 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-2] > 0 == rates[-1]


def test_the_adapter_in_training_leaves_the_bank_after_a_failure(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    def fails(run: Run) -> dict[str, Any]:
        raise RuntimeError("boom")

    run = make_run(tmp_path, tiny_base, declared(rows[:60], epochs=1), fails)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit()
    assert list(run.bank) == []
    assert isinstance(run.bank, Bank)
    assert run.bank.base.identity == load_base(tiny_base, device="cpu").identity


# ── The loss explodes ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_an_exploding_loss_stops_the_run_and_the_saved_adapter_stays(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], bad: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = model_in(tmp_path, tiny_base)
    model.fit(declared(rows[:100], epochs=1))
    before = fingerprint(tmp_path / "spam")
    right, calls = gradients.text_nats, 0

    def explode(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += not args[1][0].id.startswith("trial")  # on which memory is measured
        return right(*args) * (bad if calls > 3 else 1.0)

    monkeypatch.setattr(gradients, "text_nats", explode)
    with pytest.raises(LossExploded, match="epoch 1, step 4") as caught:
        model.fit(declared(rows[:100], epochs=2, seed=5))
    assert "No epoch was finished, so no adapter was saved" in str(caught.value)
    assert "Try --lr 0.002" in str(caught.value)
    assert fingerprint(tmp_path / "spam") == before
    assert model.domains == ("spam",)


def test_a_loss_that_explodes_in_the_second_epoch_saves_the_first(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in(tmp_path, tiny_base)
    right, calls = gradients.text_nats, 0

    def explode(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += not args[1][0].id.startswith("trial")  # on which memory is measured
        return right(*args) * (math.nan if calls > 7 else 1.0)

    monkeypatch.setattr(gradients, "text_nats", explode)
    with pytest.raises(
        LossExploded, match=r"epoch 2.*The adapter of epoch 1, the best so far, was saved"
    ):
        model.fit(declared(rows[:100], epochs=3))
    card = Card.read(tmp_path / "spam")
    assert card.adapter.training["best_epoch"] == 1
    assert model.load_adapter("spam") == "spam"


@pytest.mark.parametrize("where", ["gradient", "validation"])
def test_nan_in_a_gradient_or_a_loss_is_never_saved(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = model_in(tmp_path, tiny_base)
    if where == "gradient":

        def norm(parameters: Sequence[torch.Tensor], most: float) -> torch.Tensor:
            return torch.tensor(math.nan)

        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", norm)
    else:
        nats = torch.tensor([math.nan]).numpy(), torch.tensor([1]).numpy()
        read = validation.choices_and_nats
        monkeypatch.setattr(validation, "choices_and_nats", lambda *given: (read(*given)[0], *nats))
    with pytest.raises(LossExploded):
        model.fit(declared(rows[:100], epochs=1))
    assert not (tmp_path / "spam").exists()
