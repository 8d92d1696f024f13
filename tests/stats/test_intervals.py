"""Intervals against published figures, brute force, simulation, scipy and scikit-learn."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import f1_score

from lora_domains.stats.bootstrap import Bounds, FloatArray, bootstrap
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_classes,
    compare_f1,
    compare_means,
    compare_ratios,
    items_needed,
    ratio,
)
from lora_domains.stats.intervals import (
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
    ("won", "lost", "n"), [(0, 0, 30), (9, 3, 32), (0, 5, 12), (12, 0, 12), (3, 3, 40)]
)
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


@given(pair_counts(), st.sampled_from([-0.1, -0.03, 0.0, 0.05]))
def test_items_needed_by_tango_settles_it(counts: tuple[int, int, int], threshold: float) -> None:
    won, lost, n = counts
    needed = items_needed_tango(won, lost, n, threshold)
    if needed is None:
        assert (won - lost) / n == threshold
        return

    def settled(items: float) -> bool:
        lower, upper = tango(won / n * items, lost / n * items, items)
        return lower >= threshold - 1e-9 or upper <= threshold + 1e-9

    assert settled(needed)
    assert needed == 1 or not settled(0.98 * (needed - 1))


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
    found = difference_bounds(0.8, wilson(56, 70, 0.975), 0.6, wilson(48, 80, 0.975))
    assert found == pytest.approx((0.0524, 0.3339), abs=6e-5)


# ── bootstrap ──


def mean_bounds(values: np.ndarray, **options: object) -> Bounds:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap(ratio, columns, **options)  # type: ignore[arg-type]


def test_bootstrap_of_a_mean_is_near_the_t_interval_and_seeded() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 40)
    found = mean_bounds(values)
    half = stats.t.ppf(0.95, 39) * values.std(ddof=1) / math.sqrt(40)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert found == mean_bounds(values, seed=0)
    assert found != mean_bounds(values, seed=1)


def plain_bootstrap(values: np.ndarray, groups: np.ndarray | None) -> Bounds:
    """One resample after the other, as a textbook has it."""
    rng, found = np.random.default_rng(99), []
    names = np.arange(len(values)) if groups is None else groups
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    for _ in range(4000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        found.append(values[drawn].mean())
    count = len(members)
    tail = stats.norm.cdf(stats.t.ppf(0.05, count - 1) * math.sqrt(count / (count - 1)))
    return Bounds(*np.quantile(found, [tail, 1 - tail]))


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("by_kind", [False, True])
def test_sums_drawn_at_once_are_the_textbook_bootstrap(grouped: bool, by_kind: bool) -> None:
    rng = np.random.default_rng(4)
    groups = rng.integers(0, 40, 200) if grouped else None
    effect = 0 if groups is None else rng.random(40)[groups]
    values = (rng.random(200) + effect > 0.9).astype(float)
    names = None if groups is None else groups.tolist()
    if by_kind:
        table = np.array([[0.0, 1.0], [1.0, 1.0]])
        found = bootstrap(ratio, table, kinds=values.astype(int), groups=names, resamples=4000)
    else:
        found = mean_bounds(values, groups=names, resamples=4000)
    assert found == pytest.approx(plain_bootstrap(values, groups), abs=0.008)


def test_bootstrap_draws_whole_groups() -> None:
    groups = np.array(["a", "b", "a", "c", "b", "b"])
    seen: list[np.ndarray] = []

    def statistic(sums: FloatArray) -> FloatArray:
        seen.append(np.atleast_2d(sums))
        return sums[..., 0]

    bootstrap(statistic, np.eye(6), groups=groups.tolist(), resamples=200)
    drawn = max(seen, key=len)
    for name in "abc":
        taken = drawn[:, groups == name]
        assert (taken == taken[:, :1]).all()
    assert (drawn[:, [0, 1, 3]].sum(1) == 3).all()


def test_repeating_rows_does_not_buy_certainty() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 30)
    rows, groups = np.repeat(values, 8), np.repeat(np.arange(30), 8)
    single = compare_means(np.zeros(30), values)
    naive = compare_means(np.zeros(240), rows)
    clustered = compare_means(np.zeros(240), rows, groups.tolist())
    assert clustered.upper - clustered.lower == pytest.approx(single.upper - single.lower, rel=0.05)
    assert naive.upper - naive.lower < 0.5 * (single.upper - single.lower)


def test_bootstrap_of_few_items_is_wide() -> None:
    assert mean_bounds(np.ones(1)) == (-math.inf, math.inf)
    assert mean_bounds(np.ones(9), groups=["one"] * 9) == (-math.inf, math.inf)
    assert mean_bounds(np.array([0.0, 1.0, 2.0])) == (0.0, 2.0)
    with pytest.raises(ValueError, match="at least one item"):
        mean_bounds(np.ones(0))
    with pytest.raises(ValueError, match="expected 3, found 2"):
        mean_bounds(np.ones(3), groups=["a", "b"])


def test_bootstrap_tail_is_hesterbergs() -> None:
    values, seen = np.random.default_rng(2).normal(size=9), []

    def mean(sums: FloatArray) -> FloatArray:
        seen.append(ratio(sums))
        return seen[-1]

    columns = np.stack([values, np.ones(9)], axis=1)
    found = bootstrap(mean, columns, resamples=8000)
    tail = stats.norm.cdf(stats.t.ppf(0.05, 8) * math.sqrt(9 / 8))
    drawn = max(seen, key=np.size)
    assert np.mean(drawn < found.lower) == pytest.approx(tail, abs=0.002)
    assert np.mean(drawn > found.upper) == pytest.approx(tail, abs=0.002)


def test_bootstrap_bounds_hold_the_estimate_of_a_biased_statistic() -> None:
    # A resample of 40 items never holds all 40, which is what the sample itself holds.
    found = bootstrap(lambda sums: (sums > 0).sum(-1).astype(float), np.eye(40))
    assert found.lower < 30 < found.upper == 40


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_bootstrap_bounds_are_ordered_contain_the_estimate_and_mirror(values: list[float]) -> None:
    array = np.array(values)
    found = compare_means(np.zeros(len(array)), array)
    assert found.lower <= found.difference <= found.upper
    other = compare_means(array, np.zeros(len(array)), higher_is_better=False)
    assert (other.won, other.lost, other.p) == (found.won, found.lost, found.p)
    assert other.difference == -found.difference
    assert abs(other.lower + found.upper) <= 0.5 * (found.upper - found.lower) + 1e-12


def test_bootstrap_covers_a_skewed_mean() -> None:
    rng = np.random.default_rng(11)
    low = high = 0
    for _ in range(300):
        found = mean_bounds(rng.exponential(1.0, 25), resamples=300)
        low += found.lower > 1
        high += found.upper < 1
    # A skewed mean is hard for any interval: the side of the long tail may miss twice its share.
    assert low / 300 <= 0.05
    assert 0.02 < high / 300 <= 0.13


# ── comparisons ──


def test_compare_accuracy_counts_and_uses_tango() -> None:
    base = [1, 1, 0, 0, 1, 0, 1, 1]
    adapter = [1, 0, 1, 1, 1, 1, 1, 1]
    found = compare_accuracy(base, adapter)
    assert found == Comparison(0.625, 0.875, 0.25, *tango(3, 1, 8), 8, 3, 1, mcnemar(3, 1))
    assert compare_accuracy(base, adapter, groups=range(8)) == found


def test_clustered_accuracy_is_wider_and_p_counts_groups() -> None:
    rng = np.random.default_rng(5)
    flips = np.repeat(rng.choice([-1, 0, 1], p=[0.05, 0.7, 0.25], size=60), 5)
    base, adapter = (flips < 0).astype(int), (flips > 0).astype(int)
    groups = np.repeat(np.arange(60), 5).tolist()
    naive, found = compare_accuracy(base, adapter), compare_accuracy(base, adapter, groups)
    assert found.lower < naive.lower
    assert naive.upper < found.upper
    whole = tango((flips > 0).sum() / 5, (flips < 0).sum() / 5, 60)
    assert (found.lower, found.upper) == pytest.approx(whole, abs=0.03)
    assert (found.won, found.lost) == (naive.won, naive.lost)
    assert found.p == mcnemar(int((flips > 0).sum()) // 5, int((flips < 0).sum()) // 5)


def test_groups_without_any_flip_count_as_one_item_each() -> None:
    same = np.ones(400)
    found = compare_accuracy(same, same, np.repeat(np.arange(40), 10).tolist())
    assert (found.lower, found.upper) == pytest.approx(tango(0, 0, 40))


def test_clustered_accuracy_covers() -> None:
    # 30 groups of 4, flips all or nothing within a group: 10 % of groups lose, so the truth is -.1.
    rng = np.random.default_rng(13)
    groups = np.repeat(np.arange(30), 4).tolist()
    missed = naive_missed = 0
    for _ in range(60):
        adapter = np.repeat(rng.random(30) > 0.1, 4).astype(float)
        found = compare_accuracy(np.ones(120), adapter, groups)
        missed += found.upper < -0.1 or found.lower > -0.1
        naive = compare_accuracy(np.ones(120), adapter)
        naive_missed += naive.upper < -0.1 or naive.lower > -0.1
    assert missed / 60 <= 0.12
    assert naive_missed / 60 > 0.2


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_f1_is_scikit_learns(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 30))
    truth = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    predicted = data.draw(st.lists(st.integers(-1, 4), min_size=n, max_size=n))
    found = compare_f1(truth, truth, predicted)
    macro = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0)
    assert found.adapter == pytest.approx(macro)
    assert found.base == 1.0
    assert -1 <= found.lower <= found.difference <= found.upper <= 1
    one = f1_score(truth, predicted, labels=[2], average="macro", zero_division=0.0)
    assert compare_f1(truth, truth, predicted, positive=2).adapter == pytest.approx(one)


def test_macro_f1_of_many_small_classes_covers_what_it_estimates() -> None:
    """A class that a resample lacks must not count as 0: the bounds would lie too low."""
    classes, draws = 77, 40
    random = np.random.default_rng(0)

    def drawn(n: int) -> list[np.ndarray]:
        truth = random.integers(0, classes, n)
        others = random.integers(0, classes, (2, n))
        return [truth, *(np.where(random.random(n) < p, truth, other)
                         for p, other in zip((0.3, 0.75), others, strict=True))]  # fmt: skip

    truth, base, adapter = drawn(300_000)
    wanted = f1_score(truth, adapter, average="macro") - f1_score(truth, base, average="macro")
    found = [compare_f1(*drawn(200)) for _ in range(draws)]
    assert sum(one.upper < wanted for one in found) <= 5
    assert sum(one.lower > wanted for one in found) <= 6
    every = np.repeat(np.arange(30), 3)
    assert compare_f1(every, (every + 1) % 30, every).lower > 0.95


def test_f1_without_a_flip_still_has_width() -> None:
    truth = [0, 1] * 10
    found = compare_f1(truth, truth, truth)
    assert (found.lower, found.upper) == pytest.approx(tango(0, 0, 20))
    grouped = compare_f1(truth, truth, truth, groups=[i // 4 for i in range(20)])
    assert (grouped.lower, grouped.upper) == pytest.approx(tango(0, 0, 5))
    assert (found.won, found.lost, found.p) == (0, 0, 1.0)


def test_compare_ratios_of_sums() -> None:
    base = np.stack([np.arange(20.0), np.full(20, 2.0)], axis=1)
    adapter = base + np.array([2.0, 0.0])
    found = compare_ratios(base, adapter)
    assert (found.base, found.adapter) == (4.75, 5.75)
    assert (found.lower, found.upper) == pytest.approx((1.0, 1.0))
    assert (found.won, found.lost, found.p, found.n) == (None, None, None, 20)
    counted = compare_ratios(base, base, better=[1] * 5 + [-1] + [0] * 14)
    assert (counted.won, counted.lost, counted.p) == (5, 1, mcnemar(5, 1))


def test_level_widens_every_comparison() -> None:
    rng = np.random.default_rng(6)
    truth, base, adapter = rng.integers(0, 2, (3, 300))
    columns = np.stack([rng.random(300), np.ones(300)], axis=1)
    groups = (np.arange(300) // 2).tolist()
    made = [
        lambda level: compare_accuracy(base == truth, adapter == truth, level=level),
        lambda level: compare_accuracy(base == truth, adapter == truth, groups, level),
        lambda level: compare_means(rng.random(300) * 0 + base, adapter, level=level),
        lambda level: compare_f1(truth, base, adapter, 1, level=level),
        lambda level: compare_ratios(columns, columns[::-1], level=level),
    ]
    for comparison in made:
        usual, strict = comparison(0.95), comparison(0.998)
        assert strict.lower < usual.lower <= usual.upper < strict.upper
        assert (usual.level, strict.level) == (0.95, 0.998)
        more = items_needed(strict, -0.5), items_needed(usual, -0.5)
        assert more[0] is not None
        assert more[1] is not None
        assert more[0] > more[1]


def test_comparisons_refuse_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="same items"):
        compare_accuracy([1, 0], [1])
    with pytest.raises(ValueError, match="same items"):
        compare_means([], [])
    with pytest.raises(ValueError, match="right or wrong"):
        compare_accuracy([0.5], [1])
    with pytest.raises(ValueError, match="item 1 of adapter is nan"):
        compare_means([1.0, 2.0], [1.0, math.nan])
    with pytest.raises(ValueError, match="one length"):
        compare_f1([0, 1], [0, 1], [0])
    with pytest.raises(ValueError, match="targets >= 0"):
        compare_f1([-1, 1], [0, 1], [0, 1])
    with pytest.raises(ValueError, match="one length"):
        compare_classes([0, 1], [0, 1], [0], ratio)
    with pytest.raises(ValueError, match="same items"):
        compare_ratios([[1.0, 1.0]], [[1.0, 1.0], [2.0, 1.0]])


# ── items needed ──


def test_items_needed_by_wilson() -> None:
    needed = items_needed_wilson(85, 100, 0.80)
    assert needed == 174
    assert wilson(0.85 * 173, 173).lower < 0.80 <= wilson(0.85 * 174, 174).lower
    fewer = items_needed_wilson(12, 100, 0.80)
    assert fewer is not None
    assert wilson(0.12 * fewer, fewer).upper < 0.80
    assert items_needed_wilson(80, 100, 0.80) is None
    assert items_needed_wilson(0, 0, 0.80) is None


def test_items_needed_follows_the_interval_that_was_used() -> None:
    same = np.ones(50)
    assert items_needed(compare_accuracy(same, same), -0.03) == 88
    assert items_needed(compare_accuracy(same, same), 0.0) is None
    means = Comparison(1.0, 1.2, 0.2, -0.2, 0.7, 25, 15, 10, 0.4)
    assert items_needed(means, 0.0) == 100
    assert items_needed(means, 0.45) == 100


def test_items_needed_for_a_mean_without_bounds_is_unknown() -> None:
    assert items_needed_mean(1.0, Bounds(-math.inf, math.inf), 1, 0.0) is None


def test_importing_costs_neither_torch_nor_scipy() -> None:
    heavy = {"torch", "scipy", "sklearn"}
    code = f"import sys, lora_domains.verdict.gates; print({heavy!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
