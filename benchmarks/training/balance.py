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

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from heads import carry_out, command, fitted, metric_of, own_scores

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "balance.json"
SHARE = 0.03
"""Share of positives among the rows of every part."""
TRAIN, VALIDATION, SPARE = 600, 500, 1000
EPOCHS = 4
SEEDS = (0, 1, 2)
WAYS = ("none", "weights", "batches")
FIGURES = ("recall", "precision", "f1", "tuned_f1", "ece")


def run(balance: str, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """The figures of one adapter on the spare rows."""
    from lora_domains import Classification, Data, Domain
    from lora_domains.domain import with_settings
    from lora_domains.stats.calibration import calibration
    from lora_domains.stats.thresholds import label_thresholds

    task = Classification(head=True, positive="spam")
    rows = sampled(folder / "sms_spam" / "train.jsonl", seed)
    data = Data(rows["train"], rows["validation"], rows["test"], drop_leaks=True)
    settings = {"seed": seed, "epochs": EPOCHS, "balance": None if balance == "none" else balance}
    with fitted(with_settings(Domain("spam", task, data), **settings), base) as (
        record, dataset, scorer,
    ):  # fmt: skip
        parts = {"validation": dataset.validation, "spare": dataset.test}
        scores = {name: own_scores(dataset, scorer, part) for name, part in parts.items()}
    positive = dataset.domain.task.positive_index
    assert positive is not None
    targets = {n: np.array([row.encoded.target for row in part]) for n, part in parts.items()}
    truth = {name: part == positive for name, part in targets.items()}
    chances = {n: np.array([score["positive"] for score in part]) for n, part in scores.items()}
    spare = scores["spare"]
    chosen = label_thresholds(chances["validation"][:, None], truth["validation"][:, None])
    assert chosen is not None
    (threshold,) = chosen
    tuned = [{**score, "prediction": positive if chance >= threshold else 1 - positive}
             for score, chance in zip(spare, chances["spare"], strict=True)]  # fmt: skip
    confidence, predicted, brier = (
        np.array([score[key] for score in spare]) for key in ("confidence", "prediction", "brier")
    )
    return {
        "balance": balance, "seed": seed,
        **{name: metric_of(name, dataset, spare) for name in ("recall", "precision", "f1")},
        "tuned_f1": metric_of("f1", dataset, tuned),
        "ece": calibration(confidence, predicted == targets["spare"], brier)["ece"],
        "positives": {name: int(part.sum()) for name, part in truth.items()}, **record,
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
    for balance in WAYS:
        own = [found for found in runs if found["balance"] == balance]
        cells = []
        for name in FIGURES if own else ():
            values = [found[name] for found in own]
            cells.append(f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}")
        lines.append(f"| {balance} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    flags = command(__doc__).parse_args()
    jobs = [{"balance": balance, "seed": seed} for seed in SEEDS for balance in WAYS]
    settings = {"command": "python benchmarks/training/balance.py BASE --rows DIR",
                "share": SHARE, "seeds": SEEDS}  # fmt: skip
    carry_out(flags, RESULTS, jobs, settings, run, table)


if __name__ == "__main__":
    main()
