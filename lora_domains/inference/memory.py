"""Memory: what is free, limits of containers included, and what a pass through a model takes.

On a CPU the system kills a process that takes too much, so the memory of a pass is measured on a
few tokens and larger passes are planned accordingly. An accelerator raises an error instead, after
which a pass is halved. Gradient checkpointing takes less memory, and more time.
"""

import ctypes
import math
import os
import sys
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_domains import distributed
from lora_domains.console import Display, format_bytes
from lora_domains.errors import TrainingError
from lora_domains.modeling.base import Base
from lora_domains.modeling.routing import current_route, entered
from lora_domains.placement import is_sharded

# ── The machine and its containers ──────────────────────────────────────────────────────────────

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux shows control groups."""
OWN_CGROUPS = Path("/proc/self/cgroup")
"""Names the control groups of this process."""
Names = tuple[tuple[str, ...], str, str]
VERSION_1: Names = (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
VERSION_2: Names = (("memory.max", "memory.high"), "memory.current", "inactive_file")
"""Files of a control group: its limits, what it uses, and how much of that is cache of files."""


def free_bytes(device: torch.device) -> int:
    """Free bytes of ``device``; for a CPU those of the machine, or of a container if fewer."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(min(psutil.virtual_memory().available, *_free_in_containers()))


def _free_in_containers() -> Iterator[float]:
    """Free bytes of each control group that this process is in; infinity first."""
    yield math.inf
    if not OWN_CGROUPS.exists():  # not Linux
        return
    for line in OWN_CGROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, names = CGROUPS, VERSION_2
        elif "memory" in controllers.split(","):
            mount, names = CGROUPS / "memory", VERSION_1
        else:
            continue
        own = mount / path.strip("/")
        # Inside a container the path may be the host's: the container's own group is the root.
        for folder in (own, *own.parents):
            if folder.is_relative_to(mount):
                yield _free_in(folder, *names)


def _free_in(folder: Path, limits: tuple[str, ...], usage: str, cache: str) -> float:
    """Free bytes of one control group; infinity where it has no limit.

    File contents that were read and are not in use are freed by the system when it needs to.
    """
    smallest = min(_numbers(folder / name).get("", math.inf) for name in limits)
    used = _numbers(folder / usage).get("")
    if math.isinf(smallest) or used is None:
        return math.inf
    return max(0.0, smallest - used + _numbers(folder / "memory.stat").get(cache, 0))


def _numbers(file: Path) -> dict[str, float]:
    """The numbers in a file of a control group, by the name before each; "" without a name."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return {}
    parts = [line.rpartition(" ") for line in lines]
    return {name: float(value) for name, _, value in parts if value.isdigit()}


def peak_memory(device: torch.device) -> int:
    """The most bytes used so far: on an accelerator, or by this process for a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kilobytes) * (1024 if os.uname().sysname == "Linux" else 1)


