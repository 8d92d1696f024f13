"""Chat: conversations whose assistant turns are learned, in the shapes that people store them in.

A conversation is a tuple of messages, as chat templates read them: each has a ``role`` (system,
user, assistant or tool) and a ``content``; an assistant may have ``tool_calls`` instead.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lora_domains.errors import DataError, DomainError, EmptyCell, listed
from lora_domains.tasks.answers import answer_scores
from lora_domains.tasks.base import ScoredBy, Task, register
from lora_domains.tasks.rows import (
    BESIDE,
    Example,
    Row,
    answers_in,
    check_encodable,
    is_null,
    parsed,
    plain_text,
    said,
    text_of,
)

Message = Mapping[str, Any]
"""A turn of a conversation."""
ROLES = {
    "system": "system", "developer": "system", "user": "user", "human": "user",
    "prompter": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "bot": "assistant", "model": "assistant", "ai": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "tool": "tool", "function": "tool", "observation": "tool",
    "function_response": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
"""Names of roles in files, and those that templates know."""
CALLS = ("function_call", "tool_call")
"""Roles of a turn whose content is a call, or a list of calls, as JSON."""
TEXTS = (None, "text", "input_text", "output_text")
"""What the ``type`` of a part of a content may be."""
KEPT = ("name", "tool_call_id", "reasoning_content")
"""What a message may have beside its role, its content and its calls."""
SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("instruction", "input"), "output"), (("instruction",), "output"),
    (("instruction", "context"), "response"), (("instruction", "input"), "response"),
    (("instruction",), "response"), (("prompt",), "completion"), (("prompt",), "response"),
)  # fmt: skip
"""Columns of rows with one question and one answer: (those of the user, that of the assistant)."""
CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold all turns of a conversation."""
JOINED = "\n\n"
"""Between two texts that become one turn."""


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
        more: dict[str, Any] = {name: name for name in BESIDE if name in columns}
        for name in CONVERSATIONS:
            if name in columns and not {"chosen", "rejected"} <= {*columns}:
                return cls(messages=name, **more)
        for user, assistant in SHAPES:
            if {*user, assistant} <= {*columns}:
                return cls(user=user, assistant=assistant, **more)
        return None

    # ── Examples ────────────────────────────────────────────────────────────────────────────────

    def example(self, row: Row) -> Example:
        """A conversation up to its last answer. What follows it, an opening turn of the assistant,
        which answers nothing, and turns whose ``weight`` is 0 are not learned."""
        turns = self._turns(row)
        if self.assistant is not None:
            turns = _continued(turns, _part(row, self.assistant, "assistant"))
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
        turns = [{"role": "user", "content": _text(text, f"input {number}")}]
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
        if self.system is not None and not _is_empty(row.values.get(self.system)):
            turns = _part(row, self.system, "system")
        if self.history is not None:
            turns += _history(row, self.history)
        if self.user is None:
            return turns + messages_of(row, self.messages)
        filled = [name for name in self.users if not _is_empty(row.values.get(name))]
        parts = [_part(row, name, "user") for name in filled or self.users[:1]]
        if all(len(part) == 1 and part[0]["role"] == "user" for part in parts):
            text = JOINED.join(part[0]["content"] for part in parts)
            return [*turns, {"role": "user", "content": text}]
        return turns + [turn for part in parts for turn in part]

    def _tools(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        value = row.values.get(self.tools) if self.tools is not None else None
        if _is_empty(value):
            return ()
        tools = parsed(value)
        if not isinstance(tools, list) or not all(isinstance(one, Mapping) for one in tools):
            raise DataError(
                where=f"{row.place}, column {self.tools!r}",
                expected="a list of functions as JSON schemas",
                found=type(value).__name__,
                hint='Write [{"type": "function", "function": {"name": …, "parameters": …}}].',
            )
        return tuple(tools if isinstance(value, str) else map(_without_nulls, tools))


# ── Messages as they are stored ─────────────────────────────────────────────────────────────────


def messages_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages in ``column``: a list of them, or its JSON.

    Raises EmptyCell for none, DataError for what is no message.
    """
    where, value = f"{row.place}, column {column!r}", row.values.get(column)
    if _is_empty(value):
        if not isinstance(value, list | tuple):
            text_of(row, column)  # raises
        raise EmptyCell(
            where=where, expected="messages", found="none", hint="Delete the row (--drop-empty)."
        )
    stored = parsed(value)
    if isinstance(stored, Mapping) and stored:  # ``Sequence`` of datasets: a list for each key
        lists = [parsed(part) for part in stored.values()]
        if all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
            stored = [dict(zip(stored, parts, strict=True)) for parts in zip(*lists, strict=True)]
    if not isinstance(stored, list) or not all(isinstance(one, Mapping) for one in stored):
        raise DataError(
            where=where,
            expected="a list of messages, each with a role and a content",
            found="a text that is no JSON list" if isinstance(value, str) else type(value).__name__,
            hint='Write [{"role": "user", "content": …}, {"role": "assistant", "content": …}], or '
            "name the columns of the user and of the assistant (--text, --label).",
        )
    return [_message(one, f"{where}, message {n}") for n, one in enumerate(stored, 1)]


def _history(row: Row, column: str) -> list[dict[str, Any]]:
    """The turns in ``column``: messages, or pairs of a question and its answer; [] for none."""
    value, where = parsed(row.values.get(column)), f"{row.place}, column {column!r}"
    if _is_empty(value) or isinstance(value, Mapping) or _are_messages(value):
        return [] if _is_empty(value) else messages_of(row, column)
    pairs = [*map(parsed, value)] if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise DataError(
            where=where,
            expected="the turns before, as pairs of a question and its answer, or messages",
            found="a text that is no JSON list" if isinstance(value, str) else "another form",
            hint='Write [["first question", "its answer"], …], or leave the column out '
            "(--set task.history=null).",
        )
    return [
        _message({"role": role, "content": text}, f"{where}, pair {n}")
        for n, pair in enumerate(pairs, 1)
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]  # fmt: skip


def _message(stored: Mapping[str, Any], where: str) -> dict[str, Any]:
    named = _first(stored, "role", "from")
    role = ROLES.get(named.strip().lower()) if isinstance(named, str) else None
    if role is None:
        raise DataError(
            where=where,
            expected="a role: " + listed(ROLES, 99),
            found="another" if isinstance(named, str) else "none",
            hint="Rename the role.",
        )
    content, calls = _first(stored, "content", "value"), parsed(stored.get("tool_calls"))
    if named in CALLS:  # as ShareGPT stores calls
        calls, content = parsed(content), None
    elif not is_null(stored.get("function_call")) and not calls:
        calls = parsed(stored["function_call"])
    calls = [calls] if calls and isinstance(calls, Mapping | str) else calls
    if role == "tool" and isinstance(content, Mapping):
        content = json.dumps(content, ensure_ascii=False, default=str)
    message: dict[str, Any] = {"role": role, "content": _text(content, where)}
    message |= {key: value for key in KEPT if isinstance(value := stored.get(key), str) and value}
    if role == "assistant" and not is_null(weight := stored.get("weight")) and weight != 1:
        if weight != 0:
            raise DataError(
                where=where,
                expected="a weight of 0 (not learned) or 1",
                found="another",
                hint="Leave out the weight of turns that are learned.",
            )
        message["weight"] = 0
    if isinstance(calls, list) and calls:
        message["tool_calls"] = [_call(call, where) for call in calls]
    if role in ("user", "assistant") and not message["content"].strip() and not calls:
        raise EmptyCell(
            where=where,
            expected="text",
            found="an empty content",
            hint="Fill it or delete the row (--drop-empty).",
        )
    return message


def _text(content: object, where: str) -> str:
    """The text of a message; of several parts, those of text, which all must be."""
    parts = content if isinstance(content, list | tuple) else [{"type": "text", "text": content}]
    texts = [
        plain_text(part if isinstance(part, str) else part["text"])
        if isinstance(part, str) or _is_text(part) else None
        for part in parts
    ]  # fmt: skip
    text = "".join(part for part in texts if part is not None)
    if None in texts:
        raise DataError(
            where=where,
            expected="a content that is text",
            found="a part that is none",
            hint="Leave out images and the like: the base reads text.",
        )
    check_encodable(text, where)
    return text


def _is_text(part: object) -> bool:
    return isinstance(part, Mapping) and "text" in part and part.get("type") in TEXTS


def _call(call: object, where: str) -> dict[str, Any]:
    """A call of a function, its arguments parsed: a template writes them as JSON itself."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            where=where,
            expected='calls like {"type": "function", "function": {"name": …, "arguments": …}}',
            found="another form",
            hint="Write the name of the function and its arguments.",
        )
    given = function.get("arguments", {})
    arguments = parsed(given) if isinstance(given, str) else _without_nulls(given)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    name = call.get("id") if isinstance(call, Mapping) else None
    return {"id": name, **made} if isinstance(name, str) else made


