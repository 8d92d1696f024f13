"""An adapter in memory: its LoRA weights and its head, and how the weights lie for serving.

All A and B of an adapter lie in one flat buffer. Linears that read the same input (q, k and v; gate
and up) have their A side by side in it, so that one product serves them all. The buffer is float32
whatever the base's precision, as in PEFT: on a CPU, small bfloat16 products are slower too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_domains.errors import AdapterError
from lora_domains.modeling.base import ROUTED
from lora_domains.modeling.heads import Head
from lora_domains.modeling.quantization import GatedLow, Rescaling, row_lengths
from lora_domains.placement import each_gathered
from lora_domains.report.card import Card

Weights = dict[str, tuple[Tensor, Tensor]]
"""A linear's name → A (rank, in), B (out, rank)."""

Magnitudes = dict[str, Tensor]
"""A linear's name → the lengths (out,) that DoRA gives the rows of its weight W + scale · B·A."""

SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)
"""Children of one module that read the same input, in Llama-like models, BERT and DistilBERT. Only
speed depends on this: a linear that is given another tensor computes its own product."""


@dataclass
class Adapter:
    """LoRA weights for one base, and a trained head where the adapter has one."""

    name: str
    config: Any
    """PEFT's ``LoraConfig``."""
    weights: Weights
    scales: dict[str, float]
    """A linear's name → the factor of B·A."""
    card: Card | None = None
    path: Path | None = None
    notes: tuple[str, ...] = ()
    """Warnings about using it on this base."""
    head: Head | None = None
    flat: Tensor | None = None
    """The buffer of ``flatten`` that ``weights`` are views of, where there is one."""
    magnitudes: Magnitudes = field(default_factory=dict)
    """Of DoRA; empty for plain LoRA."""

    @property
    def folder(self) -> Path:
        """The folder that it was loaded from; raises AdapterError for one that was never saved."""
        if self.path is None:
            raise AdapterError(
                where=self.name,
                expected="an adapter loaded from a folder",
                found="one that was never saved",
                hint="Save it, and load its folder: scores belong to the digest of its files.",
            )
        return self.path


# ── The flat buffer ─────────────────────────────────────────────────────────────────────────────


def group_of(linear: str, inputs: int) -> str:
    """The name shared by ``linear`` and the linears that read the same ``inputs`` columns.

    Often it is its own. Linears of one group may have other names than here, or another width.

    >>> group_of("layers.0.self_attn.v_proj", 64)
    'layers.0.self_attn.q_proj (64)'
    """
    parent, dot, child = linear.rpartition(".")
    first = next((names[0] for names in SHARED_INPUT if child in names), child)
    return f"{parent}{dot}{first} ({inputs})"


def grouped(weights: Weights) -> dict[str, list[str]]:
    """The linears of ``weights`` by their group, in the order given."""
    groups: dict[str, list[str]] = {}
    for linear, (a, _) in weights.items():
        groups.setdefault(group_of(linear, a.shape[1]), []).append(linear)
    return groups


def flatten(weights: Weights, pinned: bool = False) -> tuple[Tensor, Weights]:
    """All tensors copied into one float32 buffer on the CPU; the buffer and the same as views.

    Group by group: every A of the group, then the transpose of every B. A token's product with
    these takes half as long as with B. ``pinned`` memory is quick to copy to CUDA.
    """
    size = sum(a.numel() + b.numel() for a, b in weights.values())
    flat = torch.empty(size, dtype=torch.float32, pin_memory=pinned)
    views = _views(flat, weights, grouped(weights))
    for linear, (a, b) in weights.items():
        views[linear][0].copy_(a)
        views[linear][1].copy_(b)
    return flat, views


def _views(flat: Tensor, weights: Weights, groups: Mapping[str, list[str]]) -> Weights:
    """Views of ``flat`` with the names and shapes of ``weights``, which form ``groups``."""
    places = [
        (linear, part) for linears in groups.values() for part in (0, 1) for linear in linears
    ]
    shapes = [weights[linear][part].shape for linear, part in places]
    parts = torch.split(flat, [shape.numel() for shape in shapes])
    views = {
        (linear, part): flat.view(shape) if part == 0 else flat.view(shape[::-1]).mT
        for (linear, part), shape, flat in zip(places, shapes, parts, strict=True)
    }
    return {linear: (views[linear, 0], views[linear, 1]) for linear in weights}


