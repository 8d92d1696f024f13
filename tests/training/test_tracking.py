"""Trackers: numbers by name, from one process, and never a row."""

import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import declared, model_in

from lora_domains.console import Display
from lora_domains.errors import UsageError
from lora_domains.training.fit import check_tracker, numbers

SECRET = "zqtrackerhush"


def test_only_numbers_of_a_run_are_logged(tmp_path: Path, tiny_base: Path) -> None:
    pytest.importorskip("tensorboardX")
    model = model_in(tmp_path, tiny_base)
    rows = make_rows(100, secret=SECRET)
    card = model.fit(declared(rows, epochs=2, retention="none"), tracker="tensorboard")
    files = [p for p in (tmp_path / ".runs").rglob("*") if p.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    epoch = (b"training_loss", b"validation_loss", b"score", b"general_nats", b"general_kl")
    for name in (b"loss", b"learning_rate", *epoch):
        assert name in content
    assert len(content) > 10 * card.adapter.training["steps"]
    for path in files:
        assert SECRET.encode() not in path.read_bytes()
        assert SECRET not in str(path)
        assert b"alpha beta" not in path.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"spam", ".runs"}


def test_wandb_receives_only_numbers(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it takes the command with its file names, the output, the host and the code."""
    pytest.importorskip("wandb", reason="pip install 'lora-domains[wandb]' runs this test")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fit", "--train", f"{SECRET}.csv"])
    model = model_in(tmp_path, tiny_base)
    model.display = Display()
    model.fit(declared(make_rows(100, secret=SECRET), epochs=2, retention="none"), tracker="wandb")
    assert {p.name for p in tmp_path.iterdir()} == {"spam", ".runs"}
    files = [p for p in (tmp_path / ".runs").rglob("*") if p.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert b"training_loss" in content
    assert not [p.name for p in files if p.parent.name == "files"]
    for word in (SECRET, "epoch  training loss", socket.gethostname() + '"', str(Path(__file__))):
        assert word.encode() not in content, word


def test_trackio_receives_only_numbers(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="pip install 'lora-domains[trackio]' runs this test")
    model = model_in(tmp_path, tiny_base)
    rows = make_rows(100, secret=SECRET)
    model.fit(declared(rows, epochs=2, retention="none"), tracker="trackio")
    files = [p for p in (tmp_path / "trackio").rglob("*") if p.is_file()]
    content = b"".join(path.read_bytes() for path in files)
    assert b"training_loss" in content
    for word in (SECRET, "alpha beta", socket.gethostname() + '"', str(Path(__file__))):
        assert word.encode() not in content, word


def test_nothing_is_logged_by_default(tmp_path: Path, tiny_base: Path) -> None:
    model_in(tmp_path, tiny_base).fit(declared(make_rows(60), epochs=1, retention="none"))
    assert {p.name for p in tmp_path.iterdir()} == {"spam"}


def test_a_missing_tracker_is_refused_before_rows_are_read(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="Did you mean 'tensorboard'"):
        check_tracker("tensorbord")
    for name in ("tensorboard", "tensorboardX", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("tensorboard", "wandb", "trackio"):
        with pytest.raises(UsageError, match=rf"pip install 'lora-domains\[{name}\]'"):
            check_tracker(name)
    with pytest.raises(UsageError, match="not installed"):
        model_in(tmp_path, tiny_base).fit("no_such_file.csv", name="spam", tracker="wandb")
    assert list(tmp_path.iterdir()) == []


def test_texts_are_left_out() -> None:
    values = {"loss": 1, "score": 0.5, "observation": SECRET, "accuracy": None, "up": True}
    assert numbers(values) == {"loss": 1.0, "score": 0.5}


def test_a_tracker_that_fails_to_start_leaves_no_adapter(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no server")

    monkeypatch.setattr("lora_domains.training.fit.open_tracker", broken)
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(RuntimeError, match="no server"):
        model.fit(declared(make_rows(100), epochs=1), tracker="tensorboard")
    assert model.domains == ()
