"""Gates: a measured figure and a rule give pass, fail or inconclusive.

A gate whose figure does not exist for a base is not applicable: it is shown, and decides nothing.

A gate passes when the one-sided bound of its figure clears the threshold, fails when the opposite
bound misses it, and is inconclusive in between; then `why` names what would settle it. Bounds are
at `level`, 95 % unless the test set was looked at before (`looks`). Figures that are counted rather
than sampled (leaks, a changed base) have no bounds and are never inconclusive.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lora_domains.stats.bootstrap import Bounds
from lora_domains.stats.comparisons import Comparison, items_needed
from lora_domains.stats.intervals import items_needed_mean, items_needed_wilson, wilson

Verdict = Literal["pass", "fail", "inconclusive", "not applicable"]
ORDER: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
"""Worst first."""


@dataclass(frozen=True)
class GateResult:
    """One gate of one adapter; every field but the bounds is in the report under `gates`.

    `observed` is None where the figure is undefined; `lower` and `upper` are None where there is
    nothing to bound. All values are finite or None, so that the result is valid JSON. `why` is one
    sentence for people.
    """

    name: str
    rule: str
    observed: float | None
    threshold: float
    lower: float | None
    upper: float | None
    verdict: Verdict
    why: str


# ── the rule itself ───────────────────────────────────────────────────────────────────────────────


def judge(
    name: str,
    rule: str,
    observed: float,
    lower: float,
    upper: float,
    threshold: float,
    *,
    higher_is_better: bool = True,
    strict: bool = False,
    what: str,
    n: int,
    unit: str = "items",
    needed: int | None = None,
    level: float = 0.95,
) -> GateResult:
    """The verdict on a sampled figure and the sentence that goes with it.

    Passes when `lower` >= `threshold` (`strict`: >), fails when `upper` < `threshold` (strict: <=);
    with `higher_is_better` False the two bounds change places. `what` names the figure, `n` and
    `unit` what it was measured on, `needed` how many of them would settle it, None when no number
    would. `level` is that of the bounds. A figure that is not a number fails.
    """
    if math.isnan(observed) or math.isnan(lower) or math.isnan(upper):
        why = f"{what} is not a number on {n:,} {unit}: the model has diverged."
        return GateResult(name, rule, None, threshold, None, None, "fail", why)
    # In the language of "higher is better", so that one comparison serves both directions.
    sign = 1 if higher_is_better else -1
    worst, best, limit = (sign * lower, sign * upper, sign * threshold)
    worst, best = min(worst, best), max(worst, best)
    clears = worst > limit if strict else worst >= limit
    misses = best <= limit if strict else best < limit
    found = f"{what} is {observed:.3f} on {n:,} {unit}"
    low, high = ("at least", "at most") if higher_is_better else ("at most", "at least")
    sure = f"{100 * level:.6g} %"
    nearest, farthest = (_beside(sign * bound, threshold) for bound in (worst, best))
    if clears:
        verdict: Verdict = "pass"
        why = f"{found}, with {sure} confidence {low} {nearest}: it clears {threshold:.3f}."
    elif misses:
        verdict = "fail"
        why = f"{found}, with {sure} confidence {high} {farthest}: it misses {threshold:.3f}."
    else:
        verdict = "inconclusive"
        settle = "at exactly this value no number of them would settle it"
        if needed is not None:
            settle = f"about {needed:,} {unit} at the same share would settle it"
        elif math.isinf(lower) or math.isinf(upper):
            settle = "so few say nothing of their spread, more are needed"
        why = (
            f"{found}, but the {sure} bounds {_beside(lower, threshold)} and "
            f"{_beside(upper, threshold)} "
            f"leave {threshold:.3f} open: {settle}."
        )
    return GateResult(name, rule, observed, threshold, _finite(lower), _finite(upper), verdict, why)


def verdict(results: Iterable[GateResult]) -> Verdict:
    """Any fail fails; else any inconclusive, or no gate at all, is inconclusive; else pass.

    A gate that is not applicable does not count.

    Several gates need no correction: to pass, every one must, so the chance of passing an adapter
    that should have failed one of them is still at most 5 % (intersection-union test: Berger 1982,
    Technometrics 24:295).
    """
    found = {result.verdict for result in results} - {"not applicable"}
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "inconclusive"


# ── one function per gate ─────────────────────────────────────────────────────────────────────────


def gain(
    over_base: Comparison,
    over_baseline: Comparison | None,
    metric: str,
    baseline: str = "best baseline",
    higher_is_better: bool = True,
    than: str = "base",
) -> GateResult:
    """The adapter beats the base on `metric`, and the best baseline too, on the same items.

    The result shown is the worse of the two comparisons, or the narrower: both must pass. Without
    any baseline only the base counts. `over_baseline` has the baseline in the place of the base.
    `than` names the base where it is another adapter.
    """
    sense = ">" if higher_is_better else "<"
    rivals = [(than, over_base)]
    if over_baseline is not None:
        rivals.append((baseline, over_baseline))
    rule = " and ".join(f"{metric} - {rival} {sense} 0" for rival, _ in rivals)
    results = []
    for rival, comparison in rivals:
        scores = f"{comparison.adapter:.3f} against {comparison.base:.3f} of the {rival}"
        what = f"{metric} ({scores}): the difference"
        results.append(
            _judge_difference("gain", rule, comparison, 0.0, higher_is_better, True, what)
        )

    def nearness(result: GateResult) -> tuple[int, float]:
        bound = result.lower if higher_is_better else result.upper
        margin = -math.inf if bound is None else bound if higher_is_better else -bound
        return ORDER.index(result.verdict), margin

    return min(results, key=nearness)


def retention(pooled: Comparison, margin: float = 0.03) -> GateResult:
    """General knowledge kept: the difference over all probe items is no worse than -margin.

    `margin` is a share of items, above 0 (.03 is 3 points). A non-inferiority test: no visible loss
    is not enough, the items must be able to show that there is none.
    """
    what = f"probes ({pooled.adapter:.3f} against {pooled.base:.3f} of the base): the difference"
    rule = f"adapter - base >= -{margin:g} over all probes"
    return _judge_difference("retention", rule, pooled, -margin, True, False, what)


def masked_retention(nats: Comparison, share: float = 0.03, unit: str = "texts") -> GateResult:
    """An encoder's general knowledge kept: nats per masked token rise by at most ``share``.

    ``nats`` compares base and adapter on general text. The margin is a share of the base's nats, so
    that it means the same for a small vocabulary and a large one.
    """
    margin = share * nats.base
    what = (
        f"nats per masked token ({nats.adapter:.3f} against {nats.base:.3f} of the base; "
        f"{100 * share:g} % of the base's are allowed): the rise"
    )
    rule = f"adapter - base <= {share:g} of the base's nats per masked token of general text"
    return judge(
        "retention",
        rule,
        nats.difference,
        nats.lower,
        nats.upper,
        margin,
        higher_is_better=False,
        what=what,
        n=nats.n,
        unit=unit,
        needed=items_needed(nats, margin),
        level=nats.level,
    )


def not_applicable(name: str, rule: str, threshold: float, why: str) -> GateResult:
    """A gate whose figure cannot be had; it says so, and neither passes nor fails."""
    return GateResult(name, rule, None, threshold, None, None, "not applicable", why)


def drift(
    kl: float, bounds: Bounds, n: int, limit: float, unit: str = "texts", level: float = 0.95
) -> GateResult:
    """KL(base || adapter) on general text stays within `limit`: nats per token, `n` texts."""
    needed = items_needed_mean(kl, bounds, n, limit)
    return judge(
        "drift",
        f"KL from base to adapter on general text <= {limit:g} nats per token",
        kl,
        bounds.lower,
        bounds.upper,
        limit,
        higher_is_better=False,
        what="KL to the base",
        n=n,
        unit=unit,
        needed=needed,
        level=level,
    )


def recall(
    true_positives: int, false_negatives: int, floor: float, level: float = 0.95
) -> GateResult:
    """The share of positives found reaches `floor`, by Wilson's bound."""
    positives = true_positives + false_negatives
    return _judge_share("recall", true_positives, positives, floor, "positives", level)


