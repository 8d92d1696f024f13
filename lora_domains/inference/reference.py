"""What the base predicts on general texts, and on pairs of answers, computed once before training;
and how far an adapter moves from it.

Predictions on text that is no user's are shared by runs (``cache``)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lora_domains import distributed
from lora_domains.distributed import sharing
from lora_domains.inference.batches import Progress, in_batches, no_progress
from lora_domains.inference.cache import (
    cache_path,
    circumstances,
    keep_tensors,
    keeps,
    read_tensors,
)
from lora_domains.inference.likelihoods import (
    TextOutput,
    answer_nll,
    choice_logprobs,
    text_output,
    training_output,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import IGNORED, Batch
from lora_domains.tokenization.encoded import EncodedExample

COMPUTES = ("inference", "modeling")
"""The rooms of the package whose code decides what is predicted."""
REFERENCE_BYTES = 2**28
"""Memory for the stored log-probabilities; a vocabulary too large for it is cut to its top tokens.
"""


class Prediction(NamedTuple):
    """What the base predicts at each token of a text."""

    logprobs: Tensor
    """(tokens, vocabulary), or of the most likely tokens only (tokens, top)."""
    ids: Tensor | None
    """Which tokens those are (tokens, top); None where all are stored."""
    nats: Tensor
    """Of the text's own tokens, (tokens,) in double precision."""

    def first(self, tokens: int) -> "Prediction":
        """That of the first ``tokens`` of the text."""
        ids = None if self.ids is None else self.ids[:tokens]
        return Prediction(self.logprobs[:tokens], ids, self.nats[:tokens])


