"""Generated text: greedy unless told otherwise, in batches of similar length.

A base's ``generation_config.json`` decides nothing here (see ``modeling.base_check``): a repetition
penalty or a temperature in it would change answers without being asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lora_domains.errors import UsageError, listed
from lora_domains.inference.batches import (
    Budget,
    Progress,
    Size,
    generated_size,
    in_batches,
    no_progress,
)
from lora_domains.inference.choice_tree import Beginning, begun
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import context_of
from lora_domains.modeling.batching import padded
from lora_domains.modeling.routing import narrowed
from lora_domains.tasks import Task
from lora_domains.tasks.answers import BEGIN
from lora_domains.tokenization.encoded import EncodedExample

NEW_TOKENS = 64
"""Tokens of an answer, at most, unless options say otherwise."""
OPENED = 8
"""Tokens at the end of a prompt that may spell ``<think>``."""
TEXTS_ONLY = (
    "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states",
)  # fmt: skip
"""Options of transformers that ask for more than the text."""


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int | None = None,
    **options: Any,
) -> list[str]:
    """The continuation of each prompt (token ids), greedy unless ``options`` say otherwise.

    ``options`` are those of transformers' ``generate``. Raises UsageError for options that cannot
    be used here, and when a prompt and its answer exceed the model's context.
    """
    if not prompts:
        return []
    options = checked_options({"max_new_tokens": max_new_tokens, **options})
    _check_context(model, prompts, options["max_new_tokens"])
    sizes = [generated_size(prompt, options["max_new_tokens"]) for prompt in prompts]
    copies = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    parts = list(Budget(model).parts(sizes, copies))
    if len(parts) == 1:
        return _generate(model, tokenizer, prompts, options)
    texts: list[str] = []
    for part in parts:
        with narrowed(model, part):
            texts += _generate(model, tokenizer, [prompts[at] for at in part], options)
    return texts


def _generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], options: Mapping[str, Any],
    after: tuple[Beginning, Sequence[EncodedExample]] | None = None,
) -> list[str]:  # fmt: skip
    """The continuation of each prompt, all in one batch.

    ``after`` the beginning of all prompts, ``prompts`` are the rest of these examples.
    """
    from transformers import GenerationConfig

    pad = tokenizer.pad_token_id
    ids, mask, _ = padded(prompts, pad, left=True)
    config = GenerationConfig()
    # Options that are no setting of the config (a streamer, stopping criteria) go to the call.
    others = config.update(**{"do_sample": False, "pad_token_id": pad, **options})
    if after is not None:
        beginning, examples = after
        ids, mask = beginning.before(ids, mask)
        others["past_key_values"] = beginning.filled_cache(examples)
    if config.stop_strings:
        others["tokenizer"] = tokenizer
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        **others,
    )
    texts: list[str] = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


@torch.no_grad()
def generate_in_batches(
    model: Any,
    tokenizer: Any,
    examples: Sequence[EncodedExample],
    max_new_tokens: int,
    progress: Progress = no_progress,
) -> list[str]:
    """Greedy answers to ``examples``, without surrounding whitespace; with ``<think>`` before them
    where it ends the prompt, so that one that ends within its reasoning is known.

    An answer ends where the context does; such examples are answered one at a time, so that the
    others do not depend on them.
    """
    context = context_of(model.config)
    examples, beginning = begun(model, examples)
    before = beginning.tokens if beginning else 0

    def answer(batch: list[EncodedExample]) -> list[str]:
        room = [min(max_new_tokens, context - before - len(one.prompt)) for one in batch]
        texts = [""] * len(batch)
        whole = [row for row in range(len(batch)) if room[row] == max_new_tokens]
        short = [[row] for row in range(len(batch)) if 0 < room[row] < max_new_tokens]
        for rows in [whole, *short] if whole else short:
            part = [batch[row] for row in rows]
            prompts, options = [one.prompt for one in part], {"max_new_tokens": room[rows[0]]}
            with narrowed(model, rows):
                if beginning is not None:
                    answers = _generate(model, tokenizer, prompts, options, (beginning, part))
                else:
                    answers = generate(model, tokenizer, prompts, **options)
            for row, text in zip(rows, answers, strict=True):
                texts[row] = _opened(tokenizer, prompts[0]) + text.strip()
        return texts

    def size(example: EncodedExample) -> Size:
        whole = generated_size(example.prompt, before + max_new_tokens)
        return whole._replace(tokens=whole.tokens + before // 8)

    return in_batches(model, examples, answer, progress, size)


def _opened(tokenizer: Any, prompt: Sequence[int]) -> str:
    """The beginning of reasoning with which a prompt ends, or nothing."""
    end = str(tokenizer.decode(prompt[-OPENED:])).rstrip()
    return BEGIN if end.endswith(BEGIN) else ""


def decoding(base: Base, task: Task) -> dict[str, Any]:
    """How the answers to test rows are generated, as a card says it."""
    stop = base.tokenizer.convert_ids_to_tokens(base.model.generation_config.eos_token_id)
    return {"method": "greedy", "max_new_tokens": task.max_new_tokens, "stop": stop}


# ── Samples ─────────────────────────────────────────────────────────────────────────────────────

SAMPLED = {True: 64, False: 512}
"""Texts that are drawn in one batch, on a CPU and elsewhere."""


@torch.no_grad()
def sample(
    model: Any, pad: int, prompts: Sequence[Sequence[int]], draws: np.ndarray,
    ends: Sequence[int], progress: Progress = no_progress,
) -> list[tuple[int, ...]]:  # fmt: skip
    """A continuation of each prompt (token ids), drawn from the model as it is (temperature 1).

    ``draws`` (prompts, tokens) are numbers from 0 to 1, one for each token: the token is the one
    whose share of the cumulated probabilities holds the number. So a text depends on its prompt and
    its own numbers, and on the others of its batch by rounding only; a shorter one is a prefix of a
    longer one. One of ``ends`` is the last token of a text that ends by itself.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    length = draws.shape[1]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=length, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    texts: list[tuple[int, ...]] = []
    sizes = [generated_size(prompt, length) for prompt in prompts]
    most = SAMPLED[model.device.type == "cpu"]
    for fitting in Budget(model).parts(sizes):
        for start in range(0, len(fitting), most):
            part = fitting[start : start + most]
            ids, mask, _ = padded([prompts[at] for at in part], pad, left=True)
            drawn = torch.from_numpy(draws[part])
            out = model.generate(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Drawn(drawn, ids.shape[1])]),
            )  # fmt: skip
            for row in out[:, ids.shape[1] :].tolist():
                last = next((at for at, token in enumerate(row) if token in ends), len(row))
                texts.append(tuple(row[: last + 1]))
            progress(len(part))
    return texts


