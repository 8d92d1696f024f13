"""Two domains, a suite, and a model with both adapters, for benchmarks in several processes."""

import random
from pathlib import Path

from support.models import model_in

from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.model import DomainModel
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Classification, MultipleChoice, Task

WORDS = ["alpha", "beta", "gamma", "delta", "red", "green", "blue", "stone"]
QUESTIONS = [
    {"question": f"The word after {a} is", "choices": [b, "river", "cloud of stone"], "answer": 0}
    for a in WORDS for b in WORDS[:4] if a != b
]  # fmt: skip
SUITE = Suite(
    "world", (Probe("world", MultipleChoice(prompt="{question}"), QUESTIONS),),
    lambda: [f"the {word} of a river is red and blue" for word in WORDS],
)  # fmt: skip


def domain(name: str, labels: tuple[str, str], task: Task) -> Domain:
    """64 rows whose label follows from their second word."""
    rows = [
        {"text": f"{a} {b} now", "label": labels[at % 2]}
        for a in WORDS
        for at, b in enumerate(WORDS)
    ]
    random.Random(name).shuffle(rows)
    data = Data(rows[:40], rows[40:52], rows[52:])
    fast = {"lr": 0.01, "batch_size": 16, "rank": 4, "epochs": 1, "retention": "none"}
    return with_settings(Domain(name, task, data), **fast)


DOMAINS = [
    domain("spam", ("ham", "spam"), Classification(positive="spam", target_recall=0.9)),
    domain("triage", ("routine", "urgent"), Classification()),
]


def loaded(adapters: Path, base: Path) -> DomainModel:
    """A model with the adapters of both domains from the folder ``adapters``."""
    model = model_in(adapters, base)
    for declared in DOMAINS:
        model.load_adapter(adapters / declared.name)
    return model
