"""The cost of switching adapters, viewing the base and loading; and correctness under threads.

python benchmarks/speed/swap.py                                  # about 5 minutes on 2 cores
python benchmarks/speed/swap.py --device cuda --dtype bfloat16 --shape 0.5b 7b

Of the large shapes fewer adapters are loaded, and fewer threads ask.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Experiment, ratios
from shape import Bench, bench

from lora_domains import DomainModel


def switching(model: DomainModel, names: list[str], loops: int) -> Callable[[], None]:
    """Work: enter and leave ``using`` ``loops`` times, for each name in turn."""
    order = [names[i % len(names)] for i in range(loops)]

    def work() -> None:
        for name in order:
            with model.using(name):
                pass

    return work


def compare(experiment: Experiment, models: dict[int, DomainModel], peft: Any, folders: list[Path],
            loops: int) -> None:  # fmt: skip
    """Ours and PEFT with 2, 8 and 64 adapters loaded; PEFT's model keeps what it has loaded."""
    for count in sorted(models)[:-1]:
        model, names = models[count], [f"d{i}" for i in range(count)]
        experiment.say(f"PEFT loads {count - len(peft.peft_config)} adapters")
        for number in range(len(peft.peft_config), count):
            peft.load_adapter(folders[number % len(folders)], adapter_name=f"d{number}")
        peft.eval()

        def set_adapter() -> None:
            for name in ("d0", "d1"):
                peft.set_adapter(name)

        def disable_adapter() -> None:
            with peft.disable_adapter():
                pass

        per = {"ours": loops, "peft": 2}
        runs = experiment.turns(
            {"ours": switching(model, names, loops), "peft": set_adapter}, per=per
        )
        experiment.figure(f"switch, {count} loaded", "ms", runs["ours"], runs["peft"],
                          at_most=0.01)  # fmt: skip

        def base_view(model: DomainModel = model) -> None:
            for _ in range(loops):
                with model.using(None):
                    pass

        per = {"ours": loops, "peft": 1}
        runs = experiment.turns({"ours": base_view, "peft": disable_adapter}, per=per)
        experiment.figure(f"base view, {count} loaded", "ms", runs["ours"], runs["peft"],
                          at_most=0.01)  # fmt: skip

        runs = experiment.turns(
            {
                "ours": partial(model.load_adapter, folders[0], name="extra"),
                "peft": lambda: peft.load_adapter(folders[0], adapter_name="extra"),
            },
            after={
                "ours": partial(model.unload, "extra"),
                "peft": lambda: peft.delete_adapter("extra"),
            },
        )
        goal = 15.0 if count == 64 else None
        experiment.figure(f"load one validated, {count} resident", "ms", runs["ours"], runs["peft"],
                          at_most=goal)  # fmt: skip
        peft.set_adapter("d0")


def growth(experiment: Experiment, models: dict[int, DomainModel], loops: int) -> None:
    """The cost of switching among 2 and among many adapters."""
    work = {
        str(count): switching(model, [f"d{i}" for i in range(count)], loops)
        for count, model in models.items()
    }
    runs = experiment.turns(work, per=loops)
    few, *others = sorted(models)
    for count in others:
        experiment.figure(f"switch, {count} over {few} loaded", "×",
                          ratios(runs[str(count)], runs[str(few)]),
                          at_most=1.1 if count == 64 else None)  # fmt: skip
    most = max(models)
    experiment.figure(f"switch, {most} loaded (rank 1)", "ms", runs[str(most)], at_most=0.01)


