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

from lora_domains.statistics import (
    Bounds,
    Comparison,
    bootstrap_sums,
    compare_accuracy,
    compare_f1,
    compare_means,
    compare_sums,
    difference_bounds,
    items_needed,
    items_needed_mean,
    items_needed_tango,
    items_needed_wilson,
    mcnemar,
    paired_bootstrap,
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


def test_bootstrap_of_a_mean_is_near_the_t_interval_and_seeded() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 40)
    found = paired_bootstrap(lambda i: float(values[i].mean()), 40)
    half = stats.t.ppf(0.95, 39) * values.std(ddof=1) / math.sqrt(40)
    assert found == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert found == paired_bootstrap(lambda i: float(values[i].mean()), 40, seed=0)
    assert found != paired_bootstrap(lambda i: float(values[i].mean()), 40, seed=1)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_bootstrap_of_sums_is_the_bootstrap(whole: bool, grouped: bool) -> None:
    random = np.random.default_rng(3)
    columns = random.integers(0, 3, (90, 2)) if whole else random.random((90, 2))
    groups = random.integers(0, 30, 90).tolist() if grouped else None
    slow = paired_bootstrap(
        lambda i: float(columns[i, 0].sum() / columns[i, 1].sum()), 90, groups, seed=5
    )
    fast = bootstrap_sums(lambda sums: sums[:, 0] / sums[:, 1], columns, groups, seed=5)
    assert fast == pytest.approx(slow, rel=1e-12)


def test_bootstrap_of_sums_without_kept_counts_is_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(3).random((40, 1))
    kept = bootstrap_sums(lambda sums: sums[:, 0], values)
    monkeypatch.setattr("lora_domains.statistics._KEPT", 0)
    assert bootstrap_sums(lambda sums: sums[:, 0], values) == kept
    assert bootstrap_sums(lambda sums: sums[:, 0], [[1.0]]) == (-math.inf, math.inf)
    with pytest.raises(ValueError, match="at least one item"):
        bootstrap_sums(lambda sums: sums[:, 0], np.empty((0, 1)))


def test_bootstrap_draws_whole_groups() -> None:
    groups = np.array(["a", "b", "a", "c", "b", "b"])
    sizes = {"a": 2, "b": 3, "c": 1}
    lengths = set()

    def statistic(indices: np.ndarray) -> float:
        lengths.add(len(indices))
        for name, size in sizes.items():
            taken = np.bincount(indices, minlength=6)[groups == name]
            assert len(taken) == size
            assert (taken == taken[0]).all()
        return 0.0

    paired_bootstrap(statistic, 6, groups.tolist(), resamples=200)
    assert {3, 9} <= lengths


def test_repeating_rows_does_not_buy_certainty() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 30)
    rows, groups = np.repeat(values, 8), np.repeat(np.arange(30), 8)
    single = compare_means(np.zeros(30), values)
    naive = compare_means(np.zeros(240), rows)
    clustered = compare_means(np.zeros(240), rows, groups.tolist())
    assert clustered.upper - clustered.lower == pytest.approx(single.upper - single.lower, rel=0.05)
    assert naive.upper - naive.lower < 0.5 * (single.upper - single.lower)


def test_bootstrap_of_few_items_is_wide() -> None:
    assert paired_bootstrap(lambda i: 1.0, 1) == (-math.inf, math.inf)
    assert paired_bootstrap(lambda i: 1.0, 9, ["one"] * 9) == (-math.inf, math.inf)
    values = np.array([0.0, 1.0, 2.0])
    assert paired_bootstrap(lambda i: float(values[i].mean()), 3) == (0.0, 2.0)
    with pytest.raises(ValueError, match="at least one item"):
        paired_bootstrap(lambda i: 0.0, 0)
    with pytest.raises(ValueError, match="expected 3, found 2"):
        paired_bootstrap(lambda i: 0.0, 3, ["a", "b"])


def test_bootstrap_tail_is_hesterbergs() -> None:
    values, seen = np.random.default_rng(2).normal(size=5), []

    def mean(indices: np.ndarray) -> float:
        seen.append(values[indices].mean())
        return float(seen[-1])

    found = paired_bootstrap(mean, 5, resamples=8000)
    tail = stats.norm.cdf(stats.t.ppf(0.05, 4) * math.sqrt(5 / 4))
    assert np.mean(np.array(seen) < found.lower) == pytest.approx(tail, abs=0.002)
    assert np.mean(np.array(seen) > found.upper) == pytest.approx(tail, abs=0.002)


def test_bootstrap_bounds_hold_the_estimate_of_a_biased_statistic() -> None:
    # A resample of 40 items never holds all 40, which is what the sample itself holds.
    found = paired_bootstrap(lambda i: float(len(np.unique(i))), 40)
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
        values = rng.exponential(1.0, 25)
        found = paired_bootstrap(lambda i, v=values: float(v[i].mean()), 25, resamples=300)  # type: ignore[misc]
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


def test_f1_without_a_flip_still_has_width() -> None:
    truth = [0, 1] * 10
    found = compare_f1(truth, truth, truth)
    assert (found.lower, found.upper) == pytest.approx(tango(0, 0, 20))
    grouped = compare_f1(truth, truth, truth, groups=[i // 4 for i in range(20)])
    assert (grouped.lower, grouped.upper) == pytest.approx(tango(0, 0, 5))
    assert (found.won, found.lost, found.p) == (0, 0, 1.0)


def test_compare_takes_any_statistic_of_sums() -> None:
    counts = np.stack([np.arange(20.0), np.ones(20)], axis=1)
    longer = np.add(counts, [1, 0])
    found = compare_sums(lambda sums: sums[:, 0] / sums[:, 1], counts, longer)
    assert (found.base, found.adapter) == (9.5, 10.5)
    assert (found.lower, found.upper) == pytest.approx((1.0, 1.0))
    assert (found.won, found.lost, found.p, found.n) == (None, None, None, 20)
    better = [1] * 5 + [-1] + [0] * 14
    counted = compare_sums(lambda sums: sums[:, 0] * 0, counts, counts, better=better)
    assert (counted.won, counted.lost, counted.p) == (5, 1, mcnemar(5, 1))


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
    with pytest.raises(ValueError, match="same items twice"):
        compare_sums(lambda sums: sums[:, 0], [[1]], [[1], [2]])


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
    code = "import sys, lora_domains.gates; print({'torch', 'scipy', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
