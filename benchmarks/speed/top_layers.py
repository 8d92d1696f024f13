"""Training steps of an adapter on the top third of the layers: PEFT and the Trainer against ours.

    python benchmarks/speed/top_layers.py --bases .bases         # 12 minutes on 2 quiet cores
    python benchmarks/speed/top_layers.py                        # without pretrained bases
    python benchmarks/speed/top_layers.py --device cuda

Both train the same LoRA weights on the same 8 rows of 256 tokens, without retention, on a random
Llama and on SmolLM2, and push no gradient below the adapter. Ours lets the layers below read the
rows once and begins each step above them; that reading is measured by itself, as a share of the
step that it is done before. The same steps without it show what it saves, which is the less, the
larger the output layer is: every token is supervised. Each takes an untimed step before a timed
one. What PEFT adapts is the list of our linears, which are those that its ``layers_to_transform``
names.
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import Experiment, ratios
from shape import bench
from training import (
    GRADIENTS,
    RANK,
    ROWS,
    TOKENS,
    Peer,
    Steps,
    add_flags,
    difference,
    exact_gradients,
    step_times,
    texts,
)

from lora_domains.modeling.base import load_base
from lora_domains.modeling.base_check import layers_of
from lora_domains.tasks.generation import LanguageModelling

GOAL = 1.5
"""Times as many tokens a second as PEFT, at least."""


class TopSteps(Steps):
    """Steps that begin above the layers which read the batch before, or whole ones."""

    def read(self) -> None:
        """Let the layers below the adapter read the batch."""
        gradients = self.run.gradients
        gradients.close()
        gradients.inputs = None
        gradients.read_below(self.batch, passes=2)
        if not self.run.state.read_below:
            raise RuntimeError("the layers below the adapter could not read the batch")

    def whole(self) -> None:
        """A step that reads the batch from the first layer on."""
        gradients = self.run.gradients
        kept, gradients.inputs = gradients.inputs, None
        self.run.state.read_below = False
        self.step()
        gradients.inputs, self.run.state.read_below = kept, True


def compare(experiment: Experiment, name: str, base: Path, rows: list[dict[str, Any]], dtype: str,
            folder: Path) -> None:  # fmt: skip
    """Measure one base at one precision."""
    _, layers = layers_of(load_base(base).model)
    top = max(1, len(layers) // 3)
    ours = TopSteps(base, LanguageModelling(), rows, dtype, experiment.device, folder / "ours",
                    top=top)  # fmt: skip
    peer = Peer(base, ours, dtype, experiment.device, 0)
    label = f"{name}, top {top} of {len(layers)} layers, {dtype}"
    ours.read()
    found, theirs = ours.gradients(), peer.gradients()
    experiment.figure(f"{label}, gradients apart, relative", "", difference(found, theirs),
                      at_most=GRADIENTS[dtype])  # fmt: skip
    truth = exact_gradients(base, ours, dtype, experiment.device)
    error = difference(theirs, truth)
    experiment.figure(f"{label}, error of the gradients, relative", "", difference(found, truth),
                      error, at_most=error)  # fmt: skip
    trainer = peer.trainer(folder / "trainer")
    steps = {"kept": ours.step, "whole": ours.whole, "read": ours.read}
    runs = step_times(experiment, steps, trainer)
    tokens = sum(map(len, ours.batch))
    experiment.figure(f"{label}, tokens a second", "tokens/s",
                      [tokens / s for s in runs["kept"]], [tokens / s for s in runs["peft"]],
                      better="more")  # fmt: skip
    experiment.figure(f"{label}, speed over PEFT's", "×", ratios(runs["peft"], runs["kept"]),
                      at_least=GOAL)  # fmt: skip
    experiment.figure(f"{label}, speed over whole passes", "×",
                      ratios(runs["whole"], runs["kept"]), better="more")  # fmt: skip
    experiment.figure(f"{label}, reading the rows once over a step", "×",
                      ratios(runs["read"], runs["kept"]))  # fmt: skip
    ours.run.gradients.close()
    ours.close()


def main() -> None:
    experiment = Experiment("top_layers", __doc__, dtypes=("float32", "bfloat16"), add=add_flags)
    bases: Path | None = experiment.flags.bases
    words = ["river", "winter", "stone", "letter", "market", "garden", "doctor", "number"]
    with bench(experiment) as test, torch.enable_grad(), TemporaryDirectory() as scratch:
        os.environ["LORA_DOMAINS_CACHE"] = scratch
        for dtype in experiment.dtypes:
            plain = [f"w{i}" for i in range(3, test.shape.vocabulary)]
            compare(experiment, "random Llama", test.base, texts(plain), dtype,
                    Path(scratch) / f"random-{dtype}")  # fmt: skip
            if bases is not None:
                compare(experiment, "SmolLM2", bases / "smollm2", texts(words), dtype,
                        Path(scratch) / f"smollm2-{dtype}")  # fmt: skip
        experiment.save(test.settings | {"rows": ROWS, "tokens": TOKENS, "rank": RANK})


if __name__ == "__main__":
    main()
