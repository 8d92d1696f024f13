"""Joint steps on the embedded base: several domains in one pass, or one after another.

    python benchmarks/speed/joint_embedded.py           # a minute on a quiet core

The steps are those of ``joint.py``, without PEFT. The base is so small that launching a pass costs
much of it: where sharing passes does not pay here, it pays nowhere on the same CPU. What the plan
counts for a token of a shared pass (``joint/together.py``) is fitted to these ratios and to those
of ``joint.py``.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from joint import Ours
from measure import Experiment, ratios
from training import RANK

from lora_domains import DomainModel
from lora_domains.console import Display

SHAPES = ((4, 64, 1), (4, 128, 1), (4, 64, 4), (4, 40, 16))
"""Adapters, tokens of a row, rows of a batch."""
WORDS = ("river", "winter", "stone", "letter", "market", "garden", "doctor", "number")


def main() -> None:
    experiment = Experiment("joint_embedded", __doc__)
    with torch.enable_grad(), TemporaryDirectory() as folder:
        model = DomainModel.from_pretrained(
            dtype=experiment.dtype, device=experiment.device, out=Path(folder),
            display=Display(quiet=True),
        )  # fmt: skip
        for adapters, tokens, rows in SHAPES[:1] if experiment.quick else SHAPES:
            ours = Ours(model, WORDS, adapters, tokens, rows)
            runs = experiment.turns({"separate": ours.separate, "together": ours.together})
            label = f"embedded, {adapters} adapters, {rows} × {tokens} tokens each"
            experiment.say(f"chosen: {ours.choice.reason}")
            faster = ratios(runs["separate"], runs["together"])
            experiment.figure(
                f"{label}, joint over separate steps of ours", "×", faster, better="more"
            )
            ours.close()
    experiment.save({"rank": RANK})


if __name__ == "__main__":
    main()
