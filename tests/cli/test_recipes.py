"""Recipes are short, load without running, and run with few rows."""

import runpy
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT
from support.encoders import make_sentence_encoder

from lora_domains.analysis.compare import compare_seeds
from lora_domains.cli import recipes
from lora_domains.console import Display
from lora_domains.data.identity import FOLDER
from lora_domains.data.source import Data
from lora_domains.domain import Domain, load_domain
from lora_domains.model import DomainModel
from lora_domains.report.card import Card
from lora_domains.tasks import Classification
from lora_domains.verdict.ledger import LEDGER

RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if path.stem != "all")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_loads(recipe: Path) -> None:
    assert len(recipe.read_text().splitlines()) < 60
    domain = load_domain(recipe)
    assert domain.name == recipe.stem
    assert isinstance(domain.task, Classification)


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES[:2], *(pytest.param(path, marks=pytest.mark.long) for path in RECIPES[2:])],
    ids=lambda path: path.stem,
)
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
    output = capsys.readouterr().out
    for part in ("base loaded", "row counts", "epoch", "fine-tuned", "evaluated", "Verdict"):
        assert part in output


def test_a_recipe_leaves_its_test_rows_alone_on_request(
    tmp_path: Path, tiny_base: Path, small_suite: None, project: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ["--base", str(tiny_base), "--out", str(tmp_path), "--limit", "60",
                 "--epochs", "1", "--no-evaluate"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", [str(RECIPES[0]), *arguments])
    runpy.run_path(str(RECIPES[0]), run_name="__main__")
    assert Card.read(tmp_path / RECIPES[0].stem).adapter.verdict is None
    assert "validation rows, which chose the epoch: no verdict" in capsys.readouterr().out
    assert not (project / FOLDER / LEDGER).exists()
    # Its scores on validation rows are stored, to compare seeds on.
    folder = tmp_path / RECIPES[0].stem
    rows, variances = compare_seeds([folder, folder])
    assert (rows, variances["accuracy"]["sd_seed"]) == ("validation", 0)


def test_the_help_of_a_recipe_shows_an_example(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes/spam.py"])
    with pytest.raises(SystemExit):
        recipes.run_recipe({"embedded": Domain("spam", Classification(), Data("x.csv"))}, ["-h"])
    *_, heading, command = capsys.readouterr().out.splitlines()
    assert (heading, command.split()[:2]) == ("example:", ["python", "recipes/spam.py"])


def test_recipes_refuse_unknown_flags_and_sources(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = {"embedded": Domain("spam", Classification(), Data("x.csv"))}
    for arguments, expected in (
        (["--epoch", "1"], "'--epochs'"),
        (["--source", "hubb"], "hubb"),
        (["--set", "training.wramup=1"], "'training.warmup'"),
        (["--set", "training.warmup=1"], "setting 'warmup'"),
    ):
        with pytest.raises(SystemExit) as left:
            recipes.run_recipe(sources, arguments)
        assert left.value.code == 2
        assert expected in capsys.readouterr().err


def test_questions_for_an_encoder_cause_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(make_sentence_encoder(tmp_path / "e"), display=Display())
    for asked, warned in ((("quick", None), True), (("auto", 9), True), (("auto", None), False)):
        flags = Namespace(suite=asked[0], questions=asked[1])
        recipes.suite_of(flags, model, recipes.named_suite(flags))
        shown = capsys.readouterr()
        words = " ".join((shown.out + shown.err).split())
        assert ("an encoder answers no general questions" in words) == warned
        model.display.stage("next", None, None, "")  # warnings are repeated after a stage
        capsys.readouterr()
