"""Is forgetting foretold by KL on general text, or by KL on the task's own inputs?

    python benchmarks/training/task_kl.py     # 15 minutes on one core; continues if stopped

Shenfeld et al. (2025, arXiv 2509.04259) find that KL between the fine-tuned and the base model, on
the inputs of the new task, foretells what is forgotten. Here adapters are trained in some of the
ways of ``retention.py``, on fewer rows, and measured: KL from the base on general text, KL from the
base on the answers to test rows, and the share of general questions lost. Spearman's correlation of
each KL with that share is reported, over all adapters and over those that were trained plainly. The
runs of ``retention.py`` measure the same (``--task-kl`` trains again those stored without it).
"""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from retention import DOMAINS, foretold, run

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "task_kl.json"
WAYS = ("plain", "rate / 3", "replay 25 %", "KL 0.5", "KL 2")
ROWS, EPOCHS, SEED = 400, 2, 0


def store(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    spearmans = foretold(runs)
    content = {
        "command": "python benchmarks/training/task_kl.py",
        "rows": ROWS, "epochs": EPOCHS, "seed": SEED, "spearman": spearmans, "runs": list(runs),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return spearmans


def main() -> None:
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    done = {(found["way"], found["domain"]) for found in runs}
    for way, domain in product(WAYS, DOMAINS):
        if (way, domain) not in done:
            runs.append(run((way, domain, SEED), ROWS, EPOCHS))
            print(json.dumps({k: v for k, v in runs[-1].items() if k != "scales"}), flush=True)
            store(runs)
    print(json.dumps(store(runs), indent=1))


if __name__ == "__main__":
    main()
