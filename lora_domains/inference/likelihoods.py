"""Forward passes only: likelihoods of choices, nats of answers, drift from the base, generation.

Whichever adapter is routed when a function is called is the one that is scored; under a mixed route
each item has its own. Nothing larger than one batch of logits is ever kept.
"""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.data.tokenization import EncodedExample, chunks
from lora_domains.distributed import merged, own_share
from lora_domains.errors import OutOfMemory
from lora_domains.inference.choice_tree import choices_at_once, cost, takes_trees, text_cost
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import IGNORED, Batch, collate
from lora_domains.modeling.heads import Head, features, head_logprobs
from lora_domains.modeling.memory import ran_out, release
from lora_domains.modeling.routing import entered, narrowed

R = TypeVar("R")
TOKENS = 4096
"""Padded tokens in one forward pass when scoring, on a CPU; times 8 on an accelerator."""

Progress = Callable[[int], None]


def most_tokens(device: torch.device) -> int:
    return TOKENS if device.type == "cpu" else 8 * TOKENS


def _silent(_: int) -> None:
    return None


def by_chunks(
    model: Any,
    items: Sequence[EncodedExample],
    most: int,
    score: Callable[[list[EncodedExample]], Sequence[R]],
    progress: Progress,
    weight: Callable[[EncodedExample], int] | None = None,
) -> list[R]:
    """``score`` of every item, a batch of similar weights at a time, in the order of ``items``.

    An item weighs its tokens, or as many of ``most`` as the logits of its answer take.
    Under a mixed route each item keeps its own. Inside ``sharing`` the batches are shared by the
    processes; they are the same batches. Where memory runs out a batch is halved.
    """
    rows: dict[int, R] = {}
    if weight is None:
        vocabulary = model.config.get_text_config().vocab_size
        weight = partial(text_cost, most=most, vocabulary=vocabulary)
    for chunk in own_share(chunks(items, most, weight), lambda chunk: progress(len(chunk))):
        waiting = [chunk]
        while waiting:
            part = waiting.pop()
            found = _scored(model, part, [items[i] for i in part], score)
            if found is None:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                rows.update(zip(part, found, strict=True))
        progress(len(chunk))
    rows = merged(rows)
    return [rows[i] for i in range(len(items))]


def _scored(
    model: Any,
    part: list[int],
    items: list[EncodedExample],
    score: Callable[[list[EncodedExample]], Sequence[R]],
) -> Sequence[R] | None:
    """The scores of one batch; None where memory ran out and it can be halved."""
    try:
        with narrowed(model, part):
            return score(items)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if len(part) == 1:
            raise OutOfMemory(
                where=f"scoring, a text of {len(items[0])} tokens",
                expected="memory for one text at a time",
                found=str(error).splitlines()[0],
                hint="Set a smaller max_length, or --load-in-4bit.",
            ) from None
    # Outside of `except`, so that the failed pass and its tensors are gone.
    release(model.device)
    return None


@torch.no_grad()
def choice_logprobs(
    model: Any, items: Sequence[EncodedExample], pad: int, progress: Progress = _silent
) -> list[np.ndarray]:
    """For each item, the natural log-likelihood of each of its choices after its prompt.

    A prompt is read once for all its choices (see ``choices``) where the model allows it. Returns
    one float64 array (choices,) per item.
    """
    most = most_tokens(model.device)
    vocabulary = model.config.get_text_config().vocab_size

    def weight(item: EncodedExample) -> int:
        return cost(item, most, vocabulary)

    def score(rows: list[EncodedExample]) -> list[np.ndarray]:
        if _keeps(model) and takes_trees(model, rows):
            return [np.array(found) for found in choices_at_once(model, rows, pad)]
        return _one_by_one(model, rows, pad)

    return by_chunks(model, items, most, score, progress, weight)


