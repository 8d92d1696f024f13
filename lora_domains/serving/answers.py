"""One answer as it is generated: which tokens are chosen, its text so far, and where it ends."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character whose last ones are missing."""


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

    probabilities, order = (logits / column(temperatures)).softmax(-1).sort(descending=True)
    before = probabilities.cumsum(-1) - probabilities
    # The most likely token always counts, whatever top_p is.
    kept = probabilities.where((before < column(top_p)) | (before == 0), 0.0)
    cumulated = kept.cumsum(-1)
    wanted = column(draws) * cumulated[:, -1:]
    places = torch.searchsorted(cumulated, wanted, right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding must not lead beyond it
    tokens: list[int] = order.gather(1, places.minimum(last)).flatten().tolist()
    return tokens
