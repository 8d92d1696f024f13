"""`evaluate.Metric` classes over scikit-learn, made directly: no loader, no network, no files.

Each is used like any metric of `evaluate`: `add_batch(predictions=…, references=…)` as often as
there are batches, then `compute()`; or `compute(predictions=…, references=…)` at once. `evaluate`
takes seconds to import and imports torch, so nothing that a card or a report needs imports this
file.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics

from lora_domains.stats.intervals import wilson

FloatArray = NDArray[np.float64]
CALIBRATION_BINS = 15


def label_losses(log_probabilities: ArrayLike, references: ArrayLike) -> FloatArray:
    """Cross-entropy of each item over the labels alone, in nats, shape (n,).

        loss = -log( p(reference) / sum over labels of p(label) )

    `log_probabilities`, shape (n, labels), need not sum to one: a language model also gives mass to
    what is no label, and dividing it out is what "renormalised" means. As in scikit-learn's
    log_loss no probability counts as less than the float64 epsilon, so one item costs at most 36.04
    nats and the mean stays finite.

    Raises ValueError when the shapes do not fit, a reference is no label number, or an item has no
    finite value.
    """
    log_shares, labels = _label_shares(log_probabilities, references)
    chosen = log_shares[np.arange(len(labels)), labels]
    return -np.clip(chosen, np.log(np.finfo(np.float64).eps), 0.0)


def expected_calibration_error(
    confidences: ArrayLike, correct: ArrayLike, bins: int = CALIBRATION_BINS
) -> float:
    """sum over bins of (share of items in it) x |accuracy - mean confidence|, in 0 … 1.

    Bins of equal width over (0, 1], as most published figures have it: Guo et al. (2017), On
    calibration of modern neural networks, ICML (15 bins); Naeini et al. (2015), AAAI. An item at an
    edge belongs to the lower bin. `confidences` and `correct` have shape (n,).

    Raises ValueError without items.
    """
    sure = np.asarray(confidences, dtype=np.float64)
    right = np.asarray(correct, dtype=np.float64)
    if not len(sure) or sure.shape != right.shape:
        raise ValueError(
            "expected_calibration_error expects one confidence and one outcome per item, at least "
            f"one item; found shapes {sure.shape} and {right.shape}."
        )
    inside = np.clip(np.ceil(sure * bins).astype(np.intp) - 1, 0, bins - 1)
    # Per bin |sum of (right - sure)| is its items times |accuracy - confidence|.
    return float(
        np.abs(np.bincount(inside, weights=right - sure, minlength=bins)).sum() / len(sure)
    )


class _InMemory(evaluate.Metric):
    """A metric that keeps its rows in memory and leaves the disk alone.

    `evaluate` would make a folder under the home folder and lock a file in it by experiment id, on
    which several ranks or two evaluations at once collide. Ranks gather their predictions first
    (Accelerate's `gather_for_metrics`); then each may hold its own metric. The random id keeps what
    `evaluate` derives from it apart all the same.
    """

    def __init__(self, **settings: Any) -> None:
        """Empty, in memory; `settings` go to `evaluate.Metric`."""
        # A fixed seed: with none, evaluate derives one from the state of numpy's global generator.
        super().__init__(keep_in_memory=True, experiment_id=uuid.uuid4().hex, seed=0, **settings)

    def _build_data_dir(self) -> str:
        return ""


class Classification(_InMemory):
    """Accuracy, macro and per-class precision, recall and F1, and the confusion matrix.

    `labels` are the names of the classes in the order of their numbers; `predictions` and
    `references` are those numbers. A prediction of -1 is an answer that named no class: wrong, and
    counted under `unanswered`. With `positive`, one of the labels, its precision, recall and F1 are
    also given at the top level.

    `compute()` returns n, accuracy, macro_precision, macro_recall, macro_f1, unanswered; per_class
    {label: precision, recall, f1, support, recall_lower}, the last a one-sided 95 % Wilson bound;
    confusion {labels, matrix}, a row for each reference and a column for each prediction. Macro
    means run over the labels that occur among the references, so that a class without a test row
    neither helps nor hurts. What has no denominator is 0.

    Raises ValueError when `positive` is not a label, or a number names none.
    """

    def __init__(self, labels: Sequence[str], positive: str | None = None) -> None:
        """`labels` in the order of their numbers, `positive` one of them."""
        if positive is not None and positive not in labels:
            raise ValueError(f"positive expects one of {list(labels)}; found {positive!r}.")
        self.labels = list(labels)
        self.positive = positive
        super().__init__()

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Accuracy, precision, recall, F1 and confusion over given labels.",
            citation="Pedregosa et al. (2011), Scikit-learn, JMLR 12:2825.",
            inputs_description="predictions, references: class numbers; -1 predicts no class.",
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike) -> dict[str, Any]:
        predicted, truth = np.asarray(predictions), np.asarray(references)
        count = len(self.labels)
        if not len(truth):
            raise ValueError("Classification expects at least one item; found none.")
        if truth.min() < 0 or max(truth.max(), predicted.max()) >= count or predicted.min() < -1:
            raise ValueError(
                f"Classification expects class numbers 0 to {count - 1}, or -1 for a prediction of "
                f"no class; found references {truth.min()} to {truth.max()}, "
                f"predictions {predicted.min()} to {predicted.max()}."
            )
        numbers = list(range(count))
        scores = np.stack(
            sklearn_metrics.precision_recall_fscore_support(
                truth, predicted, labels=numbers, zero_division=0
            )
        )
        support = scores[3].astype(int)
        matrix = sklearn_metrics.confusion_matrix(truth, predicted, labels=numbers)
        macro = scores[:3, support > 0].mean(axis=1)
        per_class = {
            label: {
                "precision": float(scores[0, i]),
                "recall": float(scores[1, i]),
                "f1": float(scores[2, i]),
                "support": int(support[i]),
                "recall_lower": wilson(int(matrix[i, i]), int(support[i])).lower,
            }
            for i, label in enumerate(self.labels)
        }
        found: dict[str, Any] = {
            "n": len(truth),
            "accuracy": float(sklearn_metrics.accuracy_score(truth, predicted)),
            "macro_precision": float(macro[0]),
            "macro_recall": float(macro[1]),
            "macro_f1": float(macro[2]),
            "unanswered": int((predicted < 0).sum()),
            "per_class": per_class,
            "confusion": {"labels": self.labels, "matrix": matrix.tolist()},
        }
        if self.positive is not None:
            found |= {key: per_class[self.positive][key] for key in ("precision", "recall", "f1")}
        return found


class LabelLoss(_InMemory):
    """Mean cross-entropy over the renormalised labels, in nats: a classification's "loss".

    `predictions` are log-probabilities of the labels, (n, labels); `references` their numbers.
    `compute()` returns label_loss and n; `label_losses` gives it item by item and says what it
    raises.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _probability_info("Mean cross-entropy over the renormalised labels, in nats.", "")

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike) -> dict[str, Any]:
        losses = label_losses(predictions, references)
        return {"label_loss": float(losses.mean()), "n": len(losses)}


