"""Edited copies of training texts: what may change, and that none equals a test row."""

import json
import re
from random import Random

from conftest import make_rows
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.analysis.augmentation import LONG, augmented, noisy
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.tasks import Chat, Classification, LanguageModelling

WORDS = st.lists(
    st.sampled_from(["no", "not", "Pain", "fever", "denies", "37.5", "mg", "urgent", "Ärger", "a"]),
    min_size=1, max_size=12,
)  # fmt: skip


@given(WORDS, st.integers(0, 1000))
def test_words_keep_their_place_and_short_ones_their_letters(words: list[str], seed: int) -> None:
    edited = noisy(" ".join(words), Random(seed)).split()
    assert len(edited) == len(words)
    for before, after in zip(words, edited, strict=True):
        assert re.sub(r"\D", "", after) == re.sub(r"\D", "", before)
        before, after = (word.strip(".").casefold() for word in (before, after))
        if LONG.fullmatch(before):
            # At most two mistakes inside the word, never in its first or last letter.
            assert (len(before), before[0], before[-1]) == (len(after), after[0], after[-1])
            assert sum(a != b for a, b in zip(before, after, strict=True)) <= 4
        else:
            assert before == after


@given(st.text(max_size=80), st.integers(0, 100))
def test_edits_of_any_text_are_reproducible(text: str, seed: int) -> None:
    assert noisy(text, Random(seed)) == noisy(text, Random(seed))


def test_most_texts_change() -> None:
    texts = [row["text"] for row in make_rows(200)]
    changed = sum(noisy(text, Random(at)) != text for at, text in enumerate(texts))
    assert changed > 120


def test_copies_keep_their_labels_and_never_equal_a_test_row() -> None:
    rows = make_rows(80)
    # A test row that is almost a training row, so that an edit could make them equal.
    rows[79] = {**rows[0], "text": rows[0]["text"] + " indeed"}
    prepared = prepare(Classification(), Data(rows))
    made = augmented(prepared.task, Data(rows), prepared.train, prepared.test, 0)
    by_id = {example.id: example for example in prepared.train}
    assert 0 < len(made) <= len(prepared.train)
    assert {example.id for example in made} <= {f"{name}~" for name in by_id}
    for example in made:
        source = by_id[example.id[:-1]]
        assert (example.answer, example.target) == (source.answer, source.target)
    held = {example.prompt for example in prepared.test}
    assert not held & {example.prompt for example in made}
    assert made == augmented(prepared.task, Data(rows), prepared.train, prepared.test, 0)
    assert made != augmented(prepared.task, Data(rows), prepared.train, prepared.test, 1)


def test_a_copy_that_equals_a_test_row_is_left_out() -> None:
    rows = make_rows(40)
    prepared = prepare(Classification(), Data(rows))
    data = Data(rows)
    every = augmented(prepared.task, data, prepared.train, [], 0)
    (first, *_) = every
    left = augmented(prepared.task, data, prepared.train, [first], 0)
    assert first.id not in {example.id for example in left}
    assert len(left) < len(every)


def test_the_row_function_of_a_recipe_is_applied() -> None:
    rows = [{"words": row["text"], "label": row["label"]} for row in make_rows(40)]
    data = Data(rows, row=lambda values: {**values, "text": f"note {values['words']}"})
    prepared = prepare(Classification(), data)
    made = augmented(prepared.task, data, prepared.train, prepared.test, 0)
    assert all("note" in example.prompt.casefold() for example in made)


def test_what_is_read_beside_a_text_is_not_edited() -> None:
    pairs = [["How does everybody understand this?", "Nobody knows exactly."]]
    rows = [{"user": row["text"], "answer": row["label"], "history": json.dumps(pairs)}
            for row in make_rows(40)]  # fmt: skip
    data = Data(rows)
    prepared = prepare(Chat(user="user", assistant="answer", history="history"), data)
    made = augmented(prepared.task, data, prepared.train, prepared.test, 0)
    assert made
    for example in made:
        assert [turn["content"] for turn in example.messages[:2]] == pairs[0]


def test_plain_text_has_no_copies() -> None:
    rows = [{"text": f"{row['text']}."} for row in make_rows(40)]
    prepared = prepare(LanguageModelling(), Data(rows))
    assert augmented(prepared.task, Data(rows), prepared.train, prepared.test, 0) == []
