"""Scale curve: the domain metric and general knowledge as the adapter is scaled from 0 to above 1.

At scale s an adapter has the same weights with their effect multiplied by s: 0 is the base, 1 the
adapter as trained. No training is needed (interpolating between the ends of a fine-tuning: Wortsman
et al. 2022, arXiv 2109.01903). The curve is for choosing a scale, so it reads no row of a gate: the
domain metric is computed on validation rows, and general knowledge on the embedded general text
that chooses checkpoints (nats per token, and KL from the base, which follows forgetting).

A scale that was measured can be applied: it is then in ``lora_alpha``, which PEFT reads. Scales
stay relative to the adapter as it was trained, so that 1 undoes it.
"""

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.folder import (
    CONFIG,
    WEIGHTS,
    fingerprint,
    own_folder,
    replacing,
    rewrite_card,
    write_card,
)
from lora_domains.adapters.foreign import is_foreign
from lora_domains.adapters.readme import readme
from lora_domains.adapters.versions import keep_version, versions
from lora_domains.console import Display
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.errors import AdapterError, DataError, UsageError, listed
from lora_domains.evaluation.items import groups_of
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.evaluation.verdict_run import check_same_length, check_same_rows
from lora_domains.inference.likelihoods import drift
from lora_domains.inference.predict import length_of
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.lora import Adapter
from lora_domains.probes.general_text import SELECTION
from lora_domains.probes.own_text import text_of
from lora_domains.report.card import MEASURED, AdapterEntry, Card, read_items
from lora_domains.stats.comparisons import Comparison
from lora_domains.tasks import Task
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.rules import finite
from lora_domains.verdict.scores import ScoreTable

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
BEST, MOST = "best", 4.0
"""The name of the best scale, and the largest that may be measured."""
LOSS = 0.03
"""A scale that loses less of the metric than this against scale 1 (95 % bound) is as good."""


def curve(
    model: DomainModel, name: str, domain: Domain, scales: Sequence[float] = SCALES
) -> dict[str, Any]:
    """Metric and drift of the loaded adapter ``name`` at each scale; also written into its card.

    ``domain`` has the validation rows and the row length of its training. Raises UsageError for
    others, for scales that make no curve and for an adapter with a trained head, AdapterError for
    one without a card.
    """
    card, path = check_adapter(model.bank[name]), model.bank[name].path
    check_scales(scales)
    dataset, entry = model.dataset(domain), card.adapter
    check_same_rows(name, entry, dataset.prepared, "validation")
    check_same_length(name, length_of(model.bank, name), dataset.tokenization.max_length)
    place = path and own_folder(path, model.out / entry.domain)
    entry.scale_curve = scale_curve(model.bank, name, dataset, scales, model.display)
    if path is not None:
        distributed.on_main(lambda: rewrite_card(path, card, readme, read_items(path), place))
    return dict(entry.scale_curve)


def check_adapter(adapter: Adapter) -> Card:
    """The card of an adapter that can be scaled.

    Raises AdapterError for one without a card, UsageError with a trained head or with DoRA.
    """
    if adapter.card is None or is_foreign(adapter):
        raise AdapterError(
            where=adapter.name,
            expected="an adapter trained here, with a card",
            found="a folder of plain PEFT",
            hint="Its validation rows are unknown, so none can be used to choose a scale.",
        )
    if adapter.head is not None:
        raise UsageError(
            where=adapter.name,
            expected="an adapter without a trained head",
            found="one whose head was trained for scale 1 only",
            hint="A head keeps scale 1; only adapters that answer as text have a choice.",
        )
    if adapter.magnitudes:
        raise UsageError(
            where=adapter.name,
            expected="an adapter whose effect is in proportion to its weights",
            found="one with DoRA, whose magnitudes are not",
            hint="Train one without lora.dora to choose a scale.",
        )
    return adapter.card


def check_scales(scales: Sequence[float]) -> None:
    """Raise UsageError for scales that make no curve."""
    if len(set(scales)) < 2 or not all(0 <= scale <= MOST for scale in scales):
        raise UsageError(
            where="--scales",
            expected="at least two scales from 0 (the base) over 1 (the adapter) to 4",
            found=listed(sorted(set(scales))) or "none",
            hint="Omit it for " + ",".join(f"{scale:g}" for scale in SCALES) + ".",
        )


