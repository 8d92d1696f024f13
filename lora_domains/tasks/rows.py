"""Rows as read, examples as scored and encoded, and the prompt templates from one to the other."""

import ast
import datetime
import decimal
import json
import math
import numbers
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from lora_domains.errors import DataError, DomainError, EmptyCell, did_you_mean, listed

TEXTUAL = (numbers.Number, decimal.Decimal, datetime.date, datetime.time, uuid.UUID)
"""Types besides text whose ``str`` is how people write them; ``bool`` is a number."""
PLACEHOLDER = re.compile(
    r"(?P<brace>\{\{|\}\})|\{(?P<name>[^{}]+)\}|\{(?P<escaped>(?:[^{}]|\{\{|\}\})+)\}|[{}]"
)
"""A doubled brace, ``{column}``, ``{a {{column}} with braces}``, or a brace that is neither."""

ARRAY = re.compile(r"""\[\s*(?:'[^']*'|"[^"]*")(?:\s+(?:'[^']*'|"[^"]*"))+\s*\]""")
"""Texts as NumPy writes an array of them, without commas."""
SURROGATE = re.compile("[\ud800-\udfff]")
NO_SLICES: Mapping[str, str] = {}
"""Shared by all examples without slices: an own dict for each would take 64 bytes."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row as read: its values, and its location for messages (never its text)."""

    values: Mapping[str, Any]
    split: str
    number: int
    """Position in its split, from 0."""
    place: str
    """Location for a reader: ``train.csv, line 17``."""

    @property
    def id(self) -> str:
        """Stable, and independent of the row's contents: a column ``id`` may name a patient."""
        return f"{self.split}:{self.number}"


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its answer.

    ``answer`` and ``choices`` start with the space that separates them from the prompt. ``target``
    is the index of the correct choice, -1 for a free-text answer.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    target: int = -1
    group: str | None = None
    slices: Mapping[str, str] = field(default_factory=lambda: NO_SLICES)
    place: str = ""
    text: str = ""
    """The row's own text in the prompt, without the template; "" where all of it is its own."""
    literal: str = ""
    """The template's own text, the prompt's part that is not of the row; "" where there is none."""
    whole: bool = False
    """Whether a choice is all of the answer: where one begins another, its end is scored too."""
    ended: bool = False
    """Whether the end of each choice is scored with it."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """The turns that a chat template renders in place of ``prompt``; () where there are none. Those
    of a chat end with the answer, others with the prompt."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas of the functions that the assistant may call in ``messages``."""
    truth: tuple[float, ...] = ()
    """What is to be predicted where that is not one choice: 1 or 0 for each label, or a number."""

    @property
    def labels(self) -> tuple[int, ...]:
        """The numbers of the row's labels, for tasks that have labels."""
        return labels_in(self.target, self.truth)


