"""Answers for people: a batch whose rows each have their own domain, and text as it is written."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lora_domains.data.tokenization import Tokenization
from lora_domains.errors import UsageError
from lora_domains.inference.generation import generate, generate_in_batches
from lora_domains.inference.likelihoods import (
    choice_logprobs,
    head_scores,
)
from lora_domains.inference.scores import renormalise, unanswered
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import row_limit
from lora_domains.stats.thresholds import REFER, check_referral, predicted_class, stored
from lora_domains.tasks import Task, task_from_record

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """One label with its probability, and those of the others; ``refer`` where none is sure."""

    label: str
    probability: float
    probabilities: dict[str, float]


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
            hint="Call f(rows, domain='medical') or f(rows, domains=['medical', None, …]).",
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
    tokenization = Tokenization(bank.base.tokenizer, bank.base.context)
    ids = [[*tokenization.bos, *tokenization.tokens(prompt)] for prompt in prompts]

    def run(rows: list[int]) -> list[str]:
        picked = [ids[row] for row in rows]
        return generate(bank.base.model, bank.base.tokenizer, picked, **options)

    return by_domain(bank, domains, len(ids), run)


def task_of(bank: Bank, name: str) -> Task:
    """The task in the card of the adapter ``name``; raises UsageError without a card."""
    card = bank[name].card
    if card is None:
        raise UsageError(
            where=name,
            expected="an adapter whose card holds its task",
            found="a folder of plain PEFT",
            hint="Its labels are not in its folder: `heads.head_logprobs` gives their numbers."
            if bank[name].head
            else "Use generate() with the prompt it was trained on.",
        )
    return task_from_record(card.adapter.task)


def length_of(bank: Bank, name: str) -> int:
    """Tokens of a text at most for the adapter ``name``, as in its training."""
    card = bank[name].card
    settings = card.adapter.settings if card else {}
    wanted = settings.get("training", {}).get("max_length")
    return min(wanted or row_limit(bank.base, None), bank.base.context)


def predicted(
    bank: Bank,
    texts: Sequence[str | Mapping[str, Any]],
    domains: Sequence[str],
    refer_below: float = 0.0,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Prediction | str]:
    """The label of each text, or its answer, prompted as the card of its domain says.

    A label less probable than ``refer_below`` becomes ``refer``. Where a domain has a target recall
    or precision, its card's threshold decides.
    """
    base = bank.base
    tasks = {name: task_of(bank, name) for name in domains}
    thresholds = {name: _threshold(bank, name, task, warn) for name, task in tasks.items()}
    for task in tasks.values():
        check_referral(refer_below, task.labels or ())
    of_row = [tasks[name] for name in domains]
    heads = [bank[name].head for name in domains]
    examples = [
        task.to_predict(text, n) for n, (task, text) in enumerate(zip(of_row, texts, strict=True))
    ]
    # A text that a head reads is framed otherwise.
    tokenizations = {
        name: Tokenization(base.tokenizer, length_of(bank, name), head=bank[name].head is not None,
                      bidirectional=base.bidirectional)
        for name in tasks
    }  # fmt: skip
    items = [
        tokenizations[name].encode(example)
        for name, example in zip(domains, unanswered(examples), strict=True)
    ]
    found: dict[int, Prediction | str] = {}
    # Labels are scored, answers are written: a batch for those of a head, one for those scored as
    # text, and one for each length of what is written.
    kinds = [
        "head" if head is not None else task.max_new_tokens
        for head, task in zip(heads, of_row, strict=True)
    ]
    for kind in dict.fromkeys(kinds):
        rows = [row for row, of in enumerate(kinds) if of == kind]

        def answer(part: list[int], rows: list[int] = rows, kind: str | int = kind) -> list[Any]:
            picked, at = [items[rows[i]] for i in part], [rows[i] for i in part]
            model, pad = base.model, base.tokenizer.pad_token_id
            if kind == "head":
                scores = head_scores(model, [h for i in at if (h := heads[i])], picked, pad)
            elif kind:
                return generate_in_batches(model, base.tokenizer, picked, int(kind))
            else:
                scores = choice_logprobs(model, picked, pad)
            return [
                _labelled(of_row[i], row, thresholds[domains[i]], refer_below)
                for i, row in zip(at, scores, strict=True)
            ]

        answers = by_domain(bank, [domains[row] for row in rows], len(rows), answer)
        found |= dict(zip(rows, answers, strict=True))
    return [found[row] for row in range(len(texts))]


def _threshold(bank: Bank, name: str, task: Task, warn: Callable[[str], None]) -> float | None:
    """From which probability the domain ``name`` has its positive class; None: the likeliest."""
    card = bank[name].card
    threshold = stored(card.adapter.judged) if task.targets and card else None
    if task.targets and threshold is None:
        warn(
            f"{name} has no threshold for the target {task.targets} (evaluate chooses it): "
            "the most likely label is predicted."
        )
    return threshold


def _labelled(
    task: Task, logprobs: np.ndarray, threshold: float | None, refer_below: float
) -> Prediction:
    labels = task.labels or ()
    shares = [float(p) for p in np.exp(renormalise(logprobs))]
    best = predicted_class(shares, task.positive_index, threshold)
    label = labels[best] if shares[best] >= refer_below else REFER
    return Prediction(label, shares[best], dict(zip(labels, shares, strict=True)))


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
