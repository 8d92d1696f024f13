"""What several texts share is read once: the beginning of all prompts, and what choices begin with.

All choices after one prompt are in one forward pass, as a tree of their shared prefixes: 77 labels
that start with a few words cost little more than one. Each token attends to the prompt and its
ancestors only (tree attention; Miao et al. 2024, "SpecInfer", section 4.2), at the position it
would have in its choice alone. The last token of a choice is predicted and never read.

An instruction or few-shot examples before all texts are read once for each adapter, and the texts
attend to their keys and values; in training once in each pass, with the gradients of all texts.
"""

import inspect
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_domains.inference.batches import TOKENS, Size, cached_bytes, text_size
from lora_domains.inference.memory import TRIAL, pass_limit
from lora_domains.modeling.batching import Batch, collate, padded
from lora_domains.modeling.routing import Mixed, current_route, entered, narrowed
from lora_domains.tokenization.encoded import EncodedExample, shared

Choices = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Tree:
    """The choices of one prompt. Node 0 is the end of the prompt, the others are tokens after."""

    tokens: Tensor
    """(nodes,) token ids; node n is ``tokens[n - 1]``."""
    depths: Tensor
    """(nodes,) distance from the prompt's end, from 1."""
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
    """Whether ``model`` can read the choices of ``examples`` as trees. Those of one token need
    none."""
    trees = [tree(example.choices) for example in examples]
    longest = max(len(example.prompt) for example in examples) + max(map(len, trees))
    return not any(map(len, trees)) or attends_by_mask(model, longest)


def attends_by_mask(model: Any, longest: int) -> bool:
    """Whether ``model`` attends by any 4-D mask it is given, for texts of up to ``longest`` tokens.

    This holds for rotary or learned positions with torch's own full attention. It does not where a
    window is shorter than the text or a kernel makes its own mask.
    """
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        bool(rotary or config.model_type == "gpt2")
        and not getattr(config, "alibi", False)
        and not getattr(model, "_is_stateful", False)  # a recurrent layer reads in order
        and config._attn_implementation in ("eager", "sdpa")
        and kinds <= {"full_attention", "sliding_attention"}
        and (not window or longest <= window)
    )


def takes_logits_to_keep(model: Any) -> bool:
    """Whether ``model`` can compute the logits of the last tokens alone."""
    return _takes(model.__class__, "logits_to_keep")


@cache
def _takes(kind: Any, argument: str) -> bool:
    return argument in inspect.signature(kind.forward).parameters


def last_logits(
    model: Any, ids: Tensor, mask: Tensor, positions: Tensor, count: int, cache: Any = None,
    *, before: int = 0,
) -> Tensor:  # fmt: skip
    """Logits (rows, count, vocabulary) of ``count`` columns of ``ids`` (rows, length), the last or
    those before the last ``before``; ``cache`` holds what was read before.

    Only these are computed: the output layer over a batch of long prompts takes more memory than
    everything else.
    """
    end = ids.shape[1] - before
    # Columns by number: a slice of logits would be copied, and its gradient padded with zeros.
    kept = torch.arange(end - count, end, device=ids.device) if before else count
    more = {"logits_to_keep": kept} if takes_logits_to_keep(model) else {}
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
        **(more if cache is None else more | {"past_key_values": cache}),
    ).logits  # fmt: skip
    return logits if logits.shape[1] == count else logits[:, end - count : end]


def choices_at_once(
    model: Any, examples: Sequence[EncodedExample], pad: int, beginning: "Beginning | None" = None
) -> list[list[float]]:
    """Natural log-likelihood of every choice of each example, in one pass; see ``takes_trees``."""
    device, trees = model.device, [tree(example.choices) for example in examples]
    # Left-padded: every prompt ends in the same column, and its tree follows it.
    ids, mask, positions = padded([example.prompt for example in examples], pad, left=True)
    if most := max(map(len, trees)):
        read = pad_sequence([t.tokens for t in trees], batch_first=True, padding_value=pad)
        depths = pad_sequence([t.depths for t in trees], batch_first=True)
        ids = torch.cat([ids, read], dim=1)
        positions = torch.cat([positions, mask.sum(1, keepdim=True) - 1 + depths], dim=1)
    if most or beginning:
        mask = _attention(mask, trees, most)
    logits = _logits(model, examples, ids, mask, positions, 1 + most, beginning)
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


