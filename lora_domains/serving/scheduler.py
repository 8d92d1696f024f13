"""The scheduler: one thread that owns the model, and lets requests join a running batch.

Between two steps it takes new requests, lets waiting rows join, answers a block of texts that are
to be labelled, and puts a retrained adapter in place. So an adapter is never exchanged in the
middle of a pass, and a request ends on the adapter that it began with.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lora_domains.errors import LoraDomainsError
from lora_domains.inference.batches import TOKENS, Budget
from lora_domains.inference.predict import Answer, encoded_texts, predict_encoded
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.lora import Adapter
from lora_domains.serving import answers as prompts
from lora_domains.serving.answers import Prompt, Sampling
from lora_domains.serving.batch import Batch, Row
from lora_domains.serving.requests import (
    Begun,
    Ended,
    Failed,
    Generate,
    Job,
    Label,
    Labelled,
    Piece,
    log,
    queue_full,
    stopping,
)
from lora_domains.serving.service import Metrics
from lora_domains.tokenization.encoded import EncodedExample

BLOCK = 32
"""Texts that are labelled between two steps of the rows that decode, on a CPU."""
RECENT = 50
"""Requests from whose ends it is estimated when there is room in the queue."""


# ── The thread ──────────────────────────────────────────────────────────────────────────────────


@dataclass(eq=False)
class _Labelling:
    """The texts of a request that are labelled, block by block."""

    job: Job
    encoded: Sequence[EncodedExample]
    refer_below: float = 0.0
    answers: list[Answer] = field(default_factory=list)


class Scheduler:
    """Answers requests for the adapters of ``bank``, many at a time.

    At most ``rows`` answers are decoded together, ``queue`` requests wait, and an answer has
    ``max_tokens`` tokens.
    """

    def __init__(
        self, bank: Bank, metrics: Metrics, *, rows: int = 16, queue: int = 64,
        max_tokens: int = 1024,
    ) -> None:  # fmt: skip
        self.bank, self.metrics = bank, metrics
        self.rows, self.queue, self.max_tokens = rows, queue, max_tokens
        self._batch = None if bank.base.bidirectional else Batch(bank.base)
        self._budget = Budget(bank.base.model)
        self._changed = threading.Condition()
        self._new: deque[Job] = deque()
        self._waiting: deque[tuple[Job, Row]] = deque()
        self._running: dict[Row, Job] = {}
        self._labelling: deque[_Labelling] = deque()
        self._swaps: deque[tuple[Adapter, Future[None]]] = deque()
        self._ends: deque[float] = deque(maxlen=RECENT)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        metrics.waiting.set_function(lambda: self.waiting)
        metrics.running.set_function(lambda: len(self._running))

    # From other threads

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step. Requests that are not answered fail."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def together(self) -> bool:
        """Whether several answers are generated at once."""
        return self._batch is None or self._batch.together

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet and of which nothing is decoded."""
        return len(self._new) + len({id(job) for job, _ in tuple(self._waiting)}) + len(
            self._labelling
        )  # fmt: skip

    def submit(self, job: Job) -> None:
        """Queue a request; raises ApiError where the queue is full, or the server stops."""
        with self._changed:
            if self._stopped:
                raise stopping()
            if self.waiting >= self.queue:
                raise queue_full(self._seconds_to_room())
            self._new.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        job.cancelled = True
        with self._changed:
            self._changed.notify()

    def swap(self, adapter: Adapter) -> "Future[None]":
        """Put ``adapter`` in the place of the one of its name; done when it is."""
        done: Future[None] = Future()
        with self._changed:
            self._swaps.append((adapter, done))
            self._changed.notify()
        return done

    def _seconds_to_room(self) -> int:
        ends = list(self._ends)
        if len(ends) < 2:
            return 1
        rate = (len(ends) - 1) / max(time.monotonic() - ends[0], 1e-3)
        return max(1, min(60, math.ceil(1 / rate)))

    # On the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._stopped:
                    break
            self._drop_cancelled()
            if not self._swaps:
                self._accept()
            if self._labelling:
                self._label_block()
            elif self._swaps:
                self._swap()
            self._decode()
        stopped = stopping()
        for job in {*self._new, *(job for job, _ in self._waiting), *self._running.values(),
                    *(one.job for one in self._labelling)}:  # fmt: skip
            self._fail(job, stopped)
        for _, done in self._swaps:
            done.set_exception(stopped)

    def _has_work(self) -> bool:
        return bool(self._stopped or self._new or self._waiting or self._running
                    or self._labelling or self._swaps)  # fmt: skip

    def _drop_cancelled(self) -> None:
        for row, job in self._running.items():
            row.cancelled = row.cancelled or job.cancelled
        self._waiting = deque(one for one in self._waiting if not one[0].cancelled)
        self._labelling = deque(one for one in self._labelling if not one.job.cancelled)

    def _accept(self) -> None:
        """Tokenise new requests; what is wrong with one is told at once."""
        while self._new:
            job = self._new.popleft()
            if job.cancelled:
                continue
            try:
                if isinstance(job, Label):
                    encoded = encoded_texts(
                        self.bank, job.texts, [str(job.name)] * len(job.texts), job.refer_below
                    )
                    self._label(job, encoded, job.refer_below)
                elif isinstance(job, Generate):
                    self._accept_texts(job)
            except LoraDomainsError as error:
                self._fail(job, error)
            except Exception as error:  # one request must not end the others
                log("A request could not be read.", error)
                self._fail(job, error)

    def _accept_texts(self, job: Generate) -> None:
        found = [prompts.text_prompt(self.bank, job.name, text) for text in job.texts]
        if job.messages is not None:
            if job.name is not None and prompts.labels(self.bank, job.name):
                self._label(job, [prompts.conversation_text(self.bank, job.name, job.messages)])
                return
            found = [prompts.conversation_prompt(self.bank, job.name, job.messages, job.thinking)]
        route = self.bank.route(job.name)
        adapter = None if route is None else route.rows[0]
        rows = [
            self._row(job, prompt, place * job.count + number, adapter)
            for place, prompt in enumerate(found) for number in range(job.count)
        ]  # fmt: skip
        tokens = sum(len(prompt.ids) for prompt in found)
        self.metrics.add_tokens(job.name, "prompt", tokens)
        job.deliver(Begun(tokens))
        self._waiting += [(job, row) for row in rows]

    def _row(self, job: Generate, prompt: Prompt, index: int, adapter: Any) -> Row:
        assert self._batch is not None, "prompts refuses encoders"
        length = prompts.answer_length(self.bank.base, prompt, job.max_tokens, self.max_tokens)
        sampling = Sampling(
            length, job.temperature, job.top_p,
            None if job.seed is None else job.seed + index, (*job.stop, *prompt.ends),
        )  # fmt: skip
        answer = self._batch.answer(sampling, strip=job.messages is not None)

        def listen(text: str) -> None:
            job.deliver(Piece(index, text))

        return Row(prompt.ids, adapter, answer, listen if job.stream else None, index)

    def _label(self, job: Job, encoded: Sequence[EncodedExample], below: float = 0.0) -> None:
        tokens = sum(len(one.prompt) for one in encoded)
        self.metrics.add_tokens(job.name, "prompt", tokens)
        job.deliver(Begun(tokens))
        self._labelling.append(_Labelling(job, encoded, below))

    # Labels

    def _label_block(self) -> None:
        """Answer the next texts; several requests share a pass."""
        size = BLOCK * self._budget.tokens // TOKENS
        block: list[tuple[_Labelling, list[EncodedExample]]] = []
        for one in self._labelling:
            # A request that waits for a swap to be over was not tokenised yet.
            part = list(one.encoded[len(one.answers) : len(one.answers) + size])
            block.append((one, part))
            size -= len(part)
            if size <= 0:
                break
        try:
            self._answer(block)
        except Exception as together:
            if len(block) == 1:
                self._fail_labelling(block[0][0], together)
            for alone in block if len(block) > 1 else []:
                try:
                    self._answer([alone])
                except Exception as error:
                    self._fail_labelling(alone[0], error)
        for one, _ in block:
            if len(one.answers) == len(one.encoded) and one in self._labelling:
                self._labelling.remove(one)
                self._tell_labels(one)

    def _answer(self, block: Sequence[tuple[_Labelling, list[EncodedExample]]]) -> None:
        owners = [one for one, part in block for _ in part]
        answers = predict_encoded(
            self.bank, [text for _, part in block for text in part],
            [str(one.job.name) for one in owners], [one.refer_below for one in owners],
        )  # fmt: skip
        for one, answer in zip(owners, answers, strict=True):
            one.answers.append(answer)

    def _tell_labels(self, one: _Labelling) -> None:
        job = one.job
        if isinstance(job, Generate):
            text = prompts.label_text(one.answers[0])
            for index in range(job.count):
                if job.stream:
                    job.deliver(Piece(index, text))
                job.deliver(Ended(index, text, "stop", 0))
        else:
            job.deliver(Labelled(one.answers))
        self._ends.append(time.monotonic())

    def _fail_labelling(self, one: _Labelling, error: Exception) -> None:
        if not isinstance(error, LoraDomainsError):
            log("Texts could not be labelled.", error)
        self._labelling.remove(one)
        self._fail(one.job, error)

    # Adapters

    def _swap(self) -> None:
        while self._swaps:
            adapter, done = self._swaps.popleft()
            try:
                self.bank.add(adapter)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    # Generated answers

    def _decode(self) -> None:
        batch = self._batch
        if batch is None:
            return
        self._join(batch)
        if batch.rows:
            try:
                left = batch.step()
            except Exception as error:  # out of memory, say: these rows fail, the server goes on
                log("A step failed.", error)
                for row in batch.clear():
                    self._fail_row(row, error)
                return
            self.metrics.steps.inc()
            self.metrics.step_rows.inc(len(batch.rows) + len(left))
            for row in left:
                self._tell_end(row)

    def _join(self, batch: Batch) -> None:
        room = self.rows - len(batch.rows)
        first = [self._waiting[at] for at in range(min(room, len(self._waiting)))]
        if not first:
            return
        count = batch.fitting([row for _, row in first])
        joining = [self._waiting.popleft() for _ in range(count)]
        if not joining:
            return
        self._running |= {row: job for job, row in joining}
        try:
            batch.join([row for _, row in joining])
        except Exception as together:
            # Tried alone, so that one prompt does not fail the others.
            for _, row in joining:
                try:
                    if row.answer.tokens or len(joining) == 1:
                        raise together
                    batch.join([row])
                except Exception as error:
                    log("A prompt could not be read.", error)
                    self._fail_row(row, error)
        for _, row in joining:
            if row in self._running and row.leaves and row not in batch.rows:
                self._tell_end(row)

    def _tell_end(self, row: Row) -> None:
        job = self._running.pop(row)
        answer = row.answer
        if job.cancelled or answer.reason is None:
            return
        self._ends.append(time.monotonic())
        self.metrics.add_tokens(job.name, "completion", len(answer.tokens))
        job.deliver(Ended(row.index, answer.text, answer.reason, len(answer.tokens)))

    def _fail_row(self, row: Row, error: Exception) -> None:
        job = self._running.pop(row)
        if not job.cancelled:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        if not job.cancelled:
            job.deliver(Failed(error))
        job.cancelled = True  # its other rows are of no use
