"""The bank: adapters loaded on one base and chosen per call and per row."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_domains.errors import AdapterError, UsageError, did_you_mean, listed
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import SHARED_POSITIONS
from lora_domains.modeling.lora import (
    Adapter,
    LoadedAdapter,
    Magnitudes,
    TrainableLora,
    Weights,
    flatten,
    load_frozen,
    load_trainable,
    rescalings,
)
from lora_domains.modeling.quantization import Rescaling, recompute_gate
from lora_domains.modeling.routing import (
    Mixed,
    Route,
    RoutedLinear,
    Single,
    current_route,
    entered,
    mixed,
)
from lora_domains.placement import output_layer

Domains = str | None | Sequence[str | None]
"""One adapter for a whole call, or one for each row; None is the base."""


@dataclass
class _Entry:
    """An adapter, its tensors in host memory, and on the device while it holds a slot."""

    adapter: Adapter
    flat: Tensor | None
    """None for a trainable adapter, which is never evicted."""
    loaded: LoadedAdapter | None
    rescalings: dict[str, Rescaling] = field(default_factory=dict)
    """Of DoRA, on the device."""


class Bank:
    """The adapters that can be routed to on ``base``; iterating gives their names.

    ``slots`` limits how many frozen adapters are on the base's device; the least recently used of
    more are kept in host memory and return when they are called. A call over more adapters than
    slots exceeds the limit while it runs.
    """

    def __init__(self, base: Base, slots: int | None = None) -> None:
        if slots is not None and slots < 1:
            raise UsageError(
                expected="at least one adapter on the device",
                found=f"slots={slots}",
                hint="Leave it out for no limit.",
            )
        self.base = base
        self.slots = slots
        self._entries: dict[str, _Entry] = {}
        # Frozen adapters on the device, the least recently used first.
        self._used: OrderedDict[str, None] = OrderedDict()
        # (in, out) of each linear that an adapter was ever loaded for; these are wrapped.
        self._sizes: dict[str, tuple[int, int]] = {}
        # The last mixed routes: token-by-token calls of the model gather their weights only once.
        # Two on a CPU, where gathering takes as long as a step, for batches that take turns.
        self._last: OrderedDict[tuple[str | None, ...], Mixed] = OrderedDict()
        self._kept = 2 if base.device.type == "cpu" else 1
        self._lock = threading.RLock()
        watch_calls(base.model)
        read_rows_at_once(base.model)

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
        """The frozen adapters on the device, the least recently used first."""
        with self._lock:
            return tuple(self._used)

    # Loading and removing

    def add(self, adapter: Adapter, *, trainable: bool = False) -> list[torch.nn.Parameter]:
        """Load ``adapter`` under its name, replacing an adapter of that name.

        Returns its parameters if it is ``trainable``, otherwise none. A failure leaves the bank
        unchanged; calls in progress keep the adapter that they began with. Raises AdapterError when
        a tensor does not fit its linear.
        """
        sizes = self._checked_sizes(adapter)
        device = self.base.device
        if trainable:
            entry = _Entry(adapter, None, load_trainable(adapter, self.base.model, device))
        else:
            flat, weights = _own(adapter, device)
            found = rescalings(adapter, self.base.model, device)
            entry = _Entry(replace(adapter, weights=weights, flat=flat), flat, None, found)
        with self._lock:
            route_linears(self.base.model, [n for n in sizes if n not in self._sizes])
            self._sizes |= sizes
            self._free_slot(adapter.name)
            self._entries[adapter.name] = entry
            self._load(adapter.name)
        if not trainable:
            return []
        return [p for lora in self.trainable(adapter.name).values() for p in lora.parameters()]

    def remove(self, name: str) -> None:
        """Remove ``name``; raises UsageError when it is not loaded."""
        with self._lock:
            self._entry(name)
            self._free_slot(name)
            del self._entries[name]

    def trainable(self, name: str) -> dict[str, TrainableLora]:
        """The weights of ``name`` by linear if it is trainable, otherwise none."""
        loaded = self._entry(name).loaded
        weights = loaded.weights if loaded is not None else {}
        return {n: lora for n, lora in weights.items() if isinstance(lora, TrainableLora)}

    @contextmanager
    def without_dropout(self, name: str) -> Iterator[None]:
        """Inside, the weights of ``name``, which is in training, are in evaluation mode."""
        weights = self.trainable(name).values()
        for lora in weights:
            lora.eval()
        try:
            yield
        finally:
            for lora in weights:
                lora.train()

    def weights(self, name: str) -> Weights:
        """A copy of the tensors of ``name``, on the CPU."""
        trained = {n: (lora.a, lora.b) for n, lora in self.trainable(name).items()}
        return {
            linear: (a.detach().float().cpu().clone(), b.detach().float().cpu().clone())
            for linear, (a, b) in (trained or self[name].weights).items()
        }

    def magnitudes(self, name: str) -> Magnitudes:
        """A copy of the magnitudes of ``name`` (DoRA), on the CPU."""
        trained = {n: lora.magnitude for n, lora in self.trainable(name).items()}
        return {
            linear: magnitude.detach().float().cpu().clone()
            for linear, magnitude in (trained or self[name].magnitudes).items()
            if magnitude is not None
        }

    def set_weights(
        self, name: str, weights: Weights, magnitudes: Magnitudes | None = None
    ) -> None:
        """Copy ``weights`` and ``magnitudes`` into those of ``name``, which is in training."""
        for linear, lora in self.trainable(name).items():
            a, b = weights[linear]
            lora.a.data.copy_(a)
            lora.b.data.copy_(b)
            if lora.magnitude is not None and magnitudes is not None:
                lora.magnitude.data.copy_(magnitudes[linear])

    # Routing

    def routed(self, domains: Domains) -> AbstractContextManager[None]:
        """Route calls inside by ``domains``; blocks nest, and exceptions restore what was before.

        Raises UsageError, when it is called, for a name that is not loaded.
        """
        return entered(self.base.model, self.route(domains), None)

    def current(self) -> Route | None:
        """The route of calls made here; None is the base."""
        return current_route(self.base.model)

    def route(self, domains: Domains) -> Route | None:
        """The route for ``domains``, which holds the adapters themselves."""
        if domains is None:
            return None
        with self._lock:
            if isinstance(domains, str):
                return Single(self._load(domains))
            names = tuple(domains)
            rows = {name: None if name is None else self._load(name) for name in names}
            if names in self._last:
                self._last.move_to_end(names)
                return self._last[names]
            if self._one_domain_a_call and len(set(names)) > 1:
                raise UsageError(
                    where=self.base.id,
                    expected="one domain in each call of a base of this kind, whose linears read "
                    "positions that all rows share",
                    found=f"{len(set(names))} domains",
                    hint="Call it once for each domain; predict() and generate() do so.",
                )
            route = mixed([rows[name] for name in names], self.base.device)
            # A route over more adapters than slots must not outlive its call.
            if isinstance(route, Mixed) and not (self.slots and len(rows) > self.slots):
                self._last[names] = route
                if len(self._last) > self._kept:
                    self._last.popitem(last=False)
            return route

    def parts(self, domains: Sequence[str | None]) -> list[list[int]]:
        """The rows sorted by domain, in parts that need no more adapters than there are slots.

        Domains on the device come first.
        """
        here = set(self.on_device)
        names = sorted(
            dict.fromkeys(domains), key=lambda name: name is not None and name not in here
        )
        size = 1 if self._one_domain_a_call else max(1, self.slots or len(names))
        parts = []
        for start in range(0, len(names), size):
            part = names[start : start + size]
            parts.append([row for name in part for row, of in enumerate(domains) if of == name])
        return parts

    # Inside

    @property
    def _one_domain_a_call(self) -> bool:
        return self.base.model.config.model_type in SHARED_POSITIONS

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise UsageError(
                expected="a loaded adapter",
                found=repr(name),
                hint=did_you_mean(name, self._entries) if self._entries else "None is loaded yet.",
            )
        return entry

    def _load(self, name: str) -> LoadedAdapter:
        """``name`` on the device, copied from host memory if it was evicted."""
        entry = self._entry(name)
        if entry.flat is None:
            assert entry.loaded is not None, "trainable adapters are never evicted"
            return entry.loaded
        loaded = entry.loaded
        if loaded is None:
            flat = entry.flat.to(self.base.device, non_blocking=True)
            weights, scales = entry.adapter.weights, entry.adapter.scales
            loaded = load_frozen(name, flat, weights, scales, entry.rescalings)
            entry.loaded = loaded
        self._used[name] = None
        self._used.move_to_end(name)
        while self.slots is not None and len(self._used) > self.slots:
            self._entries[next(iter(self._used))].loaded = None
            self._used.popitem(last=False)
            self._last.clear()
        return loaded

    def _free_slot(self, name: str) -> None:
        """Free the slot of ``name``; a call in progress keeps what it holds."""
        self._used.pop(name, None)
        self._last.clear()

    def _checked_sizes(self, adapter: Adapter) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear of ``adapter``, all of which its tensors fit."""
        sizes = {}
        for linear, (a, b) in adapter.weights.items():
            size = self._sizes.get(linear) or sizes_of(self.base.model.get_submodule(linear))
            sizes[linear] = size
            if (a.shape[1], b.shape[0]) != size or a.shape[0] != b.shape[1]:
                raise AdapterError(
                    where=f"{adapter.name}, {linear}",
                    expected=f"A and B for a linear of (in, out) = {size}",
                    found=f"A {tuple(a.shape)}, B {tuple(b.shape)}",
                    hint="Load the base this adapter was made on.",
                )
        return sizes


