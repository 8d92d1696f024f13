"""The gate on slices: a good overall score may hide a group of rows that is served badly."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import Bounds, bootstrap
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.intervals import difference_bounds, items_needed_mean, wilson
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.rules import GateResult, Measurement, capital, judge, worst

Scores = NDArray[np.float64]
Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """The score of the rows of one slice minus that of all other rows."""

    name: str
    difference: float | None
    """None where the slice or the rest has no row to score."""
    bounds: Bounds
    wide: Bounds
    """Bounds at a level divided among all slices: any of many may look bad by chance."""
    n: int
    unit: str


def judge_slices(evidence: Evidence, margin: float) -> GateResult | None:
    """The gate on slices: recall of the positive class, accuracy or token F1.

    None where the rows have no slices, or no score that compares between kinds of rows.
    """
    test, names = evidence.test, evidence.test.slice_columns()
    if not names:
        return None
    if test.scored("adapter", "prediction"):
        what, unit = "accuracy", "rows"
        scores = (test.column("adapter", "prediction") == test.targets()).astype(float)
        if evidence.positive is not None:
            what, unit = "recall", "positives"
            scores = np.where(test.targets() == evidence.positive, scores, np.nan)
    elif test.scored("adapter", "f1"):
        what, unit, scores = "token F1", "rows", test.column("adapter", "f1")
    else:  # nats differ between kinds of text by nature
        return None
    values = {name: test.slice_values(name) for name in names}
    parts = compare_slices(scores, values, test.groups(), unit, evidence.level)
    return worst_slice(parts, what, margin, evidence.level) if parts else None


def worst_slice(
    parts: Iterable[Slice], what: str, margin: float, level: float = 0.95
) -> GateResult:
    """No slice scores more than ``margin`` below the rest of the rows; the worst slice is shown.

    To pass, every slice must, so each has to clear the plain bound (intersection-union, as in
    ``rules.verdict``); to fail, one must miss by the bound divided among all (Bonferroni), or more
    slices would mean more false alarms. A slice too small to tell is inconclusive. Worst-group
    scores as the measure: Sagawa et al. (2020), ICLR.
    """
    rule = f"{what} of each slice at most {margin:g} below the rest"
    results = []
    for part in parts:
        if part.difference is None:
            why = f"{capital(what)} of {part.name} is undefined because it has no {part.unit}."
            results.append(
                GateResult("slices", rule, None, -margin, *part.bounds, "inconclusive", why)
            )
            continue
        bounds = part.bounds._replace(upper=part.wide.upper)
        measured = Measurement(part.difference, bounds, part.n, part.unit, level)
        needed = items_needed_mean(part.difference, part.bounds, part.n, -margin)
        subject = f"{capital(what)} of {part.name} minus that of the rest"
        results.append(judge("slices", rule, measured, -margin, what=subject, needed=needed))
    return worst(results)


def compare_slices(
    scores: Scores,
    values: Mapping[str, Sequence[str]],
    groups: Sequence[Hashable] | None,
    unit: str,
    level: float,
) -> list[Slice]:
    """Every value of every column: the mean score of its rows minus that of all others.

    ``scores`` (n,) lie between 0 and 1, NaN where a row does not count (a negative, for recall);
    ``values`` holds each row's value in each column. Rows of a slice and the rest are independent
    samples: Wilson's bounds of each where scores are right or wrong, else the bootstrap's, joined
    by Newcombe's method 10. A column with one value has nothing to compare.
    """
    counted = ~np.isnan(scores)
    parts = []
    for column, row_values in values.items():
        here = np.asarray(row_values)
        for value in sorted(set(row_values)):
            inside, outside = counted & (here == value), counted & (here != value)
            if (here != value).any():
                parts.append((f"{column}={value}", inside, outside))
    slices = []
    for name, inside, outside in parts:
        n = int(inside.sum())
        if not n or not outside.any():
            unknown = Bounds(-1.0, 1.0)
            slices.append(Slice(name, None, unknown, unknown, n, unit))
            continue
        means = float(scores[inside].mean()), float(scores[outside].mean())
        plain, wide = (
            difference_bounds(
                means[0], _bounds_of_mean(scores, inside, groups, at),
                means[1], _bounds_of_mean(scores, outside, groups, at),
            )
            for at in (level, 1 - (1 - level) / len(parts))
        )  # fmt: skip
        slices.append(Slice(name, means[0] - means[1], plain, wide, n, unit))
    return slices


def _bounds_of_mean(
    scores: Scores, rows: Rows, groups: Sequence[Hashable] | None, level: float
) -> Bounds:
    here, n = scores[rows], int(rows.sum())
    mean = float(here.mean())
    if groups is None and np.isin(here, (0.0, 1.0)).all():
        return wilson(mean * n, n, level)
    part = None if groups is None else [groups[int(i)] for i in np.flatnonzero(rows)]
    drawn = bootstrap(ratio, np.stack([here, np.ones(n)], axis=1), groups=part, level=level)
    if math.isfinite(drawn.lower) and drawn.lower < drawn.upper:
        return drawn
    # Where nothing varies the bootstrap has no width: as many all-or-nothing units stand in.
    units = n if part is None else len(set(part))
    return wilson(mean * units, units, level)
