"""The estimate of a dry run: parts of every phase are computed, timed and discarded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial

from lora_domains.console import (
    EVALUATION,
    GENERAL,
    HEAD,
    STEPS,
    VALIDATION,
    Clock,
    Display,
    estimated_phases,
    format_bytes,
    format_duration,
    phases_in_words,
    spread,
)
from lora_domains.inference.batches import padded_tokens
from lora_domains.inference.memory import peak_memory
from lora_domains.inference.reference import Pairs
from lora_domains.modeling.batching import epoch_batches
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.loop import Run

QUIET = Display(quiet=True)
"""What the parts that are timed print to."""
BELOW = "below"
"""The part of the steps in which layers below the adapter read each row, once."""
SAMPLE = 32
"""General texts that stand for all of them in the steps of a dry run."""
Rows = list[EncodedExample]


@dataclass(frozen=True)
class Estimate:
    """What a run would take on this machine in its present state."""

    phases: dict[str, float]
    """Seconds of each phase, if no epoch is left out."""
    peak_bytes: int
    """Measured on the batch with the most padded tokens."""
    micro: int | None
    """Padded tokens of a pass, where memory ran out."""

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    def in_words(self) -> str:
        limit = f", at most {self.micro} tokens in one pass" if self.micro else ""
        return (
            f"about {format_duration(self.seconds)} ({phases_in_words(self.phases)}), "
            f"{format_bytes(self.peak_bytes)} of memory at most{limit}; measured on parts of it"
        )


def total_in_words(estimates: Sequence[Estimate]) -> str:
    """What several runs take one after another."""
    seconds = format_duration(sum(one.seconds for one in estimates))
    memory = format_bytes(max(one.peak_bytes for one in estimates))
    return (
        f"about {seconds} one after another, {memory} of memory at most; "
        "less time where they share passes"
    )


def estimate(
    run: Run, evaluation: Callable[[str], float] | None = None, writing: float = 0.0
) -> Estimate:
    """Measure memory on the largest batch, and the time of each phase on a part of it.

    ``evaluation`` gives the seconds of evaluating an adapter of the bank by its name; ``writing``
    are those that the base will take to write general text. Nothing is kept: the adapter of ``run``
    leaves the bank, and the random state is restored.
    """
    with run.isolated():
        estimated = _training(run)
        if writing:
            estimated.phases[GENERAL] = estimated.phases.get(GENERAL, 0.0) + writing
        if evaluation is not None:
            estimated.phases[EVALUATION] = evaluation(run.adapter_name)
    run.optimizer.zero_grad(set_to_none=True)
    return estimated


def _training(run: Run) -> Estimate:
    texts = run.general.texts
    run.general.texts = spread(texts, SAMPLE)  # the base reads all of them in a phase of its own
    # What it makes of a part is for no other run.
    run.general.public = run.validation.public = False
    lengths = [len(row) for row in run.train]
    epoch = epoch_batches(lengths, run.plan.batch_size, run.domain.training.seed, 0, run.classes)
    batches = sorted(([run.train[i] for i in batch] for batch in epoch), key=_padded)
    run.gradients.announce_memory()
    compared = [*run.train, *run.validation.rows]
    if (pairs := run.gradients.pairs) is not None:
        # What the base makes of pairs of answers matters for no time.
        pairs.shares = False
        pairs.margins = dict.fromkeys((row.id for row in compared), 0.0)
        run.validation.pairs = pairs
    _steps(run, batches[-1:], Clock({}), run.gradients.texts())
    peak = peak_memory(run.model.device)

    # The head was prepared when the run was made.
    phases = {HEAD: run.state.phases.get(HEAD, 0.0)}
    phases |= dict.fromkeys((STEPS, BELOW, GENERAL, VALIDATION), 0.0)
    times = {STEPS: run.plan.passes, VALIDATION: run.plan.validations(run.plan.steps)}

    def add(found: dict[str, float]) -> None:
        # The base reads general text once, and so do layers below the adapter all rows.
        for name, seconds in found.items():
            phases[name] += times.get(name, 1) * seconds

    def size(texts: Sequence[EncodedExample]) -> int:
        return padded_tokens(run.model, texts)

    def tokens(part: Sequence[Rows]) -> int:
        return sum(map(_padded, part))

    every = run.gradients.general_every
    general = [run.gradients.texts_of(step) for step in range(0, len(batches), every)]
    # A step says what others take: it is no cheaper beside them, as rows of one pass are.
    for work, parts in ((_steps, batches), (_general_steps, [rows for rows in general if rows])):
        add(estimated_phases(parts, partial(work, run), tokens, first=1))
    if "reference" in vars(run.general):  # the steps have read it
        add(estimated_phases(texts, partial(_read, run), size))
    if pairs is not None:
        add(estimated_phases(compared, partial(_compare, pairs), size))
    add(estimated_phases(run.validation.rows, partial(_figures, run), size))
    if run.validation.monitored:
        add(estimated_phases(run.validation.monitored, partial(_drift, run), size))
    phases[STEPS] += phases.pop(BELOW)
    spent = {name: seconds for name, seconds in phases.items() if seconds}
    return Estimate(spent, peak, run.state.micro)


def _padded(rows: Rows) -> int:
    """Tokens of a batch, padded to its longest row."""
    return len(rows) * max(map(len, rows))


@contextmanager
def _read_below(run: Run, rows: Rows, general: Rows, clock: Clock) -> Iterator[None]:
    """Inside, layers below the adapter have read ``rows`` and ``general`` texts, as before the
    first step of a run."""
    gradients, shown = run.gradients, run.gradients.display
    gradients.display = QUIET
    with clock.phase(BELOW):
        gradients.read_below(rows, run.plan.passes, general)
    gradients.display = shown
    try:
        yield
    finally:
        gradients.close()
        run.state.read_below = None


def _steps(run: Run, batches: Sequence[Rows], clock: Clock, texts: Rows | None = None) -> None:
    every = [row for rows in batches for row in rows]
    with _read_below(run, every, texts or [], clock), clock.phase(STEPS):
        for rows in batches:
            float(run.gradients.compute(rows, run.gradients.units(rows), texts or []))


def _general_steps(run: Run, texts: Sequence[Rows], clock: Clock) -> None:
    every = [row for rows in texts for row in rows]
    with _read_below(run, [], every, clock), clock.phase(STEPS):
        for rows in texts:
            float(run.gradients.compute([], 1, rows))


def _read(run: Run, texts: Rows, clock: Clock) -> None:
    general = copy(run.general)
    vars(general).pop("reference")
    general.texts, general.clock, general.display = texts, clock, QUIET
    _ = general.reference


def _compare(pairs: Pairs, rows: Rows, clock: Clock) -> None:
    with clock.phase(GENERAL):
        copy(pairs).read(rows)


def _figures(run: Run, rows: Rows, clock: Clock) -> None:
    part = copy(run.validation)
    part.rows, part.display = rows, QUIET
    with clock.phase(VALIDATION):
        part.figures()


def _drift(run: Run, texts: Rows, clock: Clock) -> None:
    part = copy(run.validation)
    vars(part).pop("reference", None)
    part.monitored, part.clock, part.display = texts, clock, QUIET
    with clock.phase(VALIDATION):
        part.drift()
