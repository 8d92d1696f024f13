"""Adapters with a trained head, and prompts for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import make_rows
from safetensors.torch import load_file, save_file

from lora_domains.adapters.folder import WEIGHTS
from lora_domains.adapters.peft import new_adapter
from lora_domains.data.source import Data
from lora_domains.domain import Domain, Lora, with_settings
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import features, head_logits
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import CARD
from lora_domains.tasks import Classification
from lora_domains.tokenization.encoded import EncodedExample

PROMPTS = [(5, 9, 20, 31), (7, 8), (11, 30, 41, 52, 63, 74, 85)]
"""Token ids of prompts of different lengths, so that they are padded."""


def items() -> list[EncodedExample]:
    return [EncodedExample(str(i), prompt, (), target=i % 2) for i, prompt in enumerate(PROMPTS)]


def padded() -> dict[str, torch.Tensor]:
    """The prompts as input of plain transformers, padded on the right."""
    ids = torch.zeros((len(PROMPTS), 7), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(PROMPTS):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def headed(base: Base, name: str = "headed", classes: int = 3, seed: int = 1) -> Adapter:
    """An adapter with a head, whose effects are far above the tolerance."""
    adapter = new_adapter(base, name, Lora(), 4, 8, seed, classes)
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapter.weights.values():
        b.normal_(std=0.3, generator=generator)
    assert adapter.head is not None
    for tensor in adapter.head.weights.values():
        tensor.normal_(std=0.5, generator=generator)
    return adapter


def served(base: Base, adapter: Adapter) -> torch.Tensor:
    """(rows, classes): logits of the head of ``adapter``."""
    bank = Bank(base)
    bank.add(adapter)
    assert adapter.head is not None
    pooling = adapter.head.layout.pooling
    with torch.no_grad(), bank.routed(adapter.name):
        return head_logits(adapter.head, features(base.model, items(), 0, pooling))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Edit the stored tensors, and remove the card, whose sha256 would reveal the change."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)
    (folder / CARD).unlink()


def headed_domain(name: str = "spam", classes: int = 2, **settings: Any) -> Domain:
    """A domain of ``classes`` classes for an adapter with a head."""
    rows = make_rows(160)
    if classes > 2:
        words = ("red", "green", "blue", "stone", "river")[:classes]
        rows = [{"text": f"{row['text']} {words[i % classes]}", "label": words[i % classes]}
                for i, row in enumerate(rows)]  # fmt: skip
    data = Data(rows[:100], rows[100:130], rows[130:])
    defaults = {"epochs": 2, "lr": 0.01, "batch_size": 16, "rank": 4, "general_rows": 2}
    task = Classification(head=True)
    return with_settings(Domain(name, task, data), **(defaults | settings))
