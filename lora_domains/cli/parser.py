"""The parser of a command and of its arguments, its errors on the terminal, and its exit codes."""

import argparse
import io
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lora_domains.errors import (
    LoraDomainsError,
    TrainingInterrupted,
    UsageError,
    did_you_mean,
    in_lines,
)
from lora_domains.schema import known_here, unneeded

if TYPE_CHECKING:
    from lora_domains.domain import Domain

ADAPTERS = "adapters"
"""The default folder of adapters."""
EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
"""Exit codes of the verbs that end in a verdict."""
ERROR, INTERRUPTED = 2, 130

INVALID_CHOICE = re.compile(r"argument (.+?): invalid choice: (.+) \(choose from (.+)\)")
"""argparse's message for a value that is none of the choices."""


def guarded(run: Callable[[], int]) -> int:
    """Run a command; returns its exit code, and prints an error of this package as a message."""
    quiet_imports()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a log in cp1252 or ASCII has no arrows
    try:
        return run()
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has enough (| head). What is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except LoraDomainsError as raised:
        error = raised
    from rich.console import Console

    from lora_domains.console import Display

    # All processes of a launch raise the same error; the first one of each machine prints it.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    Display(console=Console(stderr=True, highlight=False, emoji=False, quiet=quiet)).failure(error)
    return INTERRUPTED if isinstance(error, TrainingInterrupted) else ERROR


def quiet_imports() -> None:
    """Hide the notices that libraries print while they are imported, but not later ones."""
    # transformers' progress bar for reading weights only repeats our own stages.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"bitsandbytes\..*")


