"""Merging an adapter into its base: one plain transformers model, without PEFT or this package.

The loaded base is never written to. It is read again from its source in full precision, however it
is loaded: added to 8-bit or 4-bit weights, an adapter would be rounded away.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_domains.adapters.folder import replacing
from lora_domains.errors import AdapterError, AdapterUnsupported, BaseModelError, UsageError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.placement import is_sharded

MERGED = "merged.json"
"""The file that records a merge; only a folder with it is replaced."""

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
    with bank.routed(None):
        bare = _logits(base)
    with bank.routed(name):
        served = _logits(base)
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


@torch.no_grad()
def _logits(base: Base) -> Tensor:
    """(tokens, vocabulary) in float32, for a fixed meaningless input, with the current route."""
    length = min(_TOKENS, base.context)
    ids = (torch.arange(length, device=base.device) * 7 % base.vocabulary)[None]
    logits: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()
