"""Several adapters trained in one pass: against plain PEFT, one adapter after another.

    python benchmarks/speed/joint.py                 # 10 minutes on a quiet core
    python benchmarks/speed/joint.py --device cuda --dtype bfloat16 --shape 0.5b 7b

Each contender takes one optimiser step for each of the adapters, on batches of the same rows, of
which all tokens are supervised: plain PEFT in a loop of its own, our steps one after another, and
our joint step. "Chosen" is what a fit of these domains would do (``joint/together.py``). The
gradients of the joint step are compared with those of separate ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from measure import Experiment, ratios
from shape import Bench, bench, plain
from training import RANK, RATE, allocated, data, peak, texts

from lora_domains import Domain, DomainModel, Training
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.joint.gradients import Batch, JointGradients
from lora_domains.joint.together import choose
from lora_domains.tasks.generation import LanguageModelling
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import fit
from lora_domains.training.gradients import sum_over_ranks
from lora_domains.training.loop import Run
from lora_domains.training.plan import make_plan

SHAPES = ((4, 64, 1, 1.8), (4, 64, 4, None), (4, 256, 1, 1.25), (8, 64, 1, None), (2, 256, 4, None))
"""Adapters, tokens of a row, rows of a batch, and the goal for the speed over PEFT's."""
LARGE = {"0.5b": ((4, 512, 1, 3.0),), "7b": ((4, 512, 1, None),)}
"""The same, of large bases."""
NEVER_BELOW = 0.97
"""The speed of what is chosen, over separate steps of ours, at least."""


@dataclass(frozen=True)
class Planned:
    """What the choice is made by."""

    run: Run
    parameters: int
    head: bool = False
    pairs: bool = False
    whole: bool = False

    @property
    def train(self) -> Sequence[EncodedExample]:
        return self.run.train

    @property
    def batch_size(self) -> int:
        return self.run.plan.batch_size

    @property
    def seed(self) -> int:
        return self.run.domain.training.seed


class Ours:
    """Runs of several domains without retention, each on one batch again and again."""

    def __init__(self, model: DomainModel, words: Sequence[str], adapters: int, tokens: int,
                 rows: int) -> None:  # fmt: skip
        training = Training(retention="none", batch_size=rows, epochs=1, lr=RATE,
                            max_length=tokens, warmup=0.0)  # fmt: skip
        self.runs: list[Run] = []
        for number in range(adapters):
            made = texts(words, tokens, 40 + number)[number:]
            domain = Domain(f"d{number}", LanguageModelling(), data(made),
                            lora=Lora(rank=RANK, alpha=2 * RANK, targets="all-linear"),
                            training=training)  # fmt: skip
            dataset = model.dataset(domain)
            plan = make_plan(model.base, dataset)
            run = fit.make_run(model.bank, dataset, plan, model.out, model.display)
            generator = torch.Generator().manual_seed(number)
            weights = {
                name: (a, torch.randn(b.shape, generator=generator) * 0.02)
                for name, (a, b) in model.bank.weights(run.adapter_name).items()
            }  # B = 0, its usual start, would leave A without gradients
            model.bank.set_weights(run.adapter_name, weights, {})
            self.runs.append(run)
        # The last window of a text is shorter than the others.
        whole = [[row for row in run.train if len(row) == len(run.train[0])] for run in self.runs]
        self.batches = [
            Batch(run.gradients, own[:rows]) for run, own in zip(self.runs, whole, strict=True)
        ]
        self.joint = JointGradients(model.bank)
        parameters = sum(p.numel() for p in self.runs[0].parameters)
        self.choice = choose(model.base, [Planned(run, parameters) for run in self.runs])

    def separate(self) -> None:
        for run, (_, rows) in zip(self.runs, self.batches, strict=True):
            run.train_step(rows)

    def together(self) -> None:
        nats = self.joint.compute(self.batches)
        parameters = [p for run in self.runs for p in run.parameters]
        totals, _ = sum_over_ranks(parameters, nats, None)
        for run, (_, rows), total in zip(self.runs, self.batches, totals, strict=True):
            run.finish_step(rows, total)

    def apart(self) -> float:
        """How far gradients of the joint step are from those of separate ones, relative."""
        for gradients, rows in self.batches:
            gradients.compute(rows, gradients.units(rows))
        alone = [self._gradients(run) for run in self.runs]
        self.joint.compute(self.batches)
        joint = [self._gradients(run) for run in self.runs]
        return max(float((a - b).norm() / b.norm()) for a, b in zip(joint, alone, strict=True))

    def _gradients(self, run: Run) -> torch.Tensor:
        return torch.cat([p.grad.flatten().clone() for p in run.parameters if p.grad is not None])

    def close(self) -> None:
        for run in self.runs:
            run.bank.remove(run.adapter_name)


