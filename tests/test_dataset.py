"""The rows of a domain as tokenised for a base: answers that do not fit, and rows read before."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.models import QUIET, declared

from lora_domains.data.prepare import prepare
from lora_domains.dataset import load_dataset
from lora_domains.domain import Domain
from lora_domains.errors import AnswerTooLong
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.tasks import Classification, Generation


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
@pytest.mark.parametrize("labels", [("card", "card arrival"), ("1", "10", "100")])
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
