"""An adapter merged into its base, as one transformers model or GGUF file; or alone as GGUF.

The loaded base is never written to. It is read again from its source in full precision, however it
is loaded: added to 8-bit or 4-bit weights, an adapter would be rounded away.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_domains.adapters.folder import replacing
from lora_domains.errors import (
    AdapterError,
    AdapterUnsupported,
    BaseModelError,
    UsageError,
    check_installed,
    listed,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.lora import Weights
from lora_domains.placement import is_sharded
from lora_domains.tokenization.gguf_vocabulary import add_tokenizer

MERGED = "merged.json"
"""The file that records an export; only a folder with it is replaced."""
_TOKENS = 64


@dataclass(frozen=True)
class Merged:
    """A stand-alone model with its tokenizer; ``record`` is what ``merged.json`` holds."""

    model: Any
    tokenizer: Any
    record: dict[str, Any]

    def __str__(self) -> str:
        record = self.record
        base, dtype = record["base"], record["dtype"]
        text = f"{record['adapter']} into {base['id']} in {dtype}"
        if record["error"] is None:
            return f"{text}; the adapter has no effect"
        text += f"; error {record['error']:.1e} of the adapter's effect"
        loaded = base["quantization"] or base["dtype"]
        if loaded != dtype:
            text += f" (the base alone, {loaded} to {dtype}: {record['base_error']:.1e})"
        return text


def merge(bank: Bank, name: str, dtype: str | torch.dtype | None = None) -> Merged:
    """The base of ``bank`` with the loaded adapter ``name`` added to its weights: W + scale · B·A,
    whose rows DoRA gives its magnitudes.

    The model has the dtype of the loaded base, unquantised, or ``dtype``. Sums are computed in
    float32 and rounded once. An adapter on an output layer that is tied to the embeddings leaves
    the embeddings unchanged: the two are separate in the result.

    ``record["error"]`` is ‖merged − served‖ over ‖served − base‖, logits of a fixed input, where
    *served* is the un-merged adapter on the base as it is loaded; ``record["base_error"]`` is the
    same for both bases without it. None if the adapter has no effect.

    Raises UsageError when ``name`` is not loaded, BaseModelError when the base is no longer where
    it was loaded from, AdapterError when a merged weight is too large for ``dtype``, and
    AdapterUnsupported for an adapter with a trained head, which a language model cannot hold.
    """
    base, adapter = bank.base, bank[name]
    if adapter.head is not None:
        raise AdapterUnsupported(
            where=name,
            expected="an adapter without a head",
            found=f"one with a head of {adapter.head.classes} classes",
            hint="Load its folder with PEFT's AutoPeftModelForSequenceClassification to merge it.",
        )
    if is_sharded(base.model):
        raise UsageError(
            where=name,
            expected="a base in one piece to merge into",
            found="one that is shared out to several processes",
            hint="Merge in one process, with lora-domains export; that needs no accelerator.",
        )
    bare, served = _both(bank, name)
    full = _full_precision(base, dtype)
    full_bare = _logits(full)
    with torch.no_grad():
        for linear, (a, b) in bank.weights(name).items():
            magnitude = adapter.magnitudes.get(linear)
            _add(full.model, linear, a, b, adapter.scales[linear], magnitude, name)
    effect = float((served - bare).norm())
    error = float((_logits(full) - served).norm())
    base_error = float((full_bare - bare).norm())
    # A stand-alone model is not frozen, as after `from_pretrained`.
    full.model.requires_grad_(True)
    full.model.generation_config = full.generation_config
    if adapter.card and adapter.card.adapter.chat.get("template") == "plain":
        full.tokenizer.chat_template = base.chat_template.plain
    record = {
        "schema": 1,
        "adapter": name,
        "sha256": adapter.card.adapter.sha256 if adapter.card else None,
        "base": base.record(),
        "dtype": str(full.dtype).removeprefix("torch."),
        "error": error / effect if effect else None,
        "base_error": base_error / effect if effect else None,
    }
    return Merged(full.model, full.tokenizer, record)


def export(bank: Bank, name: str, folder: Path, dtype: str | torch.dtype | None = None) -> Merged:
    """``merge``, written as a folder for ``AutoModelForCausalLM.from_pretrained``.

    The folder is written as a whole or not at all. Raises AdapterError too when the disk refuses,
    and, before anything is read, when ``folder`` holds anything but a merged model.
    """
    with replacing(folder, MERGED) as fresh:
        merged = merge(bank, name, dtype)
        merged.model.save_pretrained(fresh)
        merged.tokenizer.save_pretrained(fresh)
        text = json.dumps(merged.record, indent=1) + "\n"
        (fresh / MERGED).write_bytes(text.encode())
    return merged


# ── GGUF ────────────────────────────────────────────────────────────────────────────────────────

KINDS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""The architecture in a GGUF file, by that of the base; that of others is not written."""
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
EQUAL = 1e-3
"""The largest difference, in standard deviations of the logits, of a file that is read again."""


