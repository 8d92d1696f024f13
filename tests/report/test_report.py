"""Reports of many adapters: their figures, their files, exit codes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.commands import run
from support.folders import (
    CARD,
    FILES,
    SECRET,
    VALID,
    VALID_CARD,
    changes,
    folder,
)

from lora_domains.errors import AdapterCorrupt, AdapterMismatch, UsageError
from lora_domains.report.card import Report
from lora_domains.report.html import page
from lora_domains.report.markdown import summary
from lora_domains.report.report import VIEWS, combine, mistakes, rebuild, save_report
from lora_domains.report.text import outcome
from lora_domains.verdict.scores import ScoreTable


def test_a_report_holds_each_card_and_matches_its_schema(three: list[Path]) -> None:
    report = combine(three)
    assert [e.path for e in report.adapters] == ["medical", "legal", "finance"]
    assert [e.verdict for e in report.adapters] == ["pass", "fail", "inconclusive"]
    for made, entry in zip(three, report.adapters, strict=True):
        assert rebuild(made).adapter.to_json().items() <= entry.to_json().items()
        VALID_CARD.validate(rebuild(made).to_json())
    report.since = changes(three, three)
    VALID.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_the_matrix_holds_each_adapter_on_each_domain(three: list[Path]) -> None:
    report = combine(three)
    matrix, entries = report.matrix, {e.path: e for e in report.adapters}
    assert matrix["rows"] == matrix["columns"] == ["medical", "legal", "finance"]
    assert matrix["metrics"] == ["f1"] * 3
    for row, name in enumerate(matrix["rows"]):
        for column, domain in enumerate(matrix["columns"]):
            # Other adapters have the scores of the base here.
            who = "adapter" if name == domain else "base"
            assert matrix["values"][row][column] == entries[domain].domain_scores["f1"][who]


def test_what_was_not_measured_is_none(tmp_path: Path) -> None:
    made = [folder(tmp_path, "one"), folder(tmp_path, "two")]
    card = json.loads((made[1] / "card.json").read_text())
    del card["adapters"][0]["judged"]
    (made[1] / "card.json").write_text(json.dumps(card))
    report = combine(made)
    assert report.matrix["columns"] == ["one"]
    assert report.matrix["values"][1] == [None]
    assert report.adapters[1].verdict == "inconclusive"
    assert "has not been evaluated" in summary(report)
    save_report(report, tmp_path / "out")
    assert outcome(report) == "inconclusive"
    VALID.validate(report.to_json())


def test_environments_that_differ_are_in_each_entry(tmp_path: Path) -> None:
    made = [folder(tmp_path, name, environment={"git": name * 40}) for name in ("a", "b")]
    report = combine(made)
    assert (report.environment["git"], report.environment["python"]) == (
        None, CARD["environment"]["python"],
    )  # fmt: skip
    assert [e.environment for e in report.adapters] == [{"git": "a" * 40}, {"git": "b" * 40}]
    VALID.validate(report.to_json())
    text = page(report)
    assert "differs, see each adapter" in text
    assert "a" * 40 in text


@pytest.mark.parametrize("change", [{"identity": "f" * 64}, {"quantization": "8bit"},
                                    {"dtype": "bfloat16"}])  # fmt: skip
def test_adapters_of_other_bases_or_precisions_do_not_share_a_report(
    tmp_path: Path, change: dict[str, str]
) -> None:
    made = [folder(tmp_path, "one"), folder(tmp_path, "two", base=change)]
    with pytest.raises(AdapterMismatch, match=f"two: expected .*{next(iter(change))}"):
        combine(made)


def test_one_name_twice_and_no_folder_are_refused(tmp_path: Path) -> None:
    made = [folder(tmp_path / "a"), folder(tmp_path / "b")]
    with pytest.raises(UsageError, match="twice"):
        combine(made)
    with pytest.raises(UsageError, match="at least one"):
        combine([])


ODD = [
    '{"set": "test"}', "[1]", '{"set": "test", "target": 0, "scores": 1}',
    '{"set": "test", "target": "x", "scores": {}}',
]  # fmt: skip


@pytest.mark.parametrize("line", ODD)
def test_malformed_items_are_refused(tmp_path: Path, line: str) -> None:
    made = folder(tmp_path)
    (made / "items.jsonl").write_text(line + "\n")
    with pytest.raises(AdapterCorrupt, match="triage"):
        combine([made])


def test_mistakes_are_listed_by_id_and_with_text_only_on_request(three: list[Path]) -> None:
    listed = combine(three).adapters[1].mistakes or []
    assert len(listed) == 20
    assert listed[0].keys() == {"id", "true", "adapter", "base", "confidence"}
    assert listed[0]["true"] == "urgent"
    shown = combine(three, show_text=True).adapters[1].mistakes or []
    assert SECRET in shown[0]["text"]


def test_generated_answers_are_listed_worst_first_and_shown_only_on_request() -> None:
    items = [
        {"id": f"test:{n}", "set": "test", "target": -1, "text": f"Why {n}?",
         "answers": {"reference": "so", "base": "no", "adapter": f"well {n}", "3_shot": "hm"},
         "scores": {"base": {"f1": 0.0, "exact": 0.0}, "adapter": {"f1": f1, "exact": exact}}}
        for n, (f1, exact) in enumerate([(0.5, 0.0), (1.0, 1.0), (0.0, 0.0)])
    ]  # fmt: skip
    assert mistakes(ScoreTable(items), [], show_text=False) == [
        {"id": "test:2", "f1": 0.0, "base_f1": 0.0}, {"id": "test:0", "f1": 0.5, "base_f1": 0.0},
    ]  # fmt: skip
    assert mistakes(ScoreTable(items), [], show_text=True)[1] == {
        "id": "test:0", "f1": 0.5, "base_f1": 0.0, "true": "so", "base": "no",
        "adapter": "well 0", "text": "Why 0?",
    }  # fmt: skip


def test_numbers_are_listed_by_their_error() -> None:
    items = [
        {"id": f"test:{n}", "set": "test", "target": -1, "truth": [12.0],
         "scores": {"base": {"value": 12.5}, "adapter": {"value": value}}}
        for n, value in enumerate([12.25, 4, None])
    ]  # fmt: skip
    assert mistakes(ScoreTable(items), [], show_text=True) == [
        {"id": "test:1", "true": "12", "adapter": "4", "base": "12.5", "error": 8.0},
        {"id": "test:0", "true": "12", "adapter": "12.25", "base": "12.5", "error": 0.25},
    ]


def test_exit_codes_are_the_worst_verdict(three: list[Path], tmp_path: Path) -> None:
    medical, legal, finance = map(str, three)
    out = str(tmp_path / "out")
    assert run("report", medical, "--out", out) == 0
    assert run("report", medical, finance, "--out", out) == 3
    assert run("report", medical, finance, legal, "--out", out) == 1
    assert run("report", str(tmp_path / "nowhere"), "--out", out) == 2
    assert run("report", "--out", out) == 2


def test_every_view_is_written_and_begins_with_the_verdict(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, junit_file = tmp_path / "new" / "out", tmp_path / "elsewhere" / "j.xml"
    assert run("report", *map(str, three), "--out", str(out)) == 1
    assert {p.name for p in out.iterdir()} == FILES
    assert run("report", *map(str, three), "--out", str(out), "--junit", str(junit_file)) == 1
    assert junit_file.read_text() == (out / "junit.xml").read_text()
    assert "Do not ship: 1 of 3 fails" in capsys.readouterr().out
    assert (out / "report.md").read_text().startswith("## ✘ Do not ship: 1 of 3 fails\n")
    page = (out / "report.html").read_text()
    assert "Do not ship: 1 of 3 fails" in page.split("<h1")[1].split("</h1>")[0]
    VALID.validate(json.loads((out / "report.json").read_text()))


def test_row_text_appears_only_on_request(three: list[Path], tmp_path: Path) -> None:
    run("report", *map(str, three), "--out", str(tmp_path / "private"))
    for path in (tmp_path / "private").iterdir():
        assert "planted-7f3a" not in path.read_text(), path.name
    run("report", *map(str, three), "--out", str(tmp_path / "shown"), "--show-text")
    page = (tmp_path / "shown" / "report.html").read_text()
    assert "planted-7f3a &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


def test_missing_row_text_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = folder(tmp_path)
    assert run("report", str(made), "--out", str(tmp_path / "out"), "--show-text") == 0
    assert "hold no text" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, out = folder(tmp_path), tmp_path / "out"
    report = combine([made])
    save_report(report, out)
    before = (out / "report.json").read_text()

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_domains.atomic.os.fsync", refuse)
    with pytest.raises(UsageError, match="No space left"):
        save_report(replace(report, since=None), out)
    assert (out / "report.json").read_text() == before
    assert {p.name for p in out.iterdir()} == FILES


def test_a_file_as_output_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert run("report", str(folder(tmp_path)), "--out", str(tmp_path / "out")) == 2


@pytest.mark.slow
def test_a_report_imports_no_torch(three: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from lora_domains.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'peft', 'accelerate'} & sys.modules.keys()\n"
        "    print('HEAVY', sorted(heavy))\n"
    )
    arguments = ["report", *map(str, three), "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "HEAVY []" in done.stdout


@pytest.mark.slow
def test_the_benchmark_of_rebuilding_runs() -> None:
    script = ROOT / "benchmarks" / "speed" / "rebuild.py"
    arguments = ["--adapters", "2", "--items", "2200", "--quick"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"].keys() == FILES
    assert found["cpu_seconds"] < 10


# ── A view from outside the package ─────────────────────────────────────────────────────────────


def lines(report: Report) -> str:
    """A view: a line for each adapter."""
    return "".join(f"{entry.path},{entry.outcome}\n" for entry in report.adapters)


def test_a_new_view_is_one_function_and_one_registration(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VIEWS, "report.csv", lines)
    save_report(combine(three), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"report.csv"}
    wanted = "medical,pass\nlegal,fail\nfinance,inconclusive\n"
    assert (tmp_path / "report.csv").read_text() == wanted
