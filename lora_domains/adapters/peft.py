"""PEFT on a skeleton: it creates and writes adapters without touching the base.

PEFT resolves targets, initialises weights and names tensors. It is given the base's architecture on
the meta device, without weights.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lora_domains.adapters.folder import WEIGHTS, fingerprint, replacing, write_card
from lora_domains.domain import Lora
from lora_domains.errors import AdapterUnsupported, DomainError, did_you_mean, listed
from lora_domains.modeling.base import ROUTED, Base
from lora_domains.modeling.base_check import experts_of, layers_of
from lora_domains.modeling.heads import (
    FEATURES,
    Layout,
    head_shapes,
    layout_of,
    new_head,
    own_layout,
)
from lora_domains.modeling.lora import Adapter
from lora_domains.modeling.quantization import row_lengths
from lora_domains.report.card import Card

PREFIX = "base_model.model."
EXPERT_NAMES = {"gate", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "w1", "w2", "w3"}
"""Names that PEFT translates to weights of experts."""
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Kinds on whose ``out_proj`` PEFT refuses LoRA."""
MAGNITUDE = ".lora_magnitude_vector"
"""How the name of DoRA's tensor of a linear ends."""
WHOLE = ".modules_to_save.default."
"""Part of PEFT's names for the tensors of modules that it saves whole."""
WITHOUT_EFFECT = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
    "auto_mapping", "runtime_config",
}  # fmt: skip
"""Options of a config on which neither shapes nor scales depend."""
KEPT = 8
_kept: dict[str, Any] = {}
"""The last few skeletons, by all that they depend on; they hold no weights."""


