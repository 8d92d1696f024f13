"""Benchmarks of many adapters: equal to single evaluations, resumed, shared by processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.benchmarks import DOMAINS, QUESTIONS, SUITE, loaded
from support.commands import run
from support.folders import VALID
from support.models import model_in

from lora_domains.adapters.folder import fingerprint
from lora_domains.console import Display
from lora_domains.data.leaks import Leaks
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.evaluation import scorer, store
from lora_domains.evaluation.leak_search import every_leak
from lora_domains.evaluation.store import Store
from lora_domains.probes.suite import Probe, Suite
from lora_domains.report.report import combine
from lora_domains.tasks import MultipleChoice
from lora_domains.verdict.ledger import level


class OwnQuestions(MultipleChoice):
    """A user's kind of task."""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Two adapters, trained and evaluated."""
    out = tmp_path_factory.mktemp("adapters")
    model = model_in(out, tiny_base)
    for domain in DOMAINS:
        model.fit(domain)
        model.evaluate(domain, suite=SUITE)
    return out


def close(one: Any, two: Any) -> bool:
    """Whether two JSON values are equal, numbers to 1e-5."""
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(close(one[k], two[k]) for k in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(one, float):
        return bool(one == pytest.approx(two, abs=1e-5))
    return bool(one == two)


@pytest.mark.slow
def test_a_benchmark_gives_the_scores_of_single_evaluations(
    adapters: Path, tiny_base: Path, tmp_path: Path
) -> None:
    benchmark = loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path)
    VALID.validate(json.loads(json.dumps(benchmark.report.to_json())))
    for entry in (entry.to_json() for entry in benchmark.report.adapters):
        name = entry["domain"]
        # The same adapter on the same rows is charged once.
        assert (entry["evaluations"]["number"], entry["evaluations"]["level"]) == (1, level(5))
        card = json.loads((adapters / name / "card.json").read_text())["adapters"][0]
        for part in ("domain_scores", "general", "confusion", "gates", "calibration",
                     "memorisation"):  # fmt: skip
            assert close(entry[part], card[part]), (name, part)
        assert entry["judged"]["embedded_base"] is False
        # The validation rows choose the same threshold.
        assert close(entry["judged"]["threshold"], card["judged"]["threshold"])
        assert (card["judged"]["threshold"] is not None) == (name == "spam")
        assert close(entry.get("curve"), card.get("curve"))
        lines = (adapters / name / "items.jsonl").read_text().splitlines()
        stored = {(i["set"], i["id"]): i["scores"] for i in map(json.loads, lines)}
        assert len(stored) == len(benchmark.items[name])
        for item in benchmark.items[name]:
            assert close(item["scores"], stored[item["set"], item["id"]])
    matrix = benchmark.report.matrix
    assert (matrix["rows"], matrix["columns"]) == (["spam", "triage"], ["spam", "triage"])
    for at, entry in enumerate(benchmark.report.to_json()["adapters"]):
        score = entry["domain_scores"][matrix["metrics"][at]]
        assert matrix["base"][at] == pytest.approx(score["base"])
        assert matrix["values"][at][at] == pytest.approx(score["adapter"])
    assert all(value is not None for row in matrix["values"] for value in row)
    benchmark.save(tmp_path / "report")
    folders = sorted((tmp_path / "report" / "measured").iterdir())
    assert close(combine(folders).to_json(), benchmark.report.to_json())
    assert close(combine(folders).matrix, matrix)


