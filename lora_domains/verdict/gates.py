"""The gates: what each measures, its rule, its default threshold and the range that it may have.

Each gate is one ``Gate`` in ``GATES``. ``register`` adds one, which then counts in every verdict
and appears in cards, reports and JUnit files:

    def latency(evidence: Evidence, limit: float) -> GateResult | None: ...

    register(Gate("latency", latency, Threshold(0.2)))

A gate that informs unless a limit is set has a ``Threshold(None)`` (see ``rules.inform``).
``Gates`` are the thresholds that a domain declares. A dataclass derived from it with a field named
after a registered gate sets that gate's threshold too.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from lora_domains.verdict.evidence import Evidence
from lora_domains.verdict.performance import (
    judge_floors,
    judge_gain,
    judge_precision,
    judge_recall,
    judge_slices,
)
from lora_domains.verdict.rules import (
    FAILING_LEVEL,
    INFORMING,
    LEAST_ROWS,
    RENAMED,
    GateResult,
    Verdict,
    judge_count,
    not_applicable,
    undecided,
    unmeasured,
)
from lora_domains.verdict.side_effects import (
    NO_TRAINING_ROWS,
    judge_calibration,
    judge_drift,
    judge_memorisation,
    judge_overfit,
    judge_retention,
)


@dataclass(frozen=True)
class Threshold:
    """The default of a gate's threshold, and the range (both ends excluded) it may be set to."""

    default: float | None
    """None for a gate that informs unless a domain sets it a limit."""
    above: float = 0.0
    below: float = 1.0
    whole: bool = False

    def allows(self, value: float | None) -> bool:
        if value is None:
            return self.default is None
        return self.above < value < self.below and not (self.whole and value % 1)

    def __str__(self) -> str:
        low, high = (f"{end:g}".removeprefix("0") or "0" for end in (self.above, self.below))
        if self.whole:
            return f"a whole number above {low}"
        return f"above {low}" if math.isinf(self.below) else f"between {low} and {high}"


@dataclass(frozen=True)
class Gate:
    """A named rule on a measured figure."""

    name: str
    judge: Callable[[Evidence, Any], GateResult | None]
    """From the evidence and the threshold (None where it has no default and none is set); None
    where the gate does not concern this adapter."""
    threshold: Threshold | None = None
    """None where the rule has no setting; ``judge`` gets 0 then."""
    on_test_rows: bool = False
    """Whether its figure is sampled on test rows: fewer than ``LEAST_ROWS`` do not decide it."""


GATES: dict[str, Gate] = {}
"""By name, in the order in which they are judged and shown."""


def register(gate: Gate) -> None:
    """Add ``gate`` to ``GATES``; raises ValueError where the name is taken."""
    if gate.name in GATES:
        raise ValueError(f"register expects a new name; there is a gate {gate.name!r} already.")
    GATES[gate.name] = gate


def judge_all(
    evidence: Evidence, thresholds: Mapping[str, Any], names: Collection[str] | None = None
) -> list[GateResult]:
    """The results of every gate that concerns the adapter, those that decide first.

    A missing threshold is its default. With ``names``, only these gates are judged. Gates pass at
    the level of the test set's budget and fail at 95 %: however often a test set is evaluated, a
    harmful adapter is found as easily as the first time.
    """
    failing = evidence
    if evidence.evaluations is not None:
        at_95 = replace(evidence.evaluations, level=FAILING_LEVEL)
        failing = replace(evidence, evaluations=at_95)
    results = []
    for gate in GATES.values():
        if names is not None and gate.name not in names:
            continue
        limit = gate.threshold
        value = 0.0 if limit is None else thresholds.get(gate.name, limit.default)
        result = _judged(gate, evidence, value)
        if failing is not evidence:
            fail = _judged(gate, failing, value)
            result = fail if fail is not None and fail.verdict == "fail" else result
        results.append(result)
    known = [result for result in results if result is not None]
    if evidence.evaluations is not None:
        _say_what_more_rows_cost(known)
    return sorted(known, key=lambda result: result.verdict in INFORMING)


