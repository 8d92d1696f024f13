"""Paired differences, score intervals, McNemar: how sure a figure is.

Every bound is one-sided: at `level=.95` the truth lies below `lower` in at most 5 % of repetitions,
and above `upper` in at most 5 %. (Together the two make a 90 % interval.) A gate asks one question
in one direction, so one side is what it spends its 5 % on. Differences are always adapter - base.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import Bounds as Bounds
from lora_domains.stats.bootstrap import FloatArray, IntArray, Statistic, bootstrap, group_codes


@dataclass(frozen=True)
class Comparison:
    """Base and adapter on the same `n` items; the fields are named as in a report.

    `difference` is adapter - base, `lower` and `upper` its one-sided bounds at `level`. `won` and
    `lost` count the items on which the adapter did better and worse; `p` is the exact two-sided
    test of won against lost. All three are None where the items have no score of their own.
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


# ── one share ─────────────────────────────────────────────────────────────────────────────────────


def wilson(successes: float, n: float, level: float = 0.95) -> Bounds:
    """Bounds of a share, `successes` of `n`: the true shares a score test at `level` keeps.

    |s/n - p| <= z sqrt(p (1 - p) / n), solved for p. Counts may be fractional (a share at another
    n). Without any item nothing is known: (0, 1). Source: Wilson, E. B. (1927), Probable inference,
    the law of succession, and statistical inference, JASA 22:209.

    Raises ValueError unless 0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"wilson expects 0 <= successes <= n; found {successes} of {n}.")
    if n == 0:
        return Bounds(0.0, 1.0)
    share, z2 = successes / n, _z(level) ** 2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    # At the ends the formula gives 0 and 1 exactly; rounding would not.
    lower = 0.0 if successes == 0 else centre - half
    upper = 1.0 if successes == n else centre + half
    return Bounds(lower, upper)


# ── a paired difference of shares ─────────────────────────────────────────────────────────────────


def tango(won: float, lost: float, n: float, level: float = 0.95) -> Bounds:
    """Bounds of the paired difference (won - lost) / n by Tango's score interval.

    The bounds solve T(d) = z and T(d) = -z, where
        T(d) = (won - lost - n d) / sqrt(n (2 q + d (1 - d)))
    and q, the probability of a lost item, is its maximum-likelihood estimate under the difference
    d: the larger root of 2n q² + (d (2n - won + lost) - won - lost) q - lost d (1 - d) = 0. It
    stays right when nothing flips: won = lost = 0 gives ± z² / (n + z²), so a 3-point margin needs
    88 items, where a Wald interval would have no width at all. Counts may be fractional (an
    effective sample size). Source: Tango, T. (1998), Equivalence test and confidence interval for
    the difference in proportions for the paired-sample design, Statistics in Medicine 17:891.

    Raises ValueError unless won, lost >= 0 and won + lost <= n. Without any item: (-1, 1).
    """
    if min(won, lost) < 0 or won + lost > n * (1 + 1e-12):
        raise ValueError(
            f"tango expects won + lost <= n, none negative; found {won} + {lost} of {n}."
        )
    if n == 0:
        return Bounds(-1.0, 1.0)
    z = _z(level)
    return Bounds(_tango_lower(won, lost, n, z), -_tango_lower(lost, won, n, z))


def mcnemar(won: int, lost: int) -> float:
    """Exact two-sided p of won against lost.

    Twice the smaller tail of binomial(won + lost, 1/2), at most 1.
    Source: McNemar, Q. (1947), Psychometrika 12:153, in its exact form; for scores that are not
    right or wrong it is the sign test. Items that did not change carry no information here.

    Raises ValueError when a count is negative.
    """
    from scipy.special import bdtr

    if min(won, lost) < 0:
        raise ValueError(f"mcnemar expects counts; found won {won}, lost {lost}.")
    if won == lost:
        return 1.0
    return min(1.0, 2 * float(bdtr(min(won, lost), won + lost, 0.5)))


def difference_bounds(
    first: float, first_bounds: Bounds, second: float, second_bounds: Bounds
) -> Bounds:
    """Bounds of first - second, figures of two independent samples such as train and test.

        lower = d - sqrt((first - first.lower)² + (second.upper - second)²)
        upper = d + sqrt((first.upper - first)² + (second - second.lower)²)

    With Wilson bounds this is Newcombe's method 10; it holds for any two sound intervals. Source:
    Newcombe, R. G. (1998), Statistics in Medicine 17:873; Zou & Donner (2008), Statistics in
    Medicine 27:1693.
    """
    down = math.hypot(first - first_bounds.lower, second_bounds.upper - second)
    up = math.hypot(first_bounds.upper - first, second - second_bounds.lower)
    return Bounds(first - second - down, first - second + up)


# ── comparisons: one function per kind of metric ──────────────────────────────────────────────────


def compare_accuracy(
    correct_base: ArrayLike,
    correct_adapter: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
) -> Comparison:
    """Accuracies on the same n items, from two boolean arrays of shape (n,).

    Tango's bounds, McNemar's p.

    Where groups repeat, Tango's counts are first divided by the design effect (Rao & Scott 1992,
    Biometrics 48:577: variance by groups over variance by items), and the wider of that and a
    clustered bootstrap holds: the first is right when few items flip, the second when there are few
    groups. p then tests groups, each by its net sign.

    Raises ValueError when the arrays are empty, differ in length or hold anything but right and
    wrong.
    """
    base, adapter = _pair(correct_base, correct_adapter)
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
        effect = _design_effect(change, codes)
        scored = tango(won / effect, lost / effect, n / effect, level)
        drawn = _bounds_of_mean(change, codes, level)
        # A difference of accuracies cannot leave [-1, 1], however little one group says.
        bounds = Bounds(
            max(-1.0, min(scored.lower, drawn.lower)), min(1.0, max(scored.upper, drawn.upper))
        )
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, change, codes, level)


def compare_means(
    values_base: ArrayLike,
    values_adapter: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    higher_is_better: bool = True,
    level: float = 0.95,
) -> Comparison:
    """Means of a per-item score (nats, exact match, ROUGE) on the same items, arrays of shape (n,).

    Paired bootstrap, clustered where groups repeat. `higher_is_better` decides what counts as won,
    never the sign of the difference.

    Raises ValueError when the arrays are empty, differ in length or hold a value that is not
    finite.
    """
    base, adapter = _pair(values_base, values_adapter)
    change, n = adapter - base, len(base)
    codes = group_codes(groups, n)
    bounds = _bounds_of_mean(change, codes, level)
    better = change if higher_is_better else -change
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, better, codes, level)


def compare_f1(
    references: ArrayLike,
    predictions_base: ArrayLike,
    predictions_adapter: ArrayLike,
    positive: int | None = None,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
) -> Comparison:
    """F1 of the `positive` class, or macro-F1 over the classes among the references.

    Arrays of class numbers >= 0, shape (n,); a prediction of -1 is an answer that named no class.
    won and lost count items right and wrong. Paired bootstrap, clustered where groups repeat. Where
    no resample differs (nothing flipped) the bounds would have no width: Tango's bounds for no flip
    among as many groups stand in, exact for accuracy and a stand-in for F1.

    Raises ValueError when the arrays are empty, differ in length, or a reference is no class
    number.
    """
    truth = np.asarray(references, dtype=np.intp)
    if truth.ndim != 1 or not len(truth) or truth.min() < 0:
        raise ValueError(
            "compare_f1 expects three arrays of one length with references >= 0 (at least one); "
            f"found references of shape {truth.shape}."
        )
    groups = None if groups is None else list(groups)
    wanted = np.unique(truth) if positive is None else np.array([positive])
    found = compare_classes(
        references, predictions_base, predictions_adapter, f1_of(wanted), groups, level
    )
    width = 0.0
    if found.lower == found.upper:
        width = tango(0, 0, len(truth) if groups is None else len(set(groups)), level).upper
    # A difference of F1 cannot leave [-1, 1], however little one group says.
    return replace(found, lower=max(-1.0, found.lower - width), upper=min(1.0, found.upper + width))


def compare_classes(
    references: ArrayLike,
    predictions_base: ArrayLike,
    predictions_adapter: ArrayLike,
    statistic: Statistic,
    groups: Iterable[Hashable] | None = None,
    level: float = 0.95,
) -> Comparison:
    """Any figure of a confusion matrix, for base and adapter on the same n items.

    Arrays of class numbers, shape (n,), as in `compare_f1`. `statistic` takes counts (…, 3 C): for
    each of C classes how often it was right, asked for and said (`class_counts`). won and lost
    count items right and wrong. Paired bootstrap, clustered where groups repeat.

    Raises ValueError when the arrays are empty or differ in length.
    """
    truth, base, adapter = (
        np.asarray(labels, dtype=np.intp)
        for labels in (references, predictions_base, predictions_adapter)
    )
    if not truth.ndim == 1 or not truth.shape == base.shape == adapter.shape or not len(truth):
        raise ValueError(
            "compare_classes expects three arrays of one length, at least one item; "
            f"found shapes {truth.shape}, {base.shape}, {adapter.shape}."
        )
    size = int(max(truth.max(), base.max(), adapter.max())) + 2
    coded = (truth * size + base + 1) * size + adapter + 1
    _, first, kinds = np.unique(coded, return_index=True, return_inverse=True)
    table = np.concatenate(
        [class_counts(truth[first], said[first], size) for said in (base, adapter)], axis=1
    )
    codes = group_codes(groups, len(truth))
    half = table.shape[1] // 2
    bounds = bootstrap(
        lambda sums: statistic(sums[..., half:]) - statistic(sums[..., :half]),
        table,
        kinds=kinds,
        groups=None if codes is None else codes.tolist(),
        level=level,
    )
    totals = np.bincount(kinds).astype(np.float64) @ table
    scores = float(statistic(totals[:half])), float(statistic(totals[half:]))
    better = (adapter == truth).astype(np.float64) - (base == truth)
    return _comparison(*scores, bounds, len(truth), better, codes, level)


def class_counts(truth: IntArray, said: IntArray, classes: int) -> FloatArray:
    """(n, 3 classes): for each item and class, whether it was right, asked for and said."""
    every = np.arange(classes)
    asked, answered = truth[:, None] == every, said[:, None] == every
    return np.concatenate([asked & answered, asked, answered], axis=1).astype(np.float64)


def f1_of(classes: ArrayLike) -> Statistic:
    """Mean of 2 right / (asked + said) over those of `classes` that are asked for; 0 if none is.

    As scikit-learn's f1_score(labels=…, average="macro", zero_division=0) with these labels. A
    resample may lack a class of few items: counted as 0 it would pull both contenders, and what
    lies between them, towards 0.
    """
    wanted = np.asarray(classes, dtype=np.intp)

    def f1(sums: FloatArray) -> FloatArray:
        size = sums.shape[-1] // 3
        # A class that nobody named or asked for has no column.
        inside = wanted[wanted < size]
        right, asked, said = (sums[..., part * size + inside] for part in range(3))
        scores = (2 * right / np.maximum(1, asked + said)).sum(-1)
        mean: FloatArray = scores / np.maximum(1, (asked > 0).sum(-1))
        return mean

    return f1


def compare_ratios(
    base_columns: ArrayLike,
    adapter_columns: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    better: ArrayLike | None = None,
    level: float = 0.95,
) -> Comparison:
    """A sum over another sum (nats per token) of base and adapter, from two arrays (n, 2).

    `better`, shape (n,), is above 0 where the adapter did better on an item and below where worse;
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
    codes = group_codes(groups, n)
    bounds = bootstrap(
        lambda sums: ratio(sums[..., 2:]) - ratio(sums[..., :2]),
        np.concatenate([base, adapter], axis=1),
        groups=None if codes is None else codes.tolist(),
        level=level,
    )
    scores = float(ratio(base.sum(0))), float(ratio(adapter.sum(0)))
    return _comparison(*scores, bounds, n, change, codes, level)


