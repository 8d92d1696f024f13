"""The verbs that judge saved adapters: evaluate, one on labelled rows, and benchmark, several."""

import argparse
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lora_domains.adapters.folder import CONFIG, find_adapter
from lora_domains.analysis.regressions import comparison_with
from lora_domains.analysis.reproduce import domain_of
from lora_domains.atomic import adapter_name, check_name, check_writable, new_file
from lora_domains.cli.flags import (
    add_answer_flags,
    add_base_flags,
    add_column_flags,
    add_metric_flag,
    add_prevalence_flag,
    add_quiet_flag,
    add_row_flags,
    add_show_text_flag,
    add_suite_flags,
    add_task_flag,
    configured,
    run_flag_defaults,
)
from lora_domains.cli.machine import check_bases
from lora_domains.cli.parser import (
    ADAPTERS,
    EXIT,
    Verbs,
    add_adapter_argument,
    add_out_flag,
    add_report_flags,
    add_verb,
)
from lora_domains.cli.proposal import Reasons, proposed_task
from lora_domains.cli.recipes import named_suite, open_model, show_evaluation, suite_of
from lora_domains.console.forms import Cells, Decimals, Lines, dialect_for
from lora_domains.console.rows import read_blocks
from lora_domains.data.checks import mapped
from lora_domains.data.prepare import prepare, with_test_rows
from lora_domains.data.readers import read
from lora_domains.data.source import Data, Dialect
from lora_domains.domain import Domain, load_domain, load_domains
from lora_domains.errors import UsageError
from lora_domains.report import terminal
from lora_domains.report.card import CARD, Card, read_items
from lora_domains.report.report import mistakes
from lora_domains.tasks import Classification, Row, Task, task_from_record
from lora_domains.verdict.scores import ScoreTable

if TYPE_CHECKING:
    from lora_domains.dataset import Dataset
    from lora_domains.model import DomainModel


def add_verbs(verbs: Verbs) -> None:
    """Add these verbs to the parser."""
    _add_evaluate(verbs)
    _add_benchmark(verbs)


def _add_evaluate(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs, "evaluate", evaluate,
        usage="ADAPTER [RECIPE] [options]",
        description="Score an adapter, its base and baselines on the same test rows and on general "
        "questions, and apply the gates. An adapter that was trained here is evaluated on the rows "
        "in its card, or on those of --test. For a folder of plain PEFT give the test rows, and "
        "with --train the rows on which it was trained, if you have them: baselines, leaks and "
        "overfitting are measured on them. Writes the card, README and items of an adapter trained "
        "here. Of plain PEFT it writes a copy with these files as DIR/NAME, and leaves the folder "
        "as it is. With --errors it also writes the rows that were answered wrongly.\n\n"
        "Exit codes: 0 pass, 1 fail, 2 error, 3 inconclusive.",
        example="lora-domains evaluate downloads/their-lora --base Qwen/Qwen3-0.6B \\\n"
        "      --test rows.csv --text note --label priority --positive urgent",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs)
    add = inputs.add_argument
    add("recipe", metavar="RECIPE", nargs="?", help="a recipe with its task, rows and gates")
    add("--name", metavar="NAME", help="name of an adapter that was not trained here; "
        "default: that of its folder")  # fmt: skip
    add("--train", metavar="FILE", help="the rows on which it was trained")
    add_row_flags(inputs)
    add_column_flags(inputs)
    add_task_flag(inputs)
    add("--labels", metavar="A,B,…", help="all labels; for a classification head in its order")
    add("--prompt", metavar="TEXT", help="the prompt on which it was trained, with its columns in "
        "braces: 'Note: {text}\\nPriority:'")  # fmt: skip
    add("--seed", type=int, metavar="N", help="seed of the splits")
    add_base_flags(inputs, mapped=True)
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--positive", metavar="LABEL", help="the class whose recall and precision matter, or none")
    add("--slice", metavar="COLUMNS", help="report scores for each value of these columns")
    add_metric_flag(evaluation)
    add_prevalence_flag(evaluation)
    add_answer_flags(evaluation)
    add_suite_flags(evaluation)
    output = parser.add_argument_group("output")
    output.add_argument("--errors", metavar="FILE", help="write the test rows that were answered "
                        "wrongly, with their text and the answers, to this file (.csv "
                        "like that of the rows, .tsv or .jsonl), for your eyes alone")  # fmt: skip
    output.add_argument("--overwrite", action="store_true", help="replace the file of --errors")
    add_out_flag(output)
    add_show_text_flag(output)
    add_quiet_flag(output)
    parser.set_defaults(**run_flag_defaults())


