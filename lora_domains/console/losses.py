"""The losses of a run as they come, drawn for a terminal or a notebook."""

import math
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions
from rich.text import Text

BINS = 120
"""Places along the epochs at which the training loss is averaged: the dots of the widest chart."""
ROWS = 4
"""Lines of a terminal."""
COLOURS = {"training": "cyan", "validation": "magenta"}
STROKES = {"training": "#4f8fdd", "validation": "#d9762b"}
"""Colours that are readable on a light and on a dark page."""
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""The bits of a braille character: left and right column, from the top."""
WIDTH, HEIGHT = 480, 110
"""Pixels of the chart in a notebook."""

FLOOR = 1e-4
"""The lowest loss that is drawn apart from others."""

Point = tuple[float, float]
"""A share of the run (0 to 1), and a loss."""


class Losses:
    """Training and validation loss of a run of ``epochs``, by the epochs that are done."""

    def __init__(self, epochs: float) -> None:
        self.epochs = epochs
        self._sums = [0.0] * BINS
        self._counts = [0] * BINS
        self._last: float | None = None
        self.validated: list[Point] = []

    def trained(self, epoch: float, loss: float) -> None:
        """Add the loss of a step; ``epoch`` is how many are done."""
        place = min(BINS - 1, int(self._share(epoch) * BINS))
        self._sums[place] += loss
        self._counts[place] += 1
        self._last = loss

    def validate(self, epoch: float, loss: float, training: float) -> None:
        """Add the loss on validation rows after ``epoch``, and ``training`` where a resumed run has
        not drawn the steps before."""
        since = self.validated[-1][0] if self.validated else 0.0
        if not any(self._counts[int(since * BINS) : int(self._share(epoch) * BINS)]):
            self.trained(epoch, training)
        self.validated.append((self._share(epoch), loss))

    def _share(self, epoch: float) -> float:
        return min(1.0, max(0.0, epoch / self.epochs))

    @property
    def training(self) -> list[Point]:
        """The mean training loss at each place where there is one."""
        return [
            ((place + 0.5) / BINS, total / count)
            for place, (total, count) in enumerate(zip(self._sums, self._counts, strict=True))
            if count
        ]

    @property
    def latest(self) -> dict[str, float]:
        """The last loss of each kind."""
        found = {} if self._last is None else {"training": self._last}
        return found | ({"validation": self.validated[-1][1]} if self.validated else {})

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest loss in the chart."""
        losses = [loss for _, loss in (*self.training, *self.validated)]
        return min(losses), max(losses)

    # ── In a terminal ───────────────────────────────────────────────────────────────────────────

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """A curve of braille dots for the training loss, a point for each validation loss."""
        if not self.training or options.ascii_only or console.height < 3 * ROWS:
            return
        low, high = self.span
        label = max(len(f"{value:.4f}") for value in (low, high))
        cells = max(10, min(BINS // 2, options.max_width - label - 4))
        marks = [f"{high:.4f}", *[""] * (ROWS - 2), f"{low:.4f}"]
        rows = [Text(f"  {mark:>{label}} ", "dim") for mark in marks]
        bits, points = self._dots(cells, low, high), self._points(cells, low, high)
        for number, row in enumerate(rows):
            for column in range(cells):
                if (column, number) in points:
                    row.append("●", COLOURS["validation"])
                else:
                    dots = bits.get((column, number), 0)
                    row.append(chr(0x2800 + dots) if dots else " ", COLOURS["training"])
            row.rstrip()
            yield row
        legend = Text(f"  {'':{label}} ")
        for (name, value), sign in zip(self.latest.items(), ("⠒⠒", "●"), strict=False):
            legend.append(f"{sign} ", COLOURS[name]).append(f"{name} loss {value:.4f}   ", "dim")
        legend.rstrip()
        yield legend

    def _dots(self, cells: int, low: float, high: float) -> dict[tuple[int, int], int]:
        """The braille dots of the training loss by (column, row) of their cell."""
        bits: dict[tuple[int, int], int] = {}
        places = [
            (min(2 * cells - 1, int(share * 2 * cells)), _down(loss, low, high, 4 * ROWS))
            for share, loss in self.training
        ]
        for (left, before), (right, down) in zip(places[:1] + places, places, strict=False):
            above = before
            for across in range(left, right + 1):
                here = round(before + (down - before) * (across - left) / max(right - left, 1))
                # A steep fall has no gaps: its dots begin at the one before.
                for dot in range(min(above, here), max(above, here) + 1):
                    cell = across // 2, dot // 4
                    bits[cell] = bits.get(cell, 0) | DOTS[across % 2][dot % 4]
                above = here
        return bits

    def _points(self, cells: int, low: float, high: float) -> set[tuple[int, int]]:
        """The cells of the validation losses."""
        return {
            (min(cells - 1, int(share * cells)), _down(loss, low, high, ROWS))
            for share, loss in self.validated
        }

    # ── In a notebook ───────────────────────────────────────────────────────────────────────────

    def svg(self) -> str:
        """The chart as SVG, whose text has the colour of the page; empty before the first step."""
        if not self.training:
            return ""
        low, high = self.span

        def at(point: Point) -> tuple[float, float]:
            down = _share_below(point[1], low, high)
            return 60 + point[0] * (WIDTH - 70), 8 + down * (HEIGHT - 34)

        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, self.training))
        points = "".join(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{STROKES["validation"]}"/>'
            for x, y in map(at, self.validated)
        )
        labels = "".join(
            f'<text x="54" y="{y}" text-anchor="end">{value:.4f}</text>'
            for value, y in ((high, 12), (low, HEIGHT - 22))
        )
        legend = "".join(
            f'<tspan fill="{STROKES[name]}">●</tspan> {name} loss {value:.4f}\u2003'
            for name, value in self.latest.items()
        )
        return (
            f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'style="max-width:100%;font:11px sans-serif;display:block" fill="currentColor" '
            'aria-label="Training and validation loss by epoch">'
            f'{labels}<polyline points="{line}" fill="none" stroke="{STROKES["training"]}" '
            f'stroke-width="1.6"/>{points}<text x="60" y="{HEIGHT - 5}">{legend}</text></svg>'
        )


def _down(loss: float, low: float, high: float, steps: int) -> int:
    """The place of a loss from the top, of ``steps``."""
    return min(steps - 1, int(_share_below(loss, low, high) * steps))


def _share_below(loss: float, low: float, high: float) -> float:
    """Where a loss is between ``high`` (0) and ``low`` (1), by its logarithm.

    Losses fall by orders of magnitude at first, and later by a few percent.
    """
    top, bottom, here = (math.log(max(value, FLOOR)) for value in (high, low, loss))
    return (top - here) / (top - bottom) if top > bottom else 1.0
