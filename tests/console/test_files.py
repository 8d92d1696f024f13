"""Answers to a file: killed, on a full disk or unbroken, the rows that come out are the same."""

import codecs
import io
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from filelock import lock_descriptor
from support.commands import run, write
from support.killed import die, forked
from support.models import Fitted

from lora_domains import atomic
from lora_domains.cli.verbs import predict as verb
from lora_domains.console import files
from lora_domains.console.files import Questions
from lora_domains.console.rows import read_blocks
from lora_domains.data.readers import RowsRead
from lora_domains.errors import DataError
from lora_domains.inference import batches
from lora_domains.inference.predict import Prediction
from lora_domains.tasks import Chat, Row

ROWS = [{"id": f"a-{n:03}", "text": f"red alpha {n}\nbeta"} for n in range(50)]
ROWS_OF_ONE_LINE = [{"id": f"a-{n}", "text": f"red {n}"} for n in range(50)]
BLOCK = 8


class Answering:
    """A model that answers at once, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.names: list[str | None] = []
        self.loaded: list[str] = []

    def load_adapter(self, folder: Path, name: str | None = None) -> str:
        self.loaded.append(name or folder.name)
        return self.loaded[-1]

    def predict(
        self, texts: Sequence[Any], *, domains: Sequence[str], refer_below: float
    ) -> list[Prediction]:
        self.asked += texts
        self.names += domains
        shares = [sha256(str(text).encode()).digest()[0] / 256 for text in texts]
        return [
            Prediction("spam" if share > 0.5 else "ham", max(share, 1 - share),
                       {"ham": 1 - share, "spam": share}) for share in shares
        ]  # fmt: skip


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Answering:
    made = Answering()
    monkeypatch.setattr(verb, "open_model", lambda *_, **__: made)
    monkeypatch.setattr(batches, "BLOCK", BLOCK)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write(tmp_path / "rows.csv", ROWS)


@pytest.fixture
def ask(fitted: Fitted, rows: str) -> Callable[..., int]:
    return lambda output, *more: run(
        "predict", "spam", "--input", rows, "--output", str(output),
        "--out", str(fitted[0].out), *more,
    )  # fmt: skip


def before_it_is_counted(at: int) -> Callable[[pytest.MonkeyPatch], None]:
    """Dies when some of a block is written, and the progress is not: files are flushed in turn."""

    def doom(patch: pytest.MonkeyPatch) -> None:
        done = 0

        def fsync(file: int) -> None:
            nonlocal done
            done += 1
            if done == at:
                os.ftruncate(file, os.fstat(file).st_size - 5)
                die()

        patch.setattr(files.os, "fsync", fsync)

    return doom


def after_it_is_counted(at: int) -> Callable[[pytest.MonkeyPatch], None]:
    def doom(patch: pytest.MonkeyPatch) -> None:
        done, write_text = 0, atomic.write_text

        def counted(path: Path, text: str) -> None:
            nonlocal done
            done += 1
            write_text(path, text)
            if done == at:
                die()

        patch.setattr(files, "write_text", counted)

    return doom


def at_its_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(files.AnswerFile, "finish", lambda _: die())


def after_its_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "unlink", lambda *_, **__: die())


MOMENTS = {
    "the first block half written": (before_it_is_counted(5), 0),
    "a block half written": (before_it_is_counted(11), 24),
    "the header written": (after_it_is_counted(2), 0),
    "a block written": (after_it_is_counted(5), 24),
    "all written": (at_its_end, 50),
}


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("doom", "kept"), MOMENTS.values(), ids=MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Answering, ask: Callable[..., int], tmp_path: Path, form: str,
    doom: Callable[[pytest.MonkeyPatch], None], kept: int,
) -> None:  # fmt: skip
    whole, output = tmp_path / f"whole.{form}", tmp_path / f"answers.{form}"
    assert ask(whole) == 0

    def killed() -> None:
        doom(pytest.MonkeyPatch())
        ask(output)

    assert forked(killed) == -9
    assert not output.exists()
    model.asked.clear()
    assert ask(output) == 0
    assert output.read_bytes() == whole.read_bytes()
    assert len(model.asked) == 50 - kept
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [output.name, "rows.csv", whole.name]
    )


def test_rows_come_out_once_in_order(
    model: Answering, ask: Callable[..., int], tmp_path: Path
) -> None:
    from pyarrow import parquet

    for name in ("a.jsonl", "a.parquet"):
        assert ask(tmp_path / name) == 0
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    table = parquet.read_table(tmp_path / "a.parquet").to_pylist()
    assert [{name: row[name] for name in ROWS[0]} for row in table] == ROWS
    assert [line["id"] for line in lines] == [row["id"] for row in ROWS]
    for line, row in zip(lines, table, strict=True):
        assert line["prediction"] == row["prediction"]
        assert line["probabilities"] == {
            "ham": row["probability_ham"], "spam": row["probability_spam"]
        }  # fmt: skip


CHANGES = {
    "the rows": lambda path: write(Path(path), [*ROWS[:-1], {"id": "b", "text": "other"}]),
    "--refer-below (was 0.0)": lambda _: None,
}


@pytest.mark.parametrize("what", CHANGES)
def test_answers_of_another_run_are_not_mixed_in(
    model: Answering, ask: Callable[..., int], tmp_path: Path, rows: str, what: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "answers.csv"

    def killed() -> None:
        after_it_is_counted(5)(pytest.MonkeyPatch())
        ask(output)

    assert forked(killed) == -9
    before = (tmp_path / "answers.csv.partial").read_bytes()
    CHANGES[what](rows)
    more = ("--refer-below", "0.75") if "refer" in what else ()
    model.loaded.clear()
    assert ask(output, *more) == 2
    error = capsys.readouterr().err
    assert f"24 answers of a run that differs in {what}" in error
    assert "--overwrite" in error
    assert not model.loaded
    assert (tmp_path / "answers.csv.partial").read_bytes() == before
    assert ask(output, *more, "--overwrite") == 0
    assert len(model.asked) == 50
    assert ask(tmp_path / "whole.csv", *more) == 0
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_an_adapter_that_was_trained_again_is_another_run(
    model: Answering, fitted: Fitted, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(fitted[0].out / "spam", tmp_path / "own" / "spam")
    flags = ("predict", "spam", "--out", str(tmp_path / "own"), "--input", rows)
    output = ("--output", str(tmp_path / "answers.csv"))

    def killed() -> None:
        after_it_is_counted(4)(pytest.MonkeyPatch())
        run(*flags, *output)

    assert forked(killed) == -9
    card = tmp_path / "own" / "spam" / "card.json"
    card.write_text(card.read_text() + " ")
    assert run(*flags, *output) == 2
    assert "differs in the adapters" in capsys.readouterr().err


def test_a_file_that_exists_is_kept(
    model: Answering, ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.csv"
    output.write_text("mine")
    assert ask(output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output.read_text(), model.loaded) == ("mine", [])
    (tmp_path / "answers.csv.partial").write_text("mine too")
    assert ask(output, "--overwrite") == 0
    assert len(output.read_text().splitlines()) == 1 + 2 * 50  # each text has a line break


def test_a_partial_file_of_unknown_origin_is_kept(
    model: Answering, ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "answers.csv.partial"
    partial.write_text("mine")
    assert ask(tmp_path / "answers.csv") == 2
    assert "answers.csv.progress" in capsys.readouterr().err
    assert (partial.read_text(), model.loaded) == ("mine", [])


def test_two_processes_do_not_write_one_file(
    model: Answering, ask: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "answers.csv.partial").open("ab") as file:
        assert lock_descriptor(file.fileno())
        assert ask(tmp_path / "answers.csv") == 2
    assert "another one at work" in capsys.readouterr().err
    assert ask(tmp_path / "answers.csv") == 0


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_on_a_full_disk_whole_rows_stay_and_the_run_goes_on(
    model: Answering, ask: Callable[..., int], tmp_path: Path, form: str
) -> None:
    """The limit on a file's size refuses bytes in the middle of a write, as a full disk does."""
    whole, output, log = tmp_path / f"w.{form}", tmp_path / f"a.{form}", tmp_path / "log"
    assert ask(whole) == 0
    room = {"csv": 1500, "jsonl": 3500, "parquet": 6000}[form]

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        with log.open("w") as sys.stderr:
            assert ask(output) == 2

    assert forked(full) == 0
    partial, progress = Path(f"{output}.partial"), Path(f"{output}.progress")
    known = json.loads(progress.read_text())
    assert 0 < known["rows"] < 50
    assert partial.stat().st_size == known["bytes"] <= room
    assert "File too large" in log.read_text()
    assert f"holds the first {known['rows']} answers" in log.read_text()
    if form == "jsonl":
        kept = [json.loads(line)["id"] for line in partial.read_text().splitlines()]
        assert kept == [row["id"] for row in ROWS[: known["rows"]]]
    assert ask(output) == 0
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_the_standard_output_is_named(
    model: Answering, fitted: Fitted, rows: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run("predict", "spam", "--input", rows, "--out", str(fitted[0].out)) == 2
    error = capsys.readouterr().err
    assert "standard output" in error
    assert "No space left on device" in error


def test_answers_on_the_standard_output(
    model: Answering, fitted: Fitted, rows: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    flags = ("predict", "spam", "--out", str(fitted[0].out))
    whole = {}
    for form, more in (("csv", ()), ("jsonl", ("--json",))):
        assert run(*flags, "--input", rows, "--output", str(tmp_path / f"a.{form}")) == 0
        capsys.readouterr()
        with Path(rows).open() as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            assert run(*flags, "--input", "-", "--output", "-", *more) == 0
        whole[form] = capsys.readouterr().out
        assert whole[form] == (tmp_path / f"a.{form}").read_text()
    assert run(*flags, "--json", "red alpha", "blue") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in shown] == ["red alpha", "blue"]
    assert all({"prediction", "probability", "probabilities"} < one.keys() for one in shown)
    assert run(*flags, "--json", "--input", rows, "--output", "b.csv") == 2
    assert "ending in .jsonl" in capsys.readouterr().err


# ── The form of a table ─────────────────────────────────────────────────────────────────────────

GERMAN = [{"id": f"a-{n}", "text": f"müde, {n}", "Größe": "1,70"} for n in range(50)]


def semicolons(rows: Sequence[dict[str, str]]) -> str:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    return "".join(";".join(line) + "\n" for line in lines)


TABLES: dict[str, tuple[str, bytes, bytes, str]] = {
    # file of rows, its bytes, how the answers begin, their last cell
    "semicolons": ("r.csv", semicolons(ROWS_OF_ONE_LINE).encode(), b"id;text;pred", ";0,"),
    "decimal points": (
        "r.csv", semicolons([row | {"text": "1.75"} for row in ROWS_OF_ONE_LINE]).encode(),
        b"id;text;pred", ";0.",
    ),
    "cp1252": ("r.csv", semicolons(GERMAN).encode("cp1252"), codecs.BOM_UTF8 + b"id;text;", ";0,"),
    "BOM": ("r.csv", semicolons(GERMAN).encode("utf-8-sig"), codecs.BOM_UTF8 + b"id;text;", ";0,"),
    "UTF-16 with tabs": (
        "r.csv", semicolons(GERMAN).replace(";", "\t").encode("utf-16"),
        codecs.BOM_UTF8 + b"id\ttext\t", "\t0.",
    ),
    "commas": ("r.csv", b"id,text\n1,red\n2,blue\n", b"id,text,pred", ",0."),
    "tabs": ("r.tsv", b"id\ttext\n1;0,5\tred\n", b"id,text,pred", ",0."),
    "JSON lines": ("r.jsonl", b'{"id": "1;2", "text": "red; blue"}\n', b"id,text,pred", ",0."),
}  # fmt: skip


@pytest.mark.parametrize(("name", "rows", "begin", "end"), TABLES.values(), ids=TABLES)
def test_a_table_of_answers_is_written_like_that_of_the_rows(
    model: Answering, fitted: Fitted, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes],
    monkeypatch: pytest.MonkeyPatch, name: str, rows: bytes, begin: bytes, end: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_bytes(rows)
    output, flags = tmp_path / "a.csv", ("predict", "spam", "--out", str(fitted[0].out))
    assert run(*flags, "--input", str(tmp_path / name), "--output", str(output)) == 0
    written = output.read_bytes()
    assert written.startswith(begin)
    cell = written.decode("utf-8-sig").splitlines()[-1].rpartition(end[0])[2]
    assert (end[0] + cell).startswith(end)
    (again,) = read_blocks(output, "input")
    (given,) = read_blocks(tmp_path / name, "input")
    assert [{key: row.values[key] for key in given.rows[0].values} for row in again.rows] == [
        row.values for row in given.rows
    ]
    if name == "r.csv":
        capfdbinary.readouterr()
        with (tmp_path / name).open("rb") as stream:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
            assert run(*flags, "--output", "-") == 0
        assert capfdbinary.readouterr().out == written


def test_answers_of_a_workbook_have_a_mark_for_excel(
    model: Answering, fitted: Fitted, tmp_path: Path
) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for cells in (["text"], ["müde"]):
        book.active.append(cells)
    book.save(tmp_path / "r.xlsx")
    assert run("predict", "spam", "--out", str(fitted[0].out), "--input", str(tmp_path / "r.xlsx"),
               "--output", str(tmp_path / "a.csv")) == 0  # fmt: skip
    assert (tmp_path / "a.csv").read_bytes().startswith(codecs.BOM_UTF8 + b"text,")


@pytest.mark.parametrize("older", [False, True])
def test_a_table_goes_on_as_it_was_begun(
    model: Answering, ask: Callable[..., int], tmp_path: Path, rows: str, older: bool
) -> None:
    """Rows that are saved with semicolons meanwhile are the same rows."""
    whole, output = tmp_path / "whole.csv", tmp_path / "answers.csv"
    Path(rows).write_bytes(semicolons(GERMAN).replace("müde,", "müde").encode("cp1252"))
    if older:
        content = semicolons(GERMAN).replace("müde,", "müde").replace("1,70", "")
        Path(rows).write_text(content.replace(";", ","), encoding="utf-8")
    assert ask(whole) == 0

    def killed() -> None:
        after_it_is_counted(5)(pytest.MonkeyPatch())
        ask(output)

    assert forked(killed) == -9
    if older:
        progress = tmp_path / "answers.csv.progress"
        known = json.loads(progress.read_text())
        del known["form"]
        progress.write_text(json.dumps(known))
        Path(rows).write_bytes(Path(rows).read_bytes().replace(b",", b";"))
    else:
        Path(rows).write_text(semicolons(GERMAN).replace("müde,", "müde"), encoding="utf-8")
    model.asked.clear()
    assert ask(output) == 0
    assert len(model.asked) == 26
    assert output.read_bytes() == whole.read_bytes()


# ── Mixed domains ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def wards(fitted: Fitted, tmp_path: Path) -> Path:
    """A folder with two adapters."""
    for name in ("north", "south"):
        shutil.copytree(fitted[0].out / "spam", tmp_path / "wards" / name)
    return tmp_path / "wards"


def mixed(path: Path, cells: Sequence[str]) -> str:
    return write(path, [{"text": f"red {n}", "ward": cell} for n, cell in enumerate(cells)])


def test_each_row_is_answered_by_the_adapter_that_its_cell_names(
    model: Answering, wards: Path, tmp_path: Path
) -> None:
    path = mixed(tmp_path / "m.csv", ["south", "north", "", " south ", "north"] * 4)
    output = tmp_path / "answers.jsonl"
    assert run("predict", "north", "--out", str(wards), "--domain-column", "ward",
               "--input", path, "--output", str(output)) == 0  # fmt: skip
    assert model.names == ["south", "north", "north", "south", "north"] * 4
    assert model.loaded == ["south", "north"]
    assert len(output.read_text().splitlines()) == 20


def test_mixed_rows_on_a_base_have_the_answers_of_their_adapters(
    fitted: Fitted, tiny_base: Path, wards: Path, tmp_path: Path
) -> None:
    path = mixed(tmp_path / "m.csv", ["south", "north", "south"])
    output = tmp_path / "answers.jsonl"
    assert run("predict", "--out", str(wards), "--base", str(tiny_base), "--domain-column", "ward",
               "--input", path, "--output", str(output)) == 0  # fmt: skip
    found = [json.loads(line) for line in output.read_text().splitlines()]
    expected = fitted[0].predict([f"red {n}" for n in range(3)], "spam")
    assert [one["probability"] for one in found] == pytest.approx(
        [one.probability for one in expected if isinstance(one, Prediction)], abs=1e-5
    )


UNKNOWN = {
    "unknown": (["south", "sooth", "north", "sooth"], ("ward", "'sooth' in row 2, 4", "'south'")),
    "empty": (["south", "", "north", ""], ("column 'ward'", "an empty cell", "predict ADAPTER")),
}


@pytest.mark.parametrize(("cells", "parts"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_row_without_an_adapter_is_found_before_the_base_is_loaded(
    model: Answering, wards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    cells: list[str], parts: tuple[str, ...],
) -> None:  # fmt: skip
    path = mixed(tmp_path / "m.csv", cells)
    assert run("predict", "--out", str(wards), "--domain-column", "ward", "--input", path) == 2
    error = capsys.readouterr().err
    for part in parts:
        assert part in error
    assert not model.loaded
    assert run("predict", "--out", str(wards), "--domain-column", "wards", "--input", path) == 2
    assert "Did you mean 'ward'?" in capsys.readouterr().err


def test_adapters_of_several_bases_do_not_answer_together(
    model: Answering, wards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card = wards / "south" / "card.json"
    stored = json.loads(card.read_text())
    stored["base"]["identity"] = "0" * 64
    card.write_text(json.dumps(stored))
    path = mixed(tmp_path / "m.csv", ["south", "north"])
    assert run("predict", "--out", str(wards), "--domain-column", "ward", "--input", path) == 2
    assert "adapters of one base" in capsys.readouterr().err
    assert not model.loaded


def test_rows_to_predict_may_lack_a_column_beside_their_text() -> None:
    task = Chat(user="question", assistant="answer", history="before")
    rows = [Row({"question": f"question {n}"}, "input", n, f"row {n}") for n in range(3)]
    found = Questions(lambda: iter([RowsRead(rows)]), lambda _: task, "support")
    found.check(lambda _: None)
    assert [one.text for one in found] == [
        {"question": f"question {n}", "before": None} for n in range(3)
    ]
    lacking = [Row({"before": "[]"}, "input", 0, "row 0")]
    with pytest.raises(DataError, match="column 'question'"):
        Questions(lambda: iter([RowsRead(lacking)]), lambda _: task, "support").check(print)
