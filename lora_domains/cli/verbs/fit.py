"""The verbs init, which writes a recipe for a file, and fit, which takes several recipes too."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path

from rich.markup import escape
from rich.prompt import Prompt

from lora_domains.adapters.folder import find_adapter
from lora_domains.analysis.reproduce import domain_of
from lora_domains.atomic import write_text
from lora_domains.cli.draft import NONE, Draft, add_files_beside, drafted, recipe
from lora_domains.cli.flags import (
    add_base_flags,
    add_column_flags,
    add_reading_flags,
    add_run_flags,
    add_task_flag,
    configured,
    run_flag_defaults,
)
from lora_domains.cli.machine import with_base
from lora_domains.cli.parser import EXIT, Parser, Verbs, add_verb, guarded, wrapped
from lora_domains.cli.proposal import Reasons, proposed
from lora_domains.cli.recipes import (
    fit_and_evaluate,
    judged,
    load_finished,
    named_suite,
    open_model,
    own_base,
    quantization,
    show_validation,
    suite_of,
)
from lora_domains.console import Display
from lora_domains.data.prepare import prepare
from lora_domains.domain import Domain, load_domains
from lora_domains.errors import LoraDomainsError, LossExploded, UsageError, listed
from lora_domains.joint.grid import check_together
from lora_domains.probes.general_text import general_text
from lora_domains.report.card import CARD, Card

ASKED = {
    "task": "Kind of task", "text": "Column of the text, or several: a,b",
    "label": "Column of the labels, the numbers or the answers",
    "positive": "Class whose recall and precision decide, or none",
    "group": "Column whose equal values stay in one split, or none",
    "test": "File of test rows, or none", "base": "Base: a folder, a Hub id, auto, or none",
}  # fmt: skip
"""What a terminal asks, by the flag that it answers."""


# ── init ──────────────────────────────────────────────────────────────────────────────────────────


def add_verbs(verbs: Verbs) -> None:
    """Add these verbs to the parser."""
    _add_init(verbs)
    _add_fit(verbs)


def _add_init(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "init", init,
        usage="FILE [options]",
        description="Look at the columns, labels, lengths and number of the rows in a file, and "
        "propose a task with its columns, a positive class, a group, the splits, the gates and a "
        "base, each with the reason. A terminal asks about each; elsewhere, or with --yes, the "
        "proposal is taken. Flags decide before it. Writes NAME.py, a recipe of under 40 lines "
        "without the text of any row, and trains nothing.",
        example="lora-domains init visits.csv\n  accelerate launch visits.py",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add = inputs.add_argument
    add("train", metavar="FILE", help="training rows, of any form that fit reads")
    add("--name", metavar="NAME", help="name of the domain; default: the file's")
    add_task_flag(inputs)
    add("--validation", metavar="FILE", help="validation rows; default: a file beside FILE that is "
        "named so, or split from the training rows")  # fmt: skip
    add("--test", metavar="FILE", help="test rows; default: likewise")
    add("--group", metavar="COLUMN", help="rows with the same value stay in one split, or none")
    add_reading_flags(inputs)
    add_column_flags(inputs)
    add("--head", action="store_true", help="train a classification head; required on encoders")
    add_base_flags(inputs, trained=True, quantised=False)
    parser.add_argument_group("evaluation").add_argument(
        "--positive", metavar="LABEL", help="the class whose recall and precision matter, or none"
    )
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="FILE", help="the recipe; default: NAME.py")
    add("--overwrite", action="store_true", help="replace the recipe if there is one")
    add("--yes", action="store_true", help="take the proposal, and ask nothing")
    parser.set_defaults(**run_flag_defaults())


def init(flags: argparse.Namespace) -> int:
    """Propose a domain, ask about it in a terminal, and write the recipe."""
    display = Display()
    if flags.group == NONE:
        flags.group = ""  # None would propose one
    add_files_beside(flags)
    draft = drafted(flags)
    path = Path(flags.output or _file_for(draft.domain.name))
    if path.exists() and not flags.overwrite:
        raise UsageError(
            where=str(path),
            expected="a recipe that does not exist yet",
            found="one",
            hint="Give another name with --output, or replace it with --overwrite.",
        )
    for name, line in draft.lines.items():
        display.stage(name, None, None, line)
    if sys.stdin.isatty() and sys.stdout.isatty() and not flags.yes:
        draft = _confirmed(draft, flags, display)
    for warning in draft.warnings:
        display.warn(warning)
    text = recipe(draft, path.name)
    write_text(path, text, overwrite=flags.overwrite)
    display.line(f"Written: {path}, {text.count(chr(10))} lines. Train and evaluate: python {path}")
    return 0


def _file_for(name: str) -> str:
    """A file name for a recipe, which would hide a module of its name from the libraries."""
    try:
        found = find_spec(name)
    except (ImportError, ValueError):
        found = None
    here = found is not None and Path(found.origin or "").parent == Path.cwd()
    return f"{name}.py" if found is None or here else f"{name}_recipe.py"


def _confirmed(draft: Draft, flags: argparse.Namespace, display: Display) -> Draft:
    """The draft after the answers of the user: Enter takes what is proposed."""
    display.line("\nEnter takes what is in brackets.")
    for name, question in ASKED.items():
        while (now := _values(draft).get(name)) is not None:
            answer = Prompt.ask(escape(question), default=now, console=display.console).strip()
            if answer == now:
                break
            before = getattr(flags, name)
            setattr(flags, name, _meant(name, answer))
            try:
                draft = drafted(flags)
            except LoraDomainsError as error:
                setattr(flags, name, before)
                display.warn(f"expected {error.expected}; found {error.found}. {error.hint}")
                continue
            for part in (name, "split", "gates"):
                if part in draft.lines:
                    display.stage(part, None, None, draft.lines[part])
            break
    return draft


def _values(draft: Draft) -> dict[str, str]:
    """What is asked about a draft, and what it has for it."""
    task, data = draft.domain.task, draft.domain.data
    settings = {field.name for field in fields(task)}
    values = {"task": task.kind}
    if "text" in settings:
        values["text"] = ",".join(task.input_columns)
        values |= {"label": task.answer_column} if task.answer_column else {}
    if "positive" in settings:
        values["positive"] = task.positive or NONE
    return {**values, "group": data.group or NONE, "test": str(data.test or NONE),
            "base": draft.base or NONE}  # fmt: skip


def _meant(name: str, answer: str) -> str | None:
    """The value of a flag for an answer: "" for no group, which None would propose."""
    if answer != NONE or name in ("positive", "base"):
        return answer
    return "" if name == "group" else None


# ── fit ───────────────────────────────────────────────────────────────────────────────────────────


def _add_fit(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "fit", fit,
        usage="FILE [options]\n"
        "       lora-domains fit RECIPE.py … [options]\n"
        "       lora-domains fit --from-card CARD [options]",
        description="Train an adapter on labelled rows or conversations and choose its epoch on "
        "validation rows. "
        "With --test, also evaluate it: base, adapter and baselines on the same test rows, then "
        "the gates; --evaluate does so on test rows that are split from the training rows. Without "
        "either, no test row is scored and validation rows are shown instead. "
        "Writes adapters/NAME: adapter_model.safetensors and adapter_config.json "
        "(PEFT's format), card.json, items.jsonl and README.md. Several recipes, seeds or settings "
        "are trained in one pass, or one after another where that is faster.\n\n"
        "Exit codes: 0 pass or not evaluated, 1 fail, 2 error, 3 inconclusive, 130 interrupted.",
        example="lora-domains fit --name triage --train train.csv --test test.csv \\\n"
        "      --text note --label priority --positive urgent",
    )  # fmt: skip
    add_run_flags(parser, recipe=False)


def fit(flags: argparse.Namespace) -> int:
    """Train an adapter on rows, or repeat the run of a card; evaluate it on given test rows."""
    if flags.from_card:
        flags.train = flags.train or next(iter(flags.rows), None)
        folder = _folder_of(flags.from_card, Path(flags.out))
        card = Card.read(folder)
        flags.init_from = flags.init_from or _parent_of(card, folder, flags)
        domain = domain_of(card, vars(flags))
        if flags.name:
            domain = replace(domain, name=flags.name)
        return _fit(configured(domain, flags, repeated=True), flags, card)
    if any(path.endswith(".py") for path in flags.rows):
        return fit_recipes(flags.rows, flags)
    if bool(flags.train) == bool(flags.rows) or len(flags.rows) > 1:
        both = "both FILE and --train" if flags.train else f"{len(flags.rows)} files"
        raise UsageError(
            where="lora-domains fit",
            expected="training rows in one file or folder, or recipes",
            found=both if flags.rows else "no FILE and no --train",
            hint="lora-domains fit train.csv --name spam --text text --label label",
        )
    flags.train = flags.train or flags.rows[0]
    proposal = proposed(flags)
    return _fit(proposal.domain, flags, reasons=proposal.reasons)


def _fit(
    domain: Domain,
    flags: argparse.Namespace,
    card: Card | None = None,
    reasons: Reasons | None = None,
) -> int:
    # By default, test rows taken from the training rows are kept for the adapter that is chosen in
    # the end.
    evaluated = domain.data.test is not None if flags.evaluate is None else flags.evaluate
    verdict = fit_and_evaluate(domain, flags, card, reasons, evaluated=evaluated)
    return EXIT[verdict] if verdict else 0


def _folder_of(card: str, out: Path) -> Path:
    """The folder of a ``card``: of the file, or of the adapter that is named instead."""
    path = Path(card)
    return path.parent if path.name == CARD else find_adapter(path, out, CARD)


def _parent_of(card: Card, folder: Path, flags: argparse.Namespace) -> Path | None:
    """The folder of the adapter from which the card's training continued; None without one."""
    record = card.adapter.parent
    if record is None:
        return None
    from lora_domains.adapters.parent import parent_folder

    beside = folder.absolute().parent
    found = parent_folder(record, beside) or parent_folder(record, Path(flags.out))
    if found is None:
        raise UsageError(
            where=flags.from_card,
            expected=f"its parent {record.name} (sha256 {record.sha256[:12]})",
            found=f"none in {beside} or {flags.out}, nor among the versions kept there",
            hint="Give it: --init-from ADAPTER",
        )
    return found


