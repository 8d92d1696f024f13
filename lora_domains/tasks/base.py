"""How a row becomes a prompt and an answer, and how an answer is judged. No torch.

A task is a frozen value. ``example(row)`` is its one important function: a pure function from a
row to an :class:`Example`, which is all that encoding, scoring and the baselines ever see.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from string import Formatter
from typing import Any, Literal

from lora_domains.errors import DataError, DomainError, did_you_mean, listed

LossUnit = Literal["label cross-entropy", "nats per answer token"]


@dataclass(frozen=True)
class Row:
    """One row as read: its values, and where it stands (for messages; never its text)."""

    values: Mapping[str, Any]
    split: str
    number: int
    """Position in its split, from 0."""
    place: str
    """Where a person finds it: ``train.csv, line 17``."""

    @property
    def id(self) -> str:
        """Stable, and free of the row's contents: a column called ``id`` may name a patient."""
        return f"{self.split}:{self.number}"


@dataclass(frozen=True)
class Example:
    """One item: what the model is shown and what it should say.

    ``answer`` and ``choices`` start with the space that separates them from the prompt. ``target``
    is the index of the right choice, -1 where the answer is free text.
    """

    id: str
    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    target: int = -1
    group: str | None = None
    slices: Mapping[str, str] = field(default_factory=dict)
    place: str = ""


def is_null(value: object) -> bool:
    """None, NaN, or one of pandas' own (which cannot be compared, and need no pandas here)."""
    nan = isinstance(value, float) and math.isnan(value)
    return value is None or nan or type(value).__name__ in {"NAType", "NaTType"}


def shown(label: str) -> str:
    """A label for a message; a long one may be a row's text in the wrong column: its length."""
    return repr(label) if len(label) <= 40 else f"a text of {len(label)} characters"


def text_of(row: Row, column: str) -> str:
    """The text in ``column``; raises DataError when it is missing, null or only whitespace."""
    if column not in row.values:
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected=f"a column named {column!r}",
            found="columns " + listed(row.values),
            hint=did_you_mean(column, row.values),
        )
    value = row.values[column]
    text = "" if is_null(value) else str(value)
    if not text.strip():
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="text",
            found="null" if is_null(value) else "only whitespace" if text else "''",
            hint="Fill the cell or delete the row.",
        )
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise DataError(
            where=f"{row.place}, column {column!r}",
            expected="text that can be encoded as UTF-8",
            found="half of a surrogate pair, as a cut emoji leaves it",
            hint="Take it out, or export the rows again.",
        )
    return text


def fill(template: str, row: Row) -> str:
    """``template`` with each ``{column}`` replaced by the row's text in that column."""
    return "".join(
        literal + (text_of(row, name).strip() if name else "")
        for literal, name, _, _ in Formatter().parse(template)
    )


def columns_in(template: str) -> tuple[str, ...]:
    """The columns a prompt template names, in order; raises DomainError when it cannot be read."""
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        if "" in names:
            raise ValueError("a place without a name: {}")
        return tuple(names)
    except ValueError as error:
        raise DomainError(
            where=f"prompt {template!r}",
            expected="text with {column} places; a literal brace is written twice",
            found=str(error),
            hint="Write {{ and }} for braces that are not places.",
        ) from None


