"""Batches: epochs, chunks of similar weight, and padded tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_domains.modeling.batching import IGNORED, chunks, collate, epoch_batches
from lora_domains.tokenization.encoded import EncodedExample

ITEMS = st.lists(
    st.builds(
        lambda prompt, answer: EncodedExample("x", tuple(prompt), tuple(answer)),
        st.lists(st.integers(3, 50), min_size=1, max_size=9),
        st.lists(st.integers(3, 50), max_size=5),
    ),
    min_size=1,
    max_size=6,
)


@given(ITEMS)
@settings(deadline=None)
def test_collate_against_a_naive_oracle(items: list[EncodedExample]) -> None:
    batch = collate(items, pad=0)
    longest = max(len(item) for item in items)
    for row, item in enumerate(items):
        ids = [*item.prompt, *item.answer]
        blank = longest - len(ids)
        assert batch.ids[row].tolist() == [0] * blank + ids
        assert batch.mask[row].tolist() == [0] * blank + [1] * len(ids)
        assert batch.positions[row, blank:].tolist() == list(range(len(ids)))
        # Column c predicts the token at column c + 1 if that token belongs to the answer.
        wanted = [IGNORED] * longest
        for k, token in enumerate(item.answer):
            wanted[longest - len(item.answer) + k - 1] = token
        width = batch.labels.shape[1]
        assert batch.labels[row].tolist() == wanted[longest - 1 - width : longest - 1]
        assert all(label == IGNORED for label in wanted[: longest - 1 - width])
    assert batch.positions.min() >= 0
    assert batch.keep == max(len(item.answer) for item in items) + 1
    assert batch.ids.dtype == batch.labels.dtype == torch.long


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=300),
    size=st.integers(1, 20),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 5),
)
@settings(deadline=None, max_examples=60)
def test_epoch_batches_are_a_pure_function_and_contain_each_row_once(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    torch.manual_seed(seed + 1)
    assert epoch_batches(list(lengths), size, seed, epoch) == batches
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths) // size)


def test_epoch_batches_differ_by_epoch_and_seed_and_group_similar_lengths() -> None:
    lengths = [(i * 37) % 100 + 1 for i in range(320)]
    first = epoch_batches(lengths, 8, 0, 0)
    assert first != epoch_batches(lengths, 8, 0, 1)
    assert first != epoch_batches(lengths, 8, 1, 0)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert max(spread) <= 15  # in random batches it would be near 80


@given(ITEMS, st.integers(1, 60))
@settings(deadline=None)
def test_chunks_cover_every_item_within_the_limit(items: list[EncodedExample], most: int) -> None:
    parts = list(chunks(items, most))
    assert sorted(i for part in parts for i in part) == list(range(len(items)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(items[i]) for i in part) <= most
    assert parts == list(chunks(items, most))
