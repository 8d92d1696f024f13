"""The plan: a run's settings once everything left open is derived, each with its reason."""

import math
from dataclasses import dataclass, replace
from typing import Any

from lora_domains.adapters.parent import Parent
from lora_domains.adapters.peft import adapted_layers, new_adapter
from lora_domains.console import format_duration
from lora_domains.dataset import Dataset
from lora_domains.domain import EPOCHS, Domain, Lora, Training
from lora_domains.errors import number_of
from lora_domains.inference.choice_tree import tree
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import SENTENCE, own_layout
from lora_domains.probes.general_text import POOL
from lora_domains.training.retention import Retention, choose_retention, general_steps

BATCHES = (32, 16, 8)
"""Batch sizes to choose among: rows of an optimiser step."""
STEPS = 200
"""Optimiser steps that a run should have. On 300 rows, 300 steps in batches of 8 gave better
validation scores than 80 in batches of 32 (benchmarks/README.md, derived settings)."""
EPOCH_ROWS = 100_000
"""Rows that a run reads, repeats included, where the epochs are derived."""
VALIDATED = 400
"""Fewest steps between two validations of an epoch, where they are derived."""
VALIDATION_COST, FORWARD = 10, 3
"""Steps between two validations take so many times as long as one, where a pass forward takes a
third of a step on the same tokens."""
MANY_TOKENS = 1000
"""Labels of this many tokens, shared beginnings counted once, are warned about."""
FEW_STEPS = 60
"""A run of fewer optimiser steps than this is warned about: it rarely learns a new task."""

PROBED = 1 / 3
"""Share of the learning rate with which a head that starts as a linear probe is trained, and the
adapter beside it (benchmarks/training/heads.py)."""


PREFERRED = 1 / 10
"""Share of it with which preferences are learned: they are compared, not imitated."""


@dataclass(frozen=True)
class Plan:
    """The settings of a run once everything left open has been derived."""

    rank: int
    alpha: int
    lr: float
    epochs: int
    batch_size: int
    steps_per_epoch: int
    retention: Retention
    general_every: int = 1
    """General text is read in every step of this number."""
    max_steps: int | None = None
    validate_every: int | None = None
    """Steps between validations within an epoch; None validates at its end only."""
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    @property
    def passes(self) -> float:
        """How often the rows are read."""
        return self.steps / self.steps_per_epoch

    def validations(self, steps: int) -> int:
        """Validations of a run of ``steps``."""
        every = self.validate_every or self.steps_per_epoch
        whole, rest = divmod(steps, self.steps_per_epoch)
        return whole * math.ceil(self.steps_per_epoch / every) + math.ceil(rest / every)

    def validated_after(self, epoch: int, step: int, steps: int) -> int:
        """The first step of ``epoch``, from ``step`` on, after which the adapter is validated, in a
        run of ``steps``."""
        every = self.validate_every or self.steps_per_epoch
        left = steps - epoch * self.steps_per_epoch
        return min(math.ceil(step / every) * every, self.steps_per_epoch, left)

    @property
    def general_reads(self) -> int:
        """General texts that the run reads, repeats included."""
        return math.ceil(self.steps / self.general_every) * self.retention.rows

    def numbers(self) -> dict[str, float]:
        """The settings that are numbers, by name."""
        return {k: v for k, v in vars(self).items() if isinstance(v, int | float)}


