"""A grid of settings in one pass: runs are compared on validation rows, and the best one is saved.

No test row is read: the adapter that was chosen is evaluated like any other, once.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.loading import load_adapter
from lora_domains.console import Display, analyses
from lora_domains.data.identity import normalised_once
from lora_domains.dataset import Dataset
from lora_domains.errors import LossExploded
from lora_domains.evaluation.contenders import score_alone
from lora_domains.evaluation.items import make_items
from lora_domains.evaluation.scorer import Scorer
from lora_domains.inference.scores import Scores
from lora_domains.joint.fit import DryRun, Fit, fit_all, fit_together, over
from lora_domains.joint.grid import grid, in_words, of_grid
from lora_domains.modeling.bank import Bank
from lora_domains.report.card import Card
from lora_domains.training.fit import remembered, save
from lora_domains.training.loop import Run, Trained
from lora_domains.training.plan import make_plan
from lora_domains.training.validation import within_drift
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import comparison_fields


class Trial(Fit):
    """One run of a sweep: its best epoch is kept in the checkpoint until it is over."""

    @cached_property
    def remembered(self) -> dict[str, str]:
        """Nothing: that is for the card of the adapter that is chosen."""
        return {}

    def begin(self) -> Run:
        """Its run, which saves no adapter before its end."""
        run = super().begin()
        run.on_best = None
        return run


def fit_sweep(
    bank: Bank,
    datasets: Sequence[Dataset],
    out: Path,
    display: Display,
    *,
    sweep: Mapping[str, Sequence[Any]],
    resume: bool = False,
    dry_run: DryRun | None = None,
    **options: Any,
) -> list[Card]:
    """Train each combination of the values of ``sweep`` on the one dataset, and save the best.

    The best has the best domain metric on the validation rows, among the runs within the drift
    limit where there are any. Its card says that it was chosen, and among which. The adapters of
    the others are deleted. ``options`` are those of ``fit_all``; without a dry run the result is
    one card. Raises what ``fit_all`` raises; a run whose loss explodes counts as the worst.
    """
    (dataset,) = datasets
    domain = dataset.domain
    settings = grid(domain, sweep, continued=dataset.parent is not None)
    trials = [replace(dataset, domain=one) for one in of_grid(domain, settings)]
    folder = out / f".{domain.name}.sweep"
    for trial, one in zip(trials, settings, strict=True):
        display.stage("run", None, None, f"{trial.domain.name}: {in_words(one)}")
    if dry_run is not None:
        evaluation = dry_run

        def once(trial: Dataset, name: str) -> float:  # of the best run alone
            return evaluation(trial, name) if trial is trials[0] else 0.0

        return fit_all(bank, trials, folder, display, dry_run=once, **options)
    rows = distributed.on_main(lambda: remembered(dataset))  # which may fail
    if not resume and distributed.on_main(folder.exists):
        display.warn("an unfinished sweep is replaced; --resume would have continued it.")
        distributed.on_main(lambda: shutil.rmtree(folder))
    _train(bank, trials, folder, display, resume, (f"{domain.name}-sweep", out), options)
    finished = [distributed.on_main(partial(over, folder, one, bank.base)) for one in trials]
    measured = _Measured(bank, trials, settings, finished, folder, display)
    best, found = measured.compared()
    card = _save_chosen(bank, best, domain.name, found, folder, out, rows)
    distributed.on_main(lambda: shutil.rmtree(folder))
    if not display.quiet:
        analyses.sweep(display.console, domain.name, found)
    return [card]


def _train(
    bank: Bank, trials: Sequence[Dataset], folder: Path, display: Display, resume: bool,
    logged_as: tuple[str, Path], options: Mapping[str, Any],
) -> None:  # fmt: skip
    """Train all runs into ``folder``; raises LossExploded where no run was finished."""
    try:
        fit_together(
            bank, trials, folder, display, resume=resume, kind=Trial, logged_as=logged_as,
            **options,
        )  # fmt: skip
    except LossExploded:
        if not distributed.on_main(lambda: any(over(folder, one, bank.base) for one in trials)):
            raise


class _Measured:
    """The runs of a sweep that are over, scored on the validation rows."""

    def __init__(
        self, bank: Bank, trials: Sequence[Dataset], settings: Sequence[Mapping[str, Any]],
        cards: Sequence[Card | None], folder: Path, display: Display,
    ) -> None:  # fmt: skip
        self.bank, self.trials, self.settings, self.cards = bank, trials, settings, cards
        domain = trials[0].domain
        self.metric = metric_named(domain.primary_metric)
        self.positive = domain.task.positive_index
        methods = [make_plan(bank.base, trial).retention for trial in trials]
        self.drift_limit = min(method.drift_limit(domain.gates) for method in methods)
        """One for all runs, also for those without retention among others."""
        scores = {
            trial.domain.name: self._scored(trial, folder, display)
            for trial, card in zip(trials, cards, strict=True) if card is not None
        }  # fmt: skip
        # The items are kept nowhere, so their key does not matter.
        self.table = ScoreTable(make_items("validation", trials[0].validation, scores, bytes(32)))

    @normalised_once()
    def _scored(self, trial: Dataset, folder: Path, display: Display) -> Scores:
        name = trial.domain.name
        self.bank.add(load_adapter(folder / name, self.bank.base, name))
        try:
            with distributed.sharing():
                return score_alone(Scorer(self.bank, display), trial, name)
        finally:
            self.bank.remove(name)

    def compared(self) -> tuple[Dataset, dict[str, Any]]:
        """The best run, and the figures of all, the best first, as a card keeps them."""
        trained = zip(self.trials, self.settings, self.cards, strict=True)
        figures = [{"run": at, **self._figures(*one)} for at, one in enumerate(trained, start=1)]
        order = sorted(range(len(figures)), key=lambda at: self._rank(figures[at]), reverse=True)
        best = self.trials[order[0]]
        for at in order[1:]:
            if figures[at]["score"] is None:
                continue
            name = self.trials[at].domain.name
            compared = self.metric.compare(self.table, best.domain.name, name, self.positive)
            if compared is not None:
                fields = comparison_fields(compared)
                figures[at] |= {key: fields[key] for key in ("difference", "lower", "upper")}
        return best, {"metric": self.metric.name, "rows": len(self.table),
                      "runs": [figures[at] for at in order]}  # fmt: skip

    def _figures(
        self, trial: Dataset, settings: Mapping[str, Any], card: Card | None
    ) -> dict[str, Any]:
        if card is None:
            return {"settings": dict(settings), "score": None}
        training = card.adapter.training
        record = next(r for r in training["history"] if r["epoch"] == training["best_epoch"])
        return {
            "settings": dict(settings),
            "score": self.metric.value(self.table, trial.domain.name, self.positive),
            "loss": record["validation_loss"],
            "best_epoch": training["best_epoch"],
            # A run whose effect was reduced is within the limit by that.
            "within_drift": training["scale"] != 1 or within_drift(record, self.drift_limit),
        }

    def _rank(self, figures: Mapping[str, Any]) -> tuple[bool, bool, float, float]:
        """As epochs are ranked: within the drift limit, then score, then validation loss."""
        score = figures["score"]
        if score is None:
            return False, False, 0.0, 0.0
        return True, figures["within_drift"], self.metric.sign * score, -figures["loss"]


def _save_chosen(
    bank: Bank, best: Dataset, name: str, found: Mapping[str, Any], folder: Path, out: Path,
    rows: dict[str, str],
) -> Card:  # fmt: skip
    """Save the adapter of the ``best`` run as ``name``; its card, which remembers ``rows``."""
    trained = folder / best.domain.name
    adapter = load_adapter(trained, bank.base, name)
    record = {**Card.read(trained).adapter.training, "chosen_among": found}
    record.pop("together_with", None)
    chosen = replace(best, domain=replace(best.domain, name=name))
    return save(bank.base, chosen, Trained(adapter, record), out, rows)
