"""A linear probe: logistic regression on frozen features, and a head that starts from its weights.

A head that starts from random weights first pulls the features apart by errors that the probe does
not make (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", arXiv 2202.10054). ``benchmarks/training/heads.py`` compares the two.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.inference.likelihoods import text_features
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import Head
from lora_domains.tokenization.encoded import EncodedExample

STRENGTH = 0.01
"""Inverse regularisation strength (C) of the probe that a head starts from. A larger one predicts
few training rows with certainty, and leaves the adapter nothing to learn."""


def logistic_regression(strength: float) -> Any:
    """Logistic regression on standardised features, for dense ones."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))


def probe_head(head: Head, bank: Bank, rows: Sequence[EncodedExample], display: Display) -> Head:
    """``head``, a single layer, with the weights of a linear probe fitted to ``rows``.

    Every process gets those of the main one. Rows of a single class leave it as it is.
    """
    if len({row.target for row in rows}) < 2:
        return head
    base = bank.base
    with (
        distributed.sharing(),
        bank.routed(None),
        display.progress("frozen features", len(rows)) as advance,
    ):
        features = text_features(base.model, rows, base.pad, advance, head.layout.pooling)
    targets = [row.target for row in rows]
    weight, bias = distributed.on_main(lambda: _fitted(features, targets, head.classes))
    (layer,) = head.layout.layers
    return replace(head, weights={f"{layer.name}.weight": weight, f"{layer.name}.bias": bias})


def _fitted(features: Tensor, targets: Sequence[int], classes: int) -> tuple[Tensor, Tensor]:
    """Weight (classes, hidden) and bias (classes,) on features that are not standardised.

    A class without a row has no weight, and the least bias of all.
    """
    model = logistic_regression(STRENGTH)
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
