"""Datasets: rows counted, and each row tokenised and normalised once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import SUITE, declared, model_in

from lora_domains.data.identity import normalise
from lora_domains.data.source import Data


def test_row_counts_add_up(tiny_base: Path, tmp_path: Path) -> None:
    rows = make_rows(100)
    train = [*rows[:60], rows[0], *rows[80:85], {"text": "red " * 200, "label": "ham"}]
    data = Data(train, rows[60:80], rows[80:], drop_leaks=True)
    made = replace(declared(rows, epochs=1), data=data)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(made)
    ledger = card.adapter.ledger
    dataset = model.dataset("spam")
    assert ledger["read"] == len(train) + 20 + 20
    assert ledger["refused"] == 5
    assert ledger["duplicates"] == 1
    assert ledger["truncated"] == 1
    assert ledger["masked"] == 0
    assert len(dataset.train) == len(train) - 5
    assert ledger["supervised_tokens"] == sum(len(row.encoded.answer) for row in dataset.train)
    kept = {
        e.id for part in ("train", "validation", "test") for e in getattr(dataset.prepared, part)
    }
    assert len(kept) == ledger["read"] - ledger["refused"]


def test_each_row_is_tokenised_once_from_fit_to_verdict(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(100)
    made = declared(rows, epochs=2)
    model = model_in(tmp_path, tiny_base)
    prompts = {f"text: {row['text']}\nlabel:" for row in rows}
    counted: Counter[str] = Counter()
    plain = type(model.tokenizer).__call__

    def counting(tokenizer: Any, text: Any, *args: Any, **options: Any) -> Any:
        counted.update([text] if isinstance(text, str) else text)
        return plain(tokenizer, text, *args, **options)

    monkeypatch.setattr(type(model.tokenizer), "__call__", counting)
    model.fit(made)
    model.evaluate(made, suite=SUITE)
    assert {prompt: counted[prompt] for prompt in prompts} == dict.fromkeys(prompts, 1)


def test_each_row_is_normalised_once_in_each_search_for_leaks(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One search among the rows, and one in all that training may read."""
    made = declared(make_rows(100), epochs=1)
    counted: Counter[str] = Counter()

    def counting(text: str) -> str:
        counted[text] += 1
        return normalise(text)

    monkeypatch.setattr("lora_domains.data.identity.normalise", counting)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    assert set(counted.values()) == {1}
    model.evaluate(made, suite=SUITE)
    assert set(counted.values()) == {1, 2}


def test_general_text_is_normalised_once_beside_the_rows(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(100)
    made = declared(rows, epochs=1)
    texts = [{"text": f"river {n} of a cloud"} for n in range(30)]
    made = replace(made, data=replace(made.data, general=texts))
    counted: Counter[str] = Counter()

    def counting(text: str) -> str:
        counted[text] += 1
        return normalise(text)

    monkeypatch.setattr("lora_domains.data.identity.normalise", counting)
    model_in(tmp_path, tiny_base).dataset(made)
    assert {text["text"] for text in texts} <= counted.keys()
    assert set(counted.values()) == {1}
