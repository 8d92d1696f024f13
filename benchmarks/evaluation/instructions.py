"""What a base does with the instruction suite: the share of prompts that it follows, by family.

    python benchmarks/evaluation/instructions.py --base PATH_OR_ID             # all prompts
    python benchmarks/evaluation/instructions.py --base … --limit 180          # a sample
    python benchmarks/evaluation/instructions.py --base … --adapter adapters/x # and an adapter
    python benchmarks/evaluation/instructions.py --table                       # what is stored

Stores one entry for each base and adapter in ``results/instructions.json``. ``--suite facts`` or
another name scores that suite in the same way.
"""

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

from lora_domains.console import Display
from lora_domains.distributed import use_cores
from lora_domains.evaluation.contenders import probe_part
from lora_domains.evaluation.scorer import Scorer
from lora_domains.model import DomainModel
from lora_domains.modeling.batching import row_limit
from lora_domains.probes.suite import load_suite
from lora_domains.stats.intervals import wilson
from lora_domains.tokenization.tokenization import Tokenization

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "instructions.json"


def measured(model: DomainModel, suite: str, limit: int | None) -> dict[str, Any]:
    """The shares of correct answers by contender and part of the suite, with 95 % bounds."""
    scorer = Scorer(model.bank, Display(quiet=True))
    tokenization = Tokenization(model.tokenizer, row_limit(model.base, None))
    contenders = [None, *model.domains]
    right: dict[str, dict[str, list[bool]]] = {name or "base": {} for name in contenders}
    begun = time.perf_counter()
    for probe, questions in load_suite(suite, limit).by_probe():
        part = probe_part(probe, [example for _, example in questions], model.base, tokenization)
        targets = [max(row.encoded.target, -1) for row in part.rows]
        for name, scores in scorer.scores(part, contenders).items():
            for (label, _), target, score in zip(questions, targets, scores, strict=True):
                hit = score["prediction"] == (1 if target < 0 else target)
                right[name or "base"].setdefault(label, []).append(hit)
        print(f"{probe.name}: {time.perf_counter() - begun:.0f} s", flush=True)
    shares = {}
    for name, parts in right.items():
        every = {**parts, "pooled": [hit for hits in parts.values() for hit in hits]}
        shares[name] = {label: _share(hits) for label, hits in every.items()}
    return {
        "suite": suite, "limit": limit, "device": str(model.base.device),
        "dtype": model.base.record()["dtype"], "date": str(date.today()),
        "seconds": round(time.perf_counter() - begun, 1), "shares": shares,
    }  # fmt: skip


def _share(hits: list[bool]) -> dict[str, float]:
    lower, upper = wilson(sum(hits), len(hits), 0.975)
    return {"share": round(sum(hits) / len(hits), 4), "n": len(hits), "lower": round(lower, 4),
            "upper": round(upper, 4)}  # fmt: skip


def table(stored: dict[str, Any]) -> str:
    """The stored shares in Markdown, a row for each part of a suite."""
    lines = []
    for name, entry in stored.items():
        lines += [f"{name} ({entry['device']}, {entry['dtype']}, {entry['seconds']:.0f} s):", ""]
        contenders = list(entry["shares"])
        lines += [
            "| part | n | " + " | ".join(contenders) + " |",
            "|---" * (2 + len(contenders)) + "|",
        ]
        for part, share in entry["shares"]["base"].items():
            cells = [entry["shares"][who][part] for who in contenders]
            shown = [f"{c['share']:.3f} ({c['lower']:.3f} to {c['upper']:.3f})" for c in cells]
            lines.append(f"| {part} | {share['n']} | " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--base", help="a folder or a Hub id; default: the embedded base")
    parser.add_argument("--adapter", action="append", default=[], help="an adapter to score too")
    parser.add_argument("--suite", default="instructions")
    parser.add_argument("--limit", type=int, help="a sample of so many prompts")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is stored, and stop")
    flags = parser.parse_args()
    stored = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    if not flags.table:
        use_cores(None)
        model = DomainModel.from_pretrained(flags.base, display=Display(quiet=True))
        for path in flags.adapter:
            model.load_adapter(path)
        name = " + ".join([model.base.id, *model.domains]) + f", {flags.suite}"
        stored[name] = measured(model, flags.suite, flags.limit)
        flags.out.write_text(json.dumps(stored, indent=1) + "\n")
    print(table(stored))


if __name__ == "__main__":
    main()
