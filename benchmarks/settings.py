"""Derived settings against a sweep: what does somebody lose who does not search?

    python benchmarks/settings.py [--rows DIR]      # 41 runs a domain: hours; goes on if stopped
    python benchmarks/settings.py --table           # what is there so far

For each domain the learning rate (a quarter to four times the derived one), the rank and the number
of epochs are swept, and one run takes what is derived, early stopping included. All else is the
default, and all train on the same few rows, so that 41 runs fit into minutes. The sweep's best is
the run with the best validation score; the regret is its test score less that of the derived run.
DIR/NAME/{train,test}.jsonl are real rows, which stay where they are.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
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
RATES, RANKS, EPOCHS = (0.25, 0.5, 1.0, 2.0, 4.0), (8, 16, 32, 64), (4, 8)
SIZES = {"train": 300, "validation": 200, "test": 1000}
"""Rows of each split at most: on all of them the sweep would take days on two cores."""
REGRET = 0.01


def jobs(rows: Path | None) -> list[tuple[str, Path | None, dict[str, Any] | None]]:
    """(domain, its rows, settings); the derived run, whose settings are None, comes first."""
    names: list[tuple[str, Path | None]] = [(name, None) for name in RECIPES]
    if rows is not None:
        names += [(name, rows / name) for name in REAL]
    grid = [{"rate": r, "rank": k, "epochs": e} for r, k, e in product(RATES, RANKS, EPOCHS)]
    return [(name, at, settings) for name, at in names for settings in (None, *grid)]


def run(job: tuple[str, Path | None, dict[str, Any] | None]) -> dict[str, Any]:
    """The validation and test scores of one adapter."""
    import torch

    from lora_domains import Classification, Data, Domain, DomainModel, load_domain
    from lora_domains.display import Display
    from lora_domains.domain import with_settings
    from lora_domains.evaluation import validation_figures
    from lora_domains.plan import derived_rate
    from lora_domains.scoring import choice_logprobs

    name, rows, settings = job
    torch.set_num_threads(1)
    if rows is None:
        domain = load_domain(ROOT / "recipes" / f"{name}.py")
        domain = replace(domain, data=sampled(domain.data))
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
        training = model.fit(domain)["adapters"][0]["training"]
        ready = model._ready[name]
        scores = {}
        for split in ("validation", "test"):
            items = ready.encoder.encode_all(getattr(ready.prepared, split))
            with model.bank.routed(name):
                found = choice_logprobs(model.base.model, items, model.tokenizer.pad_token_id)
            scores[split] = float(validation_figures(ready.domain.task, items, found, 0)["score"])
    return {
        "domain": name, "settings": settings, **scores,
        **{key: training[key] for key in ("lr", "rank", "epochs", "best_epoch", "seconds")},
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
        if derived and swept:
            best = max(swept, key=lambda r: r["validation"])
            regret = best["test"] - derived[0]["test"]
            found[name] = {
                "derived": derived[0], "best": best, "swept": len(swept), "regret": regret,
                "within": regret <= REGRET,
            }  # fmt: skip
    return found


def table(found: dict[str, Any]) -> str:
    lines = ["| domain | derived | sweep's best by validation | runs | regret, points |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, one in found.items():
        best = one["best"]
        what = f"rate {best['lr']:.2g}, rank {best['rank']}, {best['settings']['epochs']} epochs"
        lines.append(
            f"| {name} | {one['derived']['test']:.3f} | {best['test']:.3f} ({what}) "
            f"| {one['swept']} | {100 * one['regret']:+.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--only", nargs="*", help="domains to run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--table", action="store_true")
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if not flags.table:
        done = [(r["domain"], r["settings"]) for r in runs]
        left = [
            job for job in jobs(flags.rows)
            if (not flags.only or job[0] in flags.only) and (job[0], job[2]) not in done
        ]  # fmt: skip
        print(f"{len(left)} runs, load {os.getloadavg()[0]:.1f}", flush=True)
        with ProcessPoolExecutor(flags.workers, mp_context=get_context("spawn")) as pool:
            for found in pool.map(run, left):
                runs.append(found)
                print(json.dumps(found), flush=True)
                content = {
                    "command": "python benchmarks/settings.py --rows DIR", "rows": SIZES,
                    "summary": summary(runs), "runs": runs,
                }  # fmt: skip
                RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    print(table(summary(runs)))


if __name__ == "__main__":
    main()
