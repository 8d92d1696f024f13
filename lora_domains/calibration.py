"""Whether a confidence can be believed, and what is gained by referring unsure answers to a person.

Arrays of one model on n items: ``confidence``, the probability of its answer; ``right``, whether
the answer was; ``brier``, the squared distance of all label probabilities from the truth.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_domains.bootstrap import Bounds, FloatArray, bootstrap
from lora_domains.statistics import ratio, wilson

BINS = 15
POINTS = 40
"""Points of a curve in a card, at most."""

Numbers = NDArray[np.float64]
Truths = NDArray[np.bool_]


def calibration(
    confidence: Numbers,
    right: Truths,
    brier: Numbers,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """Expected calibration error and Brier score with bounds, and the risk–coverage curve.

    ECE is the mean distance of confidence from accuracy over 15 equal-width bins (Guo et al. 2017,
    ICML). It is never below 0, so noise alone raises it, and raises each resample again: its bounds
    are reflected about the estimate, which takes that out once. The Brier score is the mean squared
    distance of the label probabilities from the truth (Brier 1950): 0 is best, 2 worst.
    """
    n = len(confidence)
    # Bins are closed above, as in ``metrics.expected_calibration_error``.
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    columns = np.zeros((n, BINS + 1))
    columns[np.arange(n), bins] = right - confidence
    columns[:, BINS] = 1
    ece = bootstrap(_ece, columns, groups=groups, resamples=1000, level=level, reflected=True)
    means = np.stack([brier, np.ones(n)], axis=1)
    spread = bootstrap(ratio, means, groups=groups, resamples=1000, level=level)
    return {
        "ece": float(_ece(np.ones(n) @ columns)),
        "brier": float(ratio(np.ones(n) @ means)),
        "bounds": {
            "ece": _within(ece, 0.0, 1.0),
            "brier": _within(spread, 0.0, 2.0),
        },
        "risk_coverage": risk_coverage(confidence, right, level),
    }


def risk_coverage(
    confidence: Numbers, right: Truths, level: float = 0.95
) -> list[dict[str, float]]:
    """What share is answered, and what share of that is wrong, when less sure items are referred.

    From the surest item to all of them, at the confidence from which an item is answered
    (``predict --refer-below``); ``upper`` bounds the risk of that one point (Wilson). Source:
    El-Yaniv & Wiener (2010), JMLR 11:1605; Geifman & El-Yaniv (2017), NeurIPS.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], np.cumsum(~right[order])
    # Items of one confidence are answered or referred together.
    ends = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    picks = ends[np.unique(np.linspace(0, len(ends) - 1, POINTS).round().astype(int))]
    points = []
    for last in picks:
        answered, errors = int(last) + 1, int(wrong[last])
        points.append(
            {
                "confidence": float(sure[last]),
                "coverage": answered / len(sure),
                "risk": errors / answered,
                "upper": wilson(errors, answered, level).upper,
            }
        )
    return points


def _ece(sums: FloatArray) -> FloatArray:
    # Share of a bin times the distance of its means is the distance of its sums over all items.
    found: FloatArray = np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]
    return found


def _within(bounds: Bounds, least: float, most: float) -> dict[str, float]:
    return {"lower": max(least, bounds.lower), "upper": min(most, bounds.upper)}
