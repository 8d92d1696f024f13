"""``lora-domains init``: a recipe from a file, which runs to a verdict."""

import io
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import run
from support.hospital import SECRET, table, visits

from lora_domains.cli import machine
from lora_domains.domain import load_domain
from lora_domains.report.card import Card
from lora_domains.tasks import Classification, Task
from lora_domains.verdict.gates import Gates

ROWS = [row | {"text": f"{row['text']} {n}"} for n, row in enumerate(make_rows(90))]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without bases, on a machine without any."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "bases_at_hand", dict)
    return tmp_path


def written(rows: list[dict[str, Any]], name: str = "rows") -> str:
    Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{name}.jsonl"


def turns(row: dict[str, Any], answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": answer}]


KINDS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "labels": ([{"note": r["text"], "mood": r["label"]} for r in ROWS], "classification"),
    "several labels": (
        [{"note": r["text"], "parts": ["pump"] * (n % 2) + ["valve"] * (n % 3 == 0)}
         for n, r in enumerate(ROWS)], "multi_label",
    ),
    "numbers": ([{"note": r["text"], "price": n / 7} for n, r in enumerate(ROWS)], "number"),
    "answers": (
        [{"asked": r["text"], "said": f"it is {r['text']} indeed"} for r in ROWS], "generation",
    ),
    "messages": ([{"dialog": turns(r, r["label"])} for r in ROWS], "chat"),
    "Alpaca": (
        [{"instruction": "Label it.", "input": r["text"], "output": r["label"]} for r in ROWS],
        "chat",
    ),
    "preferences": (
        [{"prompt": r["text"], "chosen": r["label"], "rejected": "no idea"} for r in ROWS],
        "preference",
    ),
}  # fmt: skip
COMMON = ("labels", "messages")
"""Tried at each change; the others in ``make test-all``."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        pytest.param(*of, id=name, marks=[] if name in COMMON else pytest.mark.long)
        for name, of in KINDS.items()
    ],
)
def test_the_recipe_runs_to_a_verdict(
    rows: list[dict[str, Any]], kind: str, tiny_base: Path, small_suite: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert run("init", written(rows)) == 0
    text = Path("rows.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 40
    assert max(map(len, text.splitlines())) <= 100
    assert not any(row["text"] in text for row in ROWS)
    assert load_domain("rows.py").task.kind == kind
    flags = ("--base", str(tiny_base), "--max-steps", "2", "--retention", "none")
    monkeypatch.setattr(sys, "argv", ["rows.py", *flags])
    runpy.run_path("rows.py", run_name="__main__")
    assert Card.read(Path("adapters/rows")).adapter.verdict is not None


def test_the_recipe_of_a_hospital(capsys: pytest.CaptureFixture[str]) -> None:
    rows = visits()
    rows[3]["Notiz"] = rows[7]["Dringlich"] = ""
    rows[8]["Dringlich"] = "Nein"
    table(Path("visits.csv"), rows)
    assert run("init", "visits.csv") == 0
    domain = load_domain("visits.py")
    assert domain.task == Classification("Notiz", "Dringlich", positive="ja")
    assert (domain.data.train, domain.data.group) == ("visits.csv", "PatID")
    assert (domain.data.drop_empty, domain.data.merge_labels) == (True, True)
    assert domain.gates == Gates()
    shown = capsys.readouterr().out
    parts = ("separated by semicolons", "2 rows without a text or a label", "groups of PatID",
             "in the test rows", "the embedded one, for trials", "Written: visits.py")  # fmt: skip
    for part in parts:
        assert part in shown
    assert SECRET not in shown + Path("visits.py").read_text(encoding="utf-8")


def test_a_recipe_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    rows = written([{"note": r["text"], "mood": r["label"]} for r in ROWS])
    Path("rows.py").write_text("mine")
    assert run("init", rows) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert Path("rows.py").read_text() == "mine"
    assert run("init", rows, "--overwrite") == 0
    assert run("init", rows, "--output", "other.py", "--name", "moods", "--positive", "spam") == 0
    domain = load_domain("other.py")
    assert (domain.name, domain.task.positive) == ("moods", "spam")


def test_test_rows_beside_the_training_rows_are_taken() -> None:
    rows = [{"note": r["text"], "mood": r["label"]} for r in ROWS]
    train = written([*rows[:60], rows[70]], "train")
    test = written(rows[60:80], "test")
    assert run("init", train) == 0
    data = load_domain("train.py").data
    assert (data.train, data.test, data.drop_leaks) == (train, test, True)


def test_a_recipe_hides_no_module() -> None:
    rows = written([{"note": r["text"], "mood": r["label"]} for r in ROWS], "pandas")
    assert run("init", rows) == 0
    assert not Path("pandas.py").exists()
    assert load_domain("pandas_recipe.py").name == "pandas"


def test_a_column_cannot_write_code(capsys: pytest.CaptureFixture[str]) -> None:
    name = 'note"\nimport os\n'
    rows = written([{name: r["text"], "mood": r["label"]} for r in ROWS])
    assert run("init", rows) == 0
    assert load_domain("rows.py").task == Classification(name, "mood")
    assert "\nimport os" not in Path("rows.py").read_text(encoding="utf-8")


def answered(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Answers typed in a terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("".join(line + "\n" for line in lines)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)


def test_a_terminal_asks_about_the_proposal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table(Path("visits.csv"), visits())
    #        task, text, label: no column, then another; positive, group, test, base
    answered(monkeypatch, "", "", "Dringend", "Geschlecht", "w", "none", "none", "none")
    assert run("init", "visits.csv") == 0
    domain = load_domain("visits.py")
    assert domain.task == Classification("Notiz", "Geschlecht", positive="w")
    assert domain.data.group is None
    assert "the column 'Dringend'" in capsys.readouterr().out


def test_all_defaults_are_the_proposal(monkeypatch: pytest.MonkeyPatch) -> None:
    table(Path("visits.csv"), visits())
    assert run("init", "visits.csv", "--output", "taken.py") == 0
    answered(monkeypatch, *[""] * 7)
    assert run("init", "visits.csv") == 0
    tasks: list[Task] = [load_domain(path).task for path in ("taken.py", "visits.py")]
    assert tasks[0] == tasks[1]


def test_the_base_at_hand_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = written([{"note": r["text"], "mood": r["label"]} for r in ROWS])
    at_hand = {machine.ENCODER: [Path(".bases/minilm")]}
    monkeypatch.setattr(machine, "bases_at_hand", lambda: at_hand)
    assert run("init", rows) == 0
    assert load_domain("rows.py").task.head
    assert 'base=".bases/minilm"' in Path("rows.py").read_text(encoding="utf-8").replace(
        "\\\\", "/"
    )
    assert run("init", rows, "--base", "none", "--group", "none", "--overwrite") == 0
    assert "base=" not in Path("rows.py").read_text(encoding="utf-8")
