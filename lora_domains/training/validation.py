"""Validation of an epoch: its figures, how epochs rank by them, and what they say in words."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from lora_domains import distributed
from lora_domains.console import GENERAL, VALIDATION, Clock, Display
from lora_domains.domain import Domain
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import (
    answer_nats,
    choices_and_nats,
    head_scores,
)
from lora_domains.inference.reference import Pairs, Prediction, Reference
from lora_domains.inference.scores import (
    Scores,
    best_threshold,
    comparable,
    decided,
    head_score,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import Head
from lora_domains.modeling.lora import Weights
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.training.retention import reference_on
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.scores import ScoreTable

SCALES = (0.8, 0.6, 0.4, 0.2)
"""Shares of an adapter's effect to try where all of it costs too much general knowledge."""
ONE_LABEL = "one_label"
"""The figure that is True where all validation rows get one label and have several."""
SAMPLES = 3
"""Validation rows whose answers are shown after each epoch, with ``--show-text``."""


class Validation:
    """Evaluates an adapter in training on validation rows and on monitored general texts."""

    pairs: Pairs | None = None
    """The base's answers to compare with, where answers are compared."""
    samples: Sequence[EncodedRow] = ()
    """Rows whose answers are shown after each epoch; they are kept nowhere."""

    def __init__(
        self,
        bank: Bank,
        adapter: str,
        head: Head | None,
        domain: Domain,
        rows: Sequence[EncodedExample],
        monitored: Sequence[EncodedExample],
        display: Display,
        clock: Clock,
        predictions: Mapping[str, Prediction] | None = None,
    ) -> None:
        self.bank, self.adapter, self.head, self.domain = bank, adapter, head, domain
        self.predictions, self.public = predictions, domain.data.general is None
        self.rows, self.monitored, self.display, self.clock = rows, monitored, display, clock

    @cached_property
    def tokens(self) -> list[int]:
        """How many the rows have, and the monitored texts."""
        return [sum(map(len, part)) for part in (self.rows, self.monitored)]

    def evaluate(self) -> dict[str, Any]:
        """``figures`` and ``drift`` of the adapter as it is, without dropout; same on all ranks."""
        with self.bank.without_dropout(self.adapter), self.clock.phase(VALIDATION):
            record = self.figures() | self.drift()
        # Rounding may differ between devices; every rank must take the same decisions.
        return distributed.same_everywhere(record)

    def show_samples(self) -> None:
        """Show what base and adapter answer to ``samples``."""
        if not self.samples:
            return
        with self.bank.without_dropout(self.adapter), self.clock.phase(VALIDATION):
            adapted = self._answers(self.adapter)
        self.display.answers(
            (row.encoded.id, row.example.text or row.example.prompt, {
                "expected": row.example.answer, "base": before, "adapter": after,
            })
            for row, before, after in zip(self.samples, self._base_answers, adapted, strict=True)
        )  # fmt: skip

    @cached_property
    def _base_answers(self) -> list[str]:
        return self._answers(None)

    def _answers(self, route: str | None) -> list[str]:
        task, base = self.domain.task, self.bank.base
        prompts = [row.encoded.unanswered() for row in self.samples]
        with self.bank.routed(route):
            texts = generate_in_batches(base.model, base.tokenizer, prompts, task.max_new_tokens)
        return [task.answer_in(text) for text in texts]

    def compare_with_base(self, pairs: Pairs | None, train: Sequence[EncodedExample]) -> None:
        """Let the base read all ``pairs``, those of the ``train`` rows too; None without pairs."""
        self.pairs, rows = pairs, [*train, *self.rows]
        if pairs is not None:
            progress = self.display.progress("the base on the pairs", len(rows))
            with self.clock.phase(GENERAL), progress as advance:
                pairs.read(rows, advance)

    def figures(self) -> dict[str, Any]:
        """``validation_loss`` (nats per answer token, or per label of a head) and
        ``validation_figures``; the processes share the rows."""
        model, pad, rows = self.bank.base.model, self.bank.base.pad, self.rows
        logprobs = records = None
        with (
            distributed.sharing(),
            self.bank.routed(self.adapter),
            self.display.progress("validating", len(rows)) as advance,
        ):
            if self.head is not None:
                task = self.domain.task
                outputs = head_scores(model, self.head, rows, pad, advance, task.outputs)
                records = [head_score(task, row, e) for row, e in zip(outputs, rows, strict=True)]
                nats = np.array([record["nll"] for record in records])
                tokens = np.ones(len(rows), dtype=int)
            elif self.pairs is not None:
                moved = self.pairs.moved(rows, advance)
                return self._figures_of_pairs(rows, moved, self.pairs)
            elif rows and rows[0].choices:
                logprobs, nats, tokens = choices_and_nats(model, rows, pad, advance)
            else:
                nats, tokens = answer_nats(model, rows, pad, advance)
        loss = float(nats.sum() / max(tokens.sum(), 1))
        if logprobs is not None:
            records = [{"prediction": int(comparable(self.domain.task, row, example).argmax())}
                       for row, example in zip(logprobs, rows, strict=True)]  # fmt: skip
        return {"validation_loss": loss, **validation_figures(self.domain, rows, records, loss)}

    def _figures_of_pairs(
        self, rows: Sequence[EncodedExample], moved: np.ndarray, pairs: Pairs
    ) -> dict[str, Any]:
        """The mean DPO loss, and the domain metric: by default the win rate over the base.

        ``moved`` (pairs,) is how much more than the base the adapter prefers each chosen answer.
        """
        metric = self.domain.primary_metric
        odds = moved + np.array([pairs.margins[row.id] for row in rows])
        score, higher = float((0.5 + 0.5 * np.sign(moved)).mean()), True
        if metric == "margin":
            score = float(odds.mean())
        elif metric == "ranked":
            score = float((odds > 0).mean())
        elif metric == "nats_per_token":
            nats, tokens = answer_nats(self.bank.base.model, rows, self.bank.base.pad)
            score, higher = float(nats.sum() / max(tokens.sum(), 1)), False
        return {"validation_loss": float(pairs.losses(moved).mean()), "accuracy": None,
                "score": score, "higher_is_better": higher}  # fmt: skip

    def scaled_down(
        self, best: dict[str, Any], weights: Weights, limit: float
    ) -> tuple[dict[str, Any], Weights]:
        """The ``best`` epoch's record and ``weights`` at the scale that ranks highest, where all of
        its effect exceeds the drift ``limit``."""
        tried, full = "no epoch", weights
        # A head is trained for the whole effect, and that of magnitudes is not in proportion to B.
        if self.head is None and not self.bank.magnitudes(self.adapter):

            def scaled(scale: float) -> Weights:
                return {linear: (a, b * scale) for linear, (a, b) in full.items()}

            def evaluate(scale: float) -> dict[str, Any]:
                self.bank.set_weights(self.adapter, scaled(scale))
                return self.evaluate()

            tried = "no epoch at any scale"
            best = scale_down(best, evaluate, limit)
            scale = best.get("scale", 1.0)
            weights = full if scale == 1.0 else scaled(scale)
            self.display.stage(
                "scale", None, None, f"epoch {best['epoch']} at scale {scale:g}: "
                f"{self.domain.primary_metric} {best['score']:.3f}, KL {best['general_kl']:.3f}",
            )  # fmt: skip
        if not within_drift(best, limit):
            self.display.warn(
                f"{tried} stays within the drift limit of {limit:g}: by its predictions on general "
                "text, the adapter forgets the base. A lower --lr may help."
            )
        return best, weights

    def drift(self) -> dict[str, float]:
        """How far the adapter moved from the base on monitored texts (``Reference.compare``)."""
        if not self.monitored:
            return {}
        reference = self.reference  # each rank computes all of it: too large to be exchanged
        with distributed.sharing():
            return reference.compare(self.adapter)

    @cached_property
    def reference(self) -> Reference:
        """The base's predictions on the monitored texts."""
        with self.clock.phase(GENERAL):
            return reference_on(
                self.monitored, self.bank, self.display, "epochs are ranked with",
                self.predictions, self.public,
            )  # fmt: skip


