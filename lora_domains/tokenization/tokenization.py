"""From examples to token ids: prompt, answer and choices, chats, truncation, windows of plain text.

A prompt is never supervised. An answer is never truncated: a row that is too long loses tokens
from the middle of its prompt, because beginnings and ends matter most (Sun et al. 2019, "How to
Fine-Tune BERT for Text Classification", section 5.3.1, head + tail). Each answer ends with EOS. A
chat template renders the turns of an example in place of its prompt (``chat_template``).

With a trained head, an encoded example is its prompt, and its target is the label. A bidirectional
base reads general text with some of its tokens masked and predicts those.
"""

import re
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np

from lora_domains.errors import AnswerTooLong, ChatTemplateError, DataError, listed
from lora_domains.tasks.rows import Example
from lora_domains.tokenization.chat_template import ChatTemplate, Conversation
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow, shared, without_middle
from lora_domains.tokenization.masked import masked_windows
from lora_domains.tokenization.special_tokens import special_names
from lora_domains.tokenization.turns import NO_SHOTS, Shots

BATCH = 1000
"""Texts that are tokenised in one call, in a fraction of the time of as many calls."""
KEPT = 10_000
"""The most answers whose tokens are kept: those of labels recur, free text does not."""


class Tokenization:
    """Tokenises examples for one base, into at most ``max_length`` tokens each.

    Plain text is read in windows of at most ``window`` tokens, by default as many, after BOS, or
    after ``start`` (EOS unless given) where the tokenizer adds no BOS.

    With ``head`` an example is encoded as its prompt, for a trained head to classify. A
    ``bidirectional`` base reads texts between [CLS] and [SEP]. With a ``template`` prompts are the
    turns of their examples, rendered by it.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        *,
        head: bool = False,
        bidirectional: bool = False,
        window: int | None = None,
        template: ChatTemplate | None = None,
        start: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.window = window or max_length
        self.head = head
        self.eos: int = tokenizer.eos_token_id
        self.template = template
        self._special = special_names(tokenizer)
        self._answers: dict[str, tuple[int, ...]] = {}
        self._whole: dict[tuple[str, ...], tuple[tuple[tuple[int, ...], ...], int]] = {}
        self._ids: dict[int, int] = {}
        """One object for each token id: a token of a row takes 8 bytes and not 36."""
        # Exactly one BOS where the tokenizer adds one, whatever the prompt starts with.
        first = tokenizer("a", add_special_tokens=True)["input_ids"][:1]
        bos = tokenizer.bos_token_id
        self.bos: tuple[int, ...] = (bos,) if bos is not None and first == [bos] else ()
        self.lead = self.bos or (self.eos if start is None else start,)
        self.sep: tuple[int, ...] = ()
        if bidirectional:
            self.bos, self.sep = (tokenizer.cls_token_id,), (tokenizer.sep_token_id,)
        self.start = self.bos if template is None else ()
        """What is put before a prompt; a chat template writes its own BOS, or none."""
        self.end = (self.eos,) if template is None else template.end
        """The end of an answer."""

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

        Raises DataError where the row's text spells a special token of the template, or the chat
        template refuses its turns.
        """
        if self.template is not None:
            return list(self.template.prompt(example.messages, example.tools, example.place))
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
        differently at the start of a text; with a chat template, as the assistant's turn.
        """
        if answer not in self._answers:
            self._learn([answer])
        return self._answers[answer]

    def _learn(self, answers: Iterable[str]) -> None:
        """Keep the token ids of ``answers``, for ``answer_tokens``."""
        if len(self._answers) > KEPT:
            self._answers.clear()
        new = [answer for answer in dict.fromkeys(answers) if answer not in self._answers]
        if self.template is not None:
            self._answers |= {answer: self.template.answer(answer.strip()) for answer in new}
            return
        colon, *both = self._tokens_of([":", *(":" + answer for answer in new)])
        for answer, ids in zip(new, both, strict=True):
            separate = ids[: len(colon)] == colon
            self._answers[answer] = tuple(ids[len(colon) :] if separate else self.tokens(answer))

    def _labels(self, choices: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
        """The token ids of choices that are whole answers, and ``_longest`` of them.

        Where one begins another (``card``, ``card_arrival``), all have their end: without it, the
        shorter one would always be at least as likely.
        """
        if choices not in self._whole:
            self._learn(choices)
            tokens = tuple(map(self.answer_tokens, choices))
            ordered = sorted(tokens)
            begins = any(b[: len(a)] == a for a, b in pairwise(ordered))
            tokens = tuple((*one, *self.end) for one in tokens) if begins else tokens
            self._whole[choices] = tokens, self._longest(tokens)
        return self._whole[choices]

    def _longest(self, choices: Sequence[tuple[int, ...]]) -> int:
        """Tokens of the longest of ``choices`` with its end."""
        end = len(self.end)
        ends = (len(choice) + end * (choice[-end:] != self.end) for choice in choices)
        return max(ends, default=0)

    # ── Prompts with answers ────────────────────────────────────────────────────────────────────

    def encode(self, example: Example, shots: Shots = NO_SHOTS) -> EncodedExample:
        """The prompt of ``example`` encoded, after ``shots``, and its answer or choices.

        Raises AnswerTooLong when the answer or a choice leaves no room for any of the prompt.
        """
        if self.template is None or not shots:
            return self._fitted(example, self.prompt_tokens(example), shots.ids)
        turns, system = shots.before(example.messages), example.messages[0]["role"] == "system"
        ids = self.template.prompt(turns, example.tools, example.place)
        # What all prompts after these shots begin with is not truncated.
        other = [*example.messages[:system], {"role": "user", "content": "?"}]
        kept = shared(ids, self.template.prompt(shots.before(other), example.tools))
        return self._fitted(example, list(ids[kept:]), ids[:kept])

    def encode_again(self, row: EncodedRow, shots: Shots = NO_SHOTS) -> EncodedExample:
        """``row`` encoded with ``shots``, or for another ``max_length``.

        ``row`` was encoded without shots by the same tokenizer. Raises what ``encode`` raises, and
        DataError where shots change the answers of a chat.
        """
        example, encoded = row
        if self.is_chat(example):
            return self._again(example, encoded, shots)
        if encoded.truncated or self.template is not None:
            return self.encode(example, shots)
        end = len(encoded.prompt) - len(self.sep)
        return self._fitted(example, list(encoded.prompt[len(self.bos) : end]), shots.ids)

    def _fitted(self, example: Example, body: list[int], prefix: Sequence[int]) -> EncodedExample:
        choices: tuple[tuple[int, ...], ...] = ()
        answer: tuple[int, ...] = ()
        longest = 0
        if not self.head:
            if example.whole:
                choices, longest = self._labels(example.choices)
            else:
                own = map(self.answer_tokens, example.choices)
                choices = tuple(tokens + self.end * example.ended for tokens in own)
                longest = self._longest(choices)
            answer = (*self.answer_tokens(example.answer), *self.end) if example.answer else ()
        longest = max(longest, len(answer))
        room = self.max_length - longest - len(self.start) - len(self.sep) - len(prefix)
        if room < min(len(body), 1):
            raise _too_long(example, longest, self.max_length)
        prompt = (*self.start, *prefix, *without_middle(body, room), *self.sep)
        rest = example.target, len(body) > room, (), (), example.truth
        return EncodedExample(example.id, prompt, answer, choices, *rest)

    # ── Chats ───────────────────────────────────────────────────────────────────────────────────

    def is_chat(self, example: Example) -> bool:
        """Whether the turns of ``example`` hold its answers too."""
        turns = example.messages if self.template is not None else ()
        return bool(turns) and turns[-1]["role"] == "assistant"

    def chats(self, example: Example, shots: Shots = NO_SHOTS) -> list[EncodedExample]:
        """A chat encoded, its answers supervised and the turns between them read.

        Of several answers each is encoded alone where the template renders earlier ones otherwise,
        or where the chat is too long: then its prompt loses the middle.
        """
        assert self.template is not None
        turns, more = example.messages, (example.tools, example.place)
        # Of two answers a template may make one, so that they are counted as it renders them.
        parts = self.template.conversation(turns, *more)
        if shots:
            learned = sum(len(part.spans) for part in parts)
            parts = self.template.conversation(shots.before(turns), *more, learned)
        short: list[Conversation] = []
        for part in parts:
            alone = [Conversation(part.ids[:end], ((start, end),)) for start, end in part.spans]
            short += [part] if len(part.ids) <= self.max_length else alone
        several = len(short) > 1
        return [_part(f"{example.id}/{n}" if several else example.id, example, part,
                      self.max_length) for n, part in enumerate(short)]  # fmt: skip

    def _again(self, example: Example, encoded: EncodedExample, shots: Shots) -> EncodedExample:
        """The part of a chat that ``encoded`` is, after ``shots``."""
        parts = self.chats(example, shots)
        for part in parts:
            same = part.id == encoded.id and part.unsupervised == encoded.unsupervised
            if same and part.answer == encoded.answer:
                return part
        if encoded.id == example.id and len(parts) > 1:  # each answer alone, for want of room
            raise _too_long(example, len(encoded.answer), self.max_length)
        raise ChatTemplateError(
            where=example.place, found="another rendering",
            expected="a chat template that renders answers the same after other turns",
            hint="Choose another base, or do without few-shot examples.",
        )  # fmt: skip

    # ── Plain text ──────────────────────────────────────────────────────────────────────────────

    def windows(self, example: Example) -> list[EncodedExample]:
        """A plain text in windows of at most ``window`` tokens; each token is supervised once.

        For a bidirectional base a share of the tokens is, at least one in each window (``masked``).
        """
        return self._windows(example, self.tokens(example.answer))

    def _windows(self, example: Example, ids: list[int]) -> list[EncodedExample]:
        """``windows`` of a text that has the tokens ``ids``."""
        if self.sep:
            size, mask = self.window - 2, self.tokenizer.mask_token_id
            return masked_windows(example.id, ids, size, mask, (self.bos, self.sep))
        ids = [*ids, self.eos]
        size = self.window - len(self.bos) - 1
        return [
            EncodedExample(f"{example.id}/{at // size}", self.lead, tuple(ids[at : at + size]))
            for at in range(0, len(ids), size)
        ]

    def sample_windows(self, texts: Sequence[Example], most: int) -> list[EncodedExample]:
        """At most ``most`` windows, drawn from all windows of the first ``most`` plain ``texts``.

        A book has many windows, each of which costs as much to read as a short text.
        """
        windows = [window for text in texts[:most] for window in self.windows(text)]
        picked = np.random.default_rng([len(windows), most]).permutation(len(windows))[:most]
        return [windows[at] for at in sorted(picked)]

    # ── Many examples ───────────────────────────────────────────────────────────────────────────

    def encode_rows(self, examples: Sequence[Example]) -> list[EncodedRow]:
        """Each example with its encoding: a chat with its parts, a plain text (no prompt, no
        choices) with its windows. Raises the error of the first one that has none."""
        rows, errors = self.encode_fitting(examples)
        if errors:
            raise errors[0]
        return rows

    def encode_fitting(
        self, examples: Sequence[Example]
    ) -> tuple[list[EncodedRow], list[DataError]]:
        """``encode_rows`` of those that fit, and an error for each that does not or is refused."""
        rows: list[EncodedRow] = []
        errors: list[DataError] = []
        if self.template is not None:
            return self._rendered(examples)
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

    def _rendered(self, examples: Sequence[Example]) -> tuple[list[EncodedRow], list[DataError]]:
        """``encode_fitting`` through the chat template."""
        rows: list[EncodedRow] = []
        errors: list[DataError] = []
        for example in examples:
            try:
                parts = self.chats(example) if self.is_chat(example) else [self.encode(example)]
                rows += [EncodedRow(example, part) for part in parts]
            except DataError as error:
                errors.append(error)
        return rows, errors

    def encode_all(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """The encodings of ``encode_rows`` alone."""
        return [encoded for _, encoded in self.encode_rows(examples)]


def _part(name: str, example: Example, part: Conversation, most: int) -> EncodedExample:
    first, last = part.spans[0][0], part.spans[-1][1]
    answer = part.ids[first:last]
    room = most - len(answer)
    if room < 1:
        raise _too_long(example, len(answer), most)
    spoken = {i for start, end in part.spans for i in range(start - first, end - first)}
    others = tuple(i for i in range(len(answer)) if i not in spoken)
    prompt = tuple(without_middle(part.ids[:first], room))
    cut = len(prompt) < first
    return EncodedExample(name, prompt, answer, truncated=cut, unsupervised=others)


def _too_long(example: Example, answer: int, most: int) -> AnswerTooLong:
    return AnswerTooLong(
        where=example.place,
        expected=f"an answer that fits the context of {most} tokens",
        found=f"an answer of {answer} tokens",
        hint="Shorten the answer, split the row, drop such rows (--drop-long), or choose a "
        "base with a longer context.",
    )
