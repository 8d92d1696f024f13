"""Linear probes of an encoder: classes that its features tell apart, before and after training.

An encoder without a masked-token head predicts nothing that could be compared, but what it knows is
in its features: a logistic regression on them tells animals from tools, singular from plural and
present from past (Alain & Bengio 2016, arXiv 1610.01644; Conneau et al. 2018, arXiv 1805.01070).
The same regression is fitted on the features of base and adapter, on the same folds; each text is
predicted by the one that was not fitted on it. The texts are made from the tables of the embedded
world and the same everywhere.
"""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np

from lora_domains.embedded import facts
from lora_domains.inference.linear_probe import logistic_regression
from lora_domains.tasks import Example

FOLDS = 5
STRENGTH = 0.1
"""Inverse regularisation strength (C) of the regressions: that of the probe a head starts from."""
PER_RELATION = 16
"""The most pairs of a relation of the embedded world."""


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
