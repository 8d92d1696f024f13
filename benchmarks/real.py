"""Real bases on public rows: what a user gets from the commands of README, with default settings.

    python benchmarks/real.py --rows DIR --bases .bases              # DIR/NAME/{train,test}.jsonl
    python benchmarks/real.py --rows DIR --bases .bases --only banking77 --workers 2
    python benchmarks/real.py --table                                # the results as Markdown

Each run is the command that a user would type, in its own process and with a ledger of its own; the
epoch and the threshold are chosen on validation rows, and the test rows are scored once, at the
end. ``results/real.json`` keeps the figures of each card, one entry for each run and device.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evaluation.domains import finished
from lora_domains.report.card import Card
from lora_domains.report.text import metric_name
from lora_domains.verdict import best_baseline, contender_label
from lora_domains.verdict.metrics import metric_named

RESULTS = Path(__file__).parent / "results" / "real.json"


@dataclass(frozen=True)
class Run:
    """One row of the table. ``train`` and ``test`` rows are drawn where a file has more."""

    rows: str
    base: str
    flags: str
    published: str = ""
    """The accuracy that others report, where there is one."""
    train: int | None = None
    test: int | None = None
    declare: bool = False
    """Whether test rows have classes that no training row has: all are declared."""


RUNS = {
    "banking77": Run("banking77", "minilm", "--head --drop-leaks", "BERT .937"),
    "twitter": Run(
        "twitter_financial_news", "minilm", "--head --drop-leaks", "DistilBERT .859"
    ),
    "sms_spam": Run("sms_spam", "minilm", "--head --positive spam", "SVM .985"),
    "ledgar": Run("lexglue_ledgar", "minilm", "--head --drop-leaks", declare=True),
    "bitext": Run("bitext_support", "minilm", "--head --drop-leaks"),
    "pubmedqa": Run("pubmedqa", "minilm", "--head --text context,question"),
    "sms_spam, 800 rows": Run("sms_spam", "smollm2", "--positive spam", train=800),
    "medquad, chat": Run(
        "medquad", "smollm2", "--task generation --text question --label answer --drop-leaks",
        train=1000, test=300,
    ),
    "pubmedqa, chat": Run("pubmedqa", "smollm2", "--text context,question"),
}  # fmt: skip
SEED = 0
"""Of the rows that are drawn where a run uses fewer than a file has."""


def drawn(source: Path, most: int | None, folder: Path) -> Path:
    """``source``, or a file of ``most`` of its lines."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    if most is None or len(lines) <= most:
        return source
    path = folder / source.name
    path.write_text("".join(random.Random(SEED).sample(lines, most)), encoding="utf-8")
    return path


def labels(files: Iterable[Path]) -> list[str]:
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted({json.loads(line)["label"] for line in lines})


def train(name: str, rows: Path, bases: Path, more: list[str]) -> dict[str, Any]:
    """Run the command of one row of the table and return the figures of its card."""
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = ["fit", "--name", run.rows, *run.flags.split(), *more]
        files = {part: drawn(rows / run.rows / f"{part}.jsonl", most, folder)
                 for part, most in (("train", run.train), ("test", run.test))}  # fmt: skip
        command = [sys.executable, "-m", "lora_domains.cli.main", *flags]
        if run.declare:
            command += ["--set", f"task.labels={json.dumps(labels(files.values()))}"]
        command += [f"--{part}={path}" for part, path in files.items()]
        command += ["--base", str((bases / run.base).resolve())]
        adapter, seconds = finished(command, folder / "out")
        return figures(run, more, Card.read(adapter), seconds)


