"""All choices after one prompt in one forward pass, as a tree of their shared prefixes.

A prompt is read once, and after it each shared prefix once: 77 labels that start with a few words
cost little more than one. Each token attends to the prompt and its ancestors only (tree attention;
Miao et al. 2024, "SpecInfer", section 4.2), at the position it would have in its choice alone. The
last token of a choice is predicted and never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lora_domains.inference.batches import Size
from lora_domains.modeling.batching import padded
from lora_domains.tokenization.encoded import EncodedExample

Choices = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """The choices of one prompt. Node 0 is the end of the prompt, the others are tokens after."""

    tokens: Tensor
    """(nodes,) token ids; node n is ``tokens[n - 1]``."""
    depths: Tensor
    """(nodes,) distance from the end of the prompt, from 1."""
    parents: Tensor
    """(nodes,) the node before each one, which comes before it in the order of nodes."""
    reads: Tensor
    """(tokens of all choices, 3): choice, node that predicts it, token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def sees(self) -> Tensor:
        """(nodes, nodes) bool: each node attends to itself and its ancestors.

        It is not kept: the answers of 1,200 labels make as many trees, each with 10⁷ such pairs.
        """
        sees = torch.eye(len(self), dtype=torch.bool)
        for depth in range(2, max(self.depths.tolist(), default=0) + 1):
            rows = (self.depths == depth).nonzero()[:, 0]
            sees[rows] |= sees[self.parents[rows] - 1]
        return sees


@lru_cache(maxsize=4096)
def tree(choices: Choices) -> Tree:
    """The tree of ``choices`` (token ids), its nodes in the order in which prefixes first occur."""
    nodes: dict[tuple[int, ...], int] = {(): 0}
    reads: list[tuple[int, int, int]] = []
    for c, choice in enumerate(choices):
        for end, token in enumerate(choice):
            reads.append((c, nodes.setdefault(choice[:end], len(nodes)), token))
    paths = [path for path in nodes if path]
    return Tree(
        torch.tensor([path[-1] for path in paths], dtype=torch.long),
        torch.tensor([len(path) for path in paths], dtype=torch.long),
        torch.tensor([nodes[path[:-1]] for path in paths], dtype=torch.long),
        torch.tensor(reads),
    )


def tree_size(example: EncodedExample) -> Size:
    """What an example with choices takes of a pass."""
    nodes = len(tree(example.choices))
    return Size(len(example.prompt) + nodes, 1 + nodes)


def takes_trees(model: Any, examples: Sequence[EncodedExample]) -> bool:
    """Whether ``model`` attends by any 4-D mask it is given, for texts as long as ``examples``.

    This holds for rotary or learned positions with torch's own full attention. It does not where a
    window is shorter than the text or a kernel makes its own mask. Choices of one token need no
    tree.
    """
    config = model.config.get_text_config()
    trees = [tree(example.choices) for example in examples]
    longest = max(len(example.prompt) for example in examples) + max(map(len, trees))
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


def choices_at_once(model: Any, examples: Sequence[EncodedExample], pad: int) -> list[list[float]]:
    """Natural log-likelihood of every choice of each example, in one pass; see ``takes_trees``."""
    device, trees = model.device, [tree(example.choices) for example in examples]
    # Left-padded: every prompt ends in the same column, and its tree follows it.
    ids, mask, positions = padded([example.prompt for example in examples], pad, left=True)
    if most := max(map(len, trees)):
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
    # Padded reads are summed into one column beyond the choices.
    width = max(len(example.choices) for example in examples)
    reads = pad_sequence([t.reads for t in trees], batch_first=True, padding_value=-1).to(device)
    choice, node, token = reads.unbind(-1)
    choice, node, token = choice.where(choice >= 0, width), node.clamp(min=0), token.clamp(min=0)
    read = logits.flatten(1).gather(1, node * logits.shape[-1] + token)
    whole = logits.float().logsumexp(-1).gather(1, node)
    logprobs = read.cpu().double() - whole.cpu().double()  # Metal has no float64
    sums = torch.zeros((len(examples), width + 1), dtype=torch.double)
    values: list[list[float]] = sums.scatter_add(1, choice.cpu(), logprobs)[:, :width].tolist()
    return [row[: len(e.choices)] for row, e in zip(values, examples, strict=True)]


def _attention(mask: Tensor, trees: Sequence[Tree], most: int) -> Tensor:
    """(rows, 1, length, length) bool: which tokens each token of prompts and trees attends to."""
    longest = mask.shape[1]
    length = longest + most
    sees = torch.zeros((len(trees), length, length), dtype=torch.bool)
    present = mask.bool()
    sees[:, :longest, :longest] = present[:, None] & torch.ones(longest, longest).tril().bool()
    sees[:, longest:, :longest] = present[:, None]
    for row, one in enumerate(trees):
        sees[row, longest : longest + len(one), longest : longest + len(one)] = one.sees()
    # Padding attends to itself: attention over no token at all is undefined.
    sees.diagonal(dim1=1, dim2=2).fill_(True)
    return sees[:, None]
