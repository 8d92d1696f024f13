"""Score intervals against published figures, brute force, simulation and scipy."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lora_domains.stats.intervals import (
    Bounds,
    difference_bounds,
    items_needed_mean,
    items_needed_tango,
    items_needed_wilson,
    mcnemar,
    tango,
    wilson,
)


@st.composite
def pair_counts(draw: st.DrawFn, most: int = 300) -> tuple[int, int, int]:
    n = draw(st.integers(1, most))
    won = draw(st.integers(0, n))
    return won, draw(st.integers(0, n - won)), n


# ── Wilson ──


@given(st.integers(1, 400), st.data())
def test_wilson_is_scipys_interval_at_one_sided_95(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    expected = stats.binomtest(successes, n).proportion_ci(0.90, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_and_of_impossible_counts() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="0 <= successes <= n"):
        wilson(3, 2)
    with pytest.raises(ValueError, match="level"):
        wilson(1, 2, level=0.05)


# ── Tango ──


@pytest.mark.parametrize(
    ("won", "lost", "n", "level", "lower", "upper"),
    [
        # Tango (1998), section 6: sleeping difficulties, 95 % two-sided.
        (9, 3, 32, 0.975, -0.027, 0.390),
        # Fagerland, Lydersen & Laake (2017), ch. 8: response before and after consolidation
        # (Cavo 2012), and airway hyper-responsiveness (Bentur 2009).
        (6, 16, 161, 0.975, -0.1240, -0.0054),
        (1, 7, 21, 0.975, -0.517, -0.026),
    ],
)
def test_tango_published(
    won: int, lost: int, n: int, level: float, lower: float, upper: float
) -> None:
    assert tango(won, lost, n, level) == pytest.approx((lower, upper), abs=6e-4)


def test_tango_published_contact_lenses() -> None:
    # Tango (1998), section 6: soft contact lenses, 44 pairs, one lost; 90 % lower limit.
    assert tango(0, 1, 44).lower == pytest.approx(-0.096, abs=6e-4)


def test_no_flip_needs_88_items_for_three_points() -> None:
    z2 = stats.norm.ppf(0.95) ** 2
    assert tango(0, 0, 87).lower < -0.03 <= tango(0, 0, 88).lower
    assert tango(0, 0, 50).lower == pytest.approx(-z2 / (50 + z2))
    assert items_needed_tango(0, 0, 20, -0.03) == 88


def brute_force(won: int, lost: int, n: int) -> tuple[float, float]:
    """All differences kept by the score test, with q from maximising the likelihood on a grid."""
    kept = []
    for d in np.linspace(-0.999, 0.999, 1999):
        q = np.linspace(max(0.0, -d), (1 - d) / 2, 20001)[1:-1]
        likelihood = (n - won - lost) * np.log(np.maximum(1 - 2 * q - d, 1e-300))
        likelihood += won * np.log(q + d) + lost * np.log(q)
        best = q[np.argmax(likelihood)]
        score = (won - lost - n * d) / math.sqrt(n * (2 * best + d * (1 - d)))
        if abs(score) <= stats.norm.ppf(0.95):
            kept.append(d)
    return min(kept), max(kept)


@pytest.mark.parametrize(
    ("won", "lost", "n"),
    [(9, 3, 32), (0, 5, 12),
     *(pytest.param(*counts, marks=pytest.mark.long)
       for counts in ((0, 0, 30), (12, 0, 12), (3, 3, 40)))],
)  # fmt: skip
def test_tango_is_the_inversion_of_the_score_test(won: int, lost: int, n: int) -> None:
    assert tango(won, lost, n) == pytest.approx(brute_force(won, lost, n), abs=2.1e-3)


@given(pair_counts())
def test_tango_contains_its_estimate_and_swaps(counts: tuple[int, int, int]) -> None:
    won, lost, n = counts
    lower, upper = tango(won, lost, n)
    assert -1 <= lower <= (won - lost) / n <= upper <= 1
    assert lower < upper
    swapped = tango(lost, won, n)
    assert (swapped.lower, swapped.upper) == (-upper, -lower)


@given(pair_counts())
def test_tango_rises_with_each_item_won(counts: tuple[int, int, int]) -> None:
    won, lost, n = counts
    if won + lost < n:
        now, then = tango(won, lost, n), tango(won + 1, lost, n)
        assert then.lower > now.lower - 1e-9
        assert then.upper > now.upper - 1e-9
        assert sum(then) > sum(now)


@given(pair_counts(100), st.integers(2, 5))
def test_tango_shrinks_with_n(counts: tuple[int, int, int], times: int) -> None:
    won, lost, n = counts
    few, many = tango(won, lost, n), tango(won * times, lost * times, n * times)
    assert many.upper - many.lower < few.upper - few.lower


@pytest.mark.parametrize(
    ("won", "lost", "n", "threshold", "level"),
    [(30, 10, 300, 0.0, 0.95), (30, 10, 300, 0.0, 0.99), (5, 5, 100, -0.03, 0.95),
     (8, 30, 300, 0.0, 0.96)],
)  # fmt: skip
def test_items_needed_by_tango_have_80_percent_power(
    won: int, lost: int, n: int, threshold: float, level: float
) -> None:
    needed = items_needed_tango(won, lost, n, threshold, level)
    assert needed is not None
    rng, decided, runs = np.random.default_rng(3), 0, 1500
    shares = [won / n, lost / n, 1 - (won + lost) / n]
    for one, other, _ in rng.multinomial(needed, shares, size=runs).tolist():
        lower, upper = tango(one, other, needed, level)
        decided += lower >= threshold if (won - lost) / n > threshold else upper < threshold
    assert decided / runs == pytest.approx(0.80, abs=0.04)


def test_items_needed_for_a_mean_have_80_percent_power() -> None:
    rng = np.random.default_rng(4)
    for level in (0.95, 0.99):
        z = stats.norm.ppf(level)
        needed = items_needed_mean(0.1, Bounds(0.1 - z * 0.1, 0.1 + z * 0.1), 100, 0.0, level)
        assert needed is not None
        means = rng.normal(0.1, 1.0, (3000, needed)).mean(1)  # se .1 at 100: a deviation of 1
        power = np.mean(means - z / math.sqrt(needed) >= 0.0)
        assert power == pytest.approx(0.80, abs=0.03)


def test_tango_refuses_impossible_counts() -> None:
    assert tango(0, 0, 0) == (-1.0, 1.0)
    with pytest.raises(ValueError, match="won \\+ lost <= n"):
        tango(3, 3, 5)


def test_tango_covers_near_its_level_where_wald_does_not() -> None:
    # 3 % lost, none won, n = 50: how often does the lower bound lie above the truth, -.03?
    rng = np.random.default_rng(7)
    draws = rng.multinomial(50, [0.0, 0.03, 0.97], size=2000)
    z = stats.norm.ppf(0.95)
    false_tango = false_wald = 0
    for won, lost, _ in draws.tolist():
        d = (won - lost) / 50
        false_tango += tango(won, lost, 50).lower > -0.03
        false_wald += d - z * math.sqrt(max(0.0, (won + lost) / 50 - d * d) / 50) > -0.03
    assert false_tango / len(draws) < 0.065
    assert false_wald / len(draws) > 0.15


# ── McNemar, differences of samples ──


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(won: int, lost: int) -> None:
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    assert mcnemar(won, lost) == pytest.approx(expected, rel=1e-9)


def test_mcnemar_published() -> None:
    # Cavo 2012 in Fagerland, Lydersen & Laake (2017): exact conditional P = .052479.
    assert mcnemar(6, 16) == pytest.approx(0.052479, abs=1e-6)


def test_difference_bounds_published() -> None:
    # Newcombe (1998), table II: 56/70 - 48/80, method 10, 95 % two-sided: .0524 to .3339.
    bounds = difference_bounds(0.8, wilson(56, 70, 0.975), 0.6, wilson(48, 80, 0.975))
    assert bounds == pytest.approx((0.0524, 0.3339), abs=6e-5)


# ── items needed ──


@pytest.mark.parametrize(("level", "about"), [(0.95, 350), (0.96, 390), (0.99, 590)])
def test_items_needed_by_wilson_have_80_percent_power(level: float, about: int) -> None:
    needed = items_needed_wilson(85, 100, 0.80, level)
    assert needed == pytest.approx(about, rel=0.06)
    assert needed is not None
    hits = np.arange(needed + 1)
    passing = [wilson(int(k), needed, level).lower >= 0.80 for k in hits]
    assert stats.binom.pmf(hits, needed, 0.85)[passing].sum() == pytest.approx(0.80, abs=0.04)
    fewer = items_needed_wilson(12, 100, 0.80)
    assert fewer is not None
    assert wilson(0.12 * fewer, fewer).upper < 0.80
    assert items_needed_wilson(80, 100, 0.80) is None
    assert items_needed_wilson(0, 0, 0.80) is None


def test_items_needed_for_a_mean_without_bounds_is_unknown() -> None:
    assert items_needed_mean(1.0, Bounds(-math.inf, math.inf), 1, 0.0) is None


def test_importing_costs_neither_torch_nor_scipy() -> None:
    heavy = {"torch", "scipy", "sklearn"}
    code = f"import sys, lora_domains.verdict.gates; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
