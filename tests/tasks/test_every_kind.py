"""Every kind of task but classification, fitted and evaluated on a tiny base."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from support.models import SUITE, declared, model_in

from lora_domains.analysis.trace import trace
from lora_domains.errors import UsageError
from lora_domains.evaluation.baselines import SHOTS
from lora_domains.inference.predict import Prediction
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.tasks import Generation, LanguageModelling, MultipleChoice, Task


def other_rows(kind: str, count: int = 80) -> list[dict[str, Any]]:
    rows = make_rows(count)
    if kind == "multiple_choice":
        return [
            {"question": f"What follows {r['text']}?", "choices": ["red stone", "blue river"],
             "answer": int(r["label"] == "spam")}
            for r in rows
        ]  # fmt: skip
    if kind == "generation":
        return [{"question": r["text"], "answer": r["label"] + " call now"} for r in rows]
    if kind == "long answers":  # too long for four of them to stand in one prompt
        return [{"question": r["text"], "answer": (r["text"] + " ") * 6} for r in rows]
    return [{"text": (r["text"] + " ") * (1 + n % 30)} for n, r in enumerate(rows)]


TASKS: dict[str, tuple[Task, str]] = {
    "multiple_choice": (MultipleChoice(), "accuracy"),
    "generation": (Generation(max_new_tokens=8), "token_f1"),
    "long answers": (Generation(max_new_tokens=8), "token_f1"),
    "language_modelling": (LanguageModelling(), "nats_per_token"),
}


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_is_fitted_and_evaluated(kind: str, tiny_base: Path, tmp_path: Path) -> None:
    task, metric = TASKS[kind]
    made = declared(other_rows(kind), "other", task)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(made)
    history = card.adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]
    entry = model.evaluate(made, suite=SUITE).entry
    assert entry.judged["metric"] == metric
    assert metric in entry.domain_scores
    nats = entry.domain_scores["nats_per_token"]
    assert nats["adapter"] < nats["base"]
    assert rebuild(tmp_path / "other") == Card.read(tmp_path / "other")
    if kind == "generation":
        assert f"{SHOTS}_shot" in entry.domain_scores["token_f1"]["baselines"]
        assert isinstance(model.predict("red stone", domain="other")[0], str)
    if kind == "multiple_choice":
        rows = made.data.test
        assert isinstance(rows, list)
        asked = [{"question": row["question"], "choices": row["choices"]} for row in rows]
        answers = [answer for answer in model.predict(asked, domain="other")
                   if isinstance(answer, Prediction)]  # fmt: skip
        right = [answer.label == row["choices"][row["answer"]]
                 for answer, row in zip(answers, rows, strict=True)]  # fmt: skip
        assert np.mean(right) == pytest.approx(entry.domain_scores["accuracy"]["adapter"])
        assert {*answers[0].probabilities} == {"red stone", "blue river"}
        assert answers[0].cells.keys() == {"prediction", "probability"}
        with pytest.raises(UsageError, match="columns question, choices"):
            model.predict("red stone", domain="other")
        traced = trace(model, asked[0], "other")
        assert traced.adapter == pytest.approx([*answers[0].probabilities.values()], abs=1e-4)
        assert traced.answer == answers[0].label
