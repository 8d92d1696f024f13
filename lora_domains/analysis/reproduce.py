"""A run once more, from its card: the same declaration, rows, seed and base; what differs is said.

On the same machine, with the same versions and rows, it ends with the same bytes. No torch.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_domains.data.source import SPLITS, Data, Hub, Source
from lora_domains.domain import RETENTION, Domain, Lora, Training
from lora_domains.errors import UsageError, listed
from lora_domains.report.card import CARD, AdapterEntry, Card
from lora_domains.tasks import task_from_record
from lora_domains.verdict.gates import Gates

MATTERS = (
    "python", "torch", "transformers", "peft", "accelerate", "bitsandbytes", "lora_domains",
    "device", "threads", "world_size",
)  # fmt: skip
"""What of a card's environment the last bit of a weight may depend on."""


def card_at(path: Path) -> Card:
    """The card at ``path``: the file itself, or the folder it lies in."""
    return Card.read(path.parent if path.name == CARD else path)


def domain_of(card: Card) -> Domain:
    """The domain a card's adapter was trained on; raises UsageError where it cannot be had again.

    Labels are found anew in the rows, as they were then.
    """
    entry = card.adapter
    # Where it has been judged by others since: those it was trained with.
    settings = entry.settings | entry.trained_with
    where = f"the card of {entry.domain}"
    record = settings.get("data")
    if record is None:
        raise UsageError(
            where=where,
            expected="the place of its rows",
            found="none: an older version wrote it",
            hint="Run the recipe, or lora-domains fit with the same flags.",
        )
    if record["row"] is not None:
        raise UsageError(
            where=where,
            expected="rows that are used as they are read",
            found=f"rows that go through the recipe's function {record['row']}",
            hint="Run the recipe itself with the same flags: a card holds no code.",
        )
    method = settings["training"]["retention"]
    if method not in RETENTION:
        raise UsageError(
            where=where,
            expected=f"a retention method of this version: {listed(RETENTION)}",
            found=f"{method}, which an older version had",
            hint="Train the adapter again with --retention replay or kl.",
        )
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
        ),
        lora=Lora(**settings["lora"] | {"targets": _targets(settings["lora"]["targets"])}),
        training=Training(**settings["training"]),
        gates=Gates(**settings["gates"]),
        show_text=settings["show_text"],
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
            expected="rows from a file, the Hub or the embedded world",
            found=f"{value}, which a card does not hold",
            hint="Call model.fit with those rows again.",
        )
    source: str | None = value
    return source


def base_of(card: Card) -> tuple[str | None, str | None]:
    """(path or id, revision) of a card's base; None is the embedded one.

    Raises UsageError where it was a folder, whose place a card does not hold.
    """
    base = card.base
    if base.id == "embedded":
        return None, None
    if base.revision is None:
        raise UsageError(
            where=f"the card of {card.adapter.domain}",
            expected="a base that can be found again",
            found=f"a folder called {base.id}, whose place a card does not hold",
            hint=f"Give it: --base …/{base.id}",
        )
    return base.id, base.revision


def differences(then: Card, now: Card) -> list[str]:
    """What two cards of one domain say differently of base, rows, versions and machine."""
    found = []
    for key in ("id", "revision", "identity", "dtype", "quantization"):
        one, two = getattr(then.base, key), getattr(now.base, key)
        if one != two:
            found.append(f"base {key}: {_short(one)} → {_short(two)}")
    before, after = then.environment, now.environment
    found += [
        f"{key}: {before[key]} → {after.get(key)}"
        for key in MATTERS
        if key in before and before[key] != after.get(key)
    ]
    one, two = then.adapter, now.adapter
    for split in (*SPLITS, "general"):
        if split in one.data and one.data[split] != two.data.get(split):
            found.append(f"{split} rows: other digests")
    if one.parent != two.parent:
        found.append("another parent")
    if _taught(one) != _taught(two):
        found.append("another task or other gates")
    if one.settings["training"] != two.settings["training"]:
        found.append("other training settings")
    if one.settings["lora"] != two.settings["lora"]:
        found.append("other LoRA settings")
    return found


def _taught(entry: AdapterEntry) -> dict[str, Any]:
    """Task and gates with which it was trained: epochs were ranked and limited by them."""
    settings = entry.settings | entry.trained_with
    return {key: settings[key] for key in ("task", "gates")}


def same_bytes(then: Card, now: Card) -> tuple[bool, str]:
    """Whether the adapter is the same to the byte, and that in words with what differs."""
    one, two = (str(card.adapter.sha256) for card in (then, now))
    differing = differences(then, now)
    what = f" What differs: {listed(differing)}." if differing else ""
    if one == two:
        return True, f"The same bytes as in the card (sha256 {one[:12]}).{what}"
    why = what or " Nothing that the cards name differs: another machine, or memory that ran out."
    return False, f"Other bytes than in the card (sha256 {two[:12]} for {one[:12]}).{why}"


def _short(value: object) -> str:
    return str(value)[:12]
