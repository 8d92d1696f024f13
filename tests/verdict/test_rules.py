"""The rule that every gate shares: bounds against a threshold, and the sentence for people."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from lora_domains.stats.intervals import Bounds, wilson
from lora_domains.stats.shares import Share, share_of
from lora_domains.verdict.rules import (
    GateResult,
    Measurement,
    Verdict,
    finite,
    judge,
    judge_limit,
    judge_share,
    verdict,
)


def result_of(
    lower: float,
    upper: float,
    threshold: float = 0.0,
    strict: bool = False,
    higher_is_better: bool = True,
) -> GateResult:
    measured = Measurement((lower + upper) / 2, Bounds(lower, upper), 9)
    return judge(
        "g", "r", measured, threshold, what="x", needed=None, strict=strict,
        higher_is_better=higher_is_better,
    )  # fmt: skip


def verdict_of(*bounds: float, **rule: bool) -> Verdict:
    return result_of(*bounds, **rule).verdict


def test_pass_fail_inconclusive() -> None:
    assert verdict_of(0.1, 0.3) == "pass"
    assert verdict_of(-0.3, -0.1) == "fail"
    assert verdict_of(-0.1, 0.1) == "inconclusive"
    assert verdict_of(0.1, 0.3, higher_is_better=False) == "fail"
    assert verdict_of(-0.3, -0.1, higher_is_better=False) == "pass"
    assert verdict_of(-0.1, 0.1, higher_is_better=False) == "inconclusive"


def test_a_bound_on_the_threshold_counts_unless_the_rule_is_strict() -> None:
    assert verdict_of(0.0, 0.1) == "pass"
    assert verdict_of(0.0, 0.1, strict=True) == "inconclusive"
    assert verdict_of(-0.1, 0.0) == "inconclusive"
    assert verdict_of(-0.1, 0.0, strict=True) == "fail"
    assert verdict_of(-0.1, 0.0, higher_is_better=False) == "pass"
    assert verdict_of(0.0, 0.0, strict=True) == "fail"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1), st.booleans())
def test_both_directions_agree(
    middle: float, down: float, up: float, threshold: float, strict: bool
) -> None:
    one = result_of(middle - down, middle + up, threshold, strict)
    other = result_of(-middle - up, -middle + down, -threshold, strict, higher_is_better=False)
    assert one.verdict == other.verdict


def test_a_bound_is_told_from_its_threshold_in_words() -> None:
    def why(lower: float, upper: float, threshold: float, strict: bool = False) -> str:
        return result_of(lower, upper, threshold, strict).why

    assert "95 % bounds -0.0004 to 0.100; at least 0.000 is required" in why(-0.0004, 0.1, 0, True)
    assert "at least 0.85000001 with 95 % confidence; at least 0.850" in why(0.85000001, 0.95, 0.85)
    assert "at least 0.850 with 95 % confidence; at least 0.850" in why(0.85, 0.95, 0.85)


def test_what_is_not_a_number_fails_and_stays_json() -> None:
    result = result_of(math.nan, math.nan)
    assert result.verdict == "fail"
    assert "diverged" in result.why
    json.dumps(dataclasses.asdict(result), allow_nan=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_stored_as_null(value: float) -> None:
    assert json.dumps(finite(value), allow_nan=False) == "null"


def test_a_finite_value_is_stored_as_it_is() -> None:
    assert finite(0.25) == 0.25
    assert finite(None) is None


def test_infinite_bounds_are_inconclusive_and_stay_json() -> None:
    measured = Measurement(1.0, Bounds(-math.inf, math.inf), 1)
    result = judge("g", "r", measured, 0.0, what="x", needed=None)
    assert result.verdict == "inconclusive"
    assert "more items are needed" in result.why
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_verdict_of_all() -> None:
    def with_verdict(*each: Verdict) -> Verdict:
        return verdict(GateResult("g", "r", 0.0, 0.0, 0.0, 0.0, one, "") for one in each)

    assert with_verdict("pass", "pass") == "pass"
    assert with_verdict("pass", "not applicable") == "pass"
    assert with_verdict("pass", "inconclusive") == "inconclusive"
    assert with_verdict("inconclusive", "fail", "pass") == "fail"
    assert verdict([]) == "inconclusive"


# ── Shares: published figures ───────────────────────────────────────────────────────────────────


def recall(hits: int, missed: int, floor: float) -> GateResult:
    return judge_share("recall", share(hits, missed), hits + missed, floor, "positives")


def precision(right: int, wrong: int, floor: float) -> GateResult:
    n = right + wrong
    return judge_share("precision", share(right, wrong), n, floor, "predicted positives")


def share(right: int, wrong: int) -> Share:
    return share_of(np.arange(right + wrong) < right)


@pytest.mark.parametrize("hits", [75, 76])
def test_rows_advised_below_the_floor_show_that_it_is_missed(hits: int) -> None:
    """Failing is held to 95 %, so fewer rows show it than a pass by 99 % would need."""
    found = share_of(np.arange(100) < hits, level=0.99)
    result = judge_share("recall", found, 100, 0.80, "positives", 0.99)
    assert result.verdict == "inconclusive"
    advised = re.search(r"about ([\d,]+) positives", result.why)
    assert advised is not None
    n = int(advised[1].replace(",", ""))
    fails = [wilson(right, n).upper < 0.80 for right in range(n + 1)]
    power = binom.pmf(np.arange(n + 1), n, hits / 100)[fails].sum()
    assert power == pytest.approx(0.80, abs=0.04)


def test_98_percent_accuracy_with_12_percent_recall_fails() -> None:
    hits, missed, alarms, rows = 27, 198, 2, 10_000
    assert (rows - missed - alarms) / rows == 0.98
    assert hits / (hits + missed) == 0.12
    result = recall(hits, missed, floor=0.80)
    assert result.verdict == "fail"
    assert result.upper == pytest.approx(0.160, abs=5e-4)
    assert result.why == (
        "Recall is 0.120 on 225 positives, at most 0.160 with 95 % confidence; at least 0.800 is "
        "required."
    )


def test_half_precision_and_a_third_of_recall_fail_both() -> None:
    assert precision(30, 30, floor=0.85).verdict == "fail"
    assert recall(30, 70, floor=0.80).verdict == "fail"


def test_85_15_10_90_is_inconclusive_and_says_how_many_are_needed() -> None:
    tp, fn, fp, tn = 85, 15, 10, 90
    assert (tp + tn) / (tp + fn + fp + tn) == 0.875
    of_recall = recall(tp, fn, floor=0.80)
    assert (of_recall.verdict, of_recall.observed) == ("inconclusive", 0.85)
    assert of_recall.lower == pytest.approx(0.782, abs=5e-4)
    assert "95 % bounds 0.782 to 0.899; at least 0.800 is required" in of_recall.why
    assert of_recall.why.endswith(
        "Too few rows to tell: about 368 positives would decide it with a probability of 80 %."
    )
    of_precision = precision(tp, fp, floor=0.85)
    assert of_precision.verdict == "inconclusive"
    assert of_precision.observed == pytest.approx(0.895, abs=5e-4)
    assert of_precision.lower == pytest.approx(0.832, abs=5e-4)
    assert "about 358 predicted positives would decide it" in of_precision.why
    assert verdict([of_recall, of_precision]) == "inconclusive"


def test_the_same_shares_of_2000_rows_pass() -> None:
    assert recall(850, 150, floor=0.80).verdict == "pass"
    assert precision(850, 100, floor=0.85).verdict == "pass"


def test_a_number_that_nobody_would_collect_is_not_printed() -> None:
    # .801 against .80 would need some hundred thousand positives.
    result = recall(801, 199, floor=0.80)
    assert result.verdict == "inconclusive"
    assert result.why.endswith("No realistic number of rows would decide it.")
    at_the_floor = recall(80, 20, floor=0.80)
    assert at_the_floor.why.endswith("No realistic number of rows would decide it.")


def test_precision_without_a_positive_prediction_cannot_pass() -> None:
    result = precision(0, 0, floor=0.0)
    assert (result.verdict, result.observed) == ("inconclusive", None)
    assert "undefined" in result.why
    assert recall(0, 0, floor=0.0).verdict == "inconclusive"


def test_a_limit_is_bounded_from_above() -> None:
    def drift(kl: float, lower: float, upper: float) -> GateResult:
        return judge_limit("drift", "r", Measurement(kl, Bounds(lower, upper), 200, "texts"), 0.15,
                           "KL")  # fmt: skip

    assert drift(0.10, 0.08, 0.12).verdict == "pass"
    assert drift(0.20, 0.17, 0.24).verdict == "fail"
    between = drift(0.14, 0.12, 0.16)
    assert between.verdict == "inconclusive"
    assert "about 1,829 texts" in between.why
