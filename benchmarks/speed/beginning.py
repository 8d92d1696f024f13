"""Scoring rows whose prompts begin alike: the beginning read once, and read with every row.

    python benchmarks/speed/beginning.py --base .bases/smollm2 --threads 2 --rows 32   # 6 minutes
    python benchmarks/speed/beginning.py                                     # on the embedded base

Both score the same test rows of the embedded domain *spam* by the base: in its chat template, where
an instruction comes first, and with 4 answered rows before them, as an evaluation does. The largest
difference between the scores, in nats, is that of rounding.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from measure import Experiment, ratios

from lora_domains import Classification, Data, Domain, DomainModel
from lora_domains.console import Display
from lora_domains.embedded.domains import domain_rows
from lora_domains.evaluation.baselines import SHOTS, with_shots
from lora_domains.inference.choice_tree import begun, whole_prompts
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.tokenization.encoded import EncodedExample


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


def main() -> None:
    experiment = Experiment(
        "beginning", __doc__,
        add=lambda add: [add("--base", type=Path, help="a pretrained base; default: the embedded"),
                         add("--rows", type=int, default=48, help="test rows")],
    )  # fmt: skip
    flags = experiment.flags
    with TemporaryDirectory() as out:
        model = DomainModel.from_pretrained(
            flags.base, dtype=experiment.dtype, device=experiment.device,
            display=Display(quiet=True), out=out,
        )  # fmt: skip
        data = Data(domain_rows("spam", "train")[:200], domain_rows("spam", "validation")[:40],
                    domain_rows("spam", "test")[: flags.rows])  # fmt: skip
        dataset = model.dataset(Domain("spam", Classification(), data))
        shot = with_shots(dataset, dataset.test, experiment.say)
        for label, rows in (("prompts", dataset.test), (f"with {SHOTS} examples", shot)):
            if rows:
                compare(experiment, model, label, [row.encoded for row in rows])
        experiment.save({"base": model.base.id, "rows": len(dataset.test)})


if __name__ == "__main__":
    main()
