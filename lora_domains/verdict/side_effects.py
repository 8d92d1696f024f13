"""The gates on what training did beside the task: forgetting, overfitting, memorising, confidence.

Retention decides; the others inform unless the domain sets them a limit (``rules.inform``), KL on
the embedded base excepted.
"""

from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np

from lora_domains.stats.comparisons import Comparison, items_needed
from lora_domains.stats.intervals import Bounds, difference_bounds
from lora_domains.verdict import CONTENDERS, best_baseline, contender_label
from lora_domains.verdict.evidence import Evidence, Fault
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.rules import (
    GateResult,
    Measurement,
    capital,
    inform,
    informing,
    judge,
    judge_limit,
    not_applicable,
    shown,
    unmeasured,
)
from lora_domains.verdict.scores import Item, ScoreTable

# ── General knowledge ───────────────────────────────────────────────────────────────────────────


def retention(
    pooled: Comparison, margin: float, rival: str = "the base", suites: str = "", *,
    questions: bool = True,
) -> GateResult:  # fmt: skip
    """General knowledge is kept: over all questions the adapter is at most ``margin`` worse.

    ``margin`` is a share of questions, above 0 (.03 is 3 points), ``rival`` the label of what is in
    the place of the base, and ``suites`` names what is asked: ``questions``, of which there may be
    more, or texts for linear probes. A non-inferiority test: no visible loss is not enough, the
    items must be able to show that there is none.
    """
    asked = "general questions" if questions else "linear probes of the features"
    rule = f"accuracy on {asked}{f' ({suites})' if suites else ''} at most {margin:g} below {rival}"
    scores = f"Accuracy on {asked} {pooled.adapter:.3f}; {rival} reaches {pooled.base:.3f}"
    unit = "questions" if questions else "texts"
    return judge(
        "retention", rule, Measurement.of(pooled, unit), -margin,
        what=f"{scores}. The difference", needed=partial(items_needed, pooled, -margin),
        enough=partial(items_needed, pooled, -margin, equal=True) if questions else None,
    )  # fmt: skip


def masked_retention(nats: Comparison, share: float, rival: str = "the base") -> GateResult:
    """An encoder's general knowledge is kept: nats per masked token rise by at most ``share``.

    ``nats`` compares base, or another ``rival``, and adapter on general text. The margin is a share
    of the base's nats, so that it means the same for a small vocabulary and a large one; bounds of
    ``masked_nats`` know that it varies with the texts.
    """
    margin = share * nats.base
    rule = f"nats per masked token of general text at most {100 * share:g} % above {rival}"
    what = (
        f"Nats per masked token {nats.adapter:.3f}; {rival} has {nats.base:.3f} and a rise of "
        f"{100 * share:g} % is allowed. The rise"
    )
    return judge(
        "retention", rule, Measurement.of(nats, "texts"), margin,
        what=what, needed=partial(items_needed, nats, margin), higher_is_better=False,
    )  # fmt: skip


NO_MASKED_TOKENS = "The base has no masked-token head, so its general knowledge was not measured."
NO_KL = "The base has no masked-token head, so there is no KL; linear probes measure what it knows."


def masked_nats(evidence: Evidence, share: float) -> Comparison | Fault:
    """Nats per masked token before and after, which may rise by ``share`` of those before.

    That margin is known from the same texts as the rise, and no better: nats before are spread
    about their mean by ``share``, so that the bounds are those of the rise less its margin.
    """
    metric = METRICS["nats_per_token"]
    compared = evidence.compared(metric, evidence.text)
    if isinstance(compared, Fault):
        return compared
    items: list[Item] = []
    for item in evidence.text:
        scores = item["scores"]
        before = scores["base"]
        above = before["nats"] - compared.base * before["tokens"]
        spread = {**before, "nats": before["nats"] + share * above}
        items.append({**item, "scores": {**scores, "base": spread}})
    table = ScoreTable(items)
    bounds = metric.compare(table, "base", "adapter", None, evidence.level)
    return replace(compared, lower=bounds.lower, upper=bounds.upper) if bounds else compared


def judge_retention(evidence: Evidence, margin: float) -> GateResult | None:
    if evidence.knowledge == "nothing":
        return not_applicable("retention", "general knowledge is kept", margin, NO_MASKED_TOKENS)
    masked = evidence.knowledge == "masked tokens"
    compared = (
        masked_nats(evidence, margin)
        if masked
        else evidence.compared(METRICS["accuracy"], evidence.general)
    )
    if isinstance(compared, Fault):
        return compared.result("retention", "general knowledge is kept", -margin)
    if masked:
        return masked_retention(compared, margin)
    names = dict.fromkeys(str(item.get("suite")).split("/")[0] for item in evidence.general)
    asked = evidence.knowledge == "questions"
    pooled = retention(compared, margin, suites=", ".join(names), questions=asked)
    return pooled if pooled.verdict == "fail" else harmed_suite(evidence, margin) or pooled


