"""Training several domains together: what separate fits give, resumed to the same bytes."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.killed import die, doomed, forked
from support.models import clear_rows, declared, fixed, model_in, patched_runs

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.parent import load_parent
from lora_domains.console import Display
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import (
    AdapterError,
    LossExploded,
    OutOfMemory,
    TrainingInterrupted,
    UsageError,
)
from lora_domains.joint import checkpoint as joint_checkpoint
from lora_domains.joint import fit as joint_fit
from lora_domains.joint.checkpoint import JointCheckpoint, joint_path
from lora_domains.joint.run import JointRun
from lora_domains.model import DomainModel
from lora_domains.report.card import Card
from lora_domains.tasks import Classification, Generation
from lora_domains.training.loop import Trained

NAMES = ("first", "second", "third")


def domains(dropout: float = 0.0) -> list[Domain]:
    """Three domains of other sizes: the second is over first, the third has a head."""
    rows = clear_rows(240)
    common: dict[str, Any] = {"dropout": dropout, "patience": 99, "general_cost": 9.0}
    return [
        declared(rows[:80], "first", epochs=3, rank=4, retention="kl", **common),
        declared(rows[80:120], "second", Generation("text", "label"), epochs=2, rank=8,
                 retention="replay", **common),
        declared(rows[120:220], "third", Classification(head=True), epochs=2, rank=2, **common),
    ]  # fmt: skip


def fingerprints(out: Path) -> dict[str, str]:
    return {name: fingerprint(out / name) for name in NAMES}


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> tuple[DomainModel, list[Card]]:
    """The three domains, trained together without dropout."""
    model = model_in(tmp_path_factory.mktemp("together"), tiny_base)
    return model, model.fit(domains(), together=3)


def test_adapters_are_those_of_separate_fits(
    tmp_path: Path, tiny_base: Path, together: tuple[DomainModel, list[Card]]
) -> None:
    model, cards = together
    alone = model_in(tmp_path, tiny_base)
    assert model.domains == NAMES
    for domain, card in zip(domains(), cards, strict=True):
        one = alone.fit(domain)
        assert one is not None
        for key in ("steps", "epochs", "best_epoch", "rank", "lr", "batch_size", "retention"):
            assert card.adapter.training[key] == one.adapter.training[key], key
        assert card.adapter.recipe_digest == one.adapter.recipe_digest
        assert card.adapter.training["together_with"] == [n for n in NAMES if n != domain.name]
        assert "together_with" not in one.adapter.training
        for linear, pair in alone.bank[domain.name].weights.items():
            for a, b in zip(pair, model.bank[domain.name].weights[linear], strict=True):
                assert (a - b).norm() <= 1e-3 * b.norm(), (domain.name, linear)


def test_base_random_state_and_folder_are_as_before(
    together: tuple[DomainModel, list[Card]], tmp_path: Path, tiny_base: Path
) -> None:
    model, _ = together
    assert not model._base_changed()
    assert not any(p.requires_grad for p in model.base.model.parameters())
    assert sorted(path.name for path in model.out.iterdir()) == sorted(NAMES)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    other = model_in(tmp_path, tiny_base)
    other.fit(domains(0.1)[:2], together=2, max_steps=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_one_at_a_time_gives_the_bytes_of_separate_fits(
    tmp_path: Path, tiny_base: Path, cache: Path
) -> None:
    """Also where layers below an adapter read the rows once."""
    first, second = domains(0.2)[:2]
    several = [first, with_settings(second, top_layers=1)]
    model = model_in(tmp_path / "several", tiny_base)
    cards = model.fit(several, together=1)
    alone = model_in(tmp_path / "alone", tiny_base)
    for domain, card in zip(several, cards, strict=True):
        one = alone.fit(domain)
        assert one is not None
        assert card.adapter.sha256 == one.adapter.sha256
        assert "together_with" not in card.adapter.training


# ── Resuming ──────────────────────────────────────────────────────────────────────────────────────


def stopped_after(
    steps: int, out: Path, base: Path, patch: pytest.MonkeyPatch, at_once: int
) -> TrainingInterrupted:
    """Train until so many joint steps are taken, then stop as Ctrl-C does."""
    step = JointRun._step

    def counting(self: JointRun) -> None:
        if self.checkpoint.step == steps - 1:
            self.signals.received = signal.SIGINT
        step(self)

    model = model_in(out, base)
    with patch.context() as inside:
        inside.setattr(JointRun, "_step", counting)
        with pytest.raises(TrainingInterrupted) as caught:
            model.fit(domains(0.3), together=at_once)
    return caught.value


@pytest.fixture(scope="module")
def unbroken(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> dict[int, dict[str, str]]:
    """How many at a time → the fingerprints of an uninterrupted run with dropout."""
    found = {}
    for at_once in (2, 3):
        out = tmp_path_factory.mktemp("unbroken")
        model_in(out, tiny_base).fit(domains(0.3), together=at_once)
        found[at_once] = fingerprints(out)
    assert found[2] != found[3]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "at_once"),
    [
        pytest.param(4, 3, marks=pytest.mark.long),
        pytest.param(5, 3, marks=pytest.mark.contract),
        pytest.param(9, 3, marks=pytest.mark.long),
        (8, 2),
    ],
)
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, steps: int, at_once: int, monkeypatch: pytest.MonkeyPatch,
    unbroken: dict[int, dict[str, str]],
) -> None:  # fmt: skip
    """Stopped in an epoch, at ends of epochs, after one was over, and while one waited."""
    error = stopped_after(steps, tmp_path, tiny_base, monkeypatch, at_once)
    assert "first, epoch" in error.where
    assert "--resume to continue" in error.hint
    torch.manual_seed(steps)  # the caller's random state must not matter
    cards = model_in(tmp_path, tiny_base).fit(domains(0.3), resume=True)
    assert fingerprints(tmp_path) == unbroken[at_once]
    assert [card.adapter.domain for card in cards] == list(NAMES)
    assert not list(tmp_path.glob(".joint*"))
    assert not (tmp_path / ".versions").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(3, "after the step"), (7, "half written")], id="in a step and a write"),
        pytest.param([(5, "before it takes its place"), (11, "after it took its place")],
                     id="before and after a write", marks=pytest.mark.long),
        pytest.param([(99, "before it is saved")], id="when the first is over",
                     marks=pytest.mark.long),
        pytest.param([(99, "saved, not noted")], id="between its folder and the checkpoint",
                     marks=pytest.mark.long),
        pytest.param([(99, "after it was saved")], id="when all are saved",
                     marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_killed_runs_end_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, unbroken: dict[int, dict[str, str]],
    kills: list[tuple[int, str]],
) -> None:  # fmt: skip
    """By SIGKILL, in or after a step of the three, of which the second is over after four."""

    def train(step: int, moment: str, resume: bool) -> None:
        joint_checkpoint.SAVE_SECONDS = -1.0  # a checkpoint after every step
        doomed(step, moment)
        end = joint_fit.Fit.end

        def ended(self: joint_fit.Fit, trained: Trained) -> None:
            end(self, trained)
            if moment == "saved, not noted":
                die()

        joint_fit.Fit.end = ended  # type: ignore[method-assign]
        model_in(tmp_path, tiny_base).fit(domains(0.3), together=3, resume=resume)

    for number, (step, moment) in enumerate(kills):
        assert forked(partial(train, step, moment, resume=number > 0)) == -signal.SIGKILL
    model_in(tmp_path, tiny_base).fit(domains(0.3), resume=True)
    assert fingerprints(tmp_path) == unbroken[3]
    assert not list(tmp_path.glob(".joint*"))


def test_resumed_when_all_were_trained_none_is_trained_again(
    together: tuple[DomainModel, list[Card]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the evaluation was interrupted: the checkpoint is deleted by then."""

    class Begun(Exception):
        pass

    def begun(self: JointRun) -> None:
        raise Begun(*[job.name for job in self.waiting])

    monkeypatch.setattr(JointRun, "fit", begun)
    model, cards = together
    again = model.fit(domains(), resume=True)
    assert [card.adapter.sha256 for card in again] == [card.adapter.sha256 for card in cards]
    first, second, third = domains()
    with pytest.raises(Begun, match=r"^second$"):
        model.fit([first, with_settings(second, lr=0.005), third], resume=True)


