"""Training steps of one adapter: plain PEFT with transformers' Trainer against ours.

    python benchmarks/speed/training.py --bases .bases           # 30 minutes on 2 quiet cores
    python benchmarks/speed/training.py                          # without pretrained bases
    python benchmarks/speed/training.py --device cuda --dtype bfloat16 --shape 0.5b 7b

Both train the same LoRA weights on the same rows, without retention, and take the same optimiser
steps: 8 rows of 256 tokens, all of which are supervised, on a random Llama and on SmolLM2, and
labels on MiniLM with a head. In bfloat16 PEFT is used as its users do: the base in bfloat16, its
adapter in float32, and autocast (`bf16=True`). A step of the Trainer is timed between its own
callbacks, without the Trainer's start, and each takes an untimed step before a timed one. Memory is
the peak of all tensors that a step makes, counted by the package's own counter, for both. Profiles
are of one more step, the Trainer's with its start.

With ``--shape`` steps are of 8 rows of 512 tokens, and the base of 7 billion parameters is trained
on in 4 and 8 bits too. The limit is 4N floating-point operations for a token over the rate of a
large matrix product, measured here: 2N for the forward pass and 2N for the gradients of the
activations. The 2N for the gradients of the weights (Kaplan et al. 2020, arXiv 2001.08361: 6N in
all) are not needed where the base is frozen. N counts the weights that a token is multiplied with.
Memory then includes base, adapter and optimiser. What the goal for 8 bits compares is one row with
gradient checkpointing, since more rows' activations take the same memory at every precision.
"""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from measure import DTYPES, Experiment, in_turn, ratios, synchronize, timed
from shape import Bench, bench, multiplied, plain

from lora_domains import Classification, Data, Domain, DomainModel, Training
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.inference.memory import TensorBytes, release
from lora_domains.tasks.generation import LanguageModelling
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import fit
from lora_domains.training.plan import make_plan

ROWS, TOKENS, RANK, RATE = 8, 256, 16, 1e-5
FEW = 16
"""Tokens of a pass that is mostly its launch."""
LONG = 512
"""Tokens of a row on large bases."""
PRECISIONS = {"0.5b": (None,), "7b": (None, "4bit", "8bit")}
"""By shape; transformers takes weights through the CPU into 8 bits, which takes longest."""
SHARE, EIGHT_BIT = 0.5, 0.6
"""Goals at 7 billion: share of the limit, at least; memory in 8 bits over bfloat16's, at most."""
GOALS = {"float32": (1.07, 0.75), "bfloat16": (1.25, 0.75)}
"""By dtype: tokens a second, at least, and memory, at most, over PEFT's."""
GRADIENTS = {"float32": 1e-6, "bfloat16": 1e-2}


class Steps:
    """Our training: the steps of a fit without retention, on one batch again and again."""

    def __init__(self, base: Path | DomainModel, task: Any, rows: list[dict[str, Any]], dtype: str,
                 device: str, out: Path, rows_per_step: int = ROWS, tokens: int = TOKENS,
                 rank: int = RANK, *, quantization: Any = None,
                 checkpointing: bool = False, top: int | None = None) -> None:  # fmt: skip
        quiet = Display(quiet=True)
        self.model = model = base if isinstance(base, DomainModel) else DomainModel.from_pretrained(
            base, dtype=dtype, device=device, out=out, quantization=quantization, display=quiet
        )  # fmt: skip
        training = Training(retention="none", batch_size=rows_per_step, epochs=1, lr=RATE,
                            max_length=tokens, warmup=0.0,
                            gradient_checkpointing=checkpointing)  # fmt: skip
        domain = Domain("speed", task, data(rows),
                        lora=Lora(rank=rank, alpha=2 * rank, targets="all-linear", top_layers=top),
                        training=training)  # fmt: skip
        dataset = model.dataset(domain)
        self.bank, self.pad = model.bank, model.base.pad
        self.run = fit.make_run(model.bank, dataset, make_plan(model.base, dataset), out, quiet)
        # The last window of a text is shorter than the others: PEFT would pad it.
        encoded = [row.encoded for row in dataset.train]
        longest = max(map(len, encoded))
        whole = [row for row in encoded if len(row) == longest]
        self.batch: list[EncodedExample] = whole[:rows_per_step]
        if len(self.batch) < rows_per_step:
            raise ValueError(f"{len(whole)} rows of {longest} tokens, fewer than {rows_per_step}")
        generator = torch.Generator().manual_seed(0)
        weights = {
            name: (a, torch.randn(b.shape, generator=generator) * 0.02)
            for name, (a, b) in self.bank.weights(self.run.adapter_name).items()
        }  # B = 0, its usual start, would leave A without gradients
        self.bank.set_weights(self.run.adapter_name, weights, {})

    def close(self) -> None:
        """Take the adapter off the base."""
        self.bank.remove(self.run.adapter_name)

    @property
    def weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B by linear."""
        return self.bank.weights(self.run.adapter_name)

    def step(self) -> None:
        self.run.train_step(self.batch)

    def gradients(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of the batch's mean loss, by linear."""
        self.run.gradients.compute(self.batch, self.run.gradients.units(self.batch))
        of = self.bank.trainable(self.run.adapter_name)
        return {name: (lora.a.grad, lora.b.grad) for name, lora in of.items()}  # type: ignore[misc]


