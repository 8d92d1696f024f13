"""Conversations, questions and answers as files store them: the usual columns, and messages.

A conversation is a list of messages, as chat templates read them: each has a ``role`` (system,
user, assistant or tool) and a ``content``; an assistant may have ``tool_calls`` instead. Tools
write names of columns in different cases (``Instruction``, ``instruction``).
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any

from lora_domains.errors import DataError, EmptyCell, listed
from lora_domains.tasks.rows import Row, check_encodable, is_null, parsed, plain_text, text_of

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold all turns of a conversation."""
INSTRUCTIONS = ("instruction", "prompt")
"""Columns that ask for an answer in a conversation."""
QUESTIONS = (*INSTRUCTIONS, "question", "query", "input")
"""Columns that ask for an answer."""
SUBJECTS = ("input", "context", "passage")
"""Columns of a text that the question is about; some rows have none."""
ANSWERS = ("output", "response", "completion", "answer")
"""Columns of a free answer."""
CHOICES = ("choices", "options", "endings")
"""Columns of the candidate answers of a question."""
ASKED_BY = ("question", "prompt", "ctx", "frage")
"""Columns of a question that has candidate answers."""
EACH_CHOICE = re.compile(r"(op|opt|option|choice|)[\W_]*([a-z]|\d)", re.IGNORECASE)
"""Names of columns of one candidate each, and their letter or number: ``A``, ``opa``, ``Option 1``.
"""
CORRECT = (
    "answer", "answerKey", "answer_idx", "cop", "label", "correct", "correct_answer",
    "correct answer", "correct_option", "correct option", "solution", "antwort",
)  # fmt: skip
"""Columns that say which candidate is correct."""
BESIDE = {
    "system": ("system", "system_prompt"), "history": ("history",), "tools": ("tools",),
}  # fmt: skip
"""Settings of chats, and names of columns that are read with a conversation where a file has them.
"""
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
CONTENTS = ("content", "value", "text")
"""Names of the content of a message."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the reasoning before an answer, the first of which templates know."""
KEPT = ("name", "tool_call_id")
"""What a message may have beside its role, its content, its reasoning and its calls."""
ARGUMENTS = ("arguments", "parameters", "input")
"""Names of what a function is called with."""
TRANSCRIPT = re.compile(r"(?:\A\s*|\n\n)(System|Human|Assistant):")
"""The beginning of a turn in a conversation that is one text, as in Anthropic's hh-rlhf."""
JOINED = "\n\n"
"""Between two texts that become one turn."""


# ── Columns ─────────────────────────────────────────────────────────────────────────────────────


def named(columns: Collection[str], *usual: str) -> str | None:
    """The column that has the first of the ``usual`` names, in any case; None where none has."""
    names = {name.casefold(): name for name in columns}
    exact = (name if name in columns else names.get(name.casefold()) for name in usual)
    return next((name for name in exact if name is not None), None)


def choice_columns(columns: Collection[str]) -> tuple[str, ...]:
    """The columns of one candidate each, at least two of them, or three that are single letters:
    all from ``A`` or 1 on; () where there are none."""
    found: dict[str, dict[str, str]] = {}
    for column in columns:
        if match := EACH_CHOICE.fullmatch(column):
            found.setdefault(match[1].casefold(), {})[match[2].casefold()] = column
    for before, named_by in found.items():
        for names in ("abcdefghij", "123456789"):
            each = [named_by[name] for name in takewhile(named_by.__contains__, names)]
            if len(each) >= (2 if before else 3) and (before or names[0] == "a"):
                return tuple(each)
    return ()


def choice_name(column: str) -> str:
    """The letter or number in the name of a column of one candidate; "" without."""
    match = EACH_CHOICE.fullmatch(column)
    return match[2].upper() if match else ""


