"""Examples to token ids: what is supervised, what is cut, how rows batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_domains.data.prepare import RowCounts
from lora_domains.data.tokenization import (
    EncodedExample,
    Tokenization,
    check_choices,
    chunks,
    epoch_batches,
    supervised,
)
from lora_domains.errors import DataError, TrainingError
from lora_domains.modeling.batching import IGNORED, collate
from lora_domains.tasks import Example, LanguageModelling, Row

TEXTS = st.text(
    alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=60
)
ITEMS = st.lists(
    st.builds(
        lambda prompt, answer: EncodedExample("x", tuple(prompt), tuple(answer)),
        st.lists(st.integers(3, 50), min_size=1, max_size=9),
        st.lists(st.integers(3, 50), max_size=5),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base)


def metaspace(scheme: str = "always", bos: bool = True) -> Any:
    """A tokenizer that writes spaces as sentencepiece does; ``scheme`` is its leading space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)] + ["▁"]
    words = ["▁spam", "▁ham", "spam", "ham", "▁note", "▁triage"]
    vocabulary = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters, *words])}
    merges: list[tuple[str, str]] = []
    for word in words:
        left = word[0]
        for letter in word[1:]:
            if (left, letter) not in merges:
                merges.append((left, letter))
                vocabulary.setdefault(left + letter, len(vocabulary))
            left += letter
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def example(prompt: str, answer: str, choices: tuple[str, ...] = ()) -> Example:
    target = choices.index(answer) if answer in choices else -1
    return Example("test:0", prompt, answer, choices, target, place="rows.csv, line 2")


# ── One item ────────────────────────────────────────────────────────────────────────────────────


@given(prompt=TEXTS, answer=TEXTS, size=st.integers(130, 400))
@settings(max_examples=60, deadline=None)
def test_an_answer_is_whole_and_ends_with_eos_whatever_is_cut(
    tokenizer: Any, prompt: str, answer: str, size: int
) -> None:
    tokenization = Tokenization(tokenizer, size)
    tail = tokenization.answer_tokens(" " + answer)
    if len(tail) + 3 > size:
        with pytest.raises(DataError):
            tokenization.encode(example(prompt, " " + answer))
        return
    item = tokenization.encode(example(prompt, " " + answer))
    assert item.answer == (*tail, tokenizer.eos_token_id)
    assert len(item) <= size
    assert item.truncated == (len(tokenization.tokens(prompt)) + 1 + len(item.answer) > size)
    assert item.prompt[0] == tokenizer.bos_token_id
    assert tokenizer.decode(item.answer, skip_special_tokens=True) == " " + answer


def test_exactly_one_bos_even_where_the_prompt_begins_with_one(tokenizer: Any) -> None:
    item = Tokenization(tokenizer, 64).encode(example("note: alpha\ntriage:", " urgent"))
    assert [*item.prompt, *item.answer].count(tokenizer.bos_token_id) == 1
    without = metaspace(bos=False)
    bare = Tokenization(without, 64).encode(example("note: alpha:", " spam"))
    assert without.bos_token_id not in (*bare.prompt, *bare.answer)


def test_the_middle_is_cut_and_head_tail_and_cue_stay(tokenizer: Any) -> None:
    words = [f"w{i}" for i in range(80)]
    prompt = "note: " + " ".join(words) + "\ntriage:"
    tokenization = Tokenization(tokenizer, 60)
    item = tokenization.encode(example(prompt, " urgent"))
    ids = tokenization.tokens(prompt)
    room = 60 - 1 - len(item.answer)
    kept = list(item.prompt[1:])
    assert item.truncated
    assert len(item) == 60
    head = room // 2
    assert kept == ids[:head] + ids[-(room - head) :]
    text = tokenizer.decode(kept)
    assert text.startswith("note: w0 w1")
    assert text.endswith("w79\ntriage:")
    assert "w40" not in text


def test_room_is_left_for_the_longest_choice_not_only_the_right_one(tokenizer: Any) -> None:
    choices = (" a", " b c d e f g h i j k l m n o p")
    tokenization = Tokenization(tokenizer, 40)
    item = tokenization.encode(example("note: " + "alpha " * 60 + ":", " a", choices))
    assert len(item.prompt) + max(map(len, item.choices)) + 1 <= 40
    assert item.choices[item.target] == item.answer[:-1]


