"""How rows are read, and prompts filled in."""

from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import SECRET, row

from lora_domains.errors import DataError, DomainError, EmptyCell
from lora_domains.tasks import (
    LanguageModelling,
    columns_in,
    fill,
    text_of,
)
from lora_domains.tasks.rows import placeholder, prompt_from


def test_row_ids_hold_position_only() -> None:
    assert row(17, id=SECRET).id == "train:17"


@given(st.text().filter(str.strip))
def test_nothing_of_a_text_is_cut(text: str) -> None:
    assert fill("<{t}>", row(t=text)) == f"<{text.strip()}>"
    assert LanguageModelling().example(row(text=text)).answer == text


@pytest.mark.parametrize("template", ["{open", "close}", "{}", "{a} and {}"])
def test_unreadable_prompts_are_refused(template: str) -> None:
    with pytest.raises(DomainError, match="column"):
        columns_in(template)


@pytest.mark.parametrize(
    ("value", "found"), [(None, "null"), (float("nan"), "null"), ("", "''"), (" \t", "whitespace")]
)
def test_empty_cells(value: Any, found: str) -> None:
    with pytest.raises(DataError, match=found):
        text_of(row(text=value, other=SECRET), "text")


def test_pandas_nulls_are_null() -> None:
    pandas = pytest.importorskip("pandas")
    for value in (pandas.NA, pandas.NaT):
        with pytest.raises(DataError, match="null"):
            text_of(row(text=value), "text")


def test_zero_and_false_are_text() -> None:
    assert text_of(row(n=0), "n") == "0"
    assert text_of(row(n=False), "n") == "False"


@pytest.mark.parametrize(
    "value", [b"bad", ["bad"], ("bad",), {"a": 1}, {"bad"}, object(), [{"role": "user"}], [b"x"]]
)
def test_a_value_that_is_no_text_is_refused_by_its_type(value: Any) -> None:
    with pytest.raises(DataError, match=f"type {type(value).__name__}") as caught:
        text_of(row(text=value), "text")
    assert "bad" not in str(caught.value)


def test_numbers_dates_and_messages_are_read_for_what_they_are() -> None:
    numpy = pytest.importorskip("numpy")
    values = {
        "3": 3, "2.50": Decimal("2.50"), "1.5": numpy.float32(1.5), "7": numpy.int64(7),
        "2024-02-03": date(2024, 2, 3), "2024-02-03 04:05:00": datetime(2024, 2, 3, 4, 5),
        "user: hello\nassistant: hi": [{"role": "user", "content": "hello"},
                                       {"role": "assistant", "content": "hi"}],
        "kind": Kind.ONE,
    }  # fmt: skip
    for text, value in values.items():
        assert text_of(row(text=value), "text") == text


class Kind(str, Enum):  # noqa: UP042 (what people pass)
    ONE = "kind"


@pytest.mark.parametrize(
    "name", ["Comment: in your own words", "Any problems?!", "Reply {free text}",
             "Comment, if any", "a[0]", "a.b"],
)  # fmt: skip
def test_any_column_name_can_be_in_a_prompt(name: str) -> None:
    template = prompt_from((name, "other"), "Label {x}")
    assert columns_in(template) == (name, "other")
    assert fill(template, row(**{name: "one", "other": "two"})) == (
        f"{name}: one\nother: two\nLabel {{x}}:"
    )
    assert columns_in(placeholder(name)) == (name,)


def test_an_empty_column_of_several_is_left_out() -> None:
    template = prompt_from(("instruction", "input"), "output")
    for empty in ("", None, "  "):
        assert fill(template, row(instruction="do", input=empty)) == "instruction: do\noutput:"
    assert fill(template, row(instruction="do")) == "instruction: do\noutput:"
    assert fill("{a} and {b}:", row(a="x", b="")) == "x and :"
    with pytest.raises(EmptyCell, match="instruction"):
        fill(template, row(instruction="", input=None))
