"""Training: it learns, stops well, resumes exactly, and leaves everything else alone."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from safetensors.torch import load_file

from lora_domains.console import Display
from lora_domains.data.prepare import Data
from lora_domains.data.tokenization import EncodedExample
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import AdapterError, LossExploded, TrainingInterrupted, UsageError
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.report.report import read_card
from lora_domains.tasks import Classification, Generation
from lora_domains.training import gradients
from lora_domains.training import loop as training
from lora_domains.training.loop import Run, observe
from lora_domains.training.plan import make_plan

WEIGHTS = "adapter_model.safetensors"
QUIET = Display(quiet=True)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The deciding word stands at the end: the random base learns that from any of five seeds."""
    rows = make_rows(430)
    for row in rows:
        row["text"] += (" alpha" if row["label"] == "spam" else " beta") * 3
    return rows


def domain(rows: Sequence[Mapping[str, Any]], name: str = "spam", **settings: Any) -> Domain:
    """A tenth validation, a fifth test, the rest training."""
    tenth = len(rows) // 10
    data = Data(rows[: -3 * tenth], rows[-3 * tenth : -2 * tenth], rows[-2 * tenth :])
    defaults = {"lr": 0.01, "batch_size": 16, "rank": 8}
    return with_settings(Domain(name, Classification(), data), **(defaults | settings))


def model_in(folder: Path, tiny_base: Path) -> DomainModel:
    return DomainModel.from_pretrained(tiny_base, out=folder, display=QUIET, device="cpu")


def make_run(
    folder: Path, tiny_base: Path, declared: Domain, judge: Callable[[Run], dict[str, Any]] | None
    = None,
) -> Run:  # fmt: skip
    """A run built as ``DomainModel.fit`` builds it, to look inside."""
    model = model_in(folder, tiny_base)
    dataset = model._read(declared)
    run = model._run(dataset, make_plan(model.base, dataset))
    if judge is not None:
        run.judge = judge
    return run


def digest(folder: Path) -> str:
    return sha256((folder / "spam" / WEIGHTS).read_bytes()).hexdigest()


def judged(*losses: float, scores: Sequence[float] = ()) -> Callable[[Run], dict[str, Any]]:
    """A judge that says these validation losses (and scores) epoch after epoch."""

    def judge(run: Run) -> dict[str, Any]:
        epoch = run.state.epoch
        score = scores[epoch] if scores else -losses[epoch]
        return {"validation_loss": losses[epoch], "accuracy": 0.5, "score": score,
                "higher_is_better": True}  # fmt: skip

    return judge


# ── It learns ───────────────────────────────────────────────────────────────────────────────────


