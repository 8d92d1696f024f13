"""Per-item scores to figures, gates and verdict, against scikit-learn and published cases."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.items import general, row, score, table, text, train_like
from support.judged import gained, gate, good, judged, sliced

from lora_domains.adapters.readme import readme
from lora_domains.console import analyses
from lora_domains.domain import Domain
from lora_domains.errors import AdapterCorrupt
from lora_domains.report.card import AdapterEntry, BaseRecord, Card, read_items
from lora_domains.report.report import Evaluation
from lora_domains.verdict import best_baseline
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import over_seeds


def test_precision_is_restated_where_fewer_rows_are_positive() -> None:
    items = [*table(172, 28, 10, 290), *train_like(172, 28, 10, 290), *general(), *text()]
    found = judged(items, prevalence=0.05)["curve"]["prevalence"]
    assert (found["test"], found["declared"]) == (0.4, 0.05)
    by_share = {point["prevalence"]: point for point in found["points"]}
    assert by_share[0.4]["precision"] == pytest.approx(172 / 182)
    assert by_share[0.05]["precision"] == pytest.approx(0.58, abs=0.005)
    assert by_share[0.05]["lower"] == pytest.approx(0.45, abs=0.03)
    assert list(by_share) == sorted(by_share)
    precisions = [point["precision"] for point in found["points"]]
    assert precisions == sorted(precisions)
    # The gate holds where the test rows are; without a declaration the curve is there too.
    assert gate(judged(items, prevalence=0.05), "precision")["observed"] == pytest.approx(172 / 182)
    undeclared = judged(items)["curve"]["prevalence"]
    assert undeclared["declared"] is None
    assert undeclared["points"] == found["points"]


def test_precision_elsewhere_needs_both_classes_and_respects_groups() -> None:
    alone = judged([*table(30, 10, 0, 0), *train_like(30, 10, 0, 0), *general(), *text()])
    assert "prevalence" not in alone["curve"]
    items = [*table(170, 30, 30, 270), *train_like(170, 30, 30, 270), *general(), *text()]
    grouped = [item | {"group": f"patient {n // 10}"} if item["set"] == "test" else item
               for n, item in enumerate(items)]  # fmt: skip
    plain, wide = (
        {p["prevalence"]: p for p in judged(rows)["curve"]["prevalence"]["points"]}[0.05]
        for rows in (items, grouped)
    )
    assert wide["precision"] == pytest.approx(plain["precision"])
    assert wide["lower"] < plain["lower"]


# ── Published cases ───────────────────────────────────────────────────────────────────────────────


def test_a_good_run_passes_every_gate() -> None:
    summary = judged(good())
    assert {g["name"]: g["verdict"] for g in summary["gates"]} == dict.fromkeys(
        ["gain", "retention", "recall", "precision", "leaks", "frozen", "effect"], "pass"
    ) | dict.fromkeys(["drift", "overfit", "memorisation", "calibration"], "note")
    assert summary["verdict"] == "pass"


def test_98_percent_accuracy_and_12_percent_recall_fails() -> None:
    summary = judged(table(tp=12, fn=88, fp=2, tn=4398))
    assert summary["domain_scores"]["accuracy"]["adapter"] == pytest.approx(0.98)
    assert gate(summary, "recall")["observed"] == pytest.approx(0.12)
    assert gate(summary, "recall")["verdict"] == "fail"
    assert summary["verdict"] == "fail"


def test_precision_one_half_and_recall_three_tenths_fails() -> None:
    summary = judged(table(tp=30, fn=70, fp=30, tn=370))
    assert gate(summary, "precision")["observed"] == pytest.approx(0.5)
    assert gate(summary, "recall")["observed"] == pytest.approx(0.3)
    assert {gate(summary, n)["verdict"] for n in ("precision", "recall")} == {"fail"}


def test_85_15_10_90_is_inconclusive_and_names_the_positives_needed() -> None:
    summary = judged(table(tp=85, fn=15, fp=10, tn=90))
    scores, recall, precision = (
        summary["domain_scores"], gate(summary, "recall"), gate(summary, "precision")
    )  # fmt: skip
    assert scores["accuracy"]["adapter"] == pytest.approx(0.875)
    assert scores["precision"]["adapter"] == pytest.approx(85 / 95)
    assert (recall["verdict"], precision["verdict"]) == ("inconclusive", "inconclusive")
    assert recall["lower"] == pytest.approx(0.782, abs=5e-4)
    assert precision["lower"] == pytest.approx(0.832, abs=5e-4)
    assert "about 368 positives would decide it" in recall["why"]
    assert summary["verdict"] == "inconclusive"


def test_the_same_shares_of_2000_rows_pass() -> None:
    summary = judged([*table(tp=850, fn=150, fp=100, tn=900), *general(), *text()])
    assert {gate(summary, n)["verdict"] for n in ("precision", "recall")} == {"pass"}
    assert summary["verdict"] == "pass"


# ── Planted faults ────────────────────────────────────────────────────────────────────────────────


FAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "leak": ("leaks", {"leaks": {"exact": 1, "near": 0}}),
    "changed base": ("frozen", {"base_changed": True}),
    "inert adapter": ("effect", {"largest_move": 0.0}),
    "diverged adapter": ("effect", {"largest_move": math.inf}),
}


@pytest.mark.parametrize(("name", "changes"), FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_fails_the_run(name: str, changes: dict[str, Any]) -> None:
    summary = judged(good(), **changes)
    assert [g["name"] for g in summary["gates"] if g["verdict"] not in ("pass", "note")] == [name]
    assert gate(summary, name)["verdict"] == "fail"
    assert summary["verdict"] == "fail"


def test_a_near_leak_warns_and_passes() -> None:
    result = gate(judged(good(), leaks={"exact": 0, "near": 2}), "leaks")
    assert result["verdict"] == "pass"
    assert "2 rows are nearly" in result["why"]


def test_scores_are_also_shown_without_near_leaks() -> None:
    """TF-IDF finds .958 of the positives that nearly repeat a training row, .823 of the others."""
    near, rest = table(100, 20, 0, 0), table(195, 65, 10, 500)
    for items, found in ((near, 115), (rest, 214)):
        for number, item in enumerate(items):
            right = item["target"] == 0 or number < found
            item["scores"]["tfidf"] = score(item["target"] if right else 0, item["target"])
    for number, item in enumerate([*near, *rest]):
        item["id"] = f"test:{number}"
    leaks = {f"test:{number}" for number in range(len(near))}
    summary = judged([*near, *rest], near_leaks=leaks)
    recall = summary["domain_scores"]["recall"]
    assert recall["baselines"]["tfidf"] == pytest.approx((115 + 214) / 380)
    clean = summary["without_near_leaks"]
    assert clean.keys() == summary["domain_scores"].keys()
    assert (clean["recall"]["n"], clean["accuracy"]["n"]) == (260, 770)
    assert clean["recall"]["baselines"]["tfidf"] == pytest.approx(0.823, abs=5e-4)
    assert clean["recall"]["adapter"] == pytest.approx(0.75)
    assert "without_near_leaks" not in judged([*near, *rest])
    assert "without_near_leaks" not in judged(near, near_leaks=leaks)
    window = [item | {"id": f"{item['id']}/1"} for item in [*near, *rest]]
    assert judged(window, near_leaks=leaks)["without_near_leaks"] == clean


def test_overfitting_warns_and_fails_where_the_domain_sets_a_limit() -> None:
    items = [*table(300, 200, 150, 350), *train_like(500, 0, 0, 500), *general(), *text()]
    gates = {"recall": 0.5, "precision": 0.5}
    for limit, verdicts in ((None, ("warning", "pass")), (0.10, ("fail", "fail"))):
        summary = judged(items, gates={**gates, "overfit": limit})
        result = gate(summary, "overfit")
        assert (result["verdict"], summary["verdict"]) == verdicts
        assert result["observed"] == pytest.approx(1 - 2 * 300 / (500 + 450))


def test_forgetting_fails_retention_and_drift_fails_on_kl() -> None:
    kept = [i for i in good() if i["set"] in ("test", "train")]
    forgot = judged([*kept, *general(lost=80), *text(kl=2.0)], embedded_base=True)
    assert [g["name"] for g in forgot["gates"] if g["verdict"] == "fail"] == ["retention", "drift"]
    assert forgot["general"]["pooled"]["difference"] == pytest.approx(-0.2)
    assert forgot["general"]["pooled"]["lost"] == 80
    assert forgot["general"]["kl"]["general"] == pytest.approx(2.0)
    assert forgot["general"]["nats"]["difference"] == pytest.approx(0.05)
    assert {"world/0", "world/1"} <= forgot["general"].keys()


def test_no_gain_over_the_best_baseline_fails() -> None:
    items = table(300, 200, 150, 350)
    for item in items:
        item["scores"]["tfidf"] = score(item["target"], item["target"])
        item["scores"]["majority"] = score(0, item["target"])
    result = gate(judged(items), "gain")
    assert result["verdict"] == "fail"
    assert "TF-IDF reaches 1.000. The adapter does not beat it" in result["why"]
    f1 = METRICS["f1"]
    values = {name: f1.value(ScoreTable(items), name, 1) for name in ("majority", "tfidf")}
    assert best_baseline(f1, values | {"unscored": None}) == ("tfidf", 1.0)
    assert best_baseline(f1, {"unscored": None}) is None
    # A baseline without the score a metric is made from is left out, not counted as zero.
    for item in items:
        item["scores"]["tfidf"].pop("nats")
    assert judged(items)["domain_scores"]["nats_per_token"]["baselines"] == {"majority": 1.0 / 2}


# ── Memorised rows, rows that chose a threshold, groups, few rows ─────────────────────────────────


def test_memorised_training_rows_warn_and_fail_where_a_limit_is_set() -> None:
    gates = {"recall": 0.80, "precision": 0.85, "memorisation": 0.75}
    learned, memorised = (judged(gained(good(), more), gates=gates) for more in (0.1, 1.5))
    assert gate(learned, "memorisation")["verdict"] == "pass"
    warned = judged(gained(good(), 1.5))
    assert (gate(warned, "memorisation")["verdict"], warned["verdict"]) == ("warning", "pass")
    assert learned["memorisation"]["auc"] == pytest.approx(0.53, abs=0.03)
    result = gate(memorised, "memorisation")
    assert (result["verdict"], memorised["verdict"]) == ("fail", "fail")
    assert memorised["memorisation"]["auc"] == pytest.approx(0.855, abs=0.03)  # Phi(1.5 / sqrt 2)
    assert (
        memorised["memorisation"]["lower"] < result["observed"] < memorised["memorisation"]["upper"]
    )
    few = [i for n, i in enumerate(gained(good(), 0.1)) if i["set"] != "train" or n % 300 == 0]
    assert gate(judged(few, gates=gates), "memorisation")["verdict"] == "inconclusive"


def test_rows_that_chose_a_threshold_enter_no_gate() -> None:
    items = good()
    for n, item in enumerate(items):
        for scores in item["scores"].values():
            scores["positive"] = n % 7 / 7
    threshold = {"targets": {"recall": 0.9}, "threshold": 0.3}
    before = judged(items, threshold=threshold)
    worst = [row(1, "validation", n, base=1, adapter=0) for n in range(300)]
    for n, item in enumerate(worst):
        item["scores"]["adapter"]["positive"] = n / 300
    after = judged([*worst, *items], threshold=threshold)
    assert (before["curve"].pop("validation", None), len(after["curve"].pop("validation"))) == (
        None, 60,
    )  # fmt: skip
    assert after == before
    assert after["curve"].keys() == {"positive", "targets", "threshold", "test", "prevalence"}


def test_ten_thousand_items_are_summarised_fast() -> None:
    import time

    items = sliced([*good(8000), *general(1500), *text(500)], "site", "abcde")
    judged(items)  # fills the cache of resamples
    started = time.process_time()
    judged(items)
    # .2 s on an idle core; 20 adapters in 10 s leave .5 for each, a busy machine twice that.
    assert time.process_time() - started < 1.0


def test_groups_widen_the_bounds() -> None:
    items = table(60, 40, 30, 70)
    alone = judged(items)["domain_scores"]["accuracy"]
    for n, item in enumerate(items):
        item["group"] = f"patient {n // 20}"
    together = judged(items)["domain_scores"]["accuracy"]
    assert together["difference"] == alone["difference"]
    assert together["upper"] - together["lower"] > 1.3 * (alone["upper"] - alone["lower"])


@pytest.mark.parametrize("count", [1, 2])
def test_one_or_two_items_give_a_card_and_no_pass(count: int) -> None:
    items = [
        *table(count, 0, 0, 0), *train_like(count, 0, 0, 0), *general(count), *text(count)
    ]  # fmt: skip
    summary = judged(items)
    assert summary["verdict"] != "pass"
    if count == 1:
        assert summary["domain_scores"]["loss"]["lower"] is None
        assert summary["general"]["kl"]["upper"] is None
    entry = AdapterEntry(
        domain="x", path="x", sha256=None, leaks={"exact": 0, "near": 0},
        training={"epochs": 1, "steps": 1, "seconds": 1.0, "best_epoch": 1},
        ledger=dict.fromkeys(
            ["read", "refused", "duplicates", "truncated", "supervised_tokens"], 0),
    )  # fmt: skip
    entry.update(summary)
    card = Card(base=BaseRecord("tiny", None, "0" * 64, "float32", None), adapter=entry)
    assert "nan" not in readme(card).lower().replace("finance", "")
    assert summary["verdict"] in str(Evaluation(card))


def test_free_text_is_evaluated_by_its_nats() -> None:
    items = [
        {"set": s, "id": f"{s}:{n}", "target": -1, "scores": {
            "base": {"nats": 40.0 + n % 5, "tokens": 10}, "adapter": {"nats": 30.0 + n % 5,
                                                                      "tokens": 10}}}
        for s in ("test", "train") for n in range(60)
    ]  # fmt: skip
    settings: dict[str, Any] = {
        "metric": "nats_per_token", "labels": [], "positive": None
    }  # fmt: skip
    summary = judged(items, **settings)
    nats = summary["domain_scores"]["nats_per_token"]
    assert (nats["base"], nats["adapter"]) == (pytest.approx(4.2), pytest.approx(3.2))
    assert (nats["won"], nats["lost"]) == (60, 0)
    assert gate(summary, "gain")["verdict"] == "pass"
    worse = [i | {"scores": {"base": i["scores"]["adapter"], "adapter": i["scores"]["base"]}}
             for i in items]  # fmt: skip
    assert gate(judged(worse, **settings), "gain")["verdict"] == "fail"
    memorised = [
        i | {"scores": {"base": i["scores"]["base"], "adapter": {"nats": 5.0, "tokens": 10}}}
        if i["set"] == "train" else i
        for i in items
    ]  # fmt: skip
    assert gate(judged(memorised, **settings), "overfit")["verdict"] == "warning"
    assert (
        gate(judged(memorised, gates={"overfit": 0.1}, **settings), "overfit")["verdict"] == "fail"
    )


@pytest.mark.parametrize("key", ["kl", "nats"])
def test_general_text_with_scores_that_are_not_numbers_still_gives_a_card(key: str) -> None:
    items = good()
    for item in items:
        if item["set"] == "text":
            item["scores"]["adapter"][key] = math.nan
    summary = judged(items)
    assert key not in summary["general"]
    assert gate(summary, "drift")["verdict"] == ("fail" if key == "kl" else "note")


def test_scores_of_a_parent_that_are_not_numbers_are_left_out() -> None:
    items = good()
    for item in items:
        if item["set"] == "test":
            item["scores"]["parent"] = {**score(0, item["target"]), "nats": math.nan}
    over = judged(items)["over_parent"]
    assert "nats_per_token" not in over
    assert "f1" in over


def test_without_general_knowledge_a_verdict_stays_open() -> None:
    rows = [item for item in good() if item["set"] in ("test", "train")]
    summary = judged(rows, embedded_base=True)
    open_gates = [g["name"] for g in summary["gates"] if g["verdict"] == "inconclusive"]
    assert (summary["verdict"], open_gates) == ("inconclusive", ["retention", "drift"])


# ── Reading what was written ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("text", [None, '{"set": "test"', "\0"])
def test_items_that_cannot_be_read_are_named(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "items.jsonl").write_text(text)
    with pytest.raises(AdapterCorrupt, match=r"items\.jsonl"):
        read_items(tmp_path)


@pytest.mark.parametrize(
    "card",
    ["{", "[]", "{}", '{"base": {"id": 1, "identity": 2, "dtype": 3, "quantization": 4}, '
     '"adapters": [{"domain": "x", "sha256": "y"}]}'],
)  # fmt: skip
def test_a_card_that_is_none_is_refused(tmp_path: Path, card: str) -> None:
    (tmp_path / "card.json").write_text(card)
    with pytest.raises(AdapterCorrupt, match=r"card\.json"):
        Card.read(tmp_path)


def test_default_gates_are_the_ones_of_the_design() -> None:
    assert Domain.__dataclass_fields__["gates"].default_factory is Gates
    assert (Gates().retention, Gates().overfit, Gates().recall) == (0.03, None, 0.80)


def test_a_metric_without_a_slope_has_its_values_over_seeds_and_no_bounds() -> None:
    """MCC of a base that gives all rows one label, as many small bases do."""
    targets = [n % 2 for n in range(40)]

    def run(right: int) -> ScoreTable:
        return ScoreTable(
            {"target": target, "scores": {
                "base": {"prediction": 0},
                "adapter": {"prediction": target if n < right else 1 - target},
            }}
            for n, target in enumerate(targets)
        )  # fmt: skip

    found = over_seeds([run(36), run(32)], [METRICS["mcc"], METRICS["accuracy"]], None, "test")
    assert found["mcc"]["adapter"] == pytest.approx([0.8, 0.6])
    assert found["mcc"]["difference"] == pytest.approx(0.7)
    assert [found["mcc"][name] for name in ("lower", "upper", "sd_seed")] == [None] * 3
    assert found["accuracy"]["lower"] < 0.35 < found["accuracy"]["upper"]
    console = Console(width=80, record=True, file=StringIO())
    analyses.seeds(console, found)
    assert "+0.700 (? to ?)" in console.export_text()