def route_linears(model: nn.Module, names: Iterable[str]) -> None:
    """Wrap the linears called ``names`` that are not wrapped yet."""
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        module = getattr(parent, child)
        if not isinstance(module, RoutedLinear):
            routed_linear = RoutedLinear(module, name, id(model))
            routed_linear.train(module.training)
            setattr(parent, child, routed_linear)
            if child == "down_proj":
                recompute_gate(parent)


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear of any kind; GPT-2's Conv1D stores its weight transposed."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    inputs, outputs = linear.weight.shape  # type: ignore[misc]
    return int(inputs), int(outputs)


def _own(adapter: Adapter, device: torch.device) -> tuple[Tensor, Weights]:
    """The buffer that ``adapter`` was read into, or a copy: the caller may change its tensors."""
    flat, pinned = adapter.flat, device.type == "cuda"
    if flat is not None and flat.is_pinned() == pinned:
        place = flat.untyped_storage().data_ptr()
        tensors = [tensor for pair in adapter.weights.values() for tensor in pair]
        if all(tensor.untyped_storage().data_ptr() == place for tensor in tensors):
            return flat, adapter.weights
    return flatten(adapter.weights, pinned)


# ── Calls of the model ──────────────────────────────────────────────────────────────────────────

CACHE_ROUTE = "_lora_domains_route"
"""Attribute of a key-value cache: the domains that it was computed with."""
AT_ONCE = "_lora_domains_at_once"
"""Attribute of an output layer that reads rows at once."""


