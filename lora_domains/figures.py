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
from typing import Any

import numpy as np

from lora_domains import gates as rules
from lora_domains.domain import Gates
from lora_domains.gates import GateResult
from lora_domains.statistics import (
    Bounds,
    Comparison,
    compare,
    compare_accuracy,
    compare_f1,
    compare_means,
    difference_bounds,
    paired_bootstrap,
    wilson,
)

Items = Sequence[Mapping[str, Any]]
Array = np.ndarray
CONTENDERS = ("base", "adapter")
LOWER_IS_BETTER = {"loss", "nats_per_token"}


def chosen(items: Items, **wanted: str) -> list[Mapping[str, Any]]:
    """The items whose fields equal ``wanted``."""
    return [item for item in items if all(item.get(k) == v for k, v in wanted.items())]


def column(items: Items, contender: str, key: str) -> Array:
    """One number per item of one contender; NaN where it has none."""
    return np.array([item["scores"].get(contender, {}).get(key, np.nan) for item in items], float)


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
    return _evaluated(metric, _columns(metric, items, contender), positive)


def comparison(
    metric: str, items: Items, first: str, second: str, positive: int | None
) -> Comparison | None:
    """``second`` minus ``first`` on the same items, with bounds; None where one has no score."""
    one, two = (_columns(metric, items, name) for name in (first, second))
    if np.isnan(one).any() or np.isnan(two).any() or not len(one):
        return None
    groups = _groups(items)
    if metric == "accuracy":
        return compare_accuracy(one[:, 0] == one[:, 1], two[:, 0] == two[:, 1], groups)
    if metric in ("f1", "macro_f1"):
        only = positive if metric == "f1" else None
        return compare_f1(one[:, 0], one[:, 1], two[:, 1], only, groups)
    if metric == "recall" and (one[:, 0] == positive).any():
        # Recall is an accuracy among the positives, so the score interval for accuracies holds.
        here = one[:, 0] == positive
        part = None if groups is None else [g for g, h in zip(groups, here, strict=True) if h]
        return compare_accuracy(one[here, 1] == positive, two[here, 1] == positive, part)
    if metric in ("loss", "token_f1", "exact_match"):
        return compare_means(one[:, 0], two[:, 0], groups, metric not in LOWER_IS_BETTER)
    better = None
    if metric == "nats_per_token":
        better = one[:, 0] / one[:, 1].clip(1) - two[:, 0] / two[:, 1].clip(1)

    def score(indices: Array, columns: Array) -> float:
        found = _evaluated(metric, columns[indices], positive)
        return 0.0 if found is None else found

    return compare(score, one, two, groups, better)


def _columns(metric: str, items: Items, contender: str) -> Array:
    """What ``metric`` is computed from, (items, 2) or (items, 1)."""
    if metric in ("loss", "token_f1", "exact_match"):
        key = {"loss": "nll", "token_f1": "f1", "exact_match": "exact"}[metric]
        return column(items, contender, key)[:, None]
    if metric == "nats_per_token":
        pair = [column(items, contender, key) for key in ("nats", "tokens")]
        return np.stack(pair, axis=1) if items else np.empty((0, 2))
    targets = np.array([item["target"] for item in items], float)
    return np.stack([targets, column(items, contender, "prediction")], axis=1)


def _evaluated(metric: str, columns: Array, positive: int | None) -> float | None:
    if not len(columns) or np.isnan(columns).any():
        return None
    if metric in ("loss", "token_f1", "exact_match"):
        return float(columns[:, 0].mean())
    if metric == "nats_per_token":
        return float(columns[:, 0].sum() / max(columns[:, 1].sum(), 1))
    truth, predicted = columns[:, 0].astype(int), columns[:, 1].astype(int)
    if metric == "accuracy":
        return float((truth == predicted).mean())
    size = int(max(truth.max(), predicted.max(), positive or 0)) + 1
    hits, asked, said = (
        np.bincount(labels, minlength=size)
        for labels in (truth[truth == predicted], truth, predicted)
    )
    parts = {"precision": (hits, said), "recall": (hits, asked), "f1": (2 * hits, asked + said)}
    over, under = parts[metric.removeprefix("macro_")]
    # What has no denominator is 0; macro means run over the classes among the references.
    scores = over / np.maximum(under, 1)
    wanted = asked > 0 if metric.startswith("macro_") else np.array([positive])
    return float(scores[wanted].mean())


