"""Membership as an AUC with bounds, and the exposure of planted canaries."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lora_domains.stats.membership import auc_bounds, canaries, exposure, membership


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_membership_is_scikit_learns_auc(trained: list[int], unseen: list[int]) -> None:
    truth = [1] * len(trained) + [0] * len(unseen)
    assert membership(trained, unseen) == pytest.approx(roc_auc_score(truth, trained + unseen))


def test_membership_needs_rows_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        membership([1.0], [])


@given(st.floats(0, 1), st.integers(1, 500), st.integers(1, 500))
def test_auc_bounds_hold_the_estimate_and_mirror(auc: float, first: int, second: int) -> None:
    lower, upper = auc_bounds(auc, first, second)
    assert 0 <= lower <= auc <= upper <= 1
    assert lower < upper
    mirrored = auc_bounds(1 - auc, second, first)
    assert (1 - mirrored.upper, 1 - mirrored.lower) == pytest.approx((lower, upper), abs=1e-6)


def test_auc_bounds_published() -> None:
    # Hanley & McNeil (1982), Radiology 143:29: 51 abnormal and 58 normal images, AUC .893, s.e.
    # .032 from the same variance formula; one-sided 97.5 % by a score interval is wider below.
    lower, upper = auc_bounds(0.893, 51, 58, 0.975)
    assert 0.893 - 1.96 * 0.032 - 0.03 < lower < 0.893 - 1.96 * 0.030
    assert 0.893 + 1.0 * 0.032 < upper < 0.893 + 1.96 * 0.032
    assert auc_bounds(0.5, 0, 9) == (0.0, 1.0)


def test_canaries_differ_and_are_reproducible() -> None:
    made = canaries(200, seed=3)
    assert len(set(made)) == 200
    assert made == canaries(200, seed=3) != canaries(200, seed=4)
    assert all(len(secret) == 7 and secret[3] == " " for secret in made)
    with pytest.raises(ValueError, match="1 to 10"):
        canaries(11, digits=1)


def test_exposure_is_carlinis() -> None:
    others = [float(n) for n in range(1, 256)]
    assert exposure(0.5, others) == 8.0  # the easiest of 256
    assert exposure(999.0, others) == 0.0  # the hardest
    assert exposure(127.5, others) == pytest.approx(1.0)  # in the middle
    assert exposure(1.0, others) == pytest.approx(8 - math.log2(2))  # a tie counts against it
    rng = np.random.default_rng(0)
    by_chance = [exposure(*_one_of(rng.random(256))) for _ in range(4000)]
    assert np.mean(by_chance) == pytest.approx(1 / math.log(2), abs=0.08)


def _one_of(nats: np.ndarray) -> tuple[float, list[float]]:
    return float(nats[0]), nats[1:].tolist()
