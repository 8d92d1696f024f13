"""Scores of padded batches against one row at a time without padding."""

import pickle
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_base
from support import device
from support.device import base_on

from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.errors import OutOfMemory
from lora_domains.inference import batches, likelihoods
from lora_domains.inference.generation import generate
from lora_domains.inference.likelihoods import (
    answer_nats,
    answer_nll,
    base_state,
    choice_logprobs,
    choices_and_nats,
    drift,
    text_features,
)
from lora_domains.inference.scores import renormalise
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import IGNORED, Batch
from lora_domains.tokenization.encoded import EncodedExample

PAD = 0
EXACT = 1e-4


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    """The tiny base with an adapter that moves logits a lot, and one without effect."""
    bank = Bank(base_on(tiny_base))
    fresh = new_adapter(bank.base, "inert", Lora(), 4, 8, seed=0)
    bank.add(fresh)
    random = torch.Generator().manual_seed(1)
    moved = {
        linear: (a, torch.randn(b.shape, generator=random) * 0.3)
        for linear, (a, b) in fresh.weights.items()
    }
    bank.add(replace(fresh, name="moved", weights=moved))
    return bank


def items(*shapes: tuple[int, tuple[int, ...]], seed: int = 0) -> list[EncodedExample]:
    """Examples of random tokens with prompts and choices of the given lengths."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(3, 390, count))

    made = []
    for n, (prompt, lengths) in enumerate(shapes):
        choices = tuple(ids(length) for length in lengths)
        answer = (*choices[0], 2) if choices else (*ids(1 + n % 4), 2)
        made.append(EncodedExample(f"test:{n}", (1, *ids(prompt)), answer, choices, 0))
    return made


@torch.no_grad()
def naive(model: Any, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> float:
    """log p(continuation | prompt): one row, no cache, no padding."""
    ids = torch.tensor([[*prompt, *continuation]], device=device.name)
    logp = F.log_softmax(model(input_ids=ids, use_cache=False).logits[0].double(), dim=-1)
    at = len(prompt) - 1
    return float(sum(logp[at + k, token] for k, token in enumerate(continuation)))


SHAPES = {
    "single tokens": [(3, (1, 1)), (20, (1, 1)), (1, (1, 1))],
    "several tokens": [(5, (3, 3, 3)), (17, (2, 2, 2)), (9, (4, 4, 4))],
    "numbers and lengths differ": [(4, (1, 5)), (30, (2, 1, 7, 3)), (1, (6,)), (12, (1, 1, 1))],
}


@pytest.mark.contract
@pytest.mark.parametrize("adapter", [None, "moved"])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_choices_score_as_one_by_one(bank: Bank, shapes: list[Any], adapter: str | None) -> None:
    rows = items(*shapes)
    with bank.routed(adapter):
        found = choice_logprobs(bank.base.model, rows, PAD)
        wanted = [[naive(bank.base.model, r.prompt, c) for c in r.choices] for r in rows]
    for scores, oracle in zip(found, wanted, strict=True):
        assert scores.dtype == np.float64
        np.testing.assert_allclose(scores, oracle, atol=EXACT)


def test_an_adapter_changes_scores(bank: Bank) -> None:
    rows = items((5, (3, 2)), (17, (1, 4)))
    base = choice_logprobs(bank.base.model, rows, PAD)
    with bank.routed("moved"):
        moved = choice_logprobs(bank.base.model, rows, PAD)
    assert all(np.abs(a - b).max() > 100 * EXACT for a, b in zip(base, moved, strict=True))


@pytest.mark.contract
@pytest.mark.parametrize("adapter", [None, "moved"])
def test_answers_score_as_one_by_one(bank: Bank, adapter: str | None) -> None:
    rows = items((4, ()), (33, ()), (1, ()), (12, ()), (7, ()))
    with bank.routed(adapter):
        nats, tokens = answer_nats(bank.base.model, rows, PAD)
        wanted = [-naive(bank.base.model, row.prompt, row.answer) for row in rows]
    np.testing.assert_allclose(nats, wanted, atol=EXACT)
    assert tokens.tolist() == [len(row.answer) for row in rows]


@pytest.mark.contract
@pytest.mark.parametrize("reads_trees", [True, False])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_choices_and_answers_from_one_pass(
    bank: Bank, shapes: list[Any], reads_trees: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = items(*shapes)
    monkeypatch.setattr(likelihoods, "takes_trees", lambda *_: reads_trees)
    advanced: list[int] = []
    with bank.routed("moved"):
        found, nats, tokens = choices_and_nats(bank.base.model, rows, PAD, advanced.append)
        for scores, row in zip(found, rows, strict=True):
            oracle = [naive(bank.base.model, row.prompt, c) for c in row.choices]
            np.testing.assert_allclose(scores, oracle, atol=EXACT)
        wanted = [-naive(bank.base.model, row.prompt, row.answer) for row in rows]
    np.testing.assert_allclose(nats, wanted, atol=EXACT)
    assert tokens.tolist() == [len(row.answer) for row in rows]
    assert sum(advanced) == len(rows)


@pytest.mark.contract
def test_the_batch_of_a_row_does_not_change_its_score(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = items((4, (1, 5)), (30, (2, 1)), (2, (6, 2)), (12, (1, 1)), (12, (3, 1)), (25, (2, 2)))
    with bank.routed("moved"):
        together = choice_logprobs(bank.base.model, rows, PAD)
        nats, _ = answer_nats(bank.base.model, rows, PAD)
        monkeypatch.setattr(batches, "TOKENS", 1)  # every row alone
        advanced: list[int] = []
        alone = choice_logprobs(bank.base.model, rows, PAD, advanced.append)
        alone_nats, _ = answer_nats(bank.base.model, rows, PAD)
    assert advanced == [1] * len(rows)
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=EXACT)
    np.testing.assert_allclose(nats, alone_nats, atol=EXACT)


def test_a_batch_out_of_memory_is_halved(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = items((4, (1, 5)), (30, (2, 1)), (2, (6, 2)), (12, (1, 1)), (12, (3, 1)))
    forward, most = bank.base.model.forward, [2]
    seen: list[int] = []

    def small(*arguments: Any, **options: Any) -> Any:
        seen.append(len(options["input_ids"]))
        if seen[-1] > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return forward(*arguments, **options)

    with bank.routed("moved"):
        wanted = choice_logprobs(bank.base.model, rows, PAD)
        monkeypatch.setattr(bank.base.model, "forward", small)
        monkeypatch.setattr(batches, "TOKENS", 10**6)  # all rows in one batch, to begin with
        advanced: list[int] = []
        found = choice_logprobs(bank.base.model, rows, PAD, advanced.append)
        assert (max(seen), sum(advanced)) == (5, 5)
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, other, atol=EXACT)
        most[0] = 0
        with pytest.raises(OutOfMemory, match=r"one text at a time.*20 GiB.*max_length"):
            answer_nats(bank.base.model, rows, PAD)


def test_the_order_of_rows_does_not_matter(bank: Bank) -> None:
    rows = items((4, (1, 5)), (30, (2, 1)), (2, (6, 2)), (12, (1, 1)))
    forward = choice_logprobs(bank.base.model, rows, PAD)
    backward = choice_logprobs(bank.base.model, rows[::-1], PAD)[::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(one, other)


def test_drift_is_zero_for_an_adapter_without_effect(bank: Bank) -> None:
    found = drift(bank, items((4, ()), (20, ())), PAD, ["inert"])["inert"]
    assert found["kl"].tolist() == [0.0, 0.0]
    assert found["largest"].tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(found["base"], found["adapter"])


@pytest.mark.contract
def test_drift_equals_kl_by_its_definition(bank: Bank) -> None:
    rows = items((4, ()), (20, ()), (1, ()), (9, ()))
    found = drift(bank, rows, PAD, ["moved"])["moved"]
    for n, row in enumerate(rows):
        ids = torch.tensor([[*row.prompt, *row.answer]], device=device.name)
        at = slice(len(row.prompt) - 1, -1)
        logits = []
        with torch.no_grad():
            for name in (None, "moved"):
                with bank.routed(name):
                    out = bank.base.model(input_ids=ids, use_cache=False).logits
                logits.append(out[0, at].double())
        p, q = (F.log_softmax(part, dim=-1) for part in logits)
        kl = F.kl_div(q, p, reduction="sum", log_target=True)
        np.testing.assert_allclose(found["kl"][n], float(kl), atol=EXACT)
        largest = float((logits[0] - logits[1]).abs().max())
        np.testing.assert_allclose(found["largest"][n], largest, atol=EXACT)
        with bank.routed("moved"):
            nats = -naive(bank.base.model, row.prompt, row.answer)
        np.testing.assert_allclose(found["adapter"][n], nats, atol=EXACT)
    assert (found["kl"] > 0).all()
    assert found["tokens"].tolist() == [len(row.answer) for row in rows]


@pytest.mark.contract
@pytest.mark.parametrize("adapter", [None, "moved"])
def test_greedy_generation_equals_that_of_transformers(bank: Bank, adapter: str | None) -> None:
    model, tokenizer = bank.base.model, bank.base.tokenizer
    prompts = [item.prompt for item in items((4, ()), (19, ()), (1, ()), (8, ()))]
    with bank.routed(adapter):
        together = generate(model, tokenizer, prompts, max_new_tokens=12)
        for prompt, text in zip(prompts, together, strict=True):
            ids = torch.tensor([prompt], device=device.name)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12,
                do_sample=False, pad_token_id=0,
            )  # fmt: skip
            assert text == tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_sampling_defaults_of_a_base_are_ignored_without_a_warning(bank: Bank) -> None:
    model, tokenizer = bank.base.model, bank.base.tokenizer
    prompts = [item.prompt for item in items((4, ()), (19, ()))]
    plain = generate(model, tokenizer, prompts, max_new_tokens=6)
    before = model.generation_config.to_dict()
    try:
        model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model, tokenizer, prompts, max_new_tokens=6) == plain
        assert model.generation_config.temperature == 0.6  # the base's own settings are unchanged
    finally:
        model.generation_config.update(**before)


def test_renormalised_log_probabilities_sum_to_one_far_from_zero() -> None:
    logprobs = np.array([[-1000.0, -1001.0, -1002.0], [-0.1, -5.0, -900.0]])
    shares = np.exp(renormalise(logprobs))
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    np.testing.assert_allclose(shares[0], np.exp([0, -1, -2]) / np.exp([0, -1, -2]).sum())


def test_a_multimodal_base_is_read_by_the_config_of_its_text(tmp_path: Path) -> None:
    """Its own config has no vocabulary or hidden size: the text's and the images' differ."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    small = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = {**small, "vocab_size": 400, "num_hidden_layers": 2, "num_key_value_heads": 1,
            "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
            "pad_token_id": 0}  # fmt: skip
    vision = {**small, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=vision))
    model.save_pretrained(make_base(tmp_path / "multimodal"))
    base = base_on(tmp_path / "multimodal")
    assert not hasattr(base.model.config, "vocab_size")
    assert (base.vocabulary, base.width, base.pad) == (400, 32, 0)
    assert base_state(base) == base_state(base)
    assert text_features(base.model, [], base.pad).shape == (0, 32)


