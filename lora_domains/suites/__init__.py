"""Probe suites: general-knowledge domains that nobody fits. No torch.

A suite is a name, questions with a task that reads them, and general text for drift and nats.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from lora_domains.tasks import Example, MultipleChoice, Row


@dataclass(frozen=True)
class Suite:
    """``questions`` and ``text`` are read when they are needed."""

    name: str
    task: MultipleChoice
    questions: Callable[[], Sequence[Mapping[str, Any]]]
    text: Callable[[], Sequence[str]]
    """Held out: drift and nats are measured on it."""
    training_text: Callable[[], Sequence[str]]
    """Disjoint from ``text`` and from the questions: adapters are held to the base on it."""
    part: str = ""
    """The column that names the part of the suite a question belongs to."""

    def examples(self) -> list[tuple[str, Example]]:
        """(part, example) of every question."""
        found = []
        for number, values in enumerate(self.questions()):
            row = Row(values, self.name, number, f"suite {self.name}, question {number}")
            part = f"{self.name}/{values[self.part]}" if self.part else self.name
            found.append((part, self.task.example(row)))
        return found

    def texts(self) -> list[Example]:
        """The general text, as language-modelling examples."""
        return self._examples("text", self.text())

    def training_texts(self) -> list[Example]:
        """The general text that training may use."""
        return self._examples("training-text", self.training_text())

    def _examples(self, kind: str, texts: Sequence[str]) -> list[Example]:
        place = f"suite {self.name}"
        return [
            Example(f"{self.name}-{kind}:{number}", "", text, place=place)
            for number, text in enumerate(texts)
        ]


@cache
def _drawn(split: str, count: int) -> tuple[str, ...]:
    """General text of the embedded world; drawing takes seconds, and fit and evaluate both ask."""
    from lora_domains.embedded.world import general_text

    return tuple(general_text(split, count))


def embedded() -> Suite:
    """The questions and general text of the embedded world, for any base."""
    from lora_domains.embedded.world import general_questions

    return Suite(
        name="embedded",
        task=MultipleChoice(prompt="{question}"),
        questions=general_questions,
        text=lambda: _drawn("test", 200),
        training_text=lambda: _drawn("train", 2000),
        part="field",
    )
