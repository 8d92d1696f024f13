"""Derived settings against a sweep: what does somebody lose who does not search?

    python benchmarks/settings.py [--rows DIR]      # 32 runs a domain: hours; goes on if stopped
    python benchmarks/settings.py --table           # what is there so far

One run of each domain takes what is derived, early stopping included. The sweep spends 31 more on
learning rates (a quarter to four times the derived one), ranks and numbers of epochs, by successive
halving (Jamieson and Talwalkar 2016): all 20 pairs of rate and rank for one epoch, those 8 with the
best validation scores for three, the best 3 of them for eight. Each is a training of its own,
warm-up and decay included. All else is the default, the batch derived, and all train on the same
few rows, so that a run fits into minutes. The sweep's best is the run with the best validation
score; the regret is its test score less that of the derived run. DIR/NAME/{train,test}.jsonl are
real rows, which stay where they are.
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
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "settings.json"
RECIPES = ("medical", "legal", "finance", "support", "spam")
REAL: dict[str, dict[str, Any]] = {
    "sms_spam": {"positive": "spam"},
    "twitter_financial_news": {},
    "bitext_support": {},
}
RATES, RANKS = (0.25, 0.5, 1.0, 2.0, 4.0), (8, 16, 32, 64)
RUNGS = ((1, 20), (3, 8), (8, 3))
"""Epochs, and how many of the pairs of rate and rank are trained for so long."""
SIZES = {"train": 300, "validation": 200, "test": 1000}
"""Rows of each split at most: on all of them the sweep would take days on two cores."""
RECORDED = ("lr", "rank", "batch_size", "epochs", "best_epoch", "seconds")
LOCK = Lock()


Settings = dict[str, Any] | None


@dataclass(frozen=True)
class Runs:
    """What was run so far; what is missing of one domain is run when it is asked for."""

    name: str
    rows: Path | None
    stored: list[dict[str, Any]]
    pool: Executor

    def __call__(self, settings: Settings, ends: bool = False) -> dict[str, Any]:
        with LOCK:
            known = [
                r for r in self.stored if (r["domain"], r["settings"]) == (self.name, settings)
            ]
        if known and ("test" in known[0] or not ends):
            return known[0]
        one = self.pool.submit(run, self.name, self.rows, settings, ends).result()
        with LOCK:
            self.stored[:] = [*(r for r in self.stored if r not in known), one]
            print(json.dumps(one), flush=True)
            write(self.stored)
        return one


def sweep(found: Runs) -> None:
    """The sweep of one domain."""
    best: list[dict[str, Any]] = [{"rate": r, "rank": k} for r, k in product(RATES, RANKS)]
    swept = []
    for epochs, count in RUNGS:
        rung = [{**pair, "epochs": epochs} for pair in best[:count]]
        with ThreadPoolExecutor(count) as together:
            tried = list(together.map(lambda one: found(one, ends=one["epochs"] > 1), rung))
        # The more epochs, the better where scores are equal; then the earlier pair.
        swept = sorted([*tried, *swept], key=lambda one: -one["validation"])
        best = [
            {key: one["settings"][key] for key in ("rate", "rank")}
            for one in sorted(tried, key=lambda one: -one["validation"])
        ]
    found(swept[0]["settings"], ends=True)


def run(name: str, rows: Path | None, settings: Settings, ends: bool) -> dict[str, Any]:
    """The validation score of one adapter, and its test score where the search ``ends``."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel, load_domain
    from lora_domains.display import Display
    from lora_domains.domain import Training, with_settings
    from lora_domains.errors import LossExploded
    from lora_domains.evaluation import validation_figures
    from lora_domains.plan import derived_rate
    from lora_domains.scoring import choice_logprobs

    torch.set_num_threads(1)
    if rows is None:
        domain = load_domain(ROOT / "recipes" / f"{name}.py")
        # Settings that a recipe has found for its own rows are not derived ones.
        domain = replace(domain, data=sampled(domain.data), training=Training())
    else:
        files = [str(rows / f"{part}.jsonl") for part in ("train", "test")]
        domain = Domain(name, Classification(**REAL[name]), sampled(Data(files[0], test=files[1])))
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True), device="cpu")
        if settings is not None:
            rate = derived_rate(model.base)[0] * settings["rate"]
            domain = with_settings(
                domain, lr=rate, rank=settings["rank"], epochs=settings["epochs"],
                patience=settings["epochs"],
            )  # fmt: skip
        try:
            card = model.fit(domain)
        except LossExploded as error:
            return {"domain": name, "settings": settings, "validation": 0.0, "failed": str(error)}
        ready = model._ready[name]
        scores = {}
        for split in ("validation", "test") if ends else ("validation",):
            items = ready.encoder.encode_all(getattr(ready.prepared, split))
            with model.bank.routed(name):
                found = choice_logprobs(model.base.model, items, model.tokenizer.pad_token_id)
            scores[split] = float(validation_figures(ready.domain.task, items, found, 0)["score"])
    return {
        "domain": name, "settings": settings, **scores,
        **{key: card["adapters"][0]["training"][key] for key in RECORDED},
        "git": card["environment"]["git"],
    }  # fmt: skip


def sampled(data: Any) -> Any:
    """``data`` with ``SIZES`` of its rows, the same for every run."""
    from lora_domains import Data
    from lora_domains.reading import read

    rows = {part: read(source, part) for part in SIZES if (source := getattr(data, part))}
    for at, part in enumerate(rows):
        rows[part] = [rows[part][i] for i in np.random.default_rng(at).permutation(len(rows[part]))]
    if "validation" not in rows:
        count = SIZES["validation"]
        rows["validation"], rows["train"] = rows["train"][:count], rows["train"][count:]
    return Data(
        **{part: [dict(row.values) for row in rows[part][: SIZES[part]]] for part in SIZES},
        drop_leaks=True,
    )


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """domain → the derived run, the sweep's best by validation, and the regret on test rows."""
    found = {}
    for name in dict.fromkeys(r["domain"] for r in runs):
        own = [r for r in runs if r["domain"] == name]
        derived = [r for r in own if r["settings"] is None]
        swept = [r for r in own if r["settings"] is not None]
        if derived and len(swept) == sum(count for _, count in RUNGS):
            # Of equal scores the run of more epochs, as the search has it.
            ended = [r for r in swept if "test" in r]
            best = max(ended, key=lambda r: (r["validation"], r["settings"]["epochs"]))
            found[name] = {
                "derived": derived[0], "best": best, "swept": len(swept),
                "regret": best["test"] - derived[0]["test"],
            }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| domain | validation: derived | the sweep's best | test: derived "
             "| the sweep's best by validation | regret, points |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in found.items():
        best, derived = one["best"], one["derived"]
        what = f"rate {best['lr']:.2g}, rank {best['rank']}, {best['settings']['epochs']} epochs"
        lines.append(
            f"| {name} | {derived['validation']:.3f} | {best['validation']:.3f} "
            f"| {derived['test']:.3f} | {best['test']:.3f} ({what}) | {100 * one['regret']:+.1f} |"
        )
    return "\n".join(lines)


def write(runs: Sequence[dict[str, Any]]) -> None:
    content = {
        "command": "python benchmarks/settings.py --rows DIR", "rows": SIZES,
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
            asked = [
                Runs(name, flags.rows / name if name in REAL else None, runs, pool)
                for name in flags.only or names
            ]
            for one in asked:
                derived = threads.submit(one, None, True)
                sweep(one)
                derived.result()
    print(table(summary(runs)))


if __name__ == "__main__":
    main()
