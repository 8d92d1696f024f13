"""The turns of a conversation as chat templates take them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

from lora_domains.tasks.answers import without_reasoning
from lora_domains.tasks.messages import JOINED, Message
from lora_domains.tasks.rows import said

PLAIN = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:"
    "{% if message['content'] %}{{ ' ' + message['content'] | trim }}{% endif %}"
    "{% if message['tool_calls'] %}{{ ' ' }}{{ message['tool_calls'] | tojson }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
"""The template of a base without one: ``User: …``, ``Assistant: …``, a line for each turn."""

SWITCHES = ("enable_thinking", "thinking")
"""What templates call whether the assistant may think before it answers."""


def switches(thinking: bool) -> dict[str, bool]:
    """The options by which a template is told whether the assistant may think first."""
    return dict.fromkeys(SWITCHES, thinking)


def chat_options(record: Mapping[str, str]) -> dict[str, bool]:
    """What the template is told where a card has the ``chat`` entry ``record``."""
    return switches(record["thinking"] == "on") if "thinking" in record else {}


def variants(
    messages: list[dict[str, Any]], tools: Sequence[Any] = ()
) -> Iterator[tuple[list[dict[str, Any]], Sequence[Any]]]:
    """``messages`` and ``tools``, and the forms in which stricter templates take them."""
    tried: list[list[dict[str, Any]]] = []
    told = _with_tools(messages, tools)
    written = _without_calls(messages), _without_calls(told)
    forms = (messages, tools), (told, ()), (written[0], tools), (written[1], ())
    for form, left in forms:
        for opened in (form, _without_opening(form)):
            for start in (opened, _without_system(opened)):
                for variant in (start, _alternating(start)):
                    if variant not in tried:
                        tried.append(variant)
                        yield variant, left


def says_all(render: Callable[..., str], messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether ``render`` writes what a template may leave out: the texts of the system and of
    tools, and every function that is called or can be, by a name that nothing else has."""
    text = render(messages, tools)
    contents = [turn["content"].strip() for turn in messages if turn["role"] in ("system", "tool")]
    if not all(part in text or _quoted(part) in text for part in contents):
        return False
    names = (f"zq{n}zq" for n in count())
    called = [
        {**turn, "tool_calls": [_named(call, next(names)) for call in turn["tool_calls"]]}
        if turn.get("tool_calls") else turn
        for turn in messages
    ]  # fmt: skip
    listed = [_named(tool, next(names)) for tool in tools]
    others = int(next(names)[2:-2])
    text = render(called, listed) if others else ""
    return all(f"zq{n}zq" in text for n in range(others))


def _named(call: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A call or a tool with another name of the function."""
    if isinstance(function := call.get("function"), Mapping):
        return {**call, "function": {**function, "name": name}}
    return {**call, "name": name}


def _quoted(text: str) -> str:
    """``text`` as it stands in JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _without_calls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls of the assistant as JSON in its text."""
    return [
        {key: part for key, part in turn.items() if key in ("role", "weight")}
        | {"content": said(turn)} if turn.get("tool_calls") else turn
        for turn in messages
    ]  # fmt: skip


def _with_tools(messages: list[dict[str, Any]], tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools as JSON in the text of the system."""
    if not tools:
        return messages
    first, *others = messages
    described = json.dumps(list(tools), ensure_ascii=False, default=str)
    if first["role"] != "system":
        return [{"role": "system", "content": described}, *messages]
    return [{**first, "content": JOINED.join((first["content"], described))}, *others]


def _without_opening(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Turns without those of the assistant before the first one of another but the system."""
    roles = [turn["role"] for turn in messages]
    first = next((n for n, role in enumerate(roles) if role in ("user", "tool")), 0)
    return [turn for n, turn in enumerate(messages) if n >= first or roles[n] != "assistant"]


def _without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The text of each system turn before that of the user's next turn."""
    turns: list[dict[str, Any]] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting.append(message["content"])
        elif message["role"] == "user" and waiting:
            turns.append({**message, "content": JOINED.join([*waiting, message["content"]])})
            waiting = []
        else:
            turns.append(message)
    return turns if not waiting else messages


def _alternating(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Consecutive turns of one role as one; of answers, those that are learned if some are."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        last: dict[str, Any] = turns[-1] if turns else {"role": ""}
        plain = all(turn.keys() <= {"role", "content", "weight"} for turn in (last, message))
        if not plain or last["role"] != message["role"]:
            turns.append(message)
        elif last.get("weight") == message.get("weight"):
            turns[-1] = {**last, "content": last["content"] + JOINED + message["content"]}
        elif "weight" in last:
            turns[-1] = message
    return turns


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """The answers in ``messages`` without the reasoning before them."""
    return [
        {key: part for key, part in turn.items() if key != "reasoning_content"}
        | {"content": without_reasoning(turn["content"])
           or ("" if turn.get("tool_calls") else turn["content"])}
        if turn["role"] == "assistant" else turn
        for turn in messages
    ]  # fmt: skip


def roles(messages: Sequence[Message]) -> list[str]:
    """The roles in order, the first eight."""
    names = [str(message["role"]) for message in messages]
    return names[:8] + (["…"] if len(names) > 8 else [])


@dataclass(frozen=True)
class Shots:
    """Answered examples to put before a prompt: their token ids, or their turns."""

    ids: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ids or self.messages)

    def before(self, messages: Sequence[Message]) -> list[Message]:
        """``messages`` with the turns of these examples before theirs, after their system turns."""
        lead = sum(1 for _ in takewhile(lambda turn: turn["role"] == "system", messages))
        return [*messages[:lead], *self.messages, *messages[lead:]]


NO_SHOTS = Shots()
