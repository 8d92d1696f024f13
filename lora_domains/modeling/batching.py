"""Batches: which encoded examples go together, and their padded tensors."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lora_domains.errors import DataError, DomainError
from lora_domains.modeling.base import Base
from lora_domains.tasks import Example, Task
from lora_domains.tokenization.chat_template import ChatTemplate
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

WINDOW = 2048
"""The most tokens of a window of plain text, unless the domain's ``max_length`` says otherwise."""
PASS = {True: 100, False: 10_000}
"""Cost of one more pass in tokens, on a CPU and elsewhere: launching it and reading the weights.

Measured on a CPU with the embedded base. On an H200 a step of 0.5 billion parameters took 161 ms
with 16 tokens and 178 with 4,088: one more pass costs as much as about 40,000 tokens, and as about
4,000 at 7 billion, whose tokens take 13 times as long. ``benchmarks/speed/training.py`` measures
it.
"""
IGNORED = -100
"""The label of an unsupervised token, which torch's cross entropy ignores."""


def epoch_batches(
    lengths: Sequence[int],
    batch_size: int,
    seed: int,
    epoch: int,
    classes: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The global batches of one epoch: lists of positions, each position in exactly one.

    With ``classes``, those of each row, as many positions are drawn as there are rows, from each
    class equally often (``balanced_order``).

    A pure function of its arguments, so that a resumed run sees the same batches. Rows are
    shuffled, sorted by length within stretches of 32 batches to save padding, and the batches
    shuffled again; the last one of a stretch may be short.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths)) if classes is None else balanced_order(classes, random)
    stretch = 32 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch].tolist(), key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def balanced_order(
    classes: Sequence[Sequence[int]], random: np.random.Generator
) -> NDArray[np.int_]:
    """Positions of rows, as many as there are rows, from each class equally often, shuffled.

    ``classes`` are those of each row; rows without any are a class of their own. The rows of a
    class follow each other in a random order, again and again where it has too few.
    """
    rows_of: dict[int, list[int]] = {}
    for row, several in enumerate(classes):
        for one in several or (-1,):
            rows_of.setdefault(one, []).append(row)
    least, rest = divmod(len(classes), len(rows_of))
    more = set(random.permutation(sorted(rows_of))[:rest].tolist())
    drawn: list[int] = []
    for one in sorted(rows_of):
        count = least + (one in more)
        rounds = -(-count // len(rows_of[one]))
        turns = [random.permutation(rows_of[one]) for _ in range(rounds)]
        drawn += np.concatenate([*turns, np.empty(0, int)])[:count].tolist()
    return random.permutation(np.array(drawn, dtype=int))


def class_weights(rows: Sequence[EncodedExample], task: Task) -> Tensor | None:
    """What the loss of each class is multiplied by, so that all count alike: inverse frequencies.

    (classes,), or (2, labels) where rows may have several: that of rows without a label, and that
    of rows with it. They are normalised to a mean of 1 over the rows; a class without a row has 1.
    None where a task has neither.
    """
    if not task.has_labels or not rows:
        return None
    if task.outputs == "labels":
        having = np.array([row.truth for row in rows], dtype=float).sum(0)
        counts = np.stack([len(rows) - having, having])
    else:
        counts = np.bincount([row.target for row in rows], minlength=len(task.labels or ()))
    shares = counts * np.maximum((counts > 0).sum(0), 1) / len(rows)
    return torch.tensor(1 / np.where(shares > 0, shares, 1.0), dtype=torch.float32)


def chunks(
    items: Sequence[EncodedExample], most: int, weight: Callable[[EncodedExample], int] = len
) -> Iterator[list[int]]:
    """Positions of ``items`` in batches of similar weight, each at most ``most`` with padding.

    By default the weight of an item is its number of tokens. The same items always give the same
    batches, so every contender is scored in identical ones.
    """
    weights = [weight(item) for item in items]
    chunk: list[int] = []
    for i in sorted(range(len(items)), key=lambda i: (weights[i], i)):
        if chunk and (len(chunk) + 1) * weights[i] > most:
            yield chunk
            chunk = []
        chunk.append(i)
    if chunk:
        yield chunk


@dataclass(frozen=True)
class Batch:
    """Padded rows; ids, mask and positions are (rows, length).

    Rows are left-padded and end in the last column, so that all supervised tokens are in the last
    columns: ``labels`` (rows, supervised columns) are those. The columns that predict them are as
    many, and begin and end one before.

    Texts with masked tokens are right-padded, as encoders expect. ``labels`` is then (rows, most
    masked tokens in a row), and ``places`` of the same shape holds the columns of those tokens.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    labels: Tensor
    places: Tensor | None = None

    def part(self, rows: slice) -> "Batch":
        """These rows of it, with the same padding."""
        places = None if self.places is None else self.places[rows]
        texts = self.ids[rows], self.mask[rows], self.positions[rows]
        return Batch(*texts, self.labels[rows], places)


def collate(items: Sequence[EncodedExample], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Prompt and answer of each item, padded to the longest; only supervised tokens have labels."""
    if items[0].masked:
        return _collate_masked(items, pad, device)
    width = max(len(item.answer) for item in items)
    labels = torch.full((len(items), width), IGNORED)
    for row, item in enumerate(items):
        labels[row, width - len(item.answer) :] = torch.tensor(item.answer)
        for at in item.unsupervised:
            labels[row, width - len(item.answer) + at] = IGNORED
    texts = padded([item.prompt + item.answer for item in items], pad, left=True)
    return Batch(*(part.to(device) for part in (*texts, labels)))


def _collate_masked(items: Sequence[EncodedExample], pad: int, device: torch.device | str) -> Batch:
    width = max(len(item.answer) for item in items)
    labels = torch.full((len(items), width), IGNORED)
    places = torch.zeros((len(items), width), dtype=torch.long)
    for row, item in enumerate(items):
        labels[row, : len(item.answer)] = torch.tensor(item.answer)
        places[row, : len(item.answer)] = torch.tensor(item.masked)
    texts = padded([item.prompt for item in items], pad, left=False)
    return Batch(*(part.to(device) for part in (*texts, labels, places)))


def padded(
    texts: Sequence[Sequence[int]], pad: int, *, left: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of ``texts`` (token ids), each (texts, tokens of the longest)."""
    longest = max(map(len, texts))
    ids = torch.full((len(texts), longest), pad)
    mask = torch.zeros((len(texts), longest), dtype=torch.long)
    for row, text in enumerate(texts):
        start = longest - len(text) if left else 0
        ids[row, start : start + len(text)] = torch.tensor(text)
        mask[row, start : start + len(text)] = 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


def check_embedded(base: Base, items: Iterable[tuple[str, EncodedExample]]) -> None:
    """Raise DataError for a token that the tokenizer has and the base's embeddings lack.

    Each item comes with the place that the error names.
    """
    places = base.model.get_input_embeddings().num_embeddings
    if len(base.tokenizer) <= places:
        return
    checked: tuple[tuple[int, ...], ...] = ()  # labels are the same in all rows
    for where, item in items:
        choices = () if item.choices is checked else item.choices
        checked = item.choices
        for token in chain(item.prompt, item.answer, *choices):
            if token >= places:
                name = base.tokenizer.convert_ids_to_tokens(token)
                raise _not_embedded(base, where, name, token)


def check_spelled(base: Base, examples: Iterable[Example]) -> None:
    """Raise DataError for a row that spells a special token without an embedding.

    It would be read as text, like any other; but rows that spell it were written for a model with
    that token, and its embedding was forgotten.
    """
    places = base.model.get_input_embeddings().num_embeddings
    lacking = {
        token.content: number
        for number, token in base.tokenizer.added_tokens_decoder.items()
        if number >= places
    }
    if not lacking:
        return
    names = re.compile("|".join(map(re.escape, lacking)))
    for example in examples:
        turns = (str(turn.get("content")) for turn in example.messages)
        for text in (example.text or example.prompt, example.answer, *turns):
            if found := names.search(text):
                raise _not_embedded(base, example.place, found[0], lacking[found[0]])


def _not_embedded(base: Base, where: str, token: str, number: int) -> DataError:
    return DataError(
        where=where,
        expected=f"tokens that the {base.model.get_input_embeddings().num_embeddings} embeddings "
        f"of {base.id} hold",
        found=f"{token!r} with the id {number}",
        hint="Remove it from the rows, or save the base with resized embeddings that were trained.",
    )


def row_limit(base: Base, max_length: int | None) -> int:
    """The most tokens of a row; raises DomainError if ``max_length`` exceeds the base's context."""
    if max_length is not None and max_length > base.context:
        raise DomainError(
            where="setting 'max_length'",
            expected=f"at most {base.context}, the context of {base.id} in tokens",
            found=str(max_length),
            hint="Set a smaller one, or leave it out.",
        )
    return max_length or base.context


def tokenization_of(
    base: Base, task: Task, max_length: int, window: int | None = None, start: int | None = None
) -> Tokenization:
    """How examples of ``task`` are tokenised for ``base``; a chat template renders those of a
    chat. Windows of plain text begin with ``start`` where the tokenizer adds no BOS."""
    return Tokenization(
        base.tokenizer, max_length, head=task.head, bidirectional=base.bidirectional,
        window=window, template=template_of(base, task) if task.chat else None,
        start=start,
    )  # fmt: skip


def template_of(base: Base, task: Task) -> ChatTemplate:
    """The chat template that renders examples of ``task``, if one does.

    A base that can think first is asked for its answer at once unless the task has reasoning: it
    would not reach one within the tokens of an answer. A task that leaves this open is asked as the
    template does by default.
    """
    template, thinking = base.chat_template, task.thinking
    return template if thinking is None else template.asked(thinking=thinking)


def window_limit(base: Base, max_length: int | None) -> int:
    """The most tokens of a window of plain text."""
    return max_length or min(base.context, WINDOW)
