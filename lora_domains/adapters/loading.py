"""Reading an adapter folder strictly: everything is checked before anything is used.

A config is somebody's text and may be hostile; weights may be cut off, changed, or made for another
base. Each is refused by name, and nothing is allocated before it is known to fit.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, fields
from mmap import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn.utils import get_total_norm

from lora_domains.adapters.peft import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    fingerprint,
    lora_layers,
    mapped,
    skeleton,
)
from lora_domains.atomic import restored
from lora_domains.domain import check_name
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterMismatch,
    AdapterUnsupported,
    did_you_mean,
    listed,
)
from lora_domains.modeling.base import ROUTED, Base
from lora_domains.modeling.heads import complete, head_shapes, layout_of, stored_classes
from lora_domains.modeling.lora import Adapter, flatten
from lora_domains.report.card import CARD, Card

_PATTERN_SECONDS = 1.0

# The options of LoraConfig that are computed here, or that change nothing once an adapter exists.
# Any other option away from its default is refused by name, never ignored.
_TAKEN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
    "revision", "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "use_rslora", "fan_in_fan_out", "init_lora_weights", "megatron_core", "runtime_config",
    "qalora_group_size", "loftq_config", "eva_config",
}  # fmt: skip


# Options on which neither shapes nor scales depend.
_SAYS_NOTHING = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "lora_dropout",
    "auto_mapping", "runtime_config",
}  # fmt: skip
_MEANINGS = 32
Meaning = tuple[Mapping[str, tuple[int, ...]], Mapping[str, float]]


def load_adapter(path: str | Path, base: Base, name: str | None = None) -> Adapter:
    """Read an adapter folder, checking everything before anything is used.

    Takes folders saved here and by plain PEFT; the latter have no card, so that their base cannot
    be verified, which ``notes`` says. Raises AdapterMismatch, AdapterCorrupt, AdapterUnsupported
    or AdapterError.
    """
    folder = restored(Path(path).absolute())
    name = check_name(folder.resolve().name if name is None else name)
    _check_files(folder)
    raw = _read_json(folder / CONFIG)
    config = _config(raw, folder, base)
    card = Card.read(folder) if (folder / CARD).exists() else None
    pages = mapped(folder / WEIGHTS)
    if card is None:
        return _read(name, folder, base, config, None, pages)
    _check_base(card, folder, base)
    # Half of the time goes into the digest: it is made while another core reads the tensors.
    with ThreadPoolExecutor(1) as other:
        digest = other.submit(fingerprint, folder, pages)
        try:
            found = _read(name, folder, base, config, card, pages)
        finally:
            # A changed byte says more than what it led to.
            _check_digest(card, folder, digest.result())
    return found


def _read(
    name: str, folder: Path, base: Base, config: Any, card: Card | None,
    pages: bytes | mmap,
) -> Adapter:  # fmt: skip
    stored = _stored(folder, pages)
    classes = _classes(config, {k: tuple(t.shape) for k, t in stored.items()}, base, card, folder)
    expected, scales = _meaning(config, base, folder, classes)
    heads = (
        {} if classes is None else {PREFIX + n: s for n, s in head_shapes(base, classes).items()}
    )
    # What is missing of a head may stand in the base's checkpoint (see ``complete``).
    expected = {**expected, **{key: shape for key, shape in heads.items() if key in stored}}
    _drop_copies(stored, base, scales)
    _check_shapes(expected, stored, folder)
    _check_finite(stored, folder)
    weights = {
        linear: (stored[f"{PREFIX}{linear}.lora_A.weight"],
                 stored[f"{PREFIX}{linear}.lora_B.weight"])
        for linear in scales
    }  # fmt: skip
    flat, own = flatten(weights, pinned=base.device.type == "cuda")
    head = None
    if classes is not None:
        # Copies: what is mapped from the file belongs to whoever holds the adapter's folder.
        whole = {
            key.removeprefix(PREFIX): stored[key].float().clone() for key in heads if key in stored
        }
        head = complete(base, whole, classes, folder.name).to(base.device)
    notes = _notes(name, base, card)
    return Adapter(name, config, own, dict(scales), card, folder, notes, head, flat)


def _meaning(config: Any, base: Base, folder: Path, classes: int | None) -> Meaning:
    """What ``config`` means on ``base``: its tensors' shapes, and the scale of each linear.

    PEFT takes a tenth of a second to say so; its last answers are remembered with the base.
    """
    said = {key: value for key, value in config.to_dict().items() if key not in _SAYS_NOTHING}
    key = json.dumps([classes, said], sort_keys=True, default=sorted)
    meaning: Meaning | None = base.layouts.get(key)
    if meaning is None:
        _check_patterns(config, base, folder)
        of_head = {} if classes is None else head_shapes(base, classes)
        expected: dict[str, tuple[int, ...]] = {}
        scales: dict[str, float] = {}
        for linear, layer in lora_layers(skeleton(base, config, classes)):
            if f"{linear}.weight" in of_head:
                raise AdapterUnsupported(
                    where=f"{folder.name}/{CONFIG}",
                    expected="a head that is stored whole",
                    found=f"LoRA on {linear}, a layer of the head",
                    hint="Name it in PEFT's modules_to_save instead.",
                )
            for letter in "AB":
                tensor = getattr(layer, f"lora_{letter}")["default"].weight
                expected[f"{PREFIX}{linear}.lora_{letter}.weight"] = tuple(tensor.shape)
            scales[linear] = float(layer.scaling["default"])
        while len(base.layouts) >= _MEANINGS:
            base.layouts.pop(next(iter(tuple(base.layouts))), None)
        meaning = base.layouts[key] = (expected, scales)
    return meaning


def _check_files(folder: Path) -> None:
    where = folder.name
    if not folder.is_dir():
        raise AdapterError(
            where=str(folder),
            expected="an adapter folder",
            found="a file" if folder.exists() else "no such folder",
            hint=_nearby(folder),
        )
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not (folder / WEIGHTS).exists():
        raise AdapterUnsupported(
            where=where,
            expected=WEIGHTS,
            found=f"{pickled[0]}, a pickle, which can run code when it is read",
            hint="Load it in PEFT where you trust it and save it again with safetensors.",
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise AdapterCorrupt(
                where=where,
                expected=f"a file {name}",
                found=listed(sorted(p.name for p in folder.iterdir())) or "an empty folder",
                hint="Copy the whole adapter folder again.",
            )


def _nearby(folder: Path) -> str:
    names = _adapters_in(folder.parent)
    if names:
        return did_you_mean(folder.name, names)
    return "Give the folder that holds adapter_config.json."


def _adapters_in(out: Path) -> list[str]:
    """The adapters in a folder; names with a dot in front are unfinished or put aside."""
    if not out.is_dir():
        return []
    return [p.name for p in out.iterdir() if p.name[0] != "." and (p / CONFIG).exists()]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterCorrupt(
            where=f"{path.parent.name}/{path.name}",
            expected="JSON",
            found=f"{type(error).__name__}",
            hint="Copy the file again from where the adapter was made.",
        ) from None
    if not isinstance(value, dict):
        raise AdapterCorrupt(
            where=f"{path.parent.name}/{path.name}",
            expected="a JSON object",
            found=type(value).__name__,
            hint="Copy the file again from where the adapter was made.",
        )
    return value


def _config(raw: dict[str, Any], folder: Path, base: Base) -> Any:
    """A LoraConfig from the stored JSON; anything it would do beyond plain LoRA is refused.

    Beside LoRA a sequence classifier (SEQ_CLS) stores its head whole.
    """
    from peft import LoraConfig

    where = f"{folder.name}/{CONFIG}"
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise AdapterUnsupported(
            where=where,
            expected="peft_type LORA",
            found=repr(kind),
            hint="Only LoRA adapters are served here.",
        )
    known = {f.name: f for f in fields(LoraConfig)}
    headed = raw.get("task_type") == "SEQ_CLS"
    taken = _TAKEN | {"modules_to_save"} if headed else _TAKEN
    for key, value in raw.items():
        if key in taken or not value:
            continue
        field = known.get(key)
        default = None
        if field is not None:
            default = (
                field.default_factory() if field.default_factory is not MISSING else field.default
            )
        if value != default:
            raise AdapterUnsupported(
                where=where,
                expected="plain LoRA",
                found=f"{key}={str(value)[:60]!r}",
                hint="This option is not computed here; train without it, or use PEFT itself.",
            )
    if not headed and (base.bidirectional or raw.get("task_type") not in (None, "CAUSAL_LM")):
        raise AdapterUnsupported(
            where=where,
            expected="task_type SEQ_CLS" + ("" if base.bidirectional else " or CAUSAL_LM"),
            found=str(raw.get("task_type"))[:60],
            hint="Only adapters of causal language models, and sequence classifiers, are served.",
        )
    whole = raw.get("modules_to_save") or [] if headed else []
    # PEFT's own two are named in every classifier's config, whatever its head is called.
    if not isinstance(whole, list) or not set(map(str, whole)) <= {
        "classifier", "score", *layout_of(base).saved
    }:  # fmt: skip
        raise AdapterUnsupported(
            where=where,
            expected="no module stored whole but the head's: " + listed(layout_of(base).saved),
            found=f"modules_to_save={str(whole)[:60]!r}",
            hint="Train without it, or use PEFT itself.",
        )
    init = raw.get("init_lora_weights", True)
    if init not in (True, False, "gaussian", "orthogonal", "eva"):
        raise AdapterUnsupported(
            where=where,
            expected="an initialisation that leaves the base as it is",
            found=f"init_lora_weights={str(init)[:40]!r}, which changes the base's weights",
            hint="Save it with path_initial_model_for_weight_conversion, as PEFT documents.",
        )
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        ("r", _is_rank, "a whole number above 0"),
        ("lora_alpha", _is_alpha, "a number above 0"),
        ("lora_dropout", lambda v: type(v) in (int, float) and 0 <= v < 1, "0 up to 1"),
        ("use_rslora", lambda v: type(v) is bool, "true or false"),
        ("fan_in_fan_out", lambda v: type(v) is bool, "true or false"),
        ("target_modules", _is_targets, "names of modules"),
        ("exclude_modules", lambda v: v is None or _is_targets(v), "names of modules"),
        ("layers_to_transform", _is_layers, "numbers of layers"),
        ("layers_pattern", lambda v: v in (None, []) or _is_targets(v), "names of modules"),
        ("rank_pattern", lambda v: _is_pattern(v, _is_rank), "patterns with whole numbers"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_alpha), "patterns with numbers"),
    ]
    for key, holds, wanted in rules:
        if key in raw and not holds(raw[key]):
            raise AdapterCorrupt(
                where=where,
                expected=f"{key}: {wanted}",
                found=str(raw[key])[:60],
                hint="Copy the file again from where the adapter was made.",
            )
    chosen = {k: v for k, v in raw.items() if k in known and k in taken}
    # These name Python classes or hold nothing that matters here; a stored config must not.
    for key in (
        "auto_mapping", "runtime_config", "megatron_core", "loftq_config", "eva_config", "peft_type"
    ):  # fmt: skip
        chosen.pop(key, None)
    chosen["init_lora_weights"] = True
    for key in ("rank_pattern", "alpha_pattern"):
        chosen[key] = chosen.get(key) or {}
    try:
        return LoraConfig(**chosen)
    except (TypeError, ValueError) as error:
        raise AdapterCorrupt(
            where=where,
            expected="settings that go together",
            found=str(error).splitlines()[0],
            hint="Copy the file again from where the adapter was made.",
        ) from error


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


_TRY_PATTERNS = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for name in names:
        re.match(pattern, name)
"""


