"""The base: a pretrained model, causal or an encoder, loaded frozen, that nothing may change.

Two hashes guard it. Its *identity* is of the stored checkpoint and tokenizer, the same whatever
the revision's name, the precision it is loaded in, or heads made at random: an adapter remembers
it. Its *state digest* is of the tensors in memory: equal before and after, nothing changed.
"""

import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_domains.distributed import state
from lora_domains.embedded import BASE_PATH
from lora_domains.errors import BaseModelError, did_you_mean, listed
from lora_domains.modeling.memory import estimated_bytes, resident_bytes

Quantization = Literal["8bit", "4bit"]
ROUTED = "routed_base"
"""What ``RoutedLinear`` calls the linear it wraps; adapters are no modules of the model."""
ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta")
"""The kinds of encoder (``config.model_type``) that can be a base."""


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
    files: tuple[Path, ...] = ()
    """The checkpoint as stored; it may hold what the resident model has no place for."""
    meanings: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What the last few configs of adapters mean on this architecture (see ``loading``)."""

    @property
    def bidirectional(self) -> bool:
        """Whether it reads a text from both sides and writes none (BERT and its kind)."""
        return is_bidirectional(self.model.config)

    @property
    def language_head(self) -> bool:
        """Whether it gives probabilities of tokens: next ones, or masked ones (an encoder)."""
        untrained = any(isinstance(child, NoMaskedHead) for child in self.model.children())
        return not self.bidirectional or not (untrained or self.tokenizer.mask_token_id is None)

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
        config = self.model.config.get_text_config()
        places = int(getattr(config, "max_position_embeddings", 2048))
        # RoBERTa counts positions from the padding id on, so that many places are never used.
        return places - config.pad_token_id - 1 if "roberta" in config.model_type else places

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

    def resident_bytes(self) -> int:
        """What the base takes in memory, scales of quantised weights included."""
        return resident_bytes(tensor for _, tensor in _base_tensors(self.model))

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


class NoMaskedHead(nn.Module):
    """In the place of a masked-token head that the checkpoint does not hold."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise BaseModelError(
            where="this encoder",
            expected="a trained masked-token head",
            found="none in its checkpoint",
            hint="Use it with trained heads only: Classification(head=True).",
        )


def is_bidirectional(config: Any) -> bool:
    """Whether a model of ``config`` is an encoder; BERT can also be configured as a decoder."""
    return config.model_type in ENCODERS and not getattr(config, "is_decoder", False)


def load_base(
    path_or_id: str | Path | None = None,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    quantization: Quantization | None = None,
    device: str | torch.device | None = None,
    announce: Callable[[int, torch.device], object] = lambda _bytes, _device: None,
) -> Base:
    """Load a base frozen and in evaluation mode.

    ``None`` is the embedded base. ``dtype`` is float32 on a CPU and bfloat16 on an accelerator
    unless given. ``announce`` is told the bytes it will take, and where, before it is loaded.
    Raises BaseModelError when the folder or id has no model, no tokenizer or no
    safetensors weights, or cannot be reached.

    An encoder is loaded with its masked-token head where the checkpoint holds one; a head that
    would be made at random is left out, and asking for its logits raises BaseModelError.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    where = str(path_or_id or "the embedded base")
    source = str(path_or_id or BASE_PATH)
    target = torch.device(device) if device is not None else state().device
    if dtype is None:
        dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    elif isinstance(dtype, str):
        dtype = _named_dtype(dtype)
    files = _checkpoint_files(source, revision, where)
    if quantization is None:
        _import_peft_alone()
    options: dict[str, Any] = {"revision": revision or "main", "dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = _quantized(quantization, dtype)
        options["device_map"] = {"": target}
    try:
        announce(estimated_bytes(files, dtype, quantization), target)
        bidirectional = is_bidirectional(
            AutoConfig.from_pretrained(source, revision=options["revision"])
        )
        tokenizer = _load_tokenizer(source, revision, where, bidirectional)
        kind = AutoModelForMaskedLM if bidirectional else AutoModelForCausalLM
        with _quiet_report(bidirectional):
            model, loading = kind.from_pretrained(source, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise BaseModelError(
            where=where,
            expected="a causal language model or an encoder that transformers can load",
            found=str(error).splitlines()[0],
            hint="Check the folder or id; only causal language models can be a base, and encoders "
            f"of kind {listed(ENCODERS)}.",
        ) from error
    missing = (
        _without_random_head(model, loading["missing_keys"])
        if bidirectional
        else sorted(loading["missing_keys"])
    )
    if missing:
        raise BaseModelError(
            where=where,
            expected="weights for the whole model",
            found=f"none for {listed(missing, 3)}",
            hint="Save it whole: model.save_pretrained(folder). Random weights are no base.",
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
        files=tuple(files),
    )


@contextmanager
def _quiet_report(bidirectional: bool) -> Iterator[None]:
    """For an encoder, hide transformers' report of heads left over or made at random.

    Neither happens here: what is left over stays in ``Base.files``, and a random head is dropped.
    """
    from transformers.utils import logging

    before = logging.get_verbosity()
    if bidirectional:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _without_random_head(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """The missing keys of the encoder itself; parts of its masked-token head are taken out.

    A random head would answer, and mean nothing.
    """
    inside = f"{model.base_model_prefix}."
    for key in missing:
        if not key.startswith(inside):
            setattr(model, key.split(".")[0], NoMaskedHead())
    return sorted(key for key in missing if key.startswith(inside))


def stored_tensor(base: Base, name: str) -> Tensor | None:
    """The tensor ``name`` of the base's checkpoint in float32, None where it has none.

    ``name`` is as in an architecture with a head; a checkpoint of the bare encoder leaves its
    prefix out (``pooler.dense.weight`` for ``bert.pooler.dense.weight``).
    """
    from safetensors import safe_open

    bare = name.removeprefix(f"{base.model.base_model_prefix}.")
    for path in base.files:
        with safe_open(path, framework="pt") as file:
            for key in {name, bare} & set(file.keys()):
                tensor: Tensor = file.get_tensor(key)
                return tensor.float()
    return None


def _named_dtype(name: str) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise BaseModelError(
            where="dtype",
            expected="a precision",
            found=repr(name),
            hint=did_you_mean(name, known),
        )
    return known[name]


def _public_name(path_or_id: str | Path) -> str:
    """A Hub id as it is; a folder by its name only: a card carries no path of this machine."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else str(path_or_id)


