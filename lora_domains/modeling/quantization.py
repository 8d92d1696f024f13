"""The precision of a base: 8 or 4 bits with bitsandbytes; GGUF files, which are de-quantised.

Also what DoRA needs of a weight of any precision, the lengths of its rows, and what a gated MLP
keeps for the backward pass.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple, get_args
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_domains.errors import BaseModelError, check_installed, did_you_mean, listed
from lora_domains.modeling.checkpoint import FORMATS, Checkpoint, TensorInfo
from lora_domains.placement import gathered

INTEGER_BYTES = {"I64": 8, "I32": 4, "I16": 2}
"""Sizes of integer types by their safetensors names; floats take those of the chosen dtype."""
NOT_QUANTIZED = ("embed", "lm_head", "wte", "wpe")
"""Parts of the names of two-dimensional tensors that bitsandbytes does not quantise."""
Quantization = Literal["8bit", "4bit"]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Precisions by their names in safetensors files."""


def dtype_of(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The precision of that name; by default float32 on a CPU and bfloat16 elsewhere."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise BaseModelError(where="dtype", expected="a precision", found=repr(dtype),
                             hint=did_you_mean(dtype, known))  # fmt: skip
    return known[dtype]


def mapped_dtype(stored: Mapping[str, TensorInfo], dtype: torch.dtype) -> torch.dtype:
    """The precision in which a base wanted in ``dtype`` is read before it is shared out.

    Weights that are read as they are stay in the file, mapped into memory. Each piece is then
    converted by itself, which is exact where ``dtype`` is float32. Otherwise transformers converts,
    which knows the weights that must keep their precision.
    """
    kinds = {FLOATS.get(info.dtype) for info in stored.values()}
    only = kinds.pop() if len(kinds) == 1 else None
    return only if only is not None and dtype == torch.float32 else dtype


def check_quantization(wanted: str | None) -> None:
    """Raise BaseModelError unless ``wanted`` is a quantisation or None."""
    known = get_args(Quantization)
    if wanted is None or wanted in known:
        return
    digit = next((word for word in known if word[0] in str(wanted)), None)
    hint = f"Did you mean {digit!r}?" if digit else did_you_mean(str(wanted), known)
    raise BaseModelError(where="quantization", expected="'8bit', '4bit' or None",
                         found=repr(wanted), hint=hint)  # fmt: skip


def stored_quantization(
    config: Any, tensors: Iterable[str], wanted: str | None, where: str
) -> Quantization | None:
    """How the checkpoint of ``config`` is quantised, None for plain weights.

    Raises BaseModelError for other methods than bitsandbytes, whose results and gradients are not
    known to be right here, when ``wanted`` is another quantisation than the stored one, and when
    none of the stored ``tensors`` is quantised.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    named = settings.get("quant_method")
    method = str(getattr(named, "value", named or "a method that the config does not name"))
    stored: Quantization | None = None
    if settings.get("load_in_8bit") or settings.get("_load_in_8bit"):
        stored = "8bit"
    elif settings.get("load_in_4bit") or settings.get("_load_in_4bit"):
        stored = "4bit"
    if stored is None or not method.startswith("bitsandbytes"):
        raise BaseModelError(
            where=where,
            expected="plain weights, or weights quantised by bitsandbytes",
            found=f"weights quantised by {method}",
            hint="Give the unquantised base, with --load-in-8bit or --load-in-4bit to save memory.",
        )
    if wanted not in (None, stored):
        raise BaseModelError(
            where=where,
            expected=f"quantization={stored!r} or none, for a base that is stored in {stored}",
            found=f"quantization={wanted!r}",
            hint="Leave it out, or give the unquantised base.",
        )
    # Beside quantised weights bitsandbytes stores their scales.
    if not any(".quant_state." in name or name.endswith(".SCB") for name in tensors):
        raise BaseModelError(
            where=where,
            expected=f"weights in {stored}, as quantization_config in config.json says",
            found="plain weights",
            hint="Delete quantization_config there, or save the quantised model again.",
        )
    return stored


def quantization_config(quantization: Quantization, dtype: torch.dtype) -> Any:
    """The settings with which transformers quantises a base while it is loaded."""
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def prepare_linears(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Set the compute dtype of 4-bit linears, and let 8-bit linears forget their inputs.

    Repacking is switched off: on CPUs with AVX512-BF16 bitsandbytes repacks nf4 weights in place,
    after which gradients and ``state_dict`` are wrong, and the loss looks normal (0.50.2).
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            module.register_forward_hook(_forget_input)
        if hasattr(module, "compute_dtype"):
            # A stored base names its own, which may be less precise than the other weights.
            setattr(module, "compute_dtype", dtype)  # noqa: B010 (a plain attribute)
        if device.type == "cpu" and hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010


def _forget_input(_module: nn.Module, _inputs: Any, y: Tensor) -> None:
    """Free what bitsandbytes keeps of an input for the gradient of a frozen weight in 8 bits: it is
    not among what autograd saves, so that gradient checkpointing does not free it."""
    node: Any = y.grad_fn
    if hasattr(node, "tensors"):
        node.tensors = (None, None, None)
    elif hasattr(node, "A"):  # of a linear in training mode on a CPU
        node.A = None


def dequantised(linear: nn.Module) -> Tensor:
    """The weight of ``linear`` as floating-point numbers."""
    weight = linear.get_parameter("weight")
    if type(weight).__name__ not in ("Int8Params", "Params4bit"):
        return weight.detach()
    from peft.utils.integrations import dequantize_bnb_weight

    # PEFT's dequantize_module_weight would replace the weight, which then loses its 8-bit scales.
    state = SimpleNamespace(SCB=dict(scales_of(linear)).get("SCB"))
    plain: Tensor = dequantize_bnb_weight(weight, state)
    return plain.detach()


def scales_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The scales that bitsandbytes keeps beside the quantised weights of a linear."""
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


