"""Generated text: greedy unless told otherwise, in batches of similar length."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from lora_domains.data.tokenization import EncodedExample
from lora_domains.inference.batches import Progress, in_batches, no_progress
from lora_domains.modeling.batching import padded


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt (token ids), greedy unless ``options`` say otherwise.

    ``options`` are those of transformers' ``generate``.
    """
    pad = tokenizer.pad_token_id
    ids, mask, _ = padded(prompts, pad, left=True)
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    # Sampling defaults that a base ships (Llama's temperature .6) warn under greedy decoding.
    for name in ("temperature", "top_p", "top_k", "max_length"):
        setattr(config, name, None)
    # Options that are no setting of the config (a streamer, stopping criteria) go to the call.
    others = config.update(**options)
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        **others,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def generate_in_batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    max_new_tokens: int,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers to ``examples``, without surrounding whitespace."""

    def answer(batch: list[EncodedExample]) -> list[str]:
        prompts = [example.prompt for example in batch]
        texts = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens)
        return [text.strip() for text in texts]

    return in_batches(model, examples, answer, progress, weight=len)