def test_it_learns_and_touches_neither_the_random_state_nor_the_base(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    model = model_in(tmp_path, tiny_base)
    declared = domain(rows, epochs=6)
    test = declared.data.test
    assert isinstance(test, list)
    base = model.base.state_digest()
    flags = [(m.training, n) for n, m in model.base.model.named_modules() if "lora" not in n]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    card = model.fit(declared)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.base.state_digest() == base
    assert not any(training for training, _ in flags)
    assert not any(m.training for _, m in model.base.model.named_modules())
    assert not any(p.requires_grad for p in model.base.model.parameters())
    assert model.domains == ("spam",)
    said = model.predict([row["text"] for row in test], domain="spam")
    right = [p.label == row["label"] for p, row in zip(said, test, strict=True)]  # type: ignore[union-attr]
    assert sum(right) / len(right) >= 0.95
    record = card["adapters"][0]["training"]
    assert record["history"][-1]["training_loss"] < record["history"][0]["training_loss"]
    assert record["steps"] == record["epochs"] * math.ceil(301 / 16)
    assert card["adapters"][0]["ledger"]["supervised_tokens"] > 0
    assert not list(tmp_path.glob(".spam*"))  # no checkpoint is left


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


@pytest.fixture(scope="module")
def forgetful(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> Callable[..., tuple[dict[str, Any], Path]]:
    """Trains with nothing but ``settings`` to keep general knowledge; the record, the folder."""

    def fit(**settings: Any) -> tuple[dict[str, Any], Path]:
        folder = tmp_path_factory.mktemp("forgetful")
        declared = domain(rows[:200], epochs=2, **({"lr": 0.02} | settings))
        card = model_in(folder, tiny_base).fit(declared)
        return card["adapters"][0]["training"], folder / "spam"

    return fit


def test_where_no_epoch_keeps_a_smaller_scale_does(
    forgetful: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    plain, folder = forgetful(retention="none")
    lost = min(h["general_kl"] for h in plain["history"])
    assert plain["scale"] == 1.0
    kept, smaller = forgetful(retention="scale", drift=lost / 3)
    assert kept["scale"] < 1
    assert [h["general_kl"] for h in kept["history"]] == [h["general_kl"] for h in plain["history"]]
    a, b = (load_file(path / WEIGHTS) for path in (folder, smaller))
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


def test_kl_keeps_what_plain_training_loses(
    forgetful: Callable[..., tuple[dict[str, Any], Path]],
) -> None:
    last = {
        way: forgetful(retention=way, drift=1e9, kl=1000.0, lr=0.005)[0]["history"][-1]
        for way in ("none", "kl", "replay", "both")
    }
    assert last["kl"]["general_kl"] < 0.5 * last["none"]["general_kl"]
    # Replay learns the texts themselves: to a random base they are rows like any other.
    nats = {way: record["general_nats"] for way, record in last.items()}
    assert nats["replay"] < nats["none"]


def test_own_general_text_is_what_it_is_held_to(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    secret = "zqheldtothis"
    texts = [{"text": f"{secret} number {n} of the stone river"} for n in range(50)]
    plain = domain(rows[:60], epochs=1, retention="kl")  # by the same method, on other texts
    declared = replace(plain, data=replace(plain.data, general=texts))
    model = model_in(tmp_path, tiny_base)
    card = model.fit(declared)
    dataset = model._datasets["spam"]
    assert {len(dataset.general.training), len(dataset.general.selection)} == {40, 10}
    assert card["adapters"][0]["settings"]["data"]["general"] == "50 rows in memory"
    own, ours = (card, model_in(tmp_path / "b", tiny_base).fit(plain))
    assert own["adapters"][0]["sha256"] != ours["adapters"][0]["sha256"]
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("given", [True, False])
def test_auto_depends_on_whose_text_it_is(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], given: bool
) -> None:
    texts = [{"text": f"number {n} of the stone river"} for n in range(50)] if given else None
    model = model_in(tmp_path, tiny_base)
    planned = {}
    for way in ("auto", "replay"):
        declared = domain(rows[:60], retention=way)
        declared = replace(declared, data=replace(declared.data, general=texts))
        planned[way] = make_plan(model.base, model._read(declared))
    assert planned["auto"].keeping.method == ("replay" if given else "kl")
    warned = ["teaches" in warning for warning in planned["replay"].warnings]
    assert any(warned) is not given
    assert not any("teaches" in warning for warning in planned["auto"].warnings)


def test_patience_stops_the_run(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    declared = domain(rows[:100], epochs=8, patience=2)
    record = make_run(tmp_path, tiny_base, declared, judged(1.0, *[2.0] * 7)).fit().record
    assert (record["epochs"], record["best_epoch"]) == (3, 1)


def test_equal_scores_are_ranked_by_loss(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    judge = judged(3.0, 1.0, 2.0, scores=[0.9, 0.9, 0.9])
    record = make_run(tmp_path, tiny_base, domain(rows[:60], epochs=3), judge).fit().record
    assert record["best_epoch"] == 2


def test_a_run_too_short_is_warned_about_with_the_number(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, domain(rows, epochs=1), None)
    (warning,) = run.plan.warnings
    assert "only 19 optimiser steps (301 rows, batches of 16, 1 epoch)" in warning
    assert "--epochs 4 gives 76" in warning
    assert make_run(tmp_path, tiny_base, domain(rows, epochs=4), None).plan.warnings == ()


def test_what_is_derived_is_derived_from_width_and_tokens(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    declared = replace(domain(rows), lora=replace(domain(rows).lora, rank=None))
    plan = make_run(tmp_path, tiny_base, with_settings(declared, lr=None), None).plan
    assert plan.lr == pytest.approx(5e-4 * (2000 / 32) ** 0.78, rel=0.05)
    assert plan.rank == 16
    rate, _, kept, general = plan.reasons
    assert "width 32" in rate
    assert "retention kl: auto" in kept
    assert re.fullmatch(r"general text: 480 of \d+ texts to train by, 200 others .*", general)
    assert plan.batch_size == 16  # as asked


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"),
    [(430, 8, 8, 304), (430, 40, 32, 400), (430, 12, 16, 228), (40, 8, 8, 32)],
)
def test_a_batch_is_small_enough_for_the_steps_a_run_wants(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]],
    count: int, epochs: int, batch: int, steps: int,
) -> None:  # fmt: skip
    declared = with_settings(domain(rows[:count], epochs=epochs), batch_size=None)
    plan = make_run(tmp_path, tiny_base, declared, None).plan
    assert (plan.batch_size, plan.steps) == (batch, steps)
    assert any(f"batches of {batch} rows: {steps} steps" in reason for reason in plan.reasons)


# ── A step ──────────────────────────────────────────────────────────────────────────────────────


def one_step(run: Run, items: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    """The gradients that ``train_step`` computes, before they are clipped and applied."""
    grads: dict[str, torch.Tensor] = {}

    def keep(*_: Any, **__: Any) -> torch.Tensor:
        for linear, slot in run.bank.slots(run.slot).items():
            for letter, p in (("A", slot.a), ("B", slot.b)):
                assert p.grad is not None
                grads[f"{linear}.{letter}"] = p.grad.clone()
        return torch.zeros(())

    patch = pytest.MonkeyPatch()
    patch.setattr(training.torch.nn.utils, "clip_grad_norm_", keep)
    try:
        run.train_step(items)
    finally:
        patch.undo()
    return grads


@pytest.mark.parametrize("micro", [16_384, 64])
def test_gradients_and_loss_equal_plain_peft(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], micro: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The oracle: PEFT's own layers, one row at a time, no padding, mean over supervised tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(gradients, "MICRO_TOKENS", micro)
    declared = replace(domain(rows, retention="none"), task=Generation("text", "label"))
    run = make_run(tmp_path, tiny_base, declared, None)
    random = torch.Generator().manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(plain, config)
    for linear, slot in run.bank.slots(run.slot).items():
        # B away from zero: with B = 0 the gradients of A would be zero on both sides.
        slot.b.data = torch.randn(slot.b.shape, generator=random) * 0.05
        layer = peft_model.base_model.model.get_submodule(linear)
        layer.lora_A["default"].weight.data = slot.a.data.clone()
        layer.lora_B["default"].weight.data = slot.b.data.clone()
    items = run.train[:6]
    grads = one_step(run, items)
    total = sum(len(item.answer) for item in items)
    nats = torch.zeros(())
    for item in items:
        ids = torch.tensor([[*item.prompt, *item.answer]])
        logits = peft_model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1]
        nats = nats + F.cross_entropy(logits, torch.tensor(item.answer), reduction="sum")
    (nats / total).backward()
    nats = nats.detach()
    assert run.state.losses[0] / run.state.tokens[0] == pytest.approx(float(nats) / total, abs=1e-5)
    assert run.state.tokens == [total]
    for linear in run.bank.slots(run.slot):
        layer = peft_model.base_model.model.get_submodule(linear)
        for letter, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            wanted = part["default"].weight.grad
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(grads[f"{linear}.{letter}"], wanted, atol=1e-5, rtol=1e-4)


def test_the_rate_rises_then_falls_to_zero(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, domain(rows, epochs=4, warmup=0.1), None)
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


# ── The loss explodes ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
def test_an_exploded_loss_stops_and_the_saved_adapter_stays(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], bad: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = model_in(tmp_path, tiny_base)
    model.fit(domain(rows[:100], epochs=1))
    before = digest(tmp_path)
    right, calls = gradients.answer_nll, 0

    def explode(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return right(*args) * (bad if calls > 3 else 1.0)

    monkeypatch.setattr(gradients, "answer_nll", explode)
    with pytest.raises(LossExploded, match="epoch 1, step 4") as caught:
        model.fit(domain(rows[:100], epochs=2, seed=5))
    assert "No epoch was finished, so no adapter was written" in str(caught.value)
    assert "Try --lr 0.002" in str(caught.value)
    assert digest(tmp_path) == before
    assert model.domains == ("spam",)


def test_an_explosion_in_the_second_epoch_keeps_the_first(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in(tmp_path, tiny_base)
    right, calls = gradients.answer_nll, 0

    def explode(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return right(*args) * (math.nan if calls > 7 else 1.0)

    monkeypatch.setattr(gradients, "answer_nll", explode)
    with pytest.raises(LossExploded, match=r"epoch 2.*Epoch 1 was kept"):
        model.fit(domain(rows[:100], epochs=3))
    card = json.loads((tmp_path / "spam" / "card.json").read_text())
    assert card["adapters"][0]["training"]["best_epoch"] == 1
    assert model.load_adapter("spam") == "spam"


@pytest.mark.parametrize("where", ["gradient", "validation"])
def test_what_is_not_a_number_is_never_saved(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = model_in(tmp_path, tiny_base)
    if where == "gradient":

        def norm(parameters: Sequence[torch.Tensor], most: float) -> torch.Tensor:
            return torch.tensor(math.nan)

        monkeypatch.setattr(training.torch.nn.utils, "clip_grad_norm_", norm)
    else:
        nats = torch.tensor([math.nan]).numpy(), torch.tensor([1]).numpy()
        read = training.choices_and_nats
        monkeypatch.setattr(training, "choices_and_nats", lambda *given: (read(*given)[0], *nats))
    with pytest.raises(LossExploded):
        model.fit(domain(rows[:100], epochs=1))
    assert not (tmp_path / "spam").exists()


# ── Resuming ────────────────────────────────────────────────────────────────────────────────────


def stopped_after(steps: int, declared: Domain, folder: Path, tiny_base: Path) -> None:
    """Train until ``steps`` are done, then as Ctrl-C does."""
    run = make_run(folder, tiny_base, declared, None)
    step = run.train_step

    def counting(items: Sequence[EncodedExample]) -> None:
        step(items)
        if run.state.total_steps == steps:
            run._stop = signal.SIGINT

    run.train_step = counting  # type: ignore[method-assign]
    with pytest.raises(TrainingInterrupted, match="--resume to continue from this step"):
        run.fit()
    assert run.slot not in run.bank


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> dict[float, str]:
    """dropout → the digest of an unbroken run of 3 epochs of 5 steps."""
    found = {}
    for dropout in (0.0, 0.3):
        folder = tmp_path_factory.mktemp("unbroken")
        model_in(folder, tiny_base).fit(domain(rows[:100], epochs=3, dropout=dropout))
        found[dropout] = digest(folder)
    assert found[0.0] != found[0.3]
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("steps", [2, 5, 8, 15])
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], unbroken: dict[float, str],
    steps: int, dropout: float,
) -> None:  # fmt: skip
    """Stopped in epoch 1, at its end, in epoch 2, and at the very end."""
    declared = domain(rows[:100], epochs=3, dropout=dropout)
    assert math.ceil(70 / 16) == 5
    stopped_after(steps, declared, tmp_path, tiny_base)
    torch.manual_seed(steps)  # the caller's random state must not matter
    card = model_in(tmp_path, tiny_base).fit(declared, resume=True)
    assert digest(tmp_path) == unbroken[dropout]
    assert card["adapters"][0]["training"]["steps"] == 15
    assert not (tmp_path / ".spam.checkpoint").exists()


def test_seeds_are_the_only_difference_between_runs(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], unbroken: dict[float, str]
) -> None:
    torch.manual_seed(99)
    model_in(tmp_path / "a", tiny_base).fit(domain(rows[:100], epochs=3))
    model_in(tmp_path / "b", tiny_base).fit(domain(rows[:100], epochs=3, seed=1))
    assert digest(tmp_path / "a") == unbroken[0.0] != digest(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "found"),
    [({"lr": 0.02}, "another recipe and another plan"), ({"epochs": 2}, "another plan")],
)
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], changes: dict[str, Any],
    found: str,
) -> None:  # fmt: skip
    stopped_after(2, domain(rows[:100], epochs=3), tmp_path, tiny_base)
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="as the interrupted run") as caught:
        model.fit(domain(rows[:100], **({"epochs": 3} | changes)), resume=True)
    assert found in str(caught.value)
    with pytest.raises(UsageError, match="another rows"):
        model.fit(domain(rows[50:150], epochs=3), resume=True)
    assert (tmp_path / ".spam.checkpoint").exists()
    assert model.domains == ()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02N."])
