"""Suites of general-knowledge probes, which no adapter is trained on. Imports no torch.

A suite is a name, a few probes (questions and the task that reads them) and general text on which
drift and nats are measured. ``load_suite`` takes the name of one, or a file; ``default_suite`` is
what a base is asked where none is named.
"""

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_domains.data.readers import read
from lora_domains.data.source import Source
from lora_domains.errors import LoraDomainsError, UsageError, did_you_mean
from lora_domains.probes.general_text import embedded_texts
from lora_domains.schema import load_declaration
from lora_domains.tasks import Example, MultipleChoice, Row, Task

if TYPE_CHECKING:
    from lora_domains.inference.scores import Score
    from lora_domains.modeling.bank import Bank
    from lora_domains.modeling.base import Base

Rows = Callable[[], Sequence[Mapping[str, Any]]]
QUICK = 700
"""Questions of the quick suite: with 8 % of the items flipping, a harmless adapter passes a 3-point
gate in at least 80 % of runs at this size (``benchmarks/verdict/simulation.py``)."""

JOINED = "+"
"""Between the names of suites that are scored together."""
STANDARD = 1400
"""Questions of the standard suite by default: twice those of the quick one, since they are harder
and more answers flip."""
CPU_WORK = 3e13
"""Floating-point operations by which base and adapter may answer a suite on a CPU by default: five
minutes at 100 GFLOP/s."""
FEWEST = 300
"""Questions of a suite by default, at the least."""