def _say_what_more_rows_cost(results: list[GateResult]) -> None:
    """Tell the first gate that asks for more test rows that they are charged to the same budget."""
    for place, result in enumerate(results):
        gate = GATES.get(result.name)
        if gate and gate.on_test_rows and result.verdict == "inconclusive":
            why = f"{result.why} Rows added to these are evaluated on the same budget."
            results[place] = replace(result, why=why)
            return


def _judged(gate: Gate, evidence: Evidence, value: float | None) -> GateResult | None:
    result = gate.judge(evidence, value)
    if result is not None and gate.on_test_rows and len(evidence.test) < LEAST_ROWS:
        return undecided(result, f"Fewer than {LEAST_ROWS} test rows do not decide it.")
    return result


register(Gate("gain", judge_gain, on_test_rows=True))
register(Gate("retention", judge_retention, Threshold(0.03)))
register(Gate("drift", judge_drift, Threshold(None, below=math.inf)))
register(Gate("recall", judge_recall, Threshold(0.80), on_test_rows=True))
register(Gate("precision", judge_precision, Threshold(0.85), on_test_rows=True))
register(Gate("floors", judge_floors, Threshold(None), on_test_rows=True))
register(Gate("slices", judge_slices, Threshold(0.10), on_test_rows=True))
register(Gate("overfit", judge_overfit, Threshold(None), on_test_rows=True))
register(Gate("memorisation", judge_memorisation, Threshold(None, above=0.5), on_test_rows=True))
register(Gate("calibration", judge_calibration, Threshold(None), on_test_rows=True))

# ── Counted, not sampled ────────────────────────────────────────────────────────────────────────


def _evaluations(evidence: Evidence, _: float) -> GateResult | None:
    """The test rows are not used up, and gates and metric were declared before."""
    now = evidence.evaluations
    if now is None:
        return None
    outcome: Verdict = "fail" if now.broken else "pass" if now.may_pass else "inconclusive"
    rule = f"at most {now.budget} evaluations of the test rows; gates declared before the first"
    return GateResult(
        "evaluations", rule, float(now.number), float(now.budget), None, None, outcome, str(now)
    )


def _leaks(evidence: Evidence, _: float) -> GateResult:
    """No test row or question occurs, word for word, in what was trained on; near ones only
    warn."""
    rule = "no exact test row or question in what was trained on"
    if evidence.leaks is None:
        if evidence.trained_elsewhere:
            return not_applicable("leaks", rule, 0.0, NO_TRAINING_ROWS)
        return unmeasured("leaks", rule, 0.0, "Leaks were not searched for: evaluate it again.")
    exact, near = int(evidence.leaks["exact"]), int(evidence.leaks["near"])
    why = "No test row and no question occurs in what was trained on."
    if exact:
        what = "the training rows (--drop-leaks) or the general text, and train again."
        then = f"Remove them from {what}"
        if evidence.trained_elsewhere:
            then = "Evaluate it on rows that it was not trained on."
        found = "test row or question is" if exact == 1 else "test rows or questions are"
        why = f"{exact:,} {found} also in what was trained on. {then}"
    if near:
        why += f" Warning: {_count(near, 'row')} nearly the same as a training row: see card.json."
    if evidence.trained_elsewhere:
        why += " That it was trained on the rows given, and no others, cannot be verified."
    return judge_count("leaks", rule, float(exact), passed=not exact, why=why)


def _frozen(evidence: Evidence, _: float) -> GateResult:
    """The base answers as before; ``observed`` is 1 where it changed."""
    changed = evidence.base_changed
    why = "The base's weights and logits are the same before and after, bit for bit."
    if changed:
        why = "The base's weights or logits changed: nothing measured against it can be trusted."
    return judge_count("frozen", "base unchanged", float(changed), passed=not changed, why=why)


def _effect(evidence: Evidence, tolerance: float) -> GateResult:
    """The adapter does something: it changes some logit by more than ``tolerance``."""
    largest = evidence.largest_move
    if not math.isfinite(largest):
        why = "The adapter's logits are not finite: training has diverged."
    elif largest > tolerance:
        why = f"The adapter changes a logit by up to {largest:.3g}."
    else:
        why = (
            f"The adapter has no effect: no logit changes by more than {largest:.3g} (its B "
            "matrices are still zero, or it is not routed)."
        )
    passed = largest > tolerance and math.isfinite(largest)
    return judge_count("effect", "adapter changes the logits", largest, passed=passed, why=why)