def import_peft_alone() -> None:
    """Import PEFT without bitsandbytes, which PEFT imports wherever it is installed.

    That takes a second and prints notices. PEFT's caches of the search are cleared afterwards, so
    that both work together when a quantised base is loaded later.
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


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────


class Gguf(Checkpoint):
    """One GGUF file with config and tokenizer inside, which transformers de-quantises."""

    pattern = "*.gguf"
    on_hub = False  # a repository holds many quantisations of the same weights
    takes_a_file = True
    kinds = ("llama", "qwen2", "qwen3")
    """The kinds of model (``config.model_type``) that are known to be read right."""

    def __init__(self, source: str, revision: str | None, folder: Path) -> None:
        super().__init__(source, revision, folder)
        if Path(source).is_file():
            self.files = [Path(source)]

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        return bool(cls.weight_files(folder))

    @property
    def place(self) -> dict[str, Any]:
        (file,) = self.files
        return {"pretrained_model_name_or_path": str(self.folder), "gguf_file": file.name}

    def config(self) -> Any:
        check_installed(str(self.folder), "the package gguf, which reads GGUF", "gguf", ["gguf"])
        if len(self.files) > 1:
            names = ", ".join(path.name for path in self.files)
            raise ValueError(f"several GGUF files: {names}; give the path of one of them")
        config = super().config()
        if config.model_type not in self.kinds:
            raise ValueError(
                f"GGUF of kind {config.model_type}; in GGUF only {listed(self.kinds)} are supported"
            )
        return config

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(**self.place)

    @cached_property
    def _stored(self) -> dict[str, Any]:
        from gguf import GGUFReader

        return {tensor.name: tensor for tensor in GGUFReader(self.files[0]).tensors}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo("F32", tuple(map(int, reversed(tensor.shape))))
                for name, tensor in self._stored.items()}  # fmt: skip

    def content(self, name: str) -> Iterator[bytes]:
        yield self._stored[name].data.tobytes()

    def tensor(self, name: str) -> Tensor:
        from gguf import dequantize

        stored = self._stored[name]
        return torch.tensor(dequantize(stored.data, stored.tensor_type), dtype=torch.float32)

    def load(self, architecture: Any, **options: Any) -> tuple[Any, list[str]]:
        if "quantization_config" in options:
            raise ValueError("a GGUF file, which is not quantised again when it is loaded")
        from transformers import modeling_gguf_pytorch_utils as reader

        # Its bar is not one that transformers can be told to hide.
        with patch.object(reader, "tqdm", partial(reader.tqdm, disable=True)):
            options |= {"output_loading_info": True, **self.place}
            model, report = architecture.from_pretrained(**options)
        # The weights are plain by now; with these, which the oldest supported transformers does
        # not set, the model could not be saved.
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer, model.is_quantized = None, False
        return model, list(report["missing_keys"])


FORMATS.append(Gguf)


def estimated_bytes(
    tensors: Mapping[str, TensorInfo], dtype: torch.dtype, quantization: str | None
) -> int:
    """The memory that stored ``tensors`` will take once loaded, in bytes.

    8-bit linears take one byte a weight and a scale for each output; 4-bit ones (nf4, scales
    quantised again) half a byte and one byte for each block of 64.
    """
    total = 0.0
    for name, (stored, shape) in tensors.items():
        count = prod(shape)
        linear = len(shape) == 2 and not any(part in name for part in NOT_QUANTIZED)
        if quantization == "8bit" and linear:
            total += count + 4 * shape[0]
        elif quantization == "4bit" and linear:
            total += count / 2 + count / 64 + 4 * count / (64 * 256)
        elif stored[0] in "FB":
            total += count * dtype.itemsize
        else:
            total += count * INTEGER_BYTES.get(stored, 1)
    return round(total)


# ── DoRA: the lengths of rows of a weight ───────────────────────────────────────────────────────


class Rescaling(NamedTuple):
    """What DoRA does to the output y of a linear with LoRA: ``gain · (y - bias) + bias``."""

    gain: Tensor
    """(out,): magnitude over length, of each row of W + scale · B·A."""
    bias: Tensor | None

    def __call__(self, y: Tensor) -> Tensor:
        rescaled = y * self.gain
        return rescaled if self.bias is None else rescaled + (1 - self.gain) * self.bias


def row_lengths(
    linear: nn.Module, a: Tensor | None = None, b: Tensor | None = None, scale: float = 0.0
) -> Tensor:
    """(out,): the lengths of the rows of the weight of ``linear``, with ``scale · b·a`` added."""
    from transformers.pytorch_utils import Conv1D

    with gathered(linear):
        weight = dequantised(linear).float()
        if isinstance(linear, Conv1D):  # GPT-2's linears are stored (in, out)
            weight = weight.T
        if a is not None and b is not None:
            weight = weight + scale * (b.detach().float() @ a.detach().float())
        lengths: Tensor = torch.linalg.vector_norm(weight, dim=1)
    return lengths


# ── Gated MLPs: what they keep for the backward pass ─────────────────────────────────────────────

GATED = "_lora_domains_gated"
"""Attribute of a product: its factors gate and up, without gradients."""
FORWARD = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
"""What the MLPs of Llama and most models like it compute; others are left as they are."""


def recompute_gate(mlp: nn.Module) -> None:
    """Let ``mlp`` keep less for the backward pass, if SiLU gates it and its forward is its own."""
    activation = type(getattr(mlp, "act_fn", None)).__name__
    if activation not in ("SiLU", "SiLUActivation") or "forward" in vars(mlp):
        return
    with suppress(OSError):  # a class without source
        if FORWARD in inspect.getsource(type(mlp).forward):
            vars(mlp)["forward"] = partial(_gated, mlp)


def _gated(mlp: Any, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if torch.is_grad_enabled() and gate.requires_grad and up.requires_grad:
        product = GatedProduct.apply(gate, up)  # type: ignore[no-untyped-call]
        setattr(product, GATED, (gate.detach(), up.detach()))
    else:
        product = mlp.act_fn(gate) * up
    out: Tensor = mlp.down_proj(product)
    return out


class GatedProduct(torch.autograd.Function):
    """``silu(gate) · up``, computed again in the backward pass: its factors alone are kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        to_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return to_gate, F.silu(gate).mul_(grads[0])


class GatedLow(torch.autograd.Function):
    """A gated ``product`` (…, in) times the transpose of ``a`` (rank, in), kept as its factors;
    with (adapters, tokens, in) also of ``a`` (adapters, rank, in)."""

    @staticmethod
    def forward(ctx: Any, product: Tensor, gate: Tensor, up: Tensor, a: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up, a)
        return product @ a.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up, a = ctx.saved_tensors
        grad, product = grads[0], F.silu(gate).mul_(up)
        if a.dim() == 2:
            grad, product = grad.flatten(0, -2), product.flatten(0, -2)
        return grads[0] @ a, None, None, grad.mT @ product
