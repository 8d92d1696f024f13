"""A bank, and a saved adapter that a test may damage."""

import shutil
from pathlib import Path

import pytest
from support.adapters import save, strong
from support.device import base_on

from lora_domains.modeling.bank import Bank


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    """A bank with "a" and "strong" loaded; the adapters to refuse are also called "strong"."""
    base = base_on(tiny_base)
    bank = Bank(base)
    bank.add(strong(base, "a", seed=8))
    bank.add(strong(base, "strong", seed=9))
    return bank


@pytest.fixture(scope="module")
def saved(bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved") / "strong", strong(bank.base), bank.base)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """An adapter folder that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "strong"))
