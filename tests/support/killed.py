"""Processes that train and are killed, and others that resume from their checkpoints.

Run as a script: killed.py BASE ROWS OUT SEED. It prints the runs as JSON, each with the
fingerprint of its adapter. All are forked from one process, so that the libraries load once.
"""

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.general_text import use_few_texts

from lora_domains import atomic
from lora_domains.adapters.folder import fingerprint
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.joint.checkpoint import JointCheckpoint
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.tasks import Classification
from lora_domains.training import checkpoints as checkpoint
from lora_domains.training import fit as fit_steps
from lora_domains.training.loop import Run

EPOCHS, STEPS = 3, 4


def declared(rows: list[dict[str, Any]], dropout: float, retention: str) -> Domain:
    """41 rows in batches of 11: four steps an epoch, the last of them short."""
    domain = Domain("spam", Classification(), Data(rows[:41], rows[41:53], rows[53:60]))
    return with_settings(
        domain,
        lr=0.02,
        batch_size=11,
        rank=4,
        epochs=EPOCHS,
        patience=99,
        retention=retention,
        dropout=dropout,
    )


def forked(action: Callable[[], object]) -> int:
    """The exit code of ``action`` in a forked process; -9 when it was killed."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def doomed(step: int, moment: str) -> None:
    """Kill this process at ``moment`` of the ``step``-th step or of the checkpoint after it."""
    finish_step, save, replace = Run.finish_step, torch.save, os.replace
    done = 0

    def counting(self: Run, rows: Any, nats: float) -> None:
        nonlocal done
        finish_step(self, rows, nats)
        done = self.state.total_steps
        if done == step and moment == "after the step":
            die()

    def half(content: Any, file: Any) -> None:
        if done >= step and moment == "half written":
            import io

            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        save(content, file)

    def replacing(one: Any, other: Any) -> None:
        if done >= step and moment == "before it takes its place":
            die()
        replace(one, other)
        if done >= step and moment == "after it took its place":
            die()

    def dying(*_: Any, **__: Any) -> None:
        die()

    if moment == "before it is saved":
        fit_steps.save_adapter = dying
    if moment == "before it takes its folder's place":
        atomic._take_place = dying
    if moment == "after it was saved":
        Run.forget = JointCheckpoint.clear = dying  # type: ignore[method-assign]
    Run.finish_step = counting  # type: ignore[method-assign]
    checkpoint.torch.save = half  # type: ignore[assignment]
    atomic.os.replace = replacing  # type: ignore[assignment]


MOMENTS = ("after the step", "half written", "before it takes its place", "after it took its place")
ENDS = ("before it is saved", "before it takes its folder's place", "after it was saved")
"""Moments after the last step, when the adapter is written and the checkpoint goes."""
ARMS = {"plain": (0.0, "none"), "replay": (0.3, "replay"), "second stage": (0.3, "kl")}


def main() -> None:
    base_path, rows_path, out, seed = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
    rows = [json.loads(line) for line in Path(rows_path).read_text().splitlines()]
    base = load_base(base_path, device="cpu")
    use_few_texts(pytest.MonkeyPatch())
    checkpoint.SAVE_SECONDS = -1.0  # a checkpoint after every step
    rng = random.Random(int(seed))

    def fit(folder: Path, arm: str, resume: bool, doom: tuple[int, str] | None = None) -> int:
        def work() -> None:
            if doom is not None:
                doomed(*doom)
            made = DomainModel(base, out=folder, display=Display(quiet=True))
            parent = "spam" if arm == "second stage" else None
            made.fit(declared(rows, *ARMS[arm]), resume=resume, init_from=parent)

        if doom is None and not resume:
            work()  # what is imported and measured for the first time is there in every fork
            return 0
        return forked(work)

    def begin(arm: str, name: str) -> Path:
        """A folder to train in: that of a second stage holds its parent, of the same name."""
        folder = out / f"{arm}-{name}"
        if arm == "second stage":
            shutil.copytree(out / "plain-whole", folder)
        return folder

    moments = rng.sample(MOMENTS * 3, 12)
    ends = rng.sample(ENDS, 3)
    runs = []
    for arm in ARMS:
        whole = begin(arm, "whole")
        assert fit(whole, arm, resume=False) == 0
        # One kill in each epoch and one in any, each followed by a second one.
        steps = [rng.randint(1, STEPS), STEPS + rng.randint(1, STEPS),
                 2 * STEPS + rng.randint(1, STEPS - 2)]  # fmt: skip
        kills = [((step, moments.pop()), (rng.randint(step + 1, EPOCHS * STEPS - 1),
                  rng.choice(MOMENTS))) for step in steps]  # fmt: skip
        kills.append(((rng.choice(steps), moments.pop()), (EPOCHS * STEPS + 1, ends.pop())))
        for number, (first, second) in enumerate(kills):
            folder = begin(arm, str(number))
            codes = [fit(folder, arm, False, first), fit(folder, arm, True, second)]
            codes.append(fit(folder, arm, True))
            runs.append({
                "arm": arm, "killed": [*first, *second], "codes": codes,
                "files": fingerprint(folder / "spam"), "whole": fingerprint(whole / "spam"),
                "ledger": ledger(folder) == ledger(whole),
                "left": sorted(p.name for p in folder.iterdir()),
            })  # fmt: skip
    print(json.dumps(runs))  # noqa: T201 (it is what the test reads)


def ledger(folder: Path) -> Any:
    entry = json.loads((folder / "spam" / "card.json").read_text())["adapters"][0]
    return {key: entry[key] for key in ("ledger", "data", "leaks", "parent", "recipe_digest")}


if __name__ == "__main__":
    main()
