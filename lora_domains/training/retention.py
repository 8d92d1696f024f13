"""Keeping general knowledge while training: how the adapter is held to the base, and watched.

Beside the domain rows of a step a few general texts are read. ``kl`` adds KL(base ‖ adapter) on
them to the loss, ``replay`` their own nats, as rows among rows; ``both`` adds both; neither costs
labels. ``scale`` trains plainly and chooses how much of the adapter's effect to keep afterwards.
The base is asked once: what it says is kept over the epochs (``Reference``). Apart from those
texts there are others on which every epoch is watched, and by them a checkpoint is chosen.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.data.tokenization import EncodedExample
from lora_domains.domain import Domain
from lora_domains.inference.batches import Progress, in_batches
from lora_domains.inference.likelihoods import tail_logits
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import IGNORED, Batch, collate

REFERENCE_BYTES = 2**28
"""For what the base says of general texts; where its whole vocabulary needs more, the top is kept.
"""
SCALES = (0.8, 0.6, 0.4, 0.2)
"""Shares of an adapter's effect that are tried where all of it costs too much general knowledge."""
AUTO = ("replay", "kl")
"""Methods chosen by `auto`: replay when general text resembles the pretraining data, otherwise KL.
(``benchmarks/training/retention.py``)"""


@dataclass(frozen=True)
class Keeping:
    """How a run keeps general knowledge, once decided: weights of the terms, texts of a step."""

    method: str
    kl: float = 0.0
    """Weight of KL per token."""
    replay: float = 0.0
    """Weight of the texts' own nats per token: their rows for each row of the domain."""
    rows: int = 0
    reason: str = ""


def decide(domain: Domain, texts: int, familiar: bool, batch: int) -> Keeping:
    """The method that ``domain`` asks for, or what auto is, with the reason.

    ``texts`` is how many general texts there are: none where the base has no language head.
    ``familiar`` says whether they are what the base was trained on: the embedded base's own, or
    those that somebody gave for it. ``batch`` is how many rows of the domain a step has.
    """
    settings = domain.training
    auto = settings.retention == "auto"
    method = AUTO[0 if familiar else 1] if auto else settings.retention
    if not texts:
        said = "the base has no language head, so nothing holds the adapter to it"
        return Keeping("none", reason=f"retention none: {said}")
    kl = settings.kl if method in ("kl", "both") else 0.0
    count = batch * settings.replay / (1 - settings.replay)
    replayed = max(1, round(count)) if method in ("replay", "both") else 0
    rows = max(settings.general_rows if kl else 0, replayed)
    what = {
        "kl": f"KL to the base, weight {kl:g}, on {rows} general texts a step",
        "replay": f"{rows} general texts a step beside {batch} rows",
        "both": f"{rows} general texts a step, learned again and held to the base by KL {kl:g}",
        "scale": "trained plainly; validation chooses the adapter's scale afterwards",
        "none": "as asked; general knowledge is watched and not kept",
    }[method]
    why = ""
    if auto and familiar:
        why = "auto: best of those compared in benchmarks/training/retention.py; "
    elif auto:
        why = "auto: the embedded world's text would teach this base, so it is only compared on " \
            "it (--general FILE gives your own); "  # fmt: skip
    return Keeping(method, kl, replayed / batch, rows, f"retention {method}: {why}{what}")


