"""Whatever the tests of this room read as a whole is read in blocks too, with the same outcome."""

from pathlib import Path
from typing import Any

import pytest

from lora_domains.console import rows
from lora_domains.data import readers
from lora_domains.data.source import DETECTED, Reading
from lora_domains.errors import DataError


def outcome(read: Any) -> Any:
    """What ``read`` gives, or the error that it raises."""
    try:
        return read()
    except DataError as error:
        return error


@pytest.fixture(autouse=True)
def _in_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_noted(source: Any, split: str, reading: Reading = DETECTED) -> readers.RowsRead:
        whole = outcome(lambda: readers.read_noted(source, split, reading))
        if reading.most is None and isinstance(source, str | Path):
            found = outcome(lambda: list(rows.read_blocks(source, split, reading)))
            if isinstance(whole, DataError):
                assert str(found) == str(whole)
            else:
                assert [row for block in found for row in block.rows] == whole.rows
                assert {note for block in found for note in block.notes} == {*whole.notes}
        if isinstance(whole, DataError):
            raise whole
        return whole

    monkeypatch.setattr(rows, "ROWS", 3)
    if hasattr(request.module, "read_noted"):
        monkeypatch.setattr(request.module, "read_noted", read_noted)
    if hasattr(request.module, "read"):
        monkeypatch.setattr(request.module, "read", lambda *a, **k: read_noted(*a, **k).rows)
