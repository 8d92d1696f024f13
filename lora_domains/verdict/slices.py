"""Each slice of the rows against the rest: a score may hide whom it fails."""

import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import Bounds, bootstrap
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.intervals import difference_bounds, wilson
from lora_domains.verdict.gates import Slice

Rows = NDArray[np.bool_]


def compare_slices(
    scores: NDArray[np.float64],
    values: Mapping[str, Sequence[str]],
    groups: Sequence[Hashable] | None,
    unit: str,
    level: float,
) -> list[Slice]:
    """Every value of every column: the mean score of its rows minus that of all others.

    ``scores`` (n,) lie between 0 and 1, NaN where a row does not count (a negative, for recall);
    ``values`` names each row's value in each column. Rows of a slice and the rest are independent
    samples: Wilson's bounds of each where scores are right or wrong, else the bootstrap's, joined
    by Newcombe's method 10. A column with one value has nothing to compare.
    """
    counted = ~np.isnan(scores)
    parts = []
    for name, each in values.items():
        here = np.asarray(each)
        for part in sorted(set(each)):
            inside, outside = counted & (here == part), counted & (here != part)
            if (here != part).any():
                parts.append((f"{name}={part}", inside, outside))
    found = []
    for name, inside, outside in parts:
        n = int(inside.sum())
        if not n or not outside.any():
            nothing = Bounds(-1.0, 1.0)
            found.append(Slice(name, None, nothing, nothing, n, unit))
            continue
        means = float(scores[inside].mean()), float(scores[outside].mean())
        plain, wide = (
            difference_bounds(
                means[0], _bounds(scores, inside, groups, at),
                means[1], _bounds(scores, outside, groups, at),
            )
            for at in (level, 1 - (1 - level) / len(parts))
        )  # fmt: skip
        found.append(Slice(name, means[0] - means[1], plain, wide, n, unit))
    return found


def _bounds(
    scores: NDArray[np.float64], rows: Rows, groups: Sequence[Hashable] | None, level: float
) -> Bounds:
    here, n = scores[rows], int(rows.sum())
    mean = float(here.mean())
    if groups is None and np.isin(here, (0.0, 1.0)).all():
        return wilson(mean * n, n, level)
    part = None if groups is None else [groups[int(i)] for i in np.flatnonzero(rows)]
    drawn = bootstrap(ratio, np.stack([here, np.ones(n)], axis=1), groups=part, level=level)
    if math.isfinite(drawn.lower) and drawn.lower < drawn.upper:
        return drawn
    # Where nothing varies resamples do not either: as many all-or-nothing units stand in.
    units = n if part is None else len(set(part))
    return wilson(mean * units, units, level)
