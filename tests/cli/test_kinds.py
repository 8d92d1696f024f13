"""Kinds of task on the command line: proposed from the rows, and each verb on several labels and
on numbers."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from support.commands import FAST, run, write
from support.models import use_small_suite

from lora_domains.cli import proposal
from lora_domains.cli.flags import add_run_flags
from lora_domains.cli.parser import Parser
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.tasks import Chat, Classification, MultiLabel, Number, Preference, Task

SEVERAL = [
    {"text": f"{row['text']}{' alpha' * (n % 2)}{' beta' * (n % 3 == 0)} {n}",
     "labels": ";".join(["pump"] * (n % 2) + ["valve"] * (n % 3 == 0))}
    for n, row in enumerate(make_rows(90))
]  # fmt: skip
NUMBERS = [
    {"text": f"{row['text']}{' alpha' * (n % 5)} {n}", "label": 100 + 10 * (n % 5) + n / 7}
    for n, row in enumerate(make_rows(90))
]


def proposed(folder: Path, rows: list[dict[str, Any]], *flags: str) -> tuple[Task, str]:
    parser = Parser()
    add_run_flags(parser, recipe=False)
    found = proposal.proposed(parser.read(["--train", write(folder / "rows.csv", rows), *flags]))
    return found.domain.task, found.reasons.get("task", "")


def test_the_kind_is_proposed_from_the_first_labels(tmp_path: Path) -> None:
    task, why = proposed(tmp_path, SEVERAL, "--head")
    assert task == MultiLabel(head=True)
    assert why.startswith("multi label, as labels holds several labels, separated by ';'")
    task, why = proposed(tmp_path, NUMBERS)
    assert task == Number()
    assert why == ("number, as label holds 90 different numbers in 90 rows; --task names another")
    renamed = [{"note": row["text"], "parts": row["labels"].replace(";", "|")} for row in SEVERAL]
    named = "--text", "note", "--label", "parts"
    expected = MultiLabel("note", "parts", separator="|")
    assert proposed(tmp_path, renamed, *named)[0] == expected
    assert proposed(tmp_path, renamed, *named, "--task", "multi_label") == (expected, "")
    assert proposed(tmp_path, renamed, *named, "--task", "classification")[0] == Classification(
        "note", "parts"
    )
    one = [{"text": row["text"], "label": "ham"} for row in SEVERAL]
    assert proposed(tmp_path, one) == (Classification(), "")
    one = [{"text": row["text"], "labels": n % 2} for n, row in enumerate(SEVERAL)]
    for flags in ((), ("--task", "classification")):
        assert proposed(tmp_path, one, *flags) == (Classification(label="labels"), "")
    assert proposed(tmp_path, one, "--decimal", ",")[0] == Number(label="labels", decimal=",")
    assert proposed(tmp_path, one, "--task", "multi_label")[0] == MultiLabel()
    asked = [{"instruction": row["text"], "output": row["labels"]} for row in SEVERAL]
    assert isinstance(proposed(tmp_path, asked)[0], Chat)


def test_a_kind_that_only_a_flag_names_is_said(tmp_path: Path) -> None:
    few = [{"text": f"{row['text']} {n}", "label": f"{n % 3},5"} for n, row in enumerate(NUMBERS)]
    task, why = proposed(tmp_path, few, "--decimal", ",")
    assert task == Number(decimal=",")
    assert why == "number, which alone has these settings; --task names another"
    task, why = proposed(tmp_path, few, "--text", "text", "--label", "label", "--generate")
    assert isinstance(task, Chat)
    assert why.startswith("chat, which alone has these settings")
    asked = [{"question": f"why {n}", "answer": "so"} for n in range(30)]
    with pytest.raises(UsageError, match="a setting of a generation task; found 'generate'"):
        proposed(tmp_path, asked, "--generate")  # which always generates


def test_pairs_of_answers_are_proposed_by_their_columns(tmp_path: Path) -> None:
    texts = [f"why {n} {row['text']}" for n, row in enumerate(make_rows(30))]
    pairs = [{"system": "s", "question": text, "chosen": f"so {text}", "rejected": f"no {text}"}
             for text in texts]  # fmt: skip
    expected = Preference("question", system="system")
    for flags in ((), ("--text", "question"), ("--text", "question", "--label", "chosen")):
        assert proposed(tmp_path, pairs, *flags)[0] == expected
    beside = [
        {"prompt": text, "chosen": "so", "rejected": "no", "messages": "[]"} for text in texts
    ]
    assert proposed(tmp_path, beside) == (
        Preference(), "preference, by the columns of the rows; --task names another"
    )  # fmt: skip


def test_two_columns_of_text_are_a_chat_where_that_is_asked(tmp_path: Path) -> None:
    rows = [{"query": f"why {n} {row['text']}", "reply": f"because {row['text']} of {n}"}
            for n, row in enumerate(make_rows(30))]  # fmt: skip
    for flags in ((), ("--text", "query"), ("--text", "query", "--label", "reply")):
        task, _ = proposed(tmp_path, rows, "--task", "chat", *flags)
        assert (task.input_columns, task.answer_column) == (("query",), "reply")


@pytest.mark.parametrize("verb", ["learning-curve", "cross-validate"])
def test_verbs_that_train_several_adapters_propose_it_too(
    verb: str, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Task] = []

    def measured(_: Any, domain: Domain, *__: Any) -> None:
        tasks.append(domain.task)
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_domains.analysis.learning_curve.learning_curve", measured)
    monkeypatch.setattr("lora_domains.analysis.cross_validation.cross_validate", measured)
    rows = write(tmp_path / "rows.csv", SEVERAL)
    assert run(verb, rows, "--base", str(tiny_base), "--reports", str(tmp_path)) != 0
    assert tasks == [MultiLabel()]


def test_several_labels_from_rows_to_answers(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_small_suite(monkeypatch)
    monkeypatch.chdir(tmp_path)  # a card has the names of files beyond it only
    train, test = write(tmp_path / "a.csv", SEVERAL[:60]), write(tmp_path / "b.csv", SEVERAL[60:])
    where = "--base", str(tiny_base), "--out", str(tmp_path / "out")
    code = run("fit", train, "--test", test, "--name", "parts", "--head", "--epochs", "1",
               "--floor", "valve=.01", "--tune-thresholds", "--retention", "none",
               *FAST, *where)  # fmt: skip
    assert code in (0, 1, 3)
    shown = capsys.readouterr().out
    for part in ("multi label, as labels holds", "micro F1", "recall (at least)", "floors"):
        assert part in shown
    answers = tmp_path / "answers.csv"
    assert run("predict", "parts", "--input", test, "--output", str(answers), *where) == 0
    with answers.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[2:] == ["prediction", "probability_pump", "probability_valve"]
    assert {label for row in rows for label in row["prediction"].split(";") if label} <= {
        "pump", "valve",
    }  # fmt: skip
    lines = tmp_path / "answers.jsonl"
    assert run("predict", "parts", "--input", test, "--output", str(lines), *where) == 0
    record = json.loads(lines.read_text().splitlines()[0])
    assert isinstance(record["prediction"], list)
    assert record["probabilities"].keys() == {"pump", "valve"}
    capsys.readouterr()
    assert run("predict", "parts", SEVERAL[0]["text"], *where) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert run("predict", "parts", "x", "--refer-below", "0.9", *where) == 2
    out, report = str(tmp_path / "out" / "parts"), tmp_path / "report"
    assert run("report", out, "--out", str(report)) == code
    assert "Per class" in (report / "report.html").read_text()
    assert run("evaluate", out, "--test", test, *where) == code


def test_numbers_from_rows_to_answers(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_small_suite(monkeypatch)
    train, test = write(tmp_path / "a.csv", NUMBERS[:60]), write(tmp_path / "b.csv", NUMBERS[60:])
    where = "--base", str(tiny_base), "--out", str(tmp_path / "out")
    code = run("fit", train, "--test", test, "--name", "price", "--epochs", "1", "--retention",
               "none", *FAST, *where)  # fmt: skip
    assert code in (0, 1, 3)
    shown = capsys.readouterr().out
    for part in ("number, as label holds", "absolute error", "R²", "rank correlation", "median"):
        assert part in shown
    answers = tmp_path / "answers.csv"
    assert run("predict", "price", "--input", test, "--output", str(answers), *where) == 0
    with answers.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["text", "label", "prediction"]
    assert all(50 < float(row["prediction"]) < 200 for row in rows)
    out, report = str(tmp_path / "out" / "price"), tmp_path / "report"
    assert run("report", out, "--out", str(report)) == code
    assert "absolute error" in (report / "report.md").read_text()


def test_a_cell_that_is_no_number_is_named_by_its_line(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 101,500 may be 101500.
    rows = [{**row, "label": f"{row['label'] // 1:.0f},{n % 2}50"} for n, row in enumerate(NUMBERS)]
    path = write(tmp_path / "a.csv", rows)
    given = "fit", path, "--task", "number", "--base", str(tiny_base), "--out", str(tmp_path)
    assert run(*given, "--dry-run") == 2
    message = capsys.readouterr().err
    assert "a comma" in message
    assert "--decimal ," in message
    assert run(*given, "--decimal", ",", "--dry-run") == 0


WRONG: dict[str, tuple[list[dict[str, Any]], set[str]]] = {
    "numbers": (NUMBERS, {"adapter_answer", "right_answer", "base_answer", "error"}),
    "several labels": (SEVERAL, {"adapter_answer", "right_answer", "base_answer", "probability"}),
    "answers": (
        [{"question": row["text"], "answer": f"it is {row['label']}"} for row in NUMBERS],
        {"adapter_answer", "right_answer", "token_f1"},
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(*of, id=kind, marks=[pytest.mark.long] if kind == "several labels" else [])
        for kind, of in WRONG.items()
    ],
)
def test_wrong_answers_of_each_kind_are_written(
    rows: list[dict[str, Any]], columns: set[str], tmp_path: Path, tiny_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_small_suite(monkeypatch)
    monkeypatch.chdir(tmp_path)
    write(Path("rows.csv"), rows)
    base = ("--base", str(tiny_base))
    assert run("fit", "rows.csv", "--max-steps", "2", "--retention", "none", *base) == 0
    assert run("evaluate", "rows", "--errors", "wrong.jsonl", *base) in (1, 3)
    wrong = [json.loads(line) for line in Path("wrong.jsonl").read_text().splitlines()]
    assert 0 < len(wrong) <= 18  # a fifth of the rows was split off
    assert wrong[0].keys() == {*rows[0], *columns}
    for row in wrong:
        own = {name: str(cell) for name, cell in row.items() if name in rows[0]}
        assert own in [{name: str(cell) for name, cell in one.items()} for one in rows]
        assert row["adapter_answer"] != row["right_answer"]
        if rows is SEVERAL:  # written as the owner's cells are
            assert row["right_answer"] == row["labels"]


def test_questions_with_candidates_from_rows_to_answers(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    use_small_suite(monkeypatch)
    monkeypatch.chdir(tmp_path)
    rows = [{"Question": f"What follows {row['text']} {n}?", "Option A": "red", "Option B": "blue",
             "Correct": "ab"[n % 2]} for n, row in enumerate(make_rows(60))]  # fmt: skip
    train, where = write(tmp_path / "quiz.csv", rows), ("--base", str(tiny_base))
    assert run("fit", train, "--epochs", "1", "--retention", "none", *FAST, *where) == 0
    capsys.readouterr()
    asked = json.dumps({name: rows[0][name] for name in ("Question", "Option A", "Option B")})
    assert run("predict", "quiz", asked, *where) == 0
    label, probability = capsys.readouterr().out.split()
    assert label in ("red", "blue")
    assert 0.5 <= float(probability) <= 1
    assert run("predict", "quiz", "--input", train, "--output", "answers.csv", *where) == 0
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        answers = list(csv.DictReader(file))
    assert [*answers[0]] == [*rows[0], "prediction", "probability"]
    assert answers[0]["prediction"] == label
    assert run("predict", "quiz", "What?", *where) == 2
    assert "as JSON" in capsys.readouterr().err
