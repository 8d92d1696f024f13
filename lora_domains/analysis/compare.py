"""Compare two adapters, or several seeds of one, on the same items. No model is needed.

Items come from ``items.jsonl`` in the adapters' folders and are matched by the keyed digests of
their rows. Adapters evaluated in one output folder share the key.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_domains.atomic import adapter_name, repository_of
from lora_domains.errors import AdapterError
from lora_domains.report.card import Card, read_items
from lora_domains.report.report import evidence_of
from lora_domains.stats.comparisons import Comparison
from lora_domains.tasks import positive_index
from lora_domains.verdict.evidence import Evidence, Fault
from lora_domains.verdict.gates import judge_all
from lora_domains.verdict.metrics import METRICS, metric_named, reported
from lora_domains.verdict.performance import gain, kept
from lora_domains.verdict.rules import (
    FAILING_LEVEL,
    LEAST_ROWS,
    GateResult,
    undecided,
    verdict,
)
from lora_domains.verdict.scores import Metric, ScoreTable
from lora_domains.verdict.side_effects import harmed_suite, masked_nats, masked_retention, retention
from lora_domains.verdict.summary import comparison_fields, over_seeds

FLOORS = ("recall", "precision")
"""Gates of an evaluation that B is held to, and figures of which nothing may clearly be lost."""
COUNTED = ("evaluations", "leaks", "frozen", "effect")
"""Gates on what was counted when B was evaluated: its test rows are not used up, it read none of
them, it left the base as it was, and has an effect."""

PER_LABEL = ("truth", "predicted", "probabilities")
"""What an item with several labels has for each of them."""


def compare_adapters(first: Path, second: Path) -> dict[str, Any]:
    """Compare B (``second``) with A (``first``) on the same test items and general questions.

    In ``scores``, ``base`` is A and ``adapter`` is B. The verdict is pass if B is better than A on
    the domain metric, keeps general knowledge within the margin that A declares, reaches the floors
    of A's gates, has not clearly lost recall or precision of the positive class, and passed what an
    evaluation counts (``COUNTED``); fail if not, and inconclusive if there are too few items to
    tell. Raises AdapterError if test items, metric
    or labels differ.
    """
    one, two = _Run(first), _Run(second)
    two.number_labels_as(one)
    _check_comparable(one, two)
    test, general = _paired(one, two, "test"), _paired(one, two, "general")
    metric, positive = metric_named(one.judged["metric"]), one.positive
    compared = {each.name: each.compare(test, positive=positive) for each in one.metrics}
    if compared.get(metric.name) is None:
        raise AdapterError(
            where=f"{one.name} and {two.name}",
            expected=f"a score for {metric.label} on every test item",
            found="items without one",
            hint="Evaluate both again.",
        )
    known = {name: comparison for name, comparison in compared.items() if comparison is not None}
    paired = replace(evidence_of(two.entry, []), items=ScoreTable([*test, *general]))
    if paired.knowledge == "masked tokens":
        items = [*test, *_paired(one, two, "text")]
        paired = replace(paired, items=ScoreTable(items))
    results = _judged(one, paired, known)
    pooled = METRICS["accuracy"].compare(general)
    return {
        "a": one.name,
        "b": two.name,
        "metric": metric.name,
        "scores": {name: comparison_fields(comparison) for name, comparison in known.items()},
        "general": None if pooled is None else comparison_fields(pooled),
        "gates": [asdict(result) for result in results],
        "verdict": verdict(results),
    }


def _judged(one: "_Run", paired: Evidence, compared: Mapping[str, Comparison]) -> list[GateResult]:
    """Gain over A, what was lost of A, and gates of an evaluation by the thresholds of A.

    B passes by bounds at the level of its evaluation, and fails by bounds of 95 %.
    """
    gates, metric = one.entry.settings["gates"], paired.metric
    results = [_at_both_levels(paired, lambda at: _gain(one, at))]
    if paired.positive is not None:
        results += [
            kept(METRICS[name], compared[name], one.name)
            for name in FLOORS if name in compared and name != metric.name
        ]  # fmt: skip
    if len(paired.test) < LEAST_ROWS:
        few = f"Fewer than {LEAST_ROWS} test rows do not decide it."
        results = [undecided(result, few) for result in results]
    results += judge_all(paired, gates, (*FLOORS, *COUNTED))
    if len(paired.text if paired.knowledge == "masked tokens" else paired.general):
        results.append(_at_both_levels(paired, lambda at: _kept_general(one, at)))
    return results


def _at_both_levels(paired: Evidence, rule: Callable[[Evidence], GateResult]) -> GateResult:
    """The failure by bounds of 95 %, or else the result at the level of the evaluation."""
    standing = paired.evaluations
    at_95 = standing and replace(standing, level=FAILING_LEVEL)
    failing = rule(replace(paired, evaluations=at_95))
    return failing if failing.verdict == "fail" else rule(paired)


def _gain(one: "_Run", paired: Evidence) -> GateResult:
    """B is better than A on the domain metric."""
    metric = paired.metric
    compared = paired.compared(metric, paired.test, positive=paired.positive)
    if isinstance(compared, Fault):
        return compared.result("gain", f"{metric.label} better than {one.name}", 0.0)
    return gain(metric, {one.name: compared})


def _kept_general(one: "_Run", paired: Evidence) -> GateResult:
    """B knows as much as A does, within the margin of A's gates, by what tells it of the base."""
    margin = one.entry.settings["gates"]["retention"]
    if paired.knowledge == "masked tokens":
        nats = masked_nats(paired, margin)
        if isinstance(nats, Fault):
            return nats.result("retention", "general knowledge is kept", -margin)
        return masked_retention(nats, margin, one.name)
    pooled = paired.compared(METRICS["accuracy"], paired.general)
    if isinstance(pooled, Fault):
        return pooled.result("retention", "accuracy on general questions kept", -margin)
    whole = retention(pooled, margin, one.name, questions=paired.knowledge == "questions")
    return whole if whole.verdict == "fail" else harmed_suite(paired, margin, one.name) or whole


