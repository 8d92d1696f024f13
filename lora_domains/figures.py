"""From per-item scores to figures, comparisons, gates and the verdict. No torch.

An adapter's ``items.jsonl`` holds everything this file reads, so a report can be rebuilt, or
checked, without a model. One item is one JSON object:

    {"set": "test" | "train" | "general" | "text", "id": "test:17", "digest": …, "target": 1,
     "group": …, "slices": {…}, "suite": …, "scores": {"base": {…}, "adapter": {…}, NAME: {…}}}

where a contender's score holds ``prediction``, ``nll``, ``confidence``, ``brier`` (choices),
``f1``, ``exact`` (generation), ``nats`` and ``tokens`` (all but some baselines), ``kl`` (text).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any

import numpy as np

from lora_domains import gates as rules
from lora_domains.domain import Gates
from lora_domains.gates import GateResult
from lora_domains.statistics import (
    Bounds,
    Comparison,
    bootstrap_sums,
    compare_accuracy,
    compare_f1,
    compare_means,
    compare_sums,
    difference_bounds,
    wilson,
)

Items = Sequence[Mapping[str, Any]]
Array = np.ndarray
CONTENDERS = ("base", "adapter")
LOWER_IS_BETTER = {"loss", "nats_per_token"}
# Metrics that are the mean of one score, and that score.
MEANS = {"loss": "nll", "token_f1": "f1", "exact_match": "exact"}


class Rows(list[Mapping[str, Any]]):
    """Items of one set; each column is read from them once, however many figures need it."""

    def __init__(self, items: Items) -> None:
        super().__init__(items)
        self.scores: dict[str, list[Mapping[str, float]]] = {}
        self.columns: dict[tuple[str, str], Array] = {}
        self.grouped = any(item.get("group") is not None for item in items)


def chosen(items: Items, field: str, wanted: str) -> Rows:
    """The items whose ``field`` is ``wanted``."""
    return Rows([item for item in items if item.get(field) == wanted])


def column(items: Items, contender: str, key: str) -> Array:
    """One number per item of one contender; NaN where it has none."""
    rows = items if isinstance(items, Rows) else Rows(items)
    if (contender, key) not in rows.columns:
        if contender not in rows.scores:
            rows.scores[contender] = [item["scores"].get(contender, {}) for item in rows]
        scores = rows.scores[contender]
        try:
            # Almost always every item has it, and this is several times faster.
            read = np.fromiter(map(itemgetter(key), scores), float, len(scores))
        except KeyError:
            read = np.array([score.get(key, np.nan) for score in scores], float)
        rows.columns[contender, key] = read
    return rows.columns[contender, key]


def targets(items: Items) -> Array:
    """The true class of each item."""
    rows = items if isinstance(items, Rows) else Rows(items)
    if ("", "target") not in rows.columns:
        rows.columns["", "target"] = np.array([item["target"] for item in rows], float)
    return rows.columns["", "target"]


def baselines(items: Items) -> list[str]:
    """The contenders other than base and adapter, in the order they were scored."""
    return [name for name in (items[0]["scores"] if items else {}) if name not in CONTENDERS]


# ── One metric: its value for a contender, and two contenders compared on it ────────────────────


def metrics_of(kind: str, positive: int | None) -> dict[str, str]:
    """Metrics reported for a task, each with the score it is made from."""
    if kind == "classification":
        names = {"accuracy": "prediction", "macro_f1": "prediction"}
        if positive is not None:
            names |= dict.fromkeys(("precision", "recall", "f1"), "prediction")
        else:
            names |= dict.fromkeys(("macro_precision", "macro_recall"), "prediction")
        return names | {"loss": "nll", "nats_per_token": "nats"}
    if kind == "multiple_choice":
        return {"accuracy": "prediction", "loss": "nll", "nats_per_token": "nats"}
    if kind == "generation":
        return {"token_f1": "f1", "exact_match": "exact", "nats_per_token": "nats"}
    return {"nats_per_token": "nats"}


def value(metric: str, items: Items, contender: str, positive: int | None) -> float | None:
    """``metric`` of one contender over ``items``; None where it was not scored on it."""
    parts = _parts(metric, items, contender, positive)
    return None if parts is None else float(_from_sums(parts.sum(axis=0)[None])[0])


def comparison(
    metric: str, items: Items, first: str, second: str, positive: int | None
) -> Comparison | None:
    """``second`` minus ``first`` on the same items, with bounds; None where one has no score."""
    one, two = (_parts(metric, items, name, positive) for name in (first, second))
    if one is None or two is None:
        return None
    groups = _groups(items)
    if metric in MEANS:
        better = metric not in LOWER_IS_BETTER
        return compare_means(one[:, 0], two[:, 0], groups, better)
    if metric == "nats_per_token":
        fewer = one[:, 0] / one[:, 1].clip(1) - two[:, 0] / two[:, 1].clip(1)
        return compare_sums(_from_sums, one, two, groups, fewer)
    truth = targets(items)
    before, after = (column(items, name, "prediction") for name in (first, second))
    if metric == "accuracy":
        return compare_accuracy(before == truth, after == truth, groups)
    if metric in ("f1", "macro_f1"):
        only = positive if metric == "f1" else None
        return compare_f1(truth, before, after, only, groups)
    if metric == "recall" and (truth == positive).any():
        # Recall is an accuracy among the positives, so the score interval for accuracies holds.
        here = truth == positive
        part = None if groups is None else [g for g, h in zip(groups, here, strict=True) if h]
        return compare_accuracy(before[here] == positive, after[here] == positive, part)
    return compare_sums(_from_sums, one, two, groups)


def _parts(metric: str, items: Items, contender: str, positive: int | None) -> Array | None:
    """The columns whose sums give ``metric`` by ``_from_sums``; None where there is no score.

    For c classes (one, unless it is a macro mean) numerators, denominators and a 1 for each item
    of the class: shape (items, 3 c).
    """
    ones = np.ones(len(items), int)
    if not items:
        return None
    if metric in MEANS:
        found = column(items, contender, MEANS[metric])
        return None if np.isnan(found).any() else np.stack([found, ones, ones], axis=1)
    if metric == "nats_per_token":
        nats, tokens = (column(items, contender, key) for key in ("nats", "tokens"))
        missing = np.isnan(nats).any() or np.isnan(tokens).any()
        return None if missing else np.stack([nats, tokens, ones], axis=1)
    truth, said = targets(items), column(items, contender, "prediction")
    if np.isnan(said).any():
        return None
    if metric == "accuracy":
        return np.stack([(truth == said).astype(int), ones, ones], axis=1)
    # Macro means run over the classes among the references; what has no denominator is 0.
    macro = metric.startswith("macro_")
    classes = np.unique(truth) if macro else np.array([positive])
    asked, chose = (side[:, None] == classes for side in (truth, said))
    hits = asked & chose
    over, under = {
        "precision": (hits, chose),
        "recall": (hits, asked),
        "f1": (2 * hits, asked.astype(int) + chose),
    }[metric.removeprefix("macro_")]
    wanted = asked if macro else np.ones_like(asked)
    return np.concatenate([over, under, wanted], axis=1, dtype=int)


def _from_sums(sums: Array) -> Array:
    """``metric`` from sums of its parts, (r, 3 c) → (r,)."""
    over, under, wanted = np.split(sums, 3, axis=1)
    scores = over / np.maximum(under, 1)
    found: Array = (scores * (wanted > 0)).sum(axis=1) / np.maximum((wanted > 0).sum(axis=1), 1)
    return found


def _groups(items: Items) -> list[Any] | None:
    rows = items if isinstance(items, Rows) else Rows(items)
    if not rows.grouped:
        return None
    # A row without a group stands alone.
    return [g if (g := item.get("group")) is not None else f"\0{i}" for i, item in enumerate(rows)]


def _bounds(metric: str, items: Items, contender: str, positive: int | None) -> Bounds:
    parts = _parts(metric, items, contender, positive)
    assert parts is not None
    if metric == "accuracy" and _groups(items) is None:
        return wilson(float(parts[:, 0].sum()), len(parts))
    return bootstrap_sums(_from_sums, parts, _groups(items), resamples=1000)


# ── The whole of one adapter ────────────────────────────────────────────────────────────────────


def summarise(
    items: Items,
    *,
    kind: str,
    metric: str,
    labels: Sequence[str],
    positive: str | None,
    gates: Gates,
    leaks: Mapping[str, Any],
    base_changed: bool,
    largest_move: float,
    knowledge: str = "questions",
) -> dict[str, Any]:
    """Every figure, gate and the verdict of one adapter, as the card holds them.

    ``knowledge`` says how the base's general knowledge is asked: by "questions", by "masked tokens"
    (an encoder), or by "nothing" (one without a masked-token head).
    """
    test, train, general, text = (
        chosen(items, "set", name) for name in ("test", "train", "general", "text")
    )
    index = labels.index(positive) if positive is not None else None
    scores = {
        name: fields
        for name in metrics_of(kind, index)
        if (fields := _with_baselines(name, test, index))
    }
    results = [
        _gain(metric, test, index),
        *_kept(knowledge, general, text, gates),
        *_positive_gates(test, index, gates),
        *([_overfit(metric, train, test, index, gates)] if train else []),
        rules.leaks(int(leaks["exact"]), int(leaks["near"])),
        rules.frozen(base_changed),
        rules.alive(largest_move),
    ]
    summary: dict[str, Any] = {
        "domain_scores": scores,
        "general": _general(general, text),
        "slices": _slices(metric, test, index),
        "gates": [asdict(result) for result in results],
        "verdict": rules.verdict(results),
    }
    if "parent" in baselines(test):
        summary["over_parent"] = {name: _over_parent(name, test, index) for name in scores}
    if kind == "classification":
        summary["confusion"] = confusion(test, labels)
        summary["per_class"] = per_class(test, labels)
    if kind in ("classification", "multiple_choice"):
        summary["calibration"] = calibration(test)
    return summary


def _with_baselines(metric: str, items: Items, positive: int | None) -> dict[str, Any]:
    """A comparison as a report holds it; nothing where base or adapter has no such score."""
    made = comparison(metric, items, "base", "adapter", positive)
    if made is None:
        return {}
    values = {name: value(metric, items, name, positive) for name in baselines(items)}
    fields = {k: _finite(v) for k, v in asdict(made).items()}
    return fields | {"baselines": {k: v for k, v in values.items() if v is not None}}


def _over_parent(metric: str, items: Items, positive: int | None) -> dict[str, Any]:
    """The adapter against the one it went on from, on the same items."""
    made = comparison(metric, items, "parent", "adapter", positive)
    assert made is not None
    fields = {k: _finite(v) for k, v in asdict(made).items()}
    return {"parent": fields.pop("base"), **fields}


def _finite(number: float | None) -> float | None:
    """``number``, or None where JSON has no word for it (one item has infinite bounds)."""
    return number if number is not None and math.isfinite(number) else None


def best_baseline(metric: str, items: Items, positive: int | None) -> str | None:
    """The strongest baseline on ``metric``; None where none was scored on it."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    scored = [(sign * v, name) for name in baselines(items)
              if (v := value(metric, items, name, positive)) is not None]  # fmt: skip
    return max(scored)[1] if scored else None


