"""Held to the base: which texts a step reads, KL with its gradient, which checkpoint is kept."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_rows
from hypothesis import given
from hypothesis import strategies as st
from support.adapters import strong
from support.fits import domain, forgetful
from support.models import model_in
from torch import Tensor

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.data.tokenization import EncodedExample, Tokenization
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import DomainError
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.tasks import Classification, Example
from lora_domains.training.retention import Reference, choose_scale, decide, general_rows, keeps


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(1, 30))
def test_every_text_comes_once_before_any_comes_again(
    count: int, batch: int, seed: int, steps: int
) -> None:
    drawn: list[int] = []
    for step in range(steps):
        rows = general_rows(count, batch, seed, step)
        assert len(rows) == min(batch, count)
        assert rows == general_rows(count, batch, seed, step)
        drawn += rows
    times = Counter(drawn)
    assert max(times.values()) - min(times.get(i, 0) for i in range(count)) <= 1


TEXTS = ("red river", "the stone is blue today", "alpha")


def held(
    tiny_base: Path, inert: bool = False
) -> tuple[Bank, list[EncodedExample], list[torch.nn.Parameter]]:
    """A bank with an adapter "a", general texts, and the adapter's parameters."""
    base = load_base(tiny_base, device="cpu")
    bank = Bank(base)
    adapter = strong(base, "a")
    if inert:
        adapter.weights = {n: (a, torch.zeros_like(b)) for n, (a, b) in adapter.weights.items()}
    parameters = bank.add(adapter, trainable=True)
    tokenization = Tokenization(base.tokenizer, 64)
    items = [tokenization.windows(Example(f"t{n}", "", text))[0] for n, text in enumerate(TEXTS)]
    return bank, items, parameters


@torch.no_grad()
def log_shares(bank: Bank, item: EncodedExample, route: str | None) -> Tensor:
    """Log-probabilities at each place of one text alone: (tokens, vocabulary)."""
    ids = torch.tensor([item.prompt + item.answer])
    with bank.routed(route):
        logits = bank.base.model(input_ids=ids).logits[0, len(item.prompt) - 1 : -1]
    return F.log_softmax(logits, dim=-1)


def divergence(bank: Bank, item: EncodedExample) -> Tensor:
    """KL(base ‖ adapter) at each place, by its definition: (tokens,)."""
    base, moved = log_shares(bank, item, None), log_shares(bank, item, "a")
    return (base.exp() * (base - moved)).sum(-1)


@pytest.mark.parametrize("inert", [True, False])
def test_kl_is_that_of_the_definition_and_zero_when_nothing_moves(
    tiny_base: Path, inert: bool
) -> None:
    bank, items, parameters = held(tiny_base, inert)
    reference = Reference(bank, items)
    assert reference.top is None
    assert reference.left == 0
    kl, nats = reference.moved(items, "a")
    wanted = torch.cat([divergence(bank, item) for item in items])
    torch.testing.assert_close(kl.detach(), wanted, rtol=1e-4, atol=1e-5)
    asked = torch.cat([
        -log_shares(bank, item, "a")[range(len(item.answer)), list(item.answer)] for item in items
    ])  # fmt: skip
    torch.testing.assert_close(nats.detach(), asked, rtol=1e-4, atol=1e-5)
    assert (float(kl.detach().sum()) > 0.1) is not inert
    kl.sum().backward()
    moved = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    assert (moved > 1e-4) is not inert
    assert all(p.grad is None for p in bank.base.model.parameters() if not p.requires_grad)


def test_what_is_kept_serves_any_batch_in_any_order(tiny_base: Path) -> None:
    bank, items, _ = held(tiny_base)
    reference = Reference(bank, items)
    mixed, _ = reference.moved([items[2], items[0]], "a")
    one = torch.cat([reference.moved([items[n]], "a")[0] for n in (2, 0)])
    torch.testing.assert_close(mixed, one, rtol=1e-4, atol=1e-5)


def test_the_top_and_the_rest_never_say_more_than_all(tiny_base: Path) -> None:
    bank, items, parameters = held(tiny_base)
    whole, _ = Reference(bank, items).moved(items, "a")
    tokens = sum(len(item.answer) for item in items)
    before, left = torch.zeros_like(whole), 1.0
    for kept in (2, 20, 150):
        reference = Reference(bank, items, most_bytes=8 * tokens * kept)
        assert reference.top == kept
        assert reference.left < left
        top, _ = reference.moved(items, "a")
        assert (top <= whole + 1e-5).all()
        assert (top >= before - 1e-5).all()  # a finer division sees more
        before, left = top.detach(), reference.left
    assert float(top.detach().sum()) > 0.5 * float(whole.detach().sum())
    top.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)


