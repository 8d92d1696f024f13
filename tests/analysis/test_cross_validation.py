"""Cross-validation: every training row scored by an adapter that did not train on it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from support.commands import run, write
from support.items import row

from lora_domains.analysis import cross_validation
from lora_domains.analysis.cross_validation import Folds, answer, cross_validate
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.evaluation.contenders import score_domain
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable

ROWS = make_rows(90)
DOMAIN = with_settings(
    Domain("spam", Classification(positive="spam"), Data(ROWS[:60], test=ROWS[60:])),
    epochs=1, retention="none", rank=4, lr=0.02, batch_size=8,
)  # fmt: skip


@pytest.mark.slow
def test_every_row_is_scored_once_by_an_adapter_that_did_not_see_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DomainModel.from_pretrained(
        tiny_base, out=tmp_path, display=Display(quiet=True), device="cpu"
    )
    before, scored = model.base.state_digest(), []

    def recorded(scorer: Any, dataset: Dataset, adapters: Sequence[str], key: bytes) -> Any:
        parts = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
        ids = {name: {row.example.id for row in part} for name, part in parts.items()}
        assert not ids["test"] & (ids["train"] | ids["validation"])
        assert not ids["train"] & ids["validation"]
        assert ids["test"] == {example.id for example in dataset.prepared.test}
        scored.extend(ids["test"])
        return score_domain(scorer, dataset, adapters, key)

    monkeypatch.setattr(cross_validation, "score_domain", recorded)
    found = cross_validate(model, DOMAIN, 3)
    dataset = model.dataset(DOMAIN)
    own = [*dataset.prepared.train, *dataset.prepared.validation]
    assert sorted(scored) == sorted(example.id for example in own)  # and no test row
    assert (found["folds"], found["rows"], found["metric"]) == (3, 60, "f1")
    assert {"accuracy", "f1", "recall", "precision"} <= found["scores"].keys()
    assert {"majority", "tfidf"} <= found["scores"]["f1"]["baselines"].keys()
    assert "base" in found["rivals"]
    for fields in (*found["scores"].values(), *found["rivals"].values()):
        assert len(fields["by_fold"]) == 3
        assert fields["lower"] <= fields["difference"] <= fields["upper"]
        assert fields["lower"] < fields["upper"]
    assert json.loads(json.dumps(found)) == found
    assert model.domains == ()
    assert model.base.state_digest() == before
    assert not [path for path in tmp_path.rglob("*") if path.name != ".key" and path.is_file()]
    for count in (1, 61):
        with pytest.raises(UsageError, match="the number of rows that can be parted"):
            cross_validate(model, DOMAIN, count)


def test_bounds_take_in_the_spread_of_the_folds() -> None:
    def fold(right: int) -> ScoreTable:
        predictions = [1] * right + [0] * (50 - right)
        return ScoreTable(row(1, number=n, base=0, adapter=p) for n, p in enumerate(predictions))

    even, uneven = Folds([fold(40)] * 5, 1), Folds([fold(n) for n in (30, 50, 35, 45, 40)], 1)
    metric, parts = METRICS["accuracy"], []
    for folds in (even, uneven):
        rows = ScoreTable(item for table in folds.tables for item in table)
        parts.append(folds._against(metric, rows, "base"))
    (one, two) = parts
    assert one["difference"] == two["difference"] == pytest.approx(0.8)
    assert one["lower"] == pytest.approx(metric.compare(rows, "base", "adapter", 1).lower)  # type: ignore[union-attr]
    assert two["lower"] < one["lower"] - 0.05
    assert two["upper"] > one["upper"] + 0.05


def test_a_baseline_without_scores_is_shown_as_such() -> None:
    rows = [row(n % 2, number=n, base=0, adapter=n % 2, tfidf=1) for n in range(40)]
    for item in rows:
        del item["scores"]["tfidf"]["nll"]
    halves = [ScoreTable(rows[:20]), ScoreTable(rows[20:])]
    figures = Folds(halves, 1)._scored(METRICS["loss"], ScoreTable(rows))
    assert figures["baselines"] == {"tfidf": None}


@pytest.mark.parametrize(
    ("lower", "upper", "words"),
    [(0.01, 0.1, "The adapter is better than TF-IDF"), (-0.1, -0.01, "TF-IDF is better than"),
     (-0.01, 0.1, "Too few rows to tell whether the adapter is better than TF-IDF"),
     (None, None, "Too few rows")],
)  # fmt: skip
def test_the_answer_is_about_the_best_rival(
    lower: float | None, upper: float | None, words: str
) -> None:
    against = {"base": 0.8, "adapter": 0.85, "difference": 0.05, "lower": lower, "upper": upper}
    found = {"metric": "f1", "rivals": {"base": against | {"base": 0.4}, "tfidf": against}}
    said = answer(found)
    assert said.startswith(words)
    assert "F1 0.850 against 0.800, a difference of +0.050" in said
    assert "no verdict" in said
    assert "nan" not in said


@pytest.mark.slow
def test_the_command_shows_the_folds_and_writes_no_text(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "mails.csv", make_rows(60, secret="secretword"))
    assert run("cross-validate", rows, "--folds", "2", "--epochs", "1", "--lr", "0.01",
               "--rank", "2", "--base", str(tiny_base), "--out", str(tmp_path / "adapters"),
               "--reports", str(tmp_path / "reports")) == 0  # fmt: skip
    shown = capsys.readouterr().out
    written = (tmp_path / "reports" / "mails-folds.json").read_text()
    assert json.loads(written)["answer"] in " ".join(shown.split())
    assert "2 folds of" in shown
    assert "secretword" not in written + shown


def test_bounds_across_folds_hold_the_truth_of_few_rows() -> None:
    from lora_domains.stats.intervals import Bounds
    from lora_domains.stats.seeds import across_folds

    assert across_folds(0.1, Bounds(0.05, 0.2), [0.1] * 5) == Bounds(0.05, 0.2)
    with pytest.raises(ValueError, match="at least two folds"):
        across_folds(0.1, Bounds(0.0, 0.2), [0.1])
    rng, missed = np.random.default_rng(0), 0
    for _ in range(2000):
        # The adapters of a training set share its luck (sd .02): each fold differs by .02 more.
        by_fold = 0.05 + rng.normal(0, 0.02) + rng.normal(0, 0.02, 5) + rng.normal(0, 0.03, 5)
        mean = float(by_fold.mean())
        missed += across_folds(mean, Bounds(mean - 0.022, mean + 0.022), by_fold).lower > 0.05
    assert missed / 2000 <= 0.05
