"""An answer: its tokens, its text in pieces, and where it ends."""

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_domains.serving.answers import Answer, Sampling, choose

TEXTS = ["the red river is blue", " now — naïve 日本 🙂 text", "call now\n\nmeet later ", "  \n"]


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_base)


def pieces(tokenizer: Any, ids: list[int], sampling: Sampling, **options: Any) -> list[str]:
    """What becomes certain with each token, until the answer ends."""
    answer = Answer(tokenizer, frozenset([2]), sampling, **options)
    found = []
    for token in ids:
        answer.add(token)
        found.append(answer.news())
        if answer.reason is not None:
            break
    assert "".join(found) == answer.text
    return found


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("strip", [False, True])
def test_the_pieces_are_the_text(tokenizer: Any, text: str, strip: bool) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, [*ids, 2], Sampling(100), strip=strip)
    assert "".join(found) == (text.strip() if strip else text)
    assert not any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("stop", [("is",), ("ver i", "blue"), ("r i",), ("iv", "r")])
def test_an_answer_ends_before_the_first_stop(tokenizer: Any, stop: tuple[str, ...]) -> None:
    text = "the red river is blue"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tokenizer, ids, Sampling(100, stop=stop))
    assert "".join(found) == text[: min(text.find(s) for s in stop if s in text)]


def test_the_beginning_of_a_stop_is_kept_back_until_it_is_none(tokenizer: Any) -> None:
    ids = tokenizer("a river stone", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tokenizer, [*ids, 2], Sampling(99, stop=("river cloud",)))) == (
        "a river stone"
    )
    ends = Answer(tokenizer, frozenset([2]), Sampling(len(ids) - 1, stop=("river stone",)))
    for token in ids[:-1]:
        ends.add(token)
    assert (ends.reason, ends.text) == ("length", tokenizer.decode(ids[:-1]))


def test_the_reason_is_the_end_or_the_length(tokenizer: Any) -> None:
    for ids, reason in (([5, 6, 2], "stop"), ([5, 6, 7], "length")):
        answer = Answer(tokenizer, frozenset([2]), Sampling(3))
        for token in ids:
            assert answer.reason is None
            answer.add(token)
        assert answer.reason == reason


def drawn(logits: list[float], count: int, **sampling: Any) -> collections.Counter[int]:
    answer = Answer(None, frozenset(), Sampling(10**9, **sampling))
    rows = torch.tensor([logits])
    return collections.Counter(choose(rows, [answer])[0] for _ in range(count))


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    logits = probabilities.log().tolist()
    counts = drawn(logits, 4000, temperature=1.0, seed=1)
    for token, p in enumerate(probabilities.tolist()):
        assert abs(counts[token] / 4000 - p) < 4 * (p * (1 - p) / 4000) ** 0.5
    # 0.6 and 0.25 are the fewest that reach .8, and keep their odds.
    nucleus = drawn(logits, 4000, temperature=1.0, top_p=0.8, seed=2)
    assert set(nucleus) == {1, 3}
    assert abs(nucleus[1] / 4000 - 0.6 / 0.85) < 0.03
    assert set(drawn(logits, 200, temperature=1.0, top_p=1e-9, seed=3)) == {1}
    for cold in (1e-4, 1e-308, 5e-324):
        assert set(drawn(logits, 200, temperature=cold, seed=4)) == {1}
    assert set(drawn(logits, 200, temperature=0.0, seed=5)) == {1}
    sharp = drawn(logits, 4000, temperature=0.5, seed=6)
    assert abs(sharp[1] / 4000 - 0.36 / (0.01 + 0.36 + 0.0025 + 0.0625)) < 0.03


def test_a_seed_decides_whatever_stands_beside_it() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))

    def answers(*seeds: int) -> list[list[int]]:
        made = [Answer(None, frozenset(), Sampling(99, 1.0, seed=seed)) for seed in seeds]
        return [choose(logits[: len(made)], made) for _ in range(20)]

    together, alone = answers(7, 8, 9), answers(7)
    assert [row[0] for row in together] == [row[0] for row in alone]
    assert answers(7, 8, 9) == together
    assert answers(1, 2, 3) != together
