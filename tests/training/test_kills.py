"""Checkpoints: whole or not at all, whatever ends a process; runs that end with the same bytes."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_rows
from support.adapters import save, strong

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import fingerprint
from lora_domains.adapters.versions import keep_version
from lora_domains.errors import AdapterError
from lora_domains.modeling.base import load_base
from lora_domains.training.checkpoints import clear, read_checkpoint, write_checkpoint

SEED = 20_241


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """No file may grow beyond ``count`` bytes: to a process it is a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def content(number: int) -> dict[str, Any]:
    return {"run": {}, "state": {"step": number}, "weights": torch.full((300_000,), float(number))}


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    path = tmp_path / "out" / ".spam.checkpoint"
    assert write_checkpoint(path, content(1)) is None
    with files_of_at_most(400_000):
        assert write_checkpoint(path, content(2)) == "File too large"
    stored = read_checkpoint(path)
    assert stored is not None
    assert stored["state"] == {"step": 1}
    assert torch.equal(stored["weights"], content(1)["weights"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert write_checkpoint(path, content(3)) is None
    (path.parent / f"{path.name}.abc").write_bytes(b"what a killed process left")
    clear(path)
    assert list(path.parent.iterdir()) == []


def test_what_is_no_fault_of_the_disk_is_raised(tmp_path: Path) -> None:
    def fails() -> None:
        return None

    with pytest.raises(Exception, match="pickle"):
        write_checkpoint(tmp_path / "x", {"run": fails})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_adapter_and_its_versions(tmp_path: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    folder = save(tmp_path / "spam", strong(base, "spam", 1), base)
    before = fingerprint(folder)
    with files_of_at_most(8_000):
        with pytest.raises(AdapterError, match=r"Free some space"):
            save(folder, strong(base, "spam", 2), base)
        with pytest.raises(AdapterError, match=r"File too large.*The adapter is untouched"):
            keep_version(folder)
    assert fingerprint(folder) == before
    assert load_adapter(folder, base).name == "spam"
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p.parent != folder]


@pytest.mark.slow
def test_killed_at_random_moments_every_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path
) -> None:
    """Each is killed with SIGKILL in some epoch, or while it writes, twice, and resumed.

    Plainly and without dropout, with replay and dropout, and as a second stage of the same name.
    """
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(60)))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "killed.py"), str(tiny_base), str(rows),
         str(tmp_path / "out"), str(SEED)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout.splitlines()[-1])
    assert len(runs) == 12
    for run in runs:
        assert run["codes"] == [-9, -9, 0], done.stderr
        assert run["digest"] == run["whole"], run
        assert run["ledger"], run
        # What was saved, finished, before the kill is replaced by the same once more.
        replaced = run["arm"] == "second stage" or run["killed"][3] == "after it was saved"
        versions = [".versions"] if replaced else []
        left = [name for name in run["left"] if not name.startswith(".spam.")]
        assert left == [*versions, "spam"], run
        if run["killed"][3] != "before it takes its folder's place":
            assert left == run["left"], run
    assert len({run["whole"] for run in runs}) == 3
    assert {run["killed"][0] > 6 for run in runs} == {True, False}
    assert len({run["killed"][1] for run in runs}) >= 3
    assert {run["killed"][3] for run in runs} >= {"before it is saved", "after it was saved"}
