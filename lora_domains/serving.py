"""Answers for people: a batch whose rows each have their own domain, and text as it is written."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from lora_domains.bank import Bank
from lora_domains.encoding import Encoder
from lora_domains.errors import UsageError
from lora_domains.scoring import generate

T = TypeVar("T")


def each_row(
    domain: str | None, domains: Sequence[str | None] | None, count: int
) -> list[str | None] | None:
    """The domain of each of ``count`` rows; None where neither is given, so ``using`` decides.

    Raises UsageError when both are given, or ``domains`` has another length.
    """
    if domains is None:
        return None if domain is None else [domain] * count
    if domain is not None or isinstance(domains, str) or len(domains) != count:
        given = repr(domains) if isinstance(domains, str) else f"{len(domains)} for {count} rows"
        raise UsageError(
            expected="either one domain, or a list with one for each row",
            found=f"both domain={domain!r} and domains" if domain is not None else given,
            mend="Call f(rows, domain='medical') or f(rows, domains=['medical', None, …]).",
        )
    return list(domains)


def by_domain(
    bank: Bank,
    domains: Sequence[str | None] | None,
    count: int,
    run: Callable[[list[int]], list[T]],
) -> list[T]:
    """``run`` over the rows with each served by its domain; its answers in the order of the rows.

    ``run`` takes positions of rows and gives the same number of answers for each. Rows are sorted
    by domain, and served in parts that need no more adapters than there are slots.
    """
    if domains is None:
        return run(list(range(count)))
    answers: list[list[T]] = [[] for _ in range(count)]
    for rows in bank.parts(domains):
        with bank.routed([domains[row] for row in rows]):
            found = run(rows)
        several = len(found) // len(rows)
        for place, row in enumerate(rows):
            answers[row] = found[place * several : (place + 1) * several]
    return [answer for of_row in answers for answer in of_row]


def continued(
    bank: Bank, prompts: Sequence[str], domains: Sequence[str | None] | None, **options: Any
) -> list[str]:
    """The continuation of each prompt; ``options`` are those of ``scoring.generate``."""
    encoder = Encoder(bank.base.tokenizer, bank.base.context)
    ids = [[*encoder.bos, *encoder.tokens(prompt)] for prompt in prompts]

    def run(rows: list[int]) -> list[str]:
        picked = [ids[row] for row in rows]
        return generate(bank.base.model, bank.base.tokenizer, picked, **options)

    return by_domain(bank, domains, len(ids), run)


def streamed(bank: Bank, prompt: str, domain: str | None, **options: Any) -> Iterator[str]:
    """The continuation of ``prompt`` in pieces of text, while it is written by another thread.

    The thread is given the route of this call: ``using`` may be left, and the adapter unloaded,
    before the last piece. A reader who stops early stops the thread. Raises what ``generate`` does.
    """
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(bank.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    left = threading.Event()
    failures: list[Exception] = []

    def stop(ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), left.is_set(), device=ids.device)

    criteria = [*options.pop("stopping_criteria", ()), stop]

    def write() -> None:
        try:
            continued(
                bank, [prompt], None, streamer=streamer, stopping_criteria=criteria, **options
            )
        except Exception as error:  # raised again where the pieces are read
            failures.append(error)
        finally:
            streamer.end()

    if domain is None:
        context = contextvars.copy_context()
    else:
        with bank.routed(domain):
            context = contextvars.copy_context()

    def pieces() -> Iterator[str]:
        thread = threading.Thread(target=context.run, args=(write,), daemon=True)
        thread.start()
        try:
            yield from filter(None, streamer)
        finally:
            left.set()
            thread.join()
        if failures:
            raise failures[0]

    return pieces()
