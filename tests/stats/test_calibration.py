"""Calibration with bounds, and risk against coverage."""

import numpy as np
import pytest

from lora_domains.stats.calibration import POINTS, calibration, risk_coverage


def drawn(sharpness: float, n: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, right): at sharpness 1 calibrated, above it too sure of itself."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.5, 1, n)
    return np.clip(0.5 + sharpness * (truth - 0.5), 0.5, 1), rng.random(n) < truth


def test_planted_overconfidence_is_told_from_calibration() -> None:
    sound, sure = (
        calibration(confidence, right, (confidence - right) ** 2)
        for confidence, right in (drawn(1.0), drawn(3.0))
    )
    assert sure["bounds"]["ece"]["lower"] > 0.08 > sound["bounds"]["ece"]["upper"]
    for figures in (sound, sure):
        for name in ("ece", "brier"):
            bounds = figures["bounds"][name]
            assert 0 <= bounds["lower"] <= figures[name] <= bounds["upper"]
    assert sound["bounds"]["brier"]["upper"] < sure["bounds"]["brier"]["lower"]


def test_a_calibrated_model_is_seldom_called_miscalibrated() -> None:
    blamed = 0
    for seed in range(60):
        confidence, right = drawn(1.0, 400, seed)
        figures = calibration(confidence, right, (confidence - right) ** 2)
        blamed += figures["bounds"]["ece"]["lower"] > 0
    assert blamed <= 8  # 3 expected; without the correction 22


def test_groups_widen_the_bounds() -> None:
    confidence, right = drawn(1.0, 400)
    confidence, right = np.repeat(confidence, 5), np.repeat(right, 5)
    groups = np.repeat(np.arange(400), 5).tolist()
    alone, together = (
        calibration(confidence, right, (confidence - right) ** 2, g)["bounds"]["brier"]
        for g in (None, groups)
    )
    assert together["upper"] - together["lower"] > 1.5 * (alone["upper"] - alone["lower"])


def test_risk_against_coverage_by_hand() -> None:
    points = risk_coverage(np.array([0.9, 0.6, 0.9, 0.8]), np.array([True, False, False, True]))
    assert [(p["confidence"], p["coverage"]) for p in points] == [(0.9, 0.5), (0.8, 0.75), (0.6, 1)]
    assert [p["risk"] for p in points] == pytest.approx([1 / 2, 1 / 3, 1 / 2])
    assert all(p["risk"] < p["upper"] <= 1 for p in points)


def test_referring_the_unsure_lowers_the_risk() -> None:
    points = risk_coverage(*drawn(1.0))
    assert len(points) == POINTS
    assert points[-1]["coverage"] == 1
    half = min(points, key=lambda p: abs(p["coverage"] - 0.5))
    assert half["upper"] < points[-1]["risk"]


def test_an_only_item_has_figures_too() -> None:
    figures = calibration(np.array([0.7]), np.array([True]), np.array([0.18]))
    assert figures["ece"] == pytest.approx(0.3)
    assert figures["bounds"]["brier"] == {"lower": 0.0, "upper": 2.0}


def test_calibration_equals_its_definition() -> None:
    random = np.random.default_rng(0)
    # Edges of the bins, where two conventions would differ, and everything between.
    confidence = np.array([*(k / 15 for k in range(8, 16)), *random.uniform(0.5, 1, 200)])
    right = random.random(len(confidence)) < confidence
    brier = 2 * (right - confidence) ** 2
    figures = calibration(confidence, right, brier)
    # Guo et al. (2017): 15 bins of equal width; an edge belongs to the lower bin.
    bins = np.ceil(confidence * 15).astype(int)
    gaps = [
        abs(right[bins == b].mean() - confidence[bins == b].mean()) * np.mean(bins == b)
        for b in set(bins)
    ]
    assert figures["ece"] == pytest.approx(sum(gaps))
    assert figures["brier"] == pytest.approx(brier.mean())


def test_ece_by_hand() -> None:
    # Ten answers at .8, eight right; five at .6, one right: gaps 0 and .4, a third of the items.
    confidence = np.array([0.8] * 10 + [0.6] * 5)
    right = np.array([True] * 8 + [False] * 2 + [True] + [False] * 4)
    assert calibration(confidence, right, np.zeros(15))["ece"] == pytest.approx(0.4 / 3)
