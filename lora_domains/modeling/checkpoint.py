"""A base as stored: its weights in some file format, its tokenizer, and the identity of both.

A subclass of ``Checkpoint`` in ``FORMATS`` is all that ``load_base`` needs for another format.
"""

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lora_domains.errors import BaseModelError, listed

BLOCK = 1 << 24
"""Bytes read at once when a checkpoint is hashed."""
HASHED_AT_ONCE = 4
"""Tensors hashed at a time, of which there are copies in memory."""
SHARED_FILES = ("*.json", "*.model", "*.txt", "README.md")
"""Files of a Hub repository that are downloaded whatever the format of the weights."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class TensorInfo(NamedTuple):
    """What a stored tensor is: its dtype as safetensors names it (``F32``) and its shape."""

    dtype: str
    shape: tuple[int, ...]


class HeaderEntry(NamedTuple):
    """One tensor of a safetensors file; its bytes are ``start`` up to ``stop`` of the file."""

    info: TensorInfo
    start: int
    stop: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """The tensors of a safetensors file by name; no weights are read."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise ValueError(f"{path.name} is cut off, or a pointer of Git LFS (git lfs pull)")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    entries = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        info = TensorInfo(entry["dtype"], tuple(entry["shape"]))
        entries[name] = HeaderEntry(info, 8 + size + start, 8 + size + stop)
    return entries


class Checkpoint(ABC):
    """The stored base in ``folder``, in one file format.

    ``source`` is the folder or Hub id that was given, ``revision`` the one on the Hub.
    Methods raise OSError, ValueError or RuntimeError for content that cannot be read.
    """

    pattern: ClassVar[str]
    """Matches the names of the files that hold the weights."""
    on_hub: ClassVar[bool] = True
    """Whether it is downloaded from the Hub."""
    takes_a_file: ClassVar[bool] = False
    """Whether one file is a whole base, so that its path names one."""

    def __init__(self, source: str, revision: str | None, folder: Path) -> None:
        self.source, self.revision, self.folder = source, revision, folder
        self.files = self.weight_files(folder)

    @classmethod
    def weight_files(cls, folder: Path) -> list[Path]:
        """The files of ``folder`` that hold the weights; some may be missing."""
        return sorted(folder.glob(cls.pattern))

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether ``folder`` holds a checkpoint of this format."""
        return (folder / "config.json").exists() and bool(cls.weight_files(folder))

    @property
    def place(self) -> dict[str, Any]:
        """Where transformers finds it: arguments of ``from_pretrained``.

        Python code beside the weights is never run.
        """
        return {
            "pretrained_model_name_or_path": self.source,
            "revision": self.revision or "main",
            "trust_remote_code": False,
        }

    def config(self) -> Any:
        """The configuration that transformers builds the model from."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(**self.place)

    def tokenizer(self) -> Any:
        """The tokenizer stored beside the weights."""
        from transformers import AutoTokenizer

        if Path(self.source).is_dir() and not any(
            (self.folder / name).exists() for name in TOKENIZER_FILES
        ):
            raise OSError("no tokenizer")
        return AutoTokenizer.from_pretrained(**self.place)

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by name; no weights are read."""

    @abstractmethod
    def content(self, name: str) -> Iterator[bytes]:
        """The bytes of a stored tensor in blocks, in row-major order and little-endian."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A stored tensor."""

    @abstractmethod
    def load(self, architecture: Any, **options: Any) -> tuple[Any, list[str]]:
        """A model of ``architecture`` (an AutoModel class), and the weights that it lacks.

        ``options`` are those of ``from_pretrained``: ``dtype``, ``quantization_config``, ….
        """


