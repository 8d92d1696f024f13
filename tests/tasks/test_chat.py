"""Conversations in the shapes that people store them in."""

import json
from typing import Any

import numpy as np
import pytest
from support.rows import SECRET, row

from lora_domains.errors import DataError, DomainError, EmptyCell
from lora_domains.tasks import (
    KINDS,
    Chat,
    Classification,
    Generation,
    MultipleChoice,
    Preference,
    plain_text,
    task_from_record,
    task_record,
)
from lora_domains.tasks.rows import answers_in

ASKED = {"role": "user", "content": "why"}
SAID = {"role": "assistant", "content": "so"}


def said(task: Chat, **values: Any) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"]) for turn in task.example(row(**values)).messages]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"messages": [{"role": "system", "content": "s"}, ASKED, SAID]}, "s why so"),
        ({"messages": json.dumps([ASKED, SAID])}, "why so"),
        ({"messages": ({"role": "developer", "content": "s"}, ASKED, SAID)}, "s why so"),
        ({"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "so"}]},
         "why so"),
        ({"conversation": [ASKED, SAID], "system": "s"}, "s why so"),
        ({"instruction": "why", "input": "", "output": "so"}, "why so"),
        ({"instruction": "why", "input": "this", "output": "so"}, "why\n\nthis so"),
        ({"instruction": "why", "output": "so", "system": None}, "why so"),
        ({"prompt": "why", "completion": "so"}, "why so"),
        ({"prompt": [{"role": "system", "content": "s"}, ASKED], "completion": [SAID]}, "s why so"),
        ({"messages": [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}]},
         "why so"),
        ({"messages": [ASKED, {"role": "assistant", "content": ["s", "o"]}]}, "why so"),
        ({"messages": str([ASKED, SAID])}, "why so"),
        ({"messages": {"from": ["human", "gpt"], "value": ["why", "so"]}}, "why so"),
        ({"messages": [{"role": None, "from": "human", "content": None, "value": "why"}, SAID]},
         "why so"),
        ({"prompt": json.dumps([ASKED]), "completion": str([SAID])}, "why so"),
        ({"prompt": "why", "completion": [ASKED, SAID]}, "why so"),
        ({"prompt": " why", "completion": [ASKED, SAID], "system": "s"}, "s why so"),
        ({"prompt": "[1] why", "completion": "[2]"}, "[1] why [2]"),
        ({"instruction": "why", "context": "this", "response": "so"}, "why\n\nthis so"),
        ({"instruction": "why", "context": "this", "output": "so"}, "why\n\nthis so"),
        ({"prompt": "why", "context": "this", "response": "so"}, "this\n\nwhy so"),
        ({"Instruction": "why", "Input": "this", "Output": "so"}, "why\n\nthis so"),
        ({"system_prompt": "s", "question": "why", "response": "so"}, "s why so"),
        ({"system": "s", "context": "this", "question": "why", "answer": "so"},
         "s this\n\nwhy so"),
        ({"Messages": [{"role": "user", "text": "why"}, SAID]}, "why so"),
        ({"messages": [{"role": "system", "content": None}, ASKED, SAID]}, "why so"),
        ({"prompt": "why", "completion": SAID}, "why so"),
        ({"messages": "\n\nHuman: why\n\nAssistant: so"}, "why so"),
    ],
)  # fmt: skip
def test_shapes(values: dict[str, Any], found: str) -> None:
    task = Chat.from_columns(values.keys())
    assert task is not None
    example = task.example(row(**values))
    assert " ".join(turn["content"] for turn in example.messages) == found
    assert example.messages[-1]["role"] == "assistant"
    assert (example.answer, example.prompt.splitlines()[-1]) == (
        f" {found.split()[-1]}",
        "assistant:",
    )
    without = task.unlabelled(row(**values))
    assert without.messages == example.messages[:-1]
    assert without.answer == ""
    assert set(task.columns) <= {*values}
    assert task_from_record(json.loads(json.dumps(task_record(task)))) == task


