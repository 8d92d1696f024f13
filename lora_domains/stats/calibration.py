"""Whether a confidence can be trusted, and what referring uncertain answers to a person gains.

Arrays of one model on n items: ``confidence``, the probability of its answer; ``right``, whether
the answer is correct; ``brier``, the squared distance of all label probabilities from the truth.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import FloatArray, bootstrap, group_codes
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.intervals import Bounds
from lora_domains.stats.shares import share_of
from lora_domains.stats.thresholds import thinned

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

    ECE is the mean distance of confidence from accuracy over 15 bins of equal width, in 0 … 1 (Guo
    et al. 2017, ICML; Naeini et al. 2015, AAAI). An item on an edge belongs to the lower bin. ECE
    is never below 0, so noise biases it upwards, and resampling adds this bias again: its lower
    bound is the upper one reflected about the estimate (Davison & Hinkley 1997, ch. 5.2.1), and 0
    where a calibrated model's ECE would reach as far by chance (consistency resampling: Bröcker &
    Smith 2007, Weather and Forecasting 22:651; normal sums in each bin). The Brier score is the
    mean squared distance of the label probabilities from the truth (Brier 1950): 0 is best, 2
    worst.
    """
    residuals = _residuals_by_bin(confidence, right)
    columns = np.concatenate([residuals, np.ones((len(confidence), 1))], axis=1)
    high = bootstrap(_ece, columns, groups=groups, resamples=1000, level=level).upper
    ece = float(_ece(np.ones(len(columns)) @ columns))
    low = 0.0
    if ece > _ece_by_chance(confidence, residuals, groups, level):
        low = 2 * ece - high
    means = np.stack([brier, np.ones(len(brier))], axis=1)
    spread = bootstrap(ratio, means, groups=groups, resamples=1000, level=level)
    return {
        "ece": ece,
        "brier": float(ratio(np.ones(len(means)) @ means)),
        "bounds": {
            "ece": _within(Bounds(low, high), 0.0, 1.0),
            "brier": _within(spread, 0.0, 2.0),
        },
        "risk_coverage": risk_coverage(confidence, right, groups, level),
    }


def risk_coverage(
    confidence: Numbers,
    right: Truths,
    groups: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> list[dict[str, float]]:
    """Coverage (share answered) and risk (share of those wrong) when unsure items are referred.

    From the most confident item to all of them, at the confidence from which an item is answered
    (``predict --refer-below``); ``upper`` bounds the risk of that one point (``share_of``). Source:
    El-Yaniv & Wiener (2010), JMLR 11:1605; Geifman & El-Yaniv (2017), NeurIPS.
    """
    order = np.argsort(-confidence, kind="stable")
    sure, wrong = confidence[order], np.cumsum(~right[order])
    # Items of one confidence are answered or referred together.
    ends = np.flatnonzero(np.append(sure[1:] != sure[:-1], True))
    points = []
    for last in ends[thinned(len(ends), POINTS)]:
        answered, errors, here = int(last) + 1, int(wrong[last]), order[: last + 1]
        groups_here = None if groups is None else [groups[i] for i in here]
        points.append(
            {
                "confidence": float(sure[last]),
                "coverage": answered / len(sure),
                "risk": errors / answered,
                "upper": share_of(~right[here], groups_here, level).bounds.upper,
            }
        )
    return points


def _bins(confidence: Numbers) -> NDArray[np.int_]:
    """The bin of each confidence, (n,); bins are closed above."""
    bins: NDArray[np.int_] = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return bins


def _residuals_by_bin(confidence: Numbers, right: Truths) -> Numbers:
    """(n, BINS): ``right`` - ``confidence`` in the column of the item's bin, else 0."""
    residuals = np.zeros((len(confidence), BINS))
    residuals[np.arange(len(confidence)), _bins(confidence)] = right - confidence
    return residuals


def _ece(sums: FloatArray) -> FloatArray:
    # Share of a bin times the distance of its means is the distance of its sums over all items.
    errors: FloatArray = np.abs(sums[..., :BINS]).sum(-1) / sums[..., BINS]
    return errors


def _ece_by_chance(
    confidence: Numbers, residuals: Numbers, groups: Sequence[Hashable] | None, level: float
) -> float:
    """The ECE that a calibrated model of these confidences stays within at ``level``."""
    codes = group_codes(groups, len(confidence))
    if codes is None:
        chance = confidence * (1 - confidence)
        variances = np.bincount(_bins(confidence), weights=chance, minlength=BINS)
    else:
        # Rows of a group err together: what its sums show is all that is known of their spread.
        sums = np.zeros((int(codes.max()) + 1, BINS))
        np.add.at(sums, codes, residuals)
        variances = (sums**2).sum(0)
    drawn = np.abs(np.random.default_rng(0).normal(size=(4000, BINS))) @ np.sqrt(variances)
    return float(np.quantile(drawn, level)) / len(confidence)


def _within(bounds: Bounds, least: float, most: float) -> dict[str, float]:
    return {"lower": max(least, bounds.lower), "upper": min(most, bounds.upper)}