@contextmanager
def skeleton(base: Base, config: Any, classes: int | None = None) -> Iterator[Any]:
    """A ``PeftModel`` of the base's architecture on the meta device, with ``config`` applied.

    With ``classes`` it is the architecture's sequence classifier, for an adapter with a head.
    PEFT takes a tenth of a second to build it, so it is kept for the next equal config. Raises
    AdapterUnsupported when no linear of the base matches, or with PEFT's own reason.
    """
    plain = deepcopy(base.model.config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    key = _key(base, plain, config, classes)
    model = _kept.pop(key, None)  # no other thread has it meanwhile
    if model is None:
        model = _built(base, plain, config, classes)
        model.peft_config["default"] = deepcopy(config)
    else:
        # PEFT has set auto_mapping, by the architecture.
        own = {n: v for n, v in vars(config).items() if n in WITHOUT_EFFECT - {"auto_mapping"}}
        vars(config).update(deepcopy(vars(model.peft_config["default"])) | own)
        config.base_model_name_or_path = plain.name_or_path
    yield model
    while len(_kept) >= KEPT:
        _kept.pop(next(iter(tuple(_kept))), None)
    _kept[key] = model


def _key(base: Base, plain: Any, config: Any, classes: int | None) -> str:
    """All that a skeleton depends on."""
    options = {
        k: sorted(v) if isinstance(v, set) else v
        for k, v in config.to_dict().items() if k not in WITHOUT_EFFECT
    }  # fmt: skip
    layout = None if classes is None else layout_of(base, config.task_type)
    architecture = type(plain), plain.to_dict(), plain.name_or_path
    return repr((architecture, classes, layout, options))


def _built(base: Base, plain: Any, config: Any, classes: int | None) -> Any:
    from peft import get_peft_model
    from transformers import AutoModel, AutoModelForCausalLM

    with torch.device("meta"):
        if config.task_type == FEATURES:
            bare = AutoModel.from_config(plain)
        elif classes is None:
            bare = AutoModelForCausalLM.from_config(plain)
        else:
            bare = _classifier(base, plain, classes)
    try:
        with warnings.catch_warnings(), _plain_linears():
            warnings.simplefilter("ignore")
            return get_peft_model(bare, config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, re.error) as error:  # TypeError: a layer that is saved whole
        linears = sorted({n.rsplit(".", 1)[-1] for n, m in bare.named_modules() if _linear(m)})
        targets = config.target_modules
        unknown = (
            [t for t in targets if t.rsplit(".", 1)[-1] not in linears]
            if not isinstance(targets, str)
            else [targets]
        )
        raise AdapterUnsupported(
            where=base.id,
            expected="target modules that are linears of this base",
            found=listed(map(repr, unknown)) or str(error).splitlines()[0],
            hint=did_you_mean(str(unknown[0]) if unknown else "", linears),
        ) from error


@contextmanager
def _plain_linears() -> Iterator[None]:
    """Keep PEFT from importing bitsandbytes: a skeleton has plain linears only."""
    peft_model = "peft.tuners.lora.model"
    with (
        patch(f"{peft_model}.is_bnb_available", return_value=False),
        patch(f"{peft_model}.is_bnb_4bit_available", return_value=False),
    ):
        yield


def _classifier(base: Base, config: Any, classes: int) -> Any:
    """The architecture's sequence classifier; its head must be the one in ``modeling.heads``."""
    from transformers import AutoModelForSequenceClassification

    config.num_labels = classes
    try:
        model = AutoModelForSequenceClassification.from_config(config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    except ValueError:  # transformers has none for this architecture
        shapes = {}
    head = head_shapes(base, layout_of(base), classes)
    if not head.items() <= shapes.items():
        raise AdapterUnsupported(
            where=base.id,
            expected=f"an architecture with a classification head of {listed(head)}",
            found=f"{config.model_type}, which has another or none",
            hint="Train without a head: the labels are then scored as text.",
        )
    return model


def _linear(module: torch.nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, torch.nn.Linear | Conv1D)


def stored_name(linear: str, base: Base, config: Any) -> str:
    """What PEFT's files call ``linear``; beside a bare encoder its prefix is left out."""
    inner = f"{base.model.base_model_prefix}." if config.task_type == FEATURES else ""
    return PREFIX + linear.removeprefix(inner)


def lora_layers(base: Base, config: Any, classes: int | None) -> Iterator[tuple[str, Any]]:
    """(name in the base, PEFT's LoRA layer) of each linear the config targets."""
    from peft.tuners.lora import LoraLayer

    inner = f"{base.model.base_model_prefix}." if config.task_type == FEATURES else ""
    with skeleton(base, config, classes) as model:
        for name, module in model.named_modules():
            if not isinstance(module, LoraLayer):
                continue
            layer = module.get_base_layer()
            if not _linear(layer):
                raise AdapterUnsupported(
                    where=name.removeprefix(PREFIX),
                    expected="LoRA on linear layers",
                    found=f"LoRA on a layer of kind {type(layer).__name__}",
                    hint="Leave it out of target_modules.",
                )
            yield inner + name.removeprefix(PREFIX), module


def new_adapter(
    base: Base, name: str, lora: Lora, rank: int, alpha: int, seed: int, classes: int | None = None
) -> Adapter:
    """A new adapter as PEFT initialises it (A Kaiming-uniform, B zero), drawn from ``seed``.

    With ``classes`` it has a head with that many classes. Raises DomainError for ``top_layers``
    that the base does not have.
    """
    from peft import LoraConfig, TaskType

    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if targets == "all-linear" and experts_of(base.model):
        targets = _beside_experts(base)
    layout = own_layout(base)
    excluded = _excluded(base, targets, layout)
    layers: dict[str, Any] = {}
    if lora.top_layers is not None:
        targets, layers = _in_top_layers(base, lora.top_layers, targets)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if classes is None else TaskType(layout.task),
        modules_to_save=(list(layout.saved) or None) if classes is not None else None,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        exclude_modules=excluded,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        base_model_name_or_path=base.id,
        revision=base.revision,
        **layers,
    )
    weights, scales = {}, {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for linear, layer in lora_layers(base, config, classes):
            parts = layer.lora_A["default"], layer.lora_B["default"]
            for part in parts:
                part.to_empty(device="cpu")
            layer.reset_lora_parameters("default", init_lora_weights=True)
            a, b = (part.weight.detach().float() for part in parts)
            weights[linear] = a, b
            for part in parts:
                part.to_empty(device="meta")
            scales[linear] = float(layer.scaling["default"])
        head = None if classes is None else new_head(base, layout, classes)
    # B is zero: the rows are as long as the base's.
    linears = {name: base.model.get_submodule(name) for name in weights if lora.dora}
    magnitudes = {
        name: row_lengths(getattr(linear, ROUTED, linear)).cpu() for name, linear in linears.items()
    }
    return Adapter(name, config, weights, scales, head=head, magnitudes=magnitudes)


def _in_top_layers(
    base: Base, count: int, targets: str | list[str]
) -> tuple[list[str], dict[str, Any]]:
    """The names of linears and the options by which PEFT adapts the last ``count`` layers alone.

    It takes no regular expression, nor "all-linear", together with numbers of layers.
    """
    path, layers = layers_of(base.model)
    if count > len(layers):
        expected, found = f"at most {len(layers)}, the layers of {base.id}", str(count)
        hint = "Set a smaller one, or leave it out."
    elif isinstance(targets, str) and targets != "all-linear":
        expected, found = "names of linears as lora.targets beside it", repr(targets)
        hint = "Leave it out: a regular expression can name the layers itself."
    else:
        if isinstance(targets, str):
            linears = (n for layer in layers[-count:] for n, m in layer.named_modules()
                       if hasattr(m, "in_features") or _linear(m))  # fmt: skip
            targets = sorted({name.removesuffix(f".{ROUTED}").rsplit(".", 1)[-1]
                              for name in linears})  # fmt: skip
        numbers = list(range(len(layers) - count, len(layers)))
        options = {"layers_to_transform": numbers, "layers_pattern": path.rsplit(".", 1)[-1]}
        return targets, options
    raise DomainError(where="setting 'top_layers'", expected=expected, found=found, hint=hint)


def adapted_layers(config: Any) -> int | None:
    """The number of layers that ``config`` restricts LoRA to; None for all."""
    numbers = config.layers_to_transform
    return None if numbers is None else 1 if isinstance(numbers, int) else len(numbers)


def _beside_experts(base: Base) -> list[str]:
    """The linears of a mixture-of-experts base, without its experts, their router and shared ones.

    PEFT takes their names for those of the experts, which were linears in older models.
    """
    names = set()
    for name, module in base.model.named_modules():
        # Routers are subclasses of a linear that return something else.
        plain = type(module).__module__.split(".")[0] in ("torch", "bitsandbytes")
        if plain and isinstance(module, torch.nn.Linear):
            names.add(name.removesuffix(f".{ROUTED}").rsplit(".", 1)[-1])
    return sorted(names - EXPERT_NAMES - {"lm_head"})


def _excluded(base: Base, targets: str | list[str], layout: Layout) -> list[str] | str | None:
    """What targets leave out: a list of names, or a regular expression.

    A bare encoder has a pooler that heads beside it do not read. "all-linear" also leaves out
    linears whose weights Mamba's kernels read past any adapter, and those of a base's image or
    sound part, which texts never pass.
    """
    if layout.task == FEATURES:
        return _poolers(base) or None
    if targets != "all-linear":
        return None
    parts = _parts_beside_the_text(base)
    if parts:
        return rf"({'|'.join(map(re.escape, parts))})\..*"
    present = {name.rsplit(".", 1)[-1] for name, _ in base.model.named_modules()}
    excluded = {"dt_proj"} & present
    if base.model.config.model_type in MAMBA:
        excluded |= {"out_proj"} & present
    return sorted(excluded) or None


def _poolers(base: Base) -> list[str]:
    """The linears of the bare encoder that the base's model does not have."""
    from transformers import AutoModel

    plain = deepcopy(base.model.config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        bare = AutoModel.from_config(plain)
    known = {name for name, _ in base.model.base_model.named_modules()}
    return [name for name, part in bare.named_modules() if _linear(part) and name not in known]


def _parts_beside_the_text(base: Base) -> list[str]:
    """The modules of a multimodal base that hold linears and are not in its text model."""
    model, config = base.model, base.model.config
    if config.get_text_config() is config:
        return []
    text = next(name for name, module in model.named_modules() if module is model.get_decoder())
    linears = [name for name, module in model.named_modules() if _linear(module)]
    outside = [name for name in linears if not name.startswith(f"{text}.")]
    return sorted({".".join(name.split(".")[:2]) for name in outside if "." in name})


def save_adapter(
    folder: Path,
    adapter: Adapter,
    base: Base,
    card: Callable[[str], Card],
    readme: Callable[[Card], str],
) -> None:
    """Write the adapter's folder in one step, without items.

    ``card`` is called with the sha256 of PEFT's two files. Raises AdapterError when the folder
    cannot be written (no space, no permission); the folder before it is kept then.
    """
    with replacing(folder) as fresh:
        _write_peft_files(fresh, adapter, base)
        write_card(fresh, card(fingerprint(fresh)), readme, [])


def _write_peft_files(folder: Path, adapter: Adapter, base: Base) -> None:
    head, applied = adapter.head, deepcopy(adapter.config)
    with skeleton(base, applied, head.classes if head else None) as model:
        config = model.peft_config["default"] = deepcopy(applied)
        config.base_model_name_or_path = base.id
        # Sets are written in hash order, which differs between processes; the bytes must not.
        for option in ("target_modules", "exclude_modules"):
            if isinstance(getattr(config, option), set):
                setattr(config, option, sorted(getattr(config, option)))
        state = _stored(adapter, base)
        if head and head.layout.saved:
            # PEFT adds its own names to the config each time, and "all-linear" includes the head.
            config.modules_to_save = list(head.layout.saved)
            if not isinstance(config.target_modules, str):
                whole = {name.rpartition(".")[0] for name in head.weights}
                config.target_modules = [t for t in config.target_modules if t not in whole]
            for name, _ in model.named_parameters():
                if WHOLE in name:
                    state[name] = head.weights[_plain_name(name)].detach().cpu().contiguous()
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        model.peft_config["default"] = applied
    if head and not head.layout.saved:
        _add_tensors(folder / WEIGHTS, {PREFIX + n: t for n, t in head.weights.items()})


def _stored(adapter: Adapter, base: Base) -> dict[str, torch.Tensor]:
    """The tensors of LoRA by PEFT's names in a model."""
    state = {}
    for linear, (a, b) in adapter.weights.items():
        name = stored_name(linear, base, adapter.config)
        state[f"{name}.lora_A.default.weight"] = a.contiguous()
        state[f"{name}.lora_B.default.weight"] = b.contiguous()
        if linear in adapter.magnitudes:
            magnitude = adapter.magnitudes[linear].contiguous()
            state[f"{name}.lora_magnitude_vector.default.weight"] = magnitude
    return state


def _add_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add a head to the weights of PEFT, which reads past tensors that it does not know."""
    from safetensors.torch import load_file, save_file

    added = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(load_file(path) | added, path, metadata={"format": "pt"})


def _plain_name(name: str) -> str:
    """``base_model.model.bert.pooler.modules_to_save.default.dense.bias``: ``bert.pooler…``."""
    return name.removeprefix(PREFIX).replace(WHOLE, ".")
