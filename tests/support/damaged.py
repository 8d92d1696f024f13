"""Damage to a saved adapter, and the refusal to load it."""

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import logits

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import (
    AdapterError,
)
from lora_domains.modeling.bank import Bank

SECONDS = 2.0
"""CPU time that a refusal may take, that of the processes it starts included."""
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "card.json"


def refused(bank: Bank, folder: Path, kind: type[AdapterError], found: str) -> AdapterError:
    """The error of loading ``folder``, which is fast and leaves the bank unchanged."""
    before = {name: logits(bank, name) for name in (None, *bank)}
    started = _cpu_seconds()
    with pytest.raises(AdapterError, match=f"(?s)found .*{found}") as caught:
        bank.add(load_adapter(folder, bank.base))
    assert _cpu_seconds() - started < SECONDS
    assert type(caught.value) is kind
    assert caught.value.expected
    assert caught.value.hint
    assert caught.value.where
    assert [None, *bank] == list(before)
    for name, wanted in before.items():
        assert torch.equal(logits(bank, name), wanted)
    return caught.value


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def plainly(folder: Path) -> Path:
    """``folder`` without its card, as plain PEFT saves it: no digest protects it."""
    (folder / CARD).unlink(missing_ok=True)
    return folder


def edit(folder: Path, name: str = CONFIG, **changes: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | changes))
