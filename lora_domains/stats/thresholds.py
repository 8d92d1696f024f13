"""From which probability the positive class is named: chosen on validation rows, for a wish.

A wish is a wanted recall or a wanted precision (``Classification(positive="urgent",
wanted_recall=.9)``). Without one, the likeliest class is named. The rows that choose a threshold
are never rows of a gate: gates hold the result against their floors on test rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_domains.errors import UsageError

REFER = "refer"
"""The answer where no label is probable enough: a person should look."""
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


def decide(shares: Sequence[float], positive: int | None, threshold: float | None) -> int:
    """The class to name: ``positive`` from ``threshold`` on, else the likeliest other.

    Without a threshold the likeliest of all. ``shares`` are the probabilities of all classes.
    """
    classes = range(len(shares))
    if positive is None or threshold is None:
        return max(classes, key=shares.__getitem__)
    if shares[positive] >= threshold:
        return positive
    return max((c for c in classes if c != positive), key=shares.__getitem__)


def stored(card: Mapping[str, Any] | None) -> float | None:
    """The threshold that an evaluation left in a card; None where there is none."""
    judged = card["adapters"][0].get("judged") if card else None
    chosen = ((judged or {}).get("threshold") or {}).get("threshold")
    return None if chosen is None else float(chosen)


def check_referral(below: float, labels: Sequence[str]) -> None:
    """Raises UsageError unless labels less probable than ``below`` can be told as ``REFER``."""
    for holds, expected, found in (
        (0 <= below <= 1, "a probability to refer below, 0 to 1", str(below)),
        (not below or labels, "a classification domain to refer from", "generated answers"),
        (not below or REFER not in labels, f"no label called {REFER!r}", f"the label {REFER!r}"),
    ):
        if not holds:
            raise UsageError(
                expected=expected, found=found, hint="Leave it out and read the probabilities."
            )


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
