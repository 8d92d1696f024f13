"""Decision threshold of the positive class, chosen on validation rows for a recall or precision.

Without a target (``Classification(positive="urgent", target_recall=.9)``) the most probable class
is predicted. Rows that choose a threshold are never rows of a gate: gates compare the result with
their floors on test rows.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_domains.errors import UsageError
from lora_domains.stats.shares import share_of

REFER = "refer"
"""The answer where no label is probable enough: a person should decide."""
POINTS = 60
"""Points of a curve in a card, at most."""
LEVEL = 0.99
"""The confidence with which a threshold reaches its target: that of a gate that passes."""


def counts_at(
    probability: ArrayLike, positive: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    """(probabilities, positives, items): from each probability up, in falling order.

    ``positives`` counts the items for which ``positive`` holds, ``items`` all of them.
    """
    chance, truth = np.asarray(probability, float), np.asarray(positive, bool)
    order = np.argsort(-chance, kind="stable")
    chance, hits = chance[order], np.cumsum(truth[order])
    # Items of one probability are on the same side of any threshold.
    last = np.flatnonzero(np.append(chance[1:] != chance[:-1], True)[: len(chance)])
    return chance[last], hits[last], last + 1


def thinned(count: int, most: int) -> NDArray[np.intp]:
    """The places of at most ``most`` of ``count`` points, evenly spaced, with both ends."""
    return np.unique(np.linspace(0, count - 1, most).round().astype(np.intp))


class Chosen(NamedTuple):
    """A threshold, and what the rows that chose it show of the target's figure."""

    threshold: float
    lower: float
    """The lower bound of recall or precision on them, at ``LEVEL``."""


def choose_threshold(
    probability: ArrayLike,
    positive: ArrayLike,
    *,
    recall: float | None = None,
    precision: float | None = None,
    groups: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Chosen | None:
    """The probability from which to predict the positive class.

    None without a positive row, and where a probability is not a number.

    Of the thresholds at which the *lower bound* of the target's figure reaches it: for a recall the
    highest, so that precision suffers least, for a precision the one with the highest recall. A
    threshold at which the figure itself reaches a target misses it on other rows half of the time.
    Where no bound reaches the target, the threshold with the highest bound.

    One of ``recall`` and ``precision`` is given. ``probability`` (n,) is that of the positive
    class, ``positive`` (n,) whether the item belongs to it. The threshold lies halfway to the next
    lower probability, so that rounding does not change a prediction.
    """
    if (recall is None) == (precision is None):
        raise ValueError("choose_threshold expects a recall or a precision, and one of them.")
    chance, truth = np.asarray(probability, float), np.asarray(positive, bool)
    if not np.isfinite(chance).all():
        return None
    thresholds, hits, _ = counts_at(chance, truth)
    places = np.flatnonzero(np.diff(hits, prepend=0))  # where one more positive is found
    if not len(places):
        return None

    def lower(place: int) -> float:
        predicted = chance >= thresholds[place]
        counted = np.flatnonzero(predicted if recall is None else truth)
        among = None if groups is None else [groups[int(i)] for i in counted]
        return share_of((predicted & truth)[counted], among, level).bounds.lower

    bounds = np.array([lower(int(place)) for place in places])
    reached = np.flatnonzero(bounds >= (recall if precision is None else precision))
    if not len(reached):
        chosen = int(bounds.argmax())
    else:
        chosen = int(reached[0] if precision is None else reached[-1])
    place = int(places[chosen])
    below = float(thresholds[place + 1]) if place + 1 < len(thresholds) else 0.0
    return Chosen((float(thresholds[place]) + below) / 2, float(bounds[chosen]))


LEAST_TUNED = 10
"""Rows that a label needs to have a threshold of its own."""


def label_thresholds(
    probabilities: NDArray[np.float64], truth: NDArray[np.float64]
) -> NDArray[np.float64] | None:
    """The probability from which to predict each label: that with the best F1, (labels,).

    ``probabilities`` and ``truth`` are (n, labels). Labels of fewer than ``LEAST_TUNED`` rows share
    the threshold with the best micro F1 over all labels, since the best for few rows is chance
    (Yang 2001, SIGIR, "A Study of Thresholding Strategies for Text Categorization": SCut, which
    overfits rare categories). None without a row that has a label, and where a probability is not a
    number.
    """
    if not np.isfinite(probabilities).all() or not truth.any():
        return None
    shared = _best_f1(probabilities.ravel(), truth.ravel())
    counts = truth.sum(0)
    return np.array([
        _best_f1(probabilities[:, label], truth[:, label]) if count >= LEAST_TUNED else shared
        for label, count in enumerate(counts)
    ])  # fmt: skip


def _best_f1(probability: ArrayLike, positive: ArrayLike) -> float:
    """The threshold with the best F1, halfway to the next lower probability."""
    thresholds, hits, predicted = counts_at(probability, positive)
    place = int((2 * hits / (predicted + hits[-1])).argmax())
    below = float(thresholds[place + 1]) if place + 1 < len(thresholds) else 0.0
    return (float(thresholds[place]) + below) / 2


def predicted_class(
    probabilities: Sequence[float], positive: int | None, threshold: float | None
) -> int:
    """The predicted class: ``positive`` from ``threshold`` on, else the most probable other one.

    Without a threshold the most probable of all. ``probabilities`` are those of all classes.
    """
    classes = range(len(probabilities))
    if positive is None or threshold is None:
        return max(classes, key=probabilities.__getitem__)
    if probabilities[positive] >= threshold:
        return positive
    return max((c for c in classes if c != positive), key=probabilities.__getitem__)


def stored_by_label(judged: Mapping[str, Any]) -> dict[str, float]:
    """The threshold of each label in a card's ``judged``; {} where none were chosen."""
    by_label: dict[str, float] = (judged.get("threshold") or {}).get("by_label") or {}
    return by_label


def stored(judged: Mapping[str, Any]) -> float | None:
    """The threshold that an evaluation left in a card's ``judged``; None where there is none."""
    chosen = (judged.get("threshold") or {}).get("threshold")
    return None if chosen is None else float(chosen)


def check_referral(below: float, labels: Sequence[str]) -> None:
    """Raises UsageError unless labels less probable than ``below`` can be replaced by ``REFER``."""
    for holds, expected, actual in (
        (0 <= below <= 1, "a probability to refer below, 0 to 1", str(below)),
        (not below or labels, "an adapter that gives one label a row, with its probability",
         "one that gives something else"),
        (not below or REFER not in labels, f"no label called {REFER!r}", f"the label {REFER!r}"),
    ):  # fmt: skip
        if not holds:
            raise UsageError(
                where="refer below", expected=expected, found=actual,
                hint="Leave it out (--refer-below).",
            )  # fmt: skip


def curve(probability: ArrayLike, positive: ArrayLike) -> list[dict[str, float]]:
    """Precision and recall at each threshold, from the highest down; ``POINTS`` at most."""
    thresholds, hits, predicted = counts_at(probability, positive)
    total = int(hits[-1]) if len(hits) else 0
    if total == 0:
        return []
    return [
        {
            "threshold": float(thresholds[i]),
            "precision": float(hits[i] / predicted[i]),
            "recall": float(hits[i] / total),
        }
        for i in thinned(len(thresholds), POINTS)
    ]
