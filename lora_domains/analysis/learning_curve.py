"""Learning curve: the domain metric on the test rows after training on growing shares of the rows.

The shares are nested, consist of whole groups and keep the proportion of the classes. Every
training takes the same number of steps of the same size, so smaller shares are repeated more often
and only the rows differ. Two alternatives to more rows are measured on the same test rows: the base
with a few rows in its prompt, and all rows with edited copies (``augmentation``).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from lora_domains.analysis.augmentation import augmented
from lora_domains.data.checks import FEWEST
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import AdapterError, UsageError, listed
from lora_domains.evaluation.baselines import SHOTS, with_shots
from lora_domains.evaluation.items import groups_of
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.model import DomainModel
from lora_domains.stats.bootstrap import FloatArray, bootstrap
from lora_domains.tasks import Example
from lora_domains.tasks.tokenization import EncodedRow
from lora_domains.training.fit import make_run
from lora_domains.training.loop import Trained
from lora_domains.training.plan import make_plan
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import finite
from lora_domains.verdict.scores import ScoreTable

SHARES = (0.125, 0.25, 0.5, 1.0)
WORTHWHILE = 0.01
"""The smallest gain of the metric for which collecting more rows is worthwhile."""
RESAMPLES = 500


def learning_curve(
    model: DomainModel, domain: Domain, shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """The curve of ``domain`` as JSON: a point for each share, the two alternatives, the answer.

    Nothing is saved and no loaded adapter changes. Every contender is scored once on the test rows.
    Raises UsageError for shares that make no curve, and what ``DomainModel.fit`` raises.
    """
    dataset = model.dataset(domain)
    prepared, task, seed = dataset.prepared, dataset.prepared.task, dataset.domain.training.seed
    ordered = sorted(set(shares))
    parts = [[prepared.train[i] for i in part] for part in nested(prepared.train, ordered, seed)]
    _check(ordered, parts)
    edited = augmented(task, domain.data, prepared.train, prepared.test, seed)
    trials = _Trials(model, dataset, edited)
    epochs, whole = dataset.domain.training.epochs, parts[-1]
    rows_per_epoch = len(trials.encoded(whole))
    # The base has no probabilities for the labels of a trained head.
    base = None if task.head else trials.score("base", dataset.test, None)
    prompted = with_shots(dataset, dataset.test, model.display.warn)
    points = [
        {"share": share, **trials.point(f"{share:g}", part, epochs, rows_per_epoch)}
        for share, part in zip(ordered, parts, strict=True)
    ]
    curve: dict[str, Any] = {
        "domain": dataset.domain.name,
        "metric": dataset.domain.primary_metric,
        "seed": seed,
        "data": dict(prepared.digests),
        "test_rows": len(prepared.test),
        "base": base,
        "few_shot": trials.score(f"{SHOTS}_shot", prompted, None) if prompted else None,
        "points": points,
    }
    largest, second = f"{ordered[-1]:g}", f"{ordered[-2]:g}"
    if edited:
        curve["augmented"] = trials.augmented_point(whole, edited, epochs) | trials.compared(
            largest, "augmented"
        )
    curve["last_step"] = trials.compared(second, largest)
    curve["twice"] = extrapolated(trials.metric, trials.items, points, task.positive_index)
    curve["answer"] = answer(curve)
    return curve


class _Trials:
    """Trains on parts of a dataset, and scores each adapter on all its test rows."""

    def __init__(self, model: DomainModel, dataset: Dataset, edited: Sequence[Example]) -> None:
        self.model, self.dataset, self.task = model, dataset, dataset.prepared.task
        self.metric = dataset.domain.primary_metric
        # Under another name, so that an interrupted run of the domain keeps its checkpoint.
        self.domain = replace(dataset.domain, name=f"{dataset.domain.name[:50]}__curve")
        self.plan = make_plan(model.base, replace(dataset, domain=self.domain))
        for warning in self.plan.warnings:
            model.display.warn(warning)
        self.items: list[dict[str, Any]] = [
            {"target": row.encoded.target, "group": group, "scores": {}}
            for row, group in zip(dataset.test, groups_of(dataset.test), strict=True)
        ]
        """The test rows, with the scores of each contender by its name."""
        self._encoded: dict[str, list[EncodedRow]] = {}
        for row in [*dataset.train, *dataset.tokenization.encode_rows(edited)]:
            self._encoded.setdefault(row.example.id, []).append(row)

    def encoded(self, examples: Sequence[Example]) -> list[EncodedRow]:
        return [row for example in examples for row in self._encoded.get(example.id, ())]

    def point(
        self, name: str, examples: Sequence[Example], epochs: int, rows_per_epoch: int
    ) -> dict[str, Any]:
        """Train on ``examples``, repeated up to ``rows_per_epoch``, and score the adapter."""
        bank, display = self.model.bank, self.model.display
        display.line(f"{name}: training on {len(examples)} rows")
        encoded = self.encoded(examples)
        repeated = (encoded * math.ceil(rows_per_epoch / len(encoded)))[:rows_per_epoch]
        trained = self._train(repeated, epochs)
        bank.add(trained.adapter)
        try:
            score = self.score(name, self.dataset.test, trained.adapter.name)
        finally:
            bank.remove(trained.adapter.name)
        steps, seconds = trained.record["steps"], trained.record["seconds"]
        metric = metric_named(self.metric).label
        display.stage(name, len(examples), None, f"{metric} {score:.3f}, {seconds:.0f} s")
        return {"rows": len(examples), "score": score, "steps": steps, "seconds": seconds}

    def augmented_point(
        self, whole: Sequence[Example], edited: Sequence[Example], epochs: int
    ) -> dict[str, Any]:
        """The point of all rows with their edited copies, in about the same number of steps."""
        copies = {f"{example.id}~" for example in whole}
        examples = [*whole, *(example for example in edited if example.id in copies)]
        rows_per_epoch = len(self.encoded(examples))
        return self.point("augmented", examples, math.ceil(epochs / 2), rows_per_epoch)

    def score(self, name: str, test: Sequence[EncodedRow], adapter: str | None) -> float:
        """The metric of the base (None) or an adapter on the test rows as ``test`` has them."""
        scorer = Scorer(self.model.bank, self.model.display)
        scores = scorer.scores(Part(f"test rows, {name}", self.task, test), [adapter])
        for item, item_score in zip(self.items, scores[adapter], strict=True):
            item["scores"][name] = item_score
        score = metric_named(self.metric).value(
            ScoreTable(self.items), name, self.task.positive_index
        )
        if score is None:
            raise AdapterError(
                where=name,
                expected=f"a finite score for {self.metric} on every test row",
                found="one that is not a number",
                hint="Train with a lower learning rate.",
            )
        return score

    def compared(self, first: str, second: str) -> dict[str, float | None]:
        """The second contender's metric minus the first's, with bounds."""
        paired = metric_named(self.metric).compare(
            ScoreTable(self.items), first, second, self.task.positive_index
        )
        assert paired is not None
        return {key: finite(getattr(paired, key)) for key in ("difference", "lower", "upper")}

    def _train(self, rows: Sequence[EncodedRow], epochs: int) -> Trained:
        steps = math.ceil(len(rows) / self.plan.batch_size)
        plan = replace(self.plan, epochs=epochs, steps_per_epoch=steps)
        domain = with_settings(self.domain, epochs=epochs)
        dataset = replace(self.dataset, domain=domain, train=list(rows))
        run = make_run(self.model.bank, dataset, plan, self.model.out, self.model.display)
        trained = run.fit()
        run.forget()
        return trained


def nested(examples: Sequence[Example], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Positions of each of ``shares`` of ``examples``; larger shares contain the smaller ones.

    Groups are taken whole, in an order drawn by ``seed`` that keeps the proportion of the classes.
    """
    groups: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        name = f"row {i}" if example.group is None else f"group {example.group}"
        groups.setdefault(name, []).append(i)
    by_class: dict[int, list[list[int]]] = {}
    for group in groups.values():
        by_class.setdefault(examples[group[0]].target, []).append(group)

    def draw(group: list[int]) -> bytes:
        return sha256(f"{seed}/learning/{examples[group[0]].id}".encode()).digest()

    placed = []
    for members in by_class.values():
        members.sort(key=draw)
        total, done = sum(map(len, members)), 0
        for group in members:
            # Relative position in its class: every prefix has the same share of each class.
            placed.append(((done + len(group) / 2) / total, draw(group), group))
            done += len(group)
    placed.sort(key=lambda entry: entry[:2])
    parts = []
    for share in shares:
        picked: list[int] = []
        for _, _, group in placed:
            if len(picked) >= round(share * len(examples)):
                break
            picked += group
        parts.append(sorted(picked))
    return parts


