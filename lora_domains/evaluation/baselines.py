"""Baselines: predictions for the same rows without an adapter. ``BASELINES`` lists them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lora_domains.data.tokenization import EncodedRow, Tokenization
from lora_domains.dataset import Dataset
from lora_domains.errors import DataError
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.inference.likelihoods import text_features
from lora_domains.inference.scores import Scores, class_score

SHOTS = 4
"""Examples in the prompt of the few-shot baseline."""
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
"""Inverse regularisation strengths (C) tried for logistic regression on frozen features."""


@dataclass(frozen=True)
class BaselineInputs:
    """What a baseline is computed from: a dataset, the rows to predict, and the scorer."""

    scorer: Scorer
    dataset: Dataset
    rows: Sequence[EncodedRow]

    @property
    def labels(self) -> int:
        """Number of labels that all rows share; 0 for tasks without such labels."""
        return len(self.dataset.domain.task.labels or ())

    def records(self, log_shares: np.ndarray) -> Scores:
        """Score records from the log-probabilities of the labels, (rows, labels)."""
        positive = self.dataset.domain.task.positive_index
        return [class_score(row, example.target, positive)
                for row, (example, _) in zip(log_shares, self.rows, strict=True)]  # fmt: skip


Baseline = Callable[[BaselineInputs], Scores | None]
"""The records of ``BaselineInputs.rows``; None where the baseline does not apply."""


def baseline_scores(
    scorer: Scorer, dataset: Dataset, rows: Sequence[EncodedRow]
) -> dict[str, Scores]:
    """The records of every baseline that applies to ``rows``, by its name."""
    setting = BaselineInputs(scorer, dataset, rows)
    tried = {name: baseline(setting) for name, baseline in BASELINES.items()}
    return {name: scores for name, scores in tried.items() if scores is not None}


# ── Without the base ────────────────────────────────────────────────────────────────────────────


def majority(setting: BaselineInputs) -> Scores | None:
    """The most common training label; probabilities are the labels' shares, each count plus one."""
    if not setting.labels:
        return None
    counts = np.ones(setting.labels)
    for example in setting.dataset.prepared.train:
        counts[example.target] += 1
    shares = np.log(counts / counts.sum())
    return setting.records(np.tile(shares, (len(setting.rows), 1)))


def tfidf(setting: BaselineInputs) -> Scores | None:
    """TF-IDF over words and word pairs with logistic regression (scikit-learn, C = 10)."""
    if not setting.labels:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    train = setting.dataset.prepared.train
    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    with warnings.catch_warnings():
        # scikit-learn warns that many classes in few rows may be numbers; they are labels.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        model.fit(vectors.fit_transform([e.prompt for e in train]), [e.target for e in train])
    probabilities = model.predict_proba(vectors.transform([e.prompt for e, _ in setting.rows]))
    return setting.records(_log_shares(probabilities, model.classes_, setting.labels))


def _log_shares(probabilities: np.ndarray, columns: np.ndarray, labels: int) -> np.ndarray:
    """Log-probabilities (rows, labels); a label without a training row has a share of 1e-9."""
    shares = np.full((len(probabilities), labels), 1e-9)
    shares[:, columns] = np.clip(probabilities, 1e-9, 1.0)
    logs: np.ndarray = np.log(shares)
    return logs


# ── The base with frozen weights ────────────────────────────────────────────────────────────────


def frozen_features(setting: BaselineInputs) -> Scores | None:
    """Logistic regression on the base's frozen features, where the adapter has a head.

    A linear probe (Alain & Bengio 2016) on the rows, prompt and position that the head reads. Its
    strength C is the best on the validation rows. It takes the place of the base, which has no head
    of its own.
    """
    dataset, bank = setting.dataset, setting.scorer.bank
    if not dataset.tokenization.head:
        return None
    splits = (dataset.train, dataset.validation, setting.rows)
    total = sum(map(len, splits))
    with bank.routed(None), setting.scorer.display.progress("frozen features", total) as advance:
        train, validation, read = (
            text_features(
                bank.base.model, [row.encoded for row in rows],
                bank.base.pad, advance,
            ).numpy()
            for rows in splits
        )  # fmt: skip
    targets = [row.example.target for row in dataset.train]
    truth = np.array([row.example.target for row in dataset.validation])

    def predicted(strength: float) -> tuple[float, np.ndarray]:
        """Cross-entropy on the validation rows, and the log-probabilities of the others."""
        probe = _logistic_regression(train, targets, strength)
        classes = probe[-1].classes_
        chosen_by, shares = (_log_shares(probe.predict_proba(x), classes, setting.labels)
                             for x in (validation, read))  # fmt: skip
        return float(-chosen_by[np.arange(len(truth)), truth].mean()), shares

    return setting.records(min(map(predicted, STRENGTHS), key=lambda pair: pair[0])[1])


