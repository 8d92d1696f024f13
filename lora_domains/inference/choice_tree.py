"""Many answers to one prompt in one forward pass: the choices as a tree of shared beginnings.

A prompt is read once, and after it every beginning that choices share once: 77 labels that start
with a few words cost little more than one. Each token sees the prompt and its own ancestors only
(tree attention; Miao et al. 2024, "SpecInfer", section 4.2), at the position it would have in its
choice alone. The last token of a choice is predicted and never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_domains.data.tokenization import EncodedExample
from lora_domains.modeling.batching import prompts

Choices = tuple[tuple[int, ...], ...]
LOGITS = 2**27
"""Numbers in the logits of one forward pass, at most: 512 MiB in fp32. One item may be more."""


@dataclass(frozen=True)
class Tree:
    """The choices of one prompt. Node 0 is the end of the prompt; the others are read after it."""

    tokens: Tensor
    """(nodes,) what is read; node n is ``tokens[n - 1]``."""
    depths: Tensor
    """(nodes,) how far behind the prompt it stands, from 1."""
    sees: Tensor
    """(nodes, nodes) bool: itself and its ancestors."""
    reads: Tensor
    """(tokens of all choices, 3): choice, node that predicts it, token."""

    def __len__(self) -> int:
        return len(self.tokens)


@lru_cache(maxsize=4096)
def tree(choices: Choices) -> Tree:
    """The tree of ``choices`` (token ids), in the order in which beginnings first come."""
    nodes: dict[tuple[int, ...], int] = {(): 0}
    reads: list[tuple[int, int, int]] = []
    for c, choice in enumerate(choices):
        for end, token in enumerate(choice):
            reads.append((c, nodes.setdefault(choice[:end], len(nodes)), token))
    begun = [path for path in nodes if path]
    sees = torch.zeros((len(begun), len(begun)), dtype=torch.bool)
    for n, path in enumerate(begun):
        sees[n, [nodes[path[:end]] - 1 for end in range(1, len(path) + 1)]] = True
    return Tree(
        torch.tensor([path[-1] for path in begun], dtype=torch.long),
        torch.tensor([len(path) for path in begun], dtype=torch.long),
        sees,
        torch.tensor(reads),
    )


def cost(item: EncodedExample, most: int, vocabulary: int) -> int:
    """Padded tokens that ``item`` takes of ``most`` in a pass, or as many as its logits weigh."""
    nodes = len(tree(item.choices))
    return max(len(item.prompt) + nodes, (1 + nodes) * vocabulary * most // LOGITS)


def text_cost(item: EncodedExample, most: int, vocabulary: int) -> int:
    """The same for a text whose answer alone is read."""
    return max(len(item), len(item.answer) * vocabulary * most // LOGITS)


def takes_trees(model: Any, rows: Sequence[EncodedExample]) -> bool:
    """Whether ``model`` attends by whatever 4-D mask it is given, as long as ``rows`` are.

    Known of rotary or learned positions with full attention in torch itself; where a window is
    shorter than the text, or the kernel makes its own mask, the mask would not be all that counts.
    Choices of one token need no tree.
    """
    config = model.config.get_text_config()
    trees = [tree(item.choices) for item in rows]
    longest = max(len(item.prompt) for item in rows) + max(map(len, trees))
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return not any(map(len, trees)) or (
        bool(rotary or config.model_type == "gpt2")
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)  # a recurrent layer reads in order
        and config._attn_implementation in ("eager", "sdpa")
        and kinds <= {"full_attention", "sliding_attention"}
        and (not window or longest <= window)
    )


def choices_at_once(model: Any, rows: Sequence[EncodedExample], pad: int) -> list[list[float]]:
    """Natural log-likelihood of every choice of each item, in one pass. See ``takes_trees``."""
    device, trees = model.device, [tree(item.choices) for item in rows]
    longest, most = max(len(item.prompt) for item in rows), max(map(len, trees))
    # Left-padded: every prompt ends in the same column, and its tree follows it.
    ids, mask, positions = prompts(rows, pad, longest, left=True)
    if most:
        read = pad_sequence([t.tokens for t in trees], batch_first=True, padding_value=pad)
        depths = pad_sequence([t.depths for t in trees], batch_first=True)
        ids = torch.cat([ids, read], dim=1)
        positions = torch.cat([positions, mask.sum(1, keepdim=True) - 1 + depths], dim=1)
        mask = _attention(mask, trees, most)
        if model.config.get_text_config()._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    logits = model(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        position_ids=positions.to(device),
        use_cache=False,
        logits_to_keep=1 + most,
    ).logits[:, -1 - most :]
    # A read beyond an item's own adds to a choice that nobody has.
    width = max(len(item.choices) for item in rows)
    reads = pad_sequence([t.reads for t in trees], batch_first=True, padding_value=-1).to(device)
    choice, node, token = reads.unbind(-1)
    choice, node, token = choice.where(choice >= 0, width), node.clamp(min=0), token.clamp(min=0)
    found = logits.flatten(1).gather(1, node * logits.shape[-1] + token).double()
    found -= logits.float().logsumexp(-1).double().gather(1, node)
    sums = torch.zeros((len(rows), width + 1), dtype=torch.double, device=device)
    values: list[list[float]] = sums.scatter_add(1, choice, found)[:, :width].tolist()
    return [row[: len(item.choices)] for row, item in zip(values, rows, strict=True)]


def _attention(mask: Tensor, trees: Sequence[Tree], most: int) -> Tensor:
    """(rows, 1, length, length) bool: what each token of prompts and trees sees."""
    longest = mask.shape[1]
    length = longest + most
    sees = torch.zeros((len(trees), length, length), dtype=torch.bool)
    there = mask.bool()
    sees[:, :longest, :longest] = there[:, None] & torch.ones(longest, longest).tril().bool()
    sees[:, longest:, :longest] = there[:, None]
    for row, one in enumerate(trees):
        sees[row, longest : longest + len(one), longest : longest + len(one)] = one.sees
    # Padding sees itself: over nothing at all an attention is undefined.
    sees.diagonal(dim1=1, dim2=2).fill_(True)
    return sees[:, None]
