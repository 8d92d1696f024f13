"""What a card keeps of the contenders' scores."""

import json
import math

import pytest

from lora_domains.evaluation.contenders import stored_move


@pytest.mark.parametrize("move", [math.nan, math.inf])
def test_a_move_that_is_not_finite_is_stored_as_null(move: float) -> None:
    assert json.dumps(stored_move(move), allow_nan=False) == "null"


def test_a_finite_move_is_stored_as_it_is() -> None:
    assert stored_move(0.25) == 0.25