def general_rows(count: int, batch: int, seed: int, step: int) -> list[int]:
    """Positions of ``batch`` of ``count`` texts for a step: a pure function of its arguments.

    Every text comes once before any comes again.
    """
    batch = min(batch, count)
    first = step * batch
    found: list[int] = []
    for turn in range(first // count, (first + batch - 1) // count + 1):
        order = np.random.default_rng([seed, turn, count]).permutation(count)
        start, end = (min(max(at - turn * count, 0), count) for at in (first, first + batch))
        found += order[start:end].tolist()
    return found


class Reference:
    """What the base says of general texts: log-probabilities of each of their tokens, kept.

    They are computed once, before anything is trained, in batches that depend on the texts alone:
    a resumed run computes the same. Where the vocabulary is too large to be kept whole
    (``most_bytes``), the ``top`` likeliest tokens of each place are, and the rest counts as one
    token: KL over these never exceeds KL over all (the log-sum inequality; Cover & Thomas 2006,
    theorem 2.7.1), and ``left`` is the share of probability in that rest.
    """

    def __init__(
        self, bank: Bank, items: Sequence[EncodedExample], *, most_bytes: int = REFERENCE_BYTES,
        progress: Progress = lambda _: None,
    ) -> None:  # fmt: skip
        self.bank, self.items = bank, items
        self.pad = bank.base.tokenizer.pad_token_id
        vocabulary = bank.base.model.config.get_text_config().vocab_size
        tokens = max(1, sum(len(item.answer) for item in items))
        whole = 4 * tokens * vocabulary <= most_bytes
        # A token that is kept takes four bytes for its number and four for its log-probability.
        self.top = None if whole else max(1, min(most_bytes // (8 * tokens), vocabulary - 1))
        self._kept: dict[str, tuple[Tensor, Tensor | None]] = {}
        self.nats: dict[str, float] = {}
        model = bank.base.model

        def read(part: list[EncodedExample]) -> list[tuple[Tensor, Tensor | None, float]]:
            batch = collate(part, self.pad, model.device)
            logp = F.log_softmax(tail_logits(model, batch)[_here(batch)].float(), dim=-1)
            nats = -logp.gather(1, _asked(batch)[:, None])[:, 0].double()
            numbers = None
            if self.top is not None:
                logp, found = logp.topk(self.top)
                numbers = found.int().cpu()
            lengths = [len(item.answer) for item in part]
            split = zip(
                logp.cpu().split_with_sizes(lengths),
                numbers.split_with_sizes(lengths) if numbers is not None else [None] * len(part),
                nats.split_with_sizes(lengths),
                strict=True,
            )
            return [(p.clone(), n, float(loss.sum())) for p, n, loss in split]

        with torch.no_grad(), bank.routed(None):
            found = in_batches(model, items, read, progress)
        for item, (logp, numbers, nats) in zip(items, found, strict=True):
            self._kept[item.id], self.nats[item.id] = (logp, numbers), nats

    @property
    def left(self) -> float:
        """Mean probability outside of what is kept; 0 where all of it is."""
        if self.top is None:
            return 0.0
        kept = torch.cat([logp.exp().sum(-1) for logp, _ in self._kept.values()])
        return float((1 - kept.double()).clamp(min=0).mean())

    def error(self) -> str | None:
        """How KL over this is wrong, in words; None where all tokens are kept."""
        if self.top is None:
            return None
        return (
            f"KL over the {self.top} likeliest tokens and the rest as one: too low by what is in "
            f"that rest, {self.left:.2%} of the base's probability"
        )

    def moved(self, items: Sequence[EncodedExample], adapter: str) -> tuple[Tensor, Tensor]:
        """KL(base ‖ adapter) and the adapter's nats at each token of ``items``, with gradient.

        Two (tokens,) tensors, the tokens of each item in order.
        """
        model = self.bank.base.model
        batch = collate(items, self.pad, model.device)
        with self.bank.routed(adapter):
            logp = F.log_softmax(tail_logits(model, batch)[_here(batch)].float(), dim=-1)
        nats = -logp.gather(1, _asked(batch)[:, None])[:, 0]
        base = torch.cat([self._kept[item.id][0] for item in items]).to(model.device)
        if self.top is not None:
            numbers = torch.cat([_known(self._kept[item.id][1]) for item in items])
            kept = logp.gather(1, numbers.to(model.device, torch.long))
            base, logp = (torch.cat([part, _rest(part)], dim=1) for part in (base, kept))
        kl = F.kl_div(logp, base, log_target=True, reduction="none").sum(-1)
        return kl, nats

    @torch.no_grad()
    def watch(self, adapter: str, progress: Progress = lambda _: None) -> dict[str, float]:
        """``general_nats`` (per token) of the adapter, their ``general_rise`` over the base's, and
        ``general_kl`` from it, over all the texts."""

        def read(part: list[EncodedExample]) -> list[tuple[float, float]]:
            lengths = [len(item.answer) for item in part]
            kl, nats = (
                found.double().split_with_sizes(lengths) for found in self.moved(part, adapter)
            )
            return [(float(k.sum()), float(n.sum())) for k, n in zip(kl, nats, strict=True)]

        found = in_batches(self.bank.base.model, self.items, read, progress)
        tokens = sum(len(item.answer) for item in self.items)
        kl, nats = (math.fsum(column) / tokens for column in zip(*found, strict=True))
        base = math.fsum(self.nats[item.id] for item in self.items) / tokens
        return {"general_nats": nats, "general_rise": nats - base, "general_kl": kl}


def _here(batch: Batch) -> Tensor:
    return batch.labels != IGNORED


def _asked(batch: Batch) -> Tensor:
    return batch.labels[_here(batch)]


def _known(numbers: Tensor | None) -> Tensor:
    assert numbers is not None
    return numbers


def _rest(logp: Tensor) -> Tensor:
    """Log of the probability that ``logp`` (tokens, kept) leaves to all others, (tokens, 1)."""
    return (1 - logp.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()


def keeps(record: dict[str, Any], limit: float) -> bool:
    """Whether an epoch's record stays within the drift gate's limit; so does one not watched."""
    found: float = record.get("general_kl", 0.0)
    return found <= limit


def choose_scale(
    judged: Callable[[float], dict[str, Any]], rank: Callable[[dict[str, Any]], Any]
) -> dict[str, Any]:
    """The best by ``rank`` of what ``judged`` says of each of ``SCALES``, with its ``scale``."""
    records = [{**judged(scale), "scale": scale} for scale in SCALES]
    return max(records, key=rank)
