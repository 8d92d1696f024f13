"""A metric that the domain declares decides in training, evaluation and reports."""

from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import SUITE, declared, model_in

from lora_domains.domain import metrics_of
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.tasks import Classification, Generation, Task

ANSWERED = [
    {"question": r["text"], "answer": r["label"] + " and 4 more now"} for r in make_rows(80)
]


@pytest.mark.parametrize(
    ("task", "rows", "metric", "label"),
    [
        (Classification(positive="spam"), make_rows(80), "mcc", "MCC"),
        (Classification(), make_rows(80), "loss", "loss"),
        (Generation(max_new_tokens=8), ANSWERED, "exact_match", "exact match"),
    ],
)
def test_the_declared_metric_decides(
    task: Task, rows: list[dict[str, Any]], metric: str, label: str, tiny_base: Path, tmp_path: Path
) -> None:
    domain = declared(rows, "own", task, metric=metric)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(domain)
    assert card is not None
    assert card.adapter.settings["metric"] == metric
    entry = model.evaluate(domain, suite=SUITE).entry
    assert entry.judged["metric"] == metric
    gain = next(gate for gate in entry.gates if gate["name"] == "gain")
    assert gain["rule"].startswith(label)
    # No program was given that judges.
    assert set(entry.domain_scores) == {*metrics_of(domain.task)} - {"judge"}
    assert rebuild(tmp_path / "own") == Card.read(tmp_path / "own")
