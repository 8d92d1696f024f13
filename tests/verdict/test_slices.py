"""The gate on slices of the test rows, and on parts of the general questions."""

import numpy as np
import pytest
from support.items import Item, row, score, table
from support.judged import evaluated, gate, good, judged, sliced, verdict_of

from lora_domains.report.text import interval
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable


def test_slices_that_are_alike_pass() -> None:
    result = gate(judged(sliced(good(2000), "sex", "fm")), "slices")
    assert result["verdict"] == "pass"
    assert "Recall of sex=" in result["why"]


def test_a_worst_slice_fails_though_all_rows_together_pass() -> None:
    # 460 of 500 positives are found, but of the 60 at one site only 25.
    items = good()
    missed = [i for i in items if i["set"] == "test" and i["target"] == 1][-60:]
    for n, item in enumerate(missed):
        item["scores"]["adapter"] = score(int(n < 25), 1)
    for item in items:
        if item["set"] == "test":
            item["slices"] = {
                "site": "C" if any(item is m for m in missed) else "AB"[item["target"]]
            }
    summary = judged(items)
    assert gate(summary, "recall")["verdict"] == "pass"
    result = gate(summary, "slices")
    assert result["verdict"] == "fail"
    assert "site=C" in result["why"]
    assert result["observed"] == pytest.approx(
        25 / 60 - gate(summary, "recall")["observed"], abs=0.1
    )
    assert summary["verdict"] == "fail"


def test_a_small_slice_informs() -> None:
    items = sliced(good(), "site", ["A"] * 60 + ["B"])
    result = gate(judged(items), "slices")
    assert result["verdict"] == "pass"
    assert "no slice is clearly worse. Slices too small to decide: 1." in result["why"]
    lonely = sliced(good(), "site", ["A"])
    assert "slices" not in {g["name"] for g in judged(lonely)["gates"]}  # nothing to compare with
    for item in (i for i in items if i["set"] == "test" and i["target"] == 0):
        item["slices"] = {"site": "C"}  # a site without positives is left out
    assert "site=C" not in gate(judged(items), "slices")["why"]


def test_rows_without_the_column_are_a_slice_of_their_own() -> None:
    items = sliced(good(), "site", "AB")
    for item in [item for item in items if item["set"] == "test"][::5]:
        item["slices"] = {}
    summary = judged(items)
    assert summary["slices"]["site"].keys() == {"A", "B", "None"}
    assert summary["slices"]["site"]["None"]["f1"]["n"] == 200


def test_many_slices_that_are_alike_seldom_fail() -> None:
    # 40 slices of 25 positives at a true recall of .8; by chance some miss a margin of one point.
    rng, strict, failed = np.random.default_rng(0), {"slices": 0.01}, 0
    for _ in range(12):
        hits = (rng.random(1000) < 0.8).astype(int)
        items = [row(1, number=n, base=0, adapter=int(hit)) for n, hit in enumerate(hits)]
        items = sliced(items, "ward", [str(n) for n in range(40)])
        failed += verdict_of("slices", items, strict) == "fail"
    assert failed <= 2


def test_four_slices_without_a_difference_do_not_stop_a_pass() -> None:
    # 200 positives of 500 rows: a gate that asked each slice to prove itself passed .07 of these.
    rng, passed = np.random.default_rng(1), 0
    for _ in range(40):
        hits = rng.random(200) < 0.9
        items = [row(1, number=n, base=0, adapter=int(hit)) for n, hit in enumerate(hits)]
        items += [row(0, number=200 + n, base=0, adapter=0) for n in range(300)]
        seen = sliced(items, "ward", [f"{n}" for n in rng.permutation(np.arange(500) % 4)])
        passed += verdict_of("slices", seen) == "pass"
    assert passed >= 38


def test_a_slice_needs_ten_positives_to_fail() -> None:
    for small, verdict in ((9, "pass"), (10, "fail")):
        hits = np.arange(200) >= small  # all those of the small site are missed
        items = [row(1, number=n, base=0, adapter=int(hit)) for n, hit in enumerate(hits)]
        items = [item | {"slices": {"site": "B" if n < small else "A"}}
                 for n, item in enumerate(items)]  # fmt: skip
        assert gate(judged(items), "slices")["verdict"] == verdict