def _gain(metric: str, items: Items, positive: int | None) -> GateResult:
    over_base = comparison(metric, items, "base", "adapter", positive)
    assert over_base is not None
    rival = best_baseline(metric, items, positive)
    over_rival = comparison(metric, items, rival, "adapter", positive) if rival else None
    return rules.gain(
        over_base,
        over_rival,
        metric,
        (rival or "best baseline"),
        higher_is_better=metric not in LOWER_IS_BETTER,
    )


def _kept(knowledge: str, general: Items, text: Items, gates: Gates) -> list[GateResult]:
    """The gates on general knowledge: retention and drift."""
    if knowledge == "nothing":
        why = "The base has no masked-token head: it gives no probabilities that could be compared."
        return [
            rules.not_applicable("retention", "general knowledge is kept", gates.retention, why),
            rules.not_applicable("drift", "KL from base to adapter", gates.drift, why),
        ]
    if knowledge == "masked tokens":
        nats = comparison("nats_per_token", text, "base", "adapter", None)
        assert nats is not None
        kept = [rules.masked_retention(nats, gates.retention)]
    else:
        kept = [_retention(general, gates)] if general else []
    return kept + ([_drift(text, gates)] if text else [])


def _retention(general: Items, gates: Gates) -> GateResult:
    pooled = comparison("accuracy", general, "base", "adapter", None)
    assert pooled is not None
    return rules.retention(pooled, gates.retention)


