"""Passes: examples of similar size, within tokens, logits and memory, in scoring and in training.

Several processes share the batches. One that runs out of memory all the same is halved. Rows of
users are put into parts by their domains, and read in blocks where there are too many to hold.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from itertools import islice, zip_longest
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import nn

from lora_domains.distributed import is_shared, merged, own_share, ran_out, smallest
from lora_domains.errors import OutOfMemory, UsageError
from lora_domains.inference.memory import (
    TRIAL,
    PassCost,
    TensorBytes,
    measured_once,
    pass_limit,
    release,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import PASS, chunks
from lora_domains.modeling.heads import base_output
from lora_domains.modeling.routing import entered, narrowed
from lora_domains.tokenization.encoded import EncodedExample

R = TypeVar("R")
T = TypeVar("T")
MICRO_TOKENS = {True: 1024, False: 65_536}
"""Padded tokens in one forward and backward pass, on a CPU and elsewhere. More of them take more
memory, and on a CPU no less time."""
TOKENS = 4096
"""Padded tokens of one forward pass in scoring, on a CPU; times 8 on an accelerator."""
LOGITS = 2**27
"""Elements of the logits of one forward pass, at most: 512 MiB in fp32, or one example."""
MARGIN = 1.1
"""A long pass may take more than its cost says, whose peak was measured on a few tokens and may lie
elsewhere (by 5 % with torch 2.6)."""
LOGIT_BYTES = 32
"""Memory that scoring takes for each logit, at most: ``drift`` holds base and adapter together."""
BLOCK = 1024
"""Texts that are read and answered before others are read."""

Progress = Callable[[int], None]
"""Called with the number of examples just finished."""


def no_progress(_: int) -> None:
    return None


class Size(NamedTuple):
    """What an example takes of a pass."""

    tokens: int
    positions: int
    """Tokens whose logits are computed."""
    cached: int = 0
    """Tokens whose keys and values are kept while text is generated."""


def text_size(example: EncodedExample) -> Size:
    return Size(len(example), len(example.answer))


def generated_size(prompt: Sized, new_tokens: int) -> Size:
    """The size of a prompt after which up to ``new_tokens`` are generated."""
    return Size(len(prompt), 1, len(prompt) + new_tokens)


class Budget:
    """What one forward pass through a model may take: tokens, logits and, on a CPU, memory."""

    def __init__(self, model: Any) -> None:
        self.tokens = TOKENS if model.device.type == "cpu" else 8 * TOKENS
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self.model, self.limit = model, pass_limit(model)

    def weight(self, size: Size) -> int:
        """The tokens of the pass that an example takes, or as large a share of its logits or of its
        memory, if that is more."""
        logits = size.positions * self.vocabulary
        weight = max(size.tokens, logits * self.tokens // LOGITS)
        if self.limit < math.inf:
            weight = max(weight, math.ceil(self.bytes(size) * self.tokens / self.limit))
        return weight

    def bytes(self, size: Size) -> float:
        """The memory that an example takes."""
        kept = size.cached * cached_bytes(self.model) if size.cached else 0.0
        logits = size.positions * self.vocabulary
        return kept + scoring_cost(self.model)(1, size.tokens, logits)

    def parts(self, sizes: Sequence[Size], copies: int = 1) -> Iterator[list[int]]:
        """Positions of ``sizes`` in order, in parts whose ``copies`` fit into memory together."""
        part: list[int] = []
        largest = 0.0
        for at, size in enumerate(sizes):
            own = copies * self.bytes(size) if self.limit < math.inf else 0.0
            if part and (len(part) + 1) * max(largest, own) > self.limit:
                yield part
                part, largest = [], 0.0
            part.append(at)
            largest = max(largest, own)
        if part:
            yield part


def padded_tokens(model: Any, examples: Sequence[EncodedExample]) -> int:
    """The tokens of all batches of ``examples``, with padding."""
    budget = Budget(model)
    batches = chunks(examples, budget.tokens, lambda example: budget.weight(text_size(example)))
    return sum(len(batch) * max(len(examples[at]) for at in batch) for batch in batches)


def in_batches(
    model: Any,
    examples: Sequence[EncodedExample],
    score: Callable[[list[EncodedExample]], Sequence[R]],
    progress: Progress = no_progress,
    size: Callable[[EncodedExample], Size] = text_size,
) -> list[R]:
    """``score`` of every example, computed in batches of similar weight, in the order given.

    ``size`` says what an example takes of a pass. Under a mixed route each example keeps its own
    adapter. Inside ``sharing`` the processes share the batches, which stay the same. A batch that
    runs out of memory is halved; raises OutOfMemory where a single example does.
    """
    scores: dict[int, R] = {}
    budget = Budget(model)
    if is_shared() and budget.limit < math.inf:  # all processes make the same batches
        budget.limit = smallest(int(budget.limit))
    batches = chunks(examples, budget.tokens, lambda example: budget.weight(size(example)))
    for chunk in own_share(batches, lambda chunk: progress(len(chunk))):
        waiting = [chunk]
        while waiting:
            part = waiting.pop()
            scored = _try_batch(model, part, [examples[i] for i in part], score)
            if scored is None:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                scores.update(zip(part, scored, strict=True))
        progress(len(chunk))
    scores = merged(scores)
    return [scores[i] for i in range(len(examples))]


def _try_batch(
    model: Any,
    part: list[int],
    examples: list[EncodedExample],
    score: Callable[[list[EncodedExample]], Sequence[R]],
) -> Sequence[R] | None:
    """The scores of one batch; None where memory ran out and the batch can be halved."""
    try:
        with narrowed(model, part):
            return score(examples)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if len(part) == 1:
            raise OutOfMemory(
                where=f"scoring, a text of {len(examples[0])} tokens",
                expected="memory for one text at a time",
                found=str(error).splitlines()[0],
                hint="Set a smaller max_length, or --load-in-4bit.",
            ) from None
    # Outside of `except`, so that the failed pass and its tensors are freed.
    release(model.device)
    return None


# ── Passes of training ────────────────────────────────────────────────────────────────────────────


class Padded(Protocol):
    """A row of a pass: an encoded example, or one of several runs."""

    @property
    def answer(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...


P = TypeVar("P", bound=Padded)


def micro_batches(
    rows: Sequence[P],
    device: torch.device,
    most: int | None = None,
    vocabulary: int = 0,
    cost: PassCost | None = None,
    limit: float = math.inf,
) -> Iterator[Sequence[P]]:
    """``rows``, longest first, in passes of at most ``most`` padded tokens (``MICRO_TOKENS``).

    With a large ``vocabulary`` passes are smaller, so that the logits of the answers stay within
    ``LOGITS``, and so they are where they would ``cost`` more than ``limit`` bytes of memory. Rows
    of different lengths share a pass only where the padding costs less than another pass
    (``PASS``): the cheapest division is found by dynamic programming over the rows sorted by
    length.
    """
    on_cpu = device.type == "cpu"
    most = most or MICRO_TOKENS[on_cpu]
    rows = sorted(rows, key=len, reverse=True)
    least, start = [0], [0]
    for end in range(1, len(rows) + 1):
        options, longest_answer = [], 0
        for begin in range(end - 1, -1, -1):
            count, length = end - begin, len(rows[begin])
            padded = length * count
            longest_answer = max(longest_answer, len(rows[begin].answer))
            logits = longest_answer * count * vocabulary
            large = padded > most or logits > LOGITS
            if cost is not None:
                large = large or MARGIN * cost(count, length, logits) > limit
            if large and begin < end - 1:
                break
            options.append((least[begin] + padded + PASS[on_cpu], begin))
        best, begin = min(options)
        least.append(best)
        start.append(begin)
    passes, end = [], len(rows)
    while end:
        passes.append(rows[start[end] : end])
        end = start[end]
    yield from reversed(passes)


# ── Measured memory ─────────────────────────────────────────────────────────────────────────────

_costs: "weakref.WeakKeyDictionary[nn.Module, PassCost]" = weakref.WeakKeyDictionary()
_cached: "weakref.WeakKeyDictionary[nn.Module, float]" = weakref.WeakKeyDictionary()


def trial_examples(
    rows: int, length: int, answer: int = 0, *, masked: bool = False
) -> list[EncodedExample]:
    """Texts of nearly the same ``length``: they are padded, which takes an attention mask. They do
    not begin alike, which would be read once.

    ``answer`` of their tokens are predicted, of a ``masked`` text in place.
    """
    lengths = [length - row % 2 - (0 if masked else answer) for row in range(rows)]
    places = tuple(range(answer)) if masked else ()
    return [
        EncodedExample(
            f"trial {row}", (1 + row % 2, *(1,) * length)[:length], (1,) * answer, target=0,
            masked=places,
        )
        for row, length in enumerate(lengths)
    ]  # fmt: skip


@torch.no_grad()
def scoring_cost(model: nn.Module) -> PassCost:
    """The memory of a forward pass through ``model``, measured when this is first asked for."""
    if model not in _costs:

        def peak(rows: int, length: int, _answer: int) -> int:
            with entered(model, None, None), TensorBytes() as counted:
                base_output(model, trial_examples(rows, length), 0)
            return int(counted.peak)

        cost = measured_once(model, "scoring", lambda: PassCost.measured(peak, vocabulary=0))
        _costs[model] = replace(cost, logit=LOGIT_BYTES)
    return _costs[model]


@torch.no_grad()
def cached_bytes(model: Any) -> float:
    """Bytes of the keys and values that ``model`` keeps for each token while it generates."""
    if model not in _cached:
        ids = torch.ones((1, TRIAL), dtype=torch.long, device=model.device)
        with entered(model, None, None), TensorBytes() as counted:
            cache = model.base_model(input_ids=ids, use_cache=True)[1:]
            _cached[model] = counted.now / TRIAL
        del cache  # it was alive while its bytes were counted
    return _cached[model]


# ── The domain of each row ──────────────────────────────────────────────────────────────────────


def row_domains(
    domain: str | None, domains: Sequence[str | None] | None, count: int
) -> list[str | None] | None:
    """The domain of each of ``count`` rows; None where neither is given, so ``using`` decides.

    Raises UsageError when both are given, or ``domains`` has another length.
    """
    if domains is None:
        return None if domain is None else [domain] * count
    if domain is not None or isinstance(domains, str) or len(domains) != count:
        both = f"both domain={domain!r} and domains" if domain is not None else None
        named = repr(domains) if isinstance(domains, str) else None
        raise UsageError(
            expected="either one domain, or a list with one for each row",
            found=both or named or f"{len(domains)} for {count} rows",
            hint="Call f(rows, domain='medical') or f(rows, domains=['medical', None, …]).",
        )
    return list(domains)


def text_domains(
    bank: Bank, domain: str | None, domains: Sequence[str | None] | None, count: int
) -> list[str]:
    """The domain of each of ``count`` texts to predict: as given, otherwise as ``using`` says.

    Raises UsageError for a text without one.
    """
    route = bank.current()
    if domain is None and domains is None and route is not None:
        active = route.domains
        domain, domains = (active[0], None) if len(active) == 1 else (None, active)
    names = [name for name in row_domains(domain, domains, count) or () if name is not None]
    if len(names) < count:
        raise UsageError(
            expected="a domain to predict for",
            found="none",
            hint="Call predict(texts, domain='medical'), or inside using('medical').",
        )
    return names


def with_domains(
    bank: Bank, texts: Iterable[T], domain: str | None, domains: Iterable[str | None] | None
) -> Iterator[tuple[T, str]]:
    """Each of ``texts`` with its domain, read one by one; raises what ``text_domains`` raises."""
    if domains is None or domain is not None or isinstance(domains, str):
        (name,) = text_domains(bank, domain, cast(Any, domains), 1)
        bank.route(name)
        return ((text, name) for text in texts)

    def pairs() -> Iterator[tuple[T, str]]:
        end: Any = object()
        for count, (text, name) in enumerate(zip_longest(texts, domains, fillvalue=end)):
            if text is end or name is end:
                fewer = "texts" if text is end else "domains"
                raise UsageError(
                    expected="a domain for each text",
                    found=f"{count} {fewer}, and more {'domains' if text is end else 'texts'}",
                    hint="Let both end together, or name one domain for all: domain='medical'.",
                )
            yield text, text_domains(bank, None, [name], 1)[0]

    return pairs()


def by_domain(
    bank: Bank,
    domains: Sequence[str | None] | None,
    count: int,
    run: Callable[[list[int]], list[T]],
) -> list[T]:
    """The results of ``run`` on ``count`` rows, each under its domain, in the order of the rows.

    ``run`` takes positions of rows and returns the same number of results for each. Rows are
    sorted by domain and run in parts that need no more adapters than fit on the device at once.
    """
    if domains is None:
        return run(list(range(count)))
    results: list[list[T]] = [[] for _ in range(count)]
    for rows in bank.parts(domains):
        with bank.routed([domains[row] for row in rows]):
            part = run(rows)
        per_row = len(part) // len(rows)
        for place, row in enumerate(rows):
            results[row] = part[place * per_row : (place + 1) * per_row]
    return [result for of_row in results for result in of_row]


def in_blocks(
    answer: Callable[[list[Any], list[str], int], Sequence[T]],
    texts: Iterable[tuple[Any, str] | None],
) -> Iterator[list[T | None]]:
    """The answers to texts, each with its domain, which are read in blocks of ``BLOCK``.

    ``answer`` is called with texts, their domains, and the number of those before the block. What
    is None has no answer.
    """
    rest, before = iter(texts), 0
    while block := list(islice(rest, BLOCK)):
        asked = [one for one in block if one is not None]
        answers = iter(answer([text for text, _ in asked], [name for _, name in asked], before))
        yield [None if one is None else next(answers) for one in block]
        before += len(block)
