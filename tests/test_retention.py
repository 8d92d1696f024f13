"""Held to the base: which general texts a step reads, and KL with its gradient."""

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from adapters import strong
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.bank import Bank
from lora_domains.base import load_base
from lora_domains.embedded.world import general_questions
from lora_domains.encoding import Encoder
from lora_domains.leaks import find_leaks
from lora_domains.retention import general_rows, kl_to_base
from lora_domains.suites import embedded
from lora_domains.tasks import Example


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(1, 30))
def test_every_text_comes_once_before_any_comes_again(
    count: int, batch: int, seed: int, steps: int
) -> None:
    drawn: list[int] = []
    for step in range(steps):
        rows = general_rows(count, batch, seed, step)
        assert len(rows) == min(batch, count)
        assert rows == general_rows(count, batch, seed, step)
        drawn += rows
    times = Counter(drawn)
    assert max(times.values()) - min(times.get(i, 0) for i in range(count)) <= 1


@pytest.mark.parametrize("inert", [True, False])
def test_kl_is_that_of_the_definition_and_zero_when_nothing_moves(
    tiny_base: Path, inert: bool
) -> None:
    base = load_base(tiny_base, device="cpu")
    bank = Bank(base)
    adapter = strong(base, "a")
    if inert:
        adapter.weights = {n: (a, torch.zeros_like(b)) for n, (a, b) in adapter.weights.items()}
    parameters = bank.add(adapter, trainable=True)
    encoder = Encoder(base.tokenizer, 64)
    texts = ("red river", "the stone is blue today", "alpha")
    items = [encoder.windows(Example("t", "", text))[0] for text in texts]
    kl = kl_to_base(bank, items, base.tokenizer.pad_token_id, "a")
    wanted = 0.0
    for item in items:
        ids = torch.tensor([item.prompt + item.answer])
        shares = []
        for route in (None, "a"):
            with bank.routed(route), torch.no_grad():
                shares.append(F.log_softmax(base.model(input_ids=ids).logits[0, :-1], dim=-1))
        wanted += float((shares[0].exp() * (shares[0] - shares[1])).sum())
    assert float(kl.detach()) == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert (float(kl.detach()) > 0.1) is not inert
    kl.backward()
    moved = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    assert (moved > 1e-4) is not inert
    assert all(p.grad is None for p in base.model.parameters() if not p.requires_grad)


def test_training_text_holds_no_question_and_no_text_that_is_measured() -> None:
    suite = embedded()
    questions = [example for _, example in suite.examples()]
    assert len(questions) == len(general_questions())
    assert find_leaks(suite.training_texts(), [*questions, *suite.texts()]).exact == 0
