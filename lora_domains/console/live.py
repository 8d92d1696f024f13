"""Progress while it is made: a bar in a terminal or a notebook, with the losses of a run."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from lora_domains.console.clock import format_duration
from lora_domains.console.losses import Losses

Update = Callable[..., None]
"""Called with the number of items that are done, and with notes, the most important first."""
GAP = "  "


# ── In a terminal ───────────────────────────────────────────────────────────────────────────────


class Bar(Progress):
    """A bar, the notes that fit beside it, and the chart of ``losses`` below."""

    def __init__(self, console: Console, what: str, total: int, losses: Losses | None) -> None:
        self._losses = losses
        named = min(cell_len(what), console.width // 3)
        width = max(8, min(28, console.width - named - 40))
        used = 2 + named + 1 + width + 1 + 2 * len(str(total)) + 1 + 1
        super().__init__(
            TextColumn(
                "  {task.description}",
                table_column=Column(no_wrap=True, overflow="ellipsis", max_width=named + 2),
            ),
            BarColumn(bar_width=width),
            MofNCompleteColumn(),
            _Notes(console.width - used - 1),
            console=console,
            transient=True,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self._losses is not None:
            yield self._losses


class _Notes(ProgressColumn):
    """As many notes as fit into ``room``; without notes, the time left."""

    def __init__(self, room: int) -> None:
        super().__init__(table_column=Column(no_wrap=True))
        self.room = room

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        notes = task.fields["notes"] or (() if left is None else (f"{format_duration(left)} left",))
        shown = ""
        for note in notes:
            longer = f"{shown}{GAP if shown else ''}{note}"
            if cell_len(longer) > self.room:
                break
            shown = longer
        return Text(shown)


@contextmanager
def terminal_bar(
    console: Console, what: str, total: int, losses: Losses | None
) -> Iterator[Update]:
    """A bar that disappears at the end."""
    with Bar(console, what, total, losses) as bar:
        task = bar.add_task(what, total=total, notes=())

        def update(done: int, *notes: str) -> None:
            bar.update(task, completed=done, notes=notes)

        yield update


# ── In a notebook ───────────────────────────────────────────────────────────────────────────────

PAUSE = 0.25
"""Seconds between two updates of a notebook's page."""
STYLE = "font-family:sans-serif;font-size:13px;margin:4px 0"


class Notebook:
    """One place in the output of each cell, for its bar and the charts of its runs.

    It is updated in place, without widgets, and a saved notebook keeps the charts.
    """

    def __init__(self) -> None:
        self._cell: int | None = None
        self._handle: Any = None
        self._charts: list[Losses] = []
        self._shown = 0.0

    @contextmanager
    def bar(self, what: str, total: int, losses: Losses | None) -> Iterator[Update]:
        """A bar that disappears at the end; the chart of ``losses`` stays."""
        began = time.monotonic()
        self._open(losses)

        def update(done: int, *notes: str) -> None:
            now = time.monotonic()
            if now - self._shown < PAUSE:
                return
            self._shown = now
            if not notes and done:
                notes = (f"{format_duration((now - began) * (total - done) / done)} left",)
            words = escape(" · ".join((what, f"{done} of {total}", *notes)))
            bar = (
                f'<progress value="{done}" max="{total}" style="vertical-align:middle"></progress>'
            )
            self._show(f'<div style="{STYLE}">{bar} {words}</div>', f"{what}: {done} of {total}")

        update(0)
        try:
            yield update
        finally:
            self._show("", "")

    def _open(self, losses: Losses | None) -> None:
        from IPython import get_ipython

        cell = get_ipython().execution_count
        if cell != self._cell:
            self._cell, self._handle, self._charts = cell, None, []
        if losses is not None and losses not in self._charts:
            self._charts.append(losses)

    def _show(self, bar: str, text: str) -> None:
        from IPython.display import display

        charts = "".join(chart.svg() for chart in self._charts)
        page = {"text/html": f"{charts}{bar}", "text/plain": text}
        if self._handle is None:
            self._handle = display(page, raw=True, display_id=True)
        else:
            self._handle.update(page, raw=True)