def test_a_broken_checkpoint_is_named(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], content: bytes
) -> None:
    (tmp_path / ".spam.checkpoint").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.spam\.checkpoint.*leave --resume out"):
        model_in(tmp_path, tiny_base).fit(domain(rows[:100], epochs=1), resume=True)


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


def test_nothing_to_resume_starts_at_the_beginning(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], unbroken: dict[float, str]
) -> None:
    model_in(tmp_path, tiny_base).fit(domain(rows[:100], epochs=3), resume=True)
    assert digest(tmp_path) == unbroken[0.0]


@pytest.mark.parametrize("moment", ["last validation", "choosing a scale"])
def test_a_signal_counts_where_no_step_is_taken(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], unbroken: dict[float, str],
    monkeypatch: pytest.MonkeyPatch, moment: str,
) -> None:  # fmt: skip
    declared = domain(rows[:100], epochs=3)
    model = model_in(tmp_path, tiny_base)
    judged, scale = Run._judged, Run._choose_scale

    def asked_in_validation(self: Run) -> dict[str, Any]:
        record = judged(self)
        if moment == "last validation" and self.state.epoch == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    def asked_in_scale(self: Run) -> None:
        scale(self)
        if moment == "choosing a scale":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_judged", asked_in_validation)
        patch.setattr(Run, "_choose_scale", asked_in_scale)
        with pytest.raises(TrainingInterrupted, match="--resume to continue") as caught:
            model.fit(declared)
    assert caught.value.found == ("SIGTERM" if moment == "last validation" else "SIGINT")
    assert not read_card(tmp_path / "spam")["adapters"][0]["training"]["finished"]
    card = model_in(tmp_path, tiny_base).fit(declared, resume=True)
    assert card["adapters"][0]["training"]["finished"]
    assert digest(tmp_path) == unbroken[0.0]


