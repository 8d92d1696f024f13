"""What the frozen base computes, kept in files so that it is computed once.

Training, validation and evaluation ask the base the same things again: what it predicts on general
text, how it scores the same rows and questions. ``LORA_DOMAINS_CACHE`` names the folder of the
answers, by default ``lora_domains`` in the user's cache, and ``LORA_DOMAINS_CACHE_GB`` how large it
may be; the files that were not used for longest make room for new ones.

A file is named by a digest of all that its content depends on (``circumstances``, and the tokens
that were read), so none is ever stale: another row, another byte of the tokenizer or another weight
names another file. Files are written whole or not at all, and their owner alone reads them. Each
holds a digest of its name and content: one that a disk or a hand changed is not read.

Of the rows of a domain they hold scores, which are numbers, and no text, token or vector. From
vectors text can be guessed: what the layers below an adapter give for its rows
(``training.layer_inputs``) is in a file without a name, which is gone when the run ends or is
killed. All files together keep within the limit.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from lora_domains.atomic import new_file, write_text
from lora_domains.console import format_bytes
from lora_domains.errors import UsageError
from lora_domains.inference.memory import pass_limit
from lora_domains.modeling.base import Base
from lora_domains.modeling.checkpoint import digest_of
from lora_domains.placement import is_sharded

NO_NUMBER = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype",
    "_attn_implementation_autoset", "quantization_config",
}  # fmt: skip
"""Keys of a config that say nothing of what a model computes, or are elsewhere in the name."""


def keeps(base: Base) -> bool:
    """Whether anything is kept of ``base``: not where its weights are shared out to processes,
    which would have to be gathered to name a file."""
    return cache_limit() > 0 and not is_sharded(base.model)


def circumstances(base: Base) -> dict[str, Any]:
    """All that decides what ``base`` computes of given tokens, rounding included.

    The weights in memory are read for it, as they are now.
    """
    import transformers

    kernels = ""
    if base.device.type in ("cpu", "cuda"):
        cpu = base.device.type == "cpu"
        kernels = torch.backends.cpu.get_cpu_capability() if cpu else torch.cuda.get_device_name()
    return {
        "base": base.identity, "config": config_digest(base),
        "state": base.state_digest(), "dtype": str(base.dtype),
        "quantization": base.quantization, "device": [base.device.type, kernels],
        "attention": base.model.config._attn_implementation, "pass": str(pass_limit(base.model)),
        "products": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": transformers.__version__,
    }  # fmt: skip


def config_digest(base: Base) -> str:
    """sha256 over the config of ``base``: what its layers do, beside their weights.

    Where it was loaded from, and by which version, changes no number.
    """
    config = base.model.config.to_dict()
    kept = {key: value for key, value in config.items() if key not in NO_NUMBER}
    return sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


# ── What a file holds ───────────────────────────────────────────────────────────────────────────


def keep_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str | None:
    """Write ``tensors`` to ``path``; why not, where they cannot be written."""
    content = dict(tensors)
    return keep_in_cache(path, save(content, {"sha256": _tensors_digest(path, content)}))


def read_tensors(path: Path) -> dict[str, Tensor] | None:
    """The tensors of a file, mapped into memory; None where there is none, or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            kept = (file.metadata() or {}).get("sha256")
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError):
        return None
    if kept != _tensors_digest(path, tensors):
        return None
    mark_used(path)
    return tensors


