"""The base: a pretrained causal model, loaded frozen, that nothing afterwards may change.

Two hashes guard it. Its *identity* is of the stored checkpoint and tokenizer, the same whatever
the revision's name, the precision it is loaded in, or heads made at random: an adapter remembers
it. Its *state digest* is of the tensors in memory: equal before and after, nothing changed.
"""

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_domains.embedded import BASE_PATH
from lora_domains.errors import BaseModelError, did_you_mean, listed

Quantization = Literal["8bit", "4bit"]
ROUTED = "routed_base"
"""What ``RoutedLinear`` calls the linear it wraps; adapters are no modules of the model."""


@dataclass
class Base:
    """A frozen model with its tokenizer, and where both came from."""

    model: Any
    tokenizer: Any
    id: str
    revision: str | None
    identity: str
    quantization: Quantization | None
    licence: str | None
    meanings: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the last few configs of adapters mean on this architecture (see ``loading``)."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def width(self) -> int:
        """Hidden size."""
        return int(self.model.config.get_text_config().hidden_size)

    @property
    def context(self) -> int:
        """Tokens the model was made for."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 2048))

    def state_digest(self) -> str:
        """sha256 over name, dtype, shape and bytes of every resident tensor of the base.

        Adapters wrapped around its linears do not count, so it is the same before and after.
        """
        digest = sha256()
        for name, tensor in sorted(_base_tensors(self.model), key=lambda pair: pair[0]):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            data = tensor.detach().contiguous().cpu().reshape(-1)
            digest.update(data.view(torch.uint8).numpy().tobytes() if data.numel() else b"")
        return digest.hexdigest()

    def record(self) -> dict[str, Any]:
        """The ``base`` entry of a card (DESIGN.md, "On disk")."""
        return {
            "id": self.id,
            "revision": self.revision,
            "identity": self.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "licence": self.licence,
        }


def load_base(
    path_or_id: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Quantization | None = None,
    device: str | torch.device | None = None,
) -> Base:
    """Load a base frozen and in evaluation mode.

    ``None`` is the embedded base. ``dtype`` is float32 on a CPU and bfloat16 on an accelerator
    unless given. Raises BaseModelError when the folder or id has no model, no tokenizer or no
    safetensors weights, or cannot be reached.
    """
    from accelerate import PartialState
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    where = str(path_or_id or "the embedded base")
    source = str(path_or_id or BASE_PATH)
    target = torch.device(device) if device is not None else PartialState().device
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        dtype = _named_dtype(dtype)
    files = _checkpoint_files(source, revision, where)
    tokenizer = _load_tokenizer(source, revision, where)
    options: dict[str, Any] = {"revision": revision or "main", "dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = _quantized(quantization, dtype)
        options["device_map"] = {"": target}
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            where=where,
            expected="a causal language model that transformers can load",
            found=str(error).splitlines()[0],
            mend="Check the folder or id; only causal language models can be a base.",
        ) from error
    if loading["missing_keys"]:
        raise BaseModelError(
            where=where,
            expected="weights for the whole model",
            found=f"none for {listed(sorted(loading['missing_keys']), 3)}",
            mend="Save it whole: model.save_pretrained(folder). Random weights are no base.",
        )
    if quantization is None:
        model.to(target)
    else:
        _mend_nf4_on_cpu(model, target)
    model.requires_grad_(False)
    model.eval()
    return Base(
        model=model,
        tokenizer=tokenizer,
        id="embedded" if path_or_id is None else _public_name(path_or_id),
        revision=revision or getattr(model.config, "_commit_hash", None),
        identity=_identity(files, tokenizer),
        quantization=quantization,
        licence=_licence(files[0].parent),
    )


def _named_dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise BaseModelError(
            where="dtype",
            expected="a precision",
            found=repr(name),
            mend=did_you_mean(name, known),
        )
    return known[name]


def _public_name(path_or_id: str | Path) -> str:
    """A Hub id as it is; a folder by its name only: a card carries no path of this machine."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else str(path_or_id)


def _load_tokenizer(source: str, revision: str | None, where: str) -> Any:
    from transformers import AutoTokenizer

    missing = BaseModelError(
        where=where,
        expected="a tokenizer beside the weights",
        found="none that transformers can load",
        mend="Save one there: tokenizer.save_pretrained(folder).",
    )
    folder = Path(source)
    if folder.is_dir() and not any(
        (folder / name).exists()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
    ):
        raise missing
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError, TypeError, KeyError, json.JSONDecodeError) as error:
        raise missing from error
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            where=where,
            expected="a tokenizer with an end-of-sequence token, so that answers can end",
            found="none",
            mend="Set tokenizer.eos_token and save it again.",
        )
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any id will do; the vocabulary must not grow.
        tokenizer.pad_token_id = tokenizer.eos_token_id
    return tokenizer


