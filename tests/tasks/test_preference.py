"""Pairs of answers: the columns they are read from, and what is refused."""

from typing import Any

import pytest
from support.rows import row

from lora_domains.errors import DataError, DomainError, EmptyCell
from lora_domains.tasks import KINDS, Preference, task_from_record, task_record

USER = {"role": "user", "content": "why"}
SYSTEM = {"role": "system", "content": "be brief"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(("task", "values"), [
    (Preference(), {"prompt": "why", "chosen": "so", "rejected": "no"}),
    (Preference(), {"prompt": [USER], "chosen": [said("so")], "rejected": [said("no")]}),
    (Preference(None), {"chosen": [USER, said("so")], "rejected": [USER, said("no")]}),
    (Preference("q", "a", "b"), {"q": "why", "a": " so ", "b": "no"}),
    (Preference(), {"prompt": "why", "chosen": [USER, said("so")], "rejected": [USER, said("no")]}),
    (Preference(), {"prompt": str([USER]), "chosen": str([said("so")]),
                    "rejected": str([said("no")])}),
])  # fmt: skip
def test_every_shape_is_a_prompt_and_two_answers(task: Preference, values: dict[str, Any]) -> None:
    example = task.example(row(**values))
    assert (example.answer, example.choices, example.target) == (" so", (" so", " no"), 0)
    assert example.messages == (USER,)
    assert set(task.columns) == set(values)
    assert task_from_record(task_record(task)) == task


@pytest.mark.parametrize(("values", "found"), [
    ({"instruction": "why", "input": "this", "chosen": "so", "rejected": "no"}, "why\n\nthis"),
    ({"question": "why", "context": "this", "chosen": "so", "rejected": "no"}, "this\n\nwhy"),
    ({"prompt": "why", "chosen_response": "so", "rejected_response": "no"}, "why"),
    ({"Prompt": "why", "Chosen": "so", "Rejected": "no"}, "why"),
    ({"conversations": [{"from": "human", "value": "why"}],
      "chosen": {"from": "gpt", "value": "so"}, "rejected": {"from": "gpt", "value": "no"}}, "why"),
    ({"messages": [USER, said("so")], "chosen": [USER, said("so")],
      "rejected": [USER, said("no")]}, "why"),
    ({"chosen": "\n\nHuman: why\n\nAssistant: so", "rejected": "\n\nHuman: why\n\nAssistant: no"},
     "why"),
    ({"system_prompt": "s", "prompt": "why", "chosen": "so", "rejected": "no"}, "s why"),
])  # fmt: skip
def test_the_columns_of_other_tools(values: dict[str, Any], found: str) -> None:
    task = Preference.from_columns(values.keys())
    assert task is not None
    example = task.example(row(**values))
    assert example.choices == (" so", " no")
    assert " ".join(turn["content"] for turn in example.messages) == found


def test_two_equal_answers_are_dropped_like_an_empty_one() -> None:
    with pytest.raises(EmptyCell, match="--drop-empty"):
        Preference().example(row(prompt="why", chosen="so", rejected="so "))


def test_a_system_column_and_earlier_turns_come_first() -> None:
    values = {"system": "be brief", "prompt": [USER, said("so"), USER], "chosen": "a",
              "rejected": "b"}  # fmt: skip
    example = Preference(system="system").example(row(**values))
    assert example.messages == (SYSTEM, USER, said("so"), USER)
    assert example.choices == (" a", " b")


@pytest.mark.parametrize(("values", "message"), [
    ({"prompt": "why", "chosen": "so", "rejected": " so"}, "two different answers; found the same"),
    ({"chosen": [USER, said("a")], "rejected": [SYSTEM, USER, said("b")]}, "turns before them"),
    ({"prompt": "why", "chosen": "so", "rejected": ""}, "column 'rejected'"),
    ({"prompt": "why", "chosen": [{**said("so"), "reasoning_content": "as"}], "rejected": "no"},
     "two answers in text; found calls"),
    ({"prompt": "why", "chosen": "so"}, "column 'rejected'"),
])  # fmt: skip
def test_what_is_no_pair_is_refused(values: dict[str, Any], message: str) -> None:
    task = Preference("prompt" if "prompt" in values else None)
    with pytest.raises(DataError, match=message) as caught:
        task.example(row(**values))
    assert "why" not in str(caught.value)


def test_the_columns_propose_it() -> None:
    def proposed(*columns: str) -> list[Any]:
        found = [kind.from_columns(columns) for kind in KINDS.values()]
        return [task for task in found if task is not None]

    assert proposed("prompt", "chosen", "rejected", "score") == [Preference()]
    assert proposed("chosen", "rejected") == [Preference(None)]
    assert proposed("prompt", "chosen") == []


@pytest.mark.parametrize("beta", [0, -1, float("inf"), float("nan")])
def test_beta_is_above_0(beta: float) -> None:
    with pytest.raises(DomainError, match="'beta': expected above 0"):
        Preference(beta=beta)
