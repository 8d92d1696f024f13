"""Compiled graphs: swapping adapters neither recompiles nor breaks them, and changes no answer."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.adapters import IDS, TOLERANCE, logits, strong

from lora_domains import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.modeling.routing import traced

# `torch.compile` counts graphs and breaks before any backend; "eager" runs them as they are.
pytestmark = pytest.mark.slow


@pytest.fixture
def model(tiny_base: Path) -> Iterator[DomainModel]:
    """Not compiled yet: "a" and "b" alike, "c" of another rank, scale and target set."""
    torch._dynamo.reset()
    model = DomainModel(load_base(tiny_base, device="cpu"))
    for seed, name in enumerate("ab"):
        model.bank.add(strong(model.base, name, seed))
    model.bank.add(strong(model.base, "c", 3, rank=3, rslora=True, targets=("q_proj", "up_proj")))
    yield model
    torch._dynamo.reset()


def graphs() -> int:
    """Graphs made since the last call, which were all whole."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    made = counters["stats"]["unique_graphs"]
    counters.clear()
    return int(made)


def test_swapping_neither_recompiles_nor_breaks_the_graph(model: DomainModel) -> None:
    names, pairs = (None, "a", "b", "c"), (["a", None], ["c", "b"], ["b", "a"])
    wanted = [logits(model.bank, name) for name in names]
    with torch.no_grad():
        mixed = [model(input_ids=IDS, domains=pair).logits for pair in pairs]
        for one, other in pairwise(wanted):
            assert (one - other).abs().max() >= 100 * TOLERANCE
        assert model.compile(backend="eager") is model
        graphs()
        for count, name, want in zip((1, 0, 0, 0), names, wanted, strict=True):
            torch.testing.assert_close(logits(model.bank, name), want, atol=TOLERANCE, rtol=0)
            assert graphs() == count, name
        for count, pair, want in zip((1, 0, 0), pairs, mixed, strict=True):
            found = model(input_ids=IDS, domains=pair).logits
            torch.testing.assert_close(found, want, atol=TOLERANCE, rtol=0)
            assert graphs() == count, pair

        # Coming, going and eviction are swaps too; only more room than ever before is compiled.
        model.unload("a")
        model.bank.budget = 1
        model.bank.add(strong(model.base, "a", 1))
        torch.testing.assert_close(logits(model.bank, "a"), wanted[2], atol=TOLERANCE, rtol=0)
        assert graphs() == 0
        model.bank.add(strong(model.base, "wider", 5, rank=6))
        logits(model.bank, "wider")
        assert graphs() == 1
        torch.testing.assert_close(logits(model.bank, "b"), wanted[2], atol=TOLERANCE, rtol=0)
        assert graphs() == 0

        # What is in training is served, though not by a graph.
        model.bank.add(strong(model.base, "b", 1), trainable=True)
        torch.testing.assert_close(logits(model.bank, "b"), wanted[2], atol=TOLERANCE, rtol=0)
        assert graphs() == 0


def test_decoding_swaps_without_compiling_and_threads_keep_their_own(model: DomainModel) -> None:
    prompts = ["the red", "blue river of"]
    wanted = {name: model.generate(prompts, name, max_new_tokens=4) for name in ("a", "b", "c")}
    assert len(set(map(tuple, wanted.values()))) == 3
    model.compile(backend="eager", dynamic=True)
    graphs()
    assert model.generate(prompts, "a", max_new_tokens=4) == wanted["a"]
    assert graphs() > 0
    assert model.generate(prompts, "b", max_new_tokens=4) == wanted["b"]
    assert graphs() == 0

    def calls(name: str) -> bool:
        return all(model.generate(prompts, name, max_new_tokens=4) == wanted[name] for _ in "1234")

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(calls, wanted))
    assert graphs() == 0
    assert traced.operands is None


def test_a_base_that_is_compiled_by_other_means_is_refused(model: DomainModel) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=r"DomainModel\.compile"):
        torch.compile(model.base.model, backend="eager", fullgraph=True)(input_ids=IDS)
