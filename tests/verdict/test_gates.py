"""Each gate on its own, their thresholds, and a gate that is registered from outside."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from support.folders import folder
from support.items import Item, general, row, table, text

from lora_domains.data.source import Data
from lora_domains.domain import Domain, as_record
from lora_domains.errors import DomainError
from lora_domains.report.card import AdapterEntry
from lora_domains.report.report import combine, rebuild, save_report
from lora_domains.stats.comparisons import Comparison, compare_accuracy, compare_means
from lora_domains.stats.intervals import tango
from lora_domains.tasks import Classification
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import (
    GATES,
    Gate,
    Gates,
    Threshold,
    judge_all,
    register,
)
from lora_domains.verdict.ledger import Standing
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.performance import gain
from lora_domains.verdict.rules import (
    INFORMING,
    GateResult,
    Verdict,
    judge_count,
)
from lora_domains.verdict.rules import verdict as verdict_of
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.side_effects import retention


def by_counts(won: int, lost: int, n: int) -> Comparison:
    change = np.array([1] * won + [-1] * lost + [0] * (n - won - lost))
    return compare_accuracy(change < 0, change > 0)


def evidence(*items: Item, **counted: Any) -> Evidence:
    counted.setdefault("leaks", {"exact": 0, "near": 0})
    return Evidence(ScoreTable(items), METRICS["accuracy"], ["no", "yes"], 1, **counted)


def result(name: str, *items: Item, threshold: float = 0.0, **counted: Any) -> GateResult:
    judged = GATES[name].judge(evidence(*items, **counted), threshold)
    assert judged is not None
    return judged


# ── Gain ────────────────────────────────────────────────────────────────────────────────────────


def test_gain_needs_both_the_base_and_the_best_baseline() -> None:
    def gained(base: Comparison, baseline: Comparison | None = None) -> GateResult:
        rivals = {"the base": base} | ({"TF-IDF": baseline} if baseline else {})
        return gain(METRICS["accuracy"], rivals)

    better, level, worse = by_counts(40, 5, 200), by_counts(6, 5, 200), by_counts(5, 40, 200)
    assert gained(better, better).verdict == "pass"
    assert gained(better).verdict == "pass"
    undecided = gained(better, level)
    assert undecided.verdict == "inconclusive"
    assert undecided.rule == "accuracy above the base and above TF-IDF"
    assert "TF-IDF reaches" in undecided.why
    assert gained(level, worse).verdict == "fail"
    assert gained(worse, better).verdict == "fail"


def test_gain_of_a_loss_is_a_fall() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.0, 0.2, 100)
    lower = compare_means(base, base - 0.5 + rng.normal(0, 0.1, 100), higher_is_better=False)
    passed = gain(METRICS["nats_per_token"], {"the base": lower})
    assert passed.verdict == "pass"
    assert passed.rule == "nats per token below the base"
    assert gain(METRICS["accuracy"], {"the base": lower}).verdict == "fail"


def test_gain_of_nothing_at_all_is_no_pass() -> None:
    same = compare_means(np.ones(50), np.ones(50), share=True)
    assert same.lower < 0.0 < same.upper
    assert gain(METRICS["exact_match"], {"the base": same}).verdict == "inconclusive"
    none = by_counts(0, 0, 50)
    assert gain(METRICS["accuracy"], {"the base": none}).verdict == "inconclusive"


def test_gain_says_in_words_what_beats_the_adapter() -> None:
    truth = np.arange(200) % 2
    adapter = np.where(np.arange(200) < 20, 1 - truth, truth)
    compared = METRICS["f1"].compare(
        evidence(*_predicted(truth, tfidf=truth, adapter=adapter)).test, "tfidf", "adapter", 1
    )
    assert compared is not None
    why = gain(METRICS["f1"], {"TF-IDF": compared}).why
    assert why.startswith("F1 0.900; TF-IDF reaches 1.000. The adapter does not beat it: ")


def _predicted(truth: np.ndarray, **predicted: np.ndarray) -> list[Item]:
    return [
        {"set": "test", "target": int(target), "scores": {
            name: {"prediction": int(each[n])} for name, each in predicted.items()}}
        for n, target in enumerate(truth)
    ]  # fmt: skip


def test_one_item_is_inconclusive_and_json() -> None:
    judged = gain(METRICS["exact_match"], {"the base": compare_means([1.0], [2.0])})
    assert judged.verdict == "inconclusive"
    assert "more test rows are needed" in judged.why
    json.dumps(dataclasses.asdict(judged), allow_nan=False)


# ── General knowledge ───────────────────────────────────────────────────────────────────────────


def test_retention_needs_88_items_even_when_nothing_is_lost() -> None:
    short = retention(by_counts(0, 0, 87), 0.03)
    assert short.verdict == "inconclusive"
    assert short.why.endswith(
        "Too few questions to tell: about 88 questions would decide it with a probability of "
        "80 %. Ask more: --questions 88, or a larger --suite."
    )
    assert retention(by_counts(0, 0, 88), 0.03).verdict == "pass"
    assert retention(by_counts(0, 0, 88), margin=0.02).verdict == "inconclusive"
    assert retention(by_counts(2, 80, 800), 0.03).verdict == "fail"


def test_few_questions_are_told_how_many_would_show_that_nothing_is_lost() -> None:
    # What so few items show says little about what more of them would.
    for won, lost, n, needed in ((0, 0, 8, 88), (0, 1, 30, 301), (1, 2, 30, 717)):
        why = retention(by_counts(won, lost, n), 0.03).why
        assert why.endswith(
            f"about {needed} questions would show that nothing is lost, if nothing is, with a "
            f"probability of 80 %. Ask more: --questions {needed}, or a larger --suite."
        )
    close = retention(by_counts(35, 64, 1000), 0.03).why
    assert close.endswith("No realistic number of questions would decide it.")
    # A probe of an encoder's features is no question, of which more could be asked.
    probed = [row(1, "general", n, base=1, adapter=1) for n in range(8)]
    for knowledge, what in (("questions", "questions 88, "), ("features", "number of rows would ")):
        assert what in result("retention", *probed, threshold=0.03, knowledge=knowledge).why


@pytest.mark.parametrize("lost", [4, 7, 8, 9])
def test_a_small_suite_that_is_lost_whole_fails_by_its_bound(lost: int) -> None:
    small = [row(0, "general", n, base=0, adapter=1) | {"suite": "law"} for n in range(lost)]
    upper = tango(0, lost, lost, 1 - 0.05 / 3).upper  # three suites
    judged = result("retention", *general(1200), *small, threshold=0.03)
    assert judged.verdict == ("fail" if upper < -0.03 else "pass")
    if lost > 7:
        assert judged.rule == "accuracy on no suite clearly more than 0.03 below the base"


def test_an_inconclusive_gate_says_that_more_rows_are_charged() -> None:
    now = Standing("rows", 1, 5, 0.99)
    charged = "Rows added to these are evaluated on the same budget."
    judged = judge_all(evidence(*table(85, 15, 10, 90), evaluations=now), {})
    told = [r for r in judged if charged in r.why]
    assert [r.name for r in told] == ["recall"]
    assert told[0].verdict == "inconclusive"
    assert "positives would decide it" in told[0].why
    assert not any(charged in r.why for r in judge_all(evidence(*table(99, 1, 1, 99)), {}))


def test_retention_threshold_is_minus_the_margin() -> None:
    judged = retention(by_counts(10, 12, 1000), margin=0.05)
    assert (judged.threshold, judged.verdict) == (-0.05, "pass")
    assert judged.lower == tango(10, 12, 1000).lower


def test_windows_of_one_text_say_no_more_than_the_text() -> None:
    texts: list[Item] = [
        {"set": "text", "id": f"{n}/{w}", "target": -1, "digest": f"{n}", "group": f"g{n}",
         "scores": {"adapter": {"kl": 0.1 * n, "tokens": 10, "nats": 10.0}}}
        for n in range(8) for w in range(20)
    ]  # fmt: skip
    alone = [{k: v for k, v in text.items() if k != "group"} for text in texts]
    together, apart = (evidence(*each).kl(0.95) for each in (texts, alone))
    assert together.observed == apart.observed
    widths = [measured.bounds.upper - measured.bounds.lower for measured in (together, apart)]
    assert widths[0] > 3 * widths[1]


# ── The other gates ─────────────────────────────────────────────────────────────────────────────


def test_overfit_is_the_gap_of_two_samples() -> None:
    def gate(train_right: int, test_right: int, n: int) -> Verdict:
        train = table(train_right, n - train_right, 0, 0, where="train")
        return result(
            "overfit", *train, *table(test_right, n - test_right, 0, 0), threshold=0.10
        ).verdict

    assert gate(1000, 980, 1000) == "pass"
    assert gate(1000, 800, 1000) == "fail"
    assert gate(100, 92, 100) == "inconclusive"
    assert gate(900, 980, 1000) == "pass"


def test_leaks_fail_when_exact_and_warn_when_near() -> None:
    assert result("leaks", leaks={"exact": 0, "near": 0}).verdict == "pass"
    near = result("leaks", leaks={"exact": 0, "near": 3})
    assert near.verdict == "pass"
    assert "Warning: 3 rows are nearly the same" in near.why
    exact = result("leaks", leaks={"exact": 1, "near": 3})
    assert (exact.verdict, exact.observed) == ("fail", 1.0)
    assert "1 test row or question is also" in exact.why
    assert "--drop-leaks" in exact.why


def test_leaks_that_were_not_searched_for_are_inconclusive() -> None:
    assert result("leaks", leaks=None).verdict == "inconclusive"
    assert result("leaks", leaks=None, trained_elsewhere=True).verdict == "not applicable"


def test_the_base_is_frozen() -> None:
    assert result("frozen", base_changed=False).verdict == "pass"
    assert result("frozen", base_changed=True).verdict == "fail"


def test_an_adapter_has_an_effect() -> None:
    assert result("effect", largest_move=0.5).verdict == "pass"
    assert result("effect", largest_move=0.0).verdict == "fail"
    assert result("effect", largest_move=1e-7, threshold=1e-6).verdict == "fail"
    for broken in (math.nan, math.inf):
        judged = result("effect", largest_move=broken)
        assert (judged.verdict, judged.observed) == ("fail", None)


# ── Too few, missing, not a number ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("rows", "verdict"), [(4, "inconclusive"), (29, "inconclusive"),
                                               (30, "pass")])  # fmt: skip
def test_fewer_than_30_test_rows_decide_nothing(rows: int, verdict: Verdict) -> None:
    # All right where the base is wrong.
    items = [row(n % 2, number=n, base=1 - n % 2, adapter=n % 2) for n in range(rows)]
    judged = {r.name: r for r in judge_all(evidence(*items), {"recall": 0.5, "precision": 0.5})}
    assert judged["gain"].verdict == verdict
    if rows < 30:
        assert judged["gain"].why.endswith("Fewer than 30 test rows do not decide it.")
        assert {judged[name].verdict for name in ("recall", "precision")} == {"inconclusive"}
    else:
        assert {judged[name].verdict for name in ("recall", "precision")} == {"pass"}
    wrong = [row(1, number=n, base=1, adapter=0) for n in range(rows)]
    assert {r.name: r.verdict for r in judge_all(evidence(*wrong), {})}["gain"] == (
        "fail" if rows >= 30 else "inconclusive"
    )


def test_fewer_than_10_positives_decide_neither_recall_nor_precision() -> None:
    for found, verdict in ((9, "inconclusive"), (10, "pass")):
        items = table(found, 0, 0, 200)
        for name in ("recall", "precision"):
            judged = result(name, *items, threshold=0.5)
            assert judged.verdict == verdict, name
            assert ("Fewer than 10" in judged.why) == (found < 10)
    # Of a hundred positives three were predicted: recall is known, precision is not.
    items = table(3, 97, 0, 200)
    assert result("recall", *items, threshold=0.8).verdict == "fail"
    assert result("precision", *items, threshold=0.3).verdict == "inconclusive"


def test_rows_without_a_positive_decide_no_gain_in_f1() -> None:
    for metric in ("f1", "precision", "recall"):
        few = Evidence(ScoreTable(table(9, 0, 0, 90)), METRICS[metric], ["no", "yes"], 1)
        none = Evidence(ScoreTable(table(0, 0, 0, 99)), METRICS[metric], ["no", "yes"], 1)
        for seen in (few, none):
            judged = GATES["gain"].judge(seen, 0.0)
            assert judged is not None
            assert judged.verdict == "inconclusive", metric
    assert judged.lower is not None
    assert judged.lower < 0.0


@pytest.mark.parametrize("metric", ["macro_f1", "balanced_accuracy", "mcc", "f1", "precision"])
def test_test_rows_of_one_class_pass_neither_gain_nor_precision(metric: str) -> None:
    items = [row(1, number=n, base=n % 2, adapter=1) for n in range(100)]
    judged = judge_all(Evidence(ScoreTable(items), METRICS[metric], ["no", "yes"], 1), {})
    verdicts = {r.name: r.verdict for r in judged}
    assert verdicts["gain"] == verdicts["precision"] == "inconclusive"
    assert verdicts["recall"] == "pass"


def test_recall_and_precision_respect_groups() -> None:
    items = table(360, 40, 20, 380)
    grouped = [item | {"group": f"patient {n // 40}"} for n, item in enumerate(items)]
    for name in ("recall", "precision"):
        alone, together = (result(name, *each, threshold=0.85) for each in (items, grouped))
        assert alone.verdict == "pass"
        assert together.observed == pytest.approx(alone.observed)
        assert together.verdict == "inconclusive"
        assert together.lower is not None
        assert alone.lower is not None
        assert together.lower < alone.lower - 0.05


def changed(items: list[Item], contender: str, **scores: float | None) -> list[Item]:
    """Items with other scores; a score that is set to ``math.inf`` is removed."""
    made = []
    for item in items:
        new = dict(item["scores"][contender]) | scores
        new = {key: value for key, value in new.items() if value != math.inf}
        made.append(item | {"scores": item["scores"] | {contender: new}})
    return made


@pytest.mark.parametrize(("value", "verdict"), [
    (math.nan, "fail"), (None, "fail"), (-math.inf, "fail"), (math.inf, "inconclusive")
])  # fmt: skip
@pytest.mark.parametrize("contender", ["base", "adapter"])
def test_nats_that_are_not_a_number_fail_and_missing_ones_are_inconclusive(
    contender: str, value: float | None, verdict: Verdict
) -> None:
    items = [i for part in ("test", "train") for i in table(30, 5, 5, 30, where=part)]
    broken = changed(items, contender, nats=value)
    seen = Evidence(ScoreTable(broken), METRICS["nats_per_token"])
    judged = {r.name: r for r in judge_all(seen, {})}
    assert judged["gain"].verdict == verdict
    assert judged["gain"].observed is None
    if contender == "adapter":
        assert judged["overfit"].verdict == ("fail" if verdict == "fail" else "warning")
    assert judged["memorisation"].verdict == ("fail" if verdict == "fail" else "note")
    words = "is not a number" if verdict == "fail" else "was not measured"
    assert f"Nats per token {words}" in judged["gain"].why
    masked = Evidence(
        ScoreTable(changed(text(), contender, nats=value)),
        METRICS["accuracy"],
        knowledge="masked tokens",
    )
    assert GATES["retention"].judge(masked, 0.03).verdict == verdict  # type: ignore[union-attr]


def test_general_knowledge_that_nobody_measured_is_inconclusive() -> None:
    items = table(300, 20, 20, 300)
    for name in ("retention", "drift"):
        judged = result(name, *items, threshold=0.1)
        assert judged.verdict == "inconclusive"
        assert "was not measured: there is nothing to measure it on" in judged.why


@pytest.mark.parametrize("value", [math.nan, None, -math.inf])
def test_kl_that_is_not_a_number_fails(value: float | None) -> None:
    judged = result("drift", *changed(text(), "adapter", kl=value), threshold=0.1)
    assert (judged.verdict, judged.observed) == ("fail", None)
    assert "is not a number" in judged.why
    one = [*text(20), *changed(text(1), "adapter", kl=value)]
    assert result("drift", *one, threshold=0.1).verdict == "fail"


def test_no_kl_at_all_has_bounds_of_a_width() -> None:
    judged = result("drift", *text(kl=0.0), threshold=0.1)
    assert (judged.verdict, judged.observed) == ("pass", 0.0)
    assert judged.upper is not None
    assert judged.upper > 0


def test_an_adapter_that_learned_nothing_is_no_proof_that_it_did_not_overfit() -> None:
    items = [*table(0, 200, 0, 200), *table(0, 200, 0, 200, where="train")]
    seen = Evidence(ScoreTable(items), METRICS["f1"], ["no", "yes"], 1)
    for limit, verdict in ((0.1, "inconclusive"), (None, "warning")):
        judged = GATES["overfit"].judge(seen, limit)
        assert judged is not None
        assert judged.verdict == verdict
        assert judged.why == "F1 is 0.000 on training rows: nothing was learned."


@pytest.mark.parametrize("metric", ["accuracy", "macro_f1", "balanced_accuracy", "mcc", "loss"])
def test_an_adapter_that_always_gives_one_answer_learned_nothing(metric: str) -> None:
    items = [*table(0, 200, 0, 200), *table(0, 200, 0, 200, where="train")]
    seen = Evidence(ScoreTable(items), METRICS[metric], ["no", "yes"], 1)
    judged = GATES["overfit"].judge(seen, 0.1)
    assert judged is not None
    assert judged.verdict == "inconclusive"
    assert judged.why.endswith("nothing was learned.")


LIMITS = {"overfit": 0.5, "memorisation": 0.9, "calibration": 0.5}


@pytest.mark.parametrize(("gate", "key"), [("calibration", "confidence"), ("calibration", "brier"),
                                           ("memorisation", "nll")])  # fmt: skip
def test_a_gate_with_a_limit_does_not_vanish_with_its_figure(gate: str, key: str) -> None:
    items = [item for where in ("test", "train") for item in table(95, 5, 5, 95, where=where)]
    assert result(gate, *items, threshold=LIMITS[gate]).verdict == "pass"
    for limit in (LIMITS[gate], None):
        judged = GATES[gate].judge(evidence(*changed(items, "adapter", **{key: None})), limit)
        assert judged is not None
        assert judged.verdict == "fail"
    lacking = changed(items, "adapter", **{key: math.inf, "nats": math.inf})
    assert result(gate, *lacking, threshold=LIMITS[gate]).verdict == "inconclusive"


@pytest.mark.parametrize("gate", ["overfit", "memorisation"])
def test_a_limit_needs_training_rows(gate: str) -> None:
    items = table(95, 5, 5, 95)
    assert result(gate, *items, threshold=LIMITS[gate]).verdict == "inconclusive"
    assert GATES[gate].judge(evidence(*items), None) is None


def test_slices_without_a_prediction_do_not_vanish() -> None:
    items = [item | {"slices": {"ward": str(n % 2)}} for n, item in enumerate(table(95, 5, 5, 95))]
    assert result("slices", *items, threshold=0.1).verdict == "pass"
    for value, verdict in ((None, "fail"), (math.inf, "inconclusive")):
        one = [*changed(items[:1], "adapter", prediction=value), *items[1:]]
        assert result("slices", *one, threshold=0.1).verdict == verdict


@pytest.mark.parametrize("place", [0, 7])
@pytest.mark.parametrize("value", [None, math.inf])
def test_a_baseline_that_lacks_a_score_does_not_drop_out_of_gain(
    place: int, value: float | None
) -> None:
    items = [row(n % 2, number=n, base=0, adapter=n % 2, tfidf=int(n < 100)) for n in range(200)]
    assert result("gain", *items).verdict == "pass"
    items[place : place + 1] = changed(items[place : place + 1], "tfidf", prediction=value)
    judged = result("gain", *items)
    assert judged.verdict == "inconclusive"
    assert "TF-IDF" in judged.why
    # One that has no score of the metric at all is no rival on it.
    items = changed(items, "tfidf", prediction=math.inf)
    assert result("gain", *items).verdict == "pass"


# ── Gates that inform ───────────────────────────────────────────────────────────────────────────


def seen_and_unseen(train: int, test: int, tfidf: tuple[int, int] | None = None) -> list[Item]:
    """200 training and 200 test rows of which the adapter, and TF-IDF, answer so many right."""
    items = []
    for n, (where, right) in enumerate((("train", train), ("test", test))):
        for number in range(200):
            target = number % 2
            wrong = 1 - target
            predicted = {"base": wrong, "adapter": target if number < right else wrong}
            if tfidf is not None:
                predicted["tfidf"] = target if number < tfidf[n] else wrong
            items.append(row(target, where, number, **predicted))
    return items


@pytest.mark.parametrize(
    ("tfidf", "verdict"),
    [(None, "warning"), ((200, 195), "warning"), ((200, 100), "note"), ((200, 166), "note")],
)
def test_a_gap_warns_only_above_the_best_baselines_own(
    tfidf: tuple[int, int] | None, verdict: Verdict
) -> None:
    """Training rows learned by heart and .85 on test rows: useful, and TF-IDF does the same."""
    items = seen_and_unseen(200, 170, tfidf)
    judged = GATES["overfit"].judge(evidence(*items), None)
    assert judged is not None
    assert (judged.verdict, judged.observed) == (verdict, pytest.approx(0.15))
    if tfidf is not None:
        assert f"That of TF-IDF is {(tfidf[0] - tfidf[1]) / 200:.3f}." in judged.why
    assert result("overfit", *items, threshold=0.1).verdict == "fail"
    assert result("overfit", *items, threshold=0.3).verdict == "pass"


def test_a_gap_that_rows_cannot_show_is_a_note() -> None:
    judged = GATES["overfit"].judge(evidence(*seen_and_unseen(200, 178)), None)
    assert judged is not None
    assert (judged.verdict, judged.observed) == ("note", pytest.approx(0.11))


def told_apart(loss: float, calibrated: float, rows: int = 1000) -> list[Item]:
    """Training rows by heart and test rows at .61, whose loss and gain have these AUCs."""
    random = np.random.default_rng(0)
    items = []
    for where in ("train", "test"):
        for number in range(rows):
            right = where == "train" or number < 0.61 * rows
            item = row(1, where, number, base=0, adapter=int(right))
            shift = 0.0 if where == "train" else 1.0
            nll = random.normal(2**0.5 * NormalDist().inv_cdf(loss) * shift, 1)
            gained = random.normal(-(2**0.5) * NormalDist().inv_cdf(calibrated) * shift, 1)
            item["scores"]["adapter"] |= {"nll": nll, "nats": 9.0 - gained, "tokens": 1}
            item["scores"]["base"] |= {"nats": 9.0, "tokens": 1}
            items.append(item)
    return items


def test_membership_is_the_larger_of_two_aucs_and_warns() -> None:
    """Calibrated by the base, an adapter that knows its training rows by heart looks harmless."""
    items = told_apart(loss=0.92, calibrated=0.646)
    judged = GATES["memorisation"].judge(evidence(*items), None)
    assert judged is not None
    assert (judged.verdict, judged.observed) == ("warning", pytest.approx(0.92, abs=0.01))
    assert (
        "Measured by the loss itself; by what the adapter gained on each row it is 0.6"
        in judged.why
    )
    assert result("memorisation", *items, threshold=0.75).verdict == "fail"
    other = result("memorisation", *told_apart(loss=0.6, calibrated=0.8), threshold=0.7)
    assert other.observed == pytest.approx(0.8, abs=0.02)
    assert other.verdict == "fail"


def test_membership_of_one_large_group_shows_little() -> None:
    items = told_apart(loss=0.92, calibrated=0.646)
    grouped = [item | {"group": "one" if n % 4 else f"g{n}"} for n, item in enumerate(items)]
    alone, together = (result("memorisation", *each, threshold=0.75) for each in (items, grouped))
    assert together.observed == alone.observed
    assert (alone.verdict, together.verdict) == ("fail", "inconclusive")


def test_membership_is_measured_without_a_score_of_the_base() -> None:
    items = [item | {"scores": {"adapter": item["scores"]["adapter"]}}
             for item in told_apart(loss=0.92, calibrated=0.646)]  # fmt: skip
    judged = GATES["memorisation"].judge(evidence(*items), None)
    assert judged is not None
    assert judged.verdict == "warning"
    assert judged.why.endswith("Measured by the loss itself.")


def test_kl_decides_on_the_embedded_base_or_where_the_domain_sets_a_limit() -> None:
    def drift(limit: float | None, *, embedded: bool) -> GateResult:
        judged = GATES["drift"].judge(evidence(*text(kl=0.4), embedded_base=embedded), limit)
        assert judged is not None
        return judged

    assert drift(None, embedded=True).verdict == "fail"
    assert drift(None, embedded=True).threshold == 0.23
    assert drift(0.5, embedded=False).verdict == "pass"
    assert drift(0.1, embedded=False).verdict == "fail"
    informs = drift(None, embedded=False)
    assert (informs.verdict, informs.observed, informs.threshold) == ("note", 0.4, None)
    missing = GATES["drift"].judge(evidence(), None)
    assert missing is not None
    assert missing.verdict == "warning"
    broken = GATES["drift"].judge(evidence(*changed(text(), "adapter", kl=math.nan)), None)
    assert broken is not None
    assert broken.verdict == "fail"


def test_confidence_that_is_far_from_accuracy_warns() -> None:
    for right, verdict in ((180, "note"), (120, "warning")):
        items = seen_and_unseen(200, right)  # their confidence is .9
        judged = GATES["calibration"].judge(evidence(*items), None)
        assert judged is not None
        assert judged.verdict == verdict
        assert result("calibration", *items, threshold=0.1).verdict == (
            "pass" if verdict == "note" else "fail"
        )
    assert GATES["calibration"].judge(evidence(*text()), None) is None


def test_those_that_decide_come_first_and_a_warning_changes_no_verdict() -> None:
    items = [*seen_and_unseen(200, 195, (200, 100)), *general(), *text()]
    seen = evidence(*changed(items, "adapter", confidence=0.5), largest_move=1.0)
    judged = judge_all(seen, {"precision": 0.5})
    kinds = [result.verdict in INFORMING for result in judged]
    assert kinds == sorted(kinds)
    assert [r.name for r in judged if r.verdict == "warning"] == ["calibration"]
    assert verdict_of(judged) == "pass"
    assert verdict_of([r for r in judged if r.verdict in INFORMING]) == "inconclusive"


# ── Thresholds ──────────────────────────────────────────────────────────────────────────────────


def test_every_threshold_is_a_setting_with_the_default_of_its_gate() -> None:
    settings = {setting.name: setting.default for setting in dataclasses.fields(Gates)}
    assert settings == {g.name: g.threshold.default for g in GATES.values() if g.threshold}


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Gates)])
def test_a_threshold_outside_its_range_is_refused_with_the_range(name: str) -> None:
    threshold = GATES[name].threshold
    assert threshold is not None
    for value in (threshold.above, threshold.below, -1.0):
        if threshold.allows(value):
            continue
        with pytest.raises(DomainError, match=f"setting '{name}'") as refused:
            Domain("x", Classification(), Data("t.csv"), gates=Gates(**{name: value}))
        assert str(threshold) in str(refused.value)


def test_ranges_in_words() -> None:
    assert str(Threshold(0.8)) == "between 0 and 1"
    assert str(Threshold(0.8, above=0.5)) == "between .5 and 1"
    assert str(Threshold(0.8, below=math.inf)) == "above 0"


# ── A gate from outside ─────────────────────────────────────────────────────────────────────────


def confident(evidence: Evidence, floor: float) -> GateResult:
    """The adapter's smallest confidence on test rows reaches a floor."""
    least = float(evidence.test.column("adapter", "confidence").min())
    why = f"The smallest confidence is {least:.3f}; at least {floor:g} is required."
    return judge_count("confidence", "all confident", least, passed=least >= floor, why=why)


