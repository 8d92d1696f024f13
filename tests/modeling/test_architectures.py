"""Each architecture in the table of docs/bases.md does what the table says."""

import re
from pathlib import Path

import pytest
from support.adapters import strong
from support.architectures import CAUSAL, TABLE, make_architecture, tried_kind, written

from lora_domains.modeling.base import load_base
from lora_domains.modeling.base_check import ENCODERS

pytestmark = pytest.mark.slow
TEXT = TABLE.read_text(encoding="utf-8")
COMMON = (
    "bart", "falcon", "gemma3_text", "gpt2", "gpt_oss", "llama", "mamba2", "mistral", "phi3",
    "qwen3", "qwen3_next",
)  # fmt: skip
"""Tried at each change; the others in ``make test-all``."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if kind in COMMON else pytest.mark.long) for kind in CAUSAL],
)
def test_an_architecture_does_what_the_table_says(kind: str) -> None:
    assert written(tried_kind(kind), kind) in TEXT.splitlines()


def test_adapters_of_a_base_with_images_train_its_text_model(tmp_path: Path) -> None:
    base = load_base(make_architecture(tmp_path / "base", "gemma3"), device="cpu")
    linears = strong(base).weights
    assert len(linears) == 14
    assert all(name.startswith("model.language_model.layers.") for name in linears)


def test_the_page_lists_every_encoder() -> None:
    listed = re.search(r"Encoders, with a head: (.*?)\.\n", TEXT, flags=re.S)
    assert listed is not None
    assert re.split(r",\s+", listed[1]) == sorted(ENCODERS)