def _unchanged(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return row


def _no_texts() -> list[str]:
    return []


@dataclass(frozen=True)
class Probe:
    """Questions of one kind: rows, the task that reads them, and a pure function of each row."""

    name: str
    task: Task
    rows: Source | Rows
    reads: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _unchanged
    """Makes the columns of the task from those of a row."""
    part: str = ""
    """The column that names the part of the probe a question belongs to."""
    shown: Source | None = None
    """Answered rows, ``shots`` of which precede every question; never questions themselves."""
    shots: int = 0
    score: "Score | None" = None
    """Scores the questions in place of ``model_scores``; None where the task does."""
    own_form: bool = False
    """Whether they are asked in the base's own form, in its whole context: through its chat
    template where the task leaves that open and the base was trained on chats."""

    def examples(self) -> list[tuple[str, Example]]:
        """(part, example) of every question; raises DataError for an unusable row."""
        before = self._shots_text()
        examples = []
        for row in self._read(self.rows):
            part = f"{self.name}/{row.values[self.part]}" if self.part else self.name
            example = self.task.example(row)
            examples.append((part, replace(example, prompt=before + example.prompt)))
        return examples

    def _shots_text(self) -> str:
        """The answered rows before every question, as text."""
        if not self.shots or self.shown is None:
            return ""
        answered = [self.task.example(row) for row in self._read(self.shown)[: self.shots]]
        return "".join(f"{example.prompt}{example.answer}\n\n" for example in answered)

    def _read(self, source: Source | Rows) -> list[Row]:
        if callable(source):
            rows = [
                Row(values, self.name, number, f"suite {self.name}, question {number}")
                for number, values in enumerate(source())
            ]
        else:
            rows = [replace(row, split=self.name) for row in read(source, self.name)]
        return [replace(row, values=self.reads(row.values)) for row in rows]


@dataclass(frozen=True)
class Suite:
    """Probes and general text, both read when they are needed."""

    name: str
    probes: tuple[Probe, ...]
    text: Callable[[], Sequence[str]] = _no_texts
    """Held-out general text on which drift and nats are measured."""
    limit: int | None = None
    """Questions at most, over all probes."""
    seed: int = 0
    """Seed of the sample that ``limit`` takes: the same questions for every adapter."""
    given: bool = False
    """Whether the questions are those of a user's file, which others may take the place of."""
    parts: tuple["Suite", ...] = ()
    """The suites that this one joins, each with its own limit; their probes are its probes."""
    tokens: int = 100
    """What a question costs, about: its tokens, and thrice those generated."""
    _questions: list[tuple[Probe, str, Example]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    _all: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _content: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def questions(self) -> list[tuple[Probe, str, Example]]:
        """(probe, part, example) of every question, in a fixed order.

        With a ``limit`` each probe keeps its share, drawn by ``seed``.
        """
        if not self._questions:
            questions = [question for suite in self.parts for question in suite.questions()]
            if not self.parts:
                questions = [(p, part, e) for p in self.probes for part, e in p.examples()]
            if self.given:
                texts = [(e.prompt, e.choices, e.answer) for _, _, e in questions]
                self._content.append(sha256(json.dumps(texts).encode()).hexdigest())
            # Parts may have samples of their own.
            self._all.append(sum(suite._all[0] for suite in self.parts) or len(questions))
            if self.limit is not None and len(questions) > self.limit:
                draw = random.Random(f"{self.name}/{self.seed}")
                questions = [questions[i] for i in _sample(questions, self.limit, draw)]
            self._questions.extend(questions)
        return self._questions

    def content(self) -> list[str]:
        """sha256 over all questions of a user's files, one of each; they are read for it."""
        self.questions()
        return [*self._content, *(one for suite in self.parts for one in suite.content())]

    def describe(self) -> str:
        """``facts (300 of 1,319 questions), instructions (all 1,180)``."""
        if self.parts and self.limit is None:
            return ", ".join(suite.describe() for suite in self.parts)
        count = len(self.questions())
        (every,) = self._all or [0]
        return f"{self.name} ({f'{count:,} of' if count < every else 'all'} {every:,} questions)"

    def by_probe(self) -> list[tuple[Probe, list[tuple[str, Example]]]]:
        """The (part, example) pairs of ``questions``, in order, by their probe."""
        questions = self.questions()
        return [
            (probe, [(part, example) for p, part, example in questions if p is probe])
            for probe in self.probes
        ]

    def texts(self) -> list[Example]:
        """The general text, as language-modelling examples."""
        place = f"suite {self.name}"
        return [
            Example(f"{self.name}-text:{number}", "", text, place=place)
            for number, text in enumerate(self.text())
        ]


def _sample(
    questions: Sequence[tuple[Probe, str, Example]], limit: int, draw: random.Random
) -> list[int]:
    """Positions of ``limit`` questions in order, of each probe as many as its share."""
    by_probe: dict[str, list[int]] = {}
    for i, (probe, _, _) in enumerate(questions):
        by_probe.setdefault(probe.name, []).append(i)
    # Each share rounded down, then one more of each probe in turn until the limit.
    picked, spare = [], []
    for places in by_probe.values():
        draw.shuffle(places)
        share = limit * len(places) // len(questions)
        picked += places[:share]
        spare += places[share : share + 1]
    return sorted(picked + spare[: limit - len(picked)])


# ── By name ─────────────────────────────────────────────────────────────────────────────────────


def embedded() -> Suite:
    """The questions and general text of the embedded world, for any base."""
    from lora_domains.embedded.world import general_questions

    task = MultipleChoice(prompt="{question}")
    return Suite(
        name="embedded",
        probes=(Probe("embedded", task, general_questions, part="field"),),
        text=lambda: embedded_texts("test"),
    )


def quick() -> Suite:
    """The embedded suite, with as many questions as a verdict needs."""
    return replace(embedded(), name="quick", limit=QUICK)


def facts() -> Suite:
    """The facts of the embedded world as plain questions, for bases that were not trained on it.

    They are asked as ``Question: …``, and an answer is ranked by its likelihood per token, on chat
    bases too: of 120 questions SmolLM2-135M-Instruct answers 76 in this form and 37 through its
    template with the candidates in the prompt, which is near chance.
    """
    from lora_domains.embedded.world import general_questions

    task = MultipleChoice(per_token=True, chat=False)
    rows = partial(general_questions, plain=True)
    probe = Probe("facts", task, rows, part="field", own_form=True)
    return Suite("facts", (probe,), lambda: embedded_texts("test"), tokens=75)


def joined(suites: Sequence[Suite]) -> Suite:
    """The questions of all ``suites``, and the general text of the first that has some."""
    if len(suites) == 1:
        return suites[0]

    def text() -> Sequence[str]:
        return next((texts for suite in suites if (texts := suite.text())), [])

    probes = tuple(probe for suite in suites for probe in suite.probes)
    return Suite(JOINED.join(suite.name for suite in suites), probes, text, parts=tuple(suites))


def load_suite(name: str | Path, limit: int | None = None, seed: int = 0) -> Suite:
    """A suite by name, or from a file; at most ``limit`` of its questions, drawn by ``seed``.

    ``facts+instructions`` names several. ``harness:arc_easy,hellaswag`` names tasks of
    lm-evaluation-harness. A ``.py`` file declares ``suite = Suite(…)``; a file of rows is one probe
    with the columns ``question``, ``choices`` and ``answer``. Raises UsageError for an unknown
    name, DomainError for a ``.py`` file without a suite, DataError for unusable rows.
    """
    names = [name] if Path(name).exists() else str(name).split(JOINED)
    suite = joined([_named(one) for one in names])
    if limit is not None:
        suite = replace(suite, limit=min(limit, suite.limit or limit), seed=seed)
    return suite


def _named(name: str | Path) -> Suite:
    from lora_domains.probes import standard
    from lora_domains.probes.instructions import instruction_suite

    known: dict[str, Callable[[], Suite]] = {
        "facts": facts, "instructions": instruction_suite, "embedded": embedded, "quick": quick,
        "standard": standard.to_be_had, **standard.SINGLE,
    }  # fmt: skip
    if str(name) in known:
        return known[str(name)]()
    if str(name).startswith("harness:"):
        from lora_domains.probes.lm_eval import harness_suite

        return harness_suite(str(name).removeprefix("harness:").split(","))
    if Path(name).suffix == ".py":
        return replace(load_declaration(name, "suite", Suite), given=True)
    if Path(name).suffix:
        probe = Probe(Path(name).stem, MultipleChoice(), str(name))
        return Suite(probe.name, (probe,), given=True)
    raise UsageError(
        expected="a suite by name, a .py file that declares one, or a file of questions",
        found=repr(str(name)),
        hint=did_you_mean(str(name), known),
    )


# ── By default ──────────────────────────────────────────────────────────────────────────────────


def asked(bank: "Bank", suite: Suite | str | None, adapter: str = "") -> Suite:
    """``suite``; by default that of the last evaluation of ``adapter``, or what suits the base."""
    if suite is None:
        card = bank[adapter].card if adapter in bank else None
        return default_suite(bank.base, card.adapter.judged.get("suite") if card else None)
    return load_suite(suite) if isinstance(suite, str) else suite


def default_suite(base: "Base", before: str | None = None) -> Suite:
    """What ``base`` is asked where no suite is named, as many questions as its device can answer.

    An adapter that was evaluated ``before`` keeps the suite of that name, where it can be loaded.
    Otherwise the embedded base is asked of its world, and any other one the standard questions
    where some are at hand, else facts; a base that was trained on chats is given instructions too.
    """
    suite = embedded()
    if base.id != "embedded" and not base.bidirectional:
        names = ["instructions"] if base.chats else []
        suite = joined([_questions_at_hand(base), *(_sized(name, base) for name in names)])
    if before in (None, suite.name):
        return suite
    try:
        return joined([_sized(name, base) for name in str(before).split(JOINED)])
    except LoraDomainsError:  # a file, which the card does not name
        return suite


def _questions_at_hand(base: "Base") -> Suite:
    from lora_domains.probes.standard import at_hand

    plain, suite = _sized("facts", base), at_hand()
    if suite is None:
        return plain
    suite = affordable(replace(suite, limit=STANDARD), base)
    try:
        return suite if suite.questions() and suite.texts() else plain
    except LoraDomainsError:  # the Hub answers, and some data set is not to be had all the same
        return plain


def _sized(name: str, base: "Base") -> Suite:
    """The suite of this name; of one that is asked by default, as many questions as by default."""
    suite = _named(name)
    if name not in ("facts", "instructions", "standard"):
        return suite
    return affordable(replace(suite, limit=STANDARD) if name == "standard" else suite, base)


def affordable(suite: Suite, base: "Base") -> Suite:
    """``suite``, on a CPU with a sample that ``CPU_WORK`` suffices for, of ``FEWEST`` at least.

    It depends on the size of the base alone, so that a later evaluation asks the same questions.
    """
    if base.device.type != "cpu":
        return suite
    # Of base and adapter.
    most = max(FEWEST, int(CPU_WORK / (2 * operations(base) * suite.tokens)))
    return replace(suite, limit=min(most, suite.limit or most))


def operations(base: "Base") -> int:
    """Floating-point operations for a token, about: two for each parameter."""
    parameters: int = sum(parameter.numel() for parameter in base.model.parameters())
    return 2 * parameters
