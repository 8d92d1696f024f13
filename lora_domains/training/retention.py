"""Retention methods: how a run preserves the base's general knowledge, and how often.

A class is a method: its settings, the general texts it reads in a step, the loss it adds on them,
and how epochs that drift from the base are ranked. ``register`` makes a method known by its name.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self, TypeVar

import numpy as np
from torch import Tensor

from lora_domains.console import GENERAL, Clock, Display
from lora_domains.dataset import Dataset
from lora_domains.domain import RETENTION, Training
from lora_domains.inference.batches import MICRO_TOKENS
from lora_domains.inference.choice_tree import saved_tokens
from lora_domains.inference.likelihoods import (
    TextOutput,
    least_saved,
    reads_whole_prompts,
    text_nats,
)
from lora_domains.inference.reference import Prediction, Reference
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import PASS
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.verdict.gates import Gates
from lora_domains.verdict.side_effects import DRIFT_LIMIT

AUTO = ("replay", "kl")
"""Methods chosen by ``auto``: replay of text of the kind the base was trained on, KL otherwise and
on what it wrote itself (``benchmarks/training/retention.py``, ``benchmarks/training/general.py``).
"""


class GeneralTexts:
    """The general texts that a run trains on, with what adapter and base predict for them."""

    output: TextOutput | None = None
    """What the adapter gives for the texts whose loss is asked for, if it has read them before."""

    def __init__(
        self, bank: Bank, adapter: str, texts: Sequence[EncodedExample], display: Display,
        clock: Clock, predictions: Mapping[str, Prediction] | None = None, public: bool = False,
    ) -> None:  # fmt: skip
        self.bank, self.adapter, self.texts = bank, adapter, texts
        self.predictions, self.public = predictions, public
        self.display, self.clock = display, clock

    def of_step(self, rows: int, seed: int, step: int) -> list[EncodedExample]:
        """The ``rows`` texts that a step reads: a pure function of its arguments."""
        return [self.texts[at] for at in positions(len(self.texts), rows, seed, step)]

    def nats(self, texts: Sequence[EncodedExample]) -> Tensor:
        """The adapter's nats summed over the tokens of ``texts``: a scalar with gradient."""
        base = self.bank.base
        with self.bank.routed(self.adapter):
            return text_nats(base.model, texts, base.pad, output=self.output)

    def kl(self, texts: Sequence[EncodedExample]) -> Tensor:
        """KL(base ‖ adapter) summed over the tokens of ``texts``: a scalar with gradient."""
        kl, _ = self.reference.kl_and_nats(texts, self.adapter, self.output)
        return kl.sum()

    @cached_property
    def reference(self) -> Reference:
        """The base's predictions, computed when the first step needs them."""
        with self.clock.phase(GENERAL):
            return reference_on(
                self.texts, self.bank, self.display, "trained with", self.predictions, self.public
            )


def reference_on(
    texts: Sequence[EncodedExample], bank: Bank, display: Display, used: str,
    stored: Mapping[str, Prediction] | None = None, public: bool = False,
) -> Reference:  # fmt: skip
    """The base's predictions on ``texts``; if approximate, a line says how, after ``used``."""
    with display.progress("base on general text", len(texts)) as advance:
        reference = Reference(bank, texts, progress=advance, stored=stored, public=public)
    if reference.refused:
        display.note(
            f"The base's predictions on general text are not kept ({reference.refused}): the next "
            "run computes them again."
        )
    if approximation := reference.approximation():
        display.stage("retention", None, None, f"{used} {approximation}")
    return reference


