"""Verbs on one trained adapter: fit, predict, list and show, and what fit writes."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import FAST, run, write
from support.models import QUESTIONS, clear_rows, use_small_suite
from support.peft_folders import peft_saved

from lora_domains.cli.verbs import fit as fit_verb
from lora_domains.data.identity import FOLDER
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.report.card import Card
from lora_domains.tasks import Classification
from lora_domains.verdict.ledger import LEDGER


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
    use_small_suite(patch)
    code = run(
        "fit", "--name", "spam", "--train", train, "--test", test, "--positive", "spam",
        "--base", str(tiny_base), "--out", str(folder / "out"), "--epochs", "8",
        "--slice", "ward", "--group", "patient", "--retention", "none", *FAST,
    )  # fmt: skip
    patch.undo()
    return folder / "out", code


@pytest.fixture(scope="module")
def plain_peft(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A working folder with the adapter ``plain`` that plain PEFT saved, its base and rows."""
    folder = tmp_path_factory.mktemp("peft")
    peft_saved(tiny_base, folder / "adapters" / "plain")
    (folder / "base").symlink_to(tiny_base)
    write(folder / "rows.csv", make_rows(40))
    questions = "".join(json.dumps(question) + "\n" for question in QUESTIONS)
    (folder / "questions.jsonl").write_text(questions)
    return folder


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
    assert {p.name for p in out.iterdir()} == {"spam", ".digest-key"}
    assert entry.evaluations is not None
    assert (entry.evaluations["number"], entry.evaluations["budget"]) == (1, 5)


def test_fit_without_test_rows_of_its_own_scores_no_test_row(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], small_suite: None, project: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train = write(tmp_path / "train.csv", rows[:200])
    parts = prepare(Classification(), Data(train))
    scores, scored = Scorer.scores, []

    def recorded(scorer: Scorer, part: Part, contenders: Any) -> Any:
        scored.extend(row.example.id for row in part.rows)
        return scores(scorer, part, contenders)

    monkeypatch.setattr(Scorer, "scores", recorded)
    assert run(
        "fit", "--name", "spam", "--train", train, "--positive", "spam", "--epochs", "1",
        "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--retention", "none", *FAST,
    ) == 0  # fmt: skip
    assert set(scored) == {row.id for row in parts.validation}
    assert len(parts.test) == 40
    entry = Card.read(tmp_path / "out" / "spam").adapter
    assert (entry.verdict, entry.evaluations, entry.domain_scores) == (None, None, {})
    output = capsys.readouterr().out
    assert "On 20 validation rows, which chose the epoch: no verdict" in output
    assert f"lora-domains evaluate {tmp_path / 'out' / 'spam'} --base {tiny_base}\n" in output
    for contender in ("base", "majority", "TF-IDF", "adapter"):
        assert contender in output
    # Nothing is charged.
    assert not (project / FOLDER / LEDGER).exists()


def test_list_and_show(trained: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = trained
    verdict = Card.read(out / "spam").adapter.verdict
    assert run("list", "--out", str(out)) == 0
    assert re.search(rf"^spam +{verdict} ", capsys.readouterr().out, re.M)
    for extra in ((), ("--rebuild",)):
        assert run("show", "spam", "--out", str(out), *extra) == 0
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

    shutil.copytree(trained[0] / "spam", tmp_path / ".spam.abc12345")
    assert run("list", "--out", str(tmp_path)) == 0
    assert "No adapters" in capsys.readouterr().out


@pytest.mark.parametrize("verdict", ["pass", "fail", "inconclusive"])
def test_show_exits_0_whatever_the_verdict(
    trained: tuple[Path, int], tmp_path: Path, verdict: str
) -> None:
    card = Card.read(trained[0] / "spam")
    card.adapter.verdict = verdict
    card.write(tmp_path / "spam")
    assert run("show", "spam", "--out", str(tmp_path)) == 0


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_verb, "fit_and_evaluate", interrupted)
    assert run("fit", "--name", "x", "--train", "x.csv") == 130


