"""Forward passes: likelihoods of choices, nats of answers, features for heads, drift from the base.

A function scores the adapter that is routed when it is called; under a mixed route each example has
its own. At most the logits of one batch are in memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_domains.domain import Domain
from lora_domains.inference.batches import Budget, Progress, in_batches, no_progress, text_size
from lora_domains.inference.choice_tree import (
    begun,
    choices_at_once,
    last_logits,
    saved_tokens,
    takes_logits_to_keep,
    takes_trees,
    tree_size,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import IGNORED, PASS, Batch, chunks, collate
from lora_domains.modeling.heads import Head, features, head_logits, head_logprobs
from lora_domains.modeling.routing import entered, narrowed
from lora_domains.placement import is_sharded
from lora_domains.tasks import Outputs
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

# ── Choices ─────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def choice_logprobs(
    model: Any, examples: Sequence[EncodedExample], pad: int, progress: Progress = no_progress
) -> list[np.ndarray]:
    """For each example, the natural log-likelihood of each of its choices after its prompt.

    Where the model allows it, a prompt is read once for all its choices, and what all prompts
    begin with is read once (see ``choice_tree``). Returns one float64 array (choices,) per example.
    """
    examples, beginning = begun(model, examples)

    def score(batch: list[EncodedExample]) -> list[np.ndarray]:
        if beginning or (takes_logits_to_keep(model) and takes_trees(model, batch)):
            return [np.array(row) for row in choices_at_once(model, batch, pad, beginning)]
        return _one_by_one(model, batch, pad)

    size = beginning.size if beginning else tree_size
    return in_batches(model, examples, score, progress, size)


def _one_by_one(model: Any, examples: Sequence[EncodedExample], pad: int) -> list[np.ndarray]:
    """``choice_logprobs`` with one text for each choice, for models that cannot read a tree."""
    pairs = [(r, c) for r, example in enumerate(examples) for c in range(len(example.choices))]
    texts = [replace(examples[r], answer=examples[r].choices[c], choices=()) for r, c in pairs]
    logprobs = [np.zeros(len(example.choices)) for example in examples]
    budget = Budget(model)
    for chunk in chunks(texts, budget.tokens, lambda text: budget.weight(text_size(text))):
        with narrowed(model, [pairs[i][0] for i in chunk]):
            batch = collate([texts[i] for i in chunk], pad, model.device)
            nats = answer_nll(tail_logits(model, batch), batch).cpu().double().sum(1).tolist()
        for i, loss in zip(chunk, nats, strict=True):
            r, c = pairs[i]
            logprobs[r][c] = -loss
    return logprobs


def choices_and_nats(
    model: Any, examples: Sequence[EncodedExample], pad: int, progress: Progress = no_progress
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """The result of ``choice_logprobs`` and the two of ``answer_nats``.

    Where the model reads trees both come from one pass, with the answer and its EOS as one more
    choice.
    """
    joined = [replace(e, choices=(*e.choices, e.answer)) for e in examples]
    if not (examples and takes_logits_to_keep(model) and takes_trees(model, joined)):
        logprobs = choice_logprobs(model, examples, pad, progress)
        return logprobs, *answer_nats(model, examples, pad)
    logprobs = choice_logprobs(model, joined, pad, progress)
    nats = np.array([-row[-1] for row in logprobs])
    tokens = np.array([len(example.answer) for example in examples], dtype=int)
    return [row[:-1] for row in logprobs], nats, tokens


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def answer_nats(
    model: Any, examples: Sequence[EncodedExample], pad: int, progress: Progress = no_progress
) -> tuple[np.ndarray, np.ndarray]:
    """Nats of each answer (EOS included) and its supervised tokens; two arrays (examples,)."""
    examples, beginning = begun(model, examples)

    def score(rows: list[EncodedExample]) -> list[float]:
        batch = collate(rows, pad, model.device)
        logits = beginning.tail(model, rows, batch) if beginning else tail_logits(model, batch)
        nats: list[float] = answer_nll(logits, batch).cpu().double().sum(1).tolist()
        return nats

    nats = in_batches(model, examples, score, progress, beginning.size if beginning else text_size)
    tokens = [example.supervised for example in examples]
    return np.array(nats), np.array(tokens, dtype=int)


LOGITS = {True: 1 << 20, False: 1 << 26}
"""Numbers of the logits whose float32 copies are in memory at a time, on a CPU and elsewhere."""
TextOutput = tuple[Batch, Tensor]
"""Padded rows, and the logits that predict their labels (``tail_logits``)."""


def text_output(model: Any, examples: Sequence[EncodedExample], pad: int) -> TextOutput:
    """``examples`` as a batch, and the logits of their answers."""
    batch = collate(examples, pad, model.device)
    return batch, tail_logits(model, batch)


def training_output(model: Any, examples: Sequence[EncodedExample], pad: int) -> TextOutput:
    """``text_output`` for steps of one adapter: what all prompts begin with is read once.

    Not of a sharded base, whose processes make the same passes over other rows.
    """
    rest, beginning = examples, None
    if not is_sharded(model):
        rest, beginning = begun(model, examples, least_saved(model))
    if beginning is None:
        return text_output(model, examples, pad)
    batch = collate(rest, pad, model.device)
    return batch, beginning.tail(model, rest, batch)


def saved_in_training(
    model: Any, examples: Sequence[EncodedExample], rows: float | None = None
) -> float:
    """``saved_tokens`` of a pass of training; see ``training_output``."""
    return 0.0 if is_sharded(model) else saved_tokens(model, examples, rows, least_saved(model))


def least_saved(model: Any) -> int:
    """The tokens that a pass of training must save: what one more pass costs."""
    return PASS[model.device.type == "cpu"]


def reads_whole_prompts(domain: Domain) -> bool:
    """Whether steps on ``domain`` read each prompt from its first token on: layers that are
    computed again keep no keys, and those below an adapter read rows by themselves."""
    return domain.training.gradient_checkpointing or domain.lora.top_layers is not None


def text_nats(
    model: Any, examples: Sequence[EncodedExample], pad: int, weights: Tensor | None = None,
    output: TextOutput | None = None,
) -> Tensor:  # fmt: skip
    """Nats summed over all answers: a scalar with gradient.

    With ``weights`` (classes,) those of an answer are multiplied by that of its class. ``output``
    is that of ``text_output``, if the examples were read before.
    """
    batch, logits = output or training_output(model, examples, pad)
    nats = answer_nll(logits, batch)
    if weights is not None:
        of_rows = weights[[example.target for example in examples]]
        nats = nats * of_rows[:, None].to(nats.device)
    return nats.sum()


def answer_nll(logits: Tensor, batch: Batch) -> Tensor:
    """Nats of each supervised token, 0 elsewhere: (rows, keep - 1).

    ``logits`` (rows, keep - 1, vocabulary) are those of ``tail_logits``.
    """
    flat, labels = logits.flatten(0, 1), batch.labels.flatten()
    if torch.is_grad_enabled() and logits.requires_grad:
        nll: Tensor = _CrossEntropy.apply(flat, labels)  # type: ignore[no-untyped-call]
    else:
        nll = F.cross_entropy(flat.float(), labels, ignore_index=IGNORED, reduction="none")
    return nll.view(batch.labels.shape)


class _CrossEntropy(torch.autograd.Function):
    """Nats of each label, of ``logits`` (tokens, vocabulary) in any precision, computed in float32.

    torch's own keeps the logarithms of all probabilities, in float32, and copies of logits in
    another precision. This keeps the logits, and computes in blocks of tokens.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        # Less the largest logit, as in torch: differences of large numbers round by more.
        largest = logits.amax(1).float()
        total = torch.empty_like(largest)
        for block in _token_blocks(logits):
            total[block] = (logits[block].float() - largest[block, None]).exp_().sum(1)
        targets = labels.clamp(min=0)[:, None]
        nll = total.log() - (logits.gather(1, targets)[:, 0].float() - largest)
        ctx.save_for_backward(logits, labels, largest, total)
        return nll.masked_fill(labels == IGNORED, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        logits, labels, largest, total = ctx.saved_tensors
        grad = grads[0].masked_fill(labels == IGNORED, 0.0)
        found = torch.empty_like(logits)
        for block in _token_blocks(logits):
            # The gradient of a token's nats: its probabilities, less 1 at the label.
            one = (logits[block].float() - largest[block, None]).exp_().div_(total[block, None])
            places = labels[block].clamp(min=0)[:, None]
            one.scatter_add_(1, places, -torch.ones_like(places, dtype=one.dtype))
            found[block] = one.mul_(grad[block, None])
        return found, None


def _token_blocks(logits: Tensor) -> Iterator[slice]:
    """The tokens of ``logits`` (tokens, vocabulary) in blocks of at most ``LOGITS`` numbers, or of
    one token."""
    tokens = max(1, LOGITS[logits.device.type == "cpu"] // logits.shape[1])
    return (slice(at, at + tokens) for at in range(0, len(logits), tokens))


def tail_logits(model: Any, batch: Batch) -> Tensor:
    """Logits (rows, keep - 1, vocabulary) of the positions that predict ``batch.labels``.

    Of masked texts they are the logits at ``batch.places``.
    """
    if batch.places is not None:
        logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        return logits.gather(1, batch.places[..., None].expand(-1, -1, logits.shape[-1]))
    return last_logits(
        model, batch.ids, batch.mask, batch.positions, batch.labels.shape[1], before=1
    )


# ── How a text begins ───────────────────────────────────────────────────────────────────────────

NEUTRAL = "The river runs through a wide valley. In spring its water rises."
"""An ordinary text; a base predicts it best after the token with which its own texts began."""
CLEARLY = 0.01
"""Nats per token by which another token must be better than the end of a text."""


def start_of_text(base: Base) -> int | None:
    """The token with which the texts began that a causal ``base`` was pretrained on.

    None where the tokenizer puts it before a text, and for an encoder. Otherwise a chat tokenizer
    may have renamed it: it is the special token after which the base predicts ``NEUTRAL`` best,
    and the end of a text unless another is ``CLEARLY`` better.
    """
    if base.bidirectional or Tokenization(base.tokenizer, 1).bos:
        return None
    if base.start is None:
        base.start = _best_start(base)
    return base.start


@torch.no_grad()
def _best_start(base: Base) -> int:
    places, end = base.model.get_input_embeddings().num_embeddings, int(base.tokenizer.eos_token_id)
    added = base.tokenizer.added_tokens_decoder
    special = {token for token, one in added.items() if one.special and token < places}
    starts = [end, *sorted(special - {end})]
    ids = base.tokenizer(NEUTRAL, add_special_tokens=False)["input_ids"][: base.context - 1]
    rows = torch.tensor([[start, *ids] for start in starts], device=base.device)
    nats: list[float] = []
    for part in torch.split(rows, 4):  # the logits of all would take much memory
        with entered(base.model, None, None):
            logits = base.model(input_ids=part, use_cache=False).logits[:, :-1].float()
        own = F.cross_entropy(logits.transpose(1, 2), part[:, 1:], reduction="none")
        nats += own.mean(1).tolist()
    best = min(range(len(starts)), key=nats.__getitem__)
    return starts[best] if nats[best] < nats[0] - CLEARLY else end


# ── Features and heads ──────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def text_features(
    model: Any, examples: Sequence[EncodedExample], pad: int, progress: Progress = no_progress,
    pooling: str = "first",
) -> Tensor:  # fmt: skip
    """The features of each prompt that a head reads (see ``heads``), float32 (examples, hidden)."""

    def read(batch: list[EncodedExample]) -> list[np.ndarray]:
        # Arrays: a row of a tensor would be sent to other processes with all rows of its batch.
        return list(features(model, batch, pad, pooling).float().cpu().numpy())

    rows = in_batches(model, examples, read, progress)
    width = model.config.get_text_config().hidden_size
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, width))


