"""Gradients of a step: those of plain PEFT, in passes that fit into memory, or recomputed."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_rows
from hypothesis import given
from hypothesis import strategies as st
from support import device
from support.adapters import strong, token_ids
from support.models import declared, ended, make_run, model_in, stopped_after
from torch.utils.checkpoint import CheckpointError

from lora_domains.console import Display
from lora_domains.errors import OutOfMemory, TrainingError
from lora_domains.inference import batches, memory
from lora_domains.inference.batches import micro_batches, trial_examples
from lora_domains.inference.memory import TensorBytes, pass_limit, recomputing
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.report.card import Card
from lora_domains.tasks import Generation
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import gradients
from lora_domains.training.loop import Run


def one_step(run: Run, rows: Sequence[EncodedExample]) -> dict[str, torch.Tensor]:
    """The gradients that ``train_step`` computes, before they are clipped and applied."""
    grads: dict[str, torch.Tensor] = {}

    def keep(*_: Any, **__: Any) -> torch.Tensor:
        for linear, lora in run.bank.trainable(run.adapter_name).items():
            for letter, p in (("A", lora.a), ("B", lora.b)):
                assert p.grad is not None
                grads[f"{linear}.{letter}"] = p.grad.clone()
        return torch.zeros((), device=device.name)

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    try:
        run.train_step(rows)
    finally:
        patch.undo()
    return grads


@pytest.mark.contract
@pytest.mark.parametrize("micro", [16_384, 64])
def test_gradients_and_loss_equal_plain_peft(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], micro: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """The oracle: PEFT's own layers, one row at a time, no padding, mean over supervised tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(batches, "MICRO_TOKENS", {True: micro, False: micro})
    spam = replace(declared(rows, retention="none"), task=Generation("text", "label"))
    run = make_run(tmp_path, tiny_base, spam, None)
    random = torch.Generator().manual_seed(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).to(device.name)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(plain, config)
    for linear, lora in run.bank.trainable(run.adapter_name).items():
        # B away from zero: with B = 0 the gradients of A would be zero on both sides.
        lora.b.data.copy_(torch.randn(lora.b.shape, generator=random) * 0.05)
        layer = peft_model.base_model.model.get_submodule(linear)
        layer.lora_A["default"].weight.data = lora.a.data.clone()
        layer.lora_B["default"].weight.data = lora.b.data.clone()
    items = run.train[:6]
    grads = one_step(run, items)
    total = sum(len(item.answer) for item in items)
    nats = torch.zeros((), device=device.name)
    for item in items:
        ids = torch.tensor([[*item.prompt, *item.answer]], device=device.name)
        logits = peft_model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1]
        nats = nats + F.cross_entropy(logits, ids[0, len(item.prompt) :], reduction="sum")
    (nats / total).backward()
    nats = nats.detach()
    assert run.state.losses[0] / run.state.tokens[0] == pytest.approx(float(nats) / total, abs=1e-5)
    assert run.state.tokens == [total]
    for linear in run.bank.trainable(run.adapter_name):
        layer = peft_model.base_model.model.get_submodule(linear)
        for letter, part in (("A", layer.lora_A), ("B", layer.lora_B)):
            wanted = part["default"].weight.grad
            assert wanted.abs().max() > 1e-4
            torch.testing.assert_close(grads[f"{linear}.{letter}"], wanted, atol=1e-5, rtol=1e-4)


# ── Out of memory ─────────────────────────────────────────────────────────────────────────────────


ERRORS = {
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate "
                        "memory: you tried to allocate 12 bytes. Error code 12"),
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}  # fmt: skip


