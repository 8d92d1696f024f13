"""Interrupting and resuming a run: stop signals, the training state and its checkpoint file."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch

from lora_domains import distributed
from lora_domains.atomic import new_file, unfinished
from lora_domains.console import STEPS, VALIDATION, Display
from lora_domains.domain import Domain, as_record
from lora_domains.errors import TrainingInterrupted, UsageError
from lora_domains.modeling.base import Base
from lora_domains.schema import flag_of
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.plan import Plan


@dataclass
class State:
    """Everything that the next step of a run depends on, beside weights and optimiser."""

    epoch: int = 0
    step: int = 0
    """Optimiser steps finished within ``epoch``."""
    losses: list[float] = field(default_factory=list)
    """Nats summed over the global batch, for each step of the epoch so far."""
    tokens: list[int] = field(default_factory=list)
    """Supervised tokens of the same batches."""
    first_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    """The record of each validation; ``epoch`` is a fraction within one."""
    best: dict[str, Any] | None = None
    """The record of the best epoch so far."""
    best_tensors: dict[str, Any] = field(default_factory=dict)
    """Its trained tensors (``Run.tensors``)."""
    best_optimizer: dict[str, Any] | None = None
    """The optimiser's state at the best epoch, where an ending may go on from it."""
    best_steps: int = 0
    """Steps before it."""
    ending: tuple[int, int] | None = None
    """Steps before and after the ending, in which the rate decays from the best epoch on."""
    phases: dict[str, float] = field(default_factory=dict)
    """Seconds so far of each phase of ``console``."""
    total_tokens: int = 0
    """Tokens that steps have read so far, of rows with their prompts and of general texts."""
    total_steps: int = 0
    micro: int | None = None
    """Padded tokens of a pass, once memory ran out; rounding depends on it."""
    pass_bytes: int | None = None
    """Memory that a pass may take, on a CPU; rounding depends on it too."""
    read_below: bool | None = None
    """Whether layers below the adapter read each row once; rounding depends on that, too."""

    @property
    def seconds(self) -> float:
        """Seconds so far, of all phases."""
        return sum(self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens read in steps, in each second of steps."""
        return self.total_tokens / max(self.phases.get(STEPS, 0.0), 1e-9)

    def seconds_left(self, steps: int, validations: int, rows: int, monitored: int) -> float:
        """The time that the rest of ``steps`` and ``validations`` will take.

        Before the first validation its time is estimated from the tokens of its ``rows`` and of the
        ``monitored`` texts, which the base reads once more: forward, a token takes about a third of
        its time in a step.
        """
        spent, rounds = self.phases.get(STEPS, 0.0), validations - len(self.history)
        left = (steps - self.total_steps) * spent / max(1, self.total_steps)
        if self.history:
            return left + rounds * self.phases.get(VALIDATION, 0.0) / len(self.history)
        tokens = rounds * (rows + monitored) + monitored
        return left + tokens * spent / max(1, self.total_tokens) / 3

    def record(self, plan: Plan, best: Mapping[str, Any], peak_memory: int) -> dict[str, Any]:
        """The card's ``training`` entry; ``best`` is the record of the epoch that is kept."""
        return {
            "epochs": self.history[-1]["epoch"],
            "steps": self.total_steps,
            "best_epoch": best["epoch"],
            **{key: best[key] for key in ("decayed_from",) if key in best},
            "rank": plan.rank,
            "alpha": plan.alpha,
            "retention": plan.retention.name,
            "scale": best.get("scale", 1.0),
            "lr": plan.lr,
            "batch_size": plan.batch_size,
            "micro_tokens": self.micro,
            "pass_bytes": self.pass_bytes,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory,
            "seconds": round(self.seconds, 2),
            "phases": {name: round(seconds, 2) for name, seconds in self.phases.items()},
            "history": self.history,
        }


SAVE_SECONDS = 60.0
"""Time between two checkpoints within an epoch."""

# ── The file ────────────────────────────────────────────────────────────────────────────────────


def checkpoint_path(out: Path, domain: str) -> Path:
    """The checkpoint of an unfinished run of ``domain`` that saves into ``out``."""
    return out / f".{domain}.checkpoint"


class Checkpoint(Protocol):
    """Where a run keeps its checkpoint: a file of its own, or one of several runs."""

    @property
    def complete(self) -> bool: ...

    @property
    def due(self) -> bool: ...

    def write(self, content: Callable[[], Mapping[str, Any]]) -> bool: ...

    def read(self, identity: Mapping[str, Any]) -> dict[str, Any] | None: ...

    def clear(self) -> None: ...


class RunCheckpoint:
    """The checkpoint file of a run: written by the main process, read for all."""

    def __init__(self, path: Path, display: Display) -> None:
        self.path, self.display = path, display
        self.complete = True
        """Whether the last write succeeded; only the main process knows."""
        self._time = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether ``SAVE_SECONDS`` have passed since the last write."""
        return time.monotonic() - self._time > SAVE_SECONDS

    def write(self, content: Callable[[], Mapping[str, Any]]) -> bool:
        """Replace the file atomically; whether that succeeded."""
        self._time = time.monotonic()
        if distributed.is_main():
            refused = write_checkpoint(self.path, content())
            if refused:
                self.display.warn(
                    f"no checkpoint could be written ({refused}); the last one stays."
                )
            self.complete = not refused
        return self.complete

    def read(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """The content for the run of ``identity``, on every process; None where there is none.

        Raises UsageError for a file that cannot be read or belongs to another run.
        """
        # Sent by the main process: other machines may not see the file.
        stored = distributed.on_main(partial(read_checkpoint, self.path))
        if stored is None:
            self.display.note("Nothing to resume: starting at the beginning.")
            return None
        check_same_run(self.path, stored, identity)
        check_ranks(stored["ranks"], self.display)
        return stored

    def clear(self) -> None:
        if distributed.is_main():
            clear(self.path)


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> str | None:
    """Replace the checkpoint at ``path`` atomically; returns why the disk refused, if it did."""
    try:
        with new_file(path, private=True) as file:
            torch.save(dict(content), file)
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:
        # torch's archive writer replaces the disk's error by a failed check of its own.
        if not isinstance(error.__context__, OSError):
            raise
        return error.__context__.strerror or str(error.__context__)
    return None


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """The checkpoint at ``path``, None where there is none; UsageError when it cannot be read."""
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, UnpicklingError):
        raise UsageError(
            where=path.name,
            expected="the checkpoint of an interrupted run",
            found="a file that cannot be read as one",
            hint="Delete it, or leave --resume out to start from the beginning.",
        ) from None
    return stored


def origin(domain: Domain, base: Base) -> dict[str, Any]:
    """The base and the recipe of a run, and its settings by name ("training.lr"), which say what
    differs in another recipe."""
    settings: dict[str, Any] = {"base": base.id, "quantization": base.quantization}
    for part, value in as_record(domain).items():
        several = isinstance(value, Mapping)
        settings |= {f"{part}.{k}": v for k, v in value.items()} if several else {part: value}
    precision = [str(base.dtype), base.quantization]
    recipe = domain.digest()
    return {"base": base.identity, "precision": precision, "recipe": recipe, "settings": settings}


def check_same_run(path: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise UsageError when the checkpoint at ``path`` belongs to another run than ``run``.

    ``run`` is the identity of the run that resumes (``Run.identity``). What differs is told by its
    flags, where it was said by them.
    """
    before = stored["run"]
    other = [name for name in run if name != "settings" and before.get(name) != run[name]]
    if not other:
        return
    now = run.get("settings", {})
    told = [
        f"{flag_of(name)} was {_shown(old)} in the interrupted run and is {_shown(now[name])} now"
        for name, old in before.get("settings", {}).items() if name in now and old != now[name]
    ]  # fmt: skip
    raise UsageError(
        where=path.name,
        expected="the same base, recipe, rows and settings as the interrupted run",
        found="; ".join(told) or "another " + " and another ".join(other),
        hint="Repeat the same command with --resume, or leave --resume out to start from the "
        "beginning.",
    )


def _shown(value: object) -> str:
    return (
        "not given" if value in (None, False, [], {}) else "given" if value is True else str(value)
    )


def check_ranks(before: int, display: Display) -> None:
    """Warn when a run with ``before`` processes is resumed with another number of them."""
    ranks = distributed.state().num_processes
    if before != ranks:
        display.warn(
            f"started with {before} processes and resumed with {ranks}: the result is the same up "
            "to rounding, except for the draws of dropout."
        )


def clear(path: Path) -> None:
    """Delete the checkpoint, and unfinished ones that killed processes left."""
    for old in (path, *unfinished(path)):
        old.unlink(missing_ok=True)


def hash_examples(examples: Sequence[EncodedExample]) -> str:
    """sha256 over encoded rows: ids and tokens, in order."""
    digest = sha256()
    for example in examples:
        fields = (example.id, example.prompt, example.answer, example.target)
        # Of answers that are compared, the first is the answer itself.
        others = example.choices[1:] if example.choices[:1] == (example.answer,) else ()
        digest.update(repr((*fields, *example.unsupervised, *others, *example.truth)).encode())
    return digest.hexdigest()


# ── Signals ─────────────────────────────────────────────────────────────────────────────────────


class StopSignals:
    """Notes Ctrl-C and SIGTERM, so that a run stops between steps; a second one stops at once."""

    received: int | None = None
    """Number of the signal."""

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Inside, signals are noted; only the main thread of a process can do that."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, _frame: object) -> None:
            if self.received is not None:
                raise KeyboardInterrupt
            self.received = number

        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self, where: str, written: bool, outcome: str) -> TrainingInterrupted:
        """The error that ends the run; ``written``: whether a checkpoint holds the last step.

        ``outcome`` says what became of the adapter.
        """
        resume = "Run the same command with --resume to continue from this step."
        if not written:
            resume = (
                "The checkpoint of this step could not be written: free some space; the same "
                "command with --resume continues from the checkpoint before."
            )
        # Another process may have received the signal.
        name = signal.Signals(self.received or signal.SIGTERM).name
        return TrainingInterrupted(
            where=where, expected="to finish", found=name, hint=f"{resume} {outcome}"
        )
