"""From examples to token ids: prompt, answer and choices, truncation, windows of plain text.

A prompt is never supervised. An answer is never truncated: a row that is too long loses tokens
from the middle of its prompt, because beginnings and ends matter most (Sun et al. 2019, "How to
Fine-Tune BERT for Text Classification", section 5.3.1, head + tail). Each answer ends with EOS.

With a trained head, an encoded example is its prompt, and its target is the label. A bidirectional
base reads general text with some of its tokens masked and predicts those.
"""

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from lora_domains.errors import AnswerTooLong, DataError, listed
from lora_domains.tasks.rows import Example

MASKED_SHARE = 0.15
"""Share of a text's tokens that a bidirectional base predicts (Devlin et al. 2019, BERT)."""

LISTED = 40
"""The most rows that one error lists."""
BATCH = 1000
"""Texts that are tokenised in one call, in a fraction of the time of as many calls."""
KEPT = 10_000
"""The most answers whose tokens are kept: those of labels recur, free text does not."""


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

    def __len__(self) -> int:
        return len(self.prompt) + (0 if self.masked else len(self.answer))

    @property
    def supervised(self) -> int:
        """Number of supervised tokens; the label of a head counts as one."""
        return len(self.answer) or int(self.target >= 0)


class EncodedRow(NamedTuple):
    """An example and its encoding. A long plain text has several, one for each window."""

    example: Example
    encoded: EncodedExample


