"""Classification: rows with one of a few labels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, ClassVar, Self

from lora_domains.errors import MOST_LISTED, DataError, DomainError, did_you_mean, listed
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.labels import spelling
from lora_domains.tasks.rows import (
    Example,
    Row,
    filled,
    literal_text,
    placeholder,
    prompt_from,
    shown,
    text_of,
)


@register
@dataclass(frozen=True)
class Classification(Task):
    """Rows with one of a few labels; each label is scored as text after the prompt.

    With ``head`` a linear layer from the text's last hidden state to the labels is trained
    instead, as in sequence classifiers: the only option on an encoder (BERT), and the cheaper one
    with many labels. The prompt is then the text alone unless ``prompt`` is given.
    ``text`` names one column or several. ``labels`` is read from the training rows unless given.
    ``positive`` is the class whose recall and precision matter (``urgent``, ``spam``). With
    ``target_recall`` or ``target_precision`` it is predicted from the probability at which the
    validation rows show that the target is reached, not where it is the most likely class; the
    target is also the floor that test rows must show. ``wording`` replaces
    the text of a label in the prompt (``{"Terms": "general terms"}``).
    """

    text: str | tuple[str, ...] = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    positive: str | None = None
    prompt: str | None = None
    wording: Mapping[str, str] = field(default_factory=dict)
    head: bool = False
    target_recall: float | None = None
    target_precision: float | None = None

    kind = "classification"
    loss_unit = "label cross-entropy"
    scored_by = "choices"
    has_labels = True
    renamed: ClassVar = {"wanted_recall": "target_recall", "wanted_precision": "target_precision"}

    def __post_init__(self) -> None:
        targets = self.targets
        if not targets:
            return
        if self.positive is None or len(targets) > 1 or not 0 < min(targets.values()) < 1:
            raise DomainError(
                where="classification",
                expected="a positive class and one target recall or precision, above 0 and below 1",
                found=f"positive {self.positive!r}, targets {targets}",
                hint='For example Classification(positive="urgent", target_recall=.9).',
            )

    @property
    def targets(self) -> dict[str, float]:
        """The target for the positive class, ``{"recall": .9}``; empty without one."""
        targets = {"recall": self.target_recall, "precision": self.target_precision}
        return {name: target for name, target in targets.items() if target is not None}

    @property
    def metric(self) -> str:
        """F1 of the positive class, else macro-F1."""
        return "f1" if self.positive else "macro_f1"

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @cached_property
    def template(self) -> str:
        if self.prompt is not None:
            return self.prompt
        if self.head and len(self.texts) == 1:
            return placeholder(self.texts[0])
        prompt = prompt_from(self.texts, self.label)
        return prompt.rsplit("\n", 1)[0] if self.head else prompt

    @property
    def answer_column(self) -> str:
        return self.label

    @cached_property
    def label_texts(self) -> tuple[str, ...]:
        return tuple(" " + self.wording.get(label, label) for label in self.labels or ())

    @cached_property
    def _indices(self) -> dict[str, int]:
        """label → its position, the first of several."""
        return {label: n for n, label in reversed([*enumerate(self.labels or ())])}

    def with_labels(self, rows: Sequence[Row]) -> Self:
        """This task with its labels known. Raises DataError for a single or an unknown class."""
        if self.labels is not None:
            labels = list(self.labels)
        else:
            labels = sorted({text_of(row, self.label).strip() for row in rows})
        where = f"{rows[0].place.rsplit(', ', 1)[0]}, column {self.label!r}" if rows else self.label
        if len(labels) < 2:
            raise DataError(
                where=where,
                expected="at least two classes",
                found=f"only {listed(map(shown, labels))}",
                hint="Name the column that holds the labels, or add rows of another class.",
            )
        task = self._spelled_as(labels)
        for name in ([task.positive] if task.positive else []) + list(task.wording):
            if name not in labels:
                raise DataError(
                    where=where,
                    expected=f"the class {name!r} that the domain names",
                    found="classes " + listed(labels),
                    hint=did_you_mean(name, labels),
                )
        return replace(task, labels=tuple(labels))

    def _spelled_as(self, labels: Sequence[str]) -> Self:
        """This task with the positive class spelled as in ``labels``: ``Urgent``, ``urgent``."""
        return replace(self, positive=self.positive and spelling(self.positive, labels))

    def with_default_labels(self, labels: tuple[str, ...] | None) -> Self:
        if self.labels is not None or labels is None:
            return self
        return replace(self._spelled_as(labels), labels=labels)

    def with_options(self, **options: Any) -> Self:
        """This task with fields replaced, and those that depend on them reset.

        Other columns drop ``prompt``, which names the former ones; no positive class drops its
        target; one target replaces the other.
        """
        reset: dict[str, None] = {}
        if "text" in options or "label" in options:
            reset["prompt"] = None
        positive = options.get("positive", self.positive)
        if positive is None or "target_recall" in options or "target_precision" in options:
            reset |= {"target_recall": None, "target_precision": None}
        return super().with_options(**(reset | options))

    def example(self, row: Row) -> Example:
        label = text_of(row, self.label).strip()
        target = self._indices.get(label)
        if target is None:
            labels = self.labels or ()
            near = get_close_matches(label, labels) or len(labels) <= MOST_LISTED
            raise DataError(
                where=f"{row.place}, column {self.label!r}",
                expected="one of the labels " + listed(labels),
                found=shown(label),
                hint=did_you_mean(label, labels)
                if near
                else "Correct the row, or declare every class: labels=(…).",
            )
        texts = self.label_texts
        prompt, text = filled(self.template, row)
        return Example(
            row.id, prompt, texts[target], texts, target, place=row.place,
            text=text, literal=literal_text(self.template), whole=True,
        )  # fmt: skip
