"""Adapters of several bases: refused before a base is loaded, with the command for each base."""

from pathlib import Path

import pytest
from support import folders
from support.commands import run, write

from lora_domains.errors import AdapterMismatch
from lora_domains.serving.network import ray_application

BASES = {"triage": "a" * 64, "legal": "a" * 64, "spam": "b" * 64}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("project")
    for name, identity in BASES.items():
        base = folders.CARD["base"] | {"id": f"base-{identity[0]}", "identity": identity}
        made = folders.folder(place / "adapters", name, base=base)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (made / file).write_text("{}")
    return place


NAMES = ("triage", "spam", "legal")
VERBS = {
    "serve": (("serve", *NAMES),
              "serve adapters/triage adapters/legal --port 8000\n"
              "lora-domains serve adapters/spam --port 8001"),
    "playground": (("playground", *NAMES, "--port", "90"),
                   "playground adapters/triage adapters/legal --port 90\n"
                   "lora-domains playground adapters/spam --port 91"),
    "benchmark": (("benchmark", *NAMES, "--out", "r"),
                  "benchmark adapters/triage adapters/legal --out r-1\n"
                  "lora-domains benchmark adapters/spam --out r-2"),
    "report": (("report", *NAMES, "--out", "r"),
               "report adapters/triage adapters/legal --out r-1\n"
               "lora-domains report adapters/spam --out r-2"),
    "vllm": (("export", *NAMES, "--to", "vllm", "--out", "v"),
             "export --to vllm adapters/triage adapters/legal --out v-1\n"
             "lora-domains export --to vllm adapters/spam --out v-2"),
    "predict": (("predict", "--domain-column", "ward", "--input", "rows.csv"),
                "a file of their own, with one command each:\nthe rows of triage, legal\n"
                "the rows of spam"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "commands"), VERBS.values(), ids=VERBS)
def test_adapters_of_two_bases_are_refused_with_a_command_for_each(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], commands: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(project)
    write(project / "rows.csv", [{"text": "a", "ward": name} for name in NAMES])
    before = sorted(project.rglob("*"))
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert "triage, legal of base-a; spam of base-b" in error
    assert commands in error
    assert sorted(project.rglob("*")) == before


def test_adapters_of_others_go_with_those_of_the_base_they_were_evaluated_on(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = folders.CARD["base"] | {"id": "base-b", "identity": "b" * 64}
    theirs = folders.folder(tmp_path, "theirs", base=base, trained_elsewhere=True)
    (theirs / "adapter_config.json").write_text("{}")
    monkeypatch.chdir(project)
    assert run("report", "triage", "spam", str(theirs), "--out", "r") == 2
    assert f"lora-domains report adapters/spam {theirs} --out r-2" in capsys.readouterr().err


def test_bases_of_one_name_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, identity in BASES.items():
        base = folders.CARD["base"] | {"id": "base", "identity": identity}
        made = folders.folder(tmp_path / "adapters", name, base=base)
        (made / "adapter_config.json").write_text("{}")
    assert run("serve", "legal", "spam") == 2
    assert "legal of base (aaaaaaaaaaaa); spam of base (bbb" in capsys.readouterr().err


def test_a_cluster_refuses_them_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setattr("lora_domains.errors.find_spec", lambda _name: True)
    with pytest.raises(AdapterMismatch, match="triage of base-a; spam of base-b"):
        ray_application({"adapters": "triage,spam"})