def test_predict_from_arguments_and_lines(
    trained: tuple[Path, int], tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, cache: Path,
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
    assert run("predict", "spam", "red alpha alpha alpha", "--out", str(trained[0])) == 0
    assert capsys.readouterr().out.splitlines() == lines[:1]  # the base is found again


def test_the_warnings_of_predict_go_to_the_standard_error(
    trained: tuple[Path, int], tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Its standard output is read by programs: a line for each text, and nothing else."""
    monkeypatch.setattr("lora_domains.inference.memory.free_bytes", lambda device: 1)
    where = ("--base", str(tiny_base), "--out", str(trained[0]))
    assert run("predict", "spam", "red alpha alpha alpha", *where) == 0
    shown = capsys.readouterr()
    assert "Warning: the base takes about" in shown.err
    assert len(shown.out.splitlines()) == 1


NEEDS_A_CARD = {
    "show": ("show", "plain"),
    "report": ("report", "adapters/plain", "--out", "reports"),
    "compare": ("compare", "plain", "plain"),
    "compare seeds": ("compare", "plain", "plain", "--seeds"),
    "predict": ("predict", "plain", "a text", "--base", "base"),
    "trace": ("trace", "plain", "a text", "--base", "base"),
    "curve": ("curve", "plain", "--base", "base"),
    "curve with rows": ("curve", "plain", "rows.csv", "--base", "base"),
    "benchmark": ("benchmark", "adapters/plain", "--base", "base", "--suite", "questions.jsonl",
                  "--out", "reports"),
    "fit": ("fit", "--from-card", "adapters/plain", "--base", "base"),
    "rollback": ("rollback", "plain", "1"),
}  # fmt: skip


@pytest.mark.parametrize("arguments", NEEDS_A_CARD.values(), ids=NEEDS_A_CARD)
def test_a_folder_of_plain_peft_is_refused_where_a_card_is_needed(
    arguments: tuple[str, ...], plain_peft: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(plain_peft)
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "plain" in error
    assert "expected" in error
    assert "hint" in error


def test_a_dry_run_plans_and_writes_nothing(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", make_rows(40))
    before = sorted(tmp_path.rglob("*"))
    assert run("fit", "--name", "x", "--train", train, "--base", str(tiny_base), "--dry-run",
               "--out", str(tmp_path / "out"), "--limit", "20", "--epochs", "1") == 0  # fmt: skip
    output = capsys.readouterr().out
    assert "Dry run: 1 epoch of" in output
    assert "nothing was trained or written" in output
    assert "at most 20 of each split" in output
    assert "learning rate" in output
    assert sorted(tmp_path.rglob("*")) == before


def test_quiet_leaves_results_and_errors(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", make_rows(40))
    fit = ("fit", train, "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--max-steps",
           "2", "--retention", "none", "--quiet")  # fmt: skip
    assert run(*fit) == 0
    shown = capsys.readouterr().out
    assert all(
        part in shown
        for part in ("Warning: ", " validation rows, which chose", "lora-domains evaluate ")
    )
    assert not any(word in shown for word in ("base loaded", "row counts", "training loss"))
    assert run(*fit, "--dry-run") == 0
    assert "plan" in capsys.readouterr().out
    assert run(*fit, "--text", "note") == 2
    assert "'note'" in capsys.readouterr().err


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


def test_reading_a_card_imports_no_numpy(trained: tuple[Path, int]) -> None:
    out = str(trained[0])
    more: set[str] = {"lora_domains.tasks", "lora_domains.verdict.ledger"}  # which only show needs
    for words, spared in ((["list", "--out", out], more), (["show", "spam", "--out", out], set())):
        code = f"""
import sys
from lora_domains.cli import main as cli
try:
    cli.main({words!r})
except SystemExit as left:
    assert left.code == 0
unused = {{"numpy", "rich.progress", "lora_domains.domain", "lora_domains.data.readers",
          "lora_domains.verdict.metrics", "lora_domains.report.html", "rich._emoji_codes"}}
unused = (unused | set({sorted(spared)!r})) & sys.modules.keys()
assert not unused, unused
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, (words, done.stderr)


# ── evaluate ────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_judges_a_folder_of_plain_peft(
    plain_peft: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(plain_peft)
    given = ("--base", "base", "--suite", "questions.jsonl", "--out", str(tmp_path))
    rows = ("--test", "rows.csv", "--text", "text", "--label", "label", "--positive", "spam")
    code = run("evaluate", "adapters/plain", *given, *rows, "--prompt", r"{text}\nlabel:")
    shown = " ".join(capsys.readouterr().out.split())
    card = Card.read(tmp_path / "plain")
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[card.adapter.outcome]
    assert f"Verdict: {card.adapter.verdict}" in shown
    assert "leaks into its training rows and whether it was made on this base were not" in shown
    assert card.adapter.task["prompt"] == "{text}\nlabel:"
    assert not (plain_peft / "adapters" / "plain" / "card.json").exists()
    assert run("evaluate", "adapters/plain", *given) == 2
    assert "--test rows.csv" in capsys.readouterr().err
    assert run("show", "plain", "--out", str(tmp_path)) == 0
    assert run("evaluate", "adapters/plain", *given, *rows, "--name", "../x") == 2


def test_evaluate_repeats_the_evaluation_of_an_adapter_trained_here(
    trained: tuple[Path, int], tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, code = trained
    copied = Path(shutil.copytree(out, tmp_path / "out"))
    before = Card.read(copied / "spam").adapter
    use_small_suite(monkeypatch)
    files = [f"--{split}={out.parent / split}.csv" for split in ("train", "test")]
    again = run("evaluate", "spam", "--out", str(copied), "--base", str(tiny_base), *files)
    after = Card.read(copied / "spam").adapter
    assert again == code
    assert after.domain_scores == before.domain_scores
    assert not after.trained_elsewhere


def test_evaluate_takes_test_rows_that_came_after_the_training(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The training split its own rows, none for a test set that was given; they stay the same."""
    monkeypatch.chdir(tmp_path)
    use_small_suite(monkeypatch)
    rows = clear_rows(300)
    train, test = write(tmp_path / "train.csv", rows[:240]), write(tmp_path / "new.csv", rows[240:])
    base = ("--base", str(tiny_base))
    assert run("fit", "--name", "own", "--train", train, *base, "--epochs", "1", *FAST) == 0
    trained = Card.read(tmp_path / "adapters" / "own").adapter
    code = run("evaluate", "own", "--test", test, *base)
    entry = Card.read(tmp_path / "adapters" / "own").adapter
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[entry.outcome]
    assert entry.domain_scores["macro_f1"]["n"] == 60
    assert {k: entry.data[k] for k in ("train", "validation")} == {
        k: trained.data[k] for k in ("train", "validation")
    }
    write(tmp_path / "train.csv", rows[1:240])
    assert run("evaluate", "own", "--test", test, *base) == 2
    assert "the train rows of its training" in capsys.readouterr().err
    assert run("evaluate", "own", "--test", "nowhere.csv", *base) == 2


def wrong_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


def test_evaluate_writes_the_wrongly_answered_rows(
    trained: tuple[Path, int], tmp_path: Path, tiny_base: Path, small_suite: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, _ = trained
    copied = Path(shutil.copytree(out, tmp_path / "out"))
    test = wrong_rows(out.parent / "test.csv")
    other = {"ham": "spam", "spam": "ham"}
    turned = [row | {"label": other[row["label"]]} if n < 5 else row for n, row in enumerate(test)]
    train = str(out.parent / "train.csv")
    where = ("--out", str(copied), "--base", str(tiny_base), "--train", train)
    errors = tmp_path / "errors.csv"
    given = ("evaluate", "spam", *where, "--test", write(tmp_path / "test.csv", turned))
    run(*given, "--errors", str(errors), "--quiet")
    shown, wrong = capsys.readouterr().out, wrong_rows(errors)
    assert f"{len(wrong)} of 250 test rows were answered wrongly" in " ".join(shown.split())
    assert "as private as the rows" in " ".join(shown.split())
    assert list(wrong[0]) == [
        *test[0],
        "adapter_answer",
        "right_answer",
        "base_answer",
        "probability",
    ]
    by_text = {row["text"]: row for row in turned}
    for row in wrong:
        assert row["right_answer"] == by_text[row["text"]]["label"] != row["adapter_answer"]
        assert 0.5 <= float(row["probability"]) <= 1
    assert {row["text"] for row in turned[:5]} <= {row["text"] for row in wrong}
    assert [row["probability"] for row in wrong] == sorted(
        (row["probability"] for row in wrong), reverse=True
    )
    assert errors.stat().st_mode & 0o077 == 0
    assert turned[0]["text"] not in (copied / "spam" / "items.jsonl").read_text()
    right = [row for row in turned[5:] if row["text"] not in {one["text"] for one in wrong}]
    all_right = (*given[:-1], write(tmp_path / "right.csv", right))
    run(*all_right, "--errors", str(errors), "--overwrite", "--quiet")
    assert "No test row was answered wrongly" in capsys.readouterr().out
    assert not errors.exists()
    errors.touch()
    assert run(*given, "--errors", str(errors)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(*given, "--errors", str(tmp_path / "errors.parquet")) == 2
    assert "ending in .csv" in capsys.readouterr().err
