"""Traces of one text agree with predictions, add up over the layers, and are never written."""

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_base
from rich.console import Console
from support.adapters import save, strong, token_ids
from support.commands import run

from lora_domains.analysis.trace import (
    ended_after,
    layer_list,
    layer_of,
    log_odds,
    trace,
    trace_example,
)
from lora_domains.console import Display, analyses
from lora_domains.errors import UsageError
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.scores import renormalise
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.report.card import AdapterEntry, BaseRecord, Card
from lora_domains.report.terminal import bar, signed_bar
from lora_domains.tasks import (
    Classification,
    Example,
    Generation,
    MultiLabel,
    Row,
    task_record,
)
from lora_domains.tokenization.tokenization import Tokenization

# Labels of several tokens with a common first token.
TASK = Classification(labels=("spam now", "spam later", "ham"))
TEXT = "alpha beta win the prize now"


def prompt(text: str = TEXT) -> Example:
    return TASK.unlabelled(Row({"text": text}, "input", 0, "input"))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = make_base(tmp_path_factory.mktemp("bases") / "four", num_hidden_layers=4)
    made = Bank(load_base(folder, device="cpu"))
    made.add(strong(made.base, "strong"))
    return made


def probabilities(bank: Bank, route: str | None) -> list[float]:
    item = Tokenization(bank.base.tokenizer, 128).encode(prompt())
    with bank.routed(route):
        (scores,) = choice_logprobs(bank.base.model, [item], bank.base.pad)
    return [float(p) for p in torch.tensor(renormalise(scores)).exp()]


def test_probabilities_are_those_of_base_and_adapter(bank: Bank) -> None:
    found = trace_example(bank, "strong", TASK, prompt(), Tokenization(bank.base.tokenizer, 128))
    assert found.base == pytest.approx(probabilities(bank, None), abs=1e-6)
    assert found.adapter == pytest.approx(probabilities(bank, "strong"), abs=1e-6)
    best = found.labels.index(found.answer)
    assert found.adapter[best] == max(found.adapter)
    last, logit = found.layers[-1], torch.logit
    # At the last layer every view is the whole model.
    assert last.base == pytest.approx(float(logit(torch.tensor(found.base[best]))), abs=1e-3)
    assert last.adapter == pytest.approx(float(logit(torch.tensor(found.adapter[best]))), abs=1e-3)
    assert last.upto == pytest.approx(last.adapter, abs=1e-5)
    assert found.start == pytest.approx(last.base, abs=1e-5)
    assert [layer.number for layer in found.layers] == [1, 2, 3, 4]
    moved = sum(layer.moved for layer in found.layers)
    assert moved == pytest.approx(last.adapter - last.base, abs=1e-5)
    assert len({round(layer.upto, 3) for layer in found.layers}) == 4


def test_a_layer_without_lora_weights_changes_nothing(bank: Bank) -> None:
    whole = bank["strong"]
    third = {n: pair for n, pair in whole.weights.items() if ".layers.2." in n}
    bank.add(replace(whole, name="third", weights=third, flat=None))
    found = trace_example(bank, "third", TASK, prompt(), Tokenization(bank.base.tokenizer, 128))
    assert [layer.moved != 0 for layer in found.layers] == [False, False, True, False]
    assert found.most_moved == (3,)
    for layer in found.layers[:2]:
        assert layer.base == layer.adapter


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_lens_is_the_last_norm_and_the_output_layer_after_each_layer(
    bank: Bank, kind: str
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model: Any = bank.base.model
    if kind == "gpt2":
        config = GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=3, n_head=4)
        model = GPT2LMHeadModel(config).eval()
    path, count = layer_list(model)
    norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
    ids = token_ids().clamp(max=59)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
        for number in range(1, count):
            view = ended_after(model, path, number)
            wanted = model.lm_head(norm(hidden[number]))
            torch.testing.assert_close(view(input_ids=ids).logits, wanted, atol=1e-5, rtol=0)
        whole = ended_after(model, path, count)(input_ids=ids).logits
        assert torch.equal(whole, model(input_ids=ids).logits)
    assert len(model.get_submodule(path)) == count  # the model itself is unchanged


def test_bank_and_base_stay_unchanged(bank: Bank) -> None:
    before, names = bank.base.state_digest(), tuple(bank)
    trace_example(bank, "strong", TASK, prompt(), Tokenization(bank.base.tokenizer, 128))
    assert (bank.base.state_digest(), tuple(bank)) == (before, names)
    assert bank.current() is None


