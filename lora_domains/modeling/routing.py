"""Which adapter serves which row of a call: a route in a ContextVar, read by every wrapped linear.

``RoutedLinear`` replaces a target linear once and keeps it unchanged inside, whatever its kind
(plain, 8-bit, 4-bit). Switching adapters writes the ContextVar: no module is visited, no train or
eval flag changes, and threads with different routes do not affect each other.

A route holds the adapters themselves, not their names: one that is unloaded, reloaded or evicted
during a call stays in memory until the call ends.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from itertools import groupby
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_domains.errors import UsageError
from lora_domains.modeling.base import ROUTED
from lora_domains.modeling.lora import (
    FrozenLora,
    LoadedAdapter,
    StackedLora,
    TrainableLora,
    add_products,
    group_of,
    stack,
    trained_lows,
)
from lora_domains.modeling.quantization import GATED, GatedLow

T = TypeVar("T")

FEW = 8
"""Tokens per row (beams included) up to which the rows' adapters run as one batched product, as in
decoding; above it each adapter runs over its own rows."""


# ── The route of one call ───────────────────────────────────────────────────────────────────────


class Single:
    """One adapter for every row."""

    def __init__(self, adapter: LoadedAdapter) -> None:
        self.adapter = adapter
        self.rows = (adapter,)
        self._shared: tuple[Tensor | None, object, Any] = (None, None, None)

    @property
    def domains(self) -> tuple[str | None, ...]:
        return (self.adapter.name,)

    def release(self) -> None:
        """Forget the activations of the last linear."""
        self._shared = (None, None, None)

    def serve(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """Add the adapter's product to ``y`` (…, out), the base's output for ``x`` (…, in)."""
        lora = self.adapter.weights.get(linear)
        if lora is None:
            return y
        if isinstance(lora, TrainableLora):
            added: Tensor = lora(x, y, self.low(linear, x))
            return added
        # One product of A serves all linears that are given this very tensor. Threads that share
        # a route may compute it twice, but never mix: the entry is replaced as a whole.
        source, group, low = self._shared
        if source is not x or group != lora.group:
            low = _down(lora, x)
            self._shared = (x, lora.group, low)
        return _up(lora, low, y)

    def low(self, linear: str, x: Tensor) -> Tensor | None:
        """(…, rank): ``x`` times A; one product serves all linears that read ``x``. For adapters in
        training that are ``plain``."""
        lora = self.adapter.weights.get(linear)
        if not isinstance(lora, TrainableLora) or not lora.plain:
            return None
        group = self.adapter.siblings(linear)
        if len(group) < 2:
            factors = getattr(x, GATED, None)
            a = lora.a.to(x.dtype)
            if factors is None:
                return F.linear(x, a)
            low: Tensor = GatedLow.apply(x, *factors, a)  # type: ignore[no-untyped-call]
            return low
        source, kept, lows = self._shared
        if source is not x or kept is not group:
            parts = [self.adapter.weights[name].a for name in group]
            low = F.linear(x, torch.cat(parts).to(x.dtype))
            shares = torch.split(low, [len(part) for part in parts], dim=-1)
            lows = dict(zip(group, shares, strict=True))
            self._shared = (x, group, lows)
        product: Tensor = lows[linear]
        return product


class Mixed:
    """An adapter, or the base (None), for each row.

    A batch of k times as many rows has the k copies of each row side by side, as beams and several
    return sequences do.
    """

    def __init__(
        self, rows: Sequence[LoadedAdapter | None], device: torch.device,
        adapters: Sequence[LoadedAdapter] = (),
    ) -> None:  # fmt: skip
        self.rows = tuple(rows)
        self.device = device
        # Those of ``adapters`` come first, in their order; they may have no row.
        self._rows_of: dict[LoadedAdapter, list[int]] = {adapter: [] for adapter in adapters}
        for index, adapter in enumerate(self.rows):
            if adapter is not None:
                self._rows_of.setdefault(adapter, []).append(index)
        self._stackable = not any(a.trainable or a.rescales for a in self._rows_of)
        # In training: how many rows of one adapter, or of the base, follow each other.
        in_training = any(adapter.trainable for adapter in self._rows_of)
        blocks = [(a, len(list(rows))) for a, rows in groupby(self.rows)] if in_training else []
        self._segments = [(Single(a) if a is not None else None, size) for a, size in blocks]
        own = [a for a, _ in blocks if a is not None]
        # Those whose products may be computed as one, and the linears where they cannot be.
        self._alike = own if len(own) == len(blocks) and len({n for _, n in blocks}) == 1 else []
        self._unlike: set[str] = set()
        self._indices = {a: _index(rows, device) for a, rows in self._rows_of.items() if rows}
        self._blocks = _blocks(list(self._rows_of.values()), len(self.rows), device)
        # Kept as long as the route, and so across the steps of decoding.
        self._stacked: dict[str, StackedLora | None] = {}
        self._shared: tuple[Tensor | None, object, Any] = (None, None, None)

    @property
    def domains(self) -> tuple[str | None, ...]:
        return tuple(None if row is None else row.name for row in self.rows)

    def with_rows(self, rows: Sequence[LoadedAdapter | None]) -> "Mixed | None":
        """A route for other ``rows`` that keeps the stacked weights of this one.

        None where they have an adapter that is not stacked here, or less than half of those.
        """
        wanted = {adapter for adapter in rows if adapter is not None}
        if not wanted <= self._rows_of.keys() or 2 * len(wanted) < len(self._rows_of):
            return None
        route = Mixed(rows, self.device, tuple(self._rows_of))
        route._stacked = self._stacked
        return route

    def release(self) -> None:
        """Forget the activations of the last linear."""
        self._shared = (None, None, None)
        for single, _ in self._segments:
            if single is not None:
                single.release()

    def serve(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """Add each row's own adapter to ``y`` (rows · n, …, out)."""
        count = len(self.rows)
        if x.shape[0] % count:
            raise UsageError(
                expected=f"a batch of {count} rows, or of a multiple, for {count} domains",
                found=f"{x.shape[0]} rows",
                hint="Give one domain for each row.",
            )
        if self._stackable and x.numel() <= FEW * count * x.shape[-1]:
            return self._together(linear, x, y)
        # (rows, tokens, width): the tokens of a row's beams follow each other.
        x_rows, y_rows = (part.reshape(count, -1, part.shape[-1]) for part in (x, y))
        serve = self._train if self._segments else self._one_by_one
        return serve(linear, x, y, x_rows, y_rows).view(y.shape)

    def _train(self, linear: str, x: Tensor, y: Tensor, x_rows: Tensor, y_rows: Tensor) -> Tensor:
        """Each adapter over its own rows, with gradients; best where these are side by side."""
        sizes = [size for _, size in self._segments]
        if self._alike and linear not in self._unlike:
            low = self._trained_low(linear, x, x_rows)
            if low is not None:
                b = torch.stack([adapter.weights[linear].b for adapter in self._alike])
                together = y.reshape(len(b), -1, y.shape[-1])
                return torch.baddbmm(together, low.to(y.dtype), b.to(y.dtype).mT)
        source, kind, x_parts = self._shared
        if source is not x or kind is not Mixed:
            x_parts = torch.split(x_rows, sizes)
            split = [torch.split(f.reshape(*x_rows.shape), sizes) for f in getattr(x, GATED, ())]
            for part, *factors in zip(x_parts, *split, strict=False) if split else ():
                setattr(part, GATED, factors)
            self._shared = (x, Mixed, x_parts)
        of = [single and single.adapter.weights.get(linear) for single, _ in self._segments]
        lows = [None if s is None else s.low(linear, part)
                for (s, _), part in zip(self._segments, x_parts, strict=True)]  # fmt: skip
        if all(lora is None or low is not None for lora, low in zip(of, lows, strict=True)):
            return add_products(y, [size * y_rows.shape[1] for size in sizes], of, lows)
        y_parts = list(torch.split(y_rows, sizes))
        for at, (single, _) in enumerate(self._segments):
            if single is not None:
                part = y_parts[at] if single.adapter.trainable else y_parts[at].clone()
                y_parts[at] = single.serve(linear, x_parts[at], part)
        return torch.cat(y_parts)

    def _trained_low(self, linear: str, x: Tensor, x_rows: Tensor) -> Tensor | None:
        """(adapters, tokens, rank): the scaled products with A of all adapters, computed as one;
        None where they cannot be."""
        source, kind, lows = self._shared
        if source is not x or kind is not trained_lows or linear not in lows:
            shape = (len(self._alike), -1, x.shape[-1])
            factors = [f.reshape(shape) for f in getattr(x, GATED, ())]
            lows = trained_lows(x_rows.reshape(shape), factors, self._alike, linear)
            if not lows:
                self._unlike.add(linear)
                return None
            self._shared = (x, trained_lows, lows)
        low: Tensor = lows[linear]
        return low

    def _one_by_one(
        self, linear: str, x: Tensor, y: Tensor, x_rows: Tensor, y_rows: Tensor
    ) -> Tensor:
        """Each adapter over its own rows."""
        source, kind, lows = self._shared
        if source is not x or kind is not Mixed:
            lows = {}
            self._shared = (x, Mixed, lows)
        for adapter, index in self._indices.items():
            lora = adapter.weights.get(linear)
            if lora is None:
                continue
            assert isinstance(lora, FrozenLora), "rows of adapters in training are served otherwise"
            key = (adapter, lora.group)
            if key not in lows:
                lows[key] = _down(lora, x_rows[index])
            part = _up(lora, lows[key], y_rows[index])
            if not isinstance(index, slice):
                y_rows[index] = part  # indexing with a tensor gave a copy, with a slice a view
        return y_rows

    def _together(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """All adapters in one batched product, over one block of rows for each adapter."""
        if linear not in self._stacked:
            stacked = stack(list(self._rows_of), group_of(linear, x.shape[-1]))
            # In one write: other threads share this route and must not see it half made.
            group = dict.fromkeys(stacked.b, stacked) if stacked else {}
            self._stacked |= {linear: None, **group}
        stacked = self._stacked[linear]
        if stacked is None:
            return y
        blocks, count = self._blocks, len(stacked.a)
        source, kept, lows = self._shared
        if source is not x or kept is not stacked:
            rows = x if blocks is None else x.reshape(len(self.rows), -1, x.shape[-1])[blocks.rows]
            picked = rows.reshape(count, -1, x.shape[-1]).to(stacked.a.dtype)
            # With A on the right: for one token each, the other order takes 2 to 3 times as long
            # in MKL on Intel.
            low = torch.bmm(picked, stacked.a.mT).mul_(stacked.scales)
            lows = dict(zip(stacked.b, torch.split(low, stacked.ranks, -1), strict=True))
            self._shared = (x, stacked, lows)
        low, b = lows[linear], stacked.b[linear]
        if blocks is not None:
            delta = torch.bmm(low, b).view(len(blocks.rows), -1, b.shape[-1])[blocks.real]
            y_rows = y.reshape(len(self.rows), -1, b.shape[-1])
            return y_rows.index_add_(0, blocks.targets, delta.to(y.dtype)).view(y.shape)
        y_blocks = y.reshape(count, -1, b.shape[-1])
        if y.dtype == b.dtype:
            y_blocks.baddbmm_(low, b)
        else:
            y_blocks.add_(torch.bmm(low, b))
        return y_blocks.view(y.shape)


Route = Single | Mixed


class _Blocks(NamedTuple):
    """Rows arranged in one block for each adapter, padded to the longest block."""

    rows: Tensor
    """The row in each place; row 0 in the padding."""
    real: Tensor
    """The places that hold a row."""
    targets: Tensor
    """The rows in those places."""


def _blocks(rows_of: list[list[int]], count: int, device: torch.device) -> _Blocks | None:
    """None when the rows already form such blocks."""
    longest = max(map(len, rows_of), default=0)
    places = [row for rows in rows_of for row in rows + [-1] * (longest - len(rows))]
    if places == list(range(count)):
        return None
    at = torch.tensor(places, device=device)
    real = (at >= 0).nonzero().flatten()
    return _Blocks(at.clamp(min=0), real, at[real])


def _index(rows: list[int], device: torch.device) -> slice | Tensor:
    if rows[-1] - rows[0] == len(rows) - 1:
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _down(lora: FrozenLora, x: Tensor) -> Tensor:
    """x (…, in) → (tokens, sum of the ranks of the group)."""
    return x.reshape(-1, x.shape[-1]).to(lora.a.dtype) @ lora.a.t()


def _up(lora: FrozenLora, low: Tensor, y: Tensor) -> Tensor:
    """Add the adapter's product to ``y`` (…, out), in place; ``low`` is that of ``_down``."""
    low = low[:, lora.start : lora.start + lora.rank]
    if y.dtype == lora.b.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(low, lora.b.t(), alpha=lora.scale)
    else:
        y.add_((low @ lora.b.t()).view(y.shape), alpha=lora.scale)
    return y if lora.rescaling is None else y.copy_(lora.rescaling(y))


# ── The current route ───────────────────────────────────────────────────────────────────────────

# By model: a route on one model does not affect calls of another.
_routes: ContextVar[Mapping[int, Route | None]] = ContextVar("lora_domains_routes", default={})  # noqa: B039 (never written to)


def current_route(model: nn.Module) -> Route | None:
    """The route of calls of ``model`` made here; None is the base."""
    return _routes.get().get(id(model))


class entered(AbstractContextManager[T]):  # noqa: N801 (called like the functions of contextlib)
    """Route calls of ``model`` inside by ``route``; blocks nest and can be entered once.

    Entering returns ``value``. A thread started inside uses the base, since threads do not inherit
    ContextVars: enter the route in that thread, or run it in ``contextvars.copy_context()``. Raises
    UsageError when blocks are left in another order than they were entered in, which only a
    generator can do.
    """

    __slots__ = ("_mine", "_model", "_route", "_token", "_value")

    def __init__(self, model: nn.Module, route: Route | None, value: T) -> None:
        self._model, self._route, self._value = id(model), route, value

    def __enter__(self) -> T:
        self._mine = {**_routes.get(), self._model: self._route}
        self._token = _routes.set(self._mine)
        return self._value

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        misplaced = _routes.get() is not self._mine
        _routes.reset(self._token)
        if misplaced and kind is None:
            raise UsageError(
                expected="blocks of `using` left in the order they were entered",
                found="another order: one is held across a `yield`",
                hint="Inside a generator name the domain in each call: domain='legal'.",
            )


def narrowed(model: nn.Module, rows: Sequence[int]) -> AbstractContextManager[None]:
    """Narrow the current route to ``rows`` of those it was made for."""
    route = current_route(model)
    if isinstance(route, Mixed):
        route = mixed([route.rows[row] for row in rows], route.device)
    return entered(model, route, None)


def mixed(rows: Sequence[LoadedAdapter | None], device: torch.device) -> Route | None:
    """The simplest route for an adapter, or the base (None), for each row."""
    if len(set(rows)) == 1:
        return None if rows[0] is None else Single(rows[0])
    return Mixed(rows, device)


# ── The linears ─────────────────────────────────────────────────────────────────────────────────


class RoutedLinear(nn.Module):
    """A linear of the base, to whose output the current route adds that of an adapter."""

    def __init__(self, base: nn.Module, linear: str, model: int) -> None:
        super().__init__()
        self.routed_base = base
        self.linear = linear
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.routed_base(x)
        route = _routes.get().get(self.model)
        return y if route is None else route.serve(self.linear, x, y)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Model code reads a linear's weight (dtype, device): give the base's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            value: Tensor | nn.Module = getattr(super().__getattr__(ROUTED), name)
            return value
