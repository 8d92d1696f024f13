"""A small suite of general questions, and domains and models for short fits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Classification, MultipleChoice, Task

QUIET = Display(quiet=True)
PAIRS = [("alpha", "beta"), ("gamma", "delta"), ("red", "green"), ("win", "prize")]
QUESTIONS = [
    {"question": f"The word after {a} is", "choices": [b, "stone", "cloud"], "answer": 0,
     "topic": f"topic {n}"}
    for n, (a, b) in enumerate(PAIRS)
] * 5  # fmt: skip
SUITE = Suite(
    "world",
    (Probe("world", MultipleChoice(prompt="{question}"), QUESTIONS, part="topic"),),
    lambda: [f"the {word} of a river is red and blue" for word in ["alpha", "beta", "gamma"]] * 4,
)  # fmt: skip


def declared(rows: Sequence[Mapping[str, Any]], name: str = "spam", task: Task | None = None,
             **settings: Any) -> Domain:  # fmt: skip
    """A domain over ``rows``, a tenth for validation and the last two tenths for the test set."""
    tenth = len(rows) // 10
    data = Data(rows[: -3 * tenth], rows[-3 * tenth : -2 * tenth], rows[-2 * tenth :])
    defaults = {"lr": 0.01, "batch_size": 16, "rank": 8, "epochs": 2}
    domain = Domain(name, task or Classification(positive="spam"), data)
    return with_settings(domain, **(defaults | settings))


def model_in(folder: Path, base: Path) -> DomainModel:
    """A quiet model on the CPU that saves its adapters in ``folder``."""
    return DomainModel.from_pretrained(base, out=folder, display=QUIET, device="cpu")