def harmed_suite(evidence: Evidence, margin: float, rival: str = "the base") -> GateResult | None:
    """A failure where one suite of questions clearly lost more than ``margin``; else None.

    Pooled, a field that is lost hides among those that are kept. The level is divided among the
    suites (Bonferroni: Holm's first step, which tells whether any is harmed).
    """
    suites = np.array([str(item.get("suite")) for item in evidence.general])
    names = np.unique(suites)
    if len(names) < 2:
        return None
    at = 1 - (1 - evidence.level) / len(names)
    parts = {name: evidence.general.part(np.flatnonzero(suites == name)) for name in names}
    compared = {name: METRICS["accuracy"].compare(part, level=at) for name, part in parts.items()}
    upper, name = min((one.upper, name) for name, one in compared.items() if one is not None)
    worst = compared[name]
    if worst is None or upper >= -margin:
        return None
    rule = f"accuracy on no suite clearly more than {margin:g} below {rival}"
    what = f"Accuracy on {name} {worst.adapter:.3f}; {rival} reaches {worst.base:.3f}"
    measured = Measurement.of(worst, "of its questions")
    return judge(
        "retention", rule, measured, -margin, what=f"{what}. The difference", needed=None
    )  # fmt: skip


DRIFT_LIMIT = 0.23
"""KL from base to adapter on general text, nats per token: where, on the embedded base, an adapter
is as likely to have lost more than 3 points of general knowledge as not
(benchmarks/training/retention.py; .18 to .30 at 95 %). No other base was calibrated."""


def judge_drift(evidence: Evidence, limit: float | None) -> GateResult | None:
    """KL from base to adapter on general text.

    Without a ``limit`` the embedded base has ``DRIFT_LIMIT``; on other bases KL informs.
    """
    if evidence.knowledge in ("features", "nothing"):
        return not_applicable("drift", "KL from base to adapter", limit, NO_KL)
    if limit is None and evidence.embedded_base:
        limit = DRIFT_LIMIT
    rule = "informs only"
    if limit is not None:
        rule = f"KL from base to adapter on general text at most {limit:g} nats per token"
    what = "KL from the base (nats per token)"
    if fault := evidence.fault("adapter", evidence.text, ("kl", "tokens"), what):
        missing = fault.result("drift", rule, limit)
        return informing(missing) if limit is None else missing
    if limit is None:
        return inform("drift", evidence.kl(SHOWN), None, what=what)
    return judge_limit("drift", rule, evidence.kl(evidence.level), limit, what)


# ── Training rows against test rows ─────────────────────────────────────────────────────────────

OVERFIT_WARNS, MEMORISATION_WARNS, CALIBRATION_WARNS = 0.10, 0.75, 0.10
"""Where these gates warn; they decide only where a domain sets a limit."""
NO_TRAINING_ROWS = "It was trained elsewhere, and its training rows were not given."
SHOWN = 0.95
"""The confidence level of figures that inform."""


def judge_overfit(evidence: Evidence, limit: float | None) -> GateResult | None:
    """The domain metric on training rows minus that on test rows, turned round for a loss.

    A gap alone says little: TF-IDF fits its training rows perfectly and is useful all the same. So
    the gap is shown beside that of the best baseline that was trained, and warns only above it.
    """
    if not len(evidence.train):
        return _unseen("overfit", evidence, limit)
    metric = evidence.metric
    rule = f"{metric.label} on training rows at most {limit} better than on test rows"
    if limit is None:
        rule = f"informs only; warns above {OVERFIT_WARNS:g} and the best baseline's own gap"
    for table in (evidence.train, evidence.test):
        counted = metric.counted(table)
        if fault := evidence.fault("adapter", counted, metric.scores, capital(metric.label)):
            missing = fault.result("overfit", rule, limit)
            return informing(missing) if limit is None else missing
    (train, _), (test, _) = _on_both(evidence, "adapter", evidence.level)
    if why := _nothing_learned(evidence, train):
        nothing = unmeasured("overfit", rule, limit, why)
        return informing(nothing) if limit is None else nothing
    what = f"{capital(metric.label)} {train:.3f} on training rows, {test:.3f} on test rows. The gap"
    if limit is not None:
        return judge_limit("overfit", rule, _gap(evidence, "adapter"), limit, what)
    gap, own = _gap(evidence, "adapter", SHOWN), _baseline_gap(evidence)
    beside = "" if own is None else f"That of {own[0]} is {shown(own[1])}."
    usual = own is not None and gap.observed <= own[1]
    # In the unit of the rows' numbers a gap is large or small beside the figure itself.
    warns = OVERFIT_WARNS * (abs(test) if metric.own_unit else 1.0)
    result = inform("overfit", gap, warns, what=what, beside=beside, usual=usual)
    return replace(result, rule=rule)


