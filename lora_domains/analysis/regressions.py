"""What got worse since older adapters: for ``--against FOLDER``.

Two figures of each adapter are compared with those of the adapter of the same name in the older
folder: the metric it is evaluated on, and pooled general knowledge. (Twenty more figures would
raise false alarms.) On the same rows, the two adapters are compared item by item, as base and
adapter are, with the same one-sided 95 % bounds. On other rows, their gains over the base are
compared as two independent figures (``stats.intervals.difference_bounds``). A figure got worse when
even the better bound of its change is a loss. A gate got worse when it fails and did not before;
one that passed and is inconclusive now is listed, but the verdict already says so.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_domains.atomic import folders_with
from lora_domains.errors import UsageError
from lora_domains.report.card import CARD, AdapterEntry, Card, Report
from lora_domains.report.report import rebuilt
from lora_domains.report.text import gained, kept
from lora_domains.stats.bootstrap import Bounds
from lora_domains.stats.intervals import difference_bounds
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import WORST_FIRST
from lora_domains.verdict.scores import ScoreTable

Items = Sequence[Mapping[str, Any]]
Change = dict[str, Any]


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


def regressions(
    report: Report, items: Callable[[str], Items], older: Mapping[str, Path], name: str
) -> dict[str, Any]:
    """The part ``since`` of ``report``: changes from ``older`` adapters, a folder called ``name``.

    ``items`` gives the items of an adapter of the report by its name. Raises UsageError when the
    bases differ (gains over different bases are not comparable), AdapterCorrupt when an older
    adapter cannot be read.
    """
    entries = {entry.path: entry for entry in report.adapters}
    changes = {}
    for path, entry in entries.items():
        if path in older:
            card, before = rebuilt(older[path])
            _check_base(card, report, f"{name}/{path}")
            after = items(path) if entry.judged else []
            changes[path] = _changes(card.adapter, before, entry, after)
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


def _changes(old: AdapterEntry, before: Items, new: AdapterEntry, after: Items) -> Change:
    """The figures and gates of one adapter that changed."""
    figures: dict[str, Change] = {}
    was, is_ = gained(old), gained(new)
    if was and is_ and was[0] == is_[0]:
        same_rows = old.data.get("test") == new.data.get("test")
        pairs = _paired(before, after, "test") if same_rows else None
        figures[is_[0]] = _change(is_[0], was[1], is_[1], pairs, new.positive_index)
    known, knows = kept(old), kept(new)
    if known and knows:
        same_suite = old.judged.get("suite") == new.judged.get("suite")
        pairs = _paired(before, after, "general") if same_suite else None
        figures["general"] = _change("accuracy", known, knows, pairs, None)
    verdicts = {gate["name"]: gate["verdict"] for gate in old.gates}
    gates = [
        {
            "name": gate["name"],
            "before": verdicts[gate["name"]],
            "now": gate["verdict"],
            "worse": gate["verdict"] == "fail",
        }
        for gate in new.gates
        if _weaker(verdicts.get(gate["name"]), gate["verdict"])
    ]
    return {
        "verdict": {"before": old.outcome, "now": new.outcome},
        "figures": figures,
        "gates": gates,
        "worse": any(part["worse"] for part in (*figures.values(), *gates)),
    }


def _paired(before: Items, after: Items, part: str) -> ScoreTable | None:
    """Items of the set ``part`` with the scores ``was`` and ``now``; None where rows differ.

    Digests of rows are keyed by the output folder, so that those of another machine differ: the
    same rows are those with the same targets and groups in the same order.
    """
    old, new = (ScoreTable(run).where("set", part) for run in (before, after))
    if not old or _arrangement(old) != _arrangement(new):
        return None
    return ScoreTable(
        [
            {**now, "scores": {"was": was["scores"]["adapter"], "now": now["scores"]["adapter"]}}
            for was, now in zip(old, new, strict=True)
        ]
    )


def _arrangement(items: ScoreTable) -> list[tuple[Any, int | None]]:
    """Target and group of each item; groups are numbered in order of appearance."""
    numbers: dict[Any, int] = {}
    groups = [item.get("group") for item in items]
    codes = [None if g is None else numbers.setdefault(g, len(numbers)) for g in groups]
    return [(item["target"], code) for item, code in zip(items, codes, strict=True)]


def _change(
    metric: str, old: Mapping[str, Any], new: Mapping[str, Any], pairs: ScoreTable | None,
    positive: int | None,
) -> Change:  # fmt: skip
    """From ``before`` to ``now``: the adapter's figure on the same rows, else its gains."""
    paired = metric_named(metric).compare(pairs, "was", "now", positive) if pairs else None
    lower: float | None
    upper: float | None
    if paired is not None:
        before, now, lower, upper = paired.base, paired.adapter, paired.lower, paired.upper
        if not np.isfinite([lower, upper]).all():
            lower = upper = None
    else:
        before, now, lower, upper = old["difference"], new["difference"], None, None
        # A single item has no bounds.
        if None not in (old["lower"], old["upper"], new["lower"], new["upper"]):
            lower, upper = difference_bounds(
                now, Bounds(new["lower"], new["upper"]), before, Bounds(old["lower"], old["upper"])
            )
    worse = False
    if lower is not None and upper is not None:
        worse = upper < 0 if metric_named(metric).higher_is_better else lower > 0
    return {
        "paired": paired is not None,
        "before": before,
        "now": now,
        "change": now - before,
        "lower": lower,
        "upper": upper,
        "worse": worse,
    }


def _weaker(before: str | None, now: str) -> bool:
    if before not in WORST_FIRST or now not in WORST_FIRST:  # new, or not applicable
        return False
    return WORST_FIRST.index(now) < WORST_FIRST.index(before)
