"""The first sentence of every view: what was found, what it costs, what to do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from support.folders import CARD, FAILS, PASSES, UNSURE, folder, items
from support.items import Item, general, row, text

from lora_domains.adapters.readme import readme
from lora_domains.report.card import AdapterEntry, ParentRecord
from lora_domains.report.conclusion import PRETRAINED, conclusion, standing
from lora_domains.report.html import page
from lora_domains.report.junit import junit
from lora_domains.report.markdown import comment
from lora_domains.report.report import Evaluation, combine, rebuild
from lora_domains.tasks import Chat, Classification, task_record

MANY = (460, 40, 30, 470)


def rival(rows: Sequence[Item], wrong: int, name: str = "tfidf") -> list[Item]:
    """Test rows with a contender that is wrong on every row whose number divides by ``wrong``."""
    scored = []
    for n, item in enumerate(rows):
        if item["set"] == "test":
            score = dict(item["scores"]["base"])
            right = bool(n % wrong)
            score["prediction"] = item["target"] if right else 1 - item["target"]
            item = item | {"scores": item["scores"] | {name: score}}
        scored.append(item)
    return scored


def entry(there: Path, rows: Sequence[Item], name: str = "triage", **changes: Any) -> AdapterEntry:
    return rebuild(folder(there, name, rows, **changes)).adapter


# ── Sentences ───────────────────────────────────────────────────────────────────────────────────


def test_a_gain_is_said_with_its_cost(tmp_path: Path) -> None:
    passed = entry(tmp_path, rival(items(PASSES), 5))
    assert conclusion(passed) == (
        "triage beats TF-IDF (F1 0.929, +0.129) and keeps general knowledge; 40 of 500 urgent rows "
        "are missed. Ship it."
    )
    assert standing(passed) == "F1 on 1,000 test rows: base 0.000, TF-IDF 0.800, triage 0.929."


def test_a_better_baseline_is_recommended(tmp_path: Path) -> None:
    beaten = entry(tmp_path, rival(items(MANY), 50))
    better = "TF-IDF does better than triage (F1 0.980 against 0.929). Use TF-IDF, or try"
    assert conclusion(beaten) == f"{better} {PRETRAINED[True]}."
    beaten.judged["embedded_base"] = False
    assert conclusion(beaten) == f"{better} training on more rows or on a larger --base."
    assert conclusion(entry(tmp_path, rival(items(FAILS), 50), "bad")).endswith(
        "It also fails recall and precision."
    )


def test_what_no_number_of_rows_would_prove_is_not_called_unproven(tmp_path: Path) -> None:
    rows = [row(n % 4 == 0, number=n, base=n % 4 == 0, adapter=n % 4 == 0) for n in range(400)]
    same = entry(tmp_path, [*rows, *general(), *text()])
    gain = next(gate for gate in same.gates if gate["name"] == "gain")
    assert (gain["verdict"], "No realistic number" in gain["why"]) == ("inconclusive", True)
    assert conclusion(same).endswith(
        f"Use the base, or try {PRETRAINED[True]}: no realistic number of rows would show a gain."
    )


def test_labels_of_a_head_in_another_order_are_suspected(tmp_path: Path) -> None:
    rows = [row(n % 4 == 0, number=n, base=0, adapter=(n % 4 == 0) != (n % 20 != 3))
            for n in range(400)]  # fmt: skip
    task = task_record(Classification(labels=("calm", "urgent"), head=True))
    headed = {"settings": {**CARD["adapters"][0]["settings"], "task": task}}
    judged = CARD["adapters"][0]["judged"] | {"labels": ["calm", "urgent"]}
    swapped = entry(tmp_path, rows, judged=judged, trained_elsewhere=True, **headed)
    assert conclusion(swapped).endswith(
        "Check the order of its labels first: in another one (--labels urgent,calm) it would be "
        "right on 95.0 % of these rows in place of 5.0 %."
    )
    collapsed = [row(n % 10 == 0, number=n, base=0, adapter=n % 15 != 1) for n in range(400)]
    always = entry(tmp_path, collapsed, "always", judged=judged, trained_elsewhere=True, **headed)
    assert "the order of its labels" not in conclusion(always)
    own = entry(tmp_path, rows, "own", judged=judged, **headed)
    assert "the order of its labels" not in conclusion(own)


def test_a_rival_that_always_says_the_same_is_not_recommended(tmp_path: Path) -> None:
    rows = [row(n % 4 == 0, number=n, base=1, adapter=1, majority=0) for n in range(400)]
    judged = {"metric": "accuracy", "labels": ["a", "b"], "positive": None, "base_changed": False,
              "largest_move": 1.0, "loss": "label cross-entropy", "suite": "world"}  # fmt: skip
    failed = entry(tmp_path, [*rows, *general(), *text()], judged=judged)
    assert conclusion(failed) == (
        "The majority class does better than triage (accuracy 0.750 against 0.250). Do not ship "
        f"it; try {PRETRAINED[True]}."
    )


def test_closer_answers_are_named_where_likelihoods_decide(tmp_path: Path) -> None:
    rows = [row(0, number=n) for n in range(200)]
    for item in rows:
        item["target"], item["scores"] = -1, {
            "base": {"nats": 8.0, "tokens": 4, "f1": 0.1, "exact": 0.0},
            "adapter": {"nats": 4.0, "tokens": 4, "f1": 0.2, "exact": 0.0},
            "nearest": {"f1": 0.25, "exact": 0.0},
        }  # fmt: skip
    judged = {"metric": "nats_per_token", "labels": [], "positive": None, "base_changed": False,
              "largest_move": 1.0, "loss": "nats per answer token", "suite": "world"}  # fmt: skip
    settings = {**CARD["adapters"][0]["settings"], "task": task_record(Chat(generate=True))}
    made = entry(tmp_path, [*rows, *general(), *text()], judged=judged, settings=settings)
    assert conclusion(made) == (
        "triage beats the base (nats per token 1.000, -1.000) and keeps general knowledge; the "
        "nearest answer is closer to the references (token F1 0.250 against 0.200). Read its "
        "answers before you ship it."
    )
    for item in rows:
        item["scores"]["adapter"]["f1"] = 0.25
    made = entry(tmp_path, [*rows, *general(), *text()], "other", judged=judged, settings=settings)
    assert conclusion(made).endswith("keeps general knowledge. Ship it.")
    for item in rows:
        item["scores"] = {
            who: {name: value for name, value in score.items() if name not in ("f1", "exact")}
            for who, score in item["scores"].items()
        }
    settings |= {"task": task_record(Chat())}
    rows += [*general(), *text()]
    made = entry(tmp_path, rows, "unread", judged=judged, settings=settings)
    assert conclusion(made).endswith(
        "keeps general knowledge. No answer was generated: read those of predict before you ship "
        "it."
    )


def test_wrong_answers_are_counted_without_a_positive_class(tmp_path: Path) -> None:
    judged = {"metric": "macro_f1", "labels": ["a", "b"], "positive": None, "base_changed": False,
              "largest_move": 1.0, "loss": "label cross-entropy", "suite": "world"}  # fmt: skip
    passed = entry(tmp_path, items(PASSES), judged=judged)
    assert "; 70 of 1,000 answers are wrong. Ship it." in conclusion(passed)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (items(PASSES, lost=60), "but loses general knowledge (100.0 % → 85.0 % correct); 40 of"),
        (items(PASSES, lost=60), "Do not ship it: it fails retention; train again with fewer"),
        (items((350, 150, 30, 470)),
         "150 of 500 urgent rows are missed (recall 0.700; 0.8 is required). Do not ship it"),
        (items((480, 20, 300, 200)),
         "300 of 780 rows called urgent are not (precision 0.615; 0.85 is required)"),
        (rival(items(UNSURE), 5), "triage may beat TF-IDF (F1 0.872, +0.072) and keeps general"),
        (rival(items(UNSURE), 5), "Not proven yet: gain, recall and precision are inconclusive"),
        (rival(items(UNSURE), 20), "TF-IDF seems to do better than triage (F1"),
    ],
)  # fmt: skip
def test_what_a_gate_found_is_in_the_sentence(
    rows: Sequence[Item], words: str, tmp_path: Path
) -> None:
    assert words in conclusion(entry(tmp_path, rows))


@pytest.mark.parametrize(
    ("lost", "words"),
    [(0, "; too few questions to show that it keeps general knowledge (100.0 % → 100.0 % correct)"),
     (1, " but may lose general knowledge (100.0 % → 96.7 % correct)")],
)  # fmt: skip
def test_few_questions_leave_general_knowledge_open(lost: int, words: str, tmp_path: Path) -> None:
    few = [item for item in items(PASSES) if item["set"] != "general"]
    made = entry(tmp_path, [*few, *general(30, lost)])
    assert words in conclusion(made)
    assert "retention is inconclusive; its gate says" in conclusion(made)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"leaks": {"exact": 3, "near": 0, "pairs": []}},
         "No figure of triage can be trusted. 3 test rows or questions are also in what"),
        ({"judged": {"base_changed": True}}, "No figure of triage can be trusted. The base's"),
        ({"judged": {"largest_move": 0.0}}, "triage cannot be used. The adapter has no effect"),
    ],
)  # fmt: skip
def test_what_makes_all_figures_meaningless_comes_alone(
    changes: Mapping[str, Any], words: str, tmp_path: Path
) -> None:
    made = entry(tmp_path, items(PASSES))
    judged = made.judged | changes.get("judged", {})
    broken = entry(tmp_path, items(PASSES), "b", **{**changes, "judged": judged})
    assert conclusion(broken).startswith(words.replace("triage", "b"))
    assert "beats" not in conclusion(broken)


def test_an_adapter_worse_than_the_one_it_continues_from(tmp_path: Path) -> None:
    rows = rival(rival(items(MANY), 5), 50, "parent")
    made = entry(tmp_path, rows, "second")
    made.parent = ParentRecord("first", "0" * 64)
    assert conclusion(made) == (
        "First does better than second (F1 0.980 against 0.929). Keep first."
    )


def test_what_was_not_checked_is_said(tmp_path: Path) -> None:
    made = entry(tmp_path, items(PASSES))
    for gate in made.gates:
        if gate["name"] in ("leaks", "memorisation", "overfit"):
            gate["verdict"] = "not applicable"
    assert conclusion(made).endswith(
        "are missed; leaks into its training rows, overfitting and memorisation were not checked. "
        "Ship it if it was not trained on these test rows."
    )


# ── Views ───────────────────────────────────────────────────────────────────────────────────────


def test_every_view_begins_with_it(tmp_path: Path) -> None:
    made = folder(tmp_path, "triage", rival(items(PASSES), 5))
    card, report = rebuild(made), combine([made])
    sentence, line = conclusion(card.adapter), standing(card.adapter)
    shown = " ".join(str(Evaluation(card)).split())
    for view, end in (
        (shown, "gain"),
        (readme(card), "| gain |"),
        (comment(report), "| gain |"),
        (page(report).replace("&#34;", '"'), "<b>gain</b>"),
    ):
        assert sentence in view
        assert view.index(sentence) < view.index(line) < view.index(end)
    assert sentence in junit(report)


def test_gates_that_decide_come_before_the_tables(tmp_path: Path) -> None:
    shown = str(Evaluation(rebuild(folder(tmp_path))))
    places = [shown.index(part) for part in ("Verdict: pass", "Gates", "test rows ─", "General")]
    assert places == sorted(places)


def test_several_adapters_are_concluded_on_before_the_table(three: list[Path]) -> None:
    report = combine(three)
    for view in (comment(report), page(report)):
        for made in report.adapters:
            found = conclusion(made)
            assert found in view
            assert view.index(found) < view.index("general knowledge</th>" if "<th" in view
                                                  else "| adapter |")  # fmt: skip


def test_without_an_evaluation_it_says_so() -> None:
    made = AdapterEntry(domain="new", path="new", sha256=None)
    assert conclusion(made) == "new has not been evaluated: there is no verdict."
    assert standing(made) == ""