def export_gguf(
    bank: Bank, name: str, folder: Path, dtype: str, files: Callable[[], Mapping[str, str]]
) -> Merged:
    """``merge``, written as the only GGUF file of a folder, for llama.cpp and what is built on it.

    ``files`` gives the text of others, by name. The file is read again by transformers:
    ``record["error"]`` is that of its logits. Raises AdapterUnsupported for a base or a tokenizer
    that has no known form in GGUF, or that is read differently, and what ``merge`` raises.
    """
    names = _names(name, bank.base)
    with replacing(folder, MERGED) as fresh:
        merged = merge(bank, name, dtype)
        file = fresh / f"{name}.gguf"
        _write_gguf(merged, file, bank.base, names)
        expected = _logits(bank.base, merged.model.float())
        bare, served = _both(bank, name)
        found = _logits(load_base(file, device="cpu", dtype="float32"))
        if not float((found - expected).abs().max()) <= EQUAL * float(expected.std()):
            raise _unwritten(name, bank.base, "logits that differ when the file is read again")
        effect = float((served - bare).norm())
        error = float((found - served).norm()) / effect if effect else None
        merged.record.update(format="gguf", error=error)
        for path, text in {**files(), MERGED: json.dumps(merged.record, indent=1)}.items():
            (fresh / path).write_bytes(text.encode() + b"\n")
    return merged


def export_gguf_adapter(bank: Bank, name: str, folder: Path, dtype: str) -> float | None:
    """The adapter ``name`` alone as the only GGUF file of a folder, as llama.cpp adds it to a base.

    The file is read again and added to the base: returned is the error of its logits, as that of
    ``merge``. Raises AdapterUnsupported for an adapter or a base that llama.cpp cannot take, and
    what ``merge`` raises.
    """
    base, adapter = bank.base, bank[name]
    names, tied = _names(name, base), base.model.config.tie_word_embeddings
    places = {linear: names.get_name(linear) for linear in bank.weights(name)}
    for wrong, found in (
        (adapter.head is not None, "one with a trained head"),
        (adapter.magnitudes, "DoRA"),
        (None in places.values(), f"one of {listed(one for one, at in places.items() if not at)}"),
        (tied and "output" in places.values(), "one of an output layer tied to the embeddings"),
    ):
        if wrong:
            raise AdapterUnsupported(
                where=f"{name} for llama.cpp",
                expected="plain LoRA of the linears of a base",
                found=found,
                hint="Write the merged model: --to gguf",
            )
    with replacing(folder, MERGED) as fresh:
        _write_adapter(bank, name, fresh / f"{name}.gguf", places, dtype)
        bare, served = _both(bank, name)
        full = _full_precision(base, None)
        with torch.no_grad():
            for linear, (a, b) in _read_adapter(fresh / f"{name}.gguf", places, base).items():
                _add(full.model, linear, a, b, 1.0, None, name)
        effect = float((served - bare).norm())
        error = float((_logits(full) - served).norm()) / effect if effect else None
        record = {"schema": 1, "adapter": name, "base": base.record(), "dtype": dtype,
                  "format": "gguf-adapter", "error": error}  # fmt: skip
        (fresh / MERGED).write_bytes(json.dumps(record, indent=1).encode() + b"\n")
    return error