def precision(
    true_positives: int, false_positives: int, floor: float, level: float = 0.95
) -> GateResult:
    """The share of positive predictions that are right reaches `floor`, by Wilson's bound.

    With no positive prediction precision is undefined: inconclusive, never pass.
    """
    predicted = true_positives + false_positives
    return _judge_share("precision", true_positives, predicted, floor, "predicted positives", level)


def overfit(
    train_score: float,
    test_score: float,
    bounds: Bounds,
    n: int,
    limit: float = 0.10,
    level: float = 0.95,
) -> GateResult:
    """train - test of the domain metric (higher is better) stays within `limit`; `n` test items.

    `bounds` are of the gap: `statistics.difference_bounds` makes them from the bounds of both
    scores.
    """
    gap = train_score - test_score
    return judge(
        "overfit",
        f"train - test <= {limit:g}",
        gap,
        bounds.lower,
        bounds.upper,
        limit,
        higher_is_better=False,
        what=f"train {train_score:.3f} - test {test_score:.3f}",
        n=n,
        unit="test items",
        needed=items_needed_mean(gap, bounds, n, limit),
        level=level,
    )


@dataclass(frozen=True)
class Slice:
    """What was found on the rows of one slice: its score minus that of all other rows."""

    name: str
    difference: float | None
    """None where the slice or the rest has no row to score."""
    bounds: Bounds
    wide: Bounds
    """Bounds at a level shared out among all slices: any of many may look bad by chance."""
    n: int
    unit: str


