"""The gates on what training did beside the task: forgetting, overfitting and memorising."""

import numpy as np

from lora_domains.stats.comparisons import Comparison, items_needed
from lora_domains.stats.intervals import difference_bounds
from lora_domains.verdict.evidence import Evidence, Fault
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.rules import (
    LEAST_POSITIVES,
    GateResult,
    Measurement,
    capital,
    judge,
    judge_limit,
    not_applicable,
    unmeasured,
)
from lora_domains.verdict.scores import CONTENDERS

# ── General knowledge ───────────────────────────────────────────────────────────────────────────


def retention(pooled: Comparison, margin: float, rival: str = "the base") -> GateResult:
    """General knowledge is kept: over all probes the adapter is at most ``margin`` worse.

    ``margin`` is a share of items, above 0 (.03 is 3 points), and ``rival`` the label of what is in
    the place of the base. A non-inferiority test: no visible loss is not enough, the items must be
    able to show that there is none.
    """
    rule = f"accuracy on all probes at most {margin:g} below {rival}"
    scores = f"Probe accuracy {pooled.adapter:.3f}; {rival} reaches {pooled.base:.3f}"
    return judge(
        "retention", rule, Measurement.of(pooled, "probe items"), -margin,
        what=f"{scores}. The difference", needed=items_needed(pooled, -margin),
    )  # fmt: skip


def masked_retention(nats: Comparison, share: float) -> GateResult:
    """An encoder's general knowledge is kept: nats per masked token rise by at most ``share``.

    ``nats`` compares base and adapter on general text. The margin is a share of the base's nats, so
    that it means the same for a small vocabulary and a large one.
    """
    margin = share * nats.base
    rule = f"nats per masked token of general text at most {100 * share:g} % above the base"
    what = (
        f"Nats per masked token {nats.adapter:.3f}; the base has {nats.base:.3f} and a rise of "
        f"{100 * share:g} % is allowed. The rise"
    )
    return judge(
        "retention", rule, Measurement.of(nats, "texts"), margin,
        what=what, needed=items_needed(nats, margin), higher_is_better=False,
    )  # fmt: skip


NO_MASKED_TOKENS = "The base has no masked-token head, so its general knowledge cannot be measured."


def judge_retention(evidence: Evidence, margin: float) -> GateResult | None:
    if evidence.knowledge == "nothing":
        return not_applicable("retention", "general knowledge is kept", margin, NO_MASKED_TOKENS)
    masked = evidence.knowledge == "masked tokens"
    metric = METRICS["nats_per_token" if masked else "accuracy"]
    compared = evidence.compared(metric, evidence.text if masked else evidence.general)
    if isinstance(compared, Fault):
        return compared.result("retention", "general knowledge is kept", -margin)
    if masked:
        return masked_retention(compared, margin)
    pooled = retention(compared, margin)
    return pooled if pooled.verdict == "fail" else harmed_suite(evidence, margin) or pooled


def harmed_suite(evidence: Evidence, margin: float) -> GateResult | None:
    """A failure where one suite of probes clearly lost more than ``margin``; else None.

    Pooled, a field that is lost hides among those that are kept. The level is divided among the
    suites (Bonferroni: Holm's first step, which tells whether any is harmed).
    """
    suites = np.array([str(item.get("suite")) for item in evidence.general])
    names, counts = np.unique(suites, return_counts=True)
    names = names[counts >= LEAST_POSITIVES]
    if len(names) < 2:
        return None
    at = 1 - (1 - evidence.level) / len(names)
    parts = {name: evidence.general.part(np.flatnonzero(suites == name)) for name in names}
    compared = {name: METRICS["accuracy"].compare(part, level=at) for name, part in parts.items()}
    upper, name = min((one.upper, name) for name, one in compared.items() if one is not None)
    worst = compared[name]
    if worst is None or upper >= -margin:
        return None
    rule = f"accuracy on no suite clearly more than {margin:g} below the base"
    what = f"Accuracy on {name} {worst.adapter:.3f}; the base reaches {worst.base:.3f}"
    measured = Measurement.of(worst, "of its probe items")
    return judge(
        "retention", rule, measured, -margin, what=f"{what}. The difference", needed=None
    )  # fmt: skip


def judge_drift(evidence: Evidence, limit: float) -> GateResult | None:
    if evidence.knowledge == "nothing":
        return not_applicable("drift", "KL from base to adapter", limit, NO_MASKED_TOKENS)
    rule = f"KL from base to adapter on general text at most {limit:g} nats per token"
    what = "KL from the base (nats per token)"
    if fault := evidence.fault("adapter", evidence.text, ("kl", "tokens"), what):
        return fault.result("drift", rule, limit)
    return judge_limit("drift", rule, evidence.kl(evidence.level), limit, what)


# ── Training rows against test rows ─────────────────────────────────────────────────────────────


def judge_overfit(evidence: Evidence, limit: float) -> GateResult | None:
    """The domain metric on training rows minus that on test rows, turned round for a loss."""
    if not len(evidence.train):
        return None
    metric = evidence.metric
    rule = f"{metric.label} on training rows at most {limit:g} better than on test rows"
    for table in (evidence.train, evidence.test):
        if fault := evidence.fault("adapter", table, metric.scores, capital(metric.label)):
            return fault.result("overfit", rule, limit)
    parts = [evidence.metric_on(table) for table in (evidence.train, evidence.test)]
    (train, _), (test, _) = parts
    if metric.higher_is_better and train <= metric.range[0]:
        why = f"{capital(metric.label)} is {train:.3f} on training rows: nothing was learned."
        return unmeasured("overfit", rule, limit, why)
    (first, first_bounds), (second, second_bounds) = (
        parts if metric.higher_is_better else parts[::-1]
    )
    bounds = difference_bounds(first, first_bounds, second, second_bounds)
    gap = Measurement(first - second, bounds, len(evidence.test), "test rows", evidence.level)
    scores = f"{capital(metric.label)} {train:.3f} on training rows, {test:.3f} on test rows"
    return judge_limit("overfit", rule, gap, limit, f"{scores}. The gap")


def judge_memorisation(evidence: Evidence, limit: float) -> GateResult | None:
    rule = f"membership-inference AUC at most {limit:g}"
    what = "Membership-inference AUC (0.5 = chance)"
    if not len(evidence.train):
        return None
    for table in (evidence.train, evidence.test):
        for contender in CONTENDERS:
            fault = evidence.fault(contender, table, ("nats", "tokens"), what)
            if fault is not None and fault.diverged:
                return fault.result("memorisation", rule, limit)
    measured = evidence.membership(evidence.level)
    if measured is None:
        return None
    return judge_limit("memorisation", rule, measured, limit, what)