def test_tokens_are_in_order_with_those_that_were_cut(bank: Bank) -> None:
    tokenization, example = Tokenization(bank.base.tokenizer, 24), prompt(WORDS)
    found = trace_example(bank, "strong", TASK, example, tokenization)
    whole = bank.base.tokenizer.decode(tokenization.tokens(example.prompt))
    assert "".join(found.before + found.cut + found.after) == whole
    read = tokenization.encode(example).prompt
    kept = bank.base.tokenizer.decode(read[len(tokenization.bos) :])
    assert "".join(found.before + found.after) == kept
    assert len(found.cut) > 0
    short = trace_example(bank, "strong", TASK, prompt(), Tokenization(bank.base.tokenizer, 128))
    assert (short.cut, short.after) == ((), ())


def test_generated_answers_of_adapter_and_base_are_compared(bank: Bank) -> None:
    task = Generation(max_new_tokens=4)
    example = task.unlabelled(Row({"question": TEXT}, "input", 0, "input"))
    found = trace_example(bank, "strong", task, example, Tokenization(bank.base.tokenizer, 128))
    assert len(found.labels) == 2
    assert sum(found.adapter) == pytest.approx(1)
    bank.add(replace(bank["strong"], name="none", scales=dict.fromkeys(bank["strong"].scales, 0.0)))
    same = trace_example(bank, "none", task, example, Tokenization(bank.base.tokenizer, 128))
    assert (len(same.labels), same.layers) == (1, ())


def test_several_labels_are_traced_as_the_text_that_is_generated(bank: Bank) -> None:
    task = MultiLabel(labels=("spam", "ham"))
    tokenization = Tokenization(bank.base.tokenizer, 128)
    example = task.unlabelled(Row({"text": TEXT}, "input", 0, "input"))
    traced = trace_example(bank, "strong", task, example, tokenization)
    assert len(traced.labels) == len(traced.adapter)
    assert traced.answer in traced.labels


def test_the_layer_of_a_linear_follows_from_its_name() -> None:
    assert layer_of("model.layers.0.self_attn.q_proj", "model.layers", 4) == 1
    assert layer_of("model.layers.3.mlp.up_proj", "model.layers", 4) == 4
    assert layer_of("lm_head", "model.layers", 4) == 4


def test_log_odds_of_even_choices() -> None:
    import numpy as np

    assert log_odds(np.log([0.5, 0.25, 0.25]), 0) == pytest.approx(0)


def saved(bank: Bank, out: Path) -> Path:
    """The folder of the strong adapter, with its task in the card."""
    folder = save(out / "strong", bank["strong"], bank.base)
    card = json.loads((folder / "card.json").read_text())
    card["adapters"][0]["settings"] = {"task": task_record(TASK)}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


def test_the_text_is_shown_and_not_written(
    bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(bank, tmp_path / "adapters")
    base = make_base(tmp_path / "base", num_hidden_layers=4)
    assert run("trace", str(folder), "a secretword now", "--base", str(base)) == 0
    shown = capsys.readouterr().out
    assert "secretword" in shown.replace("│", "")
    assert "Layer by layer" in shown
    assert re.search(r"Words that mattered most for this answer, in nats: '\w+' [+-]\d", shown)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"secretword" not in path.read_bytes(), path


def test_a_domain_with_several_columns_needs_a_row(bank: Bank, tmp_path: Path) -> None:
    model = DomainModel(bank.base, out=tmp_path, display=Display(quiet=True))
    adapter = replace(bank["strong"], card=Card(
        base=BaseRecord(**bank.base.record()),
        adapter=AdapterEntry(domain="strong", path="strong", sha256=None, settings={
            "task": task_record(replace(TASK, text=("text", "note")))}),
    ))  # fmt: skip
    model.bank.add(adapter)
    with pytest.raises(UsageError, match="rows with the columns text, note"):
        trace(model, "alpha", "strong")
    assert trace(model, {"text": "alpha", "note": "beta"}, "strong").layers


def test_a_trace_is_printed(bank: Bank, tmp_path: Path) -> None:
    found = trace_example(bank, "strong", TASK, prompt(), Tokenization(bank.base.tokenizer, 128))
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        analyses.trace(Display(console=Console(file=file)).console, asdict(found), found.most_moved)
    text = (tmp_path / "log").read_text(encoding="utf-8")
    assert f"strong answers '{found.answer}'" in text
    assert "0 cut from the middle" in text
    for layer in found.layers:
        assert f"{layer.upto:+.2f}" in text


def test_bars() -> None:
    assert bar(0, 4) == "    "
    assert bar(1, 4) == "████"
    assert bar(0.5, 4).rstrip() == "██"
    assert bar(1 / 32, 4).rstrip() == "▏"
    assert signed_bar(1, 2) == "  │██"
    assert signed_bar(-0.5, 2) == " █│  "
