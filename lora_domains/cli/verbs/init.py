"""The verb init: look at the rows of a file, propose a domain, and write it as a recipe."""

import argparse
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from rich.markup import escape
from rich.prompt import Prompt

from lora_domains.atomic import write_text
from lora_domains.cli.flags import (
    add_base_flags,
    add_column_flags,
    add_reading_flags,
    add_task_flag,
    run_flag_defaults,
)
from lora_domains.cli.parser import Verbs, add_verb
from lora_domains.cli.proposal import proposed
from lora_domains.cli.recipes import with_base
from lora_domains.console import Display
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.readers import read
from lora_domains.domain import Domain
from lora_domains.errors import EmptyCell, LeakError, LoraDomainsError, UsageError
from lora_domains.report.text import metric_name
from lora_domains.stats.intervals import wilson
from lora_domains.tasks import twins

ASKED = {
    "task": "Kind of task", "text": "Column of the text, or several: a,b",
    "label": "Column of the labels, the numbers or the answers",
    "positive": "Class whose recall and precision decide, or none",
    "group": "Column whose equal values stay in one split, or none",
    "test": "File of test rows, or none", "base": "Base: a folder, a Hub id, auto, or none",
}  # fmt: skip
"""What a terminal asks, by the flag that it answers."""
NONE = "none"
NAMES_OF_SPLITS = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}
"""What files beside a file of training rows are called."""
PASSING = 0.98
"""The level of two-sided bounds at which a test set that may be evaluated five times passes."""
WIDTH = 96


@dataclass(frozen=True)
class Plan:
    """A domain, its base (None: the embedded one), and a line on each part of the proposal."""

    domain: Domain
    base: str | None
    lines: dict[str, str]
    warnings: tuple[str, ...]


