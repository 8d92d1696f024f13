"""Scores of contenders on general questions and text."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.adapters import strong
from support.models import QUIET, SUITE, declared, model_in

from lora_domains.console import Clock
from lora_domains.evaluation import contenders, scorer
from lora_domains.evaluation.contenders import probe_part, score_general
from lora_domains.evaluation.scorer import Part, Scorer, TimedScorer
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Classification, Example, MultipleChoice
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow


def test_a_nan_after_the_first_move_is_kept(tiny_base: Path) -> None:
    class Overflowing(Scorer):
        def drift(self, part: Part, adapters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
            moved = super().drift(part, adapters)
            moved["strong"][1]["largest"] = math.nan
            return moved

    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base))
    moves = [
        score_general(kind(bank, QUIET), SUITE, 64, ["strong"], b"key")["strong"].largest_move
        for kind in (Scorer, Overflowing)
    ]
    assert 0 < moves[0] < math.inf
    assert math.isnan(moves[1])


def test_an_estimate_knows_that_a_beginning_is_read_once(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[float] = []

    def estimated(rows: Any, run: Any, size: Any) -> dict[str, float]:
        sizes.append(size(rows))
        run(rows[:1], Clock({}))
        return {}

    monkeypatch.setattr(scorer, "estimated_phases", estimated)
    bank = Bank(load_base(tiny_base, device="cpu"))
    task = Classification(labels=("a", "b"))
    for begin in (40, 0):
        rows = [
            EncodedRow(Example(f"{n}", "", ""), EncodedExample(
                f"{n}", (*(7,) * begin, *(9 + n,) * (60 - begin)), (), ((11,), (12,)), 0))
            for n in range(20)
        ]  # fmt: skip
        TimedScorer(bank, QUIET).scores(Part("rows", task, rows), [None])
    assert sizes[1] - sizes[0] == 19 * 40


@pytest.mark.slow
def test_questions_are_asked_in_the_context_of_the_base(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the length of the domain's rows, or adapters of a base would be asked others."""
    asked: list[EncodedRow] = []

    def recorded(*given: Any) -> Part:
        part = probe_part(*given)
        asked.extend(part.rows)
        return part

    monkeypatch.setattr(contenders, "probe_part", recorded)
    rows = make_rows(60)
    for n, row in enumerate(rows):
        row["text"] = f"{row['text'].split()[0]} {n}"
    long = [{"question": "red river " * 20, "choices": ["a", "b"], "answer": 0}] * 5
    suite = Suite("long", (Probe("long", MultipleChoice(), long),))
    model = model_in(tmp_path, tiny_base)
    domain = declared(rows, epochs=1, retention="none", max_length=16)
    model.fit(domain)
    model.evaluate(domain, suite=suite)
    assert len(asked) == 5
    assert not any(row.encoded.truncated for row in asked)
    assert max(len(row.encoded) for row in model.dataset(domain).test) <= 16