def slices(found: Iterable[Slice], what: str, margin: float, level: float = 0.95) -> GateResult:
    """No slice scores more than `margin` below the rest of the rows; the worst slice is shown.

    To pass, every slice must, so each is held to the plain bound (intersection-union, as in
    `verdict`); to fail, one must miss by the bound shared out among all (Bonferroni), or the more
    slices, the more false alarms. A slice too small to tell is inconclusive. Worst-group scores as
    the measure: Sagawa et al. (2020), ICLR.
    """
    rule = f"{what} of each slice - {what} of the rest >= -{margin:g}"
    results = []
    for part in found:
        if part.difference is None:
            why = f"{what} of {part.name} is undefined: there is nothing to score it on."
            bounds = part.bounds
            results.append(GateResult("slices", rule, None, -margin, *bounds, "inconclusive", why))
            continue
        results.append(
            judge(
                "slices",
                rule,
                part.difference,
                part.bounds.lower,
                part.wide.upper,
                -margin,
                what=f"{what} of {part.name} minus that of the rest",
                n=part.n,
                unit=part.unit,
                needed=items_needed_mean(part.difference, part.bounds, part.n, -margin),
                level=level,
            )
        )
    return min(results, key=lambda r: (ORDER.index(r.verdict), _or_lowest(r.lower)))


def memorisation(
    auc: float, bounds: Bounds, n: int, limit: float, level: float = 0.95
) -> GateResult:
    """How well the adapter's gain tells training rows from test rows (AUC) stays within `limit`.

    .5 is chance: nothing betrays that a row was trained on. `n` counts the rows of both.
    """
    return judge(
        "memorisation",
        f"AUC of training rows against test rows <= {limit:g}",
        auc,
        bounds.lower,
        bounds.upper,
        limit,
        higher_is_better=False,
        what="the AUC of telling training rows by what the adapter gained on them",
        n=n,
        unit="rows",
        needed=items_needed_mean(auc, bounds, n, limit),
        level=level,
    )