class Calibration(_InMemory):
    """How far the label probabilities can be believed: `ece` and `brier`, 0 at best.

    `predictions` and `references` as for `LabelLoss`. ECE is of the most probable label, 15 bins of
    equal width (see `expected_calibration_error`). Brier is the mean over items of sum over labels
    of (p - [label is right])², in 0 … 2: Brier (1950), Monthly Weather Review 78:1, by
    scikit-learn's brier_score_loss(scale_by_half=False).

    `compute()` raises ValueError like `label_losses`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _probability_info(
            "Expected calibration error (15 equal-width bins) and multi-class Brier score.",
            "Guo et al. (2017), ICML; Brier (1950), Monthly Weather Review 78:1.",
        )

    def _compute(self, *, predictions: ArrayLike, references: ArrayLike) -> dict[str, Any]:
        log_shares, truth = _label_shares(predictions, references)
        shares = np.exp(log_shares)
        brier = sklearn_metrics.brier_score_loss(
            truth, shares, labels=list(range(shares.shape[1])), scale_by_half=False
        )
        ece = expected_calibration_error(shares.max(axis=1), shares.argmax(axis=1) == truth)
        return {"ece": ece, "brier": float(brier), "n": len(truth)}


def _probability_info(description: str, citation: str) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=citation,
        inputs_description="predictions: label log-probabilities; references: label numbers.",
        features=datasets.Features(
            {
                "predictions": datasets.Sequence(datasets.Value("float64")),
                "references": datasets.Value("int64"),
            }
        ),
    )


def _label_shares(
    log_probabilities: ArrayLike, references: ArrayLike
) -> tuple[FloatArray, NDArray[np.intp]]:
    """Renormalised log-probabilities (n, labels) and label numbers (n,), checked."""
    given = np.asarray(log_probabilities, dtype=np.float64)
    labels = np.asarray(references, dtype=np.intp)
    if given.ndim != 2 or given.shape[1] < 2 or labels.shape != given.shape[:1] or not len(labels):
        raise ValueError(
            "Log-probabilities expect shape (items, labels), at least one item and two labels, and "
            f"one reference per item; found shapes {given.shape} and {labels.shape}."
        )
    if labels.min() < 0 or labels.max() >= given.shape[1]:
        raise ValueError(
            f"References expect label numbers 0 to {given.shape[1] - 1}; "
            f"found {labels.min()} to {labels.max()}."
        )
    best = given.max(axis=1)
    if not np.isfinite(best).all():
        item = int(np.flatnonzero(~np.isfinite(best))[0])
        raise ValueError(
            "Log-probabilities expect a finite value for some label of each item, and no nan; "
            f"item {item} is {given[item]}."
        )
    shares: FloatArray = log_softmax(given, axis=1)
    return shares, labels
