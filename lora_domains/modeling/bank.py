"""Adapters resident on one base: chosen per call and per row, within a budget of slots."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_domains.adapters.peft import Adapter
from lora_domains.errors import AdapterError, UsageError, did_you_mean
from lora_domains.modeling.base import Base
from lora_domains.modeling.lora import Resident, Shape, Slot, flatten, frozen, trained, wider
from lora_domains.modeling.routing import (
    Mixed,
    Route,
    Single,
    current_route,
    entered,
    features,
    mixed,
    route_linears,
)

Domains = str | None | Sequence[str | None]
"""One adapter for a whole call, or one for each row; None is the base."""


@dataclass
class _Entry:
    """An adapter, its tensors in host memory, and what serves it while it holds a slot."""

    adapter: Adapter
    flat: Tensor | None
    """None for a trainable adapter, which is never evicted."""
    resident: Resident | None


class Bank:
    """The adapters that can be routed to on ``base``; iterating gives their names.

    ``slots`` is how many may lie on the base's device; the least recently used of more wait in host
    memory and come back when they are called. Calls in flight hold what they use: one call over
    more adapters than slots takes what it needs for as long as it runs.
    """

    def __init__(self, base: Base, slots: int | None = None) -> None:
        if slots is not None and slots < 1:
            raise UsageError(
                expected="at least one slot",
                found=f"slots={slots}",
                hint="Leave it out for no limit.",
            )
        self.base = base
        self.budget = slots
        self._entries: dict[str, _Entry] = {}
        # The frozen adapters that hold a slot, the least recently used first.
        self._used: OrderedDict[str, None] = OrderedDict()
        # Of each linear that an adapter has touched, the widest so far: what graphs are made for.
        self.shapes: Mapping[str, Shape] = {}
        self._features: dict[str, tuple[int, int]] = {}
        # The last mixed route: calls of the model itself, step by step, gather its rows only once.
        self._last: tuple[tuple[str | None, ...], Mixed] | None = None
        self._lock = threading.RLock()

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, name: str) -> Adapter:
        return self._entry(name).adapter

    @property
    def on_device(self) -> tuple[str, ...]:
        """The frozen adapters that hold a slot, the least recently used first."""
        with self._lock:
            return tuple(self._used)

    # Coming and going

    def add(self, adapter: Adapter, *, trainable: bool = False) -> list[torch.nn.Parameter]:
        """Make ``adapter`` resident under its name, replacing one of that name.

        Returns its parameters where it is ``trainable``. Everything is built and checked before it
        is placed, so that a failure leaves the bank as it was; calls in flight go on with what they
        began with. Raises AdapterError when a tensor does not fit its linear.
        """
        self._check(adapter)
        device = self.base.device
        if trainable:
            dropout = float(adapter.config.lora_dropout)
            slots = trained(adapter.name, adapter.weights, adapter.scales, dropout, device)
            entry = _Entry(adapter, None, slots)
        else:
            flat, weights = _own(adapter, device)
            entry = _Entry(replace(adapter, weights=weights, flat=flat), flat, None)
        with self._lock:
            new = [linear for linear in adapter.weights if linear not in self.shapes]
            route_linears(self.base.model, new)
            wide = {n: wider(self.shapes, n, a, b) for n, (a, b) in adapter.weights.items()}
            if any(self.shapes.get(linear) != shape for linear, shape in wide.items()):
                self.shapes = {**self.shapes, **wide}
            self._forget(adapter.name)
            self._entries[adapter.name] = entry
            self._resident(adapter.name)
        if not trainable:
            return []
        return [p for slot in self.slots(adapter.name).values() for p in slot.parameters()]

    def remove(self, name: str) -> None:
        """Take ``name`` out; raises UsageError when it is not resident."""
        with self._lock:
            self._entry(name)
            self._forget(name)
            del self._entries[name]

    def slots(self, name: str) -> dict[str, Slot]:
        """The slots of the trainable adapter ``name`` by the linear they stand beside."""
        resident = self._entry(name).resident
        pieces = resident.pieces if resident is not None else {}
        return {linear: slot for linear, slot in pieces.items() if isinstance(slot, Slot)}

    def weights(self, name: str) -> dict[str, tuple[Tensor, Tensor]]:
        """A copy of the tensors of ``name``, on the CPU."""
        held = {n: (slot.a, slot.b) for n, slot in self.slots(name).items()}
        return {
            linear: (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
            for linear, (a, b) in (held or self[name].weights).items()
        }

    # Routing

    def routed(self, domains: Domains) -> AbstractContextManager[None]:
        """Serve calls inside by ``domains``; nested, re-entrant, restored on exceptions.

        Raises UsageError, at once, for a name that is not here.
        """
        return entered(self.base.model, self.route(domains), None)

    def current(self) -> Route | None:
        """What serves calls made here; None is the base."""
        return current_route(self.base.model)

    def route(self, domains: Domains) -> Route | None:
        """``domains`` resolved once: the route holds the adapters themselves."""
        if domains is None:
            return None
        with self._lock:
            if isinstance(domains, str):
                return Single(self._resident(domains))
            names = tuple(domains)
            rows = {name: None if name is None else self._resident(name) for name in names}
            if self._last is not None and self._last[0] == names:
                return self._last[1]
            route = mixed([rows[name] for name in names], self.base.device)
            # One beyond the budget holds for this call, and not after it.
            if isinstance(route, Mixed) and not (self.budget and len(rows) > self.budget):
                self._last = (names, route)
            return route

    def parts(self, domains: Sequence[str | None]) -> list[list[int]]:
        """The rows sorted by domain, in as many parts as it takes to need no more than the slots.

        Domains that hold a slot already come first.
        """
        here = set(self.on_device)
        names = sorted(
            dict.fromkeys(domains), key=lambda name: name is not None and name not in here
        )
        size = max(1, self.budget or len(names))
        parts = []
        for start in range(0, len(names), size):
            part = names[start : start + size]
            parts.append([row for name in part for row, of in enumerate(domains) if of == name])
        return parts

    # Inside

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise UsageError(
                expected="a resident adapter",
                found=repr(name),
                hint=did_you_mean(name, self._entries) if self._entries else "None is loaded yet.",
            )
        return entry

    def _resident(self, name: str) -> Resident:
        """``name`` on the device, fetched from host memory if it had to leave."""
        entry = self._entry(name)
        if entry.flat is None:
            assert entry.resident is not None
            return entry.resident
        if entry.resident is None:
            flat = entry.flat.to(self.base.device, non_blocking=True)
            entry.resident = frozen(name, flat, entry.adapter.weights, entry.adapter.scales)
        self._used[name] = None
        self._used.move_to_end(name)
        while self.budget is not None and len(self._used) > self.budget:
            self._entries[next(iter(self._used))].resident = None
            self._used.popitem(last=False)
            self._last = None
        return entry.resident

    def _forget(self, name: str) -> None:
        """Give the slot of ``name`` back; a call in flight keeps what it holds."""
        self._used.pop(name, None)
        self._last = None

    def _check(self, adapter: Adapter) -> None:
        for linear, (a, b) in adapter.weights.items():
            if linear not in self._features:
                self._features[linear] = features(self.base.model.get_submodule(linear))
            if (a.shape[1], b.shape[0]) != self._features[linear] or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    where=f"{adapter.name}, {linear}",
                    expected=f"A and B for a linear of (in, out) = {self._features[linear]}",
                    found=f"A {tuple(a.shape)}, B {tuple(b.shape)}",
                    hint="Load the base this adapter was made on.",
                )


def _own(adapter: Adapter, device: torch.device) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The buffer that ``adapter`` was read into, or copies: nobody else's tensors are served."""
    flat, pinned = adapter.flat, device.type == "cuda"
    if flat is not None and flat.is_pinned() == pinned:
        place = flat.untyped_storage().data_ptr()
        tensors = [tensor for pair in adapter.weights.values() for tensor in pair]
        if all(tensor.untyped_storage().data_ptr() == place for tensor in tensors):
            return flat, adapter.weights
    return flatten(adapter.weights, pinned)
