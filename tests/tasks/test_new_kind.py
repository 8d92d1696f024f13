"""A kind of task costs one file: this one declares one, and the package does the rest."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import make_rows
from support.models import SUITE, declared, model_in

from lora_domains.errors import DataError
from lora_domains.inference.predict import Prediction
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild
from lora_domains.tasks import KINDS, Example, Row, Task, fill, register, text_of

WORDS = ("stone", "cloud", "river")


@dataclass(frozen=True)
class Stars(Task):
    """Texts rated with one to three stars; a rating is scored by its word."""

    text: str = "text"
    rating: str = "stars"

    kind = "stars"
    loss_unit = "label cross-entropy"
    scored_by = "choices"
    has_labels = True
    metric = "accuracy"
    labels = ("1", "2", "3")
    label_texts = tuple(f" {word}" for word in WORDS)

    @property
    def template(self) -> str:
        return f"{{{self.text}}}\nstars:"

    @property
    def answer_column(self) -> str:
        return self.rating

    def example(self, row: Row) -> Example:
        rating = text_of(row, self.rating).strip()
        if rating not in self.labels:
            raise DataError(
                where=row.place, expected="1 to 3 stars", found="something else", hint="Correct it."
            )
        target, texts = self.labels.index(rating), self.label_texts
        prompt = fill(self.template, row)
        return Example(row.id, prompt, texts[target], texts, target, place=row.place)


@dataclass(frozen=True)
class StarsWithHead(Stars):
    """The same with a trained head. Neither it nor the labels are fields, so no card holds them."""

    kind = "stars_with_head"
    head = True


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    for kind in (Stars, StarsWithHead):
        register(kind)
    yield
    for kind in (Stars, StarsWithHead):
        del KINDS[kind.kind]


def test_a_new_kind_is_fitted_evaluated_rebuilt_and_predicts(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"text": row["text"], "stars": 1 + 2 * (row["label"] == "spam")}
            for row in make_rows(160)]  # fmt: skip
    domain = declared(rows, "ratings", Stars(), epochs=2)
    model = model_in(tmp_path, tiny_base)
    card = model.fit(domain)
    history = card.adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]

    entry = model.evaluate(domain, suite=SUITE).entry
    assert entry.judged["metric"] == "accuracy"
    assert entry.domain_scores.keys() >= {"accuracy", "macro_f1", "loss"}
    assert {"majority", "tfidf"} <= entry.domain_scores["accuracy"]["baselines"].keys()
    assert entry.confusion["labels"] == ["1", "2", "3"]
    assert rebuild(tmp_path / "ratings") == Card.read(tmp_path / "ratings")

    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter(tmp_path / "ratings")
    (answer,) = fresh.predict(rows[0]["text"], domain="ratings")
    assert isinstance(answer, Prediction)
    assert answer.probabilities.keys() == {"1", "2", "3"}


def test_a_new_kind_with_a_head_is_fitted_loaded_evaluated_and_continued(
    tiny_base: Path, tmp_path: Path
) -> None:
    rows = [{"text": row["text"], "stars": 1 + n % 3} for n, row in enumerate(make_rows(60))]
    domain = declared(rows, "ratings", StarsWithHead(), epochs=1, retention="none")
    model_in(tmp_path, tiny_base).fit(domain)
    assert "num_labels=3" in (tmp_path / "ratings" / "README.md").read_text()

    fresh = model_in(tmp_path, tiny_base)
    fresh.load_adapter(tmp_path / "ratings")
    (answer,) = fresh.predict(rows[0]["text"], domain="ratings")
    assert isinstance(answer, Prediction)
    assert answer.probabilities.keys() == {"1", "2", "3"}
    assert fresh.evaluate(domain, suite=SUITE).entry.confusion["labels"] == ["1", "2", "3"]
    fresh.fit(replace(domain, name="more"), init_from="ratings")
    head = fresh.bank["more"].head
    assert head is not None
    assert head.classes == 3


def test_an_unusable_row_of_a_new_kind_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    rows = [{"text": row["text"], "stars": 1 + n % 3} for n, row in enumerate(make_rows(60))]
    rows[7]["stars"] = 4
    with pytest.raises(DataError, match="1 to 3 stars"):
        model_in(tmp_path, tiny_base).fit(declared(rows, "ratings", Stars()))
