"""Cross-validation: base, adapter and baselines on every training row, before a test set is spent.

The rows for training and validation are divided into folds; each fold is scored by an adapter that
was trained on the others. With few rows this is a far better estimate than a small validation set.
No test row is scored and no adapter is saved.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_domains import distributed
from lora_domains.analysis.trials import Trials
from lora_domains.data.splits import folds, split_off
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.evaluation.contenders import score_domain
from lora_domains.evaluation.scorer import Scorer
from lora_domains.model import DomainModel
from lora_domains.report.text import interval
from lora_domains.stats.seeds import across_folds
from lora_domains.tasks import Example
from lora_domains.tokenization.encoded import EncodedRow
from lora_domains.verdict import best_baseline, contender_label
from lora_domains.verdict.metrics import metric_named, reported
from lora_domains.verdict.rules import capital, finite
from lora_domains.verdict.scores import Metric, ScoreTable


def cross_validate(model: DomainModel, domain: Domain, count: int = 5) -> dict[str, Any]:
    """The figures of ``count`` folds as JSON: each metric, the domain's against rivals, the answer.

    Raises UsageError for a number of folds that the rows do not allow, and what
    ``DomainModel.fit`` raises.
    """
    dataset = model.dataset(domain)
    settings = dataset.domain.training
    examples = [*dataset.prepared.train, *dataset.prepared.validation]
    parts = folds(examples, count, settings.seed) if count > 1 else []
    if len(parts) < 2 or not all(parts):
        raise UsageError(
            where="--folds",
            expected=f"2 up to the number of rows that can be parted, at most {len(examples)}",
            found=str(count),
            hint="Give another number. Rows of one group or of one text stay together.",
        )
    trials = Trials(model, dataset, "folds")
    tables = []
    for number, held_out in enumerate(parts, start=1):
        fold = _fold(dataset, examples, held_out)
        sizes = f"{len(fold.train)} rows for training, {len(fold.test)} to score"
        model.display.note(f"fold {number} of {count}: {sizes}")
        trained = trials.trained(fold, fold.train, epochs=trials.plan.epochs, seed=settings.seed)
        with trained as of, distributed.sharing():
            # No digest of a row is stored, so the key does not matter.
            scorer, name = Scorer(model.bank, model.display), of.adapter.name
            items = score_domain(scorer, fold, [name], bytes(32))[name].items
        tables.append(ScoreTable(items).where("set", "test"))
    measured = Folds(tables, dataset.prepared.task.positive_index)
    return measured.figures(dataset) | {"domain": dataset.domain.name, "seed": settings.seed,
                                        "data": dict(dataset.prepared.digests)}  # fmt: skip


def _fold(dataset: Dataset, examples: Sequence[Example], held_out: Sequence[int]) -> Dataset:
    """The dataset whose test rows are those ``held_out``; its validation rows are of the rest."""
    out, seed = set(held_out), dataset.domain.training.seed
    rest = [example for i, example in enumerate(examples) if i not in out]
    train, validation = split_off(rest, "validation", seed, left=1)
    test = [examples[i] for i in held_out]
    known: dict[str, list[EncodedRow]] = {}
    for row in [*dataset.train, *dataset.validation]:
        known.setdefault(row.example.id, []).append(row)

    def encoded(part: Sequence[Example]) -> list[EncodedRow]:
        return [row for example in part for row in known.get(example.id, ())]

    prepared = replace(
        dataset.prepared, train=tuple(train), validation=tuple(validation), test=tuple(test)
    )
    return replace(
        dataset, prepared=prepared,
        train=encoded(train), validation=encoded(validation), test=encoded(test),
    )  # fmt: skip


@dataclass(frozen=True)
class Folds:
    """The scored rows of each fold."""

    tables: Sequence[ScoreTable]
    positive: int | None

    def figures(self, dataset: Dataset) -> dict[str, Any]:
        """Each metric of base, baselines and adapter; the domain's against its rivals."""
        rows = ScoreTable(item for table in self.tables for item in table)
        labels = dataset.domain.task.labels or ()
        scores = {m.name: self._scored(m, rows) for m in reported(labels, self.positive)}
        scores = {name: fields for name, fields in scores.items() if fields}
        metric = metric_named(dataset.domain.primary_metric)
        best = best_baseline(metric, scores[metric.name]["baselines"])
        rivals = {who: self._against(metric, rows, who)
                  for who in ("base", *(best[:1] if best else ()))}  # fmt: skip
        found = {
            "metric": metric.name, "folds": len(self.tables), "rows": len(rows),
            "scores": scores, "rivals": rivals,
        }  # fmt: skip
        return found | {"answer": answer(found)}

    def _scored(self, metric: Metric, rows: ScoreTable) -> dict[str, Any]:
        """A metric of every contender, the adapter's against the base; empty without scores."""
        against = self._against(metric, rows, "base")
        if not against:
            return {}
        values = {name: metric.value(rows, name, self.positive) for name in rows.baselines()}
        return against | {"n": len(rows), "baselines": values}

    def _against(self, metric: Metric, rows: ScoreTable, rival: str) -> dict[str, Any]:
        """The adapter's metric minus a rival's, with bounds for other rows and trainings."""
        compared = metric.compare(rows, rival, "adapter", self.positive)
        if compared is None:
            return {}
        each = [metric.compare(table, rival, "adapter", self.positive) for table in self.tables]
        by_fold = [one.difference for one in each if one is not None]
        bounds = across_folds(compared.difference, compared.bounds, by_fold)
        return {
            "base": compared.base, "adapter": compared.adapter, "difference": compared.difference,
            "lower": finite(bounds.lower), "upper": finite(bounds.upper), "by_fold": by_fold,
        }  # fmt: skip


def answer(found: Mapping[str, Any]) -> str:
    """What the folds come to: whether the adapter is better than its best rival."""
    metric = metric_named(found["metric"])
    rival, against = max(
        found["rivals"].items(), key=lambda pair: (metric.sign * pair[1]["base"], pair[0])
    )
    name = contender_label(rival)
    lower, upper = against["lower"], against["upper"]
    words = f"Too few rows to tell whether the adapter is better than {name}"
    if lower is not None and upper is not None:
        worst, best = sorted(metric.sign * bound for bound in (lower, upper))
        if worst > 0:
            words = f"The adapter is better than {name}"
        elif best < 0:
            words = f"{capital(name)} is better than the adapter"
    return (
        f"{words}: {metric.label} {against['adapter']:.3f} against {against['base']:.3f}, a "
        f"difference of {interval(against)}. This is an estimate, and no verdict, which needs "
        "unseen test rows."
    )
