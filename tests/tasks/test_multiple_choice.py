"""Questions with their own candidate answers."""

import pytest
from support.rows import SECRET, row

from lora_domains.errors import DataError
from lora_domains.tasks import (
    MultipleChoice,
)


@pytest.mark.parametrize(
    ("answer", "target"), [(2, 2), ("2", 2), ("C", 2), ("c", 2), ("ox", 2), ("answer3", 2), (0, 0)]
)
@pytest.mark.parametrize(
    "choices",
    [["cat", "dog", " ox"], '["cat", "dog", "ox"]', {"A": "cat", "B": "dog", "C": "ox"}],
)
def test_multiple_choice(answer: object, target: int, choices: object) -> None:
    item = MultipleChoice().example(row(question="Which?", choices=choices, answer=answer))
    assert item.prompt == "Question: Which?\nAnswer:"
    assert item.choices == (" cat", " dog", " ox")
    assert item.target == target
    assert item.answer == item.choices[target]


@pytest.mark.parametrize(
    "answer", [3, -1, "D", "answer0", "answer4", "ß", "²", "answer²", None, SECRET]
)
def test_multiple_choice_answers_out_of_range(answer: object) -> None:
    with pytest.raises(DataError, match="index") as caught:
        MultipleChoice().example(row(question="q", choices=["a", "b", "c"], answer=answer))
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("choices", [None, SECRET, f'["{SECRET}"]', [SECRET], 7, "{"])
def test_multiple_choice_without_candidates(choices: object) -> None:
    with pytest.raises(DataError, match="two candidate answers") as caught:
        MultipleChoice().example(row(question="q", choices=choices, answer=0))
    assert SECRET not in str(caught.value)


def test_the_column_of_the_question_may_have_another_name() -> None:
    task = MultipleChoice(question="stem")
    item = task.example(row(stem="Two and two?", choices=["3", "4"], answer=1))
    assert task.input_columns == ("stem", "choices")
    assert item.prompt == "Question: Two and two?\nAnswer:"
    assert MultipleChoice("stem", prompt="{about}: {question}").input_columns[:2] == (
        "about", "stem",
    )  # fmt: skip
