"""The rule of every gate: a measured figure and a threshold give pass, fail or inconclusive.

A gate passes when the one-sided bound of its figure clears the threshold, fails when the opposite
bound misses it, and is inconclusive in between; then ``why`` says how many items would decide it
with a probability of 80 %, if the figure is in truth what was observed.
The bound that passes is at the level of the test set's budget (``ledger``), the one that fails at
95 % (``gates.judge_all``). Figures that are counted rather than sampled (leaks, a changed base)
have no bounds and are never inconclusive. A figure that should exist and is missing makes its gate
inconclusive, one that is not a number fails it. A gate whose figure does not exist for a base is
not applicable: it is shown, and decides nothing.

Some gates inform unless the domain sets them a limit (``inform``): they end in a warning or a note,
which decide nothing either. Only a figure that is not a number fails them too.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from lora_domains.stats.intervals import POWER, Bounds, items_needed_mean

if TYPE_CHECKING:
    from lora_domains.stats.comparisons import Comparison
    from lora_domains.stats.shares import Share

Verdict = Literal["pass", "fail", "inconclusive", "not applicable", "warning", "note"]
WORST_FIRST: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
INFORMING: tuple[Verdict, ...] = ("warning", "note")
"""Results that inform and decide nothing; they are shown after those that decide."""
LEAST_ROWS, LEAST_POSITIVES = 30, 10
"""Fewer test rows, or fewer positives for recall and precision, are inconclusive."""
FAILING_LEVEL = 0.95
"""The level of the bound that fails."""
REALISTIC = 10
"""No number of rows above so many times the present one is advised."""
RENAMED: Mapping[str, str] = {}
"""Former names of thresholds, which older cards have: {former: current}."""


def thresholds_of_today(gates: Mapping[str, Any]) -> dict[str, Any]:
    """The thresholds in a card under their names of today.

    Gates that inform today had defaults before there was a setting ``calibration``; such a default
    was no limit of the domain.
    """
    gates = {RENAMED.get(name, name): value for name, value in gates.items()}
    if "calibration" in gates:
        return gates
    from lora_domains.verdict.gates import FORMER

    return {name: None if FORMER.get(name) == value else value for name, value in gates.items()}


Needed = Callable[[float], int | None]
"""From the level of the bound that decides: how many items would, None when no number would."""


@dataclass(frozen=True)
class GateResult:
    """The result of one gate for one adapter, as the report holds it under ``gates``.

    ``observed`` is None where the figure is undefined; ``lower`` and ``upper`` are None where there
    is nothing to bound, ``threshold`` where there is no limit. All values are finite or None, so
    that the result is valid JSON. ``why`` is one or two sentences for people.
    """

    name: str
    rule: str
    observed: float | None
    threshold: float | None
    lower: float | None
    upper: float | None
    verdict: Verdict
    why: str


@dataclass(frozen=True)
class Measurement:
    """A figure sampled on ``n`` items, with its one-sided bounds at ``level``."""

    observed: float
    bounds: Bounds
    n: int
    unit: str = "items"
    level: float = 0.95

    @classmethod
    def of(cls, comparison: "Comparison", unit: str = "items") -> "Measurement":
        """The difference of a comparison."""
        return cls(comparison.difference, comparison.bounds, comparison.n, unit, comparison.level)


def verdict(results: Iterable[GateResult]) -> Verdict:
    """The verdict of all gates together.

    Any fail fails; else any inconclusive gate, or no gate at all, is inconclusive; else pass. A
    gate that is not applicable, or only informs, does not count. Several gates need no correction:
    to pass, every one must, so the chance of passing an adapter that should have failed one of them
    is still at most 5 % (intersection-union test: Berger 1982, Technometrics 24:295).
    """
    verdicts = {result.verdict for result in results} & set(WORST_FIRST)
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "inconclusive"


def worst(results: Iterable[GateResult], higher_is_better: bool = True) -> GateResult:
    """The result with the worst verdict; of several, the one whose bound is nearest to failing."""

    def nearness(result: GateResult) -> tuple[int, float]:
        bound = result.lower if higher_is_better else result.upper
        margin = -math.inf if bound is None else bound if higher_is_better else -bound
        return WORST_FIRST.index(result.verdict), margin

    return min(results, key=nearness)


def judge(
    name: str,
    rule: str,
    measured: Measurement,
    threshold: float,
    *,
    what: str,
    needed: Needed | None,
    higher_is_better: bool = True,
    strict: bool = False,
    enough: Needed | None = None,
) -> GateResult:
    """The result for a sampled figure.

    Passes when the lower bound is at least ``threshold`` (``strict``: above it), fails when the
    upper bound is below it (strict: at most it); where lower is better the two bounds change
    places. ``what`` begins the sentence ("Recall" is 0.850 …); ``needed`` is the number of items
    that would decide it, ``enough`` as in ``too_few``. A figure that is not a number fails.
    """
    observed, (lower, upper) = measured.observed, measured.bounds
    if math.isnan(observed) or math.isnan(lower) or math.isnan(upper):
        return _diverged(name, rule, measured, threshold, what)
    outcome = _decided(measured.bounds, threshold, higher_is_better, strict)
    confidence = describe_bounds(measured, outcome, threshold, higher_is_better)
    limit = "at least {} is required" if higher_is_better else "at most {} is allowed"
    why = (
        f"{what} is {shown(observed)} on {measured.n:,} {measured.unit}, {confidence}; "
        f"{limit.format(shown(threshold))}."
    )
    if outcome == "inconclusive":
        why += f" {too_few(measured, threshold, needed, higher_is_better, enough)}"
    return GateResult(name, rule, observed, threshold, finite(lower), finite(upper), outcome, why)


def judge_limit(name: str, rule: str, measured: Measurement, limit: float, what: str) -> GateResult:
    """A figure that may be at most ``limit``; the items needed are estimated from its bounds."""
    needed = partial(
        items_needed_mean, measured.observed, measured.bounds, measured.n, limit, measured.level
    )
    return judge(name, rule, measured, limit, what=what, needed=needed, higher_is_better=False)


def inform(
    name: str, measured: Measurement, limit: float | None, *, what: str, beside: str = "",
    usual: bool = False,
) -> GateResult:  # fmt: skip
    """The result of a gate that informs: a warning where the figure is clearly above ``limit``.

    Otherwise it is a note, as it is without a limit, and where it is ``usual`` for the rows.
    ``beside`` is a sentence on what the figure is to be read with.
    """
    rule = "informs only" if limit is None else f"informs only; warns above {limit:g}"
    lower, upper = measured.bounds
    if math.isnan(measured.observed) or math.isnan(lower) or math.isnan(upper):
        return _diverged(name, rule, measured, limit, what)
    warns = limit is not None and lower > limit and not usual
    why = (
        f"{what} is {shown(measured.observed)} on {measured.n:,} {measured.unit}, "
        f"{100 * measured.level:.6g} % bounds {shown(lower)} to {shown(upper)}"
    )
    why += f"; more than {shown(limit)}." if warns and limit is not None else "."
    outcome: Verdict = "warning" if warns else "note"
    why += f" {beside}" if beside else ""
    bounds = finite(lower), finite(upper)
    return GateResult(name, rule, measured.observed, limit, *bounds, outcome, why)


def informing(result: GateResult) -> GateResult:
    """``result`` of a gate that informs, where its figure is missing: a warning, not inconclusive.

    A figure that is not a number still fails.
    """
    return replace(result, verdict="warning") if result.verdict == "inconclusive" else result


def describe_bounds(
    measured: Measurement, outcome: Verdict, threshold: float, higher_is_better: bool = True
) -> str:
    """The bound that decided: ``at least 0.874 with 95 % confidence``; both where neither did."""
    confidence = f"{100 * measured.level:.6g} %"
    lower, upper = (_told_apart(bound, threshold) for bound in measured.bounds)
    if outcome == "inconclusive":
        return f"{confidence} bounds {lower} to {upper}"
    at_least = (outcome == "pass") == higher_is_better
    bound = f"at least {lower}" if at_least else f"at most {upper}"
    return f"{bound} with {confidence} confidence"


def too_few(
    measured: Measurement, threshold: float, needed: Needed | None, higher_is_better: bool = True,
    enough: Needed | None = None,
) -> str:  # fmt: skip
    """What an inconclusive gate needs to pass, or to fail where it is beyond the threshold.

    ``enough`` is given for questions, of which more can be asked: how many would show that nothing
    is lost, if nothing is.
    """
    rows = "rows" if enough is None else "questions"
    if not all(map(math.isfinite, measured.bounds)):
        return f"Too few {rows} to tell: more {measured.unit} are needed."
    passing = (measured.observed >= threshold) == higher_is_better
    level = measured.level if passing else min(measured.level, FAILING_LEVEL)
    items = None if needed is None else needed(level)
    power, done = f"with a probability of {100 * POWER:.0f} %", "decide it"
    if items is None or items > REALISTIC * measured.n:
        items = None if enough is None else enough(measured.level)
        if items is None or items <= measured.n:
            return f"No realistic number of {rows} would decide it."
        done = "show that nothing is lost, if nothing is,"
    # An estimate from bounds that are not symmetrical can fall short of what is there.
    items = max(items, measured.n + 1)
    more = "" if enough is None else f" Ask more: --questions {items}, or a larger --suite."
    return f"Too few {rows} to tell: about {items:,} {measured.unit} would {done} {power}.{more}"


def judge_share(
    name: str, share: "Share", n: int, floor: float, unit: str, level: float = 0.95
) -> GateResult:
    """A share of ``n`` items must reach ``floor`` by Wilson's bound.

    Of no items it is undefined: inconclusive, never pass.
    """
    rule = f"{name} at least {floor:g}"
    if n == 0:
        why = f"{capital(name)} is undefined because there are no {unit}."
        return GateResult(name, rule, None, floor, *share.bounds, "inconclusive", why)
    measured = Measurement(share.successes / share.n, share.bounds, n, unit, level)
    needed = partial(share.items_needed, floor)
    return judge(name, rule, measured, floor, what=capital(name), needed=needed)


def unmeasured(name: str, rule: str, threshold: float | None, why: str) -> GateResult:
    """A gate whose figure should exist and is missing: inconclusive."""
    return GateResult(name, rule, None, threshold, None, None, "inconclusive", why)


def undecided(result: GateResult, why: str) -> GateResult:
    """``result``, inconclusive where it decided: ``why`` says what it has too few of."""
    if result.verdict not in ("pass", "fail"):
        return result
    return replace(result, verdict="inconclusive", why=f"{result.why} {why}")


def judge_count(name: str, rule: str, observed: float, *, passed: bool, why: str) -> GateResult:
    """The result for a figure that is counted, not sampled; the threshold shown is 0."""
    outcome: Verdict = "pass" if passed else "fail"
    return GateResult(name, rule, finite(observed), 0.0, None, None, outcome, why)


def not_applicable(name: str, rule: str, threshold: float | None, why: str) -> GateResult:
    """A gate whose figure cannot be measured; it neither passes nor fails."""
    return GateResult(name, rule, None, threshold, None, None, "not applicable", why)


def finite(value: float | None) -> float | None:
    """``value``, or None for infinity and NaN, which JSON lacks (one item has infinite bounds)."""
    return value if value is not None and math.isfinite(value) else None


def shown(value: float) -> str:
    """``value`` in three decimals."""
    return f"{value:z.3f}"


def capital(label: str) -> str:
    """``label`` with its first letter upper case, as a sentence begins."""
    return label[:1].upper() + label[1:]


def _diverged(
    name: str, rule: str, measured: Measurement, threshold: float | None, what: str
) -> GateResult:
    why = f"{what} is not a number on {measured.n:,} {measured.unit}: training has diverged."
    return GateResult(name, rule, None, threshold, None, None, "fail", why)


def _decided(bounds: Bounds, threshold: float, higher_is_better: bool, strict: bool) -> Verdict:
    # Mirrored where lower is better, so that one comparison serves both directions.
    sign = 1 if higher_is_better else -1
    worst, best = sorted(sign * bound for bound in bounds)
    limit = sign * threshold
    if worst > limit if strict else worst >= limit:
        return "pass"
    if best <= limit if strict else best < limit:
        return "fail"
    return "inconclusive"


def _told_apart(value: float, threshold: float) -> str:
    """``value`` in three decimals, or in as many as tell it from ``threshold``."""
    text = shown(value)
    for digits in range(4, 10):
        if value == threshold or not math.isclose(float(text), threshold, abs_tol=1e-12):
            break
        text = f"{value:.{digits}f}"
    return text
