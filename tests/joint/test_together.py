"""How many runs share a pass: as many as save more than sharing costs, and as memory allows."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_domains.inference.batches import trial_examples
from lora_domains.joint import together
from lora_domains.joint.together import STATE, Choice, choose
from lora_domains.modeling.base import load_base
from lora_domains.modeling.batching import PASS
from lora_domains.tokenization.encoded import EncodedExample

CPU = torch.device("cpu")


@dataclass(eq=False)
class Whole:
    """A model that reads whole prompts."""

    config: Any = None
    device: torch.device = CPU

    def forward(self) -> None: ...


@dataclass
class Planned:
    """A run over 96 rows of ``tokens`` tokens."""

    tokens: int
    batch_size: int
    parameters: int = 1000
    seed: int = 0
    head: bool = False
    pairs: bool = False
    whole: bool = False
    asked: int = 0
    """How many times its rows were asked for."""

    @property
    def train(self) -> list[EncodedExample]:
        self.asked += 1
        rows = trial_examples(96, self.tokens, 1)
        return [replace(row, choices=(row.answer, row.answer)) for row in rows]


def chosen(runs: list[Planned], kind: str = "llama") -> Choice:
    config = SimpleNamespace(model_type=kind)
    base: Any = SimpleNamespace(device=CPU, model=Whole(config))
    return choose(base, runs)


@pytest.mark.parametrize(
    ("tokens", "rows", "count"), [(64, 1, 4), (128, 1, 4), (256, 1, 1), (512, 32, 1)]
)
def test_short_steps_share_passes_and_long_ones_do_not(tokens: int, rows: int, count: int) -> None:
    choice = chosen([Planned(tokens, rows, seed=n) for n in range(4)])
    assert choice.together == count
    assert ("4 adapters in one pass" if count == 4 else "one after another") in choice.reason


def test_only_rows_that_are_read_alike_share_passes() -> None:
    headed = [Planned(64, 1, head=True, seed=n) for n in range(2)]
    prompted = Planned(64, 1)
    assert chosen(headed).together == 2
    alone = chosen([headed[0], prompted])
    assert alone.together == 1
    assert "one has a head, and shares no pass with the other" in alone.reason
    step = [together._first_steps(run)[0] for run in (*headed, prompted)]
    model = Whole()
    parts = together.cost(model, step[:2]), together.cost(model, step[2:])
    assert together.cost(model, step) == sum(parts)


def test_what_the_prompts_of_one_adapter_begin_with_costs_once(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu").model
    prompts = [(7,) * 40 + (8 + n,) * 5 for n in range(16)]
    rows = [EncodedExample(str(n), prompt, (1,)) for n, prompt in enumerate(prompts)]
    step = together.Step(False, rows)
    launch = PASS[True]
    assert together.cost(base, [step]) == 16 * 46 - 15 * 40 + 2 * launch
    assert together.cost(base, [step._replace(whole=True)]) == 16 * 46 + launch
    # Steps that are taken together read whole prompts, also those that share no pass.
    headed = together.Step(True, rows)
    assert together.cost(base, [step, headed]) == 2 * (16 * 46 + launch)


def test_both_answers_of_a_pair_count() -> None:
    one, pair = (together._first_steps(Planned(64, 1, pairs=pairs))[0] for pairs in (False, True))
    assert [len(step.rows) for step in (one, pair)] == [1, 2]


def test_at_most_eight_share_a_pass_and_the_others_wait() -> None:
    choice = chosen([Planned(32, 2) for _ in range(10)])
    assert choice.together == 8
    assert "2 wait for a place" in choice.reason


def test_memory_limits_how_many_share_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together, "free_bytes", lambda _: 3 * 4 * STATE * 1000)
    choice = chosen([Planned(32, 2) for _ in range(5)])
    assert choice.together == 3
    assert "memory for 3 at a time; 2 wait" in choice.reason
    monkeypatch.setattr(together, "free_bytes", lambda _: 0)
    assert chosen([Planned(32, 2)] * 2).together == 1


def test_a_base_of_the_deberta_family_takes_one() -> None:
    assert chosen([Planned(32, 2) for _ in range(4)], "deberta-v2").together == 1


def test_rows_are_asked_for_once() -> None:
    """Those of a large domain take long to list."""
    runs = [Planned(32, 2) for _ in range(8)]
    chosen(runs)
    assert [run.asked for run in runs] == [1] * 8
