"""Learning curve: the domain metric on validation rows after training on growing shares of rows.

The shares are nested, consist of whole groups and keep the proportion of the classes. Every
training takes the same number of steps of the same size, so smaller shares are repeated more often
and only the rows differ. Each share is trained from ``SEEDS`` seeds, which also draw its rows, as
one training may be better than another by luck; the answer takes their spread in. Two alternatives
to more rows are measured on the same rows: the base with a few rows in its prompt, and all rows
with edited copies (``augmentation``). No test row is scored.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np

from lora_domains.analysis.augmentation import augmented
from lora_domains.analysis.trials import Trials
from lora_domains.data.checks import FEWEST
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, UsageError, listed
from lora_domains.evaluation.baselines import SHOTS, with_shots
from lora_domains.evaluation.items import groups_of
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.inference.scores import add_won
from lora_domains.model import DomainModel
from lora_domains.stats.bootstrap import FloatArray, bootstrap
from lora_domains.stats.comparisons import compare_means
from lora_domains.stats.seeds import pooled_spread, with_seed_spread
from lora_domains.tasks import Example
from lora_domains.tokenization.encoded import EncodedRow
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import finite
from lora_domains.verdict.scores import ScoreTable

SHARES = (0.125, 0.25, 0.5, 1.0)
SEEDS = 2
"""Trainings of each share."""
WORTHWHILE = 0.01
"""The smallest gain of the metric for which collecting more rows is worthwhile."""
RESAMPLES = 500
AUGMENTED = "augmented"


def learning_curve(
    model: DomainModel, domain: Domain, shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """The curve of ``domain`` as JSON: a point for each share, the two alternatives, the answer.

    Nothing is saved and no loaded adapter changes. Raises UsageError for shares that make no curve,
    and what ``DomainModel.fit`` raises.
    """
    dataset = model.dataset(domain)
    prepared, seed = dataset.prepared, dataset.domain.training.seed
    ordered, seeds = sorted(set(shares)), [seed + run for run in range(SEEDS)]
    parts = [nested(prepared.train, ordered, one) for one in seeds]
    for drawn in parts:
        _check(ordered, drawn)
    held_out = [*prepared.validation, *prepared.test]
    edited = augmented(prepared.task, domain.data, prepared.train, held_out, seed)
    measured = _Measured(model, dataset, edited)
    # The base has no probabilities for the labels of a trained head.
    rows = dataset.validation
    base = None if prepared.task.head else measured.score("base", rows, None)
    prompted = with_shots(dataset, rows, model.display.warn)
    points = [
        {"share": share} | measured.point(
            f"{share:g}", [[prepared.train[i] for i in drawn[at]] for drawn in parts], seeds
        )
        for at, share in enumerate(ordered)
    ]  # fmt: skip
    spread, freedom = pooled_spread(np.array([point["scores"] for point in points]))
    curve: dict[str, Any] = {
        "domain": dataset.domain.name,
        "metric": dataset.domain.primary_metric,
        "seeds": seeds,
        "data": dict(prepared.digests),
        "validation_rows": len(prepared.validation),
        "base": base,
        "few_shot": measured.score(f"{SHOTS}_shot", prompted, None) if prompted else None,
        "points": points,
        "sd_seed": spread,
    }
    largest, second = f"{ordered[-1]:g}", f"{ordered[-2]:g}"
    if edited:
        point = measured.augmented_point(prepared.train, edited, seeds)
        curve[AUGMENTED] = point | measured.compared(largest, AUGMENTED, spread, freedom)
    curve["last_step"] = measured.compared(second, largest, spread, freedom)
    curve["twice"] = extrapolated(
        measured.metric, measured.items, points, prepared.task.positive_index, (spread, freedom)
    )
    curve["answer"] = answer(curve)
    return curve


class _Measured:
    """Trains on parts of a dataset, and scores each adapter on its validation rows."""

    def __init__(self, model: DomainModel, dataset: Dataset, edited: Sequence[Example]) -> None:
        self.model, self.dataset, self.task = model, dataset, dataset.prepared.task
        self.metric = dataset.domain.primary_metric
        self.trials = Trials(model, dataset, "curve")
        self.items: list[dict[str, Any]] = [
            {"target": row.encoded.target, "truth": row.encoded.truth, "group": group, "scores": {}}
            for row, group in zip(dataset.validation, groups_of(dataset.validation), strict=True)
        ]
        """The validation rows, with the scores of each contender by its name."""
        self._encoded: dict[str, list[EncodedRow]] = {}
        for row in [*dataset.train, *dataset.tokenization.encode_rows(edited)]:
            self._encoded.setdefault(row.example.id, []).append(row)
        self.rows_per_epoch = len(self.encoded(dataset.prepared.train))

    def encoded(self, examples: Sequence[Example]) -> list[EncodedRow]:
        return [row for example in examples for row in self._encoded.get(example.id, ())]

    def point(
        self, name: str, parts: Sequence[Sequence[Example]], seeds: Sequence[int],
        rows_per_epoch: int | None = None, epochs: int | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Train on each of ``parts`` from its seed, and score the adapters.

        Rows are repeated up to ``rows_per_epoch``, by default as many as there are in all.
        """
        display, scores, steps, seconds = self.model.display, [], 0, 0.0
        wanted = rows_per_epoch or self.rows_per_epoch
        for run, (examples, seed) in enumerate(zip(parts, seeds, strict=True)):
            display.note(f"{name}: training on {len(examples)} rows, seed {seed}")
            encoded = self.encoded(examples)
            repeated = (encoded * math.ceil(wanted / len(encoded)))[:wanted]
            trained = self.trials.trained(
                self.dataset, repeated, seed=seed,
                epochs=epochs or self.trials.plan.epochs,
            )  # fmt: skip
            with trained as of:
                scores.append(self.score(f"{name}/{run}", self.dataset.validation, of.adapter.name))
                steps, seconds = of.record["steps"], seconds + of.record["seconds"]
        rows, score = round(sum(map(len, parts)) / len(parts)), float(np.mean(scores))
        metric = metric_named(self.metric).label
        display.stage(name, rows, None, f"{metric} {score:.3f}, {seconds:.0f} s")
        return {"rows": rows, "score": score, "scores": scores, "steps": steps, "seconds": seconds}

    def augmented_point(
        self, whole: Sequence[Example], edited: Sequence[Example], seeds: Sequence[int]
    ) -> dict[str, Any]:
        """The point of all rows with their edited copies, in about the same number of steps."""
        copies = {f"{example.id}~" for example in whole}
        examples = [*whole, *(example for example in edited if example.id in copies)]
        epochs = math.ceil(self.trials.plan.epochs / 2)
        rows_per_epoch = len(self.encoded(examples))
        return self.point(AUGMENTED, [examples] * len(seeds), seeds, rows_per_epoch, epochs)

    def score(self, name: str, rows: Sequence[EncodedRow], adapter: str | None) -> float:
        """The metric of the base (None) or an adapter on the validation rows, as in ``rows``."""
        scorer = Scorer(self.model.bank, self.model.display)
        scores = scorer.scores(Part(f"validation rows, {name}", self.task, rows), [adapter])
        if adapter is None and name != "base":  # of pairs, the base is not compared with itself
            add_won(scores[None], [item["scores"]["base"] for item in self.items])
        for item, item_score in zip(self.items, scores[adapter], strict=True):
            item["scores"][name] = item_score
        score = metric_named(self.metric).value(
            ScoreTable(self.items), name, self.task.positive_index
        )
        if score is None:
            raise AdapterError(
                where=name,
                expected=f"a finite score for {self.metric} on every validation row",
                found="one that is not a number",
                hint="Train with a lower learning rate.",
            )
        return score

    def compared(
        self, first: str, second: str, spread: float, freedom: int
    ) -> dict[str, float | None]:
        """The second point's metric minus the first's, with bounds for other rows and seeds."""
        one, two = self._contributions(first), self._contributions(second)
        compared = compare_means(one, two, ScoreTable(self.items).groups())
        bounds = with_seed_spread(compared.difference, compared.bounds, spread, freedom, SEEDS)
        figures = {"difference": compared.difference, **bounds._asdict()}
        return {key: finite(value) for key, value in figures.items()}

    def _contributions(self, name: str) -> FloatArray:
        """The contribution of each row to the metric, mean of a point's adapters, (rows,)."""
        table, positive = ScoreTable(self.items), self.task.positive_index
        metric = metric_named(self.metric)
        parts = [metric.contributions(table, of, positive) for of in _runs(name)]
        mean: FloatArray = np.mean([part for part in parts if part is not None], axis=0)
        return mean


