"""From per-item scores to figures, comparisons, gates and the verdict. No torch.

An adapter's ``items.jsonl`` holds everything this file reads, so a report can be rebuilt, or
checked, without a model. One item is one JSON object:

    {"set": "test" | "train" | "validation" | "general" | "text", "id": "test:17", "digest": …,
     "target": 1, "group": …, "slices": {…}, "suite": …,
     "scores": {"base": {…}, "adapter": {…}, NAME: {…}}}

where a contender's score holds ``prediction``, ``nll``, ``confidence``, ``brier`` (choices),
``positive`` (probability of the positive class), ``f1``, ``exact`` (generation), ``nats`` and
``tokens`` (all but some baselines), ``kl`` (text). Validation rows are there where they chose a
threshold; no gate reads them.

Beside what DESIGN.md names, an entry holds

    "looks": {"test_set", "before", "adapters", "level", "broken"}           see looks.Standing
    "calibration": {…, "bounds": {"ece" | "brier": {"lower", "upper"}},
                    "risk_coverage": [{"confidence", "coverage", "risk", "upper"}]}
    "curve": {"positive", "targets": {"recall" | "precision": …}, "threshold",
              "test" and "validation": [{"threshold", "precision", "recall"}]}
    "memorisation": {"auc", "lower", "upper", "train", "test"}
    "seeds": {METRIC: {…}}   where several seeds were compared; see seeds.seeds
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import numpy as np

from lora_domains.domain import Gates
from lora_domains.stats import thresholds
from lora_domains.stats.bootstrap import Bounds, FloatArray, Statistic, bootstrap
from lora_domains.stats.calibration import calibration
from lora_domains.stats.classes import ClassFigure, class_counts, macro, of_class
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_classes,
    compare_f1,
    compare_means,
    compare_ratios,
    ratio,
)
from lora_domains.stats.intervals import difference_bounds, wilson
from lora_domains.stats.membership import auc_bounds, membership_auc
from lora_domains.stats.seeds import influence
from lora_domains.verdict import gates as rules
from lora_domains.verdict.gates import GateResult
from lora_domains.verdict.scores import (
    CONTENDERS,
    Array,
    Items,
    Rows,
    baselines,
    chosen,
    column,
    targets,
)
from lora_domains.verdict.slices import compare_slices

LOWER_IS_BETTER = {"loss", "nats_per_token"}
MEANS = {"loss": "nll", "token_f1": "f1", "exact_match": "exact"}
"""Metrics that are the mean of one score."""


# ── One metric: its value for a contender, and two contenders compared on it ────────────────────


def value(metric: str, items: Items, contender: str, positive: int | None) -> float | None:
    """``metric`` of one contender over ``items``; None where it was not scored on it."""
    return _evaluated(metric, _columns(metric, items, contender), positive)


def comparison(
    metric: str,
    items: Items,
    first: str,
    second: str,
    positive: int | None,
    level: float = 0.95,
) -> Comparison | None:
    """``second`` minus ``first`` on the same items, with bounds; None where one has no score."""
    one, two = (_columns(metric, items, name) for name in (first, second))
    if np.isnan(one).any() or np.isnan(two).any() or not len(one):
        return None
    groups = _groups(items)
    if metric == "accuracy":
        return compare_accuracy(one[:, 0] == one[:, 1], two[:, 0] == two[:, 1], groups, level)
    if metric in ("f1", "macro_f1"):
        only = positive if metric == "f1" else None
        return compare_f1(one[:, 0], one[:, 1], two[:, 1], only, groups, level)
    if metric == "recall" and (one[:, 0] == positive).any():
        # Recall is an accuracy among the positives, so the score interval for accuracies holds.
        here = one[:, 0] == positive
        part = None if groups is None else [g for g, h in zip(groups, here, strict=True) if h]
        return compare_accuracy(one[here, 1] == positive, two[here, 1] == positive, part, level)
    if metric in MEANS:
        better = metric not in LOWER_IS_BETTER
        return compare_means(one[:, 0], two[:, 0], groups, better, level)
    if metric == "nats_per_token":
        saved = one[:, 0] / one[:, 1].clip(1) - two[:, 0] / two[:, 1].clip(1)
        return compare_ratios(one, two, groups, saved, level)
    figure = _class_figure(metric, positive)
    return compare_classes(one[:, 0], one[:, 1], two[:, 1], figure, groups, level)


def _columns(metric: str, items: Items, contender: str) -> Array:
    """What ``metric`` is computed from, (items, 2) or (items, 1)."""
    if metric in MEANS:
        return column(items, contender, MEANS[metric])[:, None]
    if metric == "nats_per_token":
        pair = [column(items, contender, key) for key in ("nats", "tokens")]
        return np.stack(pair, axis=1) if items else np.empty((0, 2))
    return np.stack([targets(items), column(items, contender, "prediction")], axis=1)


def _evaluated(metric: str, columns: Array, positive: int | None) -> float | None:
    if not len(columns) or np.isnan(columns).any():
        return None
    if metric in MEANS:
        return float(columns[:, 0].mean())
    if metric == "nats_per_token":
        return float(ratio(columns.sum(0)))
    truth, predicted = columns[:, 0].astype(int), columns[:, 1].astype(int)
    if metric == "accuracy":
        return float((truth == predicted).mean())
    size = int(max(truth.max(), predicted.max(), positive or 0)) + 1
    counts = [
        np.bincount(labels, minlength=size)
        for labels in (truth[truth == predicted], truth, predicted)
    ]
    return float(_class_figure(metric, positive)(np.concatenate(counts).astype(float)))


def _class_figure(metric: str, positive: int | None) -> Statistic:
    if metric.startswith("macro_"):
        return macro(cast(ClassFigure, metric.removeprefix("macro_")))
    return of_class(cast(ClassFigure, metric), cast(int, positive))


def _groups(items: Items) -> list[Any] | None:
    return (items if isinstance(items, Rows) else Rows(items)).groups()


def _bounds(
    metric: str, items: Items, contender: str, positive: int | None, level: float
) -> Bounds:
    columns, groups = _columns(metric, items, contender), _groups(items)
    if metric == "accuracy" and groups is None:
        return wilson(float((columns[:, 0] == columns[:, 1]).sum()), len(columns), level)
    if metric == "accuracy":
        columns = (columns[:, 0] == columns[:, 1])[:, None].astype(float)
    if metric == "accuracy" or metric in MEANS:
        columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    elif metric != "nats_per_token":
        pairs, kinds = np.unique(columns.astype(int), axis=0, return_inverse=True)
        size = int(max(pairs.max(), positive or 0)) + 1
        table = class_counts(pairs[:, 0], pairs[:, 1], size)
        figure = _class_figure(metric, positive)
        return bootstrap(figure, table, kinds=kinds, groups=groups, resamples=1000, level=level)
    return bootstrap(ratio, columns, groups=groups, resamples=1000, level=level)


# ── The whole of one adapter ────────────────────────────────────────────────────────────────────


def summarise(
    items: Items,
    *,
    metric: str,
    metrics: Sequence[str],
    labels: Sequence[str],
    positive: int | None,
    gates: Gates,
    leaks: Mapping[str, Any],
    base_changed: bool,
    largest_move: float,
    looks: Mapping[str, Any] | None = None,
    threshold: Mapping[str, Any] | None = None,
    knowledge: str = "questions",
) -> dict[str, Any]:
    """Every figure, gate and the verdict of one adapter, as the card holds them.

    ``metrics`` are reported, ``metric`` decides. ``labels`` is empty where rows have no labels in
    common, and ``positive`` the position of the positive class among them.
    Gates are held at the level that ``looks`` (see looks.Standing) leaves, else at 95 %; figures
    beside them have 95 % bounds always. ``threshold`` is what validation chose (``curve``).
    ``knowledge`` says how the base's general knowledge is asked: by "questions", by "masked tokens"
    (an encoder), or by "nothing" (one without a masked-token head).
    """
    test, train = chosen(items, "set", "test"), chosen(items, "set", "train")
    general, text = chosen(items, "set", "general"), chosen(items, "set", "text")
    level = float(looks["level"]) if looks else 0.95
    remembered = _memorisation(train, test)
    scores = {name: fields for name in metrics if (fields := _with_baselines(name, test, positive))}
    results = [
        _gain(metric, test, positive, level),
        *_kept(knowledge, general, text, gates, level),
        *_positive_gates(test, positive, gates, level),
        *_slice_gates(metrics, test, positive, gates, level),
        *([_overfit(metric, train, test, positive, gates, level)] if train else []),
        *_memorisation_gates(train, test, gates, level),
        *([rules.looks(looks["adapters"], level, looks["broken"])] if looks else []),
        rules.leaks(int(leaks["exact"]), int(leaks["near"])),
        rules.frozen(base_changed),
        rules.alive(largest_move),
    ]
    summary: dict[str, Any] = {
        "domain_scores": scores,
        "general": _general(general, text),
        "slices": _slices(metric, test, positive),
        "gates": [asdict(result) for result in results],
        "verdict": rules.verdict(results),
    }
    if "parent" in baselines(test):
        summary["over_parent"] = {name: _over_parent(name, test, positive) for name in scores}
    if labels:
        summary["confusion"] = confusion(test, labels)
        summary["per_class"] = per_class(test, labels)
    if "accuracy" in metrics:
        summary["calibration"] = _calibration(test)
    if positive is not None:
        summary["curve"] = _curve(items, positive, labels[positive], threshold)
    if remembered is not None:
        summary["memorisation"] = remembered
    if looks:
        summary["looks"] = dict(looks)
    return summary


def _with_baselines(metric: str, items: Items, positive: int | None) -> dict[str, Any]:
    """A comparison as a report holds it; nothing where base or adapter has no such score."""
    made = comparison(metric, items, "base", "adapter", positive)
    if made is None:
        return {}
    values = {name: value(metric, items, name, positive) for name in baselines(items)}
    return fields_of(made) | {"baselines": {k: v for k, v in values.items() if v is not None}}


def _over_parent(metric: str, items: Items, positive: int | None) -> dict[str, Any]:
    """The adapter against the one it went on from, on the same items."""
    made = comparison(metric, items, "parent", "adapter", positive)
    assert made is not None
    fields = fields_of(made)
    return {"parent": fields.pop("base"), **fields}


def fields_of(made: Comparison) -> dict[str, Any]:
    """A comparison as a report holds it; its level is 95 % there."""
    return {k: _finite(v) for k, v in asdict(made).items() if k != "level"}


def summands(
    metric: str, items: Items, contender: str, positive: int | None
) -> tuple[FloatArray, Statistic] | None:
    """Columns (items, k) whose sums give ``metric`` of one contender, and how they give it.

    For ``bootstrap`` and for ``seeds.influence``. None where it was not scored on it.
    """
    columns = _columns(metric, items, contender)
    if np.isnan(columns).any() or not len(columns):
        return None
    if metric == "accuracy":
        columns = (columns[:, 0] == columns[:, 1])[:, None].astype(float)
    if metric == "accuracy" or metric in MEANS:
        columns = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    if metric == "accuracy" or metric in MEANS or metric == "nats_per_token":
        return columns, ratio
    truth, said = columns[:, 0].astype(int), columns[:, 1].astype(int)
    size = int(max(truth.max(), said.max(), positive or 0)) + 1
    return class_counts(truth, said, size), _class_figure(metric, positive)


def contributions(metric: str, items: Items, contender: str, positive: int | None) -> Array | None:
    """What each item adds to ``metric``, shape (items,): its mean is the metric (seeds.influence).

    None where the contender was not scored on it.
    """
    found = summands(metric, items, contender, positive)
    return None if found is None else influence(found[1], found[0])


def _finite(number: float | None) -> float | None:
    """``number``, or None where JSON has no word for it (one item has infinite bounds)."""
    return number if number is not None and math.isfinite(number) else None


def best_baseline(metric: str, items: Items, positive: int | None) -> str | None:
    """The strongest baseline on ``metric``; None where none was scored on it."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    scored = [(sign * v, name) for name in baselines(items)
              if (v := value(metric, items, name, positive)) is not None]  # fmt: skip
    return max(scored)[1] if scored else None


