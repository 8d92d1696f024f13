"""Questions with their own candidate answers."""

import json

import pytest
from support.rows import SECRET, row

from lora_domains.errors import DataError, EmptyCell
from lora_domains.tasks import MultipleChoice, task_from_record, task_record


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


@pytest.mark.parametrize(("values", "choices", "target"), [
    ({"question": "q", "choices": {"text": ["cat", "dog"], "label": ["A", "B"]}, "answerKey": "B"},
     (" cat", " dog"), 1),
    ({"question": "q", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answerKey": "1"},
     (" cat", " dog"), 0),
    ({"question": "q", "options": {"B": "dog", "A": "cat"}, "answer_idx": "A"},
     (" dog", " cat"), 1),
    ({"question": "q", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 2},
     (" w", " x", " y", " z"), 2),
    ({"Question": "q", "A": "w", "B": "x", "C": "y", "D": "z", "Answer": "D"},
     (" w", " x", " y", " z"), 3),
    ({"prompt": "q", "A": "v", "B": "w", "C": "x", "D": "y", "E": "z", "answer": "E"},
     (" v", " w", " x", " y", " z"), 4),
    ({"question": "q", "option1": "w", "option2": "x", "answer": 1}, (" w", " x"), 0),
    ({"question": "q", "Option A": "w", "Option B": "x", "Correct Answer": "b"}, (" w", " x"), 1),
    ({"Frage": "q", "A": "w", "B": "x", "C": "y", "Antwort": "A"}, (" w", " x", " y"), 0),
    ({"ctx": "q", "endings": "['w', 'x']", "label": "1"}, (" w", " x"), 1),
])  # fmt: skip
def test_questions_as_public_sets_have_them(
    values: dict[str, object], choices: tuple[str, ...], target: int
) -> None:
    task = MultipleChoice.from_columns(values.keys())
    assert task is not None
    assert set(task.columns) <= {*values}
    item = task.example(row(**values))
    assert (item.choices, item.target, item.prompt) == (choices, target, "Question: q\nAnswer:")
    assert task_from_record(json.loads(json.dumps(task_record(task)))) == task


def test_a_number_that_is_one_choice_and_counts_another_is_refused() -> None:
    choices = '["4", "2", "1", "3"]'
    with pytest.raises(DataError, match="the index of one choice and the text of another"):
        MultipleChoice().example(row(question="1 + 1", choices=choices, answer="2"))
    for answer in (1, "B", "b"):
        item = MultipleChoice().example(row(question="1 + 1", choices=choices, answer=answer))
        assert item.answer == " 2"
    same = MultipleChoice().example(row(question="q", choices=["0", "1", "2"], answer="2"))
    assert same.answer == " 2"


def test_a_missing_candidate_is_an_empty_cell() -> None:
    task = MultipleChoice(choices=("A", "B"))
    with pytest.raises(EmptyCell, match="column 'B'"):
        task.example(row(question="q", A="x", B=None, answer="A"))


def test_a_missing_answer_is_an_empty_cell() -> None:
    for cell in (None, "", " "):
        with pytest.raises(EmptyCell, match="--drop-empty"):
            MultipleChoice().example(row(question="q", choices=["x", "y"], answer=cell))
