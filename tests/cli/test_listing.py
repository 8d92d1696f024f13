"""list, show and how every verb finds an adapter: by its folder, its name or its repository."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.commands import FAST, run, write
from support.folders import folder
from support.models import clear_rows

from lora_domains.cli.verbs import listing
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild

MINILM = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with two evaluated adapters, one that was not, a damaged one and one of PEFT."""
    for name, base in (("triage", "Qwen/Qwen3-0.6B"), ("customer-support-mail", MINILM)):
        made = folder(tmp_path, name, base={"id": base}, environment={"date": "2026-11-26T20:18Z"})
        rebuild(made).write(made)
    new = folder(tmp_path, "new")
    card = Card.read(new)
    card.adapter.judged, card.adapter.verdict = {}, None
    card.write(new)
    for name, file in (("damaged", "card.json"), ("plain", "adapter_config.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{")
    return tmp_path


def shown(out: Path, width: int, terminal: bool = True) -> list[str]:
    """The lines of the table of the adapters in ``out``."""
    console = Console(width=width, force_terminal=terminal, no_color=True, color_system=None)
    with console.capture() as capture:
        listing.adapters(console, [listing.summary_of(f) for f in listing.adapter_folders(out)])
    return capture.get().splitlines()


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["adapter", "verdict"]),
        (60, ["adapter", "verdict", "base"]),
        (80, ["adapter", "verdict", "trained", "versions", "base"]),
        (110, ["adapter", "verdict", "score", "trained", "versions", "base"]),
    ],
)
def test_a_narrow_terminal_leaves_out_what_matters_least(
    out: Path, width: int, columns: list[str]
) -> None:
    head, *rows = shown(out, width)
    assert head.split() == columns
    table = rows[:5]
    assert [row.split()[0] for row in table] == [
        "customer-support-mail", "damaged", "new", "plain", "triage",
    ]  # fmt: skip
    assert all(len(row.rstrip()) <= width for row in table)
    assert ("Qwen3-0.6B" in table[-1]) == ("base" in columns)


def test_another_program_gets_every_column_on_one_line(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert shown(out, 60, terminal=False) == shown(out, 60)
    monkeypatch.delenv("COLUMNS")
    head, *rows = shown(out, 60, terminal=False)
    assert head.split() == list(listing.COLUMNS)
    assert rows[0].split() == ["customer-support-mail", "pass", "F1", "0.000", "→", "0.929",
                               "2026-11-26", "–", MINILM]  # fmt: skip


def test_one_damaged_adapter_does_not_hide_the_others(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("list", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "damaged: a damaged card: no JSON." in text
    assert "plain: no card: saved by plain PEFT, and not evaluated." in text
    assert "not evaluated" in text


def test_list_prints_json(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list", "--out", str(out), "--json") == 0
    by_name: dict[str, Any] = {one["name"]: one for one in json.loads(capsys.readouterr().out)}
    triage, new = by_name["triage"], by_name["new"]
    assert (triage["verdict"], triage["base"], triage["date"], triage["versions"]) == (
        "pass", "Qwen/Qwen3-0.6B", "2026-11-26T20:18Z", 0,
    )  # fmt: skip
    assert (triage["metric"], triage["rows"]) == ("f1", "test")
    assert triage["score"] == Card.read(out / "triage").adapter.domain_scores["f1"]["adapter"]
    assert (new["verdict"], new["rows"]) == (None, "validation")
    assert "error" in by_name["damaged"]
    assert run("list", "--out", str(out / "nowhere"), "--json") == 0
    assert json.loads(capsys.readouterr().out) == []


def test_show_says_what_is_known_before_an_evaluation(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("show", "new", "--out", str(out)) == 0
    text = capsys.readouterr().out
    assert "Not evaluated yet." in text
    assert "training loss" in text


@pytest.mark.slow
def test_a_second_training_is_compared_with_the_first(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    train = write(tmp_path / "train.csv", clear_rows(260))
    common = ("fit", train, "--name", "spam", "--base", str(tiny_base), "--retention", "none",
              "--positive", "spam", *FAST)  # fmt: skip
    assert run(*common, "--epochs", "4") == 0
    assert "which it replaced" not in capsys.readouterr().out
    assert run(*common, "--epochs", "4", "--lr", "0.009") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "On validation rows, spam shows no clear difference from version 0001" in text
    assert run(*common, "--epochs", "1", "--lr", "1e-7") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "On validation rows, spam is worse than version 0002, which it replaced (F1" in text
    assert "to restore that: lora-domains rollback spam 0002." in text


# ── Naming ──────────────────────────────────────────────────────────────────────────────────────

VERBS: dict[str, tuple[str, ...]] = {
    "show": ("show", "ADAPTER"),
    "report": ("report", "ADAPTER"),
    "report, second": ("report", "triage", "ADAPTER"),
    "compare": ("compare", "triage", "ADAPTER"),
    "rollback": ("rollback", "ADAPTER"),
    "evaluate": ("evaluate", "ADAPTER"),
    "predict": ("predict", "ADAPTER", "a text"),
    "trace": ("trace", "ADAPTER", "a text"),
    "curve": ("curve", "ADAPTER"),
    "export": ("export", "ADAPTER", "--out", "merged"),
    "benchmark": ("benchmark", "ADAPTER"),
    "benchmark, second": ("benchmark", "triage", "ADAPTER"),
    "fit --from-card": ("fit", "--from-card", "ADAPTER"),
    "fit --init-from": ("fit", "rows.csv", "--init-from", "ADAPTER"),
}


@pytest.mark.parametrize("arguments", VERBS.values(), ids=VERBS)
def test_every_verb_looks_for_an_adapter_in_the_same_way(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Before a base is loaded: the error names what is there, and what to write for the Hub."""
    monkeypatch.chdir(tmp_path)
    made = folder(tmp_path / "adapters", "triage")
    (made / "adapter_config.json").write_text("{}")
    write(tmp_path / "rows.csv", [{"text": f"{n}", "label": "ab"[n % 2]} for n in range(40)])
    monkeypatch.setattr("lora_domains.modeling.base.load_base", None)
    for name, hint in (("triag", "Did you mean 'triage'?"), ("team/x", "team/x@REVISION")):
        assert run(*[name if word == "ADAPTER" else word for word in arguments]) == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"AdapterError {name} expected an adapter folder with" in error
        assert hint in error


@pytest.mark.parametrize(
    "named", ["triage", "adapters/triage", "adapters/triage/", "./adapters/triage"]
)
def test_a_name_and_a_folder_are_the_same_adapter(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made = folder(tmp_path / "adapters", "triage")
    rebuild(made).write(made)
    assert run("show", named, "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["path"] == "triage"
    assert run("report", named, "--out", "reports") == 0
    assert run("compare", named, "triage", "--json") != 2
    assert json.loads((tmp_path / "reports" / "report.json").read_text())["adapters"]
