"""Launches of several processes with Accelerate, and forks that form a run like those of one."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from socket import socket
from tempfile import TemporaryDirectory

from conftest import ROOT
from support.commands import fork

from lora_domains import distributed


def free_port() -> int:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def fork_run(count: int, action: Callable[[], object], folder: Path) -> list[tuple[str, str]]:
    """Run ``action`` in a run of ``count`` processes that have the libraries loaded; the output
    and the errors of each. ``folder`` holds a folder for each to work in."""
    port = free_port()
    places = [folder / f"process{rank}" for rank in range(count)]
    for place in places:
        place.mkdir(parents=True)
    forked = [fork(partial(_take_part, rank, count, port, action), place)
              for rank, place in enumerate(places)]  # fmt: skip
    ended = [process.ended() for process in forked]
    assert [code for code, _, _ in ended] == [0] * count, "\n".join(e for _, _, e in ended)
    return [(out, errors) for _, out, errors in ended]


def _take_part(rank: int, count: int, port: int, action: Callable[[], object]) -> None:
    """``action`` in the environment that ``accelerate launch`` gives to a process of a run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that was forked
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched = {
        "ACCELERATE_MIXED_PRECISION": "no",
        "OMP_NUM_THREADS": 1,
        "CUDA_VISIBLE_DEVICES": "",
    }
    os.environ.update({name: str(v) for name, v in (ranks | address | launched).items()})
    action()
    distributed.leave(distributed.state())


def launch(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """``accelerate launch ARGUMENTS``."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    return subprocess.run(
        command, env=_environment(variables), capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


def fork_launch(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same, with Accelerate in a fork of this process; what it starts are fresh processes."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    def action() -> None:
        environment = _environment(variables)
        os.environ.clear()
        os.environ.update(environment)
        launch_command(launch_command_parser().parse_args(words))

    words = list(map(str, arguments))
    with TemporaryDirectory() as folder:
        return subprocess.CompletedProcess(words, *fork(action, Path(folder)).ended())


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return environment | variables
