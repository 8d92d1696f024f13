"""Errors and correlations of numbers against scikit-learn and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn import metrics as oracle

from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable


def table(truth: np.ndarray, **values: np.ndarray) -> ScoreTable:
    return ScoreTable(
        {"target": -1, "truth": [float(y)],
         "scores": {name: {"value": float(each[n])} for name, each in values.items()}}
        for n, y in enumerate(truth)
    )  # fmt: skip


def expected(truth: np.ndarray, value: np.ndarray) -> dict[str, float]:
    return {
        "mae": oracle.mean_absolute_error(truth, value),
        "rmse": oracle.mean_squared_error(truth, value) ** 0.5,
        "r2": oracle.r2_score(truth, value),
        "spearman": spearmanr(truth, value).statistic,
    }


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(3, 60), st.booleans())
def test_metrics_equal_the_libraries(seed: int, count: int, tied: bool) -> None:
    random = np.random.default_rng(seed)
    truth = random.normal(1000, 30, count)
    value = truth + random.normal(0, 20, count)
    if tied:
        truth, value = truth.round(-1), value.round(-1)
    if np.ptp(truth) == 0 or np.ptp(value) == 0:
        return
    scored = table(truth, adapter=value)
    for name, one in expected(truth, value).items():
        assert METRICS[name].value(scored, "adapter") == pytest.approx(one, abs=1e-9)


def test_bounds_contain_the_difference_and_know_which_is_better() -> None:
    random = np.random.default_rng(3)
    truth = random.normal(50, 10, 200)
    scored = table(truth, base=truth + random.normal(0, 8, 200),
                   adapter=truth + random.normal(0, 3, 200))  # fmt: skip
    for name in ("mae", "rmse", "r2", "spearman"):
        metric = METRICS[name]
        lower, upper = metric.bounds(scored, "adapter")
        value = metric.value(scored, "adapter")
        assert value is not None
        assert lower < value < upper
        compared = metric.compare(scored)
        assert compared is not None
        assert compared.lower < compared.difference < compared.upper
        assert metric.sign * compared.difference > 0
        assert metric.sign * (compared.lower if metric.sign > 0 else compared.upper) > 0
        assert compared.won is not None
        assert compared.lost is not None
        assert compared.won > compared.lost


def test_numbers_without_variance_have_no_correlation() -> None:
    same, some = np.full(9, 2.0), np.arange(9.0)
    assert METRICS["r2"].value(table(same, adapter=some), "adapter") == 0
    assert METRICS["spearman"].value(table(some, adapter=same), "adapter") == 0


def test_bounds_of_the_mean_absolute_error_cover_it() -> None:
    random, misses, runs = np.random.default_rng(0), 0, 300
    truth = (2 / np.pi) ** 0.5 * 5
    for _ in range(runs):
        errors = random.normal(0, 5, 60)
        scored = table(np.zeros(60), adapter=errors)
        misses += METRICS["mae"].bounds(scored, "adapter").upper < truth
    assert misses <= 0.05 * runs + 2 * (0.05 * 0.95 * runs) ** 0.5
