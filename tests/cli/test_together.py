"""Several recipes at once: `fit recipes/*.py`, and a recipe of several domains."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support.commands import run
from support.models import fixed, patched_runs

from lora_domains.report.card import Card

RECIPES = ROOT / "recipes"
FEW = ("--limit", "60", "--max-steps", "3")


def test_recipes_are_trained_together_and_evaluated(
    tmp_path: Path, tiny_base: Path, small_suite: None, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run("fit", str(RECIPES / "medical.py"), str(RECIPES / "spam.py"), "--base",
               str(tiny_base), "--out", str(tmp_path), "--together", "2", *FEW)  # fmt: skip
    out = capsys.readouterr().out
    assert "2 in one pass, as asked" in out
    assert out.count("Verdict") >= 2
    verdicts = [Card.read(tmp_path / name).adapter.verdict for name in ("medical", "spam")]
    assert code == (1 if "fail" in verdicts else 3)
    assert Card.read(tmp_path / "spam").adapter.training["together_with"] == ["medical"]


@pytest.mark.long
def test_the_recipe_of_all_domains_trains_five(
    tmp_path: Path, tiny_base: Path, small_suite: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["--base", str(tiny_base), "--out", str(tmp_path), "--no-evaluate", *FEW]
    monkeypatch.setattr(sys, "argv", [str(RECIPES / "all.py"), *arguments])
    runpy.run_path(str(RECIPES / "all.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("has no verdict") == 5
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {
        "finance", "legal", "medical", "spam", "support",
    }  # fmt: skip


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param(sorted(map(str, RECIPES.glob("*.py"))), id="recipes/*.py"),
        pytest.param([str(RECIPES / "all.py")], id="recipes/all.py"),
    ],
)
def test_a_recipe_of_several_domains_is_fitted_with_others_and_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, paths: list[str]
) -> None:
    fitted: list[str] = []
    monkeypatch.setattr(
        "lora_domains.cli.verbs.fit.fit_and_evaluate_all",
        lambda domains, _: fitted.extend(one.name for one in domains) or [],
    )
    assert run("fit", *paths, "--dry-run", "--limit", "40", "--out", str(tmp_path)) == 0
    assert sorted(fitted) == ["finance", "legal", "medical", "spam", "support"]


@pytest.mark.slow
def test_the_domains_that_were_trained_are_judged_where_the_loss_of_one_exploded(
    tmp_path: Path, tiny_base: Path, small_suite: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    patched_runs(monkeypatch, medical=fixed(float("nan")))
    code = run("fit", str(RECIPES / "medical.py"), str(RECIPES / "spam.py"), "--base",
               str(tiny_base), "--out", str(tmp_path), "--no-evaluate", "--limit", "40",
               "--max-steps", "1", "--retention", "none")  # fmt: skip
    out, error = capsys.readouterr()
    assert code == 2
    assert "spam has no verdict" in " ".join(out.split())
    assert "medical has no verdict" not in " ".join(out.split())
    assert "medical, epoch 1" in error


def test_one_after_another_on_request(
    tmp_path: Path, tiny_base: Path, small_suite: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", str(RECIPES / "medical.py"), str(RECIPES / "spam.py"), "--base", str(tiny_base),
        "--out", str(tmp_path), "--no-evaluate", "--together", "1", *FEW)  # fmt: skip
    assert "one after another, as asked" in capsys.readouterr().out
    assert "together_with" not in Card.read(tmp_path / "spam").adapter.training


TWO = ["recipes/medical.py", "recipes/spam.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipes/medical.py", "rows.csv"], "recipes only, files ending in .py"),
        ([*TWO, "--name", "other"], "--name expected flags for all recipes"),
        ([*TWO, "--train", "rows.csv"], "--train expected flags for all"),
        ([*TWO, "--seeds", "3"], "--seeds expected flags for all"),
        ([*TWO, "--sweep", "rank=2,4"], "--sweep expected flags for all"),
        ([*TWO, "--together", "0"], "--together expected at least 1"),
        (["recipes/medical.py", "--task", "number"], "--task expected flags for all"),
        (["recipes/medical.py", "--limit", "60", "--init-from", "nobody"], "found none there"),
        (["one.csv", "two.csv"], "found 2 files"),
        (["recipes/none.py"], "no such file"),
    ],
)
def test_what_does_not_go_together_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    (tmp_path / "recipes").mkdir()
    for recipe in TWO:
        shutil.copy(RECIPES.parent / recipe, tmp_path / "recipes")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "lora_domains.cli.verbs.fit.open_model", lambda *_, **__: pytest.fail("loaded")
    )
    assert run("fit", *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


# ── The base of a recipe ──────────────────────────────────────────────────────────────────────────


def written(folder: Path, name: str, call: str) -> str:
    """A recipe of that name that ends in ``call``."""
    text = (RECIPES / "spam.py").read_text(encoding="utf-8")
    text = text.replace('name="spam"', f'name="{name}"').replace("run_recipe({", "_({")
    (folder / f"{name}.py").write_text(f'{text}\n\nif __name__ == "__main__":\n    {call}\n')
    return str(folder / f"{name}.py")


@pytest.mark.parametrize("verb", ["fit", "cross-validate", "learning-curve"])
def test_a_recipe_is_run_on_the_base_that_it_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    call = f'lora_domains.run_recipe({{"own": domain}}, base="{tmp_path / "own-base"}")'
    assert run(verb, written(tmp_path, "one", call)) == 2
    assert "own-base" in "".join(capsys.readouterr().err.split())


def test_bases_of_recipes_that_differ_or_are_computed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = written(tmp_path, "one", 'run_recipe({"own": domain}, base="a/b")')
    second = written(tmp_path, "two", 'run_recipe({"own": domain})')
    assert run("fit", first, second) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "recipes on one base" in message
    assert "a/b in" in message
    assert "none in" in message
    computed = written(tmp_path, "three", 'run_recipe({"own": domain}, base=chosen())')
    assert run("fit", computed) == 2
    assert "found chosen()" in " ".join(capsys.readouterr().err.split())
