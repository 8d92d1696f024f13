"""Several trainings of one domain: ``fit --seeds`` and ``fit --sweep``."""

import json
import re
from pathlib import Path

import pytest
from conftest import make_rows
from support.commands import FAST, run, write

from lora_domains import DomainModel
from lora_domains.data.identity import FOLDER
from lora_domains.report.card import Card
from lora_domains.verdict.ledger import LEDGER

FEW = (*FAST, "--epochs", "1", "--positive", "spam", "--quiet")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, str]:
    """Training rows, test rows and the output folder, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rows = make_rows(260)
    for name, part in (("train.csv", rows[:200]), ("test.csv", rows[200:])):
        write(tmp_path / name, part)
    return "train.csv", "test.csv", "out"


def evaluations(project: Path) -> int:
    ledger = project / FOLDER / LEDGER
    lines = ledger.read_text().splitlines() if ledger.exists() else []
    return sum("adapter" in json.loads(line) for line in lines)


def test_seeds_score_the_test_rows_by_the_first_alone(
    files: tuple[str, str, str], tiny_base: Path, project: Path, small_suite: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train, test, out = files
    code = run("fit", train, "--test", test, "--name", "mail", "--base", str(tiny_base),
               "--out", out, "--seeds", "2", *FEW)  # fmt: skip
    first, second = (Card.read(Path(out, name)).adapter for name in ("mail", "mail-seed1"))
    assert code == {"pass": 0, "fail": 1, "inconclusive": 3}[str(first.verdict)]
    assert second.verdict is None
    assert evaluations(project) == 1
    assert first.seeds == second.seeds
    assert first.seeds["f1"]["rows"] == "validation"
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 seeds on the same 20 validation rows" in shown
    assert "each would take one of the evaluations" in shown
    assert "compare --seeds mail mail-seed1" in shown
    assert run("compare", "--seeds", "mail", "mail-seed1", "--out", out) == 0
    assert "2 seeds on the same 20 validation rows" in capsys.readouterr().out
    # Its rows are split as those of the first seed were: they can be read again.
    assert run("evaluate", "mail-seed1", "--out", out, "--base", str(tiny_base)) in (0, 1, 3)
    assert evaluations(project) == 2


def test_seeds_are_all_evaluated_on_request(
    files: tuple[str, str, str], tiny_base: Path, project: Path, small_suite: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train, _, out = files
    run("fit", train, "--name", "mail", "--base", str(tiny_base), "--out", out, "--seeds", "2",
        "--evaluate", *FEW)  # fmt: skip
    cards = [Card.read(Path(out, name)).adapter for name in ("mail", "mail-seed1")]
    assert all(card.verdict for card in cards)
    assert evaluations(project) == 2
    shown = capsys.readouterr().out
    assert "2 seeds on the same 20 validation rows" in shown
    assert "2 seeds on the same 40 test rows" in shown
    assert cards[0].seeds["f1"]["rows"] == "validation"


def test_a_sweep_scores_the_test_rows_once(
    files: tuple[str, str, str], tiny_base: Path, project: Path, small_suite: None,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    train, test, out = files
    run("fit", train, "--test", test, "--name", "mail", "--base", str(tiny_base), "--out", out,
        "--epochs", "1", "--quiet", "--sweep", "rank=2,4", "--sweep", "lr=1e-5,1e-2")  # fmt: skip
    assert evaluations(project) == 1
    assert [path.name for path in Path(out).glob("[!.]*")] == ["mail"]
    shown = capsys.readouterr().out
    assert "mail: 4 runs on the same 20 validation rows" in shown
    assert run("show", "mail", "--out", out) == 0
    assert "Chosen among 4 trainings that differ in rank, lr" in capsys.readouterr().out
    assert len(Card.read(Path(out, "mail")).adapter.training["chosen_among"]["runs"]) == 4


def test_a_dry_run_of_a_sweep_writes_nothing(
    files: tuple[str, str, str], tiny_base: Path, small_suite: None,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(DomainModel, "_seconds", lambda *_: 6000.0)
    train, _, out = files
    assert run("fit", train, "--base", str(tiny_base), "--out", out, "--dry-run", "--sweep",
               "rank=2,4", "--epochs", "1") == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "train__2: rank 4" in shown
    assert shown.count("nothing was trained") == 2
    assert shown.count("evaluation 1 h 40 min") == 1, "the test rows are scored once"
    assert re.search(r"All 2 runs .*\nestimate +about 1 h 40 min one after another, ", shown)
    assert not Path(out).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1"], "--seeds expected 2 to 16 seeds found 1"),
        (["--seeds", "2", "--sweep", "rank=2,4"], "expected one of them found both"),
        (["--sweep", "rank"], "expected its values found none"),
        (["--sweep", "rank=2,x"], "--sweep rank=2,x expected lora.rank: a whole number or none"),
        (["--sweep", "rank=2", "--sweep", "rank=4"], "all values of lora.rank in one --sweep"),
        (["--sweep", "rank=2,4", "--rank", "8"], "a value of its own as well"),
        (["--sweep", "lora.alpha=8,16", "--set", "lora.alpha=4"], "a value of its own as well"),
        (["--sweep", "base=a,b"], "the same for all runs of a sweep"),
        (["--sweep", "lr=0.1,7"], "setting 'lr' expected above 0, below 1 found 7"),
        (["--sweep", "rank=2,4", "--init-from", "x"], "has its rank, scale and targets"),
        (["--seeds", "2", "--together", "-1"], "--together expected at least 1 found -1"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_base_is_loaded(
    files: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch, flags: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def no_rows(*_: object) -> None:
        pytest.fail("rows were prepared")

    monkeypatch.setattr("lora_domains.cli.recipes.prepare", no_rows)
    assert run("fit", files[0], *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_card_is_repeated_as_one_training(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], files: tuple[str, str, str]
) -> None:
    train, _, out = files
    assert run("fit", train, "--name", "mail", "--base", str(tiny_base), "--out", out, *FEW) == 0
    again = ("fit", "--from-card", "mail", "--out", out, "--base", str(tiny_base))
    assert run(*again, "--seeds", "2") == 2
    assert "expected one training, which is repeated" in " ".join(capsys.readouterr().err.split())
