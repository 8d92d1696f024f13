"""From which probability the positive class is named: chosen on validation rows, for a wish.

A wish is a wanted recall or a wanted precision (``Classification(positive="urgent",
wanted_recall=.9)``). Without one, the likeliest class is named. The rows that choose a threshold
are never rows of a gate: gates hold the result against their floors on test rows.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

POINTS = 60
"""Points of a curve in a card, at most."""


def counts_at(
    probability: ArrayLike, positive: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.intp], NDArray[np.intp]]:
    """(thresholds falling, positives found, items named) at each probability that occurs."""
    chance, truth = np.asarray(probability, float), np.asarray(positive, bool)
    order = np.argsort(-chance, kind="stable")
    chance, found = chance[order], np.cumsum(truth[order])
    # Items of one probability are named together or not at all.
    last = np.flatnonzero(np.append(chance[1:] != chance[:-1], True)[: len(chance)])
    return chance[last], found[last], last + 1


def choose(
    probability: ArrayLike,
    positive: ArrayLike,
    *,
    wanted_recall: float | None = None,
    wanted_precision: float | None = None,
) -> float | None:
    """The probability from which to name the positive class; None where no wish can be met.

    For a recall: the highest threshold that reaches it, so that precision suffers least. For a
    precision: of the thresholds that reach it the one that finds most. ``probability`` (n,) is that
    of the positive class, ``positive`` (n,) whether the item is one. The threshold lies halfway to
    the next probability below, so that rounding does not tip an item over.
    """
    thresholds, found, named = counts_at(probability, positive)
    total = int(found[-1]) if len(found) else 0
    if total == 0:
        return None
    if wanted_recall is not None:
        # Shares of counts against a decimal wish: 9 of 10 is .9, whatever rounding says.
        place = int(np.flatnonzero(found >= wanted_recall * total - 1e-9)[0])
    else:
        assert wanted_precision is not None
        reached = np.flatnonzero(found >= wanted_precision * named - 1e-9)
        reached = reached[found[reached] > 0]
        if not len(reached):
            return None
        place = int(reached[np.argmax(found[reached])])
    below = float(thresholds[place + 1]) if place + 1 < len(thresholds) else 0.0
    return (float(thresholds[place]) + below) / 2


def decide(probability: float, threshold: float, positive: int, other: int) -> int:
    """The class to name: ``positive`` from ``threshold`` on, else the likeliest ``other``."""
    return positive if probability >= threshold else other


def curve(probability: ArrayLike, positive: ArrayLike) -> list[dict[str, float]]:
    """Precision and recall from each threshold, from the surest item to all; ``POINTS`` at most."""
    thresholds, found, named = counts_at(probability, positive)
    total = int(found[-1]) if len(found) else 0
    if total == 0:
        return []
    picks = np.unique(np.linspace(0, len(thresholds) - 1, POINTS).round().astype(int))
    return [
        {
            "threshold": float(thresholds[i]),
            "precision": float(found[i] / named[i]),
            "recall": float(found[i] / total),
        }
        for i in picks
    ]
