"""Decision threshold of the positive class, chosen on validation rows for a recall or precision.

Without a target (``Classification(positive="urgent", target_recall=.9)``) the most probable class
is predicted. Rows that choose a threshold are never rows of a gate: gates compare the result with
their floors on test rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_domains.errors import UsageError

REFER = "refer"
"""The answer where no label is probable enough: a person should decide."""
POINTS = 60
"""Points of a curve in a card, at most."""


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


def choose_threshold(
    probability: ArrayLike,
    positive: ArrayLike,
    *,
    recall: float | None = None,
    precision: float | None = None,
) -> float | None:
    """The probability from which to predict the positive class; None where no target can be met.

    For a recall: the highest threshold that reaches it, so that precision suffers least. For a
    precision: of the thresholds that reach it the one with the highest recall. One of the two is
    given. ``probability`` (n,) is that of the positive class, ``positive`` (n,) whether the item
    belongs to it. The threshold lies halfway to the next lower probability, so that rounding does
    not change a prediction.
    """
    thresholds, hits, predicted = counts_at(probability, positive)
    total = int(hits[-1]) if len(hits) else 0
    if total == 0:
        return None
    if recall is not None:
        # Shares of counts against a decimal target: 9 of 10 is .9, whatever rounding gives.
        place = int(np.flatnonzero(hits >= recall * total - 1e-9)[0])
    elif precision is not None:
        reached = np.flatnonzero(hits >= precision * predicted - 1e-9)
        reached = reached[hits[reached] > 0]
        if not len(reached):
            return None
        place = int(reached[np.argmax(hits[reached])])
    else:
        raise ValueError("choose_threshold expects a recall or a precision; found neither.")
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


def stored(judged: Mapping[str, Any]) -> float | None:
    """The threshold that an evaluation left in a card's ``judged``; None where there is none."""
    chosen = (judged.get("threshold") or {}).get("threshold")
    return None if chosen is None else float(chosen)


def check_referral(below: float, labels: Sequence[str]) -> None:
    """Raises UsageError unless labels less probable than ``below`` can be replaced by ``REFER``."""
    for holds, expected, actual in (
        (0 <= below <= 1, "a probability to refer below, 0 to 1", str(below)),
        (not below or labels, "a classification domain to refer from", "generated answers"),
        (not below or REFER not in labels, f"no label called {REFER!r}", f"the label {REFER!r}"),
    ):
        if not holds:
            raise UsageError(
                expected=expected, found=actual, hint="Leave it out and read the probabilities."
            )


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
