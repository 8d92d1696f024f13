"""Answers that are written: to questions, in conversations; and plain text, which has none.

A conversation is a tuple of messages (``messages``), as chat templates read them.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

from lora_domains.errors import DataError, DomainError, EmptyCell, listed
from lora_domains.tasks.answers import answer_scores, number_score
from lora_domains.tasks.base import ScoredBy, Task, register
from lora_domains.tasks.classification import TextTask
from lora_domains.tasks.messages import (
    ANSWERS,
    CHOICES,
    CONVERSATIONS,
    INSTRUCTIONS,
    JOINED,
    Message,
    asking,
    beside,
    choice_columns,
    continued,
    history_of,
    is_empty,
    message_text,
    messages_of,
    named,
    turns_of,
    without_nulls,
)
from lora_domains.tasks.rows import Example, Row, answers_in, parsed, said, text_of

Judge = Literal["text", "number"]
ANSWERED = {
    "instruction": ("output", "response", "completion"),
    "prompt": ("completion", "response"),
}
"""Columns of the assistant for each column that asks it (``INSTRUCTIONS``)."""


@register
@dataclass(frozen=True)
class Generation(TextTask):
    """Rows with a free-text answer, generated greedily and compared with the reference.

    A generated answer ends before ``until``. ``judge`` says what is compared: the words, or the
    last number in each text (for calculations whose steps may differ). With ``chat`` the base's
    chat template renders the text as a turn of the user, after an ``instruction`` if one is given;
    by default (None) it does on a base that was trained on chats, unless there is a prompt. With
    ``thinking`` it may think first, where the template has a switch for that; by default (None)
    where most answers to learn do.
    """

    text: str | tuple[str, ...] = "question"
    answer: str = "answer"
    prompt: str | None = None
    max_new_tokens: int = 64
    judge: Judge = "text"
    until: str = ""
    chat: bool | None = None
    instruction: str | None = None
    thinking: bool | None = None

    kind = "generation"
    aliases: ClassVar = {"label": "answer"}
    scored_by = "text"
    metric = "token_f1"

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("judge", self.judge in get_args(Judge), listed(get_args(Judge))),
        ):
            if not holds:
                raise DomainError(
                    where=f"generation, setting {name!r}",
                    expected=expected,
                    found=repr(getattr(self, name)),
                    hint="Change it in the recipe or on the command line.",
                )

    @property
    def answer_column(self) -> str:
        return self.answer

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        text, answer = asking(columns, "question"), named(columns, "answer")
        if not text or answer is None or named(columns, *CHOICES) or choice_columns(columns):
            return None
        return cls(text[0] if len(text) == 1 else text, answer)

    def example(self, row: Row) -> Example:
        answer = " " + text_of(row, self.answer).strip()
        return replace(self.unlabelled(row), answer=answer)

    @property
    def score_keys(self) -> frozenset[str]:
        if self.judge == "number":
            return frozenset({"f1", "exact", "number", "judge", "nats", "tokens"})
        return super().score_keys

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.until,) if self.until else ()

    def answer_in(self, text: str) -> str:
        """What follows the reasoning and comes before ``until``."""
        text = super().answer_in(text)
        return text.split(self.until)[0].strip() if self.until else text

    def score_text(self, text: str, reference: str) -> dict[str, float]:
        """See ``answers``. Where ``judge`` is "number", ``f1`` and ``exact`` are 1 if the last
        numbers are equal, else 0."""
        text = self.answer_in(text)
        if self.judge == "text":
            return answer_scores(text, reference)
        number = number_score(text, reference)
        right = number.get("number", 0.0)
        return {"f1": right, "exact": right, **number}


@register
@dataclass(frozen=True)
class Chat(Task):
    """Conversations, rendered by the base's chat template; the assistant's turns are learned.

    ``messages`` is a column with all turns: a list of ``{"role": …, "content": …}`` (or ``from``
    and ``value``, as ShareGPT has them), or its JSON. Where ``user`` and ``assistant`` are given, a
    row is one question and its answer in these columns; several columns of the user are one turn.
    ``system`` is a column with the system's text, ``history`` one with the turns before (pairs of a
    question and its answer, as LLaMA-Factory has them, or messages; these answers are learned too),
    and ``tools`` one with the JSON schemas of the functions that the assistant may call. With
    ``generate`` an evaluation also generates the last answer of each conversation, of
    ``max_new_tokens`` at most, and compares it with the reference. With ``thinking`` it may think
    first, as in ``Generation``.
    """

    messages: str = "messages"
    user: str | tuple[str, ...] | None = None
    assistant: str | None = None
    system: str | None = None
    history: str | None = None
    tools: str | None = None
    max_new_tokens: int = 256
    generate: bool = False
    thinking: bool | None = None

    kind = "chat"
    aliases: ClassVar = {"text": "user", "label": "assistant"}
    metric = "nats_per_token"
    template = ""
    chat = True
    converses = True

    def __post_init__(self) -> None:
        if (self.user is None) != (self.assistant is None):
            raise DomainError(
                where="chat",
                expected="columns of the user and of the assistant, or neither",
                found=f"user {self.user!r}, assistant {self.assistant!r}",
                hint='For example Chat(user="question", assistant="answer").',
            )

    @property
    def users(self) -> tuple[str, ...]:
        """The columns of the user's turn; () where a column holds the whole conversation."""
        if self.user is None:
            return ()
        return (self.user,) if isinstance(self.user, str) else tuple(self.user)

    @property
    def input_columns(self) -> tuple[str, ...]:
        more = (name for name in (self.system, self.history, self.tools) if name is not None)
        return (*(self.users or (self.messages,)), *more)

    @property
    def answer_column(self) -> str | None:
        return self.assistant

    @property
    def scored_by(self) -> ScoredBy:
        return "text" if self.generate else "likelihood"

    def score_text(self, text: str, reference: str) -> dict[str, float]:
        return answer_scores(self.answer_in(text), reference)

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        more: dict[str, Any] = beside(columns)
        name = named(columns, *CONVERSATIONS)
        if name is not None and not {"chosen", "rejected"} <= {*columns}:
            return cls(messages=name, **more)
        for usual in INSTRUCTIONS:
            user, assistant = asking(columns, usual), named(columns, *ANSWERED[usual])
            if user and assistant:
                return cls(user=user, assistant=assistant, **more)
        user, assistant = asking(columns), named(columns, *ANSWERS)
        if more and user and assistant:  # such columns are of chats alone
            return cls(user=user, assistant=assistant, **more)
        return None

    # ── Examples ────────────────────────────────────────────────────────────────────────────────

    def example(self, row: Row) -> Example:
        """A conversation up to its last answer. What follows it, an opening turn of the assistant,
        which answers nothing, and turns whose ``weight`` is 0 are not learned."""
        turns = self._turns(row)
        if self.assistant is not None:
            where = f"{row.place}, column {self.assistant!r}"
            turns = continued(turns, turns_of(row, self.assistant, "assistant"), where)
        answers = answers_in(turns)
        turns = turns[: answers[-1] + 1] if answers else []
        if not answers:
            raise EmptyCell(
                where=f"{row.place}, column {self.assistant or self.messages!r}",
                expected="a conversation with an answer of the assistant after another turn",
                found="none",
                hint="Roles are system, user, assistant and tool; delete rows without an answer "
                "(--drop-empty).",
            )
        return self._example(row, turns, said(turns[-1]), turns[:-1])

    def unlabelled(self, row: Row) -> Example:
        turns = self._turns(row)
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise EmptyCell(
                where=f"{row.place}, column {self.messages!r}",
                expected="a turn to answer",
                found="none",
                hint="Write what the user says.",
            )
        return self._example(row, turns, "", turns)

    def to_predict(self, text: str | Mapping[str, Any], number: int) -> Example:
        if isinstance(text, Mapping):  # what else is missing is taken for empty, as in training
            row = Row(text, "input", number, f"input {number}")
            if not any(name in text for name in self.users or (self.messages,)):
                text_of(row, (self.users or (self.messages,))[0])  # raises
            return self.unlabelled(row)
        turns = [{"role": "user", "content": message_text(text, f"input {number}")}]
        return self._example(Row({}, "input", number, f"input {number}"), turns, "", turns)

    def to_answer(self, messages: Sequence[Message]) -> Example:
        return self._example(Row({}, "input", 0, "messages"), messages, "", messages)

    def _example(
        self, row: Row, turns: Sequence[Message], answer: str, before: Sequence[Message]
    ) -> Example:
        asked = [f"{turn['role']}: {said(turn)}" for turn in before]
        own = [said(turn) for turn in before if turn["role"] != "system"]
        return Example(
            row.id, "\n".join([*asked, "assistant:"]), f" {answer}" if answer else "",
            place=row.place, text="\n".join(own), messages=tuple(turns), tools=self._tools(row),
        )  # fmt: skip

    def _turns(self, row: Row) -> list[dict[str, Any]]:
        """The turns of a row, without the column of the assistant."""
        turns = []
        if self.system is not None and not is_empty(row.values.get(self.system)):
            turns = turns_of(row, self.system, "system")
        if self.history is not None:
            turns += history_of(row, self.history)
        if self.user is None:
            return turns + messages_of(row, self.messages)
        filled = [name for name in self.users if not is_empty(row.values.get(name))]
        parts = [turns_of(row, name, "user") for name in filled or self.users[:1]]
        if all(len(part) == 1 and part[0]["role"] == "user" for part in parts):
            text = JOINED.join(part[0]["content"] for part in parts)
            return [*turns, {"role": "user", "content": text}]
        return turns + [turn for part in parts for turn in part]

    def _tools(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        value = row.values.get(self.tools) if self.tools is not None else None
        if is_empty(value):
            return ()
        tools = parsed(value)
        tools = [parsed(one) for one in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(one, Mapping) for one in tools):
            raise DataError(
                where=f"{row.place}, column {self.tools!r}",
                expected="a list of functions as JSON schemas",
                found=type(value).__name__,
                hint='Write [{"type": "function", "function": {"name": …, "parameters": …}}].',
            )
        return tuple(tools if isinstance(value, str) else map(without_nulls, tools))


@register
@dataclass(frozen=True)
class LanguageModelling(Task):
    """Plain text; every token is supervised. Long texts are read in windows, none is truncated."""

    text: str = "text"

    kind = "language_modelling"
    predictable = False
    metric = "nats_per_token"
    template = ""
    answer_column = None

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (self.text,)

    def example(self, row: Row) -> Example:
        return Example(row.id, "", text_of(row, self.text), place=row.place)