def _check(shares: Sequence[float], parts: Sequence[Sequence[Example]]) -> None:
    if len(shares) < 2 or not all(0 < share <= 1 for share in shares):
        raise UsageError(
            where="--sizes",
            expected="at least two shares of the training rows, above 0 and at most 1",
            found=listed(shares) or "none",
            hint="Omit it for " + ",".join(f"{share:g}" for share in SHARES) + ".",
        )
    sizes = [len(part) for part in parts]
    if sizes[0] < FEWEST or len(set(sizes)) < len(sizes):
        raise UsageError(
            where="--sizes",
            expected=f"shares with different numbers of rows, the smallest at least {FEWEST}",
            found=listed(sizes) + " rows",
            hint="Give larger shares, or add rows. Groups are never divided.",
        )


# ── Extrapolation and answer ────────────────────────────────────────────────────────────────────


def extrapolated(
    metric: str,
    items: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    positive: int | None,
) -> dict[str, Any] | None:
    """The metric at twice the rows if the error keeps following a power law, with bounds.

    error = a · rows^-b, fitted to the logarithms (Hestness et al. 2017, arXiv 1712.00409), where
    error is 1 − metric, or the nats. The bounds come from a bootstrap over test rows and leave out
    the variance between trainings. None for fewer than three points or an error that does not fall.
    """
    lower = not metric_named(metric).higher_is_better
    sizes = np.log([point["rows"] for point in points])
    least = 0.5 / len(items)  # an observed error of zero does not mean a true error of zero
    table = ScoreTable(items)
    parts = [
        metric_named(metric).summands(table, f"{point['share']:g}", positive) for point in points
    ]
    known = [part for part in parts if part is not None]
    if len(points) < 3 or len(known) < len(points):
        return None
    columns = np.concatenate([part for part, _ in known], axis=1)
    ends = np.cumsum([part.shape[1] for part, _ in known])

    def fitted(sums: FloatArray) -> tuple[FloatArray, FloatArray]:
        """The figure at twice the rows and the slope, from sums (r, k): (r,) each."""
        split = np.split(sums, ends[:-1], axis=1)
        values = np.stack([of(s) for (_, of), s in zip(known, split, strict=True)])
        errors = np.maximum(values if lower else 1 - values, least)
        slope, level = np.polyfit(sizes, np.log(errors), 1)
        error = np.exp(level + slope * (sizes[-1] + math.log(2)))
        return (error if lower else 1 - error), slope

    score, slope = (float(part[0]) for part in fitted(columns.sum(0)[None]))
    if slope >= 0:
        return None
    bounds = bootstrap(
        lambda sums: fitted(np.atleast_2d(sums))[0].reshape(sums.shape[:-1]), columns,
        groups=table.groups(), resamples=RESAMPLES, span=score if lower else 1.0,
    )  # fmt: skip
    if not all(map(math.isfinite, bounds)):
        return None
    return {
        "rows": 2 * int(points[-1]["rows"]), "score": score, "lower": bounds.lower,
        "upper": bounds.upper, "exponent": -slope,
    }  # fmt: skip


