"""How often does a threshold chosen on validation rows pass the gate of its target on test rows?

    python benchmarks/verdict/thresholds.py      # about two minutes on one core, no model

Scores of positives (40 % of the rows) and negatives are normal, 2.5 standard deviations apart, as
of a good adapter. The package chooses a threshold on validation rows and judges the recall or
precision of fresh test rows, with the target as the floor: bounds of 99 % pass, of 95 % fail.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from lora_domains.stats.shares import share_of
from lora_domains.stats.thresholds import LEVEL, choose_threshold, counts_at

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "thresholds.json"
POSITIVE, APART = 0.4, 2.5
RUNS = 2000
SIZES = ((100, 500), (300, 500), (500, 1000))
"""Validation and test rows."""


def by_figure(chance: np.ndarray, truth: np.ndarray, name: str, target: float) -> float:
    """The threshold at which recall or precision itself reaches the target (the rule before)."""
    thresholds, hits, predicted = counts_at(chance, truth)
    if name == "recall":
        return float(thresholds[np.flatnonzero(hits >= target * hits[-1])[0]])
    reached = np.flatnonzero((hits >= target * predicted) & (hits > 0))
    return float(thresholds[reached[np.argmax(hits[reached])]])


def by_bound(chance: np.ndarray, truth: np.ndarray, name: str, target: float) -> float:
    targets: dict[str, Any] = {name: target}
    chosen = choose_threshold(chance, truth, **targets)
    assert chosen is not None
    return chosen.threshold


RULES = {"figure": by_figure, "bound": by_bound}


def outcomes(
    name: str, target: float, validation: int, test: int, rule: str, runs: int, seed: int = 0
) -> dict[str, float]:
    """Shares of runs that pass, that fail, and in which the figure is truly below the target."""
    rng = np.random.default_rng([seed, validation, test])
    counts = dict.fromkeys(("pass", "fail", "below"), 0)
    for _ in range(runs):
        truth, score = drawn(rng, validation)
        threshold = RULES[rule](score, truth, name, target)
        found, alarms = ndtr(APART - threshold), ndtr(-threshold)
        precision = POSITIVE * found / (POSITIVE * found + (1 - POSITIVE) * alarms)
        counts["below"] += (found if name == "recall" else precision) < target
        truth, score = drawn(rng, test)
        predicted = score >= threshold
        right = (truth & predicted)[truth if name == "recall" else predicted]
        counts["pass"] += share_of(right, level=LEVEL).bounds.lower >= target
        counts["fail"] += share_of(right, level=0.95).bounds.upper < target
    return {outcome: count / runs for outcome, count in counts.items()}


def drawn(rng: np.random.Generator, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``rows`` are positive, and their scores, a probability in all but its range."""
    truth = rng.random(rows) < POSITIVE
    return truth, rng.normal(APART * truth, 1.0)


def main() -> None:
    results: dict[str, Any] = {
        "command": "python benchmarks/verdict/thresholds.py",
        "runs": RUNS,
        "level": LEVEL,
        "target_is_floor": {
            f"{name} {target:g}, {validation} validation rows, {test} test rows": {
                rule: outcomes(name, target, validation, test, rule, RUNS) for rule in RULES
            }
            for name, target in (("recall", 0.8), ("recall", 0.9), ("precision", 0.85))
            for validation, test in SIZES
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