def _kl(text: Items) -> tuple[float, Bounds]:
    kl, tokens = column(text, "adapter", "kl"), column(text, "adapter", "tokens")
    parts = np.stack([kl, tokens, np.ones(len(text))], axis=1)
    return float(_from_sums(parts.sum(axis=0)[None])[0]), bootstrap_sums(_from_sums, parts)


def _drift(text: Items, gates: Gates) -> GateResult:
    kl, bounds = _kl(text)
    return rules.drift(kl, bounds, len(text), gates.drift)


def _positive_gates(test: Items, positive: int | None, gates: Gates) -> list[GateResult]:
    if positive is None:
        return []
    truth = targets(test) == positive
    said = column(test, "adapter", "prediction") == positive
    hits, missed, alarms = (int(x.sum()) for x in (truth & said, truth & ~said, ~truth & said))
    return [
        rules.recall(hits, missed, gates.recall),
        rules.precision(hits, alarms, gates.precision),
    ]


def _overfit(
    metric: str, train: Items, test: Items, positive: int | None, gates: Gates
) -> GateResult:
    scores = [value(metric, part, "adapter", positive) for part in (train, test)]
    first, second = (0.0 if s is None else s for s in scores)
    bounds = [_bounds(metric, part, "adapter", positive) for part in (train, test)]
    if metric in LOWER_IS_BETTER:
        first, second, bounds = second, first, bounds[::-1]
    gap = difference_bounds(first, bounds[0], second, bounds[1])
    return rules.overfit(first, second, gap, len(test), gates.overfit)


