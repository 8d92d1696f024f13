"""How many adapters to train in one pass: as many as make a step cheaper than steps of their own.

The cost of a step is counted in tokens: those of its passes with their padding, and for each pass
what launching it and reading the base's weights takes (``batching.PASS``). Sharing passes saves the
latter; a step of one adapter reads once what all its prompts begin with. Unlike a time, which
benchmarks/speed/joint.py measures for comparison, the count is the same whenever a run is repeated.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from lora_domains.inference.batches import micro_batches
from lora_domains.inference.likelihoods import saved_in_training
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
SHARED = {True: 1.5, False: 1.0}
"""What a token costs in a pass that adapters share, on a CPU and elsewhere: activations of a larger
pass leave the CPU's caches, and products of several adapters are batched.

Fitted to one thread of an EPYC without AVX-512, where joint steps of four adapters over separate
ones were 1.52 times as fast with 64 tokens each, 1.25 with 128, 0.94 with 256 and 0.77 with 640 on
the embedded base (``benchmarks/speed/joint_embedded.py``), and 1.43 with 64 and 0.91 to 0.97 with
256 on one of 55 million parameters (``joint.py``).
"""
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
    def head(self) -> bool:
        """Whether a head reads the rows: they share no pass with rows of predicted tokens."""

    @property
    def pairs(self) -> bool:
        """Whether answers are compared, each of which is read with its prompt."""

    @property
    def whole(self) -> bool:
        """Whether each of its prompts is read from its first token on."""

    @property
    def parameters(self) -> int: ...


class Step(NamedTuple):
    """What one step of a run reads."""

    head: bool
    rows: Rows
    whole: bool = False


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
    steps = [_first_steps(run) for run in runs[:most]]
    counted = {count: speed_up(base.model, steps[:count]) for count in range(2, most + 1)}
    together = max(counted, key=counted.__getitem__, default=1)
    limited = f"; memory for {most} at a time" if most == room < min(len(runs), MOST) else ""
    if counted.get(together, 0.0) < WORTHWHILE:
        why = "their rows fill the passes by themselves" if counted else "one adapter is left"
        if counted and most == 2 and runs[0].head != runs[1].head:
            why = "one has a head, and shares no pass with the other"
        return Choice(1, f"one after another: {why}{limited}")
    waiting = len(runs) - together
    rest = f"; {waiting} wait for a place" if waiting else ""
    return Choice(
        together,
        f"{together} adapters in one pass, about {counted[together]:.2f} times as fast as one "
        f"after another by the tokens and passes of their steps{limited}{rest}",
    )


def speed_up(model: Any, runs: Sequence[Sequence[Step]]) -> float:
    """The cost of the first steps of ``runs``, one after another, over that of joint ones."""
    steps = list(zip(*runs, strict=True))
    alone = sum(cost(model, [one]) for step in steps for one in step)
    return alone / max(1e-9, sum(cost(model, step) for step in steps))


def cost(model: Any, steps: Sequence[Step]) -> float:
    """The cost in tokens of ``steps`` that are taken together: rows that are read alike share
    passes."""
    total, device = 0.0, model.device
    for head in {step.head for step in steps}:
        alike = [step.rows for step in steps if step.head == head]
        launch = PASS[device.type == "cpu"] + MIXED * (len(alike) - 1)
        token = SHARED[device.type == "cpu"] if len(alike) > 1 else 1.0
        passes = micro_batches([row for rows in alike for row in rows], device)
        for part in passes:
            total += token * len(part) * max(map(len, part)) + launch
            if len(steps) == 1 and not (head or steps[0].whole):
                saved = saved_in_training(model, part)
                total -= saved - launch if saved else 0.0
    return total


def _first_steps(run: Planned) -> list[Step]:
    """The first steps; short runs are repeated."""
    rows = run.train
    epoch = epoch_batches([len(row) for row in rows], run.batch_size, run.seed, 0)
    batches = [[rows[at] for at in epoch[n % len(epoch)]] for n in range(SAMPLE)]
    return [Step(run.head, _read(batch) if run.pairs else batch, run.whole) for batch in batches]


def _read(pairs: Rows) -> Rows:
    """Both answers of each pair."""
    return [replace(row, answer=answer) for row in pairs for answer in row.choices]
