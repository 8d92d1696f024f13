"""The base check: what cannot be a base is refused by its true reason, before it is used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import make_architecture
from support.device import base_on
from support.encoders import make_tokenizer

from lora_domains.errors import BaseModelError, UsageError
from lora_domains.modeling import base_check
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import check_behaviour
from lora_domains.modeling.heads import check_generates

OTHERS = ("big_bird", "roberta-prelayernorm", "roc_bert", "xmod")
"""Kinds of encoder without a head here, which transformers also lists as causal models."""
ALSO_CAUSAL = (
    "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roformer",
    "xlm-roberta-xl",
)  # fmt: skip
"""Those with a head here."""


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return base_on(tiny_base)


@pytest.mark.parametrize("kind", OTHERS)
def test_an_encoder_is_no_causal_base(tmp_path: Path, kind: str) -> None:
    folder = make_architecture(tmp_path / "base", kind)
    with pytest.raises(BaseModelError, match=f"found an encoder of another kind, {kind}"):
        base_on(folder)
    # Its weights are not needed for that.
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(BaseModelError, match=f"found an encoder of another kind, {kind}"):
        base_on(folder)


@pytest.mark.parametrize("kind", ALSO_CAUSAL)
def test_an_encoder_that_was_saved_as_a_causal_model_is_an_encoder(
    tmp_path: Path, kind: str
) -> None:
    folder = make_architecture(tmp_path / "base", kind)
    with pytest.raises(BaseModelError, match=r"an encoder's tokenizer, with \[CLS\]"):
        base_on(folder)
    make_tokenizer().save_pretrained(folder)
    base = base_on(folder)
    assert base.bidirectional
    with pytest.raises(UsageError, match="to generate text"):
        check_generates(base)


def test_bidirectional_attention_is_refused(tmp_path: Path) -> None:
    folder = make_architecture(tmp_path / "base", "gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(BaseModelError, match="gemma3_text with bidirectional attention"):
        base_on(folder)
    assert base_on(make_architecture(tmp_path / "causal", "gemma3_text"))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    folder = make_architecture(tmp_path / "base", "t5", auto="AutoModelForSeq2SeqLM")
    with pytest.raises(BaseModelError, match="an encoder-decoder of kind t5"):
        base_on(folder)


@pytest.mark.parametrize("kind", ["recurrent_gemma", "rwkv"])
@pytest.mark.parametrize("by", ["name", "trial"])
def test_a_base_that_reads_padding_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, by: str
) -> None:
    if by == "trial":
        monkeypatch.setattr(base_check, "READS_PADDING", ())
    with pytest.raises(BaseModelError, match=f"kind {kind}, whose outputs depend on the padding"):
        base_on(make_architecture(tmp_path / "base", kind))


@pytest.mark.contract
def test_a_causal_model_passes_in_every_precision(tiny_base: Path) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert base_on(tiny_base, dtype=dtype).dtype == getattr(torch, dtype)


@pytest.mark.contract
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_looks_ahead_is_found_out(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = base_on(tiny_base, dtype=dtype)
    forward = base.model.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits + 0.3 * output.logits[:, -1:]
        return output

    monkeypatch.setattr(base.model, "forward", leaking)
    with pytest.raises(BaseModelError, match="last token changes the logits of earlier ones"):
        check_behaviour(base.model, 0, None, "here")


def test_a_model_that_ignores_the_mask_is_found_out(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = base.model.forward

    def unmasked(*args: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return forward(*args, attention_mask=torch.ones_like(attention_mask), **kwargs)

    monkeypatch.setattr(base.model, "forward", unmasked)
    with pytest.raises(BaseModelError, match="depend on the padding of a batch"):
        check_behaviour(base.model, 0, None, "here")


def test_a_model_that_cannot_read_padded_ids_is_named(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: Any, **__: Any) -> Any:
        raise ValueError("images are missing\nsecond line")

    monkeypatch.setattr(base.model, "forward", refusing)
    with pytest.raises(BaseModelError, match=r"kind llama that cannot: images are missing"):
        check_behaviour(base.model, 0, None, "here")


def test_outputs_that_are_not_finite_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e8
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert base_on(folder, dtype="float32")
    with pytest.raises(BaseModelError, match="NaN or infinity in float16"):
        base_on(folder, dtype="float16")


# ── Code beside the weights ─────────────────────────────────────────────────────────────────────


def test_code_beside_the_weights_never_runs(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when somebody, or a pipe, would answer transformers' question with yes."""
    import shutil

    monkeypatch.setattr("builtins.input", lambda _: "y")
    folder = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    trace = tmp_path / "ran"
    (folder / "custom.py").write_text(f"open({str(trace)!r}, 'w')\nclass Custom: ...\n")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    code = {"AutoConfig": "custom.Custom", "AutoModelForCausalLM": "custom.Custom"}
    path.write_text(json.dumps(config | {"auto_map": code}))
    assert base_on(folder).model.config.model_type == "llama"
    path.write_text(json.dumps(config | {"auto_map": code, "model_type": "custom"}))
    with pytest.raises(BaseModelError, match=r"Python code of its own .*never run"):
        base_on(folder)
    path.write_text(json.dumps(config))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["custom.Custom", None]},
                  "tokenizer_class": "Custom"}  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    (folder / "tokenizer.json").rename(folder / "vocab.txt")
    with pytest.raises(BaseModelError, match="tokenizer"):
        base_on(folder)
    assert not trace.exists()
