"""The domain that is proposed for rows, by the names of their columns, by their cells and labels.

Flags decide first, then names that say what a column is (``text`` and ``label``, ``messages``),
then what the columns hold. What is chosen has a reason, which names no cell.
"""

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import product
from pathlib import Path

from lora_domains.cli.columns import (
    Column,
    alone,
    check_numbers,
    check_rated,
    check_text,
    columns_of,
    from_cells,
    told,
    without_header,
)
from lora_domains.cli.flags import columns as columns_named
from lora_domains.cli.flags import configured, domain_name, reading
from lora_domains.console import Display
from lora_domains.data.readers import read
from lora_domains.data.source import FEWEST_READ, Data, file_of
from lora_domains.domain import Domain
from lora_domains.errors import DataError, UsageError, listed
from lora_domains.schema import SETTINGS
from lora_domains.tasks import (
    KINDS,
    Chat,
    Classification,
    Generation,
    LanguageModelling,
    MultipleChoice,
    Number,
    Preference,
    Row,
    Task,
    merged,
    shown,
)
from lora_domains.tasks.messages import ANSWERS, asking, named

LABELS = ("label", "labels")
"""Columns of labels whose cells are looked at where no --label is given."""
MOST_READ = 20 * FEWEST_READ
"""Rows that a proposal looks at: a file may be sorted by its labels."""
SKEWED = 0.35
"""The largest share of the rarer of two labels that makes it the positive class."""
FIRST: tuple[type[Task], ...] = (Chat, MultipleChoice, *KINDS.values())
"""Kinds in the order in which columns are looked for: those with the most of their own first."""
OTHERS = "--task, --text, --label, --positive and --group choose others"
"""What names other columns than those proposed."""
HARDLY = 0.1
"""An agreement below this is hardly any."""
MOST_TRIED = 12
"""The most columns that are tried as labels."""

Reasons = Mapping[str, str]
"""What was proposed, by name ("task", "label"), and why."""


@dataclass(frozen=True)
class Proposal:
    """A domain with the flags applied, and the reasons of what no flag decided."""

    domain: Domain
    reasons: Reasons
    columns: Mapping[str, Column]


def proposed(flags: argparse.Namespace, *, whole: bool = False) -> Proposal:
    """The domain for the training rows in ``flags``.

    Where the columns were not both named, or for the ``whole`` of a recipe, a positive class and a
    group are proposed too; otherwise a column that looks like one is warned of. Raises DataError
    where no column of a text or of an answer can be told.
    """
    given = _beginning(flags)
    columns = columns_of(given)
    task, reasons = _task(flags, given, columns)
    if not (flags.text and flags.label):
        check_rated(task, given)
    name = domain_name(Path(flags.train)) if flags.name is None else flags.name
    domain = configured(Domain(name, task, Data(flags.train)), flags)
    if flags.text and flags.label and not whole:
        if owner := _owner(domain, columns, len(given)):
            Display().warn(
                f"column {owner.name!r} ({owner.in_words}): rows with the same value may be among "
                f"both training and test rows. Keep them together: --group {owner.name}"
            )
        return Proposal(domain, reasons, columns)
    more = dict(reasons)
    if flags.positive is None:
        domain, more["positive"] = _with_positive(domain, given)
    if flags.group is None:
        domain, more["group"] = _with_group(domain, columns, len(given))
    return Proposal(domain, {name: why for name, why in more.items() if why}, columns)


def proposed_task(flags: argparse.Namespace) -> tuple[Task, Reasons]:
    """The task for the rows in ``flags.train``, and why. Raises as ``proposed``."""
    given = _beginning(flags)
    return _task(flags, given, columns_of(given))


def _beginning(flags: argparse.Namespace) -> list[Row]:
    most = FEWEST_READ if str(flags.train).startswith("hub:") else MOST_READ
    try:
        return read(flags.train, "train", replace(reading(flags), most=most))
    except DataError:  # which is raised again when the rows are read
        return []


def _task(
    flags: argparse.Namespace, given: Sequence[Row], columns: Mapping[str, Column]
) -> tuple[Task, Reasons]:
    if not given:
        return Classification(), {}
    named = _by_names(flags, given[:FEWEST_READ], {*columns})
    if named is None:
        return _by_contents(flags, given, columns)
    task, why = named
    if flags.head and not (flags.text or flags.label) and task.with_head() is None:
        raise UsageError(
            where="--head",
            expected="labels or numbers, which a head predicts",
            found=f"rows of a {_name(task)}: columns {listed(columns)}",
            hint="Name the columns of the text and of labels or numbers (--text COLUMN --label "
            "COLUMN); answers in words need a causal base, without --head.",
        )
    return task, {"task": why} if why else {}


