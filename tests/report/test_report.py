"""Reports of many adapters: their shape, their verdict, their views, and what got worse."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import jsonschema
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console
from support.folders import (
    CARD,
    FAILS,
    LOOKS,
    PASSES,
    UNSURE,
    VALID,
    VALID_CARD,
    folder,
    items,
    seeds,
)  # fmt: skip

from lora_domains.cli.main import main
from lora_domains.errors import AdapterCorrupt, AdapterMismatch, UsageError
from lora_domains.report import terminal
from lora_domains.report.card import AdapterEntry, BaseRecord, Card, Report, read_items
from lora_domains.report.html import page
from lora_domains.report.junit import junit
from lora_domains.report.markdown import COMMENT, escaped, summary, table
from lora_domains.report.regressions import older_adapters, regressions
from lora_domains.report.report import combine, rebuild, save_report
from lora_domains.report.text import fallen, losses, outcome
from lora_domains.stats.comparisons import compare_f1
from lora_domains.tasks import task_from_record

SECRET = "planted-7f3a <script>alert(1)</script>"
FILES = {"report.json", "report.html", "report.md", "comment.md", "junit.xml"}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An adapter that passes, one that fails and one that is inconclusive; rows hold a secret."""
    there = tmp_path_factory.mktemp("adapters")
    made = []
    for name, counts in (("medical", PASSES), ("legal", FAILS), ("finance", UNSURE)):
        rows = items(counts)
        for n, item in enumerate(rows):
            if item["set"] == "test":
                item["text"] = f"row {n}: {SECRET}"
                item["slices"] = {"ward": "north" if n % 2 else "south"}
                others = {"medical", "legal", "finance"} - {name}
                item["others"] = dict.fromkeys(others, item["scores"]["base"])
        made.append(folder(there, name, rows, looks=LOOKS, seeds=seeds()))
    return made


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["report", *arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


# ── Many adapters, one base ─────────────────────────────────────────────────────────────────────


def test_a_report_holds_what_each_card_says_and_keeps_to_its_schema(three: list[Path]) -> None:
    report = combine(three)
    assert [e.path for e in report.adapters] == ["medical", "legal", "finance"]
    assert [e.verdict for e in report.adapters] == ["pass", "fail", "inconclusive"]
    for made, entry in zip(three, report.adapters, strict=True):
        assert rebuild(made).adapter.to_json().items() <= entry.to_json().items()
        VALID_CARD.validate(rebuild(made).to_json())
    report.since = changes(three, three)
    VALID.validate(json.loads(json.dumps(report.to_json(), allow_nan=False)))


def test_labels_with_brackets_are_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.confusion(
        Console(),
        {"labels": ["[urgent]", "[/b]"], "adapter": [[3, 1], [0, 2]], "base": [[2, 2], [1, 1]]},
    )
    said = capsys.readouterr().out
    assert said.count("[urgent]") == 3
    assert said.count("[/b]") == 3


def test_a_loss_says_what_it_is_counted_in() -> None:
    def entry(judged: str, head: bool) -> AdapterEntry:
        return AdapterEntry(
            domain="x", path="x", sha256=None, judged={"loss": judged},
            settings={"task": {"head": head}},
        )  # fmt: skip

    assert losses(entry("label cross-entropy", False)) == (
        "Loss is label cross-entropy; in the epochs it is nats per answer token, as it is trained."
    )
    same = "Loss is label cross-entropy, here and in the epochs."
    assert losses(entry("label cross-entropy", True)) == same


@pytest.mark.parametrize("where", ["", "adapters/0", "adapters/0/gates/0", "base"])
def test_the_schema_refuses_what_it_does_not_name(three: list[Path], where: str) -> None:
    report: Any = combine(three).to_json()
    part = report
    for step in where.split("/") if where else []:
        part = part[int(step)] if step.isdigit() else part[step]
    part["invented"] = 1
    with pytest.raises(jsonschema.ValidationError, match="invented"):
        VALID.validate(report)


def test_the_targets_of_an_older_card_get_their_current_names(tmp_path: Path) -> None:
    judged, settings = (copy.deepcopy(CARD["adapters"][0][k]) for k in ("judged", "settings"))
    older = {"wanted": {"recall": 0.9}, "threshold": 0.3}
    judged["threshold"] = older
    settings["task"] |= {"wanted_recall": 0.9, "wanted_precision": None}
    path = folder(tmp_path, judged=judged, settings=settings, trained_with=settings,
                  curve={"positive": "urgent", **older})  # fmt: skip
    entry = Card.read(path).adapter
    assert task_from_record(entry.task).targets == {"recall": 0.9}
    assert entry.task == entry.trained_with["task"]
    assert entry.task.keys().isdisjoint({"wanted_recall", "wanted_precision", "loss_unit"})
    assert entry.judged["threshold"] == {"targets": {"recall": 0.9}, "threshold": 0.3}
    assert entry.curve == {"positive": "urgent", "targets": {"recall": 0.9}, "threshold": 0.3}


def test_the_matrix_says_what_each_adapter_does_to_the_other_domains(three: list[Path]) -> None:
    report = combine(three)
    matrix, entries = report.matrix, {e.path: e for e in report.adapters}
    assert matrix["rows"] == matrix["columns"] == ["medical", "legal", "finance"]
    assert matrix["metrics"] == ["f1"] * 3
    for row, name in enumerate(matrix["rows"]):
        for column, domain in enumerate(matrix["columns"]):
            # Here the others answer as the base does.
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


def test_environments_that_differ_are_told_apart(tmp_path: Path) -> None:
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


def test_the_same_name_twice_and_no_folder_at_all_are_refused(tmp_path: Path) -> None:
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
def test_items_of_another_shape_are_named(tmp_path: Path, line: str) -> None:
    made = folder(tmp_path)
    (made / "items.jsonl").write_text(line + "\n")
    with pytest.raises(AdapterCorrupt, match="triage"):
        combine([made])


def test_mistakes_are_listed_by_id_and_their_text_only_when_asked_for(three: list[Path]) -> None:
    mistakes = combine(three).adapters[1].mistakes or []
    assert len(mistakes) == 20
    assert mistakes[0].keys() == {"id", "true", "adapter", "base", "confidence"}
    assert mistakes[0]["true"] == "urgent"
    shown = combine(three, show_text=True).adapters[1].mistakes or []
    assert SECRET in shown[0]["text"]


# ── The verb ────────────────────────────────────────────────────────────────────────────────────


def test_exit_codes_are_the_worst_verdict(three: list[Path], tmp_path: Path) -> None:
    medical, legal, finance = map(str, three)
    out = str(tmp_path / "out")
    assert run(medical, "--out", out) == 0
    assert run(medical, finance, "--out", out) == 3
    assert run(medical, finance, legal, "--out", out) == 1
    assert run(str(tmp_path / "nowhere"), "--out", out) == 2
    assert run("--out", out) == 2


def test_every_view_is_written_and_says_the_verdict_first(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, junit_file = tmp_path / "new" / "out", tmp_path / "elsewhere" / "j.xml"
    assert run(*map(str, three), "--out", str(out)) == 1
    assert {p.name for p in out.iterdir()} == FILES
    assert run(*map(str, three), "--out", str(out), "--junit", str(junit_file)) == 1
    assert junit_file.read_text() == (out / "junit.xml").read_text()
    assert "Do not ship: 1 of 3 fails" in capsys.readouterr().out
    assert (out / "report.md").read_text().startswith("## ✘ Do not ship: 1 of 3 fails\n")
    page = (out / "report.html").read_text()
    assert "Do not ship: 1 of 3 fails" in page.split("<h1")[1].split("</h1>")[0]
    VALID.validate(json.loads((out / "report.json").read_text()))


def test_row_text_is_nowhere_unless_asked_for(three: list[Path], tmp_path: Path) -> None:
    run(*map(str, three), "--out", str(tmp_path / "private"))
    for path in (tmp_path / "private").iterdir():
        assert "planted-7f3a" not in path.read_text(), path.name
    run(*map(str, three), "--out", str(tmp_path / "shown"), "--show-text")
    page = (tmp_path / "shown" / "report.html").read_text()
    assert "planted-7f3a &lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


def test_text_that_is_asked_for_and_not_there_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = folder(tmp_path)
    assert run(str(made), "--out", str(tmp_path / "out"), "--show-text") == 0
    assert "hold no text" in capsys.readouterr().out


def test_a_refused_write_leaves_the_old_file_whole(
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


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert run(str(folder(tmp_path)), "--out", str(tmp_path / "out")) == 2


@pytest.mark.slow
def test_a_report_costs_no_torch(three: list[Path], tmp_path: Path) -> None:
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
    arguments = ["--adapters", "2", "--items", "2200", "--dry-run"]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["bytes"].keys() == FILES
    assert found["cpu_seconds"] < 10


# ── What got worse ──────────────────────────────────────────────────────────────────────────────


def changes(old: list[Path], new: list[Path]) -> dict[str, Any]:
    """What got worse in the adapters ``new`` since ``old``."""
    rows = {path.name: read_items(path) for path in new}
    return regressions(combine(new), rows.__getitem__, {p.name: p for p in old}, "main")


def since(tmp_path: Path, before: Any, now: Any) -> dict[str, Any]:
    old, new = (folder(tmp_path / n, rows=rows) for n, rows in (("old", before), ("new", now)))
    return changes([old], [new])


@pytest.mark.parametrize(
    ("counts", "lost", "worse"),
    [(PASSES, 0, set()), ((458, 42, 30, 470), 0, set()), ((400, 100, 60, 440), 0, {"f1"}),
     (PASSES, 40, {"general"}), ((480, 20, 20, 480), 0, set())],
)  # fmt: skip
def test_a_figure_is_worse_when_it_fell_beyond_its_bounds(
    tmp_path: Path, counts: tuple[int, ...], lost: int, worse: set[str]
) -> None:
    found = since(tmp_path, items(), items(counts, lost=lost))["adapters"]["triage"]
    assert {name for name, f in found["figures"].items() if f["worse"]} == worse
    for figure in found["figures"].values():
        assert figure["lower"] <= figure["change"] <= figure["upper"]


def test_the_same_rows_are_compared_item_by_item_and_others_by_their_gains(
    tmp_path: Path,
) -> None:
    # Of a base that is right half the time the gain is uncertain; what the adapter lost is not.
    random = np.random.default_rng(0)
    before = items((240, 10, 10, 240))
    for item in before:
        if item["set"] == "test":
            item["scores"]["base"]["prediction"] = int(random.integers(2))
    now = copy.deepcopy(before)
    for item in now[:12]:
        item["scores"]["adapter"]["prediction"] = 0
    old, new = (folder(tmp_path / n, rows=rows) for n, rows in (("old", before), ("new", now)))
    figure = changes([old], [new])["adapters"]["triage"]["figures"]["f1"]
    assert (figure["paired"], figure["worse"]) == (True, True)
    entries = [rebuild(path).adapter.domain_scores["f1"] for path in (old, new)]
    assert [figure["before"], figure["now"]] == [e["adapter"] for e in entries]
    truth, was, is_ = (
        np.array(
            [
                s["target"] if k is None else s["scores"]["adapter"][k]
                for s in part
                if s["set"] == "test"
            ]
        )
        for part, k in ((now, None), (before, "prediction"), (now, "prediction"))
    )
    wanted = compare_f1(truth, was, is_, 1)
    assert (figure["lower"], figure["upper"]) == pytest.approx((wanted.lower, wanted.upper))
    # The same figures on other rows: the gains are all there is, and they leave it open.
    card = Card.read(new)
    card.adapter.data = {"test": "f" * 64}
    card.write(new)
    figure = changes([old], [new])["adapters"]["triage"]["figures"]["f1"]
    assert (figure["paired"], figure["worse"]) == (False, False)
    assert [figure["before"], figure["now"]] == [e["difference"] for e in entries]
    assert figure["lower"] < wanted.lower < wanted.upper < figure["upper"]


def test_groups_are_kept_together_when_old_and_new_are_paired(tmp_path: Path) -> None:
    before, now = items((90, 10, 10, 90)), items((80, 20, 10, 90))
    widths = []
    for name in ("alone", "together"):
        folders = []
        for n, rows in enumerate((before, now)):
            if name == "together":
                rows = [r | {"group": f"g{i // 10}"} for i, r in enumerate(rows)]
            folders.append([folder(tmp_path / f"{name}{n}", rows=rows)])
        found = changes(*folders)["adapters"]["triage"]["figures"]["f1"]
        assert found["paired"]
        widths.append(found["upper"] - found["lower"])
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize("part", ["items", "domain_scores", "gates"])
def test_a_broken_older_adapter_is_named(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = folder(tmp_path / "new"), folder(tmp_path / "old")
    if part == "items":
        (old / "items.jsonl").write_text('{"set": "test"}')
    else:
        card = json.loads((old / "card.json").read_text())
        card["adapters"][0][part] = 5
        (old / "card.json").write_text(json.dumps(card))
    out = tmp_path / "out"
    assert run(str(new), "--out", str(out), "--against", str(tmp_path / "old")) == 2
    assert "AdapterCorrupt triage" in capsys.readouterr().err
    assert not out.exists()


def test_a_gate_that_fails_now_is_worse_and_one_left_open_is_shown(tmp_path: Path) -> None:
    found = since(tmp_path / "a", items(), items(FAILS))
    gates = {g["name"]: g for g in found["adapters"]["triage"]["gates"]}
    assert gates["recall"] == {"name": "recall", "before": "pass", "now": "fail", "worse": True}
    assert found["worse"]
    found = since(tmp_path / "b", items(), items(UNSURE))
    gates = {g["name"]: g for g in found["adapters"]["triage"]["gates"]}
    assert (gates["recall"]["now"], gates["recall"]["worse"]) == ("inconclusive", False)
    assert not found["worse"]
    assert "triage: recall was pass, is inconclusive." in fallen(found)


def test_a_lower_loss_is_no_fall(tmp_path: Path) -> None:
    entry = {"judged": CARD["adapters"][0]["judged"] | {"metric": "loss"}}
    one, two = [], []
    for n, sure in enumerate((0.9, 0.99)):
        rows = items()
        for item in rows:
            if item["set"] == "test":
                said = item["scores"]["adapter"]
                said["nll"] = said["nll"] * (1.0 if sure == 0.9 else 0.5)
        (one, two)[n].append(folder(tmp_path / str(n), rows=rows, **entry))
    better = changes(one, two)["adapters"]["triage"]["figures"]["loss"]
    worse = changes(two, one)["adapters"]["triage"]["figures"]["loss"]
    assert (better["worse"], worse["worse"]) == (False, True)


def test_worse_than_the_baseline_is_exit_1_and_shown_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Both pass their gates; the new one found fewer.
    old = folder(tmp_path / "old", rows=items((490, 10, 10, 490)))
    new = folder(tmp_path / "new", rows=items((450, 50, 35, 465)))
    folder(tmp_path / "old", "gone")
    out = tmp_path / "out"
    assert run(str(old), "--out", str(out)) == 0
    capsys.readouterr()
    assert run(str(new), "--out", str(out), "--baseline", str(tmp_path / "old")) == 1
    said = capsys.readouterr().out
    assert "F1 on the same rows went from 0.980 to" in said
    assert "gone was in it" in said
    report = json.loads((out / "report.json").read_text())
    VALID.validate(report)
    assert report["adapters"][0]["verdict"] == "pass"
    assert report["since"]["worse"]
    assert "Do not ship: worse than old" in said
    for view in ("report.md", "report.html"):
        shown = (out / view).read_text()
        assert shown.index("Worse since old") < shown.index("general knowledge")
    cases = Xml.parse(out / "junit.xml").getroot()
    assert cases.attrib["failures"] == "1"
    assert run(str(new), "--out", str(out), "--against", str(tmp_path / "new")) == 0
    # One adapter, such as an earlier version, goes by the name in its card.
    assert run(str(new), "--out", str(out), "--against", str(old)) == 1


def test_older_adapters_on_another_base_or_none_are_refused(tmp_path: Path) -> None:
    made, out = folder(tmp_path), tmp_path / "out"
    folder(tmp_path / "other", base={"identity": "f" * 64})
    assert run(str(made), "--out", str(out), "--against", str(tmp_path / "other")) == 2
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        with pytest.raises(UsageError, match="a folder of older adapters"):
            older_adapters(tmp_path / place)
        assert run(str(made), "--out", str(out), "--against", str(tmp_path / place)) == 2
    (tmp_path / "other" / "triage" / "card.json").write_text("{")
    assert run(str(made), "--out", str(out), "--against", str(tmp_path / "other")) == 2
    assert not out.exists()


# ── Markdown ────────────────────────────────────────────────────────────────────────────────────


def many(report: Report, count: int) -> Report:
    entries = [replace(report.adapters[n % 3], path=f"adapter-{n}") for n in range(count)]
    return replace(report, adapters=entries)


@pytest.mark.parametrize(("count", "limit"), [(3, COMMENT), (60, COMMENT), (2000, COMMENT),
                                              (700, 1024 * 1024), (3, 800)])  # fmt: skip
def test_markdown_keeps_within_its_limit_and_counts_what_it_left_out(
    three: list[Path], count: int, limit: int
) -> None:
    text = summary(many(combine(three), count), limit)
    assert len(text.encode()) <= limit
    assert text.count("<details") == text.count("</details>")
    shown = len(re.findall(r"<summary>", text))
    left_out = re.search(r"(\d+) more adapters in detail", text)
    assert shown + (int(left_out[1]) if left_out else 0) == count
    if count == 3 and limit == COMMENT:
        assert shown == 3
    # Those that fail come first, whatever is left out.
    if "| adapter-" in text:
        assert "✘ fail" in text.split("| adapter-", 1)[1].splitlines()[0]


MARKS = ["<b>", "</b>", "<script>", "<!--", "|", "*x*", "_x_", "[a](b)", "![a](b)", "`c`", "\\",
         "http://a.b", "@team", "# x", "~~s~~", "&lt;", "$x$", "\n\n", "- ", " x "]  # fmt: skip


@given(st.lists(st.sampled_from(MARKS) | st.text(max_size=4), max_size=6).map("".join))
def test_nothing_in_a_name_is_markdown_or_html(name: str) -> None:
    text = "\n".join(table(["a", "b"], [["x", escaped(name)], ["y", "z"]]))
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    cells = [t for t in tokens if t.type == "inline"]
    assert len(cells) == 6
    inside = cells[3].children or []
    assert {child.type for child in inside} <= {"text", "text_special"}
    # It reads as it was, but for what keeps it from being a link or a mention.
    shown = "".join(child.content for child in inside).replace("\u200b", "")
    assert shown == " ".join(name.replace("\0", "\ufffd").split()).replace("\u200b", "")


# ── JUnit ───────────────────────────────────────────────────────────────────────────────────────


def test_junit_has_a_case_for_each_gate(three: list[Path]) -> None:
    report = combine(three)
    root = Xml.fromstring(junit(report).encode())
    suites = {suite.attrib["name"]: suite for suite in root}
    for entry in report.adapters:
        suite = suites[f"lora_domains.{entry.path}"]
        assert [case.attrib["name"] for case in suite] == [g["name"] for g in entry.gates]
        for case, gate in zip(suite, entry.gates, strict=True):
            wanted = {"fail": "failure", "inconclusive": "error", "pass": "system-out"}
            assert [part.tag for part in case] == [wanted[gate["verdict"]]]
            assert gate["why"] in (case[0].text or "") + case[0].attrib.get("message", "")
    verdicts = [g["verdict"] for e in report.adapters for g in e.gates]
    counts = [str(len(verdicts)), str(verdicts.count("fail")), str(verdicts.count("inconclusive"))]
    assert [root.attrib[k] for k in ("tests", "failures", "errors")] == counts


@given(st.text(max_size=30), st.text(max_size=30))
def test_junit_is_xml_whatever_a_report_holds(name: str, why: str) -> None:
    gate = {"name": name, "rule": why, "verdict": "fail", "why": why}
    entry = AdapterEntry(domain="x", path=name, sha256=None, gates=[gate], verdict="fail")
    base = BaseRecord("tiny", None, "0" * 64, "float32", None)
    report = Report(base=base, environment={}, adapters=[entry], matrix={})
    root = Xml.fromstring(junit(report).encode("utf-8", "strict"))
    assert root[0][0][0].tag == "failure"


# ── In CI ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(("now", "code"), [(PASSES, 0), ((400, 100, 60, 440), 1), (FAILS, 1)])
def test_the_workflow_reports_compares_sums_up_and_fails_on_a_gate(
    tmp_path: Path, now: tuple[int, ...], code: int
) -> None:
    import yaml

    workflow = yaml.safe_load((ROOT / ".github/workflows/adapters.yml").read_text())
    steps = {s.get("name"): s for s in workflow["jobs"]["report"]["steps"]}
    save_report(combine([folder(tmp_path / "old")]), tmp_path / "main")
    folder(tmp_path / "adapters", rows=items(now))
    program = tmp_path / ".venv" / "bin" / "lora-domains"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_domains.cli "$@"\n')
    program.chmod(0o755)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "GITHUB_STEP_SUMMARY": str(tmp_path / "job.md")}

    def step(name: str) -> int:
        # The shell of a GitHub runner.
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", steps[name]["run"]], cwd=tmp_path,
                              env=env, capture_output=True, text=True, check=False)  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode

    assert step("Report") == code
    assert step("Summary") == 0
    shown = (tmp_path / "job.md").read_text()
    assert shown.startswith("## ✔ Ship" if code == 0 else "## ✘ Do not ship")
    assert "since report.json" in shown
    # A failed gate must not keep the summary, the comment and the page from appearing.
    for name in ("Summary", "Comment on the pull request", "Page, JSON and JUnit"):
        assert "!cancelled()" in steps[name]["if"]
    assert {p.name for p in (tmp_path / "reports").iterdir()} == FILES
