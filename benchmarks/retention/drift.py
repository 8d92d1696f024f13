"""Where the drift gate's limit comes from: KL on general text against general knowledge lost.

    python benchmarks/retention/drift.py      # about 25 minutes on 2 cores

Each domain is trained at rates from gentle to reckless. KL from base to adapter on general text
needs no questions and no labels; this asks how well it foretells what the probes lose, and from
which KL on more than the retention margin (3 points) is lost.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains import DomainModel, load_domain
from lora_domains.display import Display

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "drift.json"
DOMAINS = ("medical", "finance", "support")
RATES = (0.0003, 0.001, 0.003, 0.006, 0.012, 0.024)
EPOCHS, MARGIN = 3, 0.03


def measure(domain: str, lr: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True))
        declared = load_domain(ROOT / "recipes" / f"{domain}.py")
        model.fit(declared, epochs=EPOCHS, lr=lr, patience=EPOCHS)
        entry = model.evaluate(declared).entry
    pooled, nats = entry["general"]["pooled"], entry["general"]["nats"]
    score = entry["domain_scores"][entry["judged"]["metric"]]
    return {
        "domain": domain,
        "lr": lr,
        "kl": entry["general"]["kl"]["general"],
        "nats_rise": nats["difference"],
        "general_base": pooled["base"],
        "general_lost": -pooled["difference"],
        "score": score["adapter"],
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Correlation of KL with what was lost, and the KL between harmless and harmful runs."""
    kl, lost = (np.array([run[key] for run in runs]) for key in ("kl", "general_lost"))
    ranks = [np.argsort(np.argsort(values)) for values in (kl, lost)]
    kept, harmed = kl[lost <= MARGIN], kl[lost > MARGIN]
    return {
        "pearson_kl_lost": float(np.corrcoef(kl, lost)[0, 1]),
        "spearman_kl_lost": float(np.corrcoef(*ranks)[0, 1]),
        "largest_kl_within_margin": float(kept.max()) if len(kept) else None,
        "smallest_kl_beyond_margin": float(harmed.min()) if len(harmed) else None,
    }


def main() -> None:
    runs = []
    for domain in DOMAINS:
        for lr in RATES:
            runs.append(measure(domain, lr))
            print(json.dumps(runs[-1]), f"load {os.getloadavg()[0]:.1f}", flush=True)
            RESULTS.parent.mkdir(exist_ok=True)
            found = {"epochs": EPOCHS, "margin": MARGIN, "runs": runs}
            RESULTS.write_text(json.dumps(found | {"summary": summary(runs)}, indent=1) + "\n")


if __name__ == "__main__":
    main()