def _checkpoint_files(source: str, revision: str | None, where: str) -> list[Path]:
    """The safetensors files of a local folder or of a Hub repository (downloaded when missing)."""
    folder = Path(source)
    if folder.is_dir():
        files = sorted(folder.glob("*.safetensors"))
        _refuse_adapter(folder, where)
        if not (folder / "config.json").exists() or not files:
            present = [p.name for p in sorted(folder.iterdir())][:6]
            raise BaseModelError(
                where=where,
                expected="a folder with config.json and *.safetensors weights",
                found="files " + (", ".join(present) or "none at all"),
                mend="Save the model there: model.save_pretrained(folder).",
            )
        return files
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BaseModelError(
            where=where,
            expected="a folder with a saved model, or a Hub id such as Qwen/Qwen3-0.6B",
            found="a file" if folder.exists() else "no such folder",
            mend="Check the path given as --base.",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = ["*.safetensors", "*.json", "*.model", "*.txt", "README.md"]
    try:
        path = snapshot_download(source, revision=revision, allow_patterns=wanted)
    except HFValidationError:
        raise BaseModelError(
            where=where,
            expected="a folder, or a Hub id such as Qwen/Qwen3-0.6B",
            found=repr(source),
            mend="Check the path or id given as --base.",
        ) from None
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise BaseModelError(
            where=where,
            expected="a base that can be reached",
            found=f"{type(error).__name__}: no folder of that name, and the Hub gave no answer",
            mend="Go online, or download it once elsewhere and give its folder as --base.",
        ) from error
    files = sorted(Path(path).glob("*.safetensors"))
    _refuse_adapter(Path(path), where)
    if not files:
        raise BaseModelError(
            where=where,
            expected="weights in safetensors files",
            found="none in the repository",
            mend="Choose a revision with safetensors; pickled weights are not loaded.",
        )
    return files


def _refuse_adapter(folder: Path, where: str) -> None:
    """transformers would load the adapter's base from elsewhere and put the adapter on it."""
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            where=where,
            expected="a base",
            found="an adapter (it has adapter_config.json)",
            mend="Give the base it was made on, and load the adapter with load_adapter.",
        )


def _identity(files: list[Path], tokenizer: Any) -> str:
    """sha256 over every stored tensor (name, dtype, shape, bytes) and the tokenizer.

    Sharding does not count, nor do trained-by-nobody heads: they are not in the checkpoint.
    """
    digest = sha256()
    tensors: dict[str, tuple[Path, int, int, str]] = {}
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            kind = f"{entry['dtype']} {entry['shape']}"
            tensors[name] = (path, 8 + size + start, end - start, kind)
    for name in sorted(tensors):
        path, start, length, kind = tensors[name]
        digest.update(f"{name} {kind}".encode())
        with path.open("rb") as file:
            file.seek(start)
            while length > 0:
                block = file.read(min(length, 1 << 24))
                digest.update(block)
                length -= len(block)
    # Padding is masked everywhere and may be set by us; what begins and ends a text counts.
    digest.update(f"{tokenizer.bos_token} {tokenizer.eos_token}".encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set by every padded or truncated call; no part of what the tokenizer is.
        state.pop("truncation", None)
        state.pop("padding", None)
        return json.dumps(state, sort_keys=True)
    return json.dumps(sorted(tokenizer.get_vocab().items()))


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for source in (model.named_parameters(), model.named_buffers()):
        for name, tensor in source:
            yield ".".join(part for part in name.split(".") if part != ROUTED), tensor
    for name, module in model.named_modules():
        if ROUTED in module._modules:
            continue  # the wrapper answers for the linear inside, which is met once, by itself
        clean = ".".join(part for part in name.split(".") if part != ROUTED)
        for key, tensor in _quantisation_scales(module):
            yield f"{clean}.{key}", tensor


def _quantisation_scales(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """What bitsandbytes keeps beside the whole numbers; without it they mean nothing."""
    weight = getattr(module, "weight", None)
    # 8-bit: the first forward moves the scales from the weight to the module's own state.
    for holder in (weight, getattr(module, "state", None)):
        scales = getattr(holder, "SCB", None)
        if scales is not None:
            yield "SCB", scales
            break
    state, prefix = getattr(weight, "quant_state", None), ""
    while state is not None:
        for key in ("absmax", "offset", "code"):
            tensor = getattr(state, key, None)
            if tensor is not None:
                yield prefix + key, tensor
        state, prefix = getattr(state, "state2", None), "nested_"


def _licence(folder: Path) -> str | None:
    """The licence named in the front matter of the base's README, if there is one."""
    readme = folder / "README.md"
    if not readme.exists():
        return None
    for line in readme.read_text(encoding="utf-8", errors="replace").splitlines()[:40]:
        key, _, value = line.partition(":")
        if key.strip() in ("license", "licence") and value.strip():
            return value.strip()
    return None


def _quantized(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def _mend_nf4_on_cpu(model: nn.Module, device: torch.device) -> None:
    """Keep bitsandbytes from repacking nf4 weights in place on CPUs with AVX512-BF16.

    After any evaluation forward the repacked weights give wrong gradients and a wrong
    ``state_dict`` with a normal-looking loss (bitsandbytes 0.50.2).
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (a plain flag)


def quiet_imports() -> None:
    """Hide the notices that libraries print while they are imported, not what they say later."""
    import logging
    import os

    # The bar that transformers draws while it reads weights says nothing beside our own stages.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"bitsandbytes\..*")
