"""General text: the shipped file, a domain's own texts, and what must not be contained in them."""

import pytest

from benchmarks.embedded.general_text import SIZES, lines
from lora_domains.data.leaks import contained
from lora_domains.embedded import GENERAL_TEXT_PATH
from lora_domains.embedded.world import general_questions
from lora_domains.errors import DataError
from lora_domains.probes.general_text import embedded_texts, general_text
from lora_domains.probes.lm_eval import harness_suite
from lora_domains.probes.suite import Suite, embedded, quick
from lora_domains.tasks import Example


@pytest.mark.long
def test_the_script_draws_the_shipped_file() -> None:
    assert GENERAL_TEXT_PATH.read_text(encoding="utf-8") == lines()


def test_the_shipped_file_has_its_splits() -> None:
    for split, size in SIZES.items():
        assert len(set(embedded_texts(split))) == len(embedded_texts(split)) == size


def no_task(names: list[str]) -> dict[str, object]:
    return {}


@pytest.mark.usefixtures("all_texts")
@pytest.mark.parametrize("name", ["embedded", "quick", "harness"])
def test_no_training_text_contains_a_question_or_a_text_that_is_measured(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("lora_domains.probes.lm_eval.harness_tasks", no_task)
    suites: dict[str, Suite] = {
        "embedded": embedded(), "quick": quick(), "harness": harness_suite(["a_task"])
    }  # fmt: skip
    suite, general = suites[name], general_text(None)
    questions = [example for _, _, example in suite.questions()]
    used = [*general.training, *general.selection]
    assert len(suite.texts()) == SIZES["test"]
    assert contained(used, questions) == []
    assert contained(used, suite.texts()) == []
    assert contained(general.training, general.selection) == []


def test_a_question_with_its_answer_is_found_in_a_text() -> None:
    questions = [example for _, _, example in embedded().questions()]
    assert len(questions) == len(general_questions())
    told = [Example(f"{n}", "", f"Yes. {q.prompt}{q.answer}") for n, q in enumerate(questions)]
    assert len({row for _, row in contained(told, questions)}) == len(questions)


def test_own_texts_are_split_into_training_and_selection() -> None:
    rows = [{"text": f"line number {n} of the paper"} for n in range(60)]
    general = general_text([*rows, *rows])
    assert len(general.used) == len(general) == 60
    assert len(general.selection) == 12
    assert not {e.answer for e in general.training} & {e.answer for e in general.selection}
    # Training uses a few hundred texts: not the first of the file, which may share a subject.
    numbers = [int(text.answer.split()[2]) for text in general.training]
    assert numbers != sorted(numbers)
    assert general_text(rows).used == general.used


def test_no_own_training_text_contains_a_selection_text() -> None:
    texts = [f"line number {n} of the paper and what it says there" for n in range(60)]
    longer = [f"so it goes: {text}, on and on" for text in texts]
    general = general_text([{"text": t} for t in (*texts, *longer, *(f"{t}." for t in texts))])
    assert contained(general.training, general.selection) == []
    assert 60 < len(general) < 120


def test_texts_that_contain_a_test_row_are_left_out() -> None:
    general = general_text([{"text": f"river number {n} is wide and cold"} for n in range(30)])
    row = Example("test:0", "", general.training[3].answer)
    kept = general.without_texts_containing([row])
    assert len(kept) == len(general) - 1
    assert general.training[3] not in kept.training
    assert list(kept.selection) == list(general.selection)


def test_too_few_own_texts_are_refused() -> None:
    rows = [{"text": f"line number {n} of the paper"} for n in range(19)]
    with pytest.raises(DataError, match="at least 20"):
        general_text(rows)


def test_own_texts_without_the_column_are_refused() -> None:
    with pytest.raises(DataError, match="text"):
        general_text([{"line": "no such column"}] * 30)