def _logits(
    model: Any, examples: Sequence[EncodedExample], ids: Tensor, mask: Tensor, positions: Tensor,
    count: int, beginning: "Beginning | None", *, before: int = 0,
) -> Tensor:  # fmt: skip
    """``last_logits`` after ``beginning``; ``mask`` (rows, length) or that of ``_attention``."""
    cache = None
    if beginning is not None:
        positions = positions + beginning.tokens
        read = torch.ones((*mask.shape[:-1], beginning.tokens), dtype=torch.bool)
        mask = torch.cat([read, mask], -1)
        cache = beginning.cache(examples)
    if mask.dim() == 4 and model.config.get_text_config()._attn_implementation == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    ids, mask, positions = (part.to(model.device) for part in (ids, mask, positions))
    return last_logits(model, ids, mask, positions, count, cache, before=before)


# ── The beginning of all prompts ────────────────────────────────────────────────────────────────

LEAST_SHARED, LEAST_SAVED = 16, 512
"""Tokens that all prompts share, and tokens that this saves, from which they are read once; in a
pass of training from those that a pass costs (``PASS``)."""
_whole: ContextVar[bool] = ContextVar("lora_domains_whole", default=False)
_agrees: "weakref.WeakKeyDictionary[nn.Module, bool]" = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Beginning:
    """The beginning of all prompts, as it was read by the base or by each adapter."""

    ids: tuple[int, ...]
    read: Mapping[int, tuple[Tensor, Tensor]]
    """Its keys and values in each layer, (adapters, heads, tokens, width)."""
    adapters: Mapping[int, int]
    """Which of the adapters an example has, by the ``id`` of the example."""

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def cache(self, examples: Sequence[EncodedExample]) -> Any:
        """A cache for a pass over the rest of ``examples``. It keeps nothing of that."""
        rows = self._adapters(examples)

        def update(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
            return tuple(
                torch.cat([old.to(new.dtype), new], -2)
                for old, new in zip(self._of(rows, layer), (keys, values), strict=True)
            )

        return _cache(update, self.tokens)

    def filled_cache(self, examples: Sequence[EncodedExample]) -> Any:
        """A cache after the beginning, which keeps what follows, as generation needs it."""
        from transformers import DynamicCache

        cache, rows = DynamicCache(), self._adapters(examples)
        for layer in sorted(self.read):
            cache.update(*self._of(rows, layer), layer)
        return cache

    def before(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``ids`` and ``mask`` (rows, length) of left-padded texts after the beginning."""
        begins = torch.tensor(self.ids).expand(len(ids), -1)
        return torch.cat([begins, ids], 1), torch.cat([torch.ones_like(begins), mask], 1)

    def _adapters(self, examples: Sequence[EncodedExample]) -> Tensor:
        return torch.tensor([self.adapters[id(example)] for example in examples])

    def _of(self, rows: Tensor, layer: int) -> list[Tensor]:
        """The keys and values in a layer for the adapters of ``rows``."""
        return [
            part[rows.to(part.device)] if len(part) > 1 else part.expand(len(rows), -1, -1, -1)
            for part in self.read[layer]
        ]

    def size(self, example: EncodedExample) -> Size:
        """What the rest of an example takes of a pass, in which it attends to the beginning."""
        rest = tree_size(example) if example.choices else text_size(example)
        return rest._replace(tokens=rest.tokens + self.tokens // 8)

    def tail(self, model: Any, examples: Sequence[EncodedExample], batch: Batch) -> Tensor:
        """``tail_logits`` of the rest of ``examples``, which ``batch`` holds."""
        mask = _attention(batch.mask.cpu(), [tree(((0,),))] * len(examples), 0)
        ids, positions, count = batch.ids, batch.positions.cpu(), batch.labels.shape[1]
        return _logits(model, examples, ids, mask, positions, count, self, before=1)


@contextmanager
def whole_prompts() -> Iterator[None]:
    """Inside, every prompt is read from its first token on."""
    token = _whole.set(True)
    try:
        yield
    finally:
        _whole.reset(token)


def begun(
    model: Any, examples: Sequence[EncodedExample], least: int = LEAST_SAVED
) -> tuple[Sequence[EncodedExample], Beginning | None]:
    """The rest of ``examples`` and the beginning of all their prompts, which is read here for each
    adapter of the current route; ``examples`` and None where that saves less than ``least`` tokens
    or is not possible.
    """
    size, route = _shared(examples), current_route(model)
    names = route.domains if isinstance(route, Mixed) else (None,) * len(examples)
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    saved = size * (len(examples) - len(number))
    if (
        _whole.get() or saved < least or not _goes_on(model, examples, size, len(number))
        or len(number) * size * cached_bytes(model) > pass_limit(model) / 2
    ):  # fmt: skip
        return examples, None
    rest = [replace(example, prompt=example.prompt[size:]) for example in examples]
    adapters = {id(example): number[name] for example, name in zip(rest, names, strict=True)}
    with narrowed(model, [names.index(name) for name in number]):
        read = _read(model, [examples[0].prompt[:size]] * len(number))
    return rest, Beginning(examples[0].prompt[:size], read, adapters)


def saved_tokens(
    model: Any, examples: Sequence[EncodedExample], rows: float | None = None,
    least: int = LEAST_SAVED,
) -> float:  # fmt: skip
    """Tokens that a reading of ``rows`` of ``examples``, by default all, saves by ``begun``."""
    size = _shared(examples)
    saved = size * ((rows or len(examples)) - 1)
    return saved if saved >= least and _goes_on(model, examples, size, 1) else 0.0


def _goes_on(model: Any, examples: Sequence[EncodedExample], size: int, adapters: int) -> bool:
    """Whether ``model`` can read ``examples`` on after ``size`` tokens, kept for each adapter."""
    if size < LEAST_SHARED or not takes_logits_to_keep(model):
        return False
    longest = max(len(e) + max(map(len, e.choices), default=0) for e in examples)
    return (
        adapters * size <= TOKENS and attends_by_mask(model, longest)
        and _turns_alike(model.config.get_text_config(), longest) and reads_on(model)
    )  # fmt: skip


def _turns_alike(config: Any, longest: int) -> bool:
    """Whether rotary positions are those of texts of ``longest`` tokens: LongRoPE's frequencies
    depend on the last position of a pass."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in given.values() if isinstance(one, dict)] or [given]
    name = "original_max_position_embeddings"
    first = getattr(config, name, None) or config.max_position_embeddings
    return all(
        longest <= (one.get(name) or first)
        for one in kinds if one.get("rope_type") in ("longrope", "dynamic")
    )  # fmt: skip


def _shared(examples: Sequence[EncodedExample]) -> int:
    """How many tokens all prompts begin with, and go on after."""
    if len(examples) < 2 or any(example.masked for example in examples):
        return 0
    size = len(first := examples[0].prompt) - 1
    for example in examples:
        size = min(size, len(example.prompt) - 1)
        if example.prompt[:size] != first[:size]:
            size = shared(example.prompt[:size], first)
        if size < LEAST_SHARED:
            break
    return size


def _read(model: Any, texts: Sequence[Sequence[int]]) -> dict[int, tuple[Tensor, Tensor]]:
    """The keys and values of each layer after ``texts``, all of one length."""
    read = dict[int, tuple[Tensor, Tensor]]()

    def update(keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> Any:
        read[layer] = keys, values
        return keys, values

    model(
        input_ids=torch.tensor(texts, device=model.device), past_key_values=_cache(update, 0),
        use_cache=False, logits_to_keep=1,
    )  # fmt: skip
    return read


def _cache(update: Any, tokens: int) -> Any:
    """A cache of ``tokens`` tokens, of which ``update`` gives what a layer attends to."""
    from transformers import DynamicCache

    cache: Any = DynamicCache()
    cache.update, cache.get_seq_length = update, lambda *_, **__: tokens
    return cache


@torch.no_grad()
def reads_on(model: Any) -> bool:
    """Whether ``model`` gives the same after a beginning that was read before; tried once."""
    if model not in _agrees:
        vocabulary = int(model.config.get_text_config().vocab_size)
        length = min(TRIAL, model.config.get_text_config().max_position_embeddings)
        ids = tuple(7 * n % vocabulary for n in range(1, length + 1))
        example = EncodedExample("trial", ids[:-2], ids[-2:])
        rest = replace(example, prompt=ids[length // 2 : -2])
        with entered(model, None, None):
            whole = model(input_ids=torch.tensor([ids], device=model.device)).logits[:, -3:-1]
            begins = ids[: length // 2]
            try:
                one = Beginning(begins, _read(model, [begins]), {id(rest): 0})
                found = one.tail(model, [rest], collate([rest], 0, model.device))
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
                found = whole + torch.inf
        spread = whole.float().std()
        allowed = 1e-3 if model.dtype == torch.float32 else 0.1
        _agrees[model] = bool((found - whole).float().abs().max() <= allowed * spread)
    return _agrees[model]
