"""The plan: a run's settings once everything left open is derived, each with its reason."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_domains.adapters.peft import new_adapter
from lora_domains.data.general_text import POOL
from lora_domains.data.tokenization import EncodedExample
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, Lora
from lora_domains.errors import DomainError
from lora_domains.modeling.base import Base
from lora_domains.training.retention import Keeping, decide

BATCHES = (32, 16, 8)
"""Rows of an optimiser step that are chosen among."""
STEPS = 200
"""Optimiser steps that a run should have: on 300 rows 300 steps (batches of 8) were better than 80
(of 32) by validation scores; see benchmarks/README.md, derived settings."""
FEW_STEPS = 60
"""A run of fewer optimiser steps than this is warned about: it rarely learns a new task."""


@dataclass(frozen=True)
class Plan:
    """The settings of a run once everything left open has been derived."""

    rank: int
    alpha: int
    lr: float
    epochs: int
    batch_size: int
    steps_per_epoch: int
    keeping: Keeping
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch


def make_plan(base: Base, dataset: Dataset) -> Plan:
    """Learning rate, rank and batch from the base's width and the rows, with reasons.

    The rate is 5e-4 · (2000 / hidden)^p, p = .78 (.08 for Qwen), at alpha 32 and 1/r scaling:
    Thinking Machines, "LoRA Without Regret" (2025). The rank is the least power of two from 16
    to 64 whose adapter holds at least two parameters per supervised token, on the same finding
    that an adapter must have room for what the rows say. An adapter that goes on from ``parent``
    has its rank and alpha. How general knowledge is kept: ``retention.decide``.
    """
    domain, items = dataset.domain, [row.encoded for row in dataset.train]
    parent = dataset.parent.adapter if dataset.parent else None
    settings, lora = domain.training, domain.lora
    reasons: list[str] = []
    warnings: list[str] = []
    lr = settings.lr
    if lr is None:
        lr, reason = derived_rate(base)
        reasons.append(reason)
    batch = settings.batch_size
    if batch is None:
        batch, reason = derived_batch(len(items), settings.epochs)
        reasons.append(reason)
    steps = math.ceil(len(items) / batch)
    if parent is None:
        rank, alpha = _rank(base, domain, items, reasons), lora.alpha or 32
    else:
        rank, alpha = int(parent.config.r), parent.config.lora_alpha
        reasons.append(f"rank {rank}, alpha {alpha}, target modules: those of {parent.name}")
        warnings += _not_taken(lora, parent.config)
    total = steps * settings.epochs
    if total < FEW_STEPS:
        wanted = math.ceil(FEW_STEPS / steps)
        warnings.append(
            f"only {total} optimiser steps ({len(items)} rows, batches of {batch}, "
            f"{settings.epochs} {'epoch' if settings.epochs == 1 else 'epochs'}): too short to "
            f"learn much. --epochs {wanted} gives {wanted * steps}."
        )
    familiar = base.id == "embedded" or domain.data.general is not None
    keeping = decide(domain, len(dataset.general.training), familiar, batch)
    reasons.append(keeping.reason)
    if keeping.rows:
        texts = len(dataset.general.training)
        used = min(texts, POOL, total * keeping.rows)
        reasons.append(
            f"general text: {used} of {texts} texts to train by, "
            f"{len(dataset.general.selection)} others to watch by"
        )
    if keeping.method == "scale" and domain.task.head_classes is not None:
        raise DomainError(
            where=f"domain {domain.name!r}, setting 'retention'",
            expected="another way than scale: a head is trained for the whole of its adapter",
            found="scale",
            hint="Use replay, kl or auto.",
        )
    if keeping.replay and not familiar:
        warnings.append(
            f"retention {keeping.method} teaches {base.id} the embedded world's text. "
            "--general FILE gives text of its own kind; --retention kl compares only."
        )
    return Plan(
        rank, alpha, lr, settings.epochs, batch, steps, keeping, tuple(reasons),
        tuple(warnings),
    )  # fmt: skip


def derived_rate(base: Base) -> tuple[float, str]:
    """The learning rate that follows from the base's width, and the reason in words."""
    power = 0.08 if str(base.model.config.model_type).startswith("qwen") else 0.78
    rate = float(f"{5e-4 * (2000 / base.width) ** power:.2g}")
    return rate, f"learning rate {rate:g}: 5e-4 · (2000 / width {base.width})^{power:g}"


def derived_batch(rows: int, epochs: int) -> tuple[int, str]:
    """The largest of ``BATCHES`` that gives a run ``STEPS`` steps, or the least; and the reason."""

    def steps(batch: int) -> int:
        return epochs * math.ceil(rows / batch)

    batch = next((b for b in BATCHES if steps(b) >= STEPS), BATCHES[-1])
    return batch, f"batches of {batch} rows: {steps(batch)} steps, {STEPS} at least are wanted"


def _not_taken(lora: Lora, config: Any) -> list[str]:
    """What of ``lora`` was asked for, and an adapter that goes on has otherwise."""

    def named(targets: Any) -> Any:
        return targets if isinstance(targets, str | None) else sorted(targets)

    targets = named(lora.targets)
    pairs = (
        ("rank", lora.rank, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
        (
            "target modules",
            None if targets == Lora().targets else targets,
            named(config.target_modules),
        ),
        ("rslora", lora.rslora or None, config.use_rslora),
    )
    return [
        f"{name} {asked} was asked for, but an adapter keeps the {name} {taken} of the one that it "
        "goes on from."
        for name, asked, taken in pairs
        if asked not in (None, taken)
    ]


def _rank(base: Base, domain: Domain, items: Sequence[EncodedExample], reasons: list[str]) -> int:
    if domain.lora.rank is not None:
        return domain.lora.rank
    tokens = sum(item.supervised for item in items)
    one = new_adapter(base, "plan", domain.lora, 1, 1, 0, domain.task.head_classes)
    per_rank = sum(a.numel() + b.numel() for a, b in one.weights.values())
    rank = next((r for r in (16, 32) if r * per_rank >= 2 * tokens), 64)
    reasons.append(f"rank {rank}: {rank * per_rank:,} parameters for {tokens:,} supervised tokens")
    return rank
