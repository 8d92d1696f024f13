"""One answer: what a model reads for it, which tokens are chosen, its text, and where it ends."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_domains.errors import ChatTemplateError, DataError, UsageError
from lora_domains.inference.predict import Answer as Predicted
from lora_domains.inference.predict import length_of, task_of
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import check_embedded, tokenization_of
from lora_domains.modeling.heads import check_generates
from lora_domains.tasks import Chat, Row, Task
from lora_domains.tasks.messages import messages_of
from lora_domains.tasks.rows import check_encodable
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

COMPLETION_TOKENS = 16
"""Tokens of a completion at most where a request names none, as in OpenAI's API."""
UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character whose last ones are missing."""


# ── Prompts ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Prompt:
    """The token ids to continue, and where the domain's answers end."""

    ids: tuple[int, ...]
    max_new_tokens: int | None = None
    """Tokens of an answer at most, unless others are asked for; None where nothing says so."""
    ends: tuple[str, ...] = ()
    field: str = "messages"
    """Of the request that it comes from."""


def messages_in(body: object) -> list[dict[str, Any]]:
    """The messages of a request; raises DataError for an unknown role or an empty content."""
    messages = messages_of(Row({"messages": body}, "input", 0, "the request"), "messages")
    if messages[-1]["role"] == "assistant":
        raise DataError(
            where="messages",
            expected="a last message for the assistant to answer",
            found="one of the assistant",
            hint="End with a message of the user.",
        )
    return messages


def labels(bank: Bank, name: str | None) -> bool:
    """Whether the adapter ``name`` answers with labels or a number, rather than generated text."""
    if name is None or (bank[name].card is None and bank[name].head is None):
        return False
    return bank[name].head is not None or task_of(bank, name).max_new_tokens == 0


def has_labels(bank: Bank, name: str) -> bool:
    """Whether the adapter ``name`` predicts labels or a number, from likelihoods or as text."""
    return labels(bank, name) or (bank[name].card is not None and task_of(bank, name).has_labels)


def conversation_text(
    bank: Bank, name: str, messages: Sequence[Mapping[str, Any]]
) -> EncodedExample:
    """The one text of a conversation, encoded for an adapter that ``labels`` it.

    Raises UsageError for a longer conversation, DataError for a text that cannot be used.
    """
    task = task_of(bank, name)
    tokenization = tokenization_of(bank.base, task, length_of(bank, name))
    encoded = tokenization.encode(task.to_answer(messages))
    check_embedded(bank.base, [("messages", encoded)])
    return encoded


def label_text(answer: Predicted) -> str:
    """A predicted label, labels, number or text as text."""
    if isinstance(answer, str):
        return answer
    return f"{answer:.6g}" if isinstance(answer, float) else answer.line[0]


def conversation_prompt(
    bank: Bank, name: str | None, messages: Sequence[Mapping[str, Any]],
    thinking: bool | None = None,
) -> Prompt:  # fmt: skip
    """The prompt of a conversation for the adapter ``name``, or for the base (None).

    An adapter reads what it was trained on: turns in the chat template, or one text in the prompt
    of its task. ``thinking`` is what the template is to be told. Raises UsageError where an adapter
    answers no conversation or was trained otherwise, ChatTemplateError where the base has no
    template, and DataError for messages that cannot be rendered.
    """
    base = bank.base
    check_generates(base)
    trained = name is not None and bank[name].card is not None
    task: Task = task_of(bank, name) if trained and name is not None else Chat(thinking=thinking)
    if not trained and not base.chat_template.own:
        raise ChatTemplateError(
            where=base.id,
            expected="a base with a chat template",
            found="none in its tokenizer",
            hint="Use an adapter that was trained on chats, or a base that was. A server also "
            "continues plain prompts (/v1/completions).",
        )
    example = task.to_answer(messages)
    tokenization = tokenization_of(base, task, base.context)
    own = tokenization.template.thinking if tokenization.template is not None else None
    if thinking is not None and own not in (None, thinking):
        raise UsageError(
            where="chat_template_kwargs",
            expected=f"what {name} was trained with: enable_thinking={own}",
            found=f"enable_thinking={thinking}",
            hint="Leave it out.",
        )
    ids = (*tokenization.start, *tokenization.prompt_tokens(example))
    check_embedded(base, [("messages", EncodedExample("", ids, ()))])
    return Prompt(ids, (task.max_new_tokens or None) if trained else None, task.ends)


def converses(bank: Bank, name: str | None) -> bool:
    """Whether ``name`` reads earlier turns of a conversation too."""
    return name is None or bank[name].card is None or task_of(bank, name).converses


def answer_length(base: Base, prompt: Prompt, asked: int | None, most: int) -> int:
    """Tokens of an answer at most: those ``asked`` for, or what domain and context leave of
    ``most``.

    Raises UsageError for more than ``most``, or a prompt and an answer beyond the context.
    """
    if asked is not None and asked > most:
        raise UsageError(
            where="max_tokens",
            expected=f"at most {most}, the limit of this server",
            found=str(asked),
            hint="Ask for less; its owner can raise --max-tokens.",
        )
    room = base.context - len(prompt.ids)
    if room < (asked or 1):
        raise UsageError(
            where="max_tokens" if room > 0 else prompt.field,
            expected=f"prompt and answer within the base's context of {base.context} tokens",
            found=f"a prompt of {len(prompt.ids)} tokens"
            + (f" and an answer of {asked}" if asked else ""),
            hint=f"Ask for at most {room}." if room > 0 else "Shorten the prompt.",
        )
    return asked or min(prompt.max_new_tokens or most, most, room)


