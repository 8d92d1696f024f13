"""Steps of several runs in shared passes: the gradients are those of separate steps."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import support.retention  # noqa: F401 (registers the method blend)
import torch
from conftest import make_rows
from support.models import clear_rows, declared, in_float64, model_in

from lora_domains.domain import Domain
from lora_domains.errors import OutOfMemory
from lora_domains.inference import batches, memory
from lora_domains.inference.memory import recomputing
from lora_domains.joint.gradients import Batch, JointGradients
from lora_domains.model import DomainModel
from lora_domains.modeling import routing
from lora_domains.tasks import Classification, Generation, MultiLabel, Number, Preference
from lora_domains.training import fit, gradients
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan
from lora_domains.training.retention import NoRetention

PAIRS = [
    {"prompt": r["text"], "chosen": "blue stone " * (1 + n % 3), "rejected": f"red {r['label']}"}
    for n, r in enumerate(make_rows(60))
]
MANY = [{"text": r["text"], "labels": [r["label"], "short"][: 1 + n % 2]}
        for n, r in enumerate(make_rows(60))]  # fmt: skip
NUMBERS = [{"text": r["text"], "value": float(len(r["text"]))} for r in make_rows(60)]


def causal_domains() -> list[Domain]:
    """All that the base can learn at once: other tasks, heads, ranks, batches and methods."""
    spam = clear_rows(100)
    return [
        declared(spam, "prompted", rank=8, batch_size=5, retention="kl", general_cost=9.0),
        declared(spam, "replayed", rank=4, batch_size=3, retention="replay", general_cost=9.0),
        declared(spam, "written", Generation("text", "label"), rank=16, retention="blend",
                 batch_size=4, general_cost=9.0, dora=True),
        declared(spam, "headed", Classification(head=True), rank=2, retention="none",
                 batch_size=6, targets=("q_proj", "down_proj"), balance="weights"),
        declared(MANY, "several", MultiLabel(label="labels", head=True), rank=3, retention="kl"),
        declared(NUMBERS, "number", Number(label="value", head=True), retention="none"),
        declared(PAIRS, "pairs", Preference(), rank=4, batch_size=4, retention="none"),
    ]  # fmt: skip


def encoder_domains() -> list[Domain]:
    spam = clear_rows(100)
    return [
        declared(spam, "one", Classification(head=True), rank=8, batch_size=5,
                 retention="blend", general_cost=9.0),
        declared(spam[:60], "two", Classification(head=True), rank=2, batch_size=9,
                 retention="replay", general_cost=9.0),
    ]  # fmt: skip


def runs_on(model: DomainModel, domains: Sequence[Domain]) -> list[Run]:
    """Their runs, with adapters that are far from the base."""
    runs = []
    for number, domain in enumerate(domains):
        dataset = model.dataset(domain)
        plan = make_plan(model.base, dataset)
        run = fit.make_run(model.bank, dataset, plan, model.out, model.display)
        random = torch.Generator().manual_seed(number)
        for lora in run.bank.trainable(run.adapter_name).values():
            lora.b.data.copy_(0.1 * torch.randn(lora.b.shape, generator=random))
        run.validation.compare_with_base(run.gradients.pairs, run.train)
        runs.append(run)
    return runs


def gradients_of(run: Run) -> torch.Tensor:
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten().clone()
         for p in run.parameters]
    )  # fmt: skip


def compared(runs: Sequence[Run], recompute: bool = False) -> list[tuple[float, float]]:
    """Of each run: the relative difference of gradients and of nats, joint against separate."""
    batches = [Batch(run.gradients, run.train[: run.plan.batch_size]) for run in runs]
    with ExitStack() as opened:
        opened.enter_context(recomputing(runs[0].model) if recompute else nullcontext())
        alone = [float(g.compute(rows, g.units(rows))) for g, rows in batches]
        wanted = [gradients_of(run) for run in runs]
        together = [float(nats) for nats in JointGradients(runs[0].bank).compute(batches)]
    return [
        (float((gradients_of(run) - one).norm() / one.norm()), abs(a - b) / abs(b))
        for run, one, a, b in zip(runs, wanted, together, alone, strict=True)
    ]


def from_float64(runs: Sequence[Run]) -> list[tuple[float, float, float]]:
    """Of each run: how far gradients are from those of separate steps in float64.

    First joint ones and those of separate steps in float32, then joint ones in float64. Base and
    adapters stay in float64.
    """
    batches = [Batch(run.gradients, run.train[: run.plan.batch_size]) for run in runs]

    def jointly() -> list[torch.Tensor]:
        JointGradients(runs[0].bank).compute(batches)
        return [gradients_of(run) for run in runs]

    def separately() -> list[torch.Tensor]:
        for of, rows in batches:
            of.compute(rows, of.units(rows))
        return [gradients_of(run) for run in runs]

    found = [jointly(), separately()]
    with in_float64(runs):
        found += [separately(), jointly()]
    return [
        tuple(float((one - exact).norm() / exact.norm()) for one in (joint, separate, doubled))
        for joint, separate, exact, doubled in zip(*found, strict=True)
    ]


def assert_as_exact(runs: Sequence[Run]) -> None:
    """Joint gradients equal those of separate steps in float64, and are as near to them in float32.

    Rounding in float32 takes both about 1e-6 from there: where a batch of another size is computed
    by other kernels, that is how far they are from each other too. On a GPU, where a kernel's order
    of summation depends on the size of a batch, one may be several times as far as the other.
    """
    for run, (joint, separate, doubled) in zip(runs, from_float64(runs), strict=True):
        assert doubled < 1e-7, run.domain.name
        if runs[0].model.device.type == "cpu":
            assert joint < max(1e-6, 1.5 * separate), run.domain.name


@pytest.mark.contract
@pytest.mark.parametrize("micro", [pytest.param(16_384, marks=pytest.mark.long), 64])
def test_joint_gradients_equal_those_of_separate_steps(
    tmp_path: Path, tiny_base: Path, micro: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "MICRO_TOKENS", {True: micro, False: micro})
    runs = runs_on(model_in(tmp_path, tiny_base), causal_domains())
    assert {run.plan.rank for run in runs} == {2, 3, 4, 8, 16}
    assert sum(bool(run.gradients.texts()) for run in runs) == 4
    for run, (difference, nats) in zip(runs, compared(runs), strict=True):
        assert gradients_of(run).norm() > 1e-3
        assert difference < 1e-5, run.domain.name
        assert nats < 1e-6, run.domain.name
    assert_as_exact(runs)


def test_joint_gradients_on_an_encoder(tmp_path: Path, bases: Callable[[str], Path]) -> None:
    """Of masked texts, separate steps in other passes differ by 2e-6 themselves."""
    runs = runs_on(model_in(tmp_path, bases("bert")), encoder_domains())
    assert max(max(pair) for pair in compared(runs)) < 1e-5
    methods = [run.gradients.retention for run in runs]
    for run in runs:
        run.gradients.retention = NoRetention()
    assert max(max(pair) for pair in compared(runs)) < 1e-6
    for run, method in zip(runs, methods, strict=True):
        run.gradients.retention = method
    assert_as_exact(runs)


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, True),
        ({"rank": 8}, False),
        ({"alpha": 4}, False),
        ({"batch_size": 3}, False),
        ({"dora": True}, False),
    ],
)
def test_adapters_that_are_alike_share_their_products(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any], shared: bool,
) -> None:  # fmt: skip
    """One product for all adapters where ranks, scales and batches are equal; else one for each."""
    monkeypatch.setattr("lora_domains.inference.batches.PASS", {True: 10_000, False: 10_000})
    same = {"rank": 4, "batch_size": 4, "retention": "none"}
    rows = clear_rows(100)
    first, second = declared(rows, "a", **same), declared(rows[20:], "b", **same | changes)
    runs = runs_on(model_in(tmp_path, tiny_base), [first, second])
    found, products = [], routing.trained_lows
    monkeypatch.setattr(routing, "trained_lows", lambda *a: found.append(products(*a)) or found[-1])
    assert_as_exact(runs)  # which leaves them in float64
    assert all(difference < 1e-6 and nats < 1e-6 for difference, nats in compared(runs))
    assert any(found) == shared


def test_a_step_takes_one_pass_for_all_runs(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one length: seven separate steps take 13 passes, joint ones 3."""
    monkeypatch.setattr("lora_domains.inference.batches.PASS", {True: 10_000, False: 10_000})
    runs = runs_on(model_in(tmp_path, tiny_base), causal_domains())
    calls: list[int] = []
    runs[0].model.base_model.register_forward_hook(lambda *_: calls.append(1))
    batches = [Batch(run.gradients, run.train[:4]) for run in runs if run.gradients.pairs is None]
    JointGradients(runs[0].bank).compute(batches)  # the base reads general texts in the first
    calls.clear()
    JointGradients(runs[0].bank).compute(batches)
    assert len(calls) == 3  # prompts, general texts, and what heads read


