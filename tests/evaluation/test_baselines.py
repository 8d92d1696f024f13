"""Baselines: the table of them, and that each predicts what it should."""

from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows
from support.models import QUIET, SUITE, declared, model_in

from lora_domains.data.source import Data
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.evaluation.baselines import BASELINES, SHOTS, BaselineInputs, baseline_scores
from lora_domains.evaluation.scorer import Scorer
from lora_domains.inference.scores import Scores
from lora_domains.model import DomainModel
from lora_domains.tasks import Chat, Classification, Generation


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("adapters"), tiny_base)


def scores_of(model: DomainModel, dataset: Dataset) -> dict[str, Scores]:
    return baseline_scores(Scorer(model.bank, QUIET), dataset, dataset.test)[0]


def test_the_table_holds_what_applies_to_the_task(model: DomainModel) -> None:
    few_shot = f"{SHOTS}_shot"
    rows = make_rows(100)
    labels = model.dataset(declared(rows))
    assert list(scores_of(model, labels)) == ["majority", "tfidf", few_shot]
    head = model.dataset(declared(rows, "headed", Classification(positive="spam", head=True)))
    assert list(scores_of(model, head)) == ["base", "majority", "tfidf"]
    text = Generation(text="text", answer="label", max_new_tokens=2)
    assert list(scores_of(model, model.dataset(declared(rows, "text", text)))) == [
        "nearest", few_shot
    ]  # fmt: skip
    chats = [{"prompt": row["text"], "completion": row["label"]} for row in rows[:60]]
    for generate in (True, False):
        chat = Chat(user="prompt", assistant="completion", max_new_tokens=2, generate=generate)
        dataset = model.dataset(declared(chats, f"chat-{generate}", chat))
        assert ("nearest" in scores_of(model, dataset)) == generate


def test_the_nearest_answer_is_that_of_the_most_similar_training_prompt(
    model: DomainModel,
) -> None:
    """Each test prompt is one of the training with another last word, and has its answer."""
    topics = ["engine oil", "blue river", "red stone", "wheat flour", "piano keys", "tax form"]
    rows = [
        {"question": f"what is {topic} {n}", "answer": f"it is {topic.split()[0]}"}
        for topic in topics for n in ("now", "then", "here", "there")
    ]  # fmt: skip
    train, test = [row for n, row in enumerate(rows) if n % 4], rows[::4]
    domain = Domain("nearest", Generation(max_new_tokens=2), Data(train, train[:3], test))
    scores = scores_of(model, model.dataset(domain))["nearest"]
    assert [(score["exact"], score["text"]) for score in scores] == [
        (1.0, row["answer"]) for row in test
    ]
    assert all(not {"nats", "tokens"} & score.keys() for score in scores)


def test_majority_and_tfidf_predict_by_the_training_rows(model: DomainModel) -> None:
    dataset = model.dataset(declared(make_rows(200), "larger"))
    scores = scores_of(model, dataset)
    counts = np.bincount([example.target for example in dataset.prepared.train])
    assert {score["prediction"] for score in scores["majority"]} == {int(counts.argmax())}
    shares = (counts + 1) / (counts + 1).sum()
    assert scores["majority"][0]["confidence"] == pytest.approx(shares.max())
    truth = [row.example.target for row in dataset.test]
    correct = [s["prediction"] == t for s, t in zip(scores["tfidf"], truth, strict=True)]
    assert sum(correct) / len(correct) > 0.8  # the label follows from one word


@pytest.mark.slow
def test_a_new_baseline_is_one_entry_of_the_table(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always_first(setting: BaselineInputs) -> Scores | None:
        return setting.records(np.tile(np.log([0.9, 0.1]), (len(setting.rows), 1)))

    monkeypatch.setitem(BASELINES, "first", always_first)
    model = model_in(tmp_path, tiny_base)
    domain = declared(make_rows(100), epochs=1, retention="none")
    model.fit(domain)
    entry = model.evaluate(domain, suite=SUITE).entry
    assert 0 < entry.domain_scores["accuracy"]["baselines"]["first"] < 1
    report = model.benchmark(SUITE, [domain], tmp_path / "reports").report
    values = report.adapters[0].domain_scores["accuracy"]["baselines"]
    assert values == entry.domain_scores["accuracy"]["baselines"]
