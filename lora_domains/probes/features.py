"""Linear probes: classes that frozen features tell apart, a head of a sentence encoder that starts
from one, and what an encoder knows before and after training.

A head that starts from random weights first pulls the features apart by errors that the probe does
not make (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", arXiv 2202.10054). ``benchmarks/training/heads.py`` compares the two.

An encoder without a masked-token head predicts nothing that could be compared, but what it knows is
in its features: a logistic regression on them tells animals from tools, singular from plural and
present from past (Alain & Bengio 2016, arXiv 1610.01644; Conneau et al. 2018, arXiv 1805.01070).
The same regression is fitted on the features of base and adapter, on the same folds; each text is
predicted by the one that was not fitted on it. The texts are made from the tables of the embedded
world and the same everywhere.
"""

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.embedded import facts
from lora_domains.inference.batches import Progress, no_progress
from lora_domains.inference.likelihoods import text_features
from lora_domains.inference.memory import pass_limit
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import Head
from lora_domains.modeling.routing import entered
from lora_domains.placement import is_sharded
from lora_domains.tasks import Example, Task
from lora_domains.tokenization.encoded import EncodedExample

KEPT = 2**28
"""Bytes of features of a base that a process keeps."""
FOLDS = 5
STRENGTH = 0.1
"""Inverse regularisation strength (C) of the regressions on ``feature_sets``."""
PER_RELATION = 16
"""The most pairs of a relation of the embedded world."""
RIDGE = 100.0
"""Penalty of a linear regression of strength 1."""
HEAD_STRENGTH = 0.01
"""Inverse regularisation strength (C) of the probe that a head starts from. A larger one predicts
few training rows with certainty, and leaves the adapter nothing to learn."""


# ── Regressions, and a head that starts from one ──────────────────────────────────────────────────


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


_kept: "weakref.WeakKeyDictionary[nn.Module, OrderedDict[str, Tensor]]"
_kept = weakref.WeakKeyDictionary()


def base_features(
    base: Base, rows: Sequence[EncodedExample], pooling: str, progress: Progress = no_progress
) -> Tensor:
    """The features of ``rows`` by ``base`` without an adapter, (rows, hidden).

    They are the same for the probe from which a head starts and for each evaluation: the process
    keeps them in memory, ``KEPT`` bytes at most, and no file does, since text can be guessed from
    them. They are computed again once a weight changes.
    """
    if is_sharded(base.model):
        return text_features(base.model, rows, base.pad, progress, pooling)
    prompts = [row.prompt for row in rows]
    decides = (base.state_digest(), pooling, pass_limit(base.model), prompts)
    key, kept = (
        sha256(repr(decides).encode()).hexdigest(),
        _kept.setdefault(base.model, OrderedDict()),
    )
    if key not in kept:
        with entered(base.model, None, None):
            kept[key] = text_features(base.model, rows, base.pad, progress, pooling)
    kept.move_to_end(key)
    features = kept[key]
    while sum(one.nbytes for one in kept.values()) > KEPT:
        kept.popitem(last=False)
    return features


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
        display.progress("frozen features", len(rows)) as advance,
    ):
        features = base_features(base, rows, head.layout.pooling, advance)
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
    model = ridge(10 * HEAD_STRENGTH).fit(features.numpy(), (truth - mean) / sd)
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
    model = logistic_regression(HEAD_STRENGTH, balanced)
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


# ── What an encoder knows ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FeatureSet:
    """Texts with a class each. Those of one unit, such as two forms of a word, share a fold."""

    name: str
    texts: tuple[str, ...]
    targets: tuple[int, ...]
    units: tuple[str, ...]

    def examples(self) -> list[Example]:
        """The texts as examples for a head."""
        choices = tuple(f" {n}" for n in range(max(self.targets) + 1))
        return [
            Example(f"{self.name}:{n}", text, "", choices, target)
            for n, (text, target) in enumerate(zip(self.texts, self.targets, strict=True))
        ]

    def folds(self) -> np.ndarray:
        """The fold of each text, (texts,): the units of each class in turn, drawn by name."""
        units = list(dict.fromkeys(self.units))
        Random(self.name).shuffle(units)
        target = dict(zip(self.units, self.targets, strict=True))
        units.sort(key=target.__getitem__)  # stable: each class is spread over the folds
        fold = {unit: n % FOLDS for n, unit in enumerate(units)}
        return np.array([fold[unit] for unit in self.units])

    def predicted(self, features: np.ndarray) -> list[int]:
        """The class of each text by its ``features`` (texts, width)."""
        folds, targets = self.folds(), np.array(self.targets)
        predicted = np.zeros(len(targets), dtype=int)
        for fold in range(FOLDS):
            held_out = folds == fold
            model = logistic_regression(STRENGTH)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*failed to converge")
                warnings.filterwarnings("ignore", message="The number of unique classes")
                model.fit(features[~held_out], targets[~held_out])
            predicted[held_out] = model.predict(features[held_out])
        return predicted.tolist()


@cache
def feature_sets() -> tuple[FeatureSet, ...]:
    """Every set of texts."""
    relations = (
        (f"{x}: {y}", number, x)
        for number, relation in enumerate(facts.RELATIONS)
        for x, y in Random(relation.name).sample(
            relation.pairs, min(PER_RELATION, len(relation.pairs))
        )
    )  # fmt: skip
    return (
        _classified("kind", "I read something about the {}.", facts.CATEGORIES),
        _classified("animal", "Yesterday they saw the {} there.", facts.ANIMAL_CLASSES),
        _classified("continent", "She has friends in {}.", facts.CONTINENTS),
        _forms("number", "We talked about the {} again.", facts.PLURALS),
        _forms("tense", "They {} it, as far as I know.", facts.PAST_TENSES),
        _forms("comparison", "This one is {}, if you ask me.", facts.COMPARATIVES),
        _negated("negation", facts.OPPOSITES),
        _set("relation", relations),
    )


def probed(features: Sequence[np.ndarray]) -> list[list[int]]:
    """The predicted classes of all ``feature_sets``, from the features of each."""
    return [one.predicted(x) for one, x in zip(feature_sets(), features, strict=True)]


def _classified(name: str, frame: str, pairs: Iterable[tuple[str, str]]) -> FeatureSet:
    """The class of a thing, from pairs of both."""
    pairs = list(pairs)
    classes = list(dict.fromkeys(kind for _, kind in pairs))
    return _set(name, ((frame.format(x), classes.index(kind), x) for x, kind in pairs))


def _forms(name: str, frame: str, pairs: Iterable[tuple[str, str]]) -> FeatureSet:
    """Which of two forms a word has, from pairs of them."""
    different = [pair for pair in pairs if pair[0] != pair[1]]
    return _set(name, (
        (frame.format(form), n, pair[0]) for pair in different for n, form in enumerate(pair)
    ))  # fmt: skip


def _negated(name: str, pairs: Iterable[tuple[str, str]]) -> FeatureSet:
    """Whether a sentence denies what it is about."""
    words = list(dict.fromkeys(word for pair in pairs for word in pair))
    frames = ("He says that it was {}.", "He says that it was never {}.",
              "It was {}, and nothing else.", "It was anything but {}.")  # fmt: skip
    return _set(name, (
        (frames[2 * (n % 2) + denied].format(word), denied, word)
        for n, word in enumerate(words) for denied in (0, 1)
    ))  # fmt: skip


def _set(name: str, rows: Iterable[tuple[str, int, str]]) -> FeatureSet:
    once = {row[0]: row for row in rows}
    texts, targets, units = zip(*once.values(), strict=True)
    return FeatureSet(name, texts, targets, units)
