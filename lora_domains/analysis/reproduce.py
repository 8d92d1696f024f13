"""Repeat a training from its card: the same domain, rows, seed and base; the base of an adapter. No
torch.

With the same rows, versions and machine the adapter is the same to the byte. Otherwise the
differences are named.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import CONFIG
from lora_domains.data.source import SPLITS
from lora_domains.domain import Domain, domain_from
from lora_domains.errors import UsageError, listed
from lora_domains.report.card import CARD, AdapterEntry, Card

MATTERS = (
    "python", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "lora_domains",
    "device", "threads", "world_size",
)  # fmt: skip
"""The keys of a card's environment that rounding may depend on."""


BASES = Path(".bases")
"""A folder of bases that are at hand."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def domain_of(card: Card, given: Mapping[str, Any] | None = None) -> Domain:
    """The domain on which a card's adapter was trained; see ``domain_from``."""
    entry = card.adapter
    settings, where = _settings_at_training(entry), f"the card of {entry.domain}"
    return domain_from(entry.domain, settings, where, given)


def base_of(card: Card) -> tuple[str | None, str | None]:
    """(id, revision) of a card's base on the Hub; (None, None) for the embedded base.

    A card holds the name of a folder, not its path: see ``local_base``. Raises UsageError where
    it is not found.
    """
    base = card.base
    if base.id == "embedded":
        return None, None
    if base.revision is None and (folder := local_base(base.id, base.identity)):
        return folder, None
    if base.revision is None:
        raise UsageError(
            where=f"the card of {card.adapter.domain}",
            expected="the embedded base or one from the Hub",
            found=f"a folder called {base.id}, whose path is not in the card",
            hint=f"Give it: --base PATH/{base.id}. A base in {BASES}/ is found by its name.",
        )
    return base.id, base.revision


def local_base(name: str, identity: str) -> str | None:
    """The folder of a base: that from which it was last loaded on this machine, or the one of its
    ``name`` in ``BASES``; None where there is neither."""
    from lora_domains.inference.cache import folder_of_base

    named = BASES / name
    return folder_of_base(identity) or (str(named) if named.is_dir() else None)


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