def validation_figures(
    domain: Domain,
    examples: Sequence[EncodedExample],
    records: Scores | None,
    loss: float,
) -> dict[str, Any]:
    """Accuracy, and the score that ranks epochs: the domain metric of the predictions, or the loss.

    ``records`` are the scores of the examples (``inference.scores``); None for a task without
    choices, since generating answers every epoch would take too long. Thresholds of labels are
    those that the examples choose, as in an evaluation. The loss also ranks where the metric is one
    of likelihoods.
    """
    task, metric = domain.task, metric_named(domain.primary_metric)
    if records is None:
        return {"accuracy": None, "score": loss, "higher_is_better": False}
    if task.outputs == "labels":
        chosen = best_threshold(task, records, examples, [None] * len(examples))
        records = decided(task, records, chosen)
    table = ScoreTable(
        {"target": example.target, "truth": example.truth, "scores": {"adapter": record}}
        for record, example in zip(records, examples, strict=True)
    )
    accuracy, score = (
        one.value(table, "adapter", task.positive_index)
        for one in (metric_named("accuracy"), metric)
    )
    predictions = {record.get("prediction") for record in records}
    several = task.has_labels and len({example.target for example in examples}) > 1
    collapsed = {ONE_LABEL: True} if several and len(predictions) == 1 else {}
    if score is None or metric.name == "loss":
        return {"accuracy": accuracy, "score": loss, "higher_is_better": False, **collapsed}
    better = metric.higher_is_better
    return {"accuracy": accuracy, "score": score, "higher_is_better": better, **collapsed}


