"""Multiple choice: questions with their own candidate answers."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from lora_domains.errors import DataError
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.rows import (
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

    def with_chat(self, chat: bool) -> Self:
        return super().with_chat(chat and self.prompt == QUESTION)

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
