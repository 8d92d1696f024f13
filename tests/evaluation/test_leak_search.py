"""Leaks between all that training may read and all that is scored."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_rows
from support.general_text import TRAINING, use_general_text
from support.models import QUESTIONS, SUITE, declared, model_in

from lora_domains.probes.suite import Suite
from lora_domains.tasks import Generation


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
