"""Verbs on one trained adapter: fit, predict, list and show, and what fit writes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import run, write
from support.general_text import use_general_text
from support.models import SUITE, clear_rows

from lora_domains.cli import commands
from lora_domains.report.card import Card

FAST = ("--lr", "0.01", "--rank", "8")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return clear_rows(900)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> tuple[Path, int]:
    """An output folder with one adapter, made from CSV files on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    labelled = [
        row | {"ward": "north" if n % 2 else "south", "patient": f"p{n // 2}"}
        for n, row in enumerate(rows)
    ]
    train = write(folder / "train.csv", labelled[:650])
    test = write(folder / "test.csv", labelled[650:])
    patch = pytest.MonkeyPatch()
    patch.setattr("lora_domains.model.embedded", lambda: SUITE)
    use_general_text(patch)
    code = run(
        "fit", "--name", "spam", "--train", train, "--test", test, "--positive", "spam",
        "--base", str(tiny_base), "--out", str(folder / "out"), "--epochs", "8",
        "--slice", "ward", "--group", "patient", "--retention", "none", *FAST,
    )  # fmt: skip
    patch.undo()
    return folder / "out", code


def test_fit_trains_and_evaluates_and_its_exit_code_is_the_verdict(
    trained: tuple[Path, int],
) -> None:
    out, code = trained
    entry = Card.read(out / "spam").adapter
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[entry.verdict]
    assert entry.domain_scores["f1"]["adapter"] >= 0.95
    assert set(entry.slices["ward"]) == {"north", "south"}
    assert entry.training["epochs"] <= 8
    items = (out / "spam" / "items.jsonl").read_text()
    assert '"group"' in items
    assert '"text"' not in items.replace('"set": "text"', "")
    assert "alpha" not in items
    assert '"p0"' not in items
    ledger = {".looks.jsonl", ".looks.head"}
    assert {p.name for p in out.iterdir()} == {"spam", ".digest-key"} | ledger
    assert entry.looks["adapters"] == 0


def test_list_and_show(trained: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    out, code = trained
    verdict = Card.read(out / "spam").adapter.verdict
    assert run("list", "--out", str(out)) == 0
    assert f"spam                 {verdict}" in capsys.readouterr().out
    for extra in ((), ("--rebuild",)):
        assert run("show", "spam", "--out", str(out), *extra) == code
        shown = capsys.readouterr().out
        assert f"Verdict: {verdict}" in shown
        assert "retention" in shown
    assert run("show", str(out / "spam"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["verdict"] == verdict
    assert run("list", "--out", str(out / "nowhere")) == 0
    assert run("show", "spm", "--out", str(out)) == 2
    assert "Did you mean 'spam'" in capsys.readouterr().err


def test_an_unfinished_save_is_not_listed(
    trained: tuple[Path, int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(trained[0] / "spam", tmp_path / ".spam.abc12345")
    assert run("list", "--out", str(tmp_path)) == 0
    assert "No adapters" in capsys.readouterr().out


@pytest.mark.parametrize(("verdict", "code"), [("pass", 0), ("fail", 1), ("inconclusive", 3)])
def test_exit_codes_follow_the_verdict(
    trained: tuple[Path, int], tmp_path: Path, verdict: str, code: int
) -> None:
    card = Card.read(trained[0] / "spam")
    card.adapter.verdict = verdict
    card.write(tmp_path / "spam")
    assert run("show", "spam", "--out", str(tmp_path)) == code


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "fit_and_evaluate", interrupted)
    assert run("fit", "--name", "x", "--train", "x.csv") == 130


def test_predict_from_arguments_and_lines(
    trained: tuple[Path, int], tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import io

    where = ("--base", str(tiny_base), "--out", str(trained[0]))
    assert run("predict", "spam", "red alpha alpha alpha", "red beta beta beta", *where) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == ["spam", "ham"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("red alpha alpha alpha\n\nred beta beta beta\n"))
    assert run("predict", "spam", *where) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert run("predict", "spam", "red alpha alpha alpha", "--refer-below", "1", *where) == 0
    label, probability = capsys.readouterr().out.strip().split("\t")
    assert (label, probability) == ("refer", lines[0].split("\t")[1])


def test_a_dry_run_plans_and_writes_nothing(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", make_rows(40))
    before = sorted(tmp_path.rglob("*"))
    assert run("fit", "--name", "x", "--train", train, "--base", str(tiny_base), "--dry-run",
               "--out", str(tmp_path / "out"), "--limit", "20") == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "nothing was trained or written" in output
    assert "at most 20 of each split" in output
    assert "learning rate" in output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_reading_imports_no_torch(trained: tuple[Path, int], tmp_path: Path) -> None:
    out = str(trained[0])
    code = f"""
import sys
from pathlib import Path
from lora_domains.cli import main as cli
from lora_domains.report.report import rebuild
HEAVY = {{"torch", "transformers", "peft", "accelerate", "evaluate", "datasets"}}
for arguments in (["--help"], ["fit", "--help"], ["--version"], ["list", "--out", {out!r}],
                  ["show", "spam", "--out", {out!r}],
                  ["show", "spam", "--out", {out!r}, "--rebuild"],
                  ["compare", "spam", "spam", "--out", {out!r}],
                  ["report", {out!r} + "/spam", "--out", {str(tmp_path)!r}]):
    try:
        cli.main(arguments)
    except SystemExit as left:
        assert left.code != 2, arguments
    found = HEAVY & sys.modules.keys()
    assert not found, (arguments, found)
rebuild(Path({out!r}) / "spam")
assert not HEAVY & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
