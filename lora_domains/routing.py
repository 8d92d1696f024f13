"""Which adapter serves a call: a route in a ContextVar, read by every wrapped linear.

``RoutedLinear`` takes the place of a target linear once and keeps that linear untouched inside,
whatever its kind (plain, 8-bit, 4-bit). Switching adapters writes the ContextVar: no module is
visited, nothing flips to train or eval, and two threads with two routes cannot disturb each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_domains.base import ROUTED

_route: ContextVar[str | None] = ContextVar("lora_domains_route", default=None)


def current_route() -> str | None:
    """The adapter that serves calls made here; None is the base."""
    return _route.get()


@contextmanager
def routed(name: str | None) -> Iterator[None]:
    """Serve calls inside by the slot ``name``; nested, re-entrant, restored on exceptions.

    A thread started inside begins with no route (ContextVars are not inherited by threads): enter
    the route in that thread.
    """
    token = _route.set(name)
    try:
        yield
    finally:
        _route.reset(token)


class Slot(nn.Module):
    """One adapter's share of one linear: ``scale · B(A(dropout(x)))``.

    A is (rank, in), B is (out, rank), both kept in float32 as PEFT keeps them, whatever the
    base's precision.
    """

    def __init__(self, a: Tensor, b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(a, requires_grad=False)
        self.b = nn.Parameter(b, requires_grad=False)
        self.scale = scale
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.dtype)
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        # Scaled where it is narrow: rank columns, not the linear's own.
        return F.linear(F.linear(x, self.a) * self.scale, self.b)


class Slots(nn.Module):
    """Slots by adapter name, which may be a word that modules use themselves (``train``)."""

    def __getitem__(self, name: str) -> nn.Module:
        slot = self._modules[f"@{name}"]
        assert slot is not None
        return slot

    def __setitem__(self, name: str, slot: nn.Module) -> None:
        self._modules[f"@{name}"] = slot

    def __delitem__(self, name: str) -> None:
        del self._modules[f"@{name}"]

    def __contains__(self, name: str) -> bool:
        return f"@{name}" in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter([key.removeprefix("@") for key in self._modules])


class RoutedLinear(nn.Module):
    """A linear of the base, and beside it the slots of the adapters that touch it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.routed_base = base
        self.lora_slots = Slots()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.routed_base(x)
        name = _route.get()
        if name is None or name not in self.lora_slots:
            return y
        delta: Tensor = self.lora_slots[name](x)
        return y + delta.to(y.dtype)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        # Model code asks linears for their weight (dtype, device); answer with the base's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            found: Tensor | nn.Module = getattr(super().__getattr__(ROUTED), name)
            return found


def route_linears(model: nn.Module, names: list[str]) -> dict[str, RoutedLinear]:
    """Wrap the linears called ``names`` where they are not wrapped yet; all of them by name."""
    found = {}
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = getattr(parent, child)
        if not isinstance(module, RoutedLinear):
            routed_linear = RoutedLinear(module)
            routed_linear.train(module.training)
            setattr(parent, child, routed_linear)
            module = routed_linear
        found[name] = module
    return found


def features(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear of any kind; GPT-2's Conv1D stores its weight transposed."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    return int(weight.shape[0]), int(weight.shape[1])