def answer(curve: Mapping[str, Any]) -> str:
    """Whether more rows would help, from the last step of the curve and its bounds."""
    points, step, metric = curve["points"], curve["last_step"], metric_named(curve["metric"])
    sign = metric.sign
    low, high = sorted(
        (sign * (bound if bound is not None else end))
        for bound, end in ((step["lower"], -math.inf), (step["upper"], math.inf))
    )
    change = (
        f"from {points[-2]['rows']} to {points[-1]['rows']} rows, {metric.label} went "
        f"from {points[-2]['score']:.3f} to {points[-1]['score']:.3f} (95 % bounds "
        f"{_signed(step['lower'])} to {_signed(step['upper'])})"
    )
    if low > 0:
        words = f"Yes: {change}."
    elif high < WORTHWHILE:
        words = f"Hardly: {change}, so the added rows brought less than {WORTHWHILE:g}."
    else:
        words = f"Undecided: {change}. {curve['test_rows']} test rows are too few to tell."
    twice = curve["twice"]
    if twice is None:
        return words
    return (
        f"{words} If the error keeps following a power law, {twice['rows']} rows would give "
        f"{twice['score']:.3f} ({twice['lower']:.3f} to {twice['upper']:.3f})."
    )


def _signed(number: float | None) -> str:
    return "?" if number is None else f"{number:+.3f}"
