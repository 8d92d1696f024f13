"""The verb predict: one answer a row, in the order of the rows, with their ids and columns."""

import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from support.commands import fork, run, write
from support.models import Fitted, clear_rows

from lora_domains.cli import main as cli

NOTES = [
    {"id": f"a-{n:03}", "text": row["text"] if n % 7 else row["text"].replace(" ", "\n", 1),
     "ward": "north, 2"}
    for n, row in enumerate(clear_rows(30))
]  # fmt: skip


@pytest.fixture
def where(fitted: Fitted, tiny_base: Path) -> tuple[str, ...]:
    return "--base", str(tiny_base), "--out", str(fitted[0].out)


TABS = {".tsv": "\t"}


def table(path: Path, delimiter: str = "") -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter or TABS.get(path.suffix, ",")))


def given(folder: Path, form: str, rows: list[dict[str, Any]]) -> str:
    """``rows`` in a file of ``form``."""
    path = folder / f"new.{form}"
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "csv":
        return write(path, rows)
    if form == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    content = {"jsonl": lines, "json": json.dumps({"data": rows}), "jsonl.gz": lines}[form]
    path.write_bytes(gzip.compress(lines.encode()) if form.endswith("gz") else content.encode())
    return str(path)


@pytest.mark.parametrize("form", ["csv", "jsonl", "json", "jsonl.gz", "parquet"])
def test_every_row_is_answered_once_in_order_with_its_columns(
    fitted: Fitted, where: tuple[str, ...], tmp_path: Path, form: str
) -> None:
    path, output = given(tmp_path, form, NOTES), tmp_path / "answers.csv"
    assert run("predict", "spam", "--input", path, "--output", str(output), *where) == 0
    rows = table(output)
    assert list(rows[0]) == ["id", "text", "ward", "prediction", "probability",
                             "probability_ham", "probability_spam"]  # fmt: skip
    assert [{name: row[name] for name in NOTES[0]} for row in rows] == NOTES
    model, _ = fitted
    for row, answer in zip(rows, model.predict(NOTES, "spam"), strict=True):
        assert not isinstance(answer, str)
        assert row["prediction"] == answer.label
        for label, probability in answer.probabilities.items():
            assert float(row[f"probability_{label}"]) == pytest.approx(probability, abs=2e-5)


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_leaves_out_progress(
    quiet: bool, where: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("lora_domains.cli.verbs.predict.PULSE", -1.0)
    path, output = given(tmp_path, "csv", NOTES), str(tmp_path / "answers.csv")
    flags = ["--quiet"] * quiet
    assert run("predict", "spam", "--input", path, "--output", output, *where, *flags) == 0
    shown = capsys.readouterr().err
    assert f"30 rows: {output}" in shown
    assert ("30 of 30 rows answered" in shown) is not quiet


def test_answers_never_replace_the_rows(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = given(tmp_path, "csv", NOTES)
    before = Path(path).read_bytes()
    (tmp_path / "link.csv").symlink_to(path)
    for output in (path, str(tmp_path / "link.csv")):
        assert run("predict", "spam", "--input", path, "--output", output, *where) == 2
        assert "another file than --input" in capsys.readouterr().err
    assert Path(path).read_bytes() == before


def test_answers_as_json_lines_and_with_tabs(where: tuple[str, ...], tmp_path: Path) -> None:
    path = given(tmp_path, "jsonl", [{**row, "more": {"a": [1, None]}} for row in NOTES])
    for name in ("answers.jsonl", "answers.tsv"):
        assert (
            run("predict", "spam", "--input", path, "--output", str(tmp_path / name), *where) == 0
        )
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    rows = table(tmp_path / "answers.tsv")
    assert len(records) == len(rows) == 30
    for record, row, note in zip(records, rows, NOTES, strict=True):
        assert (record["id"], record["more"]) == (note["id"], {"a": [1, None]})
        assert (
            record["prediction"]
            == row["prediction"]
            == max(record["probabilities"], key=record["probabilities"].__getitem__)
        )
        assert sum(record["probabilities"].values()) == pytest.approx(1)
        assert json.loads(row["more"]) == {"a": [1, None]}


def test_line_breaks_in_a_cell_are_no_new_row(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = given(tmp_path, "csv", NOTES)
    assert run("predict", "spam", "--input", path, *where) == 0
    assert len(capsys.readouterr().out.splitlines()) == 30


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


STREAMS = {
    "csv": as_csv,
    "semicolons": lambda rows: as_csv(rows, ";"),
    "jsonl": lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
    "json": lambda rows: json.dumps(rows, indent=1),
}


@pytest.mark.parametrize("form", STREAMS)
def test_the_form_of_the_standard_input_is_found(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, form: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(STREAMS[form](NOTES)))
    assert run("predict", "spam", "--output", str(tmp_path / "answers.csv"), *where) == 0
    rows = table(tmp_path / "answers.csv", ";" if form == "semicolons" else ",")
    assert [row["id"] for row in rows] == [row["id"] for row in NOTES]


@pytest.mark.parametrize("first", ["{red} alpha", "[1] red alpha", "red, alpha; beta", "text"])
def test_other_lines_of_the_standard_input_are_texts(
    where: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    first: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{first}\n\nred beta beta\nred alpha\n"))
    assert run("predict", "spam", *where) == 0
    shown = capsys.readouterr()
    # A line that is the name of the text column alone is a header.
    assert len(shown.out.splitlines()) == 2 + (first != "text")
    assert ("1 blank lines left out" in shown.err) == (first != "text")


def test_a_text_that_is_the_name_of_a_file_is_refused(
    where: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = given(tmp_path, "csv", NOTES)
    for verb in ("predict", "trace"):
        assert run(verb, "spam", path, *where) == 2
        error = capsys.readouterr().err
        assert "the name of a file" in error
        assert f"predict spam --input {path}" in error
    assert run("predict", path, *where) == 2  # where the adapter belongs
    error = capsys.readouterr().err
    assert "the name of an adapter" in error
    assert f"predict ADAPTER --input {path}" in error


BAD = {
    "no such column": ([{"note": "a"}] * 3, (), ("the column 'text'", "Use its column names")),
    "empty": ([*NOTES[:3], {"text": " "}, {"text": "a"}, {"text": None}], (),
              ("column 'text', 2 empty: line 4, 6", "answers of such rows empty: --drop-empty")),
    "a list": ([{"text": ["a"]}], (), ("line 1", "type list")),
    "taken": ([{"text": "a", "prediction": "b"}], ("--output", "x.csv"), ("'prediction'",)),
    "form": (NOTES, ("--output", "answers.xlsx"), (".csv, .tsv, .jsonl or .parquet", "'.xlsx'")),
    "both": (NOTES, ("a text",), ("texts or --input",)),
    "columns": (NOTES, ("--text", "id,ward"), ("1 columns, for text",)),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "more", "parts"), BAD.values(), ids=BAD)
def test_rows_that_cannot_be_answered_are_refused_before_the_base_is_loaded(
    fitted: Fitted, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], more: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    path = given(tmp_path, "jsonl", rows)
    # No such base: an error about it would come first if it were loaded first.
    assert run("predict", "spam", *more, "--input", path, "--base", "nowhere",
               "--out", str(fitted[0].out)) == 2  # fmt: skip
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert not list(tmp_path.glob("*.csv"))


def test_rows_without_a_text_can_be_left_unanswered(where: tuple[str, ...], tmp_path: Path) -> None:
    rows = [dict(row) for row in NOTES]
    rows[4]["text"] = rows[9]["text"] = " "
    path, output = given(tmp_path, "csv", rows), tmp_path / "answers.csv"
    assert run("predict", "spam", "--input", path, "--output", str(output), "--drop-empty",
               *where) == 0  # fmt: skip
    answered = table(output)
    assert [row["id"] for row in answered] == [row["id"] for row in rows]
    assert [n for n, row in enumerate(answered) if not row["prediction"]] == [4, 9]
    assert answered[4]["probability_spam"] == ""


def test_a_column_may_have_another_name_than_in_training(
    where: tuple[str, ...], tmp_path: Path
) -> None:
    rows = [{"id": row["id"], "Comment, if any": row["text"]} for row in NOTES]
    path, output = given(tmp_path, "csv", rows), tmp_path / "answers.csv"
    assert run("predict", "spam", "--input", path, "--text", "Comment, if any",
               "--output", str(output), *where) == 0  # fmt: skip
    assert list(table(output)[0])[:3] == ["id", "Comment, if any", "prediction"]


@pytest.mark.slow
def test_a_reader_that_has_enough_ends_the_command(where: tuple[str, ...], tmp_path: Path) -> None:
    path = given(tmp_path, "jsonl", [{"text": "red alpha"}] * 3000)
    reading, writing = os.pipe()

    def predict() -> None:
        os.close(reading)
        cli.main(["predict", "spam", "--input", path, *where])

    forked = fork(predict, tmp_path, writing)
    os.close(writing)
    with os.fdopen(reading) as lines:
        assert lines.readline().split("\t")[0] in ("spam", "ham")
    code, _, errors = forked.ended()
    assert code == 0
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
