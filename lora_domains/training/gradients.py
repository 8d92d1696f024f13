"""The gradients of one step: this process's share, in micro-batches that fit, summed over all.

How a batch is cut into passes and shared by processes changes rounding and nothing else: each
row's loss is over the tokens of the whole batch from the start.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.data.tokenization import EncodedExample
from lora_domains.domain import Domain
from lora_domains.errors import OutOfMemory
from lora_domains.inference.choice_tree import LOGITS
from lora_domains.inference.likelihoods import answer_nll, tail_logits
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import collate
from lora_domains.modeling.heads import Head, label_nats
from lora_domains.modeling.memory import ran_out, release
from lora_domains.training.checkpoints import State
from lora_domains.training.recompute import recomputing
from lora_domains.training.retention import Keeping, Reference, general_rows

MICRO_TOKENS = 16_384
"""Padded tokens in one forward and backward pass, on a CPU; times 4 on an accelerator."""

PASS = {True: 100, False: 1000}
"""What one pass more costs, in tokens, on a CPU and off it: launching it, and reading the weights.
On a CPU measured with the embedded base; on a GPU about what a pass may hold before it is bound by
arithmetic and not by reading weights (Pope et al. 2023, arXiv 2211.05102)."""


class Gradients:
    """What one adapter's steps leave in ``grad``; ``state.micro`` keeps a halved micro-batch."""

    def __init__(
        self,
        bank: Bank,
        slot: str,
        head: Head | None,
        domain: Domain,
        keeping: Keeping,
        general: Sequence[EncodedExample],
        parameters: Sequence[torch.nn.Parameter],
        state: State,
        display: Display,
    ) -> None:
        self.bank, self.head = bank, head
        self.model, self.pad = bank.base.model, bank.base.tokenizer.pad_token_id
        self.slot, self.domain = slot, domain
        self.keeping, self.general = keeping, general
        self.parameters, self.state, self.display = parameters, state, display
        self.rank, self.ranks = distributed.state().process_index, distributed.state().num_processes

    def of(self, items: Sequence[EncodedExample], total: int) -> Tensor:
        """This process's share of the gradients of ``items``; the nats of its rows.

        ``total`` is the supervised tokens of all of them. Where memory runs out, all of the share
        is computed anew in half as large a micro-batch. Raises OutOfMemory where one row does not
        fit.
        """
        own, held = items[self.rank :: self.ranks], self._general_texts()
        mine = held[self.rank :: self.ranks]
        while True:
            try:
                for parameter in self.parameters:
                    parameter.grad = None
                # Dropout is drawn anew from the step and the rank: a step depends on nothing else.
                seed = self.domain.training.seed << 32
                torch.manual_seed(seed + self.state.total_steps * self.ranks + self.rank)
                with self._recomputing():
                    nats = self._of_rows(own, total)
                    self._of_general(mine, sum(len(text.answer) for text in held))
                return nats
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                found = str(error).splitlines()[0]
            # Outside of `except`, so that the failed pass and its tensors are gone.
            self._halve([*self._parts(own), *self._parts(mine)], found)

    def over_ranks(self, nats: Tensor, asked: float) -> tuple[Tensor, float]:
        """Gradients, ``nats`` and ``asked`` summed over the processes."""
        if self.ranks == 1:
            return nats, asked
        for parameter in self.parameters:
            if parameter.grad is None:  # a short batch may leave a process without a row
                parameter.grad = torch.zeros_like(parameter)
        grads = [p.grad.flatten() for p in self.parameters if p.grad is not None]
        flat: Tensor = torch.cat([nats[None], torch.tensor([asked], device=nats.device), *grads])
        flat = reduce(flat, reduction="sum")
        offset = 2
        for parameter in self.parameters:
            size = parameter.numel()
            parameter.grad = flat[offset : offset + size].view_as(parameter).clone()
            offset += size
        return flat[0], float(flat[1])

    def _of_rows(self, items: Sequence[EncodedExample], total: int) -> Tensor:
        nats = torch.zeros((), device=self.model.device)
        with self.bank.routed(self.slot):
            for part in self._parts(items):
                loss = self._loss(part)
                torch.autograd.backward(loss / total)
                nats += loss.detach()
        return nats

    def _loss(self, items: Sequence[EncodedExample]) -> Tensor:
        """Nats summed over what is supervised in ``items``."""
        if self.head is not None:
            return label_nats(self.model, self.head, items, self.pad)
        return self._text_nats(items)

    def _text_nats(self, items: Sequence[EncodedExample]) -> Tensor:
        batch = collate(items, self.pad, self.model.device)
        return answer_nll(tail_logits(self.model, batch), batch).sum()

    def _of_general(self, items: Sequence[EncodedExample], total: int) -> None:
        """Add the gradients of what holds the adapter to the base (see ``retention``)."""
        held = self.keeping
        for part in self._parts(items):
            if held.kl:
                kl, nats = self.reference.moved(part, self.slot)
                loss = held.kl * kl.sum() + held.replay * nats.sum()
            else:
                with self.bank.routed(self.slot):
                    loss = held.replay * self._text_nats(part)
            torch.autograd.backward(loss / total)

    @cached_property
    def reference(self) -> Reference:
        """The base on the general texts, asked when the first step needs it."""
        with self.display.progress("the base on general text", len(self.general)) as advance:
            reference = Reference(self.bank, self.general, progress=advance)
        if error := reference.error():
            self.display.stage("retention", None, None, f"trained by {error}")
        return reference

    def _general_texts(self) -> list[EncodedExample]:
        """This step's general texts, of which every process takes its share."""
        if not self.keeping.rows:
            return []
        seed, step = self.domain.training.seed, self.state.total_steps
        rows = general_rows(len(self.general), self.keeping.rows, seed, step)
        return [self.general[i] for i in rows]

    def _recomputing(self) -> Any:
        on = self.domain.training.gradient_checkpointing
        return recomputing(self.model) if on else nullcontext()

    def _parts(self, items: Sequence[EncodedExample]) -> Iterator[Sequence[EncodedExample]]:
        vocabulary = self.model.config.get_text_config().vocab_size
        return micro_batches(items, self.model.device, self.state.micro, vocabulary)

    def _halve(self, parts: Sequence[Sequence[EncodedExample]], found: str) -> None:
        shared = [len(part) * max(map(len, part)) for part in parts if len(part) > 1]
        if not shared:
            longest = max(len(item) for part in parts for item in part)
            raise OutOfMemory(
                where=f"{self.domain.name}, a row of {longest} tokens",
                expected="memory for one row at a time",
                found=found,
                hint="Set a smaller max_length, gradient_checkpointing, or --load-in-4bit.",
            )
        self.state.micro = max(shared) // 2
        release(self.model.device)
        process = f"process {self.rank}: " if self.ranks > 1 else ""
        # Another process says it itself: the first does not know.
        (self.display if self.rank == 0 else Display()).warn(
            f"{process}out of memory: from here on at most {self.state.micro} tokens in one pass; "
            "the batch of a step stays as it is."
        )


