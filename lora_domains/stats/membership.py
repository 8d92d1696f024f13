"""Does an adapter remember the rows it was trained on? Membership, and planted canaries.

A row that was trained on is told from one that was not by how much more the adapter gained on it
than the base: base nats - adapter nats per answer token. Subtracting the base takes out how hard a
row is in itself (Watson et al. 2022, ICLR: difficulty calibration of membership inference).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import Bounds


def membership(trained: ArrayLike, unseen: ArrayLike) -> float:
    """AUC: the chance that a trained row scores above an unseen one, a tie counting half.

    .5 is chance. Source: Yeom et al. (2018), CSF; the AUC as Mann & Whitney's statistic. Raises
    ValueError when either is empty.
    """
    first, second = np.asarray(trained, float), np.asarray(unseen, float)
    if not len(first) or not len(second):
        raise ValueError(
            "membership expects trained and unseen rows, at least one of each; "
            f"found {len(first)} and {len(second)}."
        )
    # Sorted, the unseen rows below each trained one, and those equal to it. (scipy.stats, which
    # ranks, takes half a second to import.)
    second = np.sort(second)
    below, up_to = (np.searchsorted(second, first, side) for side in ("left", "right"))
    return float((below + up_to).sum() / 2 / (len(first) * len(second)))


def auc_bounds(auc: float, first: int, second: int, level: float = 0.95) -> Bounds:
    """Bounds of an AUC of ``first`` against ``second`` independent rows.

    The values A that |AUC - A| <= z sqrt(V(A)) keeps, with V(A) = A (1 - A) (1 + N (1 - A)/(2 - A)
    + N A/(1 + A)) / (first second) and N = (first + second)/2 - 1; they have a width at 0 and 1
    too. Source: Newcombe (2006), Statistics in Medicine 25:559, method 5. Where rows form groups,
    count the groups.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri

    if min(first, second) < 1:
        return Bounds(0.0, 1.0)
    z, mean = float(ndtri(level)), (first + second) / 2 - 1

    def beyond(truth: float) -> float:
        spread = 1 + mean * (1 - truth) / (2 - truth) + mean * truth / (1 + truth)
        return (auc - truth) ** 2 - z * z * truth * (1 - truth) * spread / (first * second)

    # At the ends themselves `beyond` is 0, a root but not the bound.
    near = 1e-9
    lower = float(brentq(beyond, 0.0, min(auc, 1 - near))) if auc > near else 0.0
    upper = float(brentq(beyond, max(auc, near), 1.0)) if auc < 1 - near else 1.0
    return Bounds(lower, upper)


def canaries(count: int, seed: int = 0, digits: int = 6) -> list[str]:
    """``count`` different random secrets, such as "481 023": plant some, keep the others unseen.

    Raises ValueError when there are not so many of ``digits`` digits.
    """
    if not 0 < count <= 10**digits:
        raise ValueError(f"canaries expects 1 to {10**digits:,} of them; found {count:,}.")
    drawn = np.random.default_rng(seed).choice(10**digits, size=count, replace=False)
    half = digits // 2
    return [f"{number:0{digits}d}"[:half] + " " + f"{number:0{digits}d}"[half:] for number in drawn]


def exposure(planted: float, unseen: Sequence[float]) -> float:
    """Bits by which a planted secret is easier for the model than ``unseen`` ones of its kind.

    log2 of their number (the planted one counted) minus log2 of its rank by nats, a tie counting
    against it: 0 where it is the hardest, log2(len(unseen) + 1) where it is the easiest of all.
    Chance gives 1.44 bits on average. Source: Carlini et al. (2019), USENIX Security,
    definition 5, with the space of secrets sampled.
    """
    rank = 1 + sum(nats <= planted for nats in unseen)
    return math.log2(len(unseen) + 1) - math.log2(rank)
