"""The base compiled into graphs that take an adapter as an input: another adapter, other values.

A graph serves the base (zeros), one adapter, or one for each row, padded to the largest rank that
the bank has seen for each linear. So it is compiled anew only for what is wider than anything
before.
"""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch

from lora_domains.modeling.bank import Bank
from lora_domains.modeling.lora import LEAD, Piece, Resident, Shape, placed
from lora_domains.modeling.routing import Operands, Route, Single, current_route, traced


class Compiled:
    """What the base's model calls instead of its own forward pass.

    ``options`` are those of ``torch.compile``. A graph is whole or compiling fails: between the
    pieces of a broken one, threads could meet. Threads take turns: guards of torch that two of them
    check at once may fail for no reason, and the graph is compiled again (seen in torch 2.13).
    Adapters in training are served without it.
    """

    def __init__(self, bank: Bank, **options: Any) -> None:
        self.bank = bank
        self.eager = bank.base.model._call_impl
        self._graph = torch.compile(self._traced, fullgraph=True, **options)
        self._turn = Lock()
        # Of each route, with the shapes they were made for; gone when the adapter is.
        self._known: WeakKeyDictionary[object, tuple[object, Mapping[str, Operands]]]
        self._known = WeakKeyDictionary()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        route = current_route(self.bank.base.model)
        if route is not None and route.trainable:
            return self.eager(*args, **kwargs)
        with self._turn:
            return self._graph(self.operands(route), args, kwargs)

    def _traced(self, operands: Mapping[str, Operands], args: Any, kwargs: Any) -> Any:
        traced.operands = operands
        out = self.eager(*args, **kwargs)
        traced.operands = None
        return out

    def operands(self, route: Route | None) -> Mapping[str, Operands]:
        """The tensors of ``route`` for every linear that any adapter has touched."""
        shapes = self.bank.shapes
        # A route of one adapter is made for each call; the adapter is what stays.
        key = self if route is None else route.resident if isinstance(route, Single) else route
        made_for, operands = self._known.get(key, (None, {}))
        if made_for is not shapes:
            rows = (None,) if route is None else route.rows
            device = self.bank.base.device
            operands = {n: _padded(rows, n, shape, device) for n, shape in shapes.items()}
            self._known[key] = (shapes, operands)
        return operands


def _padded(
    rows: Sequence[Resident | None], linear: str, shape: Shape, device: torch.device
) -> Operands:
    """Each row's share of ``linear``. Every tensor is its own: shared ones would be compiled in."""
    pieces = [None if row is None else row.pieces.get(linear) for row in rows]
    scale = torch.zeros(len(rows), 1, 1)
    for row, piece in enumerate(pieces):
        scale[row] = 0.0 if piece is None else piece.scale
    scale = scale.to(device)
    first = pieces[0]
    if len(rows) == 1 and isinstance(first, Piece) and first.rank == shape.rank:
        a, b = (placed(t, int(t.storage_offset()), 1, *t.shape) for t in (first.own_a, first.b))
        return Operands(a, b, scale)
    a = _zeros(len(rows), shape.rank, shape.inputs, device)
    b = _zeros(len(rows), shape.outputs, shape.rank, device)
    for row, piece in enumerate(pieces):
        if isinstance(piece, Piece):
            a[row, : piece.rank] = piece.own_a
            b[row, :, : piece.rank] = piece.b
    return Operands(a, b, scale)


def _zeros(rows: int, height: int, width: int, device: torch.device) -> torch.Tensor:
    """As far into its buffer as the views of an adapter are into theirs, or it would compile."""
    room = torch.zeros(LEAD + rows * height * width, device=device)
    return placed(room, LEAD, rows, height, width)
