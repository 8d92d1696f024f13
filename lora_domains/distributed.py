"""The processes of a run: who writes, how scoring is shared, their threads, and versions.

Every process holds the frozen base, or its share of it (``sharding``). The processes share the rows
and exchange the adapter's gradients. A launch that would not run as requested is refused or warned
about.
"""

import atexit
import gc
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from lora_domains import __version__
from lora_domains.errors import BaseModelError, LoraDomainsError, UsageError

R = TypeVar("R")
_sharing: ContextVar[bool] = ContextVar("lora_domains_sharing", default=False)


def state() -> Any:
    """Accelerate's ``PartialState``: rank, number of processes, device.

    Raises UsageError when fewer processes run than were launched for one run.
    """
    from accelerate import PartialState

    if not PartialState._shared_state:
        _check_launch()
        if _number("WORLD_SIZE") > 1:
            # Imported later, its defaults would keep the process group, which ``leave`` has to end.
            import torch.distributed.nn.functional  # noqa: F401

        try:
            started = PartialState(cpu=_on_cpu())
        except ImportError as error:
            raise UsageError(
                where="accelerate launch",
                expected="plain data parallelism",
                found=str(error).splitlines()[0],
                hint="Launch with recipes/accelerate/ddp.yaml: a frozen base needs no ZeRO.",
            ) from error
        if started.num_processes > 1:
            atexit.register(leave, started)
    current = PartialState()
    launched = _number("WORLD_SIZE")
    if launched > current.num_processes:
        raise UsageError(
            where="accelerate launch",
            expected=f"one run of {launched} processes",
            found=f"{launched} separate processes, each in a group of {current.num_processes}",
            hint="On a machine without an accelerator, create no PartialState or Accelerator "
            "before lora_domains, or create it with cpu=True.",
        )
    return current


def _on_cpu() -> bool:
    """Whether Accelerate must be told to use the CPU: launched processes would otherwise each run
    alone, and write to the same folder."""
    requested = _is_set("ACCELERATE_USE_CPU")
    return requested or (_number("WORLD_SIZE") > 1 and not torch.accelerator.is_available())


def _check_launch() -> None:
    """Refuse Accelerate's simple launcher, which ignores ``--num_processes``: it sets an address
    for a process group but no number of processes."""
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
        and not any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    ):
        raise UsageError(
            where="accelerate launch",
            expected="the number of processes in --num_processes",
            found="one: with --cpu, or without --multi_gpu, Accelerate starts a single process",
            hint="accelerate launch --multi_gpu --num_processes 2 … starts two, on CPUs as well. "
            "For one process give --num_processes 1; if MASTER_ADDR was set before, unset it.",
        )


