"""The command line: flags, exit codes, bad input, and what lies on disk afterwards."""

import argparse
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, make_rows
from support.commands import run, write
from support.general_text import use_general_text
from support.models import SUITE

from lora_domains.cli import commands, recipes
from lora_domains.cli.flags import Parser, add_run_flags, configured
from lora_domains.data.source import Data
from lora_domains.domain import Domain, load_domain
from lora_domains.errors import DomainError, UsageError
from lora_domains.report.card import Card
from lora_domains.tasks import Classification, Generation

RECIPES = sorted((ROOT / "recipes").glob("*.py"))


@pytest.fixture
def small_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_domains.model.embedded", lambda: SUITE)
    use_general_text(monkeypatch)


FAST = ("--lr", "0.01", "--rank", "8")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The deciding word stands at the end: the random base learns that from any of five seeds."""
    rows = make_rows(900)
    for row in rows:
        row["text"] += (" alpha" if row["label"] == "spam" else " beta") * 3
    return rows


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> tuple[Path, int]:
    """An output folder with one adapter, made from CSV files on the command line."""
    folder = tmp_path_factory.mktemp("cli")
    dressed = [
        row | {"ward": "north" if n % 2 else "south", "patient": f"p{n // 2}"}
        for n, row in enumerate(rows)
    ]
    train, test = (write(folder / f"{n}.csv", part)
                   for n, part in (("train", dressed[:650]), ("test", dressed[650:])))  # fmt: skip
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


# ── The main job ────────────────────────────────────────────────────────────────────────────────


def test_own_csv_is_trained_measured_and_its_exit_code_is_the_verdict(
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


def test_what_a_killed_save_left_is_not_listed(
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


def test_ctrl_c_anywhere_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
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


# ── Flags ───────────────────────────────────────────────────────────────────────────────────────

VALUES = {"--epochs": "3", "--lr": "0.002", "--rank": "4", "--seed": "9", "--limit": "30",
          "--target-recall": "0.9", "--target-precision": "0.8"}  # fmt: skip
SETTLED: dict[str, Any] = {"--positive": "spam", "--retention": "none", "--group": "who",
                           "--slice": "ward,sex"}  # fmt: skip


def flags_of_a_run() -> list[argparse.Action]:
    parser = Parser()
    add_run_flags(parser)
    return [action for action in parser._actions if action.dest != "help"]


def what_happens(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the model is asked for: its base, the domain and how it is fitted."""
    asked: dict[str, Any] = {}

    class Asked(Exception):
        pass

    def fit(domain: Domain, **options: Any) -> None:
        asked.update(domain=domain, fit=options)
        raise Asked

    def from_pretrained(path_or_id: Any, **options: Any) -> Any:
        asked.update(base=path_or_id, options={k: v for k, v in options.items() if k != "display"})
        inner = SimpleNamespace(parameters=list)
        loaded = SimpleNamespace(model=inner, id="x", device="cpu", record=lambda: {"dtype": ""},
                                 resident_bytes=lambda: 0)  # fmt: skip
        return SimpleNamespace(base=loaded, fit=fit, display=options["display"])

    monkeypatch.setattr(
        "lora_domains.model.DomainModel", SimpleNamespace(from_pretrained=from_pretrained)
    )
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read([*arguments])
    domain = Domain("spam", Classification(), Data("own.csv"))
    with pytest.raises(Asked):
        recipes.fit_and_evaluate(configured(domain, flags), flags)
    return asked


@pytest.mark.parametrize("action", flags_of_a_run(), ids=lambda a: a.option_strings[0])
def test_every_flag_changes_what_happens(
    action: argparse.Action, monkeypatch: pytest.MonkeyPatch
) -> None:
    flag = action.option_strings[0]
    value = [] if action.nargs == 0 else [VALUES.get(flag, SETTLED.get(flag, "other"))]
    beside = ["--positive", "spam"] if flag.startswith("--target") else []
    assert what_happens(beside, monkeypatch) != what_happens([*beside, flag, *value], monkeypatch)