class Tokenization:
    """Tokenises examples for one base, into at most ``max_length`` tokens each.

    Plain text is read in windows of at most ``window`` tokens, by default as many.

    With ``head`` an example is encoded as its prompt, for a trained head to classify. A
    ``bidirectional`` base reads texts between [CLS] and [SEP].
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        head: bool = False,
        bidirectional: bool = False,
        window: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.window = window or max_length
        self.head = head
        self.eos: int = tokenizer.eos_token_id
        self._special = _special_names(tokenizer)
        self._answers: dict[str, tuple[int, ...]] = {}
        self._whole: dict[tuple[str, ...], tuple[tuple[tuple[int, ...], ...], int]] = {}
        self._ids: dict[int, int] = {}
        """One object for each token id: a token of a row takes 8 bytes and not 36."""
        # Exactly one BOS where the tokenizer adds one, whatever the prompt starts with.
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        bos = tokenizer.bos_token_id
        self.bos: tuple[int, ...] = (bos,) if bos is not None and first == [bos] else ()
        self.sep: tuple[int, ...] = ()
        if bidirectional:
            self.bos, self.sep = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)

    def tokens(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of ``text``, without BOS and the like.

        With ``special`` the names of special tokens in it (``</s>``) are those tokens; otherwise
        they are text like any other, as in a row, whatever it spells.
        """
        return self._tokens_of([text], special)[0]

    def _tokens_of(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """``tokens`` of each text."""
        if not texts:
            return []
        lists = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=not special,
            return_attention_mask=False, return_token_type_ids=False,
        )["input_ids"]  # fmt: skip
        own = self._ids.setdefault
        return [list(map(own, ids, ids)) for ids in lists]

    def prompt_tokens(self, example: Example) -> list[int]:
        """The token ids of the prompt: special tokens of its template, never of the row's text.

        Raises DataError where the row's text spells a special token of the template.
        """
        return self._bodies([example])[0]

    def _bodies(self, examples: Sequence[Example]) -> list[list[int]]:
        """The token ids of each prompt."""
        bodies: dict[int, list[int]] = {}
        plain, special = list[int](), list[int]()
        for at, example in enumerate(examples):
            if not self._special.search(example.literal):
                plain.append(at)
            elif not self._special.search(example.text):
                special.append(at)
            else:
                bodies[at] = self._pieces(example)
        for places, names in ((plain, False), (special, True)):
            prompts = [examples[at].prompt for at in places]
            bodies |= zip(places, self._tokens_of(prompts, names), strict=True)
        return [bodies[at] for at in range(len(examples))]

    def _pieces(self, example: Example) -> list[int]:
        """The token ids of a prompt whose template has special tokens and whose text spells some.

        Raises DataError where they are the same.
        """
        declared = set(self._special.findall(example.literal))
        spelled = set(self._special.findall(example.text))
        if twice := sorted(declared & spelled):
            raise DataError(
                where=example.place,
                expected="text that spells no special token of the prompt's template",
                found=listed(twice),
                hint="Remove it from the row, or from the template.",
            )
        parts = re.split("(" + "|".join(map(re.escape, declared)) + ")", example.prompt)
        return [
            token for part in parts if part for token in self.tokens(part, special=part in declared)
        ]

    def answer_tokens(self, answer: str) -> tuple[int, ...]:
        """The token ids of an answer that follows the colon at the end of a prompt, without EOS.

        It is tokenised together with a colon, because some tokenizers treat a leading space
        differently at the start of a text.
        """
        if answer not in self._answers:
            self._learn([answer])
        return self._answers[answer]

    def _learn(self, answers: Iterable[str]) -> None:
        """Keep the token ids of ``answers``, for ``answer_tokens``."""
        if len(self._answers) > KEPT:
            self._answers.clear()
        new = [answer for answer in dict.fromkeys(answers) if answer not in self._answers]
        colon, *both = self._tokens_of([":", *(":" + answer for answer in new)])
        for answer, ids in zip(new, both, strict=True):
            separate = ids[: len(colon)] == colon
            self._answers[answer] = tuple(ids[len(colon) :] if separate else self.tokens(answer))

    def _labels(self, choices: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
        """The token ids of choices that are whole answers, and ``_longest`` of them.

        Where one begins another (``card``, ``card_arrival``), all end with EOS: without its end,
        the shorter one would always be at least as likely.
        """
        if choices not in self._whole:
            self._learn(choices)
            tokens = tuple(map(self.answer_tokens, choices))
            ordered = sorted(tokens)
            begins = any(b[: len(a)] == a for a, b in pairwise(ordered))
            tokens = tuple((*one, self.eos) for one in tokens) if begins else tokens
            self._whole[choices] = tokens, self._longest(tokens)
        return self._whole[choices]

    def _longest(self, choices: Sequence[tuple[int, ...]]) -> int:
        """Tokens of the longest of ``choices`` with its end."""
        ends = (len(choice) + (choice[-1:] != (self.eos,)) for choice in choices)
        return max(ends, default=0)

    # ── Prompts with answers ────────────────────────────────────────────────────────────────────

    def encode(self, example: Example, prefix: Sequence[int] = ()) -> EncodedExample:
        """``example`` encoded, with the tokens of ``prefix`` before its prompt.

        Raises AnswerTooLong when the answer or a choice leaves no room for any of the prompt.
        """
        return self._fitted(example, self.prompt_tokens(example), prefix)

    def encode_again(self, row: EncodedRow, prefix: Sequence[int] = ()) -> EncodedExample:
        """``row`` encoded with ``prefix``, or for another ``max_length``.

        ``row`` was encoded without a prefix by the same tokenizer; its prompt is tokenised again
        only if it was truncated. Raises what ``encode`` raises.
        """
        example, encoded = row
        if encoded.truncated:
            return self.encode(example, prefix)
        end = len(encoded.prompt) - len(self.sep)
        return self._fitted(example, list(encoded.prompt[len(self.bos) : end]), prefix)

    def _fitted(self, example: Example, body: list[int], prefix: Sequence[int]) -> EncodedExample:
        choices: tuple[tuple[int, ...], ...] = ()
        answer: tuple[int, ...] = ()
        longest = 0
        if not self.head:
            if example.whole:
                choices, longest = self._labels(example.choices)
            else:
                choices = tuple(map(self.answer_tokens, example.choices))
                longest = self._longest(choices)
            answer = (*self.answer_tokens(example.answer), self.eos) if example.answer else ()
        longest = max(longest, len(answer))
        room = self.max_length - longest - len(self.bos) - len(self.sep) - len(prefix)
        if room < min(len(body), 1):
            raise AnswerTooLong(
                where=example.place,
                expected=f"an answer that fits the context of {self.max_length} tokens",
                found=f"an answer of {longest} tokens",
                hint="Shorten the answer, split the row, drop such rows (--drop-long), or choose a "
                "base with a longer context.",
            )
        truncated = len(body) > room
        if truncated:
            head = room // 2
            body = body[:head] + body[len(body) - (room - head) :]
        prompt = (*self.bos, *prefix, *body, *self.sep)
        return EncodedExample(example.id, prompt, answer, choices, example.target, truncated)

    # ── Plain text ──────────────────────────────────────────────────────────────────────────────

    def windows(self, example: Example) -> list[EncodedExample]:
        """A plain text in windows of at most ``window`` tokens; each token is supervised once.

        For a bidirectional base ``MASKED_SHARE`` of the tokens are, at least one in each window.
        """
        return self._windows(example, self.tokens(example.answer))

    def _windows(self, example: Example, ids: list[int]) -> list[EncodedExample]:
        """``windows`` of a text that has the tokens ``ids``."""
        if self.sep:
            return self._masked(example.id, ids)
        ids = [*ids, self.eos]
        size = self.window - len(self.bos) - 1
        lead = self.bos or (self.eos,)
        return [
            EncodedExample(f"{example.id}/{start // size}", lead, tuple(ids[start : start + size]))
            for start in range(0, len(ids), size)
        ]

    def _masked(self, name: str, ids: list[int]) -> list[EncodedExample]:
        """``ids`` in windows; the masked positions depend on ``name`` and nothing else."""
        size = self.window - 2
        windows = []
        for start in range(0, len(ids), size):
            window = ids[start : start + size]
            random = np.random.default_rng([zlib.crc32(name.encode()), start])
            count = max(1, round(MASKED_SHARE * len(window)))
            places = np.sort(random.permutation(len(window))[:count]).tolist()
            hidden = list(window)
            for place in places:
                hidden[place] = self.tokenizer.mask_token_id
            prompt = (*self.bos, *hidden, *self.sep)
            answer = tuple(window[place] for place in places)
            masked = tuple(place + len(self.bos) for place in places)
            windows.append(EncodedExample(f"{name}/{start // size}", prompt, answer, masked=masked))
        return windows

    def sample_windows(self, texts: Sequence[Example], most: int) -> list[EncodedExample]:
        """At most ``most`` windows, drawn from all windows of the first ``most`` plain ``texts``.

        A book has many windows, each of which costs as much to read as a short text.
        """
        windows = [window for text in texts[:most] for window in self.windows(text)]
        picked = np.random.default_rng([len(windows), most]).permutation(len(windows))[:most]
        return [windows[at] for at in sorted(picked)]

    # ── Many examples ───────────────────────────────────────────────────────────────────────────

    def encode_rows(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Each example with its encoding; a plain text (no prompt, no choices) with its windows.

        Raises AnswerTooLong for the first one that does not fit.
        """
        rows, errors = self.encode_fitting(examples)
        if errors:
            raise errors[0]
        return rows

    def encode_fitting(
        self, examples: Sequence[Example]
    ) -> tuple[list[EncodedRow], list[AnswerTooLong]]:
        """``encode_rows`` of those that fit, and an error for each whose answer does not."""
        rows: list[EncodedRow] = []
        errors: list[AnswerTooLong] = []
        for start in range(0, len(examples), BATCH):
            part = examples[start : start + BATCH]
            prompted = [example for example in part if example.prompt or example.choices]
            plain = [example.answer for example in part if not (example.prompt or example.choices)]
            bodies, texts = iter(self._bodies(prompted)), iter(self._tokens_of(plain))
            if not self.head:
                own = chain(*(example.choices for example in prompted if not example.whole))
                self._learn(filter(None, chain((example.answer for example in prompted), own)))
            for example in part:
                try:
                    if example.prompt or example.choices:
                        encoded = [self._fitted(example, next(bodies), ())]
                    else:
                        encoded = self._windows(example, next(texts))
                    rows += [EncodedRow(example, one) for one in encoded]
                except AnswerTooLong as error:
                    errors.append(error)
        return rows, errors

    def encode_all(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """The encodings of ``encode_rows`` alone."""
        return [encoded for _, encoded in self.encode_rows(examples)]


def _special_names(tokenizer: Any) -> re.Pattern[str]:
    """What the names of special tokens match, the longest first; without any, nothing."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted(filter(None, added | {*tokenizer.all_special_tokens}), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def all_too_long(errors: Sequence[AnswerTooLong], column: str | None) -> AnswerTooLong:
    """One error for all rows whose answer, in ``column``, does not fit."""
    first = errors[0]
    at = f", column {column!r}" if column else ""
    if len(errors) == 1:
        where, found = f"{first.where}{at}", first.found
    else:
        where = f"{len(errors)} rows{at}"
        found = "; ".join(f"{error.where}: {error.found}" for error in errors[:LISTED])
        found += f"; and {len(errors) - LISTED} more" if len(errors) > LISTED else ""
    return AnswerTooLong(where=where, expected=first.expected, found=found, hint=first.hint)


def check_choices(tokenization: Tokenization, choices: Sequence[str], where: str) -> None:
    """Raise DataError when a label has no tokens, or two labels have the same."""
    known: dict[tuple[int, ...], str] = {}
    for choice in choices:
        tokens, name = tokenization.answer_tokens(choice), choice.strip()
        if not tokens:
            raise DataError(
                where=where,
                expected="labels with text",
                found=f"label {name!r}, which has no token",
                hint="Give it a wording: Classification(…, wording={…}).",
            )
        if tokens in known:
            raise DataError(
                where=where,
                expected="labels whose tokens differ",
                found=f"{known[tokens]!r} and {name!r}, which are the same tokens",
                hint="Reword one of them in the data, or in the recipe: "
                f"Classification(…, wording={{{name!r}: 'another text'}}).",
            )
        known[tokens] = name