@contextmanager
def scaled(bank: Bank, name: str, scales: Sequence[float]) -> Iterator[dict[float, str]]:
    """Load a copy of the adapter ``name`` at each of ``scales``; yields {scale: its name}."""
    adapter = bank[name]
    applied = adapter.card.adapter.scale if adapter.card else 1.0
    names = {scale: f"{name}__scale{at}" for at, scale in enumerate(scales)}
    try:
        for scale, copy in names.items():
            effect = {linear: scale / applied * own for linear, own in adapter.scales.items()}
            bank.add(replace(adapter, name=copy, scales=effect))
        yield names
    finally:
        for copy in names.values():
            if copy in bank:
                bank.remove(copy)


def scale_curve(
    bank: Bank, name: str, dataset: Dataset, scales: Sequence[float], display: Display
) -> dict[str, Any]:
    """The card's ``scale_curve``: metric, nats and KL at each scale, and the figures of the base.

    Raises DataError without validation rows.
    """
    ordered, rows, task = sorted(set(scales)), dataset.validation, dataset.domain.task
    check_validation(rows)
    general = text_of(bank.base, None, display)
    texts = general.windows("selection", dataset.tokenization, SELECTION)
    with scaled(bank, name, ordered) as names:
        items = _scored(bank, task, rows, names.values(), display)
        moved = _drift(bank, texts, names.values(), display)
    metric, positive = dataset.domain.primary_metric, task.positive_index
    compared = {
        scale: _compared(metric, items, "base", copy, positive) for scale, copy in names.items()
    }
    points = [_point(scale, compared[scale], moved[copy]) for scale, copy in names.items()]
    first = moved[names[ordered[0]]]
    return {
        "metric": metric,
        "rows": len({row.example.id for row in rows}),
        "texts": len(texts),
        "base": {
            "score": compared[ordered[-1]].base,
            "nats": float(first["base"].sum() / first["tokens"].sum()),
        },
        "points": points,
        "best": best_scale(metric, points),
        "loss": LOSS,
        "least": least_scale(metric, items, names, positive),
    }


def _scored(
    bank: Bank, task: Task, rows: Sequence[EncodedRow], copies: Collection[str], display: Display
) -> list[dict[str, Any]]:
    """The validation rows with the scores of the base and of each copy."""
    part = Part("validation rows at each scale", task, rows)
    scores = Scorer(bank, display).scores(part, [None, *copies])
    return [
        {
            "target": row.encoded.target,
            "truth": row.encoded.truth,
            "group": group,
            "scores": {copy or "base": of_rows[at] for copy, of_rows in scores.items()},
        }
        for at, (row, group) in enumerate(zip(rows, groups_of(rows), strict=True))
    ]


def _drift(
    bank: Bank, texts: Sequence[EncodedExample], copies: Collection[str], display: Display
) -> dict[str, dict[str, Any]]:
    """``likelihoods.drift`` of each copy on general text."""
    with display.progress("general text at each scale", len(texts)) as advance:
        pad = bank.base.pad
        return drift(bank, texts, pad, list(copies), advance)


def _point(scale: float, compared: Comparison, moved: Mapping[str, Any]) -> dict[str, Any]:
    tokens = float(moved["tokens"].sum())
    return {
        "scale": scale,
        "score": compared.adapter,
        "difference": compared.difference,
        "lower": finite(compared.lower),
        "upper": finite(compared.upper),
        "nats": float(moved["adapter"].sum()) / tokens,
        "kl": float(moved["kl"].sum()) / tokens,
    }


def best_scale(metric: str, points: Sequence[Mapping[str, Any]]) -> float:
    """The scale with the best score; of several, the one nearest to the base."""
    sign = metric_named(metric).sign
    return float(max(points, key=lambda p: (sign * p["score"], -p["kl"]))["scale"])