def text_prompt(bank: Bank, name: str | None, text: str | Sequence[int]) -> Prompt:
    """The prompt that ``text`` is, or token ids; special tokens in a text are what they spell.

    Raises UsageError for a base or an adapter that generates no text, DataError for a token that
    the base lacks, or no tokens at all.
    """
    base = bank.base
    check_generates(base)
    if name is not None and bank[name].head is not None:
        raise UsageError(
            where=name,
            expected="an adapter that generates text",
            found="one with a classification head",
            hint="Send its texts to /v1/classify.",
        )
    if isinstance(text, str):
        check_encodable(text, "prompt")
        tokenization = Tokenization(base.tokenizer, base.context)
        ids = (*tokenization.bos, *tokenization.tokens(text, special=True))
    else:
        ids = tuple(text)
    places = base.model.get_input_embeddings().num_embeddings
    if not ids or not all(0 <= token < places for token in ids):
        raise DataError(
            where="prompt",
            expected=f"tokens from 0 to {places - 1}",
            found="another token" if ids else "an empty text",
            hint="Tokenise it with the tokenizer of the base." if ids else "Write a prompt.",
        )
    return Prompt(ids, COMPLETION_TOKENS, field="prompt")


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends at the latest.

    With a ``temperature`` of 0 the most likely token is taken. Otherwise one is drawn from the most
    likely tokens that together have a probability of ``top_p``, by numbers that follow from
    ``seed``. An answer ends before the first text of ``stop``.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Answer:
    """The tokens of an answer and its text.

    One of ``ends`` is the last token of an answer that ends by itself. With ``strip`` the text has
    no whitespace around it. ``reason`` is None until it ended: then "stop", or "length" at the most
    tokens.
    """

    def __init__(
        self, tokenizer: Any, ends: frozenset[int], sampling: Sampling, *, strip: bool = False
    ) -> None:
        self.sampling = sampling
        self.tokens: list[int] = []
        self.reason: str | None = None
        self._tokenizer, self._ends, self._strip = tokenizer, ends, strip
        self._random = random.Random(sampling.seed)
        # The text of the tokens before `_decoded` is complete; decoding begins at `_start`, before
        # it, because the text of a token may depend on the one before.
        self._text, self._start, self._decoded = "", 0, 0
        self._given = 0

    @property
    def text(self) -> str:
        """The text as far as it is certain; all of it once the answer ended."""
        self._decode()
        text = self._text
        places = [at for stop in self.sampling.stop if (at := text.find(stop)) >= 0]
        if places:
            text = text[: min(places)]
        elif self.reason is None:
            text = text[: len(text) - max((_begun(text, s) for s in self.sampling.stop), default=0)]
        return text.strip() if self._strip else text

    def draw(self) -> float:
        """The next random number from 0 to 1."""
        return self._random.random()

    def add(self, token: int) -> None:
        """Append a token; the answer may end with it."""
        self.tokens.append(token)
        if token in self._ends:
            self.reason = "stop"
        elif len(self.tokens) >= self.sampling.max_tokens:
            self.reason = "length"
        if self.sampling.stop:
            self._decode()
            if any(stop in self._text for stop in self.sampling.stop):
                self.reason = "stop"

    def news(self) -> str:
        """The text that became certain since the last call."""
        text = self.text
        new, self._given = text[self._given :], max(self._given, len(text))
        return new

    def _decode(self) -> None:
        if self._decoded == len(self.tokens):
            return
        before = self._text_of(self.tokens[self._start : self._decoded])
        text = self._text_of(self.tokens[self._start :])
        if text.endswith(UNFINISHED) and self.reason is None:
            return
        self._text += text[len(before) :]
        self._start, self._decoded = self._decoded, len(self.tokens)

    def _text_of(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` may be the beginning of ``stop``."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)


# ── The next token ──────────────────────────────────────────────────────────────────────────────


def choose(logits: Tensor, answers: Sequence[Answer]) -> list[int]:
    """The next token of each answer; ``logits`` is (answers, vocabulary)."""
    tokens: list[int] = logits.argmax(-1).tolist()
    drawn = [row for row, answer in enumerate(answers) if answer.sampling.temperature > 0]
    if drawn:
        settings = [answers[row].sampling for row in drawn]
        tokens_drawn = _drawn(
            logits[drawn].cpu().double(),
            temperatures=[one.temperature for one in settings],
            top_p=[one.top_p for one in settings],
            draws=[answers[row].draw() for row in drawn],
        )
        for row, token in zip(drawn, tokens_drawn, strict=True):
            tokens[row] = token
    return tokens


def _drawn(
    logits: Tensor, temperatures: list[float], top_p: list[float], draws: list[float]
) -> list[int]:
    """A token of each row of ``logits`` (rows, vocabulary), the one whose share of the cumulated
    probabilities holds the row's number in ``draws``."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=logits.dtype, device=logits.device)[:, None]

    # The largest logit is 0, so that a temperature near 0 leads to no inf − inf.
    logits = (logits - logits.amax(-1, keepdim=True)) / column(temperatures)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    # The most likely token always counts, whatever top_p is.
    kept = probabilities.where((before < column(top_p)) | (before == 0), 0.0)
    cumulated = kept.cumsum(-1)
    wanted = column(draws) * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, wanted, right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding must not lead beyond it
    tokens: list[int] = order.gather(1, places.minimum(last)).flatten().tolist()
    return tokens