DECAY = 0.2
"""Share of the steps in which the rate of the schedule "wsd" falls."""


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step, as a share of the highest, and the last step of a run.

    It rises from zero. Then it falls to zero, "linear" or as half a wave of a "cosine"; or it is
    "constant", or with "wsd" (warm-up, stable, decay: Hu et al. 2024, arXiv 2404.06395) until the
    last steps, in which it falls to zero linearly. So it does in the ending of a run that patience
    stopped, from what it was at the best epoch.
    """

    steps: int
    """Of the whole run."""
    settings: Training

    @property
    def decay(self) -> float | None:
        """Share of the steps before a fall to zero that it takes; None where nothing decays."""
        return self.settings.decay or (DECAY if self.settings.schedule == "wsd" else None)

    def share(self, done: int, best: int = 0, ending: tuple[int, int] | None = None) -> float:
        """Of the step after ``done`` others, where the best epoch was over after ``best``."""
        if ending is not None:
            return self.share(best) * (ending[1] - done) / (ending[1] - ending[0])
        warm = max(1, round(self.settings.warmup * self.steps))
        if done < warm:
            return (done + 1) / warm
        left, shape = (self.steps - done) / max(1, self.steps - warm), self.settings.schedule
        if shape == "wsd":
            return min(1.0, (self.steps - done) / max(1, round((self.decay or 0) * self.steps)))
        if shape == "cosine":
            return (1 - math.cos(math.pi * left)) / 2
        return 1.0 if shape == "constant" else left

    def ending(self, best: int, done: int) -> tuple[int, int]:
        """Steps before and after the ending of a run that patience stops after ``done`` steps."""
        return done, min(done + max(1, round((self.decay or 0) * best)), self.steps)


def make_plan(base: Base, dataset: Dataset) -> Plan:
    """Derive learning rate, batch size, rank and retention method where the domain leaves them
    open.

    An adapter that continues from a parent keeps the parent's rank and alpha. Raises DomainError
    for settings that the retention method cannot use.
    """
    settings = dataset.domain.training
    probed = dataset.domain.task.head and own_layout(base) == SENTENCE
    share = PROBED if probed else 1.0 if dataset.domain.task.beta is None else PREFERRED
    lr, lr_reason = (settings.lr, "") if settings.lr is not None else derived_rate(base, share)
    rows = len(dataset.train)
    epochs, epochs_reason = derived_epochs(rows, settings)
    batch, batch_reason = settings.batch_size, ""
    if batch is None:
        batch, batch_reason = derived_batch(rows, epochs)
    steps = math.ceil(rows / batch)
    limit = min(settings.max_steps or math.inf, steps * epochs)
    validate_every = settings.validate_every or _validation_steps(dataset, steps)
    rank, alpha, rank_reason = _rank_and_alpha(base, dataset)
    general = dataset.general.windows("training", dataset.tokenization, POOL)
    own = dataset.general.own
    # Of the kind that the base was trained on: the embedded base's, the user's, or its own.
    familiar = own or base.id == "embedded" or dataset.domain.data.general is not None
    retention, chosen = choose_retention(settings, len(general), familiar, batch, own)
    every, every_reason = 1, ""
    if retention.rows:
        retention, every, every_reason = general_steps(base, dataset, general, retention, steps)
    probe_reason = ""
    if probed and dataset.parent is None:
        probe_reason = "head: starts as logistic regression on the frozen features"
    reasons = (
        lr_reason, probe_reason, epochs_reason, batch_reason,
        f"{limit} of {steps * epochs} steps (--max-steps)" if limit < steps * epochs else "",
        _balance_reason(dataset), rank_reason,
        f"retention {retention.name}: {chosen}{retention.describe()}", every_reason,
        _general_reason(dataset, math.ceil(limit / every) * retention.rows),
        _writing_reason(dataset.general.seconds) if dataset.general.seconds else "",
        _validation_reason(validate_every, steps),
    )  # fmt: skip
    warnings = (
        *_ignored_settings(dataset.domain.lora, dataset.parent),
        _short_run_warning(rows, batch, steps, epochs) if limit == steps * epochs else "",
        _many_labels_warning(dataset),
        retention.warning(base.id, familiar) or "",
    )
    return Plan(
        rank, alpha, lr, epochs, batch, steps, retention, every,
        settings.max_steps, validate_every if validate_every < steps else None,
        tuple(filter(None, reasons)), tuple(filter(None, warnings)),
    )  # fmt: skip


def derived_rate(base: Base, share: float = 1.0) -> tuple[float, str]:
    """The learning rate for the base's width, and the reason in words.

    5e-4 · (2000 / width)^p with p = .78 (.08 for Qwen), with alpha 32 and LoRA scale alpha/r:
    Thinking Machines, "LoRA Without Regret" (2025). ``share`` of that is taken: ``PROBED`` for a
    head that starts as a linear probe and is near its goal, ``PREFERRED`` for preferences.
    """
    power = 0.08 if str(base.model.config.model_type).startswith("qwen") else 0.78
    rate = float(f"{share * 5e-4 * (2000 / base.width) ** power:.2g}")
    times = f"{share:.2g} · " if share != 1 else ""
    return rate, f"learning rate {rate:g}: {times}5e-4 · (2000 / width {base.width})^{power:g}"


def derived_epochs(rows: int, settings: Training) -> tuple[int, str]:
    """The epochs given, or as many as read ``EPOCH_ROWS`` rows, from 1 to ``EPOCHS``; the reason.

    A few passes over many rows teach what many passes over a few do, and are not repeated.
    """
    if settings.epochs is not None:
        return settings.epochs, ""
    epochs = max(1, min(EPOCHS, round(EPOCH_ROWS / rows)))
    passes = number_of(epochs, "epoch")
    reason = f"{passes}: {rows:,} rows, of which about {EPOCH_ROWS:,} are read in all"
    return epochs, reason if epochs < EPOCHS else ""


def _validation_steps(dataset: Dataset, steps: int) -> int:
    """Steps between validations of an epoch of ``steps``: at least ``VALIDATED``, and as many as
    take ten times as long as a validation, which reads its tokens forward only; equal parts."""
    read = sum(len(row.encoded) for row in dataset.train) / steps
    checked = sum(len(row.encoded) for row in dataset.validation)
    parts = int(steps / max(VALIDATED, VALIDATION_COST * checked / (FORWARD * read)))
    return math.ceil(steps / max(1, parts))


def _validation_reason(every: int, steps: int) -> str:
    return f"validation after every {every} of {steps} steps" if every < steps else ""


def derived_batch(rows: int, epochs: int) -> tuple[int, str]:
    """The largest of ``BATCHES`` with ``STEPS`` steps in a run, or the smallest; and the reason."""

    def steps(batch: int) -> int:
        return epochs * math.ceil(rows / batch)

    batch = next((b for b in BATCHES if steps(b) >= STEPS), BATCHES[-1])
    return batch, f"batches of {batch} rows: {steps(batch)} steps (target: at least {STEPS})"


def _rank_and_alpha(base: Base, dataset: Dataset) -> tuple[int, int, str]:
    """The rank and alpha given, those of the parent, or derived ones; and the reason.

    The derived rank is the smallest power of two from 16 to 64 whose adapter holds at least two
    parameters per supervised token: an adapter needs capacity for what the rows say ("LoRA Without
    Regret").
    """
    lora, parent = dataset.domain.lora, dataset.parent
    if parent is not None:
        config, name = parent.adapter.config, parent.adapter.name
        reason = f"rank {config.r}, alpha {config.lora_alpha}, target modules: those of {name}"
        return int(config.r), config.lora_alpha, reason
    alpha = lora.alpha or 32
    if lora.rank is not None:
        return lora.rank, alpha, ""
    tokens = sum(row.encoded.supervised for row in dataset.train)
    per_rank = parameters_per_rank(base, dataset.domain)
    rank = next((r for r in (16, 32) if r * per_rank >= 2 * tokens), 64)
    return rank, alpha, (
        f"rank {rank}: {rank * per_rank:,} parameters for {tokens:,} supervised tokens"
    )  # fmt: skip


def parameters_per_rank(base: Base, domain: Domain) -> int:
    """Parameters that each rank of an adapter has in A and B."""
    # The lengths that DoRA would begin with are not needed, and take long on a large base.
    lora = replace(domain.lora, dora=False)
    one = new_adapter(base, "plan", lora, 1, 1, 0, domain.task.head_classes)
    return sum(a.numel() + b.numel() for a, b in one.weights.values())


def _ignored_settings(lora: Lora, parent: Parent | None) -> list[str]:
    """Warnings about settings of ``lora`` that differ from those the parent passes on."""
    if parent is None:
        return []

    def named(targets: Any) -> Any:
        return targets if isinstance(targets, str | None) else sorted(targets)

    config, targets = parent.adapter.config, named(lora.targets)
    pairs = (
        ("rank", lora.rank, config.r),
        ("alpha", lora.alpha, config.lora_alpha),
        (
            "target modules",
            None if targets == Lora().targets else targets,
            named(config.target_modules),
        ),
        ("rslora", lora.rslora or None, config.use_rslora),
        ("dora", lora.dora or None, config.use_dora),
        ("top_layers", lora.top_layers, adapted_layers(config)),
    )
    return [
        f"{name} {given} is ignored: an adapter keeps the {name} of its parent, {kept}."
        for name, given, kept in pairs
        if given not in (None, kept)
    ]


def _short_run_warning(rows: int, batch: int, steps: int, epochs: int) -> str:
    if steps * epochs >= FEW_STEPS:
        return ""
    enough = math.ceil(FEW_STEPS / steps)
    return (
        f"only {steps * epochs} optimiser steps ({rows} rows, batches of {batch}, {epochs} "
        f"{'epoch' if epochs == 1 else 'epochs'}): too few to learn much. --epochs {enough} gives "
        f"{enough * steps}."
    )


def _many_labels_warning(dataset: Dataset) -> str:
    task, rows = dataset.domain.task, dataset.train
    choices = rows[0].encoded.choices if task.has_labels else ()
    tokens = len(tree(choices)) if choices else 0
    if tokens < MANY_TOKENS:
        return ""
    return (
        f"the {len(task.labels or ())} labels are {tokens:,} tokens, which are read after every "
        "prompt that is validated, evaluated or predicted. --head reads the prompt alone."
    )


def _balance_reason(dataset: Dataset) -> str:
    """How classes are balanced, and what that does to probabilities."""
    balance = dataset.domain.training.balance
    if balance is None:
        return ""
    how = "weighted in the loss" if balance == "weights" else "drawn equally often"
    return (
        f"classes are {how}: probabilities of rare ones are above their share in the rows, as "
        "calibration shows"
    )


def _general_reason(dataset: Dataset, read: int) -> str:
    """How many general texts a run uses that reads ``read`` of them in all, repeats included."""
    if not read:
        return ""
    training, selection = dataset.general.counts
    origin = f"; {dataset.general.origin}" if dataset.general.origin else ""
    return (
        f"general text: {min(training, POOL, read)} of {training} texts for training, {selection} "
        f"others for monitoring{origin}"
    )


def _writing_reason(seconds: float) -> str:
    """How long the base takes to write general text before a run, where it does."""
    took = format_duration(seconds)
    return f"general text: the base writes it first, once for all domains, in about {took}"
