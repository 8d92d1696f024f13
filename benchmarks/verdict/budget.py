"""What does a test set's budget of five evaluations cost, and what does it prevent?

    python benchmarks/verdict/budget.py      # about three minutes on one core, no model

Power: how often a good adapter passes, and a harmful one fails, at each evaluation. Climbs: how
often five adapters that are no better than their rival, each a change to the best one so far, end
in a pass. The package's own gates and bounds judge simulated answers.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.stats.bootstrap import bootstrap
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_f1,
    compare_means,
    ratio,
    size_of_ratio,
)
from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.gates import GATES, Gates, judge_all
from lora_domains.verdict.ledger import Standing, level
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.side_effects import DRIFT_LIMIT

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "budget.json"
BUDGET = Gates().evaluations
POSITIVES, SHARED = 0.4, 0.6
"""Share of positives; share of the rows on which adapter and rival draw on the same noise."""
Array = np.ndarray
Random = np.random.Generator


# ── Power ───────────────────────────────────────────────────────────────────────────────────────


def evidence_of(items: list[dict[str, Any]], number: int) -> Evidence:
    """The evidence in items, as the ``number``-th evaluation of their test set."""
    standing = Standing("simulated", number, BUDGET, level(BUDGET))
    labels = ["routine", "urgent"]
    return Evidence(ScoreTable(items), METRICS["f1"], labels, 1, evaluations=standing)


def good_items(rng: Random, n: int) -> list[dict[str, Any]]:
    """Recall .95 and false alarms .03; the rival, in the place of the base, has .87 and .04."""
    truth = rng.random(n) < POSITIVES
    noise, other = rng.random(n), rng.random(n)
    shared = np.where(rng.random(n) < SHARED, noise, other)
    rival = noise < np.where(truth, 0.87, 0.04)
    adapter = shared < np.where(truth, 0.95, 0.03)
    return [
        {"set": "test", "id": f"{i}", "target": int(truth[i]), "scores": {
            "base": {"prediction": int(rival[i])}, "adapter": {"prediction": int(adapter[i])},
        }}
        for i in range(n)
    ]  # fmt: skip


def harmed_items(
    rng: Random, n: int = 700, flips: float = 0.12, loss: float = 0.07
) -> list[dict[str, Any]]:
    """Probes of which a share ``flips`` changes, so that accuracy falls by ``loss``."""
    draw = rng.random(n)
    lost, won = draw < (flips + loss) / 2, draw > 1 - (flips - loss) / 2
    return [
        {"set": "general", "id": f"{i}", "target": 1, "suite": "world", "scores": {
            "base": {"prediction": int(not won[i])}, "adapter": {"prediction": int(not lost[i])},
        }}
        for i in range(n)
    ]  # fmt: skip


def passing(n: int, number: int, runs: int, seed: int = 0) -> float:
    """How often a good adapter passes gain, recall, precision and the ledger."""
    rng, passed = np.random.default_rng([seed, n]), 0
    gates = [(GATES[name], value) for name, value in Gates().record().items()
             if name in ("recall", "precision", "evaluations")]  # fmt: skip
    for _ in range(runs):
        evidence = evidence_of(good_items(rng, n), number)
        results = [gate.judge(evidence, value) for gate, value in [(GATES["gain"], 0.0), *gates]]
        passed += {result.verdict for result in results if result} == {"pass"}
    return passed / runs


def failing(number: int, runs: int, seed: int = 0) -> float:
    """How often the retention gate fails an adapter that is truly 7 points worse."""
    rng, failed = np.random.default_rng([seed, 700]), 0
    for _ in range(runs):
        results = judge_all(evidence_of(harmed_items(rng), number), Gates().record())
        failed += next(r.verdict for r in results if r.name == "retention") == "fail"
    return failed / runs


# ── Climbs ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Kind:
    """A kind of metric: how an adapter's answers are drawn, scored and compared with the rival's.

    ``truth`` draws what the rows are; ``draw`` answers of an adapter of the rival's quality, shape
    (n, …); ``score`` is higher for better answers; ``passes`` applies the gate at a level.
    """

    truth: Callable[[Random, int], Array]
    draw: Callable[[Random, Array], Array]
    score: Callable[[Array, Array], float]
    passes: Callable[[Array, Array, Array, float], bool]


def climb(kind: Kind, redrawn: float, runs: int, n: int = 500, seed: int = 0) -> float:
    """How often a climb through ``BUDGET`` adapters that are no better than their rival passes.

    Each adapter is the best so far with a share ``redrawn`` of its answers drawn anew (1: adapters
    independent of one another); it is kept if it scores higher on the test set.
    """
    rng, passed = np.random.default_rng([seed, n, round(1000 * redrawn)]), 0
    for _ in range(runs):
        truth = kind.truth(rng, n)
        rival, best = kind.draw(rng, truth), kind.draw(rng, truth)
        for step in range(BUDGET):
            now = best
            if step:
                fresh = kind.draw(rng, truth)
                change = (rng.random(n) < redrawn).reshape(n, *[1] * (best.ndim - 1))
                now = np.where(change, fresh, best)
            if kind.passes(truth, rival, now, level(BUDGET)):
                passed += 1
                break
            if kind.score(truth, now) > kind.score(truth, best):
                best = now
    return passed / runs


def better(
    kind_score: Callable[[Array, Array], float],
    bounded: Callable[[Array, Array, Array, float], Comparison],
) -> Callable[[Array, Array, Array, float], bool]:
    """The gate on gain: the lower bound of the difference is above 0."""

    def passes(truth: Array, rival: Array, now: Array, at: float) -> bool:
        # Bounds contain the difference, so one below 0 need not be bounded.
        if kind_score(truth, now) <= kind_score(truth, rival):
            return False
        return bool(bounded(truth, rival, now, at).lower > 0)

    return passes


def two_classes(rng: Random, n: int) -> Array:
    return rng.random(n) < POSITIVES


def detected(rng: Random, truth: Array) -> Array:
    return rng.random(len(truth)) < np.where(truth, 0.87, 0.04)


def four_classes(rng: Random, n: int) -> Array:
    return rng.choice(4, n, p=[0.4, 0.3, 0.2, 0.1])


def classified(rng: Random, truth: Array) -> Array:
    n = len(truth)
    return np.where(rng.random(n) < 0.8, truth, rng.integers(0, 4, n))


def accuracy(truth: Array, answers: Array) -> float:
    return float((truth == answers).mean())


def f1(truth: Array, answers: Array) -> float:
    return 2 * float((truth & answers).sum()) / max(1, int(truth.sum() + answers.sum()))


def macro_f1(truth: Array, answers: Array) -> float:
    return float(np.mean([f1(truth == label, answers == label) for label in np.unique(truth)]))


def mean(truth: Array, answers: Array) -> float:
    return float(answers.mean())


def difficulty(rng: Random, n: int) -> Array:
    return rng.beta(2, 2, n)


def answered(rng: Random, truth: Array) -> Array:
    """Token F1 of generated answers, 0 or 1 for many of them."""
    return np.clip(truth + rng.normal(0, 0.4, len(truth)), 0, 1)


LIMIT = DRIFT_LIMIT
"""Largest KL allowed; every adapter of a climb is truly there."""
TEXT_WEIGHT = 1 / (1 + math.sqrt((1 - SHARED) / SHARED))
"""Weight by which the text explains ``SHARED`` of the variance of KL per token."""


def texts(weight: float) -> Callable[[Random, int], Array]:
    """Texts of 20 to 200 tokens: columns are tokens, the text's share of KL, and its weight."""

    def drawn(rng: Random, n: int) -> Array:
        return np.stack([rng.integers(20, 200, n), rng.gamma(2.0, 0.5, n), np.full(n, weight)], 1)

    return drawn


