"""The flags that several verbs share, and the domain that they describe."""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_domains.atomic import plain_name
from lora_domains.cli.parser import (
    ADAPTERS,
    Parser,
    common_settings,
    device_map,
    floor,
    parsed_setting,
)
from lora_domains.data.readers import read
from lora_domains.data.source import FEWEST_READ, SPLITS, Data, Reading
from lora_domains.domain import BALANCE, RETENTION, Domain, with_settings
from lora_domains.errors import DataError, UsageError
from lora_domains.schema import SETTINGS
from lora_domains.tasks import KINDS
from lora_domains.tasks.answers import Judge

# ── Flags that several verbs share ──────────────────────────────────────────────────────────────


def add_base_flags(group: Any, *, trained: bool = False, quantised: bool = True,
                   mapped: bool = False, sharded: bool = True) -> None:  # fmt: skip
    """The flags that ``open_model`` reads; without ``quantised``, the base is as it is stored.
    ``trained``: an adapter is trained on it, so that it can be found for the rows."""
    which = ("a folder, a Hub id, or auto: the smallest suitable one in .bases or the Hub's cache; "
             "default: the embedded one, for trials") if trained else (
             "a folder or a Hub id; default: that of the adapter, or the embedded one")  # fmt: skip
    group.add_argument("--base", metavar="PATH_OR_ID", help=f"base model: {which}")
    if mapped:
        group.add_argument("--device-map", type=device_map, metavar="MAP", help="spread it over "
                           "device, memory and disk: auto, or JSON (docs/scaling.md)")  # fmt: skip
    if not quantised:
        group.set_defaults(load_in_8bit=False, load_in_4bit=False)
        return
    group.add_argument("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    group.add_argument("--load-in-4bit", action="store_true", help="quantise it to 4 bits (nf4)")
    if sharded:
        group.add_argument("--shard-base", action="store_true", help="divide it among processes")


def add_row_flags(group: Any) -> None:
    """Flags on rows that ``fit``, recipes and curves share."""
    add = group.add_argument
    add("--validation", metavar="FILE", help="validation rows; default: split from the training "
        "rows")  # fmt: skip
    add("--test", metavar="FILE", help="test rows; default: split from the training rows")
    add("--group", metavar="COLUMN", help="rows with the same value (a patient) stay in one split")
    add("--limit", type=int, metavar="N", help="use a sample of at most N rows of each split, "
        "drawn from the first 10 N (at least 1000) of a file")  # fmt: skip
    add("--drop-leaks", action="store_true", help="drop training rows that are also test rows, "
        "instead of refusing them")  # fmt: skip
    add("--drop-empty", action="store_true", help="drop rows with an empty text or label")
    add("--drop-long", action="store_true", help="drop rows whose answer is too long for the base")
    add_reading_flags(group)
    add("--merge-labels", action="store_true", help="take labels that differ only by case, "
        "accents, spaces or number form for one")  # fmt: skip


def add_reading_flags(group: Any) -> None:
    """Flags on how files of rows are read, which ``reading`` takes."""
    add = group.add_argument
    add("--delimiter", metavar="CHAR", help="what separates the cells of CSV files (tab for a "
        "tab); default: detected")  # fmt: skip
    add("--encoding", metavar="NAME", help="encoding of text files, such as cp1252; default: "
        "detected")  # fmt: skip


def add_column_flags(group: Any) -> None:
    add = group.add_argument
    add("--text", metavar="COLUMN", help="column of the text, or several: context,question; "
        "default: text, or proposed by the cells")  # fmt: skip
    add("--label", metavar="COLUMN", help="column of the labels or the answer; default: label(s), "
        "or proposed by the cells")  # fmt: skip
    add("--decimal", metavar="SIGN", help="decimal sign of numbers to predict, . or ,; default: .")
    add("--separator", metavar="CHAR", help="what separates the labels of a cell; default: ;")
    add("--chat", action=argparse.BooleanOptionalAction, help="ask through the base's chat "
        "template, or not; default: on a base that was trained on chats")  # fmt: skip
    add("--instruction", metavar="TEXT", help="what a text is asked for in a chat template")


def add_task_flag(group: Any) -> None:
    kinds = sorted(KINDS)
    group.add_argument("--task", choices=kinds, metavar="KIND", help=f"{', '.join(kinds)}; "
                       "default: proposed from columns and labels")  # fmt: skip


def add_training_flags(group: Any) -> None:
    """Flags on training that ``fit``, recipes and the learning curve share."""
    add = group.add_argument
    add("--epochs", type=int, metavar="N", help="maximum number of passes over the training rows; "
        "default: 8, fewer with more than 13,333 rows")  # fmt: skip
    add("--max-steps", type=int, metavar="N", help="maximum number of optimiser steps")
    add("--lr", type=float, metavar="X", help="peak learning rate; default: derived from the "
        "width of the base")  # fmt: skip
    add("--rank", type=int, metavar="N", help="LoRA rank; default: derived from the number of "
        "supervised tokens")  # fmt: skip
    add("--max-length", type=int, metavar="N", help="maximum number of tokens of a row; default: "
        "the context of the base")  # fmt: skip
    add("--head", action="store_true", help="train a classification head; required on encoders")
    add("--balance", choices=BALANCE, metavar="HOW", help="let rare classes count as much as "
        f"others: {', '.join(BALANCE)}; default: none")  # fmt: skip
    add("--set", action="append", metavar="NAME=VALUE", help="another setting, such as "
        f"training.warmup=0.1; may be repeated. Names: {', '.join(_without_a_flag())}, and "
        "task.FIELD; see docs/training.md")  # fmt: skip


def _without_a_flag() -> list[str]:
    """The settings of every domain that only ``--set`` gives."""
    return [name for name in common_settings() if name not in SETTINGS.values()]


def add_metric_flag(group: Any) -> None:
    group.add_argument("--metric", metavar="NAME", help="the metric that decides: f1, macro_f1, "
                       "accuracy, mcc, rouge_l, bleu, …; default: the task's own")  # fmt: skip


def add_prevalence_flag(group: Any) -> None:
    group.add_argument("--prevalence", type=float, metavar="P", help="the share of positives where "
                       "the adapter will be used; precision is restated for it")  # fmt: skip


def add_answer_flags(group: Any) -> None:
    """Flags on how generated answers are judged."""
    add = group.add_argument
    add("--generate", action="store_true", help="generate the answers of chats too, and compare "
        "them with the references")  # fmt: skip
    add("--judge", metavar="COMMAND", help="a program of your own that also judges the answers. It "
        "reads a JSON object a line (id, prompt, reference, answer: the text of your rows) and "
        "writes a number for each")  # fmt: skip
    add("--judge-range", metavar="LOW,HIGH", help="its worst and its best score; default: 0,1")
    add("--judge-timeout", type=float, metavar="SECONDS", help="what it may take for all answers; "
        "default: 3600")  # fmt: skip


def add_suite_flags(group: Any, *also: str) -> None:
    """Flags on the general questions, which ``recipes.suite_of`` reads; --questions is ``also``
    called so."""
    add = group.add_argument
    add("--suite", default="auto", metavar="NAMES", help="general questions: auto, standard, "
        "facts, instructions, embedded, quick, mmlu, …, harness:TASK,…, or a file; "
        "facts+instructions are both; default: what suits the base and is at hand")  # fmt: skip
    add("--questions", *also, type=int, metavar="N", help="ask a sample of at most N of them")


def add_quiet_flag(group: Any) -> None:
    """The flag that ``open_model`` reads."""
    group.add_argument("--quiet", action="store_true", help="show no stages and no progress; "
                       "results, warnings and errors stay")  # fmt: skip


def add_show_text_flag(group: Any, more: str = "") -> None:
    group.add_argument("--show-text", action="store_true", help="keep the text of rows and answers "
                       f"in items.jsonl{more}")  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser, *, recipe: bool = True) -> None:
    """The flags of a recipe, or those of ``fit``, which has no rows and no name of its own."""
    inputs = parser.add_argument_group("input")
    add = inputs.add_argument
    if not recipe:
        add("rows", nargs="*", metavar="FILE", help="rows (required), as by --train; or recipes")
        add("--name", metavar="NAME", help="name of the domain and adapter; default: the file's")
        add_task_flag(inputs)
    add("--train", metavar="FILE", help="training rows: CSV, JSONL, Parquet, or "
        "hub:OWNER/NAME@REVISION/SPLIT")  # fmt: skip
    if not recipe:
        add("--from-card", metavar="CARD", help="repeat the training in this card.json; --name and "
            "--train are then optional")  # fmt: skip
    add_row_flags(inputs)
    add_column_flags(inputs)
    add_base_flags(inputs, trained=True)
    training = parser.add_argument_group("training")
    add_training_flags(training)
    add = training.add_argument
    add("--retention", choices=RETENTION, metavar="METHOD", help="how general knowledge is kept: "
        f"{', '.join(RETENTION)}; default: auto")  # fmt: skip
    add("--general", metavar="FILE", help="general text for --retention, in a column named text; "
        "default: what suits the base (docs/general-knowledge.md)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="seed of splits, batches and initialisation")
    add("--init-from", metavar="ADAPTER", help="continue from a saved adapter")
    add("--resume", action="store_true", help="continue an interrupted run; a finished one is not "
        "trained again")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="use less memory and more time")
    add("--tracker", metavar="NAME", help="log to tensorboard, wandb or trackio")
    add("--dry-run", action="store_true", help="check the rows, print the plan and an estimate, "
        "then stop")  # fmt: skip
    _add_flags_of_several(parser)
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add("--evaluate", action=argparse.BooleanOptionalAction, help="score the test rows, with "
        "--seeds by every adapter, or none and show validation rows; default: "
        + ("score them" if recipe else "those of --test, and none that were split from the "
           "training rows"))  # fmt: skip
    add("--positive", metavar="LABEL", help="the class whose recall and precision matter, or none")
    add("--target-recall", type=float, metavar="P", help="target recall for --positive: the "
        "threshold is chosen on validation rows, and the gate on recall asks for it")  # fmt: skip
    add("--target-precision", type=float, metavar="P", help="target precision for --positive")
    add("--tune-thresholds", action="store_true", help="choose label thresholds on validation rows")
    add("--floor", action="append", type=floor, metavar="LABEL=P", help="a gate on the recall of a "
        "label: at least P; may be repeated")  # fmt: skip
    add_prevalence_flag(evaluation)
    add("--slice", metavar="COLUMNS", help="report scores for each value of these columns")
    add_metric_flag(evaluation)
    add_answer_flags(evaluation)
    add_suite_flags(evaluation)
    output = parser.add_argument_group("output")
    output.add_argument("--out", default=ADAPTERS, metavar="DIR", help="save the adapter as "
                        "DIR/NAME; default: %(default)s")  # fmt: skip
    add_show_text_flag(output, ", and show some answers after each epoch")
    add_quiet_flag(output)


