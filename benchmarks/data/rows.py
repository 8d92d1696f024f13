"""The time and memory that rows take before training, from 1,000 to 1,000,000 of them.

    python benchmarks/data/rows.py             # writes benchmarks/results/rows.json; half an hour
    python benchmarks/data/rows.py --quick     # 500 and 1,000 rows; stores nothing
    python benchmarks/data/rows.py --table     # the table of docs/rows.md

It generates rows like mails to a support desk: words as often as in ordinary text, openings that
many rows share, 20 classes of different sizes, customers with several mails, and 2 % of the rows
each repeat an earlier row or change one word of it. Each size is read as CSV, as JSON lines and as
Parquet, all of it and with a limit, and prepared as `fit` and `evaluate` do: read, checked, split
by customer, searched for leaks, tokenised for the embedded base, and searched for probes and
general text. Every reading and every preparation has a process of its own.

Seconds are those of the processor. Memory is the most that was resident in a phase, what earlier
phases left included. `growth` is the exponent of the seconds from one size to the next that is ten
times as large: 1 is linear.
"""

import argparse
import csv
import gc
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SIZES, QUICK = (1_000, 10_000, 100_000, 1_000_000), (500, 1_000)
LIMIT = 100
"""The limit of the readings that stop early."""
FORMS = ("csv", "jsonl", "parquet")
CLASSES = 20
OPENINGS = [
    "Dear support team, I am writing to you because", "Hello, I hope this finds you well.",
    "Good morning! My question is about", "To whom it may concern: since last week",
    "Hi there, quick question regarding my account:", "Following up on my last message,",
]  # fmt: skip
REPEATED, CHANGED = 0.02, 0.02
"""Shares of rows that repeat an earlier row, or all of one but a word."""


def generated(count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """``count`` rows with the columns id, customer, text and label."""
    from lora_domains.probes.general_text import embedded_texts

    draw = random.Random(seed)
    known = sorted({word for text in embedded_texts("train") for word in text.split()})
    draw.shuffle(known)
    words = known + [f"item{n}" for n in range(20_000 - len(known))]
    # Words are as frequent as in ordinary text (Zipf), classes less unequally.
    often = list(itertools.accumulate(1 / (n + 3) for n in range(len(words))))
    sizes = list(itertools.accumulate(1 / (n + 5) for n in range(CLASSES)))
    earlier: list[tuple[list[str], int]] = []
    for number in range(count):
        kind, label = draw.random(), draw.choices(range(CLASSES), cum_weights=sizes)[0]
        if kind < REPEATED + CHANGED and earlier:
            text, label = draw.choice(earlier)
            if kind < CHANGED:
                text = list(text)
                text[draw.randrange(len(text))] = f"item{draw.randrange(20_000)}"
        else:
            length = min(200, max(6, int(draw.lognormvariate(3.4, 0.6))))
            text = draw.choices(words, cum_weights=often, k=length)
            text[draw.randrange(length)] = words[label * 40 + draw.randrange(40)]
            text[draw.randrange(length)] += f", order {draw.randrange(10**6)}."
            if draw.random() < 0.4:
                text = [draw.choice(OPENINGS), *text]
        if number % 50 == 0:
            earlier.append((text, label))
        yield {
            "id": f"mail-{number}",
            "customer": f"customer-{draw.randrange(max(1, count // 4))}",
            "text": " ".join(text),
            "label": f"topic {label}",
        }


def write(folder: Path, count: int) -> None:
    """The rows as ``rows.csv``, ``rows.jsonl`` and ``rows.parquet``."""
    import pyarrow
    import pyarrow.parquet

    rows = list(generated(count))
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


# ── In a process of its own ─────────────────────────────────────────────────────────────────────


class Phases:
    """Processor seconds and peak memory of each phase of this process."""

    def __init__(self) -> None:
        self.figures: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], T]) -> T:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
        started = time.process_time()
        result = work()
        seconds = time.process_time() - started
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)
        self.figures[name] = {"seconds": round(seconds, 3), "peak_mb": round(peak / 1024)}
        return result


def read_file(path: Path, phases: Phases) -> dict[str, Any]:
    """Read ``path``, first as far as a limit needs."""
    from lora_domains.data.readers import read_noted
    from lora_domains.data.source import DETECTED, Data

    form = path.suffix[1:]
    read_noted(path.with_name("warm.csv"), "train")
    part = phases.run(
        f"read {form}, limit {LIMIT}",
        lambda: read_noted(path, "train", Data(path, limit=LIMIT).reading),
    )
    assert part.more or len(part.rows) <= 1000
    phases.run(f"read {form}", lambda: read_noted(path, "train", DETECTED))
    return {}