def _gain(metric: str, items: Items, positive: int | None, level: float) -> GateResult:
    over_base = comparison(metric, items, "base", "adapter", positive, level)
    assert over_base is not None
    rival = best_baseline(metric, items, positive)
    over_rival = comparison(metric, items, rival, "adapter", positive, level) if rival else None
    return rules.gain(
        over_base,
        over_rival,
        metric,
        (rival or "best baseline"),
        higher_is_better=metric not in LOWER_IS_BETTER,
    )


def _kept(
    knowledge: str, general: Items, text: Items, gates: Gates, level: float
) -> list[GateResult]:
    """The gates on general knowledge: retention and drift."""
    if knowledge == "nothing":
        why = "The base has no masked-token head: it gives no probabilities that could be compared."
        return [
            rules.not_applicable("retention", "general knowledge is kept", gates.retention, why),
            rules.not_applicable("drift", "KL from base to adapter", gates.drift, why),
        ]
    if knowledge == "masked tokens":
        nats = comparison("nats_per_token", text, "base", "adapter", None, level)
        assert nats is not None
        kept = [rules.masked_retention(nats, gates.retention)]
    else:
        kept = [_retention(general, gates, level)] if general else []
    return kept + ([_drift(text, gates, level)] if text else [])


def _retention(general: Items, gates: Gates, level: float) -> GateResult:
    pooled = comparison("accuracy", general, "base", "adapter", None, level)
    assert pooled is not None
    return rules.retention(pooled, gates.retention)