class Help(argparse.RawDescriptionHelpFormatter):
    """argparse's help, which breaks no name such as gguf-adapter at a hyphen."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return in_lines(" ".join(text.split()), width)


def _with_negatives(words: Sequence[str]) -> list[str]:
    """``words`` with ``--judge-range -1,1`` as ``--judge-range=-1,1``, which argparse needs."""
    joined: list[str] = []
    for word in words:
        last = joined[-1] if joined else ""
        if re.fullmatch(r"-[\d.]+,[-\d.,]+", word) and last.startswith("--") and "=" not in last:
            joined[-1] = f"{last}={word}"
        else:
            joined.append(word)
    return joined


class Parser(argparse.ArgumentParser):
    """argparse with errors of this package, a suggestion for unknown flags, and plain help."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        kwargs["formatter_class"] = Help
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        where, expected, hint = self.prog, "flags as in --help", f"See {self.prog} --help."
        if chosen := INVALID_CHOICE.fullmatch(message):
            flag, message, choices = chosen.groups()
            known = [choice.strip("'") for choice in choices.split(", ")]
            where, expected = f"{self.prog} {flag}", f"one of {', '.join(known)}"
            hint = did_you_mean(message.strip("'"), known)
        raise UsageError(where=where, expected=expected, found=message, hint=hint)

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The parsed flags; raises UsageError for an unknown verb, flag or argument."""
        words = _with_negatives(sys.argv[1:] if arguments is None else arguments)
        self._check_words(words)
        flags, rest = self.parse_known_args(words)
        if getattr(flags, "texts", None) is not None:
            # argparse leaves texts after an option unparsed when none came before it.
            flags.texts += rest
            rest = []
        if rest:
            verb = self._verb_of(words)
            folder = "--out" in verb._option_string_actions and Path(rest[0]).is_dir()
            raise UsageError(
                where=verb.prog,
                expected="no further argument",
                found=repr(rest[0]),
                hint=f"For the adapters in that folder: {verb.prog} --out {rest[0]}"
                if folder
                else f"Put a value with spaces in quotes. See {verb.prog} --help.",
            )
        return flags

    def _verb_of(self, words: Sequence[str]) -> argparse.ArgumentParser:
        """The parser of the verb among ``words``; this one where it has no verbs."""
        known = next((a.choices for a in self._actions
                      if isinstance(a, argparse._SubParsersAction)), {})  # fmt: skip
        return next((known[word] for word in words if word in known), self)

    def _check_words(self, words: Sequence[str]) -> None:
        """Raise UsageError for an unknown verb or flag among ``words``.

        argparse would first ask for the required arguments, and one of them may be misspelled.
        """
        verbs = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        unknown: dict[str, list[str]] = {}
        for at, word in enumerate(words):
            if word == "--":
                break
            if _is_flag(word):
                name = word.split("=")[0]
                if name not in self._option_string_actions:
                    unknown[name] = self._meant(name)
            elif verbs:
                if word not in verbs[0]:
                    raise UsageError(
                        where=self.prog,
                        expected="a verb",
                        found=repr(word),
                        hint=did_you_mean(word, verbs[0], known_here(word, verbs[0])),
                    )
                if not unknown:
                    verbs[0][word]._check_words(words[at + 1 :])
                break
        if unknown:
            raise UsageError(
                where=self.prog,
                expected="a known flag" if len(unknown) == 1 else "known flags",
                found=", ".join(map(repr, unknown)),
                hint=self._hint(unknown),
            )

    def _meant(self, flag: str) -> list[str]:
        """The flags, or the settings of --set, that an unknown flag may mean."""
        flags = self._option_string_actions
        meant = known_here(flag, flags)
        if unneeded(flag):
            return meant
        if not meant and "--set" in flags:
            meant = [f"--set {name}=…" for name in known_here(flag, common_settings())]
        names = {name.lstrip("-"): name for name in flags}
        near = get_close_matches(flag.lstrip("-"), names, cutoff=0.7)
        return meant or [names[name] for name in near]

    def _hint(self, unknown: Mapping[str, Sequence[str]]) -> str:
        """What ``unknown`` flags mean, and the help for those that resemble none."""
        hints, reasons = [], dict.fromkeys(filter(None, map(unneeded, unknown)))
        for flag, meant in unknown.items():
            if meant:
                of_several = f" for {flag!r}" if len(unknown) > 1 else ""
                hints.append(" or ".join(map(repr, meant)) + of_several)
        known = [f"Did you mean {', '.join(hints)}?"] if hints else []
        unclear = any(not meant and not unneeded(flag) for flag, meant in unknown.items())
        return " ".join([*known, *reasons, *[f"See {self.prog} --help."] * unclear])


def common_settings() -> list[str]:
    """The settings of every domain."""
    from lora_domains.data.source import Data
    from lora_domains.domain import Domain, setting_types
    from lora_domains.tasks import Classification

    names = setting_types(Domain("any", Classification(), Data()))
    return [name for name in names if not name.startswith("task.")]


def _is_flag(word: str) -> bool:
    """Whether argparse takes ``word`` for a flag: no number such as -1, and no text with spaces."""
    number = re.fullmatch(r"-\d+|-\d*\.\d+", word)
    return len(word) > 1 and word[0] == "-" and " " not in word and not number


def wrapped(text: str) -> str:
    """``text`` for the terminal; an empty line separates paragraphs."""
    room = _room()
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    return "\n\n".join("\n".join(in_lines(paragraph, room)) for paragraph in paragraphs)


def _room() -> int:
    """Characters of a line of help: 79, or what a narrower terminal has."""
    return max(40, min(79, shutil.get_terminal_size().columns - 1))


class Verbs:
    """The verbs of a command. One without flags of its own is known by name alone."""

    def __init__(self, command: Parser) -> None:
        self._parsers = command.add_subparsers(
            dest="verb", metavar="VERB", required=True, prog=command.prog, help=argparse.SUPPRESS
        )

    def add(self, name: str, **options: Any) -> Parser:
        """Add a verb; ``options`` are those of its parser."""
        parser: Parser = self._parsers.add_parser(name, **options)
        return parser

    def add_names(self, names: Iterable[str]) -> None:
        """Add those of ``names`` that are not there yet, without flags."""
        for name in names:
            if name not in self._parsers.choices:
                self._parsers.add_parser(name)


def add_verb(
    verbs: Verbs,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    description: str,
    example: str,
    usage: str,
) -> Parser:
    """Add a verb; ``usage`` shows its required arguments.

    ``description`` says what it does and what it writes. Its flags go into four groups: input,
    training, evaluation and output.
    """
    parser = verbs.add(
        name,
        usage=f"lora-domains {name} {usage}".rstrip(),
        description=wrapped(description),
        epilog=f"example:\n  {example}",
    )
    parser.set_defaults(run=run)
    return parser


def add_adapter_argument(group: Any, name: str = "adapter", **options: Any) -> None:
    """An adapter that ``find_adapter`` finds."""
    where = "its folder, its name in --out, or OWNER/NAME@REVISION on the Hub"
    options = {"metavar": "ADAPTER", "help": where} | options
    group.add_argument(name, **options)


def add_out_flag(group: Any) -> None:
    group.add_argument("--out", default=ADAPTERS, metavar="DIR", help="folder of the adapters; "
                       "default: %(default)s")  # fmt: skip


def add_report_flags(parser: argparse.ArgumentParser, evaluation: Any) -> Any:
    """The flags on a report that ``benchmark`` and ``report`` share; returns the output group."""
    evaluation.add_argument("--against", "--baseline", metavar="DIR", help="also say what got "
                            "worse since these older adapters, such as a release")  # fmt: skip
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", default="reports", metavar="DIR", help="folder of the report; default: "
        "%(default)s")  # fmt: skip
    add("--junit", metavar="FILE", help="place of the JUnit file; default: DIR/junit.xml")
    add("--show-text", action="store_true", help="show the text of wrongly answered rows")
    return output


def check_no_file(texts: Sequence[str], adapter: str | None = None) -> None:
    """Raise UsageError for a text that is the name of a file, whose name would be labelled, and for
    an adapter that is one.
    """
    from lora_domains.data.readers import READERS
    from lora_domains.tasks.answers import is_file

    rows = adapter and Path(adapter).suffix in READERS and not Path(adapter).name.endswith(".json")
    for text in [*([adapter] if adapter and rows else []), *texts]:
        if is_file(text):
            named = "ADAPTER" if text == adapter else adapter or "ADAPTER"
            raise UsageError(
                where=text,
                expected="the name of an adapter" if text == adapter else "a text",
                found="the name of a file",
                hint=f"For the rows in it: lora-domains predict {named} --input {text}",
            )


def floor(text: str) -> tuple[str, float]:
    """A label and its least recall, of a text like ``sepsis=.8``."""
    label, _, value = text.rpartition("=")
    try:
        recall = float(value)
    except ValueError:
        recall = -1.0
    if not label.strip() or recall < 0:
        raise UsageError(
            where=f"--floor {text}",
            expected="a label and its least recall",
            found=repr(text),
            hint="For example --floor sepsis=0.8",
        )
    return label.strip(), recall


def device_map(text: str) -> str | dict[str, Any]:
    """A device map: auto, or a JSON object with a place for each module."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return dict(json.loads(text))
    except json.JSONDecodeError as error:
        raise UsageError(
            where="--device-map",
            expected='auto, or JSON such as {"": "cpu", "model.layers.3": "disk"}',
            found=f"text that is not JSON ({error.msg}, column {error.colno})",
            hint="Quote it in the shell: --device-map '{…}'",
        ) from None


