"""A threshold tuned on validation for a target recall or precision, against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_curve

from lora_domains.errors import UsageError
from lora_domains.stats.thresholds import (
    POINTS,
    check_referral,
    choose_threshold,
    curve,
    predicted_class,
    stored,
)

ROWS = st.lists(st.tuples(st.integers(0, 10), st.booleans()), min_size=1, max_size=60)


def reached(chance: np.ndarray, truth: np.ndarray, threshold: float) -> tuple[float, float]:
    """Recall and precision of predictions from ``threshold`` on."""
    predicted = chance >= threshold
    hits = (predicted & truth).sum()
    return hits / max(1, truth.sum()), hits / max(1, predicted.sum())


@given(ROWS, st.floats(0.05, 1))
def test_a_target_recall_is_reached_by_the_highest_threshold(
    rows: list[tuple[int, bool]], wanted: float
) -> None:
    chance, truth = np.array([p / 10 for p, _ in rows]), np.array([t for _, t in rows])
    threshold = choose_threshold(chance, truth, recall=wanted)
    if not truth.any():
        assert threshold is None
        return
    assert threshold is not None
    assert reached(chance, truth, threshold)[0] >= wanted - 1e-9
    lowest_predicted = chance[chance >= threshold].min()
    assert all(reached(chance, truth, t)[0] < wanted for t in chance if t > lowest_predicted)


@given(ROWS, st.floats(0.05, 1))
def test_a_target_precision_is_reached_with_the_highest_recall(
    rows: list[tuple[int, bool]], wanted: float
) -> None:
    chance, truth = np.array([p / 10 for p, _ in rows]), np.array([t for _, t in rows])
    threshold = choose_threshold(chance, truth, precision=wanted)
    possible = [r for t in chance if (r := reached(chance, truth, t))[1] >= wanted - 1e-9 and r[0]]
    if not possible:
        assert threshold is None
        return
    assert threshold is not None
    recall, precision = reached(chance, truth, threshold)
    assert precision >= wanted - 1e-9
    assert recall == max(r for r, _ in possible)


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
        (80, ["a", "b"], "0 to 1"), (0.8, [], "generated answers"), (0.8, ["refer", "b"], "refer"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            check_referral(below, labels)


def test_a_threshold_is_read_from_a_card() -> None:
    assert stored({"threshold": {"threshold": 0.3}}) == 0.3
    for judged in ({}, {"threshold": None}, {"threshold": {"threshold": None}}):
        assert stored(judged) is None
