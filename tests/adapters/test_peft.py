"""PEFT loads adapters saved here, and its adapters load here, with equal logits."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from support.adapters import FILES, assert_equal, logits, save, strong
from support.peft_folders import peft_logits, peft_saved

from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.errors import AdapterCorrupt, AdapterUnsupported
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.report.card import Card


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base)


# ── PEFT round trip ─────────────────────────────────────────────────────────────────────────────


LLAMA = [
    {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    {"r": 8, "lora_alpha": 64, "target_modules": ["down_proj"]},
    {"r": 16, "lora_alpha": 3, "use_rslora": True, "target_modules": ["k_proj", "up_proj"]},
    {"lora_dropout": 0.3, "target_modules": ["o_proj"]},
    {"target_modules": r".*layers\.1\..*(q|up)_proj"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.0\..*"},
    {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    pytest.param(
        {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
        marks=pytest.mark.skipif(
            Version(peft.__version__) < Version("0.21"), reason="PEFT 0.20 refuses layer 0"
        ),
    ),
    {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.gate_proj": 5},
        "alpha_pattern": {"v_proj": 40, r"^model\.layers\.0\.self_attn\.q_proj": 1},
    },
    {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"q_proj": 9},
        "alpha_pattern": {"v_proj": 7},
        "use_rslora": True,
    },
    {"target_modules": ["q_proj"], "task_type": None},
    {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
]
GPT2 = [
    {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    {"target_modules": "all-linear", "fan_in_fan_out": True, "r": 5, "use_rslora": True},
]


@pytest.mark.parametrize("options", LLAMA, ids=lambda options: " ".join(options))
def test_adapters_of_plain_peft_give_equal_logits_here(
    tiny_base: Path, base: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    _round_trip(tiny_base, base, tmp_path, options)


@pytest.mark.parametrize("options", GPT2, ids=lambda options: " ".join(options))
def test_adapters_of_a_gpt2_give_equal_logits_here(
    gpt2_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _round_trip(gpt2_base, load_base(gpt2_base), tmp_path, options)


def _round_trip(base_folder: Path, base: Base, tmp_path: Path, options: dict[str, Any]) -> None:
    bare = logits(base)
    folder, wanted = peft_saved(base_folder, tmp_path / "theirs", **options)
    adapter = load_adapter(folder, base)
    assert [n for n in adapter.notes if "cannot be verified" in n], "its base is not known"
    bank = Bank(base)
    bank.add(adapter)
    assert_equal(logits(bank, "theirs"), wanted, bare)
    assert torch.equal(logits(base), bare)
    # And back.
    ours = save(tmp_path / "ours", adapter, base)
    assert_equal(peft_logits(base_folder, ours), wanted, bare)
    again = load_adapter(ours, base)
    assert again.notes == ()
    assert again.scales == adapter.scales


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:Setting `save_embedding")
def test_a_saved_output_layer_must_equal_the_bases(
    tiny_base: Path, base: Base, tmp_path: Path
) -> None:
    folder, wanted = peft_saved(tiny_base, tmp_path / "theirs", target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert key in tensors
    bank = Bank(base)
    bank.add(load_adapter(folder, base))
    assert_equal(logits(bank, "theirs"), wanted, logits(base))
    tensors[key][0, 0] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterCorrupt, match=r"unexpected, such as .*lm_head"):
        load_adapter(folder, base)


@pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`")  # the lm_head
@pytest.mark.parametrize(
    "lora",
    [{}, {"rslora": True}, {"dropout": 0.5}, {"targets": ("q_proj",)}, {"targets": ("lm_head",)}],
    ids=str,
)
def test_adapters_saved_here_give_equal_logits_in_plain_peft(
    tiny_base: Path, base: Base, tmp_path: Path, lora: dict[str, Any]
) -> None:
    adapter = strong(base, "ours", rank=6, **lora)
    bank = Bank(base)
    bank.add(adapter)
    folder = save(tmp_path / "ours", adapter, base)
    assert {p.name for p in folder.iterdir()} == FILES
    assert_equal(peft_logits(tiny_base, folder), logits(bank, "ours"), logits(base))


def test_a_new_adapter_depends_on_its_seed_and_has_no_effect(base: Base) -> None:
    one, same, other = (new_adapter(base, "a", Lora(), 4, 8, seed) for seed in (1, 1, 2))
    linear = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one.weights[linear][0], same.weights[linear][0])
    assert not torch.equal(one.weights[linear][0], other.weights[linear][0])
    bank = Bank(base)
    bank.add(one)
    assert torch.equal(logits(bank, "a"), logits(base))


def test_saving_twice_gives_the_same_bytes(base: Base, tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, strong(base), base) for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two) == Card.read(one).adapter.sha256


def test_a_target_that_is_not_a_linear_is_refused(base: Base) -> None:
    with pytest.raises(AdapterUnsupported, match=r"'q_prj'.*Did you mean 'q_proj'"):
        strong(base, targets=("q_prj",))
    with pytest.raises(AdapterUnsupported, match="a layer of kind Embedding"):
        strong(base, targets=("embed_tokens",))
