"""Figures of one epoch's validation, by which epochs are compared."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_domains.data.tokenization import EncodedExample
from lora_domains.inference.scores import comparable
from lora_domains.tasks import Task
from lora_domains.verdict.metrics import metric_named
from lora_domains.verdict.scores import ScoreTable


def validation_figures(
    task: Task, examples: Sequence[EncodedExample], logprobs: list[np.ndarray] | None, loss: float
) -> dict[str, Any]:
    """Accuracy, and the score that ranks epochs: the domain metric, or the loss of free text.

    ``logprobs`` are the log-likelihoods of each example's choices, (choices,); None for a task
    without choices, since generating answers every epoch would take too long.
    """
    if logprobs is None:
        return {"accuracy": None, "score": loss, "higher_is_better": False}
    records = ScoreTable(
        {
            "target": example.target,
            "scores": {"adapter": {"prediction": int(comparable(task, row, example).argmax())}},
        }
        for row, example in zip(logprobs, examples, strict=True)
    )
    accuracy, score = (
        metric_named(name).value(records, "adapter", task.positive_index)
        for name in ("accuracy", task.metric)
    )
    return {"accuracy": accuracy, "score": score, "higher_is_better": True}