def test_a_run_on_another_base_or_from_another_adapter_is_not_over(
    together: tuple[DomainModel, list[Card]],
) -> None:
    model, _ = together
    dataset, base = model.dataset("first"), model.base
    assert joint_fit.over(model.out, dataset, base)
    assert not joint_fit.over(model.out, dataset, replace(base, identity="other"))
    assert not joint_fit.over(model.out, dataset, replace(base, quantization="8bit"))
    parent = load_parent(model.out / "second", base)
    assert not joint_fit.over(model.out, replace(dataset, parent=parent), base)


def test_another_number_at_a_time_is_told_to_have_no_effect(
    together: tuple[DomainModel, list[Card]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of an interrupted run of which two adapters are saved, and one was given up."""
    model, _ = together
    checkpoint = JointCheckpoint(joint_path(model.out, NAMES), Display(quiet=True), resume=False)
    checkpoint.together, checkpoint.ended = 2, ["first", "third"]
    error = dict.fromkeys(("where", "expected", "found", "hint"), "")
    recipe = model.dataset(domains()[1]).domain.digest()
    checkpoint.failed = {"second": {"error": error, "recipe": recipe}}
    checkpoint.write({})
    monkeypatch.setattr(model, "display", Display())
    for given in (1, 2, None):
        with pytest.raises(LossExploded):
            model.fit(domains(), resume=True, together=given)
        shown = " ".join(capsys.readouterr().out.split())
        assert ("--together 1 has no effect" in shown) is (given == 1)
    checkpoint.clear()


@pytest.mark.long
def test_the_bar_of_a_resumed_run_begins_where_it_stood(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(4, tmp_path, tiny_base, monkeypatch, 3)
    bars: list[tuple[int, list[int]]] = []

    class Noting(Display):
        @contextmanager
        def progress(self, what: str, total: int, *, epoch: float = 0) -> Iterator[Any]:
            advanced: list[int] = []
            bars.append((total, advanced))
            yield lambda steps, *_notes, **_loss: advanced.append(steps)

    model = DomainModel.from_pretrained(
        tiny_base, out=tmp_path, device="cpu", display=Noting(quiet=True)
    )
    model.fit(domains(0.3), resume=True)
    total, advanced = bars[0]  # the others are those of losses and scores
    assert total == 12 + 4 + 10 == sum(advanced)
    assert advanced[0] == 3 * 4


def test_a_checkpoint_keeps_a_run_that_waits_for_its_place(tmp_path: Path) -> None:
    """As where the adapter of a run that was over was deleted, which is then trained before it."""
    path = tmp_path / "joint"
    checkpoint = JointCheckpoint(path, Display(quiet=True), resume=False)
    checkpoint.runs = {"waiting": {"state": 1}}
    checkpoint.write({"active": lambda: {"state": 2}})
    read = JointCheckpoint(path, Display(quiet=True), resume=True)
    assert read.runs == {"waiting": {"state": 1}, "active": {"state": 2}}


def test_a_resumed_run_of_other_settings_is_refused(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(4, tmp_path, tiny_base, monkeypatch, 3)
    with pytest.raises(UsageError, match=r"--lr was 0\.01 in the interrupted run and is 0\.02 now"):
        model_in(tmp_path, tiny_base).fit(domains(0.3), resume=True, lr=0.02)
    assert len(list(tmp_path.glob(".joint*"))) == 1


@pytest.mark.long
def test_a_resumed_run_that_was_over_is_trained_again_with_other_settings(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_after(6, tmp_path, tiny_base, monkeypatch, 3)
    assert Card.read(tmp_path / "second").adapter.training["finished"] is True
    first, second, third = domains(0.3)
    model = model_in(tmp_path, tiny_base)
    cards = model.fit([first, with_settings(second, lr=0.005), third], resume=True)
    assert [card.adapter.training["lr"] for card in cards] == [0.01, 0.005, 0.01]
    assert all(card.adapter.training["finished"] for card in cards)


# ── A run that ends early, and one that fails ─────────────────────────────────────────────────────


def test_a_run_that_ends_early_makes_room_for_one_that_waits(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched_runs(monkeypatch, first=fixed(1.0, *[2.0] * 7))
    step, active = JointRun._step, []

    def noted(self: JointRun) -> None:
        active.append([one.job.name for one in self.active])
        step(self)

    monkeypatch.setattr(JointRun, "_step", noted)
    rows = clear_rows(240)
    several = [
        declared(rows[n * 60 : n * 60 + 60], name, epochs=4, patience=1, retention="none")
        for n, name in enumerate(NAMES)
    ]
    model = model_in(tmp_path, tiny_base)
    cards = model.fit(several, together=2)
    per_epoch = 3  # 42 rows in batches of 16
    assert active[: 2 * per_epoch] == [["first", "second"]] * 2 * per_epoch
    assert active[2 * per_epoch] == ["second", "third"]
    assert cards[0].adapter.training["epochs"] == 2
    assert cards[0].adapter.training["best_epoch"] == 1


def test_a_run_whose_loss_explodes_leaves_the_others(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    together: tuple[DomainModel, list[Card]], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu")
    with monkeypatch.context() as inside:
        patched_runs(inside, second=fixed(1.0, float("nan")))
        with pytest.raises(LossExploded, match="second, epoch 2"):
            model.fit(domains(), together=3)
    assert "The others go on" in capsys.readouterr().out
    assert Card.read(tmp_path / "second").adapter.training["finished"] is False
    for name in ("first", "third"):
        assert Card.read(tmp_path / name).adapter.training["finished"] is True
    assert list(model.bank) == []
    _, cards = together
    steps = {name: Card.read(tmp_path / name).adapter.training["steps"] for name in NAMES}
    assert [steps["first"], steps["third"]] == [
        cards[0].adapter.training["steps"], cards[2].adapter.training["steps"]
    ]  # fmt: skip
    # Resumed, it is trained again only with other settings; those that are over never.
    others = {name: fingerprint(tmp_path / name) for name in ("first", "third")}
    with pytest.raises(LossExploded, match="second, epoch 2"):
        model.fit(domains(), resume=True)
    first, second, third = domains()
    model.fit([first, with_settings(second, lr=0.005), third], resume=True)
    assert Card.read(tmp_path / "second").adapter.training["finished"] is True
    assert {name: fingerprint(tmp_path / name) for name in others} == others


def two() -> list[Domain]:
    """Two small domains, of one step in each of two epochs."""
    settings: dict[str, Any] = {"epochs": 2, "batch_size": 32, "retention": "none"}
    return [declared(clear_rows(40), name, **settings) for name in NAMES[:2]]


def test_what_was_trained_is_kept_where_an_adapter_cannot_be_saved(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = joint_fit.Fit.end

    def refused(self: joint_fit.Fit, trained: Trained) -> None:
        if self.name == "second":
            raise AdapterError(where=self.name, expected="room", found="none", hint="Free some.")
        end(self, trained)

    with monkeypatch.context() as inside:
        inside.setattr(joint_fit.Fit, "end", refused)
        with pytest.raises(AdapterError, match="second: expected room"):
            model_in(tmp_path, tiny_base).fit(two(), together=2, max_steps=1)
    monkeypatch.setattr(JointRun, "_step", lambda _: pytest.fail("trained again"))
    cards = model_in(tmp_path, tiny_base).fit(two(), resume=True, max_steps=1)
    assert [card.adapter.training["steps"] for card in cards] == [1, 1]


def test_out_of_memory_ends_all_runs_and_their_best_epochs_are_saved(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = JointRun._step

    def failing(self: JointRun) -> None:
        if self.checkpoint.step == 1:
            raise OutOfMemory(where="first", expected="memory", found="none", hint="Take less.")
        step(self)

    monkeypatch.setattr(JointRun, "_step", failing)
    saved = " The adapter of epoch 1, the best so far, was saved."
    with pytest.raises(OutOfMemory, match=f"Take less.{2 * saved}$"):
        model_in(tmp_path, tiny_base).fit(two(), together=2)
    found = [Card.read(tmp_path / name).adapter.training["finished"] for name in NAMES[:2]]
    assert found == [False, False]


# ── What is said and refused ──────────────────────────────────────────────────────────────────────


def test_two_domains_of_one_name_are_refused(tmp_path: Path, tiny_base: Path) -> None:
    model = model_in(tmp_path, tiny_base)
    first = domains()[0]
    with pytest.raises(UsageError, match=r"found 'first' twice"):
        model.fit([first, first])
    with pytest.raises(UsageError, match="one of type dict among them"):
        model.fit([first, {"text": "a", "label": "b"}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_the_screen_says_what_was_chosen_and_each_line_has_its_domain(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], resumed: bool
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    cards = model.fit(domains()[:2], max_steps=2, resume=resumed, together=2)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("together") and "2 in one pass, as asked" in line for line in lines)
    assert any(line.startswith("first ") and "first epoch" in line for line in lines)
    assert any(line.startswith("fine-tuned") and "second: " in line for line in lines)
    assert any(line.startswith("Nothing to resume") for line in lines) is resumed
    record = json.loads((tmp_path / "first" / "card.json").read_text())["adapters"][0]
    assert record["training"]["together_with"] == ["second"]
    assert cards[0].adapter.training["seconds"] > 0


def test_a_dry_run_trains_nothing(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], small_suite: None
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    assert model.fit(domains()[:2], dry_run=True) == []
    out = capsys.readouterr().out
    assert out.count("nothing was trained") == 2
    assert any(line.startswith("together") for line in out.splitlines())
    assert list(tmp_path.iterdir()) == []