def watch_calls(model: nn.Module) -> None:
    """Check the cache of each call of ``model``, and free its activations afterwards.

    A route may outlive its calls, and the keys and values of a cache belong to the adapters that
    computed them. A call that continues a cache with other domains raises UsageError.
    """
    if getattr(model, "_lora_domains_watched", False):
        return
    setattr(model, "_lora_domains_watched", True)  # noqa: B010 (a plain flag)

    def before(_module: nn.Module, _args: Any, kwargs: Mapping[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            _check_cache(cache, current_route(model))

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        route, cache = current_route(model), getattr(output, "past_key_values", None)
        if cache is not None:
            _check_cache(cache, route)
        if route is not None:
            route.release()

    # Features are read from the model below the head, which is then called by itself.
    for module in {model, getattr(model, "base_model", model)}:
        module.register_forward_pre_hook(before, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True, always_call=True)


def read_rows_at_once(model: nn.Module) -> None:
    """Let the output layer read the last tokens of all rows as one matrix: torch multiplies a slice
    of a tensor with frozen weights row by row, and reads the weights for each."""
    if (output := output_layer(model)) is None or getattr(output, AT_ONCE, False):
        return
    setattr(output, AT_ONCE, True)
    output.register_forward_pre_hook(lambda _, given: tuple(one.contiguous() for one in given))


def _check_cache(cache: Any, route: Route | None) -> None:
    domains = () if route is None else route.domains
    made_with = (
        vars(cache).setdefault(CACHE_ROUTE, domains) if hasattr(cache, "__dict__") else domains
    )
    if made_with != domains:
        raise UsageError(
            expected=f"a cache of keys and values made with {_named(domains)}",
            found=f"one made with {_named(made_with)}",
            hint="Begin again without past_key_values when the domain changes.",
        )


def _named(domains: Sequence[str | None]) -> str:
    return listed(repr(domain) if domain else "the base" for domain in domains or (None,))
