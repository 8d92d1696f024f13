"""How time and memory grow: with the length of rows, layers, adapters and switches.

    python benchmarks/speed/growth.py           # 6 minutes on one core

Each curve doubles or quadruples one size of a small random Llama and keeps the others. Time is the
processor time of this process, the least of the rounds, so that other jobs disturb it little;
memory is that of all tensors at their peak. The exponent is the slope of a straight line through
the logarithms, over all sizes and over the largest two: 1 is linear growth, 0 none. Rows are in
``benchmarks/data/rows.py``.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import shape as shapes
import torch
from measure import Experiment
from shape import Shape
from training import Steps, peak, texts

from lora_domains import DomainModel
from lora_domains.adapters.peft import new_adapter
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.modeling.lora import Adapter
from lora_domains.tasks.generation import LanguageModelling

BASE = Shape(hidden=128, layers=4, heads=4, intermediate=352, vocabulary=2000, rank=8)
LINEAR = 1.15
"""The goal of an exponent: linear, but for what a measurement errs."""
LENGTHS, LAYERS = (64, 128, 256, 512, 1024), (2, 4, 8, 16)
ADAPTERS, SWITCHED, MIXED = (1, 4, 16, 64), (1, 10, 100, 1000), (1, 4, 16, 64)
CALLS = 2000


def least(work: Callable[[], Any], rounds: int) -> float:
    """Seconds of processor time that ``work`` takes, at least; one round warms up."""
    seconds = []
    for round_ in range(rounds + 1):
        started = time.process_time()
        work()
        if round_:
            seconds.append(time.process_time() - started)
    return min(seconds)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of the values over the sizes, both as logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def curve(experiment: Experiment, name: str, values: Mapping[int, float], unit: str,
          goal: float | None = LINEAR) -> dict[str, Any]:  # fmt: skip
    """Store a curve's exponents as figures; the curve itself is returned."""
    sizes, measured = [*values], [*values.values()]
    last = exponent(sizes[-2:], measured[-2:])
    experiment.figure(f"{name}, exponent over all sizes", "", exponent(sizes, measured))
    experiment.figure(f"{name}, exponent over the last two", "", last, at_most=goal)
    return {"name": name, "unit": unit, "values": {str(size): values[size] for size in sizes}}


def training(experiment: Experiment, folder: Path, shape: Shape, length: int) -> tuple[float, int]:
    """Processor time and peak memory of a step over 4 rows."""
    place = folder / f"{shape.layers}-{length}"
    base = shapes.save_base(place / "base", shape)
    words = [f"w{i}" for i in range(3, shape.vocabulary)]
    steps = Steps(base, LanguageModelling(), texts(words, length), "float32", "cpu", place / "out",
                  rows_per_step=4, tokens=length, rank=shape.rank)  # fmt: skip
    return least(steps.step, experiment.rounds), peak(steps.step)


def steps(experiment: Experiment, folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Training over the length of rows and over layers."""
    lengths, layers = (LENGTHS[:2], LAYERS[:2]) if quick else (LENGTHS, LAYERS)
    by_length = {n: training(experiment, folder, BASE, n) for n in lengths}
    by_layers = {n: training(experiment, folder, replace(BASE, layers=n), 128) for n in layers}
    curves = []
    for what, measured in (("tokens of a row", by_length), ("layers", by_layers)):
        time_of = {n: seconds for n, (seconds, _) in measured.items()}
        memory = {n: bytes_ / 1e6 for n, (_, bytes_) in measured.items()}
        curves.append(curve(experiment, f"a step's time over {what}", time_of, "s"))
        curves.append(curve(experiment, f"a step's memory over {what}", memory, "MB"))
    return curves


def random_adapters(model: DomainModel, count: int) -> list[Adapter]:
    """Adapters that share their weights' values, each with memory of its own."""
    base = model.base
    first = new_adapter(base, "a0", Lora(targets="all-linear"), BASE.rank, 16, seed=0)
    return [
        replace(first, name=f"a{n}", weights={k: (a.clone(), b.clone() + 0.01)
                                              for k, (a, b) in first.weights.items()})
        for n in range(count)
    ]  # fmt: skip


def serving(experiment: Experiment, folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Loading, switching and mixed batches over the number of adapters."""
    base = shapes.save_base(folder / "serving", BASE)

    def fresh(count: int) -> DomainModel:
        model = DomainModel.from_pretrained(base, dtype="float32", device="cpu", slots=count,
                                            display=Display(quiet=True))  # fmt: skip
        for adapter in random_adapters(model, count):
            model.bank.add(adapter)
        return model

    ids = torch.randint(3, BASE.vocabulary, (1, 8))
    loading, switching, mixing = {}, {}, {}
    for count in ADAPTERS[:2] if quick else ADAPTERS:
        model = fresh(1)
        adapters = random_adapters(model, count)

        def load(adapters: list[Adapter] = adapters, model: DomainModel = model) -> None:
            for adapter in adapters:
                model.bank.add(adapter)

        loading[count] = least(load, experiment.rounds)
    for count in SWITCHED[:2] if quick else SWITCHED:
        model = fresh(count)

        def switch(model: DomainModel = model, count: int = count) -> None:
            for call in range(CALLS):
                with model.using(f"a{call % count}"):
                    pass

        switching[count] = least(switch, experiment.rounds) / CALLS
        with torch.no_grad(), model.using("a0"):
            model(input_ids=ids)
    rows = torch.randint(3, BASE.vocabulary, (max(MIXED), 1))
    for count in MIXED[:2] if quick else MIXED:
        model = fresh(count)
        domains = [f"a{n % count}" for n in range(len(rows))]

        def call(model: DomainModel = model, domains: list[str] = domains) -> None:
            with torch.no_grad():
                for _ in range(5):
                    model(input_ids=rows, domains=domains)

        mixing[count] = least(call, experiment.rounds) / 5
    return [
        curve(experiment, "loading over adapters", loading, "s"),
        curve(experiment, "a switch over adapters in memory", switching, "s", goal=0.15),
        curve(experiment, "64 rows of one token over their domains", mixing, "s"),
    ]


def main() -> None:
    experiment = Experiment("growth", __doc__)
    with TemporaryDirectory() as folder:
        curves = steps(experiment, Path(folder), quick=experiment.quick)
        curves += serving(experiment, Path(folder), quick=experiment.quick)
        experiment.save({"shape": BASE.__dict__, "curves": curves})


if __name__ == "__main__":
    main()