def _add_flags_of_several(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several trainings in one pass").add_argument
    add("--seeds", type=int, metavar="N", help="train N seeds as NAME, NAME-seed1, …, and show how "
        "much figures on validation rows depend on the seed")  # fmt: skip
    add("--sweep", action="append", metavar="NAME=A,B,…", help="train a setting with each value, "
        "such as lr=1e-4,3e-4, and save the best on validation rows as NAME; of several --sweep, "
        "all combinations")  # fmt: skip
    add("--together", type=int, metavar="N", help="adapters that share a pass, 1 for one after "
        "another; default: what is faster")  # fmt: skip


def run_flag_defaults() -> dict[str, Any]:
    """The default of each flag of a run, for verbs that offer only some of them."""
    parser = Parser(add_help=False)
    add_run_flags(parser)
    return vars(parser.parse_args([]))


# ── What they describe ──────────────────────────────────────────────────────────────────────────


def configured(domain: Domain, flags: argparse.Namespace, *, repeated: bool = False) -> Domain:
    """``domain`` with the changes in ``flags``.

    ``repeated`` is for a run repeated from its card: files replace only where its rows are read
    from, and they are split and sampled as before. Raises UsageError for a setting that is unknown
    or given twice, DomainError for one out of range.
    """
    data = _with_data_flags(domain.data, flags, repeated)
    # A recipe allows the text of its own rows to be shown, not that of the user's rows.
    own_rows = flags.train or flags.validation or flags.test
    shown = flags.show_text or (domain.show_text and not own_rows)
    return with_settings(
        replace(domain, data=data, show_text=shown, judge=_judge(domain, flags)),
        metric=flags.metric or domain.metric,
        prevalence=domain.prevalence if flags.prevalence is None else flags.prevalence,
        **given_settings(domain, data, flags),
    )


def _judge(domain: Domain, flags: argparse.Namespace) -> Judge | None:
    """The judge of ``domain``, as ``flags`` change it; raises UsageError for a bad range."""
    options: dict[str, Any] = {}
    if flags.judge_range is not None:
        try:
            options["low"], options["high"] = map(float, flags.judge_range.split(","))
        except ValueError:
            raise UsageError(
                where="--judge-range",
                expected="two numbers, the worst and the best score",
                found=repr(flags.judge_range),
                hint="For example --judge-range 1,10",
            ) from None
    if flags.judge_timeout is not None:
        options["timeout"] = flags.judge_timeout
    if flags.judge is not None:
        return Judge(flags.judge, **options)
    if domain.judge is None and options:
        raise UsageError(
            where="--judge-range and --judge-timeout",
            expected="a program that judges",
            found="none",
            hint="Give it: --judge COMMAND",
        )
    return domain.judge and replace(domain.judge, **options)


def given_settings(domain: Domain, data: Data, flags: argparse.Namespace) -> dict[str, Any]:
    """The settings of ``domain`` that ``flags`` give, those of ``--set`` among them."""
    given: dict[str, tuple[Any, str]] = {}
    for flag, name in SETTINGS.items():
        value = getattr(flags, flag)
        if value is not None and value is not False:
            given[name] = value, "--" + flag.replace("_", "-")
    if flags.text:
        given["task.text"] = columns(flags.text, data), "--text"
    if flags.chat is False:
        given["task.chat"] = False, "--no-chat"
    if flags.floor:
        given["gates.floors"] = dict(flags.floor), "--floor"
    if flags.positive == "none":
        given["task.positive"] = None, "--positive"
    for assignment in flags.set or ():
        name, value = parsed_setting(domain, assignment)
        before, source = given.setdefault(name, (value, f"--set {assignment}"))
        if value != before:
            raise UsageError(
                where=f"--set {assignment}",
                expected=f"one value of {name}",
                found=f"{before!r} from {source} as well",
                hint="Leave one of them out.",
            )
    return {name: value for name, (value, _) in given.items()}


def _with_data_flags(data: Data, flags: argparse.Namespace, repeated: bool) -> Data:
    given = {split: source for split in SPLITS if (source := getattr(flags, split))}
    if flags.train and not repeated:
        # The user's rows replace all rows of a recipe, whose test set does not belong to them.
        data = Data(flags.train, flags.validation, flags.test, data.general)
    elif given:
        data = replace(data, **given)
    changes: dict[str, Any] = {}
    for name in ("drop_leaks", "drop_empty", "drop_long", "merge_labels", "general", "group"):
        if getattr(flags, name):
            changes[name] = getattr(flags, name)
    changes |= {name: value for name, value in asdict(reading(flags)).items() if value}
    if flags.slice:
        slices = columns(flags.slice, data)
        changes["slices"] = (slices,) if isinstance(slices, str) else slices
    if flags.limit is not None:
        changes["limit"] = flags.limit
    return replace(data, **changes)


def columns(names: str, data: Data) -> str | tuple[str, ...]:
    """The column, or the columns in a list like ``context,question``.

    A column's own name may have commas in it; only then are the names of the columns read.
    """
    parts = names.split(",")
    source = data.train if data.train is not None else data.test
    if len(parts) == 1 or source is None or data.row is not None:
        return names.strip() if len(parts) == 1 else tuple(part.strip() for part in parts)
    try:
        known = read(source, "train", replace(data.reading, most=FEWEST_READ))[0].values
    except DataError:  # which is raised again when the rows are read
        known = {}
    found = []
    while parts:
        longest = range(len(parts), 0, -1)
        size = next((n for n in longest if ",".join(parts[:n]).strip() in known), 1)
        found.append(",".join(parts[:size]).strip())
        parts = parts[size:]
    return found[0] if len(found) == 1 else tuple(found)


def reading(flags: argparse.Namespace) -> Reading:
    """How files are read; raises UsageError for a delimiter of several characters."""
    return Reading(flags.delimiter and one_character(flags.delimiter), flags.encoding)


def one_character(delimiter: str) -> str:
    """The delimiter that a flag names; raises UsageError unless it is one character."""
    character = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if len(character) != 1:
        raise UsageError(
            where="--delimiter",
            expected="one character, or tab",
            found=repr(delimiter),
            hint="For example --delimiter ';'",
        )
    return character


def domain_name(file: Path) -> str:
    """A domain name made from the name of a file."""
    return plain_name(file.stem) or "rows"
