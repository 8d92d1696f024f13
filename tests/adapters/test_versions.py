"""Versions: keeping replaced adapters, and restoring one."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import folders
from support.adapters import save, strong
from support.commands import run

from lora_domains.adapters import versions
from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.versions import KEPT, keep_version, rollback
from lora_domains.errors import AdapterError
from lora_domains.modeling.base import Base, load_base
from lora_domains.report.card import Card, ParentRecord
from lora_domains.report.report import rebuild

JUDGED = {
    "metric": "f1", "labels": ["a", "b"], "positive": "b", "base_changed": False,
    "largest_move": 1.0, "loss": "label cross-entropy", "suite": "embedded",
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, device="cpu")


def put(folder: Path, base: Base, seed: int) -> str:
    """The fingerprint of the adapter of ``seed``, after saving it like a run does."""
    keep_version(folder)
    return fingerprint(save(folder, strong(base, folder.name, seed), base))


# ── Versions ────────────────────────────────────────────────────────────────────────────────────


def test_a_replaced_adapter_is_kept_and_can_be_restored(tmp_path: Path, base: Base) -> None:
    folder = tmp_path / "health"
    one, two, three = (put(folder, base, seed) for seed in (1, 2, 3))
    assert len({one, two, three}) == 3
    assert [fingerprint(p) for p in versions.versions(folder)] == [one, two]
    taken, kept = rollback(folder)
    assert (taken.name, kept and kept.name) == ("0002", "0003")
    assert fingerprint(folder) == two
    rollback(folder)  # a rollback is rolled back
    assert fingerprint(folder) == three
    taken, _ = rollback(folder, "1")
    assert (taken.name, fingerprint(folder)) == ("0001", one)
    assert not [p for p in tmp_path.rglob(".*") if p.name not in (".versions",)]
    with pytest.raises(AdapterError, match=r"found 9.*Known|Did you mean"):
        rollback(folder, "9")
    assert fingerprint(folder) == one


def test_equal_versions_are_kept_once_and_the_oldest_deleted(tmp_path: Path, base: Base) -> None:
    folder = tmp_path / "health"
    for seed in range(KEPT + 3):
        put(folder, base, seed)
        assert keep_version(folder) is not None
        assert keep_version(folder) is None
    names = [p.name for p in versions.versions(folder)]
    assert names == [f"{n:04d}" for n in range(4, KEPT + 4)]


def test_an_unfinished_state_of_the_same_run_is_not_kept(tmp_path: Path, base: Base) -> None:
    """Rollback does not restore it, and it does not displace finished versions."""
    folder = tmp_path / "health"
    good = put(folder, base, 0)
    assert keep_version(folder) is not None
    for seed in range(1, KEPT + 3):
        save(folder, strong(base, folder.name, seed), base)
        card = Card.read(folder)
        run = replace(card.adapter, recipe_digest="r", data={"train": "d"})
        card.adapter = replace(run, training={"finished": False})
        card.write(folder)
        assert keep_version(folder, successor=run) is None
    assert [fingerprint(p) for p in versions.versions(folder)] == [good]
    left = fingerprint(folder)
    # It is kept when another run replaces it, or once it was evaluated.
    assert keep_version(folder, successor=replace(run, parent=ParentRecord("x", left))) is not None
    shutil.rmtree(folder.parent / ".versions" / "health" / "0002")
    card.adapter.judged = JUDGED
    card.write(folder)
    assert keep_version(folder, successor=run) is not None
    rollback(folder, "1")
    assert fingerprint(folder) == good
    assert left in [fingerprint(p) for p in versions.versions(folder)]


def test_rollback_without_versions_is_refused(tmp_path: Path, base: Base) -> None:
    put(tmp_path / "health", base, 1)
    with pytest.raises(AdapterError, match="expected an earlier version; found none"):
        rollback(tmp_path / "health")


@pytest.mark.parametrize("call", ["os.replace", "shutil.copy2"])
def test_a_failure_at_any_point_leaves_adapter_and_versions_whole(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder = tmp_path / "health"
    one, two = put(folder, base, 1), put(folder, base, 2)
    real = {"os.replace": os.replace, "shutil.copy2": shutil.copy2}[call]
    calls = 0

    def failing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2 or call == "os.replace":
            raise OSError(28, "No space left on device")
        return real(*arguments)  # type: ignore[operator]

    monkeypatch.setattr(call, failing)
    for action in (lambda: keep_version(folder), lambda: rollback(folder)):
        calls = 0
        with pytest.raises(AdapterError, match="No space left"):
            action()
        assert fingerprint(folder) == two
        assert [fingerprint(p) for p in versions.versions(folder)] == [one]
    assert not [p for p in tmp_path.rglob(".*") if p.name != ".versions"]


def test_the_rollback_verb(
    tmp_path: Path, base: Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = put(tmp_path / "health", base, 1), ("--out", str(tmp_path))
    assert run("rollback", "health", *out) == 0  # an empty list is an answer
    assert f"No earlier versions of {tmp_path / 'health'}" in capsys.readouterr().out
    assert run("rollback", "health", "1", *out) == 2
    assert "Versions are kept when" in capsys.readouterr().err
    two = put(tmp_path / "health", base, 2)
    assert run("rollback", "health", *out) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^0001 +\d{4}-\d\d-\d\d \d\d:\d\d +not evaluated", listed, re.M)
    assert re.search(r"^now ", listed, re.M)
    assert "lora-domains rollback health 0001" in listed
    assert fingerprint(tmp_path / "health") == two  # a list changes nothing
    assert run("rollback", "health", "0001", *out) == 0
    assert "the replaced one was saved as 0002" in capsys.readouterr().out
    assert fingerprint(tmp_path / "health") == one
    monkeypatch.chdir(tmp_path)
    assert run("rollback", "./health", "2") == 0  # a folder
    assert fingerprint(tmp_path / "health") == two
    assert run("rollback", "wealth", *out) == 2
    assert "Did you mean 'health'" in capsys.readouterr().err
    assert run("rollback", "../health", *out) == 2
    shutil.rmtree(tmp_path / "health")  # its versions are left
    assert run("rollback", "health", "1", *out) == 0
    assert fingerprint(tmp_path / "health") == one


def test_versions_are_listed_with_what_an_evaluation_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = folders.folder(tmp_path, "triage")
    rebuild(made).write(made)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).write_text("{}")
    assert keep_version(made) is not None
    assert run("rollback", "triage", "--out", str(tmp_path)) == 0
    assert re.search(r"^0001 .* pass +F1 0.000 → 0.929", capsys.readouterr().out, re.M)