def _tensors_digest(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """sha256 over the name of the file and its tensors."""
    return digest_of([(path.name, torch.empty(0)), *sorted(tensors.items())])


def keep_records(path: Path, records: Sequence[Mapping[str, Any]]) -> str | None:
    """Write ``records`` to ``path`` as JSON; why not, where they cannot be written."""
    content = {"sha256": json_digest(path, records), "records": records}
    return keep_in_cache(path, json.dumps(content).encode())


def read_records(path: Path) -> list[dict[str, Any]] | None:
    """The records of a file; None where there is none, or it is damaged."""
    try:
        stored = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    records: list[dict[str, Any]] | None = None
    match stored:
        case {"sha256": kept, "records": list(records)} if kept == json_digest(path, records):
            mark_used(path)
            return records
    return None


def json_digest(path: Path, value: Any) -> str:
    """sha256 over the name of a file and a ``value`` in it, the same before and after it went
    through JSON."""
    return sha256(f"{path.name} {json.dumps(value)}".encode()).hexdigest()


# ── Where a base is ───────────────────────────────────────────────────────────────────────────────


def remember_folder(base: Base) -> None:
    """Note from which folder a ``base`` was loaded, for ``folder_of_base``; not of one that needs
    no folder, nor without room in the cache."""
    source = Path(base.checkpoint.source)
    found = base.id == "embedded" or base.revision is not None or not source.is_dir()
    if found or room_for(4096) is not None:
        return
    with suppress(OSError):
        path = _path_of_base(base.identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, str(source.resolve()), private=True)


def folder_of_base(identity: str) -> str | None:
    """The folder from which a base was last loaded on this machine; None where none is known or it
    is gone."""
    try:
        folder = _path_of_base(identity).read_text(encoding="utf-8")
        return folder if Path(folder).is_dir() else None
    except (OSError, ValueError):
        return None


def _path_of_base(identity: str) -> Path:
    return cache_folder() / "bases" / f"{identity}.txt"


# ── A folder of limited size ──────────────────────────────────────────────────────────────────────

CACHE, CACHE_LIMIT = "LORA_DOMAINS_CACHE", "LORA_DOMAINS_CACHE_GB"
"""The variables that name the folder and its size."""
GIGABYTES = 4.0
"""The most that all files take, where the variable does not say."""
SPARE = 2**30
"""Bytes that stay free on the disk."""
ABANDONED = 3600
"""Seconds after which an unfinished file is taken for that of a killed process."""
OWN = re.compile(r"[0-9a-f]{64}\.[a-z]+|\.[0-9a-f]{64}\.[a-z]+\.[0-9a-f]{8}")
"""The names of files, and of unfinished ones; others in the folder are not ours to delete."""


def cache_folder() -> Path:
    """The folder of files that can be computed again, in a folder of each kind."""
    named = os.environ.get(CACHE)
    if named:
        return Path(named).expanduser()
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "lora_domains"


def cache_limit() -> float:
    """What all files may take; 0 keeps none. Raises UsageError for a variable that is no number."""
    given = os.environ.get(CACHE_LIMIT, "").strip() or str(GIGABYTES)
    try:
        gigabytes = float(given.upper().removesuffix("GB"))
    except ValueError:
        gigabytes = -1.0
    if not gigabytes >= 0:
        raise UsageError(
            where=CACHE_LIMIT,
            expected="gigabytes that the cache may take, 0 for none",
            found=repr(given),
            hint=f"Leave it unset for {GIGABYTES:g}.",
        )
    return gigabytes * 1e9


def cache_path(kind: str, decides: Mapping[str, Any], suffix: str = "safetensors") -> Path:
    """The file of what ``decides`` names, in the folder of its ``kind``."""
    digest = sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
    return cache_folder() / kind / f"{digest}.{suffix}"


def mark_used(path: Path) -> None:
    """Note that ``path`` was read just now; the file itself stays as it is."""
    with suppress(OSError):
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def keep_in_cache(path: Path, content: bytes) -> str | None:
    """Write ``path`` whole, after others made room; why not, where it cannot be written."""
    refused = room_for(len(content))
    try:
        if refused is None:
            with new_file(path, private=True) as file:
                file.write(content)
    except OSError as error:
        return error.strerror or str(error)
    return refused


@contextmanager
def nameless_file() -> Iterator[Any]:
    """A file that counts as the others do, and is gone when it is closed or its process is killed.

    It has no buffer: a full disk refuses what is written at once, and not when the file is read or
    closed.
    """
    with TemporaryFile(dir=cache_folder(), buffering=0) as file:
        _nameless.append(file)
        try:
            yield file
        finally:
            _nameless.remove(file)


_nameless: list[Any] = []
"""Those that this process has open; no other knows of them."""


def room_for(size: int) -> str | None:
    """Let the files that were not used for longest make room for so many bytes; why there is no
    room, if there is none."""
    limit = cache_limit() - sum(os.fstat(file.fileno()).st_size for file in _nameless)
    if size > limit:
        return f"{format_bytes(size)} are more than {CACHE_LIMIT} allows"
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        make_room(limit - size)
        if size + SPARE > shutil.disk_usage(cache_folder()).free:
            return f"less than {format_bytes(size + SPARE)} are free on the disk"
    except OSError as error:
        return error.strerror or str(error)
    return None


def make_room(most: float) -> None:
    """Delete the files that were not used for longest, until all take ``most`` bytes; and what
    killed processes left unfinished."""
    files = sorted(_cached())
    total = sum(size for _, size, _ in files)
    for used, size, path in files:
        unfinished = path.name.startswith(".")
        if used > time.time() - ABANDONED if unfinished else total <= most:
            continue
        with suppress(OSError):  # on Windows while another process reads it
            path.unlink()
            total -= size


def cache_bytes() -> int:
    """What all files take."""
    return sum(size for _, size, _ in _cached())


def _cached() -> Iterator[tuple[float, int, Path]]:
    """When each file of the cache was used, its size, and its path."""
    for path in cache_folder().glob("*/*"):
        if OWN.fullmatch(path.name):
            with suppress(OSError):  # another process may delete it meanwhile
                found = path.stat()
                yield max(found.st_mtime, found.st_atime), found.st_size, path
