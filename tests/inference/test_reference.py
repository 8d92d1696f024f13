"""The base's predictions on texts: KL with its gradient, exact or over the most likely tokens."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from support import device
from support.adapters import strong
from support.device import base_on
from torch import Tensor

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.inference.reference import Reference
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.tasks import Classification, Example
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

TEXTS = ("red river", "the stone is blue today", "alpha")


def with_adapter(
    tiny_base: Path, inert: bool = False
) -> tuple[Bank, list[EncodedExample], list[torch.nn.Parameter]]:
    """A bank with an adapter "a", texts, and the adapter's parameters."""
    base = base_on(tiny_base)
    bank = Bank(base)
    adapter = strong(base, "a")
    if inert:
        adapter.weights = {n: (a, torch.zeros_like(b)) for n, (a, b) in adapter.weights.items()}
    parameters = bank.add(adapter, trainable=True)
    tokenization = Tokenization(base.tokenizer, 64)
    items = [tokenization.windows(Example(f"t{n}", "", text))[0] for n, text in enumerate(TEXTS)]
    return bank, items, parameters


@torch.no_grad()
def logprobs(bank: Bank, item: EncodedExample, route: str | None) -> Tensor:
    """Log-probabilities at each token of one text alone: (tokens, vocabulary)."""
    ids = torch.tensor([item.prompt + item.answer], device=device.name)
    with bank.routed(route):
        logits = bank.base.model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1]
    return F.log_softmax(logits, dim=-1)


def divergence(bank: Bank, item: EncodedExample) -> Tensor:
    """KL(base ‖ adapter) at each token, by its definition: (tokens,)."""
    base, moved = logprobs(bank, item, None), logprobs(bank, item, "a")
    return (base.exp() * (base - moved)).sum(-1)


@pytest.mark.contract
@pytest.mark.parametrize("inert", [True, False])
def test_kl_is_that_of_its_definition_and_zero_for_an_adapter_without_effect(
    tiny_base: Path, inert: bool
) -> None:
    bank, items, parameters = with_adapter(tiny_base, inert)
    reference = Reference(bank, items)
    assert reference.top is None
    assert reference.omitted == 0
    kl, nats = reference.kl_and_nats(items, "a")
    wanted = torch.cat([divergence(bank, item) for item in items])
    torch.testing.assert_close(kl.detach(), wanted, rtol=1e-4, atol=1e-5)
    expected = torch.cat([
        -logprobs(bank, item, "a")[range(len(item.answer)), list(item.answer)] for item in items
    ])  # fmt: skip
    torch.testing.assert_close(nats.detach(), expected, rtol=1e-4, atol=1e-5)
    assert (float(kl.detach().sum()) > 0.1) is not inert
    kl.sum().backward()
    moved = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    assert (moved > 1e-4) is not inert
    assert all(p.grad is None for p in bank.base.model.parameters() if not p.requires_grad)


@pytest.mark.contract
def test_stored_predictions_serve_any_batch_in_any_order(tiny_base: Path) -> None:
    bank, items, _ = with_adapter(tiny_base)
    reference = Reference(bank, items)
    mixed, _ = reference.kl_and_nats([items[2], items[0]], "a")
    one = torch.cat([reference.kl_and_nats([items[n]], "a")[0] for n in (2, 0)])
    torch.testing.assert_close(mixed, one, rtol=1e-4, atol=1e-5)


def test_kl_over_the_top_tokens_never_exceeds_kl_over_all(tiny_base: Path) -> None:
    bank, items, parameters = with_adapter(tiny_base)
    whole, _ = Reference(bank, items).kl_and_nats(items, "a")
    tokens = sum(len(item.answer) for item in items)
    before, omitted = torch.zeros_like(whole), 1.0
    for kept in (2, 20, 150):
        reference = Reference(bank, items, cache_limit=8 * tokens * kept)
        assert reference.top == kept
        assert reference.omitted < omitted
        top, _ = reference.kl_and_nats(items, "a")
        assert (top <= whole + 1e-5).all()
        assert (top >= before - 1e-5).all()  # a finer division sees more
        before, omitted = top.detach(), reference.omitted
    assert float(top.detach().sum()) > 0.5 * float(whole.detach().sum())
    top.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)


def test_an_approximate_kl_is_reported(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Both for the KL that trains and for the KL that ranks epochs; not where it is exact."""
    made = Domain("spam", Classification(), Data(make_rows(60)))
    made = with_settings(made, epochs=1, retention="kl")

    def output() -> str:
        model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu",
                                            display=Display())  # fmt: skip
        model.fit(made)
        return " ".join(capsys.readouterr().out.split())

    assert "KL over the" not in output()
    monkeypatch.setattr(Reference.__init__, "__kwdefaults__",
                        Reference.__init__.__kwdefaults__ | {"cache_limit": 10**5})  # fmt: skip
    text = output()
    assert "trained with KL over the" in text
    assert re.search(
        r"epochs are ranked with KL over the \d+ most likely .* [\d.]+ % of the base", text
    )


def test_compare_gives_nats_and_kl_of_all_texts(tiny_base: Path) -> None:
    bank, items, _ = with_adapter(tiny_base)
    means = Reference(bank, items).compare("a")
    tokens = sum(len(item.answer) for item in items)
    kl = sum(float(divergence(bank, item).sum()) for item in items) / tokens
    nats = {
        route: sum(
            -float(logprobs(bank, item, route)[range(len(item.answer)), list(item.answer)].sum())
            for item in items
        ) / tokens
        for route in (None, "a")
    }  # fmt: skip
    assert means["general_kl"] == pytest.approx(kl, rel=1e-4)
    assert means["general_nats"] == pytest.approx(nats["a"], rel=1e-4)
    assert means["general_rise"] == pytest.approx(nats["a"] - nats[None], rel=1e-3)
