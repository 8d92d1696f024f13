"""Bounds of a share, such as recall, whose items may come in groups (rows of one patient)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import FloatArray, IntArray, effective_groups, group_codes
from lora_domains.stats.intervals import Bounds, items_needed_wilson, wilson


class Share(NamedTuple):
    """A share as so many independent items would show it, and the level to bound it at."""

    successes: float
    n: float
    level: float
    effect: float = 1.0
    """Design effect: how many of the grouped items equal one independent item."""
    degrees: float = math.inf
    """Degrees of freedom of the design effect; 0 where all items are of one group."""

    @property
    def bounds(self) -> Bounds:
        """Wilson's bounds; (0, 1) without any item, or where all items are of one group."""
        if not self.degrees:
            return Bounds(0.0, 1.0)
        return wilson(self.successes, self.n, self._by_t(self.level))

    def items_needed(self, threshold: float, level: float) -> int | None:
        """``items_needed_wilson``, counted in items of such groups."""
        if not self.degrees:
            return None
        needed = items_needed_wilson(self.successes, self.n, threshold, self._by_t(level))
        return None if needed is None else math.ceil(needed * self.effect)

    def _by_t(self, level: float) -> float:
        """The level at which a normal deviate is as large as t is at ``level``."""
        from scipy.special import ndtr, stdtrit

        return level if math.isinf(self.degrees) else float(ndtr(-stdtrit(self.degrees, 1 - level)))


def precision_at(recall: Share, alarms: Share, prevalence: float) -> tuple[float | None, Bounds]:
    """Precision where a share ``prevalence`` of all rows is positive, and its bounds.

    By Bayes, with r the share of positives and a that of negatives that are predicted positive:

        precision = p r / (p r + (1 - p) a)

    Both are measured in their own class, so that the share of positives among the measured rows
    does not matter. Precision depends on them through a / r, whose bounds are those of two
    independent shares by MOVER-R (Donner & Zou 2012, Statistical Methods in Medical Research
    21:347). None where nothing is predicted positive.
    """

    def at(ratio: float) -> float:
        return prevalence / (prevalence + (1 - prevalence) * ratio)

    if min(recall.n, alarms.n) == 0:
        return None, Bounds(0.0, 1.0)
    r, a = recall.successes / recall.n, alarms.successes / alarms.n
    (low_r, high_r), (low_a, high_a) = recall.bounds, alarms.bounds
    product, most = r * a, math.inf
    if low_r > 0:
        root = product**2 - high_a * low_r * (2 * a - high_a) * (2 * r - low_r)
        most = (product + math.sqrt(max(0.0, root))) / (low_r * (2 * r - low_r))
    root = product**2 - low_a * high_r * (2 * a - low_a) * (2 * r - high_r)
    spread = high_r * (2 * r - high_r)
    least = (product - math.sqrt(max(0.0, root))) / spread if spread > 0 else low_a / high_r
    observed = at(a / r) if r > 0 else 0.0 if a > 0 else None
    return observed, Bounds(at(most), at(max(0.0, least)))


def share_of(
    right: ArrayLike, groups: Iterable[Hashable] | None = None, level: float = 0.95
) -> Share:
    """The share of ``right``, booleans (n,).

    Where groups repeat, counts are divided by the design effect (Rao & Scott 1992, Biometrics
    48:577) times G / (G - 1), and z gives way to t with G - 1 degrees of freedom, since the effect
    is estimated from G groups. Of groups that differ in size, G is the effective number
    (``effective_groups``): one large group among many single items shows hardly more than itself.
    """
    values = np.asarray(right, dtype=np.float64)
    n, codes = len(values), group_codes(groups, len(values))
    if codes is None:
        return Share(float(values.sum()), n, level)
    count = effective_groups(codes, n)
    if count <= 1:
        return Share(float(values.sum()), n, level, n, 0.0)
    effect = design_effect(values, codes, count / (count - 1))
    return Share(float(values.sum()) / effect, n / effect, level, effect, max(1.0, count - 1))


def design_effect(values: FloatArray, codes: IntArray, correction: float = 1.0) -> float:
    """Variance of a mean by groups (times ``correction``) over that by items, at least 1.

    ``values`` (n,) are 0 and 1, or changes of -1, 0 and 1. Where few items differ the ratio is
    unknown rather than 1, so a tenth of one group of typical size (n over ``effective_groups``) in
    which every item differs is added to both sums: the effect starts at that size (each such group
    counts as one item) and follows the data from there. (A whole group covered 98 % where 95 %
    were intended.)
    """
    size = len(codes) / effective_groups(codes, len(codes))
    residual = values - values.mean()
    by_group = np.bincount(codes, weights=residual)
    over = correction * np.sum(by_group**2) + size**2 / 10
    return max(1.0, float(over / (np.sum(residual**2) + size / 10)))


# ── Membership inference: the share of pairs of rows told apart ───────────────────────────────────


def membership_auc(trained: ArrayLike, unseen: ArrayLike) -> float:
    """AUC: the probability that a trained row scores above an unseen one, a tie counting half.

    The score of a row is what the adapter gained on it: base nats - adapter nats per answer token.
    Subtracting the base removes how hard the row is in itself (Watson et al. 2022, ICLR: difficulty
    calibration of membership inference). .5 is chance. Source: Yeom et al. (2018), CSF; the AUC as
    Mann & Whitney's statistic. Raises ValueError when either is empty.
    """
    first, second = np.asarray(trained, float), np.asarray(unseen, float)
    if not len(first) or not len(second):
        raise ValueError(
            "membership_auc expects trained and unseen rows, at least one of each; "
            f"found {len(first)} and {len(second)}."
        )
    # Ranks by sorting: scipy.stats, which ranks, takes half a second to import.
    second = np.sort(second)
    below, up_to = (np.searchsorted(second, first, side) for side in ("left", "right"))
    return float((below + up_to).sum() / 2 / (len(first) * len(second)))


def auc_bounds(auc: float, first: float, second: float, level: float = 0.95) -> Bounds:
    """Bounds of an AUC of ``first`` against ``second`` independent rows.

    The values A with |AUC - A| <= z sqrt(V(A)), where V(A) = A (1 - A) (1 + N (1 - A)/(2 - A)
    + N A/(1 + A)) / (first second) and N = (first + second)/2 - 1; the bounds have a width
    at 0 and 1 too. Source: Newcombe (2006), Statistics in Medicine 25:559, method 5. Where rows
    form groups, count the groups (``effective_groups``).
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    if min(first, second) < 1:
        return Bounds(0.0, 1.0)
    z, mean = float(ndtri(level)), (first + second) / 2 - 1

    def beyond(truth: float) -> float:
        spread = 1 + mean * (1 - truth) / (2 - truth) + mean * truth / (1 + truth)
        return (auc - truth) ** 2 - z * z * truth * (1 - truth) * spread / (first * second)

    # At the ends themselves `beyond` is 0, a root but not the bound.
    near = 1e-9
    lower = float(brentq(beyond, 0.0, min(auc, 1 - near))) if auc > near else 0.0
    upper = float(brentq(beyond, max(auc, near), 1.0)) if auc < 1 - near else 1.0
    return Bounds(lower, upper)