def positions(count: int, rows: int, seed: int, step: int) -> list[int]:
    """Positions of the ``rows`` of ``count`` texts that a step reads: a pure function.

    Every text is read once before any is read again.
    """
    rows = min(rows, count)
    first = step * rows
    drawn: list[int] = []
    for turn in range(first // count, (first + rows - 1) // count + 1):
        order = np.random.default_rng([seed, turn, count]).permutation(count)
        start, end = (min(max(at - turn * count, 0), count) for at in (first, first + rows))
        drawn += order[start:end].tolist()
    return drawn


# ── Methods ─────────────────────────────────────────────────────────────────────────────────────


class Retention(ABC):
    """A retention method with its settings for one run.

    Subclasses are frozen dataclasses of plain numbers, so that a checkpoint can hold them.
    """

    name: ClassVar[str]
    rows: int
    """General texts read in each step, over all processes."""

    @classmethod
    @abstractmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        """The method for steps of ``batch`` domain rows.

        Raises DomainError for settings that it cannot use.
        """

    @abstractmethod
    def describe(self) -> str:
        """What the method does, as a phrase for the plan."""

    @property
    def fewest(self) -> int:
        """The general texts of a step that it can do with."""
        return self.rows

    def reading(self, rows: int) -> Self:
        """The method with ``rows`` texts in a step, at least ``fewest`` and at most its own."""
        return self

    def loss(self, general: GeneralTexts, texts: Sequence[EncodedExample]) -> Tensor:
        """The loss added on ``texts``, summed over their tokens; for methods that read ``rows``."""
        raise NotImplementedError(f"{self.name} reads general texts and defines no loss on them")

    def warning(self, base: str, familiar: bool) -> str | None:
        """What to tell the user about this method on ``base``.

        ``familiar``: whether the general texts are of the kind that the base was trained on.
        """
        return None

    def drift_limit(self, gates: Gates) -> float:
        """KL on general text up to which an epoch ranks before any that exceeds it.

        Without a limit of the domain it is that of the embedded base, on other bases too: a choice
        among epochs needs some limit, while there the gate only informs.
        """
        return DRIFT_LIMIT if gates.drift is None else gates.drift


METHODS: dict[str, type[Retention]] = {}
"""By name."""
M = TypeVar("M", bound=type[Retention])


def register(method: M) -> M:
    """Make ``method`` available by its name, in domains and plans."""
    METHODS[method.name] = method
    if method.name not in RETENTION:
        RETENTION.append(method.name)
    return method


@register
@dataclass(frozen=True)
class NoRetention(Retention):
    """Training on the domain's rows only; general knowledge is monitored."""

    name = "none"
    rows: int = 0
    monitored: bool = True

    @classmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        return cls()

    def describe(self) -> str:
        if not self.monitored:
            return "the base has no language head to compare with"
        return "general knowledge is monitored but not preserved"

    def drift_limit(self, gates: Gates) -> float:
        return math.inf


@register
@dataclass(frozen=True)
class Replay(Retention):
    """General texts trained on like rows of the domain."""

    name = "replay"
    rows: int
    batch: int

    @classmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        return cls(max(1, round(batch * settings.replay / (1 - settings.replay))), batch)

    def describe(self) -> str:
        return f"{self.rows} general texts per step beside {self.batch} rows"

    def loss(self, general: GeneralTexts, texts: Sequence[EncodedExample]) -> Tensor:
        return self.rows / self.batch * general.nats(texts)

    def warning(self, base: str, familiar: bool) -> str | None:
        if familiar:
            return None
        return (
            f"retention replay trains {base} on the embedded world's text. Give text of its own "
            "kind with --general FILE, or use --retention kl, which only compares predictions."
        )


@register
@dataclass(frozen=True)
class Kl(Retention):
    """The adapter regularised towards the base: KL(base ‖ adapter) on general texts."""

    name = "kl"
    rows: int
    weight: float

    @classmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        return cls(settings.general_rows, settings.kl)

    def describe(self) -> str:
        return f"KL to the base, weight {self.weight:g}, on {self.rows} general texts per step"

    @property
    def fewest(self) -> int:
        return min(FEWEST, self.rows)

    def reading(self, rows: int) -> Self:
        return replace(self, rows=rows)

    def loss(self, general: GeneralTexts, texts: Sequence[EncodedExample]) -> Tensor:
        return self.weight * general.kl(texts)


def choose_retention(
    settings: Training, texts: int, familiar: bool, batch: int, own: bool = False
) -> tuple[Retention, str]:
    """The method for a run, and the reason for it, which a description follows.

    ``texts`` is the number of general texts, 0 for a base without a language head. ``familiar``
    says whether they are of the kind that the base was trained on: the embedded base's, those that
    the user gave, or those that the base wrote itself (``own``). ``batch`` is the number of domain
    rows in a step.
    """
    if not texts:
        return NoRetention(monitored=False), ""
    name, why = settings.retention, ""
    if name == "auto" and own:
        name, why = AUTO[1], "chosen by auto for text that the base wrote itself; "
    elif name == "auto" and familiar:
        name, why = AUTO[0], "chosen by auto (see benchmarks/training/retention.py); "
    elif name == "auto":
        name, why = AUTO[1], (
            "chosen by auto, since replay would train this base on the embedded world's text "
            "(give your own with --general FILE); "
        )  # fmt: skip
    return METHODS[name].planned(settings, batch), why


# ── How often ───────────────────────────────────────────────────────────────────────────────────

GENERAL_COST = 0.4
"""The most that general text adds to the tokens of training on the rows alone."""
FEWEST = 2
"""Texts of a step that KL can do with: fewer of them in more steps keep more of what a base knows
than more in fewer (benchmarks/training/general.py)."""


def general_steps(
    base: Base, dataset: Dataset, texts: Sequence[EncodedExample], retention: Retention, steps: int
) -> tuple[Retention, int, str]:
    """``retention`` with as many of the general ``texts`` in a step as a run can afford, in every
    how many steps they are read, and the reason.

    As often as the ``fewest`` of them, and then as many, as add at most ``general_cost``
    (``GENERAL_COST``) to what the domain's own tokens cost, by their number alone and with the cost
    of one more pass (``PASS``). What all prompts of a pass begin with counts once. A token that is
    predicted also costs its logits, as many multiplications as the output layer has weights.
    """
    layers = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    tables = {id(p) for layer in layers if layer is not None for p in layer.parameters()}
    body = sum(p.numel() for p in base.model.parameters() if id(p) not in tables)
    logits = base.vocabulary * base.width / max(1, body)

    def cost(examples: Sequence[EncodedExample], predicted: float) -> float:
        return sum(len(one) + predicted * one.supervised for one in examples)

    own = [row.encoded for row in dataset.train]
    step = cost(own, 0.0 if dataset.domain.task.head else logits) / steps
    step -= _read_once(base, dataset, own, len(own) / steps)
    text, launch = cost(texts, logits) / len(texts), PASS[base.device.type == "cpu"]
    share = dataset.domain.training.general_cost
    if share is None:  # the embedded base's settings were measured without a limit
        share = math.inf if base.id == "embedded" else GENERAL_COST
    fewest = retention.fewest * text
    ratio = max(fewest / step, (fewest + launch) / (step + launch))
    every = max(1, math.ceil(ratio / share))
    room = every * share
    affordable = min(room * step, room * (step + launch) - launch) / text
    if affordable < retention.rows:
        retention = retention.reading(max(retention.fewest, math.floor(affordable)))
    reason = (
        f"general text in 1 of {every} steps: it adds "
        f"{100 * retention.rows * text / step / every:.0f} % to the tokens of a step (at most "
        f"{100 * share:.0f} %)"
    )
    return retention, every, reason if every > 1 else ""


def _read_once(base: Base, dataset: Dataset, own: Sequence[EncodedExample], rows: float) -> float:
    """Tokens that a step of ``rows`` saves, since a pass reads what prompts begin with once.

    On one process and an unsharded base: a run that is resumed on others has the same plan.
    """
    if dataset.domain.task.head or reads_whole_prompts(dataset.domain):
        return 0.0
    tokens = rows * sum(map(len, own)) / len(own)
    passes = max(1, math.ceil(tokens / MICRO_TOKENS[base.device.type == "cpu"]))
    return passes * saved_tokens(base.model, own, rows / passes, least_saved(base.model))