class Peer:
    """Plain PEFT on the same batch with the same weights, under transformers' Trainer."""

    def __init__(self, base: Path, ours: Steps, dtype: str, device: str, classes: int,
                 quantization: Any = None) -> None:  # fmt: skip
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForSequenceClassification

        if classes:
            model = AutoModelForSequenceClassification.from_pretrained(
                base, dtype=DTYPES[dtype], num_labels=classes
            )
        else:
            model = plain(base, dtype, device, quantization)
        names = sorted(ours.weights)
        config = LoraConfig(task_type="SEQ_CLS" if classes else "CAUSAL_LM", r=RANK,
                            lora_alpha=2 * RANK, target_modules=names)  # fmt: skip
        self.model, self.dtype, self.device = (
            get_peft_model(model, config).to(device),
            dtype,
            device,
        )
        for name, (a, b) in ours.weights.items():
            linear = self.model.base_model.model.get_submodule(name)
            linear.lora_A.default.weight.data.copy_(a)
            linear.lora_B.default.weight.data.copy_(b)
        texts = [[*row.prompt, *row.answer] for row in ours.batch]
        longest = max(map(len, texts))
        self.rows = []
        for text, row in zip(texts, ours.batch, strict=True):
            padding = longest - len(text)
            label = row.target if classes else (
                [-100] * len(row.prompt) + list(row.answer) + [-100] * padding)  # fmt: skip
            self.rows.append({"input_ids": text + [ours.pad] * padding,
                              "attention_mask": [1] * len(text) + [0] * padding,
                              "labels": label})  # fmt: skip

    def trainer(self, folder: Path) -> Any:
        """A Trainer of one step, whose ``seconds`` that step takes."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        device = self.device

        class Clock(TrainerCallback):
            seconds = 0.0

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                synchronize(device)
                self.started = time.perf_counter()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronize(device)
                self.seconds = time.perf_counter() - self.started

        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=ROWS, max_steps=1, learning_rate=RATE,
            bf16=self.dtype == "bfloat16", use_cpu=self.device == "cpu", report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True,
            lr_scheduler_type="constant",
        )  # fmt: skip
        clock = Clock()
        trainer = Trainer(self.model, arguments, train_dataset=self.rows, callbacks=[clock])
        trainer.clock = clock
        return trainer

    def gradients(self, exact: bool = False) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of the batch's mean loss, by linear; ``exact`` in the model's precision, where
        transformers computes the loss in float32."""
        self.model.zero_grad(set_to_none=True)
        columns = {key: torch.tensor([row[key] for row in self.rows], device=self.device)
                   for key in self.rows[0]}  # fmt: skip
        self.model.train()
        if exact:
            labels = columns.pop("labels")[:, 1:].flatten()
            logits = self.model(**columns).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits, labels)
        else:
            loss = self.model(**columns).loss
        torch.autograd.backward(loss)
        found = {}
        for name, module in self.model.base_model.model.named_modules():
            if hasattr(module, "lora_A"):
                pair = module.lora_A.default.weight, module.lora_B.default.weight
                found[name] = (pair[0].grad.clone(), pair[1].grad.clone())
        self.model.zero_grad(set_to_none=True)
        return found


