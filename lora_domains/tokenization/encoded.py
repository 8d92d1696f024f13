"""Examples as token ids, and two functions on lists of ids."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

from lora_domains.tasks.rows import Example, labels_in


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """The token ids of one example. ``answer`` ends with EOS; ``choices`` have no EOS, unless one
    of them is a prefix of another.

    In a masked text, ``masked`` are positions in ``prompt`` and ``answer`` holds the tokens that
    the masks replace.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    target: int = -1
    truncated: bool = False
    masked: tuple[int, ...] = ()
    unsupervised: tuple[int, ...] = ()
    """Positions in ``answer`` that are read, not predicted: turns between those of the
    assistant."""
    truth: tuple[float, ...] = ()
    """What is to be predicted where that is not one choice: see ``Example.truth``."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The numbers of the row's labels, for tasks that have labels (``Example.labels``)."""
        return labels_in(self.target, self.truth)

    def __len__(self) -> int:
        return len(self.prompt) + (0 if self.masked else len(self.answer))

    @property
    def supervised(self) -> int:
        """Number of supervised tokens; what a head predicts counts as one."""
        of_head = int(self.target >= 0 or bool(self.truth))
        return len(self.answer) - len(self.unsupervised) or of_head

    @property
    def last_answer(self) -> tuple[int, ...]:
        """The last of the answers, where there are several with turns between them."""
        return self.answer[self.unsupervised[-1] + 1 if self.unsupervised else 0 :]

    def unanswered(self) -> "EncodedExample":
        """All that is read before ``last_answer``, as a prompt without an answer."""
        turns = self.answer[: len(self.answer) - len(self.last_answer)]
        return replace(self, prompt=(*self.prompt, *turns), answer=(), unsupervised=())


class EncodedRow(NamedTuple):
    """An example and its encoding. A long plain text has several, one for each window."""

    example: Example
    encoded: EncodedExample


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many token ids both begin with."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def without_middle(tokens: Sequence[int], room: int) -> Sequence[int]:
    """``tokens`` if there is ``room`` for them, else their beginning and their end."""
    if len(tokens) <= room:
        return tokens
    head = room // 2
    return [*tokens[:head], *tokens[len(tokens) - (room - head) :]]
