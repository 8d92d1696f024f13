"""Training: it learns, stops when it should, and changes nothing else."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import declared, fixed, make_run, model_in, stopped_after

from lora_domains.adapters.folder import fingerprint
from lora_domains.domain import Training, with_settings
from lora_domains.errors import LossExploded
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.batching import epoch_batches
from lora_domains.report.card import Card
from lora_domains.training import gradients, validation
from lora_domains.training.loop import Run
from lora_domains.training.plan import Schedule


@pytest.mark.contract
def test_it_learns_and_changes_neither_the_random_state_nor_the_base(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    model = model_in(tmp_path, tiny_base)
    # With seed 0 the loss stays on a plateau for four to six epochs, as rounding has it.
    spam = declared(rows, epochs=6, seed=1)
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


@pytest.mark.parametrize(
    ("schedule", "theirs", "options"),
    [
        (None, "linear", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("constant", "constant_with_warmup", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 8, "decay_type": "linear"}),
    ],
)
def test_after_the_warm_up_schedules_are_those_of_transformers(
    schedule: str | None, theirs: str, options: dict[str, Any]
) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = get_scheduler(theirs, optimizer, 4, 40, scheduler_specific_kwargs=options)
    own = Schedule(40, Training(warmup=0.1, schedule=schedule))
    for done in range(41):
        if done >= 4:  # their first step has a rate of zero
            assert own.share(done) == pytest.approx(oracle.get_last_lr()[0]), done
        optimizer.step()
        oracle.step()
    assert [own.share(done) for done in range(4)] == [0.25, 0.5, 0.75, 1.0]


# ── Early stopping with an ending ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_run_that_patience_stops_decays_from_its_best_epoch(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], optimizer: str, better: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Five steps an epoch; the second is the best, and two others follow it."""
    spam = declared(rows[:100], epochs=8, patience=2, dropout=0.1, schedule="wsd", decay=0.3,
                    optimizer=optimizer, rank=64, targets=("gate_proj", "up_proj"))  # fmt: skip
    losses = (2.0, 1.0, 3.0, 3.0, 0.5 if better else 1.5)
    run = make_run(tmp_path / "run", tiny_base, spam, fixed(*losses))
    record = run.fit().record
    assert [one["epoch"] for one in record["history"]] == [1, 2, 3, 4, 4.6]
    assert record["history"][-1]["decayed_from"] == 2
    assert (record["steps"], record["best_epoch"]) == (23, 4.6 if better else 2)
    assert record.get("decayed_from") == (2 if better else None)

    oracle = make_run(tmp_path / "oracle", tiny_base, spam)
    lengths = [len(row) for row in oracle.train]
    batches = [
        batch for epoch in (0, 1, 4) for batch in epoch_batches(lengths, 16, 0, epoch, None)
    ]  # fmt: skip
    for number, batch in enumerate(batches[: 13 if better else 10]):
        if number >= 10:
            oracle.state.total_steps = number + 10  # seeds of dropout, and general texts
            rate = 0.01 * (13 - number) / 3
            monkeypatch.setattr(oracle, "_set_rate", partial(set_rate, oracle.optimizer, rate))
        oracle.train_step([oracle.train[i] for i in batch])
    kept = run.state.best_tensors["weights"]
    for name, pair in oracle.bank.weights(oracle.adapter_name).items():
        assert all(map(torch.equal, pair, kept[name]))


