"""Bad rows, bases, names and disks: refused with their place, and nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import FAST, run, write

from lora_domains.data.identity import open_project
from lora_domains.report.card import Card

GOOD = make_rows(40)


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def table(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Any:
    def written(path: Path) -> str:
        return write(path, change([dict(row) for row in GOOD]))

    return written


def changed(index: int, **values: str) -> Any:
    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows[index] |= values
        return rows

    return table(change)


JSONL = "".join(json.dumps(row) + "\n" for row in GOOD)
RAGGED = "text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in GOOD)

BAD: dict[str, tuple[str, Callable[[Path], str], tuple[str, ...]]] = {
    "missing file": ("t.csv", lambda path: str(path), ("t.csv", "no such file")),
    "empty file": ("t.csv", lambda path: text(path, ""), ("t.csv", "an empty file")),
    "missing column": (
        "t.csv", table(lambda rows: [{"id": n, "label": r["label"]} for n, r in enumerate(rows)]),
        ("t.csv", "a column of texts", "'id' (ids)"),
    ),
    "one class": (
        "t.csv", table(lambda rows: [r | {"label": "ham"} for r in rows]),
        ("t.csv", "column 'label'", "at least two classes"),
    ),
    "empty text": ("t.csv", changed(5, text=""), ("t.csv, line 7", "column 'text'")),
    "whitespace": ("t.csv", changed(5, text="  "), ("t.csv, line 7", "only whitespace")),
    "null": (
        "t.jsonl", lambda path: text(path, JSONL + '{"text": null, "label": "ham"}\n'),
        ("t.jsonl, line 41", "column 'text'", "null"),
    ),
    "broken JSON": (
        "t.jsonl", lambda path: text(path, JSONL + '{"text": "a'),
        ("t.jsonl", "line 41"),
    ),
    "ragged": ("t.csv", lambda path: text(path, RAGGED + "a,b,c\n"), ("t.csv", "line 42 has 3")),
    "encoding": (
        "t.csv",
        lambda path: text(path, RAGGED.encode() + "café,ham\n".encode() + b"caf\xe9,ham\n"),
        ("t.csv, line 43", "UTF-8"),
    ),
    "label longer than the context": (
        "t.csv", table(lambda rows: [r | {"label": r["label"] * 150} for r in rows]),
        ("t.csv, line ", ", column 'label'", "context of 128 tokens"),
    ),
    "two rows": ("t.csv", table(lambda rows: rows[:2]), ("t.csv", "at least 8 training rows")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "expected"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_with_their_place(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], name: str,
    make: Callable[[Path], str], expected: tuple[str, ...],
) -> None:  # fmt: skip
    path = make(tmp_path / name)
    out = tmp_path / "out"
    assert run("fit", "--name", "x", "--train", path, "--base", str(tiny_base),
               "--out", str(out)) == 2  # fmt: skip
    error = capsys.readouterr().err
    for part in expected:
        assert part in error, error
    assert not out.exists()


def test_an_unknown_label_in_the_test_rows_is_refused(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", GOOD[:30])
    test = write(tmp_path / "test.csv", [*GOOD[31:], GOOD[30] | {"label": "spaam"}])
    assert run("fit", "--name", "x", "--train", train, "--test", test, "--base", str(tiny_base),
               "--out", str(tmp_path / "out")) == 2  # fmt: skip
    error = capsys.readouterr().err
    assert "test.csv, line 11, column 'label'" in error
    assert "Did you mean 'spam'" in error
    assert not (tmp_path / "out").exists()


def test_leaks_are_refused_unless_dropped(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], small_suite: None
) -> None:
    train, test = write(tmp_path / "train.csv", GOOD), write(tmp_path / "test.csv", GOOD[:6])
    command = ("fit", "--name", "x", "--train", train, "--test", test, "--base", str(tiny_base),
              "--out", str(tmp_path / "out"), "--epochs", "1", *FAST)  # fmt: skip
    assert run(*command) == 2
    assert "train.csv, line 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*command, "--drop-leaks") in (0, 1, 3)
    assert "6 rows dropped that are also test rows" in capsys.readouterr().out
    entry = Card.read(tmp_path / "out" / "x").adapter
    assert (entry.ledger["refused"], entry.leaks["exact"]) == (6, 0)


def no_tokenizer(folder: Path, tiny_base: Path) -> str:
    import shutil

    shutil.copytree(tiny_base, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    return str(folder)


BASES: dict[str, tuple[Callable[[Path, Path], str], str]] = {
    "without a tokenizer": (no_tokenizer, "a tokenizer beside the weights"),
    "unreachable": (lambda *_: "nobody/no-such-base", "a base that can be reached"),
    "no folder": (lambda folder, _: str(folder), "no such folder"),
}


@pytest.mark.parametrize(("make", "expected"), BASES.values(), ids=BASES)
def test_an_unusable_base_is_refused(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Path], str], expected: str,
) -> None:  # fmt: skip
    train = write(tmp_path / "train.csv", GOOD)
    base = make(tmp_path / "base", tiny_base)
    assert run("fit", "--name", "x", "--train", train, "--base", base,
               "--out", str(tmp_path / "out")) == 2  # fmt: skip
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/tmp/x", "a.b", ""])
def test_unsafe_names_are_refused(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", GOOD)
    before = sorted(tmp_path.rglob("*"))
    assert run("fit", "--name", name, "--train", train, "--out", str(tmp_path / "out")) == 2
    assert "Error" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_no_files(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import errno

    open_project()  # its key is written before training; here the disk is full afterwards

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lora_domains.atomic.os.fsync", full)
    train = write(tmp_path / "train.csv", GOOD)
    assert run("fit", "--name", "x", "--train", train, "--base", str(tiny_base), "--epochs", "1",
               "--out", str(tmp_path / "out"), *FAST) == 2  # fmt: skip
    captured = capsys.readouterr()
    assert "No space left on device" in captured.err
    assert "no checkpoint could be written" in captured.out
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_rows_are_found_before_the_base_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = text(tmp_path / "t.csv", RAGGED + "a,b,c\n")
    assert run("fit", "--name", "x", "--train", path, "--base", str(tmp_path / "no-base")) == 2
    assert "line 42 has 3" in capsys.readouterr().err
    general = text(tmp_path / "g.csv", "text\na\n")
    assert run("fit", "--name", "x", "--train", text(tmp_path / "u.csv", RAGGED), "--general",
               general, "--base", str(tmp_path / "no-base")) == 2  # fmt: skip
    assert "different texts" in capsys.readouterr().err
