"""The checkpoint of several runs: one file, so that all of them are resumed from the same step.

Which rows share a pass decides rounding. Files of their own, written at different moments, could
not be resumed to the same bytes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.training.checkpoints import (
    SAVE_SECONDS,
    check_ranks,
    check_same_run,
    clear,
    read_checkpoint,
    write_checkpoint,
)


def joint_path(out: Path, names: Sequence[str]) -> Path:
    """The checkpoint of an unfinished run of the domains ``names`` that saves into ``out``."""
    return out / f".joint-{sha256('/'.join(names).encode()).hexdigest()[:12]}.checkpoint"


class JointCheckpoint:
    """The checkpoint file of several runs: written by the main process, read for all."""

    def __init__(self, path: Path, display: Display, resume: bool) -> None:
        self.path, self.display = path, display
        self.complete, self.wanted = True, False
        """Whether the last write succeeded, which only the main process knows; and whether a run
        asked for a new one."""
        self.together: int | None = None
        """How many runs take their steps together; None before that is decided, without a file."""
        self.ended: list[str] = []
        """Runs whose adapters are saved."""
        self.failed: dict[str, dict[str, Any]] = {}
        """Runs that were given up, with the parts of its error, and the digest of its recipe."""
        self.step = 0
        """Steps that runs took together so far."""
        self.runs: dict[str, dict[str, Any]] = {}
        """What was read of each run that had begun, and goes on when it gets its place again."""
        self._time = time.monotonic()
        if resume:
            self._read()
        elif distributed.on_main(path.exists):
            display.warn("an unfinished run is replaced; --resume would have continued it.")

    def _read(self) -> None:
        stored = distributed.on_main(partial(read_checkpoint, self.path))
        if stored is None:
            return
        check_ranks(stored["ranks"], self.display)
        self.together, self.step = stored["together"], stored["step"]
        self.ended, self.failed, self.runs = stored["ended"], stored["failed"], stored["runs"]

    @property
    def due(self) -> bool:
        """Whether so much time has passed since the last write that another one is due."""
        return time.monotonic() - self._time > SAVE_SECONDS

    def write(self, runs: Mapping[str, Callable[[], Mapping[str, Any]]]) -> bool:
        """Replace the file atomically by the content of ``runs``; whether that succeeded."""
        self._time, self.wanted = time.monotonic(), False
        if distributed.is_main():
            refused = write_checkpoint(self.path, {
                "ranks": distributed.state().num_processes, "together": self.together,
                "step": self.step, "ended": self.ended, "failed": self.failed,
                "runs": self.runs | {name: dict(content()) for name, content in runs.items()},
            })  # fmt: skip
            if refused:
                self.display.warn(
                    f"no checkpoint could be written ({refused}); the last one stays."
                )
            self.complete = not refused
        return self.complete

    def clear(self) -> None:
        """Delete the file, once all adapters are saved."""
        if distributed.is_main():
            clear(self.path)


class Part:
    """One run's place in the checkpoint of several; see ``training.checkpoints.Checkpoint``."""

    def __init__(self, whole: JointCheckpoint, name: str) -> None:
        self.whole, self.name = whole, name

    @property
    def complete(self) -> bool:
        return self.whole.complete

    @property
    def due(self) -> bool:
        return self.whole.due

    def write(self, content: Callable[[], Mapping[str, Any]]) -> bool:
        """Ask for a new file, which is written when all runs are between two steps."""
        self.whole.wanted = True
        return self.whole.complete

    def read(self, identity: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was stored of the run of ``identity``; None where it had not begun.

        Raises UsageError where it belongs to another run.
        """
        stored = self.whole.runs.pop(self.name, None)
        if stored is not None:
            check_same_run(self.whole.path, stored, identity)
        return stored

    def clear(self) -> None:
        """The file is deleted when all runs are over."""
