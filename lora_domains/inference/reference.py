"""What the base predicts on general texts, computed once, and how far an adapter moves from it."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.inference.batches import Progress, in_batches, no_progress
from lora_domains.inference.likelihoods import tail_logits
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import IGNORED, Batch, collate
from lora_domains.tokenization.encoded import EncodedExample

REFERENCE_BYTES = 2**28
"""Memory for the stored log-probabilities; a vocabulary too large for it is cut to its top tokens.
"""


class Reference:
    """The base's log-probabilities at each token of some texts.

    They are computed once, before training, in batches that depend on the texts only, so that a
    resumed run computes the same values. Where the whole vocabulary does not fit into
    ``most_bytes``, the ``top`` most likely tokens of each position are stored and all others count
    as one token. KL over these never exceeds KL over the whole vocabulary (log-sum inequality;
    Cover & Thomas 2006, theorem 2.7.1).
    """

    def __init__(
        self, bank: Bank, texts: Sequence[EncodedExample], *, most_bytes: int = REFERENCE_BYTES,
        progress: Progress = no_progress,
    ) -> None:  # fmt: skip
        self.bank, self.texts = bank, texts
        self.pad = bank.base.pad
        vocabulary = bank.base.vocabulary
        tokens = max(1, sum(len(text.answer) for text in texts))
        fits = 4 * tokens * vocabulary <= most_bytes
        # A stored token takes four bytes for its id and four for its log-probability.
        self.top = None if fits else max(1, min(most_bytes // (8 * tokens), vocabulary - 1))
        self._logprobs: dict[str, Tensor] = {}  # by text: (tokens, vocabulary or top)
        self._ids: dict[str, Tensor] = {}  # where cut to the top: (tokens, top)
        self._nats: dict[str, float] = {}
        with torch.no_grad(), bank.routed(None):
            rows = in_batches(bank.base.model, texts, self._read, progress)
        for text, (logprobs, ids, nats) in zip(texts, rows, strict=True):
            self._logprobs[text.id], self._nats[text.id] = logprobs, nats
            if ids is not None:
                self._ids[text.id] = ids

    def _read(self, part: list[EncodedExample]) -> list[tuple[Tensor, Tensor | None, float]]:
        """For each text: log-probabilities to store, their token ids if cut, nats in total."""
        logprobs, nats = self._predictions(part)
        ids = None
        if self.top is not None:
            logprobs, top = logprobs.topk(self.top)
            ids = top.int().cpu()
        lengths = [len(text.answer) for text in part]
        columns = zip(
            logprobs.cpu().split_with_sizes(lengths),
            ids.split_with_sizes(lengths) if ids is not None else [None] * len(part),
            nats.double().split_with_sizes(lengths),
            strict=True,
        )
        return [(rows.clone(), top_ids, float(nats.sum())) for rows, top_ids, nats in columns]

    def _predictions(self, part: Sequence[EncodedExample]) -> tuple[Tensor, Tensor]:
        """Log-probabilities (tokens, vocabulary) and nats (tokens,) under the current route."""
        model = self.bank.base.model
        batch = collate(part, self.pad, model.device)
        supervised = _supervised(batch)
        logprobs = F.log_softmax(tail_logits(model, batch)[supervised].float(), dim=-1)
        return logprobs, -logprobs.gather(1, batch.labels[supervised][:, None])[:, 0]

    @property
    def omitted(self) -> float:
        """Mean probability of the tokens that are not stored; 0 where all are."""
        if self.top is None:
            return 0.0
        stored = torch.cat([logprobs.exp().sum(-1) for logprobs in self._logprobs.values()])
        return float((1 - stored.double()).clamp(min=0).mean())

    def approximation(self) -> str | None:
        """How KL over this reference is approximate, in words; None where it is exact."""
        if self.top is None:
            return None
        return (
            f"KL over the {self.top} most likely tokens, with all others as one: an underestimate, "
            f"since the others hold {self.omitted:.2%} of the base's probability"
        )

    def kl_and_nats(self, texts: Sequence[EncodedExample], adapter: str) -> tuple[Tensor, Tensor]:
        """KL(base ‖ adapter) and the adapter's nats at each token of ``texts``, with gradient.

        Two (tokens,) tensors, the tokens of each text in order.
        """
        with self.bank.routed(adapter):
            logprobs, nats = self._predictions(texts)
        base = torch.cat([self._logprobs[text.id] for text in texts]).to(logprobs.device)
        if self.top is not None:
            ids = torch.cat([self._ids[text.id] for text in texts])
            stored = logprobs.gather(1, ids.to(logprobs.device, torch.long))
            base, logprobs = (torch.cat([part, _others(part)], dim=1) for part in (base, stored))
        kl = F.kl_div(logprobs, base, log_target=True, reduction="none").sum(-1)
        return kl, nats

    @torch.no_grad()
    def compare(self, adapter: str, progress: Progress = no_progress) -> dict[str, float]:
        """Means per token over all texts: the adapter's ``general_nats``, their ``general_rise``
        over the base's, and ``general_kl`` from the base."""

        def read(part: list[EncodedExample]) -> list[tuple[float, float]]:
            lengths = [len(text.answer) for text in part]
            kl, nats = (
                column.double().split_with_sizes(lengths)
                for column in self.kl_and_nats(part, adapter)
            )
            return [(float(k.sum()), float(n.sum())) for k, n in zip(kl, nats, strict=True)]

        rows = in_batches(self.bank.base.model, self.texts, read, progress)
        tokens = sum(len(text.answer) for text in self.texts)
        kl, nats = (math.fsum(column) / tokens for column in zip(*rows, strict=True))
        base = math.fsum(self._nats[text.id] for text in self.texts) / tokens
        return {"general_nats": nats, "general_rise": nats - base, "general_kl": kl}


def _supervised(batch: Batch) -> Tensor:
    return batch.labels != IGNORED


def _others(logprobs: Tensor) -> Tensor:
    """Log of the probability that ``logprobs`` (tokens, top) leave to all others, (tokens, 1)."""
    return (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()
