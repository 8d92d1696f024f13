"""The running batch: rows that decode together, join between two steps and leave when they ended.

Each row has an adapter of its own, or the base. Rows that join are read in a pass of their own;
their keys and values are then put beside those of the rows that decode already, with padding on the
left, which the attention mask hides. So an answer is the one that its row gets alone, up to
rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.distributed import ran_out
from lora_domains.inference.batches import Budget, generated_size
from lora_domains.inference.choice_tree import last_logits, takes_logits_to_keep
from lora_domains.modeling.bank import CACHE_ROUTE
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import padded
from lora_domains.modeling.lora import LoadedAdapter
from lora_domains.modeling.routing import Mixed, Route, entered, mixed
from lora_domains.serving.answers import Answer, Sampling, choose

OVER_TIME = ("keys", "values")
"""Tensors of a cache's layer with a place for each token, in the last dimension but one."""


class Row:
    """An answer in the making: its prompt (token ids), its adapter (None is the base).

    ``listen`` is called with each piece of text as it becomes certain. ``cancelled`` rows are
    dropped before the next step. ``index`` is its number among the answers to a request.
    """

    def __init__(
        self, prompt: Sequence[int], adapter: LoadedAdapter | None, answer: Answer,
        listen: Callable[[str], None] | None = None, index: int = 0,
    ) -> None:  # fmt: skip
        self.prompt, self.adapter, self.answer = prompt, adapter, answer
        self.listen, self.index = listen, index
        self.cancelled = False

    def add(self, token: int) -> None:
        """Append a token, and tell what it adds to the text."""
        self.answer.add(token)
        if self.listen is not None and (text := self.answer.news()):
            self.listen(text)

    @property
    def leaves(self) -> bool:
        return self.cancelled or self.answer.reason is not None

    @property
    def size(self) -> int:
        """The tokens that it may have in the end."""
        return len(self.prompt) + self.answer.sampling.max_tokens