def collapse_warning(best: Mapping[str, Any], rate: float) -> str | None:
    """A warning where even the ``best`` epoch gives all validation rows one label."""
    if not best.get(ONE_LABEL):
        return None
    return (
        "the best epoch gives all validation rows the same label. The training may have collapsed: "
        f"try --lr {rate / 3:.1g}, and look at the labels of the rows."
    )


# ── Ranking ─────────────────────────────────────────────────────────────────────────────────────


def within_drift(record: Mapping[str, Any], limit: float) -> bool:
    """Whether KL on general text is at most ``limit``; True where it was not measured."""
    kl: float = record.get("general_kl", 0.0)
    return kl <= limit


def rank(record: Mapping[str, Any], limit: float) -> tuple[bool, float, float]:
    """Records are compared by this: within the drift limit, then score, then validation loss."""
    score = record["score"] if record["higher_is_better"] else -record["score"]
    return within_drift(record, limit), score, -record["validation_loss"]


def scale_down(
    best: Mapping[str, Any], evaluate: Callable[[float], Mapping[str, Any]], limit: float
) -> dict[str, Any]:
    """``best``, or the record of it at one of ``SCALES`` that ranks higher, with its ``scale``.

    ``evaluate`` gives the figures of the best epoch's adapter at a scale.
    """
    chosen = dict(best)
    for scale in SCALES:
        record = {**best, **evaluate(scale), "scale": scale}
        if rank(record, limit) > rank(chosen, limit):
            chosen = record
    return chosen


def observe(history: Sequence[Mapping[str, Any]], limit: float = math.inf) -> str:
    """What the last epoch's figures mean, in words; 2 % of the loss counts as a change.

    ``limit`` is the drift limit: beyond it general knowledge is being lost.
    """
    last = history[-1]
    if not within_drift(last, limit):
        return f"general knowledge is being lost: KL {last['general_kl']:.2f}, limit {limit:g}"
    if len(history) == 1:
        return "first epoch"
    if last.get(ONE_LABEL):
        return "one label for all rows: a lower learning rate may help"
    before = min(record["validation_loss"] for record in history[:-1])
    change = (last["validation_loss"] - before) / max(before, 1e-9)
    training_falls = last["training_loss"] < history[-2]["training_loss"]
    if change > 0.02:
        if training_falls:
            return "overfitting: validation loss rises while training loss falls"
        return "unstable: both losses rise; a lower learning rate may help"
    if change < -0.02:
        return "still improving"
    return "converging"
