"""The task that is proposed for rows, by their columns and their labels."""

import argparse
from dataclasses import fields, replace
from itertools import product

from lora_domains.cli.flags import SETTINGS, reading
from lora_domains.data.readers import read
from lora_domains.data.source import FEWEST_READ
from lora_domains.errors import DataError
from lora_domains.tasks import KINDS, Classification, Task

LABELS = ("label", "labels")
"""Columns of labels whose cells are looked at where no --label is given."""


def proposed_task(flags: argparse.Namespace) -> tuple[Task, str]:
    """The task of the training rows, and why; "" where nothing was chosen.

    It is of the kind of --task, or of one whose first rows have such labels or such columns.
    """
    try:
        given = read(flags.train, "train", replace(reading(flags), most=FEWEST_READ))
    except DataError:  # which is raised again when the rows are read
        given = []
    columns = {name for row in given for name in row.values}
    kinds = [KINDS[flags.task]] if flags.task else _kinds_with(flags)
    named = [flags.label] if flags.label else [n for n in LABELS if n in columns]
    for label, kind in product(named, kinds):
        if (of_cells := kind.from_cells(given, label)) is not None:
            why = f"{kind.kind.replace('_', ' ')}, as {of_cells[1]}; --task names another"
            return of_cells[0], "" if flags.task else why
    if len(kinds) > 1 and (flags.text or flags.label or flags.head):
        return Classification(), ""
    only = kinds[0]() if len(kinds) == 1 and not flags.task else None
    if only is not None and (flags.text or flags.label or {*only.columns} <= columns):
        why = f"{only.kind.replace('_', ' ')}, which alone has these settings; --task names another"
        return only, why
    for kind in kinds if flags.task else KINDS.values():
        if (task := kind.from_columns(columns)) is not None:
            why = f"{task.kind.replace('_', ' ')}, by the columns of the rows; --task names another"
            return task, "" if flags.task or task == Classification() else why
    return (kinds[0]() if len(kinds) == 1 else Classification()), ""


def _kinds_with(flags: argparse.Namespace) -> list[type[Task]]:
    """The kinds to propose: all, or the only one with the settings in ``flags`` (--decimal)."""
    kinds = [*KINDS.values()]
    given = {name.removeprefix("task.") for flag, name in SETTINGS.items()
             if name.startswith("task.") and getattr(flags, flag)} - {"text", "label"}  # fmt: skip
    able = [kind for kind in kinds if given <= {field.name for field in fields(kind)}]
    return able if len(able) == 1 else kinds
