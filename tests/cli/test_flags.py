"""Flags: each is used, and what they make of a domain."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_domains.cli import recipes
from lora_domains.cli.flags import Parser, add_run_flags, configured, domain_name
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.errors import DomainError, UsageError
from lora_domains.tasks import Classification, Generation

VALUES = {"--epochs": "3", "--lr": "0.002", "--rank": "4", "--seed": "9", "--limit": "30",
          "--target-recall": "0.9", "--target-precision": "0.8", "--max-length": "64",
          "--delimiter": "tab", "--prevalence": "0.05"}  # fmt: skip
OTHER_VALUES: dict[str, Any] = {"--positive": "spam", "--retention": "none", "--group": "who",
                           "--slice": "ward,sex", "--metric": "mcc"}  # fmt: skip


def flags_of_a_run() -> list[argparse.Action]:
    parser = Parser()
    add_run_flags(parser)
    return [action for action in parser._actions if action.dest != "help"]


def calls_made(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The calls that these flags make: the base to load, the domain, and the options of fit."""
    calls: dict[str, Any] = {}

    class Called(Exception):
        pass

    def fit(domain: Domain, **options: Any) -> Any:
        calls.update(domain=domain, fit=options)
        return SimpleNamespace()

    def scored(rows: str) -> Any:
        def called(*_: Any) -> None:
            calls["scored"] = rows
            raise Called

        return called

    def from_pretrained(path_or_id: Any, **options: Any) -> Any:
        calls.update(base=path_or_id, options={k: v for k, v in options.items() if k != "display"})
        inner = SimpleNamespace(parameters=list)
        loaded = SimpleNamespace(model=inner, id="x", device="cpu", record=lambda: {"dtype": ""},
                                 resident_bytes=lambda: 0)  # fmt: skip
        evaluate = scored("test")
        return SimpleNamespace(base=loaded, fit=fit, evaluate=evaluate, display=options["display"])

    monkeypatch.setattr(recipes, "show_validation", scored("validation"))

    monkeypatch.setattr(
        "lora_domains.model.DomainModel", SimpleNamespace(from_pretrained=from_pretrained)
    )
    monkeypatch.setattr(recipes, "prepare", lambda *_: None)
    monkeypatch.setattr(recipes, "general_text", lambda *_: None)
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read([*arguments])
    domain = Domain("spam", Classification(), Data("own.csv"))
    with pytest.raises(Called):
        recipes.fit_and_evaluate(configured(domain, flags), flags)
    return calls