def _one_by_one(model: Any, rows: Sequence[EncodedExample], pad: int) -> list[np.ndarray]:
    """The same by a text for each choice: for models that cannot read a tree."""
    pairs = [(r, c) for r, item in enumerate(rows) for c in range(len(item.choices))]
    texts = [replace(rows[r], answer=rows[r].choices[c], choices=()) for r, c in pairs]
    found = [np.zeros(len(item.choices)) for item in rows]
    for chunk in chunks(texts, most_tokens(model.device)):
        with narrowed(model, [pairs[i][0] for i in chunk]):
            batch = collate([texts[i] for i in chunk], pad, model.device)
            nats = answer_nll(tail_logits(model, batch), batch).double().sum(1).tolist()
        for i, loss in zip(chunk, nats, strict=True):
            r, c = pairs[i]
            found[r][c] = -loss
    return found


@torch.no_grad()
def text_features(
    model: Any, items: Sequence[EncodedExample], pad: int, progress: Progress = _silent
) -> Tensor:
    """The features of each prompt that a head reads (see ``heads``): (items, hidden), float32."""

    def read(rows: list[EncodedExample]) -> list[Tensor]:
        return list(features(model, rows, pad).float().cpu())

    found = by_chunks(model, items, most_tokens(model.device), read, progress)
    return torch.stack(found) if found else torch.empty((0, model.config.hidden_size))


@torch.no_grad()
def head_scores(
    model: Any, heads: Head | Sequence[Head], items: Sequence[EncodedExample], pad: int,
    progress: Progress = _silent,
) -> list[np.ndarray]:  # fmt: skip
    """For each item, the log-probability of each class: one float64 array (classes,).

    ``heads`` is one head, or one for each item. The counterpart of ``choice_logprobs``.
    """
    read = text_features(model, items, pad, progress)
    of_item = [heads] * len(items) if isinstance(heads, Head) else heads
    scores: list[np.ndarray] = [np.empty(0)] * len(items)
    for head in {id(h): h for h in of_item}.values():
        rows = [i for i, h in enumerate(of_item) if h is head]
        for i, row in zip(rows, head_logprobs(head, read[rows]).double().cpu(), strict=True):
            scores[i] = row.numpy()
    return scores


def tail_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (rows, keep - 1, vocabulary) of the positions that predict ``batch.labels``.

    Of masked texts they are the logits at ``batch.places``.
    """
    if batch.places is not None:
        found: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return found.gather(1, batch.places[..., None].expand(-1, -1, found.shape[-1]))
    return last_logits(model, batch.ids, batch.mask, batch.positions, batch.keep)[:, :-1]


def last_logits(model: Any, ids: Tensor, mask: Tensor, positions: Tensor, count: int) -> Tensor:
    """Logits (rows, count, vocabulary) of the last ``count`` columns of ``ids`` (rows, length).

    Only these are computed: the output layer over a whole batch of long prompts would cost more
    memory than everything else together.
    """
    logits: Tensor = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        **({"logits_to_keep": count} if _keeps(model) else {}),
    ).logits
    return logits[:, -count:]


@cache
def _accepts(kind: Any, name: str) -> bool:
    return name in inspect.signature(kind.forward).parameters


def _keeps(model: Any) -> bool:
    return _accepts(model.__class__, "logits_to_keep")


def answer_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Nats of each supervised token, 0 elsewhere. logits (rows, keep - 1, vocabulary), as above."""
    nll = F.cross_entropy(
        logits.float().flatten(0, 1),
        batch.labels.flatten(),
        ignore_index=IGNORED,
        reduction="none",
    )
    return nll.view(batch.labels.shape)


@torch.no_grad()
def answer_nats(
    model: Any, items: Sequence[EncodedExample], pad: int, progress: Progress = _silent
) -> tuple[np.ndarray, np.ndarray]:
    """Per item: nats of its answer (EOS included) and supervised tokens; two (items,) arrays."""

    def score(rows: list[EncodedExample]) -> list[float]:
        batch = collate(rows, pad, model.device)
        nll = answer_nll(tail_logits(model, batch), batch)
        nats: list[float] = nll.double().sum(1).tolist()
        return nats

    nats = by_chunks(model, items, most_tokens(model.device), score, progress)
    return np.array(nats), np.array([len(item.answer) for item in items], dtype=int)


