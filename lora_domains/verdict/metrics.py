"""Metrics: one object for each, with everything a verdict and a report need of it.

A ``Metric`` knows the scores it is computed from, its value for one contender with bounds, the
paired comparison of two contenders, which direction is better, and its label. ``METRICS`` holds
them in the order of a report; ``register`` adds one, which is then computed wherever its scores
exist:

    register(ClassMetric("specificity", "specificity", lambda positive: specificity,
                         needs_positive=True))
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats import numbers
from lora_domains.stats.bootstrap import FloatArray, Statistic, bootstrap
from lora_domains.stats.classes import (
    ClassFigure,
    class_counts,
    label_counts,
    macro,
    matthews,
    micro,
    of_class,
    row_f1,
    span_of_flips,
    span_of_rows,
    total_counts,
)
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_classes,
    compare_f1,
    compare_sums,
    ratio,
)
from lora_domains.stats.intervals import Bounds
from lora_domains.verdict import INFO, metric_info
from lora_domains.verdict.scores import (
    RESAMPLES,
    TARGET,
    Accuracy,
    MeanMetric,
    Metric,
    NatsPerToken,
    Pair,
    RightShare,
    Sample,
    ScoreTable,
    Summed,
)

# ── Kinds of metrics ────────────────────────────────────────────────────────────────────────────


class ShareOfSome(RightShare):
    """The share of right answers (1, else 0) among the items on which some contender has a score.

    For what not every item asks for, such as a number.
    """

    def counted(self, table: ScoreTable) -> ScoreTable:
        (key,) = self.scores
        asked = [any(key in (s or {}) for s in item["scores"].values()) for item in table]
        return table.part(np.flatnonzero(asked))

    def right(self, columns: FloatArray) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = columns[:, 0] == 1
        return right


class Bleu(Metric):
    """BLEU of all answers together (Papineni et al. 2002), from 0 to 1, as sacrebleu computes it.

    From the tokens of answers and references, and the n-grams (1 to 4) that both have. Where no
    reference has as many tokens as the longest n-gram, there is nothing to compute it on.
    """

    @property
    def order(self) -> int:
        """The longest n-grams."""
        return len(self.scores) - 2

    def counted(self, table: ScoreTable) -> ScoreTable:
        lengths = [
            (score or {}).get("reference_words") or 0
            for item in table for score in item["scores"].values()
        ]  # fmt: skip
        enough = max(lengths, default=0) >= self.order
        return table if enough else table.part(np.empty(0, np.intp))

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        summed, statistic = self.summands_of(columns, positive)
        return float(statistic(summed.sum(0)))

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        first, second = (self.summands_of(c, positive)[0] for c in (pair.first, pair.second))
        return compare_sums(first, second, bleu, pair.groups, pair.level)

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        # An answer of w tokens has w - n + 1 n-grams.
        possible = (columns[:, :1] - np.arange(self.order)).clip(0)
        return np.concatenate([columns, possible], axis=1), bleu


def bleu(sums: FloatArray) -> FloatArray:
    """BLEU from sums (…, 2 + 2 k) → (…): tokens of the answers and of the references, common
    n-grams by length, and those of the answers.

    An order without a match counts as half, a quarter, … of one match (sacrebleu's ``exp``).
    """
    order = sums.shape[-1] // 2 - 1
    words, expected = sums[..., 0], sums[..., 1]
    common, possible = sums[..., 2 : 2 + order], sums[..., 2 + order :]
    missed = common == 0
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), common)
    precisions = smoothed / np.where(possible == 0, 1.0, possible)
    brevity = np.exp(np.minimum(0.0, 1 - expected / np.where(words == 0, 1.0, words)))
    scores: FloatArray = brevity * np.exp(np.log(precisions).mean(axis=-1))
    return np.where((possible > 0).all(axis=-1) & common.any(axis=-1), scores, 0.0)


@dataclass(frozen=True)
class ClassMetric(Metric):
    """A figure of a confusion matrix, for tasks with fixed classes."""

    statistic: Callable[[int | None], Statistic]
    """From the number of the positive class: a statistic of sums of ``classes.class_counts``."""
    needs_positive: bool | None = field(default=None, kw_only=True)
    """True: with a positive class only; False: without one only; None: both."""
    compared: Callable[[Pair, int | None], Comparison] | None = field(default=None, kw_only=True)
    """A paired comparison of its own; None: ``compare_classes``."""
    scores: tuple[str, ...] = field(default=(TARGET, "prediction"), kw_only=True)

    def applies(self, labels: Sequence[str], positive: int | None) -> bool:
        return bool(labels) and self.needs_positive in (None, positive is not None)

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        targets, predictions = columns.astype(np.intp).T
        counts = total_counts(targets, predictions, _classes(columns, positive))
        return float(self.statistic(positive)(counts))

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        if self.compared is not None:
            return self.compared(pair, positive)
        targets, first, second = pair.first[:, 0], pair.first[:, 1], pair.second[:, 1]
        statistic = self.statistic(positive)
        least, most = self.range
        return compare_classes(
            targets, first, second, statistic, pair.groups, pair.level, (least - most, most - least)
        )

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        targets, predictions = columns.astype(np.intp).T
        counts = class_counts(targets, predictions, _classes(columns, positive))
        return counts, self.statistic(positive)

    def bounds_of(self, sample: Sample, positive: int | None) -> Bounds:
        pairs, kinds = np.unique(sample.columns, axis=0, return_inverse=True)
        table, statistic = self.summands_of(pairs, positive)
        targets, predictions = pairs.astype(np.intp).T
        times = np.bincount(kinds).astype(np.float64)
        span = span_of_flips(statistic, targets, predictions, _classes(pairs, positive), times)
        least, most = self.range
        return bootstrap(
            statistic, table, kinds=kinds, groups=sample.groups, resamples=RESAMPLES,
            level=sample.level, span=span or most - least, limits=self.range,
        )  # fmt: skip


@dataclass(frozen=True)
class LabelMetric(Metric):
    """A figure of rows that may have several labels, from the counts of each label."""

    statistic: Statistic
    """Of sums of ``classes.label_counts``."""
    scores: tuple[str, ...] = field(default=("predicted",), kw_only=True)

    def _columns(self, table: ScoreTable, contender: str) -> FloatArray | None:
        """The labels of each item and those predicted, (items, 2 labels)."""
        return _with_truth(table, super()._columns(table, contender))

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        return float(self.statistic(label_counts(*_halves(columns)).sum(0)))

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        (truth, first), (_, second) = _halves(pair.first), _halves(pair.second)
        spans = (span_of_rows(self.statistic, truth, predicted) for predicted in (first, second))
        return compare_sums(
            label_counts(truth, first), label_counts(truth, second), self.statistic, pair.groups,
            pair.level, row_f1(truth, second) - row_f1(truth, first), max(spans) or 1.0,
        )  # fmt: skip

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        return label_counts(*_halves(columns)), self.statistic

    def span(self, summed: FloatArray) -> float:
        _, truth, predicted = np.split(summed, 3, axis=1)
        return span_of_rows(self.statistic, truth, predicted) or 1.0


class SubsetAccuracy(RightShare):
    """The share of rows whose labels are all predicted, and no other."""

    def _columns(self, table: ScoreTable, contender: str) -> FloatArray | None:
        return _with_truth(table, super()._columns(table, contender))

    def right(self, columns: FloatArray) -> NDArray[np.bool_]:
        truth, predicted = _halves(columns)
        right: NDArray[np.bool_] = (truth == predicted).all(1)
        return right


class RowF1(MeanMetric):
    """The mean over the rows of the F1 of their labels."""

    def _columns(self, table: ScoreTable, contender: str) -> FloatArray | None:
        columns = _with_truth(table, super()._columns(table, contender))
        return None if columns is None else row_f1(*_halves(columns))[:, None]


@dataclass(frozen=True)
class NumberMetric(Metric):
    """A figure of predicted numbers, from what each adds to sums."""

    adds: Callable[[FloatArray, FloatArray], FloatArray]
    """From the true and the predicted numbers (items,) to what is summed, (items, k)."""
    statistic: Statistic
    """Of these sums."""
    scores: tuple[str, ...] = field(default=("value",), kw_only=True)
    own_unit: bool = field(default=True, kw_only=True)

    def _columns(self, table: ScoreTable, contender: str) -> FloatArray | None:
        """The true number of each item and the predicted one, (items, 2)."""
        return _with_truth(table, super()._columns(table, contender))

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        return float(self.statistic(self.adds(*columns.T).sum(0)))

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        (truth, first), second = pair.first.T, pair.second[:, 1]
        before, after = self.adds(truth, first), self.adds(truth, second)
        nearer, (least, most) = abs(first - truth) - abs(second - truth), self.range
        return compare_sums(
            before, after, self.statistic, pair.groups, pair.level, nearer,
            max(self.span(before), self.span(after)), (least - most, most - least),
        )  # fmt: skip

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        return self.adds(*columns.T), self.statistic

    def span(self, summed: FloatArray) -> float:
        """n times the root mean square of how far the figure moves without one of the items."""
        totals = summed.sum(0)
        moved = self.statistic(totals - summed) - self.statistic(totals)
        return float(np.sqrt(len(summed) * (moved**2).sum())) or 1.0


def _with_truth(table: ScoreTable, predicted: FloatArray | None) -> FloatArray | None:
    """What is to be predicted of each item, and what is, side by side."""
    return None if predicted is None else np.concatenate([table.truth(), predicted], axis=1)


def _halves(columns: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The labels and those predicted, from the columns of a ``LabelMetric``."""
    half = columns.shape[1] // 2
    return columns[:, :half], columns[:, half:]


def _classes(columns: FloatArray, positive: int | None) -> int:
    return int(max(columns.max(), positive or 0)) + 1


# ── Those of the package ────────────────────────────────────────────────────────────────────────


def _compare_recall(pair: Pair, positive: int | None) -> Comparison:
    """Recall is the accuracy among the positives, so the score interval of accuracies holds."""
    targets, first, second = pair.first[:, 0], pair.first[:, 1], pair.second[:, 1]
    here = targets == positive
    if not here.any():
        return compare_classes(
            targets, first, second, _of_positive("recall")(positive), pair.groups, pair.level
        )
    groups = None
    if pair.groups is not None:
        groups = [pair.groups[int(i)] for i in np.flatnonzero(here)]
    return compare_accuracy(first[here] == positive, second[here] == positive, groups, pair.level)


def _compare_f1(pair: Pair, positive: int | None) -> Comparison:
    targets, first, second = pair.first[:, 0], pair.first[:, 1], pair.second[:, 1]
    return compare_f1(targets, first, second, positive, pair.groups, pair.level)


def _of_positive(figure: ClassFigure) -> Callable[[int | None], Statistic]:
    def statistic(positive: int | None) -> Statistic:
        if positive is None:
            raise ValueError(f"{figure} expects a positive class; found none.")
        return of_class(figure, positive)

    return statistic


METRICS: dict[str, Metric] = {}
"""By name, in the order of a report."""


def register(metric: Metric) -> None:
    """Add ``metric`` to ``METRICS`` and ``INFO``; raises ValueError where the name is taken."""
    if metric.name in METRICS:
        raise ValueError(f"register expects a new name; there is a metric {metric.name!r} already.")
    METRICS[metric.name] = INFO[metric.name] = metric


def metric_named(name: str) -> Metric:
    """The metric called ``name``; raises UsageError where there is none."""
    return METRICS[metric_info(name).name]


def reported(labels: Sequence[str], positive: int | None) -> list[Metric]:
    """The metrics of a task with these labels; each is reported where its scores exist."""
    return [metric for metric in METRICS.values() if metric.applies(labels, positive)]


def _add(kind: Callable[..., Metric], name: str, *computed: Any, **options: Any) -> None:
    """Register a metric that ``INFO`` describes."""
    info = INFO[name]
    register(kind(
        name, info.label, *computed, higher_is_better=info.higher_is_better, nats=info.nats,
        own_unit=info.own_unit, **options,
    ))  # fmt: skip


_add(Accuracy, "accuracy", (TARGET, "prediction"))
_add(ClassMetric, "macro_f1", lambda _: macro("f1"),
     compared=lambda pair, _: _compare_f1(pair, None))  # fmt: skip
_add(ClassMetric, "precision", _of_positive("precision"), needs_positive=True)
_add(ClassMetric, "recall", _of_positive("recall"), needs_positive=True, compared=_compare_recall)
_add(ClassMetric, "f1", _of_positive("f1"), needs_positive=True, compared=_compare_f1)
_add(ClassMetric, "macro_precision", lambda _: macro("precision"), needs_positive=False)
_add(ClassMetric, "balanced_accuracy", lambda _: macro("recall"))
_add(ClassMetric, "mcc", lambda _: matthews, limits=(-1.0, 1.0))
_add(LabelMetric, "micro_f1", micro("f1"))
_add(LabelMetric, "label_macro_f1", macro("f1"))
_add(LabelMetric, "micro_precision", micro("precision"))
_add(LabelMetric, "micro_recall", micro("recall"))
_add(RowF1, "row_f1", ("predicted",))
_add(SubsetAccuracy, "subset_accuracy", ("predicted",))
_add(NumberMetric, "mae", numbers.absolute, ratio, limits=(0.0, math.inf))
_add(NumberMetric, "rmse", numbers.squared, numbers.root, limits=(0.0, math.inf))
_add(NumberMetric, "r2", numbers.moments, numbers.explained, limits=(-math.inf, 1.0))
_add(NumberMetric, "spearman", numbers.ranks, numbers.correlation, limits=(-1.0, 1.0))
_add(MeanMetric, "loss", ("nll",))
_add(MeanMetric, "win_rate", ("won",))
_add(ShareOfSome, "ranked", ("ranked",))
_add(MeanMetric, "margin", ("margin",), limits=(-math.inf, math.inf))
_add(MeanMetric, "token_f1", ("f1",))
_add(MeanMetric, "exact_match", ("exact",))
_add(MeanMetric, "rouge_l", ("rouge_l",))
_add(Bleu, "bleu", ("words", "reference_words", "match_1", "match_2", "match_3", "match_4"))
_add(MeanMetric, "chrf", ("chrf",))
_add(ShareOfSome, "number_match", ("number",))
_add(MeanMetric, "judge", ("judge",))
_add(NatsPerToken, "nats_per_token", ("nats", "tokens"))
