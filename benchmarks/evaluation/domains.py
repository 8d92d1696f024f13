"""What each domain gains and keeps: every recipe on its embedded rows, and on real rows if given.

    python benchmarks/evaluation/domains.py                      # the five recipes
    python benchmarks/evaluation/domains.py --card adapters/medical   # the run of `make medical`
    python benchmarks/evaluation/domains.py --rows DIR           # and real rows

Each run is the command that a user would type, in its own process and with a ledger of its own: no
adapter is chosen by these figures. They are stored in benchmarks/results/domains.json; --table
prints those of the recipes as Markdown.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_domains.report.card import Card
from lora_domains.report.text import metric_name

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "domains.json"
LAUNCH = ["accelerate", "launch", "--num_processes", "1", "--num_machines", "1",
          "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
RECIPES = ("medical", "legal", "finance", "support", "spam")


FIT = ["lora-domains", "fit"]
# Few epochs, and a sample of large datasets: minutes on two cores.
REAL = {
    "sms_spam": [*FIT, "--name", "spam", "--positive", "spam", "--epochs", "4"],
    "twitter_financial_news": [
        *LAUNCH, "recipes/finance.py", "--drop-leaks", "--epochs", "3", "--limit", "2400",
    ],
    "banking77": [
        *LAUNCH, "recipes/support.py", "--drop-leaks", "--epochs", "4", "--limit", "4000",
    ],
    "pubmedqa": [*FIT, "--name", "pubmedqa", "--text", "context,question", "--epochs", "2"],
}  # fmt: skip


def run(name: str, command: list[str]) -> dict[str, Any]:
    """The figures of one run from its card."""
    program = str(Path(sys.executable).parent / command[0])
    with tempfile.TemporaryDirectory() as out:
        try:
            folder, seconds = finished([program, *command[1:]], Path(out))
        except RuntimeError as error:
            sys.exit(f"{name}: {error}")
        return figures(folder, command, round(seconds, 1))


def finished(command: list[str], out: Path) -> tuple[Path, float]:
    """Run ``command`` with ``out`` as the folder of its adapter and of its ledger; the adapter's
    folder and the seconds it took. Raises RuntimeError where no adapter was evaluated."""
    started = time.perf_counter()
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, text=True, capture_output=True,
        check=False, env=os.environ | {"LORA_DOMAINS_PROJECT": str(out)},
    )  # fmt: skip
    seconds = time.perf_counter() - started
    folders = [path.parent for path in out.glob("*/card.json")]
    if not folders or not Card.read(folders[0]).adapter.verdict:
        raise RuntimeError(done.stderr.strip() or done.stdout.strip())
    return folders[0], seconds


def figures(folder: Path, command: list[str], seconds: float | None) -> dict[str, Any]:
    """The figures of a finished run, from its adapter's folder."""
    card = Card.read(folder)
    size = sum(p.stat().st_size for p in folder.glob("adapter_*"))
    entry = card.adapter
    pooled = entry.general["pooled"]
    return {
        "command": " ".join(command),
        "verdict": entry.verdict,
        "gates": {gate["name"]: gate["verdict"] for gate in entry.gates},
        "metric": entry.judged["metric"],
        "scores": {
            metric: {k: fields[k] for k in ("base", "adapter", "baselines", "lower", "upper", "n")}
            for metric, fields in entry.domain_scores.items()
        },
        "general": {k: pooled[k] for k in ("base", "adapter", "lower", "upper", "n")},
        "kl": entry.general["kl"]["general"],
        "ledger": entry.ledger,
        "memorisation": entry.memorisation or None,
        "leaks": {k: entry.leaks[k] for k in ("exact", "near")},
        "training": {k: v for k, v in entry.training.items() if k != "history"},
        "adapter_bytes": size,
        "seconds": seconds,
        "environment": card.environment,
    }


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| domain | rows: read, tested | metric | base | TF-IDF | adapter | general knowledge "
        "| training | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, run in results.items():
        score = run["scores"][run["metric"]]
        tfidf = score["baselines"].get("tfidf")
        general = run["general"]
        test = run["scores"]["accuracy"]["n"]
        lines.append(
            f"| {name} | {run['ledger']['read']:,}, {test:,} "
            f"| {metric_name(run['metric'])} | {score['base']:.3f} | {tfidf:.3f} "
            f"| **{score['adapter']:.3f}** | {general['base']:.3f} → {general['adapter']:.3f} "
            f"| {run['training']['seconds']:.0f} s | {run['verdict']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, help="folder of real rows")
    parser.add_argument("--only", nargs="*", help="names to run; others keep their results")
    parser.add_argument("--card", type=Path, help="adapter folder of a recipe already run")
    parser.add_argument(
        "--table", action="store_true", help="print those of the recipes as a table"
    )
    flags = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if flags.table:
        print(table({name: results[name] for name in RECIPES}))
        return
    commands = {name: [*LAUNCH, f"recipes/{name}.py"] for name in RECIPES}
    if flags.card:
        results[flags.card.name] = figures(flags.card, commands[flags.card.name], None)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        return
    if flags.rows:
        for name, command in REAL.items():
            files = [flags.rows / name / f"{part}.jsonl" for part in ("train", "test")]
            paths = [f"--{file.stem}={file}" for file in files]
            commands[name] = command + paths
    print(f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}")
    for name, command in commands.items():
        if flags.only and name not in flags.only:
            continue
        found = run(name, command)
        # Leave the location of the rows on this machine out of the published results.
        found["command"] = found["command"].replace(str(flags.rows), "ROWS")
        # Read again: another run may have stored its own meanwhile.
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = found
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(table({name: found}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
