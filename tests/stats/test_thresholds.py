"""A threshold chosen on validation rows for a target recall or precision."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_recall_curve
from support.scripts import script

from lora_domains.errors import UsageError
from lora_domains.stats.intervals import wilson
from lora_domains.stats.thresholds import (
    LEVEL,
    POINTS,
    check_referral,
    choose_threshold,
    curve,
    label_thresholds,
    predicted_class,
    stored,
)

thresholds = script("thresholds", "verdict")
ROWS = st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=60)


def bound(chance: np.ndarray, truth: np.ndarray, name: str, threshold: float) -> float:
    """The lower bound of recall or precision of predictions from ``threshold`` on."""
    predicted = chance >= threshold
    counted = truth if name == "recall" else predicted
    return wilson(int((predicted & truth).sum()), int(counted.sum()), LEVEL).lower


@given(ROWS, st.floats(0.05, 0.95), st.sampled_from(["recall", "precision"]))
def test_a_target_is_reached_by_its_bound_at_the_least_cost(
    rows: list[tuple[int, bool]], target: float, name: str
) -> None:
    chance, truth = np.array([p / 10 for p, _ in rows]), np.array([t for _, t in rows])
    chosen = choose_threshold(chance, truth, **{name: target})
    if not truth.any():
        assert chosen is None
        return
    assert chosen is not None
    assert chosen.lower == pytest.approx(bound(chance, truth, name, chosen.threshold))
    possible = {t: bound(chance, truth, name, t) for t in chance}
    if max(possible.values()) < target:  # the nearest to it
        assert chosen.lower == pytest.approx(max(possible.values()))
        return
    assert chosen.lower >= target
    found = {t: (truth & (chance >= t)).sum() for t, lower in possible.items() if lower >= target}
    hits = (truth & (chance >= chosen.threshold)).sum()
    # A recall costs precision, so the highest threshold; a precision costs recall.
    assert hits == (min if name == "recall" else max)(found.values())


def test_a_threshold_is_chosen_by_groups_that_are_not_independent() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(400) % 2 == 0
    chance = 0.3 * truth + 0.1 * np.repeat(rng.normal(size=40), 10) + 0.1 * rng.normal(size=400)
    alone = choose_threshold(chance, truth, recall=0.8)
    grouped = choose_threshold(chance, truth, recall=0.8, groups=np.repeat(np.arange(40), 10))
    assert alone is not None
    assert grouped is not None
    assert grouped.threshold < alone.threshold
    assert min(alone.lower, grouped.lower) >= 0.8


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_probability_that_is_not_a_number_chooses_no_threshold(value: float) -> None:
    for target in ({"recall": 0.8}, {"precision": 0.8}):
        assert choose_threshold([0.9, value, 0.1], [True, False, True], **target) is None


@pytest.mark.parametrize("targets", [{}, {"recall": 0.8, "precision": 0.8}])
def test_one_target_is_given(targets: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="a recall or a precision"):
        choose_threshold([0.5, 0.1], [True, False], **targets)


def test_a_target_that_is_the_floor_mostly_passes_and_hardly_ever_fails() -> None:
    for validation, test in thresholds.SIZES:
        before, now = (
            thresholds.outcomes("recall", 0.8, validation, test, rule, 200, seed=1)
            for rule in ("figure", "bound")
        )
        assert before["pass"] < 0.2
        assert before["fail"] > 0.1
        assert now["pass"] > 0.6
        assert now["fail"] <= 0.02
    figures = json.loads(thresholds.RESULTS.read_text())["target_is_floor"]
    for rules in figures.values():
        assert rules["bound"]["pass"] >= 0.69
        assert rules["bound"]["fail"] <= 0.005
        assert rules["bound"]["below"] <= 0.015  # 1 % wanted; 2 sd


@given(ROWS)
def test_the_curve_is_scikit_learns(rows: list[tuple[int, bool]]) -> None:
    chance, truth = np.array([p / 10 for p, _ in rows]), np.array([t for _, t in rows])
    points = curve(chance, truth)
    if not truth.any():
        assert points == []
        return
    precision, recall, thresholds = precision_recall_curve(truth, chance)
    assert [p["threshold"] for p in points] == pytest.approx(thresholds[::-1].tolist())
    assert [p["precision"] for p in points] == pytest.approx(precision[-2::-1].tolist())
    assert [p["recall"] for p in points] == pytest.approx(recall[-2::-1].tolist())


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    chance = rng.random(5000)
    points = curve(chance, rng.random(5000) < chance)
    assert len(points) == POINTS
    assert points[-1]["recall"] == 1.0
    assert points[0]["threshold"] == chance.max()


def test_decide() -> None:
    shares = [0.5, 0.2, 0.3]
    assert predicted_class(shares, positive=1, threshold=0.2) == 1
    assert predicted_class(shares, positive=1, threshold=0.21) == 0
    assert predicted_class(shares, positive=0, threshold=0.6) == 2
    assert predicted_class(shares, positive=1, threshold=None) == 0
    assert predicted_class(shares, positive=None, threshold=0.1) == 0


def test_who_can_be_referred() -> None:
    check_referral(0.8, ["urgent", "routine"])
    check_referral(0.0, [])
    for below, labels, said in (
        (80, ["a", "b"], "0 to 1"), (0.8, [], "one label a row"), (0.8, ["refer", "b"], "refer"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            check_referral(below, labels)


def test_a_threshold_is_read_from_a_card() -> None:
    assert stored({"threshold": {"threshold": 0.3}}) == 0.3
    for judged in ({}, {"threshold": None}, {"threshold": {"threshold": None}}):
        assert stored(judged) is None


@pytest.mark.parametrize("seed", range(3))
def test_each_label_of_enough_rows_has_the_threshold_with_the_best_f1(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = (random.random((60, 3)) < [0.5, 0.4, 0.05]).astype(float)
    chance = (0.3 * truth + random.random(truth.shape)).clip(0, 1).round(2)
    found = label_thresholds(chance, truth)
    assert found is not None

    def best(chances: np.ndarray, labels: np.ndarray) -> float:
        tried = [f1_score(labels, chances >= at, zero_division=0) for at in np.unique(chances)]
        return max(tried)

    for label in (0, 1):
        chosen = f1_score(truth[:, label], chance[:, label] >= found[label])
        assert chosen == pytest.approx(best(chance[:, label], truth[:, label]))
    shared = f1_score(truth.ravel(), chance.ravel() >= found[2])  # too rare for one of its own
    assert shared == pytest.approx(best(chance.ravel(), truth.ravel()))


def test_no_threshold_is_chosen_without_a_label_or_from_what_is_no_number() -> None:
    assert label_thresholds(np.full((4, 2), 0.5), np.zeros((4, 2))) is None
    assert label_thresholds(np.full((4, 2), np.nan), np.ones((4, 2))) is None
