"""The processes and the machine of a run: who writes, how scoring is shared, memory, versions.

Every process holds the whole frozen base. The processes share the rows and exchange only the
adapter's gradients. A launch that would not run as requested is refused or warned about.
"""

import atexit
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lora_domains import __version__
from lora_domains.errors import LoraDomainsError, UsageError

if TYPE_CHECKING:  # reading a card or loading an adapter imports no view
    from lora_domains.console import Display

R = TypeVar("R")
_sharing: ContextVar[bool] = ContextVar("lora_domains_sharing", default=False)


def state() -> Any:
    """Accelerate's ``PartialState``: rank, number of processes, device.

    Raises UsageError when fewer processes run than were launched for one run.
    """
    from accelerate import PartialState

    if not PartialState._shared_state:
        _check_launch()
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
            # Threads of the process group may abort Python at its exit (code -6).
            atexit.register(started.destroy_process_group)
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
    """Whether Accelerate must be told to use the CPU.

    Without an accelerator, launched processes would otherwise each run alone and write to the same
    folder.
    """
    import torch

    requested = _is_set("ACCELERATE_USE_CPU")
    return requested or (_number("WORLD_SIZE") > 1 and not torch.accelerator.is_available())


def _check_launch() -> None:
    """Refuse Accelerate's simple launcher, which ignores ``--num_processes``.

    It sets an address for a process group but no number of processes.
    """
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
                "the adapter's gradients are exchanged. A base too large for that fits with "
                "--load-in-4bit."
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
    """Run ``action`` on the main process; every process gets its result.

    An error of this package is raised on all processes, so that none waits for one that failed.
    """
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

    received: R = broadcast_object_list([value])[0]
    return received


def anywhere(flag: bool) -> bool:
    """Whether ``flag`` is true on any process; all of them must call this."""
    if state().num_processes == 1:
        return flag
    from accelerate.utils import gather_object

    return any(gather_object([flag]))


# ── All processes score ─────────────────────────────────────────────────────────────────────────


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, the processes share scoring: all make the same calls and get all results.

    Outside, each process scores everything by itself.
    """
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def own_share(work: Iterable[R], skipped: Callable[[R], object]) -> Iterator[R]:
    """This process's share of ``work``: every n-th piece. ``skipped`` is called for the others.

    The pieces themselves do not depend on the number of processes.
    """
    rank, ranks = (state().process_index, state().num_processes) if _sharing.get() else (0, 1)
    for number, piece in enumerate(work):
        if number % ranks == rank:
            yield piece
        else:
            skipped(piece)


def merged(results: Mapping[int, R]) -> dict[int, R]:
    """The results of all processes, by their numbers."""
    if not _sharing.get() or state().num_processes == 1:
        return dict(results)
    from accelerate.utils import gather_object

    return {key: value for part in gather_object([dict(results)]) for key, value in part.items()}


# ── Memory and versions of the machine ──────────────────────────────────────────────────────────


def free_bytes(device: torch.device) -> int:
    """Free bytes of ``device``; of the machine's memory for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """The most bytes used so far: on an accelerator, or by this process for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes) * (1024 if os.uname().sysname == "Linux" else 1)


def ran_out(error: Exception) -> bool:
    """Whether ``error`` means out of memory, on a device or in the CPU allocator."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def release(device: torch.device) -> None:
    """Free what a failed pass left in the allocator's cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def report_memory(
    display: "Display", quantization: str | None, *, quiet: bool = False
) -> Callable[[int, torch.device], None]:
    """A function that shows the bytes a base needs on a device, and warns if they are not free.

    With ``quiet`` it only warns.
    """

    from lora_domains.console import format_bytes

    def report(needed: int, device: torch.device) -> None:
        free = free_bytes(device)
        if not quiet:
            sizes = f"about {format_bytes(needed)} for the base, of {format_bytes(free)} free"
            display.stage("memory", None, None, f"{sizes} on {device}")
        if warning := memory_warning(needed, free, quantization):
            display.warn(warning)

    return report


def memory_warning(needed: int, free: int, quantization: str | None) -> str | None:
    """A warning when a base will not fit into ``free`` bytes."""
    if needed <= free:
        return None
    from lora_domains.console import format_bytes

    hint = "" if quantization == "4bit" else "; --load-in-4bit takes about a quarter"
    return f"the base takes about {format_bytes(needed)} and {format_bytes(free)} are free{hint}."


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