# ── several recipes ──────────────────────────────────────────────────────────────────────────────

OF_ONE = ("name", "train", "validation", "test", "text", "label", "task", "from_card", "seeds",
          "sweep")  # fmt: skip
"""Flags that describe the rows of a single domain, or several trainings of one."""
WORST = ("fail", "inconclusive", "pass")


def run_recipes(
    domains: Sequence[Domain], arguments: Sequence[str] | None = None, *, base: str | None = None
) -> None:
    """Train several domains together and evaluate each, with the flags of the command line.

    The last line of a recipe of several, which changes the settings of all. Exits 0 once training
    and evaluation are finished, 2 on an error.
    """
    doc = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
    parser = Parser(usage="%(prog)s [options]", description=wrapped(doc))
    add_run_flags(parser)
    parser.set_defaults(base=base)

    def run() -> int:
        flags = parser.read(arguments)
        _check_flags(flags)
        flags.evaluate = flags.evaluate is not False
        fit_and_evaluate_all([configured(domain, flags) for domain in domains], flags)
        return 0

    code = guarded(run)
    if code:
        sys.exit(code)


def fit_recipes(paths: Sequence[str], flags: argparse.Namespace) -> int:
    """Train the domains of the recipes ``paths`` together and evaluate each; the exit code."""
    others = [path for path in paths if not path.endswith(".py")]
    if others:
        raise UsageError(
            where="lora-domains fit",
            expected="recipes only, files ending in .py, where there is one",
            found=others[0],
            hint="Fit the rows of a file by themselves, or write a recipe for them: "
            f"lora-domains init {others[0]}",
        )
    domains = load_domains(paths)
    flags.base = flags.base or own_base(paths)
    if len(domains) == 1 and not flags.task:
        name = flags.name or domains[0].name
        return _fit(configured(replace(domains[0], name=name), flags), flags)
    _check_flags(flags)
    domains = [configured(domain, flags) for domain in domains]
    verdicts = fit_and_evaluate_all(domains, flags)
    return next((EXIT[verdict] for verdict in WORST if verdict in verdicts), 0)