def compare_seeds(folders: Sequence[Path], kind: str | None = None) -> tuple[str, dict[str, Any]]:
    """Variance of the gain between seeds and between items, over trainings of one domain.

    Returns the ``kind`` of rows on which it was measured, "validation" or "test", and the figures
    of ``over_seeds``, as a card's ``seeds``. By default validation rows are taken where all have
    scores on them (``fit --seeds``, ``fit --no-evaluate``): they cost no evaluation of the test
    rows. Raises AdapterError unless all were scored on the same rows.
    """
    runs = [_Run(folder, evaluated=False) for folder in folders]
    for other in runs[1:]:
        _check_comparable(runs[0], other)
    if kind is None:
        validated = all(len(run.items.where("set", "validation")) for run in runs)
        kind = "validation" if validated else "test"
    for run in runs:
        if not len(run.items.where("set", kind)):
            raise AdapterError(
                where=run.name,
                expected="scores on validation rows",
                found="none",
                hint="Train the seeds together, with fit --seeds, or each with --no-evaluate on "
                "the same validation rows.",
            )
    rows = [_ordered(runs[0], run, kind) for run in runs]
    return kind, over_seeds(rows, runs[0].metrics, runs[0].positive, kind)


def save_seeds(folders: Sequence[Path], variances: Mapping[str, Any]) -> None:
    """Write the figures of ``compare_seeds`` into each card, as ``seeds``; reports show them."""
    for folder in folders:
        if repository := repository_of(folder):
            raise AdapterError(
                where=str(repository),
                expected="folders of your own, to write into their cards",
                found="one in the Hub's cache, which is shared",
                hint="Leave --save out, or copy it into adapters/ and name the copy.",
            )
    for folder in folders:
        card = Card.read(folder)
        card.adapter.seeds = dict(variances)
        card.write(folder)


