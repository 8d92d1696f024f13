"""Keeping general knowledge while training: the adapter is held to the base on general text.

Beside each batch of domain rows a few general texts are read by base and adapter, and KL(base ‖
adapter) is added to the loss. It costs no labels.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.bank import Bank
from lora_domains.encoding import IGNORED, Item, collate
from lora_domains.scoring import tail_logits


def general_rows(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Positions of ``batch`` of ``count`` texts for a step: a pure function of its arguments.

    Every text comes once before any comes again.
    """
    batch = min(batch, count)
    first = step * batch
    found: list[int] = []
    for turn in range(first // count, (first + batch - 1) // count + 1):
        order = np.random.default_rng([seed, turn, count]).permutation(count)
        start, end = (min(max(at - turn * count, 0), count) for at in (first, first + batch))
        found += order[start:end].tolist()
    return found


def kl_to_base(bank: Bank, items: Sequence[Item], pad: int, adapter: str) -> Tensor:
    """Sum over the tokens of ``items`` of KL(base ‖ adapter) in nats, with gradient."""
    model = bank.base.model
    batch = collate(items, pad, model.device)
    with torch.no_grad(), bank.routed(None):
        base = F.log_softmax(tail_logits(model, batch).float(), dim=-1)
    with bank.routed(adapter):
        moved = F.log_softmax(tail_logits(model, batch).float(), dim=-1)
    kl = F.kl_div(moved, base, log_target=True, reduction="none").sum(-1)
    return (kl * (batch.labels != IGNORED)).sum()
