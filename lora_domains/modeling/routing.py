"""Which adapter serves which row of a call: a route in a ContextVar, read by every wrapped linear.

``RoutedLinear`` takes the place of a target linear once and keeps that linear untouched inside,
whatever its kind (plain, 8-bit, 4-bit). Switching adapters writes the ContextVar: no module is
visited, nothing flips to train or eval, and two threads with two routes cannot disturb each other.

A route holds the adapters it needs, not their names: what is unloaded, reloaded or evicted while a
call runs stays alive until that call is over.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_domains.errors import UsageError
from lora_domains.modeling.base import ROUTED
from lora_domains.modeling.lora import Piece, Resident, Shape, Slot, Stacked, group_of, stack, wider

T = TypeVar("T")

FEW = 8
"""Tokens per row (beams included) up to which the rows' adapters run as one batched product, as in
decoding; above it each adapter runs over its own rows."""


# ── The route of one call ───────────────────────────────────────────────────────────────────────


class Single:
    """One adapter for every row."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.rows = (resident,)
        self.trainable = resident.trainable
        self._shared: tuple[Tensor | None, str, Any] = (None, "", None)

    @property
    def domains(self) -> tuple[str | None, ...]:
        return (self.resident.name,)

    def serve(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (…, out), the base's answer to ``x`` (…, in), with the adapter's share added."""
        piece = self.resident.pieces.get(linear)
        if piece is None:
            return y
        if isinstance(piece, Slot):
            delta: Tensor = piece(x)
            return y + delta.to(y.dtype)
        # One product serves the linears that are given this very tensor. Another thread on the
        # same route can only make both compute anew, since the entry is replaced whole.
        source, group, low = self._shared
        if source is not x or group != piece.group:
            low = _down(piece, x)
            self._shared = (x, piece.group, low)
        return _up(piece, low, y)


class Mixed:
    """An adapter, or the base (None), for each row.

    A batch of a multiple of the rows is each row repeated in its place, as beams and several
    return sequences are made.
    """

    def __init__(self, rows: Sequence[Resident | None], device: torch.device) -> None:
        self.rows = tuple(rows)
        self.device = device
        self._rows_of: dict[Resident, list[int]] = {}
        for index, resident in enumerate(self.rows):
            if resident is not None:
                self._rows_of.setdefault(resident, []).append(index)
        self.trainable = any(resident.trainable for resident in self._rows_of)
        self._indices = {r: _index(rows, device) for r, rows in self._rows_of.items()}
        self._blocks = _blocks(list(self._rows_of.values()), len(self.rows), device)
        # Kept as long as the route, so across the steps of decoding.
        self._stacked: dict[str, Stacked | None] = {}
        self._shared: tuple[Tensor | None, object, Any] = (None, None, None)

    @property
    def domains(self) -> tuple[str | None, ...]:
        return tuple(None if row is None else row.name for row in self.rows)

    def serve(self, linear: str, x: Tensor, y: Tensor) -> Tensor:
        """``y`` (rows · n, …, out), with each row's own adapter added to it."""
        count = len(self.rows)
        if x.shape[0] % count:
            raise UsageError(
                expected=f"a batch of {count} rows, or of a multiple, for {count} domains",
                found=f"{x.shape[0]} rows",
                hint="Give one domain for each row.",
            )
        # (rows, tokens, width): the tokens of a row and of its beams lie one after the other.
        x_rows, y_rows = (part.reshape(count, -1, part.shape[-1]) for part in (x, y))
        together = x_rows.shape[1] <= FEW and not self.trainable
        serve = self._together if together else self._one_by_one
        return serve(linear, x, x_rows, y_rows).view(y.shape)

    def _one_by_one(self, linear: str, x: Tensor, x_rows: Tensor, y_rows: Tensor) -> Tensor:
        """Each adapter over its own rows."""
        source, kind, lows = self._shared
        if source is not x or kind is not Mixed:
            lows = {}
            self._shared = (x, Mixed, lows)
        for resident, index in self._indices.items():
            piece = resident.pieces.get(linear)
            if piece is None:
                continue
            if isinstance(piece, Slot):
                delta = piece(x_rows[index]).to(y_rows.dtype)
                whole = torch.tensor(self._rows_of[resident], device=self.device)
                y_rows = y_rows.index_add(0, whole, delta)
                continue
            key = (resident, piece.group)
            if key not in lows:
                lows[key] = _down(piece, x_rows[index])
            part = _up(piece, lows[key], y_rows[index])
            if not isinstance(index, slice):
                y_rows[index] = part  # what a list of rows picks is a copy; a slice is a view
        return y_rows

    def _together(self, linear: str, x: Tensor, x_rows: Tensor, y_rows: Tensor) -> Tensor:
        """All adapters as one batched product over blocks of equally many rows, one a adapter."""
        if linear not in self._stacked:
            self._stack(linear)
        stacked = self._stacked[linear]
        if stacked is None:
            return y_rows
        blocks = self._blocks
        source, kept, low = self._shared
        if source is not x or kept is not stacked:
            picked = x_rows if blocks is None else x_rows[blocks.rows]
            picked = picked.reshape(len(stacked.a), -1, x.shape[-1]).to(stacked.a.dtype)
            # A from the left: the order in which few tokens are quickest.
            low = (stacked.a @ picked.mT).mul_(stacked.scales).mT.contiguous()
            self._shared = (x, stacked, low)
        start, rank, b = stacked.parts[linear]
        low = low[..., start : start + rank]
        if blocks is not None:
            delta = (low @ b.mT).reshape(len(blocks.rows), *y_rows.shape[1:])
            return y_rows.index_add_(0, blocks.targets, delta[blocks.real].to(y_rows.dtype))
        y_blocks = y_rows.view(len(b), -1, y_rows.shape[-1])
        if y_rows.dtype == b.dtype:
            y_blocks.baddbmm_(low, b.mT)
        else:
            y_blocks.add_(low @ b.mT)
        return y_rows

    def _stack(self, linear: str) -> None:
        shapes: dict[str, Shape] = {}
        group = group_of(linear)
        for resident in self._rows_of:
            for member in resident.groups.get(group, ()):
                piece = resident.pieces[member]
                shapes[member] = wider(shapes, member, piece.a, piece.b)
        stacked = stack(list(self._rows_of), shapes) if shapes else None
        for member in (linear, *shapes):
            self._stacked[member] = stacked if member in shapes else None


Route = Single | Mixed


class _Blocks(NamedTuple):
    """Rows arranged as one block for each adapter, each as long as the longest."""

    rows: Tensor
    """The row in each place; row 0 in places left over."""
    real: Tensor
    """The places that hold a row,"""
    targets: Tensor
    """and the rows they hold."""


def _blocks(rows_of: list[list[int]], count: int, device: torch.device) -> _Blocks | None:
    """None where the rows are such blocks as they stand."""
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


def _down(piece: Piece, x: Tensor) -> Tensor:
    """x (…, in) → (tokens, sum of the ranks of the group)."""
    return x.reshape(-1, x.shape[-1]).to(piece.a.dtype) @ piece.a.t()


def _up(piece: Piece, low: Tensor, y: Tensor) -> Tensor:
    """``y`` (…, out), with the adapter's share added to it, in place."""
    low = low[:, piece.start : piece.start + piece.rank]
    if y.dtype == piece.b.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(low, piece.b.t(), alpha=piece.scale)
        return y
    return y.add_((low @ piece.b.t()).view(y.shape), alpha=piece.scale)


# ── The current route ───────────────────────────────────────────────────────────────────────────

# By model, so that a route on one model leaves calls of another alone.
_routes: ContextVar[Mapping[int, Route | None]] = ContextVar("lora_domains_routes", default={})  # noqa: B039 (never written to)


def current_route(model: nn.Module) -> Route | None:
    """What serves calls of ``model`` made here; None is the base."""
    return _routes.get().get(id(model))


class entered(AbstractContextManager[T]):  # noqa: N801 (called like the functions of contextlib)
    """Serve calls of ``model`` inside by ``route``, once; nests, and is restored on exceptions.

    Gives ``value``. A thread started inside begins at the base (ContextVars are not inherited by
    threads): enter the route in that thread, or run it in ``contextvars.copy_context()``. Raises
    UsageError where blocks are left in another order than they were entered, which only a generator
    can do.
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
    """The current route for a batch of ``rows`` out of those it was made for."""
    route = current_route(model)
    if isinstance(route, Mixed):
        route = mixed([route.rows[row] for row in rows], route.device)
    return entered(model, route, None)


def mixed(rows: Sequence[Resident | None], device: torch.device) -> Route | None:
    """The simplest route that serves each row by its adapter."""
    if len(set(rows)) == 1:
        return None if rows[0] is None else Single(rows[0])
    return Mixed(rows, device)


# ── Inside a compiled graph ─────────────────────────────────────────────────────────────────────


class Operands(NamedTuple):
    """One linear's share of a route as tensors alone: other adapters are other values."""

    a: Tensor
    """(1 or rows, rank, in)."""
    b: Tensor
    """(1 or rows, out, rank)."""
    scale: Tensor
    """(1 or rows, 1, 1)."""


class Traced:
    """What a graph is traced with. Reading a ContextVar inside would break the graph.

    The compiled function sets ``operands`` to its own argument before the model runs, so that in
    the graph they are an input, not this object's attribute; threads cannot meet here.
    """

    operands: Mapping[str, Operands] | None = None

    def share(self, linear: str, x: Tensor) -> Tensor:
        """(…, out), for x (rows · n, …, in)."""
        if self.operands is None:
            raise RuntimeError("Compile with DomainModel.compile(), not the base model itself.")
        a, b, scale = self.operands[linear]
        rows = x.reshape(a.shape[0], -1, x.shape[-1]).to(a.dtype)
        return ((rows @ a.mT) * scale @ b.mT).reshape(*x.shape[:-1], b.shape[1])


traced = Traced()


# ── The linears ─────────────────────────────────────────────────────────────────────────────────


class RoutedLinear(nn.Module):
    """A linear of the base, to which the current route adds the share of an adapter."""

    def __init__(self, base: nn.Module, linear: str, model: int) -> None:
        super().__init__()
        self.routed_base = base
        self.linear = linear
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.routed_base(x)
        if torch.compiler.is_compiling():
            return y + traced.share(self.linear, x).to(y.dtype)
        route = _routes.get().get(self.model)
        return y if route is None else route.serve(self.linear, x, y)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Model code asks linears for their weight (dtype, device); answer with the base's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            found: Tensor | nn.Module = getattr(super().__getattr__(ROUTED), name)
            return found


def route_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Wrap the linears called ``names`` where they are not wrapped yet."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = getattr(parent, child)
        if not isinstance(module, RoutedLinear):
            routed_linear = RoutedLinear(module, name, id(model))
            routed_linear.train(module.training)
            setattr(parent, child, routed_linear)


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear of any kind; GPT-2's Conv1D stores its weight transposed."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0]), int(weight.shape[1])
