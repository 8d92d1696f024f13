"""8-bit and 4-bit bases: forward and backward equal those of the dequantised weights."""

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_base
from support.adapters import logits, strong, token_ids
from support.device import base_on
from support.models import QUIET, clear_rows, declared

from lora_domains.adapters.merging import merge
from lora_domains.errors import BaseModelError
from lora_domains.model import DomainModel
from lora_domains.modeling import base as base_file
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base

pytestmark = pytest.mark.slow
KINDS = ["8bit", "4bit"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp("bases") / "wide"
    return make_base(place, hidden_size=128, intermediate_size=256)


def dequantised(small: Base, folder: Path) -> Base:
    """A plain base with the dequantised weights of ``small``."""
    import bitsandbytes as bnb

    plain = base_on(folder)
    replaced = 0
    for name, module in small.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = module.weight.data.float() * scales[:, None] / 127
        else:
            continue
        target = plain.model.get_submodule(name).weight
        assert not torch.equal(target.data, weight)
        target.data.copy_(weight.view_as(target))
        replaced += 1
    assert replaced == 2 * 7
    return plain


def step(base: Base, **lora: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, all gradients in one row) of a strong adapter."""
    bank = Bank(base)
    parameters = bank.add(strong(base, "a", **lora), trainable=True)
    with bank.routed("a"):
        logits = base.model(input_ids=token_ids(), use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids()[:, 1:].flatten()).backward()
    bank.remove("a")
    grads = [p.grad.flatten() for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters)
    return logits.detach(), torch.cat(grads)


def after_eval(base: Base) -> None:
    with torch.no_grad():
        base.model(input_ids=token_ids())


def after_state_dict(base: Base) -> None:
    after_eval(base)
    base.model.state_dict()


BEFORE: dict[str, Callable[[Base], object]] = {
    "fresh": lambda _: None,
    "after an evaluation": after_eval,
    "after state_dict": after_state_dict,
}  # fmt: skip


def check_step(small: Base, plain: Base, **lora: Any) -> None:
    """A training step on ``small`` has the logits and gradients of one on ``plain``."""
    found, grads = step(small, **lora)
    wanted_logits, wanted = step(plain, **lora)
    assert F.cosine_similarity(grads, wanted, dim=0) >= 0.999
    assert float(grads.norm()) == pytest.approx(float(wanted.norm()), rel=0.02)
    assert F.cosine_similarity(found.flatten(), wanted_logits.flatten(), dim=0) >= 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_dora_on_small_weights_is_that_on_the_dequantised_ones(folder: Path, kind: Any) -> None:
    small = base_on(folder, quantization=kind)
    plain = dequantised(small, folder)
    adapter = strong(plain, "a", dora=True)
    after_eval(small)
    found = []
    for base in (small, plain):
        bank = Bank(base)
        bank.add(adapter)
        found.append(logits(bank, "a"))
    assert F.cosine_similarity(*(one.flatten() for one in found), dim=0) >= 0.999
    assert float(found[0].norm()) == pytest.approx(float(found[1].norm()), rel=0.02)
    digest = small.state_digest()
    check_step(small, plain, dora=True)
    assert small.state_digest() == digest


@pytest.mark.contract
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("before", BEFORE)
def test_gradients_equal_those_of_the_dequantised_weights(
    folder: Path, kind: Any, before: str
) -> None:
    small = base_on(folder, quantization=kind)
    plain = dequantised(small, folder)
    BEFORE[before](small)
    check_step(small, plain)


def test_nf4_on_a_cpu_repacks_its_weights_without_the_fix(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU the flag for repacking is off on every linear; elsewhere it is unchanged."""
    small = base_on(folder, quantization="4bit")
    flags = [m.support_avx512bf16_for_cpu for m in small.model.modules()
             if hasattr(m, "support_avx512bf16_for_cpu")]  # fmt: skip
    assert flags == [False] * 14
    packed = {n: p.data.clone() for n, p in small.model.named_parameters()}
    after_state_dict(small)
    for name, parameter in small.model.named_parameters():
        assert torch.equal(parameter.data, packed[name]), name
    seen: list[str] = []
    monkeypatch.setattr(base_file, "prepare_linears", lambda *_: seen.append("called"))
    base_on(folder, quantization="4bit")
    assert seen == ["called"]


@pytest.mark.parametrize("training", [False, True])
def test_an_8_bit_linear_keeps_no_input_for_the_gradient_of_its_weight(
    folder: Path, training: bool
) -> None:
    """bitsandbytes keeps it where gradient checkpointing cannot free it."""
    linears = [m for m in base_on(folder, quantization="8bit").model.modules()
               if type(m).__name__ == "Linear8bitLt"]  # fmt: skip
    assert len(linears) == 14
    x = torch.randn(2, 3, linears[0].in_features, requires_grad=True)
    linear, found = linears[0].train(training), []
    for forgotten in (True, False):
        middle = x * 2
        kept, y = weakref.ref(middle), linear(middle)
        del middle
        assert (kept() is None) == forgotten
        found += torch.autograd.grad(y.square().sum(), x)
        linear._forward_hooks.clear()
    assert torch.equal(*found)


@pytest.mark.contract
@pytest.mark.parametrize("kind", KINDS)
def test_training_leaves_a_quantised_base_unchanged(
    folder: Path, tmp_path: Path, kind: Any
) -> None:
    model = DomainModel(base_on(folder, quantization=kind), out=tmp_path, display=QUIET)
    digest = model.base.state_digest()
    card = model.fit(declared(clear_rows(120), epochs=4, retention="none"))
    history = card.adapter.training["history"]
    assert history[-1]["training_loss"] < history[0]["training_loss"]
    assert card.base.quantization == kind
    assert model.base.state_digest() == digest


# ── Stored in 8 or 4 bits ───────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=KINDS)
def stored(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: Any) -> tuple[Any, Path]:
    """A quantisation, and a folder whose weights transformers saved in it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    kind, place = request.param, tmp_path_factory.mktemp("stored") / request.param
    settings = {"load_in_8bit": True} if kind == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings), device_map={"": "cpu"},
        dtype=torch.float32,
    )  # fmt: skip
    model.save_pretrained(place)
    AutoTokenizer.from_pretrained(folder).save_pretrained(place)
    return kind, place


@pytest.mark.parametrize("before", BEFORE)
def test_a_base_that_is_stored_quantised_has_right_gradients(
    folder: Path, stored: tuple[Any, Path], before: str
) -> None:
    kind, place = stored
    small = base_on(place)
    assert small.quantization == small.record()["quantization"] == kind
    plain = dequantised(small, folder)
    BEFORE[before](small)
    check_step(small, plain)


def test_the_size_of_a_stored_quantised_base_is_known(stored: tuple[Any, Path]) -> None:
    sizes: list[int] = []
    base = base_on(stored[1], announce=lambda size, _: sizes.append(size))
    assert sizes == [pytest.approx(base.resident_bytes(), rel=0.05)]


def test_an_adapter_merges_into_the_dequantised_weights(
    folder: Path, stored: tuple[Any, Path]
) -> None:
    """The merged model is plain, whatever the base is stored in."""
    small = base_on(stored[1])
    bank = Bank(small)
    bank.add(strong(small, "a"))
    merged = merge(bank, "a")
    with torch.no_grad():
        found = merged.model(input_ids=token_ids()).logits
        with bank.routed("a"):
            wanted = small.model(input_ids=token_ids()).logits
    assert all(type(module) is torch.nn.Linear for module in merged.model.modules()
               if isinstance(module, torch.nn.Linear))  # fmt: skip
    assert not hasattr(merged.model.config, "quantization_config")
    assert merged.record["error"] < 0.1
    assert F.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) >= 0.999


def test_another_quantisation_than_the_stored_one_is_refused(stored: tuple[Any, Path]) -> None:
    kind, place = stored
    other: Any = "4bit" if kind == "8bit" else "8bit"
    assert base_on(place, quantization=kind).quantization == kind
    with pytest.raises(BaseModelError, match=f"stored in {kind}; found quantization='{other}'"):
        base_on(place, quantization=other)


def claiming(base: Path, place: Path, settings: dict[str, Any]) -> Path:
    """A copy of ``base`` in ``place`` whose config says that it is quantised."""
    shutil.copytree(base, place)
    config = json.loads((place / "config.json").read_text())
    config["quantization_config"] = settings
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", None])
def test_other_ways_to_quantise_are_refused(
    tiny_base: Path, tmp_path: Path, method: str | None
) -> None:
    named = {"quant_method": method} if method else {}
    place = claiming(tiny_base, tmp_path / "base", {**named, "bits": 4})
    found = f"weights quantised by {method or 'a method that the config does not name'}"
    with pytest.raises(BaseModelError, match=f"found {found}.*unquantised"):
        base_on(place)


def test_plain_weights_that_claim_to_be_quantised_are_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    place = claiming(tiny_base, tmp_path / "base", settings)
    with pytest.raises(BaseModelError, match=r"weights in 4bit, as .*; found plain weights"):
        base_on(place)
