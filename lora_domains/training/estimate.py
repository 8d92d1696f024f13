"""A dry run's estimate: one step is tried, timed and thrown away, so the figures are measured."""

import time
from dataclasses import dataclass

import torch

from lora_domains import distributed
from lora_domains.console import format_bytes, format_duration
from lora_domains.modeling.batching import epoch_batches
from lora_domains.modeling.memory import peak_memory
from lora_domains.training.loop import Run

SAMPLE = 32
"""Validation rows that are scored to time them."""


@dataclass(frozen=True)
class Estimate:
    """What the run would take on this machine, as it is now."""

    seconds: float
    """All epochs with their validation; the evaluation afterwards is not in it."""
    peak_bytes: int
    """Measured on the step with the longest rows."""
    micro: int | None
    """The micro-batch it came down to where memory ran out."""

    def in_words(self) -> str:
        less = f", at most {self.micro} tokens in one pass" if self.micro else ""
        return (
            f"about {format_duration(self.seconds)} of training, "
            f"{format_bytes(self.peak_bytes)} of memory at most{less}; measured on one step"
        )


def rehearse(run: Run) -> Estimate:
    """Try the longest batch for its memory and a middling one for its time; nothing is kept."""
    lengths = [len(item) for item in run.train]
    batches = epoch_batches(lengths, run.plan.batch_size, run.domain.training.seed, 0)
    sizes = [len(batch) * max(lengths[i] for i in batch) for batch in batches]
    order = sorted(range(len(batches)), key=sizes.__getitem__)
    device = run.model.device
    cuda = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda):
            middle = order[len(order) // 2]
            started = time.monotonic()
            for chosen in (order[-1], middle):
                started = time.monotonic()
                items = [run.train[i] for i in batches[chosen]]
                float(run.gradients.of(items, sum(item.supervised for item in items)))
            per_token = (time.monotonic() - started) / sizes[middle]
            whole, run.validation = run.validation, run.validation[:SAMPLE]
            started = time.monotonic()
            run.judge(run)
            judging = (time.monotonic() - started) * len(whole) / max(1, len(run.validation))
            if run.watched:
                watching = run.selection  # the base's own answers: once, not in every epoch
                started = time.monotonic()
                with distributed.sharing():
                    watching.watch(run.slot)
                judging += time.monotonic() - started
    finally:
        run.optimizer.zero_grad(set_to_none=True)
        run.bank.remove(run.slot)
    return Estimate(
        seconds=run.plan.epochs * (per_token * sum(sizes) + judging),
        peak_bytes=peak_memory(device),
        micro=run.state.micro,
    )