def choices_and_nats(
    model: Any, items: Sequence[EncodedExample], pad: int, progress: Progress = _silent
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """What ``choice_logprobs`` and ``answer_nats`` say of ``items``: their three results.

    From one reading where the model reads trees: an answer, with its EOS, is one choice more.
    """
    joined = [replace(item, choices=(*item.choices, item.answer)) for item in items]
    if not (items and _keeps(model) and takes_trees(model, joined)):
        return choice_logprobs(model, items, pad, progress), *answer_nats(model, items, pad)
    found = choice_logprobs(model, joined, pad, progress)
    nats = np.array([-logprobs[-1] for logprobs in found])
    tokens = np.array([len(item.answer) for item in items], dtype=int)
    return [logprobs[:-1] for logprobs in found], nats, tokens


@torch.no_grad()
def drift(
    bank: Bank, items: Sequence[EncodedExample], pad: int, adapters: Sequence[str],
    progress: Progress = _silent,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """How far each of ``adapters`` moved from the base on general text; the base is read once.

    Per adapter and item: ``kl``, the sum over tokens of KL(base ‖ adapter) over the whole
    vocabulary; ``base`` and ``adapter``, the nats of the text; ``tokens``; ``largest``, the
    largest absolute difference of a logit.
    """
    model = bank.base.model

    def score(rows: list[EncodedExample]) -> list[list[list[float]]]:
        batch = collate(rows, pad, model.device)
        here = batch.labels != IGNORED
        with bank.routed(None):
            logits = tail_logits(model, batch).float()
        base, nats = F.log_softmax(logits, dim=-1), answer_nll(logits, batch).double().sum(1)
        tables = []
        for adapter in adapters:
            with bank.routed(adapter):
                moved = tail_logits(model, batch).float()
            kl = (base.exp() * (base - F.log_softmax(moved, dim=-1))).sum(-1) * here
            gap = (logits - moved).abs() * here[..., None]
            columns = [kl.double().sum(1), nats, answer_nll(moved, batch).double().sum(1),
                       here.sum(1).double(), gap.amax((1, 2)).double()]  # fmt: skip
            tables.append(torch.stack(columns, dim=1))
        by_row: list[list[list[float]]] = torch.stack(tables, dim=1).tolist()
        return by_row

    # (items, adapters, 5)
    table = np.array(by_chunks(model, items, most_tokens(model.device), score, progress))
    table = table.reshape(len(items), len(adapters), 5)
    names = ("kl", "base", "adapter", "tokens", "largest")
    return {
        adapter: {name: table[:, a, n] for n, name in enumerate(names)}
        for a, adapter in enumerate(adapters)
    }


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt (token ids), greedy unless ``options`` say otherwise."""
    longest = max(map(len, prompts))
    pad = tokenizer.pad_token_id
    ids = torch.full((len(prompts), longest), pad)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, longest - len(prompt) :] = 1
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    # Sampling defaults a base ships (Llama's temperature .6) would warn beside greedy decoding.
    for name in ("temperature", "top_p", "top_k", "max_length"):
        setattr(config, name, None)
    # What is no setting of the config (a streamer, stopping criteria) is the call's own.
    others = config.update(**options)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        **others,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return texts


def generate_in_chunks(
    model: Any,
    tokenizer: Any,
    items: Sequence[EncodedExample],
    max_new_tokens: int,
    progress: Progress = _silent,
) -> list[str]:
    """Greedy answers to ``items``, in batches of similar length."""

    def score(rows: list[EncodedExample]) -> list[str]:
        prompts = [item.prompt for item in rows]
        answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        return [text.strip() for text in answers]

    return by_chunks(model, items, most_tokens(model.device), score, progress, weight=len)


def witness(base: Base) -> tuple[str, bytes]:
    """The base's state digest and its logits on a fixed input, bit for bit.

    Of an encoder without a masked-token head, its last hidden state.
    """
    length = min(16, base.context)
    ids = (torch.arange(length, device=base.device) * 7 % base.model.config.vocab_size)[None]
    with torch.no_grad(), entered(base.model, None, None):
        if base.bidirectional:
            model = base.model if base.language_head else base.model.base_model
            found = model(input_ids=ids)[0]
        else:
            found = base.model(input_ids=ids, use_cache=False).logits
    return base.state_digest(), found.float().cpu().numpy().tobytes()
