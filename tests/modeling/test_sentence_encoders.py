"""Sentence encoders are pooled the way their folder says, here and where adapters are used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from support.encoders import MEAN, make_encoder, make_sentence_encoder
from support.heads import headed, headed_domain, items, padded, served
from support.models import model_in
from support.readmes import blocks, run_block
from transformers import AutoModel, AutoModelForSequenceClassification

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import new_adapter
from lora_domains.adapters.readme import EXAMPLE
from lora_domains.domain import Lora
from lora_domains.errors import AdapterCorrupt, AdapterUnsupported
from lora_domains.inference.likelihoods import head_scores, text_features
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.heads import features, head_logprobs, own_layout
from lora_domains.report.card import Card


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentence_encoder(tmp_path_factory.mktemp("encoders") / "sentence")


def mean(state: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(state, mask, strict=True)])


@pytest.mark.parametrize(
    ("pooling", "found"),
    [
        (MEAN, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "first"),
    ],
    ids=str,
)
def test_the_folder_says_how_texts_are_pooled(
    tmp_path: Path, pooling: dict[str, Any], found: str
) -> None:
    base = load_base(make_sentence_encoder(tmp_path / "base", **pooling), device="cpu")
    assert base.pooling == own_layout(base).pooling == found
    assert load_base(make_encoder(tmp_path / "plain", "bert"), device="cpu").pooling == "first"


def test_features_are_the_mean_of_a_texts_own_tokens(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    pooling = own_layout(base).pooling
    with torch.no_grad():
        state = AutoModel.from_pretrained(folder).eval()(**padded()).last_hidden_state
        wanted = mean(state, padded()["attention_mask"])
        single = torch.cat([features(base.model, [item], 0, pooling) for item in items()])
    for found in (features(base.model, items(), 0, pooling), single,
                  text_features(base.model, items(), 0, pooling=pooling)):  # fmt: skip
        torch.testing.assert_close(found.detach(), wanted, atol=1e-5, rtol=0)
    assert (wanted - state[:, 0]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta", "mpnet"])
def test_the_readme_says_how_to_use_an_adapter_elsewhere(tmp_path: Path, kind: str) -> None:
    """The code in the adapter's README gives the logits of its head."""
    model = model_in(tmp_path, make_sentence_encoder(tmp_path / "base", kind))
    card = model.fit(headed_domain(epochs=1))
    assert card is not None
    assert card.adapter.pooling == Card.read(tmp_path / "spam").adapter.pooling == "mean"
    readme = (tmp_path / "spam" / "README.md").read_text()
    assert "mean of the last layer" in readme
    _, code = blocks(tmp_path / "spam", tmp_path / "base")
    texts = ["alpha red", "the beta of a river is a stone"]
    names = run_block(code.replace(json.dumps([EXAMPLE]), json.dumps(texts)))
    shares = F.softmax(names["logits"], dim=-1)
    for prediction, row in zip(model.predict(texts, "spam"), shares, strict=True):
        found = list(prediction.probabilities.values())  # type: ignore[union-attr]
        assert found == pytest.approx(row.tolist(), abs=1e-5)


def test_adapters_of_both_poolings_share_a_base(folder: Path, tmp_path: Path) -> None:
    """A sequence classifier of plain PEFT reads [CLS] on the same base."""
    torch.manual_seed(3)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["query", "value"], modules_to_save=["pooler"],
        init_lora_weights=False,
    )  # fmt: skip
    peft_model = get_peft_model(classifier, config).eval()
    peft_model.save_pretrained(tmp_path / "plain")
    base = load_base(folder, device="cpu")
    first, pooled = load_adapter(tmp_path / "plain", base), headed(base, "pooled", classes=4)
    with torch.no_grad():
        theirs = peft_model(**padded()).logits.log_softmax(-1)
    wanted = served(base, pooled).log_softmax(-1)
    bank = Bank(base)
    bank.add(first)
    bank.add(pooled)
    rows = ["plain", "pooled", "plain"]
    heads = [head for name in rows if (head := bank[name].head)]
    with bank.routed(rows):
        found = head_scores(base.model, heads, items(), 0)
    for name, one, mine, other in zip(rows, found, wanted, theirs, strict=True):
        row = mine if name == "pooled" else other
        torch.testing.assert_close(torch.tensor(one).float(), row, atol=1e-5, rtol=0)
    assert first.head is not None
    assert pooled.head is not None
    assert head_logprobs(first.head, torch.zeros(1, 32)).shape == (1, 4)


def test_a_bare_encoders_adapter_without_a_head_is_refused(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(task_type="FEATURE_EXTRACTION", r=4, target_modules=["query"])
    get_peft_model(AutoModel.from_pretrained(folder), config).save_pretrained(tmp_path / "plain")
    base = load_base(folder, device="cpu")
    with pytest.raises(AdapterCorrupt, match=r"a head classifier\.weight"):
        load_adapter(tmp_path / "plain", base)


def test_the_pooler_has_no_adapter(folder: Path) -> None:
    base = load_base(folder, device="cpu")
    for targets in ("all-linear", ("query", "dense")):
        adapter = new_adapter(base, "a", Lora(targets=targets), 4, 8, 0, 2)
        assert adapter.weights
        assert not [name for name in adapter.weights if "pooler" in name]
    with pytest.raises(AdapterUnsupported, match="'nothing'"):
        new_adapter(base, "a", Lora(targets=("nothing",)), 4, 8, 0, 2)


def test_minilm_is_pooled_by_its_mean(minilm: Path) -> None:
    assert load_base(minilm, device="cpu").pooling == "mean"
