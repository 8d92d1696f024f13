"""One adapter in memory: a flat buffer of all its tensors, and for each linear a view of it.

Linears that read the same input (q, k and v; gate and up) have their A side by side in the buffer,
so that one product serves them all. The buffer is float32 whatever the base's precision, as PEFT
keeps it: on a CPU, small bfloat16 products are slower too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Mapping[str, tuple[Tensor, Tensor]]
"""A linear's name → A (rank, in), B (out, rank)."""

# Children of one module that are given the same input, in Llama and its kin, BERT, DistilBERT.
# Only speed hangs on this: a linear whose input is another tensor computes its own product.
SHARING = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
)


def group_of(linear: str) -> str:
    """The name shared by ``linear`` and those that read its input; its own name if there is none.

    >>> group_of("layers.0.self_attn.v_proj")
    'layers.0.self_attn.q_proj'
    """
    parent, dot, child = linear.rpartition(".")
    first = next((names[0] for names in SHARING if child in names), child)
    return f"{parent}{dot}{first}"


def grouped(linears: Iterable[str]) -> dict[str, list[str]]:
    """``linears`` by their group, in the order given."""
    found: dict[str, list[str]] = {}
    for linear in linears:
        found.setdefault(group_of(linear), []).append(linear)
    return found


class Piece(NamedTuple):
    """One adapter's share of one linear: ``scale · B(A(x))``, as views of the flat buffer."""

    group: str
    a: Tensor
    """(sum of the ranks in the group, in)."""
    start: int
    """The first of this linear's rows in ``a``."""
    rank: int
    b: Tensor
    """(out, rank)."""
    scale: float

    @property
    def own_a(self) -> Tensor:
        """(rank, in): this linear's rows of ``a``."""
        return self.a.narrow(0, self.start, self.rank)


class Slot(nn.Module):
    """One adapter's share of one linear while it is trained: its parameters are ``a`` and ``b``."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(b)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        # Scaled where it is narrow: rank columns, not the linear's own.
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter that calls can be routed to; calls in flight keep it alive by holding it."""

    name: str
    pieces: Mapping[str, Piece | Slot]
    groups: Mapping[str, list[str]]
    trainable: bool = False


LEAD = 16
"""Numbers left free at the start of a buffer: torch.compile sets offsets 0 and 1 apart."""


def placed(buffer: Tensor, offset: int, *shape: int) -> Tensor:
    """A tensor of ``shape`` that lies in ``buffer``.

    It is no view to autograd: torch.compile would compile the shapes of a view's base in.
    """
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return buffer.new_empty(0).set_(buffer.untyped_storage(), offset, shape, strides)


def flatten(
    weights: Weights, pinned: bool = False
) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """All tensors copied into one float32 buffer on the CPU; the buffer, and the same as views.

    Group by group: every A of the group, then every B. ``pinned`` memory is quick to copy to CUDA.
    """
    size = LEAD + sum(a.numel() + b.numel() for a, b in weights.values())
    flat = torch.empty(size, dtype=torch.float32, pin_memory=pinned)
    shapes = {linear: (a.shape, b.shape) for linear, (a, b) in weights.items()}
    views = _views(flat, shapes)
    for linear, (a, b) in weights.items():
        views[linear][0].copy_(a)
        views[linear][1].copy_(b)
    return flat, {linear: views[linear] for linear in weights}


def frozen(name: str, flat: Tensor, like: Weights, scales: Mapping[str, float]) -> Resident:
    """The adapter in ``flat``, a buffer that ``flatten`` made, on any device.

    ``like`` gives the shapes, in the order of ``flatten``.
    """
    shapes = {linear: (a.shape, b.shape) for linear, (a, b) in like.items()}
    views, groups = _views(flat, shapes), grouped(like)
    pieces: dict[str, Piece | Slot] = {}
    for group, linears in groups.items():
        firsts = [views[linear][0] for linear in linears]
        ranks, inputs = [a.shape[0] for a in firsts], firsts[0].shape[1]
        a = placed(flat, int(firsts[0].storage_offset()), sum(ranks), inputs)
        start = 0
        for linear, rank in zip(linears, ranks, strict=True):
            pieces[linear] = Piece(group, a, start, rank, views[linear][1], scales[linear])
            start += rank
    return Resident(name, pieces, groups)


class Shape(NamedTuple):
    """Room for any of several adapters beside one linear."""

    rank: int
    inputs: int
    outputs: int


def wider(shapes: Mapping[str, Shape], linear: str, a: Tensor, b: Tensor) -> Shape:
    """The shape of ``linear`` in ``shapes``, with room for A and B (grouped or not) too."""
    rank = max(b.shape[1], shapes[linear].rank if linear in shapes else 0)
    return Shape(rank, a.shape[1], b.shape[0])


class Stacked(NamedTuple):
    """One group of linears for several adapters; smaller ranks are padded with zeros."""

    a: Tensor
    """(adapters, sum of ranks, in)."""
    scales: Tensor
    """(adapters, sum of ranks, 1), for the products of ``a``."""
    parts: Mapping[str, tuple[int, int, Tensor]]
    """A linear → its first row in ``a``, its rank, and B (adapters, out, rank)."""


def stack(residents: Sequence[Resident | None], shapes: Mapping[str, Shape]) -> Stacked:
    """The frozen ``residents`` (None is the base: zeros) side by side, over one group of linears.

    ``shapes`` names the linears, with the largest rank of any of the adapters.
    """
    pieces = {linear: [_piece(r, linear) for r in residents] for linear in shapes}
    like = next(p for of_linear in pieces.values() for p in of_linear if p is not None)
    width = sum(shape.rank for shape in shapes.values())
    a = like.a.new_empty(len(residents), width, like.a.shape[1])
    scales = torch.zeros(len(residents), width, 1)
    parts, start = {}, 0
    for linear, (rank, _, outputs) in shapes.items():
        b = like.b.new_empty(len(residents), outputs, rank)
        for row, piece in enumerate(pieces[linear]):
            mine = 0 if piece is None else piece.rank
            if piece is not None:
                a[row, start : start + mine] = piece.own_a
                b[row, :, :mine] = piece.b
                scales[row, start : start + mine] = piece.scale
            if mine < rank:
                a[row, start + mine : start + rank] = 0
                b[row, :, mine:] = 0
        parts[linear] = (start, rank, b)
        start += rank
    return Stacked(a, scales.to(like.a.device), parts)


def _piece(resident: Resident | None, linear: str) -> Piece | None:
    piece = None if resident is None else resident.pieces.get(linear)
    assert not isinstance(piece, Slot), "trainable adapters are not stacked"
    return piece


def trained(
    name: str, weights: Weights, scales: Mapping[str, float], dropout: float, device: torch.device
) -> Resident:
    """A trainable copy of an adapter: a slot for each linear."""
    slots: dict[str, Piece | Slot] = {
        linear: Slot(
            a.detach().clone().to(device), b.detach().clone().to(device), scales[linear], dropout
        )
        for linear, (a, b) in weights.items()
    }
    return Resident(name, slots, grouped(weights), trainable=True)


def _views(
    flat: Tensor, shapes: Mapping[str, tuple[torch.Size, torch.Size]]
) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, list[Tensor]] = {linear: [] for linear in shapes}
    offset = LEAD
    for linears in grouped(shapes).values():
        for part in (0, 1):
            for linear in linears:
                rows, columns = shapes[linear][part]
                found[linear].append(placed(flat, offset, rows, columns))
                offset += rows * columns
    return {linear: (a, b) for linear, (a, b) in found.items()}
