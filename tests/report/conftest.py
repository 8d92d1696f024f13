"""Reports that several test files read."""

from pathlib import Path

import pytest
from support.folders import EVALUATIONS, FAILS, PASSES, SECRET, UNSURE, folder, items, seeds


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter that passes, one that fails and one that is inconclusive; rows hold a secret."""
    there = tmp_path_factory.mktemp("adapters")
    made = []
    for name, counts in (("medical", PASSES), ("legal", FAILS), ("finance", UNSURE)):
        rows = items(counts)
        for n, item in enumerate(rows):
            if item["set"] == "test":
                item["text"] = f"row {n}: {SECRET}"
                item["slices"] = {"ward": "north" if n % 2 else "south"}
                others = {"medical", "legal", "finance"} - {name}
                item["others"] = dict.fromkeys(others, item["scores"]["base"])
        made.append(folder(there, name, rows, evaluations=EVALUATIONS, seeds=seeds()))
    return made