def _name(kind: Task | type[Task]) -> str:
    return kind.kind.replace("_", " ")


# ── By flags and names ──────────────────────────────────────────────────────────────────────────


def _by_names(
    flags: argparse.Namespace, given: Sequence[Row], columns: set[str]
) -> tuple[Task, str] | None:
    """The task that flags and names of columns say, and why; None where they say too little.

    It is of the kind of --task, or of one whose first rows have such labels or such columns.
    """
    kinds = [KINDS[flags.task]] if flags.task else _kinds_with(flags)
    pairs = None if flags.head else Preference.from_columns(columns)
    if pairs is not None and flags.text:
        pairs = pairs.with_options(text=columns_named(flags.text, Data(flags.train)))
    chosen = pairs.of_chosen(kinds[0]) if pairs and flags.task and not flags.label else None
    if chosen is not None:
        check_text(chosen, given[0])
        return chosen, ""
    if pairs is not None and Preference in kinds and flags.label in (None, pairs.chosen):
        why = "preference, by the columns of the rows; --task names another"
        return pairs, "" if flags.task else why
    labels = [flags.label] if flags.label else [name for name in LABELS if name in columns]
    known, flagged = bool(labels and (flags.text or "text" in columns)), flags.text or flags.label
    for label, kind in product(labels if known else (), kinds):
        if (of_cells := from_cells(kind, given, label, flags.decimal)) is not None:
            why = f"{_name(kind)}, as {of_cells[1]}; --task names another"
            return of_cells[0], "" if flags.task else why
    only = _on(kinds[0], labels) if len(kinds) == 1 and not flags.task else None
    if only is not None and ((flagged and known) or {*only.columns} <= columns):
        return only, f"{_name(only)}, which alone has these settings; --task names another"
    for kind in kinds if flags.task else () if flagged else FIRST:
        if (task := kind.from_columns(columns)) is not None:
            why = f"{_name(task)}, by the columns of the rows; --task names another"
            return task, "" if flags.task or task == Classification() else why
    kind = kinds[0] if len(kinds) == 1 else Classification
    return (_on(kind, labels), "") if known else None


def _on(kind: type[Task], labels: Sequence[str]) -> Task:
    """A task of ``kind`` for labels in the first of ``labels``, or in its own column among them."""
    task = kind()
    elsewhere = task.answer_column in LABELS and task.answer_column not in labels
    return task.with_options(label=labels[0]) if labels and elsewhere else task


def _kinds_with(flags: argparse.Namespace) -> list[type[Task]]:
    """The kinds to propose: all, or the only one with the settings in ``flags`` (--decimal)."""
    kinds = [*KINDS.values()]
    given = {name.removeprefix("task.") for flag, name in SETTINGS.items()
             if name.startswith("task.") and getattr(flags, flag)} - {"text", "label"}  # fmt: skip
    able = [kind for kind in kinds if given <= {field.name for field in fields(kind)}]
    return able if len(able) == 1 else kinds


# ── By what the columns hold ────────────────────────────────────────────────────────────────────