def ratio(sums: FloatArray) -> FloatArray:
    """First column over second, (…, 2) → (…); 0 where the second is 0."""
    found: FloatArray = sums[..., 0] / np.where(sums[..., 1] == 0, 1.0, sums[..., 1])
    return found


# ── how many items would settle it ────────────────────────────────────────────────────────────────


def items_needed(comparison: Comparison, threshold: float) -> int | None:
    """How many items, changing in the same shares, would bring a bound to `threshold`.

    By Tango's statistic where the bounds are Tango's, else by `items_needed_mean`. None when the
    difference equals the threshold (no number would do) or its bounds are infinite.
    """
    won, lost, n = comparison.won, comparison.lost, comparison.n
    if (
        won is not None
        and lost is not None
        and tango(won, lost, n, comparison.level) == (comparison.lower, comparison.upper)
    ):
        return items_needed_tango(won, lost, n, threshold, comparison.level)
    return items_needed_mean(
        comparison.difference, Bounds(comparison.lower, comparison.upper), n, threshold
    )


def items_needed_wilson(
    successes: float, n: float, threshold: float, level: float = 0.95
) -> int | None:
    """n' = z² t (1 - t) / (s/n - t)²: Wilson's inequality at the threshold t, solved for n.

    None when s/n is the threshold, or n is 0.
    """
    if n == 0 or successes / n == threshold:
        return None
    return _at_least(
        _z(level) ** 2 * threshold * (1 - threshold) / (successes / n - threshold) ** 2
    )


