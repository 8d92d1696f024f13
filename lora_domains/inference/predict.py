"""Predictions and generated text for users: batches whose rows have a domain each, and streams."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

from lora_domains.errors import UsageError
from lora_domains.inference.generation import generate, generate_in_batches
from lora_domains.inference.likelihoods import choice_logprobs, head_scores
from lora_domains.inference.scores import renormalise
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import check_embedded, row_limit, tokenization_of
from lora_domains.stats.thresholds import REFER, check_referral, predicted_class, stored
from lora_domains.tasks import Task, task_from_record
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

T = TypeVar("T")


@dataclass(frozen=True)
class Prediction:
    """A label, its probability and those of all labels.

    The label is ``refer`` where it is less probable than the caller asked for.
    """

    label: str
    probability: float
    probabilities: dict[str, float]


# ── The domain of each row ──────────────────────────────────────────────────────────────────────


def row_domains(
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


def text_domains(
    bank: Bank, domain: str | None, domains: Sequence[str | None] | None, count: int
) -> list[str]:
    """The domain of each of ``count`` texts to predict: as given, otherwise as ``using`` says.

    Raises UsageError for a text without one.
    """
    route = bank.current()
    if domain is None and domains is None and route is not None:
        active = route.domains
        domain, domains = (active[0], None) if len(active) == 1 else (None, active)
    names = [name for name in row_domains(domain, domains, count) or () if name is not None]
    if len(names) < count:
        raise UsageError(
            expected="a domain to predict for",
            found="none",
            hint="Call predict(texts, domain='medical'), or inside using('medical').",
        )
    return names


def by_domain(
    bank: Bank,
    domains: Sequence[str | None] | None,
    count: int,
    run: Callable[[list[int]], list[T]],
) -> list[T]:
    """The results of ``run`` on ``count`` rows, each under its domain, in the order of the rows.

    ``run`` takes positions of rows and returns the same number of results for each. Rows are
    sorted by domain and run in parts that need no more adapters than fit on the device at once.
    """
    if domains is None:
        return run(list(range(count)))
    results: list[list[T]] = [[] for _ in range(count)]
    for rows in bank.parts(domains):
        with bank.routed([domains[row] for row in rows]):
            part = run(rows)
        per_row = len(part) // len(rows)
        for place, row in enumerate(rows):
            results[row] = part[place * per_row : (place + 1) * per_row]
    return [result for of_row in results for result in of_row]


# ── What a card says of its adapter ─────────────────────────────────────────────────────────────


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
    limit = settings.get("training", {}).get("max_length")
    return min(limit or row_limit(bank.base, None), bank.base.context)


# ── Labels and answers ──────────────────────────────────────────────────────────────────────────


def predict(
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
    tasks = {name: task_of(bank, name) for name in domains}
    for task in tasks.values():
        check_referral(refer_below, task.labels or ())
    thresholds = {name: _threshold(bank, name, task, warn) for name, task in tasks.items()}
    tokenizations = {
        name: tokenization_of(bank.base, task, length_of(bank, name))
        for name, task in tasks.items()
    }
    encoded = [
        tokenizations[name].encode(tasks[name].to_predict(text, n))
        for n, (name, text) in enumerate(zip(domains, texts, strict=True))
    ]
    check_embedded(bank.base, ((f"input {n}", one) for n, one in enumerate(encoded)))
    # One pass each for heads, for labels scored as text, and for each length of generated answers.
    passes: dict[str | int, list[int]] = {}
    for row, name in enumerate(domains):
        how = "head" if bank[name].head is not None else tasks[name].max_new_tokens
        passes.setdefault(how, []).append(row)
    predictions: dict[int, Prediction | str] = {}
    for how, rows in passes.items():

        def run(part: list[int], how: str | int = how, rows: list[int] = rows) -> list[Any]:
            places = [rows[i] for i in part]
            examples, model = [encoded[row] for row in places], bank.base.model
            pad = bank.base.pad
            if how == "head":
                heads = [head for row in places if (head := bank[domains[row]].head)]
                scores = head_scores(model, heads, examples, pad)
            elif how:
                texts = generate_in_batches(model, bank.base.tokenizer, examples, int(how))
                answered = zip(places, texts, strict=True)
                return [tasks[domains[row]].answer_in(text) for row, text in answered]
            else:
                scores = choice_logprobs(model, examples, pad)
            return [
                _prediction(tasks[domains[row]], logprobs, thresholds[domains[row]], refer_below)
                for row, logprobs in zip(places, scores, strict=True)
            ]

        results = by_domain(bank, [domains[row] for row in rows], len(rows), run)
        predictions |= dict(zip(rows, results, strict=True))
    return [predictions[row] for row in range(len(texts))]


def _threshold(bank: Bank, name: str, task: Task, warn: Callable[[str], None]) -> float | None:
    """The probability at which ``name`` predicts its positive class; None: the most likely one."""
    card = bank[name].card
    threshold = stored(card.adapter.judged) if task.targets and card else None
    if task.targets and threshold is None:
        warn(
            f"{name} has no threshold for the target {task.targets} (evaluate chooses it): "
            "the most likely label is predicted."
        )
    return threshold


def _prediction(
    task: Task, logprobs: np.ndarray, threshold: float | None, refer_below: float
) -> Prediction:
    labels = task.labels or ()
    shares = [float(p) for p in np.exp(renormalise(logprobs))]
    best = predicted_class(shares, task.positive_index, threshold)
    label = labels[best] if shares[best] >= refer_below else REFER
    return Prediction(label, shares[best], dict(zip(labels, shares, strict=True)))


# ── Generated text ──────────────────────────────────────────────────────────────────────────────


def continuations(
    bank: Bank, prompts: Sequence[str], domains: Sequence[str | None] | None, **options: Any
) -> list[str]:
    """The continuation of each prompt; ``options`` are those of ``generation.generate``."""
    tokenization = Tokenization(bank.base.tokenizer, bank.base.context)
    ids = [(*tokenization.bos, *tokenization.tokens(prompt, special=True)) for prompt in prompts]
    check_embedded(
        bank.base, ((f"prompt {n}", EncodedExample("", one, ())) for n, one in enumerate(ids))
    )

    def run(rows: list[int]) -> list[str]:
        picked = [ids[row] for row in rows]
        return generate(bank.base.model, bank.base.tokenizer, picked, **options)

    return by_domain(bank, domains, len(ids), run)


def stream(bank: Bank, prompt: str, domain: str | None, **options: Any) -> Iterator[str]:
    """The continuation of ``prompt`` in pieces of text, as another thread generates it.

    The thread has the route of this call: ``using`` may be left, and the adapter unloaded, before
    the last piece is read. A reader who stops early stops the thread. Raises what ``generate``
    raises.
    """
    from transformers import TextIteratorStreamer

    streamer = TextIteratorStreamer(bank.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped = threading.Event()
    failures: list[Exception] = []

    def stop(ids: torch.Tensor, _scores: object, **_: Any) -> torch.Tensor:
        return torch.full((len(ids),), stopped.is_set(), device=ids.device)

    criteria = [*options.pop("stopping_criteria", ()), stop]

    def write() -> None:
        try:
            continuations(
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
            stopped.set()
            thread.join()
        if failures:
            raise failures[0]

    return pieces()
