"""Every error this package raises on purpose.

    LoraDomainsError
    ├── UsageError            an unknown flag, setting or name, or a call that cannot be carried out
    ├── DomainError           a setting out of range, an unsafe name, or a broken recipe
    ├── DataError             rows that cannot be used: in which file, line and column
    │   ├── EmptyCell         a cell without text where text or a label belongs
    │   ├── AnswerTooLong     an answer that leaves no room for any of its prompt
    │   ├── ChatTemplateError     a conversation that the base's chat template cannot render
    │   └── LeakError         test rows that are also training rows
    ├── JudgeError            a program that judges answers and fails, or writes no scores
    ├── BaseModelError        a base that cannot be found, loaded or used, or that changed
    ├── AdapterError          an adapter that cannot be loaded, saved or used
    │   ├── AdapterMismatch       made on another base
    │   ├── AdapterCorrupt        missing, extra, misshapen, changed or non-finite tensors
    │   └── AdapterUnsupported    a PEFT method or option that is not supported
    └── TrainingError         training stopped
        ├── LossExploded          a loss that is NaN, infinite or far above the first
        ├── OutOfMemory           not enough memory for a single row
        └── TrainingInterrupted   Ctrl-C or SIGTERM; the best finished epoch is saved

Each has ``expected``, ``found``, ``where`` and ``hint``.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib.util import find_spec


class LoraDomainsError(Exception):
    """Base class of the errors of this package.

    ``where`` names a file, row, column or setting; ``hint`` says how to fix it.
    """

    def __init__(self, *, expected: str, found: str, hint: str, where: str = "") -> None:
        self.expected = expected
        self.found = found
        self.hint = hint
        self.where = where
        super().__init__(str(self))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}expected {self.expected}; found {self.found}. {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions with keyword-only arguments cannot be unpickled without this.
        return _rebuild, (type(self), self.expected, self.found, self.hint, self.where)


def _rebuild(
    kind: type[LoraDomainsError], expected: str, found: str, hint: str, where: str
) -> LoraDomainsError:
    return kind(expected=expected, found=found, hint=hint, where=where)


class UsageError(LoraDomainsError):
    """An unknown flag, setting, metric or name, or a call that cannot be carried out."""


class DomainError(LoraDomainsError):
    """A setting out of range, an unsafe name, or a recipe that cannot be loaded."""


class DataError(LoraDomainsError):
    """Rows that cannot be used."""


class EmptyCell(DataError):
    """A cell without text where text or a label belongs."""


class AnswerTooLong(DataError):
    """An answer that leaves no room for any of its prompt."""


class ChatTemplateError(DataError):
    """A conversation that the base's chat template refuses, or renders without its answers."""


class LeakError(DataError):
    """Test rows that are also training rows."""


class JudgeError(LoraDomainsError):
    """A program that judges answers failed, or wrote something else than scores."""


class BaseModelError(LoraDomainsError):
    """A base that cannot be found, loaded or used, or whose weights changed."""


class AdapterError(LoraDomainsError):
    """An adapter that cannot be loaded, saved or used."""


class AdapterMismatch(AdapterError):
    """The adapter was made on another base."""


class AdapterCorrupt(AdapterError):
    """Tensors are missing, extra, misshapen, changed or non-finite."""


class AdapterUnsupported(AdapterError):
    """The adapter uses a PEFT method or option that is not supported."""


class TrainingError(LoraDomainsError):
    """Training stopped."""


class LossExploded(TrainingError):
    """The loss became NaN, infinite or far larger than the first."""


class OutOfMemory(TrainingError):
    """There is not enough memory for a single row."""


class TrainingInterrupted(TrainingError):
    """Training was interrupted by a signal; the best finished epoch is saved."""


def did_you_mean(word: str, known: Iterable[str], first: Sequence[str] = ()) -> str:
    """A sentence with the known names ``first``, or those most similar to ``word``, or all."""
    names = sorted(known)
    if near := list(first) or get_close_matches(word, names, n=3, cutoff=0.6):
        return "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "Known: " + ", ".join(map(repr, names)) + "."


def check_installed(
    where: str, expected: str, extra: str, packages: Iterable[str], *, instead: str = ""
) -> None:
    """Raise UsageError unless ``packages`` are installed, with the command for their ``extra``.

    ``instead`` is another way.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(
            where=where,
            expected=expected,
            found=f"{listed(missing)} not installed",
            hint=f"pip install 'lora-domains[{extra}]'" + (f", or {instead}." if instead else ""),
        )


MOST_LISTED = 8
"""Values that an error lists in full."""


_BREAK = re.compile(r" (?!(?:%|[kMGT]?B|ms|s|min|h|nats|points)(?!\w))|(?<![\d.]) ")


def in_lines(text: str, room: int, width: Callable[[str], int] = len) -> list[str]:
    """``text`` in lines of ``room`` cells, broken between words, never between number and unit."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        lines.append("")
        for word in _BREAK.split(paragraph):
            longer = f"{lines[-1]} {word}" if lines[-1] else word
            if lines[-1] and width(longer) > room:
                lines.append(word)
            else:
                lines[-1] = longer
    return [line.rstrip() for line in lines]


def number_of(count: int, what: str) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def listed(values: Iterable[object], most: int = MOST_LISTED) -> str:
    """``values`` separated by commas; after ``most`` of them, the number of the others."""
    items = [str(value) for value in values]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
