"""The verdict on an adapter: scores of items, metrics of them, and gates.

What reading a card needs of that stands here, and imports no numpy: how metrics and contenders are
called, and in which direction and unit a metric is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lora_domains.errors import UsageError, did_you_mean

# ── Metrics ─────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class MetricInfo:
    """How a metric is called and read; ``metrics`` computes it."""

    name: str
    """As a card names it: ``macro_f1``."""
    label: str
    """As people read it: ``macro F1``."""
    higher_is_better: bool = field(default=True, kw_only=True)
    nats: bool = field(default=False, kw_only=True)
    """Whether it is measured in nats; else it is a share, whose difference is shown in points."""
    own_unit: bool = field(default=False, kw_only=True)
    """Whether it is neither a share nor nats, but measured in the unit of the rows' numbers, or a
    coefficient: its differences are not shown in points."""

    @property
    def sign(self) -> float:
        """1 where higher is better, else -1: the best value is the largest ``sign * value``."""
        return 1.0 if self.higher_is_better else -1.0


INFO: dict[str, MetricInfo] = {
    info.name: info
    for info in (
        MetricInfo("accuracy", "accuracy"),
        MetricInfo("macro_f1", "macro F1"),
        MetricInfo("precision", "precision"),
        MetricInfo("recall", "recall"),
        MetricInfo("f1", "F1"),
        MetricInfo("macro_precision", "macro precision"),
        MetricInfo("balanced_accuracy", "balanced accuracy"),
        MetricInfo("mcc", "MCC"),
        MetricInfo("micro_f1", "micro F1"),
        MetricInfo("label_macro_f1", "macro F1"),
        MetricInfo("micro_precision", "micro precision"),
        MetricInfo("micro_recall", "micro recall"),
        MetricInfo("row_f1", "F1 per row"),
        MetricInfo("subset_accuracy", "subset accuracy"),
        MetricInfo("mae", "absolute error", higher_is_better=False, own_unit=True),
        MetricInfo("rmse", "RMSE", higher_is_better=False, own_unit=True),
        MetricInfo("r2", "R²", own_unit=True),
        MetricInfo("spearman", "rank correlation", own_unit=True),
        MetricInfo("loss", "loss", higher_is_better=False, nats=True),
        MetricInfo("win_rate", "win rate"),
        MetricInfo("ranked", "ranked right"),
        MetricInfo("margin", "log-odds of chosen", nats=True),
        MetricInfo("token_f1", "token F1"),
        MetricInfo("exact_match", "exact match"),
        MetricInfo("rouge_l", "ROUGE-L"),
        MetricInfo("bleu", "BLEU"),
        MetricInfo("chrf", "chrF"),
        MetricInfo("number_match", "number match"),
        MetricInfo("judge", "judge"),
        MetricInfo("nats_per_token", "nats per token", higher_is_better=False, nats=True),
    )
}
"""By name, in the order of a report; ``metrics.register`` adds to it."""


def metric_info(name: str) -> MetricInfo:
    """How the metric called ``name`` is read; raises UsageError where there is none."""
    if name not in INFO:
        raise UsageError(
            where="metric",
            expected="a metric of this package, or one that was registered",
            found=repr(name),
            hint=did_you_mean(name, INFO),
        )
    return INFO[name]


def best_baseline(
    metric: MetricInfo, values: Mapping[str, float | None]
) -> tuple[str, float] | None:
    """The baseline with the best of ``values`` on ``metric``; None where none was scored on it."""
    scored = [(name, value) for name, value in values.items() if value is not None]
    return max(scored, key=lambda pair: (metric.sign * pair[1], pair[0])) if scored else None


# ── Contenders ──────────────────────────────────────────────────────────────────────────────────

CONTENDERS = ("base", "adapter")
LABELS = {
    "base": "the base",
    "adapter": "the adapter",
    "parent": "the adapter it continues from",
    "majority": "the majority class",
    "median": "the median",
    "tfidf": "TF-IDF",
    "nearest": "the nearest answer",
}
"""Contenders as people read them; others go by their own name, in words."""


def contender_label(name: str) -> str:
    """``tfidf`` → ``TF-IDF``, ``3_shot`` → ``the base with 3 examples``."""
    shots = name.removesuffix("_shot")
    if shots != name:
        return f"the base with {shots} examples"
    return LABELS.get(name, name.replace("_", " "))
