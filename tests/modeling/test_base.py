"""The base: frozen, identified, and never changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base
from support.adapters import assert_equal, logits, save, strong, token_ids
from support.architectures import make_architecture
from support.device import base_on

from lora_domains.adapters.loading import load_adapter
from lora_domains.console import Display
from lora_domains.errors import AdapterCorrupt, BaseModelError
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import experts_of
from lora_domains.modeling.checkpoint import licence_of


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return base_on(tiny_base)


@pytest.fixture
def copy(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in a folder that a test may damage."""
    return Path(shutil.copytree(tiny_base, tmp_path / "copy"))


# ── It never changes ────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_a_bank_never_changes_the_base(base: Base, tmp_path: Path) -> None:
    digest, bare = base.state_digest(), logits(base)
    bank = Bank(base)
    for name, seed in (("a", 1), ("b", 2), ("a", 3)):
        bank.add(strong(base, name, seed))
    assert base.state_digest() == digest, "routed linears count"
    for name in ("a", None, "b"):
        logits(bank, name)
    with pytest.raises(ZeroDivisionError), bank.routed("a"):
        raise ZeroDivisionError
    folder = save(tmp_path / "c", strong(base, "c"), base)
    bank.add(load_adapter(folder, base))
    (folder / "adapter_model.safetensors").write_bytes(b"no adapter")
    with pytest.raises(AdapterCorrupt):
        load_adapter(folder, base)
    assert base.state_digest() == digest
    assert torch.equal(logits(base), bare)
    for name in tuple(bank):
        bank.remove(name)
    assert base.state_digest() == digest
    assert torch.equal(logits(base), bare)


@pytest.mark.contract
def test_training_an_adapter_changes_only_the_adapter(base: Base) -> None:
    digest, bare = base.state_digest(), logits(base)
    bank = Bank(base)
    parameters = bank.add(strong(base, "a"), trainable=True)
    before = logits(bank, "a")
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    with bank.routed("a"):
        base.model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    assert base.state_digest() == digest
    assert torch.equal(logits(base), bare)
    assert not torch.equal(logits(bank, "a"), before)


def test_the_digest_changes_with_one_bit(base: Base) -> None:
    digest = base.state_digest()
    Bank(base).add(strong(base, "a"))
    assert base.state_digest() == digest
    for tensor in (*base.model.parameters(), *base.model.buffers()):
        bits = tensor.data.view(torch.int32).reshape(-1)
        bits[-1] ^= 1
        assert base.state_digest() != digest
        bits[-1] ^= 1
    assert base.state_digest() == digest


def test_a_loaded_base_is_frozen_and_in_evaluation_mode(base: Base) -> None:
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


def test_loading_leaves_the_random_state(tiny_base: Path, tmp_path: Path) -> None:
    base = base_on(tiny_base)
    folder = save(tmp_path / "a", strong(base), base)
    state = torch.get_rng_state()
    Bank(base).add(load_adapter(folder, base))
    save(tmp_path / "b", strong(base), base)
    assert torch.equal(torch.get_rng_state(), state)


# ── Identity ────────────────────────────────────────────────────────────────────────────────────


