"""Routes: each call uses its own adapter, in nested blocks, threads, tasks and backward passes."""

import asyncio
import inspect
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support import device
from support.adapters import logits, strong, token_ids, tolerance
from support.device import base_on
from torch.utils._python_dispatch import TorchDispatchMode

from lora_domains.errors import AdapterError, UsageError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.lora import Adapter
from lora_domains.modeling.routing import RoutedLinear


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_on(tiny_base)


@pytest.fixture
def bank(base: Base) -> Bank:
    """Two adapters, "a" and "b", loaded on one base."""
    bank = Bank(base)
    for seed, name in enumerate(("a", "b"), start=1):
        bank.add(strong(base, name, seed))
    return bank


def test_every_adapter_differs_from_the_base_and_the_others(bank: Bank) -> None:
    seen = [logits(bank, name) for name in (None, "a", "b")]
    for i, one in enumerate(seen):
        for other in seen[:i]:
            assert (one - other).abs().max() >= 100 * tolerance(one)


@pytest.mark.contract
def test_switching_back_gives_identical_logits(bank: Bank) -> None:
    bare, a, b = (logits(bank, name) for name in (None, "a", "b"))
    for name, wanted in (("a", a), ("b", b), (None, bare), ("a", a), (None, bare), ("b", b)):
        assert torch.equal(logits(bank, name), wanted)


def served_by(bank: Bank) -> tuple[str | None, ...]:
    route = bank.current()
    return () if route is None else route.domains


def test_routes_nest_and_reenter(bank: Bank) -> None:
    assert served_by(bank) == ()
    with bank.routed("a"):
        with bank.routed("b"):
            with bank.routed(None):
                assert served_by(bank) == ()
            with bank.routed(["a", None]):
                assert served_by(bank) == ("a", None)
            with bank.routed("a"):
                assert served_by(bank) == ("a",)
            assert served_by(bank) == ("b",)
        assert served_by(bank) == ("a",)
    assert served_by(bank) == ()


def test_an_exception_restores_the_route(bank: Bank) -> None:
    bare = logits(bank.base)
    with pytest.raises(ZeroDivisionError), bank.routed("a"), bank.routed("b"):
        raise ZeroDivisionError
    assert served_by(bank) == ()
    assert torch.equal(bank.base.model(input_ids=token_ids()).logits, bare)


@pytest.mark.contract
def test_two_threads_each_get_their_own_adapter(bank: Bank) -> None:
    wanted = {name: logits(bank, name) for name in ("a", "b")}
    together = threading.Barrier(2)

    def calls(name: str) -> int:
        right = 0
        with bank.routed(name), torch.no_grad():
            for _ in range(50):
                together.wait(timeout=30)
                found = bank.base.model(input_ids=token_ids()).logits
                right += torch.equal(found, wanted[name])
        return right

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(calls, ("a", "b"))) == [50, 50]


@pytest.mark.contract
def test_tasks_each_get_their_own_adapter(bank: Bank) -> None:
    wanted = {name: logits(bank, name) for name in ("a", "b", None)}

    async def calls(name: str | None) -> bool:
        # no_grad belongs to the thread: held across an await it would leak into other tasks.
        with bank.routed(name):
            right = True
            for _ in range(5):
                await asyncio.sleep(0)
                right &= torch.equal(bank.base.model(input_ids=token_ids()).logits, wanted[name])
        return right

    async def together() -> list[bool]:
        return await asyncio.gather(*(calls(name) for name in ("a", "b", None, "a")))

    assert asyncio.run(together()) == [True] * 4


