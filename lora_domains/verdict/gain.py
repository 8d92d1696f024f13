"""The gate on gain: the adapter must beat the base and the best baseline on the same items."""

from collections.abc import Mapping
from dataclasses import replace

from lora_domains.stats.comparisons import Comparison, items_needed
from lora_domains.verdict.evidence import Evidence, Fault
from lora_domains.verdict.metrics import Metric, best_baseline
from lora_domains.verdict.rules import (
    GateResult,
    Measurement,
    Verdict,
    capital,
    describe_bounds,
    judge,
    shown,
    too_few,
    worst,
)
from lora_domains.verdict.scores import contender_label

OUTCOMES: dict[Verdict, str] = {
    "pass": "The adapter beats it",
    "fail": "The adapter does not beat it",
    "inconclusive": "Whether the adapter beats it is open",
}


def judge_gain(evidence: Evidence, _: float) -> GateResult:
    """The adapter against the base and the best baseline on the domain metric."""
    metric, test, positive = evidence.metric, evidence.test, evidence.positive
    values = {name: metric.value(test, name, positive) for name in test.baselines()}
    best = best_baseline(metric, values)
    rivals = {}
    for rival in ["base", *(best[:1] if best else [])]:
        compared = evidence.compared(metric, test, rival, positive)
        if isinstance(compared, Fault):
            return compared.result("gain", f"{metric.label} better than the base", 0.0)
        rivals[contender_label(rival)] = compared
    return gain(metric, rivals)


def gain(metric: Metric, rivals: Mapping[str, Comparison]) -> GateResult:
    """The adapter beats every one of ``rivals`` on the same items.

    ``rivals`` are comparisons by the rival's label, which is in the place of the base. The result
    shown is the worst of them, or the narrowest: all must pass.
    """
    sense = "above" if metric.higher_is_better else "below"
    rule = f"{metric.label} {sense} " + f" and {sense} ".join(rivals)
    results = [_beats(metric, rule, rival, compared) for rival, compared in rivals.items()]
    return worst(results, metric.higher_is_better)


def _beats(metric: Metric, rule: str, rival: str, compared: Comparison) -> GateResult:
    measured, needed = Measurement.of(compared, "test rows"), items_needed(compared, 0.0)
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
        why += f" {too_few(measured, needed)}"
    return replace(result, why=why)
