"""The notebook in docs runs in a notebook, and its outputs can be read there."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs" / "notebooks" / "first_five_minutes.ipynb"


def outputs_of(cell: Any) -> str:
    """All that a cell shows: what it prints, and HTML where there is some."""
    shown = [out.get("text") or out.data.get("text/html") or out.data.get("text/plain", "")
             for out in cell.outputs]  # fmt: skip
    return "\n".join(shown)


def test_the_notebook_is_stored_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


@pytest.mark.long
@pytest.mark.slow
def test_the_notebook_runs_and_its_outputs_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("LORA_DOMAINS_PROJECT", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [outputs_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    _rows, model, trained, evaluated, answers, joined = cells
    # No escape codes, and no bar that was overwritten.
    assert not [text for text in cells if "\x1b" in text or "\r" in text]
    assert not [text for text in cells if re.search(r"[A-Za-z]*Warning", text)]
    assert "embedded: 2.8 M parameters" in model
    # One place was updated in each cell; in the end it shows the losses, and no bar.
    assert trained.count("<svg") == 1
    assert "validation loss" in trained
    assert "<progress" not in "".join(cells)
    assert "Not evaluated: 2 epochs" in trained
    assert "<table>" in evaluated
    assert "General knowledge" in evaluated
    assert {"urgent", "routine"} <= set(re.findall(r"[a-z]+", answers))
    assert all(f"<th>{n}</th>" in joined for n in (146, 149))
    assert "probability_urgent" in joined
    assert (tmp_path / "adapters" / "triage" / "card.json").exists()