def prepare_file(path: Path, phases: Phases) -> dict[str, Any]:
    """Prepare the rows of ``path`` as `fit` does; what came out of it."""
    from lora_domains.console import Display
    from lora_domains.data.identity import normalised_once
    from lora_domains.data.prepare import Preparation
    from lora_domains.data.source import Data
    from lora_domains.dataset import load_dataset
    from lora_domains.domain import Domain
    from lora_domains.evaluation.leak_search import every_leak
    from lora_domains.modeling.base import load_base
    from lora_domains.probes.suite import load_suite
    from lora_domains.tasks import Classification

    base, suite = load_base(device="cpu"), load_suite("embedded")
    domain = Domain("support", Classification(), Data(path, group="customer"))
    with normalised_once():
        preparation = Preparation(domain.task, domain.data, domain.training.seed)
        phases.run("read", preparation.read)
        phases.run("check", preparation.check)
        phases.run("split", preparation.split)
        phases.run("leaks", preparation.remove_leaks)
        prepared = preparation.finished()
    del preparation
    dataset = phases.run(
        "tokens", lambda: load_dataset(domain, base, Display(quiet=True), prepared)
    )
    phases.run("probes", lambda: every_leak(dataset, suite, base, with_questions=True))
    counts = prepared.row_counts
    return {
        "train": len(dataset.train), "validation": len(dataset.validation),
        "test": len(dataset.test), "repeated": counts.duplicates, "near": prepared.leaks.near,
        "tokens": sum(len(row.encoded) for row in dataset.train),
    }  # fmt: skip


def measured(what: str, path: Path) -> dict[str, Any]:
    """The figures of ``read_file`` or ``prepare_file`` from a new process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", what, str(path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# ── The curve ───────────────────────────────────────────────────────────────────────────────────


def curve(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """The figures of each size."""
    points = []
    for count in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write(folder, count)
            (folder / "warm.csv").write_text("text\none\n")
            point: dict[str, Any] = {"rows": count, "file_mb": {}, "phases": {}}
            for form in FORMS:
                path = folder / f"rows.{form}"
                point["file_mb"][form] = round(path.stat().st_size / 1e6, 1)
                point["phases"] |= measured("read_file", path)["phases"]
            found = measured("prepare_file", folder / "rows.csv")
        point["phases"] |= found["phases"]
        point["found"] = found["found"]
        points.append(point)
        print(json.dumps(point), flush=True)
    return points


def growth(points: list[dict[str, Any]]) -> dict[str, list[float]]:
    """phase → exponent of its seconds from each size to the next."""
    return {
        phase: [
            round(
                math.log(b["phases"][phase]["seconds"] / max(1e-3, a["phases"][phase]["seconds"]))
                / math.log(b["rows"] / a["rows"]), 2
            )
            for a, b in itertools.pairwise(points)
        ]
        for phase in points[0]["phases"]
    }  # fmt: skip


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def commit() -> str:
    """The commit of this checkout, marked where files differ from it."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip()


def table(result: dict[str, Any]) -> str:
    """The table of docs/rows.md."""
    reads = [f"read {form}" for form in FORMS]
    steps = [*reads, "check", "split", "leaks", "tokens", "probes"]
    lines = [
        "| rows | " + " | ".join(steps) + f" | read csv, limit {LIMIT} | peak memory |",
        "|" + "---|" * (len(steps) + 3),
    ]
    for point in result["sizes"]:
        phases = point["phases"]
        cells = [f"{phases[step]['seconds']:.2g} s" if phases[step]["seconds"] < 10
                 else f"{phases[step]['seconds']:.0f} s"
                 for step in [*steps, f"read csv, limit {LIMIT}"]]  # fmt: skip
        peak = max(figures["peak_mb"] for figures in phases.values()) / 1000
        lines.append(f"| {point['rows']:,} | " + " | ".join(cells) + f" | {peak:.2g} GB |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="to try the script; stores nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what is stored")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: benchmarks/results")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.measure:
        phases = Phases()
        found = globals()[flags.measure[0]](Path(flags.measure[1]), phases)
        print(json.dumps({"phases": phases.figures, "found": found}))
        return
    results = flags.out or (None if flags.quick else RESULTS)
    if flags.table:
        print(table(json.loads(((results or RESULTS) / "rows.json").read_text(encoding="utf-8"))))
        return
    points = curve(QUICK if flags.quick else SIZES)
    import pyarrow
    import tokenizers

    result = {
        "command": "python benchmarks/data/rows.py" + (" --quick" if flags.quick else ""),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": {
            "python": platform.python_version(), "pyarrow": pyarrow.__version__,
            "tokenizers": tokenizers.__version__, "device": processor(),
            "git": commit(), "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1),
        },
        "limit": LIMIT,
        "sizes": points,
        "growth": growth(points),
    }  # fmt: skip
    print(table(result))
    if results is not None:
        text = json.dumps(result, indent=1, ensure_ascii=False)
        (results / "rows.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
