"""Paired comparisons against scikit-learn, simulation and the intervals they use."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from lora_domains.stats.bootstrap import least_width
from lora_domains.stats.classes import macro, of_class
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_classes,
    compare_f1,
    compare_means,
    compare_ratios,
    holm,
    items_needed,
    ratio,
)
from lora_domains.stats.intervals import mcnemar, tango


def test_compare_accuracy_counts_and_uses_tango() -> None:
    base = [1, 1, 0, 0, 1, 0, 1, 1]
    adapter = [1, 0, 1, 1, 1, 1, 1, 1]
    compared = compare_accuracy(base, adapter)
    assert compared == Comparison(0.625, 0.875, 0.25, *tango(3, 1, 8), 8, 3, 1, mcnemar(3, 1))
    assert compare_accuracy(base, adapter, groups=range(8)) == compared


def test_clustered_accuracy_is_wider_and_p_counts_groups() -> None:
    rng = np.random.default_rng(5)
    flips = np.repeat(rng.choice([-1, 0, 1], p=[0.05, 0.7, 0.25], size=60), 5)
    base, adapter = (flips < 0).astype(int), (flips > 0).astype(int)
    groups = np.repeat(np.arange(60), 5).tolist()
    naive, compared = compare_accuracy(base, adapter), compare_accuracy(base, adapter, groups)
    assert compared.lower < naive.lower
    assert naive.upper < compared.upper
    whole = tango((flips > 0).sum() / 5, (flips < 0).sum() / 5, 60)
    assert (compared.lower, compared.upper) == pytest.approx(whole, abs=0.03)
    assert (compared.won, compared.lost) == (naive.won, naive.lost)
    assert compared.p == mcnemar(int((flips > 0).sum()) // 5, int((flips < 0).sum()) // 5)


def test_groups_without_any_flip_count_as_one_item_each() -> None:
    same = np.ones(400)
    compared = compare_accuracy(same, same, np.repeat(np.arange(40), 10).tolist())
    assert (compared.lower, compared.upper) == pytest.approx(tango(0, 0, 40))


def test_clustered_accuracy_covers() -> None:
    # 30 groups of 4, flips all or nothing within a group: 10 % of groups lose, so the truth is -.1.
    rng = np.random.default_rng(13)
    groups = np.repeat(np.arange(30), 4).tolist()
    missed = naive_missed = 0
    for _ in range(60):
        adapter = np.repeat(rng.random(30) > 0.1, 4).astype(float)
        compared = compare_accuracy(np.ones(120), adapter, groups)
        missed += compared.upper < -0.1 or compared.lower > -0.1
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
    compared = compare_f1(truth, truth, predicted)
    macro = f1_score(truth, predicted, labels=np.unique(truth), average="macro", zero_division=0.0)
    assert compared.adapter == pytest.approx(macro)
    assert compared.base == 1.0
    assert -1 <= compared.lower <= compared.difference <= compared.upper <= 1
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
    compared = [compare_f1(*drawn(200)) for _ in range(draws)]
    assert sum(one.upper < wanted for one in compared) <= 5
    assert sum(one.lower > wanted for one in compared) <= 6
    every = np.repeat(np.arange(30), 3)
    assert compare_f1(every, (every + 1) % 30, every).lower > 0.95


def test_f1_without_a_flip_still_has_width() -> None:
    truth = [0, 1] * 10
    compared = compare_f1(truth, truth, truth)
    assert compared.upper == pytest.approx(least_width(20), rel=0.1)
    grouped = compare_f1(truth, truth, truth, groups=[i // 4 for i in range(20)])
    assert grouped.upper == pytest.approx(least_width(5), rel=0.1)
    assert grouped.lower == -grouped.upper
    assert (compared.won, compared.lost, compared.p) == (0, 0, 1.0)


def test_compare_ratios_of_sums() -> None:
    base = np.stack([np.arange(20.0), np.full(20, 2.0)], axis=1)
    adapter = base + np.array([2.0, 0.0])
    compared = compare_ratios(base, adapter)
    assert (compared.base, compared.adapter) == (4.75, 5.75)
    # The gain is constant; one item gained as much again and one nothing, at least.
    assert (compared.lower, compared.upper) == pytest.approx(
        (1 - least_width(20), 1 + least_width(20))
    )
    assert (compared.won, compared.lost, compared.p, compared.n) == (None, None, None, 20)
    counted = compare_ratios(base, base, better=[1] * 5 + [-1] + [0] * 14)
    assert (counted.won, counted.lost, counted.p) == (5, 1, mcnemar(5, 1))


def test_one_missed_row_of_81_is_no_proof() -> None:
    truth = np.array([0] * 28 + [1] * 27 + [2] * 26)
    missed = truth.copy()
    missed[0] = 1
    for positive, groups in ((None, None), (0, None), (None, range(81))):
        compared = compare_f1(truth, truth, missed, positive, groups)
        assert (compared.base, compared.p) == (1.0, 1.0)
        assert compared.lower < compared.difference < 0.0 < compared.upper
    for statistic in (macro("precision"), macro("recall"), of_class("precision", 1)):
        assert compare_classes(truth, truth, missed, statistic).upper > 0.0


def test_nothing_that_is_compared_has_bounds_without_width() -> None:
    truth, ones = np.arange(60) % 3, np.ones(60)
    columns = np.stack([ones, ones], axis=1)
    compared = [
        compare_classes(truth, truth, truth, of_class("precision", 1)),
        compare_classes(truth, truth, truth, macro("precision")),
        compare_classes(truth, truth, (truth + 1) % 3, macro("recall")),
        compare_classes(truth, np.zeros(60), np.zeros(60), of_class("precision", 1)),
        compare_f1(truth, (truth + 1) % 3, truth),
        compare_means(0 * ones, 0 * ones, share=True),
        compare_means(0 * ones, 0.2 * ones, share=True),
        compare_means(2 * ones, 2 * ones),
        compare_means(0 * ones, 0 * ones),
        compare_means(2 * ones, 1.5 * ones, higher_is_better=False),
        compare_ratios(columns, columns),
        compare_ratios(0 * columns, 0 * columns),
        compare_ratios(columns, columns * [0.5, 1.0]),
        compare_accuracy(0 * ones, ones),
    ]
    for comparison in compared:
        assert comparison.upper - comparison.lower > 0.01, comparison


def test_five_answers_with_a_constant_gain_are_no_proof() -> None:
    compared = compare_means(0.5 * np.ones(5), 0.7 * np.ones(5), share=True)
    assert compared.lower < 0 < compared.upper


def test_a_rare_class_is_known_as_well_as_its_few_items() -> None:
    def width(positives: int) -> float:
        truth = (np.arange(500) < positives).astype(int)
        compared = compare_f1(truth, truth, truth, 1)
        return compared.upper - compared.lower

    # No item changed in either case, but each of 25 positives counts ten times as much.
    assert width(25) == pytest.approx(10 * width(250), rel=0.05)


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


def test_repeating_rows_does_not_buy_certainty() -> None:
    values = np.random.default_rng(3).normal(0.0, 1.0, 30)
    rows, groups = np.repeat(values, 8), np.repeat(np.arange(30), 8)
    single = compare_means(np.zeros(30), values)
    naive = compare_means(np.zeros(240), rows)
    clustered = compare_means(np.zeros(240), rows, groups.tolist())
    assert clustered.upper - clustered.lower == pytest.approx(single.upper - single.lower, rel=0.05)
    assert naive.upper - naive.lower < 0.5 * (single.upper - single.lower)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
@example([0.0, 1.7e-108])
def test_bootstrap_bounds_are_ordered_contain_the_estimate_and_mirror(values: list[float]) -> None:
    array = np.array(values)
    compared = compare_means(np.zeros(len(array)), array)
    assert compared.lower <= compared.difference <= compared.upper
    other = compare_means(array, np.zeros(len(array)), higher_is_better=False)
    assert (other.won, other.lost, other.p) == (compared.won, compared.lost, compared.p)
    assert other.difference == -compared.difference
    assert abs(other.lower + compared.upper) <= 0.5 * (compared.upper - compared.lower) + 1e-12


def test_items_needed_follows_the_interval_that_was_used() -> None:
    same = np.ones(50)
    assert items_needed(compare_accuracy(same, same), -0.03) == 88
    assert items_needed(compare_accuracy(same, same), 0.0) is None
    means = Comparison(1.0, 1.2, 0.2, -0.2, 0.7, 25, 15, 10, 0.4)
    assert items_needed(means, 0.0) == 229
    assert items_needed(means, 0.45) == 229


def test_holm_sets_aside_what_is_significant_and_frees_the_others() -> None:
    """The step-down procedure on four p-values."""
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    tried: list[tuple[str, float]] = []

    def test(name: str, level: float) -> tuple[float, bool]:
        tried.append((name, level))
        return level, p[name] < 1 - level

    found = holm({name: partial(test, name) for name in p}, lambda outcome: outcome[1])
    # .005 and .01 fall at .05 / 4, then .03 and .04 are held to .05 / 2.
    assert {name: significant for name, (_, significant) in found.items()} == {
        "a": True, "b": False, "c": False, "d": True
    }  # fmt: skip
    assert list(found) == list(p)
    assert found["b"][0] == found["c"][0] == pytest.approx(0.975)
    assert holm({}, bool) == {}
    only = holm({"x": lambda level: level}, lambda _: False)
    assert only == {"x": pytest.approx(0.95)}
