"""Fitting several domains: plans, the choice between one pass and several, saved adapters."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.folder import is_adapter
from lora_domains.console import Display
from lora_domains.data.source import Data, Source
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain
from lora_domains.errors import UsageError, listed
from lora_domains.inference.likelihoods import reads_whole_prompts
from lora_domains.joint.checkpoint import JointCheckpoint, joint_path
from lora_domains.joint.run import JointRun
from lora_domains.joint.together import choose
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.report.card import Card
from lora_domains.tasks import Task
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.checkpoints import checkpoint_path
from lora_domains.training.estimate import total_in_words
from lora_domains.training.fit import (
    estimated,
    fit,
    make_run,
    open_tracker,
    remembered,
    save,
    show_outcome,
    shown_plan,
)
from lora_domains.training.loop import Log, Run, Trained
from lora_domains.training.plan import Plan, make_plan, parameters_per_rank

DryRun = Callable[[Dataset, str], float]
"""The seconds of evaluating an adapter on a dataset, by its name."""
TRAINED_ON = ("identity", "dtype", "quantization")
"""What decides about a base whether an adapter on it is trained again."""


class Fit:
    """One of several fits: its plan, its run, and the adapter that it saves."""

    def __init__(
        self, bank: Bank, dataset: Dataset, plan: Plan, out: Path, display: Display
    ) -> None:
        self.bank, self.dataset, self.out = bank, dataset, out
        self.name, self.plan, self.display = dataset.domain.name, plan, display
        self.log: Log | None = None
        self.others: list[str] = []
        """The domains that are trained with this one."""
        self.card: Card | None = None

    # What decides how many are trained together.

    @property
    def train(self) -> list[EncodedExample]:
        return [row.encoded for row in self.dataset.train]

    @property
    def head(self) -> bool:
        return self.dataset.domain.task.head_classes is not None

    @property
    def pairs(self) -> bool:
        return self.dataset.domain.task.beta is not None

    @property
    def whole(self) -> bool:
        return reads_whole_prompts(self.dataset.domain)

    @property
    def batch_size(self) -> int:
        return self.plan.batch_size

    @property
    def seed(self) -> int:
        return self.dataset.domain.training.seed

    @property
    def parameters(self) -> int:
        """Of the LoRA weights in training."""
        return self.plan.rank * parameters_per_rank(self.bank.base, self.dataset.domain)

    # The run.

    @property
    def steps(self) -> int:
        """Steps of its run, if patience lasts."""
        return self.plan.steps

    def begin(self) -> Run:
        """Its run; the adapter in training is added to the bank."""
        run = make_run(self.bank, self.dataset, self.plan, self.out, self.display, self.log)
        run.on_best = lambda trained: self._save(trained, finished=False)
        return run

    def end(self, trained: Trained) -> None:
        """Save the adapter of a run that is over."""
        self.card = self._save(trained)
        show_outcome(self.dataset, self.plan, trained, self.display)

    @cached_property
    def remembered(self) -> dict[str, str]:
        """What the card remembers of the rows; asked for before training, as it may fail."""
        return distributed.on_main(lambda: remembered(self.dataset))

    def _save(self, trained: Trained, finished: bool = True) -> Card:
        if self.others:
            trained.record["together_with"] = self.others
        return save(
            self.bank.base, self.dataset, trained, self.out, self.remembered, finished=finished
        )


def requested(
    domain: Any, name: str | None, task: Task, validation: Source | None, test: Source | None
) -> tuple[list[Domain], bool]:
    """The domains to fit: one, several, or that of rows, with a ``name`` and a ``task``.

    And whether a list of them was given.

    Raises UsageError for rows without a name, and for two domains of one name.
    """
    if isinstance(domain, Domain):
        return [domain], False
    domains = list(domain) if isinstance(domain, Sequence) and not isinstance(domain, str) else []
    if not any(isinstance(one, Domain) for one in domains):
        if name is None:
            raise UsageError(
                expected="a name for the adapter",
                found="rows without one",
                hint="Call fit(rows, name='spam').",
            )
        return [Domain(name, task, Data(domain, validation, test))], False
    others = [type(one).__name__ for one in domains if not isinstance(one, Domain)]
    if others:
        raise UsageError(
            expected="domains only, to train several together",
            found=f"one of type {others[0]} among them",
            hint="Declare a Domain for its rows.",
        )
    twice = [name for name, count in Counter(one.name for one in domains).items() if count > 1]
    if twice:
        raise UsageError(
            expected="domains of different names",
            found=f"{twice[0]!r} twice",
            hint="Name one of them differently: its adapter would replace the other's.",
        )
    return domains, True


def fit_all(
    bank: Bank,
    datasets: Sequence[Dataset],
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    tracker: str | None = None,
    together: int | None = None,
    dry_run: DryRun | None = None,
) -> list[Card]:
    """Train an adapter on each of ``datasets`` and save all of them in ``out``; their cards.

    Up to ``together`` of them take their steps in passes that they share; by default as many as
    make that faster than one after another. With ``dry_run`` nothing is trained and no card
    returned. Raises what ``training.fit.fit`` raises; adapters whose runs are over by then are
    saved.
    """
    if len(datasets) > 1 and dry_run is None:
        return fit_together(
            bank, datasets, out, display, resume=resume, tracker=tracker, together=together
        )
    if dry_run is None:
        cards = [_over(bank.base, one, out, display) if resume else None for one in datasets]
        return [
            card or fit(bank, one, out, display, resume=resume, tracker=tracker)
            for one, card in zip(datasets, cards, strict=True)
        ]
    estimates = []
    for dataset in datasets:
        if len(datasets) > 1:
            display.title(dataset.domain.name)
        estimates.append(estimated(bank, dataset, out, display, partial(dry_run, dataset)))
    if len(datasets) > 1:
        parts = [replace(dataset, general=dataset.general.in_part()) for dataset in datasets]
        plans = [make_plan(bank.base, part) for part in parts]
        fits = [Fit(bank, *pair, out, display) for pair in zip(parts, plans, strict=True)]
        display.title(f"All {len(datasets)} runs")
        display.stage("estimate", None, None, total_in_words(estimates))
        display.stage("together", None, None, _reason(choose(bank.base, fits).reason, together))
    return []


def fit_together(
    bank: Bank,
    datasets: Sequence[Dataset],
    out: Path,
    display: Display,
    *,
    resume: bool = False,
    tracker: str | None = None,
    together: int | None = None,
    kind: type[Fit] = Fit,
    logged_as: tuple[str, Path] | None = None,
) -> list[Card]:
    """``fit_all`` of two and more.

    ``kind`` is that of each fit; ``logged_as`` the name of the whole for a tracker, and the folder
    of its logs.
    """
    names = [dataset.domain.name for dataset in datasets]
    checkpoint, cards = _resumed(bank.base, datasets, out, display, resume)
    if len(cards) == len(names):
        checkpoint.clear()
        return [cards[name] for name in names]
    displays = [display.of(name, max(map(len, names))) for name in names]
    # Of runs on the same rows, the plan of the first is shown, and where others differ from it.
    same = all(one.train is datasets[0].train for one in datasets)
    shown: set[str] = set()
    fits = [
        kind(bank, one, shown_plan(bank.base, one, own, shown if same else set()), out, own)
        for one, own in zip(datasets, displays, strict=True) if one.domain.name not in cards
    ]  # fmt: skip
    _ = [fit.remembered for fit in fits]
    sharing = names if checkpoint.together else [fit.name for fit in fits]
    if checkpoint.together is None:
        choice = choose(bank.base, fits)
        checkpoint.together = distributed.smallest(together or choice.together)
        display.stage("together", None, None, _reason(choice.reason, together))
    elif together not in (None, checkpoint.together):
        display.warn(
            f"--together {together} has no effect: the interrupted run trained up to "
            f"{checkpoint.together} at a time, and goes on so, since rounding depends on it."
        )
    if checkpoint.together > 1:
        for fit in fits:
            fit.others = [name for name in sharing if name != fit.name]
    with ExitStack() as opened:
        run = JointRun(bank, fits, checkpoint, display)
        if tracker is not None:
            numbers = {f"{f.name}/{k}": v for f in fits for k, v in f.plan.numbers().items()}
            whole, folder = logged_as or ("+".join(names), out)
            log, close = open_tracker(tracker, whole, folder, numbers)
            opened.callback(close)
            for fit in fits:
                fit.log = _log_of(fit.name, log, checkpoint)
        run.fit()
    checkpoint.clear()
    cards |= {fit.name: fit.card for fit in fits if fit.card is not None}
    return [cards[name] for name in names]


def _resumed(
    base: Base, datasets: Sequence[Dataset], out: Path, display: Display, resume: bool
) -> tuple[JointCheckpoint, dict[str, Card]]:
    """The checkpoint of runs on ``datasets``, and the cards of the runs that are over.

    Once all are, there is no file: then every run is over whose adapter is saved.
    """
    domains = {dataset.domain.name: dataset.domain for dataset in datasets}
    checkpoint = JointCheckpoint(joint_path(out, [*domains]), display, resume)
    known = checkpoint.ended if checkpoint.together else domains if resume else ()
    # A run is trained again where its adapter was deleted or replaced, or its settings are others.
    found = {
        one.domain.name: distributed.on_main(partial(over, out, one, base))
        for one in datasets if one.domain.name in known
    }  # fmt: skip
    cards = {name: card for name, card in found.items() if card is not None}
    checkpoint.ended = [*cards]
    checkpoint.failed = {
        name: error for name, error in checkpoint.failed.items()
        if name in domains and error["recipe"] == domains[name].digest()
    }  # fmt: skip
    if cards and not checkpoint.together:
        display.note(f"Trained before, and not again: {listed(cards)}.")
    elif resume and not checkpoint.together:
        display.note("Nothing to resume: starting at the beginning.")
    return checkpoint, cards


def _over(base: Base, dataset: Dataset, out: Path, display: Display) -> Card | None:
    """``over`` of a run that was alone, once it left no checkpoint."""
    name = dataset.domain.name
    if distributed.on_main(checkpoint_path(out, name).exists):
        return None
    card = distributed.on_main(partial(over, out, dataset, base))
    if card is not None:
        display.note(f"Trained before, and not again: {name}.")
    return card


def over(out: Path, dataset: Dataset, base: Base) -> Card | None:
    """The card of the adapter in ``out`` whose run on ``dataset`` is over; None without one, or
    with one of another base, precision or parent."""
    folder = out / dataset.domain.name
    card = Card.read(folder) if is_adapter(folder) else None
    if card is None or not card.adapter.training.get("finished"):
        return None
    parent = dataset.parent.record() if dataset.parent else None
    own = dataset.domain.digest(), dict(dataset.prepared.digests), parent and parent.sha256
    entry, record = card.adapter, base.record()
    trained = entry.recipe_digest, entry.data, entry.parent and entry.parent.sha256
    alike = all(getattr(card.base, key) == record[key] for key in TRAINED_ON)
    alike = alike and entry.chat == dataset.chat
    return card if alike and trained == own else None


def _reason(chosen: str, given: int | None) -> str:
    if given is None:
        return chosen
    return "one after another, as asked" if given == 1 else f"{given} in one pass, as asked"


def _log_of(name: str, log: Log, checkpoint: JointCheckpoint) -> Log:
    """The log of one run: its name before each value, and steps counted over all runs."""

    def own(values: Mapping[str, Any], _step: int) -> None:
        log({f"{name}/{key}": value for key, value in values.items()}, checkpoint.step)

    return own
