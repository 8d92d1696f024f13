"""Everything that a card holds of one evaluated adapter, from its per-item scores. No torch.

``card.schema.json`` describes every key of an entry. Among them are

    "calibration": {…, "bounds": {"ece" | "brier": {"lower", "upper"}},
                    "risk_coverage": [{"confidence", "coverage", "risk", "upper"}]}
    "curve": {"positive", "targets": {"recall" | "precision": …}, "threshold",
              "test" and "validation": [{"threshold", "precision", "recall"}],
              "prevalence": {"test", "declared", "points": [{"prevalence", "precision", "lower",
                             "upper"}]}}    precision where another share of rows is positive
    "memorisation": {"auc", "lower", "upper", "loss", "calibrated", "train", "test"}
                    "auc" is the larger of the two measured (Evidence.membership)
    "seeds": {METRIC: {…}}    where several seeds were compared; see over_seeds

Figures beside the gates always have 95 % bounds; gates pass at the level of the test set's budget
(``ledger``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from lora_domains.stats.classes import by_class, label_counts
from lora_domains.stats.comparisons import Comparison
from lora_domains.stats.seeds import seed_variance
from lora_domains.stats.shares import precision_at, share_of
from lora_domains.stats.thresholds import curve
from lora_domains.verdict import CONTENDERS
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import judge_all
from lora_domains.verdict.metrics import METRICS, reported
from lora_domains.verdict.rules import finite, verdict
from lora_domains.verdict.scores import Metric, ScoreTable

PREVALENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""Shares of positives at which precision is restated."""