def launch_warnings() -> list[str]:
    """Options of the launch that have no effect here."""
    warnings = []
    on_cpu = state().device.type == "cpu"
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("ZeRO", "ACCELERATE_USE_DEEPSPEED")):
        if _is_set(flag):
            instead = "; on a CPU Accelerate runs plain data parallelism" if on_cpu else ""
            warnings.append(
                f"{name} is not used{instead}. Every process holds the whole frozen base, and only "
                "the adapter's gradients are exchanged. --shard-base shares a large base out to "
                "the processes; --load-in-4bit makes it smaller."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        warnings.append(
            f"mixed precision {precision} is not used: the base computes in the dtype it was "
            "loaded in, the adapter in float32."
        )
    if _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") > 1:
        warnings.append(
            "gradient accumulation steps are not used: a batch of any size is divided into passes "
            "that fit into memory. Set batch_size instead."
        )
    return warnings


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 1


# ── One process writes ──────────────────────────────────────────────────────────────────────────


def is_main() -> bool:
    return bool(state().is_main_process)


def on_main(action: Callable[[], R]) -> R:
    """Run ``action`` on the main process; every process gets its result, or its error if that is
    one of this package, so that none waits for one that failed."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = action()
        except LoraDomainsError as error:
            outcome[1] = error
    outcome = same_everywhere(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    result: R = outcome[0]
    return result


def same_everywhere(value: R) -> R:
    """The main process's ``value``, on all processes."""
    if state().num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    meet()
    received: R = broadcast_object_list([value])[0]
    return received


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; all of them must call this."""
    return not smallest(not flag)


def smallest(value: int) -> int:
    """The smallest ``value`` of any process; all of them must call this."""
    if state().num_processes == 1:
        return value
    from accelerate.utils import gather_object

    meet()
    return int(min(gather_object([value])))


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over all processes; all of them must call this."""
    if state().num_processes == 1:
        return tensor
    from accelerate.utils import reduce

    meet()
    total: torch.Tensor = reduce(tensor, reduction="sum")
    return total


# ── Turns ───────────────────────────────────────────────────────────────────────────────────────
#
# A sharded base is gathered piece by piece, and each time all processes must take part. But one may
# score three batches while another scores two, or writes a file alone. So each process says which
# operation it comes to next, and the first in their common order is everybody's turn: a process
# that came to another one only helps, and asks again. Where results are exchanged, all come to
# ``END``: a process that is there before the others helps them until they arrive.

END = 2**62
"""After all operations: where processes meet."""

_operations: dict[int, Callable[[], object]] = {}
_group: list[Any] = []
_meshes: list[Any] = []


def new_mesh(kind: str) -> Any:
    """All processes as torch's ``DeviceMesh``, of devices of this ``kind``."""
    from torch.distributed.device_mesh import init_device_mesh

    _meshes.append(init_device_mesh(kind, (torch.distributed.get_world_size(),)))
    return _meshes[-1]


def register_turns(operations: Sequence[Callable[[], object]]) -> list[int]:
    """The numbers of ``operations`` in the common order; all processes must call this alike.

    An operation helps another process: it makes the same collective calls, and keeps no result.
    """
    if not _group:
        # The default group may be of a GPU, where reading a number waits for all that was begun.
        _group.append(torch.distributed.new_group(backend="gloo"))
    numbers = [*range(len(_operations), len(_operations) + len(operations))]
    _operations.update(zip(numbers, operations, strict=True))
    return numbers


def take_turn(number: int) -> None:
    """Return when it is the turn of operation ``number``; help other processes until then."""
    while True:
        first = torch.tensor(number)
        torch.distributed.all_reduce(first, torch.distributed.ReduceOp.MIN, group=_group[0])
        if int(first) == number:
            return
        _operations[int(first)]()


def meet() -> None:
    """Return when all processes came here; help them until then."""
    if _operations:
        take_turn(END)


def leave(started: Any) -> None:
    """``meet``, at the end of the program, and end the process groups; a process that has died is
    not waited for.

    The threads of a gloo group may let go of a tensor after its operation is over, for which they
    need Python. Where it exits meanwhile they abort it (code -6), so they are joined before: when
    nothing refers to the group any more.
    """
    with suppress(RuntimeError):
        meet()
    _group.clear()
    _operations.clear()
    for mesh in _meshes:
        mesh._pg_registry = {}  # it has no public way to let go of its group
    gc.collect()
    started.destroy_process_group()


# ── All processes score ─────────────────────────────────────────────────────────────────────────


@contextmanager
def sharing(on: bool = True) -> Iterator[None]:
    """Inside, the processes share scoring: all make the same calls and get all results. Outside,
    or if not ``on``, each process scores everything by itself."""
    token = _sharing.set(on)
    try:
        yield
    finally:
        _sharing.reset(token)


def own_share(work: Iterable[R], skipped: Callable[[R], object]) -> Iterator[R]:
    """This process's share of ``work``: every n-th piece. ``skipped`` is called for the others.
    The pieces themselves do not depend on the number of processes."""
    rank, ranks = (state().process_index, state().num_processes) if _sharing.get() else (0, 1)
    for number, piece in enumerate(work):
        if number % ranks == rank:
            yield piece
        else:
            skipped(piece)


def is_shared() -> bool:
    """Whether several processes share the scoring of this call."""
    return _sharing.get() and state().num_processes > 1


def merged(results: Mapping[int, R]) -> dict[int, R]:
    """The results of all processes, by their numbers."""
    if not is_shared():
        return dict(results)
    from accelerate.utils import gather_object

    meet()
    return {key: value for part in gather_object([dict(results)]) for key, value in part.items()}


# ── The machine ─────────────────────────────────────────────────────────────────────────────────


def device_of(device: str | torch.device | None) -> torch.device:
    """The device of that name; without a name, or with "auto", the one of this process."""
    if device is None or device == "auto":
        return torch.device(state().device)
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError) as error:
        target, reason = torch.device("meta"), str(error).splitlines()[0]
    else:
        reason = "it holds no values"
    if target.type == "meta":
        raise BaseModelError(
            where="device",
            expected="'auto', 'cpu' or a device of this machine such as 'cuda'",
            found=f"{str(device)!r} ({reason})",
            hint="Leave it out to use an accelerator where there is one.",
        )
    return target


def processes_here() -> int:
    """How many processes of this run share this machine."""
    return _number("LOCAL_WORLD_SIZE")


def use_cores(threads: int | None = None) -> None:
    """Compute with ``threads`` threads, or on a CPU with this process's share of the cores.

    ``accelerate launch`` gives each process one thread unless it is told otherwise. The share is
    taken only then: a number of threads that the user set stays.
    """
    if threads is not None:
        torch.set_num_threads(threads)
        return
    by_launcher = os.environ.get("OMP_NUM_THREADS") == "1" and not _threads_requested()
    if state().device.type == "cpu" and "ACCELERATE_MIXED_PRECISION" in os.environ and by_launcher:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes_here()))


def _threads_requested() -> bool:
    """Whether ``accelerate launch`` was told a number of threads, in its environment or by flag: it
    sets OMP_NUM_THREADS for its processes in either case, so it has to be asked itself."""
    import psutil

    try:
        for process in psutil.Process().parents():
            command = process.cmdline()
            if any("accelerate" in part for part in command):
                flags = [part.replace("-", "_") for part in command]
                by_flag = any(flag.startswith("__num_cpu_threads_per_process") for flag in flags)
                return by_flag or "OMP_NUM_THREADS" in process.environ()
    except psutil.Error:
        return False  # it has ended, or belongs to another user
    return False


def ran_out(error: Exception) -> bool:
    """Whether ``error`` means out of memory, on a device or in the CPU allocator."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def environment(device: torch.device, quantization: str | None, seed: int) -> dict[str, Any]:
    """The ``environment`` entry of a card, for a base on ``device``."""
    import accelerate
    import peft
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "accelerate": accelerate.__version__,
        "lora_domains": __version__,
        "device": _device_name(device),
        "world_size": state().num_processes,
        "threads": torch.get_num_threads(),
        "seed": seed,
        "git": _git(),
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        **({} if quantization is None else {"bitsandbytes": version("bitsandbytes")}),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _git() -> str | None:
    """The current commit of the working folder's git repository, if there is one."""
    import subprocess

    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
