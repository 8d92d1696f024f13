"""Adapter folders with made-up items, as an evaluation leaves them: no model needed."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from conftest import ROOT
from referencing import Registry
from support.items import Item, general, table, text, train_like

from lora_domains.analysis.regressions import regressions
from lora_domains.report.card import read_items
from lora_domains.report.report import combine
from lora_domains.stats.seeds import seed_variance
from lora_domains.verdict.ledger import Standing, level

SCHEMAS = {
    name: json.loads((ROOT / f"lora_domains/report/assets/{name}.schema.json").read_text())
    for name in ("card", "report")
}
REGISTRY: Registry[Any] = Registry().with_contents(
    (f"{name}.schema.json", schema) for name, schema in SCHEMAS.items()
)
VALID_CARD, VALID = (
    jsonschema.Draft202012Validator(SCHEMAS[name], registry=REGISTRY) for name in ("card", "report")
)
"""Validators of ``card.json`` and ``report.json``."""

CARD: dict[str, Any] = json.loads((ROOT / "benchmarks" / "speed" / "card.json").read_text())
# What the adapter says of 500 positives and 500 others: found, missed, false alarms, right.
PASSES, FAILS = (460, 40, 30, 470), (60, 440, 30, 470)
UNSURE = (17, 3, 2, 18)
SECRET = "planted-7f3a <script>alert(1)</script>"
"""The text of a row; it appears only on request."""
FILES = {"report.json", "report.html", "report.md", "comment.md", "junit.xml"}
"""What ``lora-domains report`` writes."""


EVALUATIONS = vars(Standing("0" * 16, 2, 5, level(5)))
"""The second adapter on a test set."""


def items(counts: Sequence[int] = PASSES, *, lost: int = 0) -> list[Item]:
    """Items whose test set has these counts; ``lost`` of 400 general questions are forgotten."""
    return [*table(*counts), *train_like(*counts), *general(lost=lost), *text()]


def seeds(name: str = "f1") -> dict[str, Any]:
    """The figures of two seeds of an adapter."""
    changes = np.random.default_rng(0).choice([0.0, 1.0], size=(2, 50))
    return {name: seed_variance(changes)}


def folder(
    there: Path, name: str = "triage", rows: Sequence[Item] | None = None,
    base: Mapping[str, Any] | None = None, environment: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Path:  # fmt: skip
    """An adapter folder ``there``/``name``; ``changes`` are of its entry, the rest of its card."""
    card = copy.deepcopy(CARD)
    card["base"] |= base or {}
    card["environment"] |= environment or {}
    card["adapters"][0] |= {"domain": name, "path": name, **changes}
    made = there / name
    made.mkdir(parents=True)
    (made / "card.json").write_text(json.dumps(card), encoding="utf-8")
    lines = (json.dumps(item) + "\n" for item in (items() if rows is None else rows))
    (made / "items.jsonl").write_text("".join(lines), encoding="utf-8")
    return made


def changes(old: list[Path], new: list[Path]) -> dict[str, Any]:
    """What got worse in the adapters ``new`` since ``old``."""
    rows = {path.name: read_items(path) for path in new}
    return regressions(combine(new), rows.__getitem__, {p.name: p for p in old}, "main")
