"""Running ``lora-domains`` in this process or a fork of it, on rows in CSV files."""

import csv
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lora_domains.cli import main as cli

FAST = ("--lr", "0.01", "--rank", "8")
"""Training flags with which a tiny base learns in a few epochs."""


def run(*arguments: str) -> int:
    """The exit code of ``lora-domains ARGUMENTS``."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


@dataclass(frozen=True)
class Forked:
    """A process that was forked from this one; its output is in files of ``folder``."""

    number: int
    folder: Path

    def ended(self) -> tuple[int, str, str]:
        """Its exit code once it ended, its output and its errors."""
        code = os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])
        out = self.folder / OUTPUT[0]
        return code, out.read_text() if out.exists() else "", self.errors()

    def errors(self) -> str:
        """What it has written to its standard error so far."""
        path = self.folder / OUTPUT[1]
        return path.read_text() if path.exists() else ""


def fork(action: Callable[[], object], folder: Path, stdout: int | None = None) -> Forked:
    """Begin ``action`` in ``folder`` in a process that has the libraries loaded. Its output may go
    to the pipe ``stdout`` instead."""
    for library in ("lora_domains.model", "peft", "sklearn.svm"):
        import_module(library)
    child = os.fork()
    if child == 0:
        os._exit(_alone(action, folder, stdout))
    return Forked(child, folder)


OUTPUT = ("stdout.txt", "stderr.txt")


def _alone(action: Callable[[], object], folder: Path, stdout: int | None) -> int:
    """``action``'s exit code, as where Python alone runs it."""
    os.chdir(folder)
    warnings.resetwarnings()
    sys.stdin = open(os.devnull)  # noqa: SIM115, PTH123
    sys.stdout = open(OUTPUT[0] if stdout is None else stdout, "w")  # noqa: SIM115, PTH123
    sys.stderr = open(OUTPUT[1], "w", buffering=1)  # noqa: SIM115, PTH123 (the process ends)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        os.dup2(stream.fileno(), number)
    try:
        action()
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()  # as Python does at its exit
    except OSError:
        traceback.print_exc()
        code = 120
    sys.stderr.flush()
    return code


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write ``rows`` as CSV; returns the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
