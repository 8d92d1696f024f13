"""Linear classifiers of the baselines, their strength chosen on validation rows. No torch.

``tfidf_features`` turns texts into TF-IDF of words and characters; ``predict`` fits classifiers of
every strength and gives the log-probabilities of the best; ``nearest`` finds the most similar text.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

STRENGTHS = (0.1, 0.3, 1.0, 3.0, 10.0)
"""Inverse regularisation strengths (C) that compete."""
CHARACTERS = 5_000_000
"""Training texts of more characters than this in all are read by words alone: character n-grams
take seconds for every million."""
FOLDS = 3
"""Parts of the training rows that stand in for absent validation rows, each in turn."""
LEAST = 1e-9
"""The smallest probability, and that of a label without a training row."""

Features = Any
"""A matrix (rows, features), dense or sparse."""
Decisions = NDArray[np.float64]
"""Decision values or log-probabilities (rows, labels)."""
Score = Callable[[Decisions, Any], float]
"""How well log-probabilities, log-odds or numbers predict the targets; the highest is the best."""
Decide = Callable[[Features], Decisions]
"""A fitted classifier or regression."""
Judged = tuple[tuple[float, float], Callable[[Decisions], Decisions]]
"""By what strengths compete, and what becomes of the decision values of the best."""


class Split(NamedTuple):
    """Features and targets of some rows."""

    features: Features
    targets: Any
    """The number of each row's label, 1 or 0 for each label of each row, or a number, (rows, k)."""


def tfidf_features(train: Sequence[str], *others: Sequence[str]) -> list[Features]:
    """TF-IDF of the texts, fitted to ``train``: words, word pairs, and 1 to 4 characters.

    Characters keep their case and cross the borders of words, so that capitals, numbers, endings
    and misspellings count.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    parts = []
    if words := any(re.search(r"\b\w\w+\b", text) for text in train):
        parts.append(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True))
    if sum(map(len, train)) <= CHARACTERS or not words:
        characters = {"analyzer": "char", "ngram_range": (1, 4), "lowercase": False}
        parts.append(TfidfVectorizer(**characters, sublinear_tf=True))
    vectors = make_union(*parts)
    fitted = vectors.fit_transform(train).tocsr()
    # scikit-learn refuses to transform no text at all.
    return [fitted, *(vectors.transform(texts) if texts else fitted[:0] for texts in others)]


def nearest(train: Sequence[str], texts: Sequence[str]) -> list[int]:
    """For each of ``texts``, the number of the most similar one of ``train``, the first of equals.

    By the cosine of their ``tfidf_features``.
    """
    from sklearn.neighbors import NearestNeighbors

    fitted, features = tfidf_features(train, texts)
    found = NearestNeighbors(n_neighbors=1, metric="cosine", algorithm="brute").fit(fitted)
    numbers: list[int] = found.kneighbors(features, return_distance=False)[:, 0].tolist()
    return numbers


def support_vectors(strength: float) -> Any:
    """A linear support vector machine, for sparse features."""
    from sklearn.svm import LinearSVC

    # Up to three times as fast as with the default tolerance, and as accurate to .001.
    return LinearSVC(C=strength, tol=0.1, random_state=0)


def sparse_logistic_regression(strength: float) -> Any:
    """Logistic regression for sparse features."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=10 * strength, solver="liblinear", random_state=0)


def predict(
    classifier: Callable[[float], Any], train: Split, validation: Split, rows: Features,
    labels: int, score: Score,
) -> Decisions:  # fmt: skip
    """Log-probabilities (rows, labels) by the classifier of the best strength.

    The best has the highest ``score`` on the validation rows; of several the one with the lowest
    cross-entropy, since few rows do not tell strengths apart. Without validation rows, training
    rows are left out in turn. Probabilities are the softmax of the decision values after
    ``temperature``.
    """

    def fitted(strength: float, part: Split) -> Decide:
        return _fitted(classifier(strength), part, labels)

    def judged(held_out: Decisions, targets: Sequence[int]) -> Judged:
        factor, nats = temperature(held_out, targets)
        rank = score(log_softmax(factor * held_out), targets), -nats
        return rank, lambda decisions: log_softmax(factor * decisions)

    return _of_best_strength(fitted, train, validation, rows, judged)


def sparse_ridge(strength: float) -> Any:
    """Linear regression with a penalty, for sparse features."""
    from sklearn.linear_model import Ridge

    return Ridge(alpha=1 / strength, solver="sparse_cg", tol=1e-4, random_state=0)


def predict_number(
    regression: Callable[[float], Any], train: Split, validation: Split, rows: Features,
    score: Score,
) -> Decisions:  # fmt: skip
    """A number (rows, 1) by the regression of the strength with the best ``score``, as ``predict``.

    ``targets`` of the splits are numbers, (rows, 1).
    """

    def fitted(strength: float, part: Split) -> Decide:
        model = regression(strength).fit(part.features, part.targets[:, 0])
        return lambda features: np.asarray(model.predict(features))[:, None]

    def judged(numbers: Decisions, truth: Decisions) -> Judged:
        return (score(numbers, truth), 0.0), _as_they_are

    return _of_best_strength(fitted, train, validation, rows, judged)