def test_flags_arrive_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    found = what_happens(
        ["--train", "a.csv", "--test", "b.csv", "--text", "context,question", "--label", "kind",
         "--positive", "yes", "--epochs", "2", "--lr", "0.1", "--rank", "4", "--seed", "7",
         "--group", "who", "--slice", "ward,sex", "--limit", "5", "--drop-leaks",
         "--load-in-4bit", "--out", "there"],
        monkeypatch,
    )  # fmt: skip
    domain: Domain = found["domain"]
    assert domain.data == Data(
        "a.csv", None, "b.csv", group="who", slices=("ward", "sex"), drop_leaks=True, limit=5
    )
    task = domain.task
    assert isinstance(task, Classification)
    assert (task.text, task.label, task.positive) == (("context", "question"), "kind", "yes")
    assert (domain.training.epochs, domain.training.lr, domain.training.seed) == (2, 0.1, 7)
    assert domain.lora.rank == 4
    assert found["options"] == {"quantization": "4bit", "out": "there"}
    assert found["fit"] == {
        "resume": False, "dry_run": False, "init_from": None, "tracker": None
    }  # fmt: skip


@pytest.mark.parametrize("flag", ["--train", "--test", "--validation"])
def test_a_recipe_s_show_text_does_not_hold_for_ones_own_rows(flag: str) -> None:
    parser = Parser()
    add_run_flags(parser)
    recipe = Domain("spam", Classification(), Data.embedded("spam"), show_text=True)
    assert configured(recipe, parser.read([])).show_text
    assert not configured(recipe, parser.read([flag, "own.csv"])).show_text
    assert configured(recipe, parser.read([flag, "own.csv", "--show-text"])).show_text


def test_a_target_replaces_the_recipe_s_and_is_dropped_with_its_class() -> None:
    parser = Parser()
    add_run_flags(parser)
    task = Classification(positive="spam", target_recall=0.9)
    recipe = Domain("spam", task, Data("own.csv"))
    for arguments, targets in (
        ([], {"recall": 0.9}),
        (["--target-precision", "0.8"], {"precision": 0.8}),
        (["--positive", "ham"], {"recall": 0.9}),
        (["--positive", "none"], {}),
    ):
        found = configured(recipe, parser.read(arguments)).task
        assert isinstance(found, Classification)
        assert found.targets == targets, arguments
    with pytest.raises(DomainError, match="a positive class"):
        configured(recipe, parser.read(["--positive", "none", "--target-recall", "0.9"]))


def test_columns_cannot_be_given_to_a_recipe_without_them() -> None:
    parser = Parser()
    add_run_flags(parser)
    recipe = Domain("spam", Generation(), Data("own.csv"))
    with pytest.raises(UsageError, match="a classification recipe"):
        configured(recipe, parser.read(["--label", "kind"]))


WRONG = {
    "unknown flag": (("fit", "--epoch", "3"), "Did you mean '--epochs'"),
    "unknown flag with =": (("fit", "--trian=x"), "Did you mean '--train'"),
    "unknown verb": (("fitt",), "fitt"),
    "no verb": ((), "VERB"),
    "no number": (("fit", "--epochs", "many"), "invalid int value"),
    "nothing to fit": (("fit", "--name", "x"), "no --train"),
    "both": (("fit", "--name", "x", "--train", "t.csv", "--load-in-8bit", "--load-in-4bit"),
             "one of --load-in-8bit and --load-in-4bit"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "said"), WRONG.values(), ids=WRONG)
def test_wrong_usage_is_2_and_says_what_was_meant(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


# ── Bad input ───────────────────────────────────────────────────────────────────────────────────

GOOD = make_rows(40)


def text(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def table(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Any:
    def made(path: Path) -> str:
        return write(path, change([dict(row) for row in GOOD]))

    return made


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
        "t.csv", table(lambda rows: [{"body": r["text"], "label": r["label"]} for r in rows]),
        ("t.csv", "the column 'text'", "body"),
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
        "t.csv", lambda path: text(path, RAGGED.encode() + b"caf\xe9,ham\n"),
        ("t.csv, line 42", "UTF-8"),
    ),
    "label longer than the context": (
        "t.csv", table(lambda rows: [r | {"label": r["label"] * 150} for r in rows]),
        ("t.csv, line ", ", column 'label'", "context of 128 tokens"),
    ),
    "labels that are prefixes": (
        "t.csv",
        table(lambda rows: [
            r | {"label": "spam call" if n % 3 else r["label"]} for n, r in enumerate(rows)
        ]),
        ("t.csv, column 'label'", "'spam'", "'spam call'"),
    ),
    "two rows": ("t.csv", table(lambda rows: rows[:2]), ("t.csv", "at least 8 training rows")),
}  # fmt: skip


@pytest.mark.parametrize(("name", "make", "said"), BAD.values(), ids=BAD)
def test_bad_rows_are_refused_with_their_place_and_nothing_is_written(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], name: str,
    make: Callable[[Path], str], said: tuple[str, ...],
) -> None:  # fmt: skip
    path = make(tmp_path / name)
    out = tmp_path / "out"
    assert run("fit", "--name", "x", "--train", path, "--base", str(tiny_base),
               "--out", str(out)) == 2  # fmt: skip
    error = capsys.readouterr().err
    for part in said:
        assert part in error, error
    assert not out.exists()


