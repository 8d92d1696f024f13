"""A base with its routed adapters as the model class that lm-evaluation-harness calls.

Imports lm_eval, which is an optional dependency: import this file where it is needed.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lora_domains.errors import UsageError
from lora_domains.inference.batches import generated_size, in_batches
from lora_domains.inference.choice_tree import last_logits
from lora_domains.inference.generation import generate
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import IGNORED, collate
from lora_domains.modeling.routing import narrowed
from lora_domains.tokenization.encoded import EncodedExample

MAX_NEW_TOKENS = 256
"""Generated tokens at most where a task does not say, as in the harness."""


class RoutedLM(TemplateLM):  # type: ignore[misc, unused-ignore]
    """The base of ``bank`` under the current route, as an ``lm_eval.api.model.LM``.

    Tokenised like the harness's own ``HFLM``. For the harness's own functions too: ``with
    model.using("medical"): lm_eval.simple_evaluate(RoutedLM(model.bank), tasks=["arc_easy"])``.
    Raises UsageError when it is given ``use_cache``.
    """

    def __init__(self, bank: Bank) -> None:
        super().__init__()
        self.bank = bank
        self.tokenizer = bank.base.tokenizer
        self.max_length = bank.base.context

    @property
    def device(self) -> torch.device:
        return self.bank.base.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        given = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        special = not given if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=special)
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, answer) for _, context, answer in requests]
        return answer_logprobs(self.bank, pairs, range(len(pairs)))

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        pairs: list[Any] = []
        rows: list[int] = []
        for row, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            pairs += [make_disjoint_window(window) for window in windows]
            rows += [row] * (len(pairs) - len(rows))
        totals = [0.0] * len(requests)
        for row, (logprob, _) in zip(rows, answer_logprobs(self.bank, pairs, rows), strict=True):
            totals[row] += logprob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [(self.tok_encode(r.args[0]), dict(r.args[1])) for r in requests]
        return generate_until(self.bank, prompts)

    def set_cache_hook(self, cache_hook: object) -> None:
        raise UsageError(
            where="use_cache",
            expected="no cache of answers: it does not know which adapter gave them",
            found="use_cache",
            hint="Leave it out; `lora-domains benchmark` keeps scores by adapter.",
        )


@torch.no_grad()
def answer_logprobs(
    bank: Bank, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], rows: Sequence[int]
) -> list[tuple[float, bool]]:
    """For each (context, answer) in tokens: the answer's log-likelihood, and whether it is greedy.

    ``rows`` gives the row of the current route for each. A context that is too long loses its
    beginning. Raises UsageError for an answer longer than the base's context.
    """
    model, pad = bank.base.model, bank.base.pad
    examples = []
    for at, (context, answer) in enumerate(pairs):
        # The last token is predicted and never read, so one more than the context fits.
        room = bank.base.context + 1 - len(answer)
        if room < 1:
            raise _too_long(bank.base.context, len(answer))
        examples.append(EncodedExample(str(at), tuple(context[-room:]), tuple(answer)))

    def score(part: list[EncodedExample]) -> list[tuple[float, bool]]:
        batch = collate(part, pad, model.device)
        width = batch.labels.shape[1]
        ids, mask, positions = (each[:, :-1] for each in (batch.ids, batch.mask, batch.positions))
        logits = last_logits(model, ids, mask, positions, width).float()
        supervised = batch.labels != IGNORED
        labels = batch.labels.clamp(min=0)
        logprobs = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        totals = (logprobs * supervised).cpu().double().sum(1).tolist()
        greedy = ((logits.argmax(-1) == labels) | ~supervised).all(1).tolist()
        return list(zip(totals, greedy, strict=True))

    with narrowed(model, rows):
        return in_batches(model, examples, score)


def generate_until(bank: Bank, prompts: Sequence[tuple[list[int], dict[str, Any]]]) -> list[str]:
    """The greedy continuation of each prompt (token ids, the harness's options) up to its stop."""
    by_options: dict[tuple[tuple[str, ...], int], list[int]] = {}
    for at, (_, options) in enumerate(prompts):
        until = options.get("until") or []
        stops = tuple([until] if isinstance(until, str) else until)
        names = ("max_gen_toks", "max_new_tokens", "max_tokens")
        most = next((options[name] for name in names if options.get(name)), MAX_NEW_TOKENS)
        by_options.setdefault((stops, int(most)), []).append(at)
    texts = [""] * len(prompts)
    for (stops, most), rows in by_options.items():
        ids = [prompts[row][0] for row in rows]
        for row, text in zip(rows, _generated(bank, ids, rows, stops, most), strict=True):
            texts[row] = text
    return texts


def _generated(
    bank: Bank, prompts: Sequence[list[int]], rows: Sequence[int], stops: Sequence[str], most: int
) -> list[str]:
    """The continuations of prompts with the same options; ``rows`` as in ``answer_logprobs``."""
    from transformers import StopStringCriteria

    model, tokenizer = bank.base.model, bank.base.tokenizer
    room = bank.base.context - most
    if room < 1:
        raise _too_long(bank.base.context, most)
    examples = [EncodedExample(str(r), tuple(ids[-room:]), ())
                for r, ids in zip(rows, prompts, strict=True)]  # fmt: skip
    known = [stop for stop in stops if stop]
    criteria = [StopStringCriteria(tokenizer, known)] if known else []

    def answer(part: list[EncodedExample]) -> list[str]:
        prompts = [example.prompt for example in part]
        texts = generate(model, tokenizer, prompts, max_new_tokens=most, stopping_criteria=criteria)
        for stop in known:
            texts = [text.split(stop)[0] for text in texts]
        return texts

    with narrowed(model, rows):
        size = partial(generated_size, new_tokens=most)
        return in_batches(model, examples, answer, size=size)


def _too_long(context: int, answer: int) -> UsageError:
    return UsageError(
        expected=f"answers that leave room in a context of {context} tokens",
        found=f"an answer of {answer} tokens",
        hint="Choose a base with a longer context, or leave the task out of --suite.",
    )
