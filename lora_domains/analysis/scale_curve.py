"""Gain against retention over the adapter's scale: how much of it is worth having.

An adapter of scale s is the same weights, their effect multiplied by s: 0 is the base, 1 the
adapter as it was trained. It costs no training (weights between the ends of a fine-tuning: Wortsman
et al. 2022, arXiv 2109.01903). What is shown serves to choose a scale, so no row of a gate is read
here: the domain metric is of validation rows, and what was kept is measured on general text held
out for validation (its nats, and KL from the base, which follows forgetting).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.peft import rewrite_card
from lora_domains.console import Display
from lora_domains.data.general_text import general_text
from lora_domains.data.tokenization import EncodedRow, Tokenization
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, DataError, UsageError, listed
from lora_domains.evaluation.contenders import groups_of, model_scores
from lora_domains.evaluation.verdict_run import check_same_rows
from lora_domains.inference.likelihoods import drift
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.report.card import read_items
from lora_domains.report.markdown import readme
from lora_domains.tasks import Task
from lora_domains.verdict.summary import LOWER_IS_BETTER, comparison

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
LOSS = 0.03
"""Of the metric: a scale that loses less than this against 1, for certain, is as good."""


def curve(
    model: DomainModel, name: str, domain: Domain, scales: Sequence[float] = SCALES
) -> dict[str, Any]:
    """Metric and drift of the resident adapter ``name`` over its scale, written into its card.

    ``domain`` says where the validation rows are that it was trained beside. Raises UsageError for
    other rows, AdapterError for an adapter without a card.
    """
    dataset, adapter = model.dataset(domain), model.bank[name]
    if adapter.card is None:
        raise AdapterError(
            where=name,
            expected="an adapter trained here, with a card",
            found="a folder of plain PEFT",
            hint="Which rows it was trained beside is unknown, so none can choose its scale.",
        )
    if adapter.head is not None:
        raise UsageError(
            where=name,
            expected="an adapter without a trained head",
            found="one whose head fits it at scale 1 only",
            hint="Train one without --head to choose a scale.",
        )
    entry = adapter.card.adapter
    check_same_rows(name, entry, dataset.prepared, "validation")
    entry.scale_curve = scale_curve(
        model.bank,
        name,
        dataset.domain.task,
        dataset.validation,
        dataset.tokenization,
        scales,
        model.display,
    )
    path, card = adapter.path, adapter.card
    if path is not None:
        distributed.on_main(lambda: rewrite_card(path, card, readme, read_items(path)))
    return dict(entry.scale_curve)


@contextmanager
def scaled(bank: Bank, name: str, scales: Sequence[float]) -> Iterator[dict[float, str]]:
    """Copies of the resident adapter ``name``, one for each of ``scales``, resident inside.

    Yields scale → name.
    """
    adapter = bank[name]
    names = {scale: f"{name}__scale{at}" for at, scale in enumerate(scales)}
    try:
        for scale, copy in names.items():
            effect = {linear: scale * own for linear, own in adapter.scales.items()}
            bank.add(replace(adapter, name=copy, scales=effect))
        yield names
    finally:
        for copy in names.values():
            if copy in bank:
                bank.remove(copy)


def scale_curve(
    bank: Bank, name: str, task: Task, rows: Sequence[EncodedRow], tokenization: Tokenization,
    scales: Sequence[float], display: Display,
) -> dict[str, Any]:  # fmt: skip
    """The card's ``scale_curve``: metric, nats and KL at each scale, the first two for the base.

    Raises UsageError for scales that are no curve, DataError without validation rows.
    """
    wanted = sorted(set(scales))
    _check(wanted, rows)
    texts = general_text(None).selection
    general = tokenization.encode_all(texts)
    items = [item for _, item in rows]
    references = [example.answer.strip() for example, _ in rows]
    with scaled(bank, name, wanted) as names:
        scores = {}
        with display.progress("validation rows at each scale", len(rows) * (1 + len(names))) as on:
            for route in (None, *names.values()):
                scores[route or "base"] = model_scores(bank, task, items, references, route, on)
        with display.progress("general text at each scale", len(general)) as on:
            pad = bank.base.tokenizer.pad_token_id
            moved = drift(bank, general, pad, list(names.values()), on)
    scored = [
        {
            "target": item.target,
            "group": group,
            "scores": {contender: found[at] for contender, found in scores.items()},
        }
        for at, (item, group) in enumerate(zip(items, groups_of(rows), strict=True))
    ]
    metric = task.metric
    index = task.positive_index
    points, before = [], 0.0
    for scale, copy in names.items():
        made = comparison(metric, scored, "base", copy, index)
        assert made is not None
        before = made.base
        tokens = float(moved[copy]["tokens"].sum())
        points.append(
            {
                "scale": scale,
                "score": made.adapter,
                "difference": made.difference,
                "lower": _finite(made.lower),
                "upper": _finite(made.upper),
                "nats": float(moved[copy]["adapter"].sum()) / tokens,
                "kl": float(moved[copy]["kl"].sum()) / tokens,
            }
        )
    first = moved[names[wanted[0]]]
    return {
        "metric": metric,
        "rows": len({row.example.id for row in rows}),
        "texts": len(texts),
        "base": {
            "score": before,
            "nats": float(first["base"].sum() / first["tokens"].sum()),
        },
        "points": points,
        "best": best_scale(metric, points),
        "loss": LOSS,
        "least": _least(metric, scored, names, index),
    }


def best_scale(metric: str, points: Sequence[Mapping[str, Any]]) -> float:
    """The scale with the best score; of equal ones the one nearest to the base."""
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    return float(max(points, key=lambda p: (sign * p["score"], -p["kl"]))["scale"])


def _least(
    metric: str, scored: Sequence[Mapping[str, Any]], names: Mapping[float, str], index: int | None
) -> float | None:
    """The smallest scale that loses less than ``LOSS`` against 1 at its bound; None without 1."""
    if 1.0 not in names:
        return None
    for scale, copy in names.items():
        over = comparison(metric, scored, copy, names[1.0], index)
        assert over is not None
        # Too few rows cannot show that nothing is lost, so their bounds say no.
        lost = -over.lower if metric in LOWER_IS_BETTER else over.upper
        if lost < LOSS or scale == 1.0:
            return scale
    return 1.0


def _finite(number: float) -> float | None:
    """None where JSON has no word for it: one row has infinite bounds."""
    return number if math.isfinite(number) else None


def _check(scales: Sequence[float], validation: Sequence[EncodedRow]) -> None:
    if len(scales) < 2 or not all(0 <= scale <= 4 for scale in scales):
        raise UsageError(
            where="--scales",
            expected="at least two scales from 0 (the base) over 1 (the adapter) to 4",
            found=listed(scales) or "none",
            hint="Leave it out for " + ",".join(f"{scale:g}" for scale in SCALES) + ".",
        )
    if not validation:
        raise DataError(
            where="validation",
            expected="validation rows: a scale is never chosen on rows of a gate",
            found="none",
            hint="Give them: --validation FILE.",
        )
