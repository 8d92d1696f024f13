"""What balanced classes change where positives are rare, on a sentence encoder with a head.

    python benchmarks/training/balance.py BASE --rows DIR    # 20 minutes on one core
    python benchmarks/training/balance.py --table            # the stored runs

BASE is a folder of all-MiniLM-L6-v2. DIR/sms_spam/train.jsonl are real rows, which are not copied;
no test row is read. Of its training split, rows of each class are drawn so that ``SHARE`` of all
are spam: ``TRAIN`` to train on, ``VALIDATION`` that choose the epoch (by F1), and ``SPARE`` that
are scored. The ways differ in ``training.balance`` alone. Recall, precision and F1 are those of the
most likely class; *F1, tuned* is that from the probability with the best F1 on the validation rows,
and ECE the expected calibration error.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "balance.json"
SHARE = 0.03
"""Share of positives among the rows of every part."""
TRAIN, VALIDATION, SPARE = 600, 500, 1000
EPOCHS = 4
SEEDS = (0, 1, 2)
FIGURES = ("recall", "precision", "f1", "tuned_f1", "ece")


def run(balance: str, seed: int, base: Path, rows: Path) -> dict[str, Any]:
    """The figures of one adapter on the spare rows."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel
    from lora_domains.console import Display
    from lora_domains.domain import with_settings
    from lora_domains.evaluation.scorer import Part, Scorer
    from lora_domains.stats.calibration import calibration
    from lora_domains.stats.thresholds import label_thresholds
    from lora_domains.verdict.metrics import metric_named
    from lora_domains.verdict.scores import ScoreTable

    torch.set_num_threads(1)
    task = Classification(head=True, positive="spam")
    domain = Domain("spam", task, Data(**sampled(rows / "sms_spam" / "train.jsonl", seed),
                                       drop_leaks=True))  # fmt: skip
    domain = with_settings(
        domain, seed=seed, epochs=EPOCHS, balance=None if balance == "none" else balance
    )
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(base, out=out, display=Display(quiet=True))
        card = model.fit(domain)
        dataset, scorer = model.dataset("spam"), Scorer(model.bank, Display(quiet=True))
        task = dataset.domain.task
        scored = {
            name: scorer.scores(Part(name, task, part), ["spam"])["spam"]
            for name, part in (("validation", dataset.validation), ("spare", dataset.test))
        }
    positive = task.positive_index
    chances, truths = {}, {}
    for name, part in (("validation", dataset.validation), ("spare", dataset.test)):
        chances[name] = np.array([score["positive"] for score in scored[name]])
        truths[name] = np.array([row.encoded.target == positive for row in part])
    items = [
        {"target": row.encoded.target, "scores": {"adapter": score}}
        for row, score in zip(dataset.test, scored["spare"], strict=True)
    ]
    found = {n: metric_named(n).value(ScoreTable(items), "adapter", positive)
             for n in ("recall", "precision", "f1")}  # fmt: skip
    chosen = label_thresholds(chances["validation"][:, None], truths["validation"][:, None])
    predicted = chances["spare"] >= (0.5 if chosen is None else float(chosen[0]))
    hits = int((predicted & truths["spare"]).sum())
    confidence, right, brier = (
        np.array([score[key] for score in scored["spare"]])
        for key in ("confidence", "prediction", "brier")
    )
    right = right == [row.encoded.target for row in dataset.test]
    training = card.adapter.training
    return {
        "balance": balance, "seed": seed, **found,
        "tuned_f1": 2 * hits / max(1, int(predicted.sum() + truths["spare"].sum())),
        "ece": calibration(confidence, right, brier)["ece"],
        "train": len(dataset.train), "validation": len(dataset.validation), "spare": len(items),
        "positives": {name: int(truth.sum()) for name, truth in truths.items()},
        **{key: training[key] for key in ("lr", "batch_size", "epochs", "best_epoch", "seconds")},
        "git": card.environment["git"],
    }  # fmt: skip


def sampled(path: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Spare, validation and training rows of ``SHARE`` positives, drawn by ``seed``."""
    from lora_domains.data.readers import read

    random = np.random.default_rng(seed)
    of_class: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for row in read(path, "train"):
        of_class[row.values["label"] == "spam"].append(dict(row.values))
    drawn = {one: iter([rows[i] for i in random.permutation(len(rows))])
             for one, rows in of_class.items()}  # fmt: skip
    parts = {}
    for name, size in (("test", SPARE), ("validation", VALIDATION), ("train", TRAIN)):
        positives = round(SHARE * size)
        parts[name] = [next(drawn[n < positives]) for n in range(size)]
    return parts


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds, and the standard deviation between them."""
    heads = ["balance", "recall", "precision", "F1", "F1, tuned", "ECE"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for balance in ("none", "weights", "batches"):
        own = [found for found in runs if found["balance"] == balance]
        cells = []
        for name in FIGURES if own else ():
            values = [found[name] for found in own]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
        lines.append(f"| {balance} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", type=Path, nargs="?", help="folder of the sentence encoder")
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not flags.table:
        done = {(found["balance"], found["seed"]) for found in runs}
        for seed in SEEDS:
            for balance in ("none", "weights", "batches"):
                if (balance, seed) not in done:
                    runs.append(run(balance, seed, flags.base, flags.rows))
                    RESULTS.write_text(json.dumps({"share": SHARE, "runs": runs}, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