def _nothing_learned(evidence: Evidence, train: float) -> str:
    """Why the metric on training rows, ``train``, shows no learning; empty where it shows some."""
    metric, rows = evidence.metric, evidence.train
    if metric.higher_is_better and train <= metric.range[0]:
        return f"{capital(metric.label)} is {train:.3f} on training rows: nothing was learned."
    predicted = rows.column("adapter", "prediction")
    if evidence.labels and np.ptp(rows.targets()) and np.ptp(predicted) == 0:
        label = evidence.labels[int(predicted[0])]
        return f"All training rows are called {label}: nothing was learned."
    return ""


def _unseen(name: str, evidence: Evidence, limit: float | None) -> GateResult | None:
    """The result without training rows: not applicable where others trained the adapter."""
    rule = "training rows against test rows"
    if evidence.trained_elsewhere:
        return not_applicable(name, rule, limit, NO_TRAINING_ROWS)
    if limit is None:
        return None
    return unmeasured(name, rule, limit, "It was not measured: no training row was scored.")


def _gap(evidence: Evidence, contender: str, level: float | None = None) -> Measurement:
    """How much better a contender is on training rows than on test rows."""
    level = level or evidence.level
    parts = _on_both(evidence, contender, level)
    first, second = parts if evidence.metric.higher_is_better else parts[::-1]
    bounds = difference_bounds(*first, *second)
    return Measurement(first[0] - second[0], bounds, len(evidence.test), "test rows", level)


def _on_both(evidence: Evidence, contender: str, level: float) -> list[tuple[float, Bounds]]:
    return [evidence.metric_on(part, contender, level) for part in (evidence.train, evidence.test)]


def _baseline_gap(evidence: Evidence) -> tuple[str, float] | None:
    """The best of the baselines that were scored on training rows too, and its gap."""
    metric, positive = evidence.metric, evidence.positive
    values = {
        name: metric.value(evidence.test, name, positive)
        for name in evidence.test.baselines()
        if metric.value(evidence.train, name, positive) is not None
    }
    best = best_baseline(metric, values)
    return None if best is None else (contender_label(best[0]), _gap(evidence, best[0]).observed)


def judge_memorisation(evidence: Evidence, limit: float | None) -> GateResult | None:
    """The larger AUC of telling training rows from test rows (``Evidence.membership``)."""
    rule = f"membership-inference AUC at most {limit}"
    what = "Membership-inference AUC (0.5 = chance)"
    if not len(evidence.train):
        return _unseen("memorisation", evidence, limit)
    told_by = [("adapter", "nll"), *product(CONTENDERS, ("nats", "tokens"))]
    faults = [
        evidence.fault(contender, table, (key,), what)
        for table in (evidence.train, evidence.test) for contender, key in told_by
    ]  # fmt: skip
    for fault in faults:
        if fault is not None and fault.diverged:
            return fault.result("memorisation", rule, limit)
    measured = evidence.membership(SHOWN if limit is None else evidence.level)
    if not measured:
        missing = next((fault for fault in faults if fault is not None), None)
        return missing.result("memorisation", rule, limit) if missing and limit else None
    by, largest = max(measured.items(), key=lambda pair: pair[1].observed)
    other = "calibrated" if by == "loss" else "loss"
    beside = f"Measured by {TOLD_BY[by]}"
    if other in measured:
        beside += f"; by {TOLD_BY[other]} it is {shown(measured[other].observed)}"
    beside += "."
    if limit is None:
        return inform("memorisation", largest, MEMORISATION_WARNS, what=what, beside=beside)
    result = judge_limit("memorisation", rule, largest, limit, what)
    return replace(result, why=f"{result.why} {beside}")


TOLD_BY = {"loss": "the loss itself", "calibrated": "what the adapter gained on each row"}

# ── Confidence ──────────────────────────────────────────────────────────────────────────────────


def judge_calibration(evidence: Evidence, limit: float | None) -> GateResult | None:
    """The expected calibration error of the adapter's answers to test rows."""
    what, n = "Expected calibration error", len(evidence.test)
    rule = "informs only" if limit is None else f"expected calibration error at most {limit:g}"
    level = SHOWN if limit is None else evidence.level
    found = evidence.calibration if limit is None else evidence.calibration_at(level)
    if not found:
        fault = evidence.fault("adapter", evidence.test, ("confidence", "brier"), what)
        if fault is None or not (fault.diverged or limit):
            return None
        return fault.result("calibration", rule, limit)
    measured = Measurement(found["ece"], Bounds(**found["bounds"]["ece"]), n, "test rows", level)
    if limit is None:
        return inform("calibration", measured, CALIBRATION_WARNS, what=what)
    return judge_limit("calibration", rule, measured, limit, what)
