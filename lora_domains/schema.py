"""Values from outside: parsed JSON checked against a JSON schema, text read as a type, what a
Python file declares, the flags that give settings, and the names that other tools have for them.

Only the keywords of JSON Schema that the package's schemas use are known. An adapter loads in a few
milliseconds: jsonschema takes at least five times as long for a card as this does, and
fastjsonschema a third of a second in each process to compile the schema.
"""

import importlib.util
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

from lora_domains.errors import DomainError, LoraDomainsError

T = TypeVar("T")

TYPES: Mapping[str, set[type]] = {
    "object": {dict}, "array": {list}, "string": {str}, "boolean": {bool}, "integer": {int},
    "number": {int, float}, "null": {type(None)},
}  # fmt: skip
"""The types of a parsed value that each type of JSON Schema stands for."""
RANGES = {
    "minimum": operator.ge, "maximum": operator.le,
    "exclusiveMinimum": operator.gt, "exclusiveMaximum": operator.lt,
}  # fmt: skip

SETTINGS = {
    "epochs": "training.epochs", "max_steps": "training.max_steps", "lr": "training.lr",
    "retention": "training.retention",
    "max_length": "training.max_length", "seed": "training.seed", "balance": "training.balance",
    "gradient_checkpointing": "training.gradient_checkpointing", "rank": "lora.rank",
    "text": "task.text", "label": "task.label", "positive": "task.positive", "head": "task.head",
    "target_recall": "task.target_recall", "target_precision": "task.target_precision",
    "chat": "task.chat", "instruction": "task.instruction", "generate": "task.generate",
    "separator": "task.separator", "decimal": "task.decimal",
    "tune_thresholds": "task.tune_thresholds",
}  # fmt: skip
"""The settings of a domain's parts that have flags of their own, by flag."""
OTHER_FLAGS = {
    **{f"data.{name}": name for name in (
        "train", "validation", "test", "general", "group", "limit", "drop_leaks", "drop_empty",
        "drop_long", "merge_labels", "delimiter", "encoding")},
    "data.seed": "seed", "data.slices": "slice", "gates.floors": "floor", "metric": "metric",
    "base": "base", "prevalence": "prevalence", "show_text": "show_text",
    "quantization": "load_in_8bit",
}  # fmt: skip
"""The flags of other settings of a run, by setting."""


def flag_of(setting: str) -> str:
    """The flag that gives a setting: ``--epochs`` of training.epochs, ``--set lora.alpha``."""
    flags = {name: flag for flag, name in SETTINGS.items()} | OTHER_FLAGS
    if setting not in flags:
        return f"--set {setting}"
    return "--" + flags[setting].replace("_", "-")


class Fault(NamedTuple):
    """The first place where a value breaks its schema."""

    path: str
    """``.key`` and ``[number]`` from the root down to the value."""
    expected: str
    found: str

    @property
    def key(self) -> str:
        return self.path.removeprefix(".")


Checker = Callable[[Any], Fault | None]
"""Gives the first fault of a value; None where it keeps its schema."""


def checker(schema: Mapping[str, Any]) -> Checker:
    """The check of values against ``schema``.

    NaN and infinity, which JSON lacks, are faults anywhere.
    """
    shared: dict[str, Checker] = {}
    for name, rule in schema.get("$defs", {}).items():
        shared[name] = _checker(rule, shared)
    return _checker(schema, shared)