@dataclass(frozen=True)
class Stricter(Gates):
    confidence: float = 0.95


@pytest.fixture
def _confidence() -> Iterator[None]:
    register(Gate("confidence", confident, Threshold(0.5)))
    yield
    del GATES["confidence"]


@pytest.mark.usefixtures("_confidence")
def test_a_registered_gate_counts_in_verdict_card_and_junit(tmp_path: Path) -> None:
    def judged(name: str, gates: Mapping[str, float]) -> AdapterEntry:
        made = folder(tmp_path, name)
        card = json.loads((made / "card.json").read_text())
        card["adapters"][0]["settings"]["gates"] = dict(gates)
        (made / "card.json").write_text(json.dumps(card))
        return rebuild(made).adapter

    domain = Domain("x", Classification(), Data("t.csv"), gates=Stricter())
    plain, strict = judged("plain", {}), judged("strict", as_record(domain)["gates"])
    assert [entry.verdict for entry in (plain, strict)] == ["pass", "fail"]
    assert {g["name"]: g["verdict"] for g in strict.gates}["confidence"] == "fail"
    save_report(combine([tmp_path / "strict"]), tmp_path / "out")
    assert 'name="confidence"' in (tmp_path / "out" / "junit.xml").read_text()
    assert "smallest confidence is 0.900" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(DomainError, match="setting 'confidence'"):
        Domain("x", Classification(), Data("t.csv"), gates=Stricter(confidence=2.0))
    with pytest.raises(ValueError, match="already"):
        register(GATES["confidence"])


