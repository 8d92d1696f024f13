"""Per-item scores, read by columns: an array a score. ``figures`` says what an item holds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np

Items = Sequence[Mapping[str, Any]]
Array = np.ndarray
CONTENDERS = ("base", "adapter")


class Rows(list[Mapping[str, Any]]):
    """Items that remember their columns: every metric reads the same few."""

    def __init__(self, items: Iterable[Mapping[str, Any]], whole: "Rows | None" = None) -> None:
        super().__init__(items)
        self.columns: dict[tuple[str, str], Array] = {}
        self.scores: dict[str, list[Mapping[str, float]]] = {}
        self.numbered: list[Any] | None = None
        self.whole, self.places = whole, np.empty(0, int)

    def part(self, places: Array) -> "Rows":
        """The items at ``places``, numbers (n,), whose columns are cut from these."""
        found = Rows((self[i] for i in places), self)
        found.places = places
        return found

    def targets(self) -> Array:
        """The index of the right choice of each item, (items,)."""
        if self.whole is not None:
            return self.whole.targets()[self.places]
        return self._kept(("", "target"), lambda: [item["target"] for item in self])

    def column(self, contender: str, key: str) -> Array:
        """One number per item of one contender; NaN where it has none."""

        if self.whole is not None:
            return self.whole.column(contender, key)[self.places]

        def values() -> Iterable[float]:
            if contender not in self.scores:
                self.scores[contender] = [item["scores"].get(contender) or {} for item in self]
            scores = self.scores[contender]
            try:
                # Almost always every item has it, and this is several times faster.
                return list(map(itemgetter(key), scores))
            except KeyError:
                return [score.get(key, np.nan) for score in scores]

        return self._kept((contender, key), values)

    def groups(self) -> list[Any] | None:
        """The group of each item; None where none has one. A row without a group stands alone."""
        if self.numbered is None:
            groups = [item.get("group") for item in self]
            self.numbered = (
                []
                if all(group is None for group in groups)
                else [g if g is not None else f"\0{i}" for i, g in enumerate(groups)]
            )
        return self.numbered or None

    def _kept(self, name: tuple[str, str], values: Callable[[], Iterable[float]]) -> Array:
        if name not in self.columns:
            self.columns[name] = np.array(values(), float)
            self.columns[name].flags.writeable = False
        return self.columns[name]


def chosen(items: Items, field: str, wanted: str) -> Rows:
    """The items whose ``field`` is ``wanted``."""
    return Rows(item for item in items if item.get(field) == wanted)


def column(items: Items, contender: str, key: str) -> Array:
    """One number per item of one contender; NaN where it has none."""
    return (items if isinstance(items, Rows) else Rows(items)).column(contender, key)


def targets(items: Items) -> Array:
    """The index of the right choice of each item, (items,)."""
    return (items if isinstance(items, Rows) else Rows(items)).targets()


def baselines(items: Items) -> list[str]:
    """The contenders other than base and adapter, in the order they were scored."""
    return [name for name in (items[0]["scores"] if items else {}) if name not in CONTENDERS]