def test_processes_exchange_no_more_than_the_features(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a tensor would be sent with its whole batch."""
    sizes: list[int] = []

    def sent(scores: dict[int, Any]) -> dict[int, Any]:
        sizes.append(len(pickle.dumps(scores)))
        return scores

    monkeypatch.setattr(batches, "merged", sent)
    found = text_features(bank.base.model, items(*[(4, ())] * 50), PAD)
    assert found.shape == (50, 32)
    assert sizes[0] < 4 * found.numel() * found.element_size()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nats_in_blocks_and_their_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(likelihoods, "LOGITS", {True: 40})
    random = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(3, 5, 17, generator=random)).to(dtype)
    labels = torch.randint(17, (3, 5), generator=random)
    labels[0, :2] = IGNORED
    weights = torch.randn(3, 5, generator=random)
    batch = Batch(*([torch.zeros(0)] * 3), labels)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    found = answer_nll(ours, batch)
    wanted = F.cross_entropy(theirs.float().flatten(0, 1), labels.flatten(), reduction="none",
                             ignore_index=IGNORED).view(3, 5)  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[0, :2].any()


def test_gradients_of_nats_are_as_near_to_float64_as_those_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    logits = 40 + 4 * torch.randn(1, 50, 3000, generator=random)
    labels = torch.randint(3000, (1, 50), generator=random)
    batch = Batch(*([torch.zeros(0)] * 3), labels)
    found = []
    for dtype in (torch.float32, torch.float32, torch.float64):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        plain = F.cross_entropy(leaf.flatten(0, 1), labels.flatten(), reduction="sum")
        (plain if found else answer_nll(leaf, batch).sum()).backward()
        assert leaf.grad is not None
        found.append(leaf.grad.double())
    ours, theirs, exact = found
    assert (ours - exact).norm() <= (theirs - exact).norm()
