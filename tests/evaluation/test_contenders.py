"""Scores of contenders on general questions and text."""

import math
from collections.abc import Sequence
from pathlib import Path

from support.adapters import strong
from support.models import QUIET, SUITE

from lora_domains.evaluation.contenders import score_general
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base


def test_a_nan_after_the_first_move_is_kept(tiny_base: Path) -> None:
    class Overflowing(Scorer):
        def drift(self, part: Part, adapters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
            moved = super().drift(part, adapters)
            moved["strong"][1]["largest"] = math.nan
            return moved

    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base))
    moves = [
        score_general(kind(bank, QUIET), SUITE, 64, ["strong"], b"key")["strong"].largest_move
        for kind in (Scorer, Overflowing)
    ]
    assert 0 < moves[0] < math.inf
    assert math.isnan(moves[1])
