"""A sweep: the best run on validation rows is saved, and its card names the others."""

import signal
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from rich.console import Console
from support.killed import doomed, forked
from support.models import declared, fixed, model_in, patched_runs

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.readme import readme
from lora_domains.console import Display, analyses
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import LossExploded, TrainingInterrupted
from lora_domains.joint import checkpoint as joint_checkpoint
from lora_domains.joint import fit as joint_fit
from lora_domains.joint import sweep
from lora_domains.joint.run import JointRun
from lora_domains.model import DomainModel
from lora_domains.report.card import Card
from lora_domains.training.loop import Run

SWEEP = {"lr": [1e-5, 0.01], "rank": [2, 4]}
"""With the first rate nothing is learned."""


def domain(**settings: Any) -> Domain:
    options: dict[str, Any] = {"epochs": 2, "patience": 99, "retention": "none"}
    return with_settings(declared(make_rows(260), **options), lr=None, rank=None, **settings)


def swept(out: Path, base: Path, **options: Any) -> Card:
    settings = {"sweep": SWEEP, "together": 3} | options
    card = model_in(out, base).fit(domain(), **settings)
    assert isinstance(card, Card)
    return card


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> tuple[DomainModel, Card]:
    model = model_in(tmp_path_factory.mktemp("sweep"), tiny_base)
    card = model.fit(domain(), sweep=SWEEP, together=3)
    assert isinstance(card, Card)
    return model, card


def test_the_best_run_is_saved_and_no_other(
    chosen: tuple[DomainModel, Card], tmp_path: Path, tiny_base: Path
) -> None:
    model, card = chosen
    assert [path.name for path in model.out.iterdir()] == ["spam"]
    assert model.domains == ("spam",)
    best = card.adapter.training["chosen_among"]["runs"][0]["settings"]
    assert best["training.lr"] == 0.01
    assert "together_with" not in card.adapter.training
    alone = model_in(tmp_path, tiny_base)
    one = alone.fit(domain(**best))
    assert one is not None
    assert one.adapter.recipe_digest == card.adapter.recipe_digest
    assert len(one.adapter.trained_rows["own"]) == len(card.adapter.trained_rows["own"])
    for linear, pair in alone.bank["spam"].weights.items():
        for a, b in zip(pair, model.bank["spam"].weights[linear], strict=True):
            assert (a - b).norm() <= 1e-3 * b.norm(), linear


