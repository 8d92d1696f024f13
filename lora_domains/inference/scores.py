"""Score records: what one model's likelihoods or generated text say of one encoded example.

A record is a flat dict of numbers, as ``items.jsonl`` stores it for each contender:
``prediction``, ``confidence``, ``nll``, ``brier`` and ``positive`` where choices are scored,
``nats`` and ``tokens`` where an answer is, ``f1`` and ``exact`` where one is generated. No torch.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lora_domains.data.tokenization import EncodedExample
from lora_domains.tasks import Example, Task

Scores = list[dict[str, float]]
"""One record per example."""


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


def choice_score(task: Task, logprobs: np.ndarray, example: EncodedExample) -> dict[str, float]:
    """The record of one example from the log-likelihoods of its choices, (choices,)."""
    shares = renormalise(comparable(task, logprobs, example))
    score = class_score(shares, example.target, task.positive_index)
    if example.target >= 0:
        score["nats"] = float(-logprobs[example.target])
        score["tokens"] = len(example.choices[example.target])
    return score


def class_score(log_shares: np.ndarray, target: int, positive: int | None) -> dict[str, float]:
    """Prediction, label cross-entropy, confidence and Brier term from log-probabilities (classes,).

    With a positive class the record also holds its probability, and under ``other`` and
    ``other_confidence`` the best of the other classes, for a threshold to choose between.
    """
    probabilities = np.exp(log_shares)
    score: dict[str, float] = {
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


def unanswered(examples: Sequence[Example]) -> list[Example]:
    """The examples without their answers, as they are at prediction time."""
    return [replace(example, answer="", target=-1) for example in examples]
