"""Adapter folders: safe names, atomic saving, finding one."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import FILES, save, strong

from lora_domains import atomic
from lora_domains.adapters.folder import CONFIG, find_adapter, fingerprint, rewrite_card
from lora_domains.adapters.loading import load_adapter
from lora_domains.atomic import restored
from lora_domains.errors import AdapterError, DomainError
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import Card


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base)


# ── Names ───────────────────────────────────────────────────────────────────────────────────────

NEVER = ["a.b", "..", ".hidden", "-flag", "a b", "a\n", "ä", "x" * 65]


@pytest.mark.parametrize("name", [*NEVER, "../x", "a/b", "", ".", "/tmp/x"])
def test_unsafe_names_are_refused(base: Base, tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "safe", strong(base), base)
    with pytest.raises(DomainError, match="letters, digits"):
        load_adapter(folder, base, name)


@pytest.mark.parametrize("name", NEVER)
def test_unsafe_folders_are_refused(base: Base, tmp_path: Path, name: str) -> None:
    with pytest.raises(DomainError, match="letters, digits"):
        save(tmp_path / "out" / name, strong(base), base)
    assert not (tmp_path / "out").exists()


def test_a_folder_with_other_files_is_never_replaced(base: Base, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for name in ("thesis", "file"):
        with pytest.raises(AdapterError, match="Choose another name"):
            save(tmp_path / name, strong(base), base)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "a file"
    (tmp_path / "empty").mkdir()
    assert load_adapter(save(tmp_path / "empty", strong(base), base), base)


def test_a_link_stays_a_link(base: Base, tmp_path: Path) -> None:
    first = save(tmp_path / "first", strong(base), base)
    (tmp_path / "current").symlink_to(first)
    save(tmp_path / "current", strong(base, seed=2), base)
    assert (tmp_path / "current").is_symlink()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "first"]
    assert_same(first, strong(base, seed=2), base)


def test_the_working_folder_can_be_loaded(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save(tmp_path / "here", strong(base), base))
    assert load_adapter(".", base).name == "here"


# ── Saving is atomic ────────────────────────────────────────────────────────────────────────────


def assert_same(folder: Path, adapter: Any, base: Base) -> None:
    loaded = load_adapter(folder, base)
    for linear, (a, b) in adapter.weights.items():
        assert torch.equal(loaded.weights[linear][0], a)
        assert torch.equal(loaded.weights[linear][1], b)


def test_saving_over_an_adapter_replaces_all_of_it(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", strong(base), base)
    (folder / "stray.txt").write_text("of the adapter before")
    save(folder, strong(base, seed=2), base)
    assert_same(folder, strong(base, seed=2), base)
    assert {p.name for p in folder.iterdir()} == FILES
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def _full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_adapter(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = save(tmp_path / "a", strong(base), base)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "_exchange", lambda one, other: False)
        patch.setattr(os, call, _full)
        with pytest.raises(AdapterError, match=r"No space left.*untouched"):
            save(folder, strong(base, seed=2), base)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(folder, strong(base), base)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on file sizes")
def test_a_disk_that_refuses_the_weights_leaves_the_old_adapter(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", strong(base), base)
    weights = (folder / "adapter_model.safetensors").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights // 2, limits[1]))
    try:
        with pytest.raises(AdapterError, match="a disk that takes the adapter"):
            save(folder, strong(base, seed=2), base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(folder, strong(base), base)


def test_a_failure_while_the_card_is_made_leaves_the_old_adapter(
    base: Base, tmp_path: Path
) -> None:
    folder = save(tmp_path / "a", strong(base), base)
    with pytest.raises(ZeroDivisionError):
        rewrite_card(folder, Card.read(folder), lambda card: str(1 / 0), [])
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(folder, strong(base), base)


def test_a_card_is_rewritten_beside_the_same_weights(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", strong(base), base)
    card = Card.read(folder)
    card.adapter.verdict = "pass"
    rewrite_card(folder, card, lambda card: "# Measured\n", [{"id": 1}])
    assert load_adapter(folder, base).card == card
    assert json.loads((folder / "items.jsonl").read_text()) == {"id": 1}


def test_without_an_atomic_exchange_two_renames_do(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    folder = save(tmp_path / "a", strong(base), base)
    save(folder, strong(base, seed=2), base)
    assert_same(folder, strong(base, seed=2), base)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]

    # When the second rename fails, the old adapter is restored at once.
    rename, calls = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            _full()
        rename(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with pytest.raises(AdapterError, match="No space left"):
        save(folder, strong(base, seed=3), base)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert_same(folder, strong(base, seed=2), base)


def test_a_kill_between_the_two_renames_is_repaired(base: Base, tmp_path: Path) -> None:
    adapter = strong(base)
    folder = save(tmp_path / "a", adapter, base)
    for look_up in (
        lambda: restored(folder),
        lambda: load_adapter(folder, base),
        lambda: find_adapter("a", tmp_path),
    ):
        folder.rename(tmp_path / ".a.old")
        look_up()
        assert_same(folder, adapter, base)
    # An existing folder is never replaced by one that waits.
    waiting = shutil.copytree(folder, tmp_path / ".a.old")
    save(folder, strong(base, seed=2), base)
    assert_same(restored(folder), strong(base, seed=2), base)
    assert waiting.exists()


def test_the_checkpoints_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-1000"):
        (tmp_path / "trained" / name).mkdir(parents=True)
        (tmp_path / "trained" / name / CONFIG).write_text("{}")
    with pytest.raises(AdapterError, match=r"folders in it: .*checkpoint-1000, .*checkpoint-100\."):
        find_adapter(tmp_path / "trained", tmp_path)


def test_unfinished_folders_are_not_adapters(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "medical", strong(base), base)
    shutil.copytree(folder, tmp_path / ".medicol.x1y2")
    with pytest.raises(AdapterError, match=r"Did you mean 'medical'\?") as caught:
        find_adapter("medicol", tmp_path)
    assert "x1y2" not in str(caught.value)
    with pytest.raises(AdapterError, match=r"Did you mean 'medical'\?"):
        load_adapter(tmp_path / "medicol", base)
    with pytest.raises(AdapterError, match="Train one first"):
        find_adapter("medical", tmp_path / "nowhere")


def saving(folder: Path, made: Sequence[Adapter], base: Base, how: str) -> int:
    """The number of a forked process that saves ``made`` in turn, again and again."""
    child = os.fork()
    if child:
        return child
    try:
        if how == "renames":
            atomic._exchange = lambda one, other: False
        until = time.monotonic() + 60  # where nobody is left to kill it
        while time.monotonic() < until:
            for one in made:
                save(folder, one, base)
    finally:
        os._exit(1)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork: starting anew takes seconds a kill")
def test_a_killed_process_leaves_a_whole_adapter(base: Base, tmp_path: Path) -> None:
    folder = save(tmp_path / "out" / "a", strong(base, "a", 1), base)
    begun = time.monotonic()
    save(folder, strong(base, "a", 1), base)
    seconds = time.monotonic() - begun
    known = {
        fingerprint(save(tmp_path / "known" / f"a{s}", strong(base, "a", s), base)) for s in (1, 2)
    }
    moments = random.Random(0)
    made, seen = [strong(base, "a", seed) for seed in (1, 2)], set()
    for kill in range(60):
        if kill >= 20:  # the machine is slower than it was at first
            if seen == known:
                break
            seconds *= 1.1
        child = saving(folder, made, base, "renames" if kill % 2 else "exchange")
        time.sleep(moments.uniform(0.2, 2.4) * seconds)  # in any part of the first two
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        load_adapter(folder, base)
        seen.add(fingerprint(folder))
        assert fingerprint(folder) == Card.read(folder).adapter.sha256
        assert {p.name for p in folder.iterdir()} == FILES
    assert seen == known, "no save was finished between two kills"