def _groups(items: Items) -> list[Any] | None:
    groups = [item.get("group") for item in items]
    if not groups or all(group is None for group in groups):
        return None
    # A row without a group stands alone.
    return [g if g is not None else f"\0{i}" for i, g in enumerate(groups)]


def _bounds(metric: str, items: Items, contender: str, positive: int | None) -> Bounds:
    columns = _columns(metric, items, contender)
    if metric == "accuracy" and _groups(items) is None:
        return wilson(float((columns[:, 0] == columns[:, 1]).sum()), len(columns))

    def score(indices: Array) -> float:
        found = _evaluated(metric, columns[indices], positive)
        return 0.0 if found is None else found

    return paired_bootstrap(score, len(columns), _groups(items), resamples=1000)


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
    test, train = chosen(items, set="test"), chosen(items, set="train")
    general, text = chosen(items, set="general"), chosen(items, set="text")
    index = labels.index(positive) if positive is not None else None
    scores = {
        name: _with_baselines(name, test, index)
        for name in metrics_of(kind, index)
        if comparison_possible(name, test, index)
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
    if kind == "classification":
        summary["confusion"] = confusion(test, labels)
        summary["per_class"] = per_class(test, labels)
    if kind in ("classification", "multiple_choice"):
        summary["calibration"] = calibration(test)
    return summary


def comparison_possible(metric: str, items: Items, positive: int | None) -> bool:
    """Whether base and adapter both were scored on ``metric``."""
    return all(value(metric, items, name, positive) is not None for name in CONTENDERS)


def _with_baselines(metric: str, items: Items, positive: int | None) -> dict[str, Any]:
    made = comparison(metric, items, "base", "adapter", positive)
    assert made is not None
    values = {name: value(metric, items, name, positive) for name in baselines(items)}
    fields = {k: _finite(v) for k, v in asdict(made).items()}
    return fields | {"baselines": {k: v for k, v in values.items() if v is not None}}


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

    def per_token(indices: Array) -> float:
        return float(kl[indices].sum() / max(tokens[indices].sum(), 1))

    return per_token(np.arange(len(text))), paired_bootstrap(per_token, len(text))


def _drift(text: Items, gates: Gates) -> GateResult:
    kl, bounds = _kl(text)
    return rules.drift(kl, bounds, len(text), gates.drift)


def _positive_gates(test: Items, positive: int | None, gates: Gates) -> list[GateResult]:
    if positive is None:
        return []
    truth = np.array([item["target"] for item in test]) == positive
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
        found[suite] = _with_baselines("accuracy", chosen(general, suite=suite), None)
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
            rows = [item for item in test if str(item["slices"][name]) == part]
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


def calibration(items: Items) -> dict[str, Any]:
    """Expected calibration error over 15 equal-width bins (Guo et al. 2017) and Brier score.

    The Brier score is the mean squared distance of the label probabilities from the truth
    (Brier 1950): 0 is best, 2 worst.
    """
    confidence = column(items, "adapter", "confidence")
    right = column(items, "adapter", "prediction") == [item["target"] for item in items]
    # Bins are closed above, as in ``metrics.expected_calibration_error``.
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    ece = sum(
        abs(float(right[bins == b].mean() - confidence[bins == b].mean()))
        * float((bins == b).mean())
        for b in np.unique(bins)
    )
    return {"ece": ece, "brier": float(column(items, "adapter", "brier").mean())}