@dataclass(frozen=True)
class Classification:
    """Rows with one of a few labels; the labels are scored as text after the prompt.

    With ``head`` a linear layer is trained instead, from the text's last hidden state to the
    labels, as sequence classifiers have it: the only way on an encoder (BERT), and the cheaper one
    with many labels. What is read is then the text alone unless ``prompt`` says otherwise.
    ``text`` names one column or several. ``labels`` is read from the training rows where it is not
    given. ``positive`` is the class whose recall and precision matter (`urgent`, `spam`); with
    ``wanted_recall`` or ``wanted_precision`` it is named from the probability on that reaches it on
    the validation rows, instead of where it is the likeliest. ``wording`` gives a label another
    text for the model (`{"Terms": "general terms"}`).
    """

    text: str | tuple[str, ...] = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = None
    positive: str | None = None
    prompt: str | None = None
    wording: Mapping[str, str] = field(default_factory=dict)
    head: bool = False
    wanted_recall: float | None = None
    wanted_precision: float | None = None

    kind = "classification"
    loss_unit: LossUnit = "label cross-entropy"

    def __post_init__(self) -> None:
        wishes = self.wanted
        if not wishes:
            return
        if self.positive is None or len(wishes) > 1 or not 0 < min(wishes.values()) <= 1:
            raise DomainError(
                where="classification",
                expected="a positive class and one wanted recall or precision, above 0, at most 1",
                found=f"positive {self.positive!r}, wanted {wishes}",
                hint='For example Classification(positive="urgent", wanted_recall=.9).',
            )

    @property
    def wanted(self) -> dict[str, float]:
        """The wish for the positive class, ``{"recall": .9}``; empty where there is none."""
        wishes = {"recall": self.wanted_recall, "precision": self.wanted_precision}
        return {name: wish for name, wish in wishes.items() if wish is not None}

    @property
    def metric(self) -> str:
        """The domain metric: F1 of the positive class, else macro-F1 (all classes alike)."""
        return "f1" if self.positive else "macro_f1"

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def template(self) -> str:
        if self.prompt is not None:
            return self.prompt
        if self.head and len(self.texts) == 1:
            return f"{{{self.texts[0]}}}"
        named = "\n".join(f"{c}: {{{c}}}" for c in self.texts)
        return named if self.head else f"{named}\n{self.label}:"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*columns_in(self.template), self.label)

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(" " + self.wording.get(label, label) for label in self.labels or ())

    def with_labels(self, rows: Sequence[Row]) -> "Classification":
        """This task with its labels known; raises DataError for one class, or an unknown one."""
        if self.labels is not None:
            found = list(self.labels)
        else:
            found = sorted({text_of(row, self.label).strip() for row in rows})
        where = f"{rows[0].place.rsplit(', ', 1)[0]}, column {self.label!r}" if rows else self.label
        if len(found) < 2:
            raise DataError(
                where=where,
                expected="at least two classes",
                found=f"only {listed(map(shown, found))}",
                hint="Name the column that holds the labels, or add rows of another class.",
            )
        for name in ([self.positive] if self.positive else []) + list(self.wording):
            if name not in found:
                raise DataError(
                    where=where,
                    expected=f"the class {name!r} that the domain names",
                    found="classes " + listed(found),
                    hint=did_you_mean(name, found),
                )
        return replace(self, labels=tuple(found))

    def example(self, row: Row) -> Example:
        label = text_of(row, self.label).strip()
        labels = self.labels or ()
        if label not in labels:
            raise DataError(
                where=f"{row.place}, column {self.label!r}",
                expected="one of the labels " + listed(labels),
                found=shown(label),
                hint=did_you_mean(label, labels)
                if get_close_matches(label, labels) or len(labels) <= 8
                else "Mend the row, or declare every class: labels=(…).",
            )
        target = labels.index(label)
        choices = self.choices
        prompt = fill(self.template, row)
        return Example(row.id, prompt, choices[target], choices, target, place=row.place)

    def unlabelled(self, row: Row) -> Example:
        """An item to predict: no label is needed in the row."""
        return Example(row.id, fill(self.template, row), "", self.choices, place=row.place)


@dataclass(frozen=True)
class MultipleChoice:
    """Questions with their own candidate answers, each scored as a continuation of the prompt.

    ``answer`` holds the index of the right choice, its letter (A, B, …) or its text. With
    ``per_token`` a candidate's likelihood is divided by its tokens, so that long ones are not at a
    disadvantage (Brown et al. 2020, arXiv 2005.14165, section 2.4).
    """

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    prompt: str = "Question: {question}\nAnswer:"
    per_token: bool = False

    kind = "multiple_choice"
    loss_unit: LossUnit = "label cross-entropy"
    metric = "accuracy"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*columns_in(self.prompt), self.choices, self.answer)

    def with_labels(self, rows: Sequence[Row]) -> "MultipleChoice":
        return self

    def example(self, row: Row) -> Example:
        raw = row.values.get(self.choices)
        if isinstance(raw, str):  # a table's cell
            try:
                raw = json.loads(raw)
            except ValueError:
                raw = None
        if isinstance(raw, Mapping):  # {"A": …, "B": …}
            raw = list(raw.values())
        if not isinstance(raw, Sequence) or isinstance(raw, str) or len(raw) < 2:
            raise DataError(
                where=f"{row.place}, column {self.choices!r}",
                expected="a list of at least two candidate answers",
                found=type(raw).__name__ if not isinstance(raw, list) else f"{len(raw)} answers",
                hint="Write the candidates as a JSON list.",
            )
        texts = [str(choice).strip() for choice in raw]
        choices = tuple(" " + text for text in texts)
        target = self._target(row, texts)
        prompt = fill(self.prompt, row)
        return Example(row.id, prompt, choices[target], choices, target, place=row.place)

    def _target(self, row: Row, texts: list[str]) -> int:
        value = row.values.get(self.answer)
        if isinstance(value, int) and 0 <= value < len(texts):
            return value
        text = str(value).strip()
        if text in texts:
            return texts.index(text)
        if text.isdecimal() and int(text) < len(texts):  # a table's cell
            return int(text)
        if len(text) == 1 and text.isascii() and text.isalpha():
            letter = ord(text.upper()) - ord("A")
            if letter < len(texts):
                return letter
        # "answer3" counts from 1, as in the sets that write it so.
        digits = text.removeprefix("answer")
        if digits.isdecimal() and text.startswith("answer") and 1 <= int(digits) <= len(texts):
            return int(digits) - 1
        raise DataError(
            where=f"{row.place}, column {self.answer!r}",
            expected=f"the index (0 to {len(texts) - 1}), letter or text of the right choice",
            found=repr(value) if isinstance(value, int) else "something else",
            hint="Write the index of the right choice, counted from 0.",
        )