class _Run:
    """Card and items of an adapter; raises AdapterError where it must be ``evaluated`` and is not.

    Before an evaluation, metric, labels and positive class are those of its settings.
    """

    def __init__(self, folder: Path, *, evaluated: bool = True) -> None:
        self.name = adapter_name(folder)
        self.entry = Card.read(folder).adapter
        task = self.entry.declared_task
        self.judged = self.entry.judged
        if not self.judged and task is not None and not evaluated:
            metric = self.entry.settings.get("metric") or task.metric
            labels = list(task.labels or ())
            self.judged = {"metric": metric, "labels": labels, "positive": task.positive}
        if not self.judged:
            raise AdapterError(
                where=folder.name,
                expected="an adapter that was evaluated",
                found="a card without a verdict",
                hint="Evaluate it first.",
            )
        self.items = ScoreTable(read_items(folder))
        self.positive = positive_index(self.judged["labels"], self.judged["positive"])
        self.metrics: list[Metric] = reported(self.judged["labels"], self.positive)

    def number_labels_as(self, other: "_Run") -> None:
        """Number the labels in the order of ``other``, where they are the same ones."""
        own, labels = self.judged["labels"], other.judged["labels"]
        if own == labels or sorted(own) != sorted(labels):
            return
        self.judged = self.entry.judged = {**self.judged, "labels": labels}
        self.positive = other.positive
        places = [own.index(label) for label in labels]
        self.items = ScoreTable(
            item if item["set"] in ("general", "text") else _renumbered(item, places)
            for item in self.items
        )


def _renumbered(item: Mapping[str, Any], places: Sequence[int]) -> dict[str, Any]:
    """``item`` with its labels in another order: the first is the one at ``places[0]``."""

    def moved(fields: Mapping[str, Any]) -> dict[str, Any]:
        one = {k: places.index(fields[k]) for k in ("target", "prediction")
               if fields.get(k) in places}  # fmt: skip
        several = {k: [fields[k][at] for at in places] for k in PER_LABEL if k in fields}
        return {**fields, **one, **several}

    scores = {who: moved(score) for who, score in item["scores"].items()}
    return {**moved(item), "scores": scores}


def _check_comparable(one: _Run, two: _Run) -> None:
    for key, name in (("metric", "metric"), ("labels", "labels"), ("positive", "positive class")):
        if one.judged[key] != two.judged[key]:
            raise AdapterError(
                where=f"{one.name} and {two.name}",
                expected=f"the same {name}",
                found=f"{one.judged[key]} and {two.judged[key]}",
                hint="Compare adapters of one task, with the same --metric and --positive.",
            )


def _key(item: Mapping[str, Any]) -> tuple[Any, ...]:
    return item["digest"], item["target"], item.get("suite")


def _ordered(one: _Run, two: _Run, kind: str = "test") -> ScoreTable:
    """``two``'s items in the order of ``one``'s; raises AdapterError where they differ."""
    first = one.items.where("set", kind)
    second: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for item in two.items.where("set", kind):
        second[_key(item)].append(item)
    keys, other_keys = Counter(map(_key, first)), Counter({k: len(v) for k, v in second.items()})
    if keys != other_keys:
        shared = (keys & other_keys).total()
        hint = f"Score both on the same {kind} rows, in one output folder."
        raise AdapterError(
            where=f"{one.name} and {two.name}",
            expected=f"the same {kind} items",
            found=f"{keys.total()} and {other_keys.total()} items, {shared} of them shared",
            hint=hint + ("" if shared else " (Other output folders have another key.)"),
        )
    return ScoreTable(second[_key(item)].pop(0) for item in first)


def _paired(one: _Run, two: _Run, kind: str) -> ScoreTable:
    """The items of both, with A's scores as ``base`` and B's as ``adapter``."""
    first = one.items.where("set", kind)
    second = _ordered(one, two, kind)
    return ScoreTable(
        {**a, "scores": {"base": a["scores"]["adapter"], "adapter": b["scores"]["adapter"]}}
        for a, b in zip(first, second, strict=True)
    )