def evaluate(flags: argparse.Namespace) -> int:
    """Evaluate a saved adapter."""
    folder = find_adapter(flags.adapter, Path(flags.out))
    card = Card.read(folder, measured=False) if (folder / CARD).exists() else None
    own = card is not None and not card.adapter.trained_elsewhere
    name = card.adapter.domain if card and own else check_name(flags.name or adapter_name(folder))
    task, reasons = _task(flags, folder, card)
    domain = _domain(flags, name, card, task)
    if flags.errors:
        _check_errors_file(flags, domain)
    # Before the base is loaded, which takes a while; a wrong file or judge is found at once.
    domain.check_judge()
    prepared, named = prepare(domain.task, domain.data, domain.training.seed), named_suite(flags)
    again = card if own and not flags.base else None
    from lora_domains import distributed

    model = open_model(flags, title=name, card=again, adapter=folder)
    for stage, reason in reasons.items():
        model.display.stage(stage, None, None, reason)
    suite = suite_of(flags, model, named, card)
    model.load_adapter(folder, name)
    if not own and model.bank[name].head is not None and not domain.task.head:
        domain = replace(domain, task=_with_head(domain.task, name))
    evaluation = model.evaluate(domain, suite=suite, prepared=prepared)
    show_evaluation(model, evaluation)
    if flags.errors:
        at = folder if own else model.out / name
        distributed.on_main(lambda: _write_errors(flags.errors, model, model.dataset(name), at))
    return EXIT[evaluation.verdict]


def _task(flags: argparse.Namespace, folder: Path, card: Card | None) -> tuple[Task, Reasons]:
    """The task of the test rows where neither a recipe nor the adapter's card has one, and why.

    It is proposed as for training; an adapter with a trained head, or --labels, is a classifier
    unless --task says otherwise.
    """
    if flags.recipe or card is not None:
        if flags.task:
            known = "its recipe" if flags.recipe else "its card"
            raise UsageError(
                where="--task", expected="a kind of task for an adapter without one",
                found=f"an adapter whose task {known} has", hint="Leave --task out.",
            )  # fmt: skip
        return task_from_record(card.adapter.task) if card else Classification(), {}
    if flags.test is None or (flags.prompt and not (flags.text or flags.task)):
        return Classification(), {}
    labelled = flags.labels or _has_head(folder)
    kind = flags.task or ("classification" if labelled else None)
    return proposed_task(argparse.Namespace(**vars(flags) | {"train": flags.test, "task": kind}))


def _with_head(task: Task, name: str) -> Task:
    """``task`` predicted by a head; raises UsageError for one that is answered in words."""
    if (headed := task.with_head()) is None:
        raise UsageError(
            where=name, expected="labels, which its head predicts",
            found=f"rows of a {task.kind.replace('_', ' ')}", hint="Try --task classification.",
        )  # fmt: skip
    return headed


