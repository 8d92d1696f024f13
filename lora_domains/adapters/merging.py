"""An adapter written into its base: one plain transformers model that needs neither this nor PEFT.

The base that serves is never written to. It is read once more from where it came from, in full
precision however it is resident: added to rounded 8-bit or 4-bit weights, an adapter is rounded
away with them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_domains.adapters.peft import replacing
from lora_domains.embedded import BASE_PATH
from lora_domains.errors import AdapterError, AdapterUnsupported, BaseModelError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base

MERGED = "merged.json"
"""Says what a merged model was made from, and that its folder is one of ours."""

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
        said = f"{record['adapter']} into {base['id']} in {dtype}"
        if record["error"] is None:
            return f"{said}; the adapter changes nothing"
        said += f"; off from it un-merged by {record['error']:.1e} of its effect"
        resident = base["quantization"] or base["dtype"]
        if resident != dtype:
            said += f" (the base alone, from {resident} to {dtype}: {record['base_error']:.1e})"
        return said


def merge(bank: Bank, name: str, dtype: str | torch.dtype | None = None) -> Merged:
    """``bank``'s base with the resident adapter ``name`` added to its weights: W + scale · B·A.

    The model has the dtype of the resident base, unquantised, unless ``dtype`` says otherwise.
    Sums are made in float32 and rounded once. An adapter on the output layer of a base whose
    embeddings are tied to it leaves the embeddings alone: the two are apart in the result.

    ``record["error"]`` is ‖merged − served‖ over ‖served − base‖, logits of a fixed input, where
    *served* is the adapter un-merged on the base as it is resident; ``record["base_error"]`` the
    same for both bases without it. None where the adapter changes nothing.

    Raises UsageError when ``name`` is not resident, BaseModelError when the base is no longer
    where it was loaded from, AdapterError when a merged weight is too large for ``dtype``,
    AdapterUnsupported for one with a trained head, which a language model has no place for.
    """
    base, adapter = bank.base, bank[name]
    if adapter.head is not None:
        raise AdapterUnsupported(
            where=name,
            expected="an adapter without a head",
            found=f"one with a head of {adapter.head.classes} classes",
            hint="Load its folder with PEFT's AutoPeftModelForSequenceClassification to merge it.",
        )
    with bank.routed(None):
        bare = _logits(base)
    with bank.routed(name):
        served = _logits(base)
    full = _full_precision(base, dtype)
    full_bare = _logits(full)
    with torch.no_grad():
        for linear, (a, b) in bank.weights(name).items():
            _add(full.model, linear, a, b, adapter.scales[linear], name)
    effect = float((served - bare).norm())
    error = float((_logits(full) - served).norm())
    base_error = float((full_bare - bare).norm())
    # A stand-alone model is as `from_pretrained` gives it; only a base is frozen.
    full.model.requires_grad_(True)
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
    """``merge``, and write a folder that ``AutoModelForCausalLM.from_pretrained`` takes.

    The folder is written whole or not at all. Raises AdapterError too when the disk refuses, or,
    before anything is read, when ``folder`` holds anything but a merged model.
    """
    with replacing(folder, MERGED) as fresh:
        merged = merge(bank, name, dtype)
        merged.model.save_pretrained(fresh)
        merged.tokenizer.save_pretrained(fresh)
        text = json.dumps(merged.record, indent=1) + "\n"
        (fresh / MERGED).write_text(text, encoding="utf-8")
    return merged


def _full_precision(base: Base, dtype: str | torch.dtype | None) -> Base:
    """The same base, read once more and not quantised."""
    source = str(BASE_PATH) if base.id == "embedded" else base.model.name_or_path
    full = load_base(source, revision=base.revision, dtype=dtype or base.dtype, device=base.device)
    if full.identity != base.identity:
        raise BaseModelError(
            where=base.id,
            expected=f"the base that is resident (identity {base.identity[:12]})",
            found=f"another in its place (identity {full.identity[:12]})",
            hint="Put the base back where it was loaded from, or load the one that is there.",
        )
    return full


def _add(model: Any, linear: str, a: Tensor, b: Tensor, scale: float, adapter: str) -> None:
    from transformers.pytorch_utils import Conv1D

    module = model.get_submodule(linear)
    weight = module.weight
    delta = (b.to(weight.device) @ a.to(weight.device)) * scale  # (out, in), float32
    if isinstance(module, Conv1D):  # GPT-2's linears are stored (in, out)
        delta = delta.T
    merged = (weight.float() + delta).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(
            where=f"{adapter}, {linear}",
            expected=f"merged weights that {weight.dtype} can hold",
            found="numbers beyond its range",
            hint="Merge into float32.",
        )
    # A weight of its own: where this one is tied to the embeddings, those stay as they were.
    module.weight = nn.Parameter(merged)
    if module is model.get_output_embeddings() and weight is model.get_input_embeddings().weight:
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=False)


@torch.no_grad()
def _logits(base: Base) -> Tensor:
    """(tokens, vocabulary) in float32, for a fixed input of no meaning, as routed here."""
    length, vocabulary = min(_TOKENS, base.context), base.model.config.get_text_config().vocab_size
    ids = (torch.arange(length, device=base.device) * 7 % vocabulary)[None]
    logits: Tensor = base.model(input_ids=ids, use_cache=False).logits[0]
    return logits.float().cpu()
