"""Heads in adapter folders: PEFT is the oracle, and a head that does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.adapters import assert_close, save
from support.encoders import KINDS, make_encoder
from support.heads import change, headed, padded, served
from transformers import AutoModelForSequenceClassification

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import AdapterCorrupt, AdapterUnsupported
from lora_domains.modeling.base import load_base
from lora_domains.modeling.heads import LAYOUTS


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_plain_peft_loads_heads_saved_here(
    tmp_path: Path, bases: Callable[[str], Path], kind: str
) -> None:
    base = load_base(bases(kind), device="cpu")
    adapter = headed(base)
    folder = save(tmp_path / "headed", adapter, base)
    ours = served(base, load_adapter(folder, base))
    stored = json.loads((folder / "adapter_config.json").read_text())
    assert not {"pre_classifier", "bert.pooler.dense", "classifier.dense"} & set(
        stored["target_modules"]
    )
    classifier = AutoModelForSequenceClassification.from_pretrained(bases(kind), num_labels=3)
    with torch.no_grad():
        bare = classifier.eval()(**padded()).logits
        theirs = PeftModel.from_pretrained(classifier, folder).eval()(**padded()).logits
    assert_close(ours, theirs)
    assert (theirs - bare).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["llama", *KINDS])
def test_heads_of_plain_peft_load_here(
    tmp_path: Path, bases: Callable[[str], Path], kind: str
) -> None:
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(bases(kind), num_labels=4)
    targets = {
        "llama": ["q_proj", "down_proj"], "distilbert": ["q_lin", "lin2"], "mpnet": ["q", "v"],
        "deberta": ["in_proj"], "deberta-v2": ["query_proj", "value_proj"],
        "modernbert": ["Wqkv", "Wo"],
    }  # fmt: skip
    saved = LAYOUTS[kind].saved if kind in LAYOUTS else ()
    whole = [name for name in saved if name in ("pooler", "head")] or None
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=targets.get(kind, ["query", "value"]),
        modules_to_save=whole, init_lora_weights=False,
    )  # fmt: skip
    model = get_peft_model(classifier, config).eval()
    with torch.no_grad():
        theirs = model(**padded()).logits
    model.save_pretrained(tmp_path / "peft")
    base = load_base(bases(kind), device="cpu")
    before = base.state_digest()
    adapter = load_adapter(tmp_path / "peft", base)
    assert_close(served(base, adapter), theirs)
    assert adapter.head is not None
    assert adapter.head.classes == 4
    assert base.state_digest() == before


@pytest.mark.parametrize("trained", [True, False])
def test_a_pooler_that_peft_left_out_is_taken_from_the_checkpoint_or_refused(
    tmp_path: Path, trained: bool
) -> None:
    """PEFT saves BERT's classifier without its pooler, which may have been random."""
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare" if trained else "masked")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(classifier, config).eval()
    model.save_pretrained(tmp_path / "peft")
    base = load_base(folder, device="cpu")
    if not trained:
        with pytest.raises(AdapterUnsupported, match="random and was not saved"):
            load_adapter(tmp_path / "peft", base)
        return
    with torch.no_grad():
        theirs = model(**padded()).logits
    adapter = load_adapter(tmp_path / "peft", base)
    assert_close(served(base, adapter), theirs)


HEAD = "base_model.model.pre_classifier.weight"
LAST = "base_model.model.classifier.weight"


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda t: t.pop(LAST), AdapterCorrupt, "a head classifier.weight"),
        (lambda t: t.pop(HEAD), AdapterUnsupported, "pre_classifier.weight"),
        (lambda t: t.update({LAST: torch.ones(3, 31)}), AdapterCorrupt, "(3, 31)"),
        (lambda t: t.update({LAST: torch.ones(0, 32)}), AdapterCorrupt, "(0, 32)"),
        (lambda t: t.update({LAST: torch.ones(10**9, 0)}), AdapterCorrupt, "(1000000000, 0)"),
        (lambda t: t.update({HEAD: torch.ones(8, 32)}), AdapterCorrupt, "other shapes"),
        (lambda t: t.update({LAST: torch.ones(5, 32)}), AdapterCorrupt, "classifier.bias"),
        (lambda t: t[HEAD].__setitem__((0, 0), torch.nan), AdapterCorrupt, "NaN"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(3, 32)}), AdapterCorrupt,
         "1 unexpected"),
    ],
)  # fmt: skip
def test_a_changed_head_is_refused(
    tmp_path: Path, bases: Callable[[str], Path], edit: Any, error: type[Exception], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base), base)
    change(folder, edit)
    with pytest.raises(error) as raised:
        load_adapter(folder, base)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "CAUSAL_LM", "modules_to_save": None}, "task_type SEQ_CLS"),
        ({"task_type": None, "modules_to_save": None}, "task_type SEQ_CLS"),
        ({"modules_to_save": ["embeddings", "classifier"]}, "no saved modules except"),
        ({"modules_to_save": "classifier"}, "no saved modules except"),
        ({"modules_to_save": ["classifier"], "target_modules": ["q_lin", "pre_classifier"]},
         "target modules"),
    ],
)  # fmt: skip
def test_a_config_of_another_head_is_refused(
    tmp_path: Path, bases: Callable[[str], Path], settings: dict[str, Any], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base), base)
    (folder / "card.json").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(AdapterUnsupported, match=message):
        load_adapter(folder, base)


def test_lora_on_a_layer_of_the_head_is_refused(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare")
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "pooler.dense"])
    get_peft_model(classifier, config).save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterUnsupported, match=r"LoRA on bert\.pooler\.dense"):
        load_adapter(tmp_path / "peft", load_base(folder, device="cpu"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"kind": "classification", "head": True, "labels": ["a", "b"]}, "2 classes"),
        ({"kind": "classification", "head": False, "labels": ["a", "b", "c"]}, "no head"),
    ],
)
def test_a_head_has_as_many_classes_as_the_card_has_labels(
    tmp_path: Path, bases: Callable[[str], Path], task: dict[str, Any], message: str
) -> None:
    base = load_base(bases("distilbert"), device="cpu")
    folder = save(tmp_path / "headed", headed(base, classes=3), base)
    card = json.loads((folder / "card.json").read_text())
    card["adapters"][0]["settings"] = {"task": task}
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(AdapterCorrupt, match=message):
        load_adapter(folder, base)