def _has_head(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # which loading the adapter says
        return False
    return isinstance(config, dict) and config.get("task_type") == "SEQ_CLS"


def _domain(flags: argparse.Namespace, name: str, card: Card | None, task: Task) -> Domain:
    """The domain to evaluate on: of a recipe, of the adapter's card, or of the rows given."""
    own = card is not None and not card.adapter.trained_elsewhere
    if flags.recipe:
        domain = replace(load_domain(flags.recipe), name=name)
    elif card is not None and own:
        domain = _with_test_rows(domain_of(card, vars(flags)), flags)
    elif flags.test is None:
        raise UsageError(
            where="lora-domains evaluate",
            expected="test rows for an adapter that was not trained here",
            found="no --test and no recipe",
            hint=f"lora-domains evaluate {flags.adapter} --test rows.csv --text text --label label",
        )
    else:
        domain = Domain(name, task, Data(flags.train, flags.validation, flags.test))
    if not own:
        # What it was trained on cannot be undone: dropped rows count as leaks.
        domain = replace(domain, data=replace(domain.data, drop_leaks=True))
    options: dict[str, Any] = {}
    if flags.labels:
        options["labels"] = tuple(flags.labels.split(","))
    if flags.prompt:
        options["prompt"] = flags.prompt.replace("\\n", "\n")
    domain = configured(domain, flags, repeated=True)
    return replace(domain, task=domain.task.with_options(**options)) if options else domain


def _with_test_rows(domain: Domain, flags: argparse.Namespace) -> Domain:
    """``domain`` with the test rows in ``flags``, where its training split off its own."""
    train = flags.train or domain.data.train
    if flags.test is None or domain.data.test is not None or train is None:
        return domain  # as ``configured`` changes it
    data = replace(domain.data, train=train, validation=flags.validation or domain.data.validation)
    task, data = with_test_rows(domain.task, data, domain.training.seed, flags.test)
    flags.train = None
    return replace(domain, task=task, data=data)


# ── The rows that were answered wrongly ─────────────────────────────────────────────────────────

WRITTEN = {"adapter": "adapter_answer", "true": "right_answer", "base": "base_answer",
           "confidence": "probability", "error": "error", "f1": "token_f1"}  # fmt: skip
"""What is known of a wrong answer (``report.mistakes``), and its column beside those of the row."""


@dataclass(frozen=True)
class Wrong:
    """The cells of a wrong answer, beside those of its row."""

    cells: Mapping[str, Any]
    line = "", ""

    @property
    def record(self) -> dict[str, Any]:
        return {**self.cells}


def _check_errors_file(flags: argparse.Namespace, domain: Domain) -> None:
    """Raise UsageError where there are no errors, or their file cannot be written."""
    path, task, where = Path(flags.errors), domain.task, f"--errors {flags.errors}"
    if task.scored_by == "likelihood" and task.outputs != "value":
        expected, found = "answers that are right or wrong", f"likelihoods of a {task.kind}"
        hint = "A text alone has no right answer."
        if task.converses:
            hint = "Answers of a chat are generated with --generate."
    elif path.suffix.lower() not in (".csv", ".tsv", ".jsonl"):
        expected, found = "a file ending in .csv, .tsv or .jsonl", repr(path.suffix)
        hint = "For example --errors errors.csv"
    elif path.exists() and not flags.overwrite:
        expected, found = "no such file", "one that exists"
        hint = "Name another one, or replace it: --overwrite"
    else:
        return check_writable(path)
    raise UsageError(where=where, expected=expected, found=found, hint=hint)


def _write_errors(file: str, model: "DomainModel", dataset: "Dataset", folder: Path) -> None:
    """Write the test rows that were answered wrongly, the worst first, as their owner has them.

    Of numbers it is those farther from the truth than the mean; answers that are generated are
    generated once more, since no score holds their text.
    """
    domain, task = dataset.domain, dataset.domain.task
    items = ScoreTable(read_items(folder)).where("set", "test")
    wrong = mistakes(items, task.labels or (), show_text=False, most=None, joined=task.joined)
    errors = [one["error"] for one in wrong if "error" in one]
    wrong = [one for one in wrong if one.get("error", 1) > (fmean(errors) if errors else 0)]
    rows = {row.id: row for split in ("train", "test") if (source := getattr(domain.data, split))
            is not None for row in read(source, split, domain.data.reading)}  # fmt: skip
    function = domain.data.row
    mapped_rows = [mapped(rows[one["id"]], function) if function else rows[one["id"]]
                   for one in wrong]  # fmt: skip
    if wrong and "adapter" not in wrong[0]:
        answers = model.predict([row.values for row in mapped_rows], domain=domain.name)
        for one, row, answer in zip(wrong, mapped_rows, answers, strict=True):
            one |= {"adapter": answer, "true": task.example(row).answer.strip()}
    if task.outputs == "value":  # which a table writes with its own decimal sign
        wrong = [one | {who: float(one[who]) for who in ("adapter", "true", "base") if who in one}
                 for one in wrong]  # fmt: skip
    block = [
        (rows[one["id"]].values, Wrong({WRITTEN[k]: v for k, v in one.items() if k in WRITTEN}))
        for one in wrong
    ]
    if not block:
        Path(file).unlink(missing_ok=True)  # of an earlier evaluation, which may be replaced
        model.display.line(f"No test row was answered wrongly, so {file} is not written.")
        return
    own = list(dict.fromkeys(name for values, _ in block for name in values))
    more = [name for name in WRITTEN.values() if any(name in answer.cells for _, answer in block)]
    path = Path(file)
    suffix = path.suffix.lower()
    dialect = dialect_for(suffix, _dialect(domain.data, rows.values()))
    form = Lines() if suffix == ".jsonl" else Cells(own, more, dialect)
    with new_file(path, private=True) as written:
        written.write(form.head() + form.rows(block))
    model.display.line(
        f"{len(block)} of {len(items)} test rows were answered wrongly. They are in {path} with "
        "their text, as you asked: keep it as private as the rows."
    )


def _dialect(data: Data, rows: Iterable[Row]) -> Dialect:
    """The dialect of the file of test rows, or of that from which they were split off."""
    source = data.train if data.test is None else data.test
    dialect = next(read_blocks(source or [], "test", data.reading)).dialect
    decimals = Decimals()
    decimals.add(row.values for row in rows)
    return replace(dialect, decimal=decimals.of(dialect.delimiter))


# ── benchmark ───────────────────────────────────────────────────────────────────────────────────


def _add_benchmark(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "benchmark", benchmark,
        usage="ADAPTER [ADAPTER ...] [options]",
        description="Score adapters and their base on general questions, and on the test rows of "
        "the recipes in --domains: each adapter on every domain. Writes a report (see "
        "lora-domains report) into --out, and keeps scores there, so that an interrupted run "
        "continues.\n\n"
        "Exit codes, of the worst adapter: 0 pass, 1 fail, 2 error, 3 inconclusive.",
        example="lora-domains benchmark adapters/* --domains recipes/medical.py",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    where = f"their folders, names in {ADAPTERS}/, or OWNER/NAME@REVISION on the Hub"
    add_adapter_argument(inputs, "adapters", nargs="+", help=where)
    add_base_flags(inputs)
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add_suite_flags(evaluation, "--limit")
    add("--domains", nargs="*", default=[], metavar="RECIPE", help="also score their test rows")
    add("--seed", type=int, default=0, metavar="N", help="seed of that sample; default: 0")
    add_quiet_flag(add_report_flags(parser, evaluation))


def benchmark(flags: argparse.Namespace) -> int:
    """Score adapters on general questions and on each other's domains."""
    compare_with_older = comparison_with(flags.against)
    from lora_domains import distributed

    named = named_suite(flags, flags.seed)
    # All of them before the base is loaded, which takes a while.
    folders = [find_adapter(adapter, Path(ADAPTERS)) for adapter in flags.adapters]
    check_bases("benchmark", folders, out=flags.out)
    model = open_model(flags, out=ADAPTERS, adapter=folders[0])
    for folder in folders:
        model.load_adapter(folder)
    domains = load_domains(flags.domains)
    suite = suite_of(flags, model, named, seed=flags.seed)
    measured = model.benchmark(suite, domains, flags.out, show_text=flags.show_text)
    compare_with_older(measured.report, measured.items.__getitem__)
    distributed.on_main(lambda: measured.save(flags.out, flags.junit))
    terminal.report(model.display.console, measured.report)
    model.display.line(f"The report: {Path(flags.out) / 'report.html'}")
    return EXIT[measured.verdict]