def _part(row: Row, column: str, role: str) -> list[dict[str, Any]]:
    """The text in ``column`` as a turn of ``role``; messages stay what they are."""
    value = row.values.get(column)
    # Text that begins with a bracket is seldom a list of messages.
    plain = isinstance(value, str) and not value.lstrip().startswith("[")
    stored = None if plain else parsed(value)
    if _are_messages(stored) if isinstance(value, str) else isinstance(stored, list):
        return messages_of(row, column)
    return [{"role": role, "content": text_of(row, column).strip()}]


def _continued(turns: list[dict[str, Any]], more: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``turns`` and ``more`` after them, which may repeat them, as a whole conversation does."""
    system = [turn for turn in turns if turn["role"] == "system"]
    asked, again = ([(turn["role"], turn["content"].strip()) for turn in part
                     if turn["role"] != "system"] for part in (turns, more))  # fmt: skip
    if len(again) > len(asked) > 0 and again[: len(asked)] == asked:
        return more if more[0]["role"] == "system" else system + more
    return turns + more


def _are_messages(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(
        isinstance(one, Mapping) and ("role" in one or "from" in one) for one in value
    )  # fmt: skip


def _first(stored: Mapping[str, Any], *names: str) -> Any:
    """The first of the keys ``names`` that has a value."""
    return next((stored[name] for name in names if not is_null(stored.get(name))), None)


def _without_nulls(value: Any) -> Any:
    """``value`` without keys that are null: a Parquet file gives every row the keys of all."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple) or type(value).__name__ == "ndarray":
        return [_without_nulls(part) for part in value]
    return value


def _is_empty(value: object) -> bool:
    return is_null(value) or (isinstance(value, str | list | tuple) and not (
        value.strip() if isinstance(value, str) else value
    ))  # fmt: skip