def figures(run: Run, more: list[str], card: Card, seconds: float) -> dict[str, Any]:
    """The figures of a card."""
    entry, flags = card.adapter, ["fit", "--name", run.rows, *run.flags.split(), *more]
    return {
        "command": " ".join(["lora-domains", *flags, "--base", run.base]), "base": run.base,
        "published": run.published, "verdict": entry.verdict,
        "gates": {gate["name"]: gate["verdict"] for gate in entry.gates},
        "metric": entry.judged["metric"], "scores": entry.domain_scores,
        "general": entry.general, "rows": entry.ledger,
        "training": {k: v for k, v in entry.training.items() if k != "history"},
        "seconds": round(seconds, 1), "environment": card.environment,
    }  # fmt: skip


def device() -> str:
    """The processor that runs take: an accelerator's name, or ``cpu``."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def keep(out: Path, key: str, found: dict[str, Any]) -> None:
    """Store a run beside those that ``out`` has by now: others may write there too."""
    stored = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    stored.pop(key, None)
    out.write_text(json.dumps(stored | {key: found}, indent=1) + "\n", encoding="utf-8")
    print(table({key: found}).splitlines()[-1], flush=True)


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table, of each run the latest on any device."""
    head = ("rows", "model", "read, tested", "metric", "base", "best baseline", "adapter",
            "accuracy; published", "general knowledge", "minutes", "verdict")  # fmt: skip
    lines = [head, ["---"] * len(head)]
    latest = {key.partition(" on ")[0]: key for key in results}
    for task in sorted(latest, key=lambda name: [*RUNS, name].index(name)):
        run, (_, _, where) = results[latest[task]], latest[task].partition(" on ")
        score = run["scores"][run["metric"]]
        best = best_baseline(metric_named(run["metric"]), score["baselines"])
        general, accuracy = run["general"].get("pooled"), run["scores"].get("accuracy")
        reached = f"{accuracy['adapter']:.3f}" if accuracy else ""
        # "NVIDIA H100 80GB HBM3" is an H100.
        processor = next((w for w in where.split() if w[:1].isalpha() and w[-1].isdigit()), where)
        lines.append([
            task, run["base"], f"{run['rows']['read']:,}, {score['n']:,}",
            metric_name(run["metric"]), f"{score['base']:.3f}",
            f"{contender_label(best[0])} {best[1]:.3f}" if best else "",
            f"**{score['adapter']:.3f}**",
            "; ".join(filter(None, (reached, run["published"]))),
            f"{general['base']:.3f} → {general['adapter']:.3f}" if general else "",
            f"{run['seconds'] / 60:.1f}, {processor or 'CPU'}", run["verdict"],
        ])  # fmt: skip
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=Path, help="folder of the rows")
    add("--bases", type=Path, help="folder of the bases, as `make bases` fills it")
    add("--only", nargs="*", choices=RUNS, default=list(RUNS), help="names of runs")
    add("--workers", type=int, default=1, help="runs at a time, each with one thread")
    add("--adapter", type=Path, help="one that the command of --only trained, evaluated by itself")
    add("--seconds", type=float, help="what --adapter took to train and evaluate")
    add("--out", type=Path, default=RESULTS, help="the file of the results")
    add("--table", action="store_true", help="print the stored results as a table")
    flags, more = parser.parse_known_args()
    if flags.table:
        print(table(json.loads(flags.out.read_text(encoding="utf-8"))))
        return
    where = device()
    if flags.adapter is not None:
        if flags.seconds is None or len(flags.only) != 1:
            parser.error("--adapter needs --seconds and one run in --only")
        (name,), card = flags.only, Card.read(flags.adapter)
        keep(flags.out, name, figures(RUNS[name], more, card, flags.seconds))
        return
    if flags.rows is None or flags.bases is None:
        parser.error("--rows and --bases are required")
    with ThreadPoolExecutor(flags.workers) as pool:
        names = {
            pool.submit(train, name, flags.rows, flags.bases, more): name for name in flags.only
        }
        for future in as_completed(names):
            name = names[future]
            try:
                found = future.result()
            except RuntimeError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            keep(flags.out, name if where == "cpu" else f"{name} on {where}", found)


if __name__ == "__main__":
    main()
