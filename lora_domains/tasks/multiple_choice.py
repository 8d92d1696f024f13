"""Answers that are compared: multiple choice, and preferences, of which one is better."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, ClassVar, Self

from lora_domains.errors import DataError, DomainError, EmptyCell
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.generation import Chat, Generation
from lora_domains.tasks.messages import (
    ASKED_BY,
    BESIDE,
    CHOICES,
    CONVERSATIONS,
    CORRECT,
    asking,
    beside,
    choice_columns,
    choice_name,
    named,
)
from lora_domains.tasks.rows import (
    Example,
    Row,
    columns_in,
    fill,
    filled,
    literal_text,
    parsed,
    placeholder,
    plain_text,
    text_of,
    user_turn,
)

QUESTION = "Question: {question}\nAnswer:"
ASKED = "Answer the question with one of the answers below it, and nothing else."
"""The instruction before a question in a chat template."""


@register
@dataclass(frozen=True)
class MultipleChoice(Task):
    """Questions with their own candidate answers, each scored as a continuation of the prompt.

    ``{question}`` in the prompt stands for the column ``question`` names. ``choices`` is the column
    of all candidates, or the columns of one each. ``answer`` is the column of the index of the
    correct choice, its letter (A, B, …) or its text. With
    ``per_token`` the log-likelihood of a candidate is divided by its number of tokens, so that
    long ones are not at a disadvantage (Brown et al. 2020, arXiv 2005.14165, section 2.4).

    With ``chat`` the base's chat template renders the question and its candidates as a turn of the
    user, after an ``instruction``, and a candidate as the answer. By default (None) it does on a
    base that was trained on chats, unless there is another prompt.
    """

    question: str = "question"
    choices: str | tuple[str, ...] = "choices"
    answer: str = "answer"
    prompt: str = QUESTION
    per_token: bool = False
    chat: bool | None = None
    instruction: str | None = None

    kind = "multiple_choice"
    loss_unit = "label cross-entropy"
    scored_by = "choices"
    own_choices = True
    metric = "accuracy"

    @property
    def template(self) -> str:
        return self.prompt.replace("{question}", placeholder(self.question))

    @property
    def input_columns(self) -> tuple[str, ...]:
        each = (self.choices,) if isinstance(self.choices, str) else self.choices
        return (*columns_in(self.template), *each)

    @property
    def answer_column(self) -> str:
        return self.answer

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        question, answer = named(columns, *ASKED_BY), named(columns, *CORRECT)
        choices: str | tuple[str, ...] | None = named(columns, *CHOICES) or choice_columns(columns)
        if question is None or not choices or answer is None:
            return None
        return cls(question, choices, answer)

    def with_chat(self, chat: bool, thinking: bool | None = False) -> Self:
        return super().with_chat(chat and self.prompt == QUESTION, thinking)

    def turns(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        if self.chat is False:
            return ()
        prompt = placeholder(self.question) if self.prompt == QUESTION else self.template
        listed = "\n".join(f"- {text}" for text in self._candidates(row)[0])
        return user_turn(self.instruction or ASKED, f"{fill(prompt, row)}\n\n{listed}")

    def example(self, row: Row) -> Example:
        asked = self.unlabelled(row)
        target = self._target(row, *self._candidates(row))
        return replace(asked, answer=asked.choices[target], target=target)

    def unlabelled(self, row: Row) -> Example:
        choices = tuple(" " + text for text in self._candidates(row)[0])
        prompt, text = filled(self.template, row)
        return Example(
            row.id, prompt, "", choices, place=row.place, text=text,
            literal=literal_text(self.template), messages=self.turns(row),
        )  # fmt: skip

    def _candidates(self, row: Row) -> tuple[list[str], list[str]]:
        """The candidate answers, and their names where they have some.

        A cell is a list, a dict ``{"A": …}`` or ``{"text": […], "label": […]}``, or one as JSON.
        """
        if not isinstance(self.choices, str):
            given = [text_of(row, column) for column in self.choices]
            names = [choice_name(column) for column in self.choices]
            by_order = [_letter(n) for n in range(len(given))]
            return [text.strip() for text in given], by_order if "" in names else names
        raw = parsed(row.values.get(self.choices))
        names = []
        if isinstance(raw, Mapping) and isinstance(texts := parsed(raw.get("text")), list):
            names, raw = [*parsed(raw.get("label", ()))], texts  # as ARC has them
        elif isinstance(raw, Mapping):
            names, raw = [*raw], [*raw.values()]
        if not isinstance(raw, list) or len(raw) < 2:
            raise DataError(
                where=f"{row.place}, column {self.choices!r}",
                expected="a list of at least two candidate answers",
                found=f"{len(raw)} answers" if isinstance(raw, list)
                else "a text that is no list" if isinstance(raw, str) else type(raw).__name__,
                hint="Write the candidates as a JSON list, or name the columns of one each "
                "(--set task.choices=A,B,C,D).",
            )  # fmt: skip
        texts = [plain_text(choice) for choice in raw]
        if None in texts:
            raise DataError(
                where=f"{row.place}, column {self.choices!r}",
                expected="candidate answers that are text or numbers",
                found=f"one of type {type(raw[texts.index(None)]).__name__}",
                hint="Write each candidate as text.",
            )
        named = [*map(str, names)] if len(names) == len(texts) else []
        return [str(text).strip() for text in texts], named

    def _target(self, row: Row, texts: list[str], names: list[str]) -> int:
        value = row.values.get(self.answer)
        if isinstance(value, int) and 0 <= value < len(texts) and str(value) not in names:
            return value
        text = (plain_text(value) or "").strip()
        if text in names:
            return names.index(text)
        found = {texts.index(text)} if text in texts else set()
        if text.isdecimal() and int(text) < len(texts):  # a cell of a table
            found.add(int(text))
        letters = [_letter(n) for n in range(len(texts))]
        if not found and text.upper() in letters:
            found.add(letters.index(text.upper()))
        # "answer3" counts from 1, as some public datasets write it.
        digits = text.removeprefix("answer")
        if not found and digits.isdecimal() and digits != text and 1 <= int(digits) <= len(texts):
            found.add(int(digits) - 1)
        if len(found) == 1:
            return found.pop()
        where = f"{row.place}, column {self.answer!r}"
        expected = f"the index (0 to {len(texts) - 1}), letter or text of the correct choice"
        if not text and self.answer in row.values:
            hint = "Fill the cell or delete the row (--drop-empty)."
            raise EmptyCell(where=where, expected=expected, found="an empty cell", hint=hint)
        known = repr(value) if isinstance(value, int) else "something else"
        raise DataError(
            where=where,
            expected=expected,
            found="the index of one choice and the text of another" if found else known,
            hint="Write the letter of the correct choice: A, B, …"
            if found
            else "Write the index of the correct choice, counted from 0.",
        )


def _letter(number: int) -> str:
    """The name of a candidate without one: A, B, …"""
    return chr(ord("A") + number) if number < 26 else str(number)


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
        chosen, rejected = (
            named(columns, name, f"{name}_response") for name in ("chosen", "rejected")
        )
        if chosen is None or rejected is None:
            return None
        more: dict[str, Any] = beside(columns)
        prompt = asking(columns) or asking(columns, *CONVERSATIONS) or (None,)
        return cls(prompt[0] if len(prompt) == 1 else prompt, chosen, rejected, **more)

    def of_chosen(self, kind: type[Task]) -> Task | None:
        """The chat or generation of the chosen answers; None for other kinds."""
        if kind is Chat:
            return self._conversation(self.chosen)
        if kind is Generation and self.prompt is not None:
            return Generation(self.prompt, self.chosen)
        return None

    def example(self, row: Row) -> Example:
        """The chosen answer is the first choice, and the correct one."""
        chosen, rejected = (
            self._conversation(column).example(row) for column in (self.chosen, self.rejected)
        )
        expected, found, not_text = "", "", {"tool_calls", "reasoning_content"}
        if chosen.messages[:-1] != rejected.messages[:-1]:
            expected, found = "answers to the same turns", "turns before them that differ"
        elif chosen.answer == rejected.answer:
            raise EmptyCell(
                where=f"{row.place}, columns {self.chosen!r} and {self.rejected!r}",
                expected="two different answers",
                found="the same one twice",
                hint="Delete the row (--drop-empty).",
            )
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
