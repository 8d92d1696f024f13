"""Repeating a training from its card: the same bytes, or a message that names the differences."""

import copy
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from conftest import make_rows
from support.commands import run, write
from support.models import use_small_suite

from lora_domains.analysis.reproduce import base_of, differences, domain_of, same_bytes
from lora_domains.data.source import Data, Hub
from lora_domains.dataset import declared_domain
from lora_domains.domain import Domain, Lora, Training, as_record
from lora_domains.errors import UsageError
from lora_domains.evaluation.verdict_run import use_settings
from lora_domains.report.card import AdapterEntry, BaseRecord, Card, ParentRecord
from lora_domains.tasks import Classification, Generation
from lora_domains.verdict.gates import Gates


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Path]:
    """A working folder with rows and the adapter `x`, made by the command line."""
    folder = tmp_path_factory.mktemp("rerun")
    rows = make_rows(100)
    write(folder / "train.csv", rows[:80])
    write(folder / "test.csv", rows[80:])
    here = Path.cwd()
    patch = pytest.MonkeyPatch()
    use_small_suite(patch)
    os.chdir(folder)
    assert run("fit", "--name", "x", "--train", "train.csv", "--test", "test.csv",
               "--positive", "spam", "--epochs", "2", "--base", str(tiny_base), "--lr", "0.01",
               "--limit", "40", "--seed", "3", "--gradient-checkpointing") in (0, 1, 3)  # fmt: skip
    yield folder
    os.chdir(here)
    patch.undo()


