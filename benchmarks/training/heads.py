"""How a head on a sentence encoder should begin, and at which learning rate it is trained.

    python benchmarks/training/heads.py BASE --rows DIR    # an hour on one core, in parts
    python benchmarks/training/heads.py --table            # the stored runs

BASE is a folder of all-MiniLM-L6-v2. DIR/NAME/train.jsonl are real rows, which are not copied; no
test row is read. Every way trains on the same rows for the default number of epochs, and its epoch
is chosen on the same validation rows; it is compared with the frozen probe (logistic regression on
the base's features, its strength chosen on the same validation rows) on spare rows of the training
split. A way is how the head starts (random weights, or those of a probe of some strength C) and the
share of the learning rate for the base's width. The metric is accuracy, on sms_spam F1.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "heads.json"
WAYS: dict[str, tuple[float | None, float]] = {
    "random": (None, 1.0),
    "random, rate / 3": (None, 1 / 3),
    "probe": (0.1, 1.0),
    "probe, rate / 3": (0.1, 1 / 3),
    "probe of C = .01, rate / 3": (0.01, 1 / 3),
}
"""The strength of the probe that the head starts as, and the share of the derived learning rate."""
SETS: dict[str, dict[str, Any]] = {
    "banking77": {"train": 1000},
    "sms_spam": {"train": 300, "positive": "spam"},
    "twitter_financial_news": {"train": 300},
}
VALIDATION, SPARE = 300, 600
SEEDS = (0,)


def run(way: str, name: str, seed: int, base: Path, rows: Path) -> dict[str, Any]:
    """The scores of the adapter and of the frozen probe on the spare rows."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel
    from lora_domains.console import Display
    from lora_domains.domain import with_settings
    from lora_domains.evaluation.baselines import BaselineInputs, frozen_features
    from lora_domains.evaluation.scorer import Part, Scorer
    from lora_domains.inference import linear_probe
    from lora_domains.training import loop, plan
    from lora_domains.verdict.metrics import metric_named
    from lora_domains.verdict.scores import ScoreTable

    torch.set_num_threads(1)
    strength, share = WAYS[way]
    options = dict(SETS[name])
    parts = sampled(rows / name / "train.jsonl", options.pop("train"), seed)
    positive = options.get("positive")
    domain = Domain(name, Classification(head=True, **options), Data(**parts, drop_leaks=True),
                    metric="f1" if positive else "accuracy")  # fmt: skip
    domain = with_settings(domain, seed=seed)
    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        stack.enter_context(patch.object(plan, "PROBED", share))
        stack.enter_context(patch.object(linear_probe, "STRENGTH", strength))
        if strength is None:
            stack.enter_context(patch.object(loop, "probe_head", lambda head, *_: head))
        model = DomainModel.from_pretrained(base, out=out, display=Display(quiet=True))
        card = model.fit(domain)
        dataset, scorer = model.dataset(name), Scorer(model.bank, Display(quiet=True))
        task = dataset.domain.task
        scored = {
            "adapter": scorer.scores(Part(name, task, dataset.test), [name])[name],
            "probe": frozen_features(BaselineInputs(scorer, dataset, dataset.test)),
        }
    items = [
        {"target": row.encoded.target, "scores": {who: scored[who][n] for who in scored}}
        for n, row in enumerate(dataset.test)
    ]
    metric = metric_named(domain.primary_metric)
    scores = {who: metric.value(ScoreTable(items), who, task.positive_index) for who in scored}
    training = card.adapter.training
    return {
        "way": way, "rows": name, "seed": seed, **scores, "train": len(dataset.train),
        "validation": len(dataset.validation), "spare": len(items),
        **{key: training[key] for key in ("lr", "batch_size", "epochs", "best_epoch", "seconds")},
        "git": card.environment["git"],
    }  # fmt: skip


def sampled(path: Path, train: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Spare, validation and training rows drawn from the training split by ``seed``."""
    from lora_domains.data.readers import read

    rows = [dict(row.values) for row in read(path, "train")]
    drawn = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    start = SPARE + VALIDATION
    return {
        "test": drawn[:SPARE], "validation": drawn[SPARE:start],
        "train": drawn[start : start + train],
    }  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    names = [name for name in SETS if any(found["rows"] == name for found in runs)]
    lines = ["| way | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for way in ("frozen probe", *WAYS):
        cells = []
        for name in names:
            own = [r for r in runs if r["rows"] == name and way in (r["way"], "frozen probe")]
            key = "probe" if way == "frozen probe" else "adapter"
            cells.append(f"{np.mean([r[key] for r in own]):.3f}" if own else "")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?", help="folder of the sentence encoder")
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--only", nargs="*", default=[*SETS], help="sets of rows to run")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not flags.table:
        done = {(found["way"], found["rows"], found["seed"]) for found in runs}
        for seed, name, way in product(SEEDS, flags.only, WAYS):
            if (way, name, seed) not in done:
                runs.append(run(way, name, seed, flags.base, flags.rows))
                print(json.dumps(runs[-1]), flush=True)
                command = "python benchmarks/training/heads.py BASE --rows DIR"
                content = {"command": command, "seeds": SEEDS, "sets": SETS,
                           "validation": VALIDATION, "spare": SPARE, "runs": runs}  # fmt: skip
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