def test_a_full_disk_at_ctrl_c_promises_nothing(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Still an interruption, with what can be continued and what could not be saved."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    step = Run.train_step

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    def counting(self: Run, items: Sequence[EncodedExample]) -> None:
        step(self, items)
        if self.state.total_steps == 7:
            self._stop = signal.SIGINT
            monkeypatch.setattr("lora_domains.atomic.os.fsync", refused)

    monkeypatch.setattr(Run, "train_step", counting)
    with pytest.raises(TrainingInterrupted) as caught:
        model.fit(domain(rows[:100], epochs=3))
    assert "This step could not be stored" in caught.value.hint
    assert "continues from the last checkpoint" in caught.value.hint
    assert "No adapter is saved meanwhile" in caught.value.hint
    said = " ".join(capsys.readouterr().out.split())
    assert "the adapter of epoch 1 is not saved: No space left on device" in said


SCRIPT = """
import json, sys
from pathlib import Path
from lora_domains import Classification, Data, DomainModel, Domain
from lora_domains.console import Display
from lora_domains.domain import with_settings
from lora_domains.cli.main import guarded

def main():
    rows, base, out, resume, epochs = sys.argv[1:]
    domain = Domain("spam", Classification(), Data(rows))
    domain = with_settings(domain, lr=0.03, batch_size=4, rank=8, epochs=int(epochs),
                           patience=99, dropout=0.1)
    model = DomainModel.from_pretrained(base, out=out, display=Display(), device="cpu")
    model.fit(domain, resume=resume == "resume")
    return 0

sys.exit(guarded(main))
"""


def process(folder: Path, tiny_base: Path, rows: Path, resume: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SCRIPT, str(rows), str(tiny_base), str(folder), resume, "6"]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:220]))
    return path