def test_the_card_of_a_run_that_decayed_is_read(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=8, patience=1, decay=0.5, lr=0.05, retention="none")
    model_in(tmp_path, tiny_base).fit(spam)
    training = Card.read(tmp_path / "spam").adapter.training
    *_, stopped, last = training["history"]
    best = min((one for one in training["history"][:-1]), key=lambda one: one["validation_loss"])
    assert (stopped["epoch"], last["decayed_from"]) == (best["epoch"] + 1, best["epoch"])


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def test_an_ending_takes_no_more_steps_than_the_run_and_is_validated_within(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validated every two of five steps; the first time is the best, and an epoch follows."""
    spam = declared(rows[:100], epochs=8, patience=1, validate_every=2, schedule="linear",
                    decay=0.9, lr=0.001)  # fmt: skip
    spoken: list[str] = []

    def worse(run: Run) -> dict[str, Any]:
        loss = 9.0 - 8.0 / run.state.total_steps
        return {"validation_loss": loss, "accuracy": 0.5, "score": -loss, "higher_is_better": True}

    for most, steps, epochs in ((None, 9, 1.8), (8, 8, 1.6)):
        run = make_run(tmp_path / str(most), tiny_base, with_settings(spam, max_steps=most), worse)
        monkeypatch.setattr(run.display, "line", spoken.append)
        record = run.fit().record
        assert (record["steps"], record["epochs"], record["best_epoch"]) == (steps, epochs, 0.4)
        assert "decayed_from" not in record
        ended = [one.get("decayed_from") for one in record["history"]]
        assert ended == [None, None, None, None, 0.4]
        left = "1 decaying step" if most else "2 decaying steps"
        assert spoken[-1] == f"No better epoch than 0.4 for an epoch: back to it, for {left}."


def test_b_learns_at_a_rate_of_its_own_as_in_peft(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    """One step of LoRA+ equals a step of PEFT's optimiser with the same ratio."""
    from peft.optimizers import create_loraplus_optimizer

    spam = declared(rows[:100], lr_ratio=16.0, warmup=0.0, retention="none")
    run = make_run(tmp_path, tiny_base, spam)
    weights = run.bank.trainable(run.adapter_name)
    for lora in weights.values():
        torch.nn.init.normal_(lora.b)  # or A would have no gradient

    class Layer(torch.nn.Module):
        def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
            super().__init__()
            self.lora_A = torch.nn.Parameter(a.detach().clone())
            self.lora_B = torch.nn.Parameter(b.detach().clone())

    layers = torch.nn.ModuleList(Layer(lora.a, lora.b) for lora in weights.values())
    theirs = create_loraplus_optimizer(layers, torch.optim.AdamW, lr=run.plan.lr,
                                       loraplus_lr_ratio=16.0, weight_decay=0.0)  # fmt: skip
    batch = run.train[:16]
    run.gradients.compute(batch, sum(row.supervised for row in batch))
    for layer, lora in zip(layers, weights.values(), strict=True):
        layer.lora_A.grad, layer.lora_B.grad = lora.a.grad, lora.b.grad
    run.state.total_steps = round(run.plan.steps * 0)
    for group in run.optimizer.param_groups:
        group["lr"] = run.plan.lr * group.get("ratio", 1.0)
    run.optimizer.step()
    theirs.step()
    for layer, lora in zip(layers, weights.values(), strict=True):
        assert torch.allclose(layer.lora_A, lora.a, atol=1e-6)
        assert torch.allclose(layer.lora_B, lora.b, atol=1e-5)
    run.state.total_steps = run.plan.steps // 2
    run._set_rate()
    first, second = (group["lr"] for group in run.optimizer.param_groups)
    assert second == pytest.approx(16 * first)


def test_an_optimiser_of_8_bits_learns_and_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=3, optimizer="adamw8bit", lr_ratio=2.0, rank=64,
                    targets=("gate_proj", "up_proj"))  # fmt: skip
    whole = model_in(tmp_path / "a", tiny_base).fit(spam).adapter.training["history"]
    in_32 = with_settings(spam, optimizer=None)
    exact = model_in(tmp_path / "32", tiny_base).fit(in_32).adapter.training["history"]
    losses = [[record["training_loss"] for record in history] for history in (whole, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    assert losses[0] == sorted(losses[0], reverse=True)
    stopped_after(7, spam, tmp_path / "b", tiny_base)
    model_in(tmp_path / "b", tiny_base).fit(spam, resume=True)
    assert fingerprint(tmp_path / "a" / "spam") == fingerprint(tmp_path / "b" / "spam")
    run = make_run(tmp_path / "c", tiny_base, spam)
    run.train_step(run.train[:16])
    states = [state["state1"].dtype for state in run.optimizer.state.values()]
    assert torch.uint8 in states  # of matrices of 4,096 parameters and more


def test_an_epoch_can_be_validated_several_times_and_a_run_ends_after_so_many_steps(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=8, validate_every=2, max_steps=12, patience=9)
    run = make_run(tmp_path, tiny_base, spam)
    assert (run.plan.steps_per_epoch, run.plan.steps) == (5, 12)
    record = run.fit().record
    assert [one["epoch"] for one in record["history"]] == [0.4, 0.8, 1, 1.4, 1.8, 2, 2.4]
    assert len(record["history"]) == run.plan.validations(12)
    assert (record["steps"], record["epochs"]) == (12, 2.4)
    run.state.total_steps = 12
    run._set_rate()
    assert run.optimizer.param_groups[0]["lr"] == 0


def test_more_validations_change_no_step(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    whole, parts = (
        make_run(tmp_path / name, tiny_base, declared(rows[:100], epochs=2, patience=9, **settings))
        for name, settings in (("a", {}), ("b", {"validate_every": 2}))
    )
    ends = [run.fit().record["history"][-1] for run in (whole, parts)]
    assert ends[0]["validation_loss"] == ends[1]["validation_loss"]
    for name, weights in whole.state.best_tensors["weights"].items():  # the last epoch is the best
        assert torch.equal(weights[0], parts.state.best_tensors["weights"][name][0])


def test_patience_within_an_epoch_is_counted_in_epochs(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=8, patience=1, validate_every=2)
    calls: list[int] = []

    def worse(run: Run) -> dict[str, Any]:
        calls.append(run.state.total_steps)
        loss = float(len(calls))
        return {"validation_loss": loss, "accuracy": 0.5, "score": -loss, "higher_is_better": True}

    record = make_run(tmp_path, tiny_base, spam, worse).fit().record
    assert (record["best_epoch"], record["epochs"], calls[-1]) == (0.4, 1.4, 7)


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


@pytest.mark.parametrize(("every", "stops"), [(4, False), (1, True)])
def test_a_step_of_rare_rows_does_not_stop_a_run(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], every: int, stops: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As with weights of classes, or numbers of which few are very large."""
    model = model_in(tmp_path, tiny_base)
    right, calls = gradients.text_nats, 0

    def rare(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += not args[1][0].id.startswith("trial")  # on which memory is measured
        return right(*args) * (100 if calls > 1 and calls % every == 0 else 1.0)

    monkeypatch.setattr(gradients, "text_nats", rare)
    spam = declared(rows[:300], epochs=1, lr=1e-6, retention="none")
    if stops:
        with pytest.raises(LossExploded, match="epoch 1, step 3"):
            model.fit(spam)
    else:
        assert model.fit(spam) is not None
        assert calls > 2 * every


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
