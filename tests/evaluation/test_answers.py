"""Generated answers from fit to report: decoding, samples, a judge, and its metric."""

import io
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from rich.console import Console
from support.models import SUITE, declared, model_in

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, load_domain
from lora_domains.errors import JudgeError, UsageError
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.inference.scores import text_score
from lora_domains.model import DomainModel
from lora_domains.report.card import Card, read_items
from lora_domains.report.report import rebuild
from lora_domains.tasks import Chat, Classification, Generation
from lora_domains.tasks.answers import Judge

SHARED = """
import json, pathlib, sys
rows = [json.loads(line) for line in sys.stdin]
with pathlib.Path(__file__).with_name("calls").open("a") as calls:
    print(len(rows), file=calls)
for row in rows:
    right = set(row["reference"].split())
    print(1 + 9 * len(right & set(row["answer"].split())) / max(1, len(right)))
"""
"""The share of the reference's words that the answer has, from 1 to 10."""
ANSWERED = [{"question": r["text"], "answer": r["label"] + " call now 4 of them"}
            for r in make_rows(80)]  # fmt: skip


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    script = tmp_path / "judge.py"
    script.write_text(SHARED)
    return Judge(shlex.join([sys.executable, str(script)]), low=1, high=10)


def calls(tmp_path: Path) -> list[int]:
    """The number of answers in each call of the judge."""
    path = tmp_path / "calls"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.usefixtures("small_suite")
def test_a_judge_can_decide(tiny_base: Path, tmp_path: Path, judge: Judge) -> None:
    domain = declared(ANSWERED, "own", Generation(max_new_tokens=12), epochs=3, metric="judge")
    domain = replace(domain, judge=judge)
    model = model_in(tmp_path / "out", tiny_base)
    model.fit(domain, dry_run=True)
    model.fit(domain)
    assert calls(tmp_path) == []  # neither an estimate nor training asks it
    entry = model.evaluate(domain, suite=SUITE).entry
    trial, judged = calls(tmp_path)
    assert trial == 1
    assert judged <= 4 * len(model.dataset(domain).test)
    scores = entry.domain_scores["judge"]
    assert scores["lower"] < scores["difference"] < scores["upper"]
    assert set(scores["baselines"]) == {"nearest", "4_shot"}
    (gain,) = (gate for gate in entry.gates if gate["name"] == "gain")
    assert gain["rule"].startswith("judge above the base")
    for item in read_items(tmp_path / "out" / "own"):
        if item["set"] == "test":
            assert all(0 <= score["judge"] <= 1 for score in item["scores"].values())
    assert entry.judged["judge"] == judge.record()
    stop = model.tokenizer.eos_token
    assert entry.judged["decoding"] == {"method": "greedy", "max_new_tokens": 12, "stop": [stop]}
    folder = tmp_path / "out" / "own"
    assert rebuild(folder) == Card.read(folder)
    shown = f"Answers are greedy, of 12 tokens at most, and end at {stop}. The judge is"
    for text in ((folder / "README.md").read_text(), str(model.evaluate(domain, suite=SUITE))):
        assert shown.replace("<", "").split()[:8] == text.replace("<", "").split(
            "table of epochs. ")[1].split()[:8]  # fmt: skip
        assert "judge.py (here 1 to 10 is 0 to 1)" in " ".join(text.split())
    assert str(tmp_path) not in (folder / "card.json").read_text()
    with pytest.raises(UsageError, match=r"found judge, for which a program reads .*evaluate own"):
        model.benchmark(SUITE, [domain], tmp_path / "reports")


def test_an_edited_judge_is_another_declaration(judge: Judge, tmp_path: Path) -> None:
    domain = Domain("own", Generation(), Data(ANSWERED), metric="judge", judge=judge)
    before = domain.declared_metric
    assert domain.digest() == replace(domain, judge=None).digest()
    (tmp_path / "judge.py").write_text("print(1)")
    assert domain.declared_metric != before
    assert replace(domain, metric=None).declared_metric == "token_f1"


def test_validation_answers_are_judged_where_no_test_row_is(
    tiny_base: Path, tmp_path: Path, judge: Judge
) -> None:
    from lora_domains.evaluation.verdict_run import validation_scores

    domain = replace(declared(ANSWERED, "own", Generation(max_new_tokens=3), epochs=1), judge=judge)
    model = model_in(tmp_path / "out", tiny_base)
    model.fit(domain)
    scores = validation_scores(model.bank, model.dataset(domain), model.out, model.display)
    assert 0 <= scores["judge"]["adapter"] <= 1
    assert len(calls(tmp_path)) == 2