class _Drawn:
    """Leaves the drawn token alone, so that a greedy step takes it."""

    def __init__(self, draws: Tensor, start: int) -> None:
        self.draws, self.start = draws, start

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        # Metal has no float64.
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        cumulated = scores.to(exact).softmax(-1).cumsum(-1)
        draws = self.draws[:, ids.shape[1] - self.start, None]
        wanted = draws.to(cumulated) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, wanted, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


# ── Options ─────────────────────────────────────────────────────────────────────────────────────


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` for transformers' ``generate``, those of a ``generation_config`` among them.

    Options that are given by themselves are preferred. Raises UsageError for those that cannot be
    used: the length of padded prompts would count, or the result would be no text.
    """
    given = {name: value for name, value in options.items() if value is not None}
    config = given.pop("generation_config", None)
    if config is not None:
        settings = config if isinstance(config, Mapping) else config.to_diff_dict()
        internal = ("transformers_version", "_from_model_config")
        given = {k: v for k, v in settings.items() if k not in internal and v is not None} | given
    given.setdefault("max_new_tokens", NEW_TOKENS)
    if given["max_new_tokens"] < 1:
        raise UsageError(
            where="max_new_tokens",
            expected="at least 1",
            found=str(given["max_new_tokens"]),
            hint="Score answers with predict() if none is to be generated.",
        )
    if "max_length" in given:
        raise UsageError(
            where="max_length",
            expected="max_new_tokens, the most tokens of an answer",
            found=f"max_length={given['max_length']}, which counts the padding of a batch too",
            hint="Give max_new_tokens instead.",
        )
    more = [name for name in TEXTS_ONLY if given.get(name)]
    if more:
        raise UsageError(
            expected="options that return text",
            found=listed(more),
            hint="Inside `with model.using(name)`, call model.base.model.generate(…) for the rest.",
        )
    return given


def _check_context(model: Any, prompts: Sequence[Sequence[int]], new: int) -> None:
    context, longest = context_of(model.config), max(map(len, prompts))
    if longest + new > context:
        raise UsageError(
            expected=f"prompt and answer within the base's context of {context} tokens",
            found=f"a prompt of {longest} and max_new_tokens={new}",
            hint="Shorten the prompt"
            + (f", or give max_new_tokens={context - longest}." if longest < context else "."),
        )
