"""The time to rebuild a report of many adapters from their items, without a model or torch.

    python benchmarks/speed/rebuild.py             # writes benchmarks/results/rebuild.json
    python benchmarks/speed/rebuild.py --quick     # two adapters of 3,000 items; stores nothing

It generates twenty adapter folders with cards and 10,000 items each: 8,000 test rows, and as many
training rows, general questions and texts as in an evaluation. It times the command including the
process start, `lora-domains report FOLDERS --out OUT`, in wall-clock and in processor seconds.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.report.card import Card

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Items of an evaluation other than test items.
BESIDE = {"train": 500, "general": 1300, "text": 200}
RUN = """
import sys
from lora_domains.cli.main import main
try:
    main(["report", *sys.argv[2:], "--out", sys.argv[1]])
finally:
    assert "torch" not in sys.modules
"""


def scores(random: np.random.Generator, target: int, right: float) -> dict[str, Any]:
    """Random scores on one item of a contender with accuracy ``right``."""
    prediction = target if random.random() < right else 1 - target
    sure = round(float(random.uniform(0.5, 1.0)), 6)
    share = sure if prediction == target else 1 - sure
    return {
        "prediction": prediction, "confidence": sure, "nll": round(float(-np.log(share)), 6),
        "brier": round(2 * (1 - share) ** 2, 6), "nats": round(float(-np.log(share)) + 0.1, 6),
        "tokens": 1, "positive": sure if prediction == 1 else round(1 - sure, 6),
    }  # fmt: skip


def items(count: int, seed: int) -> list[dict[str, Any]]:
    """``count`` items of one adapter: the test set and the others."""
    random = np.random.default_rng(seed)
    shares = {"base": 0.5, "adapter": 0.95, "majority": 0.6, "tfidf": 0.9, "4_shot": 0.55}
    made: list[dict[str, Any]] = []
    for where, number in {"test": count - sum(BESIDE.values()), **BESIDE}.items():
        for n in range(number):
            target = int(random.random() < 0.4)
            item: dict[str, Any] = {"set": where, "id": f"{where}:{n}", "target": target,
                                    "digest": f"{random.integers(2**63):064x}"}  # fmt: skip
            if where == "text":
                item |= {"suite": "made-up", "target": -1}
                item["scores"] = {
                    "base": {"nats": 30.0 + n % 3, "tokens": 30},
                    "adapter": {"nats": 30.2 + n % 3, "tokens": 30, "kl": 0.2},
                }
            elif where == "general":
                item["suite"] = f"made-up/{n % 8}"
                known = scores(random, target, 0.99)
                kept = known if random.random() < 0.99 else scores(random, target, 0.5)
                item["scores"] = {"base": known, "adapter": kept}
            else:
                wanted = shares if where == "test" else {"base": 0.5, "adapter": 0.96}
                item["scores"] = {name: scores(random, target, s) for name, s in wanted.items()}
            made.append(item)
    return made


def make(folder: Path, adapters: int, count: int) -> list[Path]:
    """Adapter folders with a card and items."""
    folders = []
    for n in range(adapters):
        there = folder / f"domain-{n + 1}"
        card = Card.read(Path(__file__).parent)  # without figures: they are computed from the items
        card.adapter = replace(card.adapter, domain=there.name, path=there.name)
        card.write(there)
        lines = "".join(json.dumps(item) + "\n" for item in items(count, n))
        (there / "items.jsonl").write_text(lines)
        folders.append(there)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapters", type=int, default=20)
    parser.add_argument("--items", type=int, default=10_000, help="of each adapter, over 2,000")
    parser.add_argument("--quick", action="store_true", help="to try the script; stores nothing")
    parser.add_argument("--out", type=Path, help="folder of the JSON; default: benchmarks/results")
    flags = parser.parse_args()
    if flags.quick:
        flags.adapters, flags.items = 2, 3000
    with tempfile.TemporaryDirectory() as scratch:
        folders = make(Path(scratch) / "adapters", flags.adapters, flags.items)
        out = Path(scratch) / "reports"
        load = os.getloadavg()[0]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", RUN, str(out), *map(str, folders)],
            capture_output=True, text=True, check=False, cwd=ROOT,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode not in (0, 1, 3) or not (out / "report.json").exists():
            sys.exit(done.stderr or done.stdout)
        sizes = {p.name: p.stat().st_size for p in sorted(out.iterdir())}
    found = {
        "adapters": flags.adapters,
        "items": flags.items,
        "items_beside_the_test_set": BESIDE,
        "seconds": round(seconds, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_memory_bytes": used.ru_maxrss * 1024,
        "bytes": sizes,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(json.dumps(found, indent=1))
    results = flags.out or (None if flags.quick else RESULTS)
    if results is not None:
        (results / "rebuild.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
