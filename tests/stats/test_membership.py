"""Membership inference as an AUC with bounds."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from lora_domains.stats.shares import auc_bounds, membership_auc


@given(st.lists(st.integers(0, 5), min_size=1), st.lists(st.integers(0, 5), min_size=1))
def test_the_auc_is_scikit_learns(trained: list[int], unseen: list[int]) -> None:
    truth = [1] * len(trained) + [0] * len(unseen)
    assert membership_auc(trained, unseen) == pytest.approx(roc_auc_score(truth, trained + unseen))


def test_the_auc_needs_rows_of_both_kinds() -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        membership_auc([1.0], [])


@given(st.floats(0, 1), st.integers(1, 500), st.integers(1, 500))
def test_auc_bounds_contain_the_estimate_and_mirror(auc: float, first: int, second: int) -> None:
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
