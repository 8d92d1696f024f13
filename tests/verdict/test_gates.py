"""Gates on published figures, and the rule they share."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.stats.bootstrap import Bounds
from lora_domains.stats.comparisons import Comparison, compare_accuracy, compare_means
from lora_domains.stats.intervals import difference_bounds, tango, wilson
from lora_domains.verdict import gates
from lora_domains.verdict.gates import GateResult, Verdict, judge, verdict


def by_counts(won: int, lost: int, n: int) -> Comparison:
    change = np.array([1] * won + [-1] * lost + [0] * (n - won - lost))
    return compare_accuracy(change < 0, change > 0)


def judged(
    lower: float,
    upper: float,
    threshold: float = 0.0,
    strict: bool = False,
    higher_is_better: bool = True,
) -> Verdict:
    return judge(
        "g",
        "r",
        (lower + upper) / 2,
        lower,
        upper,
        threshold,
        strict=strict,
        higher_is_better=higher_is_better,
        what="x",
        n=9,
    ).verdict


def test_a_bound_is_told_from_its_threshold_in_words() -> None:
    found = judge("g", "r", 0.05, -0.0004, 0.1, 0.0, strict=True, what="x", n=9)
    assert "bounds -0.0004 and 0.100 leave 0.000 open" in found.why
    found = judge("g", "r", 0.9, 0.85000001, 0.95, 0.85, what="x", n=9)
    assert "at least 0.85000001: it clears 0.850" in found.why
    found = judge("g", "r", 0.9, 0.85, 0.95, 0.85, what="x", n=9)
    assert "at least 0.850: it clears 0.850" in found.why


# ── published figures ──


def test_98_percent_accuracy_with_12_percent_recall_fails() -> None:
    found, missed, alarms, rows = 27, 198, 2, 10_000
    assert (rows - missed - alarms) / rows == 0.98
    assert found / (found + missed) == 0.12
    result = gates.recall(found, missed, floor=0.80)
    assert result.verdict == "fail"
    assert result.upper == pytest.approx(0.160, abs=5e-4)
    assert "recall is 0.120 on 225 positives" in result.why
    assert "at most 0.160: it misses 0.800" in result.why


def test_half_precision_and_a_third_of_recall_fail_both() -> None:
    assert gates.precision(30, 30, floor=0.85).verdict == "fail"
    assert gates.recall(30, 70, floor=0.80).verdict == "fail"


def test_85_15_10_90_is_inconclusive_and_says_what_settles_it() -> None:
    tp, fn, fp, tn = 85, 15, 10, 90
    assert (tp + tn) / (tp + fn + fp + tn) == 0.875
    found = gates.recall(tp, fn, floor=0.80)
    assert (found.verdict, found.observed) == ("inconclusive", 0.85)
    assert found.lower == pytest.approx(0.782, abs=5e-4)
    assert "0.782 and 0.899 leave 0.800 open" in found.why
    assert "about 174 positives" in found.why
    right = gates.precision(tp, fp, floor=0.85)
    assert right.verdict == "inconclusive"
    assert right.observed == pytest.approx(0.895, abs=5e-4)
    assert right.lower == pytest.approx(0.832, abs=5e-4)
    assert "about 173 predicted positives" in right.why
    assert verdict([found, right]) == "inconclusive"


def test_the_same_shares_of_2000_rows_pass() -> None:
    assert gates.recall(850, 150, floor=0.80).verdict == "pass"
    assert gates.precision(850, 100, floor=0.85).verdict == "pass"


def test_the_number_named_settles_it() -> None:
    assert gates.recall(148, 26, floor=0.80).verdict == "pass"  # .851 of 174
    assert gates.recall(147, 26, floor=0.80).verdict == "inconclusive"  # .8497 of 173


# ── the rule ──


def test_pass_fail_inconclusive() -> None:
    assert judged(0.1, 0.3) == "pass"
    assert judged(-0.3, -0.1) == "fail"
    assert judged(-0.1, 0.1) == "inconclusive"
    assert judged(0.1, 0.3, higher_is_better=False) == "fail"
    assert judged(-0.3, -0.1, higher_is_better=False) == "pass"
    assert judged(-0.1, 0.1, higher_is_better=False) == "inconclusive"


def test_a_bound_on_the_threshold_counts_unless_the_rule_is_strict() -> None:
    assert judged(0.0, 0.1) == "pass"
    assert judged(0.0, 0.1, strict=True) == "inconclusive"
    assert judged(-0.1, 0.0) == "inconclusive"
    assert judged(-0.1, 0.0, strict=True) == "fail"
    assert judged(-0.1, 0.0, higher_is_better=False) == "pass"
    assert judged(0.0, 0.0, strict=True) == "fail"


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.floats(-1, 1), st.booleans())
def test_both_directions_agree(
    middle: float, down: float, up: float, threshold: float, strict: bool
) -> None:
    one = judged(middle - down, middle + up, threshold, strict=strict)
    other = judged(-middle - up, -middle + down, -threshold, strict=strict, higher_is_better=False)
    assert one == other


def test_what_is_not_a_number_fails_and_stays_json() -> None:
    result = judge("g", "r", math.nan, math.nan, math.nan, 0.0, what="loss", n=9)
    assert result.verdict == "fail"
    assert "diverged" in result.why
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_verdict_of_all() -> None:
    def with_verdict(*found: Verdict) -> Verdict:
        return verdict(GateResult("g", "r", 0.0, 0.0, 0.0, 0.0, one, "") for one in found)

    assert with_verdict("pass", "pass") == "pass"
    assert with_verdict("pass", "inconclusive") == "inconclusive"
    assert with_verdict("inconclusive", "fail", "pass") == "fail"
    assert verdict([]) == "inconclusive"


# ── each gate ──


def test_gain_needs_both_the_base_and_the_best_baseline() -> None:
    better, level, worse = by_counts(40, 5, 200), by_counts(6, 5, 200), by_counts(5, 40, 200)
    assert gates.gain(better, better, "accuracy", "TF-IDF").verdict == "pass"
    assert gates.gain(better, None, "accuracy").verdict == "pass"
    open_one = gates.gain(better, level, "accuracy", "TF-IDF")
    assert open_one.verdict == "inconclusive"
    assert open_one.rule == "accuracy - base > 0 and accuracy - TF-IDF > 0"
    assert "of the TF-IDF" in open_one.why
    assert gates.gain(level, worse, "accuracy").verdict == "fail"
    assert gates.gain(worse, better, "accuracy").verdict == "fail"


def test_gain_of_a_loss_is_a_fall() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.2, 100)
    lower = compare_means(base, base - 0.5 + rng.normal(0, 0.1, 100), higher_is_better=False)
    assert gates.gain(lower, None, "nats", higher_is_better=False).verdict == "pass"
    assert gates.gain(lower, None, "nats").verdict == "fail"


def test_gain_of_nothing_at_all_is_no_pass() -> None:
    same = compare_means(np.ones(50), np.ones(50))
    assert (same.lower, same.upper) == (0.0, 0.0)
    assert gates.gain(same, None, "nats").verdict == "fail"
    assert gates.gain(by_counts(0, 0, 50), None, "accuracy").verdict == "inconclusive"


def test_one_item_is_inconclusive_and_json() -> None:
    result = gates.gain(compare_means([1.0], [2.0]), None, "nats")
    assert result.verdict == "inconclusive"
    assert "more are needed" in result.why
    json.dumps(dataclasses.asdict(result), allow_nan=False)


def test_retention_needs_88_items_even_when_nothing_is_lost() -> None:
    short = gates.retention(by_counts(0, 0, 87))
    assert short.verdict == "inconclusive"
    assert "about 88 items" in short.why
    assert gates.retention(by_counts(0, 0, 88)).verdict == "pass"
    assert gates.retention(by_counts(0, 0, 88), margin=0.02).verdict == "inconclusive"
    assert gates.retention(by_counts(2, 80, 800)).verdict == "fail"


def test_retention_threshold_is_minus_the_margin() -> None:
    result = gates.retention(by_counts(10, 12, 1000), margin=0.05)
    assert (result.threshold, result.verdict) == (-0.05, "pass")
    assert result.lower == tango(10, 12, 1000).lower


def test_drift_is_bounded_from_above() -> None:
    assert gates.drift(0.10, Bounds(0.08, 0.12), 200, limit=0.15).verdict == "pass"
    assert gates.drift(0.20, Bounds(0.17, 0.24), 200, limit=0.15).verdict == "fail"
    between = gates.drift(0.14, Bounds(0.12, 0.16), 200, limit=0.15)
    assert between.verdict == "inconclusive"
    assert "about 800 texts" in between.why


def test_precision_without_a_positive_prediction_cannot_pass() -> None:
    result = gates.precision(0, 0, floor=0.0)
    assert (result.verdict, result.observed) == ("inconclusive", None)
    assert "undefined" in result.why
    assert gates.recall(0, 0, floor=0.0).verdict == "inconclusive"


def test_overfit_is_the_gap_of_two_samples() -> None:
    def gate(train_right: int, test_right: int, n: int) -> Verdict:
        train, test = wilson(train_right, n), wilson(test_right, n)
        bounds = difference_bounds(train_right / n, train, test_right / n, test)
        return gates.overfit(train_right / n, test_right / n, bounds, n).verdict

    assert gate(1000, 980, 1000) == "pass"
    assert gate(1000, 800, 1000) == "fail"
    assert gate(100, 92, 100) == "inconclusive"
    assert gate(900, 980, 1000) == "pass"


def test_leaks_fail_when_exact_and_warn_when_near() -> None:
    assert gates.leaks(0).verdict == "pass"
    near = gates.leaks(0, near=3)
    assert near.verdict == "pass"
    assert "Warning: 3 rows are nearly the same" in near.why
    exact = gates.leaks(1, near=3)
    assert (exact.verdict, exact.observed) == ("fail", 1.0)
    assert "--drop-leaks" in exact.why


def test_frozen_and_alive() -> None:
    assert gates.frozen(changed=False).verdict == "pass"
    assert gates.frozen(changed=True).verdict == "fail"
    assert gates.alive(0.5).verdict == "pass"
    assert gates.alive(0.0).verdict == "fail"
    assert gates.alive(1e-7, tolerance=1e-6).verdict == "fail"
    for broken in (math.nan, math.inf):
        result = gates.alive(broken)
        assert (result.verdict, result.observed) == ("fail", None)


def test_gates_need_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None;"
        "from lora_domains.verdict import gates; print(gates.recall(85, 15, .8).verdict)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "inconclusive"
