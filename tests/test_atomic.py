"""Files and folders are written as a whole, or what was there stays."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock, Timeout

from lora_domains import atomic
from lora_domains.atomic import (
    add_line,
    locked,
    new_file,
    new_folder,
    restored,
    unfinished,
    whole_lines,
    write_text,
)


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "out" / "report.json"
    write_text(path, "old")
    write_text(path, "näue")
    assert path.read_bytes() == "näue".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), new_file(path) as file:
        file.write(b"half" * (1 // 0))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_permissions_follow_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    before = os.umask(umask)
    try:
        write_text(tmp_path / "file", "")
        write_text(tmp_path / "key", "", private=True)
        with new_folder(tmp_path / "folder") as fresh:
            (fresh / "weights").touch(0o600)  # as safetensors writes them
    finally:
        os.umask(before)
    assert permissions(tmp_path / "file") == file
    assert permissions(tmp_path / "key") == 0o600
    assert permissions(tmp_path / "folder") == folder
    assert permissions(tmp_path / "folder" / "weights") == file


@pytest.mark.parametrize("links", [True, False])
def test_without_overwrite_the_first_writer_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(os, "link", full)
    write_text(tmp_path / "key", "first", overwrite=False)
    write_text(tmp_path / "key", "second", overwrite=False)
    assert (tmp_path / "key").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["key"]


def test_what_a_killed_process_left_is_found(tmp_path: Path) -> None:
    path = tmp_path / ".x.checkpoint"
    write_text(path, "old")
    with new_file(path) as file:
        left = unfinished(path)
        assert [Path(file.name)] == left
    assert unfinished(path) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    folder = tmp_path / "a" / "b"
    for name in ("old", "new"):
        with new_folder(folder) as fresh:
            (fresh / name).write_text(name)
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in folder.parent.iterdir()] == ["b"]

    with pytest.raises(ZeroDivisionError), new_folder(folder) as fresh:
        (fresh / "half").write_text("half" * (1 // 0))
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in folder.parent.iterdir()] == ["b"]


def test_a_folder_is_restored_after_death_between_two_renames(tmp_path: Path) -> None:
    (tmp_path / ".a.old").mkdir()
    assert restored(tmp_path / "a").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


# ── Windows, as far as it can be imitated elsewhere ─────────────────────────────────────────────


def test_on_windows_a_file_that_is_read_is_replaced_a_moment_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, busy, pauses = os.replace, [True, True], []

    def refusing(old: Path, new: Path) -> None:
        if busy:
            busy.pop()
            raise PermissionError(13, "The process cannot access the file")
        replace(old, new)

    monkeypatch.setattr(os, "replace", refusing)
    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(atomic, "time", SimpleNamespace(sleep=pauses.append))
    write_text(tmp_path / "card.json", "new")
    assert (tmp_path / "card.json").read_text() == "new"
    assert pauses == [*atomic.PAUSES[:2]]
    busy += [True] * 99
    with pytest.raises(PermissionError):
        write_text(tmp_path / "card.json", "newer")
    assert (tmp_path / "card.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_on_windows_a_folder_is_replaced_by_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    for text in ("old", "new"):
        with new_folder(tmp_path / "medical") as folder:
            (folder / "card.json").write_text(text)
    assert (tmp_path / "medical" / "card.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["medical"]


def test_a_locked_file_is_read_and_appended_to_by_one_process(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with locked(path) as file:
        add_line(file, "one")
        with pytest.raises(Timeout):
            FileLock(tmp_path / ".ledger.jsonl.lock").acquire(blocking=False)
    with locked(path) as file:
        add_line(file, "two")
        assert whole_lines(file) == ["one", "two"]
    assert path.read_bytes() == b"one\ntwo\n"