def _by_contents(
    flags: argparse.Namespace, given: Sequence[Row], columns: Mapping[str, Column]
) -> tuple[Task, Reasons]:
    """The task, and why it reads these columns. Raises DataError where none can be chosen."""
    if without_header(columns):
        raise DataError(
            where=file_of(given[0].place),
            expected="the names of the columns in the first line",
            found=f"{len(columns)} names that look like the cells of a row",
            hint="Write a line of names above the rows.",
        )
    kinds = [KINDS[flags.task]] if flags.task else _kinds_with(flags)
    turns = [column.name for column in columns.values() if column.holds == "messages"]
    if turns and Chat in kinds and not (flags.text or flags.label):
        return Chat(messages=turns[0]), {"task": f"chat, as {turns[0]} holds messages"}
    answer = flags.label or next((name for name in LABELS if name in columns), None)
    named_texts = columns_named(flags.text or "", Data(flags.train))
    unnamed = {name: column for name, column in columns.items() if name not in named_texts}
    answer = answer or _usual_answer(kinds, given, unnamed)
    text, why_text = _text(flags, given, columns, answer)
    known = columns_named(text, Data(flags.train)) if isinstance(text, str) and flags.text else text
    parts = (known,) if isinstance(known, str) else known
    left = {name: column for name, column in columns.items() if name not in parts}
    task, why_answer = _answered(kinds, given, left, parts, answer, flags.decimal)
    task = task.with_options(text=known)
    second = columns.get(task.answer_column or "")
    if not (flags.text or answer) and second is not None and second.holds == "free text":
        # Of two texts, the first one asks.
        first, second = sorted((columns[parts[0]], second), key=[*columns.values()].index)
        task = task.with_options(text=first.name, label=second.name)
        why_text, why_answer = (f"{one.name}: {one.in_words}" for one in (first, second))
    why = "" if flags.task else f"{_name(task)}, by what the columns hold; {OTHERS}"
    reasons = {"task": why, "text": why_text, "label": "" if flags.label else why_answer}
    return task, {name: why for name, why in reasons.items() if why}


def _usual_answer(
    kinds: Sequence[type[Task]], given: Sequence[Row], columns: Mapping[str, Column]
) -> str | None:
    """The column of free text that has a usual name of answers, None where none has.

    Raises DataError for a column of several answers to a question, as SQuAD has it.
    """
    if not {Generation, Chat} & {*kinds}:
        return None
    several = named(columns, "answers")
    if several is not None and columns[several].holds == "lists" and asking(columns):
        raise _undecided(given, columns, "a column of one answer each", "--label COLUMN")
    name = named(columns, *ANSWERS)
    if name is None or columns[name].holds == "free text":
        return name
    # Of answers in words a few may recur, as labels do.
    return name if len(kinds) == 1 and alone(columns, asking(columns), name) else None


def _text(
    flags: argparse.Namespace, given: Sequence[Row], columns: Mapping[str, Column],
    answer: str | None,
) -> tuple[str | tuple[str, ...], str]:  # fmt: skip
    """The column of the text, or those that ask for a usual answer, or those of --text; and why."""
    if flags.text:
        return flags.text, ""
    asked = asking([name for name in columns if name != answer])
    name = named(columns, *ANSWERS)
    usual = name is not None and (answer == name or (
        answer is None and columns[name].holds != "free text" and alone(columns, asked, name)
    ))  # fmt: skip
    if asked and usual and columns[asked[0]].holds in ("free text", "names"):
        why = "; ".join(f"{name}: {columns[name].in_words}" for name in asked)
        return asked if len(asked) > 1 else asked[0], why
    able = [column for column in columns.values() if column.holds in ("free text", "names")
            and column.name != answer and not column.repeats]  # fmt: skip
    able.sort(key=lambda column: (column.holds != "free text", -column.words * column.filled))
    if not able:
        raise _undecided(given, columns, "a column of texts", "--text COLUMN")
    first, *others = able
    more = [column.name for column in others if column.holds == "free text"]
    also = f"; not read: {listed(more)}" if more else ""
    return first.name, f"{first.name}: {first.in_words}{also}"


def _answered(
    kinds: Sequence[type[Task]], given: Sequence[Row], columns: Mapping[str, Column],
    texts: Sequence[str], answer: str | None, decimal: str | None,
) -> tuple[Task, str]:  # fmt: skip
    """The task for the column of labels, numbers or answers among ``columns``, and why it is it.

    ``answer`` is this column, where it is known.
    """
    able = columns if answer is None else {answer: columns[answer]} if answer in columns else {}
    possible = {name: task for name, column in able.items()
                if (task := _labelled(kinds, given, column, decimal)) is not None}  # fmt: skip
    if possible:
        return _told_best(possible, given, columns, texts)
    answers = [column for column in able.values() if column.holds == "free text"]
    answers = answers or ([*able.values()] if [*kinds] == [Generation] and answer else [])
    if answers and Generation in kinds:
        best = max(answers, key=lambda column: column.words * column.filled)
        return Generation(answer=best.name), f"{best.name}: {best.in_words}"
    if able and [*kinds] == [Chat]:
        best = max(answers or able.values(), key=lambda column: column.words * column.filled)
        return Chat(user=tuple(texts), assistant=best.name), f"{best.name}: {best.in_words}"
    if Number in kinds:
        check_numbers(given, able, decimal)
    if not columns and LanguageModelling in kinds:
        return LanguageModelling(), "none: the text itself is learned"
    if answer is not None or len(kinds) == 1:  # whose errors say what is missing
        kind = kinds[0] if len(kinds) == 1 else Classification
        return (kind().with_options(label=answer) if answer else kind()), ""
    raise _undecided(given, columns, "a column of labels, numbers or answers", "--label COLUMN")


