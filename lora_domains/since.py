"""What got worse since an older report: for ``--baseline reports/main.json``.

The rule. Both reports hold each adapter's gain over the base with one-sided 95 % bounds, paired on
the same items. The change is the new gain minus the old one, its bounds those of a difference of
two figures (``statistics.difference_bounds``). A figure got worse when the bound on the better side
is below no change. Where both reports were made on the same test rows the two gains move together,
so these bounds are wider than need be: what they call worse is worse, small falls they leave open.
Two figures are held to it, the metric the adapter is judged on and pooled general knowledge, so
that twenty other figures do not raise false alarms. A gate got worse when it fails and did not; one
that was passed and is inconclusive now is shown, and is what the verdict already says.
"""

from collections.abc import Mapping
from typing import Any

from lora_domains.errors import UsageError
from lora_domains.figures import LOWER_IS_BETTER
from lora_domains.statistics import Bounds, difference_bounds
from lora_domains.wording import WORST_FIRST, gained, kept

Report = Mapping[str, Any]
Entry = Mapping[str, Any]


def compare_reports(old: Report, new: Report, name: str) -> dict[str, Any]:
    """The part ``since`` of ``new``: changes from ``old``, a report or card called ``name``.

    Adapters are matched by their folder's name. Raises UsageError when the two have other bases:
    a gain over one base says nothing of a gain over another.
    """
    if old["base"]["identity"] != new["base"]["identity"]:
        raise UsageError(
            where=name,
            expected=f"a report on the same base, {new['base']['id']}",
            found=f"one on {old['base']['id']} "
            f"(identity {str(old['base']['identity'])[:12]}, "
            f"not {str(new['base']['identity'])[:12]})",
            mend="Store a report of the adapters on the new base, and compare with that.",
        )
    before = {entry["path"]: entry for entry in old["adapters"]}
    now = {entry["path"]: entry for entry in new["adapters"]}
    adapters = {path: _entry(before[path], now[path]) for path in now if path in before}
    return {
        "report": name,
        "worse": any(found["worse"] for found in adapters.values()),
        "adapters": adapters,
        "added": [path for path in now if path not in before],
        "missing": [path for path in before if path not in now],
    }


def _entry(old: Entry, new: Entry) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    was, is_ = gained(old), gained(new)
    if was and is_ and was[0] == is_[0]:
        figures[is_[0]] = _change(was[1], is_[1], is_[0] not in LOWER_IS_BETTER)
    known, knows = kept(old), kept(new)
    if known and knows:
        figures["general"] = _change(known, knows, True)
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
    rows = [entry.get("data", {}).get("test") for entry in (old, new)]
    return {
        "verdict": {"before": old.get("verdict", "inconclusive"), "now": new["verdict"]},
        "same_test_rows": rows[0] == rows[1],
        "figures": figures,
        "gates": gates,
        "worse": any(part["worse"] for part in (*figures.values(), *gates)),
    }


def _change(old: Mapping[str, Any], new: Mapping[str, Any], higher: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "before": old["difference"],
        "now": new["difference"],
        "change": new["difference"] - old["difference"],
        "lower": None,
        "upper": None,
        "worse": False,
    }
    # One item alone bounds nothing.
    if None not in (old["lower"], old["upper"], new["lower"], new["upper"]):
        bounds = difference_bounds(
            new["difference"], Bounds(new["lower"], new["upper"]),
            old["difference"], Bounds(old["lower"], old["upper"]),
        )  # fmt: skip
        found |= bounds._asdict()
        found["worse"] = bounds.upper < 0 if higher else bounds.lower > 0
    return found


def _weaker(before: str | None, now: str) -> bool:
    return before is not None and WORST_FIRST.index(now) < WORST_FIRST.index(before)
