"""Many adapters on the same items: equal to one at a time, kept, resumed, shared by processes."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.folders import VALID

from lora_domains.cli.main import main
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import UsageError
from lora_domains.evaluation import scorer as scorer_file
from lora_domains.evaluation import store as store_file
from lora_domains.evaluation.store import Store
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Probe, Suite
from lora_domains.report.report import combine
from lora_domains.tasks import Classification, MultipleChoice, Task
from lora_domains.verdict.ledger import level

QUIET = Display(quiet=True)
WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "stone"]
ASKED = [
    {"question": f"The word after {a} is", "choices": [b, "river", "cloud of stone"], "answer": 0}
    for a in WORDS for b in WORDS[:4] if a != b
]  # fmt: skip
SUITE = Suite(
    "world", (Probe("world", MultipleChoice(prompt="{question}"), ASKED),),
    lambda: [f"the {word} of a river is red and blue" for word in WORDS],
)  # fmt: skip


def rows(good: str, bad: str) -> list[dict[str, str]]:
    found = []
    for a in WORDS:
        for b in WORDS:
            label = good if WORDS.index(b) % 2 else bad
            found.append({"text": f"{a} {b} now", "label": label})
    return found


def domain(name: str, good: str, bad: str, task: Task = Classification()) -> Domain:  # noqa: B008
    made = rows(good, bad)
    random.Random(name).shuffle(made)
    data = Data(made[:40], made[40:52], made[52:])
    fast = {"lr": 0.01, "batch_size": 16, "rank": 4, "epochs": 1, "retention": "none"}
    return with_settings(Domain(name, task, data), **fast)


DOMAINS = [
    domain("spam", "spam", "ham", Classification(positive="spam", target_recall=0.9)),
    domain("triage", "urgent", "routine"),
]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """Two adapters, trained and evaluated."""
    out = tmp_path_factory.mktemp("adapters")
    model = DomainModel.from_pretrained(tiny_base, out=out, display=QUIET, device="cpu")
    for made in DOMAINS:
        model.fit(made)
        model.evaluate(made, suite=SUITE)
    return out


def loaded(adapters: Path, base: Path) -> DomainModel:
    model = DomainModel.from_pretrained(base, out=adapters, display=QUIET, device="cpu")
    for name in ("spam", "triage"):
        model.load_adapter(adapters / name)
    return model


def close(one: Any, two: Any) -> bool:
    """Equal, numbers to 1e-5."""
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(close(one[k], two[k]) for k in one)
    if isinstance(one, Sequence) and not isinstance(one, str):
        return len(one) == len(two) and all(map(close, one, two))
    if isinstance(one, float):
        return bool(one == pytest.approx(two, abs=1e-5))
    return bool(one == two)


@pytest.mark.slow
def test_all_at_once_gives_what_one_at_a_time_gives(
    adapters: Path, tiny_base: Path, tmp_path: Path
) -> None:
    found = loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path)
    VALID.validate(json.loads(json.dumps(found.report.to_json())))
    for entry in (entry.to_json() for entry in found.report.adapters):
        name = entry["domain"]
        # The same adapter on the same rows: one look more, at the same level.
        assert entry["looks"]["before"] >= 1
        assert (entry["looks"]["adapters"], entry["looks"]["level"]) == (0, level(0))
        card = json.loads((adapters / name / "card.json").read_text())["adapters"][0]
        for part in ("domain_scores", "general", "confusion", "gates", "calibration",
                     "memorisation"):  # fmt: skip
            assert close(entry[part], card[part]), (name, part)
        # The validation rows choose the same threshold, here and there.
        assert close(entry["judged"]["threshold"], card["judged"]["threshold"])
        assert (card["judged"]["threshold"] is not None) == (name == "spam")
        assert close(entry.get("curve"), card.get("curve"))
        lines = (adapters / name / "items.jsonl").read_text().splitlines()
        stored = {(i["set"], i["id"]): i["scores"] for i in map(json.loads, lines)}
        assert len(stored) == len(found.items[name])
        for item in found.items[name]:
            assert close(item["scores"], stored[item["set"], item["id"]])
    matrix = found.report.matrix
    assert (matrix["rows"], matrix["columns"]) == (["spam", "triage"], ["spam", "triage"])
    for at, entry in enumerate(found.report.to_json()["adapters"]):
        score = entry["domain_scores"][matrix["metrics"][at]]
        assert matrix["base"][at] == pytest.approx(score["base"])
        assert matrix["values"][at][at] == pytest.approx(score["adapter"])
    assert all(value is not None for row in matrix["values"] for value in row)
    found.save(tmp_path / "report")
    folders = sorted((tmp_path / "report" / "measured").iterdir())
    assert close(combine(folders).to_json(), found.report.to_json())
    assert close(combine(folders).matrix, matrix)


@pytest.mark.slow
def test_a_stopped_run_goes_on_and_a_finished_one_scores_nothing(
    adapters: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(adapters, tiny_base)
    whole = model.benchmark(SUITE, DOMAINS, tmp_path / "whole")
    monkeypatch.setattr(scorer_file, "BLOCK", 16)
    append, writes = Store.append, []

    def dies(store: Store, path: Path, scores: Mapping[int, dict[str, float]]) -> None:
        append(store, path, scores)
        writes.append(len(scores))
        if len(writes) == 5:
            with path.open("a") as file:  # a line that a kill cut off
                file.write('{"item": 99, "sc')
            raise KeyboardInterrupt

    monkeypatch.setattr(Store, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    before = sum(writes)
    again = model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    for entry, other in zip(
        again.report.to_json()["adapters"], whole.report.to_json()["adapters"], strict=True
    ):
        # A run that is stopped before it judges has not looked.
        assert entry["looks"]["before"] == other["looks"]["before"] + 1
        assert close(entry | {"looks": None}, other | {"looks": None})
    total = sum(writes)
    lines = sum(
        line.startswith('{"item"') and line.endswith("}")
        for path in (tmp_path / "stopped" / ".scores").iterdir()
        for line in path.read_text().splitlines()
    )
    assert 0 < before < total == lines  # each score was made once
    model.benchmark(SUITE, DOMAINS, tmp_path / "stopped")
    assert sum(writes) == total


@pytest.mark.slow
def test_another_suite_is_looked_for_in_the_training_rows(
    adapters: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = DOMAINS[0].data.train
    assert isinstance(train, list)
    taught = {**ASKED[0], "question": f"text: {train[0]['text']}\nlabel:"}
    probe = replace(SUITE.probes[0], rows=[taught, *ASKED])
    model = loaded(adapters, tiny_base)
    model.display = Display()
    found = model.benchmark(replace(SUITE, name="other", probes=(probe,)), DOMAINS[:1], tmp_path)
    entries = {entry.domain: entry for entry in found.report.adapters}
    assert entries["spam"].leaks["exact"] == 1
    assert entries["spam"].verdict == "fail"
    assert entries["triage"].leaks["exact"] == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "triage: other was not checked for leaks into its training rows" in output
    assert "spam: other was not checked" not in output


@pytest.mark.slow
def test_a_changed_prompt_or_code_is_scored_anew(
    adapters: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(adapters, tiny_base)
    model.benchmark(SUITE, out=tmp_path)
    files = set((tmp_path / ".scores").iterdir())
    probe = Probe("world", MultipleChoice(prompt="{question} now"), ASKED)
    model.benchmark(Suite("world", (probe,), SUITE.text), out=tmp_path)
    more = set((tmp_path / ".scores").iterdir())
    assert len(more - files) == 3  # base and two adapters on other prompts; the texts are the same
    monkeypatch.setattr(store_file, "code_version", lambda: "another")
    model.benchmark(SUITE, out=tmp_path)
    assert len(set((tmp_path / ".scores").iterdir()) - more) == 5


def test_stored_scores_hold_no_text(adapters: Path, tiny_base: Path, tmp_path: Path) -> None:
    loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path).save(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert "alpha beta" not in path.read_text(encoding="utf-8"), path


def test_nothing_resident_or_never_evaluated_is_refused(
    tiny_base: Path, tmp_path: Path, adapters: Path
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=QUIET, device="cpu")
    with pytest.raises(UsageError, match="resident"):
        model.benchmark(SUITE)
    model.load_adapter(adapters / "spam")
    card = model.bank["spam"].card
    assert card is not None
    card.adapter.judged = {}
    with pytest.raises(UsageError, match="without a verdict"):
        model.benchmark(SUITE, out=tmp_path)


def test_the_verb_writes_a_report_and_exits_with_the_worst_verdict(
    adapters: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in ASKED))
    with pytest.raises(SystemExit) as stopped:
        main(["benchmark", *map(str, sorted(adapters.iterdir())[-2:]), "--base", str(tiny_base),
              "--suite", str(questions), "--limit", "20", "--out", str(tmp_path)])  # fmt: skip
    report = json.loads((tmp_path / "report.json").read_text())
    verdicts = {entry["verdict"] for entry in report["adapters"]}
    worst = next(v for v in ("fail", "inconclusive", "pass") if v in verdicts)
    assert stopped.value.code == {"pass": 0, "fail": 1, "inconclusive": 3}[worst]
    assert {e["judged"]["suite"] for e in report["adapters"]} == {"questions"}
    assert {e["general"]["pooled"]["n"] for e in report["adapters"]} == {20}
    assert "report.html" in capsys.readouterr().out


TWO = """
import json, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/evaluation"]
from pathlib import Path
import test_benchmark as t
model = t.loaded(Path({adapters!r}), Path({base!r}))
found = model.benchmark(t.SUITE, t.DOMAINS, Path({out!r}))
from lora_domains import distributed
if distributed.is_main():
    assert distributed.state().num_processes == 2
    entries = found.report.to_json()["adapters"]
    Path({out!r}, "found.json").write_text(json.dumps([entries, found.items]))
"""


@pytest.mark.slow
def test_two_processes_share_the_work_and_get_the_same(
    adapters: Path, tiny_base: Path, tmp_path: Path
) -> None:
    one = loaded(adapters, tiny_base).benchmark(SUITE, DOMAINS, tmp_path / "one")
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=str(ROOT / "tests"), adapters=str(adapters),
                                 base=str(tiny_base), out=str(tmp_path)))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(script)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    entries, items = json.loads((tmp_path / "found.json").read_text())
    assert close(items, json.loads(json.dumps(one.items)))
    for two, alone in zip(entries, one.report.adapters, strict=True):
        assert close(two["gates"], alone.gates)
    lines = [
        line for path in (tmp_path / ".scores").iterdir() for line in path.read_text().splitlines()
    ]
    others = [
        line
        for path in (tmp_path / "one" / ".scores").iterdir()
        for line in path.read_text().splitlines()
    ]
    assert len([x for x in lines if x]) == len([x for x in others if x])  # none twice
