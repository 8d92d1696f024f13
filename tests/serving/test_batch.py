"""The running batch: answers of rows that join and leave are those of each row alone."""

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.adapters import strong

from lora_domains.inference.generation import generate
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.lora import LoadedAdapter
from lora_domains.modeling.routing import Mixed, Single, entered, mixed
from lora_domains.serving.answers import Sampling
from lora_domains.serving.batch import Batch, Row

DOMAINS: tuple[str | None, ...] = (*(f"d{n}" for n in range(8)), None)


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    bank = Bank(load_base(tiny_base, device="cpu"))
    for seed, name in enumerate(DOMAINS):
        if name is not None:
            bank.add(strong(bank.base, name, seed, rank=3 + seed % 3))
    return bank


def made(bank: Bank, batch: Batch, count: int) -> list[Row]:
    """Rows of all domains, with prompts and answers of many lengths."""
    rng = random.Random(0)
    rows = []
    for number in range(count):
        route = bank.route(DOMAINS[number % len(DOMAINS)])
        prompt = [rng.randrange(3, 300) for _ in range(rng.randint(1, 40))]
        adapter = None if route is None else route.rows[0]
        rows.append(Row(prompt, adapter, batch.answer(Sampling(rng.randint(1, 30)))))
    return rows


def alone(bank: Bank, row: Row) -> str:
    with bank.routed(row.adapter and row.adapter.name):
        (text,) = generate(bank.base.model, bank.base.tokenizer, [row.prompt],
                           max_new_tokens=row.answer.sampling.max_tokens)  # fmt: skip
    return text


def run(batch: Batch, rows: Sequence[Row], most: int) -> None:
    """Let ``rows`` join a few at a time, at most ``most`` decode together, to their end."""
    rng, waiting = random.Random(1), list(rows)
    while waiting or batch.rows:
        room = min(rng.randint(0, 3), most - len(batch.rows))
        if (count := min(room, batch.fitting(waiting))) > 0:
            batch.join(waiting[:count])
            waiting = waiting[count:]
        batch.step()


@pytest.mark.parametrize("together", [True, False])
def test_answers_are_those_of_each_row_alone(bank: Bank, together: bool) -> None:
    batch = Batch(bank.base)
    assert batch.together
    batch.together = together
    rows = made(bank, batch, 36 if together else 10)
    run(batch, rows, 12)
    found = [row.answer.text for row in rows]
    assert found == [alone(bank, row) for row in rows]
    assert len(set(found)) > 0.8 * len(rows)  # or nothing could be mixed up
    assert {row.answer.reason for row in rows} <= {"stop", "length"}


def test_a_cancelled_row_leaves_and_the_others_go_on(bank: Bank) -> None:
    batch = Batch(bank.base)
    rows = made(bank, batch, 6)
    for row in rows:
        row.answer = batch.answer(Sampling(20))
    batch.join(rows)
    batch.step()
    rows[2].cancelled = True
    assert rows[2] in batch.step()
    while batch.rows:
        batch.step()
    assert len(rows[2].answer.tokens) <= 3
    assert all(row.answer.text == alone(bank, row) for row in rows if row is not rows[2])


def test_a_row_keeps_the_adapter_that_it_began_with(bank: Bank) -> None:
    batch = Batch(bank.base)
    first, second = made(bank, batch, 10)[0], made(bank, batch, 10)[9]
    assert first.adapter is second.adapter
    first.answer = batch.answer(Sampling(20))
    wanted = alone(bank, first)
    batch.join([first])
    batch.step()
    bank.add(strong(bank.base, "d0", 99))
    try:
        renewed = bank.route("d0")
        assert renewed is not None
        other = Row(first.prompt, renewed.rows[0], batch.answer(Sampling(20)))
        batch.join([other])
        while batch.rows:
            batch.step()
        assert first.answer.text == wanted
        assert other.answer.text == alone(bank, other) != wanted
    finally:
        bank.add(strong(bank.base, "d0", 0, rank=3))


def test_an_error_in_a_prompt_leaves_the_rows_that_decode(bank: Bank) -> None:
    batch = Batch(bank.base)
    rows = made(bank, batch, 4)
    for row in rows:
        row.answer = batch.answer(Sampling(12))
    batch.join(rows)
    with pytest.raises(IndexError):
        batch.join([Row([10**6], None, batch.answer(Sampling(3)))])
    while batch.rows:
        batch.step()
    assert all(row.answer.text == alone(bank, row) for row in rows)


def test_rows_wait_for_memory_but_one_alone_never(bank: Bank) -> None:
    batch = Batch(bank.base)
    rows = made(bank, batch, 12)
    assert batch.fitting(rows) == 12
    for row in rows:
        row.answer = batch.answer(Sampling(20))
    batch._budget.limit = 1
    assert batch.fitting(rows) == 1
    batch.join(rows[:1])
    assert batch.rows
    assert batch.fitting(rows[1:]) == 0


def test_stacked_weights_are_kept_while_rows_change(bank: Bank) -> None:
    def adapter(name: str) -> LoadedAdapter:
        route = bank.route(name)
        assert isinstance(route, Single)
        return route.adapter

    a, b, c = (adapter(name) for name in ("d1", "d2", "d3"))
    route = mixed([a, b, None, c], torch.device("cpu"))
    assert isinstance(route, Mixed)
    ids = torch.arange(3, 23).reshape(4, 5)
    fewer = route.with_rows([c, None, a])
    assert fewer is not None
    assert fewer._stacked is route._stacked
    assert fewer.rows == (c, None, a)
    with torch.no_grad():
        with entered(bank.base.model, fewer, None):
            found = bank.base.model(input_ids=ids[:3]).logits
        fresh = mixed([c, None, a], torch.device("cpu"))
        with entered(bank.base.model, fresh, None):
            wanted = bank.base.model(input_ids=ids[:3]).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    # An adapter that is not stacked, or too few of those that are.
    assert route.with_rows([a, adapter("d4")]) is None
    assert route.with_rows([a, None]) is None
