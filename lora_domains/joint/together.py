"""How many adapters to train in one pass: as many as make a step cheaper than steps of their own.

The cost of a step is counted in tokens: those of its passes with their padding, and for each pass
what launching it and reading the base's weights takes (``batching.PASS``). Sharing passes saves the
latter. Unlike a time, which benchmarks/speed/joint.py measures for comparison, the count is the
same whenever a run is repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from lora_domains.inference.batches import micro_batches
from lora_domains.inference.memory import free_bytes
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import SHARED_POSITIONS
from lora_domains.modeling.batching import PASS, epoch_batches
from lora_domains.tokenization.encoded import EncodedExample

MOST = 8
"""Adapters that share a pass, at most: with 8 the cost of a pass itself is nearly saved."""
WORTHWHILE = 1.03
"""How many times as fast joint steps must be."""
SAMPLE = 24
"""Steps whose cost is counted."""
MIXED = 4
"""Cost of each further adapter in a pass, in tokens."""
STATE = 24
"""Bytes for each parameter of an adapter in training: itself, its gradient and its copy for the
processes, two moments, and the best epoch's."""
FREE = 0.25
"""Share of the free memory that the adapters in training may take."""

Rows = Sequence[EncodedExample]


class Planned(Protocol):
    """A run before it begins."""

    @property
    def batch_size(self) -> int: ...

    @property
    def seed(self) -> int: ...

    @property
    def train(self) -> Rows: ...

    @property
    def parameters(self) -> int: ...


@dataclass(frozen=True)
class Choice:
    """How many adapters take their steps together, and why."""

    together: int
    reason: str


def choose(base: Base, runs: Sequence[Planned]) -> Choice:
    """How many of ``runs`` to train together on ``base``: 1 where that is not faster."""
    if base.model.config.model_type in SHARED_POSITIONS:
        return Choice(1, "one after another: a base of this kind takes one adapter in a pass")
    largest = max(run.parameters for run in runs)
    room = int(FREE * free_bytes(base.device) / (STATE * largest))
    most = max(1, min(len(runs), MOST, room))
    batches = [_first_batches(run) for run in runs[:most]]
    counted = {count: speed_up(base.device, batches[:count]) for count in range(2, most + 1)}
    together = max(counted, key=counted.__getitem__, default=1)
    limited = f"; memory for {most} at a time" if most == room < min(len(runs), MOST) else ""
    if counted.get(together, 0.0) < WORTHWHILE:
        why = "their rows fill the passes by themselves" if counted else "one adapter is left"
        return Choice(1, f"one after another: {why}{limited}")
    waiting = len(runs) - together
    rest = f"; {waiting} wait for a place" if waiting else ""
    return Choice(
        together,
        f"{together} adapters in one pass, about {counted[together]:.2f} times as fast as one "
        f"after another by the tokens and passes of their steps{limited}{rest}",
    )


def speed_up(device: torch.device, batches: Sequence[Sequence[Rows]]) -> float:
    """The cost of the first steps of several runs, one after another, over that of joint ones;
    ``batches`` are the rows of each step of each run."""
    steps = list(zip(*batches, strict=True))
    alone = sum(cost(device, [rows]) for step in steps for rows in step)
    return alone / max(1e-9, sum(cost(device, step) for step in steps))


def cost(device: torch.device, batches: Sequence[Rows]) -> float:
    """The cost of a joint step over ``batches``, in tokens."""
    rows = [row for batch in batches for row in batch]
    launch = PASS[device.type == "cpu"] + MIXED * (len(batches) - 1)
    passes = micro_batches(rows, device)
    return sum(len(part) * max(map(len, part)) + launch for part in passes)


def _first_batches(run: Planned) -> list[Rows]:
    """The rows of the first steps; short runs are repeated."""
    rows = run.train
    epoch = epoch_batches([len(row) for row in rows], run.batch_size, run.seed, 0)
    return [[rows[i] for i in epoch[n % len(epoch)]] for n in range(SAMPLE)]
