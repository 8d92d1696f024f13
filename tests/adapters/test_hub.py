"""Adapters on the Hub: at a named revision, checked like any other, and never written to."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import hub as hubs
from support.adapters import logits, save, strong
from support.commands import FAST, run, write
from support.general_text import use_few_texts
from support.hub import Hub, Repository
from support.models import clear_rows, model_in, use_small_suite

from lora_domains.adapters.folder import find_adapter, own_folder
from lora_domains.analysis.compare import save_seeds
from lora_domains.atomic import adapter_name
from lora_domains.errors import AdapterCorrupt, AdapterError, LoraDomainsError, UsageError
from lora_domains.model import DomainModel
from lora_domains.report.card import CARD, Card


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("adapters"), tiny_base)


@pytest.fixture(scope="module")
def saved(model: DomainModel) -> Path:
    """An adapter folder of the model."""
    return save(model.out / "triage", strong(model.base, "triage"), model.base)


@pytest.fixture
def hub(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process uses; it has the adapter as team/triage.v2."""
    with hubs.running() as running:
        running.repositories["team/triage.v2"] = Repository(private=True)
        files = {path.name: path.read_bytes() for path in saved.iterdir()}
        running.repositories["team/triage.v2"].commit(files | {"training_args.bin": b"pickle"})
        hubs.use(running, tmp_path / "cache", monkeypatch)
        yield running


def commit(hub: Hub) -> str:
    """The newest commit of the adapter's repository."""
    return list(hub.repositories["team/triage.v2"].commits)[-1]


