"""Choices scored as one tree against each choice alone, over architectures and random trees."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.inference import batches, choice_tree, likelihoods
from lora_domains.inference.batches import Budget
from lora_domains.inference.choice_tree import (
    begun,
    choices_at_once,
    last_logits,
    takes_logits_to_keep,
    takes_trees,
    tree,
    tree_size,
    whole_prompts,
)
from lora_domains.inference.likelihoods import (
    answer_nats,
    choice_logprobs,
    saved_in_training,
    text_nats,
)
from lora_domains.modeling.batching import PASS, chunks
from lora_domains.tokenization.encoded import EncodedExample

EXACT = 1e-4
TOKENS = st.integers(3, 6)
CHOICE = st.lists(TOKENS, min_size=1, max_size=6).map(tuple)
CHOICES = st.lists(CHOICE, min_size=1, max_size=8, unique=True).map(tuple)

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}  # fmt: skip


def items() -> list[EncodedExample]:
    """Prompts of several lengths; choices that share prefixes, and one that is a prefix."""
    random = np.random.default_rng(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in random.integers(7, 97, count))

    made = []
    for length in (1, 9, 30):
        start = ids(3)
        shared = (start, (*start, 5), (*start, 6, 7), (*start[:1], 8, 9, 10), ids(2), (4,))
        made.append(EncodedExample(f"row:{length}", ids(length), (), shared, 0))
    return [*made, EncodedExample("single", ids(12), (), ((3,), (4,)), 0)]


def made(kind: str, attention: str, **changes: Any) -> Any:
    """A random model of ``kind`` whose logits differ a lot between texts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)
    return model


@torch.no_grad()
def alone(model: Any, item: EncodedExample) -> list[float]:
    """Each choice's log-likelihood: one text, no padding, no cache."""
    found = []
    for choice in item.choices:
        ids = torch.tensor([[*item.prompt, *choice]])
        logp = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        start = len(item.prompt) - 1
        found.append(sum(float(logp[start + k, token]) for k, token in enumerate(choice)))
    return found


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("qwen3", "sdpa", {"head_dim": 8}),
        ("mistral", "sdpa", {"sliding_window": 64}),
        ("gemma3_text", "sdpa", {"head_dim": 8, "sliding_window": 64}),
        ("phi3", "eager", {}),
        ("gpt2", "sdpa", {}),
        ("gpt_neox", "sdpa", {}),
    ],
)
def test_a_tree_scores_as_each_choice_alone(
    kind: str, attention: str, changes: dict[str, Any]
) -> None:
    model, rows = made(kind, attention, **changes), items()
    assert takes_trees(model, rows)
    with torch.no_grad():
        found = choices_at_once(model, rows, 0)
    for scores, item in zip(found, rows, strict=True):
        np.testing.assert_allclose(scores, alone(model, item), atol=EXACT)


@pytest.mark.parametrize(
    ("kind", "attention", "changes"),
    [
        ("mistral", "sdpa", {"sliding_window": 8}),  # shorter than the prompts
        ("opt", "eager", {"ffn_dim": 64, "word_embed_proj_dim": 32}),  # positions from its 2-D mask
        (
            "bamba",
            "eager",
            {
                "mamba_n_heads": 4,
                "mamba_d_head": 16,
                "mamba_n_groups": 1,
                "mamba_d_state": 16,
                "attn_layer_indices": [1],
            },
        ),  # recurrent layers
        ("qwen3_next", "eager", {"head_dim": 8}),
    ],
)
def test_a_model_that_cannot_read_trees_gives_the_same_scores(
    kind: str, attention: str, changes: dict[str, Any]
) -> None:
    model, rows = made(kind, attention, **changes), items()
    assert not takes_trees(model, rows)
    found = choice_logprobs(model, rows, 0)
    for scores, item in zip(found, rows, strict=True):
        np.testing.assert_allclose(scores, alone(model, item), atol=EXACT)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize(("count", "before"), [(3, 0), (3, 1), (1, 2), (8, 1), (9, 0)])
