"""Score records: what a contender's likelihoods or generated text say of each encoded example.

A record is a dict of numbers, as ``items.jsonl`` stores it for each contender:
``prediction``, ``confidence``, ``nll``, ``brier`` and ``positive`` where choices are scored,
``predicted`` and ``probabilities`` (a list each) where a row may have several labels, ``value``
where a number is predicted, ``nats`` and ``tokens`` where an answer is, those of ``tasks.answers``
where one is generated. The generated ``text`` is in it too, and is never stored with it
(``without_text``).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from lora_domains.errors import AdapterError
from lora_domains.inference.batches import Progress, no_progress
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import answer_nats, choice_logprobs, head_scores
from lora_domains.modeling.bank import Bank, Domains
from lora_domains.modeling.heads import Head
from lora_domains.stats.thresholds import Chosen, choose_threshold, label_thresholds
from lora_domains.tasks import Task
from lora_domains.tokenization.encoded import EncodedExample

Scores = list[dict[str, Any]]
"""One record per example."""
TEXT = "text"
Score = Callable[[Bank, Task, Sequence[EncodedExample], Sequence[str], Domains, Progress], Scores]
"""A function with the arguments of ``model_scores``."""


def model_scores(
    bank: Bank, task: Task, examples: Sequence[EncodedExample], references: Sequence[str],
    routes: Domains, progress: Progress = no_progress,
) -> Scores:  # fmt: skip
    """The records of ``examples`` as the task scores them, from the base or adapters in ``routes``.

    ``references`` holds the expected answer of each example, for tasks scored by generated text.
    """
    model, pad = bank.base.model, bank.base.pad
    with bank.routed(routes):
        if task.head and routes is not None:
            names = [routes] * len(examples) if isinstance(routes, str) else routes
            heads = [_head_of(bank, name) for name in names]
            outputs = head_scores(model, heads, examples, pad, progress, task.outputs)
            return [head_score(task, row, example)
                    for row, example in zip(outputs, examples, strict=True)]  # fmt: skip
        if task.scored_by == "choices":
            logprobs = choice_logprobs(model, examples, pad, progress)
            return [choice_score(task, row, example)
                    for row, example in zip(logprobs, examples, strict=True)]  # fmt: skip
        if task.scored_by == "text":
            nats, tokens = answer_nats(model, examples, pad)
            prompts = [example.unanswered() for example in examples]
            texts = generate_in_batches(
                model, bank.base.tokenizer, prompts, task.max_new_tokens, progress
            )
            return [
                {"nats": float(n), "tokens": int(t), **text_score(task, text, reference)}
                for n, t, text, reference in zip(nats, tokens, texts, references, strict=True)
            ]
        nats, tokens = answer_nats(model, examples, pad, progress)
        return [{"nats": float(n), "tokens": int(t)} for n, t in zip(nats, tokens, strict=True)]


def text_score(task: Task, text: str, reference: str) -> dict[str, Any]:
    """The record of an answer: its scores, and its text as it was scored."""
    text = task.answer_in(text)
    return {**task.score_text(text, reference), TEXT: text}


def without_text(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, which may be stored."""
    return {name: value for name, value in record.items() if name != TEXT}


def _head_of(bank: Bank, name: str | None) -> Head:
    head = None if name is None else bank[name].head
    if head is None:
        raise AdapterError(
            where=str(name or bank.base.id),
            expected="a trained head",
            found="none",
            hint="Score an adapter that was trained with head=True.",
        )
    return head


def head_score(task: Task, outputs: np.ndarray, example: EncodedExample) -> dict[str, Any]:
    """The record of one example from what a head gives: log-probabilities of the classes, the
    log-odds of each label, or a number in standard deviations."""
    if task.outputs == "classes":
        return class_score(outputs, example.target, task.positive_index)
    if task.outputs == "value":
        return number_score(float(outputs[0]), example.truth, task.scale)
    return label_score(outputs, example.truth)


def number_score(
    output: float, truth: Sequence[float], scale: tuple[float, float] | None
) -> dict[str, Any]:
    """The record of a number from what a head gives: ``value`` is in the unit of the rows, ``nll``
    half the squared error in standard deviations."""
    mean, sd = scale or (0.0, 1.0)
    score: dict[str, Any] = {"value": mean + sd * output}
    if len(truth):
        score["nll"] = ((score["value"] - truth[0]) / sd) ** 2 / 2
    return score


def label_score(log_odds: np.ndarray, truth: Sequence[float]) -> dict[str, Any]:
    """The record of a row that may have several labels, from the log-odds of each, (labels,).

    ``nll`` is the cross-entropy of all labels; ``brier`` and ``confidence``, the probability of
    what is predicted of a label, are means over them. A label is predicted from a probability of
    one half; see ``decided`` for other thresholds.
    """
    probabilities = 1 / (1 + np.exp(-log_odds.clip(-700, 700)))
    score = _labelled(probabilities, 0.5)
    if len(truth):
        signed = np.where(np.asarray(truth) > 0, log_odds, -log_odds)
        score["nll"] = float(np.logaddexp(0, -signed).sum())
        score["brier"] = float(2 * ((probabilities - np.asarray(truth)) ** 2).mean())
    return score


def _labelled(probabilities: np.ndarray, thresholds: float | np.ndarray) -> dict[str, Any]:
    predicted = probabilities >= thresholds
    return {
        "predicted": predicted.astype(int).tolist(),
        "probabilities": probabilities.tolist(),
        "confidence": float(np.where(predicted, probabilities, 1 - probabilities).mean()),
    }


