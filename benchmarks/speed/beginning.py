"""Rows whose prompts begin alike: the beginning read once, and read with every row.

    python benchmarks/speed/beginning.py --base .bases/smollm2 --threads 2 --rows 32   # 14 minutes
    python benchmarks/speed/beginning.py                                     # on the embedded base

Both score the same test rows of the embedded domain *spam* by the base: in its chat template, where
an instruction comes first, and with 4 answered rows before them, as an evaluation does. Then both
compute the gradients of the same training steps, of 16 rows in the chat template. The largest
difference between the scores, in nats, and that of the gradients, relative to their norm, are those
of rounding.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from measure import Experiment, ratios
from torch import Tensor

from lora_domains import Classification, Data, Domain, DomainModel
from lora_domains.console import Display
from lora_domains.dataset import Dataset
from lora_domains.domain import with_settings
from lora_domains.embedded.domains import domain_rows
from lora_domains.evaluation.baselines import SHOTS, with_shots
from lora_domains.inference.choice_tree import begun, whole_prompts
from lora_domains.inference.likelihoods import choice_logprobs, saved_in_training
from lora_domains.modeling.batching import epoch_batches
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.fit import make_run
from lora_domains.training.plan import make_plan

ROWS, STEPS = 16, 6


def compare(
    experiment: Experiment, model: DomainModel, label: str, rows: list[EncodedExample]
) -> None:
    base, scores = model.base, {}

    def once() -> None:
        scores["once"] = choice_logprobs(base.model, rows, base.pad)

    def whole() -> None:
        with whole_prompts():
            scores["whole"] = choice_logprobs(base.model, rows, base.pad)

    _, beginning = begun(base.model, rows)
    shared = 0 if beginning is None else beginning.tokens
    label = f"{label}, {sum(map(len, rows)) / len(rows):.0f} tokens, {shared} of them shared"
    runs = experiment.turns({"once": once, "whole": whole})
    experiment.figure(f"{label}, rows a second", "rows/s",
                      [len(rows) / s for s in runs["once"]], better="more")  # fmt: skip
    experiment.figure(f"{label}, speed over whole prompts", "×",
                      ratios(runs["whole"], runs["once"]), better="more")  # fmt: skip
    apart = max(float(np.abs(a - b).max())
                for a, b in zip(scores["once"], scores["whole"], strict=True))  # fmt: skip
    experiment.figure(f"{label}, scores apart", "nats", [apart], better="less")


def compare_steps(experiment: Experiment, model: DomainModel, dataset: Dataset) -> None:
    plan = make_plan(model.base, dataset)
    run = make_run(model.bank, dataset, plan, model.out, model.display)
    for lora in run.bank.trainable(run.adapter_name).values():
        torch.nn.init.normal_(lora.b, std=0.02)  # at 0 nothing would depend on the adapter
    lengths = [len(row) for row in run.train]
    epoch = epoch_batches(lengths, plan.batch_size, dataset.domain.training.seed, 0)
    steps = [[run.train[at] for at in batch] for batch in epoch[:STEPS]]
    gradients = dict[str, list[Tensor]]()

    def once(name: str = "once") -> None:
        gradients[name] = []
        for rows in steps:
            run.gradients.compute(rows, run.gradients.units(rows))
            gradients[name] += [p.grad.clone() for p in run.parameters if p.grad is not None]

    def whole() -> None:
        with whole_prompts():
            once("whole")

    read = [row for rows in steps for row in rows]
    saved = sum(saved_in_training(run.model, rows) for rows in steps) / sum(map(len, read))
    label = f"steps of {ROWS} rows, {sum(map(len, read)) / len(read):.0f} tokens"
    runs = experiment.turns({"once": once, "whole": whole}, per=len(steps))
    experiment.figure(f"{label}, steps a minute", "", [60 / s for s in runs["once"]],
                      better="more")  # fmt: skip
    experiment.figure(f"{label}, speed over whole prompts", "×",
                      ratios(runs["whole"], runs["once"]), better="more")  # fmt: skip
    experiment.figure(f"{label}, tokens not read", "%", [100 * saved],
                      better="more")  # fmt: skip
    apart = max(float((a - b).norm() / b.norm().clamp(min=1e-9))
                for a, b in zip(gradients["once"], gradients["whole"], strict=True))  # fmt: skip
    experiment.figure(f"{label}, gradients apart", "", [apart], better="less")


def flags_of(add: Callable[..., Any]) -> None:
    add("--base", type=Path, help="a pretrained base; default: the embedded")
    add("--rows", type=int, default=48, help="test rows")


def main() -> None:
    experiment = Experiment("beginning", __doc__, add=flags_of)
    flags = experiment.flags
    with TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(
            flags.base, dtype=experiment.dtype, device=experiment.device,
            display=Display(quiet=True), out=out,
        )  # fmt: skip
        data = Data(domain_rows("spam", "train")[:200], domain_rows("spam", "validation")[:40],
                    domain_rows("spam", "test")[: flags.rows])  # fmt: skip
        domain = with_settings(Domain("spam", Classification(), data), batch_size=ROWS,
                               retention="none")  # fmt: skip
        dataset = model.dataset(domain)
        shot = with_shots(dataset, dataset.test, experiment.say)
        for label, rows in (("prompts", dataset.test), (f"with {SHOTS} examples", shot)):
            if rows:
                compare(experiment, model, label, [row.encoded for row in rows])
        compare_steps(experiment, model, dataset)
        experiment.save({"base": model.base.id, "rows": len(dataset.test)})


if __name__ == "__main__":
    main()