def _runs(name: str) -> list[str]:
    """The contenders of a point: one for each seed."""
    return [f"{name}/{run}" for run in range(SEEDS)]


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


def _check(shares: Sequence[float], parts: Sequence[Sequence[int]]) -> None:
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
    spread: tuple[float, int],
) -> dict[str, Any] | None:
    """The metric at twice the rows if the error keeps following a power law, with bounds.

    error = a · rows^-b, fitted to the logarithms (Hestness et al. 2017, arXiv 1712.00409), where
    error is 1 − metric, or the nats. The bounds are those of a bootstrap over the rows, widened by
    the ``spread`` between seeds (``pooled_spread``). None for fewer than three points or an error
    that does not fall.
    """
    lower = not metric_named(metric).higher_is_better
    table = ScoreTable(items)
    parts = [
        metric_named(metric).summands(table, run, positive)
        for point in points
        for run in _runs(f"{point['share']:g}")
    ]
    known = [part for part in parts if part is not None]
    if len(points) < 3 or len(known) < len(parts):
        return None
    columns = np.concatenate([part for part, _ in known], axis=1)
    ends = np.cumsum([part.shape[1] for part, _ in known])
    # An observed error of zero does not mean a true error of zero.
    fitted = partial(_power_law, [point["rows"] for point in points], lower, 0.5 / len(items))

    def values(sums: FloatArray) -> FloatArray:
        """The metric at each point, mean of its seeds, from sums (r, k): (points, r)."""
        split = np.split(np.atleast_2d(sums), ends[:-1], axis=1)
        each = np.stack([of(part) for (_, of), part in zip(known, split, strict=True)])
        means: FloatArray = each.reshape(len(points), -1, each.shape[-1]).mean(axis=1)
        return means

    here = values(columns.sum(0))
    score, slope = (float(part[0]) for part in fitted(here))
    if slope >= 0:
        return None
    bounds = bootstrap(
        lambda sums: fitted(values(sums))[0].reshape(sums.shape[:-1]), columns,
        groups=table.groups(), resamples=RESAMPLES, span=score if lower else 1.0,
    )  # fmt: skip
    if not all(map(math.isfinite, bounds)):
        return None
    # How far the figure moves with the metric at each point, for the spread of its seeds.
    step = 1e-4
    moved = fitted(here + step * np.eye(len(points)))[0] - score
    share = float(np.sqrt((moved**2).sum() / 2)) / step
    bounds = with_seed_spread(score, bounds, share * spread[0], spread[1], SEEDS)
    return {
        "rows": 2 * int(points[-1]["rows"]), "score": score, "lower": max(0.0, bounds.lower),
        "upper": bounds.upper if lower else min(1.0, bounds.upper), "exponent": -slope,
    }  # fmt: skip


def _power_law(
    rows: Sequence[int], lower: bool, least: float, values: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """The figure at twice the rows and the slope, (r,) each, from ``values`` (points, r).

    ``lower`` says that the figure is itself an error; errors are at least ``least``.
    """
    sizes, errors = np.log(rows), np.maximum(values if lower else 1 - values, least)
    slope, level = np.polyfit(sizes, np.log(errors), 1)
    error = np.exp(level + slope * (sizes[-1] + math.log(2)))
    return (error if lower else 1 - error), slope


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
        words = (
            f"Undecided: {change}. {curve['validation_rows']} validation rows and {SEEDS} seeds, "
            f"whose scores vary by {curve['sd_seed']:.3f}, are too few to tell."
        )
    twice = curve["twice"]
    if twice is None:
        return words
    return (
        f"{words} If the error keeps following a power law, {twice['rows']} rows would give "
        f"{twice['score']:.3f} ({twice['lower']:.3f} to {twice['upper']:.3f})."
    )


def _signed(number: float | None) -> str:
    return "?" if number is None else f"{number:+.3f}"