def answers_in(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the assistant's turns that answer the user or a tool, and are to be learned."""
    names = [message["role"] for message in messages]
    asked = [n for n, name in enumerate(names) if name in ("user", "tool")]
    return [
        n for n in answer_places(messages)
        if asked and n > asked[0] and messages[n].get("weight") != 0
    ]  # fmt: skip


def answer_places(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """The places of the assistant's turns."""
    return [n for n, message in enumerate(messages) if message["role"] == "assistant"]


def said(message: Mapping[str, Any]) -> str:
    """The text of a message, with the calls of the assistant as JSON."""
    calls = message.get("tool_calls")
    written = json.dumps(calls, ensure_ascii=False, default=str) if calls else ""
    return " ".join(filter(None, (message["content"].strip(), written)))


def labels_in(target: int, truth: Sequence[float]) -> tuple[int, ...]:
    """The numbers of the labels of a row: ``target``, or those whose ``truth`` is 1."""
    return (target,) if target >= 0 else tuple(n for n, has in enumerate(truth) if has)


def parsed(value: Any) -> Any:
    """``value``, or what it says where it is JSON or a Python literal, as pandas writes lists and
    arrays into CSV files; tuples and arrays as lists."""
    if isinstance(value, str):
        with suppress(ValueError):
            return json.loads(value)
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            texts = value.strip()
            if ARRAY.fullmatch(texts):  # Python would read 'a' 'b' as one text
                texts = re.sub(r"""(?<=['"])\s+(?=['"])""", ", ", texts)
            literal = ast.literal_eval(texts)
            return literal if isinstance(literal, list | dict) else value
        return value
    if isinstance(value, tuple) or type(value).__name__ == "ndarray":
        return list(value)
    return value


def is_null(value: object) -> bool:
    """True for None, NaN and the null values of pandas (recognised without importing pandas)."""
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or type(value).__name__ in {"NAType", "NaTType"}


def shown(label: str) -> str:
    """A label for a message. A long one may be text from the wrong column: only its length."""
    return repr(label) if len(label) <= 40 else f"a text of {len(label)} characters"


def plain_text(value: object) -> str | None:
    """``value`` as text: of text, a number, a date, a time or null (""); None for other types.

    The ``repr`` of a list, bytes or an object is no text of anybody. Messages are a chat, written
    as one line ``role: content`` for each.
    """
    if is_null(value):
        return ""
    if isinstance(value, str):
        return str.__str__(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain_text(value.item())  # a number of numpy
    if isinstance(value, TEXTUAL):
        return str(value)
    return _chat(value)


def _chat(value: object) -> str | None:
    """Messages ``[{"role": …, "content": …}]`` as text; None for anything else."""
    if not isinstance(value, Sequence) or isinstance(value, bytes) or not value:
        return None
    turns = []
    for message in value:
        if not isinstance(message, Mapping):
            return None
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if content is None and "tool_calls" in message:  # in place of a text
            content = json.dumps(message["tool_calls"], default=str)
        if not isinstance(role, str) or not isinstance(content, str):
            return None
        turns.append(f"{role}: {content.strip()}")
    return "\n".join(turns)


def text_of(row: Row, column: str) -> str:
    """The text in ``column``.

    Raises EmptyCell when it is null or only whitespace, DataError when the column is missing or
    holds no text.
    """
    if column not in row.values:
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected=f"a column named {column!r}",
            found="columns " + listed(map(repr, row.values)),
            hint=did_you_mean(column, row.values),
        )
    value = row.values[column]
    text = plain_text(value)
    if text is None:
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="text, a number or a date",
            found=f"a value of type {type(value).__name__}",
            hint="Write it as text: decode bytes, and join or pick the parts of a list or object.",
        )
    if not text.strip():
        raise EmptyCell(
            where=f"{row.place}, column {column!r}",
            expected="text",
            found="null" if is_null(value) else "only whitespace" if text else "''",
            hint="Fill the cell or delete the row (--drop-empty).",
        )
    check_encodable(text, f"{row.place}, column {column!r}")
    return text


def check_encodable(text: str, where: str) -> None:
    """Raise DataError for a text that no tokenizer can read."""
    if not text.isascii() and SURROGATE.search(text):
        raise DataError(
            where=where,
            expected="text that can be encoded as UTF-8",
            found="an unpaired surrogate, such as a truncated emoji leaves",
            hint="Remove it, or export the rows again.",
        )


# ── Prompt templates ────────────────────────────────────────────────────────────────────────────


def fill(template: str, row: Row) -> str:
    """The prompt of ``filled`` alone."""
    return filled(template, row)[0]


def filled(template: str, row: Row) -> tuple[str, str]:
    """``template`` with each ``{column}`` replaced by the row's text in that column, and these
    texts alone, one on each line.

    Of several columns some may be empty: an empty one leaves nothing, and a line with nothing but
    empty columns and their names is left out. Raises EmptyCell where all are empty.
    """
    texts = _texts(template, row)
    own = "\n".join(text for text in texts.values() if text)
    if "" in texts.values():
        lines = template.split("\n")
        kept = [line for line in lines if any(map(texts.get, names := _names(line))) or not names]
        template = "\n".join(kept)

    def replaced(match: re.Match[str]) -> str:
        return match["brace"][0] if match["brace"] else texts[_name(match)]

    return PLACEHOLDER.sub(replaced, template), own


@cache
def literal_text(template: str) -> str:
    """The text of ``template`` without its columns."""
    return PLACEHOLDER.sub(lambda m: m["brace"][0] if m["brace"] else " ", template)


def _texts(template: str, row: Row) -> dict[str, str]:
    """column → its text, "" where it is empty; raises what ``text_of`` raises if all are."""
    texts: dict[str, str] = {}
    empty: EmptyCell | None = None
    names = _names(template)
    for name in names:
        if len(set(names)) > 1 and name not in row.values:
            texts[name] = ""  # JSON leaves out what is empty; the column is in other rows
            continue
        try:
            texts[name] = text_of(row, name).strip()
        except EmptyCell as error:
            texts[name], empty = "", empty or error
    if names and not any(texts.values()):
        raise empty or EmptyCell(
            where=f"{row.place}, column {names[0]!r}",
            expected="text",
            found="no such cell",
            hint="Fill the cell or delete the row (--drop-empty).",
        )
    return texts


def _name(match: re.Match[str]) -> str:
    if match["name"]:
        return match["name"]
    name = match["escaped"].replace("{{", "{").replace("}}", "}")
    return name[name.startswith(" {") : len(name) - name.endswith("} ")]


@cache
def _names(template: str) -> tuple[str, ...]:
    matches = PLACEHOLDER.finditer(template)
    return tuple(_name(m) for m in matches if m["name"] or m["escaped"])


def columns_in(template: str) -> tuple[str, ...]:
    """The columns named by a prompt template, in order. Raises DomainError if it is malformed."""
    wrong = next((m[0] for m in PLACEHOLDER.finditer(template) if m[0] in ("{", "}")), None)
    if wrong is not None:
        raise DomainError(
            where=f"prompt {template!r}",
            expected="text with {column} placeholders; literal braces are doubled",
            found="an empty placeholder: {}" if "{}" in template else f"a single {wrong!r}",
            hint="Write {{ and }} for literal braces.",
        )
    return _names(template)


def placeholder(column: str) -> str:
    """The placeholder of ``column`` in a template: ``{text}``, ``{ {{text}} }`` of ``{text}``."""
    before, after = " " * column.startswith("{"), " " * column.endswith("}")
    return "{" + before + column.replace("{", "{{").replace("}", "}}") + after + "}"


def prompt_from(columns: tuple[str, ...], answer: str | None = None) -> str:
    """The default template: a line ``column: {column}`` for each column, then ``answer:``."""
    lines = [f"{escaped(column)}: {placeholder(column)}" for column in columns]
    return "\n".join([*lines, *([f"{escaped(answer)}:"] if answer is not None else [])])


def user_turn(instruction: str | None, text: str) -> tuple[dict[str, str], ...]:
    """A turn of the user for a chat template: ``text``, after an instruction if there is one."""
    return ({"role": "user", "content": f"{instruction}\n\n{text}" if instruction else text},)


def escaped(text: str) -> str:
    """``text`` as it is written in a template."""
    return text.replace("{", "{{").replace("}", "}}")
