"""An adapter's config, read strictly: PEFT's options are untrusted input.

Options that would change what LoRA computes are refused by name, values of the wrong type or size
before anything is allocated, and regular expressions that do not finish before PEFT runs them.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NamedTuple

from lora_domains.adapters.folder import CONFIG
from lora_domains.adapters.peft import MAGNITUDE, WITHOUT_EFFECT, lora_layers, stored_name
from lora_domains.errors import AdapterCorrupt, AdapterUnsupported, listed
from lora_domains.modeling.base import ROUTED, Base
from lora_domains.modeling.heads import FEATURES, head_shapes, layout_of

SUPPORTED = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "fan_in_fan_out", "init_lora_weights", "megatron_core",
    "runtime_config", "qalora_group_size", "loftq_config", "eva_config",
}  # fmt: skip
"""Options of LoraConfig that are implemented here, or that have no effect on a trained adapter. Any
other option with a value other than its default is refused."""
IGNORED = {
    "auto_mapping", "runtime_config", "megatron_core", "loftq_config", "eva_config", "peft_type",
}  # fmt: skip
"""Options that are not passed on to PEFT: they name Python classes, or have no effect here."""
CACHED = 32
"""Configs whose targets are kept with a base."""
PATTERN_SECONDS = 1.0
"""The CPU time that all patterns of a config may take."""
WAITING_SECONDS = 60
"""The time that this may take on a machine with other work."""
TRY_PATTERNS = """
import json, re, signal, sys
patterns, names, seconds = json.load(sys.stdin)
if hasattr(signal, "setitimer"):
    signal.setitimer(signal.ITIMER_PROF, seconds)  # its signal ends the process
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""
COPY_AGAIN = "Copy the file again from where the adapter was made."


# ── Reading ─────────────────────────────────────────────────────────────────────────────────────


def read_config(folder: Path, base: Base) -> tuple[Any, list[str]]:
    """The LoraConfig stored in ``folder``, and keys that were ignored, as PEFT ignores them.

    Raises AdapterCorrupt for values that LoraConfig cannot have, and AdapterUnsupported for
    options beyond plain LoRA. A sequence classifier (SEQ_CLS) may also save its head whole.
    """
    from peft import LoraConfig

    raw = _read_json(folder / CONFIG)
    where = f"{folder.name}/{CONFIG}"
    headed = raw.get("task_type") == "SEQ_CLS" or (
        raw.get("task_type") == FEATURES and base.bidirectional
    )
    supported = SUPPORTED | {"modules_to_save"} if headed else SUPPORTED
    known = {field.name: field for field in fields(LoraConfig)}
    ignored = _check_method(raw, supported, known, where)
    _check_task(raw, headed, base, where)
    _check_values(raw, where)
    options = {k: v for k, v in raw.items() if k in known and k in supported - IGNORED}
    options["init_lora_weights"] = True
    for key in ("rank_pattern", "alpha_pattern"):
        options[key] = options.get(key) or {}
    try:
        return LoraConfig(**options), ignored
    except (TypeError, ValueError) as error:
        raise AdapterCorrupt(
            where=where,
            expected="settings that can be combined",
            found=str(error).splitlines()[0],
            hint=COPY_AGAIN,
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found, expected = type(value).__name__, "a JSON object"
    except (OSError, ValueError, RecursionError) as error:
        value, found, expected = None, type(error).__name__, "JSON"
    if not isinstance(value, dict):
        raise AdapterCorrupt(
            where=f"{path.parent.name}/{path.name}", expected=expected, found=found, hint=COPY_AGAIN
        )
    return value


def _check_method(
    raw: Mapping[str, Any], supported: set[str], known: Mapping[str, Any], where: str
) -> list[str]:
    """Refuse other methods than LoRA, and options that are not computed here.

    Returns the keys with a text or a number that PEFT's LoraConfig does not have: notes of another
    tool, or settings of a newer PEFT. Flags and structures may switch on a method, and are refused.
    """
    ignored = []
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterUnsupported(
            where=where,
            expected="peft_type LORA",
            found=repr(kind),
            hint="Only LoRA adapters are supported.",
        )
    for key, value in raw.items():
        if key in supported or not value:
            continue
        field, default = known.get(key), None
        if field is None and isinstance(value, str | int | float) and value is not True:
            ignored.append(key)
            continue
        if field is not None:
            default = (
                field.default_factory() if field.default_factory is not MISSING else field.default
            )
        if value != default:
            raise AdapterUnsupported(
                where=where,
                expected="plain LoRA",
                found=f"{key}={str(value)[:60]!r}",
                hint="This option is not supported; train without it, or use PEFT itself.",
            )
    init = raw.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterUnsupported(
            where=where,
            expected="an initialisation that does not change the base",
            found=f"init_lora_weights={str(init)[:40]!r}, which changes the base's weights",
            hint="Save it with path_initial_model_for_weight_conversion, as PEFT documents.",
        )
    return ignored


def _check_task(raw: Mapping[str, Any], headed: bool, base: Base, where: str) -> None:
    """Refuse other tasks than the base's, and saved modules other than a head."""
    if not headed and (base.bidirectional or raw.get("task_type") not in (None, "CAUSAL_LM")):
        raise AdapterUnsupported(
            where=where,
            expected="task_type SEQ_CLS" + ("" if base.bidirectional else " or CAUSAL_LM"),
            found=str(raw.get("task_type"))[:60],
            hint="Only causal language models and sequence classifiers are supported.",
        )
    layout = layout_of(base, str(raw.get("task_type")))
    whole = raw.get("modules_to_save") or [] if headed else []
    # PEFT names its own two in every classifier's config, whatever the head is called.
    if not isinstance(whole, list) or not set(map(str, whole)) <= {
        "classifier", "score", *layout.saved
    }:  # fmt: skip
        raise AdapterUnsupported(
            where=where,
            expected="no saved modules except the head's: " + listed(layout.saved),
            found=f"modules_to_save={str(whole)[:60]!r}",
            hint="Train without it, or use PEFT itself.",
        )


def _check_values(raw: Mapping[str, Any], where: str) -> None:
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("r", _is_rank, "an integer above 0"),
        ("lora_alpha", _is_alpha, "a number above 0"),
        ("lora_dropout", lambda v: type(v) in (int, float) and 0 <= v < 1, "from 0 to below 1"),
        ("use_rslora", lambda v: type(v) is bool, "true or false"),
        ("use_dora", lambda v: type(v) is bool, "true or false"),
        ("fan_in_fan_out", lambda v: type(v) is bool, "true or false"),
        ("target_modules", _is_targets, "names of modules"),
        ("exclude_modules", lambda v: v is None or _is_targets(v), "names of modules"),
        ("layers_to_transform", _is_layers, "numbers of layers"),
        ("layers_pattern", lambda v: v in (None, []) or _is_targets(v), "names of modules"),
        ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "patterns with integers"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_alpha), "patterns with numbers"),
    ]
    for key, holds, allowed in rules:
        if key in raw and not holds(raw[key]):
            raise AdapterCorrupt(
                where=where,
                expected=f"{key}: {allowed}",
                found=str(raw[key])[:60],
                hint=COPY_AGAIN,
            )