def test_the_logits_of_some_columns_are_those_of_all(
    kind: str, keeps: bool, count: int, before: int
) -> None:
    model = made(kind, "eager")
    if not keeps:  # as models that compute all of them
        of = model.__class__

        def forward(
            self: Any, input_ids: Any, attention_mask: Any, position_ids: Any, use_cache: Any
        ) -> Any:
            return of.forward(
                self, input_ids, attention_mask=attention_mask, position_ids=position_ids
            )

        model.__class__ = type("All", (of,), {"forward": forward})
    assert takes_logits_to_keep(model) == keeps
    ids = torch.arange(18).view(2, 9) + 5
    mask, positions = torch.ones_like(ids), torch.arange(9).expand(2, -1)
    with torch.no_grad():
        every = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits
        found = last_logits(model, ids, mask, positions, count, before=before)
    end = 9 - before
    torch.testing.assert_close(found, every[:, end - count : end], atol=EXACT, rtol=EXACT)
    if keeps:  # as numbers of their own: the gradient of a slice is as large as the whole
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()


def test_choices_of_one_token_need_no_tree() -> None:
    model = made("mistral", "sdpa", sliding_window=8)
    rows = [item for item in items() if item.id == "single"]
    assert takes_trees(model, rows)
    np.testing.assert_allclose(
        choice_logprobs(model, rows, 0)[0], alone(model, rows[0]), atol=EXACT
    )


@given(CHOICES)
def test_a_tree_holds_every_prefix_once(choices: tuple[tuple[int, ...], ...]) -> None:
    found = tree(choices)
    prefixes = {choice[:end] for choice in choices for end in range(1, len(choice))}
    assert len(found) == len(prefixes)
    # The tokens that a node attends to, in order, are the prefix that ends there.
    sees = found.sees()
    read = [tuple(found.tokens[sees[node]].tolist()) for node in range(len(found))]
    assert set(read) == prefixes
    assert [len(path) for path in read] == found.depths.tolist()
    # Each token of a choice is predicted from the prefix before it.
    for c, choice in enumerate(choices):
        predicted = [(n, t) for number, n, t in found.reads.tolist() if number == c]
        assert tuple(token for _, token in predicted) == choice
        assert [read[n - 1] if n else () for n, _ in predicted] == [
            choice[:end] for end in range(len(choice))
        ]


def test_the_tree_of_many_labels_is_kept_in_little_memory() -> None:
    """The answers of 1,200 labels make as many trees; the pairs of nodes of one are 12 MB."""
    labels = tuple(tuple(3 + int(digit) for digit in f"{n:04}77") for n in range(1200))
    found = tree((*labels, (3, 4, 5, 2)))
    tensors = [value for value in vars(found).values() if isinstance(value, torch.Tensor)]
    assert len(found) > 2500
    assert sum(tensor.nbytes for tensor in tensors) < 1e6


def test_an_example_weighs_its_tree_or_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    item = items()[0]
    nodes = len(tree(item.choices))
    budget = Budget(made("llama", "sdpa"))
    assert budget.weight(tree_size(item)) == len(item.prompt) + nodes
    monkeypatch.setattr(batches, "LOGITS", budget.vocabulary * (1 + nodes) * 2)
    assert budget.weight(tree_size(item)) == 2048  # two of them fill a pass
    parts = chunks([item] * 5, budget.tokens, lambda i: budget.weight(tree_size(i)))
    assert [len(part) for part in parts] == [2, 2, 1]


# ── The beginning of all prompts ────────────────────────────────────────────────────────────────


def with_beginning(answered: bool, count: int = 40, length: int = 20) -> list[EncodedExample]:
    """Rows whose prompts begin with the same ``length`` tokens."""
    random = np.random.default_rng(1)
    begins = tuple(int(i) for i in random.integers(7, 97, length))
    rows = []
    for n in range(count):
        prompt = (*begins, 9 + n % 3, *random.integers(7, 97, n % 11).tolist())
        choices = () if answered else ((11, 12), (11, 13, 14), (15,))
        answer = tuple(random.integers(7, 97, 1 + n % 4).tolist()) if answered else ()
        rows.append(EncodedExample(f"row:{n}", prompt, answer, choices, 0))
    return rows