def parsed_setting(domain: "Domain", assignment: str) -> tuple[str, Any]:
    """Name and value of a setting of ``domain`` in a text like ``training.warmup=0.1``.

    Raises UsageError for an unknown name, or a value that is not of the setting's type.
    """
    from lora_domains.domain import setting_types
    from lora_domains.schema import from_text

    (name, equals, text), types = assignment.partition("="), setting_types(domain)
    if name not in types:
        fault, found, hint = "a known setting", name, _meant(name, types)
    elif not equals:
        fault, found, hint = "NAME=VALUE", assignment, f"For example --set {name}=…"
    else:
        try:
            return name, from_text(text, types[name])
        except ValueError as error:
            fault, found, hint = f"{name}: {error}", text, "See docs/training.md, Settings."
    raise UsageError(where=f"--set {assignment}", expected=fault, found=repr(found), hint=hint)


def swept_values(domain: "Domain", assignments: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each setting in texts like ``rank=8,16``, as ``joint.grid`` takes them.

    Raises UsageError for an unknown setting, one that is named twice, or a value of another type.
    """
    from lora_domains.domain import setting_types
    from lora_domains.joint.grid import swept_name
    from lora_domains.schema import from_text

    sweep: dict[str, list[Any]] = {}
    for assignment in assignments:
        given, _, text = assignment.partition("=")
        name, fault = swept_name(domain, given), ""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            values = [from_text(part, setting_types(domain)[name]) for part in parts]
        except ValueError as error:
            fault = f"{name}: {error}"
        if name in sweep:
            fault = f"all values of {name} in one --sweep"
        if fault:
            raise UsageError(
                where=f"--sweep {assignment}", expected=fault, found=repr(text),
                hint=f"For example --sweep {given}=A,B",
            )  # fmt: skip
        sweep[name] = values
    return sweep


def _meant(name: str, known: Collection[str]) -> str:
    """Which of the settings ``known`` are like ``name``, with or without its part."""
    last = name.rpartition(".")[2]
    setting = {one: one.rpartition(".")[2] for one in known}
    nearest = [setting[one] for one in known_here(last, known)]
    nearest = nearest or get_close_matches(last, setting.values(), 1)
    meant = [one for one, last in setting.items() if last in nearest]
    return f"Did you mean {' or '.join(map(repr, meant))}?" if meant else did_you_mean(name, known)
