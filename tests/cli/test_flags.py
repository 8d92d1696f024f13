"""Flags: each is used, and what they make of a domain."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from lora_domains.atomic import check_name
from lora_domains.cli import recipes
from lora_domains.cli.flags import add_run_flags, configured, domain_name
from lora_domains.cli.parser import Parser
from lora_domains.data.source import Data
from lora_domains.domain import Domain, as_record, setting_types, with_settings
from lora_domains.errors import DomainError, UsageError
from lora_domains.probes.suite import Suite
from lora_domains.schema import SETTINGS
from lora_domains.tasks import (
    Chat,
    Classification,
    Generation,
    LanguageModelling,
    MultiLabel,
    MultipleChoice,
    Number,
    Preference,
    Task,
)

VALUES = {"--epochs": "3", "--lr": "0.002", "--rank": "4", "--seed": "9", "--limit": "30",
          "--target-recall": "0.9", "--target-precision": "0.8", "--max-length": "64",
          "--delimiter": "tab", "--prevalence": "0.05", "--judge-range": "1,10",
          "--judge-timeout": "5", "--max-steps": "50", "--questions": "30", "--seeds": "3",
          "--together": "2"}  # fmt: skip
OTHER_VALUES: dict[str, Any] = {"--positive": "spam", "--retention": "none", "--group": "who",
                           "--slice": "ward,sex", "--metric": "mcc",
                           "--set": "training.warmup=0.5", "--floor": "spam=0.5",
                           "--decimal": ",", "--balance": "weights",
                           "--sweep": "rank=2,4"}  # fmt: skip
OF_KIND: dict[str, Task] = {"--separator": MultiLabel(), "--tune-thresholds": MultiLabel(head=True),
                            "--decimal": Number(), "--generate": Chat(),
                            "--judge": Chat()}  # fmt: skip
"""Flags of some kinds of task only."""


SPAM = Classification()

DEFAULT = Suite("default", ())
"""What a base is asked."""


def flags_of_a_run() -> list[argparse.Action]:
    parser = Parser()
    add_run_flags(parser)
    return [action for action in parser._actions if action.dest != "help"]


def calls_made(
    arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, task: Task = SPAM
) -> dict[str, Any]:
    """The calls that these flags make: the base to load, the domain, and the options of fit."""
    calls: dict[str, Any] = {}

    class Called(Exception):
        pass

    def fit(domain: Domain, **options: Any) -> Any:
        calls.update(domain=domain, fit=options)
        return SimpleNamespace()

    def scored(rows: str) -> Any:
        def called(*_: Any, **options: Any) -> None:
            calls["scored"] = rows, options
            raise Called

        return called

    def from_pretrained(path_or_id: Any, **options: Any) -> Any:
        calls.update(base=path_or_id, options={k: v for k, v in options.items() if k != "display"})
        calls["brief"] = options["display"].brief
        inner = SimpleNamespace(parameters=list)
        loaded = SimpleNamespace(model=inner, id="x", device="cpu", record=lambda: {"dtype": ""},
                                 checkpoint=SimpleNamespace(source="x"), revision=None,
                                 resident_bytes=lambda: 0, bidirectional=False)  # fmt: skip
        evaluate = scored("test")
        return SimpleNamespace(base=loaded, fit=fit, evaluate=evaluate, display=options["display"])

    suites = "lora_domains.probes.suite"
    monkeypatch.setattr(f"{suites}.default_suite", lambda *_: DEFAULT)
    monkeypatch.setattr(f"{suites}.load_suite", lambda name, most, _: Suite(name, (), limit=most))
    monkeypatch.setattr(recipes, "show_validation", scored("validation"))

    monkeypatch.setattr(
        "lora_domains.model.DomainModel", SimpleNamespace(from_pretrained=from_pretrained)
    )
    monkeypatch.setattr(recipes, "prepare", lambda *_: None)
    monkeypatch.setattr(recipes, "find_adapter", lambda path, _: Path(path))
    monkeypatch.setattr(recipes, "general_text", lambda *_: None)
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read([*arguments])
    monkeypatch.setattr(Domain, "check_judge", lambda _: None)
    domain = Domain("spam", task, Data("own.csv"))
    evaluated = flags.evaluate is not False
    with pytest.raises(Called):
        recipes.fit_and_evaluate(configured(domain, flags), flags, evaluated=evaluated)
    return calls


@pytest.mark.parametrize("action", flags_of_a_run(), ids=lambda a: a.option_strings[0])
def test_every_flag_has_an_effect(action: argparse.Action, monkeypatch: pytest.MonkeyPatch) -> None:
    flag = action.option_strings[0]
    value = [] if action.nargs == 0 else [VALUES.get(flag, OTHER_VALUES.get(flag, "other"))]
    beside = ["--positive", "spam"] if flag.startswith(("--target", "--prevalence")) else []
    beside += ["--judge", "python judge.py"] if flag.startswith("--judge-") else []
    beside += ["--no-evaluate"] if flag == "--evaluate" else []
    task = OF_KIND.get(flag, SPAM)
    before, after = (calls_made(w, monkeypatch, task) for w in (beside, [*beside, flag, *value]))
    assert before != after


@pytest.mark.parametrize(("flags", "message"), [
    (["--judge-range", "1,10"], "expected a program that judges; found none"),
    (["--judge", "x", "--judge-range", "1"], "two numbers, the worst and the best score; found '1"),
    (["--judge", "x", "--judge-range", "5,5"], "found 5,5"),
    (["--judge", "x", "--judge-range", "-1,-5"], "found -1,-5"),
    (["--judge", ""], "judge, command: expected a command"),
])  # fmt: skip
def test_a_judge_that_cannot_be_meant_is_refused(flags: list[str], message: str) -> None:
    parser = Parser()
    add_run_flags(parser)
    with pytest.raises((UsageError, DomainError), match=message):
        configured(Domain("own", Generation(), Data("own.csv")), parser.read(flags))


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
        "prepared": None, "no_evaluate": False, "suite": DEFAULT, "together": None,
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
    recipe = Domain("spam", LanguageModelling(), Data("own.csv"))
    with pytest.raises(UsageError, match="a setting of a language modelling task; found 'label'"):
        configured(recipe, parser.read(["--label", "kind"]))


def test_columns_and_templates_of_other_tasks() -> None:
    parser = Parser()
    add_run_flags(parser)
    domain = Domain("answers", Generation(prompt="{question}:"), Data("own.csv"))
    flags = ["--text", "context,question", "--label", "reply", "--no-chat"]
    task = configured(domain, parser.read(flags)).task
    assert task == Generation(text=("context", "question"), answer="reply", chat=False)
    chosen = parser.read(["--chat", "--instruction", "Which?"])
    choice = configured(replace(domain, task=MultipleChoice()), chosen).task
    assert choice == MultipleChoice(chat=True, instruction="Which?")
    labels = configured(replace(domain, task=Classification()), chosen).task
    assert labels == Classification(chat=True, instruction="Which?")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("mails.csv", "mails"), ("a b.v2.jsonl", "a-b-v2"), ("__.csv", "rows"),
        (f"{'m' * 62}-ails of 2026.csv", f"{'m' * 62}-a"), (f"{'m' * 63}-ails.csv", "m" * 63),
        ("con.csv", "rows"),
    ],
)  # fmt: skip
def test_a_domain_is_named_after_its_file(file: str, name: str) -> None:
    assert domain_name(Path("folder") / file) == check_name(name)


def test_the_flag_for_a_head() -> None:
    parser = Parser()
    add_run_flags(parser)
    flags = parser.read(["--head", "--label", "kind"])
    headed = configured(Domain("x", Classification(), Data([])), flags)
    assert headed.task == Classification(label="kind", head=True)
    assert configured(headed, parser.read([])).task == headed.task  # a recipe's own stays
    with pytest.raises(UsageError, match="'head'"):
        configured(Domain("x", Generation(), Data([])), parser.read(["--head"]))
    assert headed.digest() != replace(headed, task=Classification(label="kind")).digest()


def test_a_column_s_name_may_have_a_comma(tmp_path: Path) -> None:
    parser = Parser()
    add_run_flags(parser)
    path = tmp_path / "t.csv"
    path.write_text('"Comment, if any",title,label\na,b,c\n', encoding="utf-8")
    domain = Domain("spam", Classification(), Data(path))
    for given, columns in (
        ("Comment, if any", "Comment, if any"),
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


# ── --set ───────────────────────────────────────────────────────────────────────────────────────

GIVEN: dict[str, tuple[str, Any]] = {
    "training.epochs": ("3", 3),
    "training.lr": ("1e-4", 1e-4),
    "training.batch_size": ("none", None),
    "training.warmup": (".1", 0.1),
    "training.weight_decay": ("0.01", 0.01),
    "training.clip": ("2", 2.0),
    "training.patience": ("5", 5),
    "training.retention": ("none", "none"),
    "training.balance": ("batches", "batches"),
    "training.kl": ("0.25", 0.25),
    "training.replay": ("0.5", 0.5),
    "training.general_rows": ("2", 2),
    "training.general_cost": ("0.2", 0.2),
    "training.max_steps": ("90", 90),
    "training.validate_every": ("10", 10),
    "training.lr_ratio": ("16", 16.0),
    "training.optimizer": ("adamw8bit", "adamw8bit"),
    "training.schedule": ("cosine", "cosine"),
    "training.decay": (".1", 0.1),
    "training.max_length": ("64", 64),
    "training.gradient_checkpointing": ("TRUE", True),
    "training.seed": ("7", 7),
    "lora.rank": ("4", 4),
    "lora.alpha": ("16", 16),
    "lora.dropout": ("0.05", 0.05),
    "lora.targets": ("q_proj, v_proj", ("q_proj", "v_proj")),
    "lora.rslora": ("true", True),
    "lora.dora": ("true", True),
    "lora.top_layers": ("2", 2),
    "gates.retention": ("0.05", 0.05),
    "gates.drift": ("0.5", 0.5),
    "gates.recall": ("0.9", 0.9),
    "gates.precision": ("0.7", 0.7),
    "gates.slices": ("0.2", 0.2),
    "gates.overfit": ("0.2", 0.2),
    "gates.memorisation": ("0.6", 0.6),
    "gates.calibration": ("0.1", 0.1),
    "gates.evaluations": ("3", 3),
    "gates.floors": ('{"spam": 0.5}', {"spam": 0.5}),
}
OF_TASKS: list[tuple[Task, dict[str, tuple[str, Any]]]] = [
    (Classification(), {
        "text": ('["a, b", "c"]', ("a, b", "c")),
        "label": ("kind", "kind"),
        "labels": ("ham,spam", ("ham", "spam")),
        "positive": ('"none"', "none"),
        "prompt": ("Mail: {text}\\nIs:", "Mail: {text}\nIs:"),
        "wording": ('{"spam": "unwanted"}', {"spam": "unwanted"}),
        "head": ("true", True),
        "target_recall": ("0.9", 0.9),
        "target_precision": ("0.9", 0.9),
        "chat": ("true", True),
        "instruction": ("Which?", "Which?"),
    }),
    (Generation(), {
        "text": ("q", "q"),
        "answer": ("a", "a"),
        "prompt": ("Q={question}", "Q={question}"),
        "max_new_tokens": ("9", 9),
        "judge": ("number", "number"),
        "until": ("\\n\\n", "\n\n"),
        "chat": ("true", True),
        "instruction": ("Which?", "Which?"),
        "thinking": ("true", True),
    }),
    (MultiLabel(head=True), {
        "text": ("q", "q"),
        "label": ("kinds", "kinds"),
        "labels": ("a,b", ("a", "b")),
        "separator": ("|", "|"),
        "prompt": ("Q={q}", "Q={q}"),
        "head": ("false", False),
        "tune_thresholds": ("true", True),
        "max_new_tokens": ("9", 9),
        "chat": ("false", False),
        "instruction": ("none", None),
    }),
    (Number(), {
        "text": ("q", "q"),
        "label": ("score", "score"),
        "decimal": (",", ","),
        "prompt": ("Q={q}", "Q={q}"),
        "head": ("true", True),
        "mean": ("2.5", 2.5),
        "sd": ("1.5", 1.5),
    }),
    (MultipleChoice(), {
        "question": ("q", "q"),
        "choices": ("c", "c"),
        "answer": ("a", "a"),
        "prompt": ("{question} So:", "{question} So:"),
        "per_token": ("true", True),
        "chat": ("true", True),
        "instruction": ("Which?", "Which?"),
    }),
    (LanguageModelling(), {"text": ("words", "words")}),
    (Chat(user="q", assistant="a"), {
        "messages": ("turns", "turns"),
        "user": ("c,q", ("c", "q")),
        "assistant": ("reply", "reply"),
        "system": ("rules", "rules"), "history": ("before", "before"),
        "tools": ("functions", "functions"),
        "max_new_tokens": ("9", 9),
        "generate": ("true", True),
        "thinking": ("true", True),
    }),
    (Preference(), {
        "prompt": ("c,q", ("c", "q")),
        "chosen": ("better", "better"),
        "rejected": ("worse", "worse"),
        "system": ("rules", "rules"), "history": ("before", "before"),
        "tools": ("functions", "functions"),
        "beta": ("0.3", 0.3),
        "max_new_tokens": ("9", 9),
        "thinking": ("false", False),
    }),
]  # fmt: skip


def set_to(domain: Domain, *assignments: str) -> Domain:
    parser = Parser()
    add_run_flags(parser)
    words = [word for assignment in assignments for word in ("--set", assignment)]
    return configured(domain, parser.read(words))


@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_given_by_name_is_that_set_in_python(name: str) -> None:
    text, value = GIVEN[name]
    domain = Domain("spam", Classification(positive="spam"), Data("own.csv"))
    part, _, field = name.partition(".")
    declared = replace(domain, **{part: replace(getattr(domain, part), **{field: value})})
    given = set_to(domain, f"{name}={text}")
    assert given == declared
    assert type(getattr(getattr(given, part), field)) is type(value)
    # The card, and what resuming compares.
    assert (as_record(given), given.digest()) == (as_record(declared), declared.digest())
    assert set_to(given) == given


@pytest.mark.parametrize(("task", "given"), OF_TASKS, ids=lambda one: getattr(one, "kind", ""))
def test_a_setting_of_any_kind_of_task(task: Task, given: dict[str, tuple[str, Any]]) -> None:
    domain = Domain("spam", task, Data("own.csv"))
    assert set(setting_types(domain)) == {*GIVEN, *(f"task.{name}" for name in given)}
    for name, (text, value) in given.items():
        if name.startswith("target"):
            domain = replace(domain, task=task.with_options(positive="spam"))
        wanted = replace(domain.task, **{name: value})
        assert set_to(domain, f"task.{name}={text}").task == wanted


@pytest.mark.parametrize("task", [task for task, _ in OF_TASKS], ids=lambda task: task.kind)
def test_every_setting_is_documented(task: Task) -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    domain = Domain("spam", task, Data("own.csv"))
    assert [name for name in setting_types(domain) if f"`{name}`" not in text] == []
    flags = {"--" + flag.replace("_", "-") for flag in SETTINGS}
    assert [flag for flag in flags if f"`{flag}`" not in text] == []


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("warmup=.1", "Did you mean 'training.warmup'"),
        ("training.warmpu=.1", "Did you mean 'training.warmup'"),
        ("lora.lr=1", "Did you mean 'training.lr'"),
        ("retention=kl", "Did you mean 'training.retention' or 'gates.retention'"),
        ("task.max_new_tokens=3", "Known: .*task.prompt"),
        ("data.limit=3", "Known: .*training.epochs"),
        ("training.warmup", "NAME=VALUE; found 'training.warmup'"),
        ("training.epochs=2.5", "training.epochs: a whole number or none; found '2.5'"),
        ("training.patience=none", "training.patience: a whole number; found 'none'"),
        ("training.lr=fast", "training.lr: a number or none; found 'fast'"),
        ("training.gradient_checkpointing=1", "checkpointing: true or false; found '1'"),
        ("task.wording=spam", "task.wording: a JSON object of texts; found 'spam'"),
        ('task.wording={"spam": 1}', "task.wording: a JSON object of texts"),
        ('task.label="spam', "task.label: text; found '\"spam'"),
        ("task.labels=[1, 2]", "task.labels: names with commas between them or none"),
        ("training.warmup=2", "setting 'warmup': expected 0 up to, not including, 1; found 2.0"),
        ("training.clip=inf", "setting 'clip': expected above 0, and finite"),
        ("training.lr=nan", "training.lr: a number or none; found 'nan'"),
        ("gates.recall=1", "setting 'recall'"),
        ("gates.floors=spam=0.5", "gates.floors: a JSON object of numbers or none; found 'spam="),
        ("task.target_recall=0.9", "a positive class"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(assignment: str, message: str) -> None:
    domain = Domain("spam", Classification(), Data("own.csv"))
    with pytest.raises((UsageError, DomainError), match=message):
        set_to(domain, assignment)


def test_a_choice_of_a_task_is_one_of_its_values() -> None:
    domain = Domain("spam", Generation(), Data("own.csv"))
    with pytest.raises(UsageError, match=r"task\.judge: one of text, number; found 'words'"):
        set_to(domain, "task.judge=words")
    with pytest.raises(DomainError, match="'max_new_tokens': expected at least 1; found 0"):
        set_to(domain, "task.max_new_tokens=0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "0.1", "--set", "training.lr=0.2"], "one value of training.lr; found 0.1 from "
         "--lr as well"),
        (["--set", "lora.rank=4", "--set", "lora.rank=8"], "found 4 from --set lora.rank=4"),
        (["--head", "--set", "task.head=false"], "found True from --head"),
        (["--positive", "none", "--set", "task.positive=spam"], "found None from --positive"),
        (["--seed", "0", "--set", "training.seed=1"], "found 0 from --seed"),
    ],
)  # fmt: skip
def test_a_setting_that_contradicts_a_flag_is_refused(words: list[str], message: str) -> None:
    parser = Parser()
    add_run_flags(parser)
    domain = Domain("spam", Classification(), Data("own.csv"))
    with pytest.raises(UsageError, match=message):
        configured(domain, parser.read(words))


def test_a_setting_that_says_what_a_flag_says_is_no_contradiction() -> None:
    parser = Parser()
    add_run_flags(parser)
    words = ["--lr", "0.1", "--text", "a,b", "--set", "training.lr=.1", "--set", "task.text=a,b"]
    domain = Domain("spam", Classification(), Data("own.csv"))
    assert configured(domain, parser.read(words)) == with_settings(
        domain, lr=0.1, **{"task.text": ("a", "b")}
    )


def test_other_columns_of_a_generation_drop_its_prompt() -> None:
    domain = Domain("spam", Generation(prompt="Q: {question}"), Data("own.csv"))
    assert set_to(domain, "task.text=q").task == Generation(text="q")
    assert set_to(domain, "task.until=.").task == Generation(prompt="Q: {question}", until=".")
