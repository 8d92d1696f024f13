"""What a run prints: sizes and durations, stages, the table of epochs."""

import io
import os
from typing import Any

import pytest
from rich.console import Console

from lora_domains.console import Display, format_bytes, format_duration
from lora_domains.errors import UsageError

EPOCH = {
    "epoch": 1, "training_loss": 1.2, "validation_loss": 0.5, "accuracy": 0.75, "score": 0.4,
    "higher_is_better": True, "general_nats": 1.1, "general_kl": 0.1, "observation": "first epoch",
}  # fmt: skip


def shown(call: str, *arguments: Any, width: int | None = 80) -> list[str]:
    """The lines that a display prints in a terminal of this width, or (None) in a log."""
    text = io.StringIO()
    console = Console(file=text, width=width, force_terminal=width is not None, color_system=None)
    getattr(Display(console=console), call)(*arguments)
    return text.getvalue().splitlines()


def test_sizes_and_durations_have_fitting_units() -> None:
    assert [format_bytes(n) for n in (900, 2.5e6, 1.4e9)] == ["0.9 kB", "2.5 MB", "1.4 GB"]
    assert [format_duration(s) for s in (4.4, 59.6, 200, 7500)] == [
        "4 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"
    ]  # fmt: skip


def test_a_long_stage_continues_under_itself_in_a_terminal_and_is_one_line_in_a_log() -> None:
    words = " ".join(["chat [by] columns;"] * 12)
    (first, *rest) = shown("stage", "task", 240, 240, words)
    assert first.startswith("task             240 → 240  chat [by] columns;")
    assert rest
    assert all(line.startswith(" " * 28) and len(line) <= 80 for line in rest)
    assert " ".join([first[28:], *(line.strip() for line in rest)]) == words
    assert shown("stage", "task", 240, 240, words, width=None) == [first[:28] + words]
    assert shown("warn", words, width=None) == [f"Warning: {words}"]


@pytest.mark.parametrize("width", [60, 80])
def test_lines_are_continued_under_themselves_and_paths_stay_whole(width: int) -> None:
    path = "adapters/" + "a_very_long_name_of_an_adapter_" * 4
    first, *rest = shown("warn", "the best epoch gives all rows one label. " * 3, width=width)
    assert first.startswith("Warning: the best epoch")
    assert rest
    assert all(line.startswith(" " * 9) and len(line) <= width for line in rest)
    assert path in shown("line", f"Saved the adapter in the folder {path} of this project.")
    error = UsageError(
        where="--out", expected=f"a folder like {path}", found="none " * 30, hint="No."
    )
    lines = shown("failure", error, width=width)
    assert lines[0] == "UsageError --out"
    assert path in [line.strip() for line in lines]
    assert all(line.startswith(" " * 12) or line[2:10].strip() for line in lines[1:])
    assert lines[-1] == "  hint      No."
    logged = shown("failure", error, width=None)
    assert len(logged) == 4


def test_a_text_that_names_an_emoji_is_printed_as_it_is() -> None:
    text, words = io.StringIO(), "label :fire: of row :+1:"
    display = Display(console=Console(file=text, width=80))
    display.line(words)
    display.console.print(words)
    assert text.getvalue() == f"{words}\n{words}\n"


def test_a_warning_is_not_repeated_before_the_next_stage() -> None:
    text = io.StringIO()
    display = Display(console=Console(file=text, width=80, force_terminal=True, color_system=None))
    for stage in ("one", "two"):
        display.stage(stage, None, None, "begins")
        for _ in range(3):
            display.warn("no threshold.")
        display.warn("another.")
    assert text.getvalue().count("Warning: no threshold.") == 2
    assert text.getvalue().count("Warning: another.") == 2


def test_a_narrow_table_of_epochs_keeps_its_losses_and_its_score() -> None:
    head, figures, observation = shown("epoch", EPOCH, "macro_f1", width=60)
    assert head == "epoch  training loss  validation loss  macro F1     KL"
    assert len(head) == len(figures)
    assert observation == "       first epoch"
    head, figures, *_ = shown("epoch", EPOCH, "balanced_accuracy", width=80)
    assert len(head) <= 80
    assert "general nats" not in head
    assert "accuracy  balanced accuracy" in head


def test_a_log_is_as_wide_as_the_terminal_from_which_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def size(descriptor: int) -> os.terminal_size:
        if descriptor:
            raise OSError
        return os.terminal_size((72, 24))

    def no_terminal(_: int) -> os.terminal_size:
        raise OSError

    def width() -> int:
        return Display(console=Console(file=io.StringIO())).console.width

    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr("lora_domains.console.display.os.get_terminal_size", size)
    assert width() == 72
    for columns, taken in (("100", 100), ("20", 40), ("0", 72), ("wide", 72), ("", 72)):
        monkeypatch.setenv("COLUMNS", columns)
        assert width() == taken
    monkeypatch.setattr("lora_domains.console.display.os.get_terminal_size", no_terminal)
    assert width() == 80


def test_a_line_of_the_table_of_epochs_fits_80_columns() -> None:
    note = "614 tokens/s, 856.3 MB, 10 s left"
    head, figures, observation = shown("epoch", EPOCH, "macro_f1", note)
    assert head.endswith("accuracy  macro F1  general nats     KL")
    assert len(head) == len(figures) <= 80
    assert observation == f"       first epoch ({note})"
    head, figures = shown("epoch", EPOCH, "macro_f1", note, width=None)
    assert head.endswith("KL  observation")
    assert figures.endswith(f"0.100  first epoch ({note})")


def test_a_column_of_the_table_of_epochs_says_something_of_its_own() -> None:
    likelihoods = EPOCH | {"accuracy": None, "score": 0.5, "higher_is_better": False}
    del likelihoods["general_kl"], likelihoods["general_nats"]
    for metric in ("nats_per_token", "token_f1"):
        head, _ = shown("epoch", likelihoods, metric, width=None)
        assert head.split("  ") == ["epoch", "training loss", "validation loss", "observation"]
    head, _ = shown("epoch", EPOCH, "accuracy", width=None)
    assert head.count("accuracy") == 1
    head, figures = shown("epoch", likelihoods | {"score": 3.25}, "mae", width=None)
    assert head.split("  ")[3] == "absolute error"
    assert "3.250" in figures


def test_a_brief_display_shows_results_and_warnings_alone() -> None:
    text = io.StringIO()
    display = Display(brief=True, console=Console(file=text, width=80, force_terminal=True))
    display.title("triage")
    display.stage("read", 3, 3, "rows")
    display.note("Resuming at epoch 2.")
    display.pulse("3 of 9")
    display.epoch(EPOCH, "macro_f1")
    with display.progress("epoch 1", 9) as advance:
        advance(1)
    assert text.getvalue() == ""
    display.line("The report: report.html")
    display.warn("few rows")
    assert [line.split("\x1b")[0] or "Warning" for line in text.getvalue().splitlines()] == [
        "The report: report.html", "Warning",
    ]  # fmt: skip
