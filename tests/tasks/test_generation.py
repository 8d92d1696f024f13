"""Free-text answers, and how they are scored."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import row

from lora_domains.tasks import Chat, Generation, MultiLabel, Task, last_number


def test_generation() -> None:
    task = Generation(text=("context", "question"), answer="reply")
    item = task.example(row(context="c", question="q", reply=" because "))
    assert (item.prompt, item.answer) == ("context: c\nquestion: q\nreply:", " because")
    assert (item.choices, item.target, task.metric) == ((), -1, "token_f1")
    assert (
        Generation(prompt="Q {question} A").example(row(question="q", answer="a")).prompt == "Q q A"
    )


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc .,"))
def test_the_last_number_is_found_after_any_words(number: int, words: str) -> None:
    assert last_number(f"first 3 {words} x {number:,}") == number


@pytest.mark.parametrize(("text", "f1", "exact"), [
    ("red Stone.", 1.0, 1.0), ("stone red", 1.0, 0.0), ("the red cloud", 0.5, 0.0),
    ("", 0.0, 0.0), ("the red stone\nand more", 1.0, 1.0),
])  # fmt: skip
def test_words_are_compared(text: str, f1: float, exact: float) -> None:
    scores = Generation(until="\n").score_text(text, "The red stone")
    assert (scores["f1"], scores["exact"]) == (pytest.approx(f1), exact)


def test_numbers_are_compared() -> None:
    task = Generation(judge="number")
    assert set(task.score_text("4 + 3 is 1,007", "#### 1007").values()) == {1.0}
    assert set(task.score_text("1007, no, 8", "#### 1007").values()) == {0.0}
    scores = task.score_text("no idea", "#### 1007")
    assert scores == {"f1": 0.0, "exact": 0.0, "number": 0.0}
    assert scores.keys() < task.score_keys


@pytest.mark.parametrize("reasoning", [
    "<think>\n\n</think>\n\n", " <think>\nTea, or\ncoffee?\n</think>\n\n", "begun before\n</think>",
])  # fmt: skip
@pytest.mark.parametrize(("task", "key"), [(Generation(), "exact"), (Chat(generate=True), "exact")])
def test_the_answer_after_its_reasoning_is_scored(reasoning: str, task: Task, key: str) -> None:
    assert task.answer_in(f"{reasoning}green tea") == "green tea"
    assert task.score_text(f"{reasoning}green tea", "green tea")[key] == 1.0
    assert task.answer_in("<think>without an end") == "<think>without an end"


def test_labels_after_reasoning_are_read() -> None:
    task = MultiLabel(labels=("pump", "valve"))
    assert task.score_text("<think>\npump?\n</think>\n\nvalve", "")["predicted"] == [0, 1]
