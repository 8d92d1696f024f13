"""Rows that the random base learns from."""

from typing import Any

import pytest
from support.models import clear_rows


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    """``clear_rows``; no test changes them."""
    return clear_rows()