def test_a_field_that_is_lost_fails_though_the_pool_is_kept() -> None:
    # 28 questions of one suite of 84 lost, among 1,400: two points in all.
    kept = [i for i in good() if i["set"] != "general"]
    asked = [
        row(0, "general", n, base=0, adapter=int(n < 28))
        | {"suite": "law" if n < 84 else f"other/{n % 4}"}
        for n in range(1400)
    ]
    summary = judged([*kept, *asked])
    assert summary["general"]["pooled"]["difference"] == pytest.approx(-0.02)
    result = gate(summary, "retention")
    assert result["verdict"] == "fail"
    assert result["observed"] == pytest.approx(-28 / 84)
    assert "Accuracy on law 0.667; the base reaches 1.000" in result["why"]


def test_twelve_suites_without_a_loss_seldom_fail() -> None:
    rng, failed = np.random.default_rng(2), 0
    kept = [i for i in good(300) if i["set"] == "test"]
    for _ in range(40):
        asked = [
            row(0, "general", n, base=int(one), adapter=int(two)) | {"suite": f"s{n % 12}"}
            for n, (one, two) in enumerate(rng.random((720, 2)) < 0.1)
        ]
        failed += verdict_of("retention", [*kept, *asked]) == "fail"
    assert failed <= 2


def test_slices_in_groups_and_of_free_text() -> None:
    items = sliced(good(), "ward", ["north", "south"])
    alone = gate(judged(items), "slices")
    for n, item in enumerate(i for i in items if i["set"] == "test"):
        item["group"] = f"patient {n // 40}"
    assert gate(judged(items), "slices")["lower"] < alone["lower"]
    answers = [
        {"set": "test", "id": f"t:{n}", "target": -1, "slices": {"ward": "ns"[n % 2]}, "scores": {
            "base": {"f1": 0.1, "exact": 0.0, "nats": 9.0 + n % 3, "tokens": 3},
            "adapter": {"f1": 0.9 - 0.5 * (n % 2) + n % 5 / 50, "exact": 0.0, "nats": 5.0,
                        "tokens": 3}}}
        for n in range(200)
    ]  # fmt: skip
    result = judged(answers, metric="token_f1", labels=[], positive=None)
    assert gate(result, "slices")["verdict"] == "fail"
    assert "Token F1 of ward=s" in gate(result, "slices")["why"]


def test_a_slice_that_is_clearly_worse_fails_by_the_bound_of_95_percent() -> None:
    # Slices pass unless one is clearly worse, so the stricter level must not hide it.
    def at(lost: int) -> list[Item]:
        items = sliced(good(), "ward", "n")
        for n, item in enumerate(i for i in items if i["set"] == "test" and i["target"] == 1):
            item["slices"] = {"ward": "s" if n < 100 else "n"}
            item["scores"]["adapter"]["prediction"] = int(not n < lost)
        return items

    lost = next(n for n in range(100) if verdict_of("slices", at(n)) == "fail")
    assert verdict_of("slices", at(lost), evaluations=evaluated()) == "fail"


def test_slices_are_each_value_of_each_column() -> None:
    items = table(40, 10, 10, 40)
    for n, item in enumerate(items):
        item["slices"] = {"ward": "north" if n % 4 else "south", "sex": "f" if n % 2 else "m"}
    result = judged(items)["slices"]
    assert result.keys() == {"ward", "sex"}
    assert {v: f["f1"]["n"] for v, f in result["ward"].items()} == {"north": 75, "south": 25}
    north = [i for i in items if i["slices"]["ward"] == "north"]
    assert result["ward"]["north"]["f1"]["adapter"] == METRICS["f1"].value(
        ScoreTable(north), "adapter", 1
    )


def test_a_slice_of_one_row_or_without_positives_is_still_json() -> None:
    items = table(40, 10, 10, 40)
    for n, item in enumerate(items):
        item["slices"] = {"ward": "alone" if n == 99 else "rest"}
    alone = judged(items)["slices"]["ward"]["alone"]["f1"]
    assert (alone["n"], alone["adapter"], alone["lower"]) == (1, 0.0, -1.0)
    alone = judged(items, metric="loss")["slices"]["ward"]["alone"]["loss"]
    assert alone["lower"] is None
    assert "?" in interval(alone)
