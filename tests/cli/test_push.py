"""push: what goes to the Hub, and what never does. The Hub is a server on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from huggingface_hub import ModelCard
from support import folders
from support import hub as hubs
from support.adapters import save, strong
from support.commands import run
from support.hub import Hub, Repository

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.readme import readme
from lora_domains.cli.verbs.push import PUSHED, prepared
from lora_domains.modeling.base import load_base
from lora_domains.report.card import Card
from lora_domains.report.report import rebuild

FILES = {*PUSHED}
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
"""The Hub's client sends files in a way that its HTTP library no longer recommends."""
PLANTED = "planted-2b7c, the text of a row"


@pytest.fixture(scope="module")
def weights(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an adapter with an effect."""
    base = load_base(tiny_base, device="cpu")
    return save(tmp_path_factory.mktemp("weights") / "triage", strong(base, "triage"), base)


@pytest.fixture
def adapter(weights: Path, tmp_path: Path) -> Path:
    """An evaluated adapter, with notes of its owner beside it."""
    made = folders.folder(tmp_path / "adapters", "triage")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (made / name).write_bytes((weights / name).read_bytes())
    write_card(made, "pass")
    (made / "notes.txt").write_text(PLANTED)
    return made


def write_card(folder: Path, verdict: str | None) -> None:
    """The card of a run with this verdict, and its README."""
    card = rebuild(folder)
    card.adapter.verdict, card.adapter.sha256 = verdict, fingerprint(folder)
    card.write(folder)
    (folder / "README.md").write_text(readme(card))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hubs.running() as running:
        hubs.use(running, tmp_path / "cache", monkeypatch)
        yield running


def pushed(hub: Hub) -> dict[str, bytes]:
    """The newest files of team/triage."""
    return list(hub.repositories["team/triage"].commits.values())[-1]


def test_a_dry_run_shows_every_byte_and_sends_none(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", str(adapter), "team/triage", "--dry-run") == 0
    text = capsys.readouterr().out
    assert hub.calls == []
    sizes = {line.split()[0]: line.split()[1] for line in text.splitlines() if " bytes" in line}
    promised = prepared(adapter, "team/triage").sizes
    assert {name: sizes[name] for name in FILES} == {n: f"{size:,}" for n, size in promised.items()}
    assert f"{sum(promised.values()):,} bytes" in text
    assert "triage to team/triage (private)" in text
    assert "Not pushed: notes.txt" in text
    assert "Dry run: nothing was sent." in text


def test_a_push_is_one_private_commit_that_loads_again(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    promised = prepared(adapter, "team/triage").sizes
    assert run("push", str(adapter), "team/triage") == 0
    assert hub.repositories["team/triage"].private
    content = pushed(hub)
    assert {k: len(v) for k, v in content.items() if k != ".gitattributes"} == promised
    assert promised.keys() == FILES
    for name in FILES - {"README.md"}:
        assert content[name] == (adapter / name).read_bytes()
    assert len(hub.repositories["team/triage"].commits) == 2  # the empty one, and the adapter
    assert any(call.startswith("PUT lfs/") for call in hub.calls)
    assert PLANTED.encode() not in b"".join(content.values())
    commit = list(hub.repositories["team/triage"].commits)[-1]
    assert f"lora-domains predict team/triage@{commit}" in capsys.readouterr().out
    assert run("show", f"team/triage@{commit}", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((adapter / "card.json").read_text())


def test_the_readme_names_the_repository_and_the_licence_of_its_owner(
    adapter: Path, hub: Hub
) -> None:
    assert run("push", str(adapter), "team/triage", "--licence", "cc-by-4.0") == 0
    text = pushed(hub)["README.md"].decode()
    assert ModelCard(text).data.license == "cc-by-4.0"
    assert 'load_adapter("team/triage@main")' in text
    assert 'snapshot_download("team/triage")' in text
    assert "path/to/triage" not in text
    assert run("push", str(adapter), "team/triage") == 0
    assert ModelCard(pushed(hub)["README.md"].decode()).data.license is None
    assert "path/to/triage" in (adapter / "README.md").read_text()


def test_a_public_repository_is_asked_for(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["team/open"] = Repository()
    hub.repositories["team/open"].commit({})
    assert run("push", str(adapter), "team/open") == 2
    assert "Add --public if everybody may read it" in capsys.readouterr().err
    assert len(hub.repositories["team/open"].commits) == 1
    assert run("push", str(adapter), "team/open", "--public") == 0
    assert run("push", str(adapter), "team/triage", "--public") == 0
    assert not hub.repositories["team/triage"].private
    hub.repositories["team/closed"] = Repository(private=True)
    hub.repositories["team/closed"].commit({})
    assert run("push", str(adapter), "team/closed", "--public") == 0
    assert hub.repositories["team/closed"].private
    assert "team/closed/settings makes it public" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("verdict", "words"), [("fail", "has the verdict fail"), (None, "was not evaluated")]
)
def test_an_adapter_that_does_not_pass_is_pushed_with_a_warning(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str], verdict: str | None, words: str
) -> None:
    write_card(adapter, verdict)
    assert run("push", str(adapter), "team/triage") == 0
    assert f"Warning: triage {words}" in " ".join(capsys.readouterr().out.split())


def test_text_of_rows_is_pushed_on_request_only(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in (adapter / "items.jsonl").read_text().splitlines()]
    rows[3]["text"] = PLANTED
    (adapter / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("push", str(adapter), "team/triage") == 2
    assert "items.jsonl holds text" in capsys.readouterr().err
    assert hub.calls == []
    assert run("push", str(adapter), "team/triage", "--show-text") == 0
    assert PLANTED.encode() in pushed(hub)["items.jsonl"]
    assert "holds the text of rows, which is pushed" in capsys.readouterr().out


def test_a_file_that_is_gone_is_removed_from_the_repository(adapter: Path, hub: Hub) -> None:
    assert run("push", str(adapter), "team/triage") == 0
    (adapter / "items.jsonl").unlink()
    assert run("push", str(adapter), "team/triage") == 0
    assert "items.jsonl" not in pushed(hub)
    assert ".gitattributes" in pushed(hub)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "a byte of"),
        (lambda folder: (folder / "card.json").unlink(), "an adapter folder with card.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "an adapter with adapter"),
    ],
)
def test_a_damaged_adapter_is_not_pushed(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str], change: Any, error: str
) -> None:
    change(adapter)
    assert run("push", str(adapter), "team/triage") == 2
    assert error in capsys.readouterr().err
    assert hub.calls == []


@pytest.mark.parametrize("name", ["triage", "a/b/c", "team/..", "team/a b", "/triage"])
def test_a_name_that_the_hub_does_not_take_is_refused(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run("push", str(adapter), name) == 2
    assert "expected  OWNER/NAME" in capsys.readouterr().err


def test_a_token_that_may_not_write_is_named(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert run("push", str(adapter), "team/triage") == 2
    error = capsys.readouterr().err
    assert "a token that may write to team" in error
    assert "hf auth login" in error


def test_without_network_the_error_says_how_to_go_on(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    hubs.use(None, tmp_path, monkeypatch)
    assert run("push", str(adapter), "team/triage") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "HF_HUB_OFFLINE, which switches the network off" in error
    assert "copy the folder" in error
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert run("push", str(adapter), "team/triage") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "an answer of the Hub" in error
    assert "Go online and push again. Or copy the folder" in error


def test_a_hub_that_fails_is_named(
    adapter: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hubs.Handler, "create", lambda handler, _: handler.refuse(503, "Down"))
    assert run("push", str(adapter), "team/triage") == 2
    assert "its error 503" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_alone_pushes_without_torch(adapter: Path, tmp_path: Path) -> None:
    """In a process of its own, with the variables that a user sets."""
    code = "import sys; from lora_domains.cli.main import main\ntry: main()\nfinally: " \
           "assert 'torch' not in sys.modules, 'torch'"  # fmt: skip
    with hubs.running() as hub:
        words = ["-c", code, "push", "triage", "team/triage", "--out", str(adapter.parent)]
        done = alone(hub, tmp_path, *words)
        assert done.returncode == 0, done.stderr
        assert list(hub.repositories["team/triage"].commits)[-1] in done.stdout


@pytest.mark.long  # test_hub.py loads adapters from the Hub in make test
@pytest.mark.slow
def test_the_command_alone_loads_what_was_pushed(
    adapter: Path, tiny_base: Path, tmp_path: Path
) -> None:
    with hubs.running() as hub:
        command = ("-m", "lora_domains.cli.main")
        words = ["push", "triage", "team/triage", "--out", str(adapter.parent)]
        assert alone(hub, tmp_path, *command, *words).returncode == 0
        pushed = f"team/triage@{list(hub.repositories['team/triage'].commits)[-1]}"
        words = ["predict", pushed, "a text", "--base", str(tiny_base)]
        done = alone(hub, tmp_path, *command, *words)
    # Its made-up card is of another base: the strict checks hold for what is downloaded, too.
    assert done.returncode == 2
    assert "AdapterMismatch" in done.stderr
    assert Card.read(adapter).base.id in done.stderr


def alone(hub: Hub, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Python in ``folder``, with the variables of ``hub``."""
    variables = os.environ | hub.environment(folder / "home") | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=variables, capture_output=True,
                          text=True, check=False, cwd=folder)  # fmt: skip
