"""How to preserve general knowledge, and what it costs the domain: ways to train, three seeds each.

    python benchmarks/training/retention.py            # 70 minutes on 2 cores; continues if stopped
    python benchmarks/training/retention.py --table    # table and picture of the stored runs
    python benchmarks/training/retention.py --task-kl  # train again what was stored without task KL

Each way trains the same adapter on the same rows: plainly, at lower rates (a cheap learning-rate
curve), with replay, with KL to the base, on the MLPs only, and as the package does by default (rate
and batch size derived; all others share one rate and one batch size, so that they differ in one
thing). Afterwards the domain metric is measured on validation and test rows, general knowledge on
the questions of the quick suite, and KL on held-out general text. The default was chosen by
validation scores and knowledge lost (``tied``); test scores are reported.

The plain adapters are also measured at smaller scales: with all other runs they show how KL
predicts what the questions lose, and the limit of the drift gate that follows (``calibration``).
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lora_domains import DomainModel
    from lora_domains.dataset import Dataset
    from lora_domains.probes.suite import Suite
    from lora_domains.tasks import Example
    from lora_domains.tokenization.encoded import EncodedExample

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "retention.json"
PICTURE = RESULTS.with_suffix(".svg")
DOMAINS = ("medical", "finance", "support")
SEEDS = (0, 1, 2)
ROWS, EPOCHS, BATCH, MARGIN = 800, 4, 32, 0.03
RATE = 0.0031
"""The rate derived from the embedded base's width."""
MLP = ("gate_proj", "up_proj", "down_proj")
WAYS: dict[str, dict[str, Any]] = {
    "plain": {"retention": "none"},
    "rate / 3": {"retention": "none", "lr": RATE / 3},
    "rate / 10": {"retention": "none", "lr": RATE / 10},
    "MLPs only": {"retention": "none", "targets": MLP},
    "replay 5 %": {"retention": "replay", "replay": 0.05},
    "replay 10 %": {"retention": "replay", "replay": 0.1},
    "replay 25 %": {"retention": "replay", "replay": 0.25},
    "KL 0.5": {"retention": "kl", "kl": 0.5},
    "KL 2": {"retention": "kl", "kl": 2.0},
    "default": {},
}
# It chooses an epoch within the drift limit; the others keep their best whatever it forgot.
LIMITED = ("default",)
MOST_LOST, TIE = 0.01, 0.002
"""Share of general knowledge that a default may lose, and how far its validation score may be below
the best of such ways: a tenth of the spread between seeds, or less."""
PLAIN = ("plain", "rate / 3", "rate / 10")
"""Ways without retention, on all targets."""
NO_LIMIT = 1e9
SCALES = (0.2, 0.4, 0.6, 0.8)


def run(job: tuple[str, str, int], rows: int = ROWS, epochs: int = EPOCHS) -> dict[str, Any]:
    """Train one way on one domain with one seed, and measure the adapter."""
    import torch

    from lora_domains import DomainModel, load_domain
    from lora_domains.analysis.scale_curve import scaled
    from lora_domains.console import Display
    from lora_domains.domain import with_settings

    way, name, seed = job
    torch.set_num_threads(1)
    declared = load_domain(ROOT / "recipes" / f"{name}.py")
    declared = replace(declared, data=replace(declared.data, limit=rows))
    settings = {} if way == "default" else {"lr": RATE, "batch_size": BATCH} | WAYS[way]
    declared = with_settings(declared, epochs=epochs, patience=epochs, seed=seed, **settings)
    if way not in LIMITED:
        declared = with_settings(declared, drift=NO_LIMIT)
    with tempfile.TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(out=out, display=Display(quiet=True), device="cpu")
        card = model.fit(declared)
        assert card is not None
        training = card.adapter.training
        measured = measure(model, name)
        at_scales = []
        if way == "plain":
            with scaled(model.bank, name, SCALES) as copies:
                at_scales = [
                    {"scale": scale, **measure(model, name, copy)} for scale, copy in copies.items()
                ]
    return {
        "way": way, "domain": name, "seed": seed, **measured, "scales": at_scales,
        "lr": training["lr"], "rank": training["rank"], "best_epoch": training["best_epoch"],
        "scale": training["scale"], "seconds": training["seconds"],
    }  # fmt: skip


