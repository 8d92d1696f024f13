"""Learning curves: nested shares, the same validation rows, an answer that knows of seeds."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from support.commands import run, write
from support.models import QUIET, declared, model_in
from support.scripts import script

from lora_domains.analysis.learning_curve import (
    SEEDS,
    _Measured,
    answer,
    extrapolated,
    learning_curve,
    nested,
)
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification, Example, Preference
from lora_domains.tokenization.encoded import EncodedRow

curves = script("curves", "verdict")


def examples(groups: list[str | None], targets: list[int]) -> list[Example]:
    return [
        Example(f"train:{i}", f"text {i}", " a", (" a", " b", " c"), target, group)
        for i, (group, target) in enumerate(zip(groups, targets, strict=True))
    ]


@settings(max_examples=60)
@given(st.data())
def test_shares_are_nested_and_take_whole_groups(data: st.DataObject) -> None:
    count = data.draw(st.integers(8, 60))
    groups = data.draw(st.lists(st.sampled_from([None, "a", "b", "c", "d", "e"]),
                                min_size=count, max_size=count))  # fmt: skip
    targets = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    rows = examples(groups, targets)
    parts = nested(rows, (0.125, 0.5, 1.0), data.draw(st.integers(0, 3)))
    assert parts[2] == list(range(count))
    largest = max(Counter(g for g in groups if g is not None).values(), default=1)
    for part, share in zip(parts, (0.125, 0.5, 1.0), strict=True):
        assert round(share * count) <= len(part) < round(share * count) + max(largest, 1)
        mine = {groups[i] for i in part} - {None}
        assert not mine & {groups[i] for i in range(count) if i not in part}
    assert set(parts[0]) <= set(parts[1])


def test_classes_keep_their_proportion_and_the_seed_draws() -> None:
    rows = examples([None] * 400, [0] * 300 + [1] * 100)
    (part,) = nested(rows, (0.25,), 0)
    assert len(part) == 100
    assert abs(sum(rows[i].target for i in part) - 25) <= 1
    assert nested(rows, (0.25,), 1) != [part] == nested(rows, (0.25,), 0)


def scored(errors: dict[str, float], count: int = 400) -> list[dict[str, Any]]:
    """Items of which each contender gets its share wrong, beginning with the same ones."""

    def said(at: int) -> dict[str, Any]:
        return {f"{name}/{run}": {"prediction": int(at >= share * count)}
                for name, share in errors.items() for run in range(SEEDS)}  # fmt: skip

    return [{"target": 1, "group": None, "scores": said(at)} for at in range(count)]


def test_a_power_law_is_recovered() -> None:
    rows = [100, 200, 400, 800]
    errors = {str(n): 0.4 * (n / 100) ** -0.5 for n in rows}
    points = [{"share": n, "rows": n} for n in rows]
    found = extrapolated("accuracy", scored(errors), points, None, (0.0, 4))
    assert found is not None
    assert found["rows"] == 1600
    assert found["score"] == pytest.approx(1 - 0.1, abs=0.01)
    assert found["exponent"] == pytest.approx(0.5, abs=0.02)
    assert found["lower"] < found["score"] < found["upper"]
    assert found["upper"] - found["lower"] < 0.1
    wide = extrapolated("accuracy", scored(errors), points, None, (0.03, 4))
    assert wide is not None
    assert wide["score"] == found["score"]
    assert wide["lower"] < found["lower"] - 0.01
    assert wide["upper"] > found["upper"]


@pytest.mark.parametrize(
    ("errors", "sizes"), [({"1": 0.2, "2": 0.2, "4": 0.3}, 3), ({"1": 0.4, "2": 0.2}, 2)],
    ids=["does not fall", "two points"],
)  # fmt: skip
def test_no_extrapolation_without_a_falling_error(errors: dict[str, float], sizes: int) -> None:
    points = [{"share": float(n), "rows": int(n)} for n in errors]
    assert len(points) == sizes
    assert extrapolated("accuracy", scored(errors), points, None, (0.0, 4)) is None


@pytest.mark.parametrize(
    ("metric", "low", "high", "word"),
    [("f1", 0.01, 0.05, "Yes"), ("f1", -0.02, 0.005, "Hardly"), ("f1", -0.02, 0.05, "Undecided"),
     ("nats_per_token", -0.05, -0.01, "Yes"), ("nats_per_token", 0.01, 0.02, "Hardly"),
     ("f1", None, None, "Undecided")],
)  # fmt: skip
def test_the_answer_follows_the_bounds(
    metric: str, low: float | None, high: float | None, word: str
) -> None:
    points = [{"rows": 100, "score": 0.7}, {"rows": 200, "score": 0.72}]
    step = {"difference": 0.02, "lower": low, "upper": high}
    words = answer({"points": points, "last_step": step, "metric": metric, "validation_rows": 50,
                    "sd_seed": 0.03, "twice": None})  # fmt: skip
    assert words.startswith(word)
    assert "from 100 to 200 rows" in words


def test_a_gain_by_luck_of_the_seed_is_no_yes() -> None:
    # One seed a point, compared on the rows alone, promises a gain in a quarter of the cases.
    assert curves.share_of_yes(0.0, 0.03, 1, runs=300, seed=1) > 0.15
    assert curves.share_of_yes(0.0, 0.03, 2, runs=300, seed=1) <= 0.08
    assert curves.share_of_yes(0.06, 0.01, 2, runs=100, seed=1) >= 0.6
    figures = json.loads(curves.RESULTS.read_text())["yes"]
    assert all(yes["2 seeds"] <= 0.08 for name, yes in figures.items() if "gain 0," in name)
    assert figures["true gain 0, spread 0.03"]["1 seed"] > 0.2


ROWS = make_rows(150)
DOMAIN = with_settings(
    Domain("spam", Classification(), Data(ROWS[:80], ROWS[80:100], ROWS[100:])),
    epochs=2, retention="none", rank=4, lr=0.02, batch_size=8,
)  # fmt: skip


@pytest.mark.slow
def test_one_training_for_each_share_on_the_same_test_rows(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DomainModel.from_pretrained(
        tiny_base, out=tmp_path, display=Display(quiet=True), device="cpu"
    )
    model.fit(DOMAIN)
    before, resident = model.base.state_digest(), model.bank["spam"]
    (tmp_path / ".spam.checkpoint").write_bytes(b"of an interrupted run")
    evaluations: list[tuple[str | None, int]] = []
    scores = Scorer.scores

    def recorded(scorer: Scorer, part: Part, contenders: Sequence[str | None]) -> Any:
        evaluations.extend((name, len(part.rows)) for name in contenders)
        return scores(scorer, part, contenders)

    monkeypatch.setattr(Scorer, "scores", recorded)
    found = learning_curve(model, DOMAIN, (1.0, 0.25, 0.5))
    # The base, the base with rows in its prompt; from two seeds, three shares and edited copies.
    # The 20 validation rows each: never the 50 test rows.
    assert [count for _, count in evaluations] == [20] * len(evaluations)
    assert len(evaluations) == 1 + 4 * SEEDS + (found["few_shot"] is not None)
    assert [point["rows"] for point in found["points"]] == [20, 40, 80]
    assert {point["steps"] for point in found["points"]} == {20}
    assert found["augmented"]["steps"] == 20
    assert 80 < found["augmented"]["rows"] <= 160
    assert all(math.isfinite(found["last_step"][k]) for k in ("difference", "lower", "upper"))
    gap = found["points"][-1]["score"] - found["points"][-2]["score"]
    assert found["last_step"]["difference"] == pytest.approx(gap)
    for point in (*found["points"], found["augmented"]):
        assert len(point["scores"]) == SEEDS
        assert point["score"] == pytest.approx(np.mean(point["scores"]))
    spread = np.mean([np.var(point["scores"], ddof=1) for point in found["points"]]) ** 0.5
    assert found["sd_seed"] == pytest.approx(spread)
    # The largest share is trained as fit trains, from its seed.
    card = model.bank["spam"].card
    assert card is not None
    history = card.adapter.training["history"]
    assert found["points"][-1]["scores"][0] == pytest.approx(max(e["score"] for e in history))
    assert json.loads(json.dumps(found)) == found
    assert not any(row["text"] in json.dumps(found) for row in ROWS)
    assert model.domains == ("spam",)
    assert model.bank["spam"] is not None
    np.testing.assert_array_equal(
        next(iter(model.bank["spam"].weights.values()))[0],
        next(iter(resident.weights.values()))[0],
    )
    assert model.base.state_digest() == before
    assert (tmp_path / ".spam.checkpoint").read_bytes() == b"of an interrupted run"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"spam"}


@pytest.mark.slow
@pytest.mark.parametrize("shares", [(1.0,), (0.0, 1.0), (0.5, 2.0), (0.01, 1.0), (0.5, 0.501)])
def test_shares_that_make_no_curve_are_refused(
    tiny_base: Path, tmp_path: Path, shares: tuple[float, ...]
) -> None:
    model = DomainModel.from_pretrained(
        tiny_base, out=tmp_path, display=Display(quiet=True), device="cpu"
    )
    with pytest.raises(UsageError, match="shares"):
        learning_curve(model, DOMAIN, shares)


@pytest.mark.long
@pytest.mark.slow
def test_the_command_shows_the_curve_and_writes_no_text(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mails.jsonl"
    rows = make_rows(60, secret="secretword")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("learning-curve", str(file), "--sizes", "0.5,1", "--epochs", "1", "--lr", "0.01",
               "--rank", "2", "--base", str(tiny_base), "--out", str(tmp_path / "adapters"),
               "--reports", str(tmp_path / "reports")) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "Would more data help?" in shown
    written = (tmp_path / "reports" / "mails-learning-curve.json").read_text()
    assert json.loads(written)["answer"] in " ".join(shown.split())
    assert "secretword" not in written + shown


def test_reports_that_cannot_be_written_are_refused_before_training(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "mails.csv", make_rows(60))
    (tmp_path / "reports").write_text("a file where the folder should be")
    assert run("learning-curve", rows, "--base", str(tiny_base), "--out", str(tmp_path / "out"),
               "--reports", str(tmp_path / "reports")) == 2  # fmt: skip
    shown = capsys.readouterr()
    assert "a place that can be written" in shown.err
    assert "mails-learning-curve.json" in shown.err
    assert "training on" not in shown.out


def test_few_shot_prompting_of_pairs_is_compared_with_the_base(
    tmp_path: Path, tiny_base: Path
) -> None:
    words = ["red", "blue", "green", "stone", "river", "alpha", "beta", "win", "prize", "note"]
    rows = [{"prompt": f"{one} {other}", "chosen": one, "rejected": other}
            for one in words for other in words if one != other]  # fmt: skip
    model = model_in(tmp_path, tiny_base)
    dataset = model.dataset(declared(rows, "pairs", Preference(), retention="none"))
    measured, found = _Measured(model, dataset, []), dataset.validation
    assert measured.score("base", found, None) == 0.5
    prompted = [
        EncodedRow(row.example, replace(row.encoded, prompt=row.encoded.prompt[::-1]))
        for row in found
    ]
    scorer = Scorer(model.bank, QUIET)
    shot, base = (
        scorer.scores(Part("pairs", dataset.domain.task, rows), [None])[None]
        for rows in (prompted, found)
    )
    won = [one["margin"] > other["margin"] for one, other in zip(shot, base, strict=True)]
    assert 0 < np.mean(won) < 1
    assert measured.score("4_shot", prompted, None) == np.mean(won)