FIRST = {"role": "user", "content": "first"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("prompt", "answer", "found"),
    [
        ("why", [SYSTEM, ASKED, SAID], "s why so"),
        ("s\n\nwhy", [SYSTEM, ASKED, SAID], "s why so"),
        ("why", [FIRST, SAID, ASKED, SAID], "first so why so"),
        ([FIRST, SAID, ASKED], [FIRST, SAID, ASKED, SAID], "first so why so"),
        ([ASKED, SAID], [ASKED, SAID], "why so"),
        ("why", [SAID, FIRST, SAID], "why so first so"),
        ("why", '[{"from": "Paris", "to": "Rome"}]', 'why [{"from": "Paris", "to": "Rome"}]'),
    ],
)  # fmt: skip
def test_a_conversation_in_the_column_of_the_answer(
    prompt: object, answer: object, found: str
) -> None:
    task = Chat(user="prompt", assistant="completion")
    example = task.example(row(prompt=prompt, completion=answer))
    assert " ".join(turn["content"] for turn in example.messages) == found


def test_a_conversation_that_does_not_repeat_the_question_is_refused() -> None:
    task = Chat(user="prompt", assistant="completion")
    for prompt in (SECRET, [SYSTEM, {**FIRST, "content": SECRET}]):
        with pytest.raises(DataError, match=r"'completion'.*repeats the question") as caught:
            task.example(row(prompt=prompt, completion=[ASKED, SAID]))
        assert SECRET not in str(caught.value)


def test_a_system_that_says_nothing_is_no_conversation() -> None:
    silent = [{"role": "system", "content": " "}]
    for task, values in (
        (Chat(), {"messages": silent}),
        (Chat(user="prompt", assistant="completion"), {"prompt": "why", "completion": silent}),
    ):
        with pytest.raises(EmptyCell):
            task.example(row(**values))


@pytest.mark.parametrize(
    ("turn", "key", "kept"),
    [
        ({**SAID, "loss": False}, "weight", 0), ({**SAID, "loss": True}, "weight", None),
        ({**SAID, "weight": 0}, "weight", 0),
        ({**SAID, "thinking": "hm"}, "reasoning_content", "hm"),
        ({**SAID, "reasoning": "hm"}, "reasoning_content", "hm"),
    ],
)  # fmt: skip
def test_what_other_tools_call_the_parts_of_a_turn(
    turn: dict[str, Any], key: str, kept: object
) -> None:
    example = Chat().example(row(messages=[ASKED, turn, ASKED, SAID]))
    assert example.messages[1].get(key) == kept


def test_a_message_without_a_text_says_which_keys_it_has() -> None:
    messages = [ASKED, {"role": "assistant", "msg": SECRET}]
    with pytest.raises(DataError, match=r"message 2: .*content, value, text; .*'msg'") as caught:
        Chat().example(row(messages=messages))
    assert SECRET not in str(caught.value)


def test_what_a_function_is_called_with_and_returns() -> None:
    for name in ("arguments", "parameters", "input"):
        turn = {"from": "function_call", "value": json.dumps({"name": "say", name: {"a": 1}})}
        returned = {"from": "observation", "value": [{"done": 1}]}
        example = Chat().example(row(messages=[ASKED, turn, returned, SAID]))
        assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
        assert example.messages[2]["content"] == '[{"done": 1}]'
    task = Chat(tools="tools")
    example = task.example(row(messages=[ASKED, SAID], tools=['{"name": "say"}']))
    assert example.tools == ({"name": "say"},)


def test_calls_of_functions() -> None:
    stored = {"name": "say", "arguments": '{"text": "hi"}'}
    meant = {"type": "function", "function": {"name": "say", "arguments": {"text": "hi"}}}
    openai = [ASKED, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": stored}]},
        {"role": "tool", "tool_call_id": "c1", "content": "done"}, SAID]  # fmt: skip
    first = Chat().example(row(messages=openai))
    assert first.messages[1]["tool_calls"] == [{"id": "c1", **meant}]
    assert first.messages[2]["tool_call_id"] == "c1"
    sharegpt = [
        {"from": "human", "value": "why"}, {"from": "function_call", "value": json.dumps(stored)},
        {"from": "observation", "value": "done"}, {"from": "gpt", "value": "so"},
    ]  # fmt: skip
    task = Chat(messages="conversations", tools="tools")
    second = task.example(row(conversations=sharegpt, tools=json.dumps([{"name": "say"}])))
    assert [turn["role"] for turn in second.messages] == ["user", "assistant", "tool", "assistant"]
    assert second.messages[1]["tool_calls"] == [meant]
    assert second.tools == ({"name": "say"},)
    assert plain_text(openai) is not None


