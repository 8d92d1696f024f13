"""Derived settings against a sweep: what is lost without a search?

    python benchmarks/training/settings.py [--rows DIR]      # hours; continues if stopped
    python benchmarks/training/settings.py --table           # the stored runs

The sweep spends 31 runs on learning rates (a quarter to four times the one for the base's width),
ranks and numbers of epochs, by successive halving (Jamieson and Talwalkar 2016): all 20 pairs of
rate and rank for one epoch, the 8 with the best validation scores for three, the best 3 of those
for eight. Each is a separate training with its own warm-up and decay. Other settings are defaults,
with a derived batch size, and all runs train on the same few rows, so that a run takes minutes. The
sweep's best is the run with the best validation score. The regret is its test score minus that of
the run with derived settings and early stopping: the mean over the seeds of both.

Other ways to derive settings (``CHOICES``) are compared on validation rows and on spare rows of the
training split, which no run trains on (some are copies of training rows: 7 of 400 in sms_spam).

DIR/NAME/{train,test}.jsonl are real rows, which are not copied.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import sem

if TYPE_CHECKING:
    from lora_domains import Data

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "settings.json"
RECIPES = ("medical", "legal", "finance", "support", "spam")
REAL: dict[str, dict[str, Any]] = {
    "sms_spam": {"positive": "spam"},
    "twitter_financial_news": {},
    "bitext_support": {},
}
RATES, RANKS = (0.25, 0.5, 1.0, 2.0, 4.0), (8, 16, 32, 64)
RUNGS = ((1, 20), (3, 8), (8, 3))
"""Epochs, and the number of pairs of rate and rank trained for that long."""
SIZES = {"train": 300, "validation": 200, "test": 1000}
"""Most rows of each split: with all of them the sweep would take days on two cores."""
SPARE = 400
"""Rows of the training split used neither for training nor for early stopping."""
CHOICES: tuple[dict[str, Any], ...] = (
    {"rate": 1.5}, {"rate": 2.0}, {"rate": 1.5, "batch_size": 32},
)  # fmt: skip
"""Other ways to derive settings: a factor on the rate, and the batch size."""
SEEDS = (0, 1, 2)
"""Of the runs compared on test rows; the sweep itself has the first."""
RECORDED = ("lr", "rank", "batch_size", "epochs", "best_epoch", "seconds")
LOCK = Lock()


Settings = dict[str, Any] | None


@dataclass(frozen=True)
class Runs:
    """The stored runs of one domain; missing ones are run on demand."""

    name: str
    rows: Path | None
    stored: list[dict[str, Any]]
    pool: Executor

    def __call__(
        self, settings: Settings, ends: bool = False, seed: int = SEEDS[0]
    ) -> dict[str, Any]:
        this = {"domain": self.name, "settings": settings, "seed": seed}
        with LOCK:
            known = [r for r in self.stored if this.items() <= r.items()]
        if known and ("test" in known[0] or not ends):
            return known[0]
        found = self.pool.submit(run, self.name, self.rows, settings, ends, seed).result()
        one = this | found
        with LOCK:
            self.stored[:] = [*(r for r in self.stored if r not in known), one]
            print(json.dumps(one), flush=True)
            write(self.stored)
        return one


def sweep(runs: Runs) -> None:
    """The sweep of one domain, and its best with every seed."""
    best: list[dict[str, Any]] = [{"rate": r, "rank": k} for r, k in product(RATES, RANKS)]
    swept: list[dict[str, Any]] = []
    for epochs, count in RUNGS:
        rung = [{**pair, "epochs": epochs} for pair in best[:count]]
        with ThreadPoolExecutor(count) as together:
            tried = list(together.map(runs, rung))
        swept += tried
        best = [
            {key: one["settings"][key] for key in ("rate", "rank")} for one in ranked(tried, swept)
        ]
    settings = ranked(swept, swept)[0]["settings"]
    with ThreadPoolExecutor(len(SEEDS)) as together:
        list(together.map(lambda seed: runs(settings, True, seed), SEEDS))


def choices(runs: Runs) -> None:
    """Other ways to derive settings, on rows that are not test rows."""
    with ThreadPoolExecutor(len(CHOICES)) as together:
        list(together.map(runs, CHOICES))


def ranked(runs: Sequence[dict[str, Any]], swept: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best validation score first; ties by more epochs, then by the scores after fewer."""

    def standing(one: dict[str, Any]) -> tuple[float, ...]:
        own = one["settings"]
        before = {
            r["settings"]["epochs"]: r["validation"]
            for r in swept
            if {**r["settings"], "epochs": 0} == {**own, "epochs": 0}
            and r["settings"]["epochs"] < own["epochs"]
        }
        return one["validation"], own["epochs"], *(before[e] for e in sorted(before, reverse=True))

    return sorted(runs, key=standing, reverse=True)