def predict_labels(
    classifier: Callable[[float], Any], train: Split, validation: Split, rows: Features,
    score: Score,
) -> Decisions:  # fmt: skip
    """The log-odds (rows, labels) of each label for itself, by one classifier for each.

    ``targets`` of the splits are 1 or 0 for each label. All labels share the strength with the best
    ``score``, as in ``predict``. A label that all training rows have, or none, keeps its odds.
    """

    def fitted(strength: float, part: Split) -> Decide:
        return _fitted_labels(classifier, strength, part)

    def judged(odds: Decisions, truth: Decisions) -> Judged:
        nats = float(np.logaddexp(0, np.where(truth > 0, -odds, odds)).sum())
        return (score(odds, truth), -nats), _as_they_are

    return _of_best_strength(fitted, train, validation, rows, judged)


def _of_best_strength(
    fitted: Callable[[float, Split], Decide], train: Split, validation: Split, rows: Features,
    judged: Callable[[Decisions, Any], Judged],
) -> Decisions:  # fmt: skip
    """What the model of the strength that ranks highest decides on ``rows``.

    ``judged`` ranks decision values of the validation rows; without any, those of training rows by
    models that were fitted without them.
    """
    best, chosen = (-math.inf, -math.inf), np.zeros((0, 0))
    for strength in STRENGTHS:
        decide = fitted(strength, train)
        if len(validation.targets):
            held_out, targets = decide(validation.features), validation.targets
        else:
            held_out, targets = _left_out(partial(fitted, strength), train), train.targets
        rank, finished = judged(held_out, targets)
        if rank > best:
            best, chosen = rank, finished(decide(rows))
    return chosen


def _as_they_are(decisions: Decisions) -> Decisions:
    return decisions


def _left_out(fitted: Callable[[Split], Decide], train: Split) -> Decisions:
    """Decision values of every training row by a model that was fitted without it."""
    targets = np.asarray(train.targets)
    folds = np.random.default_rng(0).permutation(len(targets)) % FOLDS
    parts = []
    for fold in range(FOLDS):
        decide = fitted(Split(train.features[folds != fold], targets[folds != fold]))
        parts.append(decide(train.features[folds == fold]))
    # From the order of the folds back to that of the rows.
    return np.concatenate(parts)[np.argsort(np.argsort(folds, kind="stable"))]


def _fitted_labels(classifier: Callable[[float], Any], strength: float, rows: Split) -> Decide:
    truth = np.asarray(rows.targets)
    models: list[Any] = []
    for label in truth.T:
        share = (label.sum() + 1) / (len(label) + 2)
        if not 0 < label.sum() < len(label):
            models.append(math.log(share / (1 - share)))
            continue
        models.append(classifier(strength))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*failed to converge")
            models[-1].fit(rows.features, label)

    def decide(features: Features) -> Decisions:
        odds = [np.full(features.shape[0], model) if isinstance(model, float)
                else model.decision_function(features) for model in models]  # fmt: skip
        return np.stack(odds, axis=1)

    return decide


def _fitted(model: Any, rows: Split, labels: int) -> Decide:
    """The decision values of ``model`` after a fit to ``rows``; -inf for labels without a row."""
    present = sorted(set(rows.targets))
    if len(present) > 1:
        with warnings.catch_warnings():
            # scikit-learn warns that many classes in few rows may be numbers; they are labels.
            warnings.filterwarnings("ignore", message="The number of unique classes")
            # A fit that did not converge competes on validation rows all the same.
            warnings.filterwarnings("ignore", message=".*failed to converge")
            model.fit(rows.features, rows.targets)

    def decide(features: Features) -> Decisions:
        values = np.zeros((features.shape[0], 1))
        if len(present) > 1:
            values = model.decision_function(features)
        if values.ndim == 1:  # of two labels: the margin of the second
            values = np.stack([-values / 2, values / 2], axis=1)
        decisions = np.full((len(values), labels), -np.inf)
        decisions[:, present] = values
        return decisions

    return decide


def temperature(decisions: Decisions, targets: Sequence[int]) -> tuple[float, float]:
    """The factor of the decision values that fits their softmax to the targets, and its nats.

    Temperature scaling (Guo et al. 2017, ICML). One row in n + 2 counts as wrong, as in Platt
    (1999), so that few rows that are all right do not end in certainty.
    """
    from scipy.optimize import minimize_scalar

    rows, labels = decisions.shape
    truth = np.full((rows, labels), 1 / (rows + 2) / (labels - 1))
    truth[np.arange(rows), np.asarray(targets)] = (rows + 1) / (rows + 2)

    def nats(log_factor: float) -> float:
        return -float((truth * log_softmax(math.exp(log_factor) * decisions)).sum(axis=1).mean())

    found = minimize_scalar(nats, bounds=(-4.0, 6.0), method="bounded")
    return math.exp(float(found.x)), float(found.fun)


def log_softmax(decisions: Decisions) -> Decisions:
    """Log-probabilities (rows, labels) of decision values; none below that of ``LEAST``."""
    from scipy.special import log_softmax as unbounded

    logs: Decisions = np.maximum(unbounded(decisions, axis=1), math.log(LEAST))
    return logs