def test_a_thread_started_inside_uses_the_base(bank: Bank) -> None:
    with bank.routed("a"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(served_by, bank).result() == ()


@pytest.mark.contract
def test_backward_from_a_second_thread_gives_the_same_gradients(base: Base) -> None:
    bank = Bank(base)
    parameters = bank.add(strong(base, "a"), trainable=True)
    bank.add(strong(base, "b", seed=2))

    def loss() -> torch.Tensor:
        with bank.routed("a"):
            return base.model(input_ids=token_ids(), labels=token_ids()).loss

    loss().backward()
    wanted = [p.grad.clone() for p in parameters]
    for p in parameters:
        p.grad = None
    second = loss()

    def backward() -> None:
        with bank.routed("b"):
            second.backward()

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert all(w.abs().max() > 0 for w in wanted)
    for p, gradient in zip(parameters, wanted, strict=True):
        assert torch.equal(p.grad, gradient)
    assert all(p.grad is None for p in base.model.parameters() if not p.requires_grad)


class Products(TorchDispatchMode):
    """Counts products of matrices by the columns of the result."""

    def __init__(self) -> None:
        super().__init__()
        self.columns: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "mm":
            self.columns[args[1].shape[1]] += 1
        return func(*args, **(kwargs or {}))


def peft_model(model: Any, adapter: Adapter) -> Any:
    """Plain PEFT on ``model``, with the weights of ``adapter``."""
    from peft import get_peft_model

    peft = get_peft_model(model, adapter.config)
    layers = dict(peft.base_model.model.named_modules())
    for linear, (a, b) in adapter.weights.items():
        layers[linear].lora_A["default"].weight.data.copy_(a)
        layers[linear].lora_B["default"].weight.data.copy_(b)
    return peft


def peft_gradients(peft: Any, adapter: Adapter) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of A and B, by linear."""
    layers = dict(peft.base_model.model.named_modules())
    return {
        linear: (layers[linear].lora_A["default"].weight.grad.clone(),
                 layers[linear].lora_B["default"].weight.grad.clone())
        for linear in adapter.weights
    }  # fmt: skip


@pytest.mark.contract
def test_gradients_are_those_of_plain_peft(tiny_base: Path, base: Base) -> None:
    adapter = strong(base, "a")
    bank = Bank(base)
    bank.add(adapter, trainable=True)
    oracle = peft_model(base_on(tiny_base).model, adapter)
    oracle(input_ids=token_ids(), labels=token_ids()).loss.backward()
    with bank.routed("a"):
        base.model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for linear, wanted in peft_gradients(oracle, adapter).items():
        lora = bank.trainable("a")[linear]
        for ours, theirs in zip((lora.a, lora.b), wanted, strict=True):
            torch.testing.assert_close(ours.grad, theirs, atol=1e-6, rtol=1e-4)
            assert theirs.abs().max() > 1e-4


def test_linears_of_one_input_share_a_product_in_training(base: Base) -> None:
    bank = Bank(base)
    bank.add(strong(base, "a"), trainable=True)
    with bank.routed("a"), Products() as products:
        base.model(input_ids=token_ids(), labels=token_ids())
    # Of a layer's seven linears q, k and v share one product with A, gate and up another.
    layers = base.model.config.num_hidden_layers
    rank = bank.trainable("a")["model.layers.0.self_attn.q_proj"].a.shape[0]
    counted = {n: products.columns[n] for n in (rank, 2 * rank, 3 * rank)}
    assert counted == {rank: 2 * layers, 2 * rank: layers, 3 * rank: layers}


@pytest.mark.contract
def test_gradients_in_bfloat16_are_as_near_to_those_in_float32_as_pefts(tiny_base: Path) -> None:
    def of_ours(base: Base, adapter: Adapter) -> torch.Tensor:
        bank = Bank(base)
        bank.add(adapter, trainable=True)
        with bank.routed("a"):
            base.model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        lora = bank.trainable("a")
        return torch.cat(
            [p.grad.flatten() for n in adapter.weights for p in (lora[n].a, lora[n].b)]
        )

    def of_peft(peft: Any) -> torch.Tensor:
        pairs = peft_gradients(peft, adapter).values()
        return torch.cat([gradient.flatten() for pair in pairs for gradient in pair])

    narrow = base_on(tiny_base, dtype="bfloat16")
    adapter = strong(narrow, "a")
    oracle = peft_model(base_on(tiny_base, dtype="bfloat16").model, adapter)
    with torch.autocast(device.name, torch.bfloat16):
        oracle(input_ids=token_ids(), labels=token_ids()).loss.backward()
    theirs = of_peft(oracle)
    oracle.float().zero_grad()
    oracle(input_ids=token_ids(), labels=token_ids()).loss.backward()
    exact = of_peft(oracle)
    error = (theirs - exact).norm()
    assert 0 < (of_ours(narrow, adapter) - exact).norm() < 1.5 * error


def test_a_routed_linear_has_the_attributes_of_its_base(bank: Bank) -> None:
    linear = bank.base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(linear, RoutedLinear)
    assert linear.weight is linear.routed_base.weight
    assert (linear.in_features, linear.out_features) == (32, 32)
    assert linear.bias is None
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = linear.no_such_thing


def test_loading_and_unloading_twice_leaves_one_wrapper(bank: Bank) -> None:
    base = bank.base
    a = logits(bank, "a")
    for _ in range(2):
        bank.remove("a")
        assert list(bank) == ["b"]
        with pytest.raises(UsageError, match="a loaded adapter"):
            bank.routed("a")
        bank.add(strong(base, "a", 1))
        bank.add(strong(base, "a", 1))
        assert torch.equal(logits(bank, "a"), a)
    linear = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert not isinstance(linear.routed_base, RoutedLinear)
    assert list(linear.children()) == [linear.routed_base], "adapters are no modules of the model"
    with pytest.raises(UsageError, match="None is loaded yet"):
        Bank(base).remove("a")


def test_an_adapter_with_other_targets_replaces_its_namesake(bank: Bank) -> None:
    base = bank.base
    bank.add(strong(base, "only", 5, targets=("q_proj",)))
    wanted = logits(bank, "only")
    bank.add(strong(base, "a", 5, targets=("q_proj",)))
    assert torch.equal(logits(bank, "a"), wanted), "the previous adapter is still served"


@pytest.mark.parametrize("name", ["train", "keys", "type", "forward", "training", "0"])
def test_names_of_module_attributes_are_valid_adapter_names(base: Base, name: str) -> None:
    bank = Bank(base)
    bare = logits(base)
    bank.add(strong(base, name))
    bank.add(strong(base, "plain"))
    assert torch.equal(logits(bank, name), logits(bank, "plain"))
    base.model.train().eval()
    assert not torch.equal(logits(bank, name), bare)
    bank.remove(name)
    assert torch.equal(logits(bank), bare)


def test_an_adapter_that_does_not_fit_leaves_the_bank_unchanged(bank: Bank) -> None:
    base = bank.base
    before = {name: logits(bank, name) for name in (None, "a", "b")}
    bad = strong(base, "a", 9)
    last = list(bad.weights)[-1]
    a, b = bad.weights[last]
    bad.weights[last] = (a[:, 1:], b)
    with pytest.raises(AdapterError, match="for a linear of"):
        bank.add(bad)
    assert list(bank) == ["a", "b"]
    for name, wanted in before.items():
        assert torch.equal(logits(bank, name), wanted)
    assert bank["a"] is not bad


def test_training_writes_into_a_copy_of_the_adapter(base: Base) -> None:
    bank = Bank(base)
    adapter = strong(base, "a")
    kept = {k: (a.clone(), b.clone()) for k, (a, b) in adapter.weights.items()}
    parameters = bank.add(adapter, trainable=True)
    with torch.no_grad():
        for p in parameters:
            p.add_(1.0)
    for linear, (a, b) in bank.weights("a").items():
        assert torch.equal(adapter.weights[linear][0], kept[linear][0])
        assert torch.equal(a, kept[linear][0] + 1)
        assert torch.equal(b, kept[linear][1] + 1)


def test_an_unknown_name_suggests_a_similar_one(bank: Bank) -> None:
    bank.add(strong(bank.base, "medical"))
    with pytest.raises(UsageError, match="Did you mean 'medical'"):
        bank["medcal"]


def test_a_gated_mlp_keeps_its_factors_alone_and_has_the_same_gradients(base: Base) -> None:
    bank = Bank(base)
    parameters = bank.add(strong(base, "a"), trainable=True)
    mlp = base.model.get_submodule("model.layers.0.mlp")
    kept: list[dict[int, int]] = []
    gradients = []
    for wrapped in (True, False):
        if not wrapped:
            for layer in base.model.model.layers:
                del layer.mlp.forward
        kept.append({})

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[-1][storage.data_ptr()] = storage.nbytes()
            return tensor

        x = torch.randn(2, 9, mlp.gate_proj.in_features, generator=torch.manual_seed(1))
        with bank.routed("a"), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            out = mlp(x.requires_grad_())
        found = torch.autograd.grad(out.square().sum(), [x, *parameters], allow_unused=True)
        gradients.append([gradient for gradient in found if gradient is not None])
    assert len(gradients[0]) == 1 + 2 * 3
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=1e-6)
    inner = 2 * 9 * mlp.gate_proj.out_features * 4
    assert sum(kept[1].values()) - sum(kept[0].values()) >= 2 * inner


def test_a_gated_mlp_can_be_pickled_and_one_without_source_is_left(
    base: Base, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Bank(base).add(strong(base, "a"))
    mlp = base.model.get_submodule("model.layers.0.mlp")
    assert "forward" in vars(mlp)
    x = torch.randn(2, 3, mlp.gate_proj.in_features)
    assert torch.equal(pickle.loads(pickle.dumps(mlp))(x), mlp(x))

    def no_source(_: object) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    other = base_on(tiny_base)
    Bank(other).add(strong(other, "a"))
    assert "forward" not in vars(other.model.get_submodule("model.layers.0.mlp"))
