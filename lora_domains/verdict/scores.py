"""Per-item scores, read by column, and what a metric of them is.

An adapter's ``items.jsonl`` holds everything that figures and gates are computed from, so a report
can be rebuilt or checked without a model. One item is one JSON object:

    {"set": "test" | "train" | "validation" | "general" | "text", "id": "test:17", "digest": …,
     "target": 1, "truth": […], "group": …, "slices": {…}, "suite": …,
     "scores": {"base": {…}, "adapter": {…}, NAME: {…}}}

where the score of a contender holds ``prediction``, ``nll``, ``confidence``, ``brier`` (choices),
``positive`` (probability of the positive class), ``f1``, ``exact`` and those of ``tasks.answers``
(generation), ``judge`` (a program's), ``nats`` and ``tokens`` (all but some baselines), ``kl``
(text). Where rows may have several labels, ``truth`` of the item and ``predicted`` and
``probabilities`` of a score have a number for each label; where a number is predicted, ``truth``
holds it and ``value`` is the predicted one. Validation rows are included where they chose a
threshold; no gate reads them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import FloatArray, Statistic, bootstrap
from lora_domains.stats.comparisons import (
    Comparison,
    compare_accuracy,
    compare_means,
    compare_ratios,
    ratio,
    size_of_ratio,
)
from lora_domains.stats.intervals import Bounds
from lora_domains.stats.seeds import influence
from lora_domains.stats.shares import share_of
from lora_domains.verdict import CONTENDERS, MetricInfo

Item = Mapping[str, Any]
Column = NDArray[np.float64]


class ScoreTable:
    """Items whose columns are read once: every metric reads the same few.

    A part of a table cuts its columns from those of the whole.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = list(items)
        self._columns: dict[tuple[str, str], Column] = {}
        self._scores: dict[str, list[Mapping[str, float]]] = {}
        self._groups: list[Any] | None = None
        self._whole: ScoreTable | None = None
        self._places: NDArray[np.intp] = np.empty(0, np.intp)

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items)

    def __getitem__(self, place: int) -> Item:
        return self._items[place]

    def where(self, field: str, value: str) -> "ScoreTable":
        """The items whose ``field`` is ``value``."""
        return ScoreTable(item for item in self._items if item.get(field) == value)

    def part(self, places: NDArray[np.intp]) -> "ScoreTable":
        """The items at ``places``, numbers (n,)."""
        table = ScoreTable(self._items[i] for i in places)
        table._whole, table._places = self, places
        return table

    def targets(self) -> Column:
        """The index of the correct choice of each item, (items,)."""
        if self._whole is not None:
            return self._whole.targets()[self._places]
        return self._kept(("", "target"), lambda: [item["target"] for item in self._items])

    def truth(self) -> Column:
        """What is to be predicted of each item where that is not one choice, (items, k)."""
        if self._whole is not None:
            return self._whole.truth()[self._places]
        return self._kept(("", "truth"), lambda: [item["truth"] for item in self._items])

    def column(self, contender: str, key: str) -> Column:
        """One number per item of one contender, (items,); NaN where it has none.

        Of a score that is a list, (items, k).
        """
        if self._whole is not None:
            return self._whole.column(contender, key)[self._places]

        def values() -> Iterable[float]:
            if contender not in self._scores:
                self._scores[contender] = [
                    item["scores"].get(contender) or {} for item in self._items
                ]
            scores = self._scores[contender]
            try:
                # Almost always every item has it, and this is several times faster.
                return list(map(itemgetter(key), scores))
            except KeyError:
                known = next((score[key] for score in scores if key in score), np.nan)
                none: Any = [np.nan] * len(known) if isinstance(known, list) else np.nan
                return [score.get(key, none) for score in scores]

        return self._kept((contender, key), values)

    def scored(self, contender: str, key: str) -> bool:
        """Whether every item has this score of the contender, a finite number."""
        return bool(len(self)) and bool(np.isfinite(self.column(contender, key)).all())

    def gives(self, contender: str, key: str) -> bool:
        """Whether some item has this score of the contender, even if it is not a number."""
        return any(key in (item["scores"].get(contender) or {}) for item in self._items)

    def missing(self, contender: str, key: str) -> bool:
        """Whether some item lacks this score; one that is not a number is there."""
        return any(key not in (item["scores"].get(contender) or {}) for item in self._items)

    def groups(self) -> list[Any] | None:
        """The group of each item; None where none has one. A row without a group stands alone."""
        if self._groups is None:
            groups = [item.get("group") for item in self._items]
            self._groups = (
                []
                if all(group is None for group in groups)
                else [g if g is not None else f"\0{i}" for i, g in enumerate(groups)]
            )
        return self._groups or None

    def slice_columns(self) -> list[str]:
        """The names of the columns that rows are sliced by, in order of appearance."""
        return list(
            dict.fromkeys(name for item in self._items for name in item.get("slices") or {})
        )

    def slice_values(self, column: str) -> list[str]:
        """The value of each item in a column that rows are sliced by; "None" where it has none."""
        return [str((item.get("slices") or {}).get(column)) for item in self._items]

    def baselines(self) -> list[str]:
        """The contenders other than base and adapter, in the order they were scored."""
        names = dict.fromkeys(name for item in self._items for name in item["scores"])
        return [name for name in names if name not in CONTENDERS]

    def _kept(self, name: tuple[str, str], values: Callable[[], Iterable[float]]) -> Column:
        if name not in self._columns:
            self._columns[name] = np.array(values(), float)
            self._columns[name].flags.writeable = False
        return self._columns[name]