def test_the_card_names_all_runs_by_their_validation_score(
    chosen: tuple[DomainModel, Card], capsys: pytest.CaptureFixture[str]
) -> None:
    model, card = chosen
    found = card.adapter.training["chosen_among"]
    assert (found["metric"], found["rows"]) == ("f1", len(model.dataset("spam").validation))
    runs = found["runs"]
    assert len(runs) == 4
    scores = [run["score"] for run in runs]
    assert scores == sorted(scores, reverse=True)
    assert "difference" not in runs[0]
    assert sorted((run["run"], *run["settings"].values()) for run in runs) == [
        (1, 1e-5, 2), (2, 1e-5, 4), (3, 0.01, 2), (4, 0.01, 4)
    ]  # fmt: skip
    for run in runs[1:]:
        assert run["difference"] == pytest.approx(run["score"] - scores[0])
        assert run["lower"] <= run["difference"] <= run["upper"]
    training = card.adapter.training
    record = next(r for r in training["history"] if r["epoch"] == training["best_epoch"])
    assert runs[0]["loss"] == record["validation_loss"]
    assert runs[0]["score"] == pytest.approx(record["score"], abs=1e-6)
    assert "Chosen among 4 trainings that differ in lr, rank, by F1 on 26" in readme(card)
    analyses.sweep(Console(width=80), "spam", found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    head = next(at for at, line in enumerate(lines) if set(line) == {"─"})
    assert [line.split()[:3] for line in lines[head + 1 : head + 5]] == [
        [str(run["run"]), *(f"{value:g}" for value in run["settings"].values())] for run in runs
    ]  # fmt: skip
    assert [word for line in lines for word in line.split() if word == "kept"] == ["kept"]


def test_no_test_row_is_scored(chosen: tuple[DomainModel, Card], project: Path) -> None:
    _, card = chosen
    assert card.adapter.verdict is None
    assert card.adapter.evaluations is None


def run_of(score: float, lower: float, upper: float) -> dict[str, Any]:
    return {"settings": {"lora.rank": 2}, "score": score, "lower": lower, "upper": upper}


@pytest.mark.parametrize(
    ("metric", "others", "words"),
    [
        ("f1", [(-0.1, 0.02)], "The other run cannot be told from the best"),
        ("f1", [(-0.1, -0.02)], "The best is clearly better than the other run"),
        ("f1", [(-0.1, 0.0), (-0.2, -0.1)], "1 of the 2 other runs cannot be told"),
        ("nats_per_token", [(0.1, 0.2), (0.2, 0.3)], "clearly better than each of the other runs"),
        ("nats_per_token", [(-0.1, 0.2), (0.2, 0.3)], "1 of the 2 other runs cannot be told"),
    ],
)
def test_runs_whose_bounds_include_no_difference_are_counted(
    metric: str, others: list[tuple[float, float]], words: str
) -> None:
    runs = [{"settings": {"lora.rank": 4}, "score": 0.9}, *(run_of(0.8, *one) for one in others)]
    told = " ".join(analyses.advice({"metric": metric, "runs": runs, "rows": 30}))
    assert words in told
    assert f"As the best of {len(runs)} on these rows" in told


@pytest.mark.long
def test_a_run_whose_loss_explodes_is_the_worst(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = fixed(1.0, float("nan"))
    patched_runs(monkeypatch, spam__3=nan, spam__4=nan)
    card = swept(tmp_path, tiny_base)
    runs = card.adapter.training["chosen_among"]["runs"]
    assert [run["score"] for run in runs[2:]] == [None, None]
    assert {run["settings"]["training.lr"] for run in runs[:2]} == {1e-5}
    patched_runs(monkeypatch, spam__1=nan, spam__2=nan)
    with pytest.raises(LossExploded):
        swept(tmp_path / "none", tiny_base)


@pytest.mark.long
def test_a_run_beyond_the_drift_limit_is_kept_only_where_every_run_is(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drifting(run: Run) -> dict[str, float]:
        kl = 9.0 if run.domain.name in ("spam__3", "spam__4") else 0.0
        return {"general_kl": kl, "general_nats": 1.0, "general_rise": 0.0}

    make_run = joint_fit.make_run

    def changing(*arguments: Any) -> Run:
        run = make_run(*arguments)
        run.validation.drift = lambda: drifting(run)  # type: ignore[method-assign]
        run.validation.scaled_down = lambda best, tensors, limit: (best, tensors)  # type: ignore
        return run

    monkeypatch.setattr(joint_fit, "make_run", changing)
    runs = swept(tmp_path, tiny_base, retention="kl").adapter.training["chosen_among"]["runs"]
    assert [run["within_drift"] for run in runs] == [True, True, False, False]
    assert runs[0]["score"] < runs[2]["score"]


def test_a_run_whose_effect_was_reduced_is_within_the_drift_limit(
    chosen: tuple[DomainModel, Card], tiny_base: Path
) -> None:
    model, card = chosen
    bank = model_in(model.out, tiny_base).bank
    dataset = model.dataset("spam")
    trial = replace(dataset, domain=with_settings(dataset.domain, retention="kl"))

    def within(scale: float) -> bool:
        trained = deepcopy(card)
        trained.adapter.training["scale"] = scale
        for record in trained.adapter.training["history"]:
            record["general_kl"] = 9.0
        measured = sweep._Measured(bank, [trial], [{}], [trained], model.out, model.display)
        return bool(measured.compared()[1]["runs"][0]["within_drift"])

    assert [within(scale) for scale in (0.5, 1.0)] == [True, False]


@pytest.mark.parametrize(
    ("methods", "within"), [(("none", "kl"), [False, False]), (("none", "none"), [True, True])]
)
def test_runs_of_a_sweep_over_retention_have_one_drift_limit(
    chosen: tuple[DomainModel, Card], tiny_base: Path, methods: tuple[str, str], within: list[bool]
) -> None:
    model, card = chosen
    drifted = deepcopy(card)
    for record in drifted.adapter.training["history"]:
        record["general_kl"] = 9.0
    dataset = model.dataset("spam")
    trials = [replace(dataset, domain=with_settings(dataset.domain, retention=m)) for m in methods]
    bank = model_in(model.out, tiny_base).bank
    measured = sweep._Measured(bank, trials, [{}] * 2, [drifted] * 2, model.out, model.display)
    assert [run["within_drift"] for run in measured.compared()[1]["runs"]] == within


# ── Resuming ──────────────────────────────────────────────────────────────────────────────────────


def test_a_sweep_is_resumed_and_replaces_nothing_before_its_end(
    tmp_path: Path, tiny_base: Path, chosen: tuple[DomainModel, Card],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    step = JointRun._step

    def stopping(self: JointRun) -> None:
        if self.checkpoint.step == 20:
            self.signals.received = signal.SIGINT
        step(self)

    with monkeypatch.context() as inside:
        inside.setattr(JointRun, "_step", stopping)
        with pytest.raises(TrainingInterrupted, match="--resume") as caught:
            swept(tmp_path, tiny_base)
    # Each run has a best epoch by now, which is in the checkpoint alone.
    assert caught.value.hint.count("No adapter was saved.") == 3
    assert [path.name for path in tmp_path.iterdir()] == [".spam.sweep"]
    card = swept(tmp_path, tiny_base, resume=True)
    assert card.adapter.sha256 == chosen[1].adapter.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["spam"]


def test_an_unfinished_sweep_is_replaced_unless_it_is_resumed(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Begun(Exception):
        pass

    def begun(*_: object) -> None:
        raise Begun

    monkeypatch.setattr(sweep, "_train", begun)
    model = model_in(tmp_path, tiny_base)
    model.display = Display()
    left = tmp_path / ".spam.sweep" / "left"
    for resume in (True, False):
        left.mkdir(parents=True, exist_ok=True)
        with pytest.raises(Begun):
            model.fit(domain(), sweep=SWEEP, resume=resume)
        assert left.exists() is resume
        assert ("an unfinished sweep is replaced" in capsys.readouterr().out) is not resume


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [(15, "after the step"), pytest.param((99, "after it was saved"), marks=pytest.mark.long)],
)
def test_a_killed_sweep_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, chosen: tuple[DomainModel, Card], kill: tuple[int, str]
) -> None:
    def train() -> None:
        joint_checkpoint.SAVE_SECONDS = -1.0
        doomed(*kill)
        swept(tmp_path, tiny_base)

    assert forked(partial(train)) == -signal.SIGKILL
    swept(tmp_path, tiny_base, resume=True)
    assert fingerprint(tmp_path / "spam") == fingerprint(chosen[0].out / "spam")
    assert [path.name for path in tmp_path.iterdir()] == ["spam"]