def difference(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> float:
    """The length of the difference of all gradients, relative to the peer's."""
    flat = [torch.cat([g.double().flatten().cpu() for name in sorted(of) for g in of[name]])
            for of in (ours, peer)]  # fmt: skip
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def exact_gradients(
    base: Path, ours: Steps, dtype: str, device: str
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """PEFT's gradients on the weights of ``dtype`` in the next higher precision."""
    exact = Peer(base, ours, dtype, device, 0)
    exact.model.to(torch.float64 if dtype == "float32" else torch.float32)
    return exact.gradients(exact=True)


def peak(work: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes of the tensors that ``work`` makes, at most at any one time."""
    if device.startswith("cuda"):
        before = allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with TensorBytes() as counted:
        work()
    return int(counted.peak)


def compare(experiment: Experiment, name: str, base: Path, task: Any, rows: list[dict[str, Any]],
            dtype: str, folder: Path, classes: int = 0) -> None:  # fmt: skip
    """Measure one base at one precision."""
    ours = Steps(base, task, rows, dtype, experiment.device, folder / "ours")
    peer = Peer(base, ours, dtype, experiment.device, classes)
    label = f"{name}, {dtype}"
    if not classes:  # the head of transformers' classifiers is another one
        found, theirs = ours.gradients(), peer.gradients()
        experiment.figure(f"{label}, gradients apart, relative", "", difference(found, theirs),
                          at_most=GRADIENTS[dtype])  # fmt: skip
        truth = exact_gradients(base, ours, dtype, experiment.device)
        error = difference(theirs, truth)
        experiment.figure(f"{label}, error of the gradients, relative", "",
                          difference(found, truth), error, at_most=error)  # fmt: skip
    trainer = peer.trainer(folder / "trainer")
    runs = step_times(experiment, {"ours": ours.step}, trainer)
    tokens = sum(map(len, ours.batch))
    speed, memory = GOALS[dtype]
    experiment.figure(f"{label}, tokens a second", "tokens/s",
                      [tokens / s for s in runs["ours"]], [tokens / s for s in runs["peft"]],
                      better="more")  # fmt: skip
    experiment.figure(f"{label}, speed over PEFT's", "×", ratios(runs["peft"], runs["ours"]),
                      at_least=speed)  # fmt: skip
    if not classes:
        pass_cost(experiment, label, ours)
    if experiment.device == "cpu":
        bytes_ = {"ours": peak(ours.step), "peft": peak(trainer.train)}
        experiment.figure(f"{label}, peak memory of a step", "MB", bytes_["ours"] / 1e6,
                          bytes_["peft"] / 1e6)  # fmt: skip
        experiment.figure(f"{label}, memory over PEFT's", "×", bytes_["ours"] / bytes_["peft"],
                          at_most=memory)  # fmt: skip
        experiment.profile(label, ours.step, runs["ours"])
        experiment.profile(f"{label}, PEFT", trainer.train, runs["peft"])
    ours.close()


def step_times(
    experiment: Experiment, steps: Mapping[str, Callable[[], Any]], trainer: Any
) -> dict[str, list[float]]:
    """Seconds of each of our ``steps`` and of "peft" in each round; one round warms up.

    Each takes an untimed step first. The system clears memory that a step needs beyond what the
    contender before it held, so that its time would depend on who came before.
    """

    def peft() -> float:
        trainer.train()
        return float(trainer.clock.seconds)  # without the Trainer's start

    contenders: dict[str, Callable[[], float]] = {
        who: partial(timed, step, experiment.device) for who, step in steps.items()
    }
    contenders["peft"] = peft
    runs: dict[str, list[float]] = {who: [] for who in contenders}
    for round_ in range(-1, experiment.rounds):
        for who in in_turn(list(contenders), round_):
            contenders[who]()
            seconds = contenders[who]()
            if round_ >= 0:
                runs[who].append(seconds)
    return runs


def pass_cost(experiment: Experiment, label: str, ours: Steps) -> None:
    """What one more pass costs, in tokens (``modeling.batching.PASS``): the time of a pass over few
    tokens, over that of a token of a large one."""
    row = ours.batch[0]
    short = [replace(row, answer=row.answer[:FEW])]
    compute, units = ours.run.gradients.compute, ours.run.gradients.units
    runs = experiment.turns({
        "short": lambda: compute(short, units(short)),
        "whole": lambda: compute(ours.batch, units(ours.batch)),
    })  # fmt: skip
    tokens = sum(map(len, ours.batch)) - len(short[0])
    costs = [few * tokens / (whole - few) for few, whole in zip(*runs.values(), strict=True)]
    experiment.figure(f"{label}, one more pass, in tokens", "tokens", costs)


# ── Large bases ─────────────────────────────────────────────────────────────────────────────────


def allocated(device: str) -> int:
    """Bytes of the tensors on an accelerator; 0 on a CPU, where they are not counted."""
    return int(torch.cuda.memory_allocated(device)) if device.startswith("cuda") else 0


def matrix_rate(experiment: Experiment) -> float:
    """Floating-point operations a second of a product of two large random matrices, bfloat16."""
    size, times = (256, 2) if experiment.quick else (8192, 50)
    a, b = (torch.randn(size, size, device=experiment.device).bfloat16() for _ in range(2))

    def products() -> None:
        for _ in range(times):
            a @ b

    runs = experiment.turns({"product": products}, per=times)["product"]
    rate = [2 * size**3 / seconds for seconds in runs]
    experiment.figure(f"product of two matrices of {size} × {size}", "TFLOP/s",
                      [each / 1e12 for each in rate], better="more")  # fmt: skip
    return sorted(rate)[len(rate) // 2]


def large(experiment: Experiment, test: Bench, scratch: Path, rate: float) -> None:
    """Speed against PEFT and against the limit, and memory, at each precision of a large base."""
    words = [f"w{i}" for i in range(3, test.shape.vocabulary)]
    tokens = 64 if experiment.quick else LONG
    memory: dict[Any, tuple[float, float]] = {}
    for precision in PRECISIONS[test.large or ""]:
        folder = scratch / f"{test.large}-{precision}"
        memory[precision] = at_precision(
            experiment, test, texts(words, tokens), tokens, precision, folder, rate
        )
        gc.collect()  # models in reference cycles of the Trainer
        release(torch.device(experiment.device))
        if precision:
            goal = EIGHT_BIT if precision == "8bit" else None
            label = f"{precision}, memory over {experiment.dtype}'s"
            (rows, one), (all_plain, one_plain) = memory[precision], memory[None]
            experiment.figure(f"{label}, {ROWS} × {tokens}", "×", rows / all_plain)
            experiment.figure(f"{label}, 1 × {tokens} with gradient checkpointing", "×",
                              one / one_plain, at_most=goal)  # fmt: skip
        experiment.save(test.settings | {"rows": ROWS, "tokens": LONG, "rank": RANK})


def at_precision(experiment: Experiment, test: Bench, rows: list[dict[str, Any]], tokens: int,
                 precision: Any, folder: Path, rate: float) -> tuple[float, float]:  # fmt: skip
    """Measure one precision; the peak memory of ours in MB, of a step and of a small one."""
    device, dtype, label = experiment.device, experiment.dtype, precision or experiment.dtype
    experiment.say(f"loading ours and PEFT in {label}")
    before = allocated(device)
    ours = Steps(test.base, LanguageModelling(), rows, dtype, device, folder / "ours",
                 tokens=tokens, quantization=precision)  # fmt: skip
    ours.step()
    own, before = allocated(device) - before, allocated(device)
    experiment.say("ours has taken a step")
    peer = Peer(test.base, ours, dtype, device, 0, precision)
    trainer = peer.trainer(folder / "trainer")
    trainer.train()
    theirs = allocated(device) - before
    if not precision:
        experiment.figure(f"{label}, gradients apart, relative", "",
                          difference(ours.gradients(), peer.gradients()),
                          at_most=GRADIENTS[dtype])  # fmt: skip
    runs = step_times(experiment, {"ours": ours.step}, trainer)
    count = sum(map(len, ours.batch))
    rates = {who: [count / seconds for seconds in of] for who, of in runs.items()}
    experiment.figure(f"{label}, tokens a second", "tokens/s", rates["ours"], rates["peft"],
                      better="more")  # fmt: skip
    experiment.figure(f"{label}, speed over PEFT's", "×", ratios(runs["peft"], runs["ours"]),
                      at_least=None if precision else GOALS[dtype][0], better="more")  # fmt: skip
    limit = rate / (4 * multiplied(test.shape))
    shares = [[one / limit for one in rates[who]] for who in ("ours", "peft")]
    goal = SHARE if test.large == "7b" and not precision else None
    experiment.figure(f"{label}, share of the limit of {limit:.0f} tokens/s", "×", *shares,
                      at_least=goal, better="more")  # fmt: skip
    if not precision:
        pass_cost(experiment, label, ours)
    experiment.profile(label, ours.step, runs["ours"])
    large_step = (own + peak(ours.step, device)) / 1e6
    experiment.figure(f"{label}, memory, {ROWS} × {tokens}", "MB", large_step,
                      (theirs + peak(trainer.train, device)) / 1e6)  # fmt: skip
    ours.close()
    before = allocated(device)
    one = Steps(ours.model, LanguageModelling(), rows, dtype, device, folder / "one",
                rows_per_step=1, tokens=tokens, checkpointing=True)  # fmt: skip
    one.step()
    own = ours.model.base.resident_bytes() + allocated(device) - before
    small_step = (own + peak(one.step, device)) / 1e6
    experiment.figure(f"{label}, memory, 1 × {tokens} with gradient checkpointing", "MB",
                      small_step)  # fmt: skip
    one.close()
    return large_step, small_step


def data(rows: list[dict[str, Any]]) -> Data:
    """``rows`` in three splits. The general text, which is not read, is given: a base would write
    its own."""
    general = [{"text": " ".join(row["text"].split()[:8])} for row in rows]
    return Data(rows[20:], rows[:10], rows[10:20], general=general)


def texts(words: Sequence[str], tokens: int = TOKENS, count: int = 40) -> list[dict[str, Any]]:
    """Different rows that are longer than a batch's: each fills its window."""
    generator = torch.Generator().manual_seed(1)
    picks = torch.randint(len(words), (count, 2 * tokens), generator=generator).tolist()
    return [{"text": " ".join(words[i] for i in row)} for row in picks]


def main() -> None:
    experiment = Experiment(
        "training", __doc__, dtypes=("float32", "bfloat16"), add=add_flags, shapes=True
    )
    if experiment.shapes != [None]:
        measure_large(experiment)
        return
    bases: Path | None = experiment.flags.bases
    words = ["river", "winter", "stone", "letter", "market", "garden", "doctor", "number"]
    with bench(experiment) as test, torch.enable_grad(), TemporaryDirectory() as scratch:
        for dtype in experiment.dtypes:
            plain = [f"w{i}" for i in range(3, test.shape.vocabulary)]
            compare(experiment, "random Llama, texts", test.base, LanguageModelling(),
                    texts(plain), dtype, Path(scratch) / f"random-{dtype}")  # fmt: skip
            if bases is None:
                continue
            compare(experiment, "SmolLM2, texts", bases / "smollm2", LanguageModelling(),
                    texts(words), dtype, Path(scratch) / f"smollm2-{dtype}")  # fmt: skip
            rows = [row | {"label": "ab"[n % 2]} for n, row in enumerate(texts(words))]
            compare(experiment, "MiniLM, head", bases / "minilm", Classification(head=True), rows,
                    dtype, Path(scratch) / f"minilm-{dtype}", classes=2)  # fmt: skip
        experiment.save(test.settings | {"rows": ROWS, "tokens": TOKENS, "rank": RANK})


def measure_large(experiment: Experiment) -> None:
    """Every large base that was asked for."""
    rate = matrix_rate(experiment)
    for name in experiment.shapes:
        with (bench(experiment, name) as test, torch.enable_grad(),
              TemporaryDirectory() as scratch):  # fmt: skip
            large(experiment, test, Path(scratch), rate)


def add_flags(add: Callable[..., Any]) -> None:
    """Flags of this script alone."""
    add("--bases", type=Path, help="folder with smollm2 and minilm; default: the random base only")


if __name__ == "__main__":
    main()
