"""Repeat a training from its card: the same domain, rows, seed and base; the base of an adapter. No
torch.

With the same rows, versions and machine the adapter is the same to the byte. Otherwise the
differences are named.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import CONFIG
from lora_domains.data.source import READING, SPLITS, Data, Hub, Source
from lora_domains.domain import RETENTION, Domain, Lora, Training
from lora_domains.errors import UsageError, listed
from lora_domains.report.card import CARD, AdapterEntry, Card
from lora_domains.tasks import task_from_record
from lora_domains.verdict.gates import Gates

MATTERS = (
    "python", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "lora_domains",
    "device", "threads", "world_size",
)  # fmt: skip
"""The keys of a card's environment that rounding may depend on."""


BASES = Path(".bases")
"""A folder of bases that are at hand."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def domain_of(card: Card) -> Domain:
    """The domain on which a card's adapter was trained; raises UsageError if the card lacks a part.

    Undeclared labels are read from the rows again.
    """
    entry, settings = card.adapter, _settings_at_training(card.adapter)
    where = f"the card of {entry.domain}"
    _check_repeatable(entry, settings, where)
    record = settings["data"]
    return Domain(
        name=entry.domain,
        task=task_from_record(settings["task"]),
        data=Data(
            train=_source(record["train"], where),
            validation=_source(record["validation"], where),
            test=_source(record["test"], where),
            general=_source(record.get("general"), where),
            group=record["group"],
            slices=tuple(record["slices"]),
            drop_leaks=record["drop_leaks"],
            limit=record["limit"],
            **{name: record[name] for name in READING if name in record},
        ),
        lora=Lora(**settings["lora"] | {"targets": _targets(settings["lora"]["targets"])}),
        training=Training(**settings["training"]),
        gates=Gates(**settings["gates"]),
        show_text=settings["show_text"],
        metric=settings.get("metric"),
        prevalence=settings.get("prevalence"),
    )


def _check_repeatable(entry: AdapterEntry, settings: Mapping[str, Any], where: str) -> None:
    """Raise UsageError where a card does not hold all that its training needs."""
    record = settings.get("data")
    if entry.trained_elsewhere:
        raise UsageError(
            where=where,
            expected="an adapter that was trained here",
            found="one of plain PEFT, whose card holds its evaluation only",
            hint="Its training rows and settings are unknown; train one on rows of your own.",
        )
    if record is None:
        raise UsageError(
            where=where,
            expected="a card that says where its rows are",
            found="one of an older version, which does not",
            hint="Run the recipe, or lora-domains fit with the same flags.",
        )
    if record["row"] is not None:
        raise UsageError(
            where=where,
            expected="rows that are used as they are read",
            found=f"rows transformed by the function {record['row']} of a recipe",
            hint="Run the recipe with the same flags, since a card holds no code.",
        )
    if own := sorted(settings["gates"].keys() - {field.name for field in fields(Gates)}):
        raise UsageError(
            where=where,
            expected="gates of this package",
            found=f"those of a recipe: {listed(own)}",
            hint="Run the recipe with the same flags, since a card holds no code.",
        )
    method = settings["training"]["retention"]
    if method not in RETENTION:
        raise UsageError(
            where=where,
            expected=f"a retention method of this version: {listed(RETENTION)}",
            found=f"{method}, of an older version",
            hint="Train the adapter again with --retention replay or kl.",
        )


def _targets(value: str | list[str]) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else tuple(value)


def _source(value: Any, where: str) -> Source | None:
    if isinstance(value, Mapping):
        # Older cards name the class under "is".
        return Hub(**{key: part for key, part in value.items() if key != "is"})
    if isinstance(value, str) and value.endswith(" rows in memory"):
        raise UsageError(
            where=where,
            expected="rows from a file, the Hub or the embedded data",
            found=f"{value}, which are not in the card",
            hint="Call model.fit with those rows again.",
        )
    source: str | None = value
    return source


def base_of(card: Card) -> tuple[str | None, str | None]:
    """(id, revision) of a card's base on the Hub; (None, None) for the embedded base.

    A card holds the name of a folder, not its path: it is looked for in ``BASES``. Raises
    UsageError where it is not there.
    """
    base = card.base
    if base.id == "embedded":
        return None, None
    if base.revision is None and (BASES / base.id).is_dir():
        return str(BASES / base.id), None
    if base.revision is None:
        raise UsageError(
            where=f"the card of {card.adapter.domain}",
            expected="the embedded base or one from the Hub",
            found=f"a folder called {base.id}, whose path is not in the card",
            hint=f"Give it: --base …/{base.id}",
        )
    return base.id, base.revision


def base_named_by(adapter: Path) -> tuple[str | None, str | None]:
    """(folder or id, revision) of the base of an adapter folder; (None, None) for the embedded one.

    It is that of the card, or without one the base that PEFT's config names. Raises UsageError for
    a folder that is not here.
    """
    card = Card.read(adapter, measured=False) if (adapter / CARD).exists() else None
    if card is not None and not card.adapter.trained_elsewhere:
        return base_of(card)
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        name, revision = config["base_model_name_or_path"], config.get("revision")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        name = revision = None  # loading the adapter says what is wrong with its config
    if isinstance(name, str) and Path(name).is_dir():
        return name, None
    if card is not None:
        return base_of(card)
    if not isinstance(name, str) or name in ("", "embedded"):
        return None, None
    if not HUB_ID.fullmatch(name):
        raise UsageError(
            where=adapter.name,
            expected="the base on which it was trained",
            found=f"none: its {CONFIG} names {name!r}, which is not here",
            hint="Give it: --base PATH_OR_ID",
        )
    return name, revision if isinstance(revision, str) else None


def differences(then: Card, now: Card) -> list[str]:
    """Differences of base, rows, settings, versions and machine between two cards of a domain."""
    different = []
    for key in ("id", "revision", "identity", "dtype", "quantization"):
        one, two = getattr(then.base, key), getattr(now.base, key)
        if one != two:
            different.append(f"base {key}: {_short(one)} → {_short(two)}")
    before, after = then.environment, now.environment
    different += [
        f"{key}: {before[key]} → {after.get(key)}"
        for key in MATTERS
        if key in before and before[key] != after.get(key)
    ]
    one, two = then.adapter, now.adapter
    for split in (*SPLITS, "general"):
        if split in one.data and one.data[split] != two.data.get(split):
            different.append(f"other {split} rows")
    if one.scale != two.scale:
        different.append(f"scale: {one.scale:g} → {two.scale:g}")
    if one.parent != two.parent:
        different.append("other parent")
    trained, retrained = _settings_at_training(one), _settings_at_training(two)
    if any(trained.get(key) != retrained.get(key) for key in ("task", "gates", "metric")):
        different.append("other task, gates or metric")
    for part, name in (("training", "training"), ("lora", "LoRA")):
        # Cards are older than some settings, which are left open or off there.
        before, after = (
            {
                key: value
                for key, value in entry.settings[part].items()
                if value not in (None, False)
            }
            for entry in (one, two)
        )
        if before != after:
            different.append(f"other {name} settings")
    memory = [entry.training.get("pass_bytes") for entry in (one, two)]
    if None not in memory and memory[0] != memory[1]:
        different.append(f"memory of a pass: {memory[0]:,} → {memory[1]:,} bytes")
    return different


def _settings_at_training(entry: AdapterEntry) -> dict[str, Any]:
    """The settings with the task, gates and metric of the training, which chose the epoch."""
    return entry.settings | entry.trained_with


def same_bytes(then: Card, now: Card) -> tuple[bool, str]:
    """Whether the adapter is the same to the byte, and a message that names the differences."""
    one, two = (str(card.adapter.sha256) for card in (then, now))
    different = differences(then, now)
    named = f" Differences: {listed(different)}." if different else ""
    if one == two:
        return True, f"The adapter is the same to the byte (sha256 {one[:12]}).{named}"
    named = named or " The cards are the same: another machine, or smaller batches to save memory."
    return False, f"The adapter differs (sha256 {two[:12]}, not {one[:12]}).{named}"


def _short(value: object) -> str:
    return str(value)[:12]
