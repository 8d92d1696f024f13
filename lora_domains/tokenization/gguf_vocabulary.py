"""The tokenizer in a GGUF file: a byte-level BPE that llama.cpp knows."""

import json
from typing import Any

from lora_domains.tokenization.tokenization import Tokenization

NEWLINES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {
    rf"{WORDS}\p{{N}}|{NEWLINES}": "qwen2",
    rf"{WORDS}\p{{N}}{{1,3}}|{NEWLINES}": "llama-bpe",
}
"""How llama.cpp calls the expressions by which tokenizers split a text first."""


def add_tokenizer(writer: Any, tokenizer: Any, tokens: int, context: int) -> bool:
    """Give a file of ``gguf.GGUFWriter`` a tokenizer, of ``tokens`` at least; False, with nothing
    written, for one that has no known form."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stored["model"]
    steps = stored.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    pre = {("ByteLevel",): "gpt-2", ("Digits", "ByteLevel"): "smollm"}.get(tuple(kinds))
    if kinds == ["Split", "ByteLevel"]:
        pre = SPLITS.get(steps[0]["pattern"].get("Regex"))
    spaced = any(step.get("add_prefix_space") for step in steps)
    if model["type"] != "BPE" or pre is None or spaced or model.get("byte_fallback"):
        return False
    count = max(tokens, len(tokenizer))
    names, types = [f"[PAD{n}]" for n in range(count)], [5] * count  # unused
    for token, number in tokenizer.get_vocab().items():
        names[number], types[number] = token, 1
    for added in stored["added_tokens"]:
        types[added["id"]] = 3 if added["special"] else 4  # control, or of a user
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(names)
    writer.add_token_types(types)
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    writer.add_token_merges(list(pairs))
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(tokenizer, f"{kind}_token_id")
        if number is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    writer.add_add_bos_token(bool(Tokenization(tokenizer, context).bos))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return True