def test_a_test_label_that_training_does_not_know(
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


def test_a_leak_stops_the_run_unless_it_is_dropped(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], small_suite: None
) -> None:
    train, test = write(tmp_path / "train.csv", GOOD), write(tmp_path / "test.csv", GOOD[:6])
    run_it = ("fit", "--name", "x", "--train", train, "--test", test, "--base", str(tiny_base),
              "--out", str(tmp_path / "out"), "--epochs", "1", *FAST)  # fmt: skip
    assert run(*run_it) == 2
    assert "train.csv, line 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run(*run_it, "--drop-leaks") in (0, 1, 3)
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


@pytest.mark.parametrize(("make", "said"), BASES.values(), ids=BASES)
def test_a_base_that_cannot_be_used(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Path], str], said: str,
) -> None:  # fmt: skip
    train = write(tmp_path / "train.csv", GOOD)
    base = make(tmp_path / "base", tiny_base)
    assert run("fit", "--name", "x", "--train", train, "--base", base,
               "--out", str(tmp_path / "out")) == 2  # fmt: skip
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/tmp/x", "a.b", ""])
def test_names_that_are_no_folder_of_their_own(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", GOOD)
    before = sorted(tmp_path.rglob("*"))
    assert run("fit", "--name", name, "--train", train, "--out", str(tmp_path / "out")) == 2
    assert "Error" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing_half_written(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import errno

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


# ── Samples, dry runs, recipes ──────────────────────────────────────────────────────────────────


def test_a_dry_run_plans_and_writes_nothing(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.csv", GOOD)
    before = sorted(tmp_path.rglob("*"))
    assert run("fit", "--name", "x", "--train", train, "--base", str(tiny_base), "--dry-run",
               "--out", str(tmp_path / "out"), "--limit", "20") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "nothing was trained or written" in said
    assert "at most 20 of each split" in said
    assert "learning rate" in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_loads(recipe: Path) -> None:
    assert len(recipe.read_text().splitlines()) < 60
    domain = load_domain(recipe)
    assert domain.name == recipe.stem
    assert isinstance(domain.task, Classification)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_with_few_rows(
    recipe: Path, tmp_path: Path, tiny_base: Path, small_suite: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["--base", str(tiny_base), "--out", str(tmp_path), "--limit", "60",
                 "--epochs", "1"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(recipe), *arguments])
    runpy.run_path(str(recipe), run_name="__main__")  # exits 0 whatever the verdict
    entry = Card.read(tmp_path / recipe.stem).adapter
    assert entry.verdict in ("pass", "fail", "inconclusive")
    said = capsys.readouterr().out
    for part in ("base loaded", "read", "ledger", "epoch", "fine-tuned", "evaluated", "Verdict"):
        assert part in said


def test_recipes_refuse_unknown_flags_and_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"embedded": Domain("spam", Classification(), Data("x.csv"))}
    for arguments, said in ((["--epoch", "1"], "'--epochs'"), (["--source", "hubb"], "hubb")):
        with pytest.raises(SystemExit) as left:
            recipes.run_recipe(sources, arguments)
        assert left.value.code == 2
        assert said in capsys.readouterr().err


# ── Without a terminal, without torch ───────────────────────────────────────────────────────────


@pytest.mark.slow
def test_without_a_terminal_the_lines_are_plain(tmp_path: Path, tiny_base: Path) -> None:
    train = write(tmp_path / "train.csv", make_rows(60))
    done = subprocess.run(
        [sys.executable, "-m", "lora_domains.cli", "fit", "--name", "x", "--train", train,
         "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--epochs", "1"],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr
    for stream in (done.stdout, done.stderr):
        assert "\x1b" not in stream
        assert "\r" not in stream
        assert "it/s" not in stream
    assert "Verdict:" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.slow
def test_reading_costs_no_torch(trained: tuple[Path, int]) -> None:
    out = str(trained[0])
    code = f"""
import sys
from pathlib import Path
from lora_domains.cli import main as cli
from lora_domains.report.report import rebuild
HEAVY = {{"torch", "transformers", "peft", "accelerate", "evaluate", "datasets"}}
for arguments in (["--help"], ["fit", "--help"], ["--version"], ["list", "--out", {out!r}],
                  ["show", "spam", "--out", {out!r}],
                  ["show", "spam", "--out", {out!r}, "--rebuild"]):
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
