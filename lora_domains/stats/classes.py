"""Precision, recall and F1 of each class and their macro means, from counts that add up.

``class_counts`` gives each item a row of 3 C counts for C classes: correctly predicted, true and
predicted. Every figure of a confusion matrix here is a function of the sums of those rows, so one
statistic serves a single figure and all resamples of a bootstrap at once.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import FloatArray, IntArray, Statistic

ClassFigure = Literal["precision", "recall", "f1"]


def class_counts(targets: IntArray, predictions: IntArray, classes: int) -> FloatArray:
    """Counts (n, 3 classes): for each item and class, whether correct, true and predicted.

    A prediction that is not one of the classes, such as -1, counts as a prediction of none.
    """
    every = np.arange(classes)
    true, predicted = targets[:, None] == every, predictions[:, None] == every
    return np.concatenate([true & predicted, true, predicted], axis=1).astype(np.float64)


def label_counts(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """``class_counts`` of rows with several labels, from two arrays (n, labels) of 0 and 1."""
    return np.concatenate([truth * predicted, truth, predicted], axis=1)


def row_f1(truth: FloatArray, predicted: FloatArray) -> FloatArray:
    """F1 of the labels of each row, (n,), from two arrays (n, labels); 1 where both have none."""
    both, either = (truth * predicted).sum(1), truth.sum(1) + predicted.sum(1)
    score: FloatArray = np.where(either > 0, 2 * both / np.maximum(either, 1), 1.0)
    return score


def span_of_rows(statistic: Statistic, truth: FloatArray, predicted: FloatArray) -> float:
    """``span_of_flips`` for rows with several labels: from what is predicted to what is right, or
    from right to no label (every label, where none is right)."""
    right = (truth == predicted).all(1, keepdims=True)
    wrong = np.where(truth.any(1, keepdims=True), 0.0, 1.0) * np.ones_like(truth)
    flipped = np.where(right, wrong, truth)
    now = label_counts(truth, predicted)
    totals = now.sum(0)
    moved = statistic(totals + label_counts(truth, flipped) - now) - statistic(totals)
    return float(np.sqrt(len(truth) * (moved**2).sum()))


def total_counts(targets: IntArray, predictions: IntArray, classes: int) -> FloatArray:
    """The sum of ``class_counts`` over all items, (3 classes,)."""
    predicted = predictions[predictions >= 0]
    counts = [
        np.bincount(labels, minlength=classes)
        for labels in (targets[targets == predictions], targets, predicted)
    ]
    return np.concatenate(counts).astype(np.float64)


def by_class(figure: ClassFigure, sums: FloatArray) -> FloatArray:
    """``figure`` of each class from sums of ``class_counts``, (…, 3 C) → (…, C).

    As in scikit-learn with ``zero_division=0``: a figure without a denominator is 0.
    """
    correct, true, predicted = np.split(sums, 3, axis=-1)
    over, under = {
        "precision": (correct, predicted),
        "recall": (correct, true),
        "f1": (2 * correct, true + predicted),
    }[figure]
    scores: FloatArray = over / np.maximum(under, 1)
    return scores


def span_of_flips(
    statistic: Statistic,
    targets: IntArray,
    predictions: IntArray,
    classes: int,
    times: FloatArray | None = None,
) -> float:
    """How far a figure would move if every item flipped, at the rate at which it moves for one.

    n times the root mean square of the figure's change when a single item flips, from right to
    wrong or back: 1 for accuracy, 1 / (2 share of positives) for the F1 of a rare class. A wrong
    prediction is the most frequent other target. ``times`` says how often each item occurs. 0 where
    no flip moves the figure, such as the F1 of a class that no item has.
    """
    counted = np.ones(len(targets)) if times is None else times
    frequent = np.argsort(-np.bincount(targets, counted, minlength=classes), kind="stable")
    second = next((other for other in frequent[1:2] if np.any(targets == other)), -1)
    wrong = np.where(targets == frequent[0], second, frequent[0])
    flipped = np.where(predictions == targets, wrong, targets)
    now = class_counts(targets, predictions, classes)
    totals = counted @ now
    moved = statistic(totals + class_counts(targets, flipped, classes) - now) - statistic(totals)
    return float(np.sqrt(counted.sum() * (counted @ moved**2)))


def matthews(sums: FloatArray) -> FloatArray:
    """Matthews' correlation coefficient from sums of ``class_counts``, (…, 3 C) → (…).

    For any number of classes (Gorodkin 2004, Computational Biology and Chemistry 28:367): the
    covariance of true and predicted class over the root of their variances. As in scikit-learn it
    is 0 where either has one class only. A prediction of none of the classes is one more class.
    """
    correct, true, predicted = np.split(sums, 3, axis=-1)
    n = true.sum(-1)
    none = n - predicted.sum(-1)
    covariance = correct.sum(-1) * n - (true * predicted).sum(-1)
    spread = (n**2 - (true**2).sum(-1)) * (n**2 - (predicted**2).sum(-1) - none**2)
    coefficient: FloatArray = covariance / np.sqrt(np.where(spread > 0, spread, np.inf))
    return coefficient


def of_class(figure: ClassFigure, index: int) -> Statistic:
    """The statistic that gives ``figure`` of the class ``index``."""

    def statistic(sums: FloatArray) -> FloatArray:
        one: FloatArray = by_class(figure, sums)[..., index]
        return one

    return statistic


def micro(figure: ClassFigure) -> Statistic:
    """``figure`` over the labels of all items together, from sums of ``label_counts``."""

    def statistic(sums: FloatArray) -> FloatArray:
        together = np.stack([part.sum(-1) for part in np.split(sums, 3, axis=-1)], axis=-1)
        one: FloatArray = by_class(figure, together)[..., 0]
        return one

    return statistic


def macro(figure: ClassFigure, classes: ArrayLike | None = None) -> Statistic:
    """The mean of ``figure`` over those of ``classes`` (all by default) that have a true item.

    As scikit-learn's ``average="macro"`` with these labels. A resample may lack a class of few
    items: counted as 0 it would pull both contenders, and their difference, towards 0.
    """
    indices = None if classes is None else np.asarray(classes, dtype=np.intp)

    def statistic(sums: FloatArray) -> FloatArray:
        scores, true = by_class(figure, sums), np.split(sums, 3, axis=-1)[1]
        if indices is not None:
            inside = indices[indices < scores.shape[-1]]  # no item has the others
            scores, true = scores[..., inside], true[..., inside]
        # A class without a true item has no correct prediction, so it adds 0 to the sum.
        mean: FloatArray = scores.sum(-1) / np.maximum(1, (true > 0).sum(-1))
        return mean

    return statistic