# ── Metrics of scored items ────────────────────────────────────────────────────────────────────

RESAMPLES = 1000
"""Of the bounds of one contender; a comparison takes the bootstrap's default."""
TARGET = "target"
"""Stands for the index of the correct choice among the scores that a metric needs."""


class Pair(NamedTuple):
    """The columns (items, k) of two contenders on the same items, and how to compare them."""

    first: FloatArray
    second: FloatArray
    groups: Sequence[Hashable] | None
    level: float


class Sample(NamedTuple):
    """The columns (items, k) of one contender, and how to bound a figure of them."""

    columns: FloatArray
    groups: Sequence[Hashable] | None
    level: float


Summed = tuple[FloatArray, Statistic]
"""Columns (items, k), and the statistic that turns their sums into a metric."""


@dataclass(frozen=True)
class Metric(MetricInfo, ABC):
    """A figure of one contender over scored items.

    Methods take a table of items and the number of the positive class, which most metrics ignore.
    """

    scores: tuple[str, ...]
    """The keys of a contender's score that it is computed from; ``TARGET`` is the item's own."""
    limits: tuple[float, float] | None = field(default=None, kw_only=True)
    """The range of the metric; None: 0 to 1, or from 0 up where it is measured in nats."""

    @property
    def range(self) -> tuple[float, float]:
        """The least and the largest value."""
        return self.limits or (0.0, math.inf if self.nats else 1.0)

    def value(self, table: ScoreTable, contender: str, positive: int | None = None) -> float | None:
        """The metric of one contender; None where some item that counts has no score of it."""
        columns = self._columns(self.counted(table), contender)
        return None if columns is None else self.value_of(columns, positive)

    def bounds(
        self, table: ScoreTable, contender: str, positive: int | None = None, level: float = 0.95
    ) -> Bounds:
        """One-sided bounds of ``value``; (-inf, inf) where it is None."""
        table = self.counted(table)
        columns = self._columns(table, contender)
        if columns is None:
            return Bounds(-math.inf, math.inf)
        return self.bounds_of(Sample(columns, table.groups(), level), positive)

    def compare(
        self,
        table: ScoreTable,
        first: str = "base",
        second: str = "adapter",
        positive: int | None = None,
        level: float = 0.95,
    ) -> Comparison | None:
        """``second`` minus ``first`` on the same items; None where one of them has no value."""
        table = self.counted(table)
        one, two = (self._columns(table, contender) for contender in (first, second))
        if one is None or two is None:
            return None
        return self.comparison_of(Pair(one, two, table.groups(), level), positive)

    def summands(
        self, table: ScoreTable, contender: str, positive: int | None = None
    ) -> Summed | None:
        """For ``bootstrap`` and ``seeds.influence``; None where ``value`` is."""
        columns = self._columns(self.counted(table), contender)
        return None if columns is None else self.summands_of(columns, positive)

    def contributions(
        self, table: ScoreTable, contender: str, positive: int | None = None
    ) -> FloatArray | None:
        """The contribution of each item, (items,), whose mean is the metric; None where it is."""
        summands = self.summands(table, contender, positive)
        return None if summands is None else influence(summands[1], summands[0])

    def counted(self, table: ScoreTable) -> ScoreTable:
        """The items of ``table`` that the metric is about: all, unless it says otherwise."""
        return table

    def applies(self, labels: Sequence[str], positive: int | None) -> bool:
        """Whether a task with these labels (none where it has no fixed classes) has the metric."""
        return True

    @abstractmethod
    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        """The metric from a contender's columns (items, k), in the order of ``scores``."""

    @abstractmethod
    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        """The paired comparison of two contenders."""

    @abstractmethod
    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        """See ``summands``."""

    def bounds_of(self, sample: Sample, positive: int | None) -> Bounds:
        """The bounds from a contender's columns: a bootstrap unless a metric has its own."""
        summed, statistic = self.summands_of(sample.columns, positive)
        return bootstrap(
            statistic, summed, groups=sample.groups, resamples=RESAMPLES, level=sample.level,
            span=self.span(summed), limits=self.range,
        )  # fmt: skip

    def span(self, summed: FloatArray) -> float:
        """How far the metric would move if every item changed (``bootstrap``): 1 for a share."""
        return size_of_ratio(summed) if self.nats else 1.0

    def _columns(self, table: ScoreTable, contender: str) -> FloatArray | None:
        if not len(table):
            return None
        columns = np.column_stack([
            table.targets() if key == TARGET else table.column(contender, key)
            for key in self.scores
        ])  # fmt: skip
        return columns if np.isfinite(columns).all() else None


