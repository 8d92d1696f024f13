"""Membership inference: the AUC of telling training rows from unseen rows.

The score of a row is what the adapter gained on it: base nats - adapter nats per answer token.
Subtracting the base removes how hard the row is in itself (Watson et al. 2022, ICLR: difficulty
calibration of membership inference).
"""

import numpy as np
from numpy.typing import ArrayLike

from lora_domains.stats.bootstrap import Bounds


def membership_auc(trained: ArrayLike, unseen: ArrayLike) -> float:
    """AUC: the probability that a trained row scores above an unseen one, a tie counting half.

    .5 is chance. Source: Yeom et al. (2018), CSF; the AUC as Mann & Whitney's statistic. Raises
    ValueError when either is empty.
    """
    first, second = np.asarray(trained, float), np.asarray(unseen, float)
    if not len(first) or not len(second):
        raise ValueError(
            "membership_auc expects trained and unseen rows, at least one of each; "
            f"found {len(first)} and {len(second)}."
        )
    # Ranks by sorting: scipy.stats, which ranks, takes half a second to import.
    second = np.sort(second)
    below, up_to = (np.searchsorted(second, first, side) for side in ("left", "right"))
    return float((below + up_to).sum() / 2 / (len(first) * len(second)))


def auc_bounds(auc: float, first: float, second: float, level: float = 0.95) -> Bounds:
    """Bounds of an AUC of ``first`` against ``second`` independent rows.

    The values A with |AUC - A| <= z sqrt(V(A)), where V(A) = A (1 - A) (1 + N (1 - A)/(2 - A)
    + N A/(1 + A)) / (first second) and N = (first + second)/2 - 1; the bounds have a width
    at 0 and 1 too. Source: Newcombe (2006), Statistics in Medicine 25:559, method 5. Where rows
    form groups, count the groups (``effective_groups``).
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
