"""What doctor shows of a machine."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.commands import run

from lora_domains.cli import machine


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # where no base is
    monkeypatch.setattr(
        machine, "bases_at_hand", lambda: {machine.ENCODER: [Path(".bases/minilm")]}
    )


def test_the_machine_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"]
    assert found["devices"][-1]["device"] == "cpu"
    assert found["devices"][-1]["threads"] >= 1
    assert found["memory"]["total_bytes"] >= found["memory"]["free_bytes"] > 0
    assert found["bases"] == [{"base": "minilm", "for": machine.ENCODER, "bytes": 0}]
    assert found["cache"]["bytes"] == found["cache"]["limit"] == 0  # tests share nothing
    assert found["hub"]["reachable"] is None  # tests are offline
    assert found["hub"]["offline"]["HF_HUB_OFFLINE"] == "1"


def test_missing_extras_come_with_their_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed, absent = machine._version, ("openpyxl", "bitsandbytes")

    def known(name: str) -> str | None:
        return None if name in absent else installed(name)

    monkeypatch.setattr(machine, "_version", known)
    assert run("doctor") == 0
    shown = capsys.readouterr().out
    assert "excel (openpyxl): pip install 'lora-domains[excel]'" in shown
    assert "missing: pip install bitsandbytes" in shown
    assert "minilm, 0.0 kB: an encoder, for labels" in shown
    assert "not asked, because of HF_HUB_OFFLINE=1" in shown
    assert "lora-domains[test]" not in shown


@pytest.mark.parametrize(("answer", "line"), [(None, "answers"), (OSError(), "does not answer")])
def test_the_hub_is_asked(
    answer: Exception | None, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert timeout < 10
            if answer is not None:
                raise answer

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    hub: dict[str, Any] = machine._hub()
    assert hub["reachable"] is (answer is None)
    assert line in machine._reached(hub)
