"""The contracts on pretrained bases: the embedded one, SmolLM2-135M-Instruct and MiniLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from support.adapters import strong
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
TEXT = (
    "Paris is the capital of France. The city lies on the river Seine and is known for its "
    "museums, its food and the Eiffel Tower. Many people visit it every year."
)
DEVIATION = 0.02
"""Of the random adapters, see ``strong``."""
TRAINED = [
    pytest.param("embedded"), pytest.param("minilm", marks=pytest.mark.real),
    pytest.param("smollm2", marks=[pytest.mark.real, pytest.mark.long]),
]  # fmt: skip


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


def read(bank: Bank, name: str | None = None) -> Any:
    """What the model makes of ``TEXT``, with its loss; random tokens would bring out extremes."""
    ids = torch.tensor([bank.base.tokenizer(TEXT).input_ids])
    with bank.routed(name):
        return bank.base.model(input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_swaps_and_a_merge(folder_of: Callable[[str], Path], name: str) -> None:
    base = load_base(folder_of(name), device="cpu")
    bank = Bank(base)
    bare = read(bank).logits
    for seed, adapter in enumerate(("a", "b")):
        bank.add(strong(base, adapter, seed, deviation=DEVIATION))
    first = read(bank, "a").logits
    assert not torch.equal(read(bank, "b").logits, first)
    assert torch.equal(read(bank, "a").logits, first)
    assert torch.equal(read(bank).logits, bare)
    merged = merge(bank, "a").model
    found = merged(input_ids=torch.tensor([base.tokenizer(TEXT).input_ids])).logits
    # Merged weights are rounded otherwise, in each of up to 30 layers.
    assert (found - first).norm() <= 1e-3 * (first - bare).norm()


@pytest.mark.long
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
    digest, bare = small.state_digest(), read(Bank(small)).logits
    logits, gradients = [], []
    for base in (plain, small):
        bank = Bank(base)
        parameters = bank.add(strong(base, "a", deviation=DEVIATION), trainable=True)
        output = read(bank, "a")
        output.loss.backward()
        logits.append(output.logits.detach().flatten())
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    # In 8 bits the activations are rounded too, in every layer.
    exact = 0.9999 if quantization == "4bit" else 0.98
    assert F.cosine_similarity(*logits, dim=0) >= exact
    assert F.cosine_similarity(*gradients, dim=0) >= (exact if quantization == "4bit" else 0.9)
    assert small.state_digest() == digest
    assert torch.equal(read(Bank(small)).logits, bare)


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("name", TRAINED)
def test_a_resumed_run_ends_with_the_same_bytes(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    folder, task = folder_of(name), Classification(head=name == "minilm")
    spam = declared(make_rows(40), task=task, epochs=2, batch_size=14, retention="none")
    model_in(tmp_path / "whole", folder).fit(spam)
    stopped_after(3, spam, tmp_path / "parts", folder)
    model_in(tmp_path / "parts", folder).fit(spam, resume=True)
    assert fingerprint(tmp_path / "parts" / "spam") == fingerprint(tmp_path / "whole" / "spam")


@pytest.mark.usefixtures("small_suite")
@pytest.mark.parametrize("name", TRAINED)
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