def _kl(text: Items, level: float = 0.95) -> tuple[float, Bounds]:
    columns = np.stack([column(text, "adapter", key) for key in ("kl", "tokens")], axis=1)
    return float(ratio(columns.sum(0))), bootstrap(
        ratio, columns, groups=_groups(text), level=level
    )


def _drift(text: Items, gates: Gates, level: float) -> GateResult:
    kl, bounds = _kl(text, level)
    return rules.drift(kl, bounds, len(text), gates.drift, level=level)


def _positive_gates(
    test: Items, positive: int | None, gates: Gates, level: float
) -> list[GateResult]:
    if positive is None:
        return []
    truth = targets(test) == positive
    said = column(test, "adapter", "prediction") == positive
    hits, missed, alarms = (int(x.sum()) for x in (truth & said, truth & ~said, ~truth & said))
    return [
        rules.recall(hits, missed, gates.recall, level),
        rules.precision(hits, alarms, gates.precision, level),
    ]


def _overfit(
    metric: str, train: Items, test: Items, positive: int | None, gates: Gates, level: float
) -> GateResult:
    scores = [value(metric, part, "adapter", positive) for part in (train, test)]
    first, second = (0.0 if s is None else s for s in scores)
    bounds = [_bounds(metric, part, "adapter", positive, level) for part in (train, test)]
    if metric in LOWER_IS_BETTER:
        first, second, bounds = second, first, bounds[::-1]
    gap = difference_bounds(first, bounds[0], second, bounds[1])
    return rules.overfit(first, second, gap, len(test), gates.overfit, level)