class Peer:
    """Plain PEFT: the same steps for one adapter after another."""

    def __init__(self, base: Path, names: Sequence[str], dtype: str, device: str) -> None:
        from peft import LoraConfig, get_peft_model

        model = plain(base, dtype, device)
        config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK,
                            target_modules=list(names))  # fmt: skip
        self.model, self.dtype, self.device = (
            get_peft_model(model, config).to(device),
            dtype,
            device,
        )
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)
        self.batches: list[dict[str, torch.Tensor]] = []

    def read(self, batches: Sequence[Batch]) -> None:
        """Take the rows of ``batches``, all of one length."""
        self.batches = []
        for _, rows in batches:
            ids = torch.tensor([[*row.prompt, *row.answer] for row in rows], device=self.device)
            prompt = len(rows[0].prompt)
            labels = ids.clone()
            labels[:, :prompt] = -100
            self.batches.append({"input_ids": ids, "labels": labels})

    def step(self) -> None:
        for batch in self.batches:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == "bfloat16"):
                loss = self.model(**batch).loss
            loss.backward()
            float(loss.detach())
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def compare(experiment: Experiment, model: DomainModel, peer: Peer, words: Sequence[str],
            shape: tuple[int, int, int, float | None]) -> None:  # fmt: skip
    """Measure one number of adapters and size of batches."""
    adapters, tokens, rows, goal = shape
    ours = Ours(model, words, adapters, tokens, rows)
    peer.read(ours.batches)
    label = f"{adapters} adapters, {rows} × {tokens} tokens each"
    limit = 1e-6 if experiment.dtype == "float32" else 1e-2
    experiment.figure(f"{label}, gradients apart, relative", "", ours.apart(), at_most=limit)
    runs = experiment.turns(
        {"peft": peer.step, "separate": ours.separate, "together": ours.together}, per=adapters
    )
    chosen = "together" if ours.choice.together > 1 else "separate"
    experiment.say(f"chosen: {ours.choice.reason}")
    experiment.figure(f"{label}, a step of one adapter, joint", "ms", runs["together"],
                      runs["peft"])  # fmt: skip
    experiment.figure(f"{label}, joint over PEFT", "×", ratios(runs["peft"], runs["together"]),
                      better="more")  # fmt: skip
    experiment.figure(f"{label}, joint over separate steps of ours", "×",
                      ratios(runs["separate"], runs["together"]), better="more")  # fmt: skip
    experiment.figure(f"{label}, chosen ({chosen}) over PEFT", "×",
                      ratios(runs["peft"], runs[chosen]), at_least=goal or NEVER_BELOW)  # fmt: skip
    experiment.figure(f"{label}, chosen over separate steps of ours", "×",
                      ratios(runs["separate"], runs[chosen]), at_least=NEVER_BELOW)  # fmt: skip
    device, works = experiment.device, {"joint": ours.together, "separate": ours.separate}
    if experiment.shapes != [None]:
        for name, work in (*works.items(), ("PEFT", peer.step)):
            times = runs[{"joint": "together", "PEFT": "peft"}.get(name, name)]
            experiment.profile(f"{label}, {name}", work, [adapters * each for each in times])
    if allocated(device):
        for name, work in works.items():
            experiment.figure(f"{label}, memory of a step beside the models, {name}", "MB",
                              peak(work, device) / 1e6, peak(peer.step, device) / 1e6)  # fmt: skip
    ours.close()


def measure(experiment: Experiment, test: Bench, scratch: Path) -> None:
    """All figures of one base."""
    words = [f"w{i}" for i in range(3, test.shape.vocabulary)]
    model = DomainModel.from_pretrained(
        test.base, dtype=experiment.dtype, device=experiment.device, out=scratch,
        display=Display(quiet=True),
    )  # fmt: skip
    first = Ours(model, words, 1, 64, 1)
    names = sorted(first.runs[0].bank.weights(first.runs[0].adapter_name))
    first.close()
    peer = Peer(test.base, names, experiment.dtype, experiment.device)
    shapes = LARGE[test.large] if test.large else SHAPES[:2] if experiment.quick else SHAPES
    for shape in shapes:
        compare(experiment, model, peer, words, shape)
    experiment.save(test.settings | {"rank": RANK})


def main() -> None:
    experiment = Experiment("joint", __doc__, shapes=True)
    for large in experiment.shapes:
        with (bench(experiment, large) as test, torch.enable_grad(),
              TemporaryDirectory() as scratch):  # fmt: skip
            measure(experiment, test, Path(scratch))


if __name__ == "__main__":
    main()
