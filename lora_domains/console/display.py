"""What a run prints while it works: stages, progress, warnings, epochs.

In a terminal with colour and progress bars; elsewhere (a log, a pipe, CI) as plain lines.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lora_domains.report import terminal
from lora_domains.report.text import metric_name


class Advance(Protocol):
    """Advances a progress bar, with a note beside it."""

    def __call__(self, done: int, note: str = "", /) -> None: ...


class Display:
    """Prints progress; ``quiet`` prints nothing (other processes, tests).

    ``brief`` leaves out titles, stages and progress (``--quiet``): results and warnings stay.
    """

    def __init__(
        self, *, quiet: bool = False, brief: bool = False, console: Console | None = None
    ) -> None:
        self.quiet, self.brief = quiet, brief
        self.console = console or Console(highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            # A log has no width: wrapping at 80 would break lines in the middle of a figure.
            self.console = Console(
                file=self.console.file, highlight=False, quiet=quiet, width=160, no_color=True
            )
        self._epochs_shown = False
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
        text = f"{self._owner}: {text}" if self._owner else text
        self.console.print(escape(text), soft_wrap=not self.console.is_terminal)

    def note(self, text: str) -> None:
        """A line about how the work goes on."""
        if not self.brief:
            self.line(text)

    def pulse(self, text: str) -> None:
        """A line of progress for a log, where no bar is drawn."""
        if not self.console.is_terminal:
            self.note(text)

    def warn(self, text: str) -> None:
        text = f"{self._owner}: {text}" if self._owner else text
        text = f"[yellow]Warning:[/] {escape(text)}"
        self.console.print(text, soft_wrap=not self.console.is_terminal)

    def stage(self, name: str, rows_in: int | None, rows_out: int | None, what: str) -> None:
        """A stage of the data flow: its name, rows in → rows out, what it did."""
        if self.brief:
            return
        what = f"{self._owner}: {what}" if self._owner else what
        if rows_in is None and rows_out is None:
            flow = ""
        else:
            flow = f"{'' if rows_in is None else rows_in} → {'' if rows_out is None else rows_out}"
        head, lines = f"{name:<12}{flow:>14}  ", [what]
        if self.console.is_terminal:  # what does not fit is continued under itself
            room = max(20, self.console.width - len(head))
            lines = [line.plain.rstrip() for line in Text(what).wrap(self.console, room)]
        text = Text(head + f"\n{'':>{len(head)}}".join(lines))
        text.stylize("bold cyan", 0, len(name))
        self.console.print(text, soft_wrap=True)

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A bar that the yielded function advances; nothing where there is no terminal, or another
        bar for all runs."""
        hidden = self.quiet or self.brief or bool(self._owner)
        if hidden or not self.console.is_terminal or not total:
            yield lambda _done, _note="": None
            return
        bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        with bar:
            task = bar.add_task(what, total=total, note="")

            def advance(done: int, note: str = "", /) -> None:
                bar.update(task, advance=done, note=note)

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
        columns = _columns(record, metric_name(metric))
        if self._owner:
            columns.insert(0, ("", self._width, f"{self._owner:<{self._width}}"))
        head = "  ".join(f"{name:>{width}}" for name, width, _ in columns)
        line = "  ".join(f"{cell:>{width}}" for _, width, cell in columns)
        observation = record["observation"] + (f" ({note})" if note else "")
        # Where a narrow terminal would break the line, what the figures mean is below them.
        below = self.console.width < len(head) + OBSERVATION
        if not self._epochs_shown:
            self._epochs_shown = True
            self.console.print(f"[bold]{head}{'' if below else '  observation'}[/]")
        between = f"\n{'':>7}" if below else "  "
        self.console.print(f"{line}{between}{escape(observation)}")

    def answers(self, rows: Iterable[tuple[str, str, Mapping[str, str]]]) -> None:
        """Answers to some rows, a line of ``COLUMNS`` each: id, prompt, and each answer by name."""
        for name, prompt, by_name in rows:
            for label, text in ((name, prompt), *((f"  {who}", by_name[who]) for who in by_name)):
                line = Text(f"{label:<13} {' '.join(text.split())}")
                line.truncate(COLUMNS, overflow="ellipsis")
                self.console.print(line, soft_wrap=True, style="dim" if label == name else "")


COLUMNS = 80
"""Characters of a line that shows some text of a row."""
OBSERVATION = 60
"""Characters that the observation on an epoch may take."""


def _columns(record: Mapping[str, Any], score: str) -> list[tuple[str, int, str]]:
    """The table of epochs: (heading, width, cell) of each column that says something of its own.

    ``score`` is the name of the metric. Where answers are not generated every epoch, the score is
    the validation loss.
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
    return columns


def format_bytes(count: float) -> str:
    """``1.4 GB``; decimal units."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def quiet_imports() -> None:
    """Hide the notices that libraries print while they are imported, but not later ones."""
    # transformers' progress bar for reading weights only repeats our own stages.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"bitsandbytes\..*")
