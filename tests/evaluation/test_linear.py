"""The linear classifiers of the baselines: how strong, how their strength is chosen, how fast."""

import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score, log_loss
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import normalize
from sklearn.svm import LinearSVC

from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.source import Data
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.evaluation import linear
from lora_domains.evaluation.baselines import BaselineInputs, tfidf
from lora_domains.evaluation.linear import (
    STRENGTHS,
    Split,
    log_softmax,
    nearest,
    predict,
    predict_labels,
    sparse_logistic_regression,
    temperature,
    tfidf_features,
)
from lora_domains.probes.features import logistic_regression
from lora_domains.tasks import Classification
from lora_domains.tokenization.encoded import EncodedRow
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable

LABELS = 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "positive", "metric", "least"),
    [("sms_spam", "spam", "f1", 0.9365),
     pytest.param("twitter_financial_news", None, "macro_f1", 0.769, marks=pytest.mark.long),
     pytest.param("banking77", None, "accuracy", 0.894, marks=pytest.mark.long)],
)  # fmt: skip
def test_tfidf_reaches_what_its_users_would_on_public_data(
    real_data: Path, name: str, positive: str | None, metric: str, least: float
) -> None:
    folder = real_data / name
    data = Data(folder / "train.jsonl", test=folder / "test.jsonl", drop_leaks=True)
    prepared = prepare(Classification(text="text", label="label", positive=positive), data)
    domain = Domain("real", prepared.task, data)
    dataset = Dataset(domain, prepared, cast(Any, None), [], [], [], cast(Any, None))
    rows = [EncodedRow(example, cast(Any, None)) for example in prepared.test]
    begin = time.process_time()
    records = tfidf(BaselineInputs(cast(Any, None), dataset, rows))
    middle = time.process_time()
    assert records is not None
    usual_fit(prepared)
    end = time.process_time()
    # Of the time that one fit takes here: seconds depend on what else the machine does.
    assert middle - begin < 2 * len(linear.STRENGTHS) * (end - middle)
    items = ScoreTable({"target": row.example.target, "scores": {"tfidf": record}}
                       for row, record in zip(rows, records, strict=True))  # fmt: skip
    value = METRICS[metric].value(items, "tfidf", prepared.task.positive_index)
    assert value is not None
    assert value >= least
    # The probabilities are worth something: near the accuracy on average.
    confidence = items.column("tfidf", "confidence").mean()
    accuracy = METRICS["accuracy"].value(items, "tfidf")
    assert confidence == pytest.approx(accuracy, abs=0.05)


def usual_fit(prepared: Prepared) -> None:
    """A linear support vector machine of one strength on words and characters, and its answers."""
    texts = {split: [row.text or row.prompt for row in getattr(prepared, split)]
             for split in ("train", "test")}  # fmt: skip
    vectors = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
    )
    model = make_pipeline(vectors, LinearSVC())
    model.fit(texts["train"], [row.target for row in prepared.train]).predict(texts["test"])


def rows_of(n: int, noise: float, seed: int) -> Split:
    """Features (n, 30) of which the first ``LABELS`` tell the class, through ``noise``."""
    random = np.random.default_rng(seed)
    targets = random.integers(0, LABELS, n)
    features = noise * random.normal(size=(n, 30))
    features[np.arange(n), targets] += 1
    return Split(features, targets.tolist())


def accuracy(shares: np.ndarray, targets: list[int]) -> float:
    return float((shares.argmax(axis=1) == targets).mean())


