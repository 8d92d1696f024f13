"""Leaks between all that training may read and all that is scored."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.general_text import TRAINING, use_general_text
from support.models import QUESTIONS, QUIET, SUITE, declared, model_in

from lora_domains.data.leaks import inherited_leaks, trained_rows
from lora_domains.data.source import Data
from lora_domains.dataset import load_dataset
from lora_domains.domain import Domain
from lora_domains.evaluation.leak_search import every_leak
from lora_domains.modeling.base import load_base
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.suite import Suite, embedded
from lora_domains.tasks import Classification, Example, Generation


def questions(first: str) -> Suite:
    rows = [{**QUESTIONS[0], "question": first}, *QUESTIONS]
    return replace(SUITE, probes=(replace(SUITE.probes[0], rows=rows),))


@pytest.mark.slow
def test_leaks_into_the_probes_fail(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Generation(prompt="{question}", max_new_tokens=4)
    rows = [{"question": r["text"], "answer": r["label"]} for r in make_rows(60)]
    made = declared(rows, "leaky", task, epochs=1)
    model_in(tmp_path, tiny_base).fit(made)

    def leaks(
        suite: Suite, training: Sequence[str] = TRAINING, selection: Sequence[str] = ()
    ) -> tuple[str, int]:
        # Whatever suite is scored, training reads the embedded general text.
        use_general_text(monkeypatch, training, selection)
        entry = model_in(tmp_path, tiny_base).evaluate(made, suite=suite).entry
        gate = next(g for g in entry.gates if g["name"] == "leaks")
        assert (entry.verdict == "fail") >= (gate["verdict"] == "fail")
        return gate["verdict"], entry.leaks["exact"]

    assert leaks(SUITE) == ("pass", 0)
    assert leaks(questions(rows[3]["question"])) == ("fail", 1)  # train ↔ probes
    assert leaks(SUITE, [QUESTIONS[0]["question"], "a red river"])[0] == "fail"  # replay ↔ probes
    # A text that a checkpoint is selected on ↔ probes
    assert leaks(SUITE, selection=[QUESTIONS[0]["question"], "a red river"])[0] == "fail"
    assert leaks(SUITE, [SUITE.text()[0], "a red river"])[0] == "fail"  # replay ↔ drift text
    assert leaks(SUITE, [rows[-1]["question"], "a red river"])[0] == "fail"  # replay ↔ test rows
    # Contained in a longer text, after other words.
    said = f"{QUESTIONS[0]['question']} {QUESTIONS[0]['choices'][QUESTIONS[0]['answer']]}"
    assert leaks(SUITE, [f"I heard: {said}, and so on", "a red river"])[0] == "fail"


@pytest.mark.parametrize(
    ("base", "general", "near"),
    [("embedded", None, False), ("another", None, True), ("embedded", "own", True)],
)
def test_the_embedded_base_may_have_read_what_its_own_questions_ask(
    tiny_base: Path, base: str, general: str | None, near: bool
) -> None:
    loaded = load_base(tiny_base, device="cpu")
    domain = declared(make_rows(60))
    if general is not None:
        texts = [{"text": text} for text in embedded_texts("train")[:2000]]
        domain = replace(domain, data=replace(domain.data, general=texts))
    dataset = load_dataset(domain, loaded, QUIET)
    found = every_leak(dataset, embedded(), replace(loaded, id=base), with_questions=True)
    assert (found.exact, found.near > 0) == (0, near)


# ── Rows of earlier trainings ───────────────────────────────────────────────────────────────────


def stage(rows: Sequence[dict[str, Any]], name: str, test: Sequence[dict[str, Any]]) -> Domain:
    made = declared(list(rows), name, epochs=1, retention="none")
    return replace(made, data=Data(list(rows[:60]), list(rows[60:80]), list(test)))


def test_test_rows_on_which_a_parent_was_trained_are_leaks(tiny_base: Path, tmp_path: Path) -> None:
    """Also where another stage lies between, in another prompt; 5 of 25 are the parent's."""
    model = model_in(tmp_path, tiny_base)
    first, second, third = make_rows(80), make_rows(80, seed=5), make_rows(120, seed=6)
    model.fit(stage(first, "first", make_rows(20, seed=9)))
    model.fit(stage(second, "second", make_rows(20, seed=9)), init_from="first")
    test = [*first[:3], *first[70:71], second[2], *third[80:100]]
    made = stage(third, "third", test)
    other = Classification(positive="spam", prompt="Read: {text}. It is")
    for domain, found in ((made, 5), (replace(made, task=other), 5)):
        model.fit(domain, init_from="second")
        entry = model.evaluate(domain, suite=SUITE).entry
        leaks = next(gate for gate in entry.gates if gate["name"] == "leaks")
        assert (leaks["verdict"], entry.leaks["exact"]) == ("fail", found)
        assert {row for _, row, _ in entry.leaks["pairs"]} >= {f"test:{n}" for n in range(5)}
    clean = replace(made, data=replace(made.data, test=third[80:]))
    model.fit(clean, init_from="second")
    assert model.evaluate(clean, suite=SUITE).entry.leaks["exact"] == 0


def test_rows_of_a_parent_from_another_project_are_unknown_and_said_to_be(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    model = model_in(tmp_path, tiny_base)
    model.fit(stage(make_rows(80), "first", make_rows(20, seed=9)))
    monkeypatch.setenv("LORA_DOMAINS_PROJECT", str(tmp_path / "another"))
    made = stage(make_rows(80, seed=5), "second", make_rows(80)[:20])
    model.fit(made, init_from="first")
    monkeypatch.setattr(model.display, "warn", warnings.append)
    model.evaluate(made, suite=SUITE)
    assert any("on which first was trained are not found" in line for line in warnings)


def test_a_card_remembers_rows_as_keyed_digests_only() -> None:
    rows = [Example(f"train:{n}", f"text: note {n}", " x", text=f"note {n}") for n in range(5)]
    known = trained_rows(rows, bytes(32), {})
    assert len(known["own"]) == 40  # 5 rows of 6 bytes in base64
    assert known["inherited"] == ""
    assert trained_rows(rows, bytes(31) + b"1", {})["own"] != known["own"]
    assert trained_rows(rows, None, {}) == {}
    assert inherited_leaks(rows, known, bytes(32)) == []  # its own rows are searched by text
    child = trained_rows(rows[:1], bytes(32), known)
    assert inherited_leaks(rows[3:], child, bytes(32)) == ["train:3", "train:4"]
    assert inherited_leaks(rows, child, bytes(31) + b"1") is None
    assert inherited_leaks(rows, {}, bytes(32)) is None
