"""Mixed batches: rows with different adapters give the outputs of each row alone."""

import gc
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import device
from support.adapters import assert_close, logits, strong, tolerance
from support.device import base_on

from lora_domains.errors import UsageError
from lora_domains.modeling import routing
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.routing import FEW, Mixed, narrowed

# Different ranks, scales, rsLoRA, DoRA, and target sets that overlap, nest or are disjoint. rsLoRA
# has a larger scale: with a B like that of the others, hidden values would reach 166, and rounding
# the embeddings alone would move logits by more than the tolerance.
ADAPTERS: dict[str, dict[str, Any]] = {
    "all": {},
    "alike": {},
    "wide": {"rank": 7, "rslora": True, "deviation": 0.2},
    "attention": {"targets": ("q_proj", "v_proj"), "rank": 2},
    "value": {"targets": ("v_proj", "down_proj")},
    "mlp": {"targets": ("gate_proj", "up_proj"), "rank": 5},
    "head": {"targets": ("lm_head",)},
    "dora": {"rank": 3, "dora": True},
}
NAMES = (*ADAPTERS, None)


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    bank = Bank(base_on(tiny_base))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        bank.add(strong(bank.base, name, seed, **options))
    return bank


@torch.no_grad()
def alone(bank: Bank, ids: torch.Tensor, domains: Sequence[str | None]) -> torch.Tensor:
    """(rows, tokens, vocabulary): each row in a call of its own, with its adapter."""
    rows = []
    for row, name in zip(ids, domains, strict=True):
        with bank.routed(name):
            rows.append(bank.base.model(input_ids=row[None]).logits)
    return torch.cat(rows)


def random_ids(rows: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 100 + tokens)
    return torch.randint(3, 300, (rows, tokens), generator=generator).to(device.name)


def test_each_adapter_has_an_effect_of_its_own(bank: Bank) -> None:
    seen = [logits(bank, name) for name in NAMES]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one - other).abs().max() >= 100 * tolerance(one)


@pytest.mark.contract
@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=7),
    st.sampled_from([1, 3, FEW, FEW + 1, 14]),
)
def test_a_mixed_batch_equals_its_rows_one_by_one(
    bank: Bank, domains: list[str | None], tokens: int
) -> None:
    ids = random_ids(len(domains), tokens)
    with torch.no_grad(), bank.routed(domains):
        found = bank.base.model(input_ids=ids).logits
    assert_close(found, alone(bank, ids, domains))


@pytest.mark.contract
@settings(deadline=None, max_examples=15)
@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5), st.sampled_from([2, 3]))
def test_beams_use_the_adapter_of_their_row(
    bank: Bank, domains: list[str | None], beams: int
) -> None:
    for tokens in (1, 12):
        ids = random_ids(len(domains) * beams, tokens)
        with torch.no_grad(), bank.routed(domains):
            found = bank.base.model(input_ids=ids).logits
        each = [name for name in domains for _ in range(beams)]
        assert_close(found, alone(bank, ids, each))