def test_an_adapter_is_loaded_at_its_revision(
    hub: Hub, model: DomainModel, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned = commit(hub)
    name = model.load_adapter(f"team/triage.v2@{pinned}")
    assert name == "triage-v2"
    model.load_adapter(saved, "local")
    assert torch.equal(logits(model.bank, name), logits(model.bank, "local"))
    hub.repositories["team/triage.v2"].commit({"adapter_config.json": b"{}"})
    assert model.load_adapter("team/triage.v2", "again", revision=pinned) == "again"
    assert torch.equal(logits(model.bank, "again"), logits(model.bank, "local"))
    for loaded in (name, "again", "local"):
        model.unload(loaded)
    # No file beside those of an adapter is downloaded, and no network is needed then.
    assert not list((tmp_path / "cache").rglob("training_args.bin"))
    hubs.use(None, tmp_path / "cache", monkeypatch)
    assert model.load_adapter(f"team/triage.v2@{pinned}") == "triage-v2"
    model.unload("triage-v2")


@pytest.mark.parametrize(
    ("named", "revision", "message"),
    [
        ("team/triage.v2@nowhere", None, "a revision of team/triage.v2; found no commit"),
        ("team/other@main", None, "that you may read; found none of that name"),
        ("team/triage.v2", None, "An adapter on the Hub needs its revision: team/triage.v2@REV"),
        ("team/triage.v2@main", "main", "found revision='main' as well"),
        ("triage", "main", "OWNER/NAME of a repository"),
    ],
)
def test_what_is_not_there_is_named(
    hub: Hub, tmp_path: Path, named: str, revision: str | None, message: str
) -> None:
    with pytest.raises(LoraDomainsError, match=message):
        find_adapter(named, tmp_path, revision=revision)


def test_a_private_adapter_needs_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(AdapterError, match="hf auth login"):
        find_adapter("team/triage.v2@main", tmp_path)


def test_without_network_the_error_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hubs.use(None, tmp_path / "cache", monkeypatch)
    with pytest.raises(AdapterError, match="hf download team/triage --revision v1 --local-dir"):
        find_adapter("team/triage@v1", tmp_path)


def test_a_hub_that_cannot_be_reached_is_named(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"an answer of the Hub; found neither"):
        find_adapter("team/triage.v2@main", tmp_path)


def test_a_repository_without_an_adapter_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repositories["team/model"] = Repository()
    hub.repositories["team/model"].commit({"README.md": b"# A model\n"})
    with pytest.raises(AdapterError, match=r"with adapter_config.json; found README.md"):
        find_adapter("team/model@main", tmp_path)


def test_it_is_checked_like_any_other(hub: Hub, model: DomainModel) -> None:
    files = dict(hub.repositories["team/triage.v2"].commits[commit(hub)])
    weights = bytearray(files["adapter_model.safetensors"])
    weights[-1] ^= 1
    changed = files | {"adapter_model.safetensors": bytes(weights)}
    hub.repositories["team/triage.v2"].commit(changed)
    with pytest.raises(AdapterCorrupt, match="a byte of"):
        model.load_adapter("team/triage.v2@main")
    assert model.domains == ()


def test_a_folder_here_comes_first(hub: Hub, saved: Path, tmp_path: Path) -> None:
    here = shutil.copytree(saved, tmp_path / "team" / "triage.v2@main")
    assert find_adapter("team/triage.v2@main", tmp_path) == tmp_path / "team/triage.v2@main" == here
    assert hub.calls == []


def test_nothing_is_written_into_the_cache(hub: Hub, saved: Path, tmp_path: Path) -> None:
    folder = find_adapter("team/triage.v2@main", tmp_path)
    assert adapter_name(folder) == "triage-v2"
    assert own_folder(folder, tmp_path / "triage-v2") == tmp_path / "triage-v2"
    assert own_folder(saved, tmp_path / "triage-v2") == saved
    shutil.copytree(saved, tmp_path / "triage-v2")
    assert own_folder(folder, tmp_path / "triage-v2") == tmp_path / "triage-v2"
    (tmp_path / "triage-v2" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match=r"a free place for team/triage.v2"):
        own_folder(folder, tmp_path / "triage-v2")
    with pytest.raises(AdapterError, match="the Hub's cache"):
        save_seeds([folder, folder], {})


def test_verbs_take_it(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", f"team/triage.v2@{commit(hub)}") == 0
    assert "triage on" in capsys.readouterr().out
    assert run("show", "team/triage.v2@nowhere") == 2
    assert "no commit, branch or tag" in capsys.readouterr().err


def test_a_revision_may_be_given_once_only() -> None:
    with pytest.raises(UsageError, match="revision"):
        find_adapter("a/b@1", Path(), CARD, "2")


@pytest.mark.slow
def test_an_evaluation_and_a_scale_are_written_into_a_copy(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    use_small_suite(monkeypatch)
    use_few_texts(monkeypatch)  # with some that choose a scale
    train = write(tmp_path / "train.csv", clear_rows(200))
    base = ("--base", str(tiny_base))
    assert run("fit", train, "--name", "spam", *base, "--epochs", "1", *FAST) == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapters" / "spam").iterdir()}
    with hubs.running() as hub:
        hub.repositories["team/mail"] = Repository()
        named = f"team/mail@{hub.repositories['team/mail'].commit(files)}"
        hubs.use(hub, tmp_path / "cache", monkeypatch)
        assert run("evaluate", named, *base, "--out", "mine") != 2
        assert Card.read(tmp_path / "mine" / "spam").adapter.verdict is not None
        assert (
            run("curve", named, "--scales", "0,1", "--scale", "0.5", *base, "--out", "other") == 0
        )
        assert Card.read(tmp_path / "other" / "spam").adapter.scale == 0.5
        assert run("evaluate", named, *base, "--out", "other") == 2  # another adapter is there
        scaled = {path.name: path.read_bytes() for path in (tmp_path / "other/spam").iterdir()}
        again = f"team/mail@{hub.repositories['team/mail'].commit(scaled)}"
        assert run("curve", again, "--scale", "1", "--out", "third") == 0  # as measured before
        assert Card.read(tmp_path / "third" / "spam").adapter.scale == 1
        cached = find_adapter(named, tmp_path)
    assert {path.name: path.read_bytes() for path in cached.iterdir()} == files
