"""The curve of rows: the script on a few of them, and what is stored and shown."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from support.scripts import script

SCRIPT = ROOT / "benchmarks" / "data" / "rows.py"
STORED = ROOT / "benchmarks" / "results" / "rows.json"
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")


@linux
@pytest.mark.slow
def test_the_script_measures_each_phase_of_generated_rows(tmp_path: Path) -> None:
    rows = script("rows", "data")
    rows.write(tmp_path, 400)
    (tmp_path / "warm.csv").write_text("text\none\n")
    phases = rows.Phases()
    for form in rows.FORMS:
        rows.read_file(tmp_path / f"rows.{form}", phases)
    found = rows.prepare_file(tmp_path / "rows.csv", phases)
    assert set(phases.figures) == {
        *(f"read {form}" for form in rows.FORMS),
        *(f"read {form}, limit {rows.LIMIT}" for form in rows.FORMS),
        "read", "check", "split", "leaks", "tokens", "probes",
    }  # fmt: skip
    assert found["train"] + found["validation"] + found["test"] == 400
    assert found["repeated"] > 0
    points = [
        {"rows": count, "phases": {"read": {"seconds": seconds}}}
        for count, seconds in ((100, 1.0), (1000, 10.0), (10_000, 1000.0))
    ]
    assert rows.growth(points) == {"read": [1.0, 2.0]}


def test_generated_rows_are_the_same_each_time_and_have_what_real_ones_have() -> None:
    rows = script("rows", "data")
    made = list(rows.generated(3000))
    assert made == list(rows.generated(3000))
    texts, labels = (Counter(row[name] for row in made) for name in ("text", "label"))
    assert 30 < sum(texts.values()) - len(texts) < 120
    assert len(labels) == rows.CLASSES
    assert max(labels.values()) > 3 * min(labels.values())


def test_the_stored_curve_is_linear_and_fits_into_memory() -> None:
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    assert [point["rows"] for point in stored["sizes"]] == [10**3, 10**4, 10**5, 10**6]
    for phase, exponents in stored["growth"].items():
        # Objects of more memory take longer to reach and to collect; a square would be 2.
        assert exponents[-1] < 1.3, phase
    for point in stored["sizes"]:
        for phase, figures in point["phases"].items():
            assert figures["peak_mb"] < 16_000, phase
            if "limit" in phase:
                assert figures["seconds"] < 1, phase


def test_the_page_on_rows_shows_the_stored_curve() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--table"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() in (ROOT / "docs" / "rows.md").read_text(encoding="utf-8")
