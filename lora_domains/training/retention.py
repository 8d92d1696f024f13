"""Retention methods: how a run preserves the base's general knowledge.

A class is a method: its settings, the general texts it reads in a step, the loss it adds on them,
and how epochs that drift from the base are ranked. ``register`` makes a method known by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import ClassVar, Self, TypeVar

import numpy as np
from torch import Tensor

from lora_domains.console import GENERAL, Clock, Display
from lora_domains.domain import RETENTION, Training
from lora_domains.inference.likelihoods import TextOutput, text_nats
from lora_domains.inference.reference import Prediction, Reference
from lora_domains.modeling.bank import Bank
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

    @classmethod
    def planned(cls, settings: Training, batch: int) -> Self:
        return cls()

    def describe(self) -> str:
        return "general knowledge is monitored but not preserved"

    def drift_limit(self, gates: Gates) -> float:
        return inf


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

    def loss(self, general: GeneralTexts, texts: Sequence[EncodedExample]) -> Tensor:
        return self.weight * general.kl(texts)


def choose_retention(
    settings: Training, texts: int, familiar: bool, batch: int, own: bool = False
) -> tuple[Retention, str]:
    """The method for a run, and the reason for the plan.

    ``texts`` is the number of general texts, 0 for a base without a language head. ``familiar``
    says whether they are of the kind that the base was trained on: the embedded base's, those that
    the user gave, or those that the base wrote itself (``own``). ``batch`` is the number of domain
    rows in a step.
    """
    if not texts:
        return NoRetention(), "retention none: the base has no language head to compare with"
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
    method = METHODS[name].planned(settings, batch)
    return method, f"retention {name}: {why}{method.describe()}"
