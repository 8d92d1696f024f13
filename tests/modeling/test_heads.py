"""Heads in memory: what they read, several on one base, and the labels they need."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.adapters import save, strong
from support.encoders import make_encoder
from support.heads import change, headed, items, served
from support.models import model_in
from transformers import AutoModelForSequenceClassification

from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.errors import AdapterError, UsageError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.modeling.heads import features, head_logprobs, head_shapes, own_layout
from lora_domains.tasks import Classification, Row
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization


def test_a_new_head_starts_from_the_pooler_of_the_checkpoint(tmp_path: Path) -> None:
    folder = make_encoder(tmp_path / "bert", "bert", saved="bare")
    stored = load_file(folder / "model.safetensors")["pooler.dense.weight"]
    head = new_adapter(load_base(folder, device="cpu"), "x", Lora(), 4, 8, 0, 3).head
    assert head is not None
    assert torch.equal(head.weights["bert.pooler.dense.weight"], stored)
    assert head.weights["classifier.weight"].std() < 0.05


def test_two_heads_of_other_sizes_and_a_language_adapter_on_one_base(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    digest = base.state_digest()
    alone = {n: served(load_base(tiny_base, device="cpu"), headed(base, n, k, seed))
             for n, k, seed in (("two", 2, 1), ("seven", 7, 2))}  # fmt: skip
    bank = Bank(base)
    for adapter in (headed(base, "two", 2, 1), headed(base, "seven", 7, 2), strong(base, "words")):
        bank.add(adapter)
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        for _ in range(2):  # there, and back again
            for name in ("two", "words", "seven", None):
                with bank.routed(name):
                    head = bank[name].head if name else None
                    if name == "words":
                        assert head is None
                        words = base.model(input_ids=ids).logits
                    elif name is None:
                        bare = base.model(input_ids=ids).logits
                    else:
                        assert head is not None
                        found = head_logprobs(head, features(base.model, items(), 0))
                        torch.testing.assert_close(
                            found, alone[name].log_softmax(-1), atol=1e-5, rtol=0
                        )
    assert (words - bare).abs().max() > 0.01
    assert base.state_digest() == digest


def test_features_do_not_depend_on_the_batch(bases: Callable[[str], Path]) -> None:
    for kind in ("llama", "bert", "roberta"):
        base = load_base(bases(kind), device="cpu")
        with torch.no_grad():
            together = features(base.model, items(), 0)
            single = torch.cat([features(base.model, [item], 0) for item in items()])
        torch.testing.assert_close(together, single, atol=1e-5, rtol=0)
        assert (single[0] - single[1]).abs().max() > 1e-3


def test_a_head_reads_the_text_without_an_answer(tiny_base: Path) -> None:
    base = load_base(tiny_base, device="cpu")
    task = Classification(head=True, labels=("ham", "spam"))
    assert task.template == "{text}"
    assert Classification(("a", "b"), head=True).template == "a: {a}\nb: {b}"
    assert Classification(prompt="{text} is", head=True).template == "{text} is"
    example = task.example(Row({"text": "alpha beta", "label": "spam"}, "train", 0, "row 0"))
    item = Tokenization(base.tokenizer, 16, head=True).encode(example)
    assert (item.answer, item.choices, item.target, item.supervised) == ((), (), 1, 1)
    assert base.tokenizer.decode(item.prompt) == "<s>alpha beta"
    long = replace(example, prompt="alpha " * 40)
    assert len(Tokenization(base.tokenizer, 16, head=True).encode(long)) == 16


def test_a_head_of_another_size_leaves_the_bank_unchanged(tmp_path: Path, tiny_base: Path) -> None:
    model = model_in(tmp_path, tiny_base)
    folder = save(tmp_path / "headed", headed(model.base), model.base)
    assert model.load_adapter(folder) == "headed"
    shutil.copytree(folder, tmp_path / "broken")
    change(
        tmp_path / "broken", lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 9)})
    )
    with pytest.raises(AdapterError):
        model.load_adapter("broken")
    assert model.domains == ("headed",)
    assert head_shapes(model.base, own_layout(model.base), 3) == {"score.weight": (3, 32)}


def test_a_classifier_of_plain_peft_has_no_labels(tmp_path: Path, tiny_base: Path) -> None:
    model = model_in(tmp_path, tiny_base)
    folder = save(tmp_path / "headed", headed(model.base), model.base)
    (folder / "card.json").unlink()
    model.load_adapter(folder)
    with pytest.raises(UsageError, match="Its task is not in its folder"):
        model.predict("alpha", "headed")


@pytest.mark.parametrize("ending", [(), (9,), (9, 9), (9,) * 7])
def test_a_text_that_ends_with_the_padding_token_is_read_as_in_transformers(
    tiny_base: Path, tmp_path: Path, ending: tuple[int, ...]
) -> None:
    """A config may name an ordinary token as padding, such as the end of text."""
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 9}))
    base = load_base(folder, device="cpu")
    prompt = (*(() if len(ending) == 7 else (5, 9, 31, 40)), *ending)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
    with torch.no_grad():
        wanted = classifier(torch.tensor([prompt])).logits
        example = EncodedExample("1", prompt, (), target=0)
        beside = EncodedExample("2", tuple(range(20, 40)), (), target=0)
        state = features(base.model, [example, beside], 0)[:1]
        found = F.linear(state, classifier.score.weight)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