@pytest.mark.parametrize("turn", [
    {"role": "assistant", "function_call": {"name": "say", "arguments": '{"a": null}'}},
    {"from": "function_call", "value": '[{"name": "say", "arguments": {"a": null}}]'},
    {"from": "function_call", "value": {"name": "say", "arguments": '{"a": null}'}},
    {"role": "assistant", "content": "", "tool_calls": {"name": "say", "arguments": '{"a": null}'}},
])  # fmt: skip
def test_a_call_in_another_form_is_a_call(turn: dict[str, Any]) -> None:
    messages = [ASKED, turn, {"role": "ipython", "content": {"done": True}}, SAID]
    _, called, done, _ = Chat().example(row(messages=messages)).messages
    assert [one["function"]["name"] for one in called["tool_calls"]] == ["say"]
    assert (done["role"], done["content"]) == ("tool", '{"done": true}')


def test_keys_that_only_other_rows_have_are_left_out() -> None:
    call = {"function": {"name": "say", "arguments": {"a": 1, "of_another": None}}}
    tool = {"name": "say", "parameters": {"properties": {"a": {"type": "int"}, "b": None}}}
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]
    example = Chat(tools="tools").example(row(messages=messages, tools=[tool]))
    assert example.messages[1]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert example.tools[0]["parameters"] == {"properties": {"a": {"type": "int"}}}


@pytest.mark.parametrize("messages", [
    [ASKED], [SAID], [SAID, SAID], [{"role": "system", "content": "s"}, SAID],
])  # fmt: skip
def test_a_conversation_without_an_answer_is_dropped_on_request(messages: list[Any]) -> None:
    with pytest.raises(EmptyCell, match="--drop-empty"):
        Chat().example(row(messages=messages))


def test_rows_to_predict_may_leave_out_what_training_rows_may() -> None:
    task = Chat(user=("instruction", "input"), assistant="output", system="system")
    assert task.to_predict({"instruction": "why"}, 1).messages == (ASKED,)
    with pytest.raises(DataError, match="'instruction'"):
        task.to_predict({"output": "so"}, 1)


def test_pairs_beside_messages_are_no_chat() -> None:
    columns = {"prompt", "chosen", "rejected", "messages"}
    assert Chat.from_columns(columns) is None