def _check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that describe the rows of one domain."""
    given = ["--" + name.replace("_", "-") for name in OF_ONE if getattr(flags, name, None)]
    if given:
        raise UsageError(
            where=given[0],
            expected="flags for all recipes, such as --epochs, --base and --out",
            found=listed(given),
            hint="Change it in the recipe that it concerns, or run that recipe by itself.",
        )
    check_together(flags.together)


def fit_and_evaluate_all(domains: Sequence[Domain], flags: argparse.Namespace) -> list[str]:
    """Train ``domains`` together, and evaluate each that has test rows; the verdicts.

    With --no-evaluate validation rows are shown instead. Raises LossExploded in the end.
    """
    from lora_domains.inference.memory import base_in_words

    quantization(flags)
    named = named_suite(flags)
    domains, why = _with_base(domains, flags)
    # Before the base is loaded, which takes a while; a wrong file or judge is found at once.
    for domain in domains:
        if not flags.dry_run:
            domain.check_judge()
        if domain.data.general is not None:
            general_text(domain.data.general)
    prepared = [prepare(one.task, one.data, one.training.seed) for one in domains]
    if flags.init_from is not None:
        find_adapter(flags.init_from, Path(flags.out))
    model = open_model(flags, title=", ".join(domain.name for domain in domains))
    model.display.stage("base loaded", None, None, f"{base_in_words(model.base)}, frozen")
    if why:
        model.display.stage("base", None, None, why)
    evaluated = flags.evaluate is not False
    suite = suite_of(flags, model, named) if evaluated else None
    failed: LossExploded | None = None
    try:
        model.fit(
            domains, resume=flags.resume, dry_run=flags.dry_run, init_from=flags.init_from,
            tracker=flags.tracker, prepared=prepared, no_evaluate=not evaluated, suite=suite,
            together=flags.together,
        )  # fmt: skip
    except LossExploded as error:  # of one domain: the others were trained
        failed, domains = error, load_finished(model, domains)
    if flags.dry_run:
        return []
    verdicts = []
    for domain in domains:
        model.display.title(domain.name)
        if evaluated and (flags.evaluate or domain.data.test is not None):
            verdicts.append(judged(model, domain, suite))
        else:
            show_validation(model, domain)
    if failed is not None:
        raise failed
    return verdicts


def _with_base(domains: Sequence[Domain], flags: argparse.Namespace) -> tuple[list[Domain], str]:
    """The domains on one base, found for all of them by ``machine.with_base``."""
    # What has no head needs an instruct model, on which all others work too.
    first = next((one for one in domains if one.task.with_head() is None), domains[0])
    found, why = with_base(first, flags)
    if not (found.task.head and not first.task.head):
        return list(domains), why
    headed = [(one, one.task.with_head()) for one in domains]
    return [replace(one, task=task) for one, task in headed if task is not None], why
