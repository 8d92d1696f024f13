"""PEFT loads adapters saved here, and its adapters load here, with equal logits."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from support.adapters import FILES, assert_equal, logits, save, strong, token_ids
from support.damaged import edit
from support.device import base_on
from support.peft_folders import peft_logits, peft_saved, plain

from lora_domains.adapters import peft as skeletons
from lora_domains.adapters.folder import fingerprint
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.errors import AdapterCorrupt, AdapterUnsupported, BaseModelError, DomainError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import layers_of
from lora_domains.report.card import Card


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_on(tiny_base)


def test_a_skeleton_is_built_once_for_equal_adapters(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skeletons, "_kept", {})
    first = new_adapter(base, "a", Lora(), 8, 16, 0)
    options = first.config.to_dict()
    save(tmp_path / "a", first, base)
    again = deepcopy(first.config)
    with skeletons.skeleton(base, again):
        assert again.to_dict() == options
    first.config.target_modules, first.config.r = {"q_proj"}, 3  # of this adapter alone
    with monkeypatch.context() as patch:
        patch.setattr(peft, "get_peft_model", lambda *_, **__: 1 / 0)
        second = new_adapter(base, "b", Lora(), 8, 16, 0)
        with pytest.raises(ZeroDivisionError):
            new_adapter(base, "b", Lora(), 4, 16, 0)
    assert second.config.to_dict() == options
    assert first.weights.keys() == second.weights.keys()
    for name, pair in first.weights.items():
        assert all(map(torch.equal, pair, second.weights[name]))
        assert pair[0].data_ptr() != second.weights[name][0].data_ptr()


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
    {"target_modules": "all-linear", "use_dora": True, "lora_dropout": 0.3},
    {
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"q_proj": 9},
        "use_rslora": True,
        "use_dora": True,
    },
]
GPT2 = [
    {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    {"target_modules": "all-linear", "fan_in_fan_out": True, "r": 5, "use_rslora": True},
    {"target_modules": "all-linear", "fan_in_fan_out": True, "use_dora": True},  # biases
]


@pytest.mark.contract
@pytest.mark.parametrize("options", LLAMA, ids=lambda options: " ".join(options))
def test_adapters_of_plain_peft_give_equal_logits_here(
    tiny_base: Path, base: Base, tmp_path: Path, options: dict[str, Any]
) -> None:
    _round_trip(tiny_base, base, tmp_path, options)


@pytest.mark.parametrize("options", GPT2, ids=lambda options: " ".join(options))
def test_adapters_of_a_gpt2_give_equal_logits_here(
    gpt2_base: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    _round_trip(gpt2_base, base_on(gpt2_base), tmp_path, options)


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


@pytest.mark.contract
@pytest.mark.filterwarnings("ignore:Model .* `tie_word_embeddings=True`")  # the lm_head
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"rslora": True},
        {"dropout": 0.5},
        {"targets": ("q_proj",)},
        {"targets": ("lm_head",)},
        {"dora": True},
        {"dora": True, "rslora": True, "targets": ("lm_head", "o_proj")},
        {"top_layers": 1},
        {"top_layers": 2, "targets": ("v_proj", "up_proj")},
    ],
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


@pytest.mark.contract
@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True}], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_and_gradients_in_training_are_those_of_peft(
    tmp_path: Path, tiny_base: Path, gpt2_base: Path, kind: str, dropout: float,
    options: dict[str, Any],
) -> None:  # fmt: skip
    folder = tiny_base if kind == "llama" else gpt2_base
    base = base_on(folder)
    adapter = strong(base, "ours", dropout=dropout, **options)
    oracle = peft.PeftModel.from_pretrained(
        plain(folder), save(tmp_path / "ours", adapter, base), is_trainable=True
    ).eval()
    for module in oracle.modules():
        if isinstance(module, LoraLayer):
            module.train()
    bank = Bank(base)
    parameters = bank.add(adapter, trainable=True)
    bare = logits(base)
    weighed = torch.randn_like(bare)
    torch.manual_seed(3)
    theirs = oracle(input_ids=token_ids()).logits
    torch.manual_seed(3)
    with bank.routed("ours"):
        ours = base.model(input_ids=token_ids()).logits
    assert_equal(ours.detach(), theirs.detach(), bare)
    # In float64: float32 rounds a gradient whose terms cancel by as much as the tolerance.
    oracle.double()
    base.model.double()
    for parameter in parameters:
        parameter.data = parameter.data.double()
    torch.manual_seed(3)
    (oracle(input_ids=token_ids()).logits * weighed).sum().backward()
    torch.manual_seed(3)
    with bank.routed("ours"):
        (base.model(input_ids=token_ids()).logits * weighed).sum().backward()
    grads = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    named = {
        f"base_model.model.{linear}.{name}": part.grad
        for linear, lora in bank.trainable("ours").items()
        for name, part in (
            ("lora_A.default.weight", lora.a), ("lora_B.default.weight", lora.b),
            ("lora_magnitude_vector.default.weight", lora.magnitude),
        )
        if part is not None
    }  # fmt: skip
    assert named.keys() == grads.keys()
    assert len(parameters) == len(named)
    for name, wanted in grads.items():
        given = named[name]
        assert wanted is not None
        assert given is not None
        error = float((given - wanted).norm() / wanted.norm())
        assert error < 1e-5, name


@pytest.mark.parametrize("kind", ["missing", "unexpected"])
def test_magnitudes_and_the_config_must_agree(
    tiny_base: Path, base: Base, tmp_path: Path, kind: str
) -> None:
    options = {"target_modules": ["q_proj"], "use_dora": kind == "unexpected"}
    folder, _ = peft_saved(tiny_base, tmp_path / "theirs", **options)
    edit(folder, use_dora=kind == "missing")
    with pytest.raises(AdapterCorrupt, match=f"{kind}, such as .*lora_magnitude_vector"):
        load_adapter(folder, base)


def test_a_new_adapter_with_dora_has_no_effect(base: Base) -> None:
    bank = Bank(base)
    bank.add(new_adapter(base, "a", Lora(dora=True), 4, 8, 1))
    torch.testing.assert_close(logits(bank, "a"), logits(base), atol=1e-5, rtol=0)


def test_a_new_adapter_depends_on_its_seed_and_has_no_effect(base: Base) -> None:
    one, same, other = (new_adapter(base, "a", Lora(), 4, 8, seed) for seed in (1, 1, 2))
    linear = "model.layers.0.self_attn.q_proj"
    assert torch.equal(one.weights[linear][0], same.weights[linear][0])
    assert not torch.equal(one.weights[linear][0], other.weights[linear][0])
    bank = Bank(base)
    bank.add(one)
    assert torch.equal(logits(bank, "a"), logits(base))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert", "modernbert"])
def test_the_top_layers_alone_are_adapted(
    bases: Callable[[str], Path], gpt2_base: Path, kind: str
) -> None:
    base = base_on(gpt2_base if kind == "gpt2" else bases(kind))
    classes = 2 if base.bidirectional else None
    every, top = (new_adapter(base, "a", Lora(top_layers=count), 4, 8, 1, classes)
                  for count in (None, 1))  # fmt: skip
    _, layers = layers_of(base.model)
    inside = {id(module) for module in layers[-1].modules()}
    wanted = {name for name in every.weights if id(base.model.get_submodule(name)) in inside}
    assert set(top.weights) == wanted < set(every.weights)
    assert top.config.layers_to_transform == [len(layers) - 1]


def test_layers_that_a_base_does_not_have_are_refused(
    base: Base, bases: Callable[[str], Path]
) -> None:
    with pytest.raises(DomainError, match=r"at most 2, the layers of tiny"):
        strong(base, top_layers=3)
    with pytest.raises(DomainError, match="a regular expression can name the layers itself"):
        strong(base, top_layers=1, targets=".*q_proj")
    albert = base_on(bases("albert"))
    with pytest.raises(BaseModelError, match="a list of 2 layers"):
        new_adapter(albert, "a", Lora(top_layers=1), 4, 8, 1, 2)


def test_saving_twice_gives_the_same_bytes(base: Base, tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, strong(base), base) for name in ("one", "two"))
    assert fingerprint(one) == fingerprint(two) == Card.read(one).adapter.sha256


def test_a_target_that_is_not_a_linear_is_refused(base: Base) -> None:
    with pytest.raises(AdapterUnsupported, match=r"'q_prj'.*Did you mean 'q_proj'"):
        strong(base, targets=("q_prj",))
    with pytest.raises(AdapterUnsupported, match="a layer of kind Embedding"):
        strong(base, targets=("embed_tokens",))


@pytest.mark.parametrize("targets", ["(q_proj", "[", "nothing"])
def test_targets_that_match_nothing_or_are_no_pattern_are_refused(base: Base, targets: str) -> None:
    with pytest.raises(AdapterUnsupported, match="target modules that are linears"):
        new_adapter(base, "a", Lora(targets=targets), 4, 8, 0)