def _check_patterns(config: Any, base: Base, folder: Path) -> None:
    """Try the regular expressions of the config with a time limit before PEFT runs them without.

    ``re`` cannot be interrupted, and another engine is slow on other patterns: so they are tried
    with ``re`` itself, in a process that can be ended.
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
            [sys.executable, "-I", "-S", "-c", _TRY_PATTERNS],
            input=json.dumps([patterns, names]).encode(),
            capture_output=True,
            timeout=_PATTERN_SECONDS,
            check=True,
        )
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        slow = isinstance(error, subprocess.TimeoutExpired)
        raise AdapterUnsupported(
            where=f"{folder.name}/{CONFIG}",
            expected="patterns that match in a moment",
            found="one that takes too long" if slow else "one that is no regular expression",
            hint="List the target modules by name instead.",
        ) from None


def _check_base(card: Card, folder: Path, base: Base) -> None:
    made_on = card.base
    if made_on.identity != base.identity:
        raise AdapterMismatch(
            where=folder.name,
            expected=f"an adapter made on {base.id} (identity {base.identity[:12]})",
            found=f"one made on {made_on.id} (identity {made_on.identity[:12]})",
            hint=f"Load the base it was made on: --base {made_on.id}.",
        )


def _check_digest(card: Card, folder: Path, found: str) -> None:
    stored = str(card.adapter.sha256)
    if stored != found:
        raise AdapterCorrupt(
            where=folder.name,
            expected=f"files with the sha256 in the card ({stored[:12]})",
            found=f"sha256 {found[:12]}: a byte of {CONFIG} or {WEIGHTS} was changed",
            hint="Copy the adapter folder again; if you changed it on purpose, remove card.json.",
        )


def _notes(name: str, base: Base, card: Card | None) -> tuple[str, ...]:
    if card is None:
        unknown = f"{name}: no card.json, so it cannot be verified that it was made on {base.id}."
        return (unknown,)
    made_on, here = card.base, base.record()
    if (made_on.quantization, made_on.dtype) == (here["quantization"], here["dtype"]):
        return ()
    at = made_on.precision
    return (
        f"{name}: trained on the base at {at}; its verdict was not measured at this precision.",
    )


def _stored(folder: Path, pages: bytes | mmap) -> dict[str, Tensor]:
    """Every tensor of the weights file, as a view of its pages: nothing is copied here."""
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            pass  # Its header is whole, and what it names lies within the file, end to end.
    except (SafetensorError, OSError) as error:
        raise AdapterCorrupt(
            where=f"{folder.name}/{WEIGHTS}",
            expected="a whole safetensors file",
            found=str(error).splitlines()[0],
            hint="Copy the file again; it may have been cut off.",
        ) from None
    start = 8 + int.from_bytes(pages[:8], "little")
    header = json.loads(pages[8:start])
    header.pop("__metadata__", None)
    data = torch.frombuffer(pages, dtype=torch.uint8)[start:]
    return {key: _view(data, entry, f"{folder.name}, {key}") for key, entry in header.items()}


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _view(data: Tensor, entry: Mapping[str, Any], where: str) -> Tensor:
    if entry["dtype"] not in _FLOATS:
        raise AdapterCorrupt(
            where=where,
            expected="finite numbers in " + " or ".join(_FLOATS),
            found=str(entry["dtype"]),
            hint="Save it again from PEFT.",
        )
    begin, end = entry["data_offsets"]
    dtype, part = _FLOATS[entry["dtype"]], data[begin:end]
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()  # stored at an odd place, which is allowed
    return part.view(dtype).view(entry["shape"])


def _drop_copies(stored: dict[str, Tensor], base: Base, linears: Iterable[str]) -> None:
    """Forget the base's own weight, which PEFT saves beside LoRA on an output layer, if it is that.

    Any other weight stays in ``stored``, and is refused there as one that belongs nowhere.
    """
    for linear in linears:
        key = f"{PREFIX}{linear}.base_layer.weight"
        if key in stored:
            weight = base.model.get_submodule(linear).weight
            if stored[key].shape == weight.shape and torch.equal(stored[key].to(weight), weight):
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
            f"{len(wrong)} of other shapes, such as {key} with {stored[key]} for {expected[key]}"
        )
    elif missing:
        found = f"{len(missing)} missing, such as {missing[0]}"
    else:
        found = f"{len(extra)} that belong nowhere, such as {extra[0]}"
    raise AdapterCorrupt(
        where=f"{folder.name}/{WEIGHTS}",
        expected=f"the {len(expected)} tensors that its config means on this base",
        found=found,
        hint="Copy the adapter again, or load the base it was made on.",
    )


def _classes(
    config: Any,
    stored: Mapping[str, tuple[int, ...]],
    base: Base,
    card: Card | None,
    folder: Path,
) -> int | None:
    """How many classes the stored head has, None without one; as many as the card's labels."""
    headed = config.task_type == "SEQ_CLS"
    where = f"{folder.name}/{WEIGHTS}"
    plain = {key.removeprefix(PREFIX): shape for key, shape in stored.items()}
    classes = stored_classes(base, plain, where) if headed else None
    record = card.adapter.task if card else {}
    if not record:
        return classes
    wanted = len(record.get("labels") or ()) if record.get("head") else None
    if wanted != classes:
        raise AdapterCorrupt(
            where=where,
            expected=f"a head of {wanted} classes, as the card's labels" if wanted else
            "no head, as the card's task has none",
            found="none" if classes is None else f"one of {classes}",
            hint="Copy the adapter folder again.",
        )  # fmt: skip
    return classes


def _check_finite(stored: Mapping[str, Tensor], folder: Path) -> None:
    # One norm of everything is quick, and finite unless a number is not (or enormous).
    bad = []
    if not bool(get_total_norm(stored.values()).isfinite()):
        bad = [key for key, tensor in stored.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise AdapterCorrupt(
            where=f"{folder.name}/{WEIGHTS}",
            expected="finite numbers",
            found=f"NaN or infinity in {bad[0]}",
            hint="Train it again with a lower learning rate, or load an earlier version.",
        )


def find_adapter(path: str | Path, out: Path) -> Path:
    """``path`` itself, or the adapter of that name under ``out``; raises AdapterError otherwise."""
    for candidate in (Path(path), out / str(path)):
        if (restored(candidate) / CONFIG).exists():
            return candidate
    names = _adapters_in(out)
    raise AdapterError(
        where=str(path),
        expected="an adapter folder, or the name of one",
        found=f"none there, and {listed(sorted(names)) or 'none'} in {out}",
        hint=did_you_mean(str(path), names) if names else "Train one first: lora-domains fit.",
    )
