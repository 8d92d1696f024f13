"""Memory of a device: what is free, what was used, and running out of it."""

import os
from collections.abc import Callable

import torch

from lora_domains.console import Display, format_bytes


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
    display: Display, quantization: str | None, *, quiet: bool = False
) -> Callable[[int, torch.device], None]:
    """A function that shows the bytes a base needs on a device, and warns if they are not free.

    With ``quiet`` it only warns.
    """

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
    hint = "" if quantization == "4bit" else "; --load-in-4bit takes about a quarter"
    return f"the base takes about {format_bytes(needed)} and {format_bytes(free)} are free{hint}."
