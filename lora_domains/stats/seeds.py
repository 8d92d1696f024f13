"""Several seeds of one adapter on the same items: what the seed does, apart from what items do.

One run says how sure its figure is for other items, and nothing about another seed. With S runs on
the same n items both show: a change is a seed's, an item's, or both's together (residual), as in a
two-way layout with random effects (Searle, Casella & McCulloch 1992, Variance Components, ch. 4;
for models trained from several seeds Bouthillier et al. 2021, MLSys).
"""

from typing import Any

import numpy as np

from lora_domains.stats.bootstrap import FloatArray, Statistic


def influence(statistic: Statistic, columns: FloatArray) -> FloatArray:
    """What each item adds to a figure made from sums, (n, k) → (n,); their mean is the figure.

    The figure plus the item's influence on it (the derivative along the item's columns), so that
    F1 or nats per token can be taken apart like a mean (Efron & Tibshirani 1993, ch. 21).
    """
    mean = columns.mean(0)
    step = 1e-6 * np.maximum(np.abs(mean), 1e-3)
    k = len(mean)
    up, down = mean + np.diag(step), mean - np.diag(step)
    # Sums, not means: some figures guard against a sum below one.
    n = len(columns)
    slopes = (statistic(n * up) - statistic(n * down)) / (2 * step)
    found: FloatArray = float(statistic(n * mean)) + (columns - mean) @ slopes.reshape(k)
    return found


def seeds(changes: FloatArray, level: float = 0.95) -> dict[str, Any]:
    """Figures of S runs, from ``changes`` (S, n): adapter - base on each item, for each run.

    ``difference`` is the mean over runs, with bounds of the mean over *all* seeds and *all* items,
    not these alone (degrees of freedom: Satterthwaite 1946). ``sd_seed`` is the standard deviation
    between seeds once the items' share is taken out, ``se_items`` what the choice of n items adds
    to the mean. Raises ValueError for fewer than two runs or two items.
    """
    from scipy.special import stdtrit

    runs, n = changes.shape
    if runs < 2 or n < 2:
        raise ValueError(f"seeds expects at least two runs of two items; found {runs} of {n}.")
    mean, by_run, by_item = changes.mean(), changes.mean(1), changes.mean(0)
    ms_run = n * float(by_run.var(ddof=1))
    ms_item = runs * float(by_item.var(ddof=1))
    rest = changes - by_run[:, None] - by_item[None] + mean
    free = (runs - 1) * (n - 1)
    ms_rest = float((rest**2).sum()) / free
    var_seed = max(0.0, (ms_run - ms_rest) / n)
    var_item = max(0.0, (ms_item - ms_rest) / runs)
    # The variance of the mean: each part over how often it was drawn; one estimated below zero is
    # none.
    parts = [(ms_run, runs - 1.0), (ms_item, n - 1.0)]
    variance = (var_seed / runs) + (var_item / n) + ms_rest / (runs * n)
    spread = sum(ms**2 / df for ms, df in parts) + ms_rest**2 / free
    df = (variance * runs * n) ** 2 / spread if ms_run > ms_rest and spread > 0 else n - 1.0
    half = -float(stdtrit(max(1.0, df), 1 - level)) * variance**0.5
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
