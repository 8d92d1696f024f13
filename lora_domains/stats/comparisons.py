"""Paired comparisons: base and adapter on the same items, one function for each kind of metric.

Differences are always adapter - base. Bounds are one-sided (``intervals``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import FloatArray, IntArray, Statistic, bootstrap, group_codes
from lora_domains.stats.classes import class_counts, macro, span_of_flips
from lora_domains.stats.intervals import (
    Bounds,
    items_needed_mean,
    items_needed_tango,
    mcnemar,
    tango,
)
from lora_domains.stats.shares import design_effect

K = TypeVar("K")
T = TypeVar("T")


@dataclass(frozen=True)
class Comparison:
    """Base and adapter on the same ``n`` items; the fields are named as in a report.

    ``difference`` is adapter - base, ``lower`` and ``upper`` its one-sided bounds at ``level``.
    ``won`` and ``lost`` count the items on which the adapter did better and worse; ``p`` is the
    exact two-sided test of won against lost. All three are None where an item has no score of its
    own.
    """

    base: float
    adapter: float
    difference: float
    lower: float
    upper: float
    n: int
    won: int | None
    lost: int | None
    p: float | None
    level: float = 0.95

    @property
    def bounds(self) -> Bounds:
        """``lower`` and ``upper``."""
        return Bounds(self.lower, self.upper)


def compare_accuracy(
    correct_base: ArrayLike,
    correct_adapter: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
) -> Comparison:
    """Accuracies on the same n items, from two boolean arrays (n,).

    Bounds by Tango, p by McNemar. Where groups repeat, Tango's counts are first divided by the
    design effect (Rao & Scott 1992, Biometrics 48:577: variance by groups over variance by items),
    and the wider of that interval and a clustered bootstrap is taken: the first is right when few
    items change, the second when there are few groups. p then tests groups, each by its net sign.

    Raises ValueError when the arrays are empty, differ in length or hold other values than right
    and wrong.
    """
    base, adapter = _checked_pair(correct_base, correct_adapter)
    for name, values in (("base", base), ("adapter", adapter)):
        if not np.isin(values, (0.0, 1.0)).all():
            raise ValueError(
                f"compare_accuracy expects right or wrong for each item; {name} holds other values."
            )
    change, n = adapter - base, len(base)
    codes = group_codes(groups, n)
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    bounds = tango(won, lost, n, level)
    if codes is not None:
        effect = design_effect(change, codes)
        scored = tango(won / effect, lost / effect, n / effect, level)
        # Tango's bounds always have a width; those of the bootstrap need no least one here.
        drawn = _bounds_of_mean(change, codes, level, 0.0, (-1.0, 1.0))
        bounds = Bounds(min(scored.lower, drawn.lower), max(scored.upper, drawn.upper))
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, change, codes, level)


def compare_means(
    values_base: ArrayLike,
    values_adapter: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    higher_is_better: bool = True,
    level: float = 0.95,
    share: bool = False,
) -> Comparison:
    """Means of a per-item score (nats, exact match, ROUGE) on the same items, from two arrays (n,).

    Paired bootstrap, clustered where groups repeat. ``higher_is_better`` decides what counts as
    won, never the sign of the difference. ``share`` says that scores lie between 0 and 1, so that
    an item may change by 1; else one is taken to change as far as items did (``size_of``).

    Raises ValueError when the arrays are empty, differ in length or hold a value that is not
    finite.
    """
    base, adapter = _checked_pair(values_base, values_adapter)
    change, n = adapter - base, len(base)
    codes = group_codes(groups, n)
    span = 1.0 if share else size_of(change) or size_of(np.concatenate([base, adapter])) or 1.0
    limits = (-1.0, 1.0) if share else (-math.inf, math.inf)
    bounds = _bounds_of_mean(change, codes, level, span, limits)
    better = change if higher_is_better else -change
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, better, codes, level)


def compare_f1(
    targets: ArrayLike,
    predictions_base: ArrayLike,
    predictions_adapter: ArrayLike,
    positive: int | None = None,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
) -> Comparison:
    """F1 of the ``positive`` class, or macro-F1 over the classes among the targets.

    Arrays as in ``compare_classes``.

    Raises ValueError when the arrays are empty, differ in length, or a target is no class number.
    """
    true = np.asarray(targets, dtype=np.intp)
    if true.ndim != 1 or not len(true) or true.min() < 0:
        raise ValueError(
            "compare_f1 expects three arrays of one length with targets >= 0 (at least one); "
            f"found targets of shape {true.shape}."
        )
    statistic = macro("f1", np.unique(true) if positive is None else [positive])
    return compare_classes(targets, predictions_base, predictions_adapter, statistic, groups, level)


def compare_classes(
    targets: ArrayLike,
    predictions_base: ArrayLike,
    predictions_adapter: ArrayLike,
    statistic: Statistic,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Comparison:
    """Any figure of a confusion matrix, for base and adapter on the same n items.

    Arrays of class numbers >= 0, shape (n,); a prediction of -1 is an answer that names no class.
    ``statistic`` takes sums of ``classes.class_counts``. won and lost count items that became right
    and wrong. ``limits`` is the range of a difference. Paired bootstrap, clustered where groups
    repeat; its least width is that of one flipped item (``classes.span_of_flips``), where that
    moves the figure, else that of a share.

    Raises ValueError when the arrays are empty or differ in length.
    """
    true, base, adapter = (
        np.asarray(labels, dtype=np.intp)
        for labels in (targets, predictions_base, predictions_adapter)
    )
    if not true.ndim == 1 or not true.shape == base.shape == adapter.shape or not len(true):
        raise ValueError(
            "compare_classes expects three arrays of one length, at least one item; "
            f"found shapes {true.shape}, {base.shape}, {adapter.shape}."
        )
    size = int(max(true.max(), base.max(), adapter.max())) + 2
    coded = (true * size + base + 1) * size + adapter + 1
    _, first, kinds = np.unique(coded, return_index=True, return_inverse=True)
    table = np.concatenate(
        [class_counts(true[first], predicted[first], size) for predicted in (base, adapter)], axis=1
    )
    codes = group_codes(groups, len(true))
    half, times = table.shape[1] // 2, np.bincount(kinds).astype(np.float64)
    span = max(
        span_of_flips(statistic, true[first], predicted[first], size, times)
        for predicted in (base, adapter)
    )
    bounds = bootstrap(
        lambda sums: statistic(sums[..., half:]) - statistic(sums[..., :half]),
        table,
        kinds=kinds,
        groups=None if codes is None else codes.tolist(),
        level=level,
        span=span or limits[1],
        limits=limits,
    )
    totals = times @ table
    scores = float(statistic(totals[:half])), float(statistic(totals[half:]))
    better = (adapter == true).astype(np.float64) - (base == true)
    return _comparison(*scores, bounds, len(true), better, codes, level)


def compare_ratios(
    base_columns: ArrayLike,
    adapter_columns: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    better: ArrayLike | None = None,
    level: float = 0.95,
) -> Comparison:
    """One sum over another (nats per token) of base and adapter, from two arrays (n, 2).

    ``better`` (n,) is above 0 where the adapter did better on an item and below where worse;
    without it won, lost and p are None. Paired bootstrap, clustered where groups repeat.

    Raises ValueError when there are no items or their numbers differ.
    """
    base, adapter = (np.asarray(c, dtype=np.float64) for c in (base_columns, adapter_columns))
    n = len(base)
    change = None if better is None else np.asarray(better, dtype=np.float64)
    if (
        n < 1
        or not base.shape == adapter.shape == (n, 2)
        or (change is not None and len(change) != n)
    ):
        raise ValueError(
            "compare_ratios expects two columns for the same items, at least one, and `better` for "
            f"each; found shapes {base.shape} for base and {adapter.shape} for adapter."
        )
    span, limits = _size_of_change(base, adapter), (-math.inf, math.inf)
    return compare_sums(base, adapter, ratio, groups, level, change, span, limits)


def compare_sums(
    base_columns: ArrayLike,
    adapter_columns: ArrayLike,
    statistic: Statistic,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
    better: FloatArray | None = None,
    span: float = 1.0,
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Comparison:
    """A figure that ``statistic`` makes from sums over all items (BLEU), from two arrays (n, k).

    ``better`` (n,) is above 0 where the adapter did better on an item and below where worse;
    without it an item has no score of its own: won, lost and p are None. ``span`` is how far the
    figure would move if every item changed, ``limits`` the range of a difference. Paired bootstrap,
    clustered where groups repeat.

    Raises ValueError when there are no items or their numbers differ.
    """
    base, adapter = (np.asarray(c, dtype=np.float64) for c in (base_columns, adapter_columns))
    if base.ndim != 2 or base.shape != adapter.shape or not len(base):
        raise ValueError(
            "compare_sums expects columns for the same items, at least one; "
            f"found shapes {base.shape} for base and {adapter.shape} for adapter."
        )
    n, size = base.shape
    codes = group_codes(groups, n)
    bounds = bootstrap(
        lambda sums: statistic(sums[..., size:]) - statistic(sums[..., :size]),
        np.concatenate([base, adapter], axis=1),
        groups=None if codes is None else codes.tolist(),
        level=level,
        span=span,
        limits=limits,
    )
    scores = float(statistic(base.sum(0))), float(statistic(adapter.sum(0)))
    return _comparison(*scores, bounds, n, better, codes, level)


def ratio(sums: FloatArray) -> FloatArray:
    """First column over second, (…, 2) → (…); 0 where the second is 0."""
    quotient: FloatArray = sums[..., 0] / np.where(sums[..., 1] == 0, 1.0, sums[..., 1])
    return quotient


def size_of(values: FloatArray) -> float:
    """How far an item is taken to change, from the changes of all: their root mean square."""
    return float(np.sqrt(np.mean(values**2)))


def size_of_ratio(columns: FloatArray) -> float:
    """``size_of`` for one sum over another, from columns (n, 2); 1 where all items are 0."""
    return size_of(columns[:, 0]) / (float(columns[:, 1].mean()) or 1.0) or 1.0


def items_needed(
    comparison: Comparison, threshold: float, level: float | None = None, *, equal: bool = False
) -> int | None:
    """How many items, changing in the same shares, decide at ``threshold`` (``intervals.POWER``).

    ``level`` is that of the bound that decides, by default the comparison's. By Tango's statistic
    where the bounds are Tango's, else by ``items_needed_mean``. None when the difference equals the
    threshold (no number would do) or its bounds are infinite. With ``equal``, as many items change
    as were seen to, but the difference is in truth 0.
    """
    won: float | None
    lost: float | None
    won, lost, n = comparison.won, comparison.lost, comparison.n
    at = level or comparison.level
    if (
        won is not None
        and lost is not None
        and tango(won, lost, n, comparison.level) == comparison.bounds
    ):
        won, lost = [(won + lost) / 2] * 2 if equal else (won, lost)
        return items_needed_tango(won, lost, n, threshold, at)
    difference, (lower, upper) = comparison.difference, comparison.bounds
    centre = difference if equal else 0.0
    bounds = Bounds(lower - centre, upper - centre)
    return items_needed_mean(difference - centre, bounds, n, threshold, comparison.level, at)


def holm(
    tests: Mapping[K, Callable[[float], T]], significant: Callable[[T], bool], error: float = 0.05
) -> dict[K, T]:
    """Each of several tests at the level that Holm's method gives it.

    A test gives its outcome at a level. Of all that are true to their null hypothesis one is called
    significant in a share ``error`` of cases at most, whatever their dependence: of m tests each is
    held to ``error`` / m; those that are significant are set aside, and the others held to a level
    divided among them alone, until none is. Source: Holm (1979), Scandinavian Journal of Statistics
    6:65.
    """
    decided: dict[K, T] = {}
    while len(decided) < len(tests):
        level = 1 - error / (len(tests) - len(decided))
        outcomes = {key: test(level) for key, test in tests.items() if key not in decided}
        found = {key: outcome for key, outcome in outcomes.items() if significant(outcome)}
        if not found:
            decided |= outcomes
        decided |= found
    return {key: decided[key] for key in tests}


# ── Inside ────────────────────────────────────────────────────────────────────────────────────────


def _checked_pair(base: ArrayLike, adapter: ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = np.asarray(base, dtype=np.float64), np.asarray(adapter, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(
            "A comparison expects one value per item for the same items, at least one; "
            f"found shape {first.shape} for base and {second.shape} for adapter."
        )
    for name, values in (("base", first), ("adapter", second)):
        if not np.isfinite(values).all():
            item = int(np.flatnonzero(~np.isfinite(values))[0])
            raise ValueError(
                f"A comparison expects finite values; item {item} of {name} is {values[item]}."
            )
    return first, second


def _size_of_change(base: FloatArray, adapter: FloatArray) -> float:
    """``size_of_ratio`` of what changed from ``base`` to ``adapter``, or of both where nothing."""
    change = np.stack([adapter[:, 0] - base[:, 0], base[:, 1]], axis=1)
    return size_of_ratio(change if change[:, 0].any() else np.concatenate([base, adapter]))


def _bounds_of_mean(
    values: FloatArray,
    codes: IntArray | None,
    level: float,
    span: float,
    limits: tuple[float, float],
) -> Bounds:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    groups = None if codes is None else codes.tolist()
    return bootstrap(ratio, columns, groups=groups, level=level, span=span, limits=limits)


def _comparison(
    base: float,
    adapter: float,
    bounds: Bounds,
    n: int,
    better: FloatArray | None,
    codes: IntArray | None,
    level: float,
) -> Comparison:
    won = lost = p = None
    if better is not None:
        won, lost = int((better > 0).sum()), int((better < 0).sum())
        net = np.sign(better)
        if codes is not None:
            net = np.sign(np.bincount(codes, weights=net))
        p = mcnemar(int((net > 0).sum()), int((net < 0).sum()))
    return Comparison(base, adapter, adapter - base, *bounds, n, won, lost, p, level)