def run(
    name: str, rows: Path | None, settings: Settings, ends: bool, seed: int
) -> dict[str, Any]:  # fmt: skip
    """The validation score of one adapter, and its test score where the search ``ends``."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel, load_domain
    from lora_domains.console import Display
    from lora_domains.data.prepare import prepare
    from lora_domains.domain import Training, with_settings
    from lora_domains.errors import LossExploded
    from lora_domains.inference.scores import model_scores
    from lora_domains.training.plan import derived_rate
    from lora_domains.training.validation import validation_figures

    torch.set_num_threads(1)
    if rows is None:
        domain = load_domain(ROOT / "recipes" / f"{name}.py")
        # Settings tuned for a recipe's own rows are not derived.
        domain = replace(domain, training=Training())
    else:
        files = [str(rows / f"{part}.jsonl") for part in ("train", "test")]
        domain = Domain(name, Classification(**REAL[name]), Data(files[0], test=files[1]))
    parts = sampled(domain.data)
    spare = parts.pop("spare")
    data = Data(parts["train"], parts["validation"], parts["test"], drop_leaks=True)
    domain = with_settings(replace(domain, data=data), seed=seed)
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True), device="cpu")
        changed = dict(settings or {})
        if "rate" in changed:
            changed["lr"] = derived_rate(model.base)[0] * changed.pop("rate")
        if "epochs" in changed:
            changed["patience"] = changed["epochs"]
        domain = with_settings(domain, **changed)
        try:
            card = model.fit(domain)
        except LossExploded as error:
            return {"validation": 0.0, "spare": 0.0, "test": 0.0, "failed": str(error)}
        assert card is not None
        dataset = model.dataset(name)
        task, read = dataset.domain.task, {"validation": dataset.prepared.validation}
        if settings is None or "rank" not in settings:
            assert isinstance(task, Classification)
            known = [row for row in spare if str(row[task.label]) in (task.labels or ())]
            read["spare"] = prepare(task, replace(domain.data, test=known)).test
        if ends:
            read["test"] = dataset.prepared.test
        scores = {}
        for split, examples in read.items():
            items = dataset.tokenization.encode_all(examples)
            found = model_scores(model.bank, task, items, [], name)
            scores[split] = float(validation_figures(dataset.domain, items, found, 0)["score"])
    return {
        **scores,
        **{key: card.adapter.training[key] for key in RECORDED},
        "git": card.environment["git"],
    }  # fmt: skip


def sampled(data: "Data") -> dict[str, list[dict[str, Any]]]:
    """``SIZES`` of the rows of ``data``, the same for every run, and the ``SPARE`` next ones."""
    from lora_domains.data.readers import read

    rows = {part: read(source, part) for part in SIZES if (source := getattr(data, part))}
    for at, part in enumerate(rows):
        rows[part] = [rows[part][i] for i in np.random.default_rng(at).permutation(len(rows[part]))]
    if "validation" not in rows:
        count = SIZES["validation"]
        rows["validation"], rows["train"] = rows["train"][:count], rows["train"][count:]
    rows["spare"] = rows["train"][SIZES["train"] :]
    sizes = SIZES | {"spare": SPARE}
    return {part: [dict(row.values) for row in rows[part][:size]] for part, size in sizes.items()}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """domain → the derived runs, the sweep's best by validation, and the regret on test rows."""
    found = {}
    for name in dict.fromkeys(r["domain"] for r in runs):
        own = [r for r in runs if r["domain"] == name]
        swept = [r for r in own if r["settings"] and "rank" in r["settings"]]
        swept = [r for r in swept if r["seed"] == SEEDS[0]]
        if len(swept) < sum(count for _, count in RUNGS):
            continue
        best = ranked(swept, swept)[0]
        sides = {
            side: {r["seed"]: r["test"] for r in own if r["settings"] == settings and "test" in r}
            for side, settings in (("derived", None), ("best", best["settings"]))
        }
        both = sorted(sides["best"].keys() & sides["derived"].keys())
        if both:
            regrets = [sides["best"][seed] - sides["derived"][seed] for seed in both]
            derived = next(r for r in own if r["settings"] is None and r["seed"] == SEEDS[0])
            found[name] = {
                "derived": derived, "best": best, "swept": len(swept),
                "test": {
                    side: float(np.mean([scores[seed] for seed in both]))
                    for side, scores in sides.items()
                },
                "regret": float(np.mean(regrets)), "seeds": len(both),
                "error": float(sem(regrets)) if len(both) > 1 else None,
            }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| domain | validation: derived | the sweep's best | its settings "
             "| test: derived | the sweep's best | regret, points |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in found.items():
        best, derived = one["best"], one["derived"]
        what = f"rate {best['lr']:.2g}, rank {best['rank']}, {best['settings']['epochs']} epochs"
        lines.append(
            f"| {name} | {derived['validation']:.3f} | {best['validation']:.3f} | {what} "
            f"| {one['test']['derived']:.3f} | {one['test']['best']:.3f} "
            f"| {100 * one['regret']:+.1f}"
            + (f" ± {100 * one['error']:.1f} |" if one["error"] is not None else " |")
        )
    return "\n".join(lines)


