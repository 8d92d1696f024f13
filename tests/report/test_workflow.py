"""The workflow for CI, run step by step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support.folders import FAILS, FILES, PASSES, UNSURE, folder, items

from lora_domains.data.identity import FOLDER, GIT, KEY_VARIABLE
from lora_domains.verdict.ledger import RowSet, Standing, Subject, begin_evaluation

HEADINGS = {0: "## ✔ Ship", 1: "## ✘ Do not ship", 3: "## ? Not proven yet"}
"""The summary's first line, by the exit code of the report."""


def test_the_workflow_keeps_the_ledger_of_evaluations_and_its_key(tmp_path: Path) -> None:
    import yaml

    workflow = yaml.safe_load((ROOT / ".github/workflows/adapters.yml").read_text())
    job = workflow["jobs"]["report"]
    assert job["env"] == {KEY_VARIABLE: "${{ secrets.LORA_DOMAINS_KEY }}"}
    assert workflow["permissions"]["contents"] == "write"
    commit = next(s for s in job["steps"] if s.get("name") == "Commit the ledger of evaluations")
    assert "!cancelled()" in commit["if"]

    def git(folder: Path, *arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True,
                              text=True).stdout  # fmt: skip

    def evaluated(run: Path, adapter: str) -> Standing:
        rows = RowSet((frozenset(map(str, range(40))),), "key")
        subject = Subject(adapter, "spam", rows.id, {"gates": "gates"})
        found = begin_evaluation(run / FOLDER, rows, subject, 5)
        for name, text in GIT.items():
            (run / FOLDER / name).write_text(text)
        (run / FOLDER / "key").write_text("secret")
        return found

    def committed(run: Path) -> None:
        subprocess.run(["bash", "-eo", "pipefail", "-c", commit["run"]], cwd=run, check=True,
                       capture_output=True)  # fmt: skip

    origin, first = tmp_path / "origin", tmp_path / "first"
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(origin))
    git(tmp_path, "clone", "-q", str(origin), str(first))
    committed(first)  # nothing was evaluated yet
    assert not git(origin, "branch")
    assert evaluated(first, "a").number == 1
    committed(first)
    # Two runs at a time, and one that pushes before the other.
    runs = [tmp_path / "second", tmp_path / "third"]
    for run in runs:
        git(tmp_path, "clone", "-q", str(origin), str(run))
    for run in runs:
        assert evaluated(run, run.name).number == 2
        committed(run)
    git(tmp_path, "clone", "-q", str(origin), str(tmp_path / "later"))
    found = evaluated(tmp_path / "later", "d")
    assert (found.number, found.broken) == (4, None)
    assert "key" not in git(origin, "ls-tree", "-r", "--name-only", "main")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("now", "code"), [(PASSES, 0), ((400, 100, 60, 440), 1), (FAILS, 1), (UNSURE, 3)]
)
def test_the_workflow_reports_compares_summarises_and_fails_on_a_gate(
    tmp_path: Path, now: tuple[int, ...], code: int
) -> None:
    import yaml

    workflow = yaml.safe_load((ROOT / ".github/workflows/adapters.yml").read_text())
    steps = {s.get("name"): s for s in workflow["jobs"]["report"]["steps"]}
    kept = steps["Cards and items, for the comparison of later runs"]["with"]
    assert f"--name {kept['name']} --dir main" in str(workflow)
    # An earlier run keeps what its paths match; an artifact begins at their common folder.
    folder(tmp_path / "earlier" / "adapters")
    (tmp_path / "earlier" / "adapters" / "triage" / "adapter_model.safetensors").touch()
    for pattern in kept["path"].split():
        for path in (tmp_path / "earlier").glob(pattern):
            copied = tmp_path / "main" / path.relative_to(tmp_path / "earlier" / "adapters")
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied)
    assert len(list((tmp_path / "main").rglob("*.json*"))) == 2
    folder(tmp_path / "adapters", rows=items(now))
    program = tmp_path / ".venv" / "bin" / "lora-domains"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_domains.cli.main "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(tmp_path / "job.md")}

    def step(name: str) -> int:
        # The shell of a GitHub runner.
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", steps[name]["run"]], cwd=tmp_path,
                              env=env, capture_output=True, text=True, check=False)  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    # Also an inconclusive verdict (3) fails the job.
    assert step("Report") == code
    assert "continue-on-error" not in steps["Report"]
    assert step("Summary") == 0
    shown = (tmp_path / "job.md").read_text()
    assert shown.startswith(HEADINGS[code])
    assert "since main" in shown
    # A failed gate must not keep the summary, the comment and the page from appearing.
    for name in ("Summary", "Comment on the pull request", "Page, JSON and JUnit",
                 "Cards and items, for the comparison of later runs"):  # fmt: skip
        assert "!cancelled()" in steps[name]["if"]
    assert {p.name for p in (tmp_path / "reports").iterdir()} == FILES