def add_init(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "init", init,
        group="everyday",
        summary="look at the rows of a file, and write a recipe for them",
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
    add_base_flags(inputs, quantised=False)
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
    _add_files_beside(flags)
    plan = planned(flags)
    path = Path(flags.output or f"{plan.domain.name}.py")
    if path.exists() and not flags.overwrite:
        raise UsageError(
            where=str(path),
            expected="a recipe that does not exist yet",
            found="one",
            hint="Give another name with --output, or replace it with --overwrite.",
        )
    for name, line in plan.lines.items():
        display.stage(name, None, None, line)
    if sys.stdin.isatty() and sys.stdout.isatty() and not flags.yes:
        plan = _confirmed(plan, flags, display)
    for warning in plan.warnings:
        display.warn(warning)
    text = recipe(plan, path.name)
    write_text(path, text, overwrite=flags.overwrite)
    display.line(f"Written: {path}, {text.count(chr(10))} lines. Train and evaluate: python {path}")
    return 0


# ── The proposal ────────────────────────────────────────────────────────────────────────────────


def planned(flags: argparse.Namespace) -> Plan:
    """The proposal for the rows in ``flags``, and whether they can be used so."""
    found = proposed(flags, whole=True)
    domain, base, why_base = _with_base(found.domain, flags)
    domain, prepared, cells = _usable(domain)
    reads = f"{_stage(prepared, 'read')}; {len(found.columns)} columns"
    lines = {"rows": reads, **found.reasons, "lengths": _lengths(prepared), "cells": cells,
             "split": _split(domain, prepared), "gates": _gates(domain, prepared),
             "base": why_base}  # fmt: skip
    kept = {name: line for name, line in lines.items() if line}
    return Plan(domain, base, kept, prepared.warnings)


def _add_files_beside(flags: argparse.Namespace) -> None:
    """Add the files of test and validation rows that lie beside the training rows to ``flags``."""
    path = Path(flags.train)
    for split, names in NAMES_OF_SPLITS.items():
        for name in names if "train" in path.name and getattr(flags, split) is None else ():
            if (beside := path.with_name(path.name.replace("train", name))).is_file():
                setattr(flags, split, str(beside))
                break


def _with_base(domain: Domain, flags: argparse.Namespace) -> tuple[Domain, str | None, str]:
    """The domain for a base at hand, the base, and why; None is the embedded one."""
    if flags.base == NONE:
        return domain, None, "the embedded one, for trials"
    asked = argparse.Namespace(**{**vars(flags), "base": flags.base or "auto"})
    try:
        domain, why = with_base(domain, asked)
    except UsageError as error:
        if flags.base:
            raise
        return domain, None, f"the embedded one, for trials, as no other is at hand. {error.hint}"
    return domain, asked.base, why or f"{asked.base}, as given"


def _usable(domain: Domain) -> tuple[Domain, Prepared, str]:
    """The domain with what its rows need, the rows, and what that is.

    Labels that differ by their spelling are merged, and rows with an empty text or label, or that
    are test rows too, dropped. Raises what else is wrong with the rows.
    """
    data, needs = domain.data, []
    labels = Counter(
        label for row in read(data.train or "", "train", data.reading)
        for label in domain.task.row_labels(row)
    ) if domain.task.has_labels else Counter[str]()  # fmt: skip
    if twins(labels):
        data = replace(data, merge_labels=True)
        needs.append("labels that differ by their spelling are merged (merge_labels)")
    while True:
        try:
            prepared = prepare(domain.task, data, domain.training.seed)
            break
        except EmptyCell:
            if data.drop_empty:
                raise
            data = replace(data, drop_empty=True)
        except LeakError:
            data = replace(data, drop_leaks=True)
    counts = prepared.row_counts
    if data.drop_empty:
        needs.append(f"{counts.empty} rows without a text or a label are left out (drop_empty)")
    if data.drop_leaks:
        needs.append(f"{counts.refused} training rows that are test rows too are left out "
                     "(drop_leaks)")  # fmt: skip
    return replace(domain, data=data), prepared, "; ".join(needs)


def _stage(prepared: Prepared, name: str) -> str:
    return next(stage.what for stage in prepared.stages if stage.name == name)


def _lengths(prepared: Prepared) -> str:
    rows = (*prepared.train, *prepared.validation, *prepared.test)
    words = sorted(len((row.text or row.prompt or row.answer).split()) for row in rows)
    *_, most = quantiles(words, n=20)
    half = words[len(words) // 2]
    return f"half of the texts have up to {half} words, 95 % up to {most:.0f}, all {words[-1]}"


def _split(domain: Domain, prepared: Prepared) -> str:
    train, validation, test = map(len, (prepared.train, prepared.validation, prepared.test))
    how = [f"groups of {domain.data.group} whole"] if domain.data.group else []
    sources = {"test": domain.data.test, "validation": domain.data.validation}
    given = [f"{split} rows from {Path(str(source)).name}" for split, source in sources.items()
             if source]  # fmt: skip
    sizes = f"{train} rows to train, {validation} to choose the epoch, {test} to test"
    return "; ".join([sizes, *given, *how])


def _gates(domain: Domain, prepared: Prepared) -> str:
    """The gates, and how many positives must be found for recall to be shown."""
    gates, task = domain.thresholds, prepared.task
    metric = metric_name(domain.primary_metric)
    every = (f"better than the base and the best baseline by {metric}; at most "
             f"{gates['retention']:.0%} of general knowledge lost")  # fmt: skip
    if task.positive_index is None:
        return every
    floor, positives = gates["recall"], sum(task.positive_index in r.labels for r in prepared.test)
    enough = [n for n in range(positives + 1) if positives and
              wilson(n, positives, PASSING).lower >= floor]  # fmt: skip
    shown = (f"that takes {enough[0]} of the {positives} in the test rows" if enough else
             f"the {positives} in the test rows are too few to show it")  # fmt: skip
    return (f"{every}; recall of {task.positive!r} at least {floor:g} and precision "
            f"{gates['precision']:g}: {shown}")  # fmt: skip


# ── Questions ───────────────────────────────────────────────────────────────────────────────────


def _confirmed(plan: Plan, flags: argparse.Namespace, display: Display) -> Plan:
    """The plan after the answers of the user: Enter takes what is proposed."""
    display.line("\nEnter takes what is in brackets.")
    for name, question in ASKED.items():
        while (now := _values(plan).get(name)) is not None:
            answer = Prompt.ask(escape(question), default=now, console=display.console).strip()
            if answer == now:
                break
            before = getattr(flags, name)
            setattr(flags, name, _meant(name, answer))
            try:
                plan = planned(flags)
            except LoraDomainsError as error:
                setattr(flags, name, before)
                display.warn(f"expected {error.expected}; found {error.found}. {error.hint}")
                continue
            for part in (name, "split", "gates"):
                if part in plan.lines:
                    display.stage(part, None, None, plan.lines[part])
            break
    return plan


def _values(plan: Plan) -> dict[str, str]:
    """What is asked about a plan, and what it has for it."""
    task, data = plan.domain.task, plan.domain.data
    settings = {field.name for field in fields(task)}
    values = {"task": task.kind}
    if "text" in settings:
        values["text"] = ",".join(task.input_columns)
        values |= {"label": task.answer_column} if task.answer_column else {}
    if "positive" in settings:
        values["positive"] = task.positive or NONE
    return {**values, "group": data.group or NONE, "test": str(data.test or NONE),
            "base": plan.base or NONE}  # fmt: skip


def _meant(name: str, answer: str) -> str | None:
    """The value of a flag for an answer: "" for no group, which None would propose."""
    if answer != NONE or name in ("positive", "base"):
        return answer
    return "" if name == "group" else None


# ── The recipe ──────────────────────────────────────────────────────────────────────────────────


def recipe(plan: Plan, name: str) -> str:
    """The Python file that declares the domain of ``plan`` and runs it."""
    domain = plan.domain
    classes = sorted({"Data", "Domain", "Gates", type(domain.task).__name__})
    floors = ("recall", "precision") if domain.task.positive else ()
    gates = {gate: domain.thresholds[gate] for gate in (*floors, "retention")}

    def why(*names: str) -> list[str]:
        return [line for name in names for line in _comment(plan.lines.get(name, ""))]

    body = [
        f"    name={_code(domain.name)},",
        *why("text", "label", "positive"),
        *_argument("task", domain.task),
        *why("group", "cells", "split"),
        *_argument("data", domain.data),
        *why("gates"),
        *_call("gates", "Gates", gates),
    ]
    base = f", base={_code(plan.base)}" if plan.base else ""
    return "\n".join([
        f'"""{domain.name}: proposed by lora-domains init. Change what does not fit.',
        "",
        f"    python {name}             # trains, evaluates, and saves adapters/{domain.name}",
        f"    accelerate launch {name}  # on several processes; --help lists the flags",
        '"""',
        "",
        f"from lora_domains import {', '.join(classes)}, run_recipe",
        "",
        "domain = Domain(",
        *body,
        ")",
        "",
        'if __name__ == "__main__":',
        *_comment(plan.lines["base"].split("; --")[0]),
        f'    run_recipe({{"own": domain}}{base})',
        "",
    ])  # fmt: skip


def _comment(text: str) -> list[str]:
    """``text`` as comment lines; no line break in it ends the comment."""
    return [f"    # {line}" for line in textwrap.wrap(" ".join(text.split()), WIDTH - 6)]


def _argument(name: str, value: Any) -> list[str]:
    """``name=Class(…),`` with the fields that differ from their defaults, and the usual gates."""
    given = {field.name: getattr(value, field.name) for field in fields(value)
             if getattr(value, field.name) != _default(field)}  # fmt: skip
    return _call(name, type(value).__name__, given)


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _call(name: str, called: str, arguments: Mapping[str, Any]) -> list[str]:
    parts = [f"{key}={_code(value)}" for key, value in arguments.items()]
    line = f"    {name}={called}({', '.join(parts)}),"
    if len(line) <= WIDTH:
        return [line]
    return [f"    {name}={called}(", *(f"        {part}," for part in parts), "    ),"]


def _code(value: Any) -> str:
    """A value as Python source, with double quotes."""
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, tuple):
        return f"({', '.join(map(_code, value))}{',' * (len(value) == 1)})"
    return repr(value)