def asking(columns: Collection[str], *usual: str) -> tuple[str, ...]:
    """The column of the question or instruction, and of the text that it is about, in the order in
    which they are read; () where there is none. ``usual`` names take the place of ``QUESTIONS``."""
    question = named(columns, *(usual or QUESTIONS))
    if question is None:
        return ()
    subject = named([name for name in columns if name != question], *SUBJECTS)
    if subject is None:
        return (question,)
    # An instruction says what to do with the text after it; other questions follow their text.
    first = question.casefold() == "instruction"
    return (question, subject) if first else (subject, question)


def beside(columns: Collection[str]) -> dict[str, str]:
    """The settings of a chat for the columns that are read with a conversation."""
    found = {setting: named(columns, *usual) for setting, usual in BESIDE.items()}
    return {setting: name for setting, name in found.items() if name is not None}


def columns_beside(task: object) -> set[str]:
    """The columns that a chat reads beside its turns: a row may do without them, and they are no
    text of its own."""
    return {name for setting in BESIDE if (name := getattr(task, setting, None)) is not None}


# ── Messages ────────────────────────────────────────────────────────────────────────────────────


def messages_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The messages in ``column``: a list of them, or its JSON.

    Raises EmptyCell for none, DataError for what is no message.
    """
    where, value = f"{row.place}, column {column!r}", row.values.get(column)
    nothing = EmptyCell(
        where=where, expected="messages", found="none", hint="Delete the row (--drop-empty)."
    )
    if is_empty(value):
        if not isinstance(value, list | tuple):
            text_of(row, column)  # raises
        raise nothing
    stored: Any = _transcript(value) if isinstance(value, str) else None
    stored = parsed(value) if stored is None else stored
    if are_messages([stored]):
        stored = [stored]
    elif isinstance(stored, Mapping) and stored:  # ``Sequence`` of datasets: a list for each key
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
    turns = [_message(one, f"{where}, message {n}") for n, one in enumerate(stored, 1)]
    # A system that says nothing is none: templates would write an empty turn, or a blank line.
    turns = [turn for turn in turns if turn["role"] != "system" or turn["content"].strip()]
    if not turns:
        raise nothing
    return turns


def _transcript(text: str) -> list[dict[str, str]] | None:
    """The turns of ``TRANSCRIPT`` in a text; None where it does not begin with one of the user."""
    before, *parts = TRANSCRIPT.split(text)
    if before or not parts or "Human" not in parts[:3:2]:
        return None
    return [{"role": role.lower(), "content": content.strip()}
            for role, content in zip(parts[::2], parts[1::2], strict=True)]  # fmt: skip


def history_of(row: Row, column: str) -> list[dict[str, Any]]:
    """The turns in ``column``: messages, or pairs of a question and its answer; [] for none."""
    value, where = parsed(row.values.get(column)), f"{row.place}, column {column!r}"
    if is_empty(value) or isinstance(value, Mapping) or are_messages(value):
        return [] if is_empty(value) else messages_of(row, column)
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
    given = _first(stored, "role", "from")
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise DataError(
            where=where,
            expected="a role: " + listed(ROLES, 99),
            found="another" if isinstance(given, str) else "none",
            hint="Rename the role.",
        )
    content, calls = _first(stored, *CONTENTS), parsed(stored.get("tool_calls"))
    if given in CALLS:  # as ShareGPT stores calls
        calls, content = parsed(content), None
    elif not is_null(stored.get("function_call")) and not calls:
        calls = parsed(stored["function_call"])
    calls = [calls] if calls and isinstance(calls, Mapping | str) else calls
    reasoning = _first(stored, *REASONING)
    known = {"role", "from", *KEPT}
    others = [key for key, part in stored.items() if key not in known and isinstance(part, str)]
    if others and not (calls or reasoning or any(name in stored for name in CONTENTS)):
        raise DataError(
            where=where,
            expected=f"the text under one of the keys {listed(CONTENTS)}",
            found=f"the keys {listed(map(repr, others))}",
            hint="Rename the key of the text.",
        )
    if role == "tool" and _is_value(content):
        content = json.dumps(content, ensure_ascii=False, default=str)
    message: dict[str, Any] = {"role": role, "content": message_text(content, where)}
    message |= {key: value for key in KEPT if isinstance(value := stored.get(key), str) and value}
    if isinstance(reasoning, str) and reasoning:
        message[REASONING[0]] = reasoning
    # ms-swift writes ``"loss": false``.
    if role == "assistant" and (weight := _first(stored, "weight", "loss")) not in (None, 1):
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


def _is_value(content: object) -> bool:
    """Whether what a tool returned is an object or a list that is no list of parts of text."""
    if isinstance(content, list | tuple):
        return not all(isinstance(part, str) or _is_text(part) for part in content)
    return isinstance(content, Mapping)


def message_text(content: object, where: str) -> str:
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
            hint="Leave out images and the like, and write objects as text: the base reads text.",
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
    given = _first(function, *ARGUMENTS) or {}
    arguments = parsed(given) if isinstance(given, str) else without_nulls(given)
    made = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    name = call.get("id") if isinstance(call, Mapping) else None
    return {"id": name, **made} if isinstance(name, str) else made


def turns_of(row: Row, column: str, role: str) -> list[dict[str, Any]]:
    """The text in ``column`` as a turn of ``role``; messages stay what they are."""
    value = row.values.get(column)
    # Text that begins with a bracket is seldom a list of messages.
    plain = isinstance(value, str) and not value.lstrip().startswith("[")
    stored = None if plain else parsed(value)
    messages = isinstance(stored, list) or are_messages([stored])
    if are_messages(stored) if isinstance(value, str) else messages:
        return messages_of(row, column)
    return [{"role": role, "content": text_of(row, column).strip()}]


def continued(
    turns: list[dict[str, Any]], more: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """``turns`` and ``more`` after them, which may repeat them, as a whole conversation does.

    A conversation that begins with the system or the user repeats at least the last question.
    Raises DataError for one that does not.
    """
    if not turns or more[0]["role"] not in ("system", "user"):
        return turns + more
    while len(turns) > 1 and turns[-1]["role"] == "assistant":  # the answers are in ``more``
        turns = turns[:-1]
    system = [turn for turn in turns if turn["role"] == "system"]
    asked, again = ([turn["content"].strip() for turn in part if turn["role"] != "system"]
                    for part in (turns, more))  # fmt: skip
    last = next((n for n in reversed(range(len(more))) if more[n]["role"] != "assistant"), 0)
    opening = JOINED.join(turn["content"].strip() for turn in more[: last + 1])
    if asked and asked[-1] not in (more[last]["content"].strip(), opening) and (
        again[: len(asked)] != asked
    ):  # fmt: skip
        raise DataError(
            where=where,
            expected="an answer, or a conversation that repeats the question",
            found="a conversation that begins otherwise",
            hint="Leave out the column of the question, or its turns.",
        )
    return more if more[0]["role"] == "system" else system + more


def are_messages(value: object) -> bool:
    """Whether ``value`` is a list of messages, and no list of other objects."""
    return isinstance(value, Sequence) and not isinstance(value, str) and bool(value) and all(
        isinstance(one, Mapping) and isinstance(_first(one, "role", "from"), str)
        and any(key in one for key in (*CONTENTS, "tool_calls", "function_call")) for one in value
    )  # fmt: skip


def _first(stored: Mapping[str, Any], *names: str) -> Any:
    """The first of the keys ``names`` that has a value."""
    return next((stored[name] for name in names if not is_null(stored.get(name))), None)


def without_nulls(value: Any) -> Any:
    """``value`` without keys that are null: a Parquet file gives every row the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple) or type(value).__name__ == "ndarray":
        return [without_nulls(part) for part in value]
    return value


def is_empty(value: object) -> bool:
    return is_null(value) or (isinstance(value, str | list | tuple) and not (
        value.strip() if isinstance(value, str) else value
    ))  # fmt: skip
