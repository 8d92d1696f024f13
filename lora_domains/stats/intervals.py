"""Score intervals: bounds of a share, of a paired difference of shares, and the items they need.

Every bound is one-sided: at ``level=.95`` the truth lies below ``lower`` in at most 5 % of
repetitions, and above ``upper`` in at most 5 %. (Together the two make a 90 % interval.) A gate
tests one direction only, so its whole 5 % error is on that side.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Bounds(NamedTuple):
    """One-sided bounds, each at its own level, in the unit of the figure they bound."""

    lower: float
    upper: float


def wilson(successes: float, n: float, level: float = 0.95) -> Bounds:
    """Bounds of a share, ``successes`` of ``n``: the true shares that a score test does not reject.

    |s/n - p| <= z sqrt(p (1 - p) / n), solved for p. Counts may be fractional (a share at another
    n). Without any item: (0, 1). Source: Wilson, E. B. (1927), Probable inference, the law of
    succession, and statistical inference, JASA 22:209.

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


def tango(won: float, lost: float, n: float, level: float = 0.95) -> Bounds:
    """Bounds of the paired difference (won - lost) / n by Tango's score interval.

    The bounds solve T(d) = z and T(d) = -z, where
        T(d) = (won - lost - n d) / sqrt(n (2 q + d (1 - d)))
    and q, the probability of a lost item, is its maximum-likelihood estimate under the difference
    d: the larger root of 2n q² + (d (2n - won + lost) - won - lost) q - lost d (1 - d) = 0. The
    interval keeps a width when no item changes: won = lost = 0 gives ± z² / (n + z²), so a margin
    of 3 points needs 88 items, where a Wald interval would have no width at all. Counts may be
    fractional (an effective sample size). Source: Tango, T. (1998), Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design, Statistics in Medicine
    17:891.

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

    Twice the smaller tail of binomial(won + lost, 1/2), at most 1. Source: McNemar, Q. (1947),
    Psychometrika 12:153, in its exact form; for scores other than right or wrong it is the sign
    test. Items that did not change carry no information here.

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


# ── How many items a decision needs ───────────────────────────────────────────────────────────────

POWER = 0.80
"""With so many items a bound clears the threshold with this probability, if the truth is what was
observed. A number at which the bound of the observed figure reaches it does so half of the time."""


def items_needed_wilson(
    successes: float, n: float, threshold: float, level: float = 0.95
) -> int | None:
    """Items for ``POWER``, at the share s/n that was observed and the threshold t:

        n' = ((z sqrt(t (1 - t)) + z_power sqrt(s/n (1 - s/n))) / (s/n - t))²

    (Fleiss, Levin & Paik 2003, Statistical Methods for Rates and Proportions, ch. 2.) None when
    s/n is the threshold, or n is 0.
    """
    if n == 0 or successes / n == threshold:
        return None
    share = successes / n
    here = _z(level) * math.sqrt(threshold * (1 - threshold))
    there = _z(POWER) * math.sqrt(share * (1 - share))
    return _at_least(((here + there) / (share - threshold)) ** 2)


def items_needed_tango(
    won: float, lost: float, n: float, threshold: float, level: float = 0.95
) -> int | None:
    """Items for ``POWER``: as for a share, from the deviations of one item's change.

    At the threshold it is that of Tango's statistic, at the observed difference d the square root
    of (won + lost)/n - d². None when (won - lost) / n is the threshold, or n is 0.
    """
    if n == 0 or (won - lost) / n == threshold:
        return None
    numerator, variance = _tango_terms(won, lost, n, threshold)
    here = _z(level) * math.sqrt(variance / n)
    there = _z(POWER) * math.sqrt(max(0.0, (won + lost) / n - ((won - lost) / n) ** 2))
    return _at_least(((here + there) * n / numerator) ** 2)


def items_needed_mean(
    observed: float,
    bounds: Bounds,
    n: int,
    threshold: float,
    level: float = 0.95,
    at: float | None = None,
) -> int | None:
    """Items for ``POWER`` at level ``at``: n' = n (width / z · (z_at + z_power) / distance)².

    ``bounds`` are those at ``level``, as ``at`` is by default. The width on the threshold's side is
    z standard errors and shrinks as 1/sqrt(n). None when the figure is the threshold, or its bounds
    are infinite.
    """
    width = observed - bounds.lower if observed > threshold else bounds.upper - observed
    if observed == threshold or not math.isfinite(width):
        return None
    reach = width / _z(level) * (_z(at or level) + _z(POWER))
    return _at_least(n * (reach / (observed - threshold)) ** 2)


# ── Inside ────────────────────────────────────────────────────────────────────────────────────────


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

    # Where no item or every item changes the variance is 0 at the estimate too: a root, but not
    # the bound, so the search stops short of it.
    start, end = -1.0, (won - lost) / n - 1e-12
    if distance(start) <= 0 or end <= start:
        return -1.0
    return float(brentq(distance, start, end, xtol=1e-13))
