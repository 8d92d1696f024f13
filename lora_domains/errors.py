"""Every error this package raises on purpose.

    LoraDomainsError
    ├── UsageError            an unknown flag, setting, metric or name ("did you mean …?")
    ├── DomainError           a declaration that contradicts itself, or an unsafe name
    ├── DataError             rows: which file, line and column
    │   └── LeakError         a test row that is also a training row
    ├── BaseModelError        the base cannot be found, loaded or used; or it changed
    ├── AdapterError          an adapter folder that is not taken
    │   ├── AdapterMismatch       made on another base
    │   ├── AdapterCorrupt        missing, extra, misshapen, changed or non-finite tensors
    │   └── AdapterUnsupported    a PEFT method or option this package would get wrong
    └── TrainingError         training stopped
        ├── LossExploded          NaN, infinity, or a loss far above the start
        ├── OutOfMemory           no memory for a single row
        └── TrainingInterrupted   Ctrl-C: the last good adapter was saved

Each says what was expected, what was found, where, and how to fix it.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class LoraDomainsError(Exception):
    """The root of the tree above; catching it catches everything raised on purpose."""

    def __init__(self, *, expected: str, found: str, hint: str, where: str = "") -> None:
        self.expected = expected
        self.found = found
        self.hint = hint
        self.where = where
        place = f"{where}: " if where else ""
        super().__init__(f"{place}expected {expected}; found {found}. {hint}")

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive pickling by default (worker processes raise too).
        return _rebuild, (type(self), self.expected, self.found, self.hint, self.where)


def _rebuild(
    kind: type[LoraDomainsError], expected: str, found: str, hint: str, where: str
) -> LoraDomainsError:
    return kind(expected=expected, found=found, hint=hint, where=where)


class UsageError(LoraDomainsError):
    """An unknown flag, setting, metric or name."""


class DomainError(LoraDomainsError):
    """A declaration that contradicts itself, or a name that is not safe as a folder."""


class DataError(LoraDomainsError):
    """Rows that cannot be used as they are."""


class LeakError(DataError):
    """A row of the test set is also a row of the training set."""


class BaseModelError(LoraDomainsError):
    """The base cannot be found, loaded or used, or its weights changed."""


class AdapterError(LoraDomainsError):
    """An adapter folder that is not taken."""


class AdapterMismatch(AdapterError):
    """The adapter was made on another base."""


class AdapterCorrupt(AdapterError):
    """Tensors are missing, extra, misshapen, changed or non-finite."""


class AdapterUnsupported(AdapterError):
    """A PEFT method or option that would be computed wrongly here, refused by name."""


class TrainingError(LoraDomainsError):
    """Training stopped."""


class LossExploded(TrainingError):
    """The loss became NaN, infinite, or far larger than it was at the start."""


class OutOfMemory(TrainingError):
    """There is no memory left for a single row."""


class TrainingInterrupted(TrainingError):
    """Ctrl-C: the last good adapter was saved."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The known names nearest to ``word`` as a sentence, or the whole list where none is near."""
    names = sorted(known)
    near = get_close_matches(word, names, n=3, cutoff=0.6)
    if near:
        return "Did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "Known: " + ", ".join(names) + "."


def listed(values: Iterable[object], most: int = 8) -> str:
    """``values`` in a sentence, cut after ``most`` with a count of the rest."""
    items = [str(value) for value in values]
    rest = len(items) - most
    return ", ".join(items[:most]) + (f" and {rest} more" if rest > 0 else "")