def test_a_repeated_training_gives_the_same_bytes(
    ran: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = Card.read(ran / "adapters" / "x").adapter
    assert entry.settings["data"]["train"] == "train.csv"
    assert entry.settings["data"]["limit"] == 40
    again = ("fit", "--from-card", "adapters/x/card.json", "--base", str(tiny_base))
    assert run(*again, "--out", "again") in (0, 1, 3)
    assert f"The adapter is the same to the byte (sha256 {entry.sha256[:12]})." in (
        capsys.readouterr().out
    )
    other = Card.read(ran / "again" / "x").adapter
    for key in ("sha256", "recipe_digest", "data", "domain_scores", "verdict"):
        assert getattr(other, key) == getattr(entry, key), key
    files = [(ran / out / "x" / "adapter_model.safetensors").read_bytes()
             for out in ("adapters", "again")]  # fmt: skip
    assert files[0] == files[1]


def test_the_same_rows_may_be_given_again(
    ran: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are split, sampled and grouped as in the card; the name may change."""
    kept = Card.read(ran / "adapters" / "x").adapter
    assert run("fit", "--from-card", "adapters/x", "--base", str(tiny_base), "--out", "moved",
               "--train", "train.csv", "--name", "y") in (0, 1, 3)  # fmt: skip
    assert "The adapter is the same to the byte" in capsys.readouterr().out
    entry = Card.read(ran / "moved" / "y").adapter
    assert entry.sha256 == kept.sha256
    assert entry.data == kept.data
    assert "general" in kept.data


def test_other_rows_are_named(
    ran: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(ran / "other.csv", make_rows(80, seed=9))
    assert run("fit", "--from-card", "adapters/x", "--base", str(tiny_base), "--out", "changed",
               "--train", "other.csv", "--epochs", "1") in (0, 1, 3)  # fmt: skip
    output = " ".join(capsys.readouterr().out.split())
    assert "Warning: The adapter differs" in output
    assert "other train rows" in output
    assert "other training settings" in output


def test_a_base_from_a_folder_must_be_given_again(
    ran: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("fit", "--from-card", "adapters/x") == 2
    error = capsys.readouterr().err
    assert "a folder called tiny" in error
    assert "Give it: --base" in error


# ── Without a model ─────────────────────────────────────────────────────────────────────────────

DECLARED = [
    Domain("a", Classification(positive="urgent"), Data.embedded("medical")),
    Domain(
        "b", Generation("question", "answer"),
        Data(Hub("o/n", "train", "abc", "cfg"), None, "hub:o/n@abc/test", group="g",
             slices=("s", "t"), drop_leaks=True, limit=7),
        Lora(rank=4, targets=("q_proj",), dropout=0.1, rslora=True),
        Training(epochs=3, lr=0.1, seed=4, max_length=99), Gates(recall=0.7), show_text=True,
        metric="exact_match",
    ),
]  # fmt: skip


def base(name: str = "embedded", revision: str | None = None) -> BaseRecord:
    return BaseRecord(name, revision, "0" * 64, "float32", None)


def card_of(domain: Domain) -> Card:
    settings = json.loads(json.dumps(as_record(domain)))
    entry = AdapterEntry(domain=domain.name, path=domain.name, sha256=None, settings=settings)
    return Card(base=base(), adapter=entry)


@pytest.mark.parametrize("domain", DECLARED, ids=lambda domain: domain.name)
def test_a_domain_is_restored_from_its_card(domain: Domain) -> None:
    again = domain_of(card_of(domain))
    assert again == domain
    assert again.digest() == domain.digest()


def test_settings_that_a_card_is_older_than_do_not_differ() -> None:
    older, newer = card_of(DECLARED[0]), card_of(DECLARED[0])
    for part, name in (("training", "schedule"), ("training", "balance"), ("lora", "dora")):
        del older.adapter.settings[part][name]
    assert differences(older, newer) == differences(newer, newer)
    newer.adapter.settings["lora"]["dora"] = True
    assert "other LoRA settings" in differences(older, newer)


def test_a_card_without_rows_or_with_code_is_refused() -> None:
    memory = Domain("a", Classification(), Data([{"text": "zqsecret", "label": "x"}]))
    assert "zqsecret" not in card_of(memory).dumps()
    with pytest.raises(UsageError, match=r"1 rows in memory.*model\.fit"):
        domain_of(card_of(memory))
    mapped = Domain("a", Classification(), Data("x.csv", row=dict))
    with pytest.raises(UsageError, match=r"row|function dict.*Run the recipe"):
        domain_of(card_of(mapped))
    old = card_of(memory)
    del old.adapter.settings["data"]
    with pytest.raises(UsageError, match="one of an older version"):
        domain_of(old)


def test_rows_in_memory_are_given_again() -> None:
    rows = [{"text": "red", "label": "x"}]
    card = card_of(Domain("a", Classification(), Data("train.csv", None, rows)))
    for found in (declared_domain("a", None, card, rows), domain_of(card, {"test": rows})):
        assert found.data == Data("train.csv", None, rows)
    # Where the training split off its own validation rows, there are none to be given again.
    found = domain_of(card, {"train": None, "validation": "other.csv", "test": "test.csv"})
    assert found.data == Data("train.csv", None, "test.csv")
    with pytest.raises(UsageError, match="1 rows in memory"):
        declared_domain("a", None, card, None)


@dataclass(frozen=True, kw_only=True)
class OwnGates(Gates):
    """The gates of a recipe, with a threshold of its own."""

    rows: float = 100


def test_gates_of_a_recipe_are_refused() -> None:
    card = card_of(Domain("a", Classification(), Data("x.csv"), gates=OwnGates()))
    with pytest.raises(UsageError, match=r"those of a recipe: rows.*Run the recipe"):
        domain_of(card)


@pytest.mark.parametrize("method", ["both", "scale"])
def test_a_retention_method_that_was_removed_is_refused(method: str) -> None:
    card = card_of(DECLARED[0])
    card.adapter.settings["training"]["retention"] = method
    with pytest.raises(UsageError, match=rf"{method}, of an older version.*--retention replay"):
        domain_of(card)


def test_a_card_holds_no_path_outside_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    data = Data(tmp_path / "out" / "x.csv", str(tmp_path / "in" / "sub" / "y.csv"), "z.csv")
    record = as_record(Domain("a", Classification(), data))["data"]
    assert (record["train"], record["validation"], record["test"]) == (
        "x.csv", "sub/y.csv", "z.csv"
    )  # fmt: skip


def test_the_base_of_a_card(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = card_of(Domain("a", Classification(), Data("x.csv")))
    assert base_of(card) == (None, None)
    assert base_of(replace(card, base=base("o/n", "abc"))) == ("o/n", "abc")
    local = replace(card, base=base("encoder", None))
    with pytest.raises(UsageError, match=r"--base PATH/encoder\. A base in \.bases/"):
        base_of(local)
    (tmp_path / ".bases" / "encoder").mkdir(parents=True)
    assert base_of(local) == (".bases/encoder", None)
    noted = cache / "bases" / f"{local.base.identity}.txt"
    noted.parent.mkdir(parents=True)
    noted.write_text(str(tmp_path), encoding="utf-8")
    assert base_of(local) == (str(tmp_path), None)
    noted.write_text(str(tmp_path / "gone"), encoding="utf-8")
    assert base_of(local) == (".bases/encoder", None)


def rebase(card: Card, **changes: str) -> None:
    card.base = replace(card.base, **changes)


def test_each_difference_is_named(ran: Path) -> None:
    then = Card.read(ran / "adapters" / "x")
    assert differences(then, then) == []
    assert same_bytes(then, then)[0]
    for change, said in (
        (lambda card: card.environment.update(torch="0.1"), "torch: "),
        (
            lambda card: card.environment.update(threads=64),
            f"threads: {then.environment['threads']} → 64",
        ),
        (lambda card: rebase(card, identity="f" * 64), "base identity: "),
        (lambda card: rebase(card, id="a/b"), "base id: tiny → a/b"),
        (
            lambda card: card.adapter.settings["gates"].update(drift=0.05),
            "other task, gates or metric",
        ),
        (lambda card: card.adapter.data.update(test="0"), "other test rows"),
        (
            lambda card: card.adapter.update({"parent": ParentRecord("p", "0" * 64)}),
            "other parent",
        ),
    ):
        now = copy.deepcopy(then)
        change(now)
        now.adapter.sha256 = "0" * 64
        (found,) = differences(then, now)
        assert said in found
        same, words = same_bytes(then, now)
        assert not same
        assert said in words


def test_a_later_evaluation_does_not_change_what_is_repeated(ran: Path) -> None:
    """Epochs are ranked by the task's metric and limited by the drift gate."""
    then = Card.read(ran / "adapters" / "x")
    judged = copy.deepcopy(then)
    domain = domain_of(then)
    stricter = replace(
        domain, task=Classification(positive="ham"), gates=Gates(drift=0.05), metric="mcc"
    )
    use_settings(judged.adapter, stricter)
    use_settings(judged.adapter, replace(domain, gates=Gates(drift=0.01)))
    assert judged.adapter.settings["gates"]["drift"] == 0.01
    assert domain_of(judged) == domain
    assert differences(then, judged) == []
    same = copy.deepcopy(then)
    use_settings(same.adapter, domain_of(then))
    assert not same.adapter.trained_with
