"""Whether noise on the embeddings (NEFTune) helps an adapter on few rows.

    python benchmarks/training/neftune.py BASE --rows DIR    # 45 minutes on one core
    python benchmarks/training/neftune.py --only medical     # without real rows: 12 minutes
    python benchmarks/training/neftune.py --table            # the stored runs

BASE is a folder of all-MiniLM-L6-v2; the recipes of the embedded world are trained on the embedded
base, which answers as text. DIR/NAME/train.jsonl are real rows, which are not copied; no test row
is read. In a step uniform noise of ``alpha / sqrt(tokens · width)`` is added to the embeddings of
the domain's rows (Jain et al. 2023, arXiv 2310.05914); validation, general text and the base are
read without. Scores are those of spare rows of the training split, with the default settings.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from heads import carry_out, command, fitted, metric_of, own_scores

if TYPE_CHECKING:
    from lora_domains.data.source import Source

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "neftune.json"
ALPHAS = (0.0, 5.0)
"""Without noise, and the strength that its authors recommend."""
SETS = ("medical", "support", "sms_spam", "twitter_financial_news")
RECIPES = ("medical", "support")
"""Of the embedded world."""
TRAIN, VALIDATION, SPARE = 300, 300, 600
SEEDS = (0, 1, 2)


def run(alpha: float, rows: str, seed: int, base: Path, folder: Path) -> dict[str, Any]:
    """The scores of one adapter on the spare rows."""
    from lora_domains import Classification, Data, Domain, load_domain
    from lora_domains.domain import Training

    if rows in RECIPES:
        domain = load_domain(ROOT / "recipes" / f"{rows}.py")
        source = domain.data.train
    else:
        positive = "spam" if rows == "sms_spam" else None
        domain = Domain(rows, Classification(head=True, positive=positive), Data("rows"))
        source = folder / rows / "train.jsonl"
    assert source is not None
    parts = sampled(source, seed)
    data = Data(parts["train"], parts["validation"], parts["test"], drop_leaks=True)
    domain = replace(domain, data=data, training=Training(seed=seed))
    with noise(alpha), fitted(domain, None if rows in RECIPES else base) as (
        record, dataset, scorer,
    ):  # fmt: skip
        scores = own_scores(dataset, scorer, dataset.test)
    return {
        "alpha": alpha, "rows": rows, "seed": seed, "metric": domain.primary_metric,
        "score": metric_of(domain.primary_metric, dataset, scores),
        "accuracy": metric_of("accuracy", dataset, scores), **record,
    }  # fmt: skip


@contextmanager
def noise(alpha: float) -> Iterator[None]:
    """Inside, the embeddings of a domain's rows are noisy in training."""
    import torch

    from lora_domains.inference.choice_tree import whole_prompts
    from lora_domains.training.gradients import Gradients, Passes

    plain = Gradients._domain_gradients

    def noisy(self: Gradients, passes: Passes, total: int) -> torch.Tensor:
        def add(_module: Any, _given: Any, embedded: torch.Tensor) -> torch.Tensor:
            # Rows of a pass have almost the same length; what falls on padding is masked.
            size = alpha / math.sqrt(embedded.shape[1] * embedded.shape[2])
            return embedded + size * (2 * torch.rand_like(embedded) - 1)

        hook = self.model.get_input_embeddings().register_forward_hook(add)
        try:
            with whole_prompts():  # each row has noise of its own where all begin alike, too
                return plain(self, passes, total)
        finally:
            hook.remove()

    with patch.object(Gradients, "_domain_gradients", noisy) if alpha else nullcontext():
        yield


def sampled(source: "Source", seed: int) -> dict[str, list[dict[str, Any]]]:
    """Spare, validation and training rows drawn from the training split by ``seed``."""
    from lora_domains.data.readers import read

    rows = [dict(row.values) for row in read(source, "train")]
    drawn = iter([rows[i] for i in np.random.default_rng(seed).permutation(len(rows))])
    sizes = (("test", SPARE), ("validation", VALIDATION), ("train", TRAIN))
    return {part: [next(drawn) for _ in range(size)] for part, size in sizes}


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The mean scores with and without noise, and the differences by seed, as a Markdown table."""
    lines = ["| rows | metric | without | with | differences by seed |", "|---|---|---|---|---|"]
    for name in SETS:
        by_seed = {(r["seed"], r["alpha"]): r for r in runs if r["rows"] == name}
        seeds = [seed for seed in SEEDS if {(seed, a) for a in ALPHAS} <= by_seed.keys()]
        if not seeds:
            continue
        metric = by_seed[seeds[0], ALPHAS[0]]["metric"]
        for key, shown in {"score": metric, "accuracy": "accuracy"}.items():
            pairs = [[by_seed[seed, alpha][key] for alpha in ALPHAS] for seed in seeds]
            without, noisy = np.mean(pairs, axis=0)
            differences = ", ".join(f"{after - before:+.3f}" for before, after in pairs)
            lines.append(f"| {name} | {shown} | {without:.3f} | {noisy:.3f} | {differences} |")
    return "\n".join(lines)


def main() -> None:
    flags = command(__doc__, SETS).parse_args()
    jobs = [{"alpha": alpha, "rows": name, "seed": seed}
            for name, seed, alpha in product(flags.only, SEEDS, ALPHAS)]  # fmt: skip
    settings = {"command": "python benchmarks/training/neftune.py BASE --rows DIR",
                "seeds": SEEDS, "train": TRAIN}  # fmt: skip
    carry_out(flags, RESULTS, jobs, settings, run, table)


if __name__ == "__main__":
    main()