@dataclass(frozen=True)
class Generation:
    """Rows with a free-text answer, generated greedily and compared with the reference.

    What is generated ends before ``until``. ``judge`` says what must agree: the words, or the last
    number in each (sums in words, whose working may differ).
    """

    text: str | tuple[str, ...] = "question"
    answer: str = "answer"
    prompt: str | None = None
    max_new_tokens: int = 64
    judge: Literal["text", "number"] = "text"
    until: str = ""

    kind = "generation"
    loss_unit: LossUnit = "nats per answer token"
    metric = "token_f1"

    @property
    def template(self) -> str:
        if self.prompt is not None:
            return self.prompt
        texts = (self.text,) if isinstance(self.text, str) else tuple(self.text)
        return "\n".join(f"{c}: {{{c}}}" for c in texts) + f"\n{self.answer}:"

    @property
    def columns(self) -> tuple[str, ...]:
        return (*columns_in(self.template), self.answer)

    def with_labels(self, rows: Sequence[Row]) -> "Generation":
        return self

    def example(self, row: Row) -> Example:
        answer = " " + text_of(row, self.answer).strip()
        return Example(row.id, fill(self.template, row), answer, place=row.place)

    def unlabelled(self, row: Row) -> Example:
        return Example(row.id, fill(self.template, row), "", place=row.place)


@dataclass(frozen=True)
class LanguageModelling:
    """Plain text; every token is supervised. Long texts are read in windows, none is cut off."""

    text: str = "text"

    kind = "language_modelling"
    loss_unit: LossUnit = "nats per answer token"
    metric = "nats_per_token"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def with_labels(self, rows: Sequence[Row]) -> "LanguageModelling":
        return self

    def example(self, row: Row) -> Example:
        return Example(row.id, "", text_of(row, self.text), place=row.place)


@dataclass(frozen=True)
class Harness:
    """A task of EleutherAI's lm-evaluation-harness, which asks and judges itself; for probes only.

    ``digest`` is of all it asks (see ``suites.harness``).
    """

    name: str
    digest: str

    kind = "harness"

    def example(self, row: Row) -> Example:
        """One document; what stands in it is for finding leaks, and is not what is scored."""
        return Example(row.id, str(row.values["text"]), "", place=row.place)


Task = Classification | MultipleChoice | Generation | LanguageModelling
KINDS: dict[str, type[Task]] = {
    kind.kind: kind for kind in (Classification, MultipleChoice, Generation, LanguageModelling)
}


def task_record(task: Task | Harness) -> dict[str, Any]:
    """The task as JSON, so that a saved adapter knows how it is asked."""
    return {"kind": task.kind, **asdict(task)}


def task_from_record(record: Mapping[str, Any]) -> Task:
    """The task of a card; raises DomainError for a kind or field this version does not know."""
    kind = KINDS.get(str(record.get("kind")))
    known = {f.name for f in fields(kind)} if kind else set()
    values = {k: v for k, v in record.items() if k != "kind"}
    if kind is None or not values.keys() <= known:
        raise DomainError(
            where="card",
            expected="a task of kind " + listed(KINDS),
            found=str(record.get("kind")),
            hint="Update lora-domains to read it.",
        )
    for name in ("labels", "text"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    return kind(**values)