# ── Serving and training ────────────────────────────────────────────────────────────────────────


class FrozenLora(NamedTuple):
    """The LoRA weights of one linear, ``scale · B(A(x))``, as views of the flat buffer."""

    group: str
    a: Tensor
    """(sum of the ranks in the group, in)."""
    start: int
    """The first of this linear's rows in ``a``."""
    rank: int
    b: Tensor
    """(out, rank)."""
    scale: float
    rescaling: Rescaling | None = None
    """Of DoRA."""

    @property
    def own_a(self) -> Tensor:
        """(rank, in): this linear's rows of ``a``."""
        return self.a.narrow(0, self.start, self.rank)


def rescalings(adapter: Adapter, model: nn.Module, device: torch.device) -> dict[str, Rescaling]:
    """What the magnitudes of ``adapter`` do on ``model``, by linear."""
    found, names = {}, list(adapter.magnitudes)
    linears = [model.get_submodule(name) for name in names]
    inner = each_gathered(getattr(linear, ROUTED, linear) for linear in linears)
    for name, linear in zip(names, inner, strict=True):
        magnitude, (a, b) = adapter.magnitudes[name], adapter.weights[name]
        lengths = row_lengths(linear, a.to(device), b.to(device), adapter.scales[name])
        bias: Any = getattr(linear, "bias", None)
        gain = magnitude.to(device).float() / lengths
        copied = None if bias is None else bias.detach().to(torch.float32, copy=True)
        found[name] = Rescaling(gain, copied)
    return found


class TrainableLora(nn.Module):
    """The LoRA weights of one linear in training: its parameters are ``a`` and ``b``, and with DoRA
    the ``magnitude``."""

    def __init__(
        self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0,
        magnitude: Tensor | None = None, linear: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        # In a tuple: the base's linear is no part of this module, whose parameters are trained.
        self._linear: tuple[Any] = (getattr(linear, ROUTED, linear),)

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def plain(self) -> bool:
        """Whether its product with ``a`` may be computed together with others of the same input:
        without DoRA, and without dropout, which each linear draws for itself."""
        return self.magnitude is None and not (self.training and self.dropout)

    def forward(self, x: Tensor, y: Tensor, low: Tensor | None = None) -> Tensor:
        """``y`` (…, out), the base's output for ``x`` (…, in), with the adapter's.

        ``low`` (tokens, rank) is the product of ``x`` and ``a`` for one that is ``plain``.
        """
        if low is not None:
            # Scaled between the products, where there are rank columns and not out.
            low = (low * self.scale).reshape(-1, low.shape[-1])
            return _added(y, [(0, len(low))], [low.to(y.dtype), self.b.to(y.dtype)])
        dropped = x = x.to(self.a.dtype)
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout)
        delta = F.linear(F.linear(dropped, self.a) * self.scale, self.b)
        if self.magnitude is not None:
            # As in PEFT, the lengths have no gradient, and dropout concerns what is added alone.
            (linear,) = self._linear
            gain = self.magnitude / row_lengths(linear, self.a, self.b, self.scale)
            own = y if dropped is x else linear(dropped.to(y.dtype))
            own = own if linear.bias is None else own - linear.bias
            delta = (gain - 1) * own + gain * delta
        return y + delta.to(y.dtype)


