"""Verdicts by the standing of the test rows: their budget, changed gates, a broken ledger."""

import pytest
from support.items import general, table, text, train_like
from support.judged import evaluated, gained, gate, good, judged, sliced

from lora_domains.stats.intervals import wilson
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import GATES
from lora_domains.verdict.ledger import Standing, level
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable


def test_the_budget_tightens_every_sampled_gate_and_no_figure() -> None:
    items = sliced(gained(good(), 0.1), "sex", "fm")
    limits = {"recall": 0.80, "precision": 0.85, "drift": 0.23, "overfit": 0.1,
              "memorisation": 0.75}  # fmt: skip
    plain = judged(items, gates=limits)
    budgeted = judged(items, gates=limits, evaluations=evaluated())
    assert budgeted["domain_scores"] == plain["domain_scores"]
    assert gate(budgeted, "calibration") == gate(plain, "calibration")
    sampled = [g["name"] for g in plain["gates"]
               if g["lower"] is not None and g["verdict"] != "note"]  # fmt: skip
    assert sampled == ["gain", "retention", "drift", "recall", "precision", "slices", "overfit",
                       "memorisation"]  # fmt: skip
    for name in sampled:
        usual, strict = gate(plain, name), gate(budgeted, name)
        assert strict["upper"] - strict["lower"] > usual["upper"] - usual["lower"], name
        assert "99 %" in strict["why"], name
    recall = gate(budgeted, "recall")
    assert (recall["lower"], recall["upper"]) == tuple(wilson(460, 500, level(5)))
    assert "Evaluation 1 of 5" in gate(budgeted, "evaluations")["why"]


def test_a_limit_on_calibration_is_judged_by_the_bounds_of_the_evaluation() -> None:
    limits = {"calibration": 0.5}
    plain, budgeted = (
        judged(good(), gates=limits, **more) for more in ({}, {"evaluations": evaluated()})
    )
    usual, strict = (gate(one, "calibration") for one in (plain, budgeted))
    assert strict["upper"] > usual["upper"]
    assert strict["lower"] <= usual["lower"]
    assert "99 %" in strict["why"]


def test_gates_are_as_strict_at_the_first_evaluation_as_at_the_last() -> None:
    # 44 of 2,000 lost: within the margin by the bound of 95 %, not by that of 99 %.
    kept = [i for i in good() if i["set"] != "general"]
    items = [*kept, *general(2000, lost=44)]
    assert gate(judged(items), "retention")["verdict"] == "pass"
    for number in range(1, 6):
        summary = judged(items, evaluations=evaluated(number))
        assert gate(summary, "retention")["verdict"] == "inconclusive"
        assert judged(good(), evaluations=evaluated(number))["verdict"] == "pass"


def test_a_gate_fails_by_the_bound_of_95_percent_however_often_one_evaluates() -> None:
    kept = [i for i in good() if i["set"] != "general"]
    # Upper bounds at 95 and 99 %: -.0307 and -.0271 (margin -.03), .7976 and .8089 (floor .80).
    for items, name in (
        ([*kept, *general(700, lost=29)], "retention"),
        ([*table(384, 116, 30, 470), *train_like(460, 40, 30, 470), *general(), *text()], "recall"),
    ):
        usual = gate(judged(items), name)
        assert usual["verdict"] == "fail"
        for number in (1, 5, 6):
            found = gate(judged(items, evaluations=evaluated(number)), name)
            assert found == usual
            assert "95 % confidence" in found["why"]
        at_99 = Evidence(ScoreTable(items), METRICS["f1"], ["routine", "urgent"], 1,
                         evaluations=evaluated())  # fmt: skip
        strict = GATES[name].judge(at_99, usual["threshold"] * (-1 if name == "retention" else 1))
        assert strict is not None
        assert strict.verdict == "inconclusive"


def test_a_sixth_adapter_is_inconclusive() -> None:
    summary = judged(good(), evaluations=evaluated(6))
    found = gate(summary, "evaluations")
    assert (found["verdict"], found["observed"], found["threshold"]) == ("inconclusive", 6, 5)
    assert "these test rows are used up; collect a new test set" in found["why"]
    assert summary["verdict"] == "inconclusive"
    # What fails still fails.
    assert judged(table(tp=12, fn=88, fp=2, tn=4398), evaluations=evaluated(6))["verdict"] == "fail"


@pytest.mark.parametrize("before", ["fail", "inconclusive", None])
def test_gates_that_were_changed_later_give_no_pass(before: str | None) -> None:
    now = evaluated(post_hoc=True, declared_verdict=before)
    summary = judged(good(), evaluations=now)
    assert gate(summary, "evaluations")["verdict"] == "inconclusive"
    was = f"this adapter, which was {before}; what" if before else "this adapter; what"
    assert "Post hoc" in gate(summary, "evaluations")["why"]
    assert was in gate(summary, "evaluations")["why"]
    assert summary["verdict"] == "inconclusive"


def test_what_passed_before_its_gates_were_changed_may_pass() -> None:
    now = evaluated(post_hoc=True, declared_verdict="pass")
    assert judged(good(), evaluations=now)["verdict"] == "pass"


def test_a_ledger_without_its_key_gives_no_pass() -> None:
    now = Standing("", 0, 5, level(5), recognised=False)
    assert judged(good(), evaluations=now)["verdict"] == "inconclusive"


def test_a_broken_ledger_fails() -> None:
    summary = judged(good(), evaluations=evaluated(broken="lines are missing"))
    assert gate(summary, "evaluations")["verdict"] == "fail"
    assert "lines are missing" in gate(summary, "evaluations")["why"]
    assert summary["verdict"] == "fail"
