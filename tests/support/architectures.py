"""Tiny random bases of many architectures, and what works on each.

``PYTHONPATH=tests python -m support.architectures`` writes the table of ``docs/bases.md``.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, make_base
from support.adapters import assert_equal, logits, save, strong, token_ids
from support.peft_folders import peft_logits

from lora_domains.adapters.loading import load_adapter
from lora_domains.errors import LoraDomainsError
from lora_domains.inference.generation import generate
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.serving.answers import Sampling
from lora_domains.serving.batch import Batch, Row

CAUSAL = (
    "bamba", "bart", "biogpt", "bloom", "codegen", "cohere", "cohere2", "cpmant", "ctrl",
    "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4", "falcon", "falcon_h1",
    "falcon_mamba", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2",
    "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe",
    "hunyuan_v1_dense", "jamba", "jetmoe", "lfm2", "llama", "llama4_text", "mamba", "mamba2",
    "minimax", "mistral", "mixtral",
    "modernbert-decoder", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe",
    "openai-gpt", "opt", "pegasus", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma",
    "rwkv", "seed_oss", "smollm3", "stablelm", "starcoder2", "t5", "xglm", "xlm", "xlstm",
)  # fmt: skip
"""The kinds of causal model that the table of ``docs/bases.md`` lists, and some that are none."""
TABLE = ROOT / "docs" / "bases.md"
HEADER = "| kind | |\n|---|---|\n"
SIZES = {
    "vocab_size": 400, "hidden_size": 32, "n_embd": 32, "d_model": 32, "dim": 32, "emb_dim": 32,
    "embedding_size": 32, "word_embed_proj_dim": 32, "attention_hidden_size": 32,
    "intermediate_size": 64, "ffn_dim": 64, "decoder_ffn_dim": 64, "n_inner": 64, "d_ff": 64,
    "ffn_hidden_size": 64, "hidden_dim": 64, "dff": 64, "d_inner": 64, "pooler_hidden_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "d_head": 8,
    "rotary_dim": 4, "max_position_embeddings": 128, "n_positions": 128, "n_ctx": 128,
    "context_length": 128, "max_seq_len": 128, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""Sizes by the names that configs use; those that a config does not have are left out."""
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
TEXT_PART = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE_PART = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 16,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "gemma3": {"text_config": TEXT_PART, "vision_config": IMAGE_PART, "mm_tokens_per_image": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
}
"""Settings of one kind that must fit each other."""
LEFT_OUT: dict[str, tuple[str, ...]] = {"falcon": ("head_dim",)}
"""Sizes that a config has and does not take."""