def _logistic_regression(features: np.ndarray, targets: Sequence[int], strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The number of unique classes")
        # A fit that has not converged after 300 iterations competes on validation rows as well.
        warnings.filterwarnings("ignore", message="lbfgs failed to converge")
        probe.fit(features, targets)
    return probe


def few_shot(setting: BaselineInputs) -> Scores | None:
    """The base with ``SHOTS`` answered training rows in its prompt."""
    dataset = setting.dataset
    prompted = with_shots(dataset, setting.rows, setting.scorer.display.warn)
    if not prompted:
        return None
    name = f"{dataset.domain.name} rows with {SHOTS} examples"
    return setting.scorer.scores(Part(name, dataset.domain.task, prompted), [None])[None]


BASELINES: dict[str, Baseline] = {
    "base": frozen_features,
    "majority": majority,
    "tfidf": tfidf,
    f"{SHOTS}_shot": few_shot,
}
"""Every baseline by the name that reports use. ``base`` stands for the base where the base has no
scores of its own, because the adapter has a head."""


# ── Few-shot prompts ────────────────────────────────────────────────────────────────────────────


def with_shots(
    dataset: Dataset, rows: Sequence[EncodedRow], warn: Callable[[str], None]
) -> list[EncodedRow]:
    """``rows`` encoded with answered training rows before them; empty where one has no room.

    All rows or none are encoded, because contenders are compared on the same rows; a warning says
    where examples displace text. None are for plain text, which has no answers to show, and for a
    head, which reads one text.
    """
    tokenization = dataset.tokenization
    applies = rows[0].example.prompt and not tokenization.head
    ids = _shots(dataset, warn) if applies else []
    if not ids:
        return []
    try:
        prompted = [tokenization.encode_again(row, ids) for row in rows]
    except DataError:
        warn(
            f"the base with {SHOTS} examples in its prompt is not measured: in a context of "
            f"{tokenization.max_length} tokens some rows leave no room for the examples."
        )
        return []
    pairs = zip(prompted, rows, strict=True)
    cut = sum(len(p.prompt) - len(ids) < len(row.encoded.prompt) for p, row in pairs)
    if cut:
        warn(
            f"the base with {SHOTS} examples in its prompt reads a shorter text in {cut} of "
            f"{len(rows)} rows: the examples take room in its {tokenization.max_length} tokens."
        )
    return [EncodedRow(row.example, encoded) for row, encoded in zip(rows, prompted, strict=True)]


def _shots(dataset: Dataset, warn: Callable[[str], None]) -> list[int]:
    """Token ids of ``SHOTS`` answered training rows, of as many labels as possible.

    A row whose answer does not fit its share of the context is left out with a warning; a long
    prompt loses its middle.
    """
    tokenization = dataset.tokenization
    short = Tokenization(tokenization.tokenizer, tokenization.max_length // (SHOTS + 2))
    gap = tokenization.tokens("\n\n")
    ids: list[int] = []
    left_out = 0
    for row in _examples(dataset.train, dataset.domain.training.seed):
        try:
            encoded = short.encode_again(row)
            ids += [*encoded.prompt[len(short.bos) :], *encoded.answer[:-1], *gap]
        except DataError:
            left_out += 1
    if left_out:
        warn(
            f"{left_out} of the {SHOTS} examples for the base's prompt are left out: their answers "
            f"do not fit their share of {tokenization.max_length} tokens."
        )
    return ids


def _examples(train: Sequence[EncodedRow], seed: int) -> list[EncodedRow]:
    """``SHOTS`` training rows drawn by ``seed``, one of each label in turn."""
    random = np.random.default_rng([seed, SHOTS])
    by_label: dict[int, list[EncodedRow]] = {}
    for i in random.permutation(len(train)):
        by_label.setdefault(train[i].example.target, []).append(train[i])
    labels = sorted(by_label)
    random.shuffle(labels)
    picked: list[EncodedRow] = []
    while len(picked) < min(SHOTS, len(train)):
        for label in labels:
            if by_label[label] and len(picked) < SHOTS:
                picked.append(by_label[label].pop())
    return picked
