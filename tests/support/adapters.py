"""Adapters with a real effect for tests: B is random, since a fresh LoRA (B = 0) proves nothing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from support import device

from lora_domains.adapters.peft import new_adapter, save_adapter
from lora_domains.domain import Lora
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.tasks import Task, task_record

TOLERANCE = 1e-5
"""Of logits in float32, relative to the largest where that is above 1."""
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "card.json", "README.md", "items.jsonl",
}  # fmt: skip
"""The files of an adapter folder."""


def strong(
    base: Base, name: str = "strong", seed: int = 1, rank: int = 4, deviation: float = 0.5,
    **lora: Any,
) -> Adapter:  # fmt: skip
    """A random adapter of ``base`` that moves its logits far beyond ``TOLERANCE``.

    On a pretrained base of many layers a smaller ``deviation`` of B does so too; with a large one
    rounding errors would grow from layer to layer.
    """
    adapter = new_adapter(base, name, Lora(**lora), rank, 2 * rank, seed)
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.normal_(std=deviation, generator=generator)
    for magnitude in adapter.magnitudes.values():
        magnitude *= torch.empty_like(magnitude).uniform_(0.5, 1.5, generator=generator)
    return adapter


def save(folder: Path, adapter: Adapter, base: Base) -> Path:
    """``adapter`` saved with its card, or with the smallest one."""

    def card(sha256: str) -> Card:
        entry = AdapterEntry(domain=adapter.name, path=adapter.name, sha256=sha256)
        if adapter.card is not None:
            entry = replace(adapter.card.adapter, sha256=sha256)
        return Card(base=BaseRecord(**base.record()), adapter=entry)

    save_adapter(folder, adapter, base, card, lambda card: "# An adapter\n")
    return folder


def with_task(adapter: Adapter, base: Base, task: Task) -> Adapter:
    """``adapter`` with a card that holds ``task``, as if it was trained and not evaluated."""
    entry = AdapterEntry(
        domain=adapter.name, path=adapter.name, sha256=None, settings={"task": task_record(task)}
    )
    return replace(adapter, card=Card(base=BaseRecord(**base.record()), adapter=entry))


def token_ids() -> torch.Tensor:
    """(2 rows, 12 tokens) of no meaning, on the device of the tests.

    They are made anew, since a ``conftest.py`` may import this module before the device is set.
    """
    return torch.arange(3, 27, device=device.name).reshape(2, 12)


def logits(of: Bank | Base, name: str | None = None) -> torch.Tensor:
    """(rows, tokens, vocabulary) of ``token_ids``, served by ``name`` of a bank."""
    bank = of if isinstance(of, Bank) else Bank(of)
    with torch.no_grad(), bank.routed(name):
        found: torch.Tensor = bank.base.model(input_ids=token_ids()).logits
    return found


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, bare: torch.Tensor) -> None:
    """Equal within the tolerance, and both at least 100 tolerances away from the bare base."""
    assert_close(found, wanted)
    assert (found - bare).abs().max() >= 100 * tolerance(wanted)


def tolerance(wanted: torch.Tensor) -> float:
    """The difference that float32 rounding may make to values as large as those ``wanted``."""
    return TOLERANCE * max(1.0, float(wanted.abs().max()))


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=tolerance(wanted), rtol=0)