class _Added(torch.autograd.Function):
    """``y`` (…, out) with the products of adapters added in place, without copies."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, places: Sequence[tuple[int, int]], *pairs: Tensor) -> Tensor:
        flat = y.view(-1, y.shape[-1])
        for (start, stop), low, b in zip(places, pairs[::2], pairs[1::2], strict=True):
            flat[start:stop].addmm_(low, b.t())
        ctx.mark_dirty(y)
        ctx.save_for_backward(*pairs)
        ctx.places = places
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        pairs, found = ctx.saved_tensors, []
        flat = grads[0].reshape(-1, grads[0].shape[-1])
        for (start, stop), low, b in zip(ctx.places, pairs[::2], pairs[1::2], strict=True):
            part = flat[start:stop]
            found += [part @ b, part.t() @ low]
        return grads[0], None, *found


def add_products(
    y: Tensor, tokens: Sequence[int], of: Sequence[Any], lows: Sequence[Tensor | None]
) -> Tensor:
    """``y`` (…, out), to whose successive ``tokens`` the products of plain adapters are added.

    ``of`` are their weights of one linear, None for the base; ``lows`` what A gave for their rows.
    """
    places, pairs, start = [], [], 0
    for count, lora, low in zip(tokens, of, lows, strict=True):
        if lora is not None and low is not None:
            places.append((start, start + count))
            # Scaled as in a batch of one adapter, so that both round alike.
            pairs += [(low * lora.scale).reshape(count, -1).to(y.dtype), lora.b.to(y.dtype)]
        start += count
    return _added(y, places, pairs)


def _added(y: Tensor, places: Sequence[tuple[int, int]], pairs: Sequence[Tensor]) -> Tensor:
    """``_Added``, on a copy of a view: autograd cannot follow one that a function made (8 bits)."""
    if y._is_view() or not y.is_contiguous():
        y = y.clone(memory_format=torch.contiguous_format)
    added: Tensor = _Added.apply(y, places, *pairs)  # type: ignore[no-untyped-call]
    return added


def trained_lows(
    x: Tensor, factors: Sequence[Tensor], adapters: Sequence["LoadedAdapter"], linear: str
) -> dict[str, Tensor]:
    """The scaled products of ``x`` (adapters, tokens, in) and A, each (adapters, tokens, rank), by
    the linears that read ``x``, ``linear`` among them; empty where the adapters differ in more than
    their weights. ``factors`` are those of a gated product, or none.
    """
    if any(linear not in adapter.weights for adapter in adapters):
        return {}
    names = adapters[0].siblings(linear)
    every: list[Any] = [adapter.weights.get(name) for adapter in adapters for name in names]
    ranks: list[Any] = [getattr(lora, "rank", None) for lora in every]
    if not all(isinstance(lora, TrainableLora) and lora.plain for lora in every) or (
        any(adapter.siblings(linear) != names for adapter in adapters)
        or ranks != ranks[: len(names)] * len(adapters)
        or len({lora.scale for lora in every}) > 1
    ):
        return {}
    a = torch.cat([lora.a for lora in every]).to(x.dtype).view(len(adapters), -1, x.shape[-1])
    low = GatedLow.apply(x, *factors, a) if factors else x @ a.mT  # type: ignore[no-untyped-call]
    shares = torch.split(low * every[0].scale, ranks[: len(names)], dim=-1)
    return dict(zip(names, shares, strict=True))


@dataclass(frozen=True, eq=False)
class LoadedAdapter:
    """LoRA weights on the base's device; a call in progress keeps them by holding this."""

    name: str
    weights: Mapping[str, FrozenLora | TrainableLora]
    """By linear."""
    groups: Mapping[str, list[str]]
    trainable: bool = False
    rescales: bool = False
    """Whether some of its outputs are rescaled (DoRA)."""

    @cached_property
    def _group_of(self) -> dict[str, list[str]]:
        return {name: names for names in self.groups.values() for name in names}

    def siblings(self, linear: str) -> list[str]:
        """The linears of the group of ``linear``, itself among them."""
        return self._group_of[linear]


