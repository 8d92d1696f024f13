"""The words that mattered: each effect is what leaving out the word changes."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from support.adapters import strong, with_task
from support.heads import headed
from support.models import model_in

from lora_domains.analysis.trace import MOST_PIECES, word_effects, words_of
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.predict import Labels, Prediction
from lora_domains.model import DomainModel
from lora_domains.modeling.batching import tokenization_of
from lora_domains.tasks import Chat, Classification, Generation, MultiLabel, Number, Task

TEXT = "alpha beta win the prize"
LABELS = ("spam", "ham", "note")


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    made = model_in(tmp_path_factory.mktemp("adapters"), tiny_base)
    columns = Classification(text=("title", "body"), labels=LABELS)
    tasks = {
        "labels": Classification(labels=LABELS), "columns": columns,
        "answers": Generation(max_new_tokens=4), "chat": Chat(max_new_tokens=4),
        "history": Chat(user="user", assistant="answer", history="before", max_new_tokens=4),
    }  # fmt: skip
    for name, task in tasks.items():
        made.bank.add(with_task(strong(made.base, name), made.base, task))
    return made


def without(words: Sequence[str]) -> list[str]:
    return ["".join([*words[:at], *words[at + 1 :]]) for at in range(len(words))]


@pytest.mark.parametrize("text", [TEXT, " two  spaces\n and lines ", "Fieber, 39 °C", "発熱と咳"])
def test_the_words_of_a_text_are_the_text(text: str) -> None:
    assert "".join(words_of(text)) == text.rstrip()
    assert all(word.strip() for word in words_of(text))


def test_a_long_text_has_pieces_of_several_words() -> None:
    text = " ".join(f"w{n}" for n in range(10 * MOST_PIECES + 1))
    pieces = words_of(text)
    assert "".join(pieces) == text
    assert MOST_PIECES // 2 < len(pieces) <= MOST_PIECES


def test_characters_of_a_language_without_spaces_are_words() -> None:
    assert words_of("発熱 39度") == ["発", "熱", " 39", "度"]


def test_an_effect_is_the_difference_of_log_odds(model: DomainModel) -> None:
    (answer,) = model.predict(TEXT, "labels")
    assert isinstance(answer, Prediction)
    found = word_effects(model, TEXT, "labels", answer)[""]
    assert [word for word, _ in found] == words_of(TEXT)
    others = model.predict(without(words_of(TEXT)), "labels")
    for (_, effect), other in zip(found, others, strict=True):
        assert isinstance(other, Prediction)
        wanted = [math.log(one.probabilities[answer.label] / (1 - one.probabilities[answer.label]))
                  for one in (answer, other)]  # fmt: skip
        assert effect == pytest.approx(wanted[0] - wanted[1], abs=1e-4)
    assert max(abs(effect) for _, effect in found) > 0.01


def test_a_label_that_was_referred_is_explained_all_the_same(model: DomainModel) -> None:
    (answer,) = model.predict(TEXT, "labels")
    (referred,) = model.predict(TEXT, "labels", refer_below=1.0)
    assert isinstance(referred, Prediction)
    assert referred.label == "refer"
    assert word_effects(model, TEXT, "labels", referred) == word_effects(
        model, TEXT, "labels", answer
    )


def test_each_column_of_a_row_has_its_words(model: DomainModel) -> None:
    row = {"title": "red stone", "body": "green river now", "note": "not read by the adapter"}
    (answer,) = model.predict(row, "columns")
    found = word_effects(model, row, "columns", answer)
    assert {column: len(words) for column, words in found.items()} == {"title": 2, "body": 3}
    # A column of one word cannot be left out: its cell would be empty.
    row["title"] = "red"
    assert list(word_effects(model, row, "columns", answer)) == ["body"]


def test_no_word_is_left_out_of_what_is_read_beside_a_text(model: DomainModel) -> None:
    row = {"user": "red stone", "before": '[["green river", "alpha beta"]]'}
    (answer,) = model.predict(row, "history")
    assert list(word_effects(model, row, "history", answer)) == ["user"]


def test_a_text_of_one_word_has_no_effects(model: DomainModel) -> None:
    (answer,) = model.predict("alpha", "labels")
    assert word_effects(model, "alpha", "labels", answer) == {}


@pytest.mark.parametrize("name", ["answers", "chat"])
def test_a_generated_answer_is_less_likely_by_its_effect(model: DomainModel, name: str) -> None:
    (answer,) = model.predict(TEXT, name)
    assert isinstance(answer, str)
    found = word_effects(model, TEXT, name, answer)[""]
    task = (Chat if name == "chat" else Generation)(max_new_tokens=4)
    tokenization = tokenization_of(model.base, task, 128)
    choice = (*tokenization.answer_tokens(" " + answer), *tokenization.end)
    likely = []
    for text in (TEXT, without(words_of(TEXT))[0]):
        item = tokenization.encode(task.to_predict(text, 0))
        with model.using(name):
            (row,) = choice_logprobs(
                model.base.model, [replace(item, choices=(choice,))], model.base.pad
            )
        likely.append(float(row[0]))
    assert found[0][1] == pytest.approx(likely[0] - likely[1], abs=1e-4)


@pytest.mark.parametrize(
    "task",
    [
        Classification(labels=LABELS, head=True),
        MultiLabel(labels=LABELS, head=True),
        Number(mean=3.0, sd=2.0),
    ],
    ids=["classes", "labels", "number"],
)
def test_adapters_with_a_head_explain_their_answers(model: DomainModel, task: Task) -> None:
    adapter = headed(model.base, "head", 1 if task.outputs == "value" else len(LABELS))
    model.bank.add(with_task(adapter, model.base, task))
    (answer,) = model.predict(TEXT, "head")
    found = word_effects(model, TEXT, "head", answer)[""]
    (other,) = model.predict(without(words_of(TEXT))[1], "head")
    if isinstance(answer, float) and isinstance(other, float):
        assert found[1][1] == pytest.approx(answer - other, abs=1e-5)
    elif isinstance(answer, Labels) and isinstance(other, Labels):
        chances = answer.probabilities
        named = answer.labels or (max(chances, key=chances.__getitem__),)
        odds = [
            [math.log(one.probabilities[name] / (1 - one.probabilities[name])) for name in named]
            for one in (answer, other)
        ]
        assert found[1][1] == pytest.approx((sum(odds[0]) - sum(odds[1])) / len(named), abs=1e-4)
    assert max(abs(effect) for _, effect in found) > 1e-3
