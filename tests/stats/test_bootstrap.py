"""The bootstrap against a textbook one, scipy and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_domains.stats.bootstrap import FloatArray, bootstrap, least_width
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.intervals import Bounds, tango


def mean_bounds(values: np.ndarray, **options: object) -> Bounds:
    columns = np.stack([values, np.ones(len(values))], axis=1)
    return bootstrap(ratio, columns, **options)  # type: ignore[arg-type]


def test_bootstrap_of_a_mean_is_near_the_t_interval_and_seeded() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 40)
    bounds = mean_bounds(values)
    half = stats.t.ppf(0.95, 39) * values.std(ddof=1) / math.sqrt(40)
    assert bounds == pytest.approx((values.mean() - half, values.mean() + half), abs=0.04)
    assert bounds == mean_bounds(values, seed=0)
    assert bounds != mean_bounds(values, seed=1)


def plain_bootstrap(values: np.ndarray, groups: np.ndarray | None) -> Bounds:
    """One resample after the other, as a textbook has it."""
    rng, means = np.random.default_rng(99), []
    names = np.arange(len(values)) if groups is None else groups
    members = [np.flatnonzero(names == name) for name in np.unique(names)]
    for _ in range(4000):
        drawn = np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        means.append(values[drawn].mean())
    count = len(members)
    tail = stats.norm.cdf(stats.t.ppf(0.05, count - 1) * math.sqrt(count / (count - 1)))
    return Bounds(*np.quantile(means, [tail, 1 - tail]))


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
        bounds = bootstrap(ratio, table, kinds=values.astype(int), groups=names, resamples=4000)
    else:
        bounds = mean_bounds(values, groups=names, resamples=4000)
    assert bounds == pytest.approx(plain_bootstrap(values, groups), abs=0.008)


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


def test_bootstrap_of_few_items_is_wide() -> None:
    assert mean_bounds(np.ones(1)) == (-math.inf, math.inf)
    assert mean_bounds(np.ones(9), groups=["one"] * 9) == (-math.inf, math.inf)
    few = mean_bounds(np.array([0.0, 1.0, 2.0]))
    assert few.lower < 0.0 < 2.0 < few.upper
    assert mean_bounds(np.array([0.0, 1.0, 2.0]), limits=(0.0, 2.0)) == (0.0, 2.0)
    assert mean_bounds(np.ones(1), limits=(0.0, 1.0)) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least one item"):
        mean_bounds(np.ones(0))
    with pytest.raises(ValueError, match="expected 3, found 2"):
        mean_bounds(np.ones(3), groups=["a", "b"])


def test_bootstrap_tail_is_hesterbergs() -> None:
    # Of a figure with a long tail above, the percentile is the wider bound there.
    values, seen = np.random.default_rng(2).normal(size=9), []

    def mean(sums: FloatArray) -> FloatArray:
        seen.append(np.exp(3 * ratio(sums)))
        return seen[-1]

    columns = np.stack([values, np.ones(9)], axis=1)
    bounds = bootstrap(mean, columns, resamples=8000, span=0.0)
    tail = stats.norm.cdf(stats.t.ppf(0.05, 8) * math.sqrt(9 / 8))
    drawn = max(seen, key=np.size)
    assert np.mean(drawn > bounds.upper) == pytest.approx(tail, abs=0.002)


def test_bootstrap_bounds_contain_the_estimate_of_a_biased_statistic() -> None:
    # The sample contains 40 distinct items; a resample practically never does.
    bounds = bootstrap(lambda sums: (sums > 0).sum(-1).astype(float), np.eye(40), limits=(0, 40))
    assert bounds.lower < 30 < bounds.upper == 40


def test_bounds_keep_widening_where_percentiles_stop() -> None:
    values = np.random.default_rng(1).normal(0.2, 1.0, 400)
    tails = [1e-2, 1e-3, 1e-5, 1e-7, 1e-9]
    bounds = [mean_bounds(values, level=1 - tail) for tail in tails]
    widths = [bound.upper - bound.lower for bound in bounds]
    error = values.std(ddof=1) / math.sqrt(400)
    for width, tail in zip(widths, tails, strict=True):
        assert width == pytest.approx(2 * stats.t.isf(tail, 399) * error, rel=0.1)
    assert widths == sorted(set(widths))


@given(
    st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=2, max_size=40),
    st.sampled_from([0.9, 0.96, 0.9999]),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_no_bounds_are_without_width(values: list[float], level: float, size: int) -> None:
    groups = [n // size for n in range(len(values))]
    bounds = mean_bounds(np.array(values), level=level, limits=(0.0, 1.0), groups=groups)
    least = least_width(groups[-1] + 1, level)
    assert bounds.upper - bounds.lower > 0.999 * min(1.0, least)


def test_the_least_width_is_tangos_for_half_an_item_won_and_half_lost() -> None:
    for n in (20, 88, 500):
        for level in (0.95, 0.99, 0.9999):
            half = tango(0.5, 0.5, n, level).upper
            assert least_width(n, level) == pytest.approx(half, rel=0.03)


def test_a_figure_that_is_not_a_number_has_no_bounds() -> None:
    bounds = mean_bounds(np.array([0.0, math.nan, 1.0]))
    assert all(map(math.isnan, bounds))


def test_bootstrap_covers_a_skewed_mean() -> None:
    rng = np.random.default_rng(11)
    low = high = 0
    for _ in range(300):
        bounds = mean_bounds(rng.exponential(1.0, 25), resamples=300)
        low += bounds.lower > 1
        high += bounds.upper < 1
    # A skewed mean is hard for any interval: the side of the long tail may miss twice its share.
    assert low / 300 <= 0.05
    assert 0.02 < high / 300 <= 0.13


def test_the_side_of_a_long_tail_is_widened() -> None:
    # KL of 100 texts of very different lengths. Without the correction 2.3 % of runs miss.
    rng, missed, runs = np.random.default_rng(11), 0, 2000
    for _ in range(runs):
        tokens = rng.integers(20, 200, 100)
        columns = np.stack([tokens * rng.gamma(1.0, 1.0, 100), tokens], axis=1)
        bounds = bootstrap(ratio, columns, level=0.99, resamples=500, span=0.0)
        missed += bounds.upper < 1.0
    assert missed / runs <= 0.018