@pytest.mark.parametrize("action", flags_of_a_run(), ids=lambda a: a.option_strings[0])
def test_every_flag_has_an_effect(action: argparse.Action, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = action.option_strings[0]
    value = [] if action.nargs == 0 else [VALUES.get(flag, OTHER_VALUES.get(flag, "other"))]
    beside = ["--positive", "spam"] if flag.startswith(("--target", "--prevalence")) else []
    assert calls_made(beside, monkeypatch) != calls_made([*beside, flag, *value], monkeypatch)


def test_flags_set_domain_and_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_made(
        ["--train", "a.csv", "--test", "b.csv", "--text", "context,question", "--label", "kind",
         "--positive", "yes", "--epochs", "2", "--lr", "0.1", "--rank", "4", "--seed", "7",
         "--group", "who", "--slice", "ward,sex", "--limit", "5", "--drop-leaks",
         "--load-in-4bit", "--out", "there"],
        monkeypatch,
    )  # fmt: skip
    domain: Domain = calls["domain"]
    assert domain.data == Data(
        "a.csv", None, "b.csv", group="who", slices=("ward", "sex"), drop_leaks=True, limit=5
    )
    task = domain.task
    assert isinstance(task, Classification)
    assert (task.text, task.label, task.positive) == (("context", "question"), "kind", "yes")
    assert (domain.training.epochs, domain.training.lr, domain.training.seed) == (2, 0.1, 7)
    assert domain.lora.rank == 4
    assert calls["options"] == {"quantization": "4bit", "out": "there"}
    assert calls["fit"] == {
        "resume": False, "dry_run": False, "init_from": None, "tracker": None,
        "prepared": None,
    }  # fmt: skip


@pytest.mark.parametrize("flag", ["--train", "--test", "--validation"])
def test_show_text_of_a_recipe_does_not_apply_to_other_rows(flag: str) -> None:
    parser = Parser()
    add_run_flags(parser)
    recipe = Domain("spam", Classification(), Data.embedded("spam"), show_text=True)
    assert configured(recipe, parser.read([])).show_text
    assert not configured(recipe, parser.read([flag, "own.csv"])).show_text
    assert configured(recipe, parser.read([flag, "own.csv", "--show-text"])).show_text


def test_a_target_replaces_that_of_the_recipe() -> None:
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


def test_prevalence_needs_a_positive_class() -> None:
    parser = Parser()
    add_run_flags(parser)
    recipe = Domain("spam", Classification(positive="spam"), Data("own.csv"), prevalence=0.1)
    assert configured(recipe, parser.read([])).prevalence == 0.1
    assert configured(recipe, parser.read(["--prevalence", "0.05"])).prevalence == 0.05
    for wrong in (["--prevalence", "1"], ["--positive", "none"]):
        with pytest.raises(DomainError, match="of a task with a positive class"):
            configured(recipe, parser.read(wrong))


def test_a_metric_may_need_another_flag() -> None:
    parser = Parser()
    add_run_flags(parser)
    domain = Domain("spam", Classification(), Data("own.csv"))
    declared = configured(domain, parser.read(["--metric", "f1", "--positive", "spam"]))
    assert declared.primary_metric == "f1"
    assert configured(declared, parser.read(["--positive", "none", "--metric", "mcc"])).metric
    with pytest.raises(DomainError, match="Name the positive class"):
        configured(domain, parser.read(["--metric", "f1"]))


def test_a_task_without_a_label_column_takes_none() -> None:
    parser = Parser()
    add_run_flags(parser)
    recipe = Domain("spam", Generation(), Data("own.csv"))
    with pytest.raises(UsageError, match="a classification recipe"):
        configured(recipe, parser.read(["--label", "kind"]))


@pytest.mark.parametrize(
    ("file", "name"), [("mails.csv", "mails"), ("a b.v2.jsonl", "a-b-v2"), ("__.csv", "rows")]
)
def test_a_domain_is_named_after_its_file(file: str, name: str) -> None:
    assert domain_name(Path("folder") / file) == name


def test_the_flag_for_a_head() -> None:
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read(["--head", "--label", "kind"])
    headed = configured(Domain("x", Classification(), Data([])), flags)
    assert headed.task == Classification(label="kind", head=True)
    assert configured(headed, parser.read([])).task == headed.task  # a recipe's own stays
    with pytest.raises(UsageError, match="--head"):
        configured(Domain("x", Generation(), Data([])), parser.read(["--head"]))
    assert headed.digest() != replace(headed, task=Classification(label="kind")).digest()


def test_a_column_s_name_may_have_a_comma(tmp_path: Path) -> None:
    parser = Parser()
    add_run_flags(parser)
    path = tmp_path / "t.csv"
    path.write_text('"Comment, if any",title,label\na,b,c\n', encoding="utf-8")
    domain = Domain("spam", Classification(), Data(path))
    for given, columns in (
        ("Comment, if any", ("Comment, if any",)),
        ("Comment, if any,title", ("Comment, if any", "title")),
        ("title,Comment, if any", ("title", "Comment, if any")),
        ("title, label", ("title", "label")),
    ):
        task = configured(domain, parser.read(["--text", given])).task
        assert isinstance(task, Classification)
        assert task.text == columns


def test_a_delimiter_is_one_character() -> None:
    parser = Parser()
    add_run_flags(parser)
    domain = Domain("spam", Classification(), Data("own.csv"))
    assert configured(domain, parser.read(["--delimiter", "tab"])).data.delimiter == "\t"
    with pytest.raises(UsageError, match="one character"):
        configured(domain, parser.read(["--delimiter", "::"]))