def looks(adapters_before: int, level: float, broken: str | None) -> GateResult:
    """The account of looks at the test set is whole; says at which level it leaves the bounds."""
    others = f"{adapters_before:,} other adapter{'' if adapters_before == 1 else 's'}"
    why = (
        f"{others if adapters_before else 'No other adapter'} was judged on these rows before: "
        f"bounds are held at {100 * level:.6g} %."
    ).replace("adapters was", "adapters were")
    if broken:
        why = f"{broken}: how often these rows were looked at is unknown. Use a fresh test set."
    return _counted("looks", "every look at the test set is on record", float(bool(broken)), 0.0,
                    not broken, why)  # fmt: skip


def leaks(exact: int, near: int = 0) -> GateResult:
    """No test or probe row occurs, word for word, in what was trained on; near ones only warn."""
    why = "No test or probe row occurs in what was trained on."
    if exact:
        why = (
            f"{_rows(exact)} of test or probes also in what was trained on: take them out of the "
            "training rows (--drop-leaks) or the general text, and train again."
        )
    if near:
        why += f" Warning: {_rows(near)} nearly the same as a training row; look at the pairs."
    return _counted(
        "leaks", "no exact test or probe row in training", float(exact), 0.0, not exact, why
    )


def frozen(changed: bool) -> GateResult:
    """The base answers as before. `observed` is 1 where it changed."""
    why = "The base's state and logits are the same before and after, bit for bit."
    if changed:
        why = "The base's state or logits changed: nothing measured against it can be trusted."
    return _counted("frozen", "base unchanged", float(changed), 0.0, not changed, why)


def alive(max_difference: float, tolerance: float = 0.0) -> GateResult:
    """The adapter does something: it moves some logit by more than `tolerance`.

    `max_difference` is the largest absolute difference of a logit from the base's.
    """
    lives = max_difference > tolerance and math.isfinite(max_difference)
    if lives:
        why = f"The adapter moves a logit by up to {max_difference:.3g}."
    elif math.isfinite(max_difference):
        why = (
            f"No logit moves by more than {max_difference:.3g}: "
            "the adapter does nothing (B still zero, or not routed)."
        )
    else:
        why = "The adapter's logits are not finite: the model has diverged."
    return _counted(
        "alive", f"max |adapter - base| > {tolerance:g}", max_difference, tolerance, lives, why
    )


# ── inside ────────────────────────────────────────────────────────────────────────────────────────


def _judge_difference(
    name: str,
    rule: str,
    comparison: Comparison,
    threshold: float,
    higher_is_better: bool,
    strict: bool,
    what: str,
) -> GateResult:
    return judge(
        name,
        rule,
        comparison.difference,
        comparison.lower,
        comparison.upper,
        threshold,
        higher_is_better=higher_is_better,
        strict=strict,
        what=what,
        n=comparison.n,
        needed=items_needed(comparison, threshold),
        level=comparison.level,
    )


def _judge_share(
    name: str, right: int, n: int, floor: float, unit: str, level: float
) -> GateResult:
    rule = f"{name} >= {floor:g}"
    bounds = wilson(right, n, level)
    if n == 0:
        why = f"{name} is undefined, there being no {unit}: {name} cannot pass without any."
        return GateResult(name, rule, None, floor, *bounds, "inconclusive", why)
    needed = items_needed_wilson(right, n, floor, level)
    return judge(
        name, rule, right / n, *bounds, floor, what=name, n=n, unit=unit, needed=needed, level=level
    )


def _counted(
    name: str, rule: str, observed: float, threshold: float, passed: bool, why: str
) -> GateResult:
    outcome: Verdict = "pass" if passed else "fail"
    return GateResult(name, rule, _finite(observed), threshold, None, None, outcome, why)


def _or_lowest(bound: float | None) -> float:
    return -math.inf if bound is None else bound


def _beside(value: float, threshold: float) -> str:
    """``value`` in three decimals, or in as many as tell it from ``threshold``."""
    shown = f"{value:.3f}"
    for digits in range(4, 10):
        if value == threshold or not math.isclose(float(shown), threshold, abs_tol=1e-12):
            break
        shown = f"{value:.{digits}f}"
    return shown


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rows(count: int) -> str:
    return f"{count:,} row is" if count == 1 else f"{count:,} rows are"
