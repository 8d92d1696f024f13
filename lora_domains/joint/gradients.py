"""The gradients of one step of several runs, whose rows share passes through the frozen base.

Each row is routed to the adapter of its run, and its loss is relative to the batch of its own run,
so that the gradients are those of separate steps up to rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from lora_domains.distributed import ran_out
from lora_domains.inference.batches import micro_batches
from lora_domains.inference.likelihoods import TextOutput, text_output
from lora_domains.inference.memory import PassCost, pass_limit, recomputing, release
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import features
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.gradients import ATTENTION, Gradients, give_back

Loss = Callable[[Sequence[EncodedExample], TextOutput | None, Tensor | None], Tensor]
"""Of rows and what the model gives for them: the text's output, or features for a head."""


class Batch(NamedTuple):
    """The rows of one step of a run."""

    gradients: Gradients
    rows: Sequence[EncodedExample]


class Reading(NamedTuple):
    """How rows are read. Those that are read alike share passes."""

    general: bool
    """Whether they are general texts, of which every token is predicted."""
    pooling: str | None
    """What a head reads of them; None where tokens are predicted."""


@dataclass(frozen=True, eq=False)
class Share:
    """What this process computes for one run: rows that are read alike."""

    run: int
    adapter: str
    reading: Reading
    rows: Sequence[EncodedExample]
    loss: Loss
    total: int
    """What the loss is divided by."""


class Row(NamedTuple):
    """A row of a pass."""

    share: Share
    example: EncodedExample

    @property
    def answer(self) -> tuple[int, ...]:
        return self.example.answer

    def __len__(self) -> int:
        return len(self.example)


class JointGradients:
    """Computes the gradients of steps that several runs take together."""

    def __init__(self, bank: Bank) -> None:
        self.bank, self.model, self.pad = bank, bank.base.model, bank.base.pad

    def compute(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Leave this process's share of the gradients in ``grad``; the nats of each run's rows.

        A single run computes its own, as in a fit of its own. When memory runs out, everything is
        computed again in passes of half the size. Raises OutOfMemory when a single row does not
        fit.
        """
        if len(batches) == 1:
            ((gradients, rows),) = batches
            return [gradients.compute(rows, gradients.units(rows))]
        shares, compared = self._shares(batches)
        while True:
            passes = list(self._passes(shares, batches))
            try:
                for gradients, _ in batches:
                    for parameter in gradients.parameters:
                        parameter.grad = None
                torch.manual_seed(_seed(batches))
                again = any(g.domain.training.gradient_checkpointing for g, _ in batches)
                with sdpa_kernel(ATTENTION), recomputing(self.model) if again else nullcontext():
                    nats = torch.zeros(len(batches), device=self.model.device)
                    for one in passes:
                        self._run(one, nats)
                        give_back(one, _cost(one[0].share.reading, batches), self.model)
                return [compared.get(run, nats[run]) for run in range(len(batches))]
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                message = str(error).splitlines()[0]
            # Outside of `except`, so that the failed pass and its tensors are freed.
            self._halve(passes, batches, message)

    def _shares(self, batches: Sequence[Batch]) -> tuple[list[Share], dict[int, Tensor]]:
        """What this process computes, and the losses of runs that compare answers."""
        shares, compared, offset = [], {}, 0
        for run, (gradients, rows) in enumerate(batches):
            texts, total = gradients.texts(), gradients.units(rows)
            # Rows go round the processes, or one of them would take all batches of one row.
            first = (gradients.rank - offset) % gradients.ranks
            own, own_texts = rows[first :: gradients.ranks], texts[first :: gradients.ranks]
            offset += len(rows)
            if gradients.pairs is not None:
                own, compared[run] = gradients.pairs.weighted(own)
            pooling = None if gradients.head is None else gradients.head.layout.pooling
            adapter = gradients.adapter
            reading = Reading(False, pooling)
            shares.append(Share(run, adapter, reading, own, gradients.loss, total))
            if texts:
                tokens = sum(len(text.answer) for text in texts)
                reading = Reading(True, None)
                loss = gradients.general_loss
                shares.append(Share(run, adapter, reading, own_texts, loss, tokens))
        return shares, compared

    def _passes(self, shares: Sequence[Share], batches: Sequence[Batch]) -> Iterator[list[Row]]:
        """The rows of each pass, those of a run side by side."""
        device, vocabulary = self.model.device, self.bank.base.vocabulary
        sizes = [gradients.state.micro for gradients, _ in batches]
        most = min((size for size in sizes if size is not None), default=None)
        for reading in dict.fromkeys(share.reading for share in shares):
            rows = [Row(s, row) for s in shares if s.reading == reading for row in s.rows]
            cost, limit = _cost(reading, batches), pass_limit(self.model)
            for part in micro_batches(rows, device, most, vocabulary, cost, limit):
                yield sorted(part, key=lambda row: row.share.run)

    def _run(self, rows: Sequence[Row], nats: Tensor) -> None:
        """One pass forward and backward; adds the nats of each run's rows to ``nats``."""
        reading, examples = rows[0].share.reading, [row.example for row in rows]
        with self.bank.routed([row.share.adapter for row in rows]):
            text = states = None
            if reading.pooling is None:
                text = text_output(self.model, examples, self.pad)
            else:
                states = features(self.model, examples, self.pad, reading.pooling)
            losses, start = [], 0
            for share in dict.fromkeys(row.share for row in rows):
                own = [row.example for row in rows if row.share is share]
                part = slice(start, start + len(own))
                loss = share.loss(own, _part(text, part), None if states is None else states[part])
                losses.append(loss / share.total)
                if not reading.general:
                    nats[share.run] += loss.detach()
                start += len(own)
            torch.autograd.backward(torch.stack(losses).sum())

    def _halve(
        self, passes: Sequence[Sequence[Row]], batches: Sequence[Batch], message: str
    ) -> None:
        longest = max((row for part in passes for row in part), key=len)
        one = batches[longest.share.run].gradients  # an error names its domain
        one.halve([[row.example for row in part] for part in passes], message)
        for gradients, _ in batches:
            gradients.state.micro = one.state.micro
        release(self.model.device)


def _part(text: TextOutput | None, rows: slice) -> TextOutput | None:
    return None if text is None else (text[0].part(rows), text[1][rows])


def _cost(reading: Reading, batches: Sequence[Batch]) -> PassCost | None:
    """At least the cost of rows of every run that are read so; None on accelerators."""
    costs = [g.general_cost if reading.general else g.cost for g, _ in batches]
    known = [cost for cost in costs if cost is not None]
    if not known:
        return None
    fields = zip(*((c.fixed, c.token, c.pair, c.logit) for c in known), strict=True)
    return PassCost(*map(max, fields))


def _seed(batches: Sequence[Batch]) -> int:
    """What dropout depends on: seed and step of every run, and the process."""
    of_runs = [(g.domain.training.seed, g.state.total_steps) for g, _ in batches]
    process = batches[0].gradients.rank, batches[0].gradients.ranks
    sequence = np.random.SeedSequence([number for pair in (*of_runs, process) for number in pair])
    return int(sequence.generate_state(1, np.uint64)[0])