def renormalise(logprobs: np.ndarray) -> np.ndarray:
    """Log-probabilities over the choices alone, summing to one. Last axis: choices."""
    peak = logprobs.max(axis=-1, keepdims=True)
    total = peak + np.log(np.exp(logprobs - peak).sum(axis=-1, keepdims=True))
    normalised: np.ndarray = logprobs - total
    return normalised


def comparable(task: Task, logprobs: np.ndarray, example: EncodedExample) -> np.ndarray:
    """What choices are ranked by: their log-likelihoods, or those per token; (choices,)."""
    if task.per_token:
        per_token: np.ndarray = logprobs / np.array([len(choice) for choice in example.choices])
        return per_token
    return logprobs


def choice_score(task: Task, logprobs: np.ndarray, example: EncodedExample) -> dict[str, Any]:
    """The record of one example from the log-likelihoods of its choices, (choices,)."""
    if task.beta is not None:
        return pair_score(logprobs, example)
    log_shares = renormalise(comparable(task, logprobs, example))
    score = class_score(log_shares, example.target, task.positive_index)
    if example.target >= 0:
        score["nats"] = float(-logprobs[example.target])
        score["tokens"] = len(example.choices[example.target])
    return score


def pair_score(logprobs: np.ndarray, example: EncodedExample) -> dict[str, float]:
    """The record of two answers, the chosen one first: its log-odds, and whether they are above 0.

    ``won`` is added where the base is known (``add_won``).
    """
    margin = float(logprobs[0] - logprobs[1])
    return {"margin": margin, "ranked": float(margin > 0), "nats": float(-logprobs[0]),
            "tokens": len(example.choices[0])}  # fmt: skip


def add_won(scores: Scores, base: Scores) -> None:
    """Add to records of pairs whether the chosen answer is preferred more than by the ``base``.

    1 where its log-odds rose, 0 where they fell, and 1/2 for the base itself.
    """
    for record, before in zip(scores, base, strict=True):
        if "margin" in record:
            record["won"] = 0.5 + 0.5 * float(np.sign(record["margin"] - before["margin"]))


def class_score(log_shares: np.ndarray, target: int, positive: int | None) -> dict[str, Any]:
    """Prediction, label cross-entropy, confidence and Brier term from log-probabilities (classes,).

    With a positive class the record also holds its probability, and the best of the other classes
    (``other``, ``other_confidence``), for a threshold to decide between (see ``apply_threshold``).
    """
    probabilities = np.exp(log_shares)
    score: dict[str, Any] = {
        "prediction": int(log_shares.argmax()),
        "confidence": float(probabilities.max()),
    }
    if target >= 0:
        truth = np.zeros(len(log_shares))
        truth[target] = 1.0
        score["nll"] = float(-log_shares[target])
        score["brier"] = float(((probabilities - truth) ** 2).sum())
    if positive is not None:
        others = np.where(np.arange(len(log_shares)) == positive, -1.0, probabilities)
        score["positive"] = float(probabilities[positive])
        score["other"], score["other_confidence"] = int(others.argmax()), float(others.max())
    return score


# ── Thresholds ──────────────────────────────────────────────────────────────────────────────────

Thresholds = Chosen | np.ndarray | None
"""What validation rows chose: of the positive class, or of each label; None where nothing."""


def best_threshold(
    task: Task, scores: Scores, tuning: Sequence[EncodedExample], groups: Sequence[str | None]
) -> Thresholds:
    """The probabilities from which a contender's ``scores`` predict the positive class, or labels.

    Its first scores are of the ``tuning`` rows, which choose them; ``groups`` are theirs. None
    where the task has no thresholds to choose or no row to choose them by, and where a probability
    is not a number.
    """
    if not task.tuned:
        return None
    chosen = scores[: len(tuning)]
    if task.outputs == "labels":
        if not tuning or any("probabilities" not in score for score in chosen):
            return None
        truth = np.array([row.truth for row in tuning])
        return label_thresholds(np.array([s["probabilities"] for s in chosen]), truth)
    positive = [row.target == task.positive_index for row in tuning]
    probabilities = [score["positive"] for score in chosen]
    # A row without a group is one of its own.
    alone: list[Hashable] = [group or i for i, group in enumerate(groups)]
    return choose_threshold(probabilities, positive, **task.targets, groups=alone)


def decided(task: Task, scores: Scores, chosen: Thresholds) -> Scores:
    """``scores`` with what ``chosen`` thresholds predict."""
    if isinstance(chosen, np.ndarray):
        return [score | _labelled(np.array(score["probabilities"]), chosen) for score in scores]
    threshold = None if chosen is None else chosen.threshold
    return [apply_threshold(score, threshold, task.positive_index) for score in scores]


def apply_threshold(
    score: dict[str, Any], threshold: float | None, positive: int | None
) -> dict[str, Any]:
    """``score`` with the class that ``threshold`` predicts, without ``other``.

    Without a threshold the most likely class stays.
    """
    decided = {k: v for k, v in score.items() if k not in ("other", "other_confidence")}
    if threshold is not None and positive is not None:
        decided |= {"prediction": score["other"], "confidence": score["other_confidence"]}
        if score["positive"] >= threshold:
            decided |= {"prediction": positive, "confidence": score["positive"]}
    return decided
