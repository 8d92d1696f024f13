"""The gradients of one step: this process's share, in passes that fit into memory, summed over all.

How a batch is divided into passes and shared by processes changes rounding only: the loss of each
row is relative to the tokens of the whole batch from the start.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_domains import distributed
from lora_domains.console import Clock, Display, format_bytes
from lora_domains.distributed import ran_out
from lora_domains.domain import Domain, Training
from lora_domains.errors import OutOfMemory, UsageError
from lora_domains.inference.batches import micro_batches, trial_examples
from lora_domains.inference.choice_tree import whole_prompts
from lora_domains.inference.likelihoods import TextOutput, text_nats, text_output
from lora_domains.inference.memory import (
    TRIAL,
    PassCost,
    TensorBytes,
    make_room,
    measured_once,
    pass_limit,
    recomputing,
    release,
)
from lora_domains.inference.reference import Pairs
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import Head, head_nats
from lora_domains.modeling.lora import TrainableLora
from lora_domains.placement import recover
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.checkpoints import State
from lora_domains.training.layer_inputs import LayerInputs
from lora_domains.training.retention import GeneralTexts, Retention

Passes = Sequence[Sequence[EncodedExample]]
LARGE_PASS = 2**28
"""Bytes of a pass on a CPU after which freed memory is given back where little is free."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""What may compute attention in training: all kernels but cuDNN's. On Hopper GPUs, where torch
prefers that one for 16 bits from 2.11 on, its gradients are NaN in masked batches of 64, 192, 320 …
tokens where the scores of a query have a logsumexp below -88 (pytorch/pytorch#196678)."""


class Gradients:
    """Computes the gradients of an adapter's steps; ``state.micro`` keeps a halved pass size."""

    inputs: LayerInputs | None = None
    """What the layers below the adapter give for the rows, where they read them once."""

    def __init__(
        self,
        bank: Bank,
        adapter: str,
        head: Head | None,
        domain: Domain,
        retention: Retention,
        general: GeneralTexts,
        parameters: Sequence[torch.nn.Parameter],
        state: State,
        display: Display,
        general_every: int = 1,
        weights: Tensor | None = None,
    ) -> None:
        self.bank, self.adapter, self.head = bank, adapter, head
        self.general_every = general_every
        self.model, self.pad = bank.base.model, bank.base.pad
        self.domain, self.retention, self.general = domain, retention, general
        self.parameters, self.state, self.display = parameters, state, display
        beta = domain.task.beta
        self.pairs = None if beta is None else Pairs(bank, adapter, beta)
        self.weights = weights
        """Of the classes in the loss; None where all rows count alike."""
        self.rank, self.ranks = distributed.state().process_index, distributed.state().num_processes

    def compute(
        self, rows: Sequence[EncodedExample], total: int,
        texts: Sequence[EncodedExample] | None = None,
    ) -> Tensor:  # fmt: skip
        """Leave this process's share of the gradients in ``grad``; returns the nats of its rows.

        ``total`` is the number of supervised tokens of all ``rows``; ``texts`` are general texts,
        by default those of the current step. When memory runs out, the whole share is computed
        again in passes of half the size. Raises OutOfMemory when a single row does not fit.
        """
        step, seed = self.state.total_steps, self.domain.training.seed
        texts = self.texts() if texts is None else texts
        own_rows, own_texts = rows[self.rank :: self.ranks], texts[self.rank :: self.ranks]
        compared = None
        if self.pairs is not None:
            own_rows, compared = self.pairs.weighted(own_rows)
        while True:
            passes = [*self._passes(own_rows, self.cost)]
            general_passes = [*self._passes(own_texts, self.general_cost)] if own_texts else []
            try:
                for parameter in self.parameters:
                    parameter.grad = None
                # Dropout depends on the seed, the step and the rank, and on nothing before.
                torch.manual_seed((seed << 32) + step * self.ranks + self.rank)
                with sdpa_kernel(ATTENTION), self._recomputing():
                    nats = self._domain_gradients(passes, total)
                    self._general_gradients(general_passes, sum(len(t.answer) for t in texts))
                return nats if compared is None else compared
            except RuntimeError as error:
                if not ran_out(error):
                    raise
                message = str(error).splitlines()[0]
            # Outside of `except`, so that the failed pass and its tensors are freed.
            self.halve([*passes, *general_passes], message)

    def read_below(
        self, rows: Sequence[EncodedExample], passes: float,
        general: Sequence[EncodedExample] | None = None,
    ) -> None:  # fmt: skip
        """Let the layers below the adapter read ``rows`` and ``general`` texts, by default all,
        once, for steps that read them in so many ``passes``. A resumed run does as before."""
        if self.inputs is not None:
            return
        self.inputs = LayerInputs(self.bank.base, self.bank.trainable(self.adapter))
        if not self.inputs.first or passes < 2 or self.state.read_below is False:
            return
        if self.pairs is not None:
            rows = [replace(row, answer=answer) for row in rows for answer in row.choices]
        if general is None:
            general = self.general.texts if self.retention.rows else ()
        texts = [self._tokens(row) for row in rows]
        texts += [self._tokens(text, general=True) for text in general]
        layers = f"{self.inputs.first} below the adapter read"
        with self.display.progress(f"layers {layers}", len(set(texts))) as advance:
            refused = self.inputs.read(texts, advance)
        told = f"{layers} each row once: {format_bytes(self.inputs.size)} while the run lasts"
        if refused is not None:
            told = f"{layers} the rows in each epoch: {refused}"
            if self.state.read_below:
                self.display.warn("before, layers below the adapter read each row once: from here "
                                  "on the result is the same up to rounding.")  # fmt: skip
        self.display.stage("layers", None, None, told)
        self.state.read_below = refused is None

    def _tokens(self, row: EncodedExample, general: bool = False) -> tuple[int, ...]:
        """What the model reads of a row."""
        alone = row.masked or (self.head is not None and not general)
        return row.prompt if alone else row.prompt + row.answer

    def _begun(
        self, part: Sequence[EncodedExample], general: bool = False
    ) -> AbstractContextManager[None]:
        """Inside, a pass over ``part`` begins above the layers that read it before."""
        if self.inputs is None:
            return nullcontext()
        return self.inputs.of([self._tokens(row, general) for row in part])

    def units(self, rows: Sequence[EncodedExample]) -> int:
        """What the loss of a step is averaged over: compared pairs, or supervised tokens."""
        return len(rows) if self.pairs is not None else sum(row.supervised for row in rows)

    def texts(self) -> list[EncodedExample]:
        """The general texts of the current step, for all processes."""
        return self.texts_of(self.state.total_steps)

    def texts_of(self, step: int) -> list[EncodedExample]:
        """The general texts of ``step``, counted from the beginning of the run."""
        seed = self.domain.training.seed
        if not self.retention.rows or step % self.general_every:
            return []
        return self.general.of_step(self.retention.rows, seed, step // self.general_every)

    def _domain_gradients(self, passes: Passes, total: int) -> Tensor:
        nats = torch.zeros((), device=self.model.device)
        with self.bank.routed(self.adapter):
            for part in passes:
                with self._begun(part):
                    loss = self.loss(part)
                torch.autograd.backward(loss / total)
                nats += loss.detach()
                give_back(part, self.cost, self.model)
        return nats

    def loss(
        self, rows: Sequence[EncodedExample],
        text: TextOutput | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Nats summed over the supervised tokens, or over the labels of a head.

        ``text``, or with a head ``features``, is what the model gives for ``rows``, if they were
        read before.
        """
        model, pad, task, weights = self.model, self.pad, self.domain.task, self.weights
        if self.head is not None:
            return head_nats(model, self.head, rows, pad, task, weights, features)
        if self.pairs is not None:
            return self.pairs.loss(rows, text)
        return text_nats(model, rows, pad, weights, text)

    def _general_gradients(self, passes: Passes, total: int) -> None:
        for part in passes:
            read = None
            if self.inputs is not None and self.inputs.size:
                with self.bank.routed(self.adapter), self._begun(part, general=True):
                    read = text_output(self.model, part, self.pad)
            torch.autograd.backward(self.general_loss(part, read) / total)

    def general_loss(
        self, texts: Sequence[EncodedExample], text: TextOutput | None = None,
        _features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The loss on general ``texts``; ``text`` is what the model gives for them, if they were
        read before. In every n-th step it counts n times: the mean gradient is as in every step."""
        self.general.output = text
        try:
            return self.general_every * self.retention.loss(self.general, texts)
        finally:
            self.general.output = None

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        if not self.domain.training.gradient_checkpointing:
            yield
            return
        with whole_prompts(), recomputing(self.model):  # keys and values leave the layers
            yield

    def _passes(
        self, rows: Sequence[EncodedExample], cost: PassCost | None
    ) -> Iterator[Sequence[EncodedExample]]:
        vocabulary, limit = self.bank.base.vocabulary, pass_limit(self.model)
        return micro_batches(rows, self.model.device, self.state.micro, vocabulary, cost, limit)

    def repeated(self) -> AbstractContextManager[None]:
        """Inside, layers below the adapter read batches once that are the same each time."""
        return nullcontext() if self.inputs is None else self.inputs.repeated()

    def close(self) -> None:
        """Delete what the layers below the adapter gave."""
        if self.inputs is not None:
            self.inputs.close()
        self.inputs = None

    # ── Memory ──────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def cost(self) -> PassCost | None:
        """The memory of a pass over domain rows, measured on a few tokens; None on accelerators."""
        vocabulary = self.bank.base.vocabulary if self.head is None else 0

        def peak(rows: int, length: int, answer: int) -> int:
            trial = trial_examples(rows, length, answer if vocabulary else 0)
            with self.bank.routed(self.adapter):
                return self._peak(trial, self.loss)

        if self.model.device.type != "cpu":
            return None
        return measured_once(self.model, self._key, partial(PassCost.measured, peak, vocabulary))

    @property
    def _key(self) -> Hashable:
        """What the memory of a pass depends on, beside the base."""
        linears = tuple((n, t.dropout > 0) for n, t in self.bank.trainable(self.adapter).items())
        shapes = tuple(p.shape for p in self.parameters)  # in float32; those of DoRA are among them
        layout = None if self.head is None else self.head.layout
        recomputed = self.domain.training.gradient_checkpointing
        return linears, shapes, layout, self.domain.task.kind, self.weights is None, recomputed

    @cached_property
    def general_cost(self) -> PassCost | None:
        """The memory of a pass over general texts: the same, but for their logits."""
        if not self.retention.rows or self.cost is None:
            return None
        key, measure = (self._key, self.retention), partial(self._general_cost, self.cost)
        return measured_once(self.model, key, measure)

    def _general_cost(self, cost: PassCost) -> PassCost:
        masked = self.bank.base.bidirectional
        # An encoder computes the logits of all tokens, of which one in eight is predicted here.
        answer = 1 if masked else TRIAL // 2
        texts = trial_examples(2, TRIAL, answer, masked=masked)
        general = GeneralTexts(self.bank, self.adapter, texts, Display(quiet=True), Clock({}))
        peak = self._peak(texts, lambda texts: self.retention.loss(general, texts))
        logits = 2 * answer * self.bank.base.vocabulary
        return replace(cost, logit=max(0.0, (peak - cost(2, TRIAL, 0)) / logits))

    def _peak(
        self, trial: Sequence[EncodedExample], loss: Callable[[Sequence[EncodedExample]], Tensor]
    ) -> int:
        """The memory of ``loss`` of ``trial`` and its gradients; nothing else changes."""
        try:
            # Dropout draws from the random state.
            with torch.random.fork_rng(devices=[]), self._recomputing(), TensorBytes() as counted:
                torch.autograd.grad(loss(trial), self.parameters, allow_unused=True)
        except RuntimeError as error:
            if not ran_out(error):
                raise
            raise self._too_large(max(map(len, trial)), error) from None
        return int(counted.peak)

    def announce_memory(self) -> None:
        """Show the measured memory of a token, and how much a pass may take."""
        costs = [cost for cost in (self.cost, self.general_cost) if cost is not None]
        if costs:
            token, limit = max(cost.token for cost in costs), pass_limit(self.model)
            sizes = f"{format_bytes(token)} per token in training, measured; at most "
            self.display.stage("memory", None, None, f"{sizes}{format_bytes(limit)} in one pass")

    def halve(self, passes: Passes, message: str) -> None:
        sizes = [len(part) * max(map(len, part)) for part in passes if len(part) > 1]
        if not sizes:
            raise self._too_large(max(len(row) for part in passes for row in part), message)
        self.state.micro = max(sizes) // 2
        recover(self.model)
        release(self.model.device)
        process = f"process {self.rank}: " if self.ranks > 1 else ""
        # Every process prints for itself: the main one does not know.
        (self.display if self.rank == 0 else Display()).warn(
            f"{process}out of memory: from here on a pass has at most {self.state.micro} tokens; "
            "the batch of a step does not change."
        )

    def _too_large(self, tokens: int, found: object) -> OutOfMemory:
        return OutOfMemory(
            where=f"{self.domain.name}, a row of {tokens} tokens",
            expected="memory for one row at a time",
            found=str(found).splitlines()[0],
            hint="Set a smaller max_length, gradient_checkpointing, or --load-in-4bit.",
        )


def sum_over_ranks(
    parameters: Sequence[torch.nn.Parameter], nats: Sequence[Tensor], stop: int | None
) -> tuple[list[float], bool]:
    """Sum the gradients and ``nats`` over the processes.

    Returns the nats, and whether ``stop`` is set on any process.
    """
    ranks = distributed.state().num_processes
    if ranks == 1:
        return [float(one) for one in nats], stop is not None
    for parameter in parameters:
        if parameter.grad is None:  # a short batch may leave a process without a row
            parameter.grad = torch.zeros_like(parameter)
    device, grads = nats[0].device, [p.grad.flatten() for p in parameters if p.grad is not None]
    stopping = torch.tensor(float(stop is not None), device=device)
    flat = distributed.summed(torch.cat([torch.stack([*nats, stopping]), *grads]))
    *values, stopped = flat[: len(nats) + 1].tolist()
    parts = torch.split(flat[len(nats) + 1 :], [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter).clone()
    return values, stopped > 0


def give_back(part: Sequence[Sized], cost: PassCost | None, model: Any) -> None:
    """Give back what a large pass left in the allocator if too little is free for another."""
    if cost is not None and cost.token * len(part) * max(map(len, part)) >= LARGE_PASS:
        make_room(model)


# ── The optimiser ───────────────────────────────────────────────────────────────────────────────


def make_optimizer(
    weights: Mapping[str, TrainableLora],
    parameters: Sequence[torch.nn.Parameter],
    lr: float,
    settings: Training,
) -> torch.optim.Optimizer:
    """AdamW for ``parameters``: those of ``weights``, and of a head.

    With ``lr_ratio`` the matrices B are a group of their own, whose rate is so many times that of
    all others (LoRA+, Hayou et al. 2024).
    """
    groups: list[dict[str, Any]] = [{"params": list(parameters)}]
    if settings.lr_ratio is not None:
        of_b = {id(lora.b) for lora in weights.values()}
        groups = [
            {"params": [p for p in parameters if id(p) not in of_b]},
            {"params": [p for p in parameters if id(p) in of_b], "ratio": settings.lr_ratio},
        ]
    if settings.optimizer == "adamw8bit":
        try:
            from bitsandbytes import optim
        except ImportError:
            raise UsageError(
                where="setting 'optimizer'",
                expected="bitsandbytes, for a state of 8 bits",
                found="none for this platform",
                hint="Leave it out: AdamW keeps its state in 32 bits.",
            ) from None
        adam: Any = vars(optim)["AdamW8bit"]
        eight: torch.optim.Optimizer = adam(groups, lr=lr, weight_decay=settings.weight_decay)
        return eight
    return torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)
