"""The command: help at 80 columns, wrong usage, and plain output without a terminal."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, make_rows
from support.commands import run, write

VERBS = {
    "everyday": ["init", "fit", "evaluate", "predict", "list", "show", "report"],
    "more": ["benchmark", "compare", "rollback", "export", "chat", "serve", "playground", "push",
             "doctor"],
    "analysis": ["trace", "curve", "learning-curve", "cross-validate"],
}  # fmt: skip
ALL_VERBS = [verb for group in VERBS.values() for verb in group]
GROUPS = {"input", "training", "evaluation", "output", "options", "example"}


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(*arguments, "--help") == 0
    return capsys.readouterr().out


def test_the_declared_command_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"]["lora-domains"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_help_lists_every_verb_in_its_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys)
    groups = {part.split(":")[0]: re.findall(r"^  ([a-z-]+)  ", part, re.MULTILINE)
              for part in text.split("\n\n")}  # fmt: skip
    assert {group: groups[group] for group in VERBS} == VERBS
    assert max(map(len, text.splitlines())) < 80


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_the_help_of_a_verb(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A description that says what is written, flags in groups, an example; 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(capsys, verb)
    assert max(map(len, text.splitlines())) < 80
    assert not re.search(r"\d\n +(%|GB|MB)", text)
    assert "write" in text.split("options:")[0].lower()
    assert set(re.findall(r"^(\w+):$", text, re.MULTILINE)) <= GROUPS
    assert f"example:\n  lora-domains {verb} ".rstrip() in text
    options = text.split("options:\n")[1].split("\n\n")[0]
    assert options.strip().splitlines()[0].startswith("-h, --help")
    assert "--" not in options.replace("--help", "")


@pytest.mark.parametrize(("verb", "argument"), [("fit", "FILE"), ("export", "--out [A-Z]+")])
def test_what_is_required_is_marked(
    verb: str, argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = " ".join(help_of(capsys, verb).split())
    assert re.search(rf" {argument} [^-]*\(required\)", text)


def test_the_help_breaks_no_name_at_a_hyphen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns in ("60", "70", "80"):
        monkeypatch.setenv("COLUMNS", columns)
        for verb in ("export", "benchmark", "fit"):
            lines = help_of(capsys, verb).splitlines()
            assert not [line for line in lines if line.endswith("-")]


WRONG = {
    "unknown flag": (("fit", "--epoch", "3"), "Did you mean '--epochs'"),
    "unknown flag with =": (("fit", "--trian=x"), "Did you mean '--train'"),
    "unknown flag before a missing one": (("export", "x", "--ou", "d"), "Did you mean '--out'"),
    "unknown flag of no verb": (("--verison",), "Did you mean '--version'"),
    "unknown setting": (("fit", "--name", "x", "--train", "t.csv", "--set", "training.warm=1"),
                        "Did you mean 'training.warmup'"),
    "a flag of other tools": (("fit", "--learning_rate", "1e-4"), "Did you mean '--lr'?"),
    "flags of other tools": (
        ("fit", "a.json", "--cutoff_len=512", "--lora_alpha", "8", "--stage", "sft"),
        "Did you mean '--max-length' for '--cutoff_len', '--set lora.alpha=…' for '--lora_alpha'? "
        "Adapters are LoRA; what is learned follows from the columns of the rows, or from --task."),
    "flags of other tools that need none": (
        ("fit", "a.json", "--bf16", "--fp16", "--val_size", "0.1", "--nonsense"),
        "A base is read in float32 on a CPU and in bfloat16 elsewhere; --load-in-8bit and "
        "--load-in-4bit take less memory. Without --validation and --test, rows of --train are "
        "held out for them. See lora-domains fit --help."),
    "a flag with underscores": (("fit", "--load_in_4bit"), "Did you mean '--load-in-4bit'?"),
    "a setting of other tools": (
        ("fit", "--name", "x", "--train", "t.csv", "--set", "training.learning_rate=1"),
        "Did you mean 'training.lr'?"),
    "a verb of other tools": (("train", "x.csv"), "Did you mean 'fit'?"),
    "a verb of Ludwig": (("experiment", "--config", "x.yaml"), "Did you mean 'fit'?"),
    "another tool": (("lm_eval", "--tasks", "mmlu"), "Did you mean 'benchmark'?"),
    "unknown verb": (("fitt", "--epochs", "3"), "Did you mean 'fit'"),
    "an argument too many": (("doctor", "now"), "See lora-domains doctor --help."),
    "a folder too many": (
        ("list", "."), "For the adapters in that folder: lora-domains list --out ."),
    "no verb": ((), "VERB"),
    "no number": (("fit", "--epochs", "many"), "invalid int value"),
    "no such choice": (("fit", "t.csv", "--retention", "kll"), "Did you mean 'kl'"),
    "no such kind": (("fit", "t.csv", "--task", "klassification"), "lora-domains fit --task"),
    "nothing to fit": (("fit", "--name", "x"), "no --train"),
    "both": (("fit", "--name", "x", "--train", "t.csv", "--load-in-8bit", "--load-in-4bit"),
             "one of --load-in-8bit and --load-in-4bit"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ALL_VERBS)
def test_an_unknown_flag_of_any_verb_is_suggested(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verb, "--hepl") == 2
    assert "Did you mean '--help'" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "learning-curve", "cross-validate"])
def test_the_help_names_the_settings(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, verb)
    assert all(name in text for name in ("--set NAME=VALUE", "training.patience", "lora.dropout"))


@pytest.mark.parametrize(("arguments", "expected"), WRONG.values(), ids=WRONG)
def test_wrong_usage_exits_with_2_and_a_hint(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_without_a_terminal_the_lines_are_plain(tmp_path: Path, tiny_base: Path) -> None:
    train = write(tmp_path / "train.csv", make_rows(60))
    general = write(tmp_path / "general.csv", make_rows(40, seed=1))
    done = subprocess.run(
        [sys.executable, "-m", "lora_domains.cli.main", "fit", "--name", "x", "--train", train,
         "--general", general, "--base", str(tiny_base), "--out", str(tmp_path / "out"),
         "--epochs", "1"],
        capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1, 3), done.stderr
    for stream in (done.stdout, done.stderr):
        assert "\x1b" not in stream
        assert "\r" not in stream
        assert "it/s" not in stream
    assert "no verdict" in done.stdout
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_terminal_cannot_show_is_substituted(encoding: str) -> None:
    code = "import sys; from lora_domains.cli.parser import guarded; " \
           "sys.exit(guarded(lambda: print('0.1 → 0.2') or 0))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False,
                          env={**os.environ, "PYTHONIOENCODING": encoding})  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, b"0.1 ? 0.2"), done.stderr


def test_a_base_is_shared_out_only_where_all_processes_make_the_same_calls(
    capsys: pytest.CaptureFixture[str],
) -> None:
    offering = set()
    for verb in ALL_VERBS:
        run(verb, "--help")
        if "--shard-base" in capsys.readouterr().out:
            offering.add(verb)
    assert offering >= {"fit", "evaluate", "benchmark", "learning-curve"}
    assert not offering & {"serve", "chat", "playground", "trace", "predict", "export"}


def test_help_offers_to_find_a_base_only_where_an_adapter_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    offering = set()
    for verb in ALL_VERBS:
        run(verb, "--help")
        if "or auto: the" in " ".join(capsys.readouterr().out.split()):
            offering.add(verb)
    assert offering == {"init", "fit", "learning-curve", "cross-validate"}


def test_a_verb_that_loads_a_base_can_be_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {verb: help_of(capsys, verb) for verb in ALL_VERBS}
    loading = {verb for verb, text in texts.items() if "--base PATH" in text}
    assert {"predict", "trace", "serve", "playground", "chat", "curve"} <= loading
    assert loading - {"init"} <= {verb for verb, text in texts.items() if "--quiet" in text}