def _is_targets(value: Any) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= 1000
    return (
        isinstance(value, list)
        and 0 < len(value) <= 10_000
        and all(isinstance(v, str) for v in value)
    )


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 65536


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e6


def _is_layers(value: Any) -> bool:
    return value is None or all(
        type(v) is int for v in (value if isinstance(value, list) else [value])
    )


def _is_pattern(value: Any, is_number: Callable[[Any], bool]) -> bool:
    return value is None or (
        isinstance(value, dict) and all(len(k) <= 1000 and is_number(v) for k, v in value.items())
    )


# ── Targets ─────────────────────────────────────────────────────────────────────────────────────


class Targets(NamedTuple):
    """The LoRA weights that a config asks for on one base."""

    shapes: Mapping[str, tuple[int, ...]]
    """By the name of the tensor in the weights file."""
    scales: Mapping[str, float]
    """By linear."""


def targets_of(config: Any, base: Base, folder: Path, classes: int | None) -> Targets:
    """The weights that ``config`` asks for on ``base``; ``folder`` is named in errors.

    PEFT takes a tenth of a second to resolve them; the last results are cached in the base. Raises
    AdapterUnsupported for patterns that take too long and for targets that PEFT cannot resolve.
    """
    options = {k: v for k, v in config.to_dict().items() if k not in WITHOUT_EFFECT}
    key = json.dumps([classes, options], sort_keys=True, default=sorted)
    targets: Targets | None = base.targets.get(key)
    if targets is not None:
        return targets
    _check_patterns(config, base, folder)
    of_head = (
        {} if classes is None else head_shapes(base, layout_of(base, config.task_type), classes)
    )
    shapes: dict[str, tuple[int, ...]] = {}
    scales: dict[str, float] = {}
    for linear, layer in lora_layers(base, config, classes):
        if f"{linear}.weight" in of_head:
            raise AdapterUnsupported(
                where=f"{folder.name}/{CONFIG}",
                expected="a head that is saved whole",
                found=f"LoRA on {linear}, a layer of the head",
                hint="Name it in PEFT's modules_to_save instead.",
            )
        for letter in "AB":
            tensor = getattr(layer, f"lora_{letter}")["default"].weight
            shapes[f"{stored_name(linear, base, config)}.lora_{letter}.weight"] = tuple(
                tensor.shape
            )
        if config.use_dora:
            shapes[stored_name(linear, base, config) + MAGNITUDE] = (tensor.shape[0],)
        scales[linear] = float(layer.scaling["default"])
    while len(base.targets) >= CACHED:
        base.targets.pop(next(iter(tuple(base.targets))), None)
    targets = base.targets[key] = Targets(shapes, scales)
    return targets


def _check_patterns(config: Any, base: Base, folder: Path) -> None:
    """Try the config's regular expressions with a time limit; PEFT would run them without one.

    ``re`` cannot be interrupted, and other engines are slow on other patterns, so ``re`` itself
    runs in a process that can be killed. Its CPU time counts, not that of the machine's other work.
    """
    patterns = [rf"(.*\.)?({p})$" for p in {**config.rank_pattern, **config.alpha_pattern}]
    for option in (config.target_modules, config.exclude_modules):
        if isinstance(option, str) and option.lower() != "all-linear":
            patterns.append(rf"(?:{option})\Z")
    layers = config.layers_pattern or []
    for pattern in [layers] if isinstance(layers, str) else layers:
        patterns.append(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")
    if not patterns:
        return
    names = [name.replace(f".{ROUTED}", "") for name, _ in base.model.named_modules()]
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY_PATTERNS],
            input=json.dumps([patterns, names, PATTERN_SECONDS]).encode(),
            capture_output=True,
            timeout=WAITING_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        # A negative code is the signal that ended the process at its limit.
        slow = isinstance(error, subprocess.TimeoutExpired) or error.returncode < 0
        raise AdapterUnsupported(
            where=f"{folder.name}/{CONFIG}",
            expected=f"regular expressions that finish within {PATTERN_SECONDS:.0f} s",
            found="one that takes too long" if slow else "one that is invalid",
            hint="List the target modules by name instead.",
        ) from None
