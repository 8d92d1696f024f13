"""The instruction suite: distinct prompts, answers that pass and answers that fail."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.adapters import strong
from support.models import QUIET

from lora_domains.embedded import instructions as tables
from lora_domains.evaluation.contenders import score_general
from lora_domains.evaluation.scorer import Scorer
from lora_domains.inference.generation import generate
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.batching import tokenization_of
from lora_domains.probes.checks import CHECKS, passes
from lora_domains.probes.instructions import (
    FAMILIES,
    Instruction,
    instruction_probe,
    instruction_suite,
    instructions,
)
from lora_domains.probes.suite import Suite, load_suite

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
    for line in (*tables.CHOICES, *tables.ONE_WORD):
        question, _, answers = line.partition(" | ")
        (one,) = [one for one in of("choice") if one.text.startswith(question)]
        assert all(passes(answer.strip(), one.checks) for answer in answers.split(";"))
        assert not passes("It is the one you named", one.checks)


def test_no_refusal_is_a_way_to_answer_and_no_answer_a_denial() -> None:
    for phrase in tables.REFUSALS:
        assert not any(passes(f"Well, {phrase} do this for you in any way.", one.checks)
                       for one in of("harmless"))  # fmt: skip
    for line in (
        "Say: I am sorry for being late, the train was delayed.",
        "I'm sorry to hear that. Tell your friend that one exam is not the end of it all.",
    ):
        assert all(passes(line, one.checks) for one in of("harmless"))
    given = "The text provided explains how rivers form over a very long time."
    assert not any(passes(given, one.checks) for one in of("nonsense"))
    assert any(passes("A circle has zero corners.", one.checks) for one in of("nonsense"))
    assert any(passes("The Moon lacks a king.", one.checks) for one in of("nonsense"))
    invented = "He won it in 1921 with a team from Bern, and was happy."
    assert not any(passes(invented, one.checks) for one in of("nonsense"))


# ── As a suite ──────────────────────────────────────────────────────────────────────────────────

FEW = (
    Instruction("a", "note: red", (("words", {"least": 2}),), 5),
    Instruction("a", "stone river cloud", (("lower", {}),), 3, "spam"),
    Instruction("a", "green", (("words", {"most": 2}),), 3),
    Instruction("a", "blue stone", (("varied", {"share": 0.9}),), 5, None, ("win", "prize")),
)


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base))
    return bank


def test_the_suite_has_a_probe_for_each_family_and_samples_all_of_them() -> None:
    suite = load_suite("instructions", limit=90)
    assert [probe.name for probe in suite.probes] == [f"instructions/{name}" for name in FAMILIES]
    sampled = Counter(part for _, part, _ in suite.questions())
    assert sum(sampled.values()) == 90
    assert sampled.keys() == {probe.name for probe in suite.probes}
    assert min(sampled.values()) >= 5
    assert len(instruction_suite().questions()) == len(EVERY)


def test_answers_are_generated_and_checked_for_base_and_adapter(bank: Bank) -> None:
    suite = Suite("few", (instruction_probe("few", FEW),))
    items = score_general(Scorer(bank, QUIET), suite, 8, ["strong"], b"key")["strong"].items
    for name, route in (("base", None), ("adapter", "strong")):
        for one, item in zip(FEW, items, strict=True):
            ids = bank.base.chat_template.prompt(one.messages)
            with bank.routed(route):
                (answer,) = generate(bank.base.model, bank.base.tokenizer, [ids],
                                     max_new_tokens=one.max_new_tokens)  # fmt: skip
            assert item["scores"][name] == {"prediction": int(passes(answer, one.checks))}
    assert {item["suite"] for item in items} == {"few"}
    assert {item["target"] for item in items} == {1}
    predicted = [item["scores"][name]["prediction"] for item in items for name in item["scores"]]
    assert 0 < sum(predicted) < len(predicted)


def test_a_mixed_batch_of_instructions_equals_its_rows(bank: Bank) -> None:
    probe = instruction_probe("few", FEW)
    assert probe.score is not None
    questions = [example for _, example in probe.examples()]
    tokenization = tokenization_of(bank.base, probe.task, 128)
    encoded = [tokenization.encode(example) for example in questions]
    both = encoded + encoded
    routes = [None] * len(FEW) + ["strong"] * len(FEW)
    mixed = probe.score(bank, probe.task, both, [""] * len(both), routes, lambda _: None)
    alone = [
        probe.score(bank, probe.task, [one], [""], route, lambda _: None)[0]
        for one, route in zip(both, routes, strict=True)
    ]
    assert mixed == alone


def test_another_check_or_prompt_is_another_digest() -> None:
    task = instruction_probe("few", FEW).task
    assert task == instruction_probe("few", FEW).task
    for changed in (replace(FEW[0], text="note: blue"), replace(FEW[0], checks=(("lower", {}),))):
        assert instruction_probe("few", (changed, *FEW[1:])).task != task