def _load_tokenizer(source: str, revision: str | None, where: str, bidirectional: bool) -> Any:
    from transformers import AutoTokenizer

    missing = BaseModelError(
        where=where,
        expected="a tokenizer beside the weights",
        found="none that transformers can load",
        hint="Save one there: tokenizer.save_pretrained(folder).",
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
    if bidirectional:
        if None in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
            raise BaseModelError(
                where=where,
                expected="an encoder's tokenizer, with [CLS], [SEP] and [PAD]",
                found="one without them",
                hint="Save the tokenizer that the encoder was trained with.",
            )
        return tokenizer
    if tokenizer.eos_token_id is None:
        raise BaseModelError(
            where=where,
            expected="a tokenizer with an end-of-sequence token, so that answers can end",
            found="none",
            hint="Set tokenizer.eos_token and save it again.",
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
                hint="Save the model there: model.save_pretrained(folder).",
            )
        return files
    if folder.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise BaseModelError(
            where=where,
            expected="a folder with a saved model, or a Hub id such as Qwen/Qwen3-0.6B",
            found="a file" if folder.exists() else "no such folder",
            hint="Check the path given as --base.",
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
            hint="Check the path or id given as --base.",
        ) from None
    except (OSError, HfHubHTTPError, ValueError) as error:
        raise BaseModelError(
            where=where,
            expected="a base that can be reached",
            found=f"{type(error).__name__}: no folder of that name, and the Hub gave no answer",
            hint="Go online, or download it once elsewhere and give its folder as --base.",
        ) from error
    files = sorted(Path(path).glob("*.safetensors"))
    _refuse_adapter(Path(path), where)
    if not files:
        raise BaseModelError(
            where=where,
            expected="weights in safetensors files",
            found="none in the repository",
            hint="Choose a revision with safetensors; pickled weights are not loaded.",
        )
    return files


def _refuse_adapter(folder: Path, where: str) -> None:
    """transformers would load the adapter's base from elsewhere and put the adapter on it."""
    if (folder / "adapter_config.json").exists():
        raise BaseModelError(
            where=where,
            expected="a base",
            found="an adapter (it has adapter_config.json)",
            hint="Give the base it was made on, and load the adapter with load_adapter.",
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


def _import_peft_alone() -> None:
    """Import PEFT without bitsandbytes, which it loads wherever it is installed.

    Nobody asked for it: it takes a second and prints notices. What PEFT remembers of the search
    is forgotten again, so that both work together as soon as somebody does ask.
    """
    if "peft" in sys.modules or "bitsandbytes" in sys.modules:
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        from peft import import_utils
    finally:
        del sys.modules["bitsandbytes"]
    import_utils.is_bnb_available.cache_clear()
    import_utils.is_bnb_4bit_available.cache_clear()


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