@pytest.fixture(scope="module")
def unbroken_process(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows_file: Path
) -> str:
    folder = tmp_path_factory.mktemp("whole")
    child = process(folder, tiny_base, rows_file, "start")
    _, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    return digest(folder)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_stopped_by_a_signal_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows_file: Path, unbroken_process: str,
    number: signal.Signals,
) -> None:  # fmt: skip
    child = process(tmp_path, tiny_base, rows_file, "start")
    checkpoint = tmp_path / ".spam.checkpoint"
    until = time.monotonic() + 120
    while not checkpoint.exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    child.send_signal(number)
    _, errors = child.communicate(timeout=120)
    assert checkpoint.exists()
    if number == signal.SIGKILL:
        assert child.returncode == -signal.SIGKILL
        assert not (tmp_path / "spam").exists()
    else:
        assert child.returncode == 130, errors
        assert "--resume" in errors
        assert number.name in errors
        assert (tmp_path / "spam" / WEIGHTS).exists()  # the best epoch so far
    child = process(tmp_path, tiny_base, rows_file, "resume")
    said, errors = child.communicate(timeout=120)
    assert child.returncode == 0, errors
    assert "Resuming at epoch" in said
    assert digest(tmp_path) == unbroken_process
    # Ctrl-C kept the best epoch until then; what it left is no version of the adapter.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["spam"]


