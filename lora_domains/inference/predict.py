"""Predictions and generated text for users: batches whose rows have a domain each, and streams."""

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lora_domains.errors import DataError, UsageError
from lora_domains.inference.batches import by_domain
from lora_domains.inference.generation import generate, generate_in_batches
from lora_domains.inference.likelihoods import choice_logprobs, head_scores
from lora_domains.inference.scores import comparable, label_score, number_score, renormalise
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import check_embedded, row_limit, tokenization_of
from lora_domains.stats.thresholds import (
    REFER,
    check_referral,
    predicted_class,
    stored,
    stored_by_label,
)
from lora_domains.tasks import Outputs, Task, task_from_record
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

Text = str | Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """A label, its probability and those of all labels.

    The label is ``refer`` where it is less probable than the caller asked for.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    of_row: bool = field(default=False, repr=False)
    """Whether other rows have other labels: candidates of their own."""

    @property
    def cells(self) -> dict[str, str | float]:
        """What a table holds of it: the label, its probability and those of all labels."""
        known = {} if self.of_row else self.probabilities
        chances = {f"probability_{label}": p for label, p in known.items()}
        return {"prediction": self.label, "probability": self.probability, **chances}

    @property
    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        known = {"probability": self.probability, "probabilities": self.probabilities}
        return {"prediction": self.label, **known}

    @property
    def line(self) -> tuple[str, str]:
        """The label and its probability as they are printed."""
        return self.label, f"{self.probability:.4f}"


@dataclass(frozen=True)
class Labels:
    """The labels of a text that may have several, and the probability of every label; {} where
    they were answered as text."""

    labels: tuple[str, ...]
    probabilities: dict[str, float]
    joined: str
    """The labels as a cell of a table holds them."""

    @property
    def cells(self) -> dict[str, str | float]:
        """What a table holds of it: the labels, and the probabilities of all labels."""
        chances = {f"probability_{label}": p for label, p in self.probabilities.items()}
        return {"prediction": self.joined, **chances}

    @property
    def record(self) -> dict[str, Any]:
        """The same as JSON."""
        known = {"probabilities": self.probabilities} if self.probabilities else {}
        return {"prediction": list(self.labels), **known}

    @property
    def line(self) -> tuple[str, str]:
        """The labels and their probabilities as they are printed."""
        known = [self.probabilities[label] for label in self.labels if self.probabilities]
        return self.joined, "; ".join(f"{chance:.4f}" for chance in known)


Answer = Prediction | Labels | float | str
"""What is predicted of a text: a label, its labels, a number, or a generated answer."""


# ── What a card says of its adapter ─────────────────────────────────────────────────────────────


def task_of(bank: Bank, name: str) -> Task:
    """The task in the card of the adapter ``name``; raises UsageError without a card."""
    card = bank[name].card
    if card is None:
        raise UsageError(
            where=name,
            expected="an adapter whose card holds its task",
            found="a folder of plain PEFT",
            hint="Its task is not in its folder. Evaluate it (lora-domains evaluate FOLDER --test "
            "rows.csv) and predict with the copy that this writes"
            + (
                "." if bank[name].head else ", or use generate() with the prompt it was trained on."
            ),
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
    first: int = 0,
    refer_below: float = 0.0,
    warn: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """The label of each text, its labels or its answer, prompted as the card of its domain says.

    A label less probable than ``refer_below`` becomes ``refer``. Where a domain has a target recall
    or precision, its card's threshold decides. Errors count texts from ``first``.
    """
    encoded = encoded_texts(bank, texts, domains, refer_below, first)
    return predict_encoded(bank, encoded, domains, [refer_below] * len(encoded), warn)


def encoded_texts(
    bank: Bank,
    texts: Sequence[str | Mapping[str, Any]],
    domains: Sequence[str],
    refer_below: float = 0.0,
    first: int = 0,
) -> list[EncodedExample]:
    """The prompt of each text, as ``predict`` reads it; raises UsageError or DataError."""
    tasks = {name: task_of(bank, name) for name in domains}
    for task in tasks.values():
        check_referral(refer_below, (task.labels or ()) if task.outputs == "classes" else ())
    tokenizations = {
        name: tokenization_of(bank.base, task, length_of(bank, name))
        for name, task in tasks.items()
    }
    for n, text in enumerate(texts, first):
        if not isinstance(text, str | Mapping):
            raise DataError(
                where=f"input {n}",
                expected="a text, or a dict with the columns of the prompt",
                found=type(text).__name__,
                hint="Leave empty rows out.",
            )
    encoded = [
        tokenizations[name].encode(tasks[name].to_predict(text, n))
        for n, (name, text) in enumerate(zip(domains, texts, strict=True), first)
    ]
    check_embedded(bank.base, ((f"input {n}", one) for n, one in enumerate(encoded, first)))
    return encoded


def predict_encoded(
    bank: Bank,
    encoded: Sequence[EncodedExample],
    domains: Sequence[str],
    refer_below: Sequence[float],
    warn: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """``predict`` for texts of ``encoded_texts``, each with its own ``refer_below``."""
    tasks = {name: task_of(bank, name) for name in domains}
    thresholds = {name: _threshold(bank, name, task, warn) for name, task in tasks.items()}
    # One pass each for heads, for labels scored as text, and for each length of generated answers.
    passes: dict[Outputs | int, list[int]] = {}
    for row, name in enumerate(domains):
        task = tasks[name]
        how = task.outputs if bank[name].head is not None else task.max_new_tokens
        passes.setdefault(how, []).append(row)
    predictions: dict[int, Answer] = {}
    for how, rows in passes.items():

        def run(part: list[int], how: Outputs | int = how, rows: list[int] = rows) -> list[Answer]:
            places = [rows[i] for i in part]
            examples, model = [encoded[row] for row in places], bank.base.model
            of_rows, pad = [tasks[domains[row]] for row in places], bank.base.pad
            if not isinstance(how, int):
                heads = [head for row in places if (head := bank[domains[row]].head)]
                scores = head_scores(model, heads, examples, pad, outputs=how)
            elif how:
                texts = generate_in_batches(model, bank.base.tokenizer, examples, how)
                return [_answer(task, text) for task, text in zip(of_rows, texts, strict=True)]
            else:
                scores = [comparable(task, np.array(row), example) for task, row, example
                          in zip(of_rows, choice_logprobs(model, examples, pad), examples,
                                 strict=True)]  # fmt: skip
            limits = [(thresholds[domains[row]], refer_below[row]) for row in places]
            if how == "value":
                return [float(number_score(float(row[0]), (), task.scale)["value"])
                        for task, row in zip(of_rows, scores, strict=True)]  # fmt: skip
            return [
                _labels(task, row, limit) if task.outputs == "labels"
                else _prediction(task, row, limit.get(""), below, _names(bank, task, example))
                for task, row, (limit, below), example
                in zip(of_rows, scores, limits, examples, strict=True)
            ]  # fmt: skip

        results = by_domain(bank, [domains[row] for row in rows], len(rows), run)
        predictions |= dict(zip(rows, results, strict=True))
    return [predictions[row] for row in range(len(encoded))]


def _threshold(bank: Bank, name: str, task: Task, warn: Callable[[str], None]) -> dict[str, float]:
    """The probability at which ``name`` predicts each label, or "", its positive class; {} where
    none was chosen."""
    card = bank[name].card
    judged = card.adapter.judged if task.tuned and card else {}
    thresholds = stored_by_label(judged)
    if (of_positive := stored(judged)) is not None:
        thresholds = {"": of_positive}
    if task.tuned and not thresholds:
        what = f"threshold for the target {task.targets}" if task.targets else "thresholds"
        then = "the most likely label is predicted" if task.targets else "0.5 decides"
        warn(f"{name} has no {what} (evaluate chooses it): {then}.")
    return thresholds


def _labels(task: Task, log_odds: np.ndarray, thresholds: Mapping[str, float]) -> Labels:
    chances = dict(zip(task.labels or (), label_score(log_odds, ())["probabilities"], strict=True))
    named = [label for label, chance in chances.items() if chance >= thresholds.get(label, 0.5)]
    return Labels(tuple(named), chances, task.joined(named))


def _answer(task: Task, text: str) -> Labels | str:
    """The answer that a generated text is."""
    text = task.answer_in(text)
    if task.outputs != "labels":
        return text
    predicted = task.score_text(text, "")["predicted"]
    named = [label for label, one in zip(task.labels or (), predicted, strict=True) if one]
    return Labels(tuple(named), {}, task.joined(named))


def _names(bank: Bank, task: Task, example: EncodedExample) -> Sequence[str]:
    """The labels of the task, or the candidates of the row."""
    if not task.own_choices:
        return task.labels or ()
    return [bank.base.tokenizer.decode(choice).strip() for choice in example.choices]


def _prediction(
    task: Task, logprobs: np.ndarray, threshold: float | None, refer_below: float,
    labels: Sequence[str],
) -> Prediction:  # fmt: skip
    shares = [float(p) for p in np.exp(renormalise(logprobs))]
    best = predicted_class(shares, task.positive_index, threshold)
    label = labels[best] if shares[best] >= refer_below else REFER
    chances = dict(zip(labels, shares, strict=True))
    return Prediction(label, shares[best], chances, of_row=task.own_choices)


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