class MeanMetric(Metric):
    """The mean of one score."""

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        return float(columns[:, 0].mean())

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        first, second = pair.first[:, 0], pair.second[:, 0]
        return compare_means(
            first, second, pair.groups, self.higher_is_better, pair.level, not self.nats
        )

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        return np.concatenate([columns, np.ones((len(columns), 1))], axis=1), ratio


class NatsPerToken(Metric):
    """Nats over tokens, each summed over all items."""

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        return float(ratio(columns.sum(0)))

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        before, after = (c[:, 0] / c[:, 1].clip(1) for c in (pair.first, pair.second))
        return compare_ratios(pair.first, pair.second, pair.groups, before - after, pair.level)

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        return columns, ratio


class RightShare(Metric):
    """A share of items that are right, whose bounds are those of a share (Wilson's)."""

    @abstractmethod
    def right(self, columns: FloatArray) -> NDArray[np.bool_]:
        """Whether each item is right, (items,)."""

    def value_of(self, columns: FloatArray, positive: int | None) -> float:
        return float(self.right(columns).mean())

    def comparison_of(self, pair: Pair, positive: int | None) -> Comparison:
        first, second = self.right(pair.first), self.right(pair.second)
        return compare_accuracy(first, second, pair.groups, pair.level)

    def summands_of(self, columns: FloatArray, positive: int | None) -> Summed:
        return np.stack([self.right(columns), np.ones(len(columns))], axis=1), ratio

    def bounds_of(self, sample: Sample, positive: int | None) -> Bounds:
        return share_of(self.right(sample.columns), sample.groups, sample.level).bounds


class Accuracy(RightShare):
    """The share of items whose prediction is the target."""

    def right(self, columns: FloatArray) -> NDArray[np.bool_]:
        right: NDArray[np.bool_] = columns[:, 0] == columns[:, 1]
        return right