@pytest.mark.parametrize(("kind", "attention"), [
    ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gemma3_text", "sdpa"),
    ("gpt2", "eager"), ("gpt_neox", "sdpa"),
])  # fmt: skip
def test_a_beginning_that_is_read_once_changes_no_score(kind: str, attention: str) -> None:
    model = made(kind, attention)
    choices, answered = with_beginning(answered=False), with_beginning(answered=True)
    rest, beginning = begun(model, choices)
    assert beginning is not None
    assert beginning.tokens == 20
    assert [len(one.prompt) for one in rest] == [len(one.prompt) - 20 for one in choices]
    shared = choice_logprobs(model, choices, 0), *answer_nats(model, answered, 0)
    with whole_prompts():
        assert begun(model, choices)[1] is None
        whole = choice_logprobs(model, choices, 0), *answer_nats(model, answered, 0)
    for found, expected in zip(shared, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(("kind", "attention"), [
    ("llama", "sdpa"), ("llama", "eager"), ("qwen3", "sdpa"), ("gpt2", "eager"),
])  # fmt: skip
def test_gradients_of_a_step_flow_back_through_its_beginning(kind: str, attention: str) -> None:
    model, rows = made(kind, attention), with_beginning(answered=True, count=9)
    parameters = [p.requires_grad_() for p in model.parameters()]
    rows = [replace(row, target=n % 3) for n, row in enumerate(rows)]
    weights = torch.tensor([0.5, 1.0, 3.0])
    passes, ways = [], [nullcontext(), whole_prompts()]
    model.register_forward_pre_hook(
        lambda _, __, given: passes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    found = []
    for way in ways:
        with way:
            nats = text_nats(model, rows, 0, weights)
        found.append((nats, *torch.autograd.grad(nats, parameters, allow_unused=True)))
    longest = max(map(len, rows))
    assert passes == [*passes[:-3], (1, 20), (9, longest - 20), (9, longest)]  # after a trial
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found[0][1].abs().max() > 0.01


def test_a_step_reads_whole_prompts_where_that_costs_no_more() -> None:
    model, rows = made("llama", "sdpa"), with_beginning(answered=True, count=9)
    assert saved_in_training(model, rows) == 8 * 20
    assert saved_in_training(model, rows, 16.5) == 15.5 * 20
    assert begun(model, rows, PASS[True])[1] is not None
    for other in (rows[:5], with_beginning(answered=True, length=9)):
        assert saved_in_training(model, other) == 0
        assert begun(model, other, PASS[True]) == (other, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihoods, "is_sharded", lambda _: True)
        assert saved_in_training(model, rows) == 0


@pytest.mark.parametrize(("rows", "why"), [
    (with_beginning(answered=False, count=3), "it saves little"),
    (with_beginning(answered=False, length=9), "it is short"),
    ([*with_beginning(answered=False), *items()], "others begin otherwise"),
])  # fmt: skip
def test_prompts_are_read_whole_where_that_is_as_well(rows: list[EncodedExample], why: str) -> None:
    assert begun(made("llama", "sdpa"), rows) == (rows, None), why


def test_prompts_are_read_whole_by_a_model_that_cannot_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows, model = with_beginning(answered=False), made("llama", "sdpa")
    monkeypatch.setattr(choice_tree, "_cache", lambda *_: None)  # so that the beginning is not read
    assert begun(model, rows) == (rows, None)
    assert begun(made("mamba", "eager"), rows)[1] is None
    assert begun(made("mistral", "sdpa", sliding_window=16), rows)[1] is None


def test_a_beginning_is_read_with_its_text_where_positions_depend_on_the_last_one() -> None:
    """The frequencies of LongRoPE are others in texts beyond the first length."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}  # fmt: skip
    model = made("phi3", "sdpa", rope_parameters=rope, original_max_position_embeddings=64)
    assert begun(model, with_beginning(answered=True))[1] is not None
    longer = with_beginning(answered=True, length=60)
    assert begun(model, longer) == (longer, None)


def test_an_end_of_a_beginning_is_left_to_be_read() -> None:
    (first, *_), alike = with_beginning(answered=False), []
    alike = [replace(first, id=f"row:{n}") for n in range(40)]
    rest, beginning = begun(made("llama", "sdpa"), alike)
    assert beginning is not None
    assert {one.prompt for one in rest} == {first.prompt[-1:]}
