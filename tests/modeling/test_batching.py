"""Batches: epochs, chunks of similar weight, and padded tensors."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_domains.data.source import Data
from lora_domains.domain import Domain, Training
from lora_domains.errors import DomainError
from lora_domains.inference.likelihoods import text_nats
from lora_domains.modeling.base import load_base
from lora_domains.modeling.batching import (
    IGNORED,
    chunks,
    class_weights,
    collate,
    epoch_batches,
)
from lora_domains.modeling.heads import CAUSAL, features, head_logits, head_nats, new_head
from lora_domains.tasks import Classification, Generation, MultiLabel, Number, Task
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
    assert batch.labels.shape[1] == max(len(item.answer) for item in items)
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


# ── Balanced classes ────────────────────────────────────────────────────────────────────────────

SEVERAL = st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=1, max_size=80)


@given(SEVERAL, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=60)
def test_balanced_batches_draw_every_class_equally_often(
    classes: list[list[int]], seed: int, epoch: int
) -> None:
    lengths = [1 + i % 7 for i in range(len(classes))]
    batches = epoch_batches(lengths, 8, seed, epoch, classes)
    assert epoch_batches([*lengths], 8, seed, epoch, classes) == batches
    drawn = Counter(i for batch in batches for i in batch)
    assert drawn.total() == len(classes)
    if all(len(several) <= 1 for several in classes):  # else a row is drawn for any of its classes
        by_class = Counter[int]()
        for row, count in drawn.items():
            by_class[classes[row][0] if classes[row] else -1] += count
        assert max(by_class.values()) - min(by_class.values()) <= 1
        for one in by_class:
            rows = [i for i, several in enumerate(classes) if (several or [-1])[0] == one]
            counts = [drawn[i] for i in rows]
            assert max(counts) - min(counts) <= 1  # no row again before the others


def test_weights_are_inverse_frequencies_with_a_mean_of_one() -> None:
    targets = [0] * 6 + [1] * 3 + [2]
    rows = [EncodedExample(str(n), (1,), (), target=t) for n, t in enumerate(targets)]
    weights = class_weights(rows, Classification(labels=("a", "b", "c", "d"), head=True))
    assert weights is not None
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3, 1.0])
    assert weights[targets].mean() == pytest.approx(1)
    truth = [(1, 0, 0)] * 2 + [(0, 1, 0)] * 6 + [(0, 0, 0)] * 2
    several = [EncodedExample(str(n), (1,), (), truth=t) for n, t in enumerate(truth)]
    weights = class_weights(several, MultiLabel(labels=("a", "b", "c"), head=True))
    assert weights is not None
    without, having = weights.tolist()
    assert having == pytest.approx([10 / 4, 10 / 12, 1.0])
    assert without == pytest.approx([10 / 16, 10 / 8, 1.0])  # no row has the last label
    assert class_weights(rows, Generation()) is None


def test_weights_multiply_the_loss_of_each_class(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    weights = torch.tensor([0.5, 2.0, 3.0])
    rows = [EncodedExample(str(n), (5, 9, 20 + n), (7, 2), target=n) for n in range(3)]
    task, head = Classification(labels=("a", "b", "c"), head=True), new_head(base, CAUSAL, 3)
    with torch.no_grad():
        alone = [head_nats(base.model, head, [row], 0, task) for row in rows]
        torch.testing.assert_close(
            head_nats(base.model, head, rows, 0, task, weights), torch.stack(alone) @ weights
        )
        text = [text_nats(base.model, [row], 0) for row in rows]
        torch.testing.assert_close(
            text_nats(base.model, rows, 0, weights), torch.stack(text) @ weights
        )
        several = [replace(row, truth=(1, 0, n), target=-1) for n, row in enumerate(rows[:2])]
        odds = head_logits(head, features(base.model, several, 0))
        truth, both = torch.tensor([row.truth for row in several]).float(), torch.rand(2, 3)
        each = F.binary_cross_entropy_with_logits(odds, truth, reduction="none")
        found = head_nats(base.model, head, several, 0, MultiLabel(head=True), both)
        torch.testing.assert_close(found, (each * both[truth.long(), torch.arange(3)]).sum())


@pytest.mark.parametrize(
    ("task", "balance"),
    [(Generation(), "weights"), (Number(), "batches"), (MultiLabel(), "weights"),
     (Classification(), "both")],
)  # fmt: skip
def test_balance_is_refused_where_it_means_nothing(task: Task, balance: str) -> None:
    with pytest.raises(DomainError, match="setting 'balance'"):
        Domain("x", task, Data("t.csv"), training=Training(balance=balance))
