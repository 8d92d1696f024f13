"""Training one adapter: ``fit`` → ``run_epoch`` → ``train_step``, on Accelerate.

Only the adapter's slots are trained. The base stays in evaluation mode and without gradients, and
there is no wrapper around it: each rank takes its share of a global batch, and the few gradients
are summed over the ranks. Everything that a step depends on is in ``State``, which is written to
disk between steps; a run continued from there ends with the same bytes as an unbroken one.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from lora_domains import distributed
from lora_domains.adapters.peft import new_adapter
from lora_domains.adapters.versions import Parent, continued
from lora_domains.console import Display, format_bytes, format_duration
from lora_domains.data.tokenization import EncodedExample
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, LossExploded, TrainingInterrupted
from lora_domains.inference.likelihoods import answer_nats, choices_and_nats, head_scores
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import epoch_batches
from lora_domains.modeling.lora import Adapter
from lora_domains.modeling.memory import peak_memory
from lora_domains.training.checkpoints import (
    State,
    check_same_run,
    clear,
    hash_items,
    read_checkpoint,
    write_checkpoint,
)
from lora_domains.training.gradients import Gradients
from lora_domains.training.plan import Plan, make_plan
from lora_domains.training.retention import Reference, choose_scale, keeps
from lora_domains.training.tracking import Log, no_tracker
from lora_domains.training.validation import validation_figures

SAVE_SECONDS = 60.0


@dataclass
class Trained:
    """What a run gives: the best epoch's adapter, and how it went."""

    adapter: Adapter
    record: dict[str, Any]
    """The card's ``training`` entry."""