def _checker(rule: Mapping[str, Any], shared: Mapping[str, Checker]) -> Checker:
    if "$ref" in rule:
        name = rule["$ref"].rpartition("/")[2]
        return lambda value: shared[name](value)
    kinds = rule.get("type", list(TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    types = frozenset(kind for name in kinds for kind in TYPES[name])
    narrowed = not rule.keys().isdisjoint({"const", "enum", "pattern", "minItems", *RANGES})
    in_object = _object_checker(rule, shared) if dict in types else None
    item = _checker(rule["items"], shared) if "items" in rule else _anything

    def check(value: Any) -> Fault | None:
        kind = type(value)
        if kind not in types:
            return _misfit(" or ".join(kinds), value)
        if kind is float and not math.isfinite(value):
            return _misfit("a finite number", value)
        if narrowed and (expected := _unmet(value, rule)) is not None:
            return _misfit(expected, value)
        if kind is dict and in_object is not None:
            return in_object(value)
        return _fault_in_list(value, item) if kind is list else None

    return check


def _object_checker(rule: Mapping[str, Any], shared: Mapping[str, Checker]) -> Checker:
    required = rule.get("required", ())
    known = {name: _checker(part, shared) for name, part in rule.get("properties", {}).items()}
    more = rule.get("additionalProperties", {})
    others = None if more is False else _checker(more, shared) if more else _anything

    def check(value: dict[str, Any]) -> Fault | None:
        for name in required:
            if name not in value:
                return Fault("", f"a key {name!r}", f"no {name!r}")
        for name, part in value.items():
            of_part = known.get(name, others)
            if of_part is None:
                return Fault(f".{name}", "a known key", "an unknown one")
            if fault := of_part(part):
                return fault._replace(path=f".{name}{fault.path}")
        return None

    return check


def _fault_in_list(value: list[Any], item: Checker) -> Fault | None:
    for number, part in enumerate(value):
        if fault := item(part):
            return fault._replace(path=f"[{number}]{fault.path}")
    return None


def _anything(value: Any) -> Fault | None:
    """The check of the schema {}, which every JSON value keeps."""
    match value:
        case float() if not math.isfinite(value):
            return _misfit("a finite number", value)
        case dict():
            parts = ((f".{name}", part) for name, part in value.items())
        case list():
            parts = ((f"[{number}]", part) for number, part in enumerate(value))
        case _:
            return None
    for place, part in parts:
        if fault := _anything(part):
            return fault._replace(path=f"{place}{fault.path}")
    return None


def _misfit(expected: str, value: Any) -> Fault:
    return Fault("", expected, f"{type(value).__name__} {str(value)[:40]!r}")


def _unmet(value: Any, rule: Mapping[str, Any]) -> str | None:
    """What ``rule`` expects of the value itself, its type apart; None where the value meets it."""
    if "const" in rule and (isinstance(value, bool) or value != rule["const"]):
        return repr(rule["const"])
    if "enum" in rule and value not in rule["enum"]:
        return "one of " + ", ".join(map(repr, rule["enum"]))
    if isinstance(value, str) and not re.search(rule.get("pattern", ""), value):
        return f"text that matches {rule['pattern']}"
    if isinstance(value, list):
        low, high = rule.get("minItems", 0), rule.get("maxItems", len(value))
        return None if low <= len(value) <= high else f"{low} to {high} elements"
    if isinstance(value, int | float) and not isinstance(value, bool):
        for keyword, holds in RANGES.items():
            if keyword in rule and not holds(value, rule[keyword]):
                return f"a number with {keyword} {rule[keyword]}"
    return None


# ── Text read as the type of a setting ──────────────────────────────────────────────────────────

WORDS: Mapping[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text",
    tuple[str, ...]: "names with commas between them", Mapping[str, str]: "a JSON object of texts",
    Mapping[str, float]: "a JSON object of numbers",
    NoneType: "none",
}  # fmt: skip
"""The types that ``from_text`` reads, in words; it reads a ``Literal`` too."""


def from_text(text: str, kind: Any) -> Any:
    """``text`` as a value of the type ``kind``, such as ``float | None``.

    ``none`` is None where the type allows it. A text may be written as a JSON string, names with
    commas in them as a JSON list; otherwise ``\\n`` in a text is a line break. Raises ValueError,
    with what was expected, for other texts and other types.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    # Any text is a str, and a single name is one rather than a tuple.
    lists = "," in text or text.startswith("[")
    for one in sorted(kinds, key=lambda one: (one is str, one == tuple[str, ...])):
        if not (one == tuple[str, ...] and str in kinds and not lists):
            with suppress(ValueError, KeyError):
                return _of_kind(text.strip(), one)
    raise ValueError(" or ".join(_in_words(one) for one in kinds))


def _of_kind(text: str, kind: Any) -> Any:
    """``text`` as one type; raises ValueError or KeyError where it is of another."""
    if kind is NoneType:
        return {"none": None}[text.lower()]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind in (int, float):
        number = kind(text)
        if math.isnan(number):
            raise ValueError
        return number
    if get_origin(kind) is Literal:
        return {str(one): one for one in get_args(kind)}[text]
    if kind is str:
        return _json_of(str, text) if text.startswith('"') else text.replace("\\n", "\n")
    if kind == tuple[str, ...] and not text.startswith("["):
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == tuple[str, ...]:
        return tuple(map(_text, _json_of(list, text)))
    if kind == Mapping[str, str]:
        return {name: _text(value) for name, value in _json_of(dict, text).items()}
    if kind == Mapping[str, float]:
        return {name: float(value) for name, value in _json_of(dict, text).items()}
    raise ValueError


def _json_of(kind: type, text: str) -> Any:
    value = json.loads(text)
    if not isinstance(value, kind):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    return WORDS.get(kind, f"a {kind} of a recipe, which no text gives")


def load_declaration(path: str | Path, variable: str, kind: type[T]) -> T:
    """The value of ``variable``, a ``kind``, in a Python file that is imported.

    Raises DomainError for a file that is missing, fails or has no such value.
    """
    return load_declarations(path, variable, kind, many=False)[0]


def load_declarations(path: str | Path, variable: str, kind: type[T], many: bool = True) -> list[T]:
    """The same, as a list; where there may be ``many``, also a list whose name has an s more."""
    path, declared = Path(path), f"`{variable} = {kind.__name__}(…)`"
    declared += f" or `{variable}s = [{kind.__name__}(…), …]`" if many else ""
    spec = importlib.util.spec_from_file_location(f"lora_domains_{variable}_{path.stem}", path)
    if not path.is_file() or path.suffix != ".py" or spec is None or spec.loader is None:
        wrong = "a folder" if path.is_dir() else f"a file ending in {path.suffix!r}"
        raise DomainError(
            where=str(path), expected="a Python file, ending in .py",
            found=wrong if path.exists() else "no such file",
            hint=f"Give the path of a file that declares {declared}.",
        )  # fmt: skip
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except LoraDomainsError:
        raise
    except Exception as error:
        raise DomainError(
            where=str(path), expected="a file that Python can run",
            found=f"{type(error).__name__}: {error}", hint=f"python {path} shows where.",
        ) from error  # fmt: skip
    names = [variable, f"{variable}s"] if many else [variable]
    value = next((vars(module)[name] for name in names if name in vars(module)), None)
    values = value if many and isinstance(value, list) else [value]
    found = [one for one in values if isinstance(one, kind)]
    if not found or len(found) < len(values):
        types = dict.fromkeys(type(one).__name__ for one in values if one is not None)
        raise DomainError(
            where=str(path), expected=f"a variable {declared}", found=", ".join(types) or "none",
            hint="Declare it at the top level of the file.",
        )  # fmt: skip
    return found


# ── Names that other tools have ─────────────────────────────────────────────────────────────────

ELSEWHERE = {
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs",
    "max_steps": "max_train_steps iters num_steps",
    "lr": "learning_rate learning_rate_multiplier body_learning_rate",
    "rank": "lora_rank lora_r r lora_dim",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "lora_target target_modules lora_target_modules lora_modules",
    "rslora": "use_rslora",
    "dora": "use_dora",
    "batch_size": "per_device_train_batch_size micro_batch_size "
    "train_batch_size gradient_accumulation_steps",
    "optimizer": "optim",
    "schedule": "lr_scheduler_type lr_scheduler scheduler",
    "warmup": "warmup_ratio warmup_steps num_warmup_steps",
    "validate_every": "eval_steps eval_every val_check_interval evaluation_steps",
    "clip": "max_grad_norm gradient_clipping grad_clip",
    "patience": "early_stopping_patience early_stop",
    "balance": "class_weights class_weight sampling_strategy",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing",
    "tracker": "report_to logger",
    "init_from": "adapter_name_or_path lora_path",
    "resume": "resume_from_checkpoint",
    "seed": "random_seed random_state",
    "base": "model model_name model_path model_name_or_path base_model pretrained "
    "pretrained_model_name_or_path",
    "load_in_4bit": "quantization_bit quantization quantize",
    "max_length": "cutoff_len max_seq_length max_seq_len model_max_length sequence_len max_len",
    "chat": "template chat_template apply_chat_template",
    "system": "system_prompt system_instruction default_system",
    "max_tokens": "max_new_tokens max_gen_toks",
    "temperature": "temp",
    "train": "dataset data data_path dataset_path train_file train_data train_dataset training_set",
    "validation": "val valid validation_file validation_set eval_dataset eval_data eval_file dev",
    "test": "test_file test_data test_set test_dataset",
    "input": "dataset data input_file input_path file data_path",
    "text": "text_column text_col input_column input_columns input_features feature sentence",
    "label": "label_column label_col target target_column output_column output_features response",
    "limit": "max_samples max_train_samples num_samples",
    "suite": "tasks task benchmark",
    "metric": "metrics metric_for_best_model",
    "refer_below": "threshold confidence",
    "out": "output_dir out_dir output_directory save_dir output_path export_dir",
    "output": "output_file output_path output_dir out_file predictions",
    "overwrite": "force overwrite_output_dir",
    "quiet": "silent q",
    "licence": "license_id",
    "api_key_file": "api_keys",
    "fit": "train finetune fine_tune tune sft experiment",
    "evaluate": "eval test score",
    "benchmark": "lm_eval lm_eval_harness eval_harness",
    "predict": "infer inference generate classify run",
    "export": "merge convert quantize save",
    "serve": "api server deploy",
    "playground": "webui web ui webchat demo gradio gui",
    "list": "ls adapters",
    "show": "info card inspect",
    "push": "upload publish",
    "doctor": "env check version",
    "init": "new create init_config",
    "cross-validate": "cv kfold cross_validation",
}
"""Names that other tools have for flags, settings and verbs, by our name."""
UNNEEDED = {
    "bf16 fp16 fp32 dtype torch_dtype precision mixed_precision": "A base is read in float32 on a "
    "CPU and in bfloat16 elsewhere; --load-in-8bit and --load-in-4bit take less memory.",
    "val_size val_set_size val_split val_ratio validation_split validation_size val_fraction "
    "test_size test_split split split_ratio train_test_split": "Without --validation and --test, "
    "rows of --train are held out for them.",
    "stage finetuning_type training_type method peft_method peft_type do_train do_eval": "Adapters "
    "are LoRA; what is learned follows from the columns of the rows, or from --task.",
}
"""Flags of other tools for which no flag of ours is needed, and why."""


def unneeded(word: str) -> str | None:
    """Why no flag of ours is needed for the one of other tools that is called ``word``."""
    plain = _plain(word)
    return next((why for others, why in UNNEEDED.items() if plain in others.split()), None)


def known_here(word: str, known: Iterable[str]) -> list[str]:
    """Which of the flags, settings or verbs in ``known`` other tools call ``word``.

    ``--lora-alpha`` is ``lora.alpha`` and ``--load_in_4bit`` is ``--load-in-4bit``.
    """
    plain = _plain(word)
    ours = [_plain(our) for our, others in ELSEWHERE.items() if plain in others.split()]
    names = {name: _plain(name) for name in known}
    same = [name for name, here in names.items() if here == plain]
    return same or [n for n, here in names.items() if here in ours]


def _plain(name: str) -> str:
    """``name`` without dashes before it or the part of a domain: lr of training.lr."""
    return name.lstrip("-").replace("-", "_").lower().rpartition(".")[2]
