"""Answers that are compared: multiple choice, and preferences, of which one is better."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Self

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.chat import Chat
from lora_domains.tasks.rows import (
    BESIDE,
    Example,
    Row,
    columns_in,
    fill,
    filled,
    literal_text,
    placeholder,
    plain_text,
    user_turn,
)

QUESTION = "Question: {question}\nAnswer:"
ASKED = "Answer the question with one of the answers below it, and nothing else."
"""The instruction before a question in a chat template."""


@register
@dataclass(frozen=True)
class MultipleChoice(Task):
    """Questions with their own candidate answers, each scored as a continuation of the prompt.

    ``{question}`` in the prompt stands for the column ``question`` names. ``answer`` is the column
    of the index of the correct choice, its letter (A, B, …) or its text. With
    ``per_token`` the log-likelihood of a candidate is divided by its number of tokens, so that
    long ones are not at a disadvantage (Brown et al. 2020, arXiv 2005.14165, section 2.4).

    With ``chat`` the base's chat template renders the question and its candidates as a turn of the
    user, after an ``instruction``, and a candidate as the answer. By default (None) it does on a
    base that was trained on chats, unless there is another prompt.
    """

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    prompt: str = QUESTION
    per_token: bool = False
    chat: bool | None = None
    instruction: str | None = None

    kind = "multiple_choice"
    loss_unit = "label cross-entropy"
    scored_by = "choices"
    predictable = False
    metric = "accuracy"

    @property
    def template(self) -> str:
        return self.prompt.replace("{question}", placeholder(self.question))

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (*columns_in(self.template), self.choices)

    @property
    def answer_column(self) -> str:
        return self.answer

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        return cls() if {"question", "choices", "answer"} <= {*columns} else None

    def with_chat(self, chat: bool, thinking: bool | None = False) -> Self:
        return super().with_chat(chat and self.prompt == QUESTION, thinking)

    def turns(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        if self.chat is False:
            return ()
        prompt = placeholder(self.question) if self.prompt == QUESTION else self.template
        listed = "\n".join(f"- {text}" for text in self._candidates(row))
        return user_turn(self.instruction or ASKED, f"{fill(prompt, row)}\n\n{listed}")

    def example(self, row: Row) -> Example:
        texts = self._candidates(row)
        choices = tuple(" " + text for text in texts)
        target = self._target(row, texts)
        prompt, text = filled(self.template, row)
        return Example(
            row.id, prompt, choices[target], choices, target, place=row.place, text=text,
            literal=literal_text(self.template), messages=self.turns(row),
        )  # fmt: skip

    def _candidates(self, row: Row) -> list[str]:
        """The candidate answers: a list, a dict ``{"A": …}``, or either as JSON."""
        raw = row.values.get(self.choices)
        if isinstance(raw, str):  # a cell of a table
            try:
                raw = json.loads(raw)
            except ValueError:
                raw = None
        if isinstance(raw, Mapping):
            raw = list(raw.values())
        if not isinstance(raw, Sequence) or isinstance(raw, str) or len(raw) < 2:
            raise DataError(
                where=f"{row.place}, column {self.choices!r}",
                expected="a list of at least two candidate answers",
                found=type(raw).__name__ if not isinstance(raw, list) else f"{len(raw)} answers",
                hint="Write the candidates as a JSON list.",
            )
        texts = [plain_text(choice) for choice in raw]
        if None in texts:
            raise DataError(
                where=f"{row.place}, column {self.choices!r}",
                expected="candidate answers that are text or numbers",
                found=f"one of type {type(raw[texts.index(None)]).__name__}",
                hint="Write each candidate as text.",
            )
        return [str(text).strip() for text in texts]

    def _target(self, row: Row, texts: list[str]) -> int:
        value = row.values.get(self.answer)
        if isinstance(value, int) and 0 <= value < len(texts):
            return value
        text = (plain_text(value) or "").strip()
        if text in texts:
            return texts.index(text)
        if text.isdecimal() and int(text) < len(texts):  # a cell of a table
            return int(text)
        if len(text) == 1 and text.isascii() and text.isalpha():
            letter = ord(text.upper()) - ord("A")
            if letter < len(texts):
                return letter
        # "answer3" counts from 1, as some public datasets write it.
        digits = text.removeprefix("answer")
        if digits.isdecimal() and text.startswith("answer") and 1 <= int(digits) <= len(texts):
            return int(digits) - 1
        raise DataError(
            where=f"{row.place}, column {self.answer!r}",
            expected=f"the index (0 to {len(texts) - 1}), letter or text of the correct choice",
            found=repr(value) if isinstance(value, int) else "something else",
            hint="Write the index of the correct choice, counted from 0.",
        )


PROMPTS = ("prompt", "question", "instruction", "query", "input")
"""Columns of the prompt of a pair of answers."""


@register
@dataclass(frozen=True)
class Preference(Task):
    """Pairs of answers, the chosen and the rejected one, in columns of text or of messages.

    The adapter learns to prefer the chosen answer more than the base does (direct preference
    optimisation, Rafailov et al. 2023, arXiv 2305.18290); the frozen base is the reference. The
    smaller ``beta``, the further it may move from the base. Without a ``prompt`` both columns hold
    whole conversations that differ in their last answer. ``system``, ``history``, ``tools`` and
    ``thinking`` are as in ``Chat``, and ``max_new_tokens`` are those of a predicted answer.
    """

    prompt: str | tuple[str, ...] | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    beta: float = 0.1
    max_new_tokens: int = 256
    thinking: bool | None = None

    kind = "preference"
    aliases: ClassVar = {"text": "prompt", "label": "chosen"}
    loss_unit = "nats per answer token"
    trained_unit = "the DPO loss of a pair"
    scored_by = "choices"
    metric = "win_rate"
    template = ""
    chat = True
    converses = True
    score_keys = frozenset({"won", "ranked", "margin", "nats", "tokens"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise DomainError(
                where="preference, setting 'beta'",
                expected="above 0, and finite",
                found=repr(self.beta),
                hint="Usual values are 0.01 to 0.5.",
            )

    @property
    def answer_column(self) -> str | None:
        return self._conversation(self.chosen).answer_column

    @property
    def input_columns(self) -> tuple[str, ...]:
        return self._conversation(self.chosen).input_columns

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.input_columns, self.chosen, self.rejected)))

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        if not {"chosen", "rejected"} <= {*columns}:
            return None
        more: dict[str, Any] = {name: name for name in BESIDE if name in columns}
        return cls(prompt=next((name for name in PROMPTS if name in columns), None), **more)

    def example(self, row: Row) -> Example:
        """The chosen answer is the first choice, and the correct one."""
        chosen, rejected = (
            self._conversation(column).example(row) for column in (self.chosen, self.rejected)
        )
        expected, found, not_text = "", "", {"tool_calls", "reasoning_content"}
        if chosen.messages[:-1] != rejected.messages[:-1]:
            expected, found = "answers to the same turns", "turns before them that differ"
        elif chosen.answer == rejected.answer:
            expected, found = "two different answers", "the same one twice"
        elif not_text & ({*chosen.messages[-1]} | {*rejected.messages[-1]}):
            expected, found = "two answers in text", "calls of functions, or reasoning beside it"
        if expected:
            raise DataError(
                where=f"{row.place}, columns {self.chosen!r} and {self.rejected!r}",
                expected=expected,
                found=found,
                hint="Delete the row.",
            )
        return replace(
            chosen, messages=chosen.messages[:-1], choices=(chosen.answer, rejected.answer),
            target=0, ended=True,
        )  # fmt: skip

    def unlabelled(self, row: Row) -> Example:
        return self._conversation(self.chosen).unlabelled(row)

    def to_predict(self, text: str | Mapping[str, Any], number: int) -> Example:
        return self._conversation(self.chosen).to_predict(text, number)

    def to_answer(self, messages: Sequence[Mapping[str, Any]]) -> Example:
        return self._conversation(self.chosen).to_answer(messages)

    def _conversation(self, answer: str) -> Chat:
        """The rows with the answer in one column, as a chat."""
        beside = {name: getattr(self, name) for name in BESIDE}
        if self.prompt is None:
            return Chat(messages=answer, **beside)
        return Chat(user=self.prompt, assistant=answer, **beside)
