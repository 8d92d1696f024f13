"""The tables in a terminal."""

import pytest
from rich.console import Console

from lora_domains.report import terminal


def test_labels_with_brackets_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.confusion(
        Console(),
        {"labels": ["[urgent]", "[/b]"], "adapter": [[3, 1], [0, 2]], "base": [[2, 2], [1, 1]]},
    )
    said = capsys.readouterr().out
    assert said.count("[urgent]") == 3
    assert said.count("[/b]") == 3