class Batch:
    """Rows that decode together on ``base``, one token each in a ``step``.

    Where the states of a base's layers cannot be put beside each other (``together`` is False), a
    row is generated from beginning to end as it joins.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.rows: list[Row] = []
        model = base.model
        self.ends = frozenset(model.generation_config.eos_token_id)
        self._last_only = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        self._route: Route | None = None
        self._cache: Any = None
        # (rows, tokens): 1 where the cache holds a token of the row, 0 in the padding before it.
        self._mask = torch.empty(0)
        self._budget = Budget(model)
        self.together = self._exact()

    def answer(self, sampling: Sampling, *, strip: bool = False) -> Answer:
        """An empty answer of this base."""
        return Answer(self.base.tokenizer, self.ends, sampling, strip=strip)

    def fitting(self, rows: Sequence[Row]) -> int:
        """How many of ``rows``, from the first, can join now within a pass and the memory."""
        if not self.together:
            return min(1, len(rows))
        bytes_ = [self._budget.bytes(generated_size(range(row.size), 0)) for row in self.rows]
        largest, count = max(bytes_, default=0.0), len(self.rows)
        limit, longest = self._budget.limit, 0
        for number, row in enumerate(rows, 1):
            size = generated_size(row.prompt, row.answer.sampling.max_tokens)
            largest, longest = max(largest, self._budget.bytes(size)), max(longest, size.tokens)
            # A row that fits by itself is never refused, or it would wait for ever.
            within = number * longest <= self._budget.tokens or number == 1
            if not within or (count + number > 1 and (count + number) * largest > limit):
                return number - 1
        return len(rows)

    # Steps

    @torch.no_grad()
    def join(self, rows: Sequence[Row]) -> None:
        """Read the prompts of ``rows`` and choose their first tokens; those that did not end stay.

        An error leaves the rows that decode already as they were.
        """
        if not self.together:
            for row in rows:
                self._generate(row)
            return
        ids, mask, positions = padded([row.prompt for row in rows], self.base.pad, left=True)
        route = mixed([row.adapter for row in rows], self.base.device)
        cache = _new_cache(self.base.model.config)
        logits = self._pass(route, ids, mask, positions, cache)
        self._choose(rows, logits)
        stay = [place for place, row in enumerate(rows) if not row.leaves]
        if not stay:
            return
        mask = mask.to(self.base.device)
        if len(stay) < len(rows):
            mask = _select(cache, mask, stay)
        if self.rows:
            mask = _merge(self._cache, self._mask, cache, mask)
        else:
            self._cache = cache
        self._mask = mask
        self.rows = [*self.rows, *(rows[place] for place in stay)]
        self._reroute()

    @torch.no_grad()
    def step(self) -> list[Row]:
        """One more token for each row; returns the rows that left, cancelled ones among them."""
        left = self._leave()
        if not self.rows:
            return left
        ids = torch.tensor([[row.answer.tokens[-1]] for row in self.rows])
        self._mask = F.pad(self._mask, (0, 1), value=1)
        positions = self._mask.sum(1, keepdim=True) - 1
        logits = self._pass(self._route, ids, self._mask, positions, self._cache)
        self._choose(self.rows, logits)
        return left + self._leave()

    def clear(self) -> list[Row]:
        """Drop all rows, as after an error; returns them."""
        rows, self.rows, self._cache, self._route = self.rows, [], None, None
        return rows

    # Inside

    def _pass(
        self, route: Route | None, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any
    ) -> Tensor:
        """The logits (rows, vocabulary) after the last token of each row."""
        device = self.base.device
        with entered(self.base.model, route, None):
            output = self.base.model(
                input_ids=ids.to(device), attention_mask=mask.to(device),
                position_ids=positions.to(device), past_key_values=cache, use_cache=True,
                **self._last_only,
            )  # fmt: skip
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _choose(self, rows: Sequence[Row], logits: Tensor) -> None:
        tokens = choose(logits, [row.answer for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            row.add(token)

    def _leave(self) -> list[Row]:
        """Drop the rows that ended or were cancelled."""
        left = [row for row in self.rows if row.leaves]
        if left:
            stay = [place for place, row in enumerate(self.rows) if not row.leaves]
            self.rows = [self.rows[place] for place in stay]
            if not stay:
                self.clear()
            else:
                self._mask = _select(self._cache, self._mask, stay)
                self._reroute()
        return left

    def _reroute(self) -> None:
        adapters = [row.adapter for row in self.rows]
        kept = self._route.with_rows(adapters) if isinstance(self._route, Mixed) else None
        self._route = kept or mixed(adapters, self.base.device)
        # The keys and values are still those of the same rows and domains.
        vars(self._cache).pop(CACHE_ROUTE, None)

    @torch.no_grad()
    def _exact(self) -> bool:
        """Whether rows that join and leave get the logits that they get alone, by trying it."""
        texts = [[3 + (7 * n + place) % 40 for place in range(9)] for n in (1, 2)]
        try:
            with entered(self.base.model, None, None):
                return all(difference <= self._allowed for difference in self._differences(*texts))
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
            if isinstance(error, RuntimeError) and ran_out(error):
                raise
            return False

    @property
    def _allowed(self) -> float:
        """As in the check of a base, which is compared in the same way."""
        exact = self.base.dtype in (torch.float32, torch.float64) and not self.base.quantization
        return 0.25 if self.base.quantization == "8bit" else 1e-3 if exact else 0.1

    def _differences(self, long: list[int], short: list[int]) -> Iterator[float]:
        """How much the logits of two texts change by decoding beside each other."""

        def read(*texts: list[int], cache: Any) -> tuple[Tensor, Tensor]:
            ids, mask, positions = padded(texts, self.base.pad, left=True)
            return self._pass(None, ids, mask, positions, cache), mask.to(self.base.device)

        def more(mask: Tensor, tokens: list[int], cache: Any) -> tuple[Tensor, Tensor]:
            mask = F.pad(mask, (0, 1), value=1)
            positions = mask.sum(1, keepdim=True) - 1
            ids = torch.tensor(tokens)[:, None]
            return self._pass(None, ids, mask, positions, cache), mask

        def difference(found: Tensor, text: list[int]) -> float:
            ids, mask, positions = (
                part.to(self.base.device) for part in padded([text], self.base.pad, left=True)
            )
            alone = last_logits(self.base.model, ids, mask, positions, 1)[0, -1].float()
            return float((found - alone).square().mean().sqrt() / alone.std())

        config = self.base.model.config
        first, second = _new_cache(config), _new_cache(config)
        (_, mask), (_, other) = read(long[:6], cache=first), read(short[:3], cache=second)
        mask = _merge(first, mask, second, other)
        logits, mask = more(mask, [long[6], short[3]], first)
        yield difference(logits[0], long[:7])
        yield difference(logits[1], short[:4])
        mask = _select(first, mask, [1])
        logits, mask = more(mask, [short[4]], first)
        yield difference(logits[0], short[:5])

    def _generate(self, row: Row) -> None:
        """A whole answer through transformers' ``generate``, which knows every kind of state."""
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        def chosen(_ids: Tensor, scores: Tensor) -> Tensor:
            (token,) = choose(scores, [row.answer])
            row.add(token)
            return torch.full_like(scores, -torch.inf).index_fill(
                1, torch.tensor([token], device=scores.device), 0.0
            )

        def ended(ids: Tensor, _scores: object, **_: Any) -> Tensor:
            return torch.full((len(ids),), row.leaves, device=ids.device)

        ids = torch.tensor([row.prompt], device=self.base.device)
        config = GenerationConfig(
            do_sample=False, max_new_tokens=row.answer.sampling.max_tokens,
            pad_token_id=self.base.pad,
        )  # fmt: skip
        with entered(self.base.model, mixed([row.adapter], self.base.device), None):
            self.base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                logits_processor=LogitsProcessorList([chosen]),
                stopping_criteria=StoppingCriteriaList([ended]),
            )  # fmt: skip


