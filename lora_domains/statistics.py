"""Paired differences, score intervals, McNemar, bootstrap: how sure a figure is.

Every bound is one-sided: at `level=.95` the truth lies below `lower` in at most 5 % of repetitions,
and above `upper` in at most 5 %. (Together the two make a 90 % interval.) A gate asks one question
in one direction, so one side is what it spends its 5 % on. Differences are always adapter - base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

IntArray = NDArray[np.intp]
FloatArray = NDArray[np.float64]


class Bounds(NamedTuple):
    """One-sided bounds, each at its own level. Unit: that of the figure they bound."""

    lower: float
    upper: float


@dataclass(frozen=True)
class Comparison:
    """Base and adapter on the same `n` items; the fields are named as in a report.

    `difference` is adapter - base, `lower` and `upper` its one-sided 95 % bounds. `won` and `lost`
    count the items on which the adapter did better and worse; `p` is the exact two-sided test of
    won against lost. All three are None where the items have no score of their own.
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


# ── anything else: the bootstrap ──────────────────────────────────────────────────────────────────


def paired_bootstrap(
    statistic: Callable[[IntArray], float],
    n: int,
    groups: Iterable[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Bounds:
    """Bounds of any statistic of n items, from its values on items drawn again with replacement.

    `statistic(indices)` takes an integer array of item numbers, shape (n,) or thereabouts, with
    repetitions. To compare two models let it return their difference on those indices: one draw
    serves both, and what makes an item hard for both cancels (Koehn 2004, EMNLP; Berg-Kirkpatrick
    et al. 2012, EMNLP). Where `groups`, n of them, repeat, whole groups are drawn, since rows of
    one group are no independent evidence (Field & Welsh 2007, JRSS B 69:369).

    Percentile bounds: quantiles of the resampled statistic itself. They need no standard error,
    respect the statistic's range and any monotone transformation of it, and stay defined where BCa
    divides by zero (no item changes) or needs n more evaluations (Efron & Tibshirani 1993, ch. 13).
    Known to be short for small samples, so the tail is widened to Phi(t_{G-1} sqrt(G / (G - 1)))
    for G groups: Hesterberg (2015), The American Statistician 69:371, the expanded percentile
    interval. The bounds always hold the estimate itself.

    What never happened in the sample happens in no resample: where nothing varies the bounds have
    no width (see `tango`). One group or item alone tells nothing of its spread: (-inf, inf). The
    same seed gives the same bounds.

    Raises ValueError without items, or when groups are not n.
    """
    if n < 1:
        raise ValueError("paired_bootstrap expects at least one item; found none.")
    codes = _group_codes(groups, n)
    count = n if codes is None else int(codes.max()) + 1
    if count < 2:
        return Bounds(-math.inf, math.inf)
    rng = np.random.default_rng(seed)
    draw = _draws(codes, n)
    values = np.array([statistic(draw(rng)) for _ in range(resamples)], dtype=np.float64)
    return _percentiles(values, float(statistic(np.arange(n))), count, level)


def bootstrap_sums(
    statistic: Callable[[FloatArray], FloatArray],
    columns: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Bounds:
    """`paired_bootstrap` of a statistic of sums over the items: the same draws, faster.

    `columns`, shape (n, k), holds what is summed: for a mean the values and a column of ones, for
    recall the hits and the positives. `statistic` takes sums, shape (r, k), one row for each of r
    resamples, and gives r values. A resample is then a row of counts, how often each item was
    drawn, and all sums are one matrix product.

    Raises ValueError without items, or when groups are not n.
    """
    parts = np.asarray(columns, dtype=np.float64)
    if len(parts) < 1:
        raise ValueError("bootstrap_sums expects at least one item; found none.")
    codes = _group_codes(groups, len(parts))
    if codes is not None:
        order = np.argsort(codes, kind="stable")
        parts = np.add.reduceat(parts[order], np.flatnonzero(np.diff(codes[order], prepend=-1)))
    if len(parts) < 2:
        return Bounds(-math.inf, math.inf)
    drawn = _drawn_counts(len(parts), resamples, seed)
    sums = np.concatenate([counts.astype(np.float64) @ parts for counts in drawn])
    estimate = float(statistic(parts.sum(axis=0)[None])[0])
    return _percentiles(statistic(sums), estimate, len(parts), level)


# ── comparisons: one function per kind of metric ──────────────────────────────────────────────────


def compare_accuracy(
    correct_base: ArrayLike, correct_adapter: ArrayLike, groups: Iterable[Hashable] | None = None
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
    codes = _group_codes(groups, n)
    won, lost = int((change > 0).sum()), int((change < 0).sum())
    bounds = tango(won, lost, n)
    if codes is not None:
        effect = _design_effect(change, codes)
        scored = tango(won / effect, lost / effect, n / effect)
        drawn = bootstrap_sums(_ratio, np.stack([change, np.ones(n)], axis=1), codes.tolist())
        # A difference of accuracies cannot leave [-1, 1], however little one group says.
        bounds = Bounds(
            max(-1.0, min(scored.lower, drawn.lower)), min(1.0, max(scored.upper, drawn.upper))
        )
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, change, codes)


def compare_means(
    values_base: ArrayLike,
    values_adapter: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    higher_is_better: bool = True,
) -> Comparison:
    """Means of a per-item score (nats, exact match, ROUGE) on the same items, arrays of shape (n,).

    Paired bootstrap, clustered where groups repeat. `higher_is_better` decides what counts as won,
    never the sign of the difference.

    Raises ValueError when the arrays are empty, differ in length or hold a value that is not
    finite.
    """
    base, adapter = _pair(values_base, values_adapter)
    change, n = adapter - base, len(base)
    codes = _group_codes(groups, n)
    bounds = bootstrap_sums(
        _ratio,
        np.stack([change, np.ones(n)], axis=1),
        None if codes is None else codes.tolist(),
    )
    better = change if higher_is_better else -change
    return _comparison(float(base.mean()), float(adapter.mean()), bounds, n, better, codes)


def compare_f1(
    references: ArrayLike,
    predictions_base: ArrayLike,
    predictions_adapter: ArrayLike,
    positive: int | None = None,
    groups: Iterable[Hashable] | None = None,
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
    base, adapter = (
        np.asarray(predictions, dtype=np.intp)
        for predictions in (predictions_base, predictions_adapter)
    )
    if (
        not truth.ndim == 1
        or not truth.shape == base.shape == adapter.shape
        or not len(truth)
        or truth.min() < 0
    ):
        raise ValueError(
            "compare_f1 expects three arrays of one length with references >= 0 (at least one); "
            f"found shapes {truth.shape}, {base.shape}, {adapter.shape}."
        )
    groups = None if groups is None else list(groups)
    wanted = np.unique(truth) if positive is None else np.array([positive])

    asked = truth[:, None] == wanted
    said = [predictions[:, None] == wanted for predictions in (base, adapter)]
    first, second = (
        np.concatenate([2 * (asked & chosen), asked.astype(int) + chosen], axis=1)
        for chosen in said
    )
    found = compare_sums(
        _mean_ratio, first, second, groups,
        better=(adapter == truth).astype(float) - (base == truth),
    )  # fmt: skip
    width = 0.0
    if found.lower == found.upper:
        width = tango(0, 0, len(truth) if groups is None else len(set(groups))).upper
    # A difference of F1 cannot leave [-1, 1], however little one group says.
    return replace(found, lower=max(-1.0, found.lower - width), upper=min(1.0, found.upper + width))


def compare_sums(
    statistic: Callable[[FloatArray], FloatArray],
    base_columns: ArrayLike,
    adapter_columns: ArrayLike,
    groups: Iterable[Hashable] | None = None,
    better: ArrayLike | None = None,
) -> Comparison:
    """Any statistic of sums (see `bootstrap_sums`) of base and adapter, columns (n, k) each.

    `statistic` takes sums (r, k) and gives r values. `better`, shape (n,), is above 0 where the
    adapter did better on an item and below where worse; without it won, lost and p are None. Paired
    bootstrap, clustered where groups repeat.

    Raises ValueError when there are no items or their numbers differ.
    """
    first, second = np.asarray(base_columns), np.asarray(adapter_columns)
    n, k = len(first), first.shape[-1]
    change = np.zeros(n) if better is None else np.asarray(better, dtype=np.float64)
    if n < 1 or first.shape != second.shape or len(change) != n:
        raise ValueError(
            "compare_sums expects the same items twice, at least one, and `better` for each; "
            f"found {first.shape} for base, {second.shape} for adapter, {len(change)} for better."
        )
    codes = _group_codes(groups, n)
    bounds = bootstrap_sums(
        lambda sums: statistic(sums[:, k:]) - statistic(sums[:, :k]),
        np.concatenate([first, second], axis=1),
        None if codes is None else codes.tolist(),
    )
    one, two = (float(statistic(part.sum(axis=0)[None])[0]) for part in (first, second))
    return _comparison(one, two, bounds, n, None if better is None else change, codes)


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
        and tango(won, lost, n) == (comparison.lower, comparison.upper)
    ):
        return items_needed_tango(won, lost, n, threshold)
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


def _ratio(sums: FloatArray) -> FloatArray:
    """The first column over the second, (r, 2) → (r,): a mean, where the second counts items."""
    found: FloatArray = sums[:, 0] / sums[:, 1]
    return found


def _mean_ratio(sums: FloatArray) -> FloatArray:
    """Mean over c classes of c numerators over c denominators, (r, 2 c) → (r,).

    A class that never occurs scores 0.
    """
    over, under = np.split(sums, 2, axis=1)
    found: FloatArray = (over / np.maximum(under, 1)).mean(axis=1)
    return found


def _percentiles(values: FloatArray, estimate: float, count: int, level: float) -> Bounds:
    """The expanded percentile bounds of `paired_bootstrap`; `count` is what was drawn from."""
    from scipy.special import ndtr, stdtrit

    tail = float(ndtr(stdtrit(count - 1, 1 - level) * math.sqrt(count / (count - 1))))
    lower = float(np.quantile(values, tail, method="lower"))
    upper = float(np.quantile(values, 1 - tail, method="higher"))
    return Bounds(min(lower, estimate), max(upper, estimate))


# Of so many items and fewer the counts are kept (32 MB): adapters share a test set's size. A block
# of 25 resamples of 10,000 items still fits into a processor's cache.
_KEPT, _BLOCK = 2**25, 25


def _drawn_counts(count: int, resamples: int, seed: int) -> Iterable[NDArray[np.uint8]]:
    """How often each of `count` is drawn, blocks of shape (up to 25, count), one row a resample.

    The draws are those of `paired_bootstrap`. A byte is enough: 256 times the same one of more than
    255 has no probability to speak of.
    """
    if count * resamples <= _KEPT:
        return _kept_counts(count, resamples, seed)
    return _count_blocks(count, resamples, seed)


@lru_cache(maxsize=8)
def _kept_counts(count: int, resamples: int, seed: int) -> tuple[NDArray[np.uint8], ...]:
    return tuple(_count_blocks(count, resamples, seed))


def _count_blocks(count: int, resamples: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _BLOCK):
        block = np.empty((min(_BLOCK, resamples - start), count), dtype=np.uint8)
        for row in block:
            row[:] = np.bincount(rng.integers(0, count, size=count), minlength=count)
        yield block


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


def _group_codes(groups: Iterable[Hashable] | None, n: int) -> IntArray | None:
    """Groups as numbers 0, 1, … in order of appearance, shape (n,); None where no group repeats."""
    if groups is None:
        return None
    seen: dict[Hashable, int] = {}
    codes = np.array([seen.setdefault(group, len(seen)) for group in groups], dtype=np.intp)
    if len(codes) != n:
        raise ValueError(f"groups name the group of each item: expected {n}, found {len(codes)}.")
    return codes if len(seen) < n else None


def _draws(codes: IntArray | None, n: int) -> Callable[[np.random.Generator], IntArray]:
    """A function drawing item numbers with replacement, by whole groups where there are codes."""
    if codes is None:
        return lambda rng: rng.integers(0, n, size=n, dtype=np.intp)
    order = np.argsort(codes, kind="stable")
    sizes = np.bincount(codes)
    starts = np.cumsum(sizes) - sizes

    def draw(rng: np.random.Generator) -> IntArray:
        chosen = rng.integers(0, len(sizes), size=len(sizes))
        taken = sizes[chosen]
        within = np.arange(taken.sum()) - np.repeat(np.cumsum(taken) - taken, taken)
        drawn: IntArray = order[np.repeat(starts[chosen], taken) + within]
        return drawn

    return draw


def _design_effect(change: FloatArray, codes: IntArray) -> float:
    """Variance of the mean change by groups over that by items, at least 1.

    `change` is -1, 0 or 1 for each item, shape (n,).
    With no or few flips the ratio is unknown rather than 1, so one group of mean size in which
    every item flips is added to both sums: the effect starts at that size (each group counts as one
    item) and follows the data from there.
    """
    mean_size = len(codes) / (codes.max() + 1)
    residual = change - change.mean()
    by_group = np.bincount(codes, weights=residual)
    return max(1.0, float((np.sum(by_group**2) + mean_size**2) / (np.sum(residual**2) + mean_size)))


def _comparison(
    base: float,
    adapter: float,
    bounds: Bounds,
    n: int,
    better: FloatArray | None,
    codes: IntArray | None,
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
    return Comparison(base, adapter, adapter - base, bounds.lower, bounds.upper, n, won, lost, p)