def release(device: torch.device) -> None:
    """Give back to the system what a pass left in the allocator's cache.

    On SmolLM2 passes of 1.9 GB of tensors left up to 2.5 GB with a process on a CPU, since glibc
    keeps what is freed in small pieces. The next pass is slower, since the system clears the memory
    that it gives out.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's function of this name; None where the system has another allocator."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def base_in_words(base: Base) -> str:
    """``tiny: 2.8 M parameters, float32, 11.0 MB on cpu``."""
    parameters, stored = sum(p.numel() for p in base.model.parameters()), base.record()
    precision = stored.get("quantization") or stored["dtype"]
    memory = format_bytes(base.resident_bytes())
    each = " in each process" if is_sharded(base.model) else ""
    size = f"{parameters / 1e6:.1f} M parameters, {precision}"
    return f"{base.id}: {size}, {memory} on {base.device}{each}"


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


# ── The memory of a pass ────────────────────────────────────────────────────────────────────────

SHARE = 0.5
"""Share of the free memory that a pass may take. The rest is for the optimiser, other programs,
and what the allocator of the system does not give back."""
TRIAL = 16
"""Tokens of the shorter rows on which the memory of a pass is measured."""


class TensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make inside, on this thread."""

    now: int
    peak: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: dict[int, weakref.ref[UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        result = func(*args, **(kwargs or {}))
        unknown = [part for part in _tensors(result) if _storage(part) not in self._counted]
        if unknown:
            # A view, or the result of an operation in place, takes no memory of its own.
            given = {_storage(part) for part in _tensors((args, kwargs))}
            for part in unknown:
                if (key := _storage(part)) not in given and key not in self._counted:
                    self._count(key, part.untyped_storage())
        return result

    def _count(self, key: int, storage: UntypedStorage) -> None:
        size = storage.nbytes()

        def forget(_: object) -> None:
            del self._counted[key]
            self.now -= size

        self._counted[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(part: Any) -> Iterator[Tensor]:
    """The tensors among the arguments or results of an operation."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, tuple | list):
        for one in part:
            yield from _tensors(one)
    elif isinstance(part, dict):
        for one in part.values():
            yield from _tensors(one)


def _storage(tensor: Tensor) -> int:
    """The identity of the memory that ``tensor`` is a view of."""
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True)
class PassCost:
    """The bytes that a pass takes at its peak, from bytes measured on small ones.

    They grow with the tokens of its padded rows, with the pairs of tokens that attend to each
    other, and with the logits that are computed.
    """

    fixed: float
    token: float
    pair: float
    logit: float = 0.0

    @classmethod
    def measured(cls, peak: Callable[[int, int, int], int], vocabulary: int) -> "PassCost":
        """``peak`` gives the bytes of a pass of so many rows, tokens in each, answer tokens.

        A ``vocabulary`` of 0: no logits are computed.
        """
        n = TRIAL
        sizes = [(2, n, 1), (4, n, 1), (2, 2 * n, 1), (2, n, n // 2)][: 4 if vocabulary else 3]
        terms = [[1, r * n, r * n * n, r * a * vocabulary][: len(sizes)] for r, n, a in sizes]
        bytes_ = np.linalg.solve(np.array(terms, float), [peak(*size) for size in sizes])
        return cls(*(max(0.0, float(value)) for value in bytes_))

    def __call__(self, rows: int, length: int, logits: int) -> float:
        """Bytes of ``rows`` rows of ``length`` tokens, with ``logits`` logits in all."""
        pairs = rows * length * length
        return self.fixed + self.token * rows * length + self.pair * pairs + self.logit * logits


_measured: dict[Hashable, PassCost] = {}
"""What was measured in this process, by all that it depends on."""


def measured_once(model: nn.Module, key: Hashable, measure: Callable[[], PassCost]) -> PassCost:
    """``measure()``, or what it gave before for the same ``key`` and a model of the same structure.

    Adapters trained one after another are measured once. A sharded model is always measured: all
    processes must take part.
    """
    if is_sharded(model):
        return measure()
    whole = (key, _structure(model))
    if whole not in _measured:
        _measured[whole] = measure()
    return _measured[whole]


def _structure(model: Any) -> str:
    """A digest of the config, modules and tensor shapes of ``model``."""
    parts = [repr(model.config.to_dict()), model.config._attn_implementation]
    parts += [f"{name} {type(module).__qualname__}" for name, module in model.named_modules()]
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}")
    return sha256("\n".join(parts).encode()).hexdigest()


_limits: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()


def pass_limit(model: Any) -> float:
    """Bytes that a pass through ``model`` may take; infinity on an accelerator.

    The largest power of two within ``SHARE`` of the memory that is free when this is first asked
    for. It stays the same afterwards, so that the same rows are scored in the same batches.
    """
    if model.device.type != "cpu":
        return math.inf
    if model not in _limits:
        _limits[model] = allowance(free_bytes(model.device))
    return _limits[model]


def make_room(model: Any) -> None:
    """After a pass, give freed memory back to the system if less is free than another may take."""
    if free_bytes(model.device) / distributed.processes_here() < pass_limit(model):
        release(model.device)


def reuse_pass_limit(model: Any, limit: int, warn: Callable[[str], object]) -> None:
    """Let a pass through ``model`` take ``limit`` bytes, as in an earlier run, if they are free.

    Rounding depends on how rows are divided into passes, so a run that is repeated or continued
    divides them as it did before.
    """
    own = pass_limit(model)
    if own < limit and limit > free_bytes(model.device) / distributed.processes_here():
        warn(
            f"a pass could take {format_bytes(limit)} before, which are no longer free: it takes "
            f"at most {format_bytes(own)} now, and the result is the same up to rounding."
        )
    elif own < math.inf:
        _limits[model] = limit


def agreed_pass_limit(model: Any) -> int | None:
    """The smallest ``pass_limit`` of all processes, from here on that of each.

    None on an accelerator. All processes must call this.
    """
    own = pass_limit(model)
    if math.isinf(own):
        return None
    _limits[model] = distributed.smallest(int(own))
    return _limits[model]


def allowance(free: int) -> int:
    """The largest power of two within ``SHARE`` of what each process on this machine has."""
    own = SHARE * free / distributed.processes_here()
    return 1 << int(math.log2(max(own, 1)))


# ── Gradient checkpointing ──────────────────────────────────────────────────────────────────────


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Inside, each layer of ``model`` keeps only its input and is computed again in ``backward``.

    ``backward`` may run in another thread, and a thread inherits no ContextVar: the route is
    restored there, or a layer would be computed as the bare base's and the gradients would be
    silently wrong. The layers stay in evaluation mode, which transformers' own switch does not
    allow. Raises TrainingError for a model without layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(
            where=type(model).__name__,
            expected="layers that support gradient checkpointing in transformers",
            found="none",
            hint="Leave gradient_checkpointing out, or set a smaller max_length.",
        )
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_checkpointed, model, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # the method of its class is visible again
            if own is not None:
                layer.forward = own


def _checkpointed(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    route = current_route(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), entered(model, route, None)

    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)


@contextmanager
def weights_bar(here: bool) -> Iterator[None]:
    """While weights are loaded: no bar of transformers for those that are ``here``, on this
    machine, only for those to be downloaded."""
    from transformers.utils import logging as bars

    shown = bars.is_progress_bar_enabled() and not os.getenv("HF_HUB_DISABLE_PROGRESS_BARS")
    if shown and here:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown and here:
            bars.enable_progress_bar()
