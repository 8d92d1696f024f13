"""What a run prints while it works: stages, progress, warnings, epochs.

In a terminal with colour, progress bars and a chart of the losses; in a notebook as plain text,
with bars and charts that are updated in place; elsewhere (a log, a pipe, CI) as plain lines.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.text import Text

from lora_domains.console.losses import Losses
from lora_domains.errors import LoraDomainsError
from lora_domains.report import terminal
from lora_domains.report.text import metric_name

if TYPE_CHECKING:
    from lora_domains.console.live import Notebook


class Advance(Protocol):
    """Advances a progress bar, with notes beside it, the most important first."""

    def __call__(self, done: int, /, *notes: str, loss: float | None = None) -> None: ...


class Display:
    """Prints progress; ``quiet`` prints nothing (other processes, tests).

    ``brief`` leaves out titles, stages and progress (``--quiet``): results and warnings stay.
    """

    def __init__(
        self, *, quiet: bool = False, brief: bool = False, console: Console | None = None
    ) -> None:
        self.quiet, self.brief = quiet, brief
        self.console = console or Console(highlight=False, emoji=False, quiet=quiet)
        self._notebook = _notebook() if self.console.is_jupyter else None
        self._wraps = self.console.is_terminal or self._notebook is not None
        if not self.console.is_terminal:
            self.console = Console(
                file=self.console.file, highlight=False, emoji=False, quiet=quiet, no_color=True,
                force_jupyter=False, force_terminal=False, color_system=None,
                width=NOTEBOOK if self._notebook else _width_of_a_log(),
            )  # fmt: skip
        self._losses: Losses | None = None
        self._epochs_shown = False
        self._warned: set[str] = set()
        self._owner, self._width = "", 0

    def of(self, name: str, width: int) -> "Display":
        """What one of several runs prints: its ``name`` comes first, in ``width`` characters."""
        display = copy(self)
        display._owner, display._width = name, width
        return display

    def title(self, text: str) -> None:
        if not self.brief:
            terminal.title(self.console, text)

    def line(self, text: str) -> None:
        """A line of a result."""
        self._print(self._owned(text))

    def note(self, text: str) -> None:
        """A line about how the work goes on."""
        if not self.brief:
            self.line(text)

    def pulse(self, text: str) -> None:
        """A line of progress for a log, where no bar is drawn."""
        if not self._wraps:
            self.note(text)

    def warn(self, text: str) -> None:
        """A warning, which is not repeated before the next stage."""
        if text not in self._warned:
            self._warned.add(text)
            self._print(self._owned(text), Text("Warning: ", "yellow"))

    def failure(self, error: LoraDomainsError) -> None:
        """An error, as a command ends with it."""
        name = Text(type(error).__name__, "bold red")
        self._print("", name.append(f" {error.where}" if error.where else "", "bold default"))
        for part in ("expected", "found", "hint"):
            self._print(getattr(error, part), f"  {part:<10}")

    def stage(self, name: str, rows_in: int | None, rows_out: int | None, what: str) -> None:
        """A stage of the data flow: its name, rows in → rows out, what it did."""
        self._warned.clear()
        if self.brief:
            return
        if rows_in is None and rows_out is None:
            flow = ""
        else:
            flow = f"{'' if rows_in is None else rows_in} → {'' if rows_out is None else rows_out}"
        wide = self.console.width >= WIDE
        head = Text(f"{name:<12}{flow:>14}  " if wide else f"{name:<12}{flow}{'  ' * bool(flow)}")
        head.stylize("bold cyan", 0, len(name))
        self._print(self._owned(what), head)

    def _owned(self, text: str) -> str:
        """``text`` after the name of its run, where there are several."""
        return f"{self._owner}: {text}" if self._owner else text

    def _print(self, text: str, head: Text | str = "") -> None:
        """``head`` and ``text``, continued under itself; a log has one line."""
        if self._wraps:
            terminal.line(self.console, text, head)
        else:
            self.console.print(Text.assemble(head, text), soft_wrap=True)

    @contextmanager
    def losses(self, epochs: float) -> Iterator[None]:
        """Inside, a run of ``epochs`` draws its losses under its bars."""
        self._losses, self._epochs_shown = Losses(epochs), False
        try:
            yield
        finally:
            self._losses = None

    @contextmanager
    def progress(self, what: str, total: int, *, epoch: float = 0) -> Iterator[Advance]:
        """A bar that the yielded function advances; nothing where nobody looks on, and for one of
        several runs.

        ``epoch`` is how many epochs of a run were done before these steps.
        """
        hidden = self.quiet or self.brief or bool(self._owner)
        if hidden or not self._wraps or not total:
            yield lambda _done, *_notes, **_loss: None
            return
        losses, done = self._losses, 0
        if self._notebook is not None:
            bar = self._notebook.bar(what, total, losses)
        else:
            from lora_domains.console.live import terminal_bar

            bar = terminal_bar(self.console, what, total, losses)
        with bar as update:

            def advance(steps: int, /, *notes: str, loss: float | None = None) -> None:
                nonlocal done
                done += steps
                if loss is not None and losses is not None:
                    losses.trained(epoch + done / total, loss)
                update(done, *(() if loss is None else (f"loss {loss:.4f}",)), *notes)

            yield advance

    def row_counts(self, counts: Mapping[str, int], splits: Mapping[str, int]) -> None:
        """The row counts: of each split, and of what was refused or cut."""
        rows = "  ".join(f"{name} {count}" for name, count in splits.items())
        self.stage("row counts", None, None, rows)
        parts = [f"{name.replace('_', ' ')} {count}" for name, count in counts.items()]
        self.stage("", None, None, "  ".join(parts))

    def epoch(self, record: Mapping[str, Any], metric: str, note: str = "") -> None:
        """A line of the table of epochs, with its heading the first time."""
        if self.brief:
            return
        if self._losses is not None:
            losses = record["validation_loss"], record["training_loss"]
            self._losses.validate(record["epoch"], *losses)
        room = self.console.width - (self._width + 2 if self._owner else 0)
        columns = _columns(record, metric_name(metric), room)
        if self._owner:
            columns.insert(0, ("", self._width, f"{self._owner:<{self._width}}"))
        head = "  ".join(f"{name:>{width}}" for name, width, _ in columns)
        line = "  ".join(f"{cell:>{width}}" for _, width, cell in columns)
        observation = record["observation"] + (f" ({note})" if note else "")
        # Where a narrow terminal would break the line, what the figures mean is below them.
        below = self._wraps and self.console.width < len(head) + OBSERVATION
        if not self._epochs_shown:
            self._epochs_shown = True
            heading = Text(head if below else f"{head}  observation", "bold")
            self.console.print(heading, soft_wrap=True)
        if below:
            self.console.print(Text(line), soft_wrap=True)
            terminal.line(self.console, observation, " " * 7)
        else:
            self._print(observation, f"{line}  ")

    def answers(self, rows: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
        """Answers to some rows, a line of ``COLUMNS`` each: id, prompt, and each answer by name."""
        for name, prompt, by_name in rows:
            for label, text in ((name, prompt), *((f"  {who}", by_name[who]) for who in by_name)):
                line = Text(f"{label:<13} {' '.join(text.split())}")
                line.truncate(min(COLUMNS, self.console.width), overflow="ellipsis")
                self.console.print(line, soft_wrap=True, style="dim" if label == name else "")


COLUMNS = 80
"""Characters of a line that shows some text of a row."""
OBSERVATION = 60
"""Characters that the observation on an epoch may take."""


NOTEBOOK, LOG, WIDE, NARROWEST = 100, 80, 72, 40
"""Characters of a line in a notebook, and in a log whose width nothing tells; how many a terminal
needs for a column of row counts, and the fewest that are taken for true."""


def _notebook() -> "Notebook":
    from lora_domains.console.live import Notebook

    return Notebook()


def given_columns() -> int:
    """The width in ``COLUMNS``; 0 without one."""
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() else 0


def _width_of_a_log() -> int:
    """The width for the tables of a log: COLUMNS, or that of the terminal around it (| less)."""
    if columns := given_columns():
        return max(NARROWEST, columns)
    for descriptor in (0, 1, 2):
        with suppress(OSError):
            return max(NARROWEST, os.get_terminal_size(descriptor).columns)
    return LOG


def _columns(record: Mapping[str, Any], score: str, room: int) -> list[tuple[str, int, str]]:
    """The table of epochs: (heading, width, cell) of each column that says something of its own.

    ``score`` is the name of the metric. Where answers are not generated every epoch, the score is
    the validation loss. What does not fit into ``room`` is left out, the least important first.
    """
    losses = "training_loss", "validation_loss"
    columns = [("epoch", 5, str(record["epoch"]))]
    columns += [(key.replace("_", " "), len(key), f"{record[key]:.4f}") for key in losses]
    if record["accuracy"] is not None and score != "accuracy":
        columns.append(("accuracy", 8, f"{record['accuracy']:.3f}"))
    if record["higher_is_better"] or record["score"] != record["validation_loss"]:
        columns.append((score, max(8, len(score)), f"{record['score']:.3f}"))
    if "general_kl" in record:
        columns.append(("general nats", 12, f"{record['general_nats']:.3f}"))
        columns.append(("KL", 5, f"{record['general_kl']:.3f}"))
    for spare in ("general nats", "accuracy", "KL", "training loss"):
        if sum(width + 2 for _, width, _ in columns) - 2 > room:
            columns = [column for column in columns if column[0] != spare]
    return columns


def format_bytes(count: float) -> str:
    """``1.4 GB``; decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