def test_a_judge_that_fails_is_named_before_anything_is_generated(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    domain = declared(ANSWERED, "own", Generation(max_new_tokens=3), epochs=1)
    model = model_in(tmp_path, tiny_base)
    model.fit(domain)

    def refuse(*_: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("lora_domains.evaluation.contenders.baseline_scores", refuse)
    with pytest.raises(JudgeError, match="No such file"):
        model.evaluate(replace(domain, judge=Judge("no-such-program")), suite=SUITE)


@pytest.mark.parametrize(("domain", "message"), [
    (Domain("own", Generation(), Data([]), metric="judge"), "expected a program that judges.*--ju"),
    (Domain("own", Chat(), Data([]), judge=Judge("x")), "found chat. .*--generate"),
    (Domain("own", Classification(), Data([]), judge=Judge("x")), "found classification"),
])  # fmt: skip
def test_a_judge_and_what_it_judges_belong_together(domain: Domain, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        domain.check_judge()


# ── Samples on screen ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("show_text", [False, True])
def test_some_answers_are_shown_after_each_epoch(
    tiny_base: Path, tmp_path: Path, show_text: bool
) -> None:
    rows = [{**row, "question": f"zq{n} {row['question']} " + "long\n[bold] " * 20}
            for n, row in enumerate(ANSWERED)]  # fmt: skip
    domain = replace(declared(rows, "own", Generation(max_new_tokens=4), lr=0.02),
                     show_text=show_text)  # fmt: skip
    text = io.StringIO()
    display = Display(console=Console(file=text, width=80))
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, display=display, device="cpu")
    model.fit(domain)
    lines = text.getvalue().splitlines()
    shown = [line for line in lines if line.startswith("validation:")]
    if not show_text:
        assert not shown
        assert "zq" not in text.getvalue()
        return
    assert len(shown) == 6
    assert shown[:3] == shown[3:]
    epochs = [n for n, line in enumerate(lines) if line == shown[0]]
    for at in epochs:
        block = lines[at : at + 12]
        assert [line.split()[0] for line in block[1:4]] == ["expected", "base", "adapter"]
        assert all(len(line) <= 80 for line in block)
        assert block[0].endswith("…")
        assert block[1].split(maxsplit=1)[1] == rows[56]["answer"]
    base, adapter = ([[lines[at + 4 * n + k] for n in range(3)] for at in epochs] for k in (2, 3))
    assert base[0] == base[1]
    assert adapter[0] != adapter[1]
    stored = "".join(path.read_text() for path in tmp_path.rglob("card.json"))
    assert not re.search(r"zq\d+ ", stored)  # weights in base 64 hold any letters, but no space


def test_samples_change_nothing_that_is_trained(tiny_base: Path, tmp_path: Path) -> None:
    domain = declared(ANSWERED, "own", Generation(max_new_tokens=4), epochs=2)
    digests = {
        model_in(tmp_path / str(shown), tiny_base).fit(replace(domain, show_text=shown))
        .adapter.sha256
        for shown in (False, True)
    }  # fmt: skip
    assert len(digests) == 1


def test_a_recipe_declares_its_judge(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from lora_domains import Data, Domain, Generation, Judge\n"
        "domain = Domain('own', Generation(), Data('rows.csv'), metric='judge',\n"
        "                judge=Judge('python judge.py', high=5))\n"
    )
    domain = load_domain(recipe)
    assert domain.judge == Judge("python judge.py", 0, 5)


def test_a_base_that_is_still_reasoning_is_warned_of(tiny_base: Path, tmp_path: Path) -> None:
    model = model_in(tmp_path / "out", tiny_base)
    domain = declared(ANSWERED[:20], "own", Generation())
    rows = model.dataset(domain).test

    def thinking(*given: Any) -> list[dict[str, Any]]:
        texts = ["<think> 4 or 5", "<think> 5 </think> 4"]
        return [text_score(domain.task, texts[n % 2], "4") for n, _ in enumerate(given[2])]

    shown = io.StringIO()
    scorer = Scorer(model.bank, Display(console=Console(file=shown, width=200)))
    scorer.scores(Part("own", domain.task, rows, thinking), [None])
    cut = (len(rows) + 1) // 2
    assert (
        f"{cut} of {len(rows)} answers of the base end within their reasoning" in shown.getvalue()
    )
