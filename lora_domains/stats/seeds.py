"""Variance between seeds, separated from variance between items.

One run shows how much its figure would vary with other items, and nothing about another seed. S
runs on the same n items show both: each change is split into the effect of the seed, of the item,
and a residual, as in a two-way layout with random effects (Searle, Casella & McCulloch 1992,
Variance Components, ch. 4; for models trained from several seeds Bouthillier et al. 2021, MLSys).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_domains.stats.bootstrap import FloatArray, Statistic, least_width
from lora_domains.stats.intervals import Bounds


def influence(statistic: Statistic, columns: FloatArray) -> FloatArray:
    """The contribution of each item to a figure made from sums, (n, k) → (n,).

    The figure plus the item's influence on it (the derivative along the item's columns), so that
    F1 or nats per token can be decomposed like a mean (Efron & Tibshirani 1993, ch. 21). The mean
    of the contributions is the figure.
    """
    mean = columns.mean(0)
    step = 1e-6 * np.maximum(np.abs(mean), 1e-3)
    k = len(mean)
    up, down = mean + np.diag(step), mean - np.diag(step)
    # Sums, not means: some figures guard against sums below 1.
    n = len(columns)
    slopes = (statistic(n * up) - statistic(n * down)) / (2 * step)
    parts: FloatArray = float(statistic(n * mean)) + (columns - mean) @ slopes.reshape(k)
    return parts


def seed_variance(changes: FloatArray, level: float = 0.95) -> dict[str, Any]:
    """Figures of S runs, from ``changes`` (S, n): adapter - base on each item, for each run.

    ``difference`` is the mean over runs, with bounds for the mean over *all* seeds and *all* items,
    not only these (degrees of freedom: Satterthwaite 1946). ``sd_seed`` is the standard deviation
    between seeds after removing the variance of items, ``se_items`` the standard error of the mean
    due to the choice of n items. Raises ValueError for fewer than two runs or two items.
    """
    from scipy.special import stdtrit

    runs, n = changes.shape
    if runs < 2 or n < 2:
        raise ValueError(
            f"seed_variance expects at least two runs of two items; found {runs} of {n}."
        )
    mean, by_run, by_item = changes.mean(), changes.mean(1), changes.mean(0)
    ms_run = n * float(by_run.var(ddof=1))
    ms_item = runs * float(by_item.var(ddof=1))
    rest = changes - by_run[:, None] - by_item[None] + mean
    free = (runs - 1) * (n - 1)
    ms_rest = float((rest**2).sum()) / free
    var_seed = max(0.0, (ms_run - ms_rest) / n)
    var_item = max(0.0, (ms_item - ms_rest) / runs)
    # The variance of the mean: each component over its number of draws; a component estimated
    # below 0 counts as 0.
    parts = [(ms_run, runs - 1.0), (ms_item, n - 1.0)]
    variance = (var_seed / runs) + (var_item / n) + ms_rest / (runs * n)
    spread = sum(ms**2 / df for ms, df in parts) + ms_rest**2 / free
    df = (variance * runs * n) ** 2 / spread if ms_run > ms_rest and spread > 0 else n - 1.0
    # Where no item changes the variance is 0, which proves nothing: see ``bootstrap``.
    least = (float(np.sqrt((changes**2).mean())) or 1.0) * least_width(n, level)
    half = max(least, -float(stdtrit(max(1.0, df), 1 - level)) * variance**0.5)
    return {
        "runs": runs,
        "n": n,
        "each": [float(value) for value in by_run],
        "difference": float(mean),
        "lower": float(mean) - half,
        "upper": float(mean) + half,
        "sd_seed": var_seed**0.5,
        "se_items": (var_item / n) ** 0.5,
        "se_residual": (ms_rest / (runs * n)) ** 0.5,
    }


def pooled_spread(values: FloatArray) -> tuple[float, int]:
    """Standard deviation of a figure between seeds, pooled over settings, and its degrees of
    freedom.

    ``values`` (settings, seeds) are the figures of trainings that differ in their seed alone within
    a row. Raises ValueError for fewer than two seeds.
    """
    settings, seeds = values.shape
    if seeds < 2:
        raise ValueError(f"pooled_spread expects at least two seeds; found {seeds}.")
    return float(np.sqrt(values.var(axis=1, ddof=1).mean())), settings * (seeds - 1)


def with_seed_spread(
    difference: float, bounds: Bounds, spread: float, freedom: int, seeds: int, level: float = 0.95
) -> Bounds:
    """Bounds of a difference between two settings, for other items and for other seeds.

    ``bounds`` are those for other items, of figures that are means over ``seeds`` trainings each.
    ``spread`` is the standard deviation between seeds with its degrees of ``freedom``
    (``pooled_spread``). The two sources are independent, so their distances add in squares (MOVER:
    Zou & Donner 2008, Statistics in Medicine 27:1693).
    """
    from scipy.special import stdtrit

    by_seed = -float(stdtrit(freedom, 1 - level)) * spread * (2 / seeds) ** 0.5
    return Bounds(
        difference - float(np.hypot(difference - bounds.lower, by_seed)),
        difference + float(np.hypot(bounds.upper - difference, by_seed)),
    )


def across_folds(
    difference: float, bounds: Bounds, by_fold: Sequence[float], level: float = 0.95
) -> Bounds:
    """Bounds of a cross-validated difference: the wider of those for its rows and of those below.

    Folds share training rows, so their spread understates that of independent trainings. With K
    folds the variance of the mean is taken as (1 / K + 1 / (K - 1)) times that of the folds, with
    K - 1 degrees of freedom (Nadeau & Bengio 2003, Machine Learning 52:239; no unbiased estimator
    exists: Bengio & Grandvalet 2004, JMLR 5:1089). Raises ValueError for fewer than two folds.
    """
    from scipy.special import stdtrit

    count = len(by_fold)
    if count < 2:
        raise ValueError(f"across_folds expects at least two folds; found {count}.")
    spread = float(np.std(by_fold, ddof=1)) * (1 / count + 1 / (count - 1)) ** 0.5
    half = -float(stdtrit(count - 1, 1 - level)) * spread
    return Bounds(min(bounds.lower, difference - half), max(bounds.upper, difference + half))
