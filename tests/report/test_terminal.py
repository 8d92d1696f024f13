"""The tables in a terminal."""

import pytest
from rich.console import Console

from lora_domains.report import terminal

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