def drifted(rng: Random, text: Array) -> Array:
    """KL of each text: ``LIMIT`` per token on average."""
    tokens, own, weight = text.T
    kl: Array = LIMIT * tokens * (weight * own + (1 - weight) * rng.gamma(2.0, 0.5, len(text)))
    return kl


def little_drift(text: Array, kl: Array) -> float:
    return -float(kl.sum() / text[:, 0].sum())


def drift_passes(text: Array, rival: Array, kl: Array, at: float) -> bool:
    if -little_drift(text, kl) >= LIMIT:
        return False
    columns = np.stack([kl, text[:, 0]], axis=1)
    bounds = bootstrap(
        ratio, columns, level=at, span=size_of_ratio(columns), limits=(0.0, float("inf"))
    )
    return bounds.upper <= LIMIT


MARGIN = Gates().retention
"""Loss of accuracy on probes that is allowed; every adapter of a climb truly has it."""
FLIPS = 0.2


def probes(rng: Random, n: int) -> Array:
    """The noise of each probe that all adapters share."""
    return rng.random(n)


def harmed(shared: float) -> Callable[[Random, Array], Array]:
    """Probes won (1), lost (-1) and kept (0): a share ``FLIPS`` changes, ``MARGIN`` is lost."""

    def drawn(rng: Random, noise: Array) -> Array:
        own = np.where(rng.random(len(noise)) < shared, noise, rng.random(len(noise)))
        won, lost = (FLIPS - MARGIN) / 2, (FLIPS + MARGIN) / 2
        return np.where(own < won, 1, np.where(own < won + lost, -1, 0))

    return drawn


