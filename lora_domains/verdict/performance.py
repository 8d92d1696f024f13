"""The gates on an adapter's answers to test rows: gain, floors of the positive class, slices."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from lora_domains.stats.bootstrap import bootstrap
from lora_domains.stats.classes import row_f1
from lora_domains.stats.comparisons import Comparison, items_needed, ratio
from lora_domains.stats.intervals import Bounds, difference_bounds
from lora_domains.stats.shares import share_of
from lora_domains.verdict import best_baseline, contender_label
from lora_domains.verdict.evidence import Evidence, Fault
from lora_domains.verdict.metrics import ClassMetric
from lora_domains.verdict.rules import (
    LEAST_POSITIVES,
    LEAST_ROWS,
    GateResult,
    Measurement,
    Verdict,
    capital,
    describe_bounds,
    finite,
    judge,
    judge_share,
    shown,
    too_few,
    undecided,
    unmeasured,
    worst,
)
from lora_domains.verdict.scores import Metric

Scores = NDArray[np.float64]
Rows = NDArray[np.bool_]

# ── Gain ────────────────────────────────────────────────────────────────────────────────────────

OUTCOMES: dict[Verdict, str] = {
    "pass": "The adapter beats it",
    "fail": "The adapter does not beat it",
    "inconclusive": "It is unclear whether the adapter beats it",
}


def judge_gain(evidence: Evidence, _: float) -> GateResult:
    """The adapter against the base and the best baseline on the domain metric.

    A baseline that was scored on some rows only might be the best: no pass then.
    """
    metric, test, positive = evidence.metric, evidence.test, evidence.positive
    values = {name: metric.value(test, name, positive) for name in test.baselines()}
    best = best_baseline(metric, values)
    rivals = {}
    for rival in ["base", *(best[:1] if best else [])]:
        compared = evidence.compared(metric, test, rival, positive)
        if isinstance(compared, Fault):
            return compared.result("gain", f"{metric.label} better than the base", 0.0)
        rivals[contender_label(rival)] = compared
    result, targets = gain(metric, rivals), test.targets()
    if isinstance(metric, ClassMetric) and metric.needs_positive:
        result = _enough(result, int((targets == positive).sum()), "positives")
    counted = metric.counted(test)
    for name in (name for name, value in values.items() if value is None):
        fault = evidence.fault(name, counted, metric.scores, capital(metric.label))
        if fault and any(test.gives(name, key) for key in metric.scores):
            result = _unproven(result, fault.why)
    return _of_classes(result, evidence)


def gain(metric: Metric, rivals: Mapping[str, Comparison]) -> GateResult:
    """The adapter beats every one of ``rivals`` on the same items.

    ``rivals`` are comparisons by the rival's label, whose ``base`` is the rival's score. The result
    shown is the worst of them, or the narrowest: all must pass.
    """
    sense = "above" if metric.higher_is_better else "below"
    rule = f"{metric.label} {sense} " + f" and {sense} ".join(rivals)
    results = [_beats(metric, rule, rival, compared) for rival, compared in rivals.items()]
    return worst(results, metric.higher_is_better)


def _beats(metric: Metric, rule: str, rival: str, compared: Comparison) -> GateResult:
    measured = Measurement.of(compared, "test rows")
    needed = partial(items_needed, compared, 0.0)
    scores = f"{capital(metric.label)} {compared.adapter:.3f}; {rival} reaches {compared.base:.3f}"
    result = judge(
        "gain", rule, measured, 0.0, what=f"{scores}. The difference", needed=needed,
        higher_is_better=metric.higher_is_better, strict=True,
    )  # fmt: skip
    if result.observed is None:
        return result
    bounds = describe_bounds(measured, result.verdict, 0.0, metric.higher_is_better)
    difference = f"the difference is {shown(measured.observed)}, {bounds}"
    why = f"{scores}. {OUTCOMES[result.verdict]}: {difference}."
    if result.verdict == "inconclusive":
        why += f" {too_few(measured, 0.0, needed, metric.higher_is_better)}"
    return replace(result, why=why)


# ── The positive class ──────────────────────────────────────────────────────────────────────────


def judge_recall(evidence: Evidence, floor: float) -> GateResult | None:
    """The share of positives that are predicted positive."""
    return _share_of_positives("recall", "positives", evidence, floor)


def judge_precision(evidence: Evidence, floor: float) -> GateResult | None:
    """The share of predicted positives that are positive."""
    return _share_of_positives("precision", "predicted positives", evidence, floor)


def _share_of_positives(
    name: str, unit: str, evidence: Evidence, floor: float
) -> GateResult | None:
    """Recall among the positives, or precision among the predicted positives."""
    if evidence.positive is None:
        return None
    test, rule = evidence.test, f"{name} at least {floor:g}"
    if fault := evidence.fault("adapter", test, ("prediction",), capital(name)):
        return fault.result(name, rule, floor)
    columns = test.targets(), test.column("adapter", "prediction")
    true, predicted = (column == evidence.positive for column in columns)
    counted = np.flatnonzero(true if name == "recall" else predicted)
    groups = test.groups()
    share = share_of(
        (true & predicted)[counted],
        None if groups is None else [groups[int(i)] for i in counted],
        evidence.level,
    )
    result = judge_share(name, share, len(counted), floor, unit, evidence.level)
    result = _enough(_enough(result, int(true.sum()), "positives"), len(counted), unit)
    return result if name == "recall" else _of_classes(result, evidence)


def judge_floors(evidence: Evidence, floors: Mapping[str, float] | None) -> GateResult | None:
    """The recall of each label in ``floors``; the result is the worst of them: all must pass."""
    if not floors:
        return None
    test, results = evidence.test, []
    rule = "recall at least " + ", ".join(f"{floor:g} of {n}" for n, floor in floors.items())
    key = "predicted" if test.gives("adapter", "predicted") else "prediction"
    if fault := evidence.fault("adapter", test, (key,), "Recall"):
        return fault.result("floors", rule, None)
    groups, predictions = test.groups(), test.column("adapter", key)
    for label, floor in floors.items():
        if label not in evidence.labels:
            why = f"No label is called {label}."
            results.append(unmeasured("floors", rule, floor, why))
            continue
        at = list(evidence.labels).index(label)
        several = key == "predicted"
        true = test.truth()[:, at] > 0 if several else test.targets() == at
        found = predictions[:, at] > 0 if several else predictions == at
        rows = np.flatnonzero(true)
        among = None if groups is None else [groups[int(i)] for i in rows]
        share, unit = share_of(found[rows], among, evidence.level), f"rows of {label}"
        result = judge_share(f"recall of {label}", share, len(rows), floor, unit, evidence.level)
        results.append(_enough(result, len(rows), unit))
    result = replace(worst(results), name="floors", rule=rule)
    met = sum(one.verdict == "pass" for one in results)
    return replace(result, why=f"{result.why} {met} of {len(results)} floors are met.")


def _enough(result: GateResult, number: int, what: str) -> GateResult:
    """``result``, which fewer than ``LEAST_POSITIVES`` do not decide."""
    if number >= LEAST_POSITIVES:
        return result
    return undecided(result, f"Fewer than {LEAST_POSITIVES} {what} do not decide it.")


def _of_classes(result: GateResult, evidence: Evidence) -> GateResult:
    """``result``, which test rows of one class do not pass: giving always that answer would."""
    targets = evidence.test.targets()
    if not evidence.labels or np.ptp(targets) or targets[0] < 0:  # rows with several labels
        return result
    return _unproven(result, "Test rows of one class do not decide it: give rows of each class.")


def _unproven(result: GateResult, why: str) -> GateResult:
    """``result``, inconclusive where it passed."""
    return undecided(result, why) if result.verdict == "pass" else result


def kept(metric: Metric, compared: Comparison, rival: str) -> GateResult:
    """``metric`` is not clearly below that of ``rival``, whose score is ``compared.base``.

    For a comparison of two adapters: a better score may hide that fewer positives are found.
    """
    bounds, level = compared.bounds, f"{100 * compared.level:.6g} %"
    clear = bounds.upper < 0
    why = (
        f"{capital(metric.label)} {compared.adapter:.3f}; {rival} reaches {compared.base:.3f}. "
        f"The difference is {shown(compared.difference)}"
    )
    why += (
        f", at most {shown(bounds.upper)} with {level} confidence: it clearly fell."
        if clear
        else f", {level} bounds {shown(bounds.lower)} to {shown(bounds.upper)}: no clear loss."
    )
    name, rule = f"{metric.name} kept", f"{metric.label} not clearly below {rival}"
    lower, upper = map(finite, bounds)
    outcome: Verdict = "fail" if clear else "pass"
    return GateResult(name, rule, compared.difference, 0.0, lower, upper, outcome, why)


# ── Slices ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Slice:
    """The score of the rows of one slice minus that of all other rows."""

    name: str
    difference: float
    bounds: Bounds
    wide: Bounds | None
    """Bounds at a level divided among all slices that are large enough: any of many may look bad by
    chance. None for a slice of fewer than ``LEAST_ROWS`` rows or ``LEAST_POSITIVES`` positives."""
    n: int
    unit: str


def judge_slices(evidence: Evidence, margin: float) -> GateResult | None:
    """The gate on slices: recall of the positive class, accuracy or token F1.

    None where the rows have no slices, or no score that compares between kinds of rows.
    """
    test, names = evidence.test, evidence.test.slice_columns()
    if not names:
        return None
    keys = ("prediction", "predicted", "f1", "won")
    key = next((key for key in keys if test.gives("adapter", key)), None)
    if key is None:  # nats differ between kinds of text by nature
        return None
    if fault := evidence.fault("adapter", test, (key,), "The score of slices"):
        return fault.result("slices", "no slice clearly below the rest", -margin)
    what, unit, scores = "token F1", "rows", test.column("adapter", key)
    what = "win rate" if key == "won" else what
    if key == "predicted":
        what, scores = "F1 per row", row_f1(test.truth(), scores)
    if key == "prediction":
        what = "accuracy"
        scores = (test.column("adapter", "prediction") == test.targets()).astype(float)
        if evidence.positive is not None:
            what, unit = "recall", "positives"
            scores = np.where(test.targets() == evidence.positive, scores, np.nan)
    values = {name: test.slice_values(name) for name in names}
    parts = compare_slices(scores, values, test.groups(), unit, evidence.level)
    return worst_slice(parts, what, margin, evidence.level)


def worst_slice(
    parts: Iterable[Slice], what: str, margin: float, level: float = 0.95
) -> GateResult | None:
    """Fails where a slice clearly scores more than ``margin`` below the rest of the rows.

    The bound of each is divided among all slices of enough rows, or more slices would mean more
    false alarms (Bonferroni: Holm's first step, which tells whether any is worse). Where none is,
    slices only inform: the lowest is shown. Worst-group scores as the measure: Sagawa et al.
    (2020), ICLR. None where no slice has a score.
    """
    known = list(parts)
    if not known:
        return None
    rule = f"{what} of no slice clearly more than {margin:g} below the rest"
    large = [part for part in known if part.wide is not None]
    worse = [part for part in large if part.wide is not None and part.wide.upper < -margin]
    outcome: Verdict = "fail" if worse else "pass" if large else "note"
    part = min(worse or large or known, key=lambda p: p.bounds.upper if worse else p.difference)
    lower, upper = part.bounds if part.wide is None else part.bounds._replace(upper=part.wide.upper)
    why = (
        f"{capital(what)} of {part.name} minus that of the rest is {shown(part.difference)} on "
        f"{part.n:,} {part.unit}, {100 * level:.6g} % bounds {shown(lower)} to {shown(upper)}"
    )
    why += f"; {shown(-margin)} is allowed." if worse else "; no slice is clearly worse."
    if small := len(known) - len(large):
        why += f" Slices too small to decide: {small}."
    return GateResult("slices", rule, part.difference, -margin, lower, upper, outcome, why)


def compare_slices(
    scores: Scores,
    values: Mapping[str, Sequence[str]],
    groups: Sequence[Hashable] | None,
    unit: str,
    level: float,
) -> list[Slice]:
    """Every value of every column: the mean score of its rows minus that of all others.

    ``scores`` (n,) lie between 0 and 1, NaN where a row does not count (a negative, for recall);
    ``values`` holds each row's value in each column. Rows of a slice and the rest are independent
    samples: Wilson's bounds of each where scores are right or wrong, else the bootstrap's, joined
    by Newcombe's method 10. A column with one value has nothing to compare, nor has a slice without
    a row that counts.
    """
    counted = ~np.isnan(scores)
    parts = []
    for column, row_values in values.items():
        here = np.asarray(row_values)
        for value in sorted(set(row_values)):
            inside, outside = counted & (here == value), counted & (here != value)
            if (here != value).any():
                parts.append((f"{column}={value}", inside, outside))
    parts = [(name, inside, outside) for name, inside, outside in parts
             if inside.any() and outside.any()]  # fmt: skip
    least = LEAST_POSITIVES if unit == "positives" else LEAST_ROWS
    large = sum(int(inside.sum()) >= least for _, inside, _ in parts)
    slices = []
    for name, inside, outside in parts:
        n, means = int(inside.sum()), (float(scores[inside].mean()), float(scores[outside].mean()))
        plain, wide = (
            difference_bounds(
                means[0], _bounds_of_mean(scores, inside, groups, at),
                means[1], _bounds_of_mean(scores, outside, groups, at),
            )
            for at in (level, 1 - (1 - level) / max(1, large))
        )  # fmt: skip
        slices.append(
            Slice(name, means[0] - means[1], plain, wide if n >= least else None, n, unit)
        )
    return slices


def _bounds_of_mean(
    scores: Scores, rows: Rows, groups: Sequence[Hashable] | None, level: float
) -> Bounds:
    here = scores[rows]
    part = None if groups is None else [groups[int(i)] for i in np.flatnonzero(rows)]
    if np.isin(here, (0.0, 1.0)).all():
        return share_of(here, part, level).bounds
    columns = np.stack([here, np.ones(len(here))], axis=1)
    return bootstrap(ratio, columns, groups=part, level=level, limits=(0.0, 1.0))
