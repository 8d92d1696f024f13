"""The bank: a switch visits no module, an adapter takes its file's size, models are independent."""

from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from support.adapters import TOLERANCE, logits, save, strong, token_ids
from support.device import base_on
from torch import nn

from lora_domains import DomainModel
from lora_domains.adapters import config, peft
from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import UsageError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.lora import (
    FrozenLora,
    TrainableLora,
    flatten,
    group_of,
    load_frozen,
)


@pytest.fixture
def bank(tiny_base: Path) -> Bank:
    bank = Bank(base_on(tiny_base))
    for seed, name in enumerate("ab"):
        bank.add(strong(bank.base, name, seed))
    return bank


@pytest.mark.contract
def test_a_switch_visits_no_module_and_changes_no_flag(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(bank, "a")
    model = bank.base.model
    flags = [(m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()]

    def visited(*_: object, **__: object) -> Any:
        raise AssertionError("a module was visited")

    with monkeypatch.context() as patch:
        for method in ("modules", "named_modules", "children", "parameters", "train", "apply",
                       "requires_grad_", "__setattr__", "get_submodule"):  # fmt: skip
            patch.setattr(nn.Module, method, visited)
        entered = bank.routed("a")
        entered.__enter__()
    assert torch.equal(model(input_ids=token_ids()).logits, wanted)
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__setattr__", visited)
        patch.setattr(nn.Module, "named_modules", visited)
        entered.__exit__(None, None, None)
    assert flags == [
        (m.training, *(p.requires_grad for p in m.parameters())) for m in model.modules()
    ]


def test_an_adapter_takes_as_much_memory_as_its_file(tmp_path: Path) -> None:
    base = base_on(make_base(tmp_path / "base", hidden_size=128, intermediate_size=256))
    folder = save(tmp_path / "a", strong(base, "a", rank=16), base)
    bank = Bank(base)
    bank.add(load_adapter(folder, base))
    with bank.routed("a"):
        route = bank.current()
    assert route is not None
    assert route.rows[0] is not None
    weights = route.rows[0].weights
    held = [t for w in weights.values() if isinstance(w, FrozenLora) for t in (w.a, w.b)]
    held += [t for pair in bank["a"].weights.values() for t in pair]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert size > 100_000
    assert sum(storages.values()) <= 1.05 * size
    assert len(held) == 4 * len(weights)


def test_linears_that_share_an_input_share_a_product(bank: Bank) -> None:
    layer = "model.layers.1.self_attn."
    assert group_of(layer + "k_proj", 8) == group_of(layer + "v_proj", 8) == layer + "q_proj (8)"
    assert group_of("lm_head", 8) == "lm_head (8)"
    with bank.routed("a"):
        route = bank.current()
    assert route is not None
    assert route.rows[0] is not None
    group = [route.rows[0].weights[layer + name] for name in ("q_proj", "k_proj", "v_proj")]
    assert all(isinstance(w, FrozenLora) and w.a is group[0].a for w in group)
    for name, lora in zip("qkv", group, strict=True):
        assert isinstance(lora, FrozenLora)
        assert torch.equal(lora.own_a, bank["a"].weights[f"{layer}{name}_proj"][0])
    starts = [t.storage_offset() for pair in bank["a"].weights.values() for t in pair]
    assert min(starts) == 0
    assert len(set(starts)) == len(starts)


def test_linears_of_one_name_and_other_widths_keep_their_weights() -> None:
    """As in RWKV, whose feed-forward has a "key" and a "value" of different inputs."""
    weights = {
        f"ffn.{name}": (torch.randn(3, inputs), torch.randn(outputs, 3))
        for name, inputs, outputs in (("key", 4, 16), ("value", 16, 4), ("query", 4, 4))
    }
    flat, views = flatten(weights)
    loaded = load_frozen("a", flat, views, dict.fromkeys(weights, 1.0))
    for linear, (a, b) in weights.items():
        lora = loaded.weights[linear]
        assert isinstance(lora, FrozenLora)
        assert torch.equal(views[linear][0], a)
        assert torch.equal(lora.own_a, a)
        assert torch.equal(lora.b, b)


def test_another_input_of_the_same_shape_gets_its_own_product(bank: Bank) -> None:
    """Only the same tensor is shared: equal shapes, or the same memory later, are not enough."""
    attention = bank.base.model.get_submodule("model.layers.0.self_attn")
    with torch.no_grad(), bank.routed("a"):
        for _ in range(3):
            x, other = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
            attention.q_proj(x)
            a, b = bank["a"].weights["model.layers.0.self_attn.k_proj"]
            scale = bank["a"].scales["model.layers.0.self_attn.k_proj"]
            wanted = attention.k_proj.routed_base(other) + scale * (other @ a.T @ b.T)
            torch.testing.assert_close(attention.k_proj(other), wanted, atol=TOLERANCE, rtol=0)
            del x, other


def test_routes_of_two_models_are_independent(bank: Bank, tmp_path: Path) -> None:
    other = Bank(base_on(make_base(tmp_path / "other", seed=5)))
    other.add(strong(other.base, "a", 7))
    ours, theirs, bare = logits(bank, "a"), logits(other, "a"), logits(other)
    with torch.no_grad(), bank.routed("a"):
        assert torch.equal(other.base.model(input_ids=token_ids()).logits, bare)
        with other.routed("a"):
            assert torch.equal(bank.base.model(input_ids=token_ids()).logits, ours)
            assert torch.equal(other.base.model(input_ids=token_ids()).logits, theirs)
        assert other.current() is None


def test_using_held_across_a_yield_is_refused_when_blocks_interleave(bank: Bank) -> None:
    model = DomainModel(bank.base)
    model.bank = bank

    def held(name: str) -> Iterator[None]:
        with model.using(name):
            yield

    def mixed_up() -> None:
        one, other = held("a"), held("b")
        next(one)
        next(other)
        with pytest.raises(UsageError, match="held across a `yield`"):
            list(one)
        other.close()

    copy_context().run(mixed_up)  # the routes that these generators leave stay in this context


def test_autocast_gives_the_same_outputs(bank: Bank) -> None:
    ids = token_ids()[:, :5]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with bank.routed("a"):
            alone = bank.base.model(input_ids=ids).logits
        with bank.routed(["a", None]):
            mixed = bank.base.model(input_ids=ids).logits
        bare = bank.base.model(input_ids=ids).logits
    effect = (alone - bare).abs().max()
    assert effect > 0.5
    assert (mixed[0] - alone[0]).abs().max() < 0.1 * effect
    assert (mixed[1] - bare[1]).abs().max() < 0.1 * effect


def test_the_tensors_of_the_last_few_configs_are_cached(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_on(tiny_base)
    folders = [
        save(tmp_path / f"a{rank}", strong(base, f"a{rank}", rank=rank), base) for rank in (2, 3, 5)
    ]
    built: list[object] = []
    skeleton = peft.skeleton
    monkeypatch.setattr(peft, "skeleton", lambda *args: (built.append(args), skeleton(*args))[1])
    monkeypatch.setattr(config, "CACHED", 2)
    for folder in (folders[0], folders[0], folders[1], folders[0]):
        load_adapter(folder, base)
    assert len(built) == 2
    load_adapter(folders[2], base)
    assert len(built) == 3
    assert len(base.targets) == 2
    scales = load_adapter(folders[0], base).scales
    scales.clear()
    assert load_adapter(folders[0], base).scales, "an adapter's scales are its own"


def test_the_output_layer_reads_the_last_tokens_of_all_rows_at_once(bank: Bank) -> None:
    """A slice of a tensor would be multiplied row by row."""
    read: list[bool] = []
    layer = bank.base.model.get_output_embeddings()
    hook = layer.register_forward_pre_hook(lambda _, given: read.append(given[0].is_contiguous()))
    with hook, torch.no_grad():
        kept = bank.base.model(input_ids=token_ids(), logits_to_keep=2).logits
    whole = bank.base.model(input_ids=token_ids()).logits
    assert read == [True]
    torch.testing.assert_close(kept, whole[:, -2:])


class Reshaped(torch.autograd.Function):
    """A product whose result is a view made without gradients, as of bitsandbytes in 8 bits."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return (x.flatten(0, 1) @ weight).view(*x.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] @ ctx.saved_tensors[0].T, None


@pytest.mark.parametrize("view", [False, True], ids=["whole", "view"])
def test_a_product_in_training_is_added_in_place_where_gradients_allow(view: bool) -> None:
    torch.manual_seed(0)
    lora = TrainableLora(torch.randn(2, 5), torch.randn(3, 2), 0.5)
    x, weight = torch.randn(4, 6, 5, requires_grad=True), torch.randn(5, 3)
    expected = x @ weight + (x @ lora.a.T) @ lora.b.T * 0.5
    expected.square().sum().backward()
    wanted = [part.grad for part in (x, lora.a, lora.b)]
    x.grad = lora.a.grad = lora.b.grad = None

    y = Reshaped.apply(x, weight) if view else x @ weight  # type: ignore[no-untyped-call]
    found = lora(x, y, x.flatten(0, 1) @ lora.a.T)
    found.square().sum().backward()
    assert (found.data_ptr() == y.data_ptr()) != view
    torch.testing.assert_close(found, expected)
    for part, grad in zip((x, lora.a, lora.b), wanted, strict=True):
        torch.testing.assert_close(part.grad, grad)
