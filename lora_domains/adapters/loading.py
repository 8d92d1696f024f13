"""Loading an adapter folder strictly: everything is checked before anything is used.

The files may be cut off, changed, hostile, or made for another base. Each fault is a named error,
and nothing is allocated before its size is known to fit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm

from lora_domains.adapters.config import read_config, targets_of
from lora_domains.adapters.folder import CONFIG, WEIGHTS, check_digest, fingerprint, mapped
from lora_domains.adapters.peft import MAGNITUDE, PREFIX, stored_name
from lora_domains.atomic import adapter_name, check_name, folders_with, restored
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
    DomainError,
    did_you_mean,
    listed,
)
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import template_of
from lora_domains.modeling.checkpoint import HeaderEntry, read_header
from lora_domains.modeling.heads import (
    FEATURES,
    Head,
    complete_head,
    head_shapes,
    layout_of,
    stored_classes,
)
from lora_domains.modeling.lora import Adapter, flatten
from lora_domains.modeling.quantization import FLOATS
from lora_domains.placement import gathered
from lora_domains.report.card import CARD, Card

"""Dtypes of weights, by their safetensors names."""
LORA = (".lora_A.weight", ".lora_B.weight")
"""How the names of the two tensors of a linear end."""


def load_adapter(path: str | Path, base: Base, name: str | None = None) -> Adapter:
    """Read an adapter folder that was saved here or by plain PEFT.

    The base of an adapter without a card cannot be verified, which ``notes`` says. Raises
    AdapterMismatch, AdapterCorrupt, AdapterUnsupported or AdapterError.
    """
    folder = restored(Path(path).absolute())
    name = check_name(adapter_name(folder) if name is None else name)
    _check_files(folder)
    config, ignored = read_config(folder, base)
    card = Card.read(folder, measured=False) if (folder / CARD).exists() else None
    pages = mapped(folder / WEIGHTS)
    if card is None:
        adapter = _read(name, folder, base, config, None, pages)
        return replace(adapter, notes=(*adapter.notes, *_ignored(name, ignored)))
    if not card.adapter.trained_elsewhere:
        _check_base(card, folder, base)
    # Half of the time goes into the digest: it is computed while another core reads the tensors.
    with ThreadPoolExecutor(1) as executor:
        digest = executor.submit(fingerprint, folder, pages)
        try:
            adapter = _read(name, folder, base, config, card, pages)
        finally:
            # A wrong digest is reported rather than the error that the changed byte led to.
            check_digest(folder, str(card.adapter.sha256), digest.result())
    return replace(adapter, notes=(*adapter.notes, *_ignored(name, ignored)))


def _ignored(name: str, keys: Sequence[str]) -> Iterator[str]:
    if keys:
        yield f"{name}: {CONFIG} has keys that PEFT does not know, and ignores: {listed(keys)}."


def _read(
    name: str, folder: Path, base: Base, config: Any, card: Card | None, pages: bytes | mmap
) -> Adapter:
    stored = _tensors(folder, pages)
    classes = _classes(config, stored, base, card, folder)
    notes = _notes(name, base, card, config)  # PEFT writes this base's name into the config
    expected, scales = targets_of(config, base, folder, classes)
    layout = layout_of(base, config.task_type)
    shapes = {} if classes is None else head_shapes(base, layout, classes)
    # Tensors of the head that are not stored may be in the base's checkpoint.
    head_keys = [key for key in (PREFIX + name for name in shapes) if key in stored]
    expected = {**expected, **{key: shapes[key.removeprefix(PREFIX)] for key in head_keys}}
    _drop_base_weights(stored, base, scales)
    _check_shapes(expected, stored, folder)
    _check_finite(stored, folder)
    names = {linear: stored_name(linear, base, config) for linear in scales}
    weights = {
        linear: (stored[name + LORA[0]], stored[name + LORA[1]]) for linear, name in names.items()
    }
    flat, own = flatten(weights, pinned=base.device.type == "cuda")
    head: Head | None = None
    if classes is not None:
        # Copies: changes to the file would reach the mapped tensors.
        whole = {key.removeprefix(PREFIX): stored[key].float().clone() for key in head_keys}
        head = complete_head(base, layout, whole, classes, folder.name).to(base.device)
    magnitudes = {linear: stored[name + MAGNITUDE].float().clone()
                  for linear, name in names.items() if config.use_dora}  # fmt: skip
    return Adapter(name, config, own, dict(scales), card, folder, notes, head, flat, magnitudes)


# ── Files and card ──────────────────────────────────────────────────────────────────────────────


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        names = [path.name for path in folders_with(folder.parent, CONFIG)]
        raise AdapterError(
            where=str(folder),
            expected="an adapter folder",
            found="a file" if folder.exists() else "no such folder",
            hint=did_you_mean(folder.name, names) if names else
            f"Give the folder that holds {CONFIG}.",
        )  # fmt: skip
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not (folder / WEIGHTS).exists():
        raise AdapterUnsupported(
            where=folder.name,
            expected=WEIGHTS,
            found=f"{pickled[0]}, a pickle, which can run code when it is read",
            hint="If you trust it, load it in PEFT and save it again with safetensors.",
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterCorrupt(
                where=folder.name,
                expected=f"a file {name}",
                found=listed(sorted(p.name for p in folder.iterdir())) or "an empty folder",
                hint="Copy the whole adapter folder again.",
            )


def _check_base(card: Card, folder: Path, base: Base) -> None:
    if card.base.identity != base.identity:
        raise AdapterMismatch(
            where=folder.name,
            expected=f"an adapter made on {base.id} (identity {base.identity[:12]})",
            found=f"one made on {card.base.id} (identity {card.base.identity[:12]})",
            hint=f"Load the base it was made on: --base {card.base.id}.",
        )


def _notes(name: str, base: Base, card: Card | None, config: Any) -> tuple[str, ...]:
    if card is None or card.adapter.trained_elsewhere:
        named = Path(config.base_model_name_or_path or "").name
        differs = named and named != Path(base.id).name
        return (
            f"{name}: trained elsewhere, so it cannot be verified that it was made on {base.id}"
            + (f"; its config names {named}." if differs else "."),
        )
    trained, here = card.base, base.record()
    notes = []
    if (trained.quantization, trained.dtype) != (here["quantization"], here["dtype"]):
        notes.append(
            f"{name}: trained on the base at {trained.precision}; "
            "its verdict was not measured at this precision."
        )
    task = card.adapter.declared_task
    if card.adapter.chat and task and card.adapter.chat != template_of(base, task).record():
        notes.append(
            f"{name}: trained with another chat template than that of {base.id}; its verdict was "
            "not measured with this one."
        )
    return tuple(notes)


# ── Tensors ─────────────────────────────────────────────────────────────────────────────────────


def _tensors(folder: Path, pages: bytes | mmap) -> dict[str, Tensor]:
    """Every tensor of the weights file, as views of its pages."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass  # This checks the header, and that its tensors cover the file without gaps.
    except (SafetensorError, OSError) as error:
        raise AdapterCorrupt(
            where=f"{folder.name}/{WEIGHTS}",
            expected="a whole safetensors file",
            found=str(error).splitlines()[0],
            hint="Copy the file again; it may have been cut off.",
        ) from None
    return {
        name: _view(pages, entry, f"{folder.name}, {name}")
        for name, entry in read_header(folder / WEIGHTS).items()
    }  # fmt: skip


