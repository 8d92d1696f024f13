"""GGUF files: a base in one file, which is de-quantised."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.adapters import assert_equal, logits, save, strong, token_ids

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.merging import export
from lora_domains.errors import BaseModelError, UsageError
from lora_domains.modeling import quantization
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base

gguf = pytest.importorskip("gguf")

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
}  # fmt: skip
"""Parts of the names of a Llama's tensors, as they are called in GGUF."""


def write_gguf(folder: Path, path: Path) -> Path:
    """The random Llama in ``folder`` as llama.cpp writes it, in float32."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"<unused{n}>" for n in range(config["vocab_size"] - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in load_file(folder / "model.safetensors").items():
        kind = name.split(".")[-2]
        if kind in heads:  # llama.cpp pairs the rotated columns side by side
            halves = tensor.reshape(heads[kind], 2, -1, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
        for part, called in NAMES.items():
            name = name.replace(part, called)
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tiny_base, tmp_path_factory.mktemp("gguf") / "tiny" / "model.gguf")


def test_a_gguf_file_is_the_base_that_it_holds(
    file: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, plain = load_base(file.parent, device="cpu"), load_base(tiny_base, device="cpu")
    assert "GGUF tensors" not in capsys.readouterr().err  # a bar of transformers
    torch.testing.assert_close(logits(base), logits(plain), atol=1e-5, rtol=0)
    assert base.quantization is None
    assert base.identity != plain.identity, "the tensors are stored otherwise"
    by_path = load_base(file, device="cpu")
    assert (by_path.id, by_path.identity) == ("model.gguf", base.identity)
    sizes: list[int] = []
    load_base(file, device="cpu", announce=lambda size, _: sizes.append(size))
    assert sizes == [pytest.approx(base.resident_bytes(), rel=0.03)]
    stored = base.checkpoint.tensor("token_embd.weight")
    assert torch.equal(stored, plain.model.get_input_embeddings().weight)


def test_adapters_on_a_gguf_file(file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = load_base(file, device="cpu")
    saved = save(tmp_path / "a", strong(base, "a"), base)
    bank = Bank(base)
    bank.add(load_adapter(saved, load_base(file, device="cpu")))
    export(bank, "a", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        assert_equal(merged(input_ids=token_ids()).logits, logits(bank, "a"), logits(base))


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        ("two files", "several GGUF files: model.gguf, other.gguf"),
        ("kind", r"GGUF of kind llama; .* only phi3"),
        ("quantised", "not quantised again"),
    ],
)
def test_what_cannot_be_used_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str, found: str
) -> None:
    folder = Path(shutil.copytree(file.parent, tmp_path / "base"))
    options: dict[str, Any] = {}
    if spoil == "two files":
        shutil.copy(folder / "model.gguf", folder / "other.gguf")
    elif spoil == "kind":
        monkeypatch.setattr(quantization.Gguf, "kinds", ("phi3",))
    else:
        pytest.importorskip("bitsandbytes")
        options["quantization"] = "8bit"
    with pytest.raises(BaseModelError, match=found):
        load_base(folder, device="cpu", **options)


def test_the_package_that_reads_gguf_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"gguf not installed.*lora-domains\[gguf\]"):
        load_base(file)