def other_choices(runs: Sequence[dict[str, Any]]) -> str:
    """The table of other ways to derive settings."""
    names = {"derived": None, "rate · 1.5": CHOICES[0], "rate · 2": CHOICES[1],
             "rate · 1.5, batches of 32": CHOICES[2]}  # fmt: skip
    lines = ["| domain | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name in dict.fromkeys(r["domain"] for r in runs):
        own = {str(r["settings"]): r for r in runs if r["domain"] == name and r["seed"] == SEEDS[0]}
        if all(str(settings) in own for settings in names.values()):
            cells = [own[str(settings)] for settings in names.values()]
            scores = [f"{one['validation']:.3f} / {one['spare']:.3f}" for one in cells]
            lines.append(f"| {name} | " + " | ".join(scores) + " |")
    return "\n".join(lines)


def write(runs: Sequence[dict[str, Any]]) -> None:
    content = {
        "command": "python benchmarks/training/settings.py --rows DIR", "rows": SIZES,
        "summary": summary(runs), "runs": runs,
    }  # fmt: skip
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--only", nargs="*", help="domains to run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not flags.table:
        print(f"load {os.getloadavg()[0]:.1f}", flush=True)
        names = [*RECIPES, *(REAL if flags.rows else ())]
        with (
            ProcessPoolExecutor(flags.workers, mp_context=get_context("spawn")) as pool,
            ThreadPoolExecutor(flags.workers) as threads,
        ):
            domains = [
                Runs(name, flags.rows / name if name in REAL else None, runs, pool)
                for name in flags.only or names
            ]
            for one in domains:
                derived = [threads.submit(one, None, True, seed) for seed in SEEDS]
                choices(one)
                sweep(one)
                for each in derived:
                    each.result()
    print(table(summary(runs)), other_choices(runs), sep="\n\n")


if __name__ == "__main__":
    main()