# ── Caches ──────────────────────────────────────────────────────────────────────────────────────


def _new_cache(config: Any) -> Any:
    """An empty cache that keeps the keys and values of all tokens, and states of other layers.

    Where attention has a window, the mask keeps to it: a cache that forgets what is outside of it
    cannot be padded on the left.
    """
    from transformers import DynamicCache

    planned = DynamicCache(config=config)
    states = any(not hasattr(layer, "keys") or _states(layer) for layer in planned.layers)
    return planned if states else DynamicCache()


def _states(layer: Any) -> list[tuple[Any, Any, Tensor | None]]:
    """(container, key, tensor) of each state of a layer of linear attention."""
    found: list[tuple[Any, Any, Tensor | None]] = []
    for name in ("conv_states", "recurrent_states"):
        value = vars(layer).get(name, ...)
        if isinstance(value, dict):
            found += [(value, key, tensor) for key, tensor in value.items()]
        elif value is not ...:
            found.append((vars(layer), name, value))
    return found


def _parts(cache: Any) -> Iterator[tuple[Any, Any, Tensor, bool]]:
    """(container, key, tensor, whether it has a place for each token) of all that a cache holds.

    Raises TypeError for a tensor of another kind.
    """
    for layer in cache.layers:
        known = set()
        for name in OVER_TIME:
            tensor = vars(layer).get(name)
            if isinstance(tensor, Tensor) and tensor.numel():
                known.add(id(tensor))
                yield vars(layer), name, tensor, True
        for container, key, state in _states(layer):
            if state is not None:
                known.add(id(state))
                yield container, key, state, False
        others = [v for v in vars(layer).values() if isinstance(v, Tensor) and v.dim() > 1]
        if any(id(tensor) not in known and tensor.numel() for tensor in others):
            raise TypeError(f"{type(layer).__name__} holds a tensor of an unknown kind")


def _select(cache: Any, mask: Tensor, rows: list[int]) -> Tensor:
    """Keep ``rows`` in ``cache``, without the columns that only padded other rows; the new mask."""
    index = torch.tensor(rows, device=mask.device)
    mask = mask[index]
    start = mask.shape[1] - int(mask.sum(1).max())
    for container, key, tensor, over_time in list(_parts(cache)):
        kept = tensor[index]
        container[key] = kept[..., start:, :].contiguous() if over_time and start else kept
    return mask[:, start:]


def _merge(cache: Any, mask: Tensor, more: Any, more_mask: Tensor) -> Tensor:
    """Add the rows of ``more`` to ``cache``, padded on the left to one length; the new mask."""
    length = max(mask.shape[1], more_mask.shape[1])
    before, after = length - mask.shape[1], length - more_mask.shape[1]
    others = list(_parts(more))
    for (container, key, tensor, over_time), (_, _, other, _) in zip(
        list(_parts(cache)), others, strict=True
    ):
        pads = [(0, 0, part, 0) if over_time else (0, 0) for part in (before, after)]
        container[key] = torch.cat([F.pad(tensor, pads[0]), F.pad(other, pads[1])])
    return torch.cat([F.pad(mask, (before, 0)), F.pad(more_mask, (after, 0))])
