"""The workflow for CI, run step by step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support.folders import FAILS, FILES, PASSES, UNSURE, folder, items

HEADINGS = {0: "## ✔ Ship", 1: "## ✘ Do not ship", 3: "## ? Not proven yet"}
"""The summary's first line, by the exit code of the report."""


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
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_domains.cli "$@"\n')
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