# ── Slices, memorisation, calibration, the curve ────────────────────────────────────────────────


def _slice_gates(
    metrics: Sequence[str], test: Items, positive: int | None, gates: Gates, level: float
) -> list[GateResult]:
    """One gate on the worst slice: recall of the positive class, accuracy, or token F1.

    None for nats alone, which differ between kinds of text.
    """
    names = dict.fromkeys(name for item in test for name in item.get("slices") or {})
    if not names or not {"accuracy", "token_f1"} & set(metrics):
        return []
    what, unit, scores = "token F1", "rows", column(test, "adapter", "f1")
    if "accuracy" in metrics:
        what, scores = "accuracy", column(test, "adapter", "prediction") == targets(test)
    if positive is not None:
        what, unit, scores = "recall", "positives", np.where(
            targets(test) == positive, scores, np.nan
        )  # fmt: skip
    values = {name: [str((item.get("slices") or {}).get(name)) for item in test] for name in names}
    found = compare_slices(np.asarray(scores, float), values, _groups(test), unit, level)
    return [rules.slices(found, what, gates.slices, level)] if found else []


def _general(general: Rows, text: Rows) -> dict[str, Any]:
    found: dict[str, Any] = {}
    suites = np.array([item["suite"] for item in general])
    for suite in dict.fromkeys(suites.tolist()):
        part = general.part(np.flatnonzero(suites == suite))
        found[suite] = _with_baselines("accuracy", part, None)
    if general:
        found["pooled"] = _with_baselines("accuracy", general, None)
    if text:
        found["nats"] = _with_baselines("nats_per_token", text, None)
        kl, bounds = _kl(text)
        low, high = map(_finite, bounds)
        found["kl"] = {"general": kl, "lower": low, "upper": high}
    return found


