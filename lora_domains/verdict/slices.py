"""Slices and suites: a good overall score may hide a group of rows that is served badly."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import Bounds, bootstrap
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.intervals import difference_bounds
from lora_domains.stats.shares import share_of
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.rules import (
    LEAST_POSITIVES,
    LEAST_ROWS,
    GateResult,
    Measurement,
    Verdict,
    capital,
    judge,
    shown,
)

Scores = NDArray[np.float64]
Rows = NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """The score of the rows of one slice minus that of all other rows."""

    name: str
    difference: float
    bounds: Bounds
    wide: Bounds | None
    """Bounds at a level divided among all slices that are large enough: any of many may look bad by
    chance. None for a slice of fewer than ``LEAST_ROWS`` rows or ``LEAST_POSITIVES`` positives."""
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
    return worst_slice(parts, what, margin, evidence.level)


def harmed_suite(evidence: Evidence, margin: float) -> GateResult | None:
    """A failure where one suite of probes clearly lost more than ``margin``; else None.

    Pooled, a field that is lost hides among those that are kept. The level is divided among the
    suites (Bonferroni: Holm's first step, which tells whether any is harmed).
    """
    suites = np.array([str(item.get("suite")) for item in evidence.general])
    names, counts = np.unique(suites, return_counts=True)
    names = names[counts >= LEAST_POSITIVES]
    if len(names) < 2:
        return None
    at = 1 - (1 - evidence.level) / len(names)
    parts = {name: evidence.general.part(np.flatnonzero(suites == name)) for name in names}
    compared = {name: METRICS["accuracy"].compare(part, level=at) for name, part in parts.items()}
    upper, name = min((one.upper, name) for name, one in compared.items() if one is not None)
    worst = compared[name]
    if worst is None or upper >= -margin:
        return None
    rule = f"accuracy on no suite clearly more than {margin:g} below the base"
    what = f"Accuracy on {name} {worst.adapter:.3f}; the base reaches {worst.base:.3f}"
    measured = Measurement.of(worst, "of its probe items")
    return judge(
        "retention", rule, measured, -margin, what=f"{what}. The difference", needed=None
    )  # fmt: skip


def worst_slice(
    parts: Iterable[Slice], what: str, margin: float, level: float = 0.95
) -> GateResult | None:
    """Fails where a slice clearly scores more than ``margin`` below the rest of the rows.

    The bound of each is divided among all slices of enough rows, or more slices would mean more
    false alarms (Bonferroni: Holm's first step, which tells whether any is worse). Where none is,
    slices only inform: the lowest is shown. Worst-group scores as the measure: Sagawa et al.
    (2020), ICLR. None where no slice has a score.
    """
    known = list(parts)
    if not known:
        return None
    rule = f"{what} of no slice clearly more than {margin:g} below the rest"
    large = [part for part in known if part.wide is not None]
    worse = [part for part in large if part.wide is not None and part.wide.upper < -margin]
    outcome: Verdict = "fail" if worse else "pass"
    part = min(worse or large or known, key=lambda p: p.bounds.upper if worse else p.difference)
    lower, upper = part.bounds if part.wide is None else part.bounds._replace(upper=part.wide.upper)
    why = (
        f"{capital(what)} of {part.name} minus that of the rest is {shown(part.difference)} on "
        f"{part.n:,} {part.unit}, {100 * level:.6g} % bounds {shown(lower)} to {shown(upper)}"
    )
    why += f"; {shown(-margin)} is allowed." if worse else "; no slice is clearly worse."
    if small := len(known) - len(large):
        why += f" Slices too small to decide: {small}."
    return GateResult("slices", rule, part.difference, -margin, lower, upper, outcome, why)


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
    by Newcombe's method 10. A column with one value has nothing to compare, nor has a slice without
    a row that counts.
    """
    counted = ~np.isnan(scores)
    parts = []
    for column, row_values in values.items():
        here = np.asarray(row_values)
        for value in sorted(set(row_values)):
            inside, outside = counted & (here == value), counted & (here != value)
            if (here != value).any():
                parts.append((f"{column}={value}", inside, outside))
    parts = [(name, inside, outside) for name, inside, outside in parts
             if inside.any() and outside.any()]  # fmt: skip
    least = LEAST_POSITIVES if unit == "positives" else LEAST_ROWS
    large = sum(int(inside.sum()) >= least for _, inside, _ in parts)
    slices = []
    for name, inside, outside in parts:
        n, means = int(inside.sum()), (float(scores[inside].mean()), float(scores[outside].mean()))
        plain, wide = (
            difference_bounds(
                means[0], _bounds_of_mean(scores, inside, groups, at),
                means[1], _bounds_of_mean(scores, outside, groups, at),
            )
            for at in (level, 1 - (1 - level) / max(1, large))
        )  # fmt: skip
        slices.append(
            Slice(name, means[0] - means[1], plain, wide if n >= least else None, n, unit)
        )
    return slices


def _bounds_of_mean(
    scores: Scores, rows: Rows, groups: Sequence[Hashable] | None, level: float
) -> Bounds:
    here = scores[rows]
    part = None if groups is None else [groups[int(i)] for i in np.flatnonzero(rows)]
    if np.isin(here, (0.0, 1.0)).all():
        return share_of(here, part, level).bounds
    columns = np.stack([here, np.ones(len(here))], axis=1)
    return bootstrap(ratio, columns, groups=part, level=level, limits=(0.0, 1.0))