@pytest.mark.contract
def test_decoding_with_a_cache_gathers_once(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    domains = ["wide", None, "all", "attention"]
    ids = random_ids(4, 12)
    wanted = alone(bank, ids, domains)
    with torch.no_grad(), bank.routed(domains):
        out = bank.base.model(input_ids=ids[:, :9], use_cache=True)
        cache = out.past_key_values
    assert_close(out.logits, wanted[:, :9])
    gathered = []
    stack = routing.stack
    monkeypatch.setattr(
        routing,
        "stack",
        lambda adapters, group: (gathered.append(group), stack(adapters, group))[1],
    )
    for step in range(9, 12):
        # A new call for each token, as in a decoding loop outside `generate`.
        with torch.no_grad(), bank.routed(domains):
            out = bank.base.model(input_ids=ids[:, step : step + 1], past_key_values=cache)
        assert_close(out.logits[:, 0], wanted[:, step])
    assert len(gathered) == len(set(gathered)) > 0, "gathered again for a later step"


def test_two_batches_that_take_turns_gather_once_on_a_cpu(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered, stack = [], routing.stack
    monkeypatch.setattr(
        routing, "stack", lambda of, group: (gathered.append((*of, group)), stack(of, group))[1]
    )
    for _ in range(3):
        for domains in (["all", "alike"], ["wide", "alike", None]):
            with torch.no_grad(), bank.routed(domains):
                bank.base.model(input_ids=random_ids(len(domains), 1))
    times = 1 if bank.base.device.type == "cpu" else 3
    assert len(gathered) == times * len(set(gathered)) > 0


class Observed(dict[str, Any]):
    """A dictionary that calls ``changed`` after every change."""

    changed: Callable[[], object]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self.changed()

    def __ior__(self, other: Any) -> "Observed":  # type: ignore[override, misc]
        super().__ior__(other)
        self.changed()
        return self


@pytest.mark.contract
def test_a_thread_that_gathers_weights_never_misleads_another(bank: Bank) -> None:
    """Threads that share a mixed route share what it gathered, after every change of it."""
    domains = ["all", "wide", None, "mlp"]
    ids = random_ids(4, FEW)
    wanted, found = alone(bank, ids, domains), []
    bank.add(bank["all"])  # the next route is a new one, which has gathered nothing
    route = bank.route(domains)
    assert isinstance(route, Mixed)
    route._stacked = gathered = Observed()

    @torch.no_grad()
    def call() -> None:
        with bank.routed(domains):
            found.append(bank.base.model(input_ids=ids).logits)

    def call_elsewhere() -> None:
        gathered.changed = lambda: None
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call).result()

    gathered.changed = call_elsewhere
    call()
    assert bank.route(domains) is route, "the threads did not share it"
    assert len(found) == 2
    for outputs in found:
        assert_close(outputs, wanted)


def test_a_batch_of_another_size_is_refused(bank: Bank) -> None:
    with pytest.raises(UsageError, match="a batch of 3 rows"), bank.routed(["all", "wide", None]):
        bank.base.model(input_ids=random_ids(4, 2))


@pytest.mark.contract
def test_a_subset_of_rows_keeps_its_domains(bank: Bank) -> None:
    domains = ["all", "wide", None, "mlp", "all"]
    ids = random_ids(5, 12)
    wanted = alone(bank, ids, domains)
    for rows in ([3, 0], [4, 0], [2], [1, 2, 4]):
        with torch.no_grad(), bank.routed(domains), narrowed(bank.base.model, rows):
            found = bank.base.model(input_ids=ids[rows]).logits
        assert_close(found, wanted[rows])


@pytest.mark.contract
def test_a_trainable_adapter_may_be_one_of_several(tiny_base: Path) -> None:
    """Gradients of a mixed batch equal those of its rows alone, for every adapter in training."""
    bank = Bank(base_on(tiny_base))
    names = ("a", "b", "still")
    grads: dict[str, list[torch.Tensor]] = {}
    parameters = {
        name: bank.add(strong(bank.base, name, seed), trainable=name != "still")
        for seed, name in enumerate(names)
    }
    domains = ["a", "b", None, "a", "still"]
    ids = random_ids(5, 6)
    for name in ("a", "b"):
        rows = [row for row, of in enumerate(domains) if of == name]
        with bank.routed(name):
            (bank.base.model(input_ids=ids[rows]).logits ** 2).sum().backward()
        grads[name] = [p.grad.clone() for p in parameters[name]]
        for p in parameters[name]:
            p.grad = None
    with bank.routed(domains):
        out = bank.base.model(input_ids=ids).logits
    assert_close(out, alone(bank, ids, domains))
    (out**2).sum().backward()
    for name in ("a", "b"):
        for p, wanted in zip(parameters[name], grads[name], strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(p.grad, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.contract
def test_mixed_batches_on_half_precision_bases(tiny_base: Path) -> None:
    bank = Bank(base_on(tiny_base, dtype="bfloat16"))
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        bank.add(strong(bank.base, name, seed, **options))
    for tokens in (2, 12):
        ids = random_ids(len(NAMES), tokens)
        with torch.no_grad(), bank.routed(NAMES):
            found = bank.base.model(input_ids=ids).logits
        assert found.dtype == torch.bfloat16
        wanted = alone(bank, ids, NAMES)
        # A rounding error is 2^-8 of a value; another adapter's row would differ by its effect.
        close = (found - wanted).abs().amax((1, 2))
        assert (close <= 0.05 * wanted.abs().amax((1, 2)) + 0.02).all()


# ── After a call ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("domains", ["wide", ["wide", None, "mlp"]])
@pytest.mark.parametrize("tokens", [FEW, FEW + 1])
def test_no_activation_outlives_a_call(bank: Bank, domains: Any, tokens: int) -> None:
    """A route outlives its call, so that decoding gathers weights once."""
    inputs: list[weakref.ref[torch.Tensor]] = []

    def note(_module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        inputs.append(weakref.ref(args[0]))

    linears = [m for m in bank.base.model.modules() if isinstance(m, routing.RoutedLinear)]
    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    with torch.no_grad(), bank.routed(domains):
        bank.base.model(input_ids=random_ids(3, tokens))
        bank.base.model.base_model(input_ids=random_ids(3, tokens))
        gc.collect()
        assert len(inputs) > 20
        assert [ref for ref in inputs if ref() is not None] == []
    for hook in hooks:
        hook.remove()


@pytest.mark.contract
def test_a_cache_belongs_to_its_domain(bank: Bank) -> None:
    ids = random_ids(2, 9)
    with torch.no_grad():
        for made, others in (("all", ["mlp", None, ["all", None]]), (None, ["all"]),
                             (["all", "mlp"], [["mlp", "all"], "all"])):  # fmt: skip
            with bank.routed(made):
                cache = bank.base.model(input_ids=ids, use_cache=True).past_key_values
            for other in others:
                with bank.routed(other), pytest.raises(UsageError, match="a cache of keys and"):
                    bank.base.model(input_ids=ids[:, :1], past_key_values=cache)
            with bank.routed(made):
                bank.base.model(input_ids=ids[:, :1], past_key_values=cache)