@pytest.mark.slow
def test_a_stopped_benchmark_continues_and_a_finished_one_scores_nothing(
    adapters: Path, tiny_base: Path, tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(adapters, tiny_base)
    whole = model.benchmark(SUITE, DOMAINS, tmp_path / "whole")
    monkeypatch.setattr(scorer, "BLOCK", 16)
    append, writes = Store.append, []

    def append_and_die(store: Store, path: Path, scores: Mapping[int, dict[str, float]]) -> None:
        append(store, path, scores)
        writes.append(len(scores))
        if len(writes) == 5:
            with path.open("a") as file:  # a line that a kill cut off
                file.write('{"item": 99, "sc')
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "append", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    before = sum(writes)
    again = model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    for entry, other in zip(
        again.report.to_json()["adapters"], whole.report.to_json()["adapters"], strict=True
    ):
        assert close(entry, other)
    # The run that was stopped before its gates is not in the ledger.
    lines = (project / ".lora-domains" / "evaluations.jsonl").read_text().splitlines()
    assert sum('"adapter"' in line for line in lines) == 2 * len(DOMAINS)
    total = sum(writes)
    lines = sum(
        line.startswith('{"item"') and line.endswith("}")
        for path in (tmp_path / "stopped" / ".scores").iterdir()
        for line in path.read_text().splitlines()
    )
    assert 0 < before < total == lines  # each score was computed once
    model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    assert sum(writes) == total


@pytest.mark.slow
def test_training_rows_are_checked_for_leaks_of_the_suite(
    adapters: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = DOMAINS[0].data.train
    assert isinstance(train, list)
    leaked = {**QUESTIONS[0], "question": f"text: {train[0]['text']}\nlabel:"}
    probe = replace(SUITE.probes[0], rows=[leaked, *QUESTIONS])
    model = loaded(adapters, tiny_base)
    model.display = Display()
    benchmark = model.benchmark(
        replace(SUITE, name="other", probes=(probe,)), DOMAINS[:1], tmp_path
    )
    entries = {entry.domain: entry for entry in benchmark.report.adapters}
    assert entries["spam"].leaks["exact"] == 1
    assert entries["spam"].verdict == "fail"
    assert entries["triage"].leaks["exact"] == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "triage: other was not checked for leaks into its training rows" in output
    assert "spam: other was not checked" not in output


@pytest.mark.slow
def test_a_changed_prompt_or_code_is_scored_again(
    adapters: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(adapters, tiny_base)
    model.benchmark(SUITE, out=tmp_path)
    files = set((tmp_path / ".scores").iterdir())
    probe = Probe("world", MultipleChoice(prompt="{question} now"), QUESTIONS)
    model.benchmark(Suite("world", (probe,), SUITE.text), out=tmp_path)
    more = set((tmp_path / ".scores").iterdir())
    assert len(more - files) == 3  # base and both adapters on other prompts; the same texts
    monkeypatch.setattr(store, "code_version", lambda: "another")
    model.benchmark(SUITE, out=tmp_path)
    everything = set((tmp_path / ".scores").iterdir())
    assert len(everything - more) == 5
    # Scores of code outside the package are not stored, since that may change unseen.
    probe = Probe("world", OwnQuestions(prompt="{question} then"), QUESTIONS)
    model.benchmark(Suite("world", (probe,), SUITE.text), out=tmp_path)
    assert set((tmp_path / ".scores").iterdir()) == everything


def test_stored_scores_hold_no_text(adapters: Path, tiny_base: Path, tmp_path: Path) -> None:
    loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path).save(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert "alpha beta" not in path.read_text(encoding="utf-8"), path


def test_a_bank_without_evaluated_adapters_is_refused(
    tiny_base: Path, tmp_path: Path, adapters: Path
) -> None:
    model = model_in(tmp_path, tiny_base)
    with pytest.raises(UsageError, match="at least one loaded adapter"):
        model.benchmark(SUITE)
    model.load_adapter(adapters / "spam")
    card = model.bank["spam"].card
    assert card is not None
    card.adapter.judged = {}
    with pytest.raises(UsageError, match="without a verdict"):
        model.benchmark(SUITE, out=tmp_path)


def _train(domain: Domain) -> list[Any]:
    assert isinstance(domain.data.train, list)
    return domain.data.train


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (replace(DOMAINS[1], name="another"), "at least one adapter of this domain"),
        (replace(DOMAINS[1], data=replace(DOMAINS[1].data, train=_train(DOMAINS[1])[:30])),
         "the train rows of its training"),
        (with_settings(DOMAINS[1], max_length=64), "rows of at most 128 tokens"),
    ],
    ids=["another domain", "other rows", "another length"],
)  # fmt: skip
def test_a_domain_that_fits_no_adapter_is_refused_before_anything_is_scored(
    adapters: Path, tiny_base: Path, tmp_path: Path, other: Domain, words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        loaded(adapters, tiny_base).benchmark(SUITE, [DOMAINS[0], other], tmp_path)
    assert not (tmp_path / ".scores").exists()


def test_other_general_text_than_in_training_is_warned_of(
    adapters: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [{"text": f"river {n} of a cloud"} for n in range(20)]
    other = replace(DOMAINS[1], data=replace(DOMAINS[1].data, general=texts))
    model = loaded(adapters, tiny_base)
    model.display = Display()
    model.benchmark(SUITE, [other], tmp_path)
    assert "the general text differs from that in the training of triage" in " ".join(
        capsys.readouterr().out.split()
    )


def test_leaks_are_searched_for_once_per_domain_and_each_adapter_is_hashed_once(
    adapters: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    searched: list[str] = []
    hashed: list[Path] = []

    def counting(dataset: Dataset, *args: Any, **options: Any) -> Leaks:
        searched.append(dataset.domain.name)
        return every_leak(dataset, *args, **options)

    def counted(folder: Path) -> str:
        hashed.append(folder)
        return fingerprint(folder)

    monkeypatch.setattr("lora_domains.evaluation.leak_search.every_leak", counting)
    monkeypatch.setattr("lora_domains.evaluation.scorer.fingerprint", counted)
    model = loaded(adapters, tiny_base)
    model.load_adapter(adapters / "spam", name="copy")
    card = model.bank["copy"].card
    assert card is not None
    card.adapter.sha256 = "0" * 64  # as if it had been trained anew
    model.display = Display()
    benchmark = model.benchmark(SUITE, DOMAINS, tmp_path)
    # Before anything is scored, each evaluation is numbered as the ledger will record it.
    announced = re.findall(r"Evaluation (\d) of 5", capsys.readouterr().out)
    assert announced == ["1", "2", "1"]
    recorded = {e.path: e.evaluations["number"] for e in benchmark.report.adapters if e.evaluations}
    assert sorted(recorded.values()) == [1, 1, 2]
    assert searched == ["spam", "triage"]
    assert sorted(hashed) == sorted(model.bank[name].path for name in model.domains)
    assert [entry.leaks["exact"] for entry in benchmark.report.adapters] == [0, 0, 0]


def test_the_command_writes_a_report_and_exits_with_the_worst_verdict(
    adapters: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    code = run("benchmark", *map(str, sorted(adapters.iterdir())[-2:]), "--base", str(tiny_base),
               "--suite", str(questions), "--limit", "20", "--out", str(tmp_path))  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    verdicts = {entry["verdict"] for entry in report["adapters"]}
    worst = next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[worst]
    assert {e["judged"]["suite"] for e in report["adapters"]} == {"questions"}
    assert {e["general"]["pooled"]["n"] for e in report["adapters"]} == {20}
    assert "report.html" in capsys.readouterr().out


SCRIPT = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from support.benchmarks import DOMAINS, SUITE, loaded
benchmark = loaded(Path({adapters!r}), Path({base!r})).benchmark(SUITE, DOMAINS, Path({out!r}))
from lora_domains import distributed
if distributed.is_main():
    assert distributed.state().num_processes == 2
    entries = benchmark.report.to_json()["adapters"]
    Path({out!r}, "measured.json").write_text(json.dumps([entries, benchmark.items]))
"""


@pytest.mark.long
@pytest.mark.slow
def test_two_processes_share_the_scoring_and_get_the_same_scores(
    adapters: Path, tiny_base: Path, tmp_path: Path
) -> None:
    one = loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path / "one")
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), adapters=str(adapters),
                                 base=str(tiny_base), out=str(tmp_path)))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    entries, items = json.loads((tmp_path / "measured.json").read_text())
    assert close(items, json.loads(json.dumps(one.items)))
    for two, alone in zip(entries, one.report.adapters, strict=True):
        assert close(two["gates"], alone.gates)
    stored = [
        sum(bool(line) for path in folder.iterdir() for line in path.read_text().splitlines())
        for folder in (tmp_path / ".scores", tmp_path / "one" / ".scores")
    ]
    assert stored[0] == stored[1]  # no score twice