@pytest.mark.parametrize("validation", [rows_of(200, 1.0, 1), rows_of(0, 1.0, 1)])
def test_the_strength_is_the_best_of_validation_rows_or_of_rows_left_out(
    validation: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, test = rows_of(150, 1.0, 0), rows_of(2000, 1.0, 2)
    reached = {}
    every = (0.0001, 0.01, 1.0, 100.0)
    for strengths in (*((one,) for one in every), every):
        monkeypatch.setattr(linear, "STRENGTHS", strengths)
        shares = predict(logistic_regression, train, validation, test.features, LABELS, accuracy)
        reached[strengths] = accuracy(shares, test.targets)
    alone = [reached[one,] for one in every]
    assert max(alone) - min(alone) > 0.04  # the choice matters
    assert reached[every] >= max(alone) - 0.015


def test_ties_of_the_metric_are_broken_by_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    train, validation = rows_of(300, 0.8, 0), rows_of(300, 0.8, 1)
    losses = {}
    for strengths in ((0.0001,), (0.1,), (0.0001, 0.1)):
        monkeypatch.setattr(linear, "STRENGTHS", strengths)
        shares = predict(
            logistic_regression, train, validation, validation.features, LABELS,
            lambda shares, targets: 1.0,
        )  # fmt: skip
        losses[strengths] = log_loss(validation.targets, np.exp(shares))
    assert losses[0.0001, 0.1] == min(losses.values()) < losses[0.0001,]


def test_temperature_makes_probabilities_fit_the_validation_rows() -> None:
    random = np.random.default_rng(0)
    true = random.normal(0, 2, (4000, LABELS))
    targets = [int(random.choice(LABELS, p=np.exp(row))) for row in log_softmax(true)]
    factor, nats = temperature(true / 5, targets)
    assert factor == pytest.approx(5, rel=0.1)
    assert nats == pytest.approx(
        log_loss(targets, np.exp(log_softmax(factor * true / 5))), abs=0.01
    )
    # A few rows that are all right are no certainty: about 1 of n + 2 is left to be wrong.
    separable = np.eye(LABELS)[np.arange(20) % LABELS]
    factor, _ = temperature(separable, (np.arange(20) % LABELS).tolist())
    assert np.exp(log_softmax(factor * separable)).max() == pytest.approx(21 / 22, abs=0.005)


@pytest.mark.parametrize("targets", [[0, 2] * 20, [2] * 40])
def test_a_label_without_a_training_row_is_the_least_probable(targets: list[int]) -> None:
    features = rows_of(40, 1.0, 0).features
    validation = rows_of(30, 1.0, 1)
    shares = predict(
        linear.support_vectors, Split(features, targets), validation, features, LABELS, accuracy
    )
    assert shares.shape == (40, LABELS)
    assert (np.exp(shares[:, [1, 3]]) <= linear.LEAST * 1.001).all()
    assert np.exp(shares).sum(axis=1) == pytest.approx(np.ones(40), abs=1e-6)


def test_long_texts_are_read_by_words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["one two three", "four five six"]
    both = linear.tfidf_features(texts, texts[:1], [])
    assert [part.shape[0] for part in both] == [2, 1, 0]
    monkeypatch.setattr(linear, "CHARACTERS", 20)
    words = linear.tfidf_features(texts)[0]
    assert words.shape == (2, 10)
    assert both[0].shape[1] > 50


def test_the_nearest_text_is_found_by_cosine() -> None:
    """Equal to the largest product of unit vectors, over words and characters."""
    random = np.random.default_rng(1)
    words = ["red", "stone", "blue", "river", "x1", "7"]
    train, texts = ([" ".join(random.choice(words, 4)) for _ in range(n)] for n in (40, 15))
    fitted, features = tfidf_features(train, texts)
    similar = normalize(features) @ normalize(fitted).T
    found = nearest(train, texts)
    for row, at in enumerate(found):
        assert similar[row, at] == pytest.approx(similar[row].max())
    assert nearest(["a", "b c", "b"], ["b", "a!"]) == [2, 0]  # no words of two letters


def test_each_label_has_a_classifier_and_all_share_a_strength() -> None:
    random = np.random.default_rng(0)
    features = random.normal(size=(120, 6))
    truth = (features[:, :3] + 0.5 * random.normal(size=(120, 3)) > 0.5).astype(int)
    truth = np.column_stack([truth, np.zeros(120, int)])  # and a label that no row has
    train, validation = (Split(features[a], truth[a]) for a in (slice(80), slice(80, 120)))
    scored: list[float] = []

    def score(odds: np.ndarray, labels: np.ndarray) -> float:
        scored.append(float(f1_score(labels, odds > 0, average="micro", zero_division=0)))
        return scored[-1]

    found = predict_labels(sparse_logistic_regression, train, validation, features[80:], score)
    best = STRENGTHS[int(np.argmax(scored))]
    expected = OneVsRestClassifier(sparse_logistic_regression(best))
    expected.fit(features[:80], truth[:80, :3])
    assert found[:, :3] == pytest.approx(expected.decision_function(features[80:]))
    assert found[:, 3] == pytest.approx(np.log(1 / 81))  # one in n + 2, as of any share
    assert max(scored) > 0.7
    without = predict_labels(
        sparse_logistic_regression, train, Split(features[:0], truth[:0]), features[80:], score
    )
    assert without.shape == (40, 4)