def summarise(
    evidence: Evidence,
    gates: Mapping[str, Any],
    threshold: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Every figure, gate and the verdict of one adapter, as its card holds them.

    The metric of the domain decides; others are reported where their scores exist. ``gates`` are
    the thresholds by gate, ``threshold`` what validation rows chose for the positive class
    (``curve``). Raises ValueError where an item lacks a score that a gate needs.
    """
    scores = every_metric(evidence.test, evidence.labels, evidence.positive)
    results = judge_all(evidence, gates)
    summary = {
        "domain_scores": scores,
        "general": _general(evidence),
        "slices": _slices(evidence),
        "gates": [asdict(result) for result in results],
        "verdict": verdict(results),
    }
    return summary | _details(evidence, list(scores), threshold or {})


def _details(
    evidence: Evidence, metrics: Sequence[str], threshold: Mapping[str, Any]
) -> dict[str, Any]:
    """What only some adapters have, by the key of a card."""
    test, labels, positive = evidence.test, evidence.labels, evidence.positive
    details: dict[str, Any] = {}
    if 0 < len(evidence.without_near_leaks) < len(test):
        details["without_near_leaks"] = every_metric(evidence.without_near_leaks, labels, positive)
    if "parent" in test.baselines():
        over = {n: _over_parent(METRICS[n], test, positive) for n in metrics}
        details["over_parent"] = {name: fields for name, fields in over.items() if fields}
    if test.gives("adapter", "predicted"):
        details["per_class"] = per_label(test, labels, threshold.get("by_label") or {})
    elif labels and test.gives("adapter", "prediction"):
        details["confusion"] = confusion(test, labels)
        details["per_class"] = per_class(test, labels)
    if evidence.calibration:
        details["calibration"] = evidence.calibration
    if positive is not None:
        chosen = {"positive": labels[positive], **threshold}
        details["curve"] = chosen | _curves(evidence) | _by_prevalence(evidence, positive)
    if memorisation := _memorisation(evidence):
        details["memorisation"] = memorisation
    return details


def comparison_fields(comparison: Comparison) -> dict[str, Any]:
    """A comparison as a report holds it; its level is 95 % there."""
    return {k: finite(v) for k, v in asdict(comparison).items() if k != "level"}


def confusion(test: ScoreTable, labels: Sequence[str]) -> dict[str, Any]:
    """Counts of (true, predicted), a row for each true label, for base and adapter."""
    tables = {}
    for name in CONTENDERS:
        table = np.zeros((len(labels), len(labels)), dtype=int)
        np.add.at(table, (test.targets().astype(int), _predictions(test, name)), 1)
        tables[name] = table.tolist()
    return {"labels": list(labels), **tables}


def per_class(test: ScoreTable, labels: Sequence[str]) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class for the adapter, and recall's lower bound."""
    targets, predicted = test.targets().astype(int), _predictions(test, "adapter")
    every = np.arange(len(labels))
    return _by_label(test, labels, targets[:, None] == every, predicted[:, None] == every)


def per_label(
    test: ScoreTable, labels: Sequence[str], thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """``per_class`` where rows may have several labels, with the thresholds that were chosen."""
    found = _by_label(test, labels, test.truth() > 0, test.column("adapter", "predicted") > 0)
    return {
        label: figures | ({"threshold": thresholds[label]} if label in thresholds else {})
        for label, figures in found.items()
    }


def _by_label(
    test: ScoreTable, labels: Sequence[str], true: np.ndarray, predicted: np.ndarray
) -> dict[str, Any]:
    """Figures of each label, from two arrays (items, labels)."""
    counts = label_counts(true.astype(float), predicted.astype(float)).sum(0)
    support = np.split(counts.astype(int), 3)[1]
    precision, recall, f1 = (by_class(figure, counts) for figure in ("precision", "recall", "f1"))
    return {
        label: {
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(f1[i]),
            "support": int(support[i]),
            "recall_lower": _recall_lower(test, true[:, i], predicted[:, i]),
        }
        for i, label in enumerate(labels)
    }


def _recall_lower(test: ScoreTable, true: np.ndarray, predicted: np.ndarray) -> float:
    inside, every = np.flatnonzero(true), test.groups()
    groups = None if every is None else [every[i] for i in inside]
    return share_of(predicted[inside], groups).bounds.lower


def _predictions(test: ScoreTable, contender: str) -> np.ndarray:
    return test.column(contender, "prediction").astype(int)


def _scored(metric: Metric, table: ScoreTable, positive: int | None) -> dict[str, Any]:
    """Base, adapter and baselines on a metric; empty where base or adapter has no such score."""
    comparison = metric.compare(table, "base", "adapter", positive)
    if comparison is None:
        return {}
    values = {name: metric.value(table, name, positive) for name in table.baselines()}
    known = {name: value for name, value in values.items() if value is not None}
    return comparison_fields(comparison) | {"baselines": known}


def every_metric(
    table: ScoreTable, labels: Sequence[str], positive: int | None
) -> dict[str, dict[str, Any]]:
    """Base, adapter and baselines on every metric that has scores."""
    scored = {m.name: _scored(m, table, positive) for m in reported(labels, positive)}
    return {name: fields for name, fields in scored.items() if fields}


WITH_SLOPE = ("lower", "upper", "sd_seed", "se_items", "se_residual")
"""Figures of ``seed_variance`` that need the slope of the metric."""


def over_seeds(
    tables: Sequence[ScoreTable], metrics: Sequence[Metric], positive: int | None, rows: str
) -> dict[str, dict[str, Any]]:
    """Trainings that differ in their seed, each with its scores on the same items, by metric.

    The figures of ``seed_variance``, the metric of the base, and of the adapter of each training.
    ``rows`` says which rows the items are: "validation" or "test". Bounds wider than the range of
    the metric are left out, and what they were made of: they come of a metric that has no slope
    where it is, such as MCC where all rows get one label.
    """
    found = {}
    for metric in metrics:
        parts = [
            [metric.contributions(table, who, positive) for who in CONTENDERS] for table in tables
        ]
        gains = [after - before for before, after in parts
                 if before is not None and after is not None]  # fmt: skip
        if len(gains) == len(tables):
            fields, (low, high) = seed_variance(np.stack(gains)), metric.range
            if fields["upper"] - fields["difference"] > high - low:
                fields |= dict.fromkeys(WITH_SLOPE)
            found[metric.name] = {
                **fields,
                "rows": rows,
                "base": metric.value(tables[0], "base", positive),
                "adapter": [metric.value(table, "adapter", positive) for table in tables],
            }
    return found


def _over_parent(metric: Metric, test: ScoreTable, positive: int | None) -> dict[str, Any]:
    """The adapter against the one that it continues from; empty where that has no such score."""
    comparison = metric.compare(test, "parent", "adapter", positive)
    if comparison is None:
        return {}
    fields = comparison_fields(comparison)
    return {"parent": fields.pop("base"), **fields}


def _general(evidence: Evidence) -> dict[str, Any]:
    """Accuracy on each suite of probes and on all; nats and KL per token of general text."""
    general, text = evidence.general, evidence.text
    accuracy, nats = METRICS["accuracy"], METRICS["nats_per_token"]
    suites = np.array([item["suite"] for item in general])
    fields: dict[str, Any] = {
        suite: _scored(accuracy, general.part(np.flatnonzero(suites == suite)), None)
        for suite in dict.fromkeys(suites.tolist())
    }
    if len(general):
        fields["pooled"] = _scored(accuracy, general, None)
    fields["nats"] = _scored(nats, text, None)
    if text.scored("adapter", "kl"):
        kl = evidence.kl(0.95)
        lower, upper = map(finite, kl.bounds)
        fields["kl"] = {"general": kl.observed, "lower": lower, "upper": upper}
    return {name: figures for name, figures in fields.items() if figures}


def _slices(evidence: Evidence) -> dict[str, Any]:
    """The domain metric on each value of each column that rows are sliced by."""
    test, metric = evidence.test, evidence.metric
    columns: dict[str, Any] = {}
    for column in test.slice_columns():
        values = np.array(test.slice_values(column))
        columns[column] = {
            value: {
                metric.name: _scored(
                    metric, test.part(np.flatnonzero(values == value)), evidence.positive
                )
            }
            for value in sorted(set(values.tolist()))
        }
    return columns


def _memorisation(evidence: Evidence) -> dict[str, Any] | None:
    """The larger AUC with its bounds, and each that could be measured."""
    measured = evidence.membership(0.95)
    if not measured:
        return None
    largest = max(measured.values(), key=lambda one: one.observed)
    each = {name: one.observed for name, one in measured.items()}
    rows = {"train": len(evidence.train), "test": len(evidence.test)}
    return {"auc": largest.observed, **largest.bounds._asdict(), **each, **rows}


def _curves(evidence: Evidence) -> dict[str, Any]:
    """Precision against recall of the adapter, on test rows and on those that chose."""
    curves = {}
    for name, table in (
        ("test", evidence.test),
        ("validation", evidence.items.where("set", "validation")),
    ):
        if table.scored("adapter", "positive"):
            positives = table.targets() == evidence.positive
            curves[name] = curve(table.column("adapter", "positive"), positives)
    return curves


def _by_prevalence(evidence: Evidence, positive: int) -> dict[str, Any]:
    """Precision where other shares of the rows are positive; empty without a row of each class."""
    test = evidence.test
    true, predicted = test.targets() == positive, _predictions(test, "adapter") == positive
    if not 0 < true.sum() < len(true):
        return {}
    every = test.groups()
    recall, alarms = (
        share_of(predicted[rows], None if every is None else [every[i] for i in rows])
        for rows in (np.flatnonzero(true), np.flatnonzero(~true))
    )
    own, declared = float(true.mean()), evidence.prevalence
    points = []
    for share in sorted({*PREVALENCES, own, *([] if declared is None else [declared])}):
        precision, bounds = precision_at(recall, alarms, share)
        points.append({"prevalence": share, "precision": precision, **bounds._asdict()})
    return {"prevalence": {"test": own, "declared": declared, "points": points}}
