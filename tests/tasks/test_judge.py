"""A program that judges answers: what it is told, and what goes wrong with it."""

import json
import shlex
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_domains.errors import DomainError, JudgeError
from lora_domains.tasks.answers import TRIAL, Judge

LENGTHS = """
import json, pathlib, sys
rows = [json.loads(line) for line in sys.stdin]
pathlib.Path(sys.argv[1]).write_text(json.dumps(rows))
for row in rows:
    print(len(row["answer"]))
"""
SECRET = "zqhush"


def judge(tmp_path: Path, code: str, *arguments: str, **options: float) -> Judge:
    script = tmp_path / "own" / "judge.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(code)
    return Judge(shlex.join([sys.executable, str(script), *arguments]), **options)


def test_scores_are_restated_and_equal_answers_judged_once(tmp_path: Path) -> None:
    seen = tmp_path / "seen.json"
    own = judge(tmp_path, LENGTHS, str(seen), low=0, high=10)
    asked = [("p\n1", "r", "ab"), ("p2", "r", "ünïcode\u2028"), ("p\n1", "r", "ab"), ("p2", "", "")]
    assert own.scores(asked) == [0.2, 0.8, 0.2, 0.0]
    rows = json.loads(seen.read_text())
    assert [sorted(row) for row in rows] == [["answer", "id", "prompt", "reference"]] * 3
    assert [row["id"] for row in rows] == [0, 1, 2]
    told = {(row["prompt"], row["reference"], row["answer"]) for row in rows}
    assert told == set(asked)


def test_the_order_does_not_tell_who_answered(tmp_path: Path) -> None:
    """Answers of two contenders, one after the other, are mixed; the same way each time."""
    seen = tmp_path / "seen.json"
    own = judge(tmp_path, LENGTHS, str(seen), high=10)
    asked = [(f"p{n}", "r", who) for who in ("base", "tuned") for n in range(40)]
    orders = []
    for _ in range(2):
        own.scores(asked)
        orders.append([row["answer"] for row in json.loads(seen.read_text())])
    first_half = orders[0][:40].count("base")
    assert 10 < first_half < 30
    assert orders[0] == orders[1]


@pytest.mark.parametrize(("code", "message"), [
    ("import sys; sys.exit(3)", "expected exit code 0; found exit code 3"),
    ("print(1)", "expected 2 scores, a line each; found 1 line"),
    ("print(1); print(1); print(1)", "found 3 lines"),
    ("", "found 0 lines"),
    (f"print(1); print('{SECRET}')", "expected numbers from 0 to 1; found line 2: no number"),
    ("print('\"1\"'); print(1)", "found line 1: no number"),
    ("print('true'); print(1)", "found line 1: no number"),
    ("print('{\"score\": 1}'); print(1)", "found line 1: no number"),
    ("print(1); print('NaN')", "found line 2: nan"),
    ("print('Infinity'); print(1)", "found line 1: inf"),
    ("print(0.5); print(1.01)", "found line 2: 1.01"),
    ("print(-1); print(1)", "found line 1: -1"),
])  # fmt: skip
def test_what_a_judge_does_wrong_is_named(tmp_path: Path, code: str, message: str) -> None:
    with pytest.raises(JudgeError, match=message) as caught:
        judge(tmp_path, code).scores([("p", "r", "a"), ("p", "r", SECRET)])
    assert SECRET not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


def test_a_judge_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    began, pid = time.monotonic(), tmp_path / "pid"
    with pytest.raises(JudgeError, match=r"all scores within 1\.5 s; found no end .*--judge-tim"):
        judge(tmp_path, code, str(pid), timeout=1.5).check()
    assert time.monotonic() - began < 30
    child = Path(f"/proc/{pid.read_text()}/stat")
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child of the judge is still running")


def test_a_judge_that_cannot_be_run_is_named_before_anything_is_generated(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match=r"judge no-such-judge --x: .*found No such file"):
        Judge("no-such-judge --x").check()
    own = judge(tmp_path, LENGTHS, str(tmp_path / "seen.json"))
    own.check()
    (row,) = json.loads((tmp_path / "seen.json").read_text())
    assert (row["prompt"], row["reference"], row["answer"]) == TRIAL


def test_input_that_the_judge_does_not_read_is_no_error(tmp_path: Path) -> None:
    asked = [("p" * 10_000, "r", str(n)) for n in range(100)]
    code = "import sys\nsys.stdin.readline()\nsys.stdin.close()\nfor _ in range(100): print(1)"
    assert judge(tmp_path, code).scores(asked) == [1.0] * 100


@settings(max_examples=20)
@given(st.lists(st.tuples(st.text(), st.text(), st.text(max_size=9)), min_size=1, max_size=5))
def test_any_text_reaches_the_judge_as_it_is(asked: list[tuple[str, str, str]]) -> None:
    asked = [tuple(t.encode("utf-8", "replace").decode() for t in one) for one in asked]
    code = "import sys, json\nfor l in sys.stdin: print(len(json.loads(l)['answer']) / 9)"
    scores = Judge(shlex.join([sys.executable, "-c", code])).scores(asked)
    assert scores == pytest.approx([len(answer) / 9 for *_, answer in asked])


# ── What a card says of it ──────────────────────────────────────────────────────────────────────


def test_the_record_has_no_paths_and_no_values_of_options(tmp_path: Path) -> None:
    own = judge(tmp_path, LENGTHS, "--key", SECRET, f"--token={SECRET}", "-v")
    record = own.record()
    assert record["command"] == f"{Path(sys.executable).name} judge.py --key … --token=… -v"
    assert SECRET not in json.dumps(record)
    assert str(tmp_path) not in json.dumps(record)
    digests = {record["sha256"], judge(tmp_path, LENGTHS, "--key", "other").record()["sha256"],
               judge(tmp_path, LENGTHS + "\n", "--key", "other").record()["sha256"]}  # fmt: skip
    assert len(digests) == 3


@pytest.mark.parametrize(("options", "message"), [
    ({"command": ""}, "judge, command: expected a command"),
    ({"command": "python 'open"}, "judge, command"),
    ({"command": "x", "low": 1, "high": 1}, "judge, range: .*the worst first; found 1,1"),
    ({"command": "x", "high": float("inf")}, "found 0,inf"),
    ({"command": "x", "timeout": 0}, "judge, timeout: expected seconds, above 0"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(DomainError, match=message):
        Judge(**options)