def _labelled(
    kinds: Sequence[type[Task]], given: Sequence[Row], column: Column, decimal: str | None
) -> Task | None:
    """The task whose labels or numbers a column holds; None where it holds neither."""
    if column.repeats or column.holds not in ("categories", "numbers", "lists", "names"):
        return None
    for kind in kinds:
        if (of_cells := from_cells(kind, given[:FEWEST_READ], column.name, decimal)) is not None:
            return of_cells[0]
    able = column.holds == "categories" and Classification in kinds
    return Classification(label=column.name) if able else None


def _told_best(
    possible: Mapping[str, Task], given: Sequence[Row], columns: Mapping[str, Column],
    texts: Sequence[str],
) -> tuple[Task, str]:  # fmt: skip
    """The task whose answers the texts tell best, its name considered; the later of equals."""
    if len(possible) == 1:
        (name, task), *_ = possible.items()
        return task, f"{name}: {columns[name].in_words}, the only column of answers"
    shares = {name: told(task.with_options(text=tuple(texts)), given)
            for name, task in [*possible.items()][-MOST_TRIED:]}  # fmt: skip

    def rank(name: str) -> float:
        # Nobody writes several labels into a cell by chance.
        several = possible[name].outputs == "labels"
        return -round(shares[name] + columns[name].standing + 0.4 * several, 2)

    best, *others = sorted(reversed(shares), key=rank)  # noqa: C414 - the later of equals comes first
    hardly = "" if shares[best] >= HARDLY else "hardly "
    why = f"{columns[best].in_words}, which the words of the text {hardly}predict"
    why += f" (kappa {shares[best]:.2f}); other candidates: {listed(others, 3)}"
    return possible[best], f"{best}: {why}"


def _undecided(
    given: Sequence[Row], columns: Mapping[str, Column], wanted: str, flag: str
) -> DataError:
    held = [f"{column.name!r} ({column.holds})" for column in columns.values()]
    return DataError(
        where=file_of(given[0].place),
        expected=wanted,
        found=f"columns {listed(held)}" if held else "no other column",
        hint=f"Name it: {flag}. Or name the kind of task: --task KIND",
    )


# ── The positive class and groups ───────────────────────────────────────────────────────────────


def _with_positive(domain: Domain, given: Sequence[Row]) -> tuple[Domain, str]:
    """The domain with the rarer of two labels as its positive class, where it is rare."""
    task = domain.task
    able = {"positive"} <= {field.name for field in fields(task)} and task.positive is None
    labels = [label for row in given for label in task.row_labels(row)] if able else []
    same = merged(Counter(labels))
    counts = Counter(same.get(label, label) for label in labels)
    if len(counts) != 2:
        return domain, ""
    (_, most), (rare, fewest) = counts.most_common()
    share = fewest / (most + fewest)
    if share > SKEWED:
        return domain, ""
    why = f"{shown(rare)}, the label of {100 * share:.0f} % of the rows: its recall and precision "
    why += "decide"
    return replace(domain, task=task.with_options(positive=rare)), why


def _with_group(domain: Domain, columns: Mapping[str, Column], rows: int) -> tuple[Domain, str]:
    """The domain with the column that says whose a row is as its group, where there is one."""
    owner = _owner(domain, columns, rows)
    if owner is None:
        return domain, ""
    why = f"{owner.name}: {owner.in_words}; rows with the same value stay in one split"
    return replace(domain, data=replace(domain.data, group=owner.name)), why


def _owner(domain: Domain, columns: Mapping[str, Column], rows: int) -> Column | None:
    """The column that says whose a row is; None where there is none, or a group is named."""
    read = {*domain.task.columns}
    owners = [column for column in columns.values()
              if column.repeats and column.filled == rows and column.name not in read]  # fmt: skip
    if not owners or domain.data.group:
        return None
    return min(owners, key=lambda column: column.distinct)
