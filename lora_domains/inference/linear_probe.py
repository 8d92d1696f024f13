"""A linear probe: logistic regression on frozen features, and a head that starts from its weights.

A head that starts from random weights first pulls the features apart by errors that the probe does
not make (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", arXiv 2202.10054). ``benchmarks/training/heads.py`` compares the two.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.inference.likelihoods import text_features
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import Head
from lora_domains.tasks import Task
from lora_domains.tokenization.encoded import EncodedExample

RIDGE = 100.0
"""Penalty of a linear regression of strength 1."""
STRENGTH = 0.01
"""Inverse regularisation strength (C) of the probe that a head starts from. A larger one predicts
few training rows with certainty, and leaves the adapter nothing to learn."""


def logistic_regression(strength: float, balanced: bool = False) -> Any:
    """Logistic regression on standardised features, for dense ones; ``balanced``: all classes count
    alike."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(
        StandardScaler(),
        LogisticRegression(C=strength, max_iter=300, class_weight="balanced" if balanced else None),
    )


def probe(strength: float) -> Any:
    """Logistic regression whose usual strength is 1: on dense features a tenth of that on sparse
    ones fits best."""
    return logistic_regression(strength / 10)


def ridge(strength: float) -> Any:
    """Linear regression on standardised features with a penalty, for dense ones."""
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), Ridge(alpha=RIDGE / strength))


def probe_head(
    head: Head, bank: Bank, rows: Sequence[EncodedExample], display: Display, task: Task,
    balanced: bool = False,
) -> Head:  # fmt: skip
    """``head``, a single layer, with the weights of a linear probe fitted to ``rows``.

    Every process gets those of the main one. Rows of a single class leave it as it is.
    """
    if len({(row.target, row.truth) for row in rows}) < 2:
        return head
    base = bank.base
    with (
        distributed.sharing(),
        bank.routed(None),
        display.progress("frozen features", len(rows)) as advance,
    ):
        features = text_features(base.model, rows, base.pad, advance, head.layout.pooling)
    targets = [row.target for row in rows]
    truth = np.array([row.truth for row in rows])

    def fitted() -> tuple[Tensor, Tensor]:
        if task.outputs == "value":
            return _of_number(features, truth[:, 0], task.scale)
        if task.outputs == "labels":
            return _of_labels(features, truth, balanced)
        return _fitted(features, targets, head.classes, balanced)

    weight, bias = distributed.on_main(fitted)
    (layer,) = head.layout.layers
    return replace(head, weights={f"{layer.name}.weight": weight, f"{layer.name}.bias": bias})


def _of_number(
    features: Tensor, truth: np.ndarray, scale: tuple[float, float] | None
) -> tuple[Tensor, Tensor]:
    """Weight (1, hidden) and bias (1,) of a regression on features that are not standardised."""
    mean, sd = scale or (0.0, 1.0)
    model = ridge(10 * STRENGTH).fit(features.numpy(), (truth - mean) / sd)
    scaler, regression = (step for _, step in model.steps)
    weight = regression.coef_ / scaler.scale_
    bias = regression.intercept_ - weight @ scaler.mean_
    return torch.from_numpy(weight)[None].float(), torch.tensor([float(bias)])


def _of_labels(features: Tensor, truth: np.ndarray, balanced: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of a probe of each label for itself; ``truth`` (rows, labels) is 1 or 0.

    A label that all rows have, or none, has no weight, and its odds as bias.
    """
    weight, bias = torch.zeros(truth.shape[1], features.shape[1]), torch.zeros(truth.shape[1])
    for label, has in enumerate(truth.T.astype(int)):
        if 0 < has.sum() < len(has):
            margins = _fitted(features, has.tolist(), 2, balanced)
            weight[label], bias[label] = (side[1] - side[0] for side in margins)
        else:
            share = (has.sum() + 1) / (len(has) + 2)
            bias[label] = float(np.log(share / (1 - share)))
    return weight, bias


def _fitted(
    features: Tensor, targets: Sequence[int], classes: int, balanced: bool
) -> tuple[Tensor, Tensor]:
    """Weight (classes, hidden) and bias (classes,) on features that are not standardised.

    A class without a row has no weight, and the least bias of all.
    """
    model = logistic_regression(STRENGTH, balanced)
    with warnings.catch_warnings():
        # scikit-learn warns that many classes in few rows may be numbers; they are labels.
        warnings.filterwarnings("ignore", message="The number of unique classes")
        # Training goes on from where the fit ends.
        warnings.filterwarnings("ignore", message=".*failed to converge")
        model.fit(features.numpy(), targets)
    scaler, regression = (step for _, step in model.steps)
    coefficients, intercepts = map(torch.from_numpy, (regression.coef_, regression.intercept_))
    if len(regression.classes_) == 2:  # scikit-learn has the margin of the second class alone
        coefficients = torch.cat([-coefficients / 2, coefficients / 2])
        intercepts = torch.cat([-intercepts / 2, intercepts / 2])
    coefficients = coefficients / torch.from_numpy(scaler.scale_)
    intercepts = intercepts - coefficients @ torch.from_numpy(scaler.mean_)
    weight = torch.zeros(classes, features.shape[1])
    bias = torch.full((classes,), float(intercepts.min()))
    present = torch.as_tensor(regression.classes_)
    weight[present], bias[present] = coefficients.float(), intercepts.float()
    return weight, bias
