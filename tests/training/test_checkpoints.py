"""Checkpoints are whole or absent, and a run that is resumed ends with the same bytes."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_rows
from support.adapters import save, strong
from support.commands import Forked, fork
from support.models import QUIET, declared, fixed, make_run, model_in, stopped_after

from lora_domains.adapters.folder import WEIGHTS, fingerprint
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.versions import keep_version
from lora_domains.cli.parser import guarded
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import (
    AdapterError,
    TrainingInterrupted,
    UsageError,
)
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.report.card import Card
from lora_domains.tasks import Classification, MultiLabel, Task
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import fit
from lora_domains.training.checkpoints import clear, read_checkpoint, write_checkpoint
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan
from lora_domains.training.validation import Validation


@pytest.fixture(scope="module")
def uninterrupted(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> dict[float, str]:
    """dropout → the fingerprint after an uninterrupted run of 3 epochs of 5 steps."""
    fingerprints = {}
    for dropout in (0.0, 0.3):
        folder = tmp_path_factory.mktemp("uninterrupted")
        model_in(folder, tiny_base).fit(declared(rows[:100], epochs=3, dropout=dropout))
        fingerprints[dropout] = fingerprint(folder / "spam")
    assert fingerprints[0.0] != fingerprints[0.3]
    return fingerprints


# ── The file ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """No file may grow beyond ``count`` bytes, which looks like a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(number: int) -> dict[str, Any]:
    return {"run": {}, "state": {"step": number}, "weights": torch.full((300_000,), float(number))}


def test_a_full_disk_leaves_the_last_checkpoint_intact(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".spam.checkpoint"
    assert write_checkpoint(path, content(1)) is None
    with files_of_at_most(400_000):
        assert write_checkpoint(path, content(2)) == "File too large"
    stored = read_checkpoint(path)
    assert stored is not None
    assert stored["state"] == {"step": 1}
    assert torch.equal(stored["weights"], content(1)["weights"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert write_checkpoint(path, content(3)) is None
    (path.parent / f"{path.name}.abc").write_bytes(b"what a killed process left")
    clear(path)
    assert list(path.parent.iterdir()) == []


def test_errors_that_are_not_the_disks_are_raised(tmp_path: Path) -> None:
    def fails() -> None:
        return None

    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(tmp_path / "x", {"run": fails})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_adapter_and_its_versions(tmp_path: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    folder = save(tmp_path / "spam", strong(base, "spam", 1), base)
    before = fingerprint(folder)
    with files_of_at_most(8_000):
        with pytest.raises(AdapterError, match=r"Free some space"):
            save(folder, strong(base, "spam", 2), base)
        with pytest.raises(AdapterError, match=r"File too large.*The adapter is untouched"):
            keep_version(folder)
    assert fingerprint(folder) == before
    assert load_adapter(folder, base).name == "spam"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"\x80\x02N."])
def test_a_broken_checkpoint_is_refused_by_its_name(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], content: bytes
) -> None:
    (tmp_path / ".spam.checkpoint").write_bytes(content)
    with pytest.raises(UsageError, match=r"\.spam\.checkpoint.*leave --resume out"):
        model_in(tmp_path, tiny_base).fit(declared(rows[:100], epochs=1), resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.02}, "found --lr was 0.01 in the interrupted run and is 0.02 now. "),
        ({"epochs": 2}, "found --epochs was 3 in the interrupted run and is 2 now. "),
        ({"warmup": 0.2}, "found --set training.warmup was 0.06 in the "),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], changes: dict[str, Any],
    message: str,
) -> None:  # fmt: skip
    stopped_after(2, declared(rows[:100], epochs=3), tmp_path, tiny_base)
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="as the interrupted run") as caught:
        model.fit(declared(rows[:100], **({"epochs": 3} | changes)), resume=True)
    assert message in str(caught.value)
    with pytest.raises(UsageError, match="another rows"):
        model.fit(declared(rows[50:150], epochs=3), resume=True)
    assert (tmp_path / ".spam.checkpoint").exists()
    assert model.domains == ()


def test_the_identity_of_a_run_names_what_changed(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:100], epochs=1)
    first = make_run(tmp_path, tiny_base, spam).identity
    assert make_run(tmp_path, tiny_base, spam).identity == first
    general = [{"text": f"text number {n} of a river"} for n in range(40)]
    told = {
        "validation rows": replace(spam, data=replace(spam.data, validation=rows[200:210])),
        "general text": replace(spam, data=replace(spam.data, general=general)),
    }
    for what, other in told.items():
        assert isinstance(spam.data.validation, list)
        changed = make_run(tmp_path, tiny_base, other).identity
        assert changed[what] != first[what]
        assert changed["rows"] == first["rows"]
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu",
                                        dtype="bfloat16")  # fmt: skip
    dataset = model.dataset(spam)
    run = fit.make_run(
        model.bank, dataset, make_plan(model.base, dataset), model.out, model.display
    )
    again = run.identity
    assert [name for name in first if again[name] != first[name]] == ["precision"]