def measure(model: "DomainModel", domain: str, adapter: str | None = None) -> dict[str, float]:
    """Domain metric on validation and test rows, general knowledge lost, KL and nats."""
    from lora_domains.inference.likelihoods import drift

    dataset, bank = model.dataset(domain), model.bank
    adapter = adapter or domain
    scores = {}
    for split, rows in (
        ("validation", dataset.prepared.validation),
        ("test", dataset.prepared.test),
    ):
        scores[split] = score(model, dataset, rows, adapter)
    questions, texts = general(model)
    base, now = base_accuracy(model), accuracy(model, questions, adapter)
    pad = model.base.pad
    moved = drift(bank, texts, pad, [adapter])[adapter]
    tokens = float(moved["tokens"].sum())
    answers = dataset.tokenization.encode_all(dataset.prepared.test)
    on_task = drift(bank, answers, pad, [adapter])[adapter]
    return {
        **scores,
        "general_base": base,
        "general_lost": base - now,
        "kl": float(moved["kl"].sum()) / tokens,
        "task_kl": float(on_task["kl"].sum() / on_task["tokens"].sum()),
        "nats_rise": float(moved["adapter"].sum() - moved["base"].sum()) / tokens,
    }


def score(
    model: "DomainModel", dataset: "Dataset", rows: Sequence["Example"], route: str | None
) -> float:
    from lora_domains.inference.scores import model_scores
    from lora_domains.training.validation import validation_figures

    items = dataset.tokenization.encode_all(rows)
    found = model_scores(model.bank, dataset.domain.task, items, [], route)
    return float(validation_figures(dataset.domain, items, found, 0.0)["score"])


def accuracy(
    model: "DomainModel", questions: Sequence["EncodedExample"], route: str | None
) -> float:
    """Share of the general questions whose most likely answer is correct."""
    from lora_domains.inference.likelihoods import choice_logprobs

    with model.bank.routed(route):
        found = choice_logprobs(model.base.model, questions, model.base.pad)
    return float(
        np.mean([scores.argmax() == q.target for scores, q in zip(found, questions, strict=True)])
    )


def base_accuracy(model: "DomainModel") -> float:
    """The base's accuracy, the same for every run of a process."""
    if not _base_accuracy:
        _base_accuracy.append(accuracy(model, general(model)[0], None))
    return _base_accuracy[0]


_base_accuracy: list[float] = []


@cache
def _suite() -> "Suite":
    from lora_domains.probes.suite import load_suite

    return load_suite("quick")


def general(model: "DomainModel") -> tuple[list["EncodedExample"], list["EncodedExample"]]:
    """The encoded questions and texts of the quick suite."""
    from lora_domains.tokenization.tokenization import Tokenization

    tokenization = Tokenization(model.tokenizer, model.base.context)
    questions = [tokenization.encode(example) for _, _, example in _suite().questions()]
    return questions, tokenization.encode_all(_suite().texts())


# ── Results ────────────────────────────────────────────────────────────────────────────────


def points(runs: Sequence[dict[str, Any]]) -> Iterator[tuple[float, float]]:
    """(KL, share of general knowledge lost) of every adapter that no limit was applied to."""
    for found in runs:
        if found["way"] in LIMITED:
            continue
        for one in (found, *found["scales"]):
            yield one["kl"], one["general_lost"]


