"""Does the estimate of a dry run say how long the run takes?

    python benchmarks/training/duration.py --bases DIR --rows DIR [--cpu] [NAME …]

Three runs are estimated, then trained and evaluated on the machine in its present state: the
embedded base on demo rows, SmolLM2-135M-Instruct on 300 rows of sms_spam, and all-MiniLM-L6-v2 with
a head on 4,000 rows of banking77. DIR holds their folders (``make bases``) and those of the rows.
The ratio of estimated to measured seconds is stored for each phase. With ``--cpu`` both are CPU
seconds of the process, which other programs disturb less; use one thread then (OMP_NUM_THREADS=1).
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from lora_domains import Classification, Data, Domain, DomainModel, Training, load_domain
from lora_domains.console import EVALUATION, Clock, Display, clock
from lora_domains.evaluation.verdict_run import evaluation_seconds
from lora_domains.probes.suite import embedded
from lora_domains.training.estimate import estimate
from lora_domains.training.fit import make_run, training_dataset
from lora_domains.training.plan import make_plan

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "duration.json"
EPOCHS = 2
"""Without early stopping, which no estimate foresees."""


def declared(name: str, rows: Path) -> Domain:
    """The domain that is trained on the base ``name``."""
    training = Training(epochs=EPOCHS, patience=EPOCHS)
    if name == "embedded":
        return replace(load_domain(ROOT / "recipes" / "medical.py"), training=training)
    if name == "smollm2":
        task, folder, limit = Classification(positive="spam"), rows / "sms_spam", 300
    else:
        task, folder, limit = Classification(head=True), rows / "banking77", 4000
    data = Data(
        str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), limit=limit, drop_leaks=True
    )
    return Domain(name, task, data, training=training)


def timed_by(seconds: Callable[[], float]) -> AbstractContextManager[object]:
    """Inside, the phases of runs are timed by ``seconds``."""
    return patch.object(clock, "time", SimpleNamespace(monotonic=seconds))


def compared(name: str, bases: Path, rows: Path, out: Path) -> dict[str, Any]:
    """Estimated and measured seconds of each phase, and their ratios."""
    path = None if name == "embedded" else bases / name
    domain, display = declared(name, rows), Display()
    model = DomainModel.from_pretrained(path, out=out, display=display, device="cpu")
    dataset = training_dataset(domain, model.base, out, display)
    evaluation = partial(
        evaluation_seconds, model.bank, dataset, embedded(),
        base_changed=model._base_changed, test=True,
    )  # fmt: skip
    spent: dict[str, float] = {}
    with Clock(spent).phase("dry run"):
        plan = make_plan(model.base, dataset)
        estimated = estimate(make_run(model.bank, dataset, plan, out, display), evaluation).phases
    card = model.fit(domain)
    assert card is not None
    with Clock(spent).phase(EVALUATION):
        model.evaluate(domain)
    measured = card.adapter.training["phases"] | {EVALUATION: spent[EVALUATION]}
    return {
        "base": name,
        "rows": {split: len(getattr(dataset, split)) for split in ("train", "validation", "test")},
        "dry_run_seconds": round(spent["dry run"], 1),
        "estimated": {k: round(v, 1) for k, v in estimated.items()},
        "measured": {k: round(v, 1) for k, v in measured.items()},
        "ratio": round(sum(estimated.values()) / sum(measured.values()), 2),
        "ratios": {k: round(estimated[k] / v, 2) for k, v in measured.items() if v >= 1},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=["embedded", "smollm2", "minilm"])
    parser.add_argument("--bases", type=Path, default=ROOT / ".bases")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--cpu", action="store_true")
    flags = parser.parse_args()
    runs = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else {}
    for name in flags.names:
        seconds = time.process_time if flags.cpu else time.monotonic
        with tempfile.TemporaryDirectory() as out, timed_by(seconds):
            runs[name] = compared(name, flags.bases, flags.rows, Path(out))
        runs[name] |= {"clock": "cpu" if flags.cpu else "wall", "threads": torch.get_num_threads()}
        print(json.dumps(runs[name], indent=1), flush=True)
        RESULTS.write_text(json.dumps({"epochs": EPOCHS, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
