"""Merging: PEFT's result at every precision, and an unchanged base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from support.adapters import TOLERANCE, assert_equal, logits, save, strong, token_ids
from support.commands import run
from support.device import base_on
from support.peft_folders import peft_saved, plain

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.merging import MERGED, export, merge
from lora_domains.adapters.peft import new_adapter
from lora_domains.console import Display
from lora_domains.domain import Lora
from lora_domains.errors import AdapterError, BaseModelError, UsageError
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_on(tiny_base)


def loaded(base: Base, *adapters: Any) -> Bank:
    bank = Bank(base)
    for adapter in adapters:
        bank.add(adapter)
    return bank


def plain_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=token_ids()).logits
    return found.float()


def assert_stands_alone(model: Any) -> None:
    assert type(model).__module__.startswith("transformers.")
    assert not [n for n, _ in model.named_modules() if "routed" in n or "lora" in n]
    assert all(p.requires_grad for p in model.parameters())
    assert not model.training


# ── Compared with PEFT ──────────────────────────────────────────────────────────────────────────

LLAMA = [
    {"r": 4, "target_modules": "all-linear"},
    {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2},
     "alpha_pattern": {"v_proj": 40}},
    {"use_dora": True, "target_modules": "all-linear"},
]  # fmt: skip
GPT2 = [
    {"target_modules": ["c_proj"], "fan_in_fan_out": True},  # square, so a transpose would fit too
    {"target_modules": "all-linear", "fan_in_fan_out": True, "r": 5, "use_rslora": True},
    {"target_modules": ["c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True},
]


@pytest.mark.contract
@pytest.mark.parametrize("options", LLAMA, ids=lambda options: " ".join(options))
def test_a_llama_is_merged_as_peft_merges_it(
    tiny_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _as_peft(tiny_base, tmp_path, options)


@pytest.mark.parametrize("options", GPT2, ids=lambda options: " ".join(options))
def test_a_gpt2_is_merged_as_peft_merges_it(
    gpt2_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _as_peft(gpt2_base, tmp_path, options)


def _as_peft(base_folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    from peft import PeftModel

    folder, unmerged = peft_saved(base_folder, tmp_path / "theirs", **options)
    oracle = PeftModel.from_pretrained(plain(base_folder), folder).merge_and_unload()
    base = base_on(base_folder)
    bank = loaded(base, strong(base, "other", 7, targets="all-linear"))
    bank.add(load_adapter(folder, base))
    bare, digest = logits(base), base.state_digest()
    merged = merge(bank, "theirs")
    assert_stands_alone(merged.model)
    theirs = dict(oracle.named_parameters())
    ours = dict(merged.model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=TOLERANCE, rtol=0)
    assert_equal(plain_logits(merged.model), plain_logits(oracle), bare)
    assert_equal(plain_logits(merged.model), unmerged, bare)
    assert merged.record["error"] < 1e-5
    assert merged.record["base_error"] == 0
    assert (base.state_digest(), torch.equal(logits(base), bare)) == (digest, True)


def test_the_merged_model_shares_no_weights_with_the_base(base: Base) -> None:
    bank = loaded(base, strong(base))
    served, digest = logits(bank, "strong"), base.state_digest()
    model = merge(bank, "strong").model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert base.state_digest() == digest
    assert torch.equal(logits(bank, "strong"), served)


def test_an_adapter_without_effect_is_reported(base: Base) -> None:
    bank = loaded(base, new_adapter(base, "fresh", Lora(), 4, 8, seed=1))
    merged = merge(bank, "fresh")
    assert merged.record["error"] is None
    assert "the adapter has no effect" in str(merged)
    assert torch.equal(plain_logits(merged.model), logits(base))


# ── Tied embeddings ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_adapter_on_a_tied_output_layer_leaves_the_embeddings_unchanged(
    kind: str, tiny_base: Path, gpt2_base: Path, tmp_path: Path
) -> None:
    base = base_on({"llama": tiny_base, "gpt2": gpt2_base}[kind])
    assert base.model.config.tie_word_embeddings
    embeddings = base.model.get_input_embeddings().weight.clone()
    bank = loaded(base, strong(base, targets=("lm_head",)))
    bare, served = logits(base), logits(bank, "strong")
    merged = export(bank, "strong", tmp_path / "merged")
    assert torch.equal(merged.model.get_input_embeddings().weight, embeddings)
    assert_equal(plain_logits(merged.model), served, bare)
    again = plain(tmp_path / "merged")
    assert not again.config.tie_word_embeddings
    assert torch.equal(again.get_input_embeddings().weight, embeddings)
    assert_equal(plain_logits(again), served, bare)


def test_other_adapters_leave_embeddings_tied(base: Base, tmp_path: Path) -> None:
    bank = loaded(base, strong(base))
    export(bank, "strong", tmp_path / "merged")
    again = plain(tmp_path / "merged")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_an_output_layer_that_was_never_tied(tmp_path: Path) -> None:
    base = base_on(make_base(tmp_path / "untied", tie_word_embeddings=False))
    bank = loaded(base, strong(base, targets=("lm_head", "q_proj")))
    bare, served = logits(base), logits(bank, "strong")
    export(bank, "strong", tmp_path / "merged")
    assert_equal(plain_logits(plain(tmp_path / "merged")), served, bare)


# ── Precisions ──────────────────────────────────────────────────────────────────────────────────


def stated(bank: Bank, merged: torch.Tensor, name: str) -> float:
    """The error that ``record`` defines, on other inputs than those it was measured on."""
    served, bare = logits(bank, name).float(), logits(bank).float()
    return float((merged - served).norm() / (served - bare).norm())


def test_a_bf16_base_gives_bf16_weights_rounded_once(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = base_on(tiny_base, dtype="bfloat16")
    adapter = strong(base)
    folder = save(tmp_path / "strong", adapter, base)
    bank = loaded(base, adapter)
    digest = base.state_digest()
    merged = merge(bank, "strong")
    assert {p.dtype for p in merged.model.parameters()} == {torch.bfloat16}
    assert merged.record["dtype"] == "bfloat16"
    # Sums are rounded once from float32: within half a unit of bf16's last place (8 bits).
    theirs = PeftModel.from_pretrained(base_on(tiny_base, dtype="bfloat16").model, folder)
    peft = dict(theirs.merge_and_unload().named_parameters())
    for linear, (a, b) in adapter.weights.items():
        weight = base.model.get_submodule(linear).weight.double()
        exact = weight + b.double() @ a.double() * adapter.scales[linear]
        ours = merged.model.get_submodule(linear).weight
        assert bool(((ours - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all())
        torch.testing.assert_close(ours, peft[f"{linear}.weight"], atol=1e-6, rtol=2**-7)
    error = stated(bank, plain_logits(merged.model), "strong")
    assert 0 < error < 0.05
    assert error / 3 < merged.record["error"] < error * 3
    assert merged.record["base_error"] == 0
    assert "in bfloat16; error " in str(merged)
    assert base.state_digest() == digest


def test_merging_into_another_dtype(tiny_base: Path) -> None:
    base = base_on(tiny_base, dtype="bfloat16")
    exact = base_on(tiny_base)
    bank, wanted = loaded(base, strong(base)), logits(exact)
    exact_bank = loaded(exact, strong(exact))
    merged = merge(bank, "strong", "float32")
    assert merged.model.dtype == torch.float32
    # The stored weights are merged, not those already rounded to bf16.
    assert_equal(plain_logits(merged.model), logits(exact_bank, "strong"), wanted)
    assert 0 < merged.record["base_error"] < 1
    assert "the base alone, bfloat16 to float32" in str(merged)


@pytest.mark.contract
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_is_merged_in_full_precision(tiny_base: Path, quantization: Any) -> None:
    base, full = base_on(tiny_base, quantization=quantization), base_on(tiny_base)
    adapter = strong(full)
    bank, digest, bare = loaded(base, adapter), base.state_digest(), logits(base)
    merged = merge(bank, "strong")
    wanted = merge(loaded(full, adapter), "strong")
    assert_stands_alone(merged.model)
    theirs = dict(wanted.model.named_parameters())
    for name, weight in merged.model.named_parameters():
        assert torch.equal(weight, theirs[name]), name
    assert not hasattr(merged.model.config, "quantization_config")
    error = stated(bank, plain_logits(merged.model), "strong")
    assert error > 1e-3
    assert error / 3 < merged.record["error"] < error * 3
    assert merged.record["base_error"] > 1e-4
    assert f"the base alone, {quantization} to float32" in str(merged)
    assert base.state_digest() == digest
    assert torch.equal(logits(base), bare)


def test_weights_beyond_the_range_of_a_dtype_are_refused(base: Base) -> None:
    adapter = strong(base)
    _, b = next(iter(adapter.weights.values()))
    b.mul_(1e6)
    bank, digest = loaded(base, adapter), base.state_digest()
    with pytest.raises(AdapterError, match="float16 can hold"):
        merge(bank, "strong", "float16")
    assert merge(bank, "strong").record["dtype"] == "float32"
    assert base.state_digest() == digest


# ── Refusals ────────────────────────────────────────────────────────────────────────────────────


def test_a_name_that_is_not_loaded(base: Base) -> None:
    with pytest.raises(UsageError, match="Did you mean 'strong'"):
        merge(loaded(base, strong(base)), "stronk")


def test_another_base_in_its_place_is_refused(tmp_path: Path) -> None:
    base = base_on(make_base(tmp_path / "base"))
    bank = loaded(base, strong(base))
    make_base(tmp_path / "base", seed=1)
    with pytest.raises(BaseModelError, match="another one in its place"):
        merge(bank, "strong")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(BaseModelError, match="no such folder"):
        merge(bank, "strong")


def test_only_a_merged_model_is_replaced(base: Base, tmp_path: Path) -> None:
    adapter = strong(base)
    bank = loaded(base, adapter, strong(base, "second", 2))
    kept = save(tmp_path / "strong", adapter, base)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    for name in ("strong", "thesis"):
        before = {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        with pytest.raises(AdapterError, match=r"a folder with merged\.json"):
            export(bank, "strong", tmp_path / name)
        assert {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} == before
    export(bank, "strong", tmp_path / "merged")
    with pytest.raises(AdapterError, match=r"a folder with adapter_config\.json"):
        save(tmp_path / "merged", adapter, base)
    second = export(bank, "second", tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / MERGED).read_text())["adapter"] == "second"
    assert torch.equal(plain_logits(plain(tmp_path / "merged")), plain_logits(second.model))
    assert {p.name for p in tmp_path.iterdir()} == {kept.name, "thesis", "merged"}


def test_a_failed_save_keeps_the_previous_model(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = loaded(base, strong(base), strong(base, "second", 2))
    first = export(bank, "strong", tmp_path / "merged")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(base.tokenizer), "save_pretrained", full)
    with pytest.raises(AdapterError, match="No space left"):
        export(bank, "second", tmp_path / "merged")
    assert torch.equal(plain_logits(plain(tmp_path / "merged")), plain_logits(first.model))
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]


def test_a_folder_is_refused_before_the_base_is_read_again(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = loaded(base, strong(base))
    (tmp_path / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(
        "lora_domains.adapters.merging.load_base", lambda *_, **__: pytest.fail("read")
    )
    with pytest.raises(AdapterError, match=r"merged\.json"):
        export(bank, "strong", tmp_path)


# ── DomainModel and the command line ────────────────────────────────────────────────────────────


def test_a_domain_model_merges_and_exports(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path)
    model.load_adapter(save(tmp_path / "strong", strong(model.base), model.base))
    bare, served = logits(model.base), logits(model.bank, "strong")
    assert_equal(plain_logits(model.merged("strong")), served, bare)
    assert "of the adapter's effect" in " ".join(capsys.readouterr().out.split())
    model.export("strong", tmp_path / "merged", dtype="bfloat16")
    again = plain(tmp_path / "merged")
    assert again.dtype == torch.bfloat16
    assert (plain_logits(again) - served).norm() < 0.05 * (served - bare).norm()
    assert torch.equal(logits(model.base), bare)


def test_export_writes_what_plain_transformers_loads(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    base = base_on(tiny_base)
    adapter = save(tmp_path / "strong", strong(base), base)
    bank = loaded(base, strong(base))
    out = tmp_path / "out" / "merged"
    command = ["export", str(adapter), "--base", str(tiny_base), "--out", str(out)]
    assert run(*command) == 0
    assert "of the adapter's effect" in " ".join(capsys.readouterr().out.split())
    assert_equal(plain_logits(plain(out)), logits(bank, "strong"), logits(base))
    text = "alpha beta, triage urgent"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(tiny_base)(
        text
    )
    record = json.loads((out / MERGED).read_text())
    assert record["adapter"] == "strong"
    assert record["base"]["identity"] == base.identity
    for path in out.iterdir():
        assert str(tmp_path.parent).encode() not in path.read_bytes(), path.name
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "weights others cannot read"
    # The result is a base like any other, and a mistaken --out deletes no folder.
    assert torch.equal(logits(base_on(out)), plain_logits(plain(out)))
    assert run(*command[:-1], str(adapter)) == 2
    assert "merged.json" in capsys.readouterr().err


def test_export_prints_nothing_when_quiet(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    model = DomainModel(base, display=Display(quiet=True))
    model.bank.add(strong(base))
    model.merged("strong")
    assert capsys.readouterr().out == ""
