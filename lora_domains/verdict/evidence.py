"""What gates are judged on: an adapter's scored items by set, and what was counted beside them."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from lora_domains.stats.bootstrap import FloatArray, bootstrap, effective_groups, group_codes
from lora_domains.stats.calibration import calibration
from lora_domains.stats.comparisons import Comparison, ratio, size_of_ratio
from lora_domains.stats.intervals import Bounds
from lora_domains.stats.shares import auc_bounds, membership_auc
from lora_domains.verdict import CONTENDERS, contender_label
from lora_domains.verdict.ledger import Standing
from lora_domains.verdict.rules import GateResult, Measurement, capital, unmeasured
from lora_domains.verdict.scores import TARGET, Metric, ScoreTable


@dataclass(frozen=True)
class Fault:
    """Why a figure that should exist has no value."""

    why: str
    diverged: bool
    """A score is not a number, which fails a gate; a score that is missing leaves it open."""

    def result(self, name: str, rule: str, threshold: float | None) -> GateResult:
        """The result of the gate that needs the figure."""
        result = unmeasured(name, rule, threshold, self.why)
        return replace(result, verdict="fail") if self.diverged else result


@dataclass(frozen=True)
class Evidence:
    """Everything that a gate may look at."""

    items: ScoreTable
    """All items of an adapter."""
    metric: Metric
    """The metric of the domain."""
    labels: Sequence[str] = ()
    """Empty where the task has no fixed classes."""
    positive: int | None = None
    """The number of the positive class among ``labels``."""
    knowledge: str = "questions"
    """How general knowledge is measured: by "questions", by "masked tokens" (an encoder), or by
    linear probes of "features" (an encoder without a masked-token head); in older cards of such an
    encoder, by "nothing"."""
    leaks: Mapping[str, int] | None = None
    """Rows of the test set and probes in what was trained on: ``exact`` and ``near``."""
    trained_elsewhere: bool = False
    """Whether others trained the adapter: its base cannot be verified, and its training rows are
    only those that were given, if any."""
    embedded_base: bool = False
    """Whether the base is the embedded one, on which the default limit of KL was calibrated."""
    near_leaks: Collection[str] = ()
    """Ids of the rows that are nearly the same as what training read."""
    prevalence: float | None = None
    """The share of positives where the adapter will be used, as the domain declares it."""
    base_changed: bool = False
    largest_move: float = 0.0
    """The largest absolute difference of a logit from the base's."""
    evaluations: Standing | None = None
    """This evaluation among all those of its test set."""

    @cached_property
    def test(self) -> ScoreTable:
        return self.items.where("set", "test")

    @cached_property
    def without_near_leaks(self) -> ScoreTable:
        """The test rows that are no near leak."""
        # The windows of a text are numbered after a slash.
        clean = [str(item["id"]).split("/")[0] not in self.near_leaks for item in self.test]
        return self.test.part(np.flatnonzero(clean))

    @cached_property
    def train(self) -> ScoreTable:
        return self.items.where("set", "train")

    @cached_property
    def general(self) -> ScoreTable:
        """Probes of general knowledge."""
        return self.items.where("set", "general")

    @cached_property
    def text(self) -> ScoreTable:
        """General text."""
        return self.items.where("set", "text")

    @property
    def level(self) -> float:
        """The confidence level of the gates' bounds."""
        return self.evaluations.level if self.evaluations else 0.95

    def compared(
        self, metric: Metric, table: ScoreTable, rival: str = "base", positive: int | None = None
    ) -> Comparison | Fault:
        """The adapter against ``rival``, or why they cannot be compared."""
        comparison = metric.compare(table, rival, "adapter", positive, self.level)
        if comparison is not None:
            return comparison
        counted = metric.counted(table)
        faults = (
            self.fault(contender, counted, metric.scores, capital(metric.label))
            for contender in (rival, "adapter")
        )
        return next(fault for fault in faults if fault is not None)

    def fault(
        self, contender: str, table: ScoreTable, scores: Sequence[str], what: str
    ) -> Fault | None:
        """Why a figure of ``scores`` of a contender has no value; None where it has one."""
        who = contender_label(contender)
        if not len(table):
            return Fault(f"{what} was not measured: there is nothing to measure it on.", False)
        for key in scores:
            if key == TARGET or table.scored(contender, key):
                continue
            if table.missing(contender, key):
                return Fault(f"{what} was not measured: items lack the {key} of {who}.", False)
            return Fault(f"{what} is not a number: {who} gives {key} that is not finite.", True)
        return None

    def kl(self, level: float) -> Measurement:
        """KL(base || adapter) on general text, nats per token."""
        columns = np.stack([self.text.column("adapter", key) for key in ("kl", "tokens")], axis=1)
        bounds = bootstrap(
            ratio, columns, groups=self.text.groups(), level=level,
            span=size_of_ratio(columns), limits=(0.0, math.inf),
        )  # fmt: skip
        return Measurement(float(ratio(columns.sum(0))), bounds, len(self.text), "texts", level)

    def membership(self, level: float) -> dict[str, Measurement]:
        """AUCs of telling training rows from test rows, by what they are told.

        "loss": by the adapter's loss on a row (label cross-entropy, else nats per answer token).
        "calibrated": by what the adapter gained on it over the base, in nats per answer token.
        Each is left out where a row has no such score.
        """
        parts = (self.train, self.test)
        units = [effective_groups(group_codes(p.groups(), len(p)), len(p)) for p in parts]
        measured = {}
        for name, seen in (("loss", self._fit), ("calibrated", self._gains)):
            trained, unseen = map(seen, parts)
            if trained is not None and unseen is not None:
                auc = membership_auc(trained, unseen)
                bounds = auc_bounds(auc, units[0], units[1], level)
                rows = len(self.train) + len(self.test)
                measured[name] = Measurement(auc, bounds, rows, "rows", level)
        return measured

    def _fit(self, part: ScoreTable) -> FloatArray | None:
        """How well the adapter fits each row: minus its loss, (items,)."""
        if part.scored("adapter", "nll"):
            return -part.column("adapter", "nll")
        nats = self._nats(part, "adapter")
        return None if nats is None else -nats

    def _gains(self, part: ScoreTable) -> FloatArray | None:
        """Nats per answer token that the adapter gained over the base on each row, (items,)."""
        before, after = (self._nats(part, name) for name in CONTENDERS)
        return None if before is None or after is None else before - after

    @staticmethod
    def _nats(part: ScoreTable, contender: str) -> FloatArray | None:
        if not part.scored(contender, "nats") or not part.scored("adapter", "tokens"):
            return None
        nats, tokens = part.column(contender, "nats"), part.column("adapter", "tokens")
        per_token: FloatArray = nats / tokens.clip(1)
        return per_token

    @cached_property
    def calibration(self) -> dict[str, Any]:
        """``calibration_at`` 95 %."""
        return self.calibration_at(0.95)

    def calibration_at(self, level: float) -> dict[str, Any]:
        """How reliable the adapter's confidence is (``stats.calibration``), with bounds.

        Empty where its answers have no confidence.
        """
        test = self.test
        if test.scored("adapter", "probabilities"):
            return self._calibration_of_labels(level)
        if not test.scored("adapter", "confidence") or not test.scored("adapter", "brier"):
            return {}
        confidence, prediction, brier = (
            test.column("adapter", key) for key in ("confidence", "prediction", "brier")
        )
        right = prediction == test.targets()
        return calibration(confidence, right, brier, test.groups(), level)

    def _calibration_of_labels(self, level: float) -> dict[str, Any]:
        """The same for rows with several labels: whether a row has a label is one answer."""
        test, truth = self.test, self.test.truth()
        chance, predicted = (test.column("adapter", k) for k in ("probabilities", "predicted"))
        rows = group_codes(test.groups(), len(test))
        groups = np.repeat(np.arange(len(test)) if rows is None else rows, truth.shape[1])
        confidence = np.where(predicted > 0, chance, 1 - chance)
        right, brier = predicted == truth, 2 * (chance - truth) ** 2
        answers = confidence.ravel(), right.ravel(), brier.ravel()
        found = calibration(*answers, groups.tolist(), level)
        return found | {"risk_coverage": []}  # rows are not referred by one of their labels

    def metric_on(
        self, table: ScoreTable, contender: str = "adapter", level: float | None = None
    ) -> tuple[float, Bounds]:
        """A contender's domain metric on ``table`` and its bounds; 0 where it has no value."""
        value = self.metric.value(table, contender, self.positive)
        bounds = self.metric.bounds(table, contender, self.positive, level or self.level)
        return (0.0 if value is None else value), bounds
