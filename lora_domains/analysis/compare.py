"""Two adapters or versions on the same items, and several seeds of one; no model is needed.

Everything comes from the ``items.jsonl`` of the adapters' folders, matched by the keyed digest of
each row: only folders evaluated in one output folder share a key.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.errors import AdapterError
from lora_domains.report.card import Card, read_items
from lora_domains.stats.seeds import seed_variance
from lora_domains.tasks import positive_index
from lora_domains.verdict.gain import gain
from lora_domains.verdict.gates import retention
from lora_domains.verdict.metrics import METRICS, Metric, metric_named, reported
from lora_domains.verdict.rules import verdict
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import comparison_fields


def compare_adapters(first: Path, second: Path) -> dict[str, Any]:
    """B (``second``) against A on the same test items and the same general questions.

    Every metric's ``base`` is A and its ``adapter`` B. ``verdict``: pass where B is better than A
    on the domain metric, fail where it is not, inconclusive where the items cannot tell; and
    general knowledge must be kept within A's margin. Raises AdapterError when the test sets or
    what is asked of them differ.
    """
    one, two = _Run(first), _Run(second)
    _same_question(one, two)
    test, general = _paired(one, two, "test"), _paired(one, two, "general")
    metric, positive = metric_named(one.judged["metric"]), one.positive
    scores = {
        each.name: comparison_fields(comparison)
        for each in one.metrics
        if (comparison := each.compare(test, positive=positive)) is not None
    }
    decisive = metric.compare(test, positive=positive)
    if decisive is None:
        raise AdapterError(
            where=f"{one.name} and {two.name}",
            expected=f"a score for {metric.label} on every test item",
            found="items without one",
            hint="Evaluate both again.",
        )
    results = [gain(metric, {one.name: decisive})]
    pooled = METRICS["accuracy"].compare(general)
    if pooled is not None:
        results.append(retention(pooled, one.entry.settings["gates"]["retention"]))
    return {
        "a": one.name,
        "b": two.name,
        "metric": metric.name,
        "scores": scores,
        "general": None if pooled is None else comparison_fields(pooled),
        "gates": [asdict(result) for result in results],
        "verdict": verdict(results),
    }


def compare_seeds(folders: Sequence[Path]) -> dict[str, Any]:
    """``seeds`` of a report entry: {metric: figures of ``seed_variance``}, over runs of one domain.

    The change over the base on each metric, seed variance apart from item variance. Raises
    AdapterError when the runs were not judged on the same test set.
    """
    runs = [_Run(folder) for folder in folders]
    for other in runs[1:]:
        _same_question(runs[0], other)
    rows = [_ordered(runs[0], run) for run in runs]
    found = {}
    for metric in runs[0].metrics:
        changes = []
        for part in rows:
            before, after = (
                metric.contributions(part, name, runs[0].positive) for name in ("base", "adapter")
            )
            if before is not None and after is not None:
                changes.append(after - before)
        if len(changes) == len(runs):
            found[metric.name] = seed_variance(np.stack(changes))
    return found


def save_seeds(folders: Sequence[Path], found: Mapping[str, Any]) -> None:
    """Put the figures of ``compare_seeds`` into each card, as ``seeds``: reports show them."""
    for folder in folders:
        card = Card.read(folder)
        card.adapter.seeds = dict(found)
        card.write(folder)


# ── inside ──────────────────────────────────────────────────────────────────────────────────────


class _Run:
    """One adapter's card and items."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        self.entry = Card.read(folder).adapter
        if not self.entry.judged:
            raise AdapterError(
                where=folder.name,
                expected="an adapter that was evaluated",
                found="a card without a verdict",
                hint="Evaluate it first.",
            )
        self.items = ScoreTable(read_items(folder))
        self.judged = self.entry.judged
        self.positive = positive_index(self.judged["labels"], self.judged["positive"])
        self.metrics: list[Metric] = reported(self.judged["labels"], self.positive)


def _same_question(one: _Run, two: _Run) -> None:
    for what in ("metric", "labels", "positive"):
        if one.judged[what] != two.judged[what]:
            raise AdapterError(
                where=f"{one.name} and {two.name}",
                expected=f"the same {what}",
                found=f"{one.judged[what]} and {two.judged[what]}",
                hint="Compare adapters that were asked the same question.",
            )


def _key(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return item["digest"], item["target"], item.get("suite")


def _ordered(one: _Run, two: _Run, where: str = "test") -> ScoreTable:
    """``two``'s items in the order of ``one``'s; raises AdapterError where they differ."""
    first = one.items.where("set", where)
    second: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for item in two.items.where("set", where):
        second[_key(item)].append(item)
    wanted, there = Counter(map(_key, first)), Counter({k: len(v) for k, v in second.items()})
    if wanted != there:
        shared = (wanted & there).total()
        hint = "Evaluate both on the same test rows, in one output folder."
        raise AdapterError(
            where=f"{one.name} and {two.name}",
            expected=f"the same {where} items",
            found=f"{wanted.total()} and {there.total()} items, {shared} of them shared",
            hint=hint + ("" if shared else " (Digests of another folder have another key.)"),
        )
    return ScoreTable(second[_key(item)].pop(0) for item in first)


def _paired(one: _Run, two: _Run, where: str) -> ScoreTable:
    """Items in which ``base`` is A's adapter and ``adapter`` B's."""
    first = one.items.where("set", where)
    second = _ordered(one, two, where)
    return ScoreTable(
        {**a, "scores": {"base": a["scores"]["adapter"], "adapter": b["scores"]["adapter"]}}
        for a, b in zip(first, second, strict=True)
    )