def tiny_config(kind: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING

    known = CONFIG_MAPPING[kind]
    default = known()
    sizes = {
        key: value
        for key, value in SIZES.items()
        if hasattr(default, key) and key not in LEFT_OUT.get(kind, ())
    }
    return known(**sizes | OWN.get(kind, {}) | changes)


def make_architecture(
    folder: Path, kind: str, *, auto: str = "AutoModelForCausalLM", **changes: Any
) -> Path:
    """Save a random model of ``kind`` with a byte-level tokenizer, or an encoder's."""
    import transformers
    from support.encoders import make_tokenizer

    config = tiny_config(kind, **changes)
    if auto == "AutoModelForMaskedLM":
        folder.mkdir(parents=True)
        make_tokenizer().save_pretrained(folder)
    else:
        make_base(folder)
        for path in (*folder.glob("*.safetensors"), *folder.glob("*config.json")):
            if path.name != "tokenizer_config.json":
                path.unlink()
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        # As drawn (deviation .02) a tiny model hardly depends on its input.
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "position" not in name:
                parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    return folder


def written(result: str, kind: str) -> str:
    """A row of the table."""
    for known in (f" of kind {kind}", f", {kind}", "a model, whose ", "a model whose "):
        result = result.replace(known, "")
    return f"| {kind} | {result} |"


def tried_kind(kind: str) -> str:
    """The result of ``tried`` for a random base of ``kind``."""
    auto = "AutoModelForSeq2SeqLM" if kind in ("pegasus", "t5") else "AutoModelForCausalLM"
    with tempfile.TemporaryDirectory() as folder:
        return tried(make_architecture(Path(folder) / "base", kind, auto=auto), Path(folder))


Exact = Callable[[Bank, str, Path], Any]
"""The base of a bank in a folder, in float64, with the adapter of that name in its weights."""


def tried(folder: Path, out: Path, deviation: float = 0.5, exact: Exact | None = None) -> str:
    """ "works", or why a causal base in ``folder`` is refused; any other failure is raised.

    ``deviation`` is that of ``strong``. ``exact`` gives the model in float64, where rounding is
    amplified: ours may then be as far from it as PEFT's.
    """
    try:
        base = load_base(folder, device="cpu")
        adapter = strong(base, "strong", deviation=deviation)
    except LoraDomainsError as error:
        return f"refused: {error.found}"
    _check_peft(folder, save(out / "strong", adapter, base), base, exact)
    bank = Bank(base)
    for seed, name in enumerate(("a", "b")):
        bank.add(strong(base, name, seed, deviation=deviation))
    _check_rows(bank)
    _check_decoding(bank)
    _check_joining(bank)
    _check_gradients(base)
    return "works; its experts are left out" if base.notes else "works"


def _check_peft(folder: Path, saved: Path, base: Base, exact: Exact | None) -> None:
    """Plain PEFT computes the same with an adapter saved here."""
    bare = logits(base)
    bank = Bank(base)
    bank.add(load_adapter(saved, base))
    found, wanted = logits(bank, "strong"), peft_logits(folder, saved)
    if exact is None:
        assert_equal(found, wanted, bare)
    else:
        with torch.no_grad():
            truth = exact(bank, "strong", folder)(input_ids=token_ids()).logits
        error = (wanted - truth).norm()
        assert (found - truth).norm() <= 1.5 * error
        assert (found - bare).norm() >= 100 * error
    bank.remove("strong")


def _check_rows(bank: Bank) -> None:
    """A mixed batch equals its rows one by one."""
    names = ["a", None, "b", "a"]
    for length in (5, 17):  # a batched product, and one for each adapter
        ids = torch.randint(3, 300, (4, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            with bank.routed(names):
                together = bank.base.model(input_ids=ids).logits
            for row, name in enumerate(names):
                with bank.routed(name):
                    alone = bank.base.model(input_ids=ids[row : row + 1]).logits[0]
                # Rounding grows with the logits, which a large base may have far above 1.
                allowed = 1e-5 * max(1.0, float(alone.abs().max()))
                torch.testing.assert_close(together[row], alone, atol=allowed, rtol=0)


def _check_decoding(bank: Bank) -> None:
    """Answers to prompts of different lengths are those without a cache and without padding."""
    model, tokenizer = bank.base.model, bank.base.tokenizer
    prompts = [list(range(40, 47)), list(range(90, 94))]
    with bank.routed("a"):
        answers = generate(model, tokenizer, prompts, max_new_tokens=4)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = list(prompt)
            with torch.no_grad():
                while len(ids) < len(prompt) + 4 and ids[-1] != tokenizer.eos_token_id:
                    scores = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                    ids.append(int(scores.argmax()))
            assert tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True) == answer


def _check_joining(bank: Bank) -> None:
    """Answers of rows that join a running batch, and leave it, are those that each has alone."""
    batch = Batch(bank.base)
    asked = [("a", 4), (None, 9), ("b", 12), ("a", 3), ("b", 7)]
    rows, alone = [], []
    for name, length in asked:
        route = bank.route(name)
        prompt = list(range(40, 40 + length))
        answer = batch.answer(Sampling(6 + length % 3))
        rows.append(Row(prompt, None if route is None else route.rows[0], answer))
        with bank.routed(name):
            alone += generate(bank.base.model, bank.base.tokenizer, [prompt],
                              max_new_tokens=answer.sampling.max_tokens)  # fmt: skip
    for start in range(0, len(rows), 2):
        batch.join(rows[start : start + 2])
        batch.step()
    while batch.rows:
        batch.step()
    assert [row.answer.text for row in rows] == alone


def _check_gradients(base: Base) -> None:
    """Every weight of an adapter in training has a gradient, and the base is left as it is."""
    digest, bank = base.state_digest(), Bank(base)
    parameters = bank.add(strong(base, "trained"), trainable=True)
    ids = torch.arange(3, 27).reshape(2, 12)
    with bank.routed("trained"):
        base.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    largest = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    assert 0 < largest < float("inf")
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    assert base.state_digest() == digest
    bank.remove("trained")


def main() -> None:
    rows = "\n".join(written(tried_kind(kind), kind) for kind in CAUSAL)
    text = TABLE.read_text(encoding="utf-8")
    before, after = text.split(HEADER, 1)
    rest = after.split("\n\n", 1)[1]
    TABLE.write_text(f"{before}{HEADER}{rows}\n\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
