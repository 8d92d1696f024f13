"""The parser of a command, its errors on the terminal, and its exit codes."""

import argparse
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lora_domains.console import quiet_imports
from lora_domains.errors import LoraDomainsError, TrainingInterrupted, UsageError, did_you_mean

EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
"""Exit codes of the verbs that end in a verdict."""
ERROR, INTERRUPTED = 2, 130


def guarded(run: Callable[[], int]) -> int:
    """Run a command; returns its exit code, and prints an error of this package as a message."""
    from rich.console import Console
    from rich.markup import escape

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
    # All processes of a launch raise the same error; the first one of each machine prints it.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    where = f" {escape(error.where)}" if error.where else ""
    console.print(f"[bold red]{type(error).__name__}[/][bold]{where}[/]")
    console.print(f"  expected  {escape(error.expected)}")
    console.print(f"  found     {escape(error.found)}")
    console.print(f"  hint      {escape(error.hint)}")
    return INTERRUPTED if isinstance(error, TrainingInterrupted) else ERROR


class Parser(argparse.ArgumentParser):
    """argparse with errors of this package, a suggestion for unknown flags, and plain help."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        kwargs["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(
            where=self.prog,
            expected="flags as in --help",
            found=message,
            hint=f"See {self.prog} --help.",
        )

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The parsed flags; raises UsageError for an unknown verb, flag or argument."""
        words = list(sys.argv[1:] if arguments is None else arguments)
        self._check_words(words)
        flags, rest = self.parse_known_args(words)
        if getattr(flags, "texts", None) is not None:
            # argparse leaves texts after an option unparsed when none came before it.
            flags.texts += rest
            rest = []
        if rest:
            raise UsageError(
                where=self.prog,
                expected="no further argument",
                found=repr(rest[0]),
                hint=f"Put a value with spaces in quotes. See {self.prog} --help.",
            )
        return flags

    def _check_words(self, words: Sequence[str]) -> None:
        """Raise UsageError for an unknown verb or flag among ``words``.

        argparse would first ask for the required arguments, and one of them may be misspelled.
        """
        verbs = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        for at, word in enumerate(words):
            if word == "--":
                return
            if _is_flag(word):
                name = word.split("=")[0]
                if name not in self._option_string_actions:
                    hint = did_you_mean(name, self._option_string_actions)
                    raise self._unknown("a known flag", name, hint)
            elif verbs:
                if word not in verbs[0]:
                    raise self._unknown("a verb", word, did_you_mean(word, verbs[0]))
                verbs[0][word]._check_words(words[at + 1 :])
                return

    def _unknown(self, expected: str, word: str, hint: str) -> UsageError:
        return UsageError(where=self.prog, expected=expected, found=repr(word), hint=hint)


def _is_flag(word: str) -> bool:
    """Whether argparse takes ``word`` for a flag: no number such as -1, and no text with spaces."""
    number = re.fullmatch(r"-\d+|-\d*\.\d+", word)
    return len(word) > 1 and word[0] == "-" and " " not in word and not number


def wrapped(text: str) -> str:
    """``text`` for a terminal of 80 columns; an empty line separates paragraphs."""
    return "\n\n".join(textwrap.fill(paragraph, 79) for paragraph in text.split("\n\n"))


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    example: str,
    usage: str,
) -> Parser:
    """Add a verb; ``summary`` is its line in the list of verbs, ``usage`` its required arguments.

    ``description`` says what it does and what it writes. Its flags go into four groups: input,
    training, evaluation and output.
    """
    parser: Parser = verbs.add_parser(
        name,
        help=summary,
        usage=f"lora-domains {name} {usage}".rstrip(),
        description=wrapped(description),
        epilog=f"example:\n  {example}",
    )
    parser.set_defaults(run=run)
    return parser


def check_no_file(texts: Sequence[str]) -> None:
    """Raise UsageError for a text that is the name of a file, whose name would be labelled."""
    for text in texts:
        if _is_file(text):
            raise UsageError(
                where=text,
                expected="a text",
                found="the name of a file",
                hint=f"For the rows in it: lora-domains predict ADAPTER --input {text}",
            )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long a name, or a NUL character
        return False