def _view(pages: bytes | mmap, entry: HeaderEntry, where: str) -> Tensor:
    if entry.info.dtype not in FLOATS:
        raise AdapterCorrupt(
            where=where,
            expected="finite numbers in " + " or ".join(FLOATS),
            found=entry.info.dtype,
            hint="Save it again from PEFT.",
        )
    dtype, shape = FLOATS[entry.info.dtype], entry.info.shape
    if entry.start == entry.stop:
        return torch.empty(shape, dtype=dtype)
    if entry.start % dtype.itemsize:  # the format allows unaligned tensors
        data = torch.frombuffer(pages, dtype=torch.uint8)[entry.start : entry.stop]
        return data.clone().view(dtype).view(shape)
    size = (entry.stop - entry.start) // dtype.itemsize
    return torch.frombuffer(pages, dtype=dtype, count=size, offset=entry.start).view(shape)


def _drop_base_weights(stored: dict[str, Tensor], base: Base, linears: Iterable[str]) -> None:
    """Drop copies of the base's own embeddings, which PEFT saves beside LoRA on an output layer.

    It also saves them when told to, or when it cannot see whether they were resized. A weight that
    differs stays in ``stored``, and is refused as unexpected.
    """
    if all(key.endswith(LORA) for key in stored):
        return
    layers = {f"{PREFIX}{linear}.base_layer.weight": linear for linear in linears}
    embeddings = [base.model.get_input_embeddings()]
    if base.language_head:
        embeddings.append(base.model.get_output_embeddings())
    for name, module in base.model.named_modules():
        if module in embeddings:
            layers[f"{PREFIX}{name}.weight"] = name
    for key, name in layers.items():
        if key in stored:
            module = base.model.get_submodule(name)
            with gathered(module):
                weight = module.weight
                same = stored[key].shape == weight.shape
                if same and torch.equal(stored[key].to(weight), weight):
                    del stored[key]


