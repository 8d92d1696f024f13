"""Bytes: what a base will take before it is loaded, what it took, and when none are left."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

WIDTHS = {"I64": 8, "I32": 4, "I16": 2}
"""Bytes of a whole number, by the names of safetensors; floats take those of the chosen dtype."""
KEPT = ("embed", "lm_head", "wte", "wpe")
"""Parts of names of the two-dimensional tensors that bitsandbytes leaves as they are."""


def estimated_bytes(files: Iterable[Path], dtype: torch.dtype, quantization: str | None) -> int:
    """What a checkpoint will take in memory, from the headers of its files; nothing is loaded.

    8-bit linears take one byte a weight and a scale for each output; 4-bit ones (nf4, scales
    quantised again) half a byte and one byte for each block of 64.
    """
    total = 0.0
    for path in files:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            shape = entry["shape"]
            count = 1
            for size in shape:
                count *= size
            linear = len(shape) == 2 and not any(part in name for part in KEPT)
            if quantization == "8bit" and linear:
                total += count + 4 * shape[0]
            elif quantization == "4bit" and linear:
                total += count / 2 + count / 64 + 4 * count / (64 * 256)
            elif entry["dtype"][0] in "FB":
                total += count * dtype.itemsize
            else:
                total += count * WIDTHS.get(entry["dtype"], 1)
    return round(total)


def resident_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of ``tensors``, each storage counted once (tied embeddings are one)."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def free_bytes(device: torch.device) -> int:
    """What can still be taken on ``device``: of the machine's memory on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the device on an accelerator, of the process on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes) * (1024 if os.uname().sysname == "Linux" else 1)


def ran_out(error: Exception) -> bool:
    """Whether ``error`` is a device's or the CPU allocator's "out of memory"."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or bool(should_reduce_batch_size(error))


def release(device: torch.device) -> None:
    """Give back what a failed pass left in the allocator's cache."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def words(count: float) -> str:
    """``1.4 GB``; decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def too_little(needed: int, free: int, quantization: str | None) -> str | None:
    """A warning where a base will not fit."""
    if needed <= free:
        return None
    hint = "" if quantization == "4bit" else "; --load-in-4bit takes about a quarter"
    return f"the base takes about {words(needed)} and {words(free)} are free{hint}."
