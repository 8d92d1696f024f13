"""The estimate of a dry run: two steps are computed, timed and discarded."""

import time
from copy import copy
from dataclasses import dataclass

from lora_domains.console import format_bytes, format_duration
from lora_domains.distributed import peak_memory
from lora_domains.modeling.batching import epoch_batches
from lora_domains.training.loop import Run
from lora_domains.training.validation import Validation

SAMPLE = 32
"""Validation rows that are scored to measure their time."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine in its present state."""

    seconds: float
    """All epochs with their validation, without the evaluation that follows."""
    peak_bytes: int
    """Measured on the batch with the most padded tokens."""
    micro: int | None
    """Padded tokens of a pass, where memory ran out."""

    def in_words(self) -> str:
        limit = f", at most {self.micro} tokens in one pass" if self.micro else ""
        return (
            f"about {format_duration(self.seconds)} of training, "
            f"{format_bytes(self.peak_bytes)} of memory at most{limit}; measured on one step"
        )


def estimate(run: Run) -> Estimate:
    """Measure memory on the largest batch and time on the median one; nothing is kept.

    The adapter of ``run`` leaves the bank, and the random state is restored.
    """
    lengths = [len(row) for row in run.train]
    batches = epoch_batches(lengths, run.plan.batch_size, run.domain.training.seed, 0)
    sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    order = sorted(range(len(batches)), key=sizes.__getitem__)
    middle = order[len(order) // 2]
    with run.isolated():
        started = time.monotonic()
        for chosen in (order[-1], middle):
            started = time.monotonic()
            rows = [run.train[i] for i in batches[chosen]]
            float(run.gradients.compute(rows, sum(row.supervised for row in rows)))
        per_token = (time.monotonic() - started) / sizes[middle]
        validation = _validation_seconds(run.validation)
    run.optimizer.zero_grad(set_to_none=True)
    return Estimate(
        seconds=run.plan.epochs * (per_token * sum(sizes) + validation),
        peak_bytes=peak_memory(run.model.device),
        micro=run.state.micro,
    )


def _validation_seconds(validation: Validation) -> float:
    """The time of one epoch's validation, estimated from ``SAMPLE`` rows."""
    sample = copy(validation)
    sample.rows = validation.rows[:SAMPLE]
    started = time.monotonic()
    sample.figures()
    seconds = (time.monotonic() - started) * len(validation.rows) / max(1, len(sample.rows))
    if validation.monitored:
        _ = validation.reference  # the base's predictions: once, not in every epoch
        started = time.monotonic()
        validation.drift()
        seconds += time.monotonic() - started
    return seconds
