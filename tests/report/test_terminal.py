"""The tables in a terminal."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from lora_domains.report import terminal
from lora_domains.report.card import AdapterEntry
from lora_domains.report.report import rebuild
from lora_domains.report.text import interval, points

FIELDS = {"base": 9.2, "adapter": 1.9, "difference": -11.58, "lower": -12.008, "upper": -11.16,
          "baselines": {"majority": 0.7, "tfidf": 0.03, "4_shot": 9.0}}  # fmt: skip


def test_labels_with_brackets_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.confusion(
        Console(),
        {"labels": ["[urgent]", "[/b]"], "adapter": [[3, 1], [0, 2]], "base": [[2, 2], [1, 1]]},
    )
    said = capsys.readouterr().out
    assert said.count("[urgent]") == 3
    assert said.count("[/b]") == 3


def test_a_table_of_scores_breaks_no_word_at_80_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("balanced_accuracy", "precision", "nats_per_token")
    terminal.validation(Console(width=80), dict.fromkeys(names, FIELDS), 40)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    starts = [line.split("  ")[0].strip() for line in lines[-5:]]
    assert starts == ["balanced", "accuracy", "precision", "nats per", "token"]


def test_a_confusion_that_is_too_wide_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["zufrieden", "unzufrieden", "unentschieden", "unbekannt"]
    counts = [[9, 2, 0, 0], [0, 9, 0, 0], [0, 0, 9, 3], [0, 0, 0, 9]]
    found = {"labels": labels, "adapter": counts, "base": counts}
    terminal.confusion(Console(width=200), found)
    assert "base: unbekannt" in capsys.readouterr().out
    terminal.confusion(Console(width=80), found)
    assert capsys.readouterr().out.splitlines() == [
        "Confusion of 4 classes, the most frequent mistakes:",
        "     3 × unentschieden predicted as unbekannt",
        "     2 × zufrieden predicted as unzufrieden",
    ]
    right = [[9 * (i == j) for j in range(4)] for i in range(4)]
    terminal.confusion(Console(width=80), found | {"adapter": right})
    shown = " ".join(capsys.readouterr().out.split())
    assert shown == "No row of any of the 4 classes was predicted as another class."


LONG_NAME = "befunde_aus_der_radiologie_und_der_notaufnahme_2024_endfassung"


def long_names(entry: AdapterEntry) -> None:
    """Give a card the names and baselines of a long-winded user."""
    entry.path = LONG_NAME
    for fields in entry.domain_scores.values():
        fields["baselines"] |= {"nearest": 0.4, "4_shot": 0.5, "frozen_features": 0.6}


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_every_line_of_a_card_fits_and_no_figure_is_broken(three: list[Path], width: int) -> None:
    for folder in three:
        entry = rebuild(folder).adapter
        long_names(entry)
        file = io.StringIO()
        terminal.evaluation(Console(file=file, width=width), entry)
        text = file.getvalue()
        # A word that is longer than the terminal is the only reason for a longer line.
        assert all(len(line) <= width for line in text.splitlines() if LONG_NAME not in line)
        assert all(line == line.rstrip() for line in text.splitlines())
        assert not re.search(r"\d *\n *%", text)
        for fields in entry.domain_scores.values():
            assert f"{fields['adapter']:.3f}" in text
            assert interval(fields) in text
        for suite, fields in entry.general.items():
            assert suite == "kl" or (interval if suite == "nats" else points)(fields) in text


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    parts = ["at 95 % confidence", "12.5 MB", "in 81 s", "4.2 GB,", "3 min", "1 B", "0.1 nats"]
    text = " ".join(["It is", *parts, "and 30 samples."])
    for width in range(20, 120):
        file = io.StringIO()
        terminal.line(Console(file=file, width=width), text, "> ")
        shown = file.getvalue()
        assert " ".join(shown.split()) == f"> {text}"
        assert max(map(len, shown.splitlines())) <= width
        for part in ("95 %", *parts[1:]):
            assert re.sub("[^0-9]*(.*)", r"\1", part) in shown, (width, part)
        broken_later = shown.replace("30\n  samples", "30 samples")
        assert not re.search(r"\d\n", broken_later)


def test_the_least_important_columns_are_left_out_first() -> None:
    def heads(width: int) -> str:
        file = io.StringIO()
        terminal.validation(Console(file=file, width=width), {"f1": FIELDS}, 40)
        return " ".join(file.getvalue().split())

    assert "Too narrow" not in heads(80)
    # 4 examples are the best baseline, so they stay the longest.
    assert heads(56).endswith("Too narrow for: the majority class, TF-IDF.")
    assert "examples" in heads(56)
    assert heads(40).endswith(
        "Too narrow for: difference (95 % bounds), the majority class, TF-IDF."
    )


def test_reasons_of_gates_go_below_their_names_where_a_column_would_be_narrow() -> None:
    why = "The adapter does not beat the baseline. " * 3
    gate = {"name": "memorisation", "verdict": "fail", "why": why}
    wide, narrow = io.StringIO(), io.StringIO()
    terminal.gates(Console(file=wide, width=100), [gate])
    terminal.gates(Console(file=narrow, width=60), [gate])
    assert "✘ fail  memorisation  The adapter" in wide.getvalue()
    lines = narrow.getvalue().splitlines()
    assert lines[2] == "✘ fail memorisation"
    assert all(line.startswith("  ") for line in lines[3:])


def test_long_names_of_two_adapters_become_letters() -> None:
    fields = FIELDS | {"n": 40, "won": 3, "lost": 1, "difference": 0.1, "lower": 0.0, "upper": 0.2}
    found = {"a": LONG_NAME, "b": "other", "metric": "f1", "scores": {"f1": fields},
             "general": None, "gates": [], "verdict": "pass"}  # fmt: skip
    file = io.StringIO()
    terminal.comparison(Console(file=file, width=80), found)
    text = file.getvalue()
    assert f"A: {LONG_NAME}\nB: other\n" in text
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_table_for_a_notebook_escapes_its_text() -> None:
    grid = terminal.Grid(["label", "rows", "why"])
    assert "<th" in grid.html()
    grid.add("<script>alert(1)</script>", "3", "Too few.")
    assert [side.split('"')[0] for side in grid.html().split("text-align:")[1:4]] == [
        "left", "right", "left"
    ]  # fmt: skip
    assert "<script>" not in grid.html()
    assert "&lt;script&gt;" in grid.html()