def _general(general: Items, text: Items) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for suite in dict.fromkeys(item["suite"] for item in general):
        found[suite] = _with_baselines("accuracy", chosen(general, "suite", suite), None)
    if general:
        found["pooled"] = _with_baselines("accuracy", general, None)
    if text:
        found["nats"] = _with_baselines("nats_per_token", text, None)
        kl, bounds = _kl(text)
        low, high = map(_finite, bounds)
        found["kl"] = {"general": kl, "lower": low, "upper": high}
    return found


def _slices(metric: str, test: Items, positive: int | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for item in test for name in item.get("slices") or {}):
        found[name] = {}
        for part in sorted({str(item["slices"][name]) for item in test}):
            rows = Rows([item for item in test if str(item["slices"][name]) == part])
            found[name][part] = {metric: _with_baselines(metric, rows, positive)}
    return found


def confusion(items: Items, labels: Sequence[str]) -> dict[str, Any]:
    """Counts of (true, predicted), rows being true labels, for base and adapter."""
    tables = {}
    for name in CONTENDERS:
        table = np.zeros((len(labels), len(labels)), dtype=int)
        said = column(items, name, "prediction").astype(int)
        np.add.at(table, (targets(items).astype(int), said), 1)
        tables[name] = table.tolist()
    return {"labels": list(labels), **tables}


def per_class(items: Items, labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class for the adapter, and recall's lower bound."""
    truth, said = targets(items), column(items, "adapter", "prediction")
    found = {}
    for index, label in enumerate(labels):
        hits, support = (int(x.sum()) for x in ((truth == index) & (said == index), truth == index))
        row: dict[str, Any] = {
            name: value(name, items, "adapter", index) for name in ("precision", "recall", "f1")
        }
        found[label] = row | {"support": support, "recall_lower": wilson(hits, support).lower}
    return found


def calibration(items: Items) -> dict[str, Any]:
    """Expected calibration error over 15 equal-width bins (Guo et al. 2017) and Brier score.

    The Brier score is the mean squared distance of the label probabilities from the truth
    (Brier 1950): 0 is best, 2 worst.
    """
    confidence = column(items, "adapter", "confidence")
    right = column(items, "adapter", "prediction") == targets(items)
    # Bins are closed above, as in ``metrics.expected_calibration_error``.
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    ece = sum(
        abs(float(right[bins == b].mean() - confidence[bins == b].mean()))
        * float((bins == b).mean())
        for b in np.unique(bins)
    )
    return {"ece": ece, "brier": float(column(items, "adapter", "brier").mean())}