@torch.no_grad()
def head_scores(
    model: Any, heads: Head | Sequence[Head], examples: Sequence[EncodedExample], pad: int,
    progress: Progress = no_progress, outputs: Outputs = "classes",
) -> list[np.ndarray]:  # fmt: skip
    """For each example, the log-probability of each class: one float64 array (classes,).

    For other ``outputs`` they are what the head gives: the log-odds of each label, or a number.
    ``heads`` is one head, or one for each example. The counterpart of ``choice_logprobs``.
    """
    read = head_logprobs if outputs == "classes" else head_logits
    of_example = [heads] * len(examples) if isinstance(heads, Head) else heads
    scores: list[np.ndarray] = [np.empty(0)] * len(examples)
    for pooling in dict.fromkeys(head.layout.pooling for head in of_example):
        pooled = [i for i, head in enumerate(of_example) if head.layout.pooling == pooling]
        with narrowed(model, pooled):
            rows = text_features(model, [examples[i] for i in pooled], pad, progress, pooling)
        for head in {id(of_example[i]): of_example[i] for i in pooled}.values():
            places = [n for n, i in enumerate(pooled) if of_example[i] is head]
            logprobs = read(head, rows[places]).cpu().double()
            for n, row in zip(places, logprobs, strict=True):
                scores[pooled[n]] = row.numpy()
    return scores


