"""The code in an adapter's README: run with the places of this machine in it."""

import re
from pathlib import Path
from typing import Any

import torch

from lora_domains.report.card import Card


def blocks(folder: Path, base: Path) -> list[str]:
    """The blocks of Python in the README of the adapter in ``folder``, which is on ``base``."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    text = text.replace(f"path/to/{Card.read(folder).adapter.path}", folder.as_posix())
    text = text.replace(f"path/to/{Card.read(folder).base.id}", base.as_posix())
    assert "path/to" not in text
    return re.findall(r"```python\n(.*?)```", text, flags=re.S)


def run_block(code: str) -> dict[str, Any]:
    """The variables that a block leaves."""
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(code, names)
    return names