def micro_batches(
    items: Sequence[EncodedExample],
    device: torch.device,
    most: int | None = None,
    vocabulary: int = 0,
) -> Iterator[Sequence[EncodedExample]]:
    """``items``, longest first, in passes of at most ``most`` padded tokens (``MICRO_TOKENS``).

    Over a large ``vocabulary`` fewer, where the logits of their answers would pass ``LOGITS``.
    Items of unlike lengths share a pass only where the padding costs less than a pass more would
    (``PASS``): of all divisions the cheapest, by dynamic programming over the sorted lengths.
    """
    on_cpu = device.type == "cpu"
    most = most or MICRO_TOKENS * (1 if on_cpu else 4)
    rows = sorted(items, key=len, reverse=True)
    cost, start = [0], [0]
    for end in range(1, len(rows) + 1):
        options, asked = [], 0
        for begin in range(end - 1, -1, -1):
            padded = len(rows[begin]) * (end - begin)
            asked = max(asked, len(rows[begin].answer))
            large = padded > most or asked * (end - begin) * vocabulary > LOGITS
            if large and begin < end - 1:
                break
            options.append((cost[begin] + padded + PASS[on_cpu], begin))
        best, begin = min(options)
        cost.append(best)
        start.append(begin)
    parts, end = [], len(rows)
    while end:
        parts.append(rows[start[end] : end])
        end = start[end]
    yield from reversed(parts)