# ── Words ───────────────────────────────────────────────────────────────────────────────────────


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


def test_a_bank_without_the_slot_is_left_after_every_failure(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    def fails(run: Run) -> dict[str, Any]:
        raise RuntimeError("boom")

    run = make_run(tmp_path, tiny_base, domain(rows[:60], epochs=1), fails)
    with pytest.raises(RuntimeError, match="boom"):
        run.fit()
    assert list(run.bank) == []
    assert isinstance(run.bank, Bank)
    assert run.bank.base.identity == load_base(tiny_base, device="cpu").identity


def test_a_disk_that_refuses_the_adapter_costs_no_training(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], unbroken: dict[float, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    declared = domain(rows[:100], epochs=3)

    def full(*_: Any) -> None:
        raise AdapterError(expected="space", found="none", hint="Free some.")

    model = model_in(tmp_path, tiny_base)
    with monkeypatch.context() as patch:
        patch.setattr("lora_domains.model.save_adapter", full)
        with pytest.raises(AdapterError):
            model.fit(declared)
    assert not (tmp_path / "spam").exists()
    monkeypatch.setattr(Run, "train_step", None)  # nothing is left to train
    model_in(tmp_path, tiny_base).fit(declared, resume=True)
    assert digest(tmp_path) == unbroken[0.0]
    assert not list(tmp_path.glob(".spam*"))


def test_what_a_resumed_run_must_share(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    declared = domain(rows[:100], epochs=1)
    first = make_run(tmp_path, tiny_base, declared).fingerprint()
    assert make_run(tmp_path, tiny_base, declared).fingerprint() == first
    general = [{"text": f"text number {n} of a river"} for n in range(40)]
    told = {
        "validation rows": replace(declared, data=replace(declared.data, validation=rows[200:210])),
        "general text": replace(declared, data=replace(declared.data, general=general)),
    }
    for what, other in told.items():
        assert isinstance(declared.data.validation, list)
        found = make_run(tmp_path, tiny_base, other).fingerprint()
        assert found[what] != first[what]
        assert found["rows"] == first["rows"]
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu",
                                        dtype="bfloat16")  # fmt: skip
    dataset = model._read(declared)
    again = model._run(dataset, make_plan(model.base, dataset)).fingerprint()
    assert [name for name in first if again[name] != first[name]] == ["precision"]


def test_a_tracker_that_fails_to_start_leaves_no_slot(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr("lora_domains.model.open_tracker", broken)
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(RuntimeError, match="no server"):
        model.fit(domain(rows[:100], epochs=1), tracker="tensorboard")
    assert model.domains == ()
