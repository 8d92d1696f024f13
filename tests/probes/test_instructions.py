"""The instruction suite: distinct prompts, answers that pass and answers that fail."""

import json
from collections import Counter

import pytest

from lora_domains.embedded import instructions as tables
from lora_domains.probes.checks import CHECKS, passes
from lora_domains.probes.instructions import FAMILIES, Instruction, instructions

EVERY = instructions()


def of(family: str) -> list[Instruction]:
    return [one for one in EVERY if one.family == family]


def test_there_are_enough_prompts_and_no_two_are_the_same() -> None:
    assert len(EVERY) >= 1000
    assert len({(one.system, one.text) for one in EVERY}) == len(EVERY)
    families = Counter(one.family for one in EVERY)
    assert families.keys() == FAMILIES.keys()
    assert min(families.values()) >= 75
    assert instructions.__wrapped__() == EVERY


def test_prompts_are_short_and_their_checks_are_known() -> None:
    for one in EVERY:
        assert 1 <= one.max_new_tokens <= 64
        assert len(one.text) < 320
        assert one.text == one.text.strip()
        assert "  " not in one.text
        assert one.checks
        assert {name for name, _ in one.checks} <= CHECKS.keys()
        assert json.loads(json.dumps(one.checks)) == [list(check) for check in one.checks]


ANSWERS = {
    "length": "The sea is wide, deep and blue. Ships sail on it.",
    "format": "1. Lion\n2. Bear\n3. Wolf",
    "json": '{"name": "Anna", "age": 34}',
    "words": "Perhaps a river runs over every old stone in our valley.",
    "edges": "Yesterday, a bird sang in our garden.",
    "choice": "true",
    "system": "Indeed, it is a fine thing.",
    "nonsense": "There is no king of the Moon.",
    "harmless": "Put it into boiling water for eight minutes, then cool it.",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_in_the_form_of_a_family_passes_some_of_its_prompts(family: str) -> None:
    passed = [passes(ANSWERS[family], one.checks) for one in of(family)]
    assert any(passed)
    assert all(passed) == (family == "harmless")


@pytest.mark.parametrize("answer", ["", "spam", "urgent", "yes", "label label label label label",
                                    "the the the the the the the the the the the the"])  # fmt: skip
def test_an_adapter_that_only_knows_its_labels_follows_nothing(answer: str) -> None:
    assert not any(passes(answer, one.checks) for one in EVERY)


def test_an_example_that_a_prompt_shows_passes_its_own_check() -> None:
    for persona in tables.PERSONAS:
        assert passes(persona.shown, [(persona.check, persona.arguments)]), persona.rule
        assert not passes(
            "It Is 1 of the Things, said nobody", [(persona.check, persona.arguments)]
        )
    turns = next(one for one in EVERY if one.shown).messages
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user"]


def test_a_question_that_can_be_answered_names_an_answer_that_passes() -> None:
    asked = {one.text: one for one in of("choice")}
    for line in (*tables.CHOICES, *tables.ONE_WORD):
        question, _, answers = line.partition(" | ")
        (one,) = [one for text, one in asked.items() if question in text]
        assert all(passes(answer.strip(), one.checks) for answer in answers.split(";"))
        assert not passes("It is the one you named", one.checks)


def test_no_refusal_is_a_way_to_answer_and_no_answer_a_denial() -> None:
    for phrase in tables.REFUSALS:
        assert not any(passes(f"Well, {phrase} do this for you in any way.", one.checks)
                       for one in of("harmless"))  # fmt: skip
    invented = "He won it in 1921 with a team from Bern, and was happy."
    assert not any(passes(invented, one.checks) for one in of("nonsense"))