def least_scale(
    metric: str,
    items: Sequence[Mapping[str, Any]],
    names: Mapping[float, str],
    positive: int | None,
) -> float | None:
    """The smallest scale that loses less than ``LOSS`` against 1 at its bound; None without 1."""
    if 1.0 not in names:
        return None
    for scale, copy in names.items():
        compared = _compared(metric, items, copy, names[1.0], positive)
        # With few rows the bounds are wide, and no smaller scale qualifies.
        lost = compared.upper if metric_named(metric).higher_is_better else -compared.lower
        if lost < LOSS or scale == 1.0:
            return scale
    return 1.0


def _compared(
    metric: str, items: Sequence[Mapping[str, Any]], one: str, other: str, positive: int | None
) -> Comparison:
    compared = metric_named(metric).compare(ScoreTable(items), one, other, positive)
    if compared is None:
        raise AdapterError(
            where=f"scales {one} and {other}",
            expected=f"a finite score for {metric} on every row",
            found="one that is not a number",
            hint="Train again with a lower learning rate.",
        )
    return compared


def check_validation(rows: Sequence[EncodedRow]) -> None:
    """Raise DataError without validation rows."""
    if not rows:
        raise DataError(
            where="validation",
            expected="validation rows, since a scale is not chosen on the rows of a gate",
            found="none",
            hint="Give them: --validation FILE.",
        )


# ── Applying a scale ────────────────────────────────────────────────────────────────────────────


def chosen(curve: Mapping[str, Any], wanted: float | str) -> float | None:
    """The measured scale that ``wanted`` names, "best" or a number; None where ``curve`` lacks it.

    The best is that above 0, which is the base itself. Raises UsageError for a number that is none
    of an adapter.
    """
    points = [point for point in curve.get("points", ()) if point["scale"] > 0]
    if wanted == BEST:
        return best_scale(curve["metric"], points) if points else None
    if isinstance(wanted, str) or not 0 < wanted <= MOST:
        raise UsageError(
            where="--scale",
            expected=f"{BEST}, or a scale above 0 (the base), 1 as trained, at most {MOST:g}",
            found=str(wanted),
            hint="lora-domains curve ADAPTER shows what each is like.",
        )
    return wanted if any(point["scale"] == wanted for point in points) else None


def apply_scale(folder: Path, wanted: float | str) -> tuple[Card, Path | None]:
    """Give the adapter in ``folder`` a scale of its curve, in the config that PEFT reads.

    Returns its card, without what an evaluation found at another scale, and the version that it
    was saved as before; None where it has that scale already. Raises UsageError for a scale that
    was not measured on validation rows, AdapterError where the disk refuses.
    """
    card = Card.read(folder)
    entry, scale = card.adapter, chosen(card.adapter.scale_curve, wanted)
    if scale is None:
        raise UsageError(
            where=folder.name,
            expected="a scale that was measured on validation rows",
            found=f"{wanted}, which its curve lacks",
            hint=f"Measure it first: lora-domains curve {entry.path} --scale {wanted}",
        )
    if scale == entry.scale:
        return card, None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    factor = scale / entry.scale
    config["lora_alpha"] = _times(config["lora_alpha"], factor)
    pattern = config.get("alpha_pattern") or {}
    config["alpha_pattern"] = {part: _times(alpha, factor) for part, alpha in pattern.items()}
    saved = keep_version(folder) or versions(folder)[-1]
    with replacing(folder) as fresh:
        shutil.copyfile(folder / WEIGHTS, fresh / WEIGHTS)
        # As PEFT writes it, so that scale 1 has the bytes of the training.
        written = json.dumps(config, indent=2, sort_keys=True)
        (fresh / CONFIG).write_text(written, encoding="utf-8")
        card.adapter = replace(entry, scale=scale, sha256=fingerprint(fresh), **_unmeasured())
        write_card(fresh, card, readme, [])
    return card, saved


def _times(alpha: float, factor: float) -> float:
    """``alpha`` times ``factor``; an integer where it is one but for rounding."""
    product = float(f"{alpha * factor:.12g}")
    return int(product) if product.is_integer() else product


def _unmeasured() -> dict[str, Any]:
    """The attributes of a card that hold what an evaluation found, empty."""
    names = (MEASURED - {"scale_curve"}) | {"judged", "verdict", "evaluations"}
    fresh = AdapterEntry(domain="", path="", sha256=None)
    return {name: getattr(fresh, name) for name in names}
