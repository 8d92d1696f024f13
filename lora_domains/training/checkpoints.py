"""Where a run stands, and that on disk: everything the next step depends on.

A checkpoint is written whole or not at all: a process killed, or a disk full, at any moment leaves
the one before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from lora_domains.atomic import new_file, unfinished
from lora_domains.data.tokenization import EncodedExample
from lora_domains.errors import UsageError


@dataclass
class State:
    """Where a run stands: everything the next step depends on."""

    epoch: int = 0
    step: int = 0
    """Optimiser steps done within ``epoch``."""
    losses: list[float] = field(default_factory=list)
    """Nats summed over the global batch, and its tokens, for each step of the epoch so far."""
    tokens: list[int] = field(default_factory=list)
    first_loss: float | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_weights: dict[str, tuple[Tensor, Tensor]] | None = None
    best_head: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    total_tokens: int = 0
    total_steps: int = 0
    micro: int | None = None
    """Padded tokens in one pass, once memory ran out; rounding depends on it."""


def checkpoint_path(out: Path, domain: str) -> Path:
    """Where an unfinished run of ``domain`` that saves into ``out`` keeps its checkpoint."""
    return out / f".{domain}.checkpoint"


def write_checkpoint(path: Path, content: Mapping[str, Any]) -> str | None:
    """Put ``content`` in the place of the checkpoint at ``path``; why not, where that failed."""
    try:
        with new_file(path, private=True) as file:
            torch.save(dict(content), file)
    except OSError as error:
        return error.strerror or str(error)
    except RuntimeError as error:
        # torch's archive writer hides what the disk said behind a failed check of its own.
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
            hint="Delete it, or leave --resume out to start anew.",
        ) from None
    return stored


def check_same_run(path: Path, stored: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise UsageError when the checkpoint at ``path`` is of another run than ``run``."""
    other = [name for name in run if stored["run"].get(name) != run[name]]
    if other:
        raise UsageError(
            where=path.name,
            expected="the same base, recipe, rows and settings as the interrupted run",
            found="another " + " and another ".join(other),
            hint="Give the same command and --resume, or leave --resume out to start anew.",
        )


def clear(path: Path) -> None:
    """Take the checkpoint away, and what killed processes left of unfinished ones."""
    for old in (path, *unfinished(path)):
        old.unlink(missing_ok=True)


def hash_items(items: Sequence[EncodedExample]) -> str:
    """sha256 over encoded rows: ids and tokens, in order."""
    digest = sha256()
    for item in items:
        digest.update(repr((item.id, item.prompt, item.answer, item.target)).encode())
    return digest.hexdigest()
