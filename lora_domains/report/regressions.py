"""What got worse since an older report: for ``--baseline reports/main.json``.

The rule. Two figures of each adapter are held against the older report: the metric it is judged on,
and pooled general knowledge. (Twenty others would raise false alarms.) Where both reports were made
on the same rows, old and new adapter are compared as base and adapter are: paired, item by item,
with the same one-sided 95 % bounds. A report keeps what that takes, packed, under ``answers``.
Where the rows are others, the gains over the base are compared, their difference bounded as one of
two independent figures (``statistics.difference_bounds``). A figure got worse when even the better
bound of its change is a loss. A gate got worse when it fails and did not; one that was passed and
is inconclusive now is shown, and is what the verdict already says.
"""

import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lora_domains.errors import UsageError
from lora_domains.report.text import WORST_FIRST, gained, kept
from lora_domains.stats.bootstrap import Bounds
from lora_domains.stats.intervals import difference_bounds
from lora_domains.tasks import positive_index
from lora_domains.verdict.scores import Rows, column, targets
from lora_domains.verdict.summary import LOWER_IS_BETTER, MEANS, comparison

Report = Mapping[str, Any]
Entry = Mapping[str, Any]
Change = dict[str, Any]


# ── What a report keeps of its items ────────────────────────────────────────────────────────────


def answers(items: Sequence[Mapping[str, Any]], metric: str) -> dict[str, str]:
    """What the adapter said on each item, as far as ``metric`` needs it: packed columns.

    A column is float32, little-endian, compressed, in base 64: some 3 kB for 10,000 predictions.
    Groups are numbers in order of appearance.
    """
    keys = ["nats", "tokens"] if metric == "nats_per_token" else [MEANS.get(metric, "prediction")]
    packed = {key: _packed(column(items, "adapter", key)) for key in keys}
    packed["target"] = _packed(targets(items))
    groups = [item.get("group") for item in items]
    if any(group is not None for group in groups):
        seen: dict[Any, int] = {}
        codes = [-1 if g is None else seen.setdefault(g, len(seen)) for g in groups]
        packed["group"] = _packed(np.array(codes))
    return packed


def _packed(values: np.ndarray) -> str:
    return b64encode(zlib.compress(values.astype("<f4").tobytes(), 9)).decode()


def _unpacked(text: str) -> list[float]:
    found: list[float] = np.frombuffer(zlib.decompress(b64decode(text)), "<f4").tolist()
    return found


def _paired(old: Mapping[str, str], new: Mapping[str, str]) -> Rows | None:
    """Items with the scores ``was`` and ``now``; None where the two are not of the same rows."""
    # The true classes of other rows, or of the same ones in another order, are hardly ever these.
    if old.keys() != new.keys() or any(old[k] != new[k] for k in ("target", "group") if k in new):
        return None
    was, now = ({k: _unpacked(v) for k, v in part.items()} for part in (old, new))
    keys = [key for key in now if key not in ("target", "group")]
    groups = now.get("group")
    return Rows(
        [
            {
                "target": target,
                "group": None if groups is None or groups[n] < 0 else groups[n],
                "scores": {
                    "was": {key: was[key][n] for key in keys},
                    "now": {key: now[key][n] for key in keys},
                },
            }
            for n, target in enumerate(now["target"])
        ]
    )


# ── Two reports ─────────────────────────────────────────────────────────────────────────────────


def compare_reports(old: Report, new: Report, name: str) -> dict[str, Any]:
    """The part ``since`` of ``new``: changes from ``old``, a report or card called ``name``.

    Adapters are matched by their folder's name. Raises UsageError when the two have other bases
    (a gain over one base says nothing of a gain over another), or ``old`` cannot be read.
    """
    if old["base"]["identity"] != new["base"]["identity"]:
        raise UsageError(
            where=name,
            expected=f"a report on the same base, {new['base']['id']}",
            found=f"one on {old['base']['id']} "
            f"(identity {str(old['base']['identity'])[:12]}, "
            f"not {str(new['base']['identity'])[:12]})",
            hint="Store a report of the adapters on the new base, and compare with that.",
        )
    before = {entry["path"]: entry for entry in old["adapters"]}
    now = {entry["path"]: entry for entry in new["adapters"]}
    try:
        adapters = {path: _entry(before[path], now[path]) for path in now if path in before}
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        raise UsageError(
            where=name,
            expected="a report as lora-domains writes it",
            found=f"{type(error).__name__}: {error}",
            hint="Make it again: lora-domains report adapters/* --out reports/",
        ) from error
    return {
        "report": name,
        "worse": any(found["worse"] for found in adapters.values()),
        "adapters": adapters,
        "added": [path for path in now if path not in before],
        "missing": [path for path in before if path not in now],
    }


def _entry(old: Entry, new: Entry) -> dict[str, Any]:
    figures: dict[str, Change] = {}
    was, is_ = gained(old), gained(new)
    if was and is_ and was[0] == is_[0]:
        rows = [entry.get("data", {}).get("test") for entry in (old, new)]
        judged = new["judged"]
        index = positive_index(judged["labels"], judged["positive"])
        same = _same_items(old, new, "domain") if rows[0] == rows[1] else None
        figures[is_[0]] = _change(is_[0], was[1], is_[1], same, index)
    known, knows = kept(old), kept(new)
    if known and knows:
        suites = [entry.get("judged", {}).get("suite") for entry in (old, new)]
        same = _same_items(old, new, "general") if suites[0] == suites[1] else None
        figures["general"] = _change("accuracy", known, knows, same, None)
    verdicts = {gate["name"]: gate["verdict"] for gate in old.get("gates", [])}
    gates = [
        {
            "name": gate["name"],
            "before": verdicts[gate["name"]],
            "now": gate["verdict"],
            "worse": gate["verdict"] == "fail",
        }
        for gate in new["gates"]
        if _weaker(verdicts.get(gate["name"]), gate["verdict"])
    ]
    return {
        "verdict": {"before": old.get("verdict", "inconclusive"), "now": new["verdict"]},
        "figures": figures,
        "gates": gates,
        "worse": any(part["worse"] for part in (*figures.values(), *gates)),
    }


def _same_items(old: Entry, new: Entry, which: str) -> Rows | None:
    one, other = (entry.get("answers", {}).get(which) for entry in (old, new))
    return _paired(one, other) if one and other else None


def _change(
    metric: str, old: Mapping[str, Any], new: Mapping[str, Any], same: Rows | None,
    positive: int | None,
) -> Change:  # fmt: skip
    """From ``before`` to ``now``: the adapter's figure on the same rows, else its gains."""
    paired = comparison(metric, same, "was", "now", positive) if same else None
    lower: float | None
    upper: float | None
    if paired is not None:
        before, now, lower, upper = paired.base, paired.adapter, paired.lower, paired.upper
        if not np.isfinite([lower, upper]).all():
            lower = upper = None
    else:
        before, now, lower, upper = old["difference"], new["difference"], None, None
        # One item alone bounds nothing.
        if None not in (old["lower"], old["upper"], new["lower"], new["upper"]):
            lower, upper = difference_bounds(
                now, Bounds(new["lower"], new["upper"]), before, Bounds(old["lower"], old["upper"])
            )
    worse = False
    if lower is not None and upper is not None:
        worse = lower > 0 if metric in LOWER_IS_BETTER else upper < 0
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
