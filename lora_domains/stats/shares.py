"""Bounds of a share, such as recall, whose items may come in groups (rows of one patient)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import Bounds, FloatArray, IntArray, group_codes
from lora_domains.stats.intervals import items_needed_wilson, wilson


class Share(NamedTuple):
    """A share as so many independent items would show it, and the level to bound it at."""

    successes: float
    n: float
    level: float
    effect: float = 1.0
    """Items that say as much as one independent item."""

    @property
    def bounds(self) -> Bounds:
        """Wilson's bounds; (0, 1) without any item, or where all items are of one group."""
        return wilson(self.successes, self.n, self.level) if self.level < 1 else Bounds(0.0, 1.0)

    def items_needed(self, threshold: float) -> int | None:
        """``items_needed_wilson``, counted in items of such groups."""
        if self.level == 1:
            return None
        needed = items_needed_wilson(self.successes, self.n, threshold, self.level)
        return None if needed is None else math.ceil(needed * self.effect)


def share_of(
    right: ArrayLike, groups: Iterable[Hashable] | None = None, level: float = 0.95
) -> Share:
    """The share of ``right``, booleans (n,).

    Where groups repeat, counts are divided by the design effect (Rao & Scott 1992, Biometrics
    48:577) times G / (G - 1), and z gives way to t with G - 1 degrees of freedom, since the effect
    is estimated from G groups.
    """
    from scipy.special import ndtr, stdtrit

    values = np.asarray(right, dtype=np.float64)
    n, codes = len(values), group_codes(groups, len(values))
    if codes is None:
        return Share(float(values.sum()), n, level)
    count = int(codes.max()) + 1
    if count < 2:
        return Share(float(values.sum()), n, 1.0, n)
    effect = design_effect(values, codes, count / (count - 1))
    by_t = float(ndtr(-stdtrit(count - 1, 1 - level)))
    return Share(float(values.sum()) / effect, n / effect, by_t, effect)


def design_effect(values: FloatArray, codes: IntArray, correction: float = 1.0) -> float:
    """Variance of a mean by groups (times ``correction``) over that by items, at least 1.

    ``values`` (n,) are 0 and 1, or changes of -1, 0 and 1. Where few items differ the ratio is
    unknown rather than 1, so a tenth of one group of mean size in which every item differs is added
    to both sums: the effect starts at that size (each group counts as one item) and follows the
    data from there. (A whole group covered 98 % where 95 % were intended.)
    """
    mean_size = len(codes) / (codes.max() + 1)
    residual = values - values.mean()
    by_group = np.bincount(codes, weights=residual)
    over = correction * np.sum(by_group**2) + mean_size**2 / 10
    return max(1.0, float(over / (np.sum(residual**2) + mean_size / 10)))
