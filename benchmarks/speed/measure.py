"""Timing and storing of speed benchmarks: contenders take turns in one process.

Absolute times depend on the machine and on its load. Therefore PEFT and this package do the same
work alternately, each round starts with another of them, and medians over rounds are compared. The
load average is stored with them, and whether the machine was busy before or after (``busy``).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

RESULTS = Path(__file__).parents[1] / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ROUNDS = 7
THREADS = min(8, os.cpu_count() or 1)
"""On a machine whose CPU is not what is measured."""
SHARE = 0.9
"""The part of the time that threads run on a machine that is not busy."""
SECONDS = 0.2
"""How long ``busy`` watches them."""
LARGEST = 12
"""Kernels of a profile that are stored, those that take most time."""

Work = Callable[[], Any]


class Experiment:
    """One run of a script: its flags, progress messages, figures and result file."""

    def __init__(
        self, name: str, doc: str | None, dtypes: Sequence[str] = ("float32",),
        add: Callable[[Callable[..., Any]], None] | None = None, shapes: bool = False,
    ) -> None:  # fmt: skip
        parser = argparse.ArgumentParser(
            description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        flag = parser.add_argument
        if add is not None:
            add(flag)
        flag("--device", default="cpu", help="cpu or cuda; default: %(default)s")
        if shapes:
            flag(
                "--shape", nargs="+", choices=("0.5b", "7b"), default=[None],
                help="random Llamas of 0.5 or 7 billion parameters; default: 55 million",
            )  # fmt: skip
        if dtypes:
            flag(
                "--dtype", nargs="+", choices=list(DTYPES), default=list(dtypes), help="of the base"
            )
        flag(
            "--threads",
            type=int,
            help=f"of torch on the CPU; default: 1, elsewhere {THREADS} to load bases and adapters",
        )
        flag("--rounds", type=int, help=f"of each comparison; default: {ROUNDS}, 2 if quick")
        flag("--quick", action="store_true", help="a small model and few rounds, to try the script")
        flag(
            "--out",
            type=Path,
            help="folder of the JSON; default: benchmarks/results, none if quick",
        )
        flags = parser.parse_args()
        given: list[str] = flags.dtype if dtypes else []
        if len(given) > len(dtypes):
            parser.error(f"{name} takes {len(dtypes)} --dtype")
        if flags.threads is None:
            flags.threads = 1 if flags.device == "cpu" else THREADS
        self.flags = flags
        self.name, self.device, self.quick = name, flags.device, bool(flags.quick)
        self.dtypes = given
        self.out: Path | None = flags.out or (None if self.quick else RESULTS)
        self.rounds: int = flags.rounds or (2 if self.quick else ROUNDS)
        self.shapes: list[str | None] = flags.shape if shapes else [None]
        self.prefix = ""
        self.figures: list[dict[str, Any]] = []
        self._settings: dict[str, Any] = {}
        self._threads = flags.threads
        self._started, self._load = time.perf_counter(), os.getloadavg()
        torch.set_num_threads(flags.threads)
        words = [f"{name} on {self.device}", " and ".join(given), f"{flags.threads} thread(s)"]
        self.say(", ".join(filter(None, words)))
        self._busy = False
        self._watch()

    @property
    def dtype(self) -> str:
        return self.dtypes[0]

    def say(self, text: str) -> None:
        """One line of progress, with the time since the start and the load average."""
        seconds = time.perf_counter() - self._started
        print(f"{seconds:6.1f} s  load {os.getloadavg()[0]:4.1f}  {text}", flush=True)

    def _watch(self) -> None:
        """Warn if the machine is busy, and store that it was."""
        if reason := busy(self._threads):
            self._busy = True
            self.say(f"WARNING: this machine is busy: {reason}. Times are too long; measure again.")

    def turns(
        self,
        contenders: Mapping[str, Work],
        *,
        per: int | Mapping[str, int] = 1,
        after: Mapping[str, Work] | None = None,
    ) -> dict[str, list[float]]:
        """Seconds of each contender's work in each round, divided by ``per``.

        One warm-up round is not counted. ``after`` cleans up after a contender, untimed.
        """
        names = list(contenders)
        runs: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(-1, self.rounds):
            for name in in_turn(names, round_):
                seconds = timed(contenders[name], self.device)
                if after is not None and name in after:
                    after[name]()
                if round_ >= 0:
                    runs[name].append(seconds / (per if isinstance(per, int) else per[name]))
        return runs

    def figure(
        self,
        name: str,
        unit: str,
        ours: float | Sequence[float],
        peft: float | Sequence[float] | None = None,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        better: str = "less",
    ) -> None:
        """Add a figure: a value, or the runs whose median it is; ``at_…`` is the goal for ours.

        Values are in ``unit``, except that "ms" takes seconds. ``better`` is "less" or "more".
        """
        factor = 1000.0 if unit == "ms" else 1.0
        better = "more" if at_least is not None else better
        name = self.prefix + name
        entry: dict[str, Any] = {"name": name, "unit": unit, "better": better}
        runs = {}
        for who, value in (("ours", ours), ("peft", peft)):
            if isinstance(value, Sequence):
                runs[who] = [factor * v for v in value]
                entry[who] = statistics.median(runs[who])
            else:
                entry[who] = None if value is None else factor * value
        if at_most is not None:
            entry |= {"goal": f"≤ {at_most:.4g}", "reached": entry["ours"] <= at_most}
        elif at_least is not None:
            entry |= {"goal": f"≥ {at_least:.4g}", "reached": entry["ours"] >= at_least}
        else:
            entry |= {"goal": None, "reached": None}
        self.figures.append(entry | {"runs": runs})
        text = f"{name}: ours {entry['ours']:.4g} {unit}"
        if entry["peft"] is not None:
            text += f", PEFT {entry['peft']:.4g}"
        if entry["goal"]:
            text += f", goal {entry['goal']}: {'reached' if entry['reached'] else 'MISSED'}"
        self.say(text)

    def against_peft(self, name: str, unit: str, runs: Mapping[str, Sequence[float]]) -> None:
        """Add a figure whose goal is to be no slower than PEFT."""
        factor = 1000.0 if unit == "ms" else 1.0
        goal = factor * statistics.median(runs["peft"])
        self.figure(name, unit, runs["ours"], runs["peft"], at_most=goal)

    def profile(self, name: str, work: Work, runs: Sequence[float]) -> None:
        """Add what a step is made of: kernels, or operators on a CPU, and the time of the largest.

        ``runs`` are the seconds of ``work`` without the profiler, which makes launches slower.
        """
        from torch.profiler import ProfilerActivity, profile

        cuda = self.device.startswith("cuda")
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
        with profile(activities=kinds) as seen:
            work()
            synchronize(self.device)
        where = "CUDA" if cuda else "CPU"
        events = [each for each in seen.key_averages() if each.device_type.name == where]
        spent = {each.key: _own_time(each, cuda) / 1e6 for each in events}
        of = "kernels" if cuda else "operators"
        self.figure(f"{name}, {of} of a step", "", float(sum(each.count for each in events)))
        wall = statistics.median(runs)
        self.figure(f"{name}, time of {of} over that of a step", "×", sum(spent.values()) / wall,
                    better="more")  # fmt: skip
        largest = sorted(spent, key=lambda key: -spent[key])[:LARGEST]
        self._settings[f"profile {self.prefix}{name}, ms"] = {
            key: round(1000 * spent[key], 2) for key in largest
        }
        for key in largest:
            self.say(f"{1000 * spent[key]:8.1f} ms  {key[:90]}")

    def save(self, settings: Mapping[str, Any]) -> None:
        """Write ``NAME.json``, or ``NAME-DEVICE-DTYPE.json`` on another device than the CPU.

        Called once for each shape or precision, it keeps the settings of those before: what was
        measured is there when a later one fails.
        """
        self._settings |= settings
        self._watch()
        if self.out is None:
            self.say("quick: nothing is stored")
            return
        plain = self.device == "cpu"
        stem = (
            self.name if plain else "-".join([self.name, self.device.split(":")[0], *self.dtypes])
        )
        words = sys.argv[1:]
        if "--out" in words:  # a path of this machine does not belong into the results
            at = words.index("--out")
            words = words[:at] + words[at + 2 :]
        result = {
            "experiment": self.name,
            "command": " ".join(["python", f"benchmarks/speed/{self.name}.py", *words]),
            "environment": self._environment(),
            "load": {"before": list(self._load), "after": list(os.getloadavg())},
            "busy": self._busy,
            "seconds": round(time.perf_counter() - self._started, 1),
            "settings": {"dtypes": self.dtypes, "rounds": self.rounds, "quick": self.quick}
            | self._settings,
            "figures": self.figures,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / f"{stem}.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self.say(f"stored in {path.name}")

    def _environment(self) -> dict[str, Any]:
        import peft
        import transformers

        import lora_domains

        cuda = self.device.startswith("cuda")
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "lora_domains": lora_domains.__version__,
            "git": _commit(),
            "device": torch.cuda.get_device_name(self.device) if cuda else _processor(),
            "cores": os.cpu_count(),
            "threads": self._threads,
        }


def _own_time(event: Any, cuda: bool) -> float:
    """Microseconds of an event of the profiler, without those inside it."""
    return float(event.self_device_time_total if cuda else event.self_cpu_time_total)


def busy(threads: int) -> str | None:
    """Why a measurement would take too long just now, in words; None on a quiet machine.

    ``threads`` of torch that multiply matrices run all the time where no other process takes their
    cores from them.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores + 0.5:  # threads of this process are in it too
        return f"the load is {load:.1f} on {cores} core(s)"
    matrix = torch.ones(1024, 1024)
    started, ran = time.perf_counter(), time.process_time()
    while time.perf_counter() - started < SECONDS:
        torch.mm(matrix, matrix)
    ran, seconds = time.process_time() - ran, time.perf_counter() - started
    share = ran / (seconds * threads)
    if share >= SHARE:
        return None
    if threads == 1:
        return f"a thread runs only {100 * share:.0f} % of the time"
    return (
        f"{threads} threads run only {100 * share:.0f} % of the time, and wait for each other: one "
        "(--threads 1) may be faster"
    )


def in_turn(names: Sequence[str], round_: int) -> list[str]:
    """``names`` in the order of a round, each of which begins with another of them."""
    first = round_ % len(names)
    return [*names[first:], *names[:first]]


def synchronize(device: str) -> None:
    """Wait for the kernels of ``device``."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(work: Work, device: str) -> float:
    """Seconds that ``work`` takes, until its kernels are finished."""

    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Ratios of each round, in which changes of the machine's speed between rounds cancel."""
    return [a / b for a, b in zip(over, under, strict=True)]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str | None:
    done = subprocess.run(
        ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None