def failing(monkeypatch: pytest.MonkeyPatch, run: Run, error: Exception, calls: int) -> None:
    """The ``calls``-th forward pass raises ``error``, once."""
    assert run.gradients.cost is not None  # measured before
    right, done = gradients.text_nats, 0

    def once(*arguments: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        if done == calls:
            raise error
        return right(*arguments)

    monkeypatch.setattr(gradients, "text_nats", once)


@pytest.mark.parametrize("kind", ERRORS)
def test_after_running_out_of_memory_a_run_equals_one_with_smaller_passes(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, kind: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spam = declared(make_rows(60), epochs=2, retention="none", dropout=0.2)
    run = make_run(tmp_path, tiny_base, spam)
    run.gradients.display = Display()
    failing(monkeypatch, run, ERRORS[kind], calls=1)
    weights = ended(run)
    assert "out of memory: from here on a pass has at most" in capsys.readouterr().out
    micro = run.state.micro
    assert micro is not None
    parts = list(micro_batches(run.train[:16], torch.device("cpu"), micro))
    assert len(parts) >= 2
    other = make_run(tmp_path / "other", tiny_base, spam)
    other.state.micro = micro
    for name, wanted in ended(other).items():
        assert torch.equal(weights[name], wanted), name


def test_running_out_of_memory_within_a_step_counts_no_row_twice(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout, smaller passes change rounding only; the global batch stays the same."""
    spam = declared(make_rows(60), epochs=2, retention="none")
    whole = ended(make_run(tmp_path / "whole", tiny_base, spam))
    monkeypatch.setattr(batches, "MICRO_TOKENS", {True: 100, False: 100})
    run = make_run(tmp_path, tiny_base, spam)
    parts = len(list(micro_batches(run.train[:16], torch.device("cpu"))))
    assert parts >= 2
    failing(monkeypatch, run, ERRORS["cuda"], calls=2)  # its first pass was finished
    weights = ended(run)
    assert run.state.micro is not None
    for name, wanted in whole.items():
        torch.testing.assert_close(weights[name], wanted, atol=2e-4, rtol=1e-3)


def test_a_row_that_does_not_fit_is_an_error_with_a_hint(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, tiny_base, declared(make_rows(60), epochs=1, retention="none"))

    def never(*_: Any) -> torch.Tensor:
        raise ERRORS["cuda"]

    monkeypatch.setattr(gradients, "text_nats", never)
    with pytest.raises(OutOfMemory, match=r"one row at a time.*gradient_checkpointing"):
        run.fit()
    assert run.adapter_name not in run.bank


def test_the_best_epoch_is_saved_where_memory_runs_out(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Run.train_step

    def failing(self: Run, rows: Any) -> None:
        if self.state.epoch == 1:
            raise OutOfMemory(where="spam", expected="memory", found="none", hint="Take less.")
        step(self, rows)

    monkeypatch.setattr(Run, "train_step", failing)
    spam = declared(make_rows(40), epochs=2, batch_size=32, retention="none")
    with pytest.raises(
        OutOfMemory, match=r"Take less\. The adapter of epoch 1, the best so far, was"
    ):
        model_in(tmp_path, tiny_base).fit(spam)
    assert Card.read(tmp_path / "spam").adapter.training["finished"] is False


def test_a_long_row_among_short_ones_is_the_same_error(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The long row has its own pass and never fits; the passes of short ones can be halved."""
    rows = make_rows(60)
    # One of the 42 training rows; half its length is longer than the others.
    rows[0]["text"] += " stone" * 200
    run = make_run(tmp_path, tiny_base, declared(rows, epochs=1, retention="none"))
    right, passes = gradients.text_nats, 0

    def long_never(model: Any, rows: Any, *rest: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        assert passes < 100
        if max(map(len, rows)) > 100:
            raise ERRORS["cuda"]
        return right(model, rows, *rest)

    monkeypatch.setattr(gradients, "text_nats", long_never)
    with pytest.raises(OutOfMemory, match=r"a row of \d+ tokens.*one row at a time"):
        run.fit()


def test_a_pass_on_a_cpu_has_1024_tokens_and_on_an_accelerator_as_many_as_it_is_given() -> None:
    rows = [EncodedExample(f"{n}", (n, *range(100, 225)), (1, 2), target=0) for n in range(20)]
    cpu, gpu = (
        [len(part) for part in micro_batches(rows, torch.device(name))] for name in ("cpu", "cuda")
    )
    assert max(cpu) == 1024 // 128
    assert sum(cpu) == sum(gpu) == 20
    assert gpu == [20]


def test_a_large_vocabulary_makes_smaller_passes() -> None:
    rows = [EncodedExample(str(n), (1,), tuple(range(2, 102))) for n in range(8)]
    cpu = torch.device("cpu")
    assert [len(part) for part in micro_batches(rows, cpu)] == [8]
    assert [len(part) for part in micro_batches(rows, cpu, vocabulary=2800)] == [8]
    # 100 tokens over 600,000 words are 60 million logits: two rows pass 2 ** 27.
    parts = [len(part) for part in micro_batches(rows, cpu, vocabulary=600_000)]
    assert parts == [2] * 4


# ── Before memory runs out ────────────────────────────────────────────────────────────────────────


METHODS = [{"retention": "none"}, {"retention": "kl", "kl": 0.5}, {"retention": "replay"},
           {"retention": "none", "gradient_checkpointing": True}]  # fmt: skip


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_the_memory_of_a_pass_is_known_from_a_few_tokens(
    tmp_path: Path, tiny_base: Path, settings: dict[str, Any]
) -> None:
    run = make_run(tmp_path, tiny_base, declared(make_rows(60), **settings))
    cost, before = run.gradients.cost, torch.get_rng_state()
    assert cost is not None
    assert all(p.grad is None for p in run.parameters)
    assert torch.equal(torch.get_rng_state(), before)
    for rows, length, answer in ((3, 100, 2), (20, 40, 20), (8, 120, 60)):
        trial = trial_examples(rows, length, answer)
        logits = rows * answer * run.bank.base.vocabulary
        with TensorBytes() as counted, run.gradients._recomputing():
            run.gradients._domain_gradients([trial], 1)
        assert counted.peak == pytest.approx(cost(rows, length, logits), rel=0.15)
    if run.plan.retention.rows:
        texts = run.general.texts[:20]
        general = run.gradients.general_cost
        assert general is not None
        _ = run.plan.retention.loss(run.general, texts)  # the base's predictions are computed once
        answer = max(len(text.answer) for text in texts)
        logits = len(texts) * answer * run.bank.base.vocabulary
        with TensorBytes() as counted:
            run.gradients._general_gradients([texts], 1)
        estimated = general(len(texts), max(map(len, texts)), logits)
        assert 0.5 * estimated < counted.peak < 1.15 * estimated  # a text may be shorter


def test_adapters_of_one_shape_are_measured_once(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a base that is loaded again too; whatever changes what a pass takes is measured."""
    monkeypatch.setattr(memory, "_measured", {})
    kinds: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"rank": 4}, {"dropout": 0.1}, {"gradient_checkpointing": True},
    ]  # fmt: skip
    runs = [make_run(tmp_path, tiny_base, declared(make_rows(60), **kind)) for kind in kinds]
    first, same, *others = [run.gradients.cost for run in runs]
    assert first is same
    assert len({first, *others}) == 4
    other = make_base(tmp_path / "other", vocab_size=800)
    assert make_run(tmp_path, other, declared(make_rows(60))).gradients.cost is not first
    texts = [run.gradients.general_cost for run in runs[:2]]
    assert texts[0] is texts[1] is not None
    assert texts[0] != first


def test_passes_keep_within_memory_and_change_rounding_only(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spam = declared(make_rows(60), epochs=2, kl=0.5, retention="kl", general_rows=8,
                    general_cost=1000.0)  # fmt: skip
    weights, peaks, parts = [], [], []
    for free in (2**30, 2**23):  # a single text of 127 tokens takes 2.1 MB
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        run = make_run(tmp_path / str(free), tiny_base, spam)
        run.display = run.gradients.display = Display()
        _ = run.general.reference  # the base reads before, in batches of its own
        counted, passes = watched(run)
        weights.append(ended(run))
        assert run.state.pass_bytes == pass_limit(run.model) == free // 2
        peaks.append(max(counted))
        parts.append(len(passes))
        assert "per token in training, measured; at most" in capsys.readouterr().out
    assert peaks[1] <= 2**22 < peaks[0]
    assert parts[1] > parts[0]
    for name, wanted in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted, atol=2e-4, rtol=1e-3)


def watched(run: Run) -> tuple[list[int], list[int]]:
    """The memory of each pass of ``run`` at its peak, and its rows."""
    peaks: list[int] = []
    rows: list[int] = []
    for name in ("_domain_gradients", "_general_gradients"):
        right = getattr(run.gradients, name)

        def one_by_one(passes: Any, total: int, right: Any = right) -> Any:
            nats = torch.zeros(())
            for part in passes:
                rows.append(len(part))
                with TensorBytes() as counted:
                    result = right([part], total)
                peaks.append(counted.peak)
                nats = nats + (0 if result is None else result)
            return nats

        setattr(run.gradients, name, one_by_one)
    return peaks, rows


def test_a_resumed_run_divides_its_steps_as_before(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less memory is free after the interruption, but enough for the passes of before."""
    spam = declared(make_rows(60), epochs=2, retention="none")
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**23)
    whole = ended(make_run(tmp_path / "whole", tiny_base, spam))
    stopped_after(2, spam, tmp_path / "part", tiny_base)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2**22)
    run = make_run(tmp_path / "part", tiny_base, spam)
    weights = run.fit(resume=True).adapter.weights
    assert run.state.pass_bytes == 2**22
    for linear, pair in weights.items():
        for n, part in enumerate(pair):
            assert torch.equal(part, whole[f"{linear}.{n}"])


def test_other_errors_are_not_taken_for_it(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, tiny_base, declared(make_rows(60), epochs=1, retention="none"))
    failing(monkeypatch, run, RuntimeError("shapes cannot be multiplied"), calls=2)
    with pytest.raises(RuntimeError, match="shapes cannot"):
        run.fit()


@given(st.lists(st.integers(1, 60), max_size=8), st.integers(1, 200), st.integers(0, 80))
def test_passes_hold_every_row_once_and_cost_the_least(
    lengths: list[int], most: int, once: int
) -> None:
    rows = [EncodedExample(str(at), (7,) * length, ()) for at, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(batches.PASS, True, once)
        parts = list(micro_batches(rows, torch.device("cpu"), most))
    ordered = sorted(rows, key=len, reverse=True)
    assert [row for part in parts for row in part] == ordered

    def cost(division: Sequence[Sequence[EncodedExample]]) -> int:
        return sum(once + len(part) * len(part[0]) for part in division)

    def allowed(division: Sequence[Sequence[EncodedExample]]) -> bool:
        return all(len(part) == 1 or len(part) * len(part[0]) <= most for part in division)

    assert allowed(parts)
    between = range(1, len(ordered))
    divisions = [
        [ordered[i:j] for i, j in pairwise((0, *cuts, len(ordered)))]
        for count in range(len(ordered)) for cuts in combinations(between, count)
    ]  # fmt: skip
    assert cost(parts) == min(map(cost, filter(allowed, divisions)), default=0)


# ── Attention ─────────────────────────────────────────────────────────────────────────────────────


def test_no_gradient_is_left_to_cudnn_attention(tmp_path: Path, tiny_base: Path) -> None:
    """Its kernel for Hopper gives NaN; which kernel computes a gradient is chosen in the forward
    pass, of rows and of general texts, and again where layers are recomputed."""
    spam = declared(make_rows(60), epochs=1, kl=0.5, retention="kl", gradient_checkpointing=True)
    run = make_run(tmp_path, tiny_base, spam)
    _ = run.gradients.cost, run.gradients.general_cost
    allowed: list[bool] = []

    def note(*_: Any) -> None:
        if torch.is_grad_enabled():
            allowed.append(torch.backends.cuda.cudnn_sdp_enabled())

    run.model.model.layers[0].self_attn.register_forward_pre_hook(note)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    run.train_step(run.train[:6])
    assert len(allowed) >= 4
    assert not any(allowed)
    assert torch.backends.cuda.cudnn_sdp_enabled()


# ── Gradient checkpointing ────────────────────────────────────────────────────────────────────────


def adapter_gradients(tiny_base: Path, *, recompute: bool, thread: bool) -> dict[str, torch.Tensor]:
    """Gradients of a strong adapter with dropout; ``thread``: backward runs in another thread."""
    base = load_base(tiny_base, device="cpu")
    bank = Bank(base)
    bank.add(strong(base, "a", dropout=0.3), trainable=True)
    torch.manual_seed(0)
    with recomputing(base.model) if recompute else nullcontext():
        with bank.routed("a"):
            loss = base.model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss
        if thread:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
        else:
            loss.backward()
    grads = {}
    for name, lora in bank.trainable("a").items():
        assert lora.a.grad is not None
        assert lora.b.grad is not None
        grads[f"{name}.A"], grads[f"{name}.B"] = lora.a.grad, lora.b.grad
    return grads


@pytest.mark.parametrize("thread", [False, True])
def test_recomputed_layers_give_the_same_gradients(tiny_base: Path, thread: bool) -> None:
    plain = adapter_gradients(tiny_base, recompute=False, thread=False)
    grads = adapter_gradients(tiny_base, recompute=True, thread=thread)
    assert max(float(g.abs().max()) for g in plain.values()) > 1e-3
    for name, wanted in plain.items():
        torch.testing.assert_close(grads[name], wanted, atol=1e-6, rtol=1e-5)


def test_without_the_route_restored_gradients_would_be_silently_wrong(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above would fail: other gradients, or an error of torch."""
    plain = adapter_gradients(tiny_base, recompute=False, thread=False)
    monkeypatch.setattr(memory, "entered", lambda *_: nullcontext())
    try:
        grads = adapter_gradients(tiny_base, recompute=True, thread=True)
    except CheckpointError:
        return  # the bare base saves another number of tensors, which torch counts
    assert any(not torch.allclose(grads[name], plain[name], rtol=0.1) for name in plain)


def test_each_layer_is_computed_twice_and_restored_afterwards(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    bank = Bank(base)
    bank.add(strong(base, "a"), trainable=True)
    layer = base.model.model.layers[0]
    calls: list[int] = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    before = dict(vars(layer))
    with recomputing(base.model), bank.routed("a"):
        base.model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        assert not base.model.training
    assert len(calls) == 2
    assert vars(layer).keys() == before.keys()
    base.model(input_ids=token_ids())
    assert len(calls) == 3


def test_a_model_without_layers_to_recompute_is_refused() -> None:
    with (
        pytest.raises(TrainingError, match="Leave gradient_checkpointing out"),
        recomputing(torch.nn.Linear(2, 2)),
    ):
        pass


def test_a_run_ends_with_the_same_weights_with_and_without_recomputing(
    tmp_path: Path, tiny_base: Path
) -> None:
    """With KL, passes of the base alternate with those of the adapter."""
    rows = make_rows(60)
    weights = [
        ended(make_run(tmp_path / str(on), tiny_base,
                       declared(rows, epochs=1, dropout=0.2, kl=0.5,
                              gradient_checkpointing=on)))
        for on in (False, True)
    ]  # fmt: skip
    for name, wanted in weights[0].items():
        torch.testing.assert_close(weights[1][name], wanted, atol=1e-5, rtol=1e-4)


# ── The beginning of all prompts ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("more", [{}, {"dora": True}], ids=str)
def test_a_step_that_reads_a_beginning_once_has_the_gradients_of_whole_prompts(
    tmp_path: Path, tiny_base: Path, more: dict[str, Any]
) -> None:
    begin = tuple(7 + n % 50 for n in range(40))
    rows = [
        EncodedExample(f"{n}", (*begin, *(9 + n,) * (1 + n % 5)), (11 + n % 3, 2)) for n in range(8)
    ]
    found, passes = [], []
    for on in (False, True):
        domain = declared(make_rows(20), retention="none", gradient_checkpointing=on, **more)
        run = make_run(tmp_path / str(on), tiny_base, domain)
        random = torch.Generator().manual_seed(0)
        for lora in run.bank.trainable(run.adapter_name).values():
            lora.b.data.copy_(torch.randn(lora.b.shape, generator=random) * 0.05)
        hook = run.model.register_forward_pre_hook(
            lambda _, __, given: passes.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        passes.clear()
        found.append(one_step(run, rows))
        hook.remove()
        # Before them the memory of a few tokens may be measured.
        assert (passes[-1], 40 in passes) == ((47, False) if on else (7, True))
    for name, wanted in found[1].items():
        assert wanted.abs().max() > 1e-5
        assert (found[0][name] - wanted).norm() <= 1e-4 * wanted.norm(), name