def _write_adapter(
    bank: Bank, name: str, path: Path, places: Mapping[str, str], dtype: str
) -> None:
    import gguf

    config, scales, weights = bank.base.model.config, bank[name].scales, bank.weights(name)
    writer = gguf.GGUFWriter(path, KINDS[config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    first = next(iter(weights))
    alpha = scales[first] * len(weights[first][0]) or 1.0
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    form = gguf.GGMLQuantizationType[STORED[dtype]]
    for linear, (a, b) in weights.items():
        # llama.cpp multiplies by alpha over the rank, whatever the adapter's own rule is.
        factor = scales[linear] * len(a) / alpha
        b = _rows(b if factor == 1 else b * factor, linear, config)
        for part, tensor in (("a", a), ("b", b)):
            array = gguf.quants.quantize(tensor.contiguous().numpy(), form)
            writer.add_tensor(f"{places[linear]}.weight.lora_{part}", array, raw_dtype=form)
    _finish(writer)


def _read_adapter(path: Path, places: Mapping[str, str], base: Base) -> Weights:
    """A and B of each linear, with the factor of B·A in B."""
    import gguf

    reader = gguf.GGUFReader(path)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    read = {
        one.name: torch.from_numpy(gguf.quants.dequantize(one.data, one.tensor_type).copy())
        for one in reader.tensors
    }
    found = {}
    for linear, place in places.items():
        a, b = (read[f"{place}.weight.lora_{part}"] for part in ("a", "b"))
        found[linear] = a, _rows(b * (alpha / len(a)), linear, base.model.config, back=True)
    return found


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(name: str, base: Base) -> Any:
    """What llama.cpp calls the tensors of a base; raises AdapterUnsupported for another kind."""
    check_installed("GGUF", "the package gguf", "gguf", ["gguf"])
    import gguf

    config = base.model.config
    kinds = {text: kind for kind, text in gguf.MODEL_ARCH_NAMES.items()}
    if config.model_type not in KINDS:
        raise _unwritten(name, base, f"the kind {config.model_type}")
    return gguf.get_tensor_name_map(kinds[KINDS[config.model_type]], config.num_hidden_layers)


def _rows(value: Tensor, module: str, config: Any, *, back: bool = False) -> Tensor:
    """The rows of the weight, bias or B of ``module`` as llama.cpp orders them, or ``back``: it
    pairs the rotated columns of a Llama side by side."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(module.split(".")[-1])
    if count is None or KINDS[config.model_type] != "llama":
        return value
    halves = (count, -1, 2) if back else (count, 2, -1)
    return value.reshape(*halves, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _unwritten(name: str, base: Base, found: str) -> AdapterUnsupported:
    return AdapterUnsupported(
        where=f"{name} as GGUF",
        expected=f"a base of the kind {listed(KINDS)} with a byte-level BPE that llama.cpp knows",
        found=f"{base.id}: {found}",
        hint="Merge it into a model of transformers, and convert that with llama.cpp: --to merged",
    )


def _write_gguf(merged: Merged, path: Path, base: Base, names: Any) -> None:
    import gguf

    name, config = merged.record["adapter"], merged.model.config
    kind = KINDS[config.model_type]
    rope = getattr(config, "rope_parameters", None) or {}
    for wrong, found in (
        (rope.get("rope_type", "default") != "default", f"{rope.get('rope_type')} positions"),
        (getattr(config, "sliding_window", None) and kind == "llama", "attention in windows"),
    ):
        if wrong:
            raise _unwritten(name, base, found)
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, kind)
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if not add_tokenizer(writer, merged.tokenizer, config.vocab_size, base.context):
        raise _unwritten(name, base, "another tokenizer")
    stored = STORED[merged.record["dtype"]]
    writer.add_file_type({"F32": 0, "F16": 1, "BF16": 32}[stored])
    tied = config.tie_word_embeddings
    for tensor_name, tensor in merged.model.state_dict().items():
        if tied and tensor_name == "lm_head.weight":
            continue
        called = names.get_name(tensor_name, try_suffixes=(".weight", ".bias"))
        if called is None:
            raise _unwritten(name, base, f"a tensor {tensor_name}")
        value = _rows(tensor.float().cpu(), tensor_name.rpartition(".")[0], config)
        # Vectors (norms, biases) stay in float32.
        form = gguf.GGMLQuantizationType["F32" if value.dim() == 1 else stored]
        array = gguf.quants.quantize(value.contiguous().numpy(), form)
        writer.add_tensor(called, array, raw_dtype=form)
    _finish(writer)


# ── Weights ─────────────────────────────────────────────────────────────────────────────────────


def _full_precision(base: Base, dtype: str | torch.dtype | None) -> Base:
    """The same base, read again without quantisation."""
    source = base.checkpoint.source
    full = load_base(source, revision=base.revision, dtype=dtype or base.dtype, device=base.device)
    if full.identity != base.identity:
        raise BaseModelError(
            where=base.id,
            expected=f"the base that is loaded (identity {base.identity[:12]})",
            found=f"another one in its place (identity {full.identity[:12]})",
            hint="Restore the base where it was loaded from, or load the one that is there.",
        )
    if full.quantization is not None:  # stored so: these weights are the most precise there are
        full.model.dequantize(dtype=full.dtype)
    return full


def _add(
    model: Any, linear: str, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None,
    adapter: str,
) -> None:  # fmt: skip
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(linear)
    weight = module.weight
    delta = (b.to(weight.device) @ a.to(weight.device)) * scale  # (out, in), float32
    transposed = isinstance(module, Conv1D)  # GPT-2's linears are stored (in, out)
    whole = (weight.T if transposed else weight).float() + delta
    if magnitude is not None:
        whole *= (magnitude.to(whole.device) / torch.linalg.vector_norm(whole, dim=1))[:, None]
    merged = (whole.T if transposed else whole).contiguous().to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(
            where=f"{adapter}, {linear}",
            expected=f"merged weights that {weight.dtype} can hold",
            found="numbers beyond its range",
            hint="Merge into float32.",
        )
    # A new parameter, so that embeddings tied to this one stay as they are.
    module.weight = nn.Parameter(merged)
    if module is model.get_output_embeddings() and weight is model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


def _both(bank: Bank, name: str) -> tuple[Tensor, Tensor]:
    """The logits of the base, and of the adapter ``name`` on it."""
    with bank.routed(None):
        bare = _logits(bank.base)
    with bank.routed(name):
        return bare, _logits(bank.base)


@torch.no_grad()
def _logits(base: Base, model: Any = None) -> Tensor:
    """(tokens, vocabulary) in float32, for a fixed meaningless input, with the current route, or of
    another model of the base's shape."""
    length = min(_TOKENS, base.context)
    ids = (torch.arange(length, device=base.device) * 7 % base.vocabulary)[None]
    model = base.model if model is None else model
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()
