"""Answered examples before a prompt: what a base can do without being trained, as a baseline."""

from collections.abc import Callable, Sequence

import numpy as np

from lora_domains.data.tokenization import EncodedExample, EncodedRow, Tokenization
from lora_domains.errors import DataError

SHOTS = 4
"""Examples in the prompt of the few-shot baseline."""


def shots(
    tokenization: Tokenization, train: Sequence[EncodedRow], seed: int, warn: Callable[[str], None]
) -> list[int]:
    """Token ids of ``SHOTS`` answered training examples, over as many labels as there is room.

    One whose answer is too long for its share of the context is left out, which is said; a long
    prompt loses its middle.
    """
    random = np.random.default_rng([seed, SHOTS])
    by_label: dict[int, list[EncodedRow]] = {}
    for i in random.permutation(len(train)):
        by_label.setdefault(train[i].example.target, []).append(train[i])
    labels = sorted(by_label)
    random.shuffle(labels)
    picked: list[EncodedRow] = []
    while len(picked) < min(SHOTS, len(train)):
        for label in labels:
            if by_label[label] and len(picked) < SHOTS:
                picked.append(by_label[label].pop())
    short = Tokenization(tokenization.tokenizer, tokenization.max_length // (SHOTS + 2))
    gap = tokenization.tokens("\n\n")
    ids: list[int] = []
    left_out = 0
    for row in picked:
        try:
            item = short.encode_again(row)
            ids += [*item.prompt[len(short.bos) :], *item.answer[:-1], *gap]
        except DataError:
            left_out += 1
    if left_out:
        warn(
            f"{left_out} of the {SHOTS} examples for the base's prompt are left out: their answers "
            f"do not fit their share of {tokenization.max_length} tokens."
        )
    return ids


def with_shots(
    tokenization: Tokenization,
    train: Sequence[EncodedRow],
    rows: Sequence[EncodedRow],
    seed: int,
    warn: Callable[[str], None],
) -> list[EncodedExample]:
    """The rows with examples of ``train`` before them; none where one has no room for them.

    All or none, since contenders are compared on the same items. What the examples cost is said.
    Plain text asks nothing that an example could answer, and a head reads one text.
    """
    asks = rows[0][0].prompt and not tokenization.head
    few = shots(tokenization, train, seed, warn) if asks else []
    if not few:
        return []
    try:
        found = [tokenization.encode_again(row, few) for row in rows]
    except DataError:
        warn(
            f"the base with {SHOTS} examples in its prompt is not measured: in a context of "
            f"{tokenization.max_length} tokens some rows leave no room for the examples."
        )
        return []
    pairs = zip(found, rows, strict=True)
    cut = sum(len(item.prompt) - len(few) < len(own.prompt) for item, (_, own) in pairs)
    if cut:
        warn(
            f"the base with {SHOTS} examples in its prompt reads less of {cut} of {len(rows)} "
            f"rows: the examples take their room in {tokenization.max_length} tokens."
        )
    return found