def _check_shapes(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], folder: Path
) -> None:
    stored = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    missing = sorted(expected.keys() - stored.keys())
    extra = sorted(stored.keys() - expected.keys())
    wrong = sorted(key for key in expected.keys() & stored.keys() if expected[key] != stored[key])
    if not (missing or extra or wrong):
        return
    if wrong:
        key = wrong[0]
        found = (
            f"{len(wrong)} of other shapes, such as {key} with {stored[key]}, not {expected[key]}"
        )
    elif missing:
        found = f"{len(missing)} missing, such as {missing[0]}"
    else:
        found = f"{len(extra)} unexpected, such as {extra[0]}"
    raise AdapterCorrupt(
        where=f"{folder.name}/{WEIGHTS}",
        expected=f"the {len(expected)} tensors that its config asks for on this base",
        found=found,
        hint="Copy the adapter again, or load the base it was made on.",
    )


def _classes(
    config: Any, stored: Mapping[str, Tensor], base: Base, card: Card | None, folder: Path
) -> int | None:
    """The classes of the stored head, None without one; raises if the card's labels differ."""
    where = f"{folder.name}/{WEIGHTS}"
    classes = None
    if config.task_type in ("SEQ_CLS", FEATURES):
        shapes = {key.removeprefix(PREFIX): tuple(t.shape) for key, t in stored.items()}
        classes = stored_classes(base, layout_of(base, config.task_type), shapes, where)
    try:
        task = card.adapter.declared_task if card else None
    except DomainError as error:
        raise AdapterUnsupported(
            where=f"{folder.name}/{CARD}",
            expected=error.expected,
            found=error.found,
            hint=error.hint,
        ) from error
    if task is not None and task.head_classes != classes:
        raise AdapterCorrupt(
            where=where,
            expected=f"a head of {task.head_classes} classes, like the card's labels" if task.head
            else "no head, like the card's task",
            found="none" if classes is None else f"one of {classes}",
            hint="Copy the adapter folder again.",
        )  # fmt: skip
    return classes


def _check_finite(stored: Mapping[str, Tensor], folder: Path) -> None:
    # One norm over everything is fast; it is infinite for enormous numbers too.
    if bool(get_total_norm(stored.values()).isfinite()):
        return
    bad = [key for key, tensor in stored.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise AdapterCorrupt(
            where=f"{folder.name}/{WEIGHTS}",
            expected="finite numbers",
            found=f"NaN or infinity in {bad[0]}",
            hint="Train it again with a lower learning rate, or load an earlier version.",
        )
