"""What got worse since older adapters: for ``--against FOLDER``.

Two figures of each adapter are compared with those of the adapter of the same name in the older
folder: the metric it is evaluated on, and pooled general knowledge. (Twenty more figures would hide
a loss.) On the same rows, the two adapters are compared item by item, as base and adapter are. On
other rows, their gains over the base are compared as two independent figures
(``stats.intervals.difference_bounds``). A figure got worse when even the better bound of its change
is a loss. Holm's method widens the bounds so that of all figures of all adapters together one is
called worse by chance in at most 5 % of reports (benchmarks/verdict/retrained.py).

Gates whose result got worse are listed. One that now fails by a count (a leak, a changed base, a
figure that is not a number) is worse; one whose figure is sampled may fail by chance, and what it
means for the adapter is in its verdict.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.adapters.versions import versions
from lora_domains.atomic import folders_with
from lora_domains.errors import AdapterError, UsageError
from lora_domains.report.card import CARD, AdapterEntry, Card, Report, read_items
from lora_domains.report.report import rebuilt
from lora_domains.report.text import gained, kept
from lora_domains.stats.comparisons import holm
from lora_domains.stats.intervals import difference_bounds
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import WORST_FIRST
from lora_domains.verdict.scores import ScoreTable

Items = Sequence[Mapping[str, Any]]
Change = dict[str, Any]
Compared = Callable[[float], Change]
"""A change with bounds at a level."""


def older_adapters(folder: Path) -> dict[str, Path]:
    """The adapters to compare with, by name: those in ``folder``, or ``folder`` itself.

    Raises UsageError when it holds none.
    """
    if (folder / CARD).is_file():
        return {Card.read(folder).adapter.path: folder}
    found = {path.name: path for path in folders_with(folder, CARD)}
    if not found:
        raise UsageError(
            where=str(folder),
            expected="a folder of older adapters, each with its card.json and items.jsonl",
            found="none in it" if folder.is_dir() else "no such folder",
            hint="Give a copy of adapters/, or reports/measured of an older benchmark.",
        )
    return found


def comparison_with(folder: str | None) -> Callable[[Report, Callable[[str], Items]], None]:
    """A function that sets ``since`` of a report, given its adapters' items by name.

    ``folder`` holds the older adapters; without one, the function does nothing. Raises UsageError
    at once when it holds none; the function raises what ``regressions`` does.
    """
    older = older_adapters(Path(folder)) if folder else None

    def compare(report: Report, items: Callable[[str], Items]) -> None:
        if folder and older is not None:
            report.since = regressions(report, items, older, Path(folder).resolve().name)

    return compare


def since_replaced(card: Card, folder: Path, *, validation: bool = False) -> dict[str, Any] | None:
    """Changes since the version that the adapter in ``folder`` replaced, as ``since`` of a report.

    ``version`` in it is the number of that version. With ``validation`` they are those of the
    metric on validation rows, where both have scores on some. None where no version of other bytes
    was scored on the same base.
    """
    report = Report(base=card.base, environment={}, adapters=[card.adapter], matrix={})
    for version in reversed(versions(folder)):
        try:
            older, name = Card.read(version), f"version {version.name}"
            if older.adapter.sha256 == card.adapter.sha256:
                continue
            since = None
            if validation:
                _check_base(older, report, name)
                since = _in_validation(older, read_items(version), card, read_items(folder), name)
            elif older.adapter.judged:
                known = {card.adapter.path: version}
                since = regressions(report, lambda _: read_items(folder), known, name)
        except (AdapterError, UsageError):  # another base, or a damaged version: nothing to say
            continue
        if since is not None:
            return since | {"version": version.name}
    return None


def _in_validation(
    older: Card, before: Items, card: Card, after: Items, name: str
) -> dict[str, Any] | None:
    """``since`` with one figure, the metric on validation rows; None without scores on some."""
    old, new = older.adapter, card.adapter
    runs = Runs(before, after, "validation", old.positive_index, new.positive_index)
    metric = new.metric
    if metric is None or old.metric != metric:
        return None
    if any(metric_named(metric).compare(part) is None for part in (runs.before, runs.after)):
        return None
    same_rows = old.data.get("validation") == new.data.get("validation")
    compared = {metric: partial(_change, metric, runs, same_rows)}
    figures = holm(compared, lambda change: change["worse"])
    changes = _changes(old, replace(new, gates=[]), figures)
    return {"report": name, "worse": changes["worse"], "adapters": {new.path: changes},
            "added": [], "missing": []}  # fmt: skip


def regressions(
    report: Report, items: Callable[[str], Items], older: Mapping[str, Path], name: str
) -> dict[str, Any]:
    """The part ``since`` of ``report``: changes from ``older`` adapters, a folder called ``name``.

    ``items`` gives the items of an adapter of the report by its name. Raises UsageError when the
    bases differ (gains over different bases are not comparable), AdapterCorrupt when an older
    adapter cannot be read.
    """
    entries = {entry.path: entry for entry in report.adapters}
    compared: dict[tuple[str, str], Compared] = {}
    before: dict[str, AdapterEntry] = {}
    for path, entry in entries.items():
        if path in older:
            card, old_items = rebuilt(older[path])
            _check_base(card, report, f"{name}/{path}")
            before[path] = card.adapter
            new_items = items(path) if entry.judged else []
            for figure, change in _figures(card.adapter, old_items, entry, new_items):
                compared[path, figure] = change
    found = holm(compared, lambda change: change["worse"])
    changes = {
        path: _changes(
            old, entries[path], {figure: c for (of, figure), c in found.items() if of == path}
        )
        for path, old in before.items()
    }
    return {
        "report": name,
        "worse": any(change["worse"] for change in changes.values()),
        "adapters": changes,
        "added": [path for path in entries if path not in older],
        "missing": [path for path in older if path not in entries],
    }


def _check_base(card: Card, report: Report, where: str) -> None:
    before, now = card.base, report.base
    if before.identity != now.identity:
        raise UsageError(
            where=where,
            expected=f"an adapter on the same base, {now.id} (identity {now.identity[:12]})",
            found=f"one on {before.id} (identity {before.identity[:12]})",
            hint="Compare with adapters that were evaluated on this base.",
        )


def _figures(
    old: AdapterEntry, before: Items, new: AdapterEntry, after: Items
) -> Iterator[tuple[str, Compared]]:
    """The figures of one adapter that old and new have, and how each is compared at a level."""
    was, is_ = gained(old), gained(new)
    if was and is_ and was[0] == is_[0]:
        same_rows = old.data.get("test") == new.data.get("test")
        runs = Runs(before, after, "test", old.positive_index, new.positive_index)
        yield is_[0], partial(_change, is_[0], runs, same_rows)
    if kept(old) and kept(new):
        same_suite = old.judged.get("suite") == new.judged.get("suite")
        runs = Runs(before, after, "general")
        yield "general", partial(_change, "accuracy", runs, same_suite)


def _changes(old: AdapterEntry, new: AdapterEntry, figures: Mapping[str, Change]) -> Change:
    """The figures and gates of one adapter that changed."""
    verdicts = {gate["name"]: gate["verdict"] for gate in old.gates}
    gates = [
        {
            "name": gate["name"],
            "before": verdicts[gate["name"]],
            "now": gate["verdict"],
            "worse": gate["verdict"] == "fail" and gate["lower"] is gate["upper"] is None,
        }
        for gate in new.gates
        if _weaker(verdicts.get(gate["name"]), gate["verdict"])
    ]
    return {
        "verdict": {"before": old.outcome, "now": new.outcome},
        "figures": dict(figures),
        "gates": gates,
        "worse": any(part["worse"] for part in (*figures.values(), *gates)),
    }


class Runs:
    """The items of the set ``part`` in an older and a new run of an adapter."""

    def __init__(
        self, before: Items, after: Items, part: str,
        positive_before: int | None = None, positive: int | None = None,
    ) -> None:  # fmt: skip
        self.before, self.after = (ScoreTable(run).where("set", part) for run in (before, after))
        self.positive_before, self.positive = positive_before, positive

    def paired(self) -> ScoreTable | None:
        """The same items with the scores ``was`` and ``now``; None where rows differ.

        Digests of rows are keyed by the output folder, so that those of another machine differ: the
        same rows are those with the same targets and groups in the same order.
        """
        old, new = self.before, self.after
        if not old or _arrangement(old) != _arrangement(new):
            return None
        return ScoreTable(
            {**now, "scores": {"was": was["scores"]["adapter"], "now": now["scores"]["adapter"]}}
            for was, now in zip(old, new, strict=True)
        )


def _arrangement(items: ScoreTable) -> list[tuple[Any, int | None]]:
    """Target and group of each item; groups are numbered in order of appearance."""
    numbers: dict[Any, int] = {}
    groups = [item.get("group") for item in items]
    codes = [None if g is None else numbers.setdefault(g, len(numbers)) for g in groups]
    return [(item["target"], code) for item, code in zip(items, codes, strict=True)]


def _change(name: str, runs: Runs, same: bool, level: float) -> Change:
    """From ``before`` to ``now``: the adapter's figure on the same rows, else its gains."""
    metric, pairs = metric_named(name), runs.paired() if same else None
    paired = metric.compare(pairs, "was", "now", runs.positive, level) if pairs else None
    if paired is not None:
        before, now, bounds = paired.base, paired.adapter, paired.bounds
    else:
        was = metric.compare(runs.before, positive=runs.positive_before, level=level)
        is_ = metric.compare(runs.after, positive=runs.positive, level=level)
        if was is None or is_ is None:
            raise ValueError(f"{name} expects a score of base and adapter on every item")
        before, now = was.difference, is_.difference
        bounds = difference_bounds(now, is_.bounds, before, was.bounds)
    known = bool(np.isfinite(bounds).all())  # a single item has no bounds
    worse = bounds.upper < 0 if metric.higher_is_better else bounds.lower > 0
    return {
        "paired": paired is not None,
        "before": before,
        "now": now,
        "change": now - before,
        "lower": bounds.lower if known else None,
        "upper": bounds.upper if known else None,
        "level": level,
        "worse": known and worse,
    }


def _weaker(before: str | None, now: str) -> bool:
    if before not in WORST_FIRST or now not in WORST_FIRST:  # new, or not applicable
        return False
    return WORST_FIRST.index(now) < WORST_FIRST.index(before)
