"""Running ``lora-domains`` in this process, on rows in CSV files."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_domains.cli import main as cli

FAST = ("--lr", "0.01", "--rank", "8")
"""Training flags with which a tiny base learns in a few epochs."""


def run(*arguments: str) -> int:
    """The exit code of ``lora-domains ARGUMENTS``."""
    with pytest.raises(SystemExit) as left:
        cli.main(list(arguments))
    assert isinstance(left.value.code, int)
    return left.value.code


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    """Write ``rows`` as CSV; returns the path."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)
