"""The flags that ``fit`` and every recipe share, and the domain that they make."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, NoReturn

from lora_domains.data.source import SPLITS, Data
from lora_domains.domain import RETENTION, Domain, with_settings
from lora_domains.errors import UsageError, did_you_mean
from lora_domains.tasks import Task


class Parser(argparse.ArgumentParser):
    """argparse that suggests the flag that was meant."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(
            where=self.prog,
            expected="flags as --help lists them",
            found=message,
            hint=f"See {self.prog} --help.",
        )

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The parsed flags; raises UsageError for an unknown one."""
        flags, unknown = self.parse_known_args(arguments)
        if getattr(flags, "texts", None) is not None:
            # argparse takes no texts after an option once it has met none before it.
            flags.texts += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            # A verb's flags belong to its own parser.
            known = set(self._option_string_actions)
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    verb = action.choices.get(getattr(flags, "verb", ""))
                    known |= set(verb._option_string_actions) if verb else set()
            word = unknown[0].split("=")[0]
            raise UsageError(
                where=self.prog,
                expected="known flags",
                found=repr(word),
                hint=did_you_mean(word, known),
            )
        return flags


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `fit` and every recipe share."""
    add = parser.add_argument
    add("--base", metavar="PATH_OR_ID", help="base model; default: the embedded one")
    add("--train", help="training rows: CSV, JSONL, Parquet, or hub:OWNER/NAME@REVISION/SPLIT")
    add("--validation", help="validation rows; default: carved from the training rows")
    add("--test", help="test rows; default: carved from the training rows")
    add("--general", metavar="FILE", help="general text that the adapter is held to, in a column "
        "text; default: the embedded world's")  # fmt: skip
    add("--retention", choices=RETENTION, help="how general knowledge is kept; default: auto")
    add("--text", metavar="COLUMN", help="column of the text, or several: context,question")
    add("--label", metavar="COLUMN", help="column of the label")
    add("--positive", metavar="LABEL", help="the class whose recall and precision matter, or none")
    add("--target-recall", type=float, metavar="P", help="target recall for --positive; its "
        "threshold is tuned on validation rows")  # fmt: skip
    add("--target-precision", type=float, metavar="P", help="target precision for --positive")
    add("--head", action="store_true", help="train a head over the labels (needed on encoders)")
    add("--out", default="adapters", metavar="DIR", help="the adapter lands in DIR/NAME")
    add("--epochs", type=int, help="passes over the training rows at most")
    add("--lr", type=float, help="peak learning rate; default: derived from the base's width")
    add("--rank", type=int, help="LoRA rank; default: derived from the supervised tokens")
    add("--seed", type=int, help="of splits, batches and initialisation")
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--init-from", metavar="ADAPTER", help="go on from a saved adapter, on narrower rows")
    add("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    add("--load-in-4bit", action="store_true", help="quantise the base to 4 bits (nf4)")
    add("--limit", type=int, metavar="N", help="a sample of at most N rows of each split")
    add("--group", metavar="COLUMN", help="rows that share it (a patient) stay in one split")
    add("--slice", metavar="COLUMNS", help="report scores for each value of these columns")
    add("--drop-leaks", action="store_true", help="take training rows that are test rows out")
    add("--gradient-checkpointing", action="store_true", help="less memory for more time")
    add("--tracker", metavar="NAME", help="log to tensorboard, wandb or trackio")
    add("--show-text", action="store_true", help="allow row text in items.jsonl")
    add("--dry-run", action="store_true", help="read, check and plan; train and write nothing")


def run_flag_defaults() -> dict[str, Any]:
    """What each flag of a run is when it is not given: for verbs that offer only some of them."""
    parser = Parser(add_help=False)
    add_run_flags(parser)
    return vars(parser.parse_args([]))


def configured(domain: Domain, flags: argparse.Namespace, *, again: bool = False) -> Domain:
    """``domain`` with what the flags say.

    ``again`` is a run repeated from its card: files are then where its rows lie now, and how they
    were split and sampled stays.
    """
    data, task = domain.data, domain.task
    if again:
        given = {split: getattr(flags, split) for split in SPLITS}
        data = replace(data, **{split: source for split, source in given.items() if source})
    elif flags.train:
        # Rows of one's own replace all of the recipe's: a foreign test set would prove nothing.
        data = Data(flags.train, flags.validation, flags.test, data.general)
    elif flags.test or flags.validation:
        data = replace(data, **{k: v for k in ("validation", "test") if (v := getattr(flags, k))})
    changes: dict[str, Any] = {"drop_leaks": flags.drop_leaks or data.drop_leaks}
    if flags.general:
        changes["general"] = flags.general
    if flags.group:
        changes["group"] = flags.group
    if flags.slice:
        changes["slices"] = tuple(flags.slice.split(","))
    if flags.limit is not None:
        changes["limit"] = flags.limit
    data = replace(data, **changes)
    task = _with_task_flags(task, flags)
    given = {k: getattr(flags, k) for k in ("epochs", "lr", "rank", "seed", "retention")}
    settings = {k: v for k, v in given.items() if v is not None}
    if flags.gradient_checkpointing:
        settings["gradient_checkpointing"] = True
    # A recipe speaks for the rows it ships, not for one's own.
    own = flags.train or flags.validation or flags.test
    show = flags.show_text or (domain.show_text and not own)
    return replace(with_settings(domain, **settings), data=data, task=task, show_text=show)


def _with_task_flags(task: Task, flags: argparse.Namespace) -> Task:
    """``task`` with the flags of its columns, labels and head; UsageError where it has none."""
    options: dict[str, Any] = {}
    if flags.text:
        options["text"] = tuple(flags.text.split(","))
    if flags.label:
        options["label"] = flags.label
    if flags.positive:
        options["positive"] = None if flags.positive == "none" else flags.positive
    if flags.head:
        options["head"] = True
    for name in ("target_recall", "target_precision"):
        if getattr(flags, name) is not None:
            options[name] = getattr(flags, name)
    return task.with_options(**options) if options else task


def quantization(flags: argparse.Namespace) -> Literal["8bit", "4bit"] | None:
    """What --load-in-8bit and --load-in-4bit say; raises UsageError for both."""
    if flags.load_in_8bit and flags.load_in_4bit:
        raise UsageError(
            expected="one of --load-in-8bit and --load-in-4bit",
            found="both",
            hint="Leave one out.",
        )
    return "8bit" if flags.load_in_8bit else "4bit" if flags.load_in_4bit else None
