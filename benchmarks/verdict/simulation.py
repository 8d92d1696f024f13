"""How often is a verdict wrong? Gates and intervals, by simulation.

    python benchmarks/verdict/simulation.py      # about three minutes on one core, no model

``budget.py`` simulates the ledger.
The true figures are simulated; the package's own functions judge them. (Not called
``statistics.py``: a script's folder comes first on the path, and torch imports that module.)
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.stats.calibration import calibration
from lora_domains.stats.comparisons import (
    compare_accuracy,
    compare_f1,
    compare_means,
    compare_ratios,
)
from lora_domains.stats.intervals import Bounds, tango, wilson
from lora_domains.stats.seeds import seed_variance
from lora_domains.stats.shares import auc_bounds, membership_auc, share_of
from lora_domains.verdict.ledger import level
from lora_domains.verdict.side_effects import retention

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "verdicts.json"
MARGIN = 0.03
TWO_SIDED = 0.975
"""Level of one side, so that both together are meant to hold the truth in 95 % of runs."""


# ── The retention gate ──────────────────────────────────────────────────────────────────────────


def flipping(difference: float, flips: float) -> list[float]:
    """Shares of items won, lost and unchanged: ``flips`` change, and ``difference`` remains."""
    return [(flips + difference) / 2, (flips - difference) / 2, 1 - flips]


def share_passing(
    n: int, flips: float, difference: float, runs: int, at: float = 0.95, seed: int = 0
) -> float:
    """How often the retention gate passes, at level ``at``, an adapter of this true difference."""
    rng = np.random.default_rng([seed, n, round(1000 * flips)])
    passed = 0
    for won, lost, _ in rng.multinomial(n, flipping(difference, flips), size=runs).tolist():
        change = np.repeat([1, -1, 0], [won, lost, n - won - lost])
        pooled = compare_accuracy(change < 0, change > 0, level=at)
        passed += retention(pooled, MARGIN).verdict == "pass"
    return passed / runs


# ── Groups of items that go together ────────────────────────────────────────────────────────────

PATIENTS = {
    "40 of 5": [5] * 40,
    "40 of 10": [10] * 40,
    "40 of 1 to 29": np.random.default_rng(3).integers(1, 30, 40).tolist(),
    "100, lognormal": [max(1, int(n)) for n in np.random.default_rng(5).lognormal(1, 1, 100)],
    "3 of 20 and 180 of 1": [20] * 3 + [1] * 180,
    "3 of 60 and 60 of 1": [60] * 3 + [1] * 60,
}
"""Positives of each patient."""


def false_passes(patients: str, correlation: float, level: float, floor: float, runs: int) -> float:
    """How often the lower bound of a recall reaches ``floor``, the truth.

    ``correlation`` is the intra-class correlation of the positives of a patient.
    """
    sizes = PATIENTS[patients]
    rng, passed = np.random.default_rng([len(sizes), sum(sizes), round(10 * correlation)]), 0
    shape = (1 - correlation) / correlation
    groups = np.repeat(np.arange(len(sizes)), sizes).tolist()
    for _ in range(runs):
        chance = rng.beta(floor * shape, (1 - floor) * shape, len(sizes))
        hits = rng.random(sum(sizes)) < np.repeat(chance, sizes)
        passed += share_of(hits, groups, level).bounds.lower >= floor
    return passed / runs


# ── Do intervals cover? ─────────────────────────────────────────────────────────────────────────


def covered(make: Callable[[np.random.Generator], tuple[Bounds, float]], runs: int) -> float:
    """Share of runs in which the bounds contain the truth; ``make`` gives (bounds, truth)."""
    rng, held = np.random.default_rng(5), 0
    for _ in range(runs):
        (lower, upper), truth = make(rng)
        held += lower <= truth <= upper
    return held / runs


def accuracy(rng: np.random.Generator) -> tuple[Bounds, float]:
    won, lost, _ = rng.multinomial(300, flipping(-0.02, 0.12))
    return tango(won, lost, 300, TWO_SIDED), -0.02


def share(rng: np.random.Generator) -> tuple[Bounds, float]:
    return wilson(int(rng.binomial(150, 0.85)), 150, TWO_SIDED), 0.85


def clustered(rng: np.random.Generator) -> tuple[Bounds, float]:
    """80 patients of 5 rows each; how likely a row is lost differs from patient to patient."""
    lost = rng.random(400) < np.repeat(rng.beta(0.5, 4.5, 80), 5)
    won = ~lost & (rng.random(400) < 0.1)
    compared = compare_accuracy(~won, ~lost, np.repeat(np.arange(80), 5).tolist(), TWO_SIDED)
    return compared.bounds, 0.9 * 0.1 - 0.1


def mean(rng: np.random.Generator) -> tuple[Bounds, float]:
    change = rng.exponential(1.0, 200) - 0.8
    return compare_means(np.zeros(200), change, level=TWO_SIDED).bounds, 0.2


def nats(rng: np.random.Generator) -> tuple[Bounds, float]:
    """Nats per token of texts of very different lengths; the adapter saves .1 on each token."""
    tokens = rng.integers(5, 100, 200)
    base = tokens * 2.0 + rng.normal(0, 3, 200) * np.sqrt(tokens)
    adapter = base - 0.1 * tokens + rng.normal(0, 1, 200) * np.sqrt(tokens)
    before, after = (np.stack([values, tokens], axis=1) for values in (base, adapter))
    return compare_ratios(before, after, level=TWO_SIDED).bounds, -0.1


def f1(rng: np.random.Generator) -> tuple[Bounds, float]:
    """30 % positives; base finds 60 % and adapter 80 % of them, with 10 % and 5 % of alarms."""
    truth = rng.random(500) < 0.3
    predicted = [np.where(truth, rng.random(500) < hit, rng.random(500) < alarm)
            for hit, alarm in ((0.6, 0.1), (0.8, 0.05))]  # fmt: skip

    def of(hit: float, alarm: float) -> float:
        return 2 * 0.3 * hit / (0.3 + 0.3 * hit + 0.7 * alarm)

    compared = compare_f1(truth, predicted[0], predicted[1], 1, level=TWO_SIDED)
    return compared.bounds, of(0.8, 0.05) - of(0.6, 0.1)


def auc(rng: np.random.Generator) -> tuple[Bounds, float]:
    """Normal scores half a standard deviation apart: AUC = Phi(.5 / sqrt 2) = .638."""
    measured = membership_auc(rng.normal(0.5, 1, 200), rng.normal(0, 1, 150))
    return auc_bounds(measured, 200, 150, TWO_SIDED), 0.6381632


def seeded(rng: np.random.Generator) -> tuple[Bounds, float]:
    """5 seeds (sd .02 between them) on 400 items."""
    changes = 0.05 + rng.normal(0, 0.02, (5, 1)) + rng.normal(0, 0.3, (1, 400))
    figures = seed_variance(changes + rng.normal(0, 0.2, (5, 400)), TWO_SIDED)
    return Bounds(figures["lower"], figures["upper"]), 0.05


def seedless(rng: np.random.Generator) -> tuple[Bounds, float]:
    """The same, where seeds do not matter."""
    changes = 0.05 + rng.normal(0, 0.3, (1, 400)) + rng.normal(0, 0.2, (5, 400))
    figures = seed_variance(changes, TWO_SIDED)
    return Bounds(figures["lower"], figures["upper"]), 0.05


def brier(rng: np.random.Generator) -> tuple[Bounds, float]:
    chance = rng.uniform(0.5, 1, 300)
    right = rng.random(300) < chance
    distance = 2 * (right - chance) ** 2
    bounds = calibration(chance, right, distance, level=TWO_SIDED)["bounds"]["brier"]
    return Bounds(**bounds), 1 / 3  # the mean of 2 p (1 - p)


def ece(rng: np.random.Generator) -> tuple[Bounds, float]:
    """Confidences half as far above .5 as they should be: on average .125 too low."""
    truth = rng.uniform(0.5, 1, 500)
    right, confidence = rng.random(500) < truth, 0.5 + 0.5 * (truth - 0.5)
    figures = calibration(confidence, right, (right - confidence) ** 2, level=TWO_SIDED)
    return Bounds(**figures["bounds"]["ece"]), 0.125


INTERVALS = {
    "tango": accuracy,
    "wilson": share,
    "clustered accuracy": clustered,
    "mean": mean,
    "nats per token": nats,
    "f1": f1,
    "auc": auc,
    "seeds that differ": seeded,
    "seeds alike": seedless,
    "brier": brier,
    "ece": ece,
}


def main() -> None:
    results: dict[str, Any] = {
        "command": "python benchmarks/verdict/simulation.py",
        "margin": MARGIN,
        "harmful_passes": {
            f"n=200, {flips:.0%} flip": share_passing(200, flips, -MARGIN, 2000)
            for flips in (0.05, 0.08, 0.2)
        },
        "harmless_passes": {
            f"n=700, {flips:.0%} flip, {name}": share_passing(700, flips, 0.0, 2000, at)
            for flips in (0.08, 0.2)
            for name, at in (("95 %", 0.95), ("99 %", level(5)))
        },
        "recall_at_the_floor_passes": {
            patients: {
                f"level {at:g}, floor {floor:g}, correlation {correlation:g}": false_passes(
                    patients, correlation, at, floor, 4000
                )
                for at, floor in ((0.96, 0.8), (0.99, 0.8), (0.99, 0.9))
                for correlation in (0.1, 0.3, 0.5)
            }
            for patients in PATIENTS
        },
        "two_sided_95_covers": {name: covered(make, 2000) for name, make in INTERVALS.items()},
    }  # fmt: skip
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
