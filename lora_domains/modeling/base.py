"""The base: a frozen pretrained model, causal or an encoder.

Two hashes protect it. Its *identity* covers the stored checkpoint and tokenizer, whatever the
revision, the precision or the random heads of the loaded model; adapters record it. Its *state
digest* covers the tensors in memory, and shows that nothing changed them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_domains.distributed import device_of
from lora_domains.embedded import BASE_PATH
from lora_domains.errors import BaseModelError, listed
from lora_domains.modeling.base_check import (
    UNREADABLE,
    answer_ends,
    check_architecture,
    check_behaviour,
    check_placement,
    check_side_files,
    context_of,
    experts_of,
    fit_special_tokens,
    is_bidirectional,
    load_tokenizer,
    neutral_generation,
    without_remote_code,
)
from lora_domains.modeling.checkpoint import (
    Checkpoint,
    TensorInfo,
    digest_of,
    find_checkpoint,
    identity,
    licence_of,
    pooling_of,
)
from lora_domains.modeling.quantization import (
    Quantization,
    check_quantization,
    dtype_of,
    estimated_bytes,
    import_peft_alone,
    mapped_dtype,
    prepare_linears,
    quantization_config,
    scales_of,
    stored_quantization,
)
from lora_domains.placement import (
    DeviceMap,
    Placement,
    check_mapped,
    each_gathered,
    one_call_at_a_time,
    resident,
    shard,
)
from lora_domains.tokenization.chat_template import ChatTemplate

ROUTED = "routed_base"
"""What ``RoutedLinear`` calls the linear it wraps; adapters are no modules of the model."""


@dataclass
class Base:
    """A frozen model with its tokenizer, and the checkpoint that both were loaded from."""

    model: Any
    tokenizer: Any
    id: str
    revision: str | None
    identity: str
    quantization: Quantization | None
    licence: str | None
    checkpoint: Checkpoint
    """What it was loaded from; it may hold tensors that the model has no place for."""
    generation_config: Any = None
    """The stored one; that of the model is neutral, see ``neutral_generation``."""
    pooling: str = "first"
    """How its folder pools a text's tokens: the "first", or the "mean" of a sentence encoder."""
    notes: tuple[str, ...] = ()
    """Warnings about adapters on it."""
    targets: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The LoRA weights that recent configs ask for on it, cached by ``adapters.config``."""
    start: int | None = field(default=None, repr=False, compare=False)
    """The token with which a text begins, cached by ``likelihoods.start_of_text``."""

    @property
    def bidirectional(self) -> bool:
        """Whether it is an encoder such as BERT: it attends both ways and generates no text."""
        return is_bidirectional(self.model.config)

    @property
    def language_head(self) -> bool:
        """Whether it predicts tokens: the next one, or masked ones (an encoder)."""
        untrained = any(isinstance(child, NoMaskedHead) for child in self.model.children())
        return not self.bidirectional or not (untrained or self.tokenizer.mask_token_id is None)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """Its chat template, or a plain one where it has none."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def chats(self) -> bool:
        """Whether it was trained on chats: it has a template, and its answers end as turns do."""
        if self.bidirectional or not self.chat_template.own:
            return False
        ends = answer_ends(self.tokenizer, self.generation_config, self.model.config)
        return self.chat_template.asked(thinking=False).stop in ends

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
    def vocabulary(self) -> int:
        """Size of the vocabulary: the width of its logits."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def pad(self) -> int:
        """The id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    @property
    def context(self) -> int:
        """The longest input, in tokens."""
        return context_of(self.model.config)

    def state_digest(self) -> str:
        """sha256 over name, dtype, shape and bytes of every tensor of the base in memory.

        Adapters around its linears are left out, so it is the same before and after loading them.
        """
        return digest_of(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The name of every tensor of the base in memory, and a copy on the CPU."""
        tensors = sorted(_base_tensors(self.model), key=lambda found: found[0])
        modules = each_gathered(module for _, module, _ in tensors)
        for module, (name, _, own) in zip(modules, tensors, strict=True):
            tensor = own if isinstance(own, Tensor) else getattr(module, own)
            # A copy: what lies in NumPy's hands can no longer be given up.
            yield name, tensor.detach().to("cpu", copy=True)

    def resident_bytes(self) -> int:
        """The memory that the base takes in this process, scales of quantised weights included.

        Tensors that share a storage (tied embeddings) are counted once.
        """
        held = (own if isinstance(own, Tensor) else resident(getattr(module, own))
                for _, module, own in _base_tensors(self.model))  # fmt: skip
        storages = (tensor.untyped_storage() for tensor in held if not tensor.is_meta)
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def stored_tensor(self, name: str) -> Tensor | None:
        """The tensor ``name`` of the checkpoint in float32, None when it holds none.

        ``name`` is that of an architecture with a head; a checkpoint of the bare encoder leaves out
        the prefix (``pooler.dense.weight`` for ``bert.pooler.dense.weight``).
        """
        for key in (name, name.removeprefix(f"{self.model.base_model_prefix}.")):
            if key in self.checkpoint.tensors:
                return self.checkpoint.tensor(key).float()
        return None

    def record(self) -> dict[str, Any]:
        """The ``base`` entry of a card."""
        return {
            "id": self.id,
            "revision": self.revision,
            "identity": self.identity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quantization": self.quantization,
            "licence": self.licence,
        }


class NoMaskedHead(nn.Module):
    """Stands in for a masked-token head that the checkpoint does not hold."""

    def forward(self, *_: Any, **__: Any) -> Tensor:
        raise BaseModelError(
            where="this encoder",
            expected="a trained masked-token head",
            found="none in its checkpoint",
            hint="Use it with trained heads only: Classification(head=True).",
        )


def load_base(
    path_or_id: str | Path | None = None, *, revision: str | None = None,
    dtype: str | torch.dtype | None = None, quantization: Quantization | None = None,
    device: str | torch.device | None = None, device_map: DeviceMap | None = None,
    sharded: bool = False,
    announce: Callable[[int, torch.device], object] = lambda _bytes, _device: None,
) -> Base:  # fmt: skip
    """Load a base frozen and in evaluation mode; without a path or id, the embedded one.

    ``dtype`` defaults to float32 on a CPU and bfloat16 on an accelerator. ``announce`` is called
    with the bytes that the base will take and its device, before it is loaded. ``device_map``
    spreads it over a device, memory and disk; ``sharded`` shares its weights out to the processes,
    all of which must call this. An encoder is loaded with its masked-token head where the
    checkpoint holds one; asking for the logits of a head that it does not hold raises
    BaseModelError.

    Raises BaseModelError for what is no whole model with a tokenizer, or cannot be reached.
    """
    where = str(path_or_id or "the embedded base")
    check_quantization(quantization)
    target = device_of(device)
    place = Placement(target, dtype_of(dtype, target), device_map, sharded)
    checkpoint = find_checkpoint(str(path_or_id or BASE_PATH), revision, where)
    check_side_files(checkpoint.folder, where)
    config, tensors = _described(checkpoint, where)
    check_architecture(config, where)
    encoder = is_bidirectional(config)
    stored = stored_quantization(config, tensors, quantization, where)
    check_placement(place, quantization or stored, where)
    if device_map is None:
        needed = estimated_bytes(tensors, place.dtype, None if stored else quantization)
        announce(needed // place.shares, target)
    tokenizer = load_tokenizer(checkpoint, where, encoder)
    model = _placed(checkpoint, where, encoder, quantization, stored, place)
    quantization = quantization or stored
    fit_special_tokens(model, tokenizer, where)
    own_identity = identity(checkpoint, tokenizer)  # of the tokenizer as it is stored
    stored_generation = getattr(model, "generation_config", None)
    other_end = None if encoder else neutral_generation(model, tokenizer)
    check_behaviour(model, tokenizer.pad_token_id, quantization, where)
    return Base(
        model=model,
        tokenizer=tokenizer,
        id="embedded" if path_or_id is None else _public_name(path_or_id),
        revision=revision or getattr(model.config, "_commit_hash", None),
        identity=own_identity,
        quantization=quantization,
        licence=licence_of(checkpoint.folder),
        checkpoint=checkpoint,
        generation_config=stored_generation,
        pooling=pooling_of(checkpoint.folder) if encoder else "first",
        notes=(*_notes(model), *filter(None, [other_end])),
    )


def _placed(
    checkpoint: Checkpoint, where: str, encoder: bool, quantization: Quantization | None,
    stored: Quantization | None, place: Placement,
) -> Any:  # fmt: skip
    """The frozen model, in its place."""
    loaded_in = mapped_dtype(checkpoint.tensors, place.dtype) if place.sharded else place.dtype
    model = _load(checkpoint, where, encoder, _options(loaded_in, quantization, stored, place))
    model.requires_grad_(False).eval()
    if quantization or stored:
        prepare_linears(model, place.dtype, place.device)
    elif place.sharded:
        shard(model, None if loaded_in == place.dtype else place.dtype, place.device, where)
    elif place.device_map is not None:
        check_mapped(model, where)
        one_call_at_a_time(model)
    else:
        model.to(place.device)
    return model


def _options(
    dtype: torch.dtype, quantization: Quantization | None, stored: Quantization | None,
    place: Placement,
) -> dict[str, Any]:  # fmt: skip
    """The options of ``from_pretrained``."""
    options: dict[str, Any] = {"dtype": dtype, **place.map_options()}
    if quantization or stored:
        options["device_map"] = {"": place.device}
    else:
        import_peft_alone()
    if quantization and not stored:
        options["quantization_config"] = quantization_config(quantization, dtype)
    return options


def _notes(model: nn.Module) -> Iterator[str]:
    if experts := experts_of(model):
        yield (
            f"the experts of this base ({listed(experts, 1)}) are not linear layers; adapters "
            "train its attention."
        )


def _described(checkpoint: Checkpoint, where: str) -> tuple[Any, Mapping[str, TensorInfo]]:
    """Config and tensors of a checkpoint; no weights are read."""
    try:
        return checkpoint.config(), checkpoint.tensors
    except UNREADABLE as error:
        raise BaseModelError(
            where=where,
            expected="a base that transformers knows",
            found=without_remote_code(error),
            hint="Update transformers if the base is newer than it is; otherwise copy the files "
            "again or choose another base.",
        ) from error


def _load(checkpoint: Checkpoint, where: str, bidirectional: bool, options: dict[str, Any]) -> Any:
    """The model; raises BaseModelError when a part cannot be read or is missing.

    An unquantised model is still on the CPU.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    architecture = AutoModelForMaskedLM if bidirectional else AutoModelForCausalLM
    try:
        with _quiet_report(bidirectional):
            model, missing = checkpoint.load(architecture, **options)
    except UNREADABLE as error:
        raise BaseModelError(
            where=where,
            expected="weights that transformers can load",
            found=without_remote_code(error),
            hint="Check the folder or id; copy the files again if they were cut off.",
        ) from error
    if bidirectional:
        missing = _without_random_head(model, missing)
    if missing:
        raise BaseModelError(
            where=where,
            expected="weights for the whole model",
            found=f"none for {listed(sorted(missing), 3)}",
            hint="Save the whole model: model.save_pretrained(folder). Random weights are no base.",
        )
    return model


@contextmanager
def _quiet_report(bidirectional: bool) -> Iterator[None]:
    """For an encoder, hide transformers' report of unused and of randomly initialised heads.

    Unused tensors can be read from ``Base.checkpoint``, and a random head is dropped.
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
    """The missing keys of the encoder itself; a masked-token head that lacks some is removed.

    A randomly initialised head would give meaningless predictions.
    """
    inside = f"{model.base_model_prefix}."
    for key in missing:
        if not key.startswith(inside):
            setattr(model, key.split(".")[0], NoMaskedHead())
    return sorted(key for key in missing if key.startswith(inside))


def _public_name(path_or_id: str | Path) -> str:
    """A Hub id unchanged; of a folder only its name, since a card holds no local paths."""
    return Path(path_or_id).resolve().name if Path(path_or_id).exists() else str(path_or_id)


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | Tensor]]:
    """(name, module, attribute) of every tensor of the base; for scales the tensors themselves."""
    for source in (model.named_parameters(), model.named_buffers()):
        for name, _ in source:
            parent, _, own = name.rpartition(".")
            clean = ".".join(part for part in name.split(".") if part != ROUTED)
            yield clean, model.get_submodule(parent), own
    for name, module in model.named_modules():
        if ROUTED in module._modules:
            continue  # a wrapper; the linear inside is visited by itself
        clean = ".".join(part for part in name.split(".") if part != ROUTED)
        yield from ((f"{clean}.{key}", module, tensor) for key, tensor in scales_of(module))