# ── Resuming ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("steps", "dropout"),
    [
        (2, 0.3), (5, 0.3), pytest.param(8, 0.0, marks=pytest.mark.contract), (15, 0.3),
        pytest.param(8, 0.3, marks=[pytest.mark.contract, pytest.mark.long]),
        *(pytest.param(steps, 0.0, marks=pytest.mark.long) for steps in (2, 5, 15)),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], uninterrupted: dict[float, str],
    steps: int, dropout: float,
) -> None:  # fmt: skip
    """Stopped in epoch 1, at its end, in epoch 2 and after the last step."""
    spam = declared(rows[:100], epochs=3, dropout=dropout)
    assert math.ceil(70 / 16) == 5
    stopped_after(steps, spam, tmp_path, tiny_base)
    torch.manual_seed(steps)  # the caller's random state must not matter
    card = model_in(tmp_path, tiny_base).fit(spam, resume=True)
    assert fingerprint(tmp_path / "spam") == uninterrupted[dropout]
    assert card.adapter.training["steps"] == 15
    assert not (tmp_path / ".spam.checkpoint").exists()


def test_a_finished_run_is_not_trained_again(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A job that is queued again after its end."""
    spam = declared(rows[:40], epochs=1)
    first = model_in(tmp_path, tiny_base).fit(spam)
    again = DomainModel.from_pretrained(tiny_base, out=tmp_path)
    assert again.fit(spam, resume=True) == first
    assert "Trained before, and not again: spam." in capsys.readouterr().out
    assert again.domains == ("spam",)
    other = again.fit(declared(rows[:40], epochs=1, seed=1), resume=True)
    assert other.adapter.sha256 != first.adapter.sha256


def validated_within_epochs(rows: list[dict[str, Any]]) -> Domain:
    return declared(rows[:100], epochs=3, validate_every=2, max_steps=9, dropout=0.3)


@pytest.fixture(scope="module")
def validated(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> Path:
    """The adapter of an uninterrupted run of ``validated_within_epochs``."""
    folder = tmp_path_factory.mktemp("validated")
    model_in(folder, tiny_base).fit(validated_within_epochs(rows))
    return folder / "spam"


@pytest.mark.parametrize(
    "steps", [*(pytest.param(n, marks=pytest.mark.long) for n in (1, 5)), 2, 7]
)
def test_a_run_that_is_validated_within_epochs_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], validated: Path, steps: int
) -> None:
    """Stopped before a validation within an epoch, at it, at the end of one, and in the second."""
    spam = validated_within_epochs(rows)
    stopped_after(steps, spam, tmp_path, tiny_base)
    model_in(tmp_path, tiny_base).fit(spam, resume=True)
    assert fingerprint(tmp_path / "spam") == fingerprint(validated)
    for folder in (tmp_path / "spam", validated):
        history = Card.read(folder).adapter.training["history"]
        assert [record["epoch"] for record in history] == [0.4, 0.8, 1, 1.4, 1.8]


def test_a_run_with_dora_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows[:40], epochs=2, dora=True, rslora=True, dropout=0.3)
    model_in(tmp_path / "a", tiny_base).fit(spam)
    stopped_after(3, spam, tmp_path / "b", tiny_base)
    model_in(tmp_path / "b", tiny_base).fit(spam, resume=True)
    one, other = (fingerprint(tmp_path / name / "spam") for name in ("a", "b"))
    assert one == other


@pytest.mark.long
def test_an_ending_resumes_to_the_same_bytes(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    """Killed in the epoch before it, before its first step, within it and after it.

    The first of its epochs, of two steps, is the best; after the second the ending begins.
    """
    task = Classification(positive="spam", head=True)
    spam = declared(rows[:40], "spam", task, epochs=8, patience=1, dropout=0.3, decay=0.9)
    losses = fixed(2.0, 3.0, 0.5)

    def run(name: str) -> Run:
        return make_run(tmp_path / name, tiny_base, spam, losses)

    def killed(name: str, method: str, step: int) -> None:
        doomed = run(name)
        original = getattr(doomed, method)

        def die(*given: Any) -> None:
            if doomed.state.total_steps == step:
                raise InterruptedError
            original(*given)

        setattr(doomed, method, die)
        with pytest.raises(InterruptedError):
            doomed.fit()

    whole = run("whole").fit()
    assert (whole.record["best_epoch"], whole.record["steps"]) == (3, 6)
    stopped_after(3, spam, tmp_path / "epoch", tiny_base, losses)
    killed("first", "train_step", 4)
    stopped_after(5, spam, tmp_path / "ending", tiny_base, losses)
    killed("last", "_scale_down", 6)
    for name in ("epoch", "first", "ending", "last"):
        resumed = run(name).fit(resume=True)
        for linear, pair in whole.adapter.weights.items():
            assert all(map(torch.equal, pair, resumed.adapter.weights[linear])), (name, linear)
        assert whole.adapter.head is not None
        assert resumed.adapter.head is not None
        for part, tensor in whole.adapter.head.weights.items():
            assert torch.equal(tensor, resumed.adapter.head.weights[part])
        assert resumed.record["history"] == whole.record["history"]


@pytest.mark.parametrize(
    ("balance", "task"),
    [
        ("weights", Classification(positive="spam")), ("batches", MultiLabel(head=True)),
        pytest.param("batches", Classification(positive="spam"), marks=pytest.mark.long),
        pytest.param("weights", MultiLabel(head=True), marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_resumed_run_on_balanced_classes_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, balance: str, task: Task
) -> None:
    """Rare classes are weighted, or drawn again, as in the uninterrupted run."""
    rows = [{**row, "labels": "a;b" if n % 5 else "b"} for n, row in enumerate(make_rows(60))]
    for name, how in (("whole", balance), ("none", None)):
        domain = declared(rows, "spam", task, epochs=2, retention="none", balance=how)
        model_in(tmp_path / name, tiny_base).fit(domain)
    balanced = declared(rows, "spam", task, epochs=2, retention="none", balance=balance)
    stopped_after(4, balanced, tmp_path / "part", tiny_base)
    model_in(tmp_path / "part", tiny_base).fit(balanced, resume=True)
    whole, part, none = (fingerprint(tmp_path / n / "spam") for n in ("whole", "part", "none"))
    assert whole == part != none


def test_a_run_depends_on_its_seed_only(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], uninterrupted: dict[float, str]
) -> None:
    torch.manual_seed(99)
    model_in(tmp_path / "a", tiny_base).fit(declared(rows[:100], epochs=3))
    model_in(tmp_path / "b", tiny_base).fit(declared(rows[:100], epochs=3, seed=1))
    same, other = (fingerprint(tmp_path / name / "spam") for name in ("a", "b"))
    assert same == uninterrupted[0.0] != other


def test_nothing_to_resume_starts_at_the_beginning(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], uninterrupted: dict[float, str]
) -> None:
    model_in(tmp_path, tiny_base).fit(declared(rows[:100], epochs=3), resume=True)
    assert fingerprint(tmp_path / "spam") == uninterrupted[0.0]


@pytest.mark.parametrize("moment", ["last validation", "choosing a scale"])
def test_a_signal_after_the_last_step_interrupts_the_run(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], uninterrupted: dict[float, str],
    monkeypatch: pytest.MonkeyPatch, moment: str,
) -> None:  # fmt: skip
    spam = declared(rows[:100], epochs=3)
    model = model_in(tmp_path, tiny_base)
    evaluate, scale_down = Validation.evaluate, Run._scale_down

    epochs = 0

    def signal_in_validation(self: Validation) -> dict[str, Any]:
        nonlocal epochs
        record, epochs = evaluate(self), epochs + 1
        if moment == "last validation" and epochs == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return record

    def signal_in_scale(self: Run) -> None:
        scale_down(self)
        if moment == "choosing a scale":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "evaluate", signal_in_validation)
        patch.setattr(Run, "_scale_down", signal_in_scale)
        with pytest.raises(TrainingInterrupted, match="--resume to continue") as caught:
            model.fit(spam)
    assert caught.value.found == ("SIGTERM" if moment == "last validation" else "SIGINT")
    assert not Card.read(tmp_path / "spam").adapter.training["finished"]
    card = model_in(tmp_path, tiny_base).fit(spam, resume=True)
    assert card.adapter.training["finished"]
    assert fingerprint(tmp_path / "spam") == uninterrupted[0.0]


def test_an_effect_that_was_reduced_before_a_checkpoint_is_not_reduced_again(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a joint run ends because an adapter cannot be saved."""
    run = make_run(tmp_path, tiny_base, declared(rows[:100], retention="kl"))
    monkeypatch.setattr(run.validation, "scaled_down", lambda *_: pytest.fail("reduced again"))
    best = run.state.best = {"scale": 0.2, "general_kl": run.drift_limit + 1}
    run._scale_down()
    assert run.state.best is best


def test_a_full_disk_at_ctrl_c_is_reported(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The run is interrupted all the same, and the error says what could not be saved."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    step = Run.train_step

    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    def counting(self: Run, items: Sequence[EncodedExample]) -> None:
        step(self, items)
        if self.state.total_steps == 7:
            self.signals.received = signal.SIGINT
            monkeypatch.setattr("lora_domains.atomic.os.fsync", refused)

    monkeypatch.setattr(Run, "train_step", counting)
    with pytest.raises(TrainingInterrupted) as caught:
        model.fit(declared(rows[:100], epochs=3))
    assert "The checkpoint of this step could not be written" in caught.value.hint
    assert "continues from the checkpoint before" in caught.value.hint
    assert "No adapter was saved" in caught.value.hint
    output = " ".join(capsys.readouterr().out.split())
    assert "the adapter of epoch 1 could not be saved: No space left on device" in output


def test_no_training_is_lost_when_the_disk_refuses_the_adapter(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], uninterrupted: dict[float, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spam = declared(rows[:100], epochs=3)

    def full(*_: Any) -> None:
        raise AdapterError(expected="space", found="none", hint="Free some.")

    model = model_in(tmp_path, tiny_base)
    with monkeypatch.context() as patch:
        patch.setattr("lora_domains.training.fit.save_adapter", full)
        with pytest.raises(AdapterError):
            model.fit(spam)
    assert not (tmp_path / "spam").exists()
    monkeypatch.setattr(Run, "train_step", None)  # nothing is left to train
    model_in(tmp_path, tiny_base).fit(spam, resume=True)
    assert fingerprint(tmp_path / "spam") == uninterrupted[0.0]
    assert not list(tmp_path.glob(".spam*"))


# ── Processes that are stopped ────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def begun(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> Callable[..., Forked]:
    """Begins a process that trains in a folder, and perhaps resumes."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:120]))
    base = load_base(tiny_base, device="cpu")
    domain = with_settings(
        Domain("spam", Classification(), Data(str(path))),
        lr=0.03, batch_size=8, rank=8, epochs=3, patience=99, dropout=0.1,
    )  # fmt: skip

    def begin(folder: Path, resume: bool = False) -> Forked:
        def fit() -> int:
            DomainModel(base, out="adapters", display=Display()).fit(domain, resume=resume)
            return 0

        return fork(lambda: sys.exit(guarded(fit)), folder)

    return begin


@pytest.fixture(scope="module")
def uninterrupted_process(
    tmp_path_factory: pytest.TempPathFactory, begun: Callable[..., Forked]
) -> str:
    folder = tmp_path_factory.mktemp("whole")
    code, _, errors = begun(folder).ended()
    assert code == 0, errors
    return fingerprint(folder / "adapters" / "spam")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_process_stopped_by_a_signal_resumes_to_the_same_bytes(
    tmp_path: Path, begun: Callable[..., Forked], uninterrupted_process: str,
    number: signal.Signals,
) -> None:  # fmt: skip
    process, out = begun(tmp_path), tmp_path / "adapters"
    checkpoint = out / ".spam.checkpoint"
    until = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(process.number, number)
    code, _, errors = process.ended()
    assert checkpoint.exists()
    if number == signal.SIGKILL:
        assert code == -signal.SIGKILL
        assert not (out / "spam").exists()
    else:
        assert code == 130, errors
        assert "--resume" in errors
        assert number.name in errors
        assert (out / "spam" / WEIGHTS).exists()  # the best epoch so far
    code, output, errors = begun(tmp_path, resume=True).ended()
    assert code == 0, errors
    assert "Resuming at epoch" in output
    assert fingerprint(out / "spam") == uninterrupted_process
    # The adapter of the best epoch, saved at Ctrl-C, is replaced and does not become a version.
    assert sorted(p.name for p in out.iterdir()) == ["spam"]


SEED = 20_241


@pytest.mark.long
@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Each run is killed with SIGKILL twice, in an epoch or during a write, and resumed.

    Plainly and without dropout, with replay and dropout, and as a second stage of the same name.
    """
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "killed.py"), str(tiny_base), str(rows),
         str(tmp_path / "out"), str(SEED)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert len(runs) == 12
    for run in runs:
        assert run["codes"] == [-9, -9, 0], done.stderr
        assert run["files"] == run["whole"], run
        assert run["ledger"], run
        # An adapter that was saved before the kill becomes a version.
        replaced = run["arm"] == "second stage" or run["killed"][3] == "after it was saved"
        versions = [".versions"] if replaced else []
        left = [name for name in run["left"] if not name.startswith(".spam.")]
        assert left == [*versions, "spam"], run
        if run["killed"][3] != "before it takes its folder's place":
            assert left == run["left"], run
    assert len({run["whole"] for run in runs}) == 3
    assert {run["killed"][0] > 4 for run in runs} == {True, False}
    assert len({run["killed"][1] for run in runs}) >= 3
    assert {run["killed"][3] for run in runs} >= {"before it is saved", "after it was saved"}