def _slices(metric: str, test: Rows, positive: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in test for name in item.get("slices") or {}):
        found[name] = {}
        values = np.array([str(item["slices"][name]) for item in test])
        for part in sorted(set(values.tolist())):
            rows = test.part(np.flatnonzero(values == part))
            found[name][part] = {metric: _with_baselines(metric, rows, positive)}
    return found


def confusion(items: Items, labels: Sequence[str]) -> dict[str, Any]:
    """Counts of (true, predicted), rows being true labels, for base and adapter."""
    tables = {}
    for name in CONTENDERS:
        table = np.zeros((len(labels), len(labels)), dtype=int)
        pairs = _columns("accuracy", items, name).astype(int)
        np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
        tables[name] = table.tolist()
    return {"labels": list(labels), **tables}


def per_class(items: Items, labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class for the adapter, and recall's lower bound."""
    pairs = _columns("accuracy", items, "adapter").astype(int)
    found = {}
    for index, label in enumerate(labels):
        truth, said = pairs[:, 0] == index, pairs[:, 1] == index
        hits, support = int((truth & said).sum()), int(truth.sum())
        row: dict[str, Any] = {
            name: _evaluated(name, pairs.astype(float), index)
            for name in ("precision", "recall", "f1")
        }
        found[label] = row | {"support": support, "recall_lower": wilson(hits, support).lower}
    return found


def _memorisation(train: Items, test: Items, level: float = 0.95) -> dict[str, Any] | None:
    """How well what the adapter gained over the base tells training rows from test rows."""
    gains, units = [], []
    for part in (train, test):
        before, after = (column(part, name, "nats") for name in CONTENDERS)
        gains.append((before - after) / column(part, "adapter", "tokens").clip(1))
        groups = _groups(part)
        units.append(len(part) if groups is None else len(set(groups)))
    if not train or not test or any(np.isnan(gain).any() for gain in gains):
        return None
    auc = membership_auc(*gains)
    bounds = auc_bounds(auc, units[0], units[1], level)
    rows = {"train": len(train), "test": len(test)}
    return {"auc": auc, "lower": bounds.lower, "upper": bounds.upper, **rows}


def _memorisation_gates(train: Items, test: Items, gates: Gates, level: float) -> list[GateResult]:
    found = _memorisation(train, test, level)
    if found is None:
        return []
    bounds, n = Bounds(found["lower"], found["upper"]), found["train"] + found["test"]
    return [rules.memorisation(found["auc"], bounds, n, gates.memorisation, level)]


def _calibration(test: Items) -> dict[str, Any]:
    """See ``calibration``: the adapter's confidence in the label it names."""
    score = {key: column(test, "adapter", key) for key in ("confidence", "prediction", "brier")}
    right = score["prediction"] == targets(test)
    return calibration(score["confidence"], right, score["brier"], _groups(test))


def _curve(
    items: Items, positive: int, label: str, threshold: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Precision against recall of the adapter, on test rows and on those that chose."""
    found: dict[str, Any] = {"positive": label, **(threshold or {})}
    for name in ("test", "validation"):
        part = chosen(items, "set", name)
        chance = column(part, "adapter", "positive")
        if part and not np.isnan(chance).any():
            found[name] = thresholds.curve(chance, targets(part) == positive)
    return found