class Run:
    """One training run of one adapter."""

    def __init__(
        self,
        bank: Bank,
        domain: Domain,
        plan: Plan,
        train: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        checkpoint: Path,
        display: Display,
        judge: Callable[["Run"], dict[str, Any]] | None = None,
        general: Sequence[EncodedExample] = (),
        watched: Sequence[EncodedExample] = (),
        parent: Parent | None = None,
        log: Log = no_tracker,
    ) -> None:
        self.bank, self.domain, self.plan = bank, domain, plan
        self.train, self.validation = train, validation
        self.checkpoint, self.display = checkpoint, display
        self.judge = judge or validate
        self.model = bank.base.model
        self.pad = bank.base.tokenizer.pad_token_id
        self.slot = f"{domain.name}__fit"
        self.log = log
        self.rank, self.ranks = distributed.state().process_index, distributed.state().num_processes
        self.state = State()
        seed = domain.training.seed
        classes = domain.task.head_classes
        self.adapter = (
            new_adapter(bank.base, self.slot, domain.lora, plan.rank, plan.alpha, seed, classes)
            if parent is None
            else continued(parent.adapter, self.slot, domain.lora)
        )
        self._goes_on_from = None if parent is None else parent.sha256
        self.parameters = bank.add(self.adapter, trainable=True)
        self.head = self.adapter.head
        if self.head is not None:
            self.head, trained = self.head.trainable(self.model.device)
            self.parameters += trained
        decay = domain.training.weight_decay
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.lr, weight_decay=decay, fused=True
        )
        self.gradients = Gradients(
            bank, self.slot, self.head, domain, plan.keeping, general, self.parameters, self.state,
            display,
        )  # fmt: skip
        self.watched = watched
        self._stop: int | None = None
        self._agreed = False
        self._saved = time.monotonic()
        self._written = True

    # fit → run_epoch → train_step

    def fit(self, *, resume: bool = False) -> Trained:
        """Train until the epochs are over or validation stops improving; the best epoch's adapter.

        The checkpoint stays until ``forget`` is called: a disk that then refuses the adapter costs
        nothing. Raises LossExploded and TrainingInterrupted. Whatever happens, the slot is taken
        out of the bank again and the caller's random state is as before.
        """
        cuda = [self.model.device] if self.model.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda), self._signals():
                if resume:
                    self._load()
                while self.state.epoch < self.plan.epochs and not self._patience_over():
                    self.run_epoch()
                self._choose_scale()
                self._end_where_asked()
        finally:
            self.bank.remove(self.slot)
        return self._trained()

    def forget(self) -> None:
        """Take the checkpoint away, once what was trained is safe."""
        if distributed.is_main():
            clear(self.checkpoint)

    def run_epoch(self) -> None:
        """The rest of the current epoch, then validation, then a checkpoint."""
        state = self.state
        lengths = [len(item) for item in self.train]
        batches = epoch_batches(
            lengths, self.plan.batch_size, self.domain.training.seed, state.epoch
        )
        with self.display.progress(f"epoch {state.epoch + 1}", len(batches)) as advance:
            advance(state.step)
            for batch in batches[state.step :]:
                self.train_step([self.train[i] for i in batch])
                advance(1, self._speed())
                self._between_steps()
        loss = sum(state.losses) / max(sum(state.tokens), 1)
        started = time.monotonic()
        record = {"epoch": state.epoch + 1, "training_loss": loss, **self._judged()}
        self._check_loss(record["validation_loss"])
        state.history.append(record)
        record["observation"] = observe(state.history, self._limit)
        state.seconds += time.monotonic() - started
        if state.best is None or self._rank(record) > self._rank(state.best):
            state.best, state.best_weights = record, self.bank.weights(self.slot)
            state.best_head = self._head_weights()
        self.display.epoch(record, self.domain.task.metric, self._speed())
        self.log(record, state.total_steps)
        state.epoch, state.step, state.losses, state.tokens = state.epoch + 1, 0, [], []
        self.save()

    def train_step(self, items: Sequence[EncodedExample]) -> None:
        """One optimiser step on one global batch; this rank takes its share of the rows."""
        state, started = self.state, time.monotonic()
        total = sum(item.supervised for item in items)
        self._set_rate()
        # A signal may reach one rank only, at any moment; all must stop after the same step.
        nats, asked = self.gradients.over_ranks(self.gradients.of(items, total), self._stop or 0)
        self._agreed = asked > 0
        loss_now = float(nats) / total
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.domain.training.clip)
        self._check_loss(loss_now if bool(norm.isfinite()) else math.nan)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.losses.append(float(nats))
        state.tokens.append(total)
        state.total_tokens += sum(len(item) for item in items)
        state.step += 1
        state.total_steps += 1
        state.seconds += time.monotonic() - started
        rate = self.optimizer.param_groups[0]["lr"]
        self.log({"loss": loss_now, "learning_rate": rate}, state.total_steps)

    def _judged(self) -> dict[str, Any]:
        """The adapter as it is on validation rows and on watched general text."""
        with self._without_dropout():
            record = dict(self.judge(self))
            if self.watched:
                selection = self.selection  # of the whole: nothing of its size is exchanged
                with distributed.sharing():
                    record |= selection.watch(self.slot)
        # Rounding may differ between devices; every rank must take the same decisions.
        return distributed.same_everywhere(record)

    @cached_property
    def selection(self) -> Reference:
        """The base on the general texts by which checkpoints are chosen."""
        reference = Reference(self.bank, self.watched)
        if error := reference.error():
            self.display.stage("retention", None, None, f"epochs are chosen by {error}")
        return reference

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        weights = self.bank.trainable(self.slot).values()
        for lora in weights:
            lora.eval()
        try:
            yield
        finally:
            for lora in weights:
                lora.train()

    # Inside a step

    def _head_weights(self) -> dict[str, Tensor]:
        return self.head.to("cpu").weights if self.head is not None else {}

    def _set_rate(self) -> None:
        """Linear warm-up, then linearly down to zero at the last step."""
        done, total = self.state.total_steps, self.plan.steps
        warm = max(1, round(self.domain.training.warmup * total))
        share = (done + 1) / warm if done < warm else (total - done) / max(1, total - warm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr * share

    def _check_loss(self, loss: float) -> None:
        state = self.state
        first = state.first_loss = loss if state.first_loss is None else state.first_loss
        vocabulary = math.log(self.model.config.get_text_config().vocab_size)
        # A model that knows nothing has a loss of log(vocabulary); far above it nothing is learned.
        limit = max(3 * first, 2 * vocabulary)
        if math.isfinite(loss) and loss <= limit:
            return
        best, kept = state.best, self._keep_best()
        raise LossExploded(
            where=f"{self.domain.name}, epoch {state.epoch + 1}, step {state.step + 1}",
            expected=f"a finite loss, at most {limit:.1f}",
            found=f"{loss:.4g} (it began at {first:.3f}, learning rate {self.plan.lr:g})",
            hint=f"Try --lr {self.plan.lr / 5:.1g}. "
            + ("No epoch was finished, so no adapter was written." if best is None else
               f"Epoch {best['epoch']} was kept." if kept else "No adapter could be saved."),
        )  # fmt: skip

    # Between steps

    def _between_steps(self) -> None:
        if self._agreed or (self.ranks == 1 and self._stop is not None):
            self._interrupt(self.save())
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()
            step = f"epoch {self.state.epoch + 1}, step {self.state.step}"
            self.display.pulse(f"{step} of {self.plan.steps_per_epoch}: {self._speed()}")

    def _end_where_asked(self) -> None:
        """A signal may come after the last step, too; the last epoch's checkpoint is written."""
        if distributed.anywhere(self._stop is not None):
            self._interrupt(self._written)

    def _interrupt(self, written: bool) -> NoReturn:
        best, state = self.state.best, self.state
        if best is None:
            meanwhile = "No epoch was finished yet, so there is no adapter."
        elif self._keep_best():
            meanwhile = f"The adapter of epoch {best['epoch']} is saved meanwhile."
        else:
            meanwhile = "No adapter is saved meanwhile."
        over = state.epoch == self.plan.epochs
        place = "after the last epoch" if over else f"epoch {state.epoch + 1}, step {state.step}"
        raise TrainingInterrupted(
            where=f"{self.domain.name}, {place}",
            expected="to finish",
            found=signal.Signals(self._stop or signal.SIGTERM).name,
            hint=(
                "Run the same command with --resume to continue from this step. "
                if written
                else "This step could not be stored: free some space, and the same command with "
                "--resume continues from the last checkpoint there is. "
            )
            + meanwhile,
        )

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop after the current step; a second one stops at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: object) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = number

        before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _speed(self) -> str:
        """Tokens a second, memory and time left, for people."""
        state = self.state
        left = (self.plan.steps - state.total_steps) * state.seconds / max(1, state.total_steps)
        return (
            f"{state.total_tokens / max(state.seconds, 1e-9):,.0f} tokens/s, "
            f"{format_bytes(peak_memory(self.model.device))}, {format_duration(left)} left"
        )

    def _patience_over(self) -> bool:
        best = self.state.best
        over = (
            best is not None and self.state.epoch - best["epoch"] >= self.domain.training.patience
        )
        if over and best is not None:
            self.display.line(
                f"Stopped: no better epoch than {best['epoch']} for "
                f"{self.domain.training.patience} epochs."
            )
        return over

    # Which epoch, and how much of it

    @property
    def _limit(self) -> float:
        """The drift gate's, beyond which a checkpoint is not kept; none where that was asked."""
        return math.inf if self.plan.keeping.method == "none" else self.domain.gates.drift

    def _rank(self, record: dict[str, Any]) -> tuple[bool, float, float]:
        """Checkpoints compare by this: general knowledge kept, then score, then loss."""
        score = record["score"] if record["higher_is_better"] else -record["score"]
        return keeps(record, self._limit), score, -record["validation_loss"]

    def _choose_scale(self) -> None:
        """How much of the best epoch's effect to keep, where that is asked or all is too much."""
        best, weights = self.state.best, self.state.best_weights
        if best is None or weights is None or not self.watched:
            return
        kept = keeps(best, self._limit)
        if self.head is not None:  # it is trained for the whole of its adapter
            if not kept:
                self._warn_of_forgetting("no epoch")
            return
        if kept and self.plan.keeping.method != "scale":
            return

        def judged(scale: float) -> dict[str, Any]:
            self._put({linear: (a, b * scale) for linear, (a, b) in weights.items()})
            return self._judged()

        chosen = choose_scale(judged, self._rank)
        if self._rank(chosen) > self._rank(best):
            best = self.state.best = best | chosen
            scale = best["scale"]
            self.state.best_weights = {n: (a, b * scale) for n, (a, b) in weights.items()}
        what = (
            f"epoch {best['epoch']} at scale {best.get('scale', 1.0):g}: {self.domain.task.metric} "
            f"{best['score']:.3f}, KL {best['general_kl']:.3f}"
        )
        self.display.stage("scale", None, None, what)
        if not keeps(best, self._limit):
            self._warn_of_forgetting("no epoch and no scale")

    def _warn_of_forgetting(self, what: str) -> None:
        self.display.warn(
            f"{what} stays within the drift limit of {self._limit:g}: by the general text the base "
            "is forgotten. A lower --lr may help."
        )

    def _put(self, weights: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for linear, lora in self.bank.trainable(self.slot).items():
            a, b = weights[linear]
            lora.a.data.copy_(a)
            lora.b.data.copy_(b)

    # The result, and the checkpoint

    on_best: Callable[[Trained], object] | None = None
    """Called with the best epoch so far when a run ends early, so that it is not lost."""

    def _keep_best(self) -> bool:
        """Whether there is a best epoch, and the disk took it."""
        if self.state.best is None or self.on_best is None:
            return False
        try:
            self.on_best(self._trained())
        except AdapterError as error:
            self.display.warn(
                f"the adapter of epoch {self.state.best['epoch']} is not saved: {error.found}."
            )
            return False
        return True

    def _trained(self) -> Trained:
        state = self.state
        assert state.best is not None
        assert state.best_weights is not None
        head = replace(self.head, weights=state.best_head) if self.head is not None else None
        adapter = replace(
            self.adapter, name=self.domain.name, weights=state.best_weights, head=head
        )
        record = {
            "epochs": len(state.history),
            "steps": state.total_steps,
            "best_epoch": state.best["epoch"],
            "rank": self.plan.rank,
            "alpha": self.plan.alpha,
            "retention": self.plan.keeping.method,
            "scale": state.best.get("scale", 1.0),
            "lr": self.plan.lr,
            "batch_size": self.plan.batch_size,
            "micro_tokens": state.micro,
            "tokens_per_second": round(state.total_tokens / max(state.seconds, 1e-9), 1),
            "peak_memory_bytes": peak_memory(self.model.device),
            "seconds": round(state.seconds, 2),
            "history": state.history,
        }
        return Trained(adapter, record)

    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that continues it."""
        plan = {k: v for k, v in asdict(self.plan).items() if k not in ("reasons", "warnings")}
        base = self.bank.base
        return {
            "base": base.identity,
            "precision": [str(base.dtype), base.quantization],
            "recipe": self.domain.digest(),
            "rows": hash_items(self.train),
            "validation rows": hash_items(self.validation),
            "general text": hash_items([*self.gradients.general, *self.watched]),
            "plan": plan,
            "parent": self._goes_on_from,
        }

    def save(self) -> bool:
        """Write the checkpoint: the old one or the new one is whole, whatever happens.

        Whether it could be written; only the first process knows.
        """
        self._saved = time.monotonic()
        if self.rank:
            return True
        content = {
            "run": self.fingerprint(),
            "ranks": self.ranks,
            "state": dict(vars(self.state)),
            "weights": self.bank.weights(self.slot),
            "head": self._head_weights(),
            "optimizer": self.optimizer.state_dict(),
        }
        refused = write_checkpoint(self.checkpoint, content)
        if refused:
            self.display.warn(f"no checkpoint could be written ({refused}); the last one stays.")
        self._written = not refused
        return self._written

    def _load(self) -> None:
        # Read once and sent to all: other machines may not see the file.
        stored = distributed.on_main(lambda: read_checkpoint(self.checkpoint))
        if stored is None:
            self.display.line("Nothing to resume: starting at the beginning.")
            return
        check_same_run(self.checkpoint, stored, self.fingerprint())
        ranks = stored.get("ranks", self.ranks)
        if ranks != self.ranks:
            self.display.warn(
                f"begun with {ranks} processes, resumed with {self.ranks}: the same up "
                "to rounding, with dropout drawn otherwise."
            )
        vars(self.state).update(stored["state"])
        self._put(stored["weights"])
        for name, tensor in (self.head.weights if self.head else {}).items():
            tensor.data.copy_(stored["head"][name])
        self.optimizer.load_state_dict(stored["optimizer"])
        self.display.line(
            f"Resuming at epoch {self.state.epoch + 1}, after {self.state.step} of "
            f"{self.plan.steps_per_epoch} steps."
        )
        for record in self.state.history:
            self.display.epoch(record, self.domain.task.metric)


# ── Small functions ─────────────────────────────────────────────────────────────────────────────


def validate(run: Run) -> dict[str, Any]:
    """Loss (nats per answer token, or per label of a head), accuracy and the domain metric.

    The rows are shared by the processes, and every one gets the figures of all.
    """
    rows = run.validation
    with (
        distributed.sharing(),
        run.bank.routed(run.slot),
        run.display.progress("validating", len(rows)) as advance,
    ):
        scores = None
        if run.head is not None:
            scores = head_scores(run.model, run.head, rows, run.pad, advance)
            nats = np.array([-score[row.target] for score, row in zip(scores, rows, strict=True)])
            tokens = np.ones(len(rows), dtype=int)
        elif rows and rows[0].choices:
            scores, nats, tokens = choices_and_nats(run.model, rows, run.pad, advance)
        else:
            nats, tokens = answer_nats(run.model, rows, run.pad, advance)
    loss = float(nats.sum() / max(tokens.sum(), 1))
    return {
        "validation_loss": loss,
        **validation_figures(run.domain.task, rows, scores, loss),
    }


def observe(history: Sequence[dict[str, Any]], limit: float = math.inf) -> str:
    """What the last epoch's figures say, in words; 2 % of the loss counts as a change.

    General knowledge is going where KL to the base is above ``limit``.
    """
    last = history[-1]
    if not keeps(last, limit):
        return f"general knowledge is going: KL {last['general_kl']:.2f}, limit {limit:g}"
    if len(history) == 1:
        return "the first epoch"
    before = min(h["validation_loss"] for h in history[:-1])
    change = (last["validation_loss"] - before) / max(before, 1e-9)
    training_falls = last["training_loss"] < history[-2]["training_loss"]
    if change > 0.02:
        if training_falls:
            return "validation loss rises: overfitting begins"
        return "both losses rise: unstable, a lower learning rate may help"
    if change < -0.02:
        return "still improving"
    return "converging"


__all__ = ["Plan", "Run", "State", "Trained", "make_plan", "observe"]