class Reference:
    """The base's log-probabilities at each token of some texts.

    They are computed once, before training, in batches that depend on the texts only, so that a
    resumed run computes the same values; those ``stored`` by the texts' ids are taken as they are,
    if they are given. ``public`` texts are no user's: the next run reads what this one computed.
    Where the whole vocabulary does not fit into
    ``cache_limit``, the ``top`` most likely tokens of each position are stored and all others count
    as one token. KL over these never exceeds KL over the whole vocabulary (log-sum inequality;
    Cover & Thomas 2006, theorem 2.7.1).
    """

    def __init__(
        self, bank: Bank, texts: Sequence[EncodedExample], *, cache_limit: int = REFERENCE_BYTES,
        progress: Progress = no_progress, stored: Mapping[str, Prediction] | None = None,
        public: bool = False,
    ) -> None:  # fmt: skip
        self.bank, self.texts = bank, texts
        self.refused: str | None = None
        """Why the predictions could not be kept for the next run, where they could not."""
        vocabulary = bank.base.vocabulary
        tokens = max(1, sum(len(text.answer) for text in texts))
        fits = 4 * tokens * vocabulary <= cache_limit
        # A stored token takes four bytes for its id and four for its log-probability.
        top = None if fits else max(1, min(cache_limit // (8 * tokens), vocabulary - 1))
        if stored is None:
            path = predictions_path(bank.base, texts, top) if public and keeps(bank.base) else None
            stored = None if path is None else read_predictions(path, texts)
            if stored is None:
                with bank.routed(None):
                    stored = base_predictions(bank.base, texts, top, progress)
                if path is not None and distributed.is_main():
                    self.refused = keep_tensors(path, packed([stored[text.id] for text in texts]))
        self._base = {text.id: stored[text.id].first(len(text.answer)) for text in texts}

    @property
    def top(self) -> int | None:
        """How many tokens of each position are stored; None where all are."""
        ids = [prediction.ids for prediction in self._base.values()]
        return ids[0].shape[1] if ids and ids[0] is not None else None

    @property
    def omitted(self) -> float:
        """Mean probability of the tokens that are not stored; 0 where all are."""
        if self.top is None:
            return 0.0
        stored = torch.cat([one.logprobs.exp().sum(-1) for one in self._base.values()])
        return float((1 - stored.double()).clamp(min=0).mean())

    def approximation(self) -> str | None:
        """How KL over this reference is approximate, in words; None where it is exact."""
        if self.top is None:
            return None
        return (
            f"KL over the {self.top} most likely tokens, with the others taken as one: an "
            f"underestimate, since they hold {100 * self.omitted:.2f} % of the base's probability"
        )

    def kl_and_nats(
        self, texts: Sequence[EncodedExample], adapter: str | None,
        output: TextOutput | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """KL(base ‖ adapter) and the adapter's nats at each token of ``texts``, with gradient.

        Two (tokens,) tensors, the tokens of each text in order. ``output`` is the adapter's
        ``text_output``, if it has read the texts before.
        """
        if output is None:
            with self.bank.routed(adapter):
                output = text_output(self.bank.base.model, texts, self.bank.base.pad)
        logprobs, nats = _predictions(*output)
        of_base = [self._base[text.id] for text in texts]
        base = torch.cat([one.logprobs for one in of_base]).to(logprobs.device)
        ids = [one.ids for one in of_base if one.ids is not None]
        if ids:
            stored = logprobs.gather(1, torch.cat(ids).to(logprobs.device, torch.long))
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
                column.cpu().double().split_with_sizes(lengths)
                for column in self.kl_and_nats(part, adapter)
            )
            return [(float(k.sum()), float(n.sum())) for k, n in zip(kl, nats, strict=True)]

        rows = in_batches(self.bank.base.model, self.texts, read, progress)
        tokens = sum(len(text.answer) for text in self.texts)
        kl, nats = (math.fsum(column) / tokens for column in zip(*rows, strict=True))
        base = math.fsum(float(self._base[text.id].nats.sum()) for text in self.texts) / tokens
        return {"general_nats": nats, "general_rise": nats - base, "general_kl": kl}


@torch.no_grad()
def base_predictions(
    base: Base, texts: Sequence[EncodedExample], top: int | None, progress: Progress = no_progress
) -> dict[str, Prediction]:
    """What is predicted at each token of ``texts`` under the current route, by the texts' ids;
    the ``top`` most likely tokens, or all."""

    def read(part: list[EncodedExample]) -> list[Prediction]:
        logprobs, nats = _predictions(*text_output(base.model, part, base.pad))
        ids = None
        if top is not None:
            logprobs, likely = logprobs.topk(top)
            ids = likely.int().cpu()
        lengths = [len(text.answer) for text in part]
        columns = zip(
            logprobs.cpu().split_with_sizes(lengths),
            ids.split_with_sizes(lengths) if ids is not None else [None] * len(part),
            nats.cpu().double().split_with_sizes(lengths),
            strict=True,
        )
        # Copies: a part of a tensor is sent to other processes with the whole of it.
        return [
            Prediction(rows.clone(), None if likely is None else likely.clone(), nats.clone())
            for rows, likely, nats in columns
        ]

    rows = in_batches(base.model, texts, read, progress)
    return {text.id: row for text, row in zip(texts, rows, strict=True)}


# ── In a file ───────────────────────────────────────────────────────────────────────────────────


def predictions_path(base: Base, texts: Sequence[EncodedExample], top: int | None) -> Path:
    """The file of what ``base`` predicts on ``texts``."""
    return cache_path("predictions", {**_decides(base, texts), "top": top})


def _decides(base: Base, texts: Sequence[EncodedExample]) -> dict[str, Any]:
    """All that decides what ``base`` makes of ``texts``."""
    tokens = sha256()
    for text in texts:
        parts = (text.prompt, text.answer, text.choices, text.unsupervised, text.masked)
        tokens.update(repr(parts).encode())
    return {**circumstances(base), "texts": tokens.hexdigest(), "code": _code()}


@cache
def _code() -> str:
    """sha256 of the code of ``COMPUTES``."""
    digest = sha256()
    for room in COMPUTES:
        for path in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            digest.update(f"{room}/{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def packed(predictions: Sequence[Prediction]) -> dict[str, Tensor]:
    """The tensors of a file, those of all texts behind each other."""
    ids = [one.ids for one in predictions if one.ids is not None]
    return {
        "logprobs": torch.cat([one.logprobs for one in predictions]),
        **({"top": torch.cat(ids)} if ids else {}),
        "nats": torch.cat([one.nats for one in predictions]),
    }


def unpacked(
    tensors: Mapping[str, Tensor], lengths: Mapping[str, int], copied: bool = False
) -> dict[str, Prediction]:
    """The predictions of ``packed`` by the ids of the texts, whose tokens are ``lengths``."""

    def parts(name: str) -> Iterator[Tensor]:
        for part in tensors[name].split_with_sizes([*lengths.values()]):
            yield part.clone() if copied else part

    ids = parts("top") if "top" in tensors else repeat(None)
    columns = zip(lengths, parts("logprobs"), ids, parts("nats"), strict=False)
    return {name: Prediction(logprobs, top, nats) for name, logprobs, top, nats in columns}


def read_predictions(path: Path, texts: Sequence[EncodedExample]) -> dict[str, Prediction] | None:
    """Those of a file, which stay on the disk until they are used; None where there is none."""
    tensors = read_tensors(path)
    if tensors is None:
        return None
    return unpacked(tensors, {text.id: len(text.answer) for text in texts})


def _predictions(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (tokens, vocabulary) and nats (tokens,) of the supervised tokens."""
    supervised = batch.labels != IGNORED
    logprobs = F.log_softmax(logits[supervised].float(), dim=-1)
    return logprobs, -logprobs.gather(1, batch.labels[supervised][:, None])[:, 0]


def _others(logprobs: Tensor) -> Tensor:
    """Log of the probability that ``logprobs`` (tokens, top) leave to all others, (tokens, 1)."""
    return (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=1e-6).log()


# ── Pairs of answers ────────────────────────────────────────────────────────────────────────────


class Pairs:
    """The base as the reference of direct preference optimisation (Rafailov et al. 2023, arXiv
    2305.18290) of an adapter.

    With x, how much more the adapter prefers the chosen of two answers than the base does, in nats,
    the loss of a pair is -log sigmoid(beta x) (equation 7). Its gradient is that of the nats of the
    chosen answer, minus that of the rejected one, times beta sigmoid(-beta x).
    """

    shares = True
    """Whether runs on the same pairs share the base's log-odds (``cache``)."""

    def __init__(self, bank: Bank, adapter: str, beta: float) -> None:
        self.bank, self.adapter, self.beta = bank, adapter, beta
        self.margins: dict[str, float] = {}
        """The base's log-odds of the chosen answer, by the id of its row."""
        self._weights: dict[str, float] = {}

    def read(self, rows: Sequence[EncodedExample], progress: Progress = no_progress) -> None:
        """Compute the base's log-odds of ``rows``: all at once, so that a resumed run has the same.

        The processes share the rows.
        """
        base = self.bank.base
        path = cache_path("pairs", _decides(base, rows)) if self.shares and keeps(base) else None
        stored = read_tensors(path) if path is not None and distributed.is_main() else None
        margins = distributed.same_everywhere(stored["margins"].tolist() if stored else None)
        if margins is None:
            with sharing():
                margins = self._log_odds(rows, None, progress).tolist()
            if path is not None and distributed.is_main():
                keep_tensors(path, {"margins": torch.tensor(margins, dtype=torch.double)})
        self.margins = dict(zip((row.id for row in rows), margins, strict=True))

    def moved(
        self, rows: Sequence[EncodedExample], progress: Progress = no_progress
    ) -> NDArray[np.float64]:
        """x of each row, by the adapter as it is."""
        before = np.array([self.margins[row.id] for row in rows])
        moved: NDArray[np.float64] = self._log_odds(rows, self.adapter, progress) - before
        return moved

    def losses(self, moved: NDArray[np.float64]) -> NDArray[np.float64]:
        """The loss of each pair, from x."""
        losses: NDArray[np.float64] = np.logaddexp(0.0, -self.beta * moved)
        return losses

    def weighted(self, rows: Sequence[EncodedExample]) -> tuple[list[EncodedExample], Tensor]:
        """Both answers of each row, which ``loss`` weighs, and the loss summed over the rows.

        x is computed without dropout.
        """
        with self.bank.without_dropout(self.adapter):
            moved = self.moved(rows)
        pulls = self.beta * np.exp(-np.logaddexp(0.0, self.beta * moved))
        both: list[EncodedExample] = []
        self._weights = {}
        for row, pull in zip(rows, pulls.tolist(), strict=True):
            for number, answer in enumerate(row.choices):
                name = f"{row.id}/answer {number}"
                both.append(EncodedExample(name, row.prompt, answer))
                self._weights[name] = -pull if number else pull
        device = self.bank.base.model.device
        return both, torch.tensor(float(self.losses(moved).sum()), device=device)

    def loss(self, answers: Sequence[EncodedExample], output: TextOutput | None = None) -> Tensor:
        """The weighted nats of ``answers``, whose gradient is that of the loss of their pairs;
        ``output`` is that of ``text_output``, if they were read before."""
        base = self.bank.base
        batch, logits = output or training_output(base.model, answers, base.pad)
        nats = answer_nll(logits, batch).sum(1)
        weights = [self._weights.get(one.id, 1.0) for one in answers]
        return nats @ torch.tensor(weights, dtype=nats.dtype, device=nats.device)

    def _log_odds(
        self, rows: Sequence[EncodedExample], route: str | None, progress: Progress = no_progress
    ) -> NDArray[np.float64]:
        """By how many nats the first of two choices is the more likely one, (rows,)."""
        with self.bank.routed(route):
            scored = choice_logprobs(self.bank.base.model, rows, self.bank.base.pad, progress)
        return np.array([row[0] - row[1] for row in scored])
