"""Would more data help? One training for each of several shares of the rows, on the same test rows.

The shares are nested, whole groups, classes in proportion, and every training takes as many steps
of as many rows: a smaller share is gone through more often. So only the rows differ. Beside them on
the same test: the base with a few rows in its prompt, and all rows with edited copies
(``augmentation``), the cheap ways to get more out of the rows that are there.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

import numpy as np

from lora_domains.analysis.augmentation import augmented
from lora_domains.console import Display
from lora_domains.data.checks import FEWEST
from lora_domains.data.tokenization import EncodedExample, EncodedRow
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError, listed
from lora_domains.evaluation.contenders import groups_of, model_scores
from lora_domains.evaluation.shots import SHOTS, with_shots
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.stats.bootstrap import FloatArray, bootstrap
from lora_domains.stats.comparisons import Comparison
from lora_domains.tasks import Example
from lora_domains.training.fit import make_run
from lora_domains.training.loop import Trained
from lora_domains.training.plan import make_plan
from lora_domains.verdict.summary import LOWER_IS_BETTER, comparison, summands, value

SHARES = (0.125, 0.25, 0.5, 1.0)
HARDLY = 0.01
"""A step up the curve that cannot have brought more than this is hardly worth collecting rows."""
RESAMPLES = 500

Train = Callable[[Sequence[EncodedRow], int], Trained]
"""Trains on rows for a number of epochs."""


def learning_curve(
    model: DomainModel, domain: Domain, shares: Sequence[float] = SHARES
) -> dict[str, Any]:
    """The curve of ``domain`` on the model's base: the one function that people call.

    Nothing is saved, and no resident adapter changes. Raises what ``fit`` does.
    """
    dataset = model.dataset(domain)
    prepared, seed = dataset.prepared, dataset.domain.training.seed
    edited = augmented(prepared.task, domain.data, prepared.train, prepared.test, seed)
    # A name of its own: an interrupted run of this domain keeps its checkpoint.
    own = replace(dataset.domain, name=f"{domain.name[:50]}__curve")
    plan = make_plan(model.base, replace(dataset, domain=own))
    for warning in plan.warnings:
        model.display.warn(warning)

    def train(rows: Sequence[EncodedRow], epochs: int) -> Trained:
        steps = math.ceil(len(rows) / plan.batch_size)
        part = replace(dataset, domain=with_settings(own, epochs=epochs), train=list(rows))
        planned = replace(plan, epochs=epochs, steps_per_epoch=steps)
        run = make_run(model.bank, part, planned, model.out, model.display)
        trained = run.fit()
        run.forget()
        return trained

    return measured(model.bank, dataset, shares, edited, train, model.display)


def nested(examples: Sequence[Example], shares: Sequence[float], seed: int) -> list[list[int]]:
    """Positions of each of ``shares`` of ``examples``: every smaller one lies in every larger one.

    Whole groups are taken, in an order drawn by ``seed`` in which classes keep their proportion.
    """
    units: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        named = f"row {i}" if example.group is None else f"group {example.group}"
        units.setdefault(named, []).append(i)
    by_class: dict[int, list[list[int]]] = {}
    for unit in units.values():
        by_class.setdefault(examples[unit[0]].target, []).append(unit)

    def draw(unit: list[int]) -> bytes:
        return sha256(f"{seed}/learning/{examples[unit[0]].id}".encode()).digest()

    placed = []
    for members in by_class.values():
        members.sort(key=draw)
        total, done = sum(map(len, members)), 0
        for unit in members:
            # How far into its class a unit stands: any beginning holds as much of every class.
            placed.append(((done + len(unit) / 2) / total, draw(unit), unit))
            done += len(unit)
    placed.sort(key=lambda entry: entry[:2])
    found = []
    for share in shares:
        picked: list[int] = []
        for _, _, unit in placed:
            if len(picked) >= round(share * len(examples)):
                break
            picked += unit
        found.append(sorted(picked))
    return found


def measured(
    bank: Bank,
    dataset: Dataset,
    shares: Sequence[float],
    edited: Sequence[Example],
    train: Train,
    display: Display,
) -> dict[str, Any]:
    """The curve as JSON: a point for each share, the two cheap ways, and the answer in words.

    ``edited`` are the training rows once more, changed in form. The test rows are looked at once
    for each training. Raises UsageError for shares that are no curve.
    """
    domain, prepared, tokenization = dataset.domain, dataset.prepared, dataset.tokenization
    task, seed, metric = prepared.task, domain.training.seed, prepared.task.metric
    wanted = sorted(set(shares))
    parts = nested(prepared.train, wanted, seed)
    _check(wanted, parts)
    rows = dataset.test
    items = [item for _, item in rows]
    references = [example.answer.strip() for example, _ in rows]
    scored: list[dict[str, Any]] = [
        {"target": item.target, "group": group, "scores": {}}
        for item, group in zip(items, groups_of(rows), strict=True)
    ]
    index = task.positive_index

    def look(name: str, asked: Sequence[EncodedExample], route: str | None) -> float:
        with display.progress(f"{name} on test rows", len(asked)) as advance:
            found = model_scores(bank, task, asked, references, route, advance)
        for item, of_item in zip(scored, found, strict=True):
            item["scores"][name] = of_item
        score = value(metric, scored, name, index)
        assert score is not None
        return score

    encodings: dict[str, list[EncodedRow]] = {}
    for row in [*dataset.train, *tokenization.encode_rows(edited)]:
        encodings.setdefault(row.example.id, []).append(row)

    def encoded(examples: Sequence[Example]) -> list[EncodedRow]:
        return [row for example in examples for row in encodings.get(example.id, ())]

    def point(name: str, examples: Sequence[Example], epochs: int, most: int) -> dict[str, Any]:
        display.line(f"{name}: training on {len(examples)} rows")
        chosen = encoded(examples)
        again = (chosen * math.ceil(most / len(chosen)))[:most]
        trained = train(again, epochs)
        bank.add(trained.adapter)
        try:
            score = look(name, items, trained.adapter.name)
        finally:
            bank.remove(trained.adapter.name)
        record = trained.record
        display.stage(name, len(examples), None, f"{metric} {score:.3f}, {record['seconds']:.0f} s")
        return {"rows": len(examples), "score": score} | {
            key: record[key] for key in ("steps", "seconds")
        }

    epochs, whole = domain.training.epochs, [prepared.train[i] for i in parts[-1]]
    length = len(encoded(whole))
    # Of a trained head's labels the base knows nothing.
    base = None if task.head else look("base", items, None)
    prompted = with_shots(tokenization, dataset.train, rows, seed, display.warn)
    points = [
        {"share": share}
        | point(f"{share:g}", [prepared.train[i] for i in part], epochs, length)
        for share, part in zip(wanted, parts, strict=True)
    ]  # fmt: skip
    curve: dict[str, Any] = {
        "domain": domain.name,
        "metric": metric,
        "seed": seed,
        "data": dict(prepared.digests),
        "test_rows": len(prepared.test),
        "base": base,
        "few_shot": look(f"{SHOTS}_shot", prompted, None) if prompted else None,
        "points": points,
    }
    if edited:
        taken = {f"{example.id}~" for example in whole}
        more = [*whole, *(example for example in edited if example.id in taken)]
        half = math.ceil(epochs / 2)  # twice the rows, half as often
        curve["augmented"] = point("augmented", more, half, len(encoded(more))) | _fields(
            comparison(metric, scored, f"{wanted[-1]:g}", "augmented", index)
        )
    last = comparison(metric, scored, f"{wanted[-2]:g}", f"{wanted[-1]:g}", index)
    curve["last_step"] = _fields(last)
    curve["twice"] = extrapolated(metric, scored, points, index)
    curve["answer"] = answer(curve)
    return curve


def _check(shares: Sequence[float], parts: Sequence[Sequence[int]]) -> None:
    if len(shares) < 2 or not all(0 < share <= 1 for share in shares):
        raise UsageError(
            where="--sizes",
            expected="at least two shares of the training rows, above 0 and up to 1",
            found=listed(shares) or "none",
            hint="Leave it out for " + ",".join(f"{share:g}" for share in SHARES) + ".",
        )
    sizes = [len(part) for part in parts]
    if sizes[0] < FEWEST or len(set(sizes)) < len(sizes):
        raise UsageError(
            where="--sizes",
            expected=f"shares that differ in rows, the smallest of at least {FEWEST}",
            found="rows " + listed(sizes),
            hint="Give larger shares, or add rows. Whole groups are taken together.",
        )


def _fields(made: Comparison | None) -> dict[str, float | None]:
    assert made is not None
    bounds = {k: getattr(made, k) for k in ("difference", "lower", "upper")}
    return {k: v if math.isfinite(v) else None for k, v in bounds.items()}


# ── The power law, and the answer ───────────────────────────────────────────────────────────────


def extrapolated(
    metric: str,
    scored: Sequence[Mapping[str, Any]],
    points: Sequence[Mapping[str, Any]],
    index: int | None,
) -> dict[str, Any] | None:
    """The metric at twice the rows if error goes on falling as a power of them, with bounds.

    error = a · rows^-b, fitted to the logarithms (Hestness et al. 2017, arXiv 1712.00409), where
    error is 1 − metric, or the nats. Bounds by the bootstrap over test rows; what another training
    would change is not in them. None for fewer than three points, or an error that does not fall.
    """
    lower = metric in LOWER_IS_BETTER
    sizes = np.log([point["rows"] for point in points])
    least = 0.5 / len(scored)  # no mistake among so many is no proof of none
    parts = [summands(metric, scored, f"{point['share']:g}", index) for point in points]
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

    found, slope = (float(part[0]) for part in fitted(columns.sum(0)[None]))
    if slope >= 0:
        return None
    bounds = bootstrap(
        lambda sums: fitted(np.atleast_2d(sums))[0].reshape(sums.shape[:-1]), columns,
        groups=_groups(scored), resamples=RESAMPLES,
    )  # fmt: skip
    if not all(map(math.isfinite, bounds)):
        return None
    return {
        "rows": 2 * int(points[-1]["rows"]), "score": found, "lower": bounds.lower,
        "upper": bounds.upper, "exponent": -slope,
    }  # fmt: skip


def _groups(scored: Sequence[Mapping[str, Any]]) -> list[str] | None:
    groups = [item["group"] for item in scored]
    if all(group is None for group in groups):
        return None
    return [f"row {i}" if group is None else f"group {group}" for i, group in enumerate(groups)]


def answer(curve: Mapping[str, Any]) -> str:
    """Whether more rows would help, from the last step up the curve and its bounds."""
    points, step, metric = curve["points"], curve["last_step"], curve["metric"]
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    low, high = sorted(
        (sign * (bound if bound is not None else end))
        for bound, end in ((step["lower"], -math.inf), (step["upper"], math.inf))
    )
    named = metric.replace("_", " ")
    seen = (
        f"from {points[-2]['rows']} to {points[-1]['rows']} rows {named} went from "
        f"{points[-2]['score']:.3f} to {points[-1]['score']:.3f} ({_signed(step['lower'])} to "
        f"{_signed(step['upper'])})"
    )
    if low > 0:
        words = f"Yes, more rows of this kind still help: {seen}."
    elif high < HARDLY:
        words = f"Hardly: {seen}, so the rows that were added brought less than {HARDLY:g}."
    else:
        words = f"Undecided on {curve['test_rows']} test rows: {seen}. More test rows would tell."
    twice = curve["twice"]
    if twice is None:
        return words
    return (
        f"{words} If error goes on falling as a power of the rows, {twice['rows']} would give "
        f"{twice['score']:.3f} ({twice['lower']:.3f} to {twice['upper']:.3f})."
    )


def _signed(number: float | None) -> str:
    return "?" if number is None else f"{number:+.3f}"
