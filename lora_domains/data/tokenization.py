"""From examples to token ids: prompt and answer, what is supervised, what is cut, how rows batch.

The prompt is never supervised. An answer is never cut: where a row is too long its prompt loses
tokens from the middle, because beginnings and ends carry most (Sun et al. 2019, "How to Fine-Tune
BERT for Text Classification", section 5.3.1, head + tail). Each answer ends with EOS.

Where a trained head answers, an item is its prompt alone, and its target is the label. An encoder
reads general text with some of its tokens masked, and is asked for those.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from lora_domains.data.prepare import RowCounts
from lora_domains.errors import DataError, TrainingError
from lora_domains.tasks import Example

MASKED = 0.15
"""Share of a general text's tokens that an encoder is asked for (Devlin et al. 2019, BERT)."""


@dataclass(frozen=True)
class EncodedExample:
    """One encoded example. ``answer`` ends with EOS; ``choices`` do not.

    In a masked text (``masked``: places in ``prompt``) ``answer`` holds what stood there.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    target: int = -1
    truncated: bool = False
    masked: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + (0 if self.masked else len(self.answer))

    @property
    def supervised(self) -> int:
        """Tokens that are supervised; a label given to a head counts as one."""
        return len(self.answer) or int(self.target >= 0)


class EncodedRow(NamedTuple):
    """An example and its encoding. A long plain text has several, one for each window."""

    example: Example
    encoded: EncodedExample


class Tokenization:
    """Tokenises examples for one base, at most ``max_length`` tokens each.

    With ``head`` an item is its prompt, for a trained head to label. ``framed`` is how a base that
    is an encoder reads: between [CLS] and [SEP], and general text with masks.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, *, head: bool = False, framed: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head = head
        self.eos: int = tokenizer.eos_token_id
        self._answers: dict[str, tuple[int, ...]] = {}
        prefix = tokenizer("a", add_special_tokens=True)["input_ids"]
        # Exactly one BOS where the tokenizer adds one, whatever the prompt starts with.
        bos = tokenizer.bos_token_id
        self.bos: tuple[int, ...] = (bos,) if bos is not None and prefix[:1] == [bos] else ()
        self.sep: tuple[int, ...] = ()
        if framed:
            self.bos, self.sep = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)

    def tokens(self, text: str) -> list[int]:
        """``text`` alone, without special tokens."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def answer_tokens(self, answer: str) -> tuple[int, ...]:
        """An answer as it is tokenised after the colon that ends a prompt, without EOS.

        Tokenised together with its anchor, since some tokenizers treat a leading space differently
        at the start of a text.
        """
        if answer not in self._answers:
            anchor, whole = self.tokens(":"), self.tokens(":" + answer)
            together = whole[: len(anchor)] == anchor
            self._answers[answer] = tuple(whole[len(anchor) :] if together else self.tokens(answer))
        return self._answers[answer]

    def encode(self, example: Example, shots: Sequence[int] = ()) -> EncodedExample:
        """The item for ``example``, its prompt preceded by the tokens of ``shots``.

        Raises DataError when the answer (or a choice) leaves no room for any prompt.
        """
        return self._fitted(example, self.tokens(example.prompt), shots)

    def encode_again(self, row: EncodedRow, shots: Sequence[int] = ()) -> EncodedExample:
        """``row`` encoded with ``shots`` before its prompt, or with another ``max_length``.

        ``row`` was encoded without shots by the same tokenizer. Its prompt is tokenised again only
        where it was truncated. Raises what ``encode`` raises.
        """
        example, encoded = row
        if encoded.truncated:
            return self.encode(example, shots)
        end = len(encoded.prompt) - len(self.sep)
        return self._fitted(example, list(encoded.prompt[len(self.bos) : end]), shots)

    def _fitted(self, example: Example, body: list[int], shots: Sequence[int]) -> EncodedExample:
        choices: tuple[tuple[int, ...], ...] = ()
        answer: tuple[int, ...] = ()
        if not self.head:
            choices = tuple(map(self.answer_tokens, example.choices))
            answer = (*self.answer_tokens(example.answer), self.eos) if example.answer else ()
        longest = max([len(answer), *(len(choice) + 1 for choice in choices)])
        room = self.max_length - longest - len(self.bos) - len(self.sep) - len(shots)
        if room < min(len(body), 1):
            raise DataError(
                where=example.place,
                expected=f"an answer that fits the context of {self.max_length} tokens",
                found=f"an answer of {longest} tokens",
                hint="Shorten the answer, split the row, or choose a base with a longer context.",
            )
        cut = len(body) > room
        if cut:
            head = room // 2
            body = body[:head] + body[len(body) - (room - head) :]
        prompt = (*self.bos, *shots, *body, *self.sep)
        return EncodedExample(example.id, prompt, answer, choices, example.target, cut)

    def windows(self, example: Example) -> list[EncodedExample]:
        """A plain text as items of at most ``max_length`` tokens; every token supervised once.

        For an encoder ``MASKED`` of the tokens are, at least one in each item.
        """
        ids = self.tokens(example.answer)
        if self.sep:
            return self._masked(example.id, ids)
        ids.append(self.eos)
        size = self.max_length - len(self.bos) - 1
        lead = self.bos or (self.eos,)
        return [
            EncodedExample(f"{example.id}/{start // size}", lead, tuple(ids[start : start + size]))
            for start in range(0, len(ids), size)
        ]

    def _masked(self, name: str, ids: list[int]) -> list[EncodedExample]:
        """``ids`` in windows with places masked that depend on ``name`` and nothing else."""
        size = self.max_length - 2
        found = []
        for start in range(0, len(ids), size):
            window = ids[start : start + size]
            random = np.random.default_rng([zlib.crc32(name.encode()), start])
            count = max(1, round(MASKED * len(window)))
            places = np.sort(random.permutation(len(window))[:count]).tolist()
            hidden = list(window)
            for place in places:
                hidden[place] = self.tokenizer.mask_token_id
            prompt = (*self.bos, *hidden, *self.sep)
            answer = tuple(window[place] for place in places)
            shifted = tuple(place + len(self.bos) for place in places)
            found.append(EncodedExample(f"{name}/{start // size}", prompt, answer, masked=shifted))
        return found

    def encode_all(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Every example; plain texts (no prompt, no choices) in windows."""
        return [encoded for _, encoded in self.encode_rows(examples)]

    def encode_rows(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Each example with its encoding; a plain text with each of its windows."""
        rows = []
        for example in examples:
            if example.prompt or example.choices:
                rows.append(EncodedRow(example, self.encode(example)))
            else:
                rows += [EncodedRow(example, window) for window in self.windows(example)]
        return rows

    def some(self, texts: Sequence[Example], most: int) -> list[EncodedExample]:
        """At most ``most`` windows of the first ``most`` plain ``texts``, drawn from all of theirs.

        A book is as many texts as it has windows, and reading it costs as many.
        """
        windows = [item for text in texts[:most] for item in self.windows(text)]
        picked = np.random.default_rng([len(windows), most]).permutation(len(windows))[:most]
        return [windows[at] for at in sorted(picked)]


def check_choices(tokenization: Tokenization, choices: Sequence[str], where: str) -> None:
    """Raise DataError when two labels are one under the tokenizer, or one begins another.

    The likelihoods of labels are compared as texts, so a label that begins another would always
    be at least as likely.
    """
    coded = [(tokenization.answer_tokens(choice), choice.strip()) for choice in choices]
    for i, (one, name) in enumerate(coded):
        if not one:
            raise DataError(
                where=where,
                expected="labels with text",
                found=f"label {name!r}, which has no token",
                hint="Give it a wording: Classification(…, wording={…}).",
            )
        for j, (other, second) in enumerate(coded):
            if i != j and other[: len(one)] == one and (i < j or other != one):
                same = other == one
                raise DataError(
                    where=where,
                    expected="labels whose texts differ from the start under the tokenizer",
                    found=f"{name!r} and {second!r}, "
                    + (
                        "which are the same tokens"
                        if same
                        else "the first of which begins the second"
                    ),
                    hint="Reword one of them in the data, or in the recipe: "
                    f"Classification(…, wording={{{name!r}: 'another text'}}).",
                )


def supervised(ledger: RowCounts, items: Sequence[EncodedExample]) -> RowCounts:
    """``ledger`` with what encoding found in the training items.

    Raises TrainingError when nothing is supervised: training would teach nothing, in silence.
    """
    tokens = sum(item.supervised for item in items)
    filled = replace(
        ledger,
        truncated=sum(item.truncated for item in items),
        masked=sum(not item.supervised for item in items),
        supervised_tokens=tokens,
    )
    if tokens == 0:
        raise TrainingError(
            where="encoding",
            expected="at least one supervised token",
            found=f"none in {len(items)} rows",
            hint="Check that the answer column holds text.",
        )
    return filled


def epoch_batches(
    lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """The global batches of one epoch: lists of item positions, each item exactly once.

    A pure function of its arguments, so that a resumed run sees the same batches. Rows are
    shuffled, sorted by length within stretches of 32 batches to save padding, and the batches
    shuffled again; the last one may be short.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    stretch = 32 * batch_size
    batches: list[list[int]] = []
    for start in range(0, len(order), stretch):
        part = sorted(order[start : start + stretch].tolist(), key=lambda i: lengths[i])
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def chunks(
    items: Sequence[EncodedExample], most: int, weight: Callable[[EncodedExample], int] = len
) -> Iterator[list[int]]:
    """Positions of ``items`` in batches of similar weight, at most ``most`` with padding.

    An item weighs its tokens unless told otherwise. The same items always give the same batches,
    so every contender is scored in identical ones.
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
