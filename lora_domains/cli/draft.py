"""A draft of a recipe: the domain that is proposed for a file, its base, and the Python file."""

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from lora_domains.cli.machine import with_base
from lora_domains.cli.proposal import proposed
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.readers import read
from lora_domains.domain import Domain
from lora_domains.errors import EmptyCell, LeakError, UsageError, in_lines, number_of
from lora_domains.report.text import metric_name
from lora_domains.stats.intervals import wilson
from lora_domains.tasks import KINDS, twins

NONE = "none"
"""What a flag has for no base."""
NAMES_OF_SPLITS = {"test": ("test",), "validation": ("validation", "valid", "val", "dev")}
"""What files beside a file of training rows are called."""
PASSING = 0.98
"""The level of two-sided bounds at which a test set that may be evaluated five times passes."""
WIDTH = 96


@dataclass(frozen=True)
class Draft:
    """A domain, its base (None: the embedded one), and a line on each part of the proposal."""

    domain: Domain
    base: str | None
    lines: dict[str, str]
    warnings: tuple[str, ...]


# ── The proposal ────────────────────────────────────────────────────────────────────────────────


def drafted(flags: argparse.Namespace) -> Draft:
    """The proposal for the rows in ``flags``, and whether they can be used so."""
    found = proposed(flags, whole=True)
    domain, base, why_base = _with_base(found.domain, flags)
    domain, prepared, cells = _usable(domain)
    columns = f"{len(found.columns)} column{'s' * (len(found.columns) > 1)}"
    reads = f"{_stage(prepared, 'read')}; {columns}"
    lines = {"rows": reads, **found.reasons, "lengths": _lengths(prepared), "cells": cells,
             "split": _split(domain, prepared), "gates": _gates(domain, prepared),
             "base": why_base}  # fmt: skip
    kept = {name: line for name, line in lines.items() if line}
    return Draft(domain, base, kept, prepared.warnings)


def add_files_beside(flags: argparse.Namespace) -> None:
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
        rows = number_of(counts.empty, "row")
        needs.append(f"left out: {rows} without a text or a label (drop_empty)")
    if data.drop_leaks:
        needs.append(f"left out: {number_of(counts.refused, 'training row')} among the test rows "
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
    how = [f"groups of {domain.data.group} stay together"] if domain.data.group else []
    sources = {"test": domain.data.test, "validation": domain.data.validation}
    given = [f"{split} rows from {Path(str(source)).name}" for split, source in sources.items()
             if source]  # fmt: skip
    sizes = f"{number_of(train, 'row')} to train, {validation} to choose the epoch, {test} to test"
    return "; ".join([sizes, *given, *how])


def _gates(domain: Domain, prepared: Prepared) -> str:
    """The gates, and how many positives must be found for recall to be shown."""
    gates, task = domain.thresholds, prepared.task
    metric = metric_name(domain.primary_metric)
    every = (f"better than the base and the best baseline by {metric}; at most "
             f"{100 * gates['retention']:.0f} % of general knowledge lost")  # fmt: skip
    if task.positive_index is None:
        return every
    floor, positives = gates["recall"], sum(task.positive_index in r.labels for r in prepared.test)
    enough = [n for n in range(positives + 1) if positives and
              wilson(n, positives, PASSING).lower >= floor]  # fmt: skip
    shown = (f"that takes {enough[0]} of the {positives} in the test rows" if enough else
             f"the {positives} in the test rows are too few to show it")  # fmt: skip
    return (f"{every}; recall of {task.positive!r} at least {floor:g} and precision "
            f"{gates['precision']:g}: {shown}")  # fmt: skip


# ── The recipe ──────────────────────────────────────────────────────────────────────────────────


def recipe(draft: Draft, name: str) -> str:
    """The Python file that declares the domain of ``draft`` and runs it."""
    domain, kind = draft.domain, KINDS[draft.domain.task.kind].__name__
    classes = sorted({"Data", "Domain", "Gates", kind})
    floors = ("recall", "precision") if domain.task.positive else ()
    gates = {gate: domain.thresholds[gate] for gate in (*floors, "retention")}

    def why(*names: str) -> list[str]:
        return [line for name in names for line in _comment(draft.lines.get(name, ""))]

    body = [
        f"    name={_code(domain.name)},",
        *why("task", "text", "label", "positive"),
        *_call("task", kind, _changed(domain.task)),
        *why("group", "cells", "split"),
        *_call("data", "Data", _changed(domain.data)),
        *why("gates"),
        *_call("gates", "Gates", gates),
    ]
    base = f", base={_code(draft.base)}" if draft.base else ""
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
        *_comment(draft.lines["base"].split("; --")[0]),
        f'    run_recipe({{"own": domain}}{base})',
        "",
    ])  # fmt: skip


def _comment(text: str) -> list[str]:
    """``text`` as comment lines; no line break in it ends the comment."""
    words = " ".join(text.split())
    return [f"    # {line}" for line in in_lines(words, WIDTH - 6) if words]


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    return {field.name: values[field.name] for field in fields(value)
            if values[field.name] != _default(field)}  # fmt: skip


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _call(name: str, called: str, arguments: Mapping[str, Any]) -> list[str]:
    """``name=called(…),`` on one line, or one for each argument."""
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
