"""The contracts on pretrained bases: the embedded one, SmolLM2-135M-Instruct and MiniLM."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_rows
from support.adapters import save, strong
from support.architectures import tried
from support.models import declared, model_in, stopped_after
from transformers import AutoModelForCausalLM

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.merging import merge
from lora_domains.embedded import BASE_PATH
from lora_domains.inference.likelihoods import start_of_text
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.quantization import quantization_config
from lora_domains.tasks import Classification

pytestmark = pytest.mark.slow
CAUSAL = [pytest.param("embedded"), pytest.param("smollm2", marks=pytest.mark.real)]
TEXT = (
    "Paris is the capital of France. The city lies on the river Seine and is known for its "
    "museums, its food and the Eiffel Tower. Many people visit it every year."
)
DEVIATION = 0.02
"""Of the random adapters, see ``strong``."""
LONG = [pytest.mark.real, pytest.mark.long]
TRAINED = ["embedded", *(pytest.param(name, marks=LONG) for name in ("minilm", "smollm2"))]


@pytest.fixture
def folder_of(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    def folder(name: str) -> Path:
        found: Path = BASE_PATH if name == "embedded" else request.getfixturevalue(name)
        return found

    return folder


@pytest.mark.parametrize("name", [CAUSAL[0], pytest.param("smollm2", marks=LONG)])
def test_adapters_of_a_pretrained_base(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Round trip with PEFT, mixed batch, decoding and gradients; the base stays as it is."""
    exact = in_float64 if name == "smollm2" else None
    assert tried(folder_of(name), tmp_path, DEVIATION, exact) == "works"


def tokens(base: Base) -> torch.Tensor:
    return torch.tensor([base.tokenizer(TEXT).input_ids])


def read(bank: Bank, name: str | None = None) -> Any:
    """What the model makes of ``TEXT``, with its loss; random tokens would bring out extremes."""
    ids = tokens(bank.base)
    with bank.routed(name):
        return bank.base.model(input_ids=ids, labels=ids, use_cache=False)


@pytest.mark.parametrize("name", [CAUSAL[0], pytest.param("smollm2", marks=LONG)])
@torch.no_grad()
def test_swaps_and_a_merge(folder_of: Callable[[str], Path], name: str) -> None:
    folder = folder_of(name)
    base = load_base(folder, device="cpu")
    bank = Bank(base)
    bare = read(bank).logits
    for seed, adapter in enumerate(("a", "b")):
        bank.add(strong(base, adapter, seed, deviation=DEVIATION))
    first = read(bank, "a").logits
    assert not torch.equal(read(bank, "b").logits, first)
    assert torch.equal(read(bank, "a").logits, first)
    assert torch.equal(read(bank).logits, bare)
    merged, exact = merge(bank, "a").model, in_float64(bank, "a", folder)
    found, wanted = (model(input_ids=tokens(base)).logits for model in (merged, exact))
    # Both are rounded to 24 bits in as many products. Merging rounds each weight once more, which
    # adds one rounding to the hundreds of a sum.
    error = (first - wanted).norm()
    assert (found - wanted).norm() <= 1.5 * error
    assert (first - bare).norm() >= 1000 * error


def in_float64(bank: Bank, name: str, folder: Path) -> Any:
    """The base in float64, with the adapter added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for linear, (a, b) in bank.weights(name).items():
        delta = bank[name].scales[linear] * (b.double() @ a.double())
        model.get_submodule(linear).weight += delta
    return model


@pytest.mark.long
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_quantised_base_trains_and_stays_as_it_is(
    folder_of: Callable[[str], Path], tmp_path: Path, name: str, quantization: Any
) -> None:
    """Beside the dequantised weights in float32, the same weights in bitsandbytes' layers err by
    what those round (in 8 bits the activations too, in every layer). So does PEFT on the same
    base, and an adapter here must not err by more."""
    pytest.importorskip("bitsandbytes")
    folder = folder_of(name)
    small, plain = (load_base(folder, device="cpu", quantization=quantization) for _ in range(2))
    plain.model.dequantize(dtype=torch.float32)
    digest, bare = small.state_digest(), read(Bank(small)).logits
    save(tmp_path / "a", strong(small, "a", deviation=DEVIATION), small)
    ours = errors(own_step(small), own_step(plain))
    assert small.state_digest() == digest
    assert torch.equal(read(Bank(small)).logits, bare)
    other = quantised(folder, quantization)
    other.dequantize(dtype=torch.float32)
    theirs = errors(
        peft_step(quantised(folder, quantization), tmp_path / "a", tokens(small)),
        peft_step(other, tmp_path / "a", tokens(small)),
    )
    # Nothing but the order of sums may differ: 24 bits, over hundreds of roundings in a row.
    assert all(own <= 1.01 * peft + 1e-4 for own, peft in zip(ours, theirs, strict=True))


Step = tuple[torch.Tensor, torch.Tensor]
"""Logits, and all gradients of the adapter in one row."""


def errors(found: Step, wanted: Step) -> list[float]:
    """How far each is off, relative to what is wanted."""
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def own_step(base: Base) -> Step:
    bank = Bank(base)
    parameters = bank.add(strong(base, "a", deviation=DEVIATION), trainable=True)
    output = read(bank, "a")
    output.loss.backward()
    bank.remove("a")
    gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
    assert len(gradients) == len(parameters)
    return output.logits.detach(), torch.cat(gradients)


def peft_step(model: Any, adapter: Path, ids: torch.Tensor) -> Step:
    from peft import PeftModel

    wrapped = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    output = wrapped(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    gradients = [p.grad.flatten() for p in wrapped.parameters() if p.grad is not None]
    return output.logits.detach(), torch.cat(gradients)


def quantised(folder: Path, quantization: Any) -> Any:
    """The base as transformers quantises it."""
    config = quantization_config(quantization, torch.float32)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map={"": "cpu"}
    ).eval()


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


@pytest.mark.long
def test_smollm2_knows_a_capital_and_begins_texts_as_in_its_pretraining(
    smollm2: Path, tmp_path: Path
) -> None:
    model = model_in(tmp_path, smollm2)
    assert model.tokenizer.convert_ids_to_tokens(start_of_text(model.base)) == "<|endoftext|>"
    assert model.tokenizer.eos_token == "<|im_end|>"
    answer = model.generate("The capital of France is", max_new_tokens=8)
    assert "Paris" in answer
    both = model.generate(["The capital of France is", "Two and two is"], max_new_tokens=8)
    assert both[0] == answer