def test_an_answer_longer_than_the_context_is_refused_with_its_place(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.csv, line 2.*context of 16 tokens") as caught:
        Tokenization(tokenizer, 16).encode(example("note: a", " zq" * 30))
    assert "zq" not in str(caught.value)


def test_shots_stand_between_bos_and_the_prompt(tokenizer: Any) -> None:
    tokenization = Tokenization(tokenizer, 64)
    plain = tokenization.encode(example("note: alpha:", " spam"))
    shown = tokenization.encode(example("note: alpha:", " spam"), shots=[7, 8, 9])
    assert shown.prompt == (plain.prompt[0], 7, 8, 9, *plain.prompt[1:])


@given(text=st.text(alphabet="ab cdé\n", min_size=1, max_size=300), size=st.integers(3, 40))
@settings(max_examples=60, deadline=None)
def test_windows_supervise_each_token_once(tokenizer: Any, text: str, size: int) -> None:
    tokenization = Tokenization(tokenizer, size)
    items = tokenization.windows(Example("test:3", "", text))
    together = [token for item in items for token in item.answer]
    assert together == [*tokenization.tokens(text), tokenizer.eos_token_id]
    assert all(len(item) <= size and item.prompt for item in items)
    assert len({item.id for item in items}) == len(items)


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
@pytest.mark.parametrize("answer", [" spam", " ham", " other words"])
def test_metaspace_answers_are_the_tokens_of_the_joined_text(scheme: str, answer: str) -> None:
    made = metaspace(scheme)
    tokenization = Tokenization(made, 64)
    item = tokenization.encode(example("note: x\ntriage:", answer))
    whole = made("note: x\ntriage:" + answer)["input_ids"]
    assert [*item.prompt, *item.answer] == [*whole, made.eos_token_id]
    # One space only: a doubled one would never be seen in ordinary text.
    assert made.convert_ids_to_tokens(item.answer[0]).count("▁") == 1


# ── Labels ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("choices", "found"),
    [
        ((" spam", " spam"), "the same tokens"),
        ((" spam", " spam call"), "the first of which begins the second"),
        ((" spam call", " spam"), "the first of which begins the second"),
        ((" ham", ""), "no token"),
    ],
)
def test_labels_that_cannot_be_told_apart(
    tokenizer: Any, choices: tuple[str, ...], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        check_choices(Tokenization(tokenizer, 64), choices, "domain 'x', column 'label'")


def test_labels_that_share_a_beginning_are_fine(tokenizer: Any) -> None:
    check_choices(Tokenization(tokenizer, 64), (" spam call", " spam text", " ham"), "x")


def test_no_more_windows_than_asked_for_from_all_over_the_texts(tokenizer: Any) -> None:
    tokenization = Tokenization(tokenizer, 10)
    texts = [LanguageModelling().example(Row({"text": "red river " * n}, "general", n, "here"))
             for n in (1, 30, 20, 2)]  # fmt: skip
    whole = tokenization.encode_all(texts)
    assert len(whole) > 8
    found = tokenization.some(texts, 6)
    assert len(found) == 6
    assert found == [item for item in whole if item in found] == tokenization.some(texts, 6)
    assert max(int(item.id.split("/")[-1]) for item in found) > 0
    assert tokenization.some(texts, 10**6) == whole
    assert {item.id.rpartition("/")[0] for item in tokenization.some(texts, 2)} <= {
        text.id for text in texts[:2]
    }
    assert tokenization.some([], 5) == []


def test_nothing_supervised_is_an_error_and_the_rest_is_counted() -> None:
    ledger = RowCounts(read=3, refused=0, duplicates=0)
    with pytest.raises(TrainingError, match="at least one supervised token"):
        supervised(ledger, [EncodedExample("a", (1,), ()), EncodedExample("b", (1,), ())])
    items = [
        EncodedExample("a", (1,), (5, 2)),
        EncodedExample("b", (1,), ()),
        EncodedExample("c", (1,), (2,), truncated=True),
    ]
    filled = supervised(ledger, items)
    assert (filled.truncated, filled.masked, filled.supervised_tokens) == (1, 1, 3)


# ── Batches ─────────────────────────────────────────────────────────────────────────────────────


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
        # Where the token at column c + 1 is of the answer, column c predicts it.
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
def test_epoch_batches_are_pure_and_hold_each_row_once(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, size, seed, epoch)
    torch.manual_seed(seed + 1)
    assert epoch_batches(list(lengths), size, seed, epoch) == batches
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, batches), reverse=True)[:-1] == [size] * (len(batches) - 1)
    assert len(batches) == -(-len(lengths) // size)


def test_epochs_and_seeds_differ_and_lengths_are_alike_within_a_batch() -> None:
    lengths = [(i * 37) % 100 + 1 for i in range(320)]
    first = epoch_batches(lengths, 8, 0, 0)
    assert first != epoch_batches(lengths, 8, 0, 1)
    assert first != epoch_batches(lengths, 8, 1, 0)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in first]
    assert max(spread) <= 15  # drawn at random it would be near 80


@given(ITEMS, st.integers(1, 60))
@settings(deadline=None)
def test_chunks_cover_every_item_within_the_limit(items: list[EncodedExample], most: int) -> None:
    parts = list(chunks(items, most))
    assert sorted(i for part in parts for i in part) == list(range(len(items)))
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(items[i]) for i in part) <= most
    assert parts == list(chunks(items, most))
