"""Batches of scoring: examples of similar size, shared by processes, halved when too large."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from lora_domains.distributed import merged, own_share, ran_out, release
from lora_domains.errors import OutOfMemory
from lora_domains.modeling.batching import chunks
from lora_domains.modeling.routing import narrowed
from lora_domains.tasks.tokenization import EncodedExample

R = TypeVar("R")
TOKENS = 4096
"""Padded tokens of one forward pass in scoring, on a CPU; times 8 on an accelerator."""
LOGITS = 2**27
"""Elements of the logits of one forward pass, at most: 512 MiB in fp32, or one example."""

Progress = Callable[[int], None]
"""Called with the number of examples just finished."""


def no_progress(_: int) -> None:
    return None


def token_budget(device: torch.device) -> int:
    """Padded tokens of one forward pass on ``device``, at most."""
    return TOKENS if device.type == "cpu" else 8 * TOKENS


def text_cost(example: EncodedExample, most: int, vocabulary: int) -> int:
    """What an example takes of the ``most`` tokens of a pass: its tokens, or the share of
    ``LOGITS`` that the logits of its answer take."""
    return max(len(example), len(example.answer) * vocabulary * most // LOGITS)


def in_batches(
    model: Any,
    examples: Sequence[EncodedExample],
    score: Callable[[list[EncodedExample]], Sequence[R]],
    progress: Progress = no_progress,
    weight: Callable[[EncodedExample], int] | None = None,
) -> list[R]:
    """``score`` of every example, computed in batches of similar weight, in the order given.

    By default an example weighs its ``text_cost``. Under a mixed route each example keeps its own
    adapter. Inside ``sharing`` the processes share the batches, which stay the same. A batch that
    runs out of memory is halved; raises OutOfMemory where a single example does.
    """
    scores: dict[int, R] = {}
    most = token_budget(model.device)
    if weight is None:
        vocabulary = model.config.get_text_config().vocab_size
        weight = partial(text_cost, most=most, vocabulary=vocabulary)
    for chunk in own_share(chunks(examples, most, weight), lambda chunk: progress(len(chunk))):
        waiting = [chunk]
        while waiting:
            part = waiting.pop()
            scored = _try_batch(model, part, [examples[i] for i in part], score)
            if scored is None:
                waiting += [part[: len(part) // 2], part[len(part) // 2 :]]
            else:
                scores.update(zip(part, scored, strict=True))
        progress(len(chunk))
    scores = merged(scores)
    return [scores[i] for i in range(len(examples))]


def _try_batch(
    model: Any,
    part: list[int],
    examples: list[EncodedExample],
    score: Callable[[list[EncodedExample]], Sequence[R]],
) -> Sequence[R] | None:
    """The scores of one batch; None where memory ran out and the batch can be halved."""
    try:
        with narrowed(model, part):
            return score(examples)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        if len(part) == 1:
            raise OutOfMemory(
                where=f"scoring, a text of {len(examples[0])} tokens",
                expected="memory for one text at a time",
                found=str(error).splitlines()[0],
                hint="Set a smaller max_length, or --load-in-4bit.",
            ) from None
    # Outside of `except`, so that the failed pass and its tensors are freed.
    release(model.device)
    return None