def test_identity_does_not_depend_on_precision(tiny_base: Path, base: Base) -> None:
    half = base_on(tiny_base, dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    assert half.identity == base.identity
    assert half.state_digest() != base.state_digest()
    assert torch.isfinite(half.model(input_ids=token_ids()).logits).all()


def test_identity_does_not_depend_on_sharding_or_place(base: Base, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    base.model.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    sharded = base_on(copy)
    assert sharded.identity == base.identity
    assert torch.equal(logits(sharded), logits(base))


def test_identity_and_size_count_only_the_files_that_are_loaded(base: Base, copy: Path) -> None:
    sizes: list[int] = []
    for name in ("consolidated.safetensors", "model-00001-of-00002.safetensors"):
        shutil.copy(copy / "model.safetensors", copy / name)
    again = base_on(copy, announce=lambda size, _: sizes.append(size))
    assert again.identity == base.identity
    assert sizes == [pytest.approx(base.resident_bytes(), rel=0.03)]
    (copy / "model.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"model\*\.safetensors or .* found files config"):
        base_on(copy)


def test_a_missing_shard_is_named(base: Base, copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    base.model.save_pretrained(copy, max_shard_size="20KB")
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(BaseModelError, match=f"found no {shard.name}"):
        base_on(copy)
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(BaseModelError, match="an index that names the weight files"):
        base_on(copy)


def test_identity_does_not_depend_on_padding_calls(base: Base, copy: Path) -> None:
    base.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    base.tokenizer.save_pretrained(copy)
    assert base_on(copy).identity == base.identity


def test_identity_changes_with_one_weight(base: Base, copy: Path) -> None:
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert base_on(copy).identity != base.identity


def test_identity_changes_with_the_tokenizer(base: Base, copy: Path) -> None:
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    assert base_on(copy).identity != base.identity


def test_identity_changes_with_the_end_of_text_token(base: Base, copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"eos_token": "<pad>"}))
    assert base_on(copy).identity != base.identity


def test_the_record_holds_no_local_path(base: Base, tiny_base: Path) -> None:
    assert base.record() == {
        "id": tiny_base.name, "revision": None, "identity": base.identity, "dtype": "float32",
        "quantization": None, "licence": None,
    }  # fmt: skip


def test_the_licence_is_read_from_the_readme(copy: Path) -> None:
    (copy / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    assert base_on(copy).licence == "apache-2.0"


@pytest.mark.parametrize(
    ("front", "config", "licence"),
    [
        ("tags:\n" + "- a\n" * 60 + "license: mit", None, "mit"),
        ("license: 'cc-by-4.0'  # as its data", None, "cc-by-4.0"),
        ("license: other\nlicense_name: qwen-research", None, "qwen-research"),
        ("language: en", "gpl", "gpl"),
        ("license: [", "gpl", "gpl"),
        ("language: en", None, None),
    ],
)
def test_the_licence_of_a_base_is_what_its_files_say(
    tmp_path: Path, front: str, config: str | None, licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\nlicense: of the text below\n")
    (tmp_path / "config.json").write_text(json.dumps({"license": config} if config else {}))
    assert licence_of(tmp_path) == licence
    assert licence_of(tmp_path / "nowhere") is None


# ── Refused bases ───────────────────────────────────────────────────────────────────────────────


def _without(*patterns: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return damage


def _no_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)


def _half_the_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(dict(sorted(tensors.items())[::2]), path, {"format": "pt"})


def _cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _is_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def _no_causal_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    ("damage", "found", "hint"),
    [
        (_without("tokenizer*"), "none that transformers can load", "tokenizer.save_pretrained"),
        (_without("*.safetensors"), "files config.json", "model.save_pretrained"),
        (_without("config.json"), "files .*model.safetensors", "model.save_pretrained"),
        (_without("*"), "none at all", "model.save_pretrained"),
        (_no_eos, "none", "Set tokenizer.eos_token"),
        (_half_the_weights, "none for .* more", "Save the whole model"),
        (_cut_off, ".", "Check the folder"),
        (_no_causal_model, "kind vit, which is neither", "Choose another base"),
        (_is_an_adapter, "an adapter", "load the adapter with load_adapter"),
    ],
)
def test_a_folder_that_is_no_base_is_refused(
    copy: Path, damage: Callable[[Path], None], found: str, hint: str
) -> None:
    damage(copy)
    with pytest.raises(BaseModelError, match=f"(?s)found .*{found}.*{hint}") as caught:
        base_on(copy)
    assert str(copy) in caught.value.where


BROKEN = {
    "generation_config.json": ("[]", "null", '"x"', "{", "\xff"),
    "tokenizer_config.json": ("[]", "{"),
    "special_tokens_map.json": ("[]",),
    "config.json": ("[]", "{"),
}


@pytest.mark.parametrize(("name", "text"), [(n, text) for n in BROKEN for text in BROKEN[n]])
def test_a_side_file_that_is_no_object_is_named(copy: Path, name: str, text: str) -> None:
    # transformers ignores some of them, and with them the tokens that end an answer.
    (copy / name).write_text(text, encoding="latin-1")
    with pytest.raises(BaseModelError, match=rf"{name}: expected a JSON object; found \w+"):
        base_on(copy)


@pytest.mark.parametrize(
    ("name", "setting", "found"),
    [
        ("config.json", {"dtype": "float17"}, "float17"),
        ("config.json", {"pad_token_id": 10**6}, "Padding_idx"),
        ("config.json", {"vocab_size": 0}, "index 0"),
        ("config.json", {"quantization_config": "x"}, "'str' object"),
        ("config.json", {"eos_token_id": "</s>"}, "'eos_token_id': TypeError: .*int"),
        ("tokenizer_config.json", {"chat_template": 5}, "one of type int"),
        ("tokenizer_config.json", {"padding_side": "middle"}, "none that transformers can load"),
    ],
)
def test_a_setting_that_transformers_cannot_read_is_refused(
    copy: Path, name: str, setting: dict[str, Any], found: str
) -> None:
    path = copy / name
    path.write_text(json.dumps(json.loads(path.read_text()) | setting))
    with pytest.raises(BaseModelError, match=f"found .*{found}"):
        base_on(copy)


def test_pickled_weights_are_refused_in_one_sentence(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"pytorch_model\.bin, a pickle, .* save it again"):
        base_on(copy)


def test_a_folder_has_no_revision(copy: Path) -> None:
    with pytest.raises(BaseModelError, match="revision='main' for a folder, which has none"):
        base_on(copy, revision="main")
    with pytest.raises(BaseModelError, match="revision='main'"):
        base_on(revision="main")


@pytest.mark.parametrize(
    ("given", "meant"), [("int8", "8bit"), ("nf4", "4bit"), ("4-bit", "4bit"), ("8bits", "8bit")]
)
def test_another_word_for_a_quantisation_is_refused(copy: Path, given: Any, meant: str) -> None:
    with pytest.raises(BaseModelError, match=f"found '{given}'.*Did you mean '{meant}'"):
        base_on(copy, quantization=given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("{tmp}/nowhere", "no such folder"),
        ("{tmp}/file", "a file"),
        ("./nowhere", "no such folder"),
        ("nobody/has-this-base", "the Hub gave no answer"),
        ("not a name", "'not a name'"),
    ],
)
def test_a_missing_base_is_refused(tmp_path: Path, given: str, found: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BaseModelError, match=found) as caught:
        base_on(given.format(tmp=tmp_path))
    assert "--base" in caught.value.hint


def test_an_unknown_precision_is_refused(tiny_base: Path) -> None:
    with pytest.raises(BaseModelError, match=r"'bfloat61'.*Did you mean 'bfloat16'"):
        base_on(tiny_base, dtype="bfloat61")


def test_a_tokenizer_without_padding_token_pads_with_eos(base: Base, copy: Path) -> None:
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("pad_token")
    path.write_text(json.dumps(settings))
    unpadded = base_on(copy)
    assert unpadded.tokenizer.pad_token_id == unpadded.tokenizer.eos_token_id == 2
    assert len(unpadded.tokenizer) == len(base.tokenizer)
    assert unpadded.identity == base.identity


def test_experts_are_found_by_their_class(tmp_path: Path) -> None:
    base = base_on(make_architecture(tmp_path / "base", "jetmoe"))
    assert "model.layers.1.mlp.input_linear.weight" in experts_of(base.model)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_left_out_and_named(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_architecture(tmp_path / "base", kind)
    model = DomainModel.from_pretrained(folder, device="cpu", display=Display())
    assert "mlp.experts.gate_up_proj and" in "".join(capsys.readouterr())
    linears = strong(model.base).weights
    assert "model.layers.1.self_attn.v_proj" in linears
    assert not [name for name in linears if "expert" in name]


# ── 8-bit and 4-bit ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wider_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that is wide enough for the block sizes of bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    folder = tmp_path_factory.mktemp("bases") / "wider"
    return make_base(folder, hidden_size=64, intermediate_size=128)


@pytest.mark.contract
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_a_quantised_base_serves_adapters_unchanged(
    wider_base: Path, tmp_path: Path, quantization: Any
) -> None:
    full = base_on(wider_base)
    small = base_on(wider_base, quantization=quantization)
    digest, bare = small.state_digest(), logits(small)
    assert small.identity == full.identity
    assert not torch.equal(bare, logits(full))
    adapter = strong(small, "a")
    bank = Bank(small)
    parameters = bank.add(adapter, trainable=True)
    moved = logits(bank, "a")
    assert (moved - bare).abs().max() > 1e-2
    with bank.routed("a"):
        small.model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in parameters)
    assert max(float(p.grad.abs().max()) for p in parameters) > 0
    assert small.state_digest() == digest
    assert torch.equal(logits(small), bare)

    # An adapter saved here loads in full precision too, with a note on its verdict.
    folder = save(tmp_path / "a", adapter, small)
    loaded = load_adapter(folder, full)
    assert any("not measured at this precision" in note for note in loaded.notes)
    assert load_adapter(folder, small).notes == ()
    bank = Bank(full)
    bank.add(loaded)
    bank.add(strong(full, "same"))
    assert_equal(logits(bank, "a"), logits(bank, "same"), logits(full))


@pytest.mark.contract
@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_the_digest_of_a_quantised_base_covers_its_scales(
    wider_base: Path, quantization: Any
) -> None:
    small = base_on(wider_base, quantization=quantization)
    digest = small.state_digest()
    linear = small.model.get_submodule("model.layers.0.self_attn.q_proj")
    if quantization == "8bit":
        scales = [linear.state.SCB]  # moved there by the first forward
    else:
        state = linear.weight.quant_state
        scales = [state.absmax, state.state2.absmax, state.offset]
    for scale in scales:
        kept = scale.clone()
        scale.copy_(scale + 1)
        assert small.state_digest() != digest
        scale.copy_(kept)
    assert small.state_digest() == digest
    logits(small)
    assert small.state_digest() == digest