class Safetensors(Checkpoint):
    """Weights in one or more safetensors files, as ``save_pretrained`` writes them.

    Other safetensors files in the folder are not read by transformers, and do not count here.
    """

    pattern = "model*.safetensors"

    @classmethod
    def weight_files(cls, folder: Path) -> list[Path]:
        whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if whole.exists():
            return [whole]
        if not index.exists():
            return []
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(shards))]

    @cached_property
    def _entries(self) -> dict[str, tuple[Path, HeaderEntry]]:
        return {
            name: (path, entry)
            for path in self.files
            for name, entry in read_header(path).items()
        }  # fmt: skip

    @cached_property
    def _infos(self) -> dict[str, TensorInfo]:
        return {name: entry.info for name, (_, entry) in self._entries.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def content(self, name: str) -> Iterator[bytes]:
        path, entry = self._entries[name]
        left = entry.stop - entry.start
        with path.open("rb") as file:
            file.seek(entry.start)
            while left > 0 and (block := file.read(min(left, BLOCK))):
                yield block
                left -= len(block)

    def tensor(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._entries[name][0], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def load(self, architecture: Any, **options: Any) -> tuple[Any, list[str]]:
        model, report = architecture.from_pretrained(
            **self.place, output_loading_info=True, **options
        )
        return model, list(report["missing_keys"])


FORMATS: list[type[Checkpoint]] = [Safetensors]
"""The formats that are tried, in this order."""


# ── Finding one ─────────────────────────────────────────────────────────────────────────────────


def find_checkpoint(source: str, revision: str | None, where: str) -> Checkpoint:
    """The checkpoint in a folder or of a Hub id, which is downloaded when it is not cached.

    Raises BaseModelError, of the base ``where``, when there is none.
    """
    local = Path(source)
    if local.exists() and revision is not None:
        raise BaseModelError(
            where=where,
            expected="a revision of a Hub repository only",
            found=f"revision={revision!r} for a folder, which has none",
            hint="Leave it out, or give the Hub id.",
        )
    if local.is_dir():
        return _in_folder(local, where)
    single = next((k for k in FORMATS if local.is_file() and local.match(k.pattern)), None)
    if single is not None and single.takes_a_file:
        return single(source, None, local.parent)
    if local.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BaseModelError(
            where=where,
            expected="a folder with a saved model, or a Hub id such as Qwen/Qwen3-0.6B",
            found="a file" if local.exists() else "no such folder",
            hint="Check the path given as --base.",
        )
    folder = _download(source, revision, where)
    _refuse_adapter(folder, where)
    checkpoint = _recognised(source, revision, folder, where)
    if checkpoint is None:
        raise BaseModelError(
            where=where,
            expected=f"config.json and weights in {_patterns()} files",
            found="none in the repository",
            hint="Choose a revision with safetensors; pickled weights are not loaded.",
        )
    return checkpoint


def _in_folder(folder: Path, where: str) -> Checkpoint:
    _refuse_adapter(folder, where)
    checkpoint = _recognised(str(folder), None, folder, where)
    if checkpoint is not None:
        return checkpoint
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        raise BaseModelError(
            where=where,
            expected=f"weights in {_patterns()}",
            found=f"{pickled[0]}, a pickle, which can run code when it is read",
            hint="If you trust it, load it in transformers and save it again: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder).",
        )
    raise BaseModelError(
        where=where,
        expected=f"a folder with config.json and {_patterns()} weights",
        found="files " + (listed(names, 6) or "none at all"),
        hint="Save the model there: model.save_pretrained(folder).",
    )


def _recognised(source: str, revision: str | None, folder: Path, where: str) -> Checkpoint | None:
    try:
        found = next((kind for kind in FORMATS if kind.recognises(folder)), None)
        checkpoint = None if found is None else found(source, revision, folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BaseModelError(
            where=where,
            expected="an index that names the weight files",
            found=f"one that cannot be read ({type(error).__name__})",
            hint="Copy model.safetensors.index.json again.",
        ) from error
    missing = [path.name for path in checkpoint.files if not path.exists()] if checkpoint else []
    if missing:
        raise BaseModelError(
            where=where,
            expected="every file that model.safetensors.index.json names",
            found=f"no {listed(missing, 3)}",
            hint="Copy or download the missing files.",
        )
    return checkpoint


def _patterns() -> str:
    return " or ".join(kind.pattern for kind in FORMATS)


def _download(source: str, revision: str | None, where: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [*(kind.pattern for kind in FORMATS if kind.on_hub), *SHARED_FILES]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise BaseModelError(
            where=where,
            expected="a folder, or a Hub id such as Qwen/Qwen3-0.6B",
            found=repr(source),
            hint="Check the path or id given as --base.",
        ) from None
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise BaseModelError(
            where=where,
            expected="a base that can be reached",
            found=f"{type(error).__name__}: no folder of that name, and the Hub gave no answer",
            hint="Go online, or download it on another machine and give its folder as --base.",
        ) from error


def _refuse_adapter(folder: Path, where: str) -> None:
    """transformers would load the adapter's base from elsewhere and put the adapter on it."""
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            where=where,
            expected="a base",
            found="an adapter (it has adapter_config.json)",
            hint="Give the base it was made on, and load the adapter with load_adapter.",
        )


# ── What it is ──────────────────────────────────────────────────────────────────────────────────


def identity(checkpoint: Checkpoint, tokenizer: Any) -> str:
    """sha256 over every stored tensor (name, dtype, shape, bytes) and the tokenizer.

    It does not depend on sharding, nor on randomly initialised heads, which are not stored.
    """
    digest = sha256()
    for name, (dtype, shape) in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {dtype} {list(shape)}".encode())
        for block in checkpoint.content(name):
            digest.update(block)
    # The padding token is left out: it is masked everywhere, and may be set when it is loaded.
    digest.update(f"{tokenizer.bos_token} {tokenizer.eos_token}".encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    return digest.hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over name, dtype, shape and bytes of ``tensors`` on the CPU, in their order.

    ``HASHED_AT_ONCE`` of them are hashed at a time, which releases Python's lock.
    """
    digest, hashes = sha256(), deque[Future[Any]]()
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = tensor.contiguous().reshape(-1).view(torch.uint8)
            hashes.append(pool.submit(sha256, flat.numpy().data if flat.numel() else b""))
            if len(hashes) == HASHED_AT_ONCE:
                digest.update(hashes.popleft().result().digest())
    for one in hashes:
        digest.update(one.result().digest())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Every call that pads or truncates sets these; they are not part of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
        return json.dumps(state, sort_keys=True)
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def pooling_of(folder: Path) -> str:
    """The pooling of a sentence encoder: "mean", or "first" where its folder says nothing else.

    sentence-transformers writes it in ``1_Pooling/config.json``.
    """
    try:
        settings = json.loads((folder / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
        mean = settings.get("pooling_mode_mean_tokens") or settings.get("pooling_mode") == "mean"
    except (OSError, ValueError, AttributeError):
        return "first"
    return "mean" if mean else "first"


def licence_of(folder: Path) -> str | None:
    """The licence in the front matter of the base's README, or in its config; None for neither."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    stated: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError):
        stated |= json.loads((folder / "config.json").read_text(encoding="utf-8"))
    with suppress(OSError, ValueError, TypeError, YAMLError):
        stated |= metadata_load(folder / "README.md") or {}
    licence = stated.get("license")
    if licence == "other":  # its name is beside it
        licence = stated.get("license_name")
    return licence if isinstance(licence, str) and licence else None