def test_a_pass_that_runs_out_of_memory_is_halved_for_all_runs(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_on(model_in(tmp_path, tiny_base), causal_domains()[:2])
    batches = [Batch(run.gradients, run.train[:8]) for run in runs]
    joint = JointGradients(runs[0].bank)
    joint.compute(batches)
    wanted = [gradients_of(run) for run in runs]
    right, calls = joint._run, 0

    def once(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        right(*arguments)

    monkeypatch.setattr(joint, "_run", once)
    joint.compute(batches)
    assert runs[0].state.micro == runs[1].state.micro is not None
    for run, one in zip(runs, wanted, strict=True):
        assert (gradients_of(run) - one).norm() < 1e-6 * one.norm()


def test_a_row_that_does_not_fit_is_named_after_its_domain(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [declared(clear_rows(100), name, retention="none") for name in ("short", "long")]
    runs = runs_on(model_in(tmp_path, tiny_base), several)
    rows = sorted(runs[0].train, key=len)
    batches = [Batch(run.gradients, [rows[at]]) for run, at in zip(runs, (0, -1), strict=True)]
    joint = JointGradients(runs[0].bank)

    def never(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(joint, "_run", never)
    with pytest.raises(OutOfMemory, match=f"^long, a row of {len(rows[-1])} tokens"):
        joint.compute(batches)


def test_large_passes_give_their_memory_back_if_too_little_is_free(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = runs_on(model_in(tmp_path, tiny_base), causal_domains()[:2])
    batches = [Batch(run.gradients, run.train[:8]) for run in runs]
    joint, freed, passes = JointGradients(runs[0].bank), [], []
    run_pass = joint._run
    monkeypatch.setattr(joint, "_run", lambda *a: (passes.append(1), run_pass(*a)))
    monkeypatch.setattr(memory, "release", freed.append)
    monkeypatch.setattr(gradients, "LARGE_PASS", 0)
    joint.compute(batches)
    assert freed == []
    monkeypatch.setattr(memory, "free_bytes", lambda _: memory.pass_limit(joint.model) - 1)
    monkeypatch.setattr(gradients, "LARGE_PASS", 2**28)
    joint.compute(batches)
    assert freed == []
    monkeypatch.setattr(gradients, "LARGE_PASS", 0)
    passes.clear()
    joint.compute(batches)
    assert len(freed) == len(passes) > 1


def test_recomputed_layers_give_the_same_gradients(tmp_path: Path, tiny_base: Path) -> None:
    domains = [
        declared(clear_rows(100), name, rank=rank, retention="none", gradient_checkpointing=True)
        for name, rank in (("a", 4), ("b", 8))
    ]
    runs = runs_on(model_in(tmp_path, tiny_base), domains)
    assert max(difference for difference, _ in compared(runs)) < 1e-6