def _identity(evidence: Evidence, _: float) -> GateResult | None:
    """The base is the one on which the adapter was trained; loading checks that by its card."""
    if not evidence.trained_elsewhere:
        return None
    why = "It was trained elsewhere, so it cannot be verified that it was made on this base."
    return not_applicable("identity", "trained on this base", 0.0, why)


def _count(count: int, what: str) -> str:
    return f"{count:,} {what} is" if count == 1 else f"{count:,} {what}s are"


register(Gate("evaluations", _evaluations, Threshold(5, below=math.inf, whole=True)))
register(Gate("leaks", _leaks))
register(Gate("frozen", _frozen))
register(Gate("effect", _effect))
register(Gate("identity", _identity))

# ── The thresholds of a domain ──────────────────────────────────────────────────────────────────

ALWAYS_HASHED = ("retention", "drift", "recall", "precision", "overfit", "slices", "memorisation")
"""The thresholds of the first digest, by the names they had in it."""
FORMER = {"drift": 0.23, "overfit": 0.10, "memorisation": 0.75}
"""What the first digest, and cards of that time, hold where a gate that informs has no limit."""


@dataclass(frozen=True)
class Gates:
    """The thresholds of a domain's gates."""

    renamed: ClassVar[Mapping[str, str]] = RENAMED
    """Former names of fields, which older cards have: {former: current}."""

    retention: float = 0.03
    """Largest acceptable loss of general knowledge, as a share of the questions."""
    drift: float | None = None
    """Largest KL from base to adapter on general text, nats per token. Where it is None, the
    embedded base has ``side_effects.DRIFT_LIMIT``, and on other bases KL informs."""
    recall: float = 0.80
    """Smallest recall of the positive class; applies where a task names one, as ``precision``."""
    precision: float = 0.85
    slices: float = 0.10
    """How far a slice may score below the rest of the rows; applies where rows are sliced."""
    overfit: float | None = None
    """Largest difference of the domain metric between training and test rows; informs where it is
    None, as do ``memorisation`` and ``calibration``."""
    memorisation: float | None = None
    """Largest AUC of telling training rows from test rows; .5 is chance. Set it where membership
    itself is a secret."""
    calibration: float | None = None
    """Largest expected calibration error."""
    floors: Mapping[str, float] | None = None
    """Smallest recall of labels by name, of any task with labels."""

    evaluations: int = 5
    """Number of adapters that may be evaluated on one test set, each by bounds of 1 - .05 / number
    confidence; fixed by the first evaluation of the test set."""

    def record(self) -> dict[str, Any]:
        """The thresholds by gate, as a card stores them; ``floors`` only where there are some."""
        record = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {name: value for name, value in record.items() if name != "floors" or value}

    def hashed(self) -> dict[str, Any]:
        """The thresholds for a digest, with the field names of the first release: old digests hold.

        A threshold that was added later counts where it differs from its gate's default, so adding
        one changes no digest.
        """
        former = {current: name for name, current in self.renamed.items()}
        hashed: dict[str, Any] = {}
        for name, value in self.record().items():
            first = former.get(name, name)
            if value is None:
                value = FORMER.get(first)
            elif value == FORMER.get(first):
                hashed[f"{first} decides"] = 1.0
            threshold = GATES[name].threshold if name in GATES else None
            if first in ALWAYS_HASHED or threshold is None or value != threshold.default:
                hashed[first] = value
        return hashed

    def ranges(self) -> Iterator[tuple[str, float | None, bool, str]]:
        """For each threshold its name, value, whether its gate allows that, and the range."""
        for setting in fields(self):
            threshold = GATES[setting.name].threshold if setting.name in GATES else None
            if threshold is not None:
                value, name = getattr(self, setting.name), setting.name
                if name != "floors" or value is None:
                    yield name, value, threshold.allows(value), str(threshold)
                    continue
                given = isinstance(value, Mapping) and all(map(threshold.allows, value.values()))
                yield name, value, given, f"the recall of each label, {threshold}"