def retention_passes(noise: Array, rival: Array, change: Array, at: float) -> bool:
    return compare_accuracy(change < 0, change > 0, level=at).lower >= -MARGIN


KINDS: Mapping[str, Kind] = {
    "accuracy": Kind(four_classes, classified, accuracy, better(
        accuracy, lambda t, a, b, at: compare_accuracy(t == a, t == b, level=at))),
    "f1": Kind(two_classes, detected, f1, better(
        f1, lambda t, a, b, at: compare_f1(t, a, b, 1, level=at))),
    "macro_f1": Kind(four_classes, classified, macro_f1, better(
        macro_f1, lambda t, a, b, at: compare_f1(t, a, b, level=at))),
    "mean": Kind(difficulty, answered, mean, better(
        mean, lambda t, a, b, at: compare_means(a, b, level=at, share=True))),
    "kl": Kind(texts(TEXT_WEIGHT), drifted, little_drift, drift_passes),
    "retention": Kind(probes, harmed(SHARED), mean, retention_passes),
}  # fmt: skip


UNSHARED: Mapping[str, Kind] = {
    "kl": Kind(texts(0.0), drifted, little_drift, drift_passes),
    "retention": Kind(probes, harmed(0.0), mean, retention_passes),
}
"""Where adapters change texts and probes that have nothing in common: unlike gains over a rival,
whose errors all adapters share, five such figures are independent of one another."""

# ── What the budget does not cover ──────────────────────────────────────────────────────────────


def best_by_slice(slices: int, runs: int, n: int = 500, adapters: int = 8, seed: int = 0) -> float:
    """How often the best of ``adapters`` in each of ``slices`` passes, when all are useless.

    None is better than the rival; for each slice of the test rows the one that scores highest on
    them answers. The mixture is then evaluated once.
    """
    kind, rng, passed = KINDS["f1"], np.random.default_rng([seed, slices]), 0
    for _ in range(runs):
        truth = two_classes(rng, n)
        rival = detected(rng, truth)
        tried = np.stack([detected(rng, truth) for _ in range(adapters)])
        part = np.arange(n) % slices
        correct = np.stack([np.bincount(part, one == truth, slices) for one in tried])
        mixed = tried[correct.argmax(0)[part], np.arange(n)]
        passed += kind.passes(truth, rival, mixed, level(BUDGET))
    return passed / runs


def main() -> None:
    redrawn = (0.1, 0.3, 1.0)
    results: dict[str, Any] = {
        "command": "python benchmarks/verdict/budget.py",
        "budget": BUDGET,
        "level": level(BUDGET),
        "good_passes": {
            f"n={n}": {str(k): passing(n, k, 1000) for k in (1, BUDGET)} for n in (200, 500, 600)
        },
        "sixth_passes": passing(600, BUDGET + 1, 100),
        "harmful_fails": {str(k): failing(k, 1000) for k in (1, BUDGET, BUDGET + 1)},
        "climb_passes": {
            name: {f"{share:.0%} redrawn": climb(kind, share, 1000) for share in redrawn}
            for name, kind in KINDS.items()
        },
        "not_covered": {
            f"best of 8 adapters in each of {slices} slices": best_by_slice(slices, 400)
            for slices in (4, 8, 16)
        } | {
            f"climb on {name}, nothing shared, {share:.0%} redrawn": climb(kind, share, 2000)
            for name, kind in UNSHARED.items() for share in (0.1, 0.3, 0.5, 1.0)
        } | {
            f"climb on kl of 100 texts, nothing shared, {share:.0%} redrawn": climb(
                UNSHARED["kl"], share, 2000, n=100
            )
            for share in redrawn
        },
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
