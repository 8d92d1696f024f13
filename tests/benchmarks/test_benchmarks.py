"""Benchmarks run, on a small model, and what they store is what the tables are made from."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from support import device
from support.adapters import token_ids
from support.scripts import script

from lora_domains.console import Clock
from lora_domains.domain import Training
from lora_domains.modeling import checkpoint
from lora_domains.modeling.base import load_base
from lora_domains.training.retention import AUTO
from lora_domains.verdict.side_effects import DRIFT_LIMIT

SPEED = ROOT / "benchmarks" / "speed"
EXPERIMENTS = ("swap", "mixed_batch", "overhead", "residency")


def experiment(monkeypatch: pytest.MonkeyPatch, *flags: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["swap.py", "--quick", *flags])
    return script("measure", "speed").Experiment("swap", None)


OTHERS = ("evaluation", "rebuild")
"""Scripts whose results have a form of their own."""

# One process for all of them: importing torch and PEFT takes longer than any.
RUN = """
import runpy, sys
folder, out, *names = sys.argv[1:]
sys.path.insert(0, folder)
for name in names:
    sys.argv = [name + ".py", "--quick", "--out", out]
    runpy.run_path(folder + "/" + name + ".py", run_name="__main__")
sys.argv = ["report.py", "--results", out, "--readme", out + "/README.md"]
runpy.run_path(folder + "/report.py", run_name="__main__")
"""


def assert_result(result: dict[str, Any], name: str) -> None:
    assert result["experiment"] == name
    assert result["command"] == f"python benchmarks/speed/{name}.py --quick"
    assert {"torch", "transformers", "peft", "device", "cores", "threads", "git"} <= result[
        "environment"
    ].keys()
    assert len(result["load"]["before"]) == len(result["load"]["after"]) == 3
    assert result["settings"]["quick"] is True
    assert len({figure["name"] for figure in result["figures"]}) == len(result["figures"])
    for figure in result["figures"]:
        assert figure.keys() == {
            "name",
            "unit",
            "better",
            "ours",
            "peft",
            "goal",
            "reached",
            "runs",
        }
        assert math.isfinite(figure["ours"])
        assert (figure["goal"] is None) == (figure["reached"] is None)
        assert all(len(runs) == result["settings"]["rounds"] for runs in figure["runs"].values())


@pytest.mark.long
@pytest.mark.slow
def test_each_script_runs_and_stores_figures(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8"))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(SPEED), str(tmp_path), *EXPERIMENTS, *OTHERS],
        cwd=ROOT,
        capture_output=True, text=True, check=False, timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for name in EXPERIMENTS:
        assert f"{name} on cpu" in done.stdout
        found[name] = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
        assert_result(found[name], name)
        assert str(tmp_path) not in json.dumps(found[name])
    values = {f["name"]: f["ours"] for result in found.values() for f in result["figures"]}
    # Figures that do not depend on the load of the machine must be right in a trial as well.
    for threads in (2, 4, 8):
        assert values[f"right answers, {threads} threads × domains"] == 1.0
    assert values["largest difference of a logit from PEFT's"] < 1e-4
    assert values["adapters evicted per pass, fit"] == 0
    assert values["adapters evicted per pass, twice"] == 4
    assert (tmp_path / "speed.svg").read_text(encoding="utf-8").count("one token") >= 2
    text = readme.read_text(encoding="utf-8")
    for name in values:
        assert f"| {name} |" in text
    assert text.count("for trial only") == len(EXPERIMENTS)
    evaluated = json.loads((tmp_path / "evaluation.json").read_text())["cpu float32"]
    assert evaluated["largest_share"] < 1e-4
    assert evaluated["questions"] == 8
    assert set(evaluated["seconds"]) == {"peft", "ours"}
    rebuilt = json.loads((tmp_path / "rebuild.json").read_text())
    assert (rebuilt["adapters"], rebuilt["items"]) == (2, 3000)
    assert rebuilt["bytes"].keys() >= {"report.json", "report.html", "report.md"}


@pytest.mark.long
def test_the_script_for_a_gpu_tries_all_its_parts_on_a_cpu() -> None:
    results = ROOT / "benchmarks" / "results"
    before = {path: path.stat().st_mtime_ns for path in results.iterdir()}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--quick"],
        capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr
    for name in ("training", "joint", "mixed_batch", "contract", "overhead", "swap", "evaluation"):
        assert re.search(rf"── {name}: \d+ s, exit status 0", done.stdout)
    both, small, large = ("0.5b", "7b"), ("0.5b",), ("7b",)
    for figure, shapes in (
        ("share of the limit", both), ("over the base", both), ("8bit, memory over", large),
        (r"chosen \(\w+\) over PEFT", small), ("16 domains over one", small),
        ("switch, 16 loaded", small), ("speed over PEFT's", both),
    ):  # fmt: skip
        found = {base for base in both
                 if re.search(rf"{base}, .*{figure}", done.stdout)}  # fmt: skip
        assert found == {*shapes}, figure
    assert {path: path.stat().st_mtime_ns for path in results.iterdir()} == before


def test_the_weights_of_a_large_base_are_drawn_alike_for_every_contender(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(SPEED))
    monkeypatch.setattr(checkpoint, "FORMATS", [*checkpoint.FORMATS])
    shape = script("shape", "speed")
    for tied in (True, False):
        small = dataclasses.replace(shape.SMALL, tied=tied)
        folder = shape.save_base(tmp_path / f"{tied}", small, "cpu")
        ours, plain = load_base(folder, device="cpu"), shape.plain(folder, "float32", "cpu")
        assert ours.identity == load_base(folder, device="cpu").identity
        ids = token_ids().cpu()
        with torch.no_grad():
            assert torch.equal(ours.model(ids).logits, plain(ids).logits)
        weights = sum(p.numel() for p in plain.parameters() if p.ndim > 1)
        looked_up = 0 if tied else small.hidden * small.vocabulary
        assert shape.multiplied(small) == weights - looked_up
    sizes = {name: shape.multiplied(large) for name, large in shape.LARGE.items()}
    assert sizes == {"0.5b": 516_751_360, "7b": 6_607_077_376}


@pytest.mark.parametrize("chosen", ["cuda", "gpu"])
def test_tests_refuse_a_device_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"--device {chosen}: (torch .* finds no GPU|expected)"):
        device.use(chosen)


def test_the_tokens_of_tests_are_on_a_device_that_is_set_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "name", "meta")
    assert token_ids().device.type == "meta"


def test_contenders_take_turns_and_warming_up_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    after = {"b": lambda: order.append("-")}
    runs = experiment(monkeypatch).turns(works, per={"a": 1, "b": 2, "c": 3}, after=after)
    assert {name: len(of) for name, of in runs.items()} == {"a": 2, "b": 2, "c": 2}
    assert "".join(order) == "cab-ab-cb-ca"


def test_goals_are_judged_on_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = experiment(monkeypatch)
    kept.figure("time", "ms", [0.001, 0.009, 0.002], [0.004] * 3, at_most=2.0)
    kept.figure("late", "ms", [0.003] * 3, at_most=2.0)
    kept.figure("rate", "rows/s", 3.0, 2.0, at_least=4.0)
    kept.against_peft("slower", "×", {"ours": [2.0], "peft": [1.0]})
    kept.figure("open", "", 1.0)
    found = {f["name"]: f for f in kept.figures}
    assert (found["time"]["ours"], found["time"]["peft"]) == (2.0, 4.0)
    assert {name: f["reached"] for name, f in found.items()} == {
        "time": True, "late": False, "rate": False, "slower": False, "open": None,
    }  # fmt: skip
    advantage = script("report", "speed").advantage
    assert [advantage(f) for f in found.values()] == [2.0, None, 1.5, 0.5, None]


def test_a_quick_trial_never_replaces_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert experiment(monkeypatch).out is None
    assert experiment(monkeypatch, "--out", "there").out == Path("there")
    measure = script("measure", "speed")
    monkeypatch.setattr(sys, "argv", ["swap.py"])
    assert measure.Experiment("swap", None).out == ROOT / "benchmarks" / "results"


def test_a_busy_machine_is_noticed_said_and_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, report = script("measure", "speed"), script("report", "speed")
    monkeypatch.setattr(measure, "SECONDS", 0.01)
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", ["swap.py", "--quick", "--threads", "2", "--out", str(tmp_path)]
    )

    def machine(share: float, load: float) -> dict[str, Any]:
        """What is stored on a machine whose other processes leave a ``share`` to ours."""
        clock = time.perf_counter
        monkeypatch.setattr(measure.time, "process_time", lambda: 2 * share * clock())
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        measure.Experiment("swap", None).save({})
        stored: dict[str, Any] = json.loads((tmp_path / "swap.json").read_text(encoding="utf-8"))
        return stored

    try:
        quiet = machine(0.99, 1.0)
        assert quiet["busy"] is False
        assert "WARNING" not in capsys.readouterr().out
        waiting = machine(0.5, 1.0)
        said = "this machine is busy: 2 threads run only 50 % of the time, and wait for each other"
        assert capsys.readouterr().out.count(said) == 2  # before and after
        loaded = machine(0.99, 1000.0)
        assert "the load is 1000.0 on " in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)
    marked = ["busy machine" in report.table(one) for one in (quiet, waiting, loaded)]
    assert marked == [False, True, True]


def test_a_whole_run_rotates_its_contenders_and_names_its_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(SPEED))
    whole = script("whole_run", "speed")
    order: list[str] = []

    def finished(_: Any, command: list[str], folder: Path) -> tuple[float, str]:
        order.append(command[-1] if "--padding" in command else "ours")
        train = Path(command[command.index("--train") + 1 if "--train" in command else 1])
        assert len(train.read_text(encoding="utf-8").splitlines()) == 30
        return 2.0, "ended"

    monkeypatch.setattr(whole, "finished", finished)
    monkeypatch.setattr(whole, "phases", lambda *_: {"training": 1.0})
    words = ["--quick", "--rounds", "3", "--train", "30", "--test", "20", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["whole_run.py", *words])
    whole.main()
    ours, longest, maximum = "ours", "longest", "maximum"
    assert order == [ours, longest, maximum, longest, maximum, ours, maximum, ours, longest]
    stored = json.loads((tmp_path / "whole_run.json").read_text(encoding="utf-8"))
    assert stored["settings"]["rows"]["sms_spam"] == {"base": "base", "train": 30, "test": 20}
    names = [figure["name"] for figure in stored["figures"]]
    assert all(name.startswith("sms_spam, 30 train rows and 20 test rows: ") for name in names)
    order.clear()
    monkeypatch.setattr(sys, "argv", ["whole_run.py", *words, "--padding", "longest"])
    whole.main()
    assert order == [ours, longest, longest, ours, ours, longest]


def test_the_readme_shows_what_is_stored() -> None:
    report = script("report", "speed")
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    results = report.stored(ROOT / "benchmarks" / "results")
    assert report.section(results, f"results/{report.PLOT}") in text
    assert not [result["command"] for result in results if result["settings"]["quick"]]


def test_the_readme_shows_what_keeps_general_knowledge() -> None:
    experiment = script("retention", "training")
    stored = json.loads((ROOT / "benchmarks" / "results" / "retention.json").read_text())
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert experiment.table(experiment.summary(stored["runs"])) in text
    assert stored["summary"] == json.loads(json.dumps(experiment.summary(stored["runs"])))
    # The default, and the limit of its gate, are what the experiment found.
    limit = stored["calibration"]["limit"]
    assert pytest.approx(limit, abs=0.005) == DRIFT_LIMIT
    chosen = experiment.WAYS[experiment.tied(stored["summary"])[0]]
    assert chosen == {"retention": AUTO[0], "replay": Training().replay}
    # On test rows, the default loses at most a point of general knowledge and scores within a
    # point of the best way.
    for domain in experiment.DOMAINS:
        own = {way: one[domain] for way, one in stored["summary"].items()}
        assert own["default"]["general_lost"]["mean"] <= 0.01
        best = max(one["test"]["mean"] for one in own.values())
        assert own["default"]["test"]["mean"] >= best - 0.01


def test_derived_settings_are_shown_as_they_came_out() -> None:
    settings = script("settings", "training")
    stored = json.loads((ROOT / "benchmarks" / "results" / "settings.json").read_text())
    found = settings.summary(stored["runs"])
    assert stored["summary"] == found
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    assert settings.table(found) in text
    assert settings.other_choices(stored["runs"]) in text
    assert found.keys() == {*settings.RECIPES, *settings.REAL}
    near = sum(one["regret"] <= 0.01 for one in found.values())
    assert f"In {near} of {len(found)} domains" in text
    for one in found.values():
        assert one["swept"] == sum(count for _, count in settings.RUNGS)


def test_estimates_are_compared_by_the_chosen_clock() -> None:
    spent: dict[str, float] = {}
    timed_by = script("duration", "training").timed_by
    with timed_by(iter((1.0, 4.0)).__next__), Clock(spent).phase("steps"):
        pass
    assert spent == {"steps": 3.0}


def test_the_readme_names_every_script() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "benchmarks").rglob("*.py"):
        if path.stem not in ("measure", "shape"):  # what the others are made of
            assert f"`{path.relative_to(ROOT / 'benchmarks')}`" in text, path.name


def test_task_kl_joins_a_stored_run_of_the_same_adapter_only() -> None:
    with_task_kl = script("retention", "training").with_task_kl
    stored = {"way": "plain", "domain": "medical", "test": 0.7, "general_lost": 0.1,
              "scales": [{"scale": 0.5, "general_lost": 0.05}]}  # fmt: skip
    again = {
        **stored,
        "test": 0.6,
        "task_kl": 8.0,
        "scales": [{**stored["scales"][0], "task_kl": 3.0}],
    }
    joined = with_task_kl(stored, again)
    assert joined == {**stored, "task_kl": 8.0, "scales": again["scales"]}
    with pytest.raises(ValueError, match="another adapter"):
        with_task_kl(stored, {**again, "general_lost": 0.2})


def test_the_table_of_real_bases_names_the_best_baseline_of_the_metric() -> None:
    table = script("real", ".").table
    run = {
        "base": "minilm", "metric": "mae", "published": "", "verdict": "pass",
        "rows": {"read": 1200}, "general": {}, "seconds": 90.0,
        "scores": {"mae": {"base": 3.0, "adapter": 1.0, "n": 100,
                                           "baselines": {"majority": 2.5, "tfidf": 2.0}}},
    }  # fmt: skip
    older = {**run, "verdict": "fail"}
    *before, line = table({"scores": older, "scores on NVIDIA H100 80GB HBM3": run}).splitlines()
    assert len(before) == 2  # the head: of each run the latest
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "scores", "minilm", "1,200, 100", "absolute error", "3.000", "TF-IDF 2.000",
        "**1.000**", "", "", "1.5, H100", "pass",
    ]  # fmt: skip


def test_rank_correlations_are_those_of_scipy() -> None:
    from scipy.stats import spearmanr

    retention = script("retention", "training")
    first, second = [0.1, 0.4, 0.2, 0.9, 0.2], [0.0, 0.1, 0.0, 0.5, 0.3]
    expected = spearmanr(first, second).statistic
    assert retention.spearman(first, second) == pytest.approx(expected)


def test_the_readme_says_which_kl_foretells_forgetting() -> None:
    retention = script("retention", "training")
    stored = json.loads((ROOT / "benchmarks" / "results" / "task_kl.json").read_text())
    assert stored["spearman"] == retention.foretold(stored["runs"])
    assert retention.foretold([]) == {}
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    for figures in stored["spearman"].values():
        for name in ("general text", "task inputs"):
            assert f"{figures[name]:.2f}" in text


def test_the_runs_on_general_knowledge_are_ordered_and_summarised() -> None:
    general = script("general", "training")
    ways, domains = list(general.WAYS), ["sms_spam", "medquad"]
    order = general.jobs(Namespace(ways=ways, domains=domains, seeds=3))
    assert len(order) == len(set(order)) == 3 * (2 * len(ways) - 1)
    assert {seed for _, _, seed in order[: 2 * len(ways) - 1]} == {0}
    assert [job for job in order if job[0] == "rewritten answers"] == [
        ("rewritten answers", "medquad", seed) for seed in range(3)
    ]
    measured = {"score": 0.5, "nats": 1.0, "wikitext": 3.0, "kl": 0.1,
                **dict.fromkeys(general.QUESTIONS, 0.4)}  # fmt: skip
    run = {
        "way": "plain", "domain": "medquad", "seed": 0, "adapter": measured, "scales": [],
        "base": measured | {"nats": 1.5, "wikitext": 2.5, "facts": 0.5}, "general_tokens": 0.25,
        "every": 2, "phases": {}, "seconds": 1.0,
    }  # fmt: skip
    row = general.table([run]).splitlines()[-1]
    assert row == "| plain | 0.500, 0.50 | +0.500 | +0.0 | +10.0 | +0.0 | 0.100 | 25% |"
    assert "nats -0.500; lost: WikiText +0.500" in general.line(run)
