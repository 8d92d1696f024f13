"""Errors and correlations of predicted numbers, as sums over items and statistics of these sums.

The functions of the first kind take the true and the predicted numbers, (n,) each, and give what
each item adds, (n, k); those of the second turn sums (…, k) into figures (…).
"""

import numpy as np

from lora_domains.stats.bootstrap import FloatArray


def absolute(truth: FloatArray, value: FloatArray) -> FloatArray:
    """For the mean absolute error, the ``ratio`` of the sums."""
    return np.stack([np.abs(value - truth), np.ones(len(truth))], axis=1)


def squared(truth: FloatArray, value: FloatArray) -> FloatArray:
    """For the root mean squared error."""
    return np.stack([(value - truth) ** 2, np.ones(len(truth))], axis=1)


def root(sums: FloatArray) -> FloatArray:
    """The root of the first sum over the second."""
    figure: FloatArray = np.sqrt(sums[..., 0] / np.maximum(sums[..., 1], 1e-9))
    return figure


def moments(truth: FloatArray, value: FloatArray) -> FloatArray:
    """For R²: squared errors, and the true numbers' distances from their mean."""
    away = truth - truth.mean()
    return np.stack([(value - truth) ** 2, away**2, away, np.ones(len(truth))], axis=1)


def explained(sums: FloatArray) -> FloatArray:
    """R², the share of the variance that is predicted: 1 - squared errors / squared distances.

    0 where all true numbers are the same.
    """
    error, square, away, n = np.moveaxis(sums, -1, 0)
    spread = square - away**2 / np.maximum(n, 1e-9)
    known = spread > 1e-12 * np.maximum(square, 1e-300)
    figure: FloatArray = np.where(known, 1 - error / np.where(known, spread, 1.0), 0.0)
    return figure


def ranks(truth: FloatArray, value: FloatArray) -> FloatArray:
    """For Spearman's rank correlation. Ranks are those among all items, ties sharing their mean:
    a resample is not ranked again."""
    x, y = (_centred_ranks(numbers) for numbers in (truth, value))
    return np.stack([x * y, x * x, y * y, x, y, np.ones(len(x))], axis=1)


def correlation(sums: FloatArray) -> FloatArray:
    """Pearson's correlation from sums of products, squares and values; 0 without variance."""
    xy, xx, yy, x, y, n = np.moveaxis(sums, -1, 0)
    count = np.maximum(n, 1e-9)
    spread = (xx - x**2 / count) * (yy - y**2 / count)
    known = spread > 1e-9
    root_of = np.sqrt(np.where(known, spread, 1.0))
    figure: FloatArray = np.where(known, (xy - x * y / count) / root_of, 0.0)
    return np.clip(figure, -1.0, 1.0)


def _centred_ranks(values: FloatArray) -> FloatArray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2
    centred: FloatArray = mean_rank[places] - (len(values) + 1) / 2
    return centred
