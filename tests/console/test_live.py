"""Progress while it is made: the bar, its notes, and the chart of the losses."""

import io
import math

import pytest
from rich.console import Console

from lora_domains.console import Display
from lora_domains.console.losses import ROWS, Losses

EPOCH = {
    "epoch": 1, "training_loss": 0.9, "validation_loss": 0.6, "accuracy": None, "score": 0.6,
    "higher_is_better": False, "observation": "first epoch",
}  # fmt: skip


def terminal(width: int = 80, **options: object) -> tuple[Display, io.StringIO]:
    """A display in a terminal without colours, and what is written to it."""
    file = io.StringIO()
    settings = {"width": width, "height": 30, "force_terminal": True, "color_system": None}
    return Display(console=Console(file=file, **settings | options)), file  # type: ignore[arg-type]


def frames(display: Display, file: io.StringIO, steps: int = 40) -> list[str]:
    """The lines of the last frame before the bar is erased."""
    with (
        display.losses(2),
        display.progress("epoch 1 of 2", steps) as advance,
    ):
        for step in range(steps):
            advance(1, "46 s left", "3,101 tokens/s", "837.6 MB", loss=2 * math.exp(-step / 9))
        display.epoch(EPOCH, "loss")
        advance(0, "46 s left", "3,101 tokens/s", "837.6 MB", loss=0.1)
    lines = file.getvalue().replace("\r", "\n").split("\n")
    last = max(at for at, line in enumerate(lines) if "epoch 1 of 2" in line)
    return lines[last : last + ROWS + 2]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_shows_step_loss_and_time_left_and_more_where_there_is_room(width: int) -> None:
    bar, *chart = frames(*terminal(width))
    assert "40/40 loss 0.1000  46 s left" in bar
    assert ("tokens/s" in bar) == ("MB" in bar) == (width == 120)
    assert len(bar.split("\x1b")[0].rstrip()) <= width
    assert all(len(line.split("\x1b")[0]) <= width for line in chart)


def test_the_losses_are_drawn_under_the_bar() -> None:
    _, *rows, legend = frames(*terminal())
    assert len(rows) == ROWS
    assert "2.0000" in rows[0]
    # The first of two epochs: the curve falls from the left to the middle of the chart.
    curve = [[at for at, sign in enumerate(row) if "\u2800" < sign <= "\u28ff"] for row in rows]
    assert curve[0][0] < curve[-1][-1] <= 45
    assert max(at for row in rows for at, sign in enumerate(row) if sign == "●") <= 45
    assert "training loss 0.1000" in legend
    assert "validation loss 0.6000" in legend


def test_nothing_of_it_is_in_a_log() -> None:
    file = io.StringIO()
    display = Display(console=Console(file=file))
    with display.losses(2), display.progress("epoch 1 of 2", 2) as advance:
        advance(1, "46 s left", loss=2.0)
    assert file.getvalue() == ""


def test_a_terminal_that_cannot_draw_dots_has_no_chart() -> None:
    losses = Losses(1)
    losses.trained(0.5, 1.0)
    console = Console(file=io.StringIO(), width=80, height=30)
    assert list(losses.__rich_console__(console, console.options))
    ascii_only = console.options.copy()
    ascii_only.encoding = "ascii"
    assert not list(losses.__rich_console__(console, ascii_only))


def test_a_resumed_run_begins_with_the_epochs_before() -> None:
    losses = Losses(4)
    losses.validate(1, 0.6, training=0.9)
    losses.trained(1.5, 0.4)
    losses.validate(2, 0.5, training=0.7)
    assert [loss for _, loss in losses.training] == [0.9, 0.4]
    assert [loss for _, loss in losses.validated] == [0.6, 0.5]


def test_losses_of_one_value_or_zero_are_drawn() -> None:
    console = Console(file=io.StringIO(), width=80, height=30)
    for values in ([0.0], [0.5, 0.5], [0.0, 3.0]):
        losses = Losses(1)
        for at, value in enumerate(values):
            losses.trained(at / 3, value)
        assert len(list(losses.__rich_console__(console, console.options))) == ROWS + 1
        assert "polyline" in losses.svg()
