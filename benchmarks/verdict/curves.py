"""How often does a learning curve promise a gain from more rows where there is none?

    python benchmarks/verdict/curves.py      # about a minute on one core, no model

Adapters trained on half and on all rows have one true accuracy, .85, moved by the seed of each
training. They are compared on 300 validation rows, by one seed each (the rule before) and by two
whose spread enters the bounds (``stats.seeds``).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.stats.comparisons import compare_accuracy, compare_means
from lora_domains.stats.seeds import pooled_spread, with_seed_spread

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "curves.json"
ACCURACY, ROWS, SHARED = 0.85, 300, 0.6
"""``SHARED`` of the rows are right or wrong for reasons that all adapters share."""
SPREADS = (0.0, 0.01, 0.02, 0.03)
GAINS = (0.0, 0.03, 0.06)
SHARES, SEEDS, RUNS = 4, 2, 2000


def answers(rng: np.random.Generator, gains: np.ndarray, spread: float, seeds: int) -> np.ndarray:
    """Whether each adapter is right on each row, (shares, seeds, rows)."""
    shape = (len(gains), seeds)
    true = np.clip(ACCURACY + gains[:, None] + rng.normal(0, spread, shape), 0, 1)
    luck = np.where(rng.random(ROWS) < SHARED, rng.random(ROWS), rng.random((*shape, ROWS)))
    right: np.ndarray = luck < true[..., None]
    return right


def share_of_yes(gain: float, spread: float, seeds: int, runs: int = RUNS, seed: int = 0) -> float:
    """How often the lower bound of the last step is above 0."""
    rng = np.random.default_rng([seed, round(1000 * gain), round(1000 * spread), seeds])
    gains, yes = np.array([0.0] * (SHARES - 1) + [gain]), 0
    for _ in range(runs):
        right = answers(rng, gains, spread, seeds).astype(float)
        if seeds == 1:
            yes += compare_accuracy(right[-2, 0] > 0, right[-1, 0] > 0).lower > 0
            continue
        compared = compare_means(right[-2].mean(0), right[-1].mean(0))
        bounds = with_seed_spread(
            compared.difference, compared.bounds, *pooled_spread(right.mean(2)), seeds
        )
        yes += bounds.lower > 0
    return yes / runs


def main() -> None:
    results: dict[str, Any] = {
        "command": "python benchmarks/verdict/curves.py",
        "runs": RUNS,
        "yes": {
            f"true gain {gain:g}, spread {spread:g}": {
                f"{seeds} seed" + "s" * (seeds > 1): share_of_yes(gain, spread, seeds)
                for seeds in (1, SEEDS)
            }
            for gain in GAINS
            for spread in SPREADS
        },
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