def load_frozen(
    name: str, flat: Tensor, weights: Weights, scales: Mapping[str, float],
    rescaled: Mapping[str, Rescaling] | None = None,
) -> LoadedAdapter:  # fmt: skip
    """The adapter in ``flat``, a buffer of ``flatten`` on any device.

    ``weights`` gives the shapes, in the order that ``flatten`` was given; ``rescaled`` the linears
    of DoRA.
    """
    groups = grouped(weights)
    views = _views(flat, weights, groups)
    loaded: dict[str, FrozenLora | TrainableLora] = {}
    for group, linears in groups.items():
        first = views[linears[0]][0]
        ranks, inputs = [views[linear][0].shape[0] for linear in linears], first.shape[1]
        offset, size = int(first.storage_offset()), sum(ranks) * inputs
        a = flat[offset : offset + size].view(sum(ranks), inputs)
        start = 0
        for linear, rank in zip(linears, ranks, strict=True):
            b, rescaling = views[linear][1], (rescaled or {}).get(linear)
            loaded[linear] = FrozenLora(group, a, start, rank, b, scales[linear], rescaling)
            start += rank
    return LoadedAdapter(name, loaded, groups, rescales=bool(rescaled))


def load_trainable(adapter: Adapter, model: nn.Module, device: torch.device) -> LoadedAdapter:
    """A copy of ``adapter`` on ``device``, for ``model``, whose weights are parameters."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device)

    dropout = float(adapter.config.lora_dropout)
    loaded: dict[str, FrozenLora | TrainableLora] = {}
    for name, (a, b) in adapter.weights.items():
        lora = copied(a), copied(b), adapter.scales[name], dropout
        magnitude = adapter.magnitudes.get(name)
        loaded[name] = TrainableLora(*lora) if magnitude is None else TrainableLora(
            *lora, copied(magnitude), model.get_submodule(name)
        )  # fmt: skip
    return LoadedAdapter(adapter.name, loaded, grouped(adapter.weights), trainable=True)


# ── Several adapters in one product ─────────────────────────────────────────────────────────────


class StackedLora(NamedTuple):
    """One group of linears for several adapters; smaller ranks are padded with zeros."""

    a: Tensor
    """(adapters, sum of ranks, in)."""
    scales: Tensor
    """(adapters, 1, sum of ranks), for the products of ``a``."""
    ranks: list[int]
    """Of each linear, in the order of ``b``."""
    b: Mapping[str, Tensor]
    """A linear → the transpose of B, (adapters, rank, out)."""


def stack(adapters: Sequence[LoadedAdapter], group: str) -> StackedLora | None:
    """The frozen ``adapters`` side by side, over one group of linears; None if none has any."""
    linears = dict.fromkeys(n for adapter in adapters for n in adapter.groups.get(group, ()))
    lora = {linear: [_frozen(adapter, linear) for adapter in adapters] for linear in linears}
    if not lora:
        return None
    ranks = {n: max(p.rank for p in of if p is not None) for n, of in lora.items()}
    starts = dict(zip(ranks, accumulate(ranks.values(), initial=0), strict=False))
    scales = torch.zeros(len(adapters), 1, sum(ranks.values()))
    parts = [(p, n, row) for n, of in lora.items() for row, p in enumerate(of) if p is not None]
    for part, linear, row in parts:
        scales[row, :, starts[linear] : starts[linear] + part.rank] = part.scale
    alike = all((part.start, part.rank) == (starts[n], ranks[n]) for part, n, _ in parts)
    if alike and len(parts) == len(lora) * len(adapters):  # whole, as they lie in memory
        first = next(iter(lora.values()))
        a = torch.stack([part.a for part in first if part is not None])
        b = {n: torch.stack([p.b.mT for p in of if p is not None]) for n, of in lora.items()}
        return StackedLora(a, scales.to(a.device), list(ranks.values()), b)
    like = parts[0][0]
    a = like.a.new_zeros(len(adapters), sum(ranks.values()), like.a.shape[1])
    outputs = {linear: len(part.b) for part, linear, _ in parts}
    b = {n: like.b.new_zeros(len(adapters), rank, outputs[n]) for n, rank in ranks.items()}
    for part, linear, row in parts:
        a[row, starts[linear] : starts[linear] + part.rank] = part.own_a
        b[linear][row, : part.rank] = part.b.mT
    return StackedLora(a, scales.to(a.device), list(ranks.values()), b)


def _frozen(adapter: LoadedAdapter, linear: str) -> FrozenLora | None:
    lora = adapter.weights.get(linear)
    if isinstance(lora, TrainableLora):
        raise TypeError(f"{adapter.name} is in training: trainable adapters are not stacked")
    return lora
