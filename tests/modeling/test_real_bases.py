"""The contracts on pretrained bases: the embedded one, SmolLM2-135M-Instruct and MiniLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from support.adapters import IDS, logits, strong
from support.architectures import tried
from support.models import declared, model_in, stopped_after

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.merging import merge
from lora_domains.embedded import BASE_PATH
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.tasks import Classification

pytestmark = pytest.mark.slow
CAUSAL = [pytest.param("embedded"), pytest.param("smollm2", marks=pytest.mark.real)]
DEVIATION = 0.02
"""Of the random adapters, see ``strong``."""
ALL = [*CAUSAL, pytest.param("minilm", marks=pytest.mark.real)]


@pytest.fixture
def folder_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        found: Path = BASE_PATH if name == "embedded" else request.getfixturevalue(name)
        return found

    return folder


@pytest.mark.parametrize("name", CAUSAL)
def test_adapters_of_a_pretrained_base(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Round trip with PEFT, mixed batch, decoding and gradients; the base stays as it is."""
    assert tried(folder_of(name), tmp_path, DEVIATION) == "works"


@pytest.mark.parametrize("name", CAUSAL)
def test_swaps_and_a_merge(folder_of: Callable[[str], Path], name: str) -> None:
    base = load_base(folder_of(name), device="cpu")
    bank, bare = Bank(base), logits(base)
    for seed, adapter in enumerate(("a", "b")):
        bank.add(strong(base, adapter, seed, deviation=DEVIATION))
    first = logits(bank, "a")
    logits(bank, "b")
    assert torch.equal(logits(bank, "a"), first)
    assert torch.equal(logits(bank), bare)
    merged = merge(bank, "a").model
    with torch.no_grad():
        found = merged(input_ids=IDS).logits
    # Sums of merged weights are rounded otherwise, in each of up to 30 layers.
    assert (found - first).norm() <= 1e-4 * (first - bare).norm()


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_quantised_base_trains_and_stays_as_it_is(
    folder_of: Callable[[str], Path], name: str, quantization: Any
) -> None:
    pytest.importorskip("bitsandbytes")
    small, plain = (
        load_base(folder_of(name), device="cpu", quantization=quantization) for _ in range(2)
    )
    plain.model.dequantize(dtype=torch.float32)
    digest, bare = small.state_digest(), logits(small)
    found = []
    for base in (plain, small):
        bank = Bank(base)
        parameters = bank.add(strong(base, "a", deviation=DEVIATION), trainable=True)
        with bank.routed("a"):
            output = base.model(input_ids=IDS, labels=IDS, use_cache=False)
        output.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        found.append((output.logits.detach().flatten(), gradients))
    for of_plain, of_small in zip(*found, strict=True):
        assert F.cosine_similarity(of_plain, of_small, dim=0) > 0.99
    assert small.state_digest() == digest
    assert torch.equal(logits(small), bare)


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_ends_with_the_same_bytes(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder, task = folder_of(name), Classification(head=name == "minilm")
    spam = declared(make_rows(40), task=task, epochs=2, batch_size=14, retention="none")
    model_in(tmp_path / "whole", folder).fit(spam)
    stopped_after(3, spam, tmp_path / "parts", folder)
    model_in(tmp_path / "parts", folder).fit(spam, resume=True)
    assert fingerprint(tmp_path / "parts" / "spam") == fingerprint(tmp_path / "whole" / "spam")


@pytest.mark.parametrize("name", ALL)
def test_an_adapter_of_a_pretrained_base_learns(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    task = Classification(head=name == "minilm", positive="spam")
    model = model_in(tmp_path, folder_of(name))
    digest = model.base.state_digest()
    model.fit(declared(make_rows(120), task=task, epochs=3, lr=2e-3, retention="none"))
    answers = [model.predict(f"{word} red", "spam")[0] for word in ("alpha", "beta")]
    assert [answer.label for answer in answers] == ["spam", "ham"]  # type: ignore[union-attr]
    assert model.base.state_digest() == digest


def test_smollm2_knows_a_capital(smollm2: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path, smollm2)
    answer = model.generate("The capital of France is", max_new_tokens=8)
    assert "Paris" in answer
    both = model.generate(["The capital of France is", "Two and two is"], max_new_tokens=8)
    assert both[0] == answer
