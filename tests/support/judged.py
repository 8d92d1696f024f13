"""Summaries and gates of per-item scores."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from support.items import Item, general, table, text, train_like

from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import judge_all
from lora_domains.verdict.ledger import Standing, level
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import summarise

LIMITS = {"recall": 0.80, "precision": 0.85}


def judged(
    items: Sequence[Item], *, metric: str = "f1", gates: Mapping[str, float] | None = None,
    threshold: Mapping[str, Any] | None = None, **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    summary = summarise(evidence(items, metric, **changes), gates or LIMITS, threshold)
    json.dumps(summary, allow_nan=False)
    return summary


def evidence(items: Sequence[Item], metric: str = "f1", **changes: Any) -> Evidence:
    settings: dict[str, Any] = {
        "labels": ["routine", "urgent"], "positive": 1, "leaks": {"exact": 0, "near": 0},
        "base_changed": False, "largest_move": 2.0,
    }  # fmt: skip
    return Evidence(ScoreTable(items), METRICS[metric], **settings | changes)


def verdict_of(
    name: str, items: Sequence[Item], gates: Mapping[str, float] | None = None, **changes: Any
) -> str:
    """The verdict of one gate, where the summary of all the others would take its time."""
    (result,) = judge_all(evidence(items, **changes), gates or LIMITS, {name})
    return result.verdict


def gate(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    result: dict[str, Any] = next(g for g in summary["gates"] if g["name"] == name)
    return result


def good(count: int = 1000) -> list[Item]:
    """Every gate of this run passes."""
    return [
        *table(count * 46 // 100, count * 4 // 100, count * 3 // 100, count * 47 // 100),
        *train_like(460, 40, 30, 470),
        *general(),
        *text(),
    ]


def sliced(items: Sequence[Item], column: str, of: Sequence[str]) -> list[Item]:
    return [i | {"slices": {column: of[n % len(of)]}} if i["set"] == "test" else i
            for n, i in enumerate(items)]  # fmt: skip


def gained(items: Sequence[Item], more: float, seed: int = 0) -> list[Item]:
    """Items on which the adapter gains a nat on average, ``more`` on training rows."""
    rng = np.random.default_rng(seed)
    changed = []
    for item in items:
        if item["set"] in ("test", "train"):
            gain = rng.normal(1 + (more if item["set"] == "train" else 0), 1)
            scores = {**item["scores"], "base": {**item["scores"]["base"], "nats": 5.0}}
            scores["adapter"] = {**item["scores"]["adapter"], "nats": 5.0 - 2 * gain}
            item = item | {"scores": scores}
        changed.append(item)
    return changed


def evaluated(number: int = 1, **changes: Any) -> Standing:
    return Standing("x", number, 5, level(5), **changes)
