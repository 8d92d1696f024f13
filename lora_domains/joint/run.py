"""Training several adapters together: the loop over the steps that their runs take at once.

A run keeps all that is its own: batches, optimiser, clipping, schedule, patience, validation. Each
joint step computes the gradients of one step of every run in shared passes. When a run is over its
adapter is saved, and one that waits takes its place.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import torch

from lora_domains import distributed
from lora_domains.console import STEPS, Display, format_duration
from lora_domains.errors import AdapterError, LossExploded, OutOfMemory
from lora_domains.joint.checkpoint import JointCheckpoint, Part
from lora_domains.joint.gradients import Batch, JointGradients
from lora_domains.modeling.bank import Bank
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.checkpoints import StopSignals
from lora_domains.training.fit import save_best
from lora_domains.training.gradients import sum_over_ranks
from lora_domains.training.loop import Run, Trained


class Job(Protocol):
    """An adapter to train."""

    name: str

    @property
    def steps(self) -> int:
        """Steps of its run, if patience lasts."""

    def begin(self) -> Run:
        """Its run; the adapter in training is added to the bank."""

    def end(self, trained: Trained) -> None:
        """Save the adapter of a run that is over."""


@dataclass
class Active:
    """A run that takes its steps with others."""

    job: Job
    run: Run
    batches: Generator[list[EncodedExample]]
    opened: ExitStack
    rows: Sequence[EncodedExample] = field(default_factory=list)
    """Of its next step."""


class JointRun:
    """Trains ``jobs``, up to ``checkpoint.together`` of them at a time."""

    def __init__(
        self, bank: Bank, jobs: Sequence[Job], checkpoint: JointCheckpoint, display: Display
    ) -> None:
        self.bank, self.jobs, self.checkpoint, self.display = bank, jobs, checkpoint, display
        self.gradients, self.signals = JointGradients(bank), StopSignals()
        over = {*checkpoint.ended, *checkpoint.failed}
        self.waiting = [job for job in jobs if job.name not in over]
        self.active: list[Active] = []

    def fit(self) -> None:
        """Train until every run is over.

        Raises TrainingInterrupted after a signal, OutOfMemory, and AdapterError for an adapter that
        cannot be saved. A run whose loss explodes is given up; the others go on, and its
        LossExploded is raised in the end. In every case the adapters in training leave the bank,
        and the caller's random state is restored.
        """
        device = self.bank.base.device
        total = sum(job.steps for job in self.waiting)
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            self.signals.noted(), ExitStack() as opened,
        ):  # fmt: skip
            opened.callback(self._close)
            advance = opened.enter_context(self.display.progress("steps of all", total))
            advance(sum(stored["state"]["total_steps"] for stored in self.checkpoint.runs.values()))
            try:
                while self._advance():
                    if self.checkpoint.wanted:
                        self._save()
                    self._step()
                    advance(len(self.active), self._note())
            except OutOfMemory as error:
                save_best(error, [one.run for one in self.active])
                raise
            self._save()
            # Ranks exchange signals within each step, and once more after the last one.
            if distributed.anywhere(self.signals.received is not None):
                self._interrupt(self.checkpoint.complete)
        for first in self.checkpoint.failed.values():
            raise LossExploded(**first["error"])

    # ── From step to step ───────────────────────────────────────────────────────────────────────

    def _advance(self) -> bool:
        """Let every run reach its next step, and others take the place of those that are over.

        Whether there is a step to take.
        """
        for one in list(self.active):
            self._next(one)
        while self.waiting and len(self.active) < (self.checkpoint.together or 1):
            self._next(self._begin(self.waiting.pop(0)))
        return bool(self.active)

    def _begin(self, job: Job) -> Active:
        run, opened = job.begin(), ExitStack()
        opened.enter_context(run.isolated())
        run.checkpoint = Part(self.checkpoint, job.name)
        batches = run.batches(resume=job.name in self.checkpoint.runs)
        opened.enter_context(closing(batches))
        self.active.append(one := Active(job, run, batches, opened))
        return one

    def _next(self, one: Active) -> None:
        try:
            one.rows = next(one.batches)
        except StopIteration:
            try:
                one.job.end(one.run.trained())
            except AdapterError:
                self._save()  # all runs are between two steps
                raise
            self.checkpoint.ended.append(one.job.name)
            self._leave(one)
        except LossExploded as error:
            self._give_up(one, error)

    def _step(self) -> None:
        """One step of every active run."""
        began, inside = time.monotonic(), self._seconds()
        if (self.checkpoint.together or 1) == 1:  # as in a fit of its own
            (one,) = self.active
            one.run.gradients.read_below(one.run.train, one.run.plan.passes)
        batches = [Batch(one.run.gradients, one.rows) for one in self.active]
        nats = self.gradients.compute(batches)
        parameters = [p for one in self.active for p in one.run.parameters]
        totals, stop = sum_over_ranks(parameters, nats, self.signals.received)
        before = [one.run.state.total_tokens for one in self.active]
        exploded: list[tuple[Active, LossExploded]] = []
        for one, total in zip(self.active, totals, strict=True):
            try:
                one.run.finish_step(one.rows, total)
            except LossExploded as error:
                exploded.append((one, error))
        # What the base computed for general text counts as a phase of its own.
        spent = time.monotonic() - began - (self._seconds() - inside)
        self._credit(spent, before)
        self.checkpoint.step += 1
        for one, reason in exploded:
            self._give_up(one, reason)
        if stop:
            self._interrupt(self._save())

    def _seconds(self) -> float:
        return sum(one.run.state.seconds for one in self.active)

    def _credit(self, seconds: float, before: Sequence[int]) -> None:
        """Share the time of a step among the runs by the tokens that each read."""
        read = [one.run.state.total_tokens - b for one, b in zip(self.active, before, strict=True)]
        for one, tokens in zip(self.active, read, strict=True):
            phases, share = one.run.state.phases, tokens / max(1, sum(read))
            phases[STEPS] = phases.get(STEPS, 0.0) + seconds * share

    def _note(self) -> str:
        left = format_duration(sum(one.run.seconds_left() for one in self.active))
        waiting = f", {len(self.waiting)} wait" if self.waiting else ""
        return f"{len(self.active)} adapters{waiting}, {left} left"

    # ── The end of a run ────────────────────────────────────────────────────────────────────────

    def _leave(self, one: Active) -> None:
        self.active.remove(one)
        self.checkpoint.wanted = True
        one.opened.close()

    def _give_up(self, one: Active, error: LossExploded) -> None:
        parts = ("where", "expected", "found", "hint")
        self.checkpoint.failed[one.job.name] = {
            "error": {part: getattr(error, part) for part in parts},
            "recipe": one.run.domain.digest(),
        }
        self._leave(one)
        others = " The others go on." if self.active or self.waiting else ""
        self.display.warn(f"{error.where}: the loss is {error.found}. {error.hint}{others}")

    def _save(self) -> bool:
        return self.checkpoint.write({one.job.name: one.run.content for one in self.active})

    def _interrupt(self, written: bool) -> NoReturn:
        runs = [one.run for one in self.active]
        where = "; ".join(run.place for run in runs) or "after the last step"
        outcome = " ".join(run.save_best() for run in runs)
        raise self.signals.interrupted(where, written, outcome)

    def _close(self) -> None:
        while self.active:
            self.active.pop().opened.close()
