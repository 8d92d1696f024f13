"""A whole run, from the command to the verdict, beside the script that a user would write.

    python benchmarks/speed/whole_run.py --rows DIR --bases .bases     # many hours on a CPU
    python benchmarks/speed/whole_run.py --rows DIR --bases .bases --only banking77 --rounds 1
    python benchmarks/speed/whole_run.py --rows DIR --bases .bases --train 300 --test 300

The peer is ``user_script.py``: the same rows, epochs, batch size and rank, and the same test rows
scored by base and adapter. Ours is ``lora-domains fit`` with default settings but for these: in its
time it also keeps general knowledge and measures it, scores baselines, monitors each epoch and
judges. Contenders are processes that take turns, and each round begins with another of them; a
ratio over 1 says that ours is faster. The phases are those of our card; "before and after training"
is the rest: imports, reading, baselines, evaluation. Each run is a first one: the base writes its
general text anew.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import Experiment, in_turn, ratios
from user_script import BATCH, EPOCHS, RANK

from lora_domains.embedded.domains import domain_rows
from lora_domains.report.card import Card

ROOT = Path(__file__).parents[2]
SETS = {"sms_spam": ("smollm2", 800), "banking77": ("minilm", None)}
"""The base and the number of training rows, by the name of the rows."""
GOALS = {"longest": 1.5, "maximum": 3.0}
"""Of the ratio, by how the peer pads its rows."""


def flags_of(add: Callable[..., Any]) -> None:
    add("--rows", type=Path, help="folder with NAME/{train,test}.jsonl; not needed if quick")
    add("--bases", type=Path, help="folder with smollm2 and minilm; not needed if quick")
    add("--only", choices=[*SETS], nargs="*", default=[*SETS])
    add("--train", type=int, help="training rows of a set, at most; the figures name their number")
    add("--test", type=int, help="test rows of a set, at most; the figures name their number")
    add("--padding", choices=[*GOALS], nargs="*", default=[*GOALS], help="of the script's rows")


def finished(experiment: Experiment, command: list[str], folder: Path) -> tuple[float, str]:
    """Seconds of a process, and what it printed; raises where it failed."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "OMP_NUM_THREADS": str(experiment.flags.threads), "PYTHONPATH": os.pathsep.join(paths),
        "LORA_DOMAINS_PROJECT": str(folder), "LORA_DOMAINS_CACHE": str(folder / "cache"),
    }  # fmt: skip
    if experiment.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | own,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    if done.returncode not in (0, 1, 3) or "Traceback" in done.stderr:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return seconds, done.stdout


def ours(files: dict[str, Path], base: Path) -> list[str]:
    """The arguments of our command. All classes are declared, as the peer knows those of the test
    rows."""
    lines = [line for file in files.values() for line in file.read_text("utf-8").splitlines()]
    labels = sorted({json.loads(line)["label"] for line in lines})
    return ["-m", "lora_domains.cli.main", "fit", "--name", "whole",
            "--train", str(files["train"]), "--test", str(files["test"]), "--base", str(base),
            "--drop-leaks", "--epochs", str(EPOCHS), "--rank", str(RANK),
            "--set", f"training.batch_size={BATCH}", "--set", f"training.patience={EPOCHS}",
            "--set", f"task.labels={json.dumps(labels)}"]  # fmt: skip


def phases(folder: Path, seconds: float) -> dict[str, float]:
    """Seconds of each phase of our run, by its card."""
    training = Card.read(folder / "adapters" / "whole").adapter.training
    spent = {name.replace("_", " "): value for name, value in training["phases"].items()}
    spent["other training"] = training["seconds"] - sum(spent.values())
    return spent | {"before and after training": seconds - training["seconds"]}


def compare(experiment: Experiment, name: str, files: dict[str, Path], base: Path) -> None:
    """Add the figures of one set of rows."""
    flags = experiment.flags
    rows = " and ".join(f"{count(path):,} {split} rows" for split, path in files.items())
    label = f"{name}, {rows}" if flags.train or flags.test else name
    head = ["--head"] if SETS[name][0] == "minilm" and not experiment.quick else []
    script = [str(ROOT / "benchmarks" / "speed" / "user_script.py"), *map(str, files.values()),
              str(base), *head]  # fmt: skip
    contenders = {"ours": [*ours(files, base), *head]}
    contenders |= {padding: [*script, "--padding", padding] for padding in flags.padding}
    runs: dict[str, list[float]] = {who: [] for who in contenders}
    parts: dict[str, list[float]] = {}
    for round_ in range(experiment.rounds):
        for who in in_turn([*contenders], round_):
            with TemporaryDirectory() as folder:
                seconds, printed = finished(experiment, contenders[who], Path(folder))
                runs[who].append(seconds)
                if who == "ours":
                    for phase, spent in phases(Path(folder), seconds).items():
                        parts.setdefault(phase, []).append(spent)
            last = "" if who == "ours" else printed.splitlines()[-1]
            experiment.say(f"{label}, round {round_ + 1}, {who}: {seconds:.1f} s {last}")
    for padding in flags.padding:
        over = ratios(runs[padding], runs["ours"])
        experiment.figure(f"{label}: time of a script padding to the {padding}, over ours", "×",
                          over, at_least=GOALS[padding])  # fmt: skip
    experiment.figure(f"{label}: a whole run", "s", runs["ours"], runs.get("longest"))
    for phase, in_rounds in parts.items():
        experiment.figure(f"{label}: our {phase}", "s", in_rounds)


def drawn(source: Path, most: int | None, folder: Path) -> Path:
    """A file of ``most`` lines of ``source``, or of all."""
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    path = folder / source.name
    path.write_text("".join(random.Random(0).sample(lines, min(most or len(lines), len(lines)))),
                    encoding="utf-8")  # fmt: skip
    return path


def count(rows: Path) -> int:
    return len(rows.read_text(encoding="utf-8").splitlines())


def write_embedded(folder: Path) -> None:
    """A few rows to try this script on."""
    folder.mkdir()
    for split, count in {"train": 100, "test": 60}.items():
        lines = [json.dumps(dict(row)) + "\n" for row in domain_rows("spam", split)[:count]]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    experiment = Experiment("whole_run", __doc__, dtypes=(), add=flags_of)
    flags = experiment.flags
    experiment.rounds = flags.rounds or (1 if experiment.quick else 5)
    rows: dict[str, dict[str, Any]] = {}
    for name in ["sms_spam"] if experiment.quick else flags.only:
        base, most = SETS[name]
        with TemporaryDirectory() as folder:
            if experiment.quick:
                source = Path(folder) / "source"
                place, base, most = ROOT / "lora_domains" / "embedded", "base", 100
                write_embedded(source)
            else:
                source, place = flags.rows / name, flags.bases
            files = {"train": drawn(source / "train.jsonl", flags.train or most, Path(folder)),
                     "test": drawn(source / "test.jsonl", flags.test, Path(folder))}  # fmt: skip
            rows[name] = {"base": base, **{split: count(path) for split, path in files.items()}}
            compare(experiment, name, files, (place / base).resolve())
    experiment.save({"epochs": EPOCHS, "batch": BATCH, "rank": RANK, "rows": rows,
                     "threads": flags.threads})  # fmt: skip


if __name__ == "__main__":
    main()