def items_needed_tango(
    won: float, lost: float, n: float, threshold: float, level: float = 0.95
) -> int | None:
    """n' = n (z / T(threshold))², since T grows as sqrt(n) at fixed shares.

    None when (won - lost) / n is the threshold, or n is 0.
    """
    if n == 0 or (won - lost) / n == threshold:
        return None
    numerator, variance = _tango_terms(won, lost, n, threshold)
    return _at_least(n * _z(level) ** 2 * variance / numerator**2)


def items_needed_mean(observed: float, bounds: Bounds, n: int, threshold: float) -> int | None:
    """n' = n (width / distance)²: the width on the threshold's side shrinks as 1/sqrt(n).

    None when the figure is the threshold, or its bounds are infinite.
    """
    width = observed - bounds.lower if observed > threshold else bounds.upper - observed
    if observed == threshold or not math.isfinite(width):
        return None
    return _at_least(n * (width / (observed - threshold)) ** 2)


# ── inside ────────────────────────────────────────────────────────────────────────────────────────


def _z(level: float) -> float:
    from scipy.special import ndtri

    if not 0.5 < level < 1:
        raise ValueError(
            f"level is the confidence of one side, above .5 and below 1; found {level}."
        )
    return float(ndtri(level))


def _at_least(items: float) -> int:
    # The subtraction keeps a whole number whole when the arithmetic lands a hair above it.
    return max(1, math.ceil(items - 1e-9 * items))