def test_what_answers_nothing_is_not_learned() -> None:
    assert said(Chat(), messages=[SAID, ASKED, SAID, ASKED]) == [
        ("assistant", "so"), ("user", "why"), ("assistant", "so"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="an answer of the assistant after another turn"):
        Chat().example(row(messages=[SAID]))
    with pytest.raises(DataError, match="an answer of the assistant"):
        Chat().example(row(messages=[ASKED]))
    unwanted = {**SAID, "weight": 0}
    assert said(Chat(), messages=[ASKED, {**SAID, "weight": 1}, ASKED, unwanted]) == [
        ("user", "why"), ("assistant", "so"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="an answer of the assistant"):
        Chat().example(row(messages=[ASKED, unwanted]))


@pytest.mark.parametrize(
    ("value", "error", "found"),
    [
        (None, EmptyCell, "null"), ([], EmptyCell, "none"), (SECRET, DataError, "no JSON list"),
        (7, DataError, "int"), ([SECRET], DataError, "list"),
        ([{"role": SECRET, "content": "x"}, SAID], DataError, "message 1: .*found another"),
        ([{"content": "x"}, SAID], DataError, "message 1: .*found none"),
        ([ASKED, {**SAID, "weight": 0.5}], DataError, "message 2: .*a weight of 0"),
        ([ASKED, {"role": "assistant", "content": " "}], EmptyCell, "message 2: .*empty content"),
        ([ASKED, {"role": "assistant"}], EmptyCell, "empty content"),
        ([{"role": "user", "content": {"a": SECRET}}, SAID], DataError, "a part that is none"),
        ([{"role": "user", "content": [{"type": "image", "url": SECRET}]}, SAID], DataError,
         "a part that is none"),
        ([{"role": "user", "content": [{"type": "image", "text": None}]}, SAID], DataError,
         "a part that is none"),
        ([{"role": "user", "content": "\ud83d"}, SAID], DataError, "unpaired surrogate"),
        ([ASKED, {"role": "assistant", "tool_calls": [{"function": SECRET}]}], DataError,
         "another form"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused_without_its_text(
    value: Any, error: type[DataError], found: str
) -> None:
    with pytest.raises(error, match=found) as caught:
        Chat().example(row(messages=value))
    assert SECRET not in str(caught.value)
    assert "b.csv, line 2" in str(caught.value)


PAIRS = [["who", "me"], ["where", "here"]]
BEFORE = [("user", "who"), ("assistant", "me"), ("user", "where"), ("assistant", "here")]


@pytest.mark.parametrize("stored", [
    PAIRS, json.dumps(PAIRS), str(PAIRS), [tuple(pair) for pair in PAIRS], np.array(PAIRS),
    np.array([*map(np.array, PAIRS)], dtype=object), [{"role": r, "content": c} for r, c in BEFORE],
    {"role": [role for role, _ in BEFORE], "content": [text for _, text in BEFORE]},
])  # fmt: skip
def test_turns_before_the_question_in_a_column(stored: Any) -> None:
    task = Chat.from_columns(["instruction", "input", "output", "system", "history"])
    assert task is not None
    values = {"instruction": "why", "input": "", "output": "so", "system": "Be brief."}
    example = task.example(row(**values, history=stored))
    turns = [(turn["role"], turn["content"]) for turn in example.messages]
    system, last = ("system", "Be brief."), [("user", "why"), ("assistant", "so")]
    assert turns == [system, *BEFORE, *last]
    assert len(answers_in(example.messages)) == 3
    for none in ([], "", None, "[]", np.array([])):
        assert len(task.example(row(**values, history=none)).messages) == 3
    without = task.to_predict({"instruction": "why", "history": stored}, 0)
    assert [turn["content"] for turn in without.messages][-2:] == ["here", "why"]


@pytest.mark.parametrize(
    "stored", ["of an illness", [["who"]], [1, 2], {"a": 1}, [["a", {"b": 1}]]]
)
def test_what_is_no_history_is_refused(stored: Any) -> None:
    task = Chat(user="q", assistant="a", history="history")
    with pytest.raises(DataError, match=r"b\.csv, line 2, column 'history'"):
        task.example(row(q="why", a="so", history=stored))


def test_a_pair_of_answers_has_a_history() -> None:
    task = Preference.from_columns(["instruction", "history", "chosen", "rejected"])
    assert task is not None
    example = task.example(row(instruction="why", history=PAIRS, chosen="so", rejected="no"))
    assert [turn["content"] for turn in example.messages] == ["who", "me", "where", "here", "why"]


def test_questions_and_answers_in_columns() -> None:
    task = Chat().with_options(text=("context", "question"), label="answer")
    assert task == Chat(user=("context", "question"), assistant="answer")
    assert task.columns == ("context", "question", "answer")
    assert said(task, context=" c ", question="q", answer=" a\n") == [
        ("user", "c\n\nq"), ("assistant", "a"),
    ]  # fmt: skip
    assert task.to_predict("q", 0).messages == ({"role": "user", "content": "q"},)
    with pytest.raises(EmptyCell, match="column 'context'"):
        task.example(row(context="", question=" ", answer="a"))
    with pytest.raises(EmptyCell, match="column 'answer'"):
        task.example(row(context="", question="q", answer=""))
    with pytest.raises(DomainError, match="columns of the user and of the assistant"):
        Chat(user="question")


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ("messages id", Chat),
        ("instruction input output", Chat),
        ("prompt completion", Chat),
        ("question answer", Generation),
        ("question choices answer", MultipleChoice),
        ("text label", Classification),
        ("note triage", None),
        ("text", None),
    ],
)
def test_the_kind_that_columns_are_the_shape_of(columns: str, kind: type | None) -> None:
    found = [task for one in KINDS.values() if (task := one.from_columns(columns.split()))]
    assert [type(task) for task in found] == ([kind] if kind else [])
