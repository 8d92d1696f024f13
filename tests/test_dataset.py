"""Datasets: rows counted, and each row tokenised and normalised once."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import QUIET, SUITE, declared, model_in

from lora_domains.data.identity import normalise
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.dataset import load_dataset
from lora_domains.domain import Domain
from lora_domains.errors import AnswerTooLong
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.tasks import Classification, Generation


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
    """One search among the rows, and one in all that training may read.

    Training and validation rows are normalised once more for the digests in the card.
    """
    made = declared(make_rows(100), epochs=1)
    counted: Counter[str] = Counter()

    def counting(text: str) -> str:
        counted[text] += 1
        return normalise(text)

    monkeypatch.setattr("lora_domains.data.identity.normalise", counting)
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    fitted = dict(counted)
    assert set(fitted.values()) == {1, 2}
    model.evaluate(made, suite=SUITE)
    assert {counted[text] - fitted.get(text, 0) for text in counted} <= {0, 1}


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


# ── Rows that do not fit, and rows read before the base ─────────────────────────────────────────


def answered(long: tuple[int, ...]) -> Domain:
    rows = [{"question": row["text"], "answer": "red river " * (90 if n in long else 1)}
            for n, row in enumerate(make_rows(60))]  # fmt: skip
    return declared(rows, task=Generation())


def test_answers_that_do_not_fit_are_all_listed_or_dropped(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    domain = answered((3, 10, 45, 57))
    with pytest.raises(AnswerTooLong, match="4 rows, column 'answer'") as caught:
        load_dataset(domain, base, QUIET)
    for place in ("train rows in memory, index 3", "index 10", "validation rows in memory, index 3",
                  "test rows in memory, index 9"):  # fmt: skip
        assert place in caught.value.found
    dropped = load_dataset(replace(domain, data=replace(domain.data, drop_long=True)), base, QUIET)
    assert dropped.prepared.row_counts.too_long == 4
    assert [len(part) for part in (dropped.train, dropped.validation, dropped.test)] == [40, 5, 11]
    assert len(dropped.prepared.train) == 40


def test_rows_that_were_read_before_the_base_are_used(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, domain = load_base(tiny_base, device="cpu"), answered(())
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    calls: list[Any] = []

    def again(*arguments: Any) -> Any:
        calls.append(arguments)
        return prepare(*arguments)

    monkeypatch.setattr("lora_domains.dataset.prepare", again)
    dataset = load_dataset(domain, base, QUIET, prepared)
    assert dataset.prepared.train is prepared.train
    assert not calls
    load_dataset(replace(domain, training=replace(domain.training, seed=3)), base, QUIET, prepared)
    assert len(calls) == 1


def test_the_limit_of_a_row_is_the_context_of_the_base(tiny_base: Path) -> None:
    base, domain = load_base(tiny_base, device="cpu"), answered(())
    assert load_dataset(domain, base, QUIET).tokenization.max_length == 128
    short = replace(domain, training=replace(domain.training, max_length=40))
    assert load_dataset(short, base, QUIET).tokenization.max_length == 40


@pytest.mark.slow
@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize(
    "labels",
    [pytest.param(("card", "card arrival"), marks=pytest.mark.long), ("1", "10", "100")],
)
def test_labels_that_begin_one_another_train_and_predict(
    labels: tuple[str, ...], tmp_path: Path
) -> None:
    """On the embedded base: a random one gives each further token of a label 1 / vocabulary."""
    words = ("chest pain", "routine letter", "good service")
    rows = [{"text": f"{words[n % len(labels)]} number {n}", "label": labels[n % len(labels)]}
            for n in range(120)]  # fmt: skip
    model = DomainModel.from_pretrained(out=tmp_path, display=QUIET, device="cpu")
    domain = declared(rows, task=Classification(), epochs=6, lr=0.003, retention="none")
    model.fit(domain)
    found = model.predict([row["text"] for row in rows], domain="spam")
    right = sum(one.label == row["label"] for one, row in zip(found, rows, strict=True))  # type: ignore[union-attr]
    assert right >= 110