def first_forward(experiment: Experiment, test: Bench, model: DomainModel, peft: Any,
                  names: list[str]) -> None:  # fmt: skip
    """Forward passes that follow a switch: another adapter in each call, and the same one."""
    ids = test.ids(1, 1)

    def ours(order: list[str]) -> Callable[[], None]:
        def work() -> None:
            for name in order:
                with model.using(name):
                    model(input_ids=ids)

        return work

    def theirs(order: list[str]) -> Callable[[], None]:
        def work() -> None:
            for name in order:
                if peft.active_adapter != name:
                    peft.set_adapter(name)
                peft(input_ids=ids)

        return work

    same = [names[0]] * len(names)
    runs = experiment.turns(
        {"ours same": ours(same), "peft same": theirs(same), "ours other": ours(names),
         "peft other": theirs(names)},
        per=len(names),
        after={"peft other": lambda: peft.set_adapter(names[0])},  # "same" starts without a switch
    )  # fmt: skip
    experiment.against_peft(
        "one token, the same adapter each call", "ms",
        {"ours": runs["ours same"], "peft": runs["peft same"]},
    )  # fmt: skip
    experiment.against_peft(
        "one token, another adapter each call", "ms",
        {"ours": runs["ours other"], "peft": runs["peft other"]},
    )  # fmt: skip


def right_calls(call: Callable[[str], torch.Tensor], names: list[str], calls: int) -> int:
    """The number of ``calls`` answered by the right adapter; each thread uses its own of ``names``.

    A call is right within a hundredth of the distance to the nearest other adapter.
    """
    wanted = {name: call(name) for name in names}
    apart = min(float((wanted[a] - wanted[b]).abs().max()) for a in names for b in names if a != b)

    def ask(name: str) -> int:
        right = 0
        with torch.no_grad():
            for _ in range(calls // len(names)):
                try:
                    found = call(name)
                except Exception as error:  # under threads PEFT also raises, which counts as wrong
                    print(f"  {type(error).__name__} from {name}", flush=True)
                    continue
                right += int(float((found - wanted[name]).abs().max()) < apart / 100)
        return right

    with ThreadPoolExecutor(len(names)) as pool:
        return sum(pool.map(ask, names))


def threads(experiment: Experiment, test: Bench, model: DomainModel, peft: Any) -> None:
    """Two to eight threads, each with a domain of its own."""
    ids = test.ids(1, 8)
    calls, few = (80, 40) if experiment.quick or test.large else (1000, 120)

    def ours(name: str) -> torch.Tensor:
        with model.using(name):
            logits: torch.Tensor = model(input_ids=ids).logits.float()
        return logits

    def theirs(name: str) -> torch.Tensor:
        peft.set_adapter(name)
        logits: torch.Tensor = peft(input_ids=ids).logits.float()
        return logits

    for count in (2,) if test.large else (2, 4, 8):
        experiment.say(f"{count} threads")
        names = [f"d{i}" for i in range(count)]
        peers = None
        if count == 2:
            peers = right_calls(theirs, names, few) / few
        found = right_calls(ours, names, calls) / calls
        experiment.figure(f"right answers, {count} threads × domains", "of calls", found, peers,
                          at_least=1.0)  # fmt: skip


def measure(experiment: Experiment, test: Bench) -> None:
    """All figures of one base."""
    counts = (2, 16) if test.large else (2, 8, 10) if experiment.quick else (2, 8, 64, 1000)
    loops = 2_000 if experiment.quick or test.large else 40_000
    folders, narrow = test.adapters(min(test.different, counts[-2])), test.adapters(2, rank=1)
    models = {}
    for count in counts:
        experiment.say(f"ours loads {count} adapters")
        kinds = narrow if count == counts[-1] else folders
        models[count] = test.ours([kinds[i % len(kinds)] for i in range(count)])
    peft = test.peft(folders[:2])
    compare(experiment, models, peft, folders, loops)
    growth(experiment, models, loops)
    several = models[counts[-2]]  # as many as PEFT has by now
    names = [f"d{i}" for i in range(min(8, counts[-2]))]
    first_forward(experiment, test, several, peft, names)
    threads(experiment, test, several, peft)
    loaded = f"loaded, {test.large}" if test.large else "loaded"
    experiment.save(test.settings | {loaded: counts, "switches_per_run": loops})


def main() -> None:
    experiment = Experiment("swap", __doc__, shapes=True)
    for large in experiment.shapes:
        with bench(experiment, large) as test:
            measure(experiment, test)


if __name__ == "__main__":
    main()