def test_what_kl_over_the_top_is_wrong_by_is_said(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of the KL that trains, and of that by which epochs are chosen; nothing where all is kept."""
    made = Domain("spam", Classification(), Data(make_rows(60)))
    made = with_settings(made, epochs=1, retention="kl")

    def said() -> str:
        model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu",
                                            display=Display())  # fmt: skip
        model.fit(made)
        return " ".join(capsys.readouterr().out.split())

    assert "too low by" not in said()
    monkeypatch.setattr(Reference.__init__, "__kwdefaults__",
                        Reference.__init__.__kwdefaults__ | {"most_bytes": 10**6})  # fmt: skip
    told = said()
    assert "trained by KL over the" in told
    assert re.search(r"epochs are chosen by KL over the \d+ likeliest .* [\d.]+% of the base", told)


def test_watching_gives_nats_and_kl_of_all_texts(tiny_base: Path) -> None:
    bank, items, _ = held(tiny_base)
    found = Reference(bank, items).watch("a")
    tokens = sum(len(item.answer) for item in items)
    kl = sum(float(divergence(bank, item).sum()) for item in items) / tokens
    nats = {
        route: sum(
            -float(log_shares(bank, item, route)[range(len(item.answer)), list(item.answer)].sum())
            for item in items
        ) / tokens
        for route in (None, "a")
    }  # fmt: skip
    assert found["general_kl"] == pytest.approx(kl, rel=1e-4)
    assert found["general_nats"] == pytest.approx(nats["a"], rel=1e-4)
    assert found["general_rise"] == pytest.approx(nats["a"] - nats[None], rel=1e-3)


@pytest.mark.parametrize(
    ("asked", "kl", "replay", "rows"),
    [("kl", 0.5, 0.0, 6), ("replay", 0.0, 11 / 32, 11), ("both", 0.5, 11 / 32, 11),
     ("scale", 0.0, 0.0, 0), ("none", 0.0, 0.0, 0)],
)  # fmt: skip
def test_a_method_is_its_weights_and_says_so(
    asked: str, kl: float, replay: float, rows: int
) -> None:
    domain = Domain("x", Classification(), Data([]))
    found = decide(with_settings(domain, retention=asked), texts=100, familiar=True, batch=32)
    assert (found.method, found.kl, found.replay, found.rows) == (asked, kl, replay, rows)
    assert asked in found.reason


@pytest.mark.parametrize(
    ("batch", "kl", "replay"), [(64, 6, 21), (32, 6, 11), (8, 6, 3), (2, 6, 1)]
)
def test_a_share_of_the_batch_is_replayed_and_kl_reads_as_many_beside_any(
    batch: int, kl: int, replay: int
) -> None:
    domain = Domain("x", Classification(), Data([]))

    def texts(method: str) -> int:
        return decide(with_settings(domain, retention=method), 100, True, batch).rows

    assert (texts("kl"), texts("replay"), texts("both")) == (kl, replay, max(kl, replay))


@pytest.mark.parametrize(("familiar", "method"), [(True, "replay"), (False, "kl")])
def test_auto_says_what_it_chose_and_why(familiar: bool, method: str) -> None:
    domain = Domain("x", Classification(), Data([]))
    found = decide(domain, texts=100, familiar=familiar, batch=32)
    asked = decide(with_settings(domain, retention=method), 100, familiar, 32)
    assert found == replace(asked, reason=found.reason)
    assert f"retention {method}: auto" in found.reason
    assert ("benchmarks/training/retention.py" if familiar else "--general") in found.reason
    nothing = decide(domain, texts=0, familiar=familiar, batch=32)
    assert (nothing.method, nothing.rows) == ("none", 0)
    assert "no language head" in nothing.reason


@pytest.mark.parametrize("wrong", [{"retention": "ewc"}, {"kl": 0.0}, {"replay": 1.0}])
def test_settings_that_mean_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DomainError, match=next(iter(wrong))):
        with_settings(Domain("x", Classification(), Data([])), **wrong)


def test_a_scale_is_the_best_that_keeps() -> None:
    def judged(scale: float) -> dict[str, Any]:
        return {"score": scale, "general_kl": scale}

    found = choose_scale(judged, lambda r: (keeps(r, 0.5), r["score"]))
    assert found == {"scale": 0.4, "score": 0.4, "general_kl": 0.4}


def test_kl_keeps_what_plain_training_loses(tmp_path: Path, tiny_base: Path) -> None:
    settings = {"drift": 1e9, "kl": 1000.0, "lr": 0.005}
    last = {
        way: forgetful(tmp_path / way, tiny_base, retention=way, **settings)["history"][-1]
        for way in ("none", "kl", "replay", "both")
    }
    assert last["kl"]["general_kl"] < 0.5 * last["none"]["general_kl"]
    # Replay learns the texts themselves: to a random base they are rows like any other.
    nats = {way: record["general_nats"] for way, record in last.items()}
    assert nats["replay"] < nats["none"]


def test_own_general_text_is_what_it_is_held_to(tmp_path: Path, tiny_base: Path) -> None:
    secret = "zqheldtothis"
    texts = [{"text": f"{secret} number {n} of the stone river"} for n in range(50)]
    plain = domain(make_rows(60), epochs=1, retention="kl")  # by the same method, on other texts
    declared = replace(plain, data=replace(plain.data, general=texts))
    model = model_in(tmp_path, tiny_base)
    card = model.fit(declared)
    dataset = model.dataset("spam")
    assert {len(dataset.general.training), len(dataset.general.selection)} == {40, 10}
    assert card.adapter.settings["data"]["general"] == "50 rows in memory"
    own, ours = (card, model_in(tmp_path / "b", tiny_base).fit(plain))
    assert own.adapter.sha256 != ours.adapter.sha256
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path