# ── Against the base ────────────────────────────────────────────────────────────────────────────

DRIFT = ("kl", "base", "adapter", "tokens", "largest")
"""The fields of ``drift``."""


@torch.no_grad()
def drift(
    bank: Bank, examples: Sequence[EncodedExample], pad: int, adapters: Sequence[str],
    progress: Progress = no_progress,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """How far each of ``adapters`` moved from the base on general text; the base is read once.

    Per adapter, arrays (examples,): ``kl``, the sum over tokens of KL(base ‖ adapter) over the
    whole vocabulary; ``base`` and ``adapter``, the nats of the text; ``tokens``; ``largest``, the
    largest absolute difference of a logit.
    """
    model = bank.base.model

    def score(rows: list[EncodedExample]) -> list[list[list[float]]]:
        batch = collate(rows, pad, model.device)
        supervised = batch.labels != IGNORED
        with bank.routed(None):
            logits = tail_logits(model, batch).float()
        base = F.log_softmax(logits, dim=-1)
        nats = answer_nll(logits, batch).cpu().double().sum(1)
        tables = []
        for adapter in adapters:
            with bank.routed(adapter):
                moved = tail_logits(model, batch).float()
            kl = (base.exp() * (base - F.log_softmax(moved, dim=-1))).sum(-1) * supervised
            gap = (logits - moved).abs() * supervised[..., None]
            of_text = answer_nll(moved, batch).cpu().double().sum(1)
            columns = [kl.cpu().double().sum(1), nats, of_text,
                       supervised.sum(1).cpu(), gap.amax((1, 2)).cpu().double()]  # fmt: skip
            tables.append(torch.stack(columns, dim=1))
        by_row: list[list[list[float]]] = torch.stack(tables, dim=1).tolist()
        return by_row

    table = np.array(in_batches(model, examples, score, progress))
    table = table.reshape(len(examples), len(adapters), len(DRIFT))
    return {
        adapter: {name: table[:, a, n] for n, name in enumerate(DRIFT)}
        for a, adapter in enumerate(adapters)
    }


def base_state(base: Base) -> tuple[str, bytes]:
    """The base's state digest and its logits on a fixed input, bit for bit.

    For an encoder without a masked-token head, its last hidden state in place of the logits.
    """
    length = min(16, base.context)
    ids = (torch.arange(length, device=base.device) * 7 % base.vocabulary)[None]
    with torch.no_grad(), entered(base.model, None, None):
        if base.bidirectional:
            model = base.model if base.language_head else base.model.base_model
            output = model(input_ids=ids)[0]
        else:
            output = base.model(input_ids=ids, use_cache=False).logits
    return base.state_digest(), output.float().cpu().numpy().tobytes()
