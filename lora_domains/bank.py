"""Adapters resident on one base, each a slot in the routed linears."""

from collections.abc import Iterator

import torch

from lora_domains.adapter import Adapter
from lora_domains.base import Base
from lora_domains.errors import AdapterError, UsageError, did_you_mean
from lora_domains.routing import Slot, features, route_linears


class Bank:
    """The adapters that can be routed to on ``base``; iterating gives their names."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self._adapters: dict[str, Adapter] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._adapters))

    def __len__(self) -> int:
        return len(self._adapters)

    def __getitem__(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise UsageError(
                expected="a resident adapter",
                found=repr(name),
                mend=did_you_mean(name, self._adapters)
                if self._adapters
                else "None is loaded yet.",
            )
        return self._adapters[name]

    def add(self, adapter: Adapter, *, trainable: bool = False) -> list[torch.nn.Parameter]:
        """Make ``adapter`` resident under its name, replacing one of that name; its parameters.

        Everything is built and checked before the first slot is placed, so that a failure leaves
        the bank as it was. Raises AdapterError when a tensor does not fit its linear.
        """
        model = self.base.model
        slots: dict[str, Slot] = {}
        for linear, (a, b) in adapter.weights.items():
            module = model.get_submodule(linear)
            if (a.shape[1], b.shape[0]) != features(module):
                raise AdapterError(
                    where=f"{adapter.name}, {linear}",
                    expected=f"A and B for a linear of (in, out) = {features(module)}",
                    found=f"A {tuple(a.shape)}, B {tuple(b.shape)}",
                    mend="Load the base this adapter was made on.",
                )
            device = module.weight.device
            dropout = float(adapter.config.lora_dropout)
            # Copies: training must not write into the tensors the caller holds.
            slot = Slot(
                a.detach().clone().to(device), b.detach().clone().to(device),
                adapter.scales[linear], dropout,
            )  # fmt: skip
            slot.train(trainable)
            slot.requires_grad_(trainable)
            slots[linear] = slot
        linears = route_linears(model, list(slots))
        self._drop_slots(adapter.name, keep=set(slots))
        for linear, slot in slots.items():
            linears[linear].lora_slots[adapter.name] = slot
        self._adapters[adapter.name] = adapter
        return [p for slot in slots.values() for p in slot.parameters()]

    def remove(self, name: str) -> None:
        """Take ``name`` out; raises UsageError when it is not resident."""
        self[name]
        del self._adapters[name]
        self._drop_slots(name, keep=set())

    def slots(self, name: str) -> dict[str, Slot]:
        """The slots of ``name`` by the linear they stand beside."""
        found = {}
        for linear in self[name].weights:
            slot = self.base.model.get_submodule(linear).lora_slots[name]
            assert isinstance(slot, Slot)
            found[linear] = slot
        return found

    def weights(self, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A copy of the resident tensors of ``name``, on the CPU."""
        return {
            linear: (slot.a.detach().float().cpu().clone(), slot.b.detach().float().cpu().clone())
            for linear, slot in self.slots(name).items()
        }

    def _drop_slots(self, name: str, keep: set[str]) -> None:
        for linear, module in self.base.model.named_modules():
            slots = getattr(module, "_modules", {}).get("lora_slots")
            if slots is not None and name in slots and linear not in keep:
                del slots[name]
