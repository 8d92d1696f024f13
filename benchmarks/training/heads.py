"""How a head on a sentence encoder should begin, and at which learning rate it is trained.

    python benchmarks/training/heads.py BASE --rows DIR    # an hour on one core, in parts
    python benchmarks/training/heads.py --table            # the stored runs

BASE is a folder of all-MiniLM-L6-v2. DIR/NAME/train.jsonl are real rows, which are not copied; no
test row is read. Every way trains on the same rows for the default number of epochs at most, its
epoch chosen on the same validation rows; it is compared with the frozen probe (logistic regression
on the base's features, its strength chosen on the same validation rows) on spare rows of the
training split. A way is how the head starts (random weights, or those of a probe of some strength
C), the share of the learning rate for the base's width, and whether patience ends the run (as by
default), ends it with a decay, or does not end it. The metric is accuracy, on sms_spam F1.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np

if TYPE_CHECKING:
    from lora_domains import Domain
    from lora_domains.dataset import Dataset
    from lora_domains.evaluation.scorer import Scorer
    from lora_domains.tokenization.encoded import EncodedRow

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "heads.json"
WAYS: dict[str, tuple[float | None, float, dict[str, Any]]] = {
    "random": (None, 1.0, {}),
    "random, rate / 3": (None, 1 / 3, {}),
    "random, decay": (None, 1.0, {"decay": 0.9}),
    "probe": (0.1, 1.0, {}),
    "probe, rate / 3": (0.1, 1 / 3, {}),
    "probe of C = .01": (0.01, 1.0, {}),
    "probe of C = .01, rate · 2 / 3": (0.01, 2 / 3, {}),
    "probe of C = .01, rate · 2 / 3, decay": (0.01, 2 / 3, {"decay": 0.9}),
    "probe of C = .01, rate · 2 / 3, all epochs": (0.01, 2 / 3, {"patience": 8}),
    "probe of C = .01, rate / 3": (0.01, 1 / 3, {}),
    "probe of C = .01, rate / 3, decay": (0.01, 1 / 3, {"decay": 0.9}),
}
"""The strength of the probe that the head starts as, the share of the derived learning rate, and
settings of the training."""
SETS: dict[str, dict[str, Any]] = {
    "banking77": {"train": 1000},
    "sms_spam": {"train": 300, "positive": "spam"},
    "twitter_financial_news": {"train": 300},
    "banking77, many rows": {"train": 7500, "spare": 2000},
    "sms_spam, many rows": {"train": 3000, "spare": 1000, "positive": "spam"},
    "twitter_financial_news, many rows": {"train": 7000, "spare": 2000},
}
VALIDATION, SPARE = 300, 600
SEEDS = (0,)


def run(way: str, rows: str, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """The scores of the adapter and of the frozen probe on the spare rows."""
    from lora_domains import Classification, Data, Domain
    from lora_domains.domain import with_settings
    from lora_domains.evaluation.baselines import BaselineInputs, frozen_features
    from lora_domains.probes import features
    from lora_domains.training import loop, plan

    strength, share, settings = WAYS[way]
    options, name = dict(SETS[rows]), rows.partition(",")[0]
    counts = {"train": options.pop("train"), "spare": options.pop("spare", SPARE)}
    parts = sampled(folder / name / "train.jsonl", **counts, seed=seed)
    positive = options.get("positive")
    data = Data(parts["train"], parts["validation"], parts["test"], drop_leaks=True)
    domain = Domain(name, Classification(head=True, **options), data,
                    metric="f1" if positive else "accuracy")  # fmt: skip
    domain = with_settings(domain, seed=seed, **settings)
    with ExitStack() as stack:
        stack.enter_context(patch.object(plan, "PROBED", share))
        stack.enter_context(patch.object(features, "HEAD_STRENGTH", strength))
        if strength is None:
            stack.enter_context(patch.object(loop, "probe_head", lambda head, *_: head))
        record, dataset, scorer = stack.enter_context(fitted(domain, base))
        adapter = own_scores(dataset, scorer, dataset.test)
        probe = frozen_features(BaselineInputs(scorer, dataset, dataset.test))
        assert probe is not None
        scores = {
            who: metric_of(domain.primary_metric, dataset, records)
            for who, records in (("adapter", adapter), ("probe", probe))
        }
    return {"way": way, "rows": rows, "seed": seed, **scores, **record}


# ── What ``balance`` and ``neftune`` do too ─────────────────────────────────────────────────────


@contextmanager
def fitted(
    domain: "Domain", base: Path | None
) -> Iterator[tuple[dict[str, Any], "Dataset", "Scorer"]]:
    """An adapter that is trained on ``domain`` by one thread: what is stored of its training, its
    dataset, and a scorer that has it."""
    import torch

    from lora_domains import DomainModel
    from lora_domains.console import Display
    from lora_domains.evaluation.scorer import Scorer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(base, out=out, display=Display(quiet=True))
        card = model.fit(domain)
        assert card is not None
        dataset, training = model.dataset(domain.name), card.adapter.training
        keys = ("lr", "batch_size", "epochs", "best_epoch", "seconds")
        yield {
            "train": len(dataset.train), "validation": len(dataset.validation),
            "spare": len(dataset.test), **{key: training[key] for key in keys},
            "git": card.environment["git"],
        }, dataset, Scorer(model.bank, Display(quiet=True))  # fmt: skip


def own_scores(
    dataset: "Dataset", scorer: "Scorer", rows: Sequence["EncodedRow"]
) -> list[dict[str, Any]]:
    """The records of the adapter of ``dataset`` on ``rows``."""
    from lora_domains.evaluation.scorer import Part

    name = dataset.domain.name
    return scorer.scores(Part(name, dataset.domain.task, rows), [name])[name]


def metric_of(name: str, dataset: "Dataset", records: Sequence[dict[str, Any]]) -> float | None:
    """A metric of ``records``, which are those of the spare rows."""
    from lora_domains.verdict.metrics import metric_named
    from lora_domains.verdict.scores import ScoreTable

    items = [
        {"target": row.encoded.target, "scores": {"adapter": record}}
        for row, record in zip(dataset.test, records, strict=True)
    ]
    positive = dataset.domain.task.positive_index
    return metric_named(name).value(ScoreTable(items), "adapter", positive)


def run_missing(
    results: Path, jobs: Sequence[dict[str, Any]], settings: dict[str, Any],
    run_one: Callable[..., dict[str, Any]], workers: int = 1,
) -> None:  # fmt: skip
    """Run those of ``jobs`` that ``results`` lacks, ``workers`` at a time, and store each run when
    it ends."""
    runs = stored_runs(results)
    missing = [job for job in jobs if not any(job.items() <= found.items() for found in runs)]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run_one, **job) for job in missing]):
            runs.append(future.result())
            print(json.dumps(runs[-1]), flush=True)
            results.write_text(json.dumps({**settings, "runs": runs}, indent=1) + "\n")


def command(description: str | None, only: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The command line of an experiment, which may run ``only`` some of its sets of rows."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", type=Path, nargs="?", help="folder of the sentence encoder")
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    if only:
        parser.add_argument("--only", nargs="*", default=[*only], help="sets of rows to run")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    parser.add_argument("--table", action="store_true", help="show the stored runs")
    return parser


def carry_out(
    flags: argparse.Namespace, results: Path, jobs: Sequence[dict[str, Any]],
    settings: dict[str, Any], run_one: Callable[..., dict[str, Any]],
    shown: Callable[[Sequence[dict[str, Any]]], str],
) -> None:  # fmt: skip
    """Run what ``results`` lacks, unless only the table is asked for, and print the table."""
    if not flags.table:
        one = partial(run_one, base=flags.base, folder=flags.rows)
        run_missing(results, jobs, settings, one, flags.workers)
    print(shown(stored_runs(results)))


def stored_runs(results: Path) -> list[dict[str, Any]]:
    """The runs in ``results``; none where there is no such file."""
    runs: list[dict[str, Any]] = []
    if results.exists():
        runs = json.loads(results.read_text())["runs"]
    return runs


def sampled(
    path: Path, *, train: int, seed: int, spare: int = SPARE
) -> dict[str, list[dict[str, Any]]]:
    """Spare, validation and training rows drawn from the training split by ``seed``."""
    from lora_domains.data.readers import read

    rows = [dict(row.values) for row in read(path, "train")]
    drawn = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    start = spare + VALIDATION
    return {
        "test": drawn[:spare], "validation": drawn[spare:start],
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
        if any(cells):
            lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = command(__doc__, [*SETS])
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=[*WAYS], metavar="WAY")
    flags = parser.parse_args()
    jobs = [{"way": way, "rows": name, "seed": seed}
            for seed, name, way in product(SEEDS, flags.only, flags.ways)]  # fmt: skip
    settings = {"command": "python benchmarks/training/heads.py BASE --rows DIR", "seeds": SEEDS,
                "sets": SETS, "validation": VALIDATION, "spare": SPARE}  # fmt: skip
    carry_out(flags, RESULTS, jobs, settings, run, table)


if __name__ == "__main__":
    main()
