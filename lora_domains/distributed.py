"""Several processes, one run: how many there are, who writes, and how scoring is shared.

Every process holds the whole frozen base; the rows are shared, and only the adapter's gradients
are exchanged. A launch that would end in something else than was asked for is named here.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from lora_domains.errors import LoraDomainsError, UsageError

R = TypeVar("R")
_sharing: ContextVar[bool] = ContextVar("lora_domains_sharing", default=False)


def state() -> Any:
    """Accelerate's ``PartialState``: rank, number of processes, device.

    On a machine without an accelerator it has to be told so, or two launched processes would each
    take themselves for the only one and write the same folder. Raises UsageError when fewer
    processes run than were asked for.
    """
    from accelerate import PartialState

    if not PartialState._shared_state:
        _check_started()
        try:
            made = PartialState(cpu=_on_cpu())
            if made.num_processes > 1:
                # Left to the end of Python its threads may abort the process: exit code -6.
                atexit.register(made.destroy_process_group)
        except ImportError as error:
            raise UsageError(
                where="accelerate launch",
                expected="plain data parallelism",
                found=str(error).splitlines()[0],
                hint="Launch with recipes/accelerate/ddp.yaml: the frozen base needs no ZeRO.",
            ) from error
    found = PartialState()
    started = _number("WORLD_SIZE")
    if started > found.num_processes:
        raise UsageError(
            where="accelerate launch",
            expected=f"one run of {started} processes",
            found=f"{started} processes that know of {found.num_processes} each",
            hint="Make no PartialState or Accelerator before lora_domains on a machine without "
            "an accelerator, or make it with cpu=True.",
        )
    return found


def _on_cpu() -> bool:
    import torch

    asked = _is_set("ACCELERATE_USE_CPU")
    return asked or (_number("WORLD_SIZE") > 1 and not torch.accelerator.is_available())


def _check_started() -> None:
    """Accelerate's simple launcher starts one process whatever ``--num_processes`` says.

    It shows in the environment: an address to meet at, and nobody to be met there.
    """
    if (
        "ACCELERATE_MIXED_PRECISION" in os.environ
        and "MASTER_ADDR" in os.environ
        and "WORLD_SIZE" not in os.environ
        and not any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))
    ):
        raise UsageError(
            where="accelerate launch",
            expected="as many processes as --num_processes says",
            found="one: with --cpu, or without --multi_gpu, Accelerate starts a single process",
            hint="accelerate launch --multi_gpu --num_processes 2 … starts two, on CPUs as well. "
            "For one process say --num_processes 1; where MASTER_ADDR is set already, unset it.",
        )


def launch_warnings() -> list[str]:
    """What the launcher was asked for that does not happen here, in words."""
    found = []
    device = state().device.type
    for name, flag in (("FSDP", "ACCELERATE_USE_FSDP"), ("ZeRO", "ACCELERATE_USE_DEEPSPEED")):
        if not _is_set(flag):
            continue
        why = (
            f"{name} was asked for: on a CPU Accelerate runs plain data parallelism instead. "
            if device == "cpu"
            else f"{name} was asked for. "
        )
        found.append(
            why + "Nothing is sharded: every process holds the whole frozen base, and only the "
            "adapter's gradients are exchanged. A base too large for that fits with --load-in-4bit."
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        found.append(
            f"mixed precision {precision} is not used: the base is computed as it was loaded, "
            "the adapter in float32."
        )
    if _number("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") > 1:
        found.append(
            "gradient accumulation steps are not used: a batch is split into micro-batches that "
            "fit, whatever its size. Set batch_size instead."
        )
    return found


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("1", "true", "yes", "on")


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else 1


# ── One writes ──────────────────────────────────────────────────────────────────────────────────


def is_main() -> bool:
    return bool(state().is_main_process)


def on_main(action: Callable[[], R]) -> R:
    """What ``action`` returns on the first process, which alone runs it; the others wait for it.

    An error of this package raised there is raised everywhere: nobody waits for a process that
    has given up.
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
    """The first process's ``value``, on all of them."""
    if state().num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    found: R = broadcast_object_list([value])[0]
    return found


def anywhere(flag: bool) -> bool:
    """Whether any process says so; all must ask."""
    if state().num_processes == 1:
        return flag
    from accelerate.utils import gather_object

    return any(gather_object([flag]))


# ── All score ───────────────────────────────────────────────────────────────────────────────────


@contextmanager
def sharing() -> Iterator[None]:
    """Inside, scoring is shared: every process must make the same calls, and gets every result.

    Outside, each process scores what it is given, alone.
    """
    token = _sharing.set(True)
    try:
        yield
    finally:
        _sharing.reset(token)


def own_share(work: Iterable[R], left_out: Callable[[R], object]) -> Iterator[R]:
    """This process's pieces of ``work``: every n-th, so that a piece is the same in any number.

    ``left_out`` is called for the pieces of the others.
    """
    rank, ranks = (state().process_index, state().num_processes) if _sharing.get() else (0, 1)
    for number, piece in enumerate(work):
        if number % ranks == rank:
            yield piece
        else:
            left_out(piece)


def merged(rows: Mapping[int, R]) -> dict[int, R]:
    """The rows of all processes, each from the one that scored it."""
    if not _sharing.get() or state().num_processes == 1:
        return dict(rows)
    from accelerate.utils import gather_object

    parts = gather_object([dict(rows)])
    found = {key: row for part in parts for key, row in part.items()}
    assert len(found) == sum(map(len, parts)), "a row was scored twice"
    return found