def _tango_terms(won: float, lost: float, n: float, difference: float) -> tuple[float, float]:
    """Numerator of T, and its variance n (2 q + d (1 - d))."""
    linear = difference * (2 * n - won + lost) - won - lost
    constant = -lost * difference * (1 - difference)
    q = (-linear + math.sqrt(max(0.0, linear * linear - 8 * n * constant))) / (4 * n)
    return won - lost - n * difference, max(0.0, n * (2 * q + difference * (1 - difference)))


def _tango_lower(won: float, lost: float, n: float, z: float) -> float:
    from scipy.optimize import brentq

    def distance(difference: float) -> float:
        numerator, variance = _tango_terms(won, lost, n, difference)
        return numerator - z * math.sqrt(variance)

    # Where nothing or everything flips the variance is 0 at the estimate too: a root, but not the
    # bound, so the search stops short of it.
    start, end = -1.0, (won - lost) / n - 1e-12
    if distance(start) <= 0 or end <= start:
        return -1.0
    return float(brentq(distance, start, end, xtol=1e-13))


def _pair(base: ArrayLike, adapter: ArrayLike) -> tuple[FloatArray, FloatArray]:
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


def _bounds_of_mean(values: FloatArray, codes: IntArray | None, level: float) -> Bounds:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap(ratio, columns, groups=None if codes is None else codes.tolist(), level=level)


def _design_effect(change: FloatArray, codes: IntArray) -> float:
    """Variance of the mean change by groups over that by items, at least 1.

    `change` is -1, 0 or 1 for each item, shape (n,).
    With no or few flips the ratio is unknown rather than 1, so a tenth of one group of mean size in
    which every item flips is added to both sums: the effect starts at that size (each group counts
    as one item) and follows the data from there. (A whole one covered 98 % where 95 % were meant.)
    """
    mean_size = len(codes) / (codes.max() + 1)
    residual = change - change.mean()
    by_group = np.bincount(codes, weights=residual)
    over, under = np.sum(by_group**2) + mean_size**2 / 10, np.sum(residual**2) + mean_size / 10
    return max(1.0, float(over / under))


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
        net = (
            np.sign(better)
            if codes is None
            else np.sign(np.bincount(codes, weights=np.sign(better)))
        )
        p = mcnemar(int((net > 0).sum()), int((net < 0).sum()))
    return Comparison(
        base, adapter, adapter - base, bounds.lower, bounds.upper, n, won, lost, p, level
    )