def test_gates_need_neither_torch_nor_scikit_learn() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['sklearn'] = None;"
        "from lora_domains.stats.shares import share_of;"
        "from lora_domains.verdict.rules import judge_share;"
        "from lora_domains.verdict import gates;"
        "share = share_of([1] * 85 + [0] * 15);"
        "print(judge_share('recall', share, 100, .8, 'positives').verdict)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "inconclusive"


def test_judge_all_leaves_out_gates_that_do_not_concern_the_adapter() -> None:
    items = [*table(50, 5, 5, 50), *general(), *text()]
    names = [r.name for r in judge_all(evidence(*items), {})]
    assert names == [
        "gain", "retention", "recall", "precision", "leaks", "frozen", "effect", "drift",
        "calibration"
    ]  # fmt: skip


# ── Floors of labels ────────────────────────────────────────────────────────────────────────────


def test_floors_hold_the_worst_label_to_its_recall() -> None:
    """The recall of each label by its lower bound, of classes and of several labels alike."""
    classes = table(tp=190, fn=10, fp=0, tn=200)
    several = [
        {"set": "test", "id": f"test:{n}", "digest": "", "target": -1,
         "truth": [item["target"], 1 - item["target"]],
         "scores": {"adapter": {"predicted": [item["scores"]["adapter"]["prediction"],
                                              1 - item["target"]]}}}
        for n, item in enumerate(classes)
    ]  # fmt: skip
    for items, labels in ((classes, ["no", "yes"]), (several, ["yes", "no"])):
        given = Evidence(ScoreTable(items), METRICS["accuracy"], labels, None)
        for floors, verdict in (
            ({"yes": 0.9}, "pass"), ({"yes": 0.99}, "fail"), ({"yes": 0.94}, "inconclusive"),
            ({"no": 0.9, "yes": 0.99}, "fail"), ({"other": 0.9}, "inconclusive"),
        ):  # fmt: skip
            (found,) = judge_all(given, {"floors": floors}, ["floors"])
            assert found.verdict == verdict
            assert (found.observed == pytest.approx(0.95)) == ("yes" in floors)
        assert judge_all(given, {}, ["floors"]) == []


def test_floors_count_in_a_digest_only_where_there_are_some() -> None:
    assert "floors" not in Gates().record()
    assert Gates(floors={"a": 0.5}).hashed() == Gates().hashed() | {"floors": {"a": 0.5}}
    with pytest.raises(DomainError, match=r"'floors': expected .*each label, between 0 and 1"):
        Domain("x", Classification(), Data("x.csv"), gates=Gates(floors={"a": 1.5}))
