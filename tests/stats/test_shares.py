"""Shares of grouped items, by simulation (benchmarks/verdict/simulation.py)."""

import numpy as np
import pytest
from support.scripts import script

from lora_domains.stats.calibration import risk_coverage
from lora_domains.stats.intervals import wilson
from lora_domains.stats.shares import Share, precision_at, share_of

simulation = script("simulation", "verdict")


@pytest.mark.parametrize("correlation", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("patients", ["40 of 5", "40 of 10"])
def test_positives_of_one_patient_do_not_pass_a_recall_at_the_floor(
    patients: str, correlation: float
) -> None:
    # Without the design effect .08, .13 and .16 for 5 positives each, and .21 for 10.
    assert simulation.false_passes(patients, correlation, 0.96, 0.8, 2000) <= 1.5 * 0.04


@pytest.mark.parametrize("patients", ["40 of 1 to 29", "3 of 60 and 60 of 1"])
def test_patients_with_many_positives_count_as_what_they_show(patients: str) -> None:
    # As many groups of the mean size gave .022 and .13 where .01 are intended.
    assert simulation.false_passes(patients, 0.3, 0.99, 0.9, 1000) <= 0.015


def test_a_share_of_items_alone_is_wilsons() -> None:
    right = np.arange(100) < 85
    assert share_of(right, None, 0.96).bounds == wilson(85, 100, 0.96)
    assert share_of(right, range(100), 0.96).bounds == wilson(85, 100, 0.96)
    assert share_of([], None).bounds == (0.0, 1.0)


def test_repeated_rows_say_no_more_than_one_of_each() -> None:
    right = np.arange(60) < 51
    repeated = share_of(np.repeat(right, 5), np.repeat(np.arange(60), 5).tolist())
    single = share_of(right)
    assert repeated.n == pytest.approx(60, rel=0.05)
    assert repeated.bounds == pytest.approx(single.bounds, abs=0.01)
    needed = [share.items_needed(0.80, 0.95) for share in (repeated, single)]
    assert needed[0] == pytest.approx(5 * needed[1], rel=0.1)


def test_one_group_says_nothing() -> None:
    share = share_of(np.ones(50), ["one"] * 50)
    assert share.bounds == (0.0, 1.0)
    assert share.items_needed(0.8, 0.95) is None


def test_the_risk_of_referral_counts_patients() -> None:
    rng = np.random.default_rng(0)
    right = np.repeat(rng.random(40) < 0.8, 10)
    confidence = rng.random(400)
    alone = risk_coverage(confidence, right)[-1]
    grouped = risk_coverage(confidence, right, np.repeat(np.arange(40), 10).tolist())[-1]
    assert grouped["risk"] == alone["risk"]
    assert grouped["upper"] > alone["upper"] + 0.05


def test_precision_is_restated_for_another_prevalence() -> None:
    # 172 of 200 positives found and 10 false alarms among 300: .945 at the test set's 40 %.
    recall, alarms = Share(172, 200, 0.95), Share(10, 300, 0.95)
    here, bounds = precision_at(recall, alarms, 0.4)
    assert here == pytest.approx(172 / 182)
    assert bounds.lower < 172 / 182 < bounds.upper
    rare, bounds = precision_at(recall, alarms, 0.05)
    assert rare == pytest.approx(0.58, abs=0.005)
    assert 0.4 < bounds.lower < 0.5 < 0.65 < bounds.upper < 0.75


@pytest.mark.parametrize(
    ("found", "alarms", "observed"),
    [((9, 10), (0, 30), 1.0), ((0, 10), (3, 30), 0.0), ((0, 10), (0, 30), None),
     ((0, 0), (3, 30), None), ((10, 10), (30, 30), 0.05)],
)  # fmt: skip
def test_precision_of_few_rows_has_wide_bounds(
    found: tuple[int, int], alarms: tuple[int, int], observed: float | None
) -> None:
    precision, bounds = precision_at(Share(*found, 0.95), Share(*alarms, 0.95), 0.05)
    assert precision == (observed if observed is None else pytest.approx(observed))
    assert 0 <= bounds.lower <= (0.5 if observed is None else observed) <= bounds.upper <= 1
    assert bounds.upper - bounds.lower > 0.01


@pytest.mark.parametrize(
    ("rows", "recall", "alarms"), [(500, 0.85, 0.03), (200, 0.6, 0.1), (1000, 0.9, 0.02)]
)
def test_bounds_of_precision_elsewhere_hold_the_truth(
    rows: int, recall: float, alarms: float
) -> None:
    rng, missed = np.random.default_rng(rows), np.zeros(2)
    truth = 0.05 * recall / (0.05 * recall + 0.95 * alarms)
    for _ in range(1500):
        positives = int(rng.binomial(rows, 0.4))
        _, bounds = precision_at(
            Share(rng.binomial(positives, recall), positives, 0.95),
            Share(rng.binomial(rows - positives, alarms), rows - positives, 0.95), 0.05,
        )  # fmt: skip
        missed += bounds.lower > truth, bounds.upper < truth
    assert (missed / 1500 <= 0.07).all()  # 5 % on each side; 3 sd
    assert (missed / 1500 >= 0.02).all()  # and not for free
