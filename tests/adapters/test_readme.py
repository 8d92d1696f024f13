"""The README of an adapter: its code runs, and its front matter is what the Hub reads."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from support import folders
from support.adapters import logits, strong, token_ids
from support.encoders import make_encoder, make_sentence_encoder
from support.heads import headed
from support.models import model_in
from support.readmes import blocks, run_block

from lora_domains.adapters.peft import save_adapter
from lora_domains.adapters.readme import EXAMPLE, readme
from lora_domains.embedded import BASE_PATH
from lora_domains.model import DomainModel
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.report.report import rebuild
from lora_domains.report.text import metric_name
from lora_domains.tasks import Classification, Task, task_record
from lora_domains.tasks.generation import Chat, Generation, LanguageModelling
from lora_domains.tasks.multi_label import MultiLabel
from lora_domains.tasks.multiple_choice import MultipleChoice
from lora_domains.tasks.number import Number

LABELS = ("routine", "urgent", "later")
TRAINED = folders.CARD["adapters"][0]
"""The entry of an adapter that was trained here."""


def saved(model: DomainModel, adapter: Adapter, task: Task) -> Path:
    """``adapter`` saved as a run on ``task`` saves it."""
    head = adapter.head

    def card(sha256: str) -> Card:
        entry = AdapterEntry(
            domain=adapter.name, path=adapter.name, sha256=sha256,
            settings=TRAINED["settings"] | {"task": task_record(task)},
            **{key: TRAINED[key] for key in ("training", "ledger", "leaks")},
            pooling=head.layout.pooling if head and head.layout.pooling != "first" else None,
        )  # fmt: skip
        return Card(base=BaseRecord(**model.base.record()), adapter=entry)

    folder = model.out / adapter.name
    save_adapter(folder, adapter, model.base, card, readme)
    return folder


HERE: dict[str, Task] = {
    "classification": Classification(labels=LABELS),
    "two columns": Classification(text=("title", "body"), labels=LABELS),
    "generation": Generation(prompt="{text} ->", max_new_tokens=4),
    "chat": Chat(max_new_tokens=4),
    "choices": MultipleChoice(prompt="{question}"),
    "text": LanguageModelling(),
}


@pytest.fixture(scope="module")
def model(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> DomainModel:
    return model_in(tmp_path_factory.mktemp("adapters"), tiny_base)


@pytest.mark.parametrize("kind", HERE)
def test_the_code_loads_an_adapter_here_and_in_peft(
    kind: str, model: DomainModel, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = strong(model.base, kind.replace(" ", "-"))
    folder = saved(model, adapter, HERE[kind])
    here, peft = blocks(folder, tiny_base)
    assert run_block(here)["name"] == adapter.name
    assert capsys.readouterr().out.strip()
    plain = run_block(peft)["model"]
    with torch.no_grad():
        theirs = plain(input_ids=token_ids()).logits
    model.bank.add(adapter)
    torch.testing.assert_close(theirs, logits(model.bank, adapter.name), atol=1e-5, rtol=0)
    model.unload(adapter.name)


def test_the_code_for_the_embedded_base_runs(tmp_path: Path) -> None:
    model = DomainModel.from_pretrained(out=tmp_path, device="cpu")
    adapter = strong(model.base, "triage")
    here, peft = blocks(saved(model, adapter, Classification(labels=LABELS)), BASE_PATH)
    assert "from_pretrained()" in here
    assert run_block(here)["name"] == "triage"
    plain = run_block(peft)["model"]
    model.bank.add(adapter)
    with torch.no_grad():
        theirs = plain(input_ids=token_ids()).logits
    torch.testing.assert_close(theirs, logits(model.bank, "triage"), atol=1e-4, rtol=0)


HEADS: dict[str, tuple[Callable[[Path], Path] | None, Task]] = {
    "causal": (None, Classification(labels=LABELS, head=True)),
    "encoder": (lambda folder: make_encoder(folder, "bert", saved="bare"),
                Classification(labels=LABELS, head=True)),
    "sentences": (make_sentence_encoder, Classification(labels=LABELS, head=True)),
    "labels": (make_sentence_encoder, MultiLabel(labels=LABELS, head=True)),
    "number": (make_sentence_encoder, Number().with_scale((3.0, 2.0))),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADS)
def test_the_code_gives_the_answer_of_a_head(
    kind: str, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, task = HEADS[kind]
    base = make(tmp_path / "base") if make else tiny_base
    model = model_in(tmp_path / "adapters", base)
    classes = task.head_classes
    assert classes is not None
    folder = saved(model, headed(model.base, "triage", classes), task)
    here, peft = blocks(folder, base)
    run_block(here)
    assert capsys.readouterr().out.strip()
    found = run_block(peft)["logits"][0]
    (answer,) = model.predict(EXAMPLE, model.load_adapter(folder))
    wanted: Any
    if task.outputs == "value":
        found, wanted = found[0] * 2.0 + 3.0, answer
    else:
        shares = found.softmax(-1) if task.outputs == "classes" else found.sigmoid()
        found, wanted = shares.tolist(), list(answer.probabilities.values())  # type: ignore[union-attr]
        text = (folder / "README.md").read_text()
        assert "in the order of the head: routine, urgent, later." in text
    assert found == pytest.approx(wanted, abs=1e-5)


# ── Front matter ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def card(tmp_path: Path) -> Card:
    """A card with a verdict."""
    return rebuild(folders.folder(tmp_path, "triage"))


def test_the_hub_reads_the_scores(card: Card) -> None:
    found = ModelCard(readme(card)).data
    assert found.library_name == "peft"
    assert found.pipeline_tag == "text-generation"
    assert "lora" in found.tags
    name, results = model_index_to_eval_results(
        ModelCard(readme(card)).data.to_dict()["model-index"]
    )
    assert name == "triage"
    by_name = {result.metric_name: result for result in results}
    scores = card.adapter.domain_scores
    assert by_name.keys() == {metric_name(metric) for metric in scores}
    f1, macro = by_name["F1"], by_name["macro F1"]
    assert f1.metric_value == round(scores["f1"]["adapter"], 4)
    assert (f1.metric_type, f1.metric_args, f1.dataset_name) == ("f1", None, "triage test rows")
    assert (macro.metric_type, macro.metric_args) == ("f1", {"average": "macro"})
    assert f1.task_type == "text-classification"


def test_rows_on_the_hub_are_named_in_the_scores(card: Card) -> None:
    card.adapter.settings["data"] = {"test": {
        "id": "team/rows", "split": "test", "revision": "abc", "config": None,
    }}  # fmt: skip
    result = ModelCard(readme(card)).data.eval_results[0]
    assert (result.dataset_type, result.dataset_split, result.dataset_revision) == (
        "team/rows", "test", "abc",
    )  # fmt: skip


def test_no_licence_is_invented(card: Card) -> None:
    card.base = replace(card.base, licence="apache-2.0")
    text = readme(card)
    assert ModelCard(text).data.license is None
    assert "The base has the licence apache-2.0. The licence of the adapter is its owner's" in text
    card.base = replace(card.base, licence=None)
    assert "The base has" not in readme(card)


def test_only_a_base_on_the_hub_is_linked(card: Card) -> None:
    card.base = replace(card.base, id='odd: "name"', revision=None)
    assert ModelCard(readme(card)).data.base_model is None
    card.base = replace(card.base, id="Qwen/Qwen3-0.6B", revision="abc")
    text = readme(card)
    assert ModelCard(text).data.base_model == "Qwen/Qwen3-0.6B"
    assert 'DomainModel.from_pretrained("Qwen/Qwen3-0.6B", revision="abc")' in text


def test_an_adapter_without_a_verdict_has_no_scores(card: Card) -> None:
    card.adapter.verdict, card.adapter.domain_scores = None, {}
    assert ModelCard(readme(card)).data.eval_results is None