def calibration(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How well KL predicts what the questions lose, and the limit that follows.

    The limit is the KL at which an adapter is as likely to have lost more than the margin as not,
    by logistic regression on log KL. Its bounds are percentiles of 2,000 draws of whole runs (an
    adapter and its scales go together).
    """
    found = list(points(runs))
    kl, lost = (np.array(column) for column in zip(*found, strict=True))
    of_kl, of_lost = (np.argsort(np.argsort(values)) for values in (kl, lost))
    harmed, limit = lost > MARGIN, even(found)
    own = [[*points([one])] for one in runs if one["way"] not in LIMITED]
    random = np.random.default_rng(0)
    draws = [
        even([point for at in random.integers(0, len(own), len(own)) for point in own[at]])
        for _ in range(2000)
    ]
    low, high = np.nanpercentile(draws, (2.5, 97.5))
    return {
        "adapters": len(kl), "harmed": int(harmed.sum()),
        "spearman": float(np.corrcoef(of_kl, of_lost)[0, 1]),
        "pearson": float(np.corrcoef(kl, lost)[0, 1]),
        "largest_kl_within_margin": float(kl[~harmed].max()) if (~harmed).any() else None,
        "smallest_kl_beyond_margin": float(kl[harmed].min()) if harmed.any() else None,
        "limit": limit, "lower": float(low), "upper": float(high),
        "harmed_below": int((harmed & (kl <= limit)).sum()),
        "unharmed_above": int((~harmed & (kl > limit)).sum()),
    }  # fmt: skip


def even(found: Sequence[tuple[float, float]]) -> float:
    """The KL at which an adapter is as likely harmed as not; NaN where all or none are."""
    from sklearn.linear_model import LogisticRegression

    kl, lost = (np.array(column) for column in zip(*found, strict=True))
    harmed = lost > MARGIN
    if harmed.all() or not harmed.any():
        return math.nan
    fitted = LogisticRegression(C=np.inf).fit(np.log(kl)[:, None], harmed)
    return float(np.exp(-fitted.intercept_[0] / fitted.coef_[0, 0]))


def foretold(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Spearman's correlation of the share of questions lost with KL on general text, and with KL on
    the answers to test rows: of all ``runs``, and of those that were trained plainly."""
    found = {}
    plain = [one for one in runs if one["way"] in PLAIN]
    for name, part in (("all", runs), ("trained plainly", plain)):
        adapters = [one for run in part for one in (run, *run["scales"])]
        lost = [one["general_lost"] for one in adapters]
        found[name] = {
            "adapters": len(adapters),
            "general text": spearman([one["kl"] for one in adapters], lost),
            "task inputs": spearman([one["task_kl"] for one in adapters], lost),
        }
    return {name: figures for name, figures in found.items() if figures["adapters"] > 1}


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """The correlation of ranks, those of ties averaged; NaN of fewer than two."""
    ranks = [
        [sum(other < one for other in values) + values.count(one) / 2 for one in values]
        for values in map(list, (first, second))
    ]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(ranks[0]) > 1 else math.nan


def with_task_kl(stored: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """A ``stored`` run and the task KL of the same adapter trained ``again``.

    Its scores stay, since the embedded test rows are others now. Raises ValueError where another
    share of questions is lost: then it is another adapter.
    """
    scales = zip(stored["scales"], again["scales"], strict=True)
    pairs: list[tuple[dict[str, Any], dict[str, Any]]] = [(stored, again), *scales]
    if any(one["general_lost"] != other["general_lost"] for one, other in pairs):
        raise ValueError(f"{again['way']}, {again['domain']}: another adapter than the one stored")
    first, *others = [one | {"task_kl": other["task_kl"]} for one, other in pairs]
    return first | {"scales": others}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """way → domain → means over the seeds, and their standard deviations."""
    found: dict[str, Any] = {}
    for way, domain in product(WAYS, DOMAINS):
        own = [r for r in runs if (r["way"], r["domain"]) == (way, domain)]
        if own:
            found.setdefault(way, {})[domain] = {
                key: {
                    "mean": mean(r[key] for r in own),
                    "sd": stdev(r[key] for r in own) if len(own) > 1 else None,
                }
                for key in ("validation", "test", "general_lost", "kl", "nats_rise", "seconds")
            } | {"seeds": len(own)}
    return found


def tied(found: dict[str, Any]) -> list[str]:
    """The ways that lose little in every domain and whose validation score is the best or ties with
    it, sorted by what they lose."""
    lost = {way: max(d["general_lost"]["mean"] for d in found[way].values()) for way in found}
    score = {
        way: mean(d["validation"]["mean"] for d in found[way].values())
        for way in found
        if way != "default" and lost[way] <= MOST_LOST
    }
    best = max(score.values())
    return sorted((way for way in score if score[way] >= best - TIE), key=lost.__getitem__)


def table(found: dict[str, Any]) -> str:
    lines = [
        "| way | " + " | ".join(f"{d}: score / general lost, points" for d in DOMAINS) + " | KL |",
        "|---" * (len(DOMAINS) + 2) + "|",
    ]
    for way, domains in found.items():
        cells = [
            f"{d['test']['mean']:.3f} / {round(100 * d['general_lost']['mean'], 1) + 0:.1f}"
            for d in domains.values()
        ]
        kl = mean(d["kl"]["mean"] for d in domains.values())
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {kl:.3f} |")
    return "\n".join(lines)


def picture(found: dict[str, Any], runs: Sequence[dict[str, Any]], limit: float) -> None:
    """Score against general knowledge lost, and KL against what was lost."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "retention"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 1 + len(DOMAINS), figsize=(4 * (1 + len(DOMAINS)), 3.8))
    for axis, domain in zip(axes, DOMAINS, strict=False):
        for number, (way, domains) in enumerate(found.items()):
            one = domains.get(domain)
            if one is None:
                continue
            x, y = 100 * one["general_lost"]["mean"], one["test"]["mean"]
            axis.errorbar(
                x, y, xerr=100 * (one["general_lost"]["sd"] or 0), yerr=one["test"]["sd"] or 0,
                fmt="os^Dv<8>pPX*"[number], color=f"C{number % 10}", label=way,
                markersize=11 if way == "default" else 6,
            )  # fmt: skip
        axis.set(title=domain, xlabel="general knowledge lost, points")
    axes[0].set_ylabel("domain metric on test rows")
    kl, lost = zip(*points(runs), strict=True)
    axes[-1].scatter(kl, [100 * value for value in lost], s=12, color="C0")
    axes[-1].axvline(limit, color="C3", linestyle="--", label=f"limit {limit:.2f}")
    axes[-1].axhline(100 * MARGIN, color="grey", linewidth=0.8)
    axes[-1].set(title="KL predicts it", xlabel="KL from the base, nats per token", xscale="log")
    axes[-1].legend()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=len(WAYS))
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS))
    parser.add_argument(
        "--again", action="store_true", help="run these ways again, even where stored"
    )
    parser.add_argument(
        "--task-kl", action="store_true", help="run again what was stored without task KL"
    )
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    if flags.again:
        runs = [r for r in runs if r["way"] not in flags.ways]
    if not flags.table:
        done = {
            (r["way"], r["domain"], r["seed"]) for r in runs if "task_kl" in r or not flags.task_kl
        }
        jobs = [
            (way, domain, seed) for seed, way, domain in product(SEEDS, flags.ways, DOMAINS)
            if (way, domain, seed) not in done
        ]  # fmt: skip
        print(f"{len(jobs)} runs, load {os.getloadavg()[0]:.1f}", flush=True)
        with ProcessPoolExecutor(flags.workers, mp_context=get_context("spawn")) as pool:
            for found in pool.map(run, jobs):
                key = ("way", "domain", "seed")
                same = [r for r in runs if all(r[k] == found[k] for k in key)]
                runs = [r for r in runs if r not in same]
                runs.append(with_task_kl(same[0], found) if same and flags.task_kl else found)
                print(json.dumps({k: v for k, v in found.items() if k != "scales"}), flush=True)
                store(runs)
    store(runs)
    found = summary(runs)
    calibrated = calibration(runs)
    picture(found, runs, calibrated["limit"])
    print(table(found), json.dumps(calibrated, indent=1), sep="\n\n")


def store(runs: Sequence[dict[str, Any]]) -> None:
    known = [found for found in runs if "task_kl" in found]
    content = {
        "command": "python benchmarks/training/retention.py",
        "rows": ROWS, "epochs": EPOCHS, "margin": MARGIN, "summary": summary(runs),
        "calibration": calibration(runs), "foretold": foretold(known), "runs": list(runs),
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
