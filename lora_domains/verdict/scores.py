"""Per-item scores, read by column.

An adapter's ``items.jsonl`` holds everything that figures and gates are computed from, so a report
can be rebuilt or checked without a model. One item is one JSON object:

    {"set": "test" | "train" | "validation" | "general" | "text", "id": "test:17", "digest": …,
     "target": 1, "group": …, "slices": {…}, "suite": …,
     "scores": {"base": {…}, "adapter": {…}, NAME: {…}}}

where the score of a contender holds ``prediction``, ``nll``, ``confidence``, ``brier`` (choices),
``positive`` (probability of the positive class), ``f1``, ``exact`` (generation), ``nats`` and
``tokens`` (all but some baselines), ``kl`` (text). Validation rows are included where they chose a
threshold; no gate reads them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

Item = Mapping[str, Any]
Column = NDArray[np.float64]

CONTENDERS = ("base", "adapter")
LABELS = {
    "base": "the base",
    "adapter": "the adapter",
    "parent": "the adapter it continues from",
    "majority": "the majority class",
    "tfidf": "TF-IDF",
}
"""Contenders as people read them; others go by their own name, in words."""


def contender_label(name: str) -> str:
    """``tfidf`` → ``TF-IDF``, ``3_shot`` → ``the base with 3 examples``."""
    shots = name.removesuffix("_shot")
    if shots != name:
        return f"the base with {shots} examples"
    return LABELS.get(name, name.replace("_", " "))


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

    def column(self, contender: str, key: str) -> Column:
        """One number per item of one contender, (items,); NaN where it has none."""
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
                return [score.get(key, np.nan) for score in scores]

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
