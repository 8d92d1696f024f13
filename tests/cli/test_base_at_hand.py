"""``fit --base auto``: which base is taken of those at hand, and what is said without one."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import make_rows
from huggingface_hub import constants
from support.commands import run, write

from lora_domains.cli import machine
from lora_domains.cli.machine import EXAMPLES, bases_at_hand
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.tasks import Classification, Generation, MultiLabel, Number, Task


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return cache


def make_base(folder: Path, architecture: str, size: int, *files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    (folder / "model.safetensors").write_bytes(b"0" * size)
    for name in files:
        (folder / name).write_text("[]")
    return folder


def test_bases_are_told_apart_by_their_files(tmp_path: Path, empty_cache: Path) -> None:
    own, cached = tmp_path / ".bases", empty_cache / "models--org--name" / "snapshots" / "ab"
    make_base(own / "large", "BertModel", 20, "modules.json")
    make_base(own / "small", "BertForMaskedLM", 10)
    make_base(own / "no_template", "LlamaForCausalLM", 5)
    make_base(own / "no_weights", "BertModel", 0, "modules.json")
    (make_base(own / "broken", "BertModel", 5) / "config.json").write_text("{")
    make_base(cached, "LlamaForCausalLM", 5, "chat_template.jinja")
    found = bases_at_hand()
    assert found == {
        "an encoder, for labels": [Path(".bases/small"), Path(".bases/large")],
        "an instruct model, for answers": [cached],
    }
    assert machine.public_name(cached) == "org/name"
    flags = flags_of("auto")
    machine.with_base(ANSWERS, flags)
    # So that the card names it as on the Hub.
    assert (flags.base, flags.revision) == ("org/name", "ab")


def flags_of(base: str | None) -> Namespace:
    return Namespace(base=base, from_card=None)


LABELS = Domain("spam", Classification(), Data("rows.csv"))
ANSWERS = Domain("answers", Generation(), Data("rows.csv"))


def test_labels_take_an_encoder_with_a_head_and_answers_an_instruct_model(tmp_path: Path) -> None:
    make_base(tmp_path / ".bases" / "chat", "LlamaForCausalLM", 5, "chat_template.jinja")
    flags = flags_of("auto")
    domain, _ = machine.with_base(LABELS, flags)
    assert domain == LABELS  # no encoder is at hand
    assert flags.base == ".bases/chat"
    make_base(tmp_path / ".bases" / "encoder", "BertModel", 10, "modules.json")
    flags = flags_of("auto")
    domain, why = machine.with_base(LABELS, flags)
    assert domain.task == Classification(head=True)
    assert flags.base == ".bases/encoder"
    assert why.startswith("encoder, the smallest at hand of its kind")
    flags = flags_of("auto")
    domain, _ = machine.with_base(ANSWERS, flags)
    assert (domain, flags.base) == (ANSWERS, ".bases/chat")
    flags, asked = flags_of("auto"), replace(LABELS, task=Classification(chat=True))
    domain, _ = machine.with_base(asked, flags)
    assert (domain, flags.base) == (asked, ".bases/chat")  # a head reads no chat


@pytest.mark.parametrize("task", [MultiLabel(), MultiLabel(head=True), Number()])
def test_kinds_that_can_have_a_head_take_an_encoder(task: Task, tmp_path: Path) -> None:
    make_base(tmp_path / ".bases" / "chat", "LlamaForCausalLM", 5, "chat_template.jinja")
    make_base(tmp_path / ".bases" / "encoder", "BertModel", 10, "modules.json")
    flags = flags_of("auto")
    domain, _ = machine.with_base(Domain("parts", task, Data("rows.csv")), flags)
    assert (domain.task.head, flags.base) == (True, ".bases/encoder")
    asked = Domain("parts", MultiLabel(chat=True), Data("rows.csv"))
    flags = flags_of("auto")
    assert machine.with_base(asked, flags)[0] == asked
    assert flags.base == ".bases/chat"


@pytest.mark.parametrize("asked", ["own", "org/name"])
def test_a_sentence_encoder_that_is_named_gets_a_head(
    asked: str, tmp_path: Path, empty_cache: Path
) -> None:
    make_base(tmp_path / "own", "BertModel", 20, "modules.json")
    cached = empty_cache / "models--org--name" / "snapshots" / "ab"
    make_base(cached, "BertModel", 20, "modules.json")
    make_base(tmp_path / "causal", "LlamaForCausalLM", 20)
    make_base(tmp_path / "masked", "BertForMaskedLM", 20)
    labels = Domain("x", Classification(), Data("t.csv"))
    domain, why = machine.with_base(labels, Namespace(base=asked))
    assert domain.task.head
    assert why == f"{asked}, a sentence encoder: with a head"
    # The only task of the encoder stays the user's choice: what has no head is refused later.
    answers = replace(labels, task=Generation())
    assert machine.with_base(answers, Namespace(base=asked)) == (answers, "")
    # A decoder and a model of masked tokens answer with words too: the user chooses.
    for other in ("causal", "masked"):
        assert machine.with_base(labels, Namespace(base=other)) == (labels, "")


def test_without_a_base_the_one_for_real_work_is_named(tmp_path: Path) -> None:
    flags = flags_of(None)
    _, why = machine.with_base(LABELS, flags)
    assert "--base sentence-transformers/all-MiniLM-L6-v2 --head" in why
    assert flags.base is None
    make_base(tmp_path / ".bases" / "encoder", "BertModel", 10, "modules.json")
    _, why = machine.with_base(LABELS, flags)
    assert "--base auto, which takes encoder" in why
    embedded = Domain("spam", Classification(), Data.embedded("spam"))
    assert machine.with_base(embedded, flags) == (embedded, "")


@pytest.mark.parametrize("verb", ["fit", "learning-curve", "cross-validate"])
def test_nothing_at_hand_is_an_error_that_names_a_download(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "rows.jsonl", make_rows(40))
    assert run(verb, str(rows), "--base", "auto", "--out", str(tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"hf download {EXAMPLES['an encoder, for labels']}" in error
