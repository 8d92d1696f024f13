"""How rows are read, and prompts filled in."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.rows import SECRET, row

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks import (
    LanguageModelling,
    columns_in,
    fill,
    text_of,
)


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
