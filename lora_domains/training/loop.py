"""Training one adapter: ``fit`` → ``run_epoch`` → ``train_step``, on Accelerate.

Only the adapter is trained. The base stays in evaluation mode, without gradients and without a
wrapper: each rank takes its share of a global batch, and the adapter's gradients are summed over
the ranks. Everything that a step depends on is in ``State``, which is written to a checkpoint
between steps; a run resumed from it ends with the same bytes as an uninterrupted one.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median_low
from typing import Any, NoReturn

import torch

from lora_domains import distributed
from lora_domains.adapters.parent import Parent, continued_adapter
from lora_domains.adapters.peft import new_adapter
from lora_domains.console import HEAD, STEPS, Clock, Display, format_bytes, format_duration
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, LossExploded
from lora_domains.inference.memory import agreed_pass_limit, peak_memory, reuse_pass_limit
from lora_domains.inference.reference import Prediction
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import class_weights, epoch_batches
from lora_domains.modeling.heads import SENTENCE
from lora_domains.modeling.lora import Adapter
from lora_domains.probes.features import probe_head
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.checkpoints import Checkpoint, State, StopSignals, hash_examples, origin
from lora_domains.training.gradients import Gradients, make_optimizer, sum_over_ranks
from lora_domains.training.plan import Plan, Schedule
from lora_domains.training.retention import GeneralTexts
from lora_domains.training.validation import Validation, observe, rank, within_drift

Log = Callable[[Mapping[str, Any], int], None]
RECENT, FAR = 5, 100
"""Losses of which most must be above the limit, or one this many times, before a run is stopped."""


@dataclass
class Trained:
    """The result of a run: the best epoch's adapter, and the card's ``training`` record."""

    adapter: Adapter
    record: dict[str, Any]


class Run:
    """One training run of one adapter."""

    on_best: Callable[[Trained], object] | None = None
    """Called with the best epoch so far when a run ends early, so that it is not lost."""

    def __init__(
        self, bank: Bank, domain: Domain, plan: Plan, train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample], checkpoint: Checkpoint, display: Display,
        general: Sequence[EncodedExample] = (), monitored: Sequence[EncodedExample] = (),
        parent: Parent | None = None, log: Log | None = None,
        predictions: Mapping[str, Prediction] | None = None,
    ) -> None:  # fmt: skip
        self.bank, self.domain, self.plan = bank, domain, plan
        self.train, self.display, self.checkpoint = train, display, checkpoint
        self.log: Log = log or (lambda _values, _step: None)
        self.model = bank.base.model
        self.adapter_name = f"{domain.name}__fit"
        self.ranks = distributed.state().num_processes
        self.state, self.signals = State(), StopSignals()
        self.clock = Clock(self.state.phases)
        self.adapter, self.parent = initial_adapter(self, parent), parent
        self.parameters = bank.add(self.adapter, trainable=True)
        self.head = self.adapter.head
        if self.head is not None:
            self.head, trained = self.head.trainable(self.model.device)
            self.parameters += trained
        name, how, public = self.adapter_name, domain.training, domain.data.general is None
        self.optimizer = make_optimizer(bank.trainable(name), self.parameters, plan.lr, how)
        weights = class_weights(train, domain.task) if how.balance == "weights" else None
        self.classes = [row.labels for row in train] if how.balance == "batches" else None
        self.general = GeneralTexts(bank, name, general, display, self.clock, predictions, public)
        self.gradients = Gradients(
            bank, name, self.head, domain, plan.retention, self.general,
            self.parameters, self.state, display, plan.general_every, weights,
        )  # fmt: skip
        self.validation = Validation(
            bank, name, self.head, domain, validation, monitored, display, self.clock, predictions
        )
        self.drift_limit = plan.retention.drift_limit(domain.gates)
        self.schedule = Schedule(plan.steps, how)
        self._all_stop = False  # whether any rank received a signal, as all know since a step

    # ── fit → run_epoch → train_step ────────────────────────────────────────────────────────────

    def fit(self, *, resume: bool = False) -> Trained:
        """Train until the epochs are over or validation stops improving; the best epoch's adapter.

        The checkpoint stays until ``forget`` is called, so that no training is lost when the disk
        refuses the adapter. Raises LossExploded and TrainingInterrupted. In every case the adapter
        in training leaves the bank, and the caller's random state is restored.
        """
        with self.isolated(), self.signals.noted(), closing(self.batches(resume)) as batches:
            for rows in batches:
                with self.clock.phase(STEPS):
                    self.train_step(rows)
            # Ranks exchange signals within each step, and once more after the last one.
            if distributed.anywhere(self.signals.received is not None):
                self._interrupt(self.checkpoint.complete)
        return self.trained()

    def batches(self, resume: bool) -> Generator[list[EncodedExample]]:
        """The rows of each step, on which the caller trains before it asks for those of the next.

        Validates in between, and writes checkpoints.
        """
        with self.display.losses(self.plan.epochs):
            if resume:
                self._resume()
            self.state.pass_bytes = agreed_pass_limit(self.model)
            self.gradients.announce_memory()
            self.validation.compare_with_base(self.gradients.pairs, self.train)
            while not self._finished() and self._goes_on():
                yield from self.run_epoch()
            self._scale_down()

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Restores the random state and removes the adapter in training from the bank."""
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                yield
        finally:
            self.gradients.close()
            self.bank.remove(self.adapter_name)

    def forget(self) -> None:
        """Delete the checkpoint, once the trained adapter is saved."""
        self.checkpoint.clear()

    def run_epoch(self) -> Generator[list[EncodedExample]]:
        """The epoch up to its next validation or its end, the validation, and a checkpoint."""
        state, seed, limit = self.state, self.domain.training.seed, self.drift_limit
        # Without losses since the last validation, that one was of the current step.
        step = state.step + (not state.losses)
        end = self.plan.validated_after(state.epoch, step, self.last_step)
        lengths = [len(row) for row in self.train]
        batches = epoch_batches(lengths, self.plan.batch_size, seed, state.epoch, self.classes)
        name = f"epoch {state.epoch + 1} of {self.plan.epochs}"
        with self.display.progress(name, len(batches), epoch=state.epoch) as advance:
            advance(state.step)
            for batch in batches[state.step : end]:
                yield [self.train[i] for i in batch]
                advance(1, *self._speed(), loss=state.losses[-1] / max(state.tokens[-1], 1))
                self._between_steps()
        loss, whole = sum(state.losses) / max(sum(state.tokens), 1), end == len(batches)
        epoch = state.epoch + 1 if whole else round(state.epoch + end / len(batches), 3)
        with self.gradients.repeated():
            record = {"epoch": epoch, "training_loss": loss, **self.validation.evaluate()}
        if state.ending:
            record["decayed_from"] = round(state.best_steps / self.plan.steps_per_epoch, 3)
        self._check_loss(record["validation_loss"])
        state.history.append(record)
        record["observation"] = observe(state.history, limit)
        if state.best is None or rank(record, limit) > rank(state.best, limit):
            state.best, state.best_tensors = record, self.tensors()
            if state.ending is None and self.schedule.decay is not None:
                state.best_steps = state.total_steps
                state.best_optimizer = deepcopy(self.optimizer.state_dict())
        self.display.epoch(record, self.domain.primary_metric, ", ".join(self._speed()))
        self.validation.show_samples()
        self.log(record, state.total_steps)
        state.losses, state.tokens = [], []
        if whole:
            state.epoch, state.step = state.epoch + 1, 0
        self.save()

    def train_step(self, rows: Sequence[EncodedExample]) -> None:
        """One optimiser step on one global batch, of which this rank takes its share."""
        self.gradients.read_below(self.train, self.plan.passes)
        nats = self.gradients.compute(rows, self.gradients.units(rows))
        # A signal may reach a single rank, at any moment; all must stop after the same step.
        (total,), self._all_stop = sum_over_ranks(self.parameters, [nats], self.signals.received)
        self.finish_step(rows, total)

    def finish_step(self, rows: Sequence[EncodedExample], nats: float) -> None:
        """Apply the gradients of ``rows``, whose loss is ``nats``, of all ranks."""
        state, total = self.state, self.gradients.units(rows)
        self._set_rate()
        loss = nats / total
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.domain.training.clip)
        self._check_loss(loss if bool(norm.isfinite()) else math.nan)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.losses.append(nats)
        state.tokens.append(total)
        state.total_tokens += sum(map(len, (*rows, *self.gradients.texts())))
        state.step += 1
        state.total_steps += 1
        rate = self.optimizer.param_groups[0]["lr"]
        self.log({"loss": loss, "learning_rate": rate}, state.total_steps)

    # ── Within a step ───────────────────────────────────────────────────────────────────────────

    def _set_rate(self) -> None:
        """Set the learning rate of the next step."""
        done, best, ending = self.state.total_steps, self.state.best_steps, self.state.ending
        share = self.schedule.share(done, best, ending)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * share * group.get("ratio", 1.0)

    def _check_loss(self, loss: float) -> None:
        """Raise LossExploded where nothing is learned any more, and not for a step of rare rows."""
        state = self.state
        first = state.first_loss = loss if state.first_loss is None else state.first_loss
        # A model that knows nothing has a loss of log(vocabulary); far above it nothing is learned.
        limit = max(3 * first, 2 * math.log(self.bank.base.vocabulary))
        before = zip(state.losses[1 - RECENT :], state.tokens[1 - RECENT :], strict=True)
        usual = median_low([loss, *(nats / max(total, 1) for nats, total in before)])
        if math.isfinite(loss) and (loss <= limit or (usual <= limit and loss <= FAR * limit)):
            return
        raise LossExploded(
            where=f"{self.domain.name}, epoch {state.epoch + 1}, step {state.step + 1}",
            expected=f"a finite loss, at most {limit:.1f}",
            found=f"{loss:.4g} (first loss {first:.3f}, learning rate {self.plan.lr:g})",
            hint=f"Try --lr {self.plan.lr / 5:.1g}. {self.save_best()}",
        )

    # ── Between steps ───────────────────────────────────────────────────────────────────────────

    def _between_steps(self) -> None:
        if self._all_stop or (self.ranks == 1 and self.signals.received is not None):
            self._interrupt(self.save())
        if self.checkpoint.due:
            self.save()
            step = f"{self.state.step} of {self.plan.steps_per_epoch}: {', '.join(self._speed())}"
            self.display.pulse(f"epoch {self.state.epoch + 1}, step {step}")

    def _interrupt(self, written: bool) -> NoReturn:
        raise self.signals.interrupted(self.place, written, self.save_best())

    @property
    def place(self) -> str:
        """Where the run stands, in words."""
        state = self.state
        step = f"epoch {state.epoch + 1}, step {state.step}"
        return f"{self.domain.name}, {'after the last epoch' if self._finished() else step}"

    def _finished(self) -> bool:
        """Whether all steps are done and validated."""
        return self.state.total_steps >= self.last_step and not self.state.losses

    @property
    def last_step(self) -> int:
        """Steps after which the run ends, if patience lasts."""
        return self.state.ending[1] if self.state.ending else self.plan.steps

    def _goes_on(self) -> bool:
        """Whether patience lasts, or the ending, to begin which the run goes back to its best."""
        state, patience = self.state, self.domain.training.patience
        best, optimizer = state.best, state.best_optimizer
        if best is None or state.ending is not None:
            return True
        if round(state.history[-1]["epoch"] - best["epoch"], 3) < patience:
            return True
        waited = f"{patience} epochs" if patience > 1 else "an epoch"
        since = f"no better epoch than {best['epoch']} for {waited}"
        if optimizer is None:
            self.display.note(f"Stopped: {since}.")
            return False
        first, last = state.ending = self.schedule.ending(state.best_steps, state.total_steps)
        steps = "1 decaying step" if last == first + 1 else f"{last - first} decaying steps"
        self.display.note(f"{since.capitalize()}: back to it, for {steps}.")
        self._restore(state.best_tensors, optimizer)
        state.best_optimizer = None
        return True

    def _speed(self) -> tuple[str, ...]:
        """Time left, tokens per second and memory, for people."""
        left, memory = format_duration(self.seconds_left()), peak_memory(self.model.device)
        return f"{left} left", f"{self.state.tokens_per_second:,.0f} tokens/s", format_bytes(memory)

    def seconds_left(self) -> float:
        """The time that steps and validations will still take."""
        last = self.last_step
        return self.state.seconds_left(last, self.plan.validations(last), *self.validation.tokens)

    def _scale_down(self) -> None:
        """Reduce the best epoch's effect where all of it exceeds the drift limit."""
        best, tensors, limit = self.state.best, self.state.best_tensors, self.drift_limit
        if best and "scale" not in best and not within_drift(best, limit):
            found = self.validation.scaled_down(best, tensors["weights"], limit)
            self.state.best, tensors["weights"] = found

    # ── The result, and the checkpoint ──────────────────────────────────────────────────────────

    def tensors(self) -> dict[str, Any]:
        """A copy of what is trained: ``weights``, ``magnitudes`` and those of the ``head``."""
        bank, name = self.bank, self.adapter_name
        head = self.head.to("cpu").weights if self.head is not None else {}
        return {"weights": bank.weights(name), "magnitudes": bank.magnitudes(name), "head": head}

    def _restore(self, tensors: Mapping[str, Any], optimizer: dict[str, Any]) -> None:
        """Continue from these ``tensors`` and this state of the optimiser."""
        self.bank.set_weights(self.adapter_name, tensors["weights"], tensors["magnitudes"])
        for name, tensor in (self.head.weights if self.head else {}).items():
            tensor.data.copy_(tensors["head"][name])
        self.optimizer.load_state_dict(optimizer)

    def save_best(self) -> str:
        """Save the best epoch's adapter before the run ends early; what became of it, in words."""
        best = self.state.best
        if best is None:
            return "No epoch was finished, so no adapter was saved."
        if self.on_best is None:
            return "No adapter was saved."
        try:
            self.on_best(self.trained())
        except AdapterError as error:
            self.display.warn(
                f"the adapter of epoch {best['epoch']} could not be saved: {error.found}."
            )
            return "No adapter was saved."
        return f"The adapter of epoch {best['epoch']}, the best so far, was saved."

    def trained(self) -> Trained:
        """The best epoch's adapter, and the record of the run so far."""
        state, plan, best = self.state, self.plan, self.state.best
        if best is None:
            raise RuntimeError("a run has a result once its first epoch is finished")
        tensors = dict(state.best_tensors)
        head = tensors.pop("head")
        trained = None if self.head is None else replace(self.head, weights=head)
        adapter = replace(self.adapter, name=self.domain.name, head=trained, **tensors)
        return Trained(adapter, state.record(plan, best, peak_memory(self.model.device)))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes from it."""
        retention = self.plan.retention
        return {
            "format of checkpoints": 2,
            **origin(self.domain, self.bank.base),
            "rows": hash_examples(self.train),
            "validation rows": hash_examples(self.validation.rows),
            "general text": hash_examples([*self.general.texts, *self.validation.monitored]),
            "plan": {**self.plan.numbers(), "retention": [retention.name, vars(retention)]},
            "parent": self.parent.sha256 if self.parent else None,
        }

    def save(self) -> bool:
        """Write the checkpoint; whether that succeeded, which only the main process knows."""
        return self.checkpoint.write(self.content)

    def content(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return {
            "run": self.identity,
            "ranks": self.ranks,
            "state": dict(vars(self.state)),
            **self.tensors(),
            "optimizer": self.optimizer.state_dict(),
        }

    def _resume(self) -> None:
        stored = self.checkpoint.read(self.identity)
        if stored is None:
            return
        vars(self.state).update(stored["state"])
        self.clock.seconds = self.state.phases
        if self.state.pass_bytes is not None:
            reuse_pass_limit(self.model, self.state.pass_bytes, self.display.warn)
        self._restore(stored, stored["optimizer"])
        self.display.note(
            f"Resuming at epoch {self.state.epoch + 1}, after {self.state.step} of "
            f"{self.plan.steps_per_epoch} steps."
        )
        for record in self.state.history:
            self.display.epoch(record, self.domain.primary_metric)


def initial_adapter(run: Run, parent: Parent | None) -> Adapter:
    """The adapter with which ``run`` begins: a new one, or a copy of its parent's."""
    domain, plan = run.domain, run.plan
    if parent is not None:
        return continued_adapter(parent.adapter, run.adapter_name, domain.lora)
    seed, classes = domain.training.seed, domain.task.head_classes
    adapter = new_adapter(
        run.bank.base, run.adapter_name, domain.lora, plan.rank, plan.alpha, seed, classes
    )
    if adapter.head is None or adapter.head.layout != SENTENCE:
        return adapter
    balanced = domain.training.balance is not None
    with run.clock.phase(HEAD):
        head = probe_head(adapter.head, run.bank, run.train, run.display, domain.task, balanced)
    return replace(adapter, head=head)
