"""Classification: rows with one of a few labels, and which labels are one and the same.

``TextTask`` is what it shares with the other kinds that read a text.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from typing import Any, ClassVar, Self

from lora_domains.errors import MOST_LISTED, DataError, DomainError, did_you_mean, listed
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.rows import (
    Example,
    Row,
    fill,
    placeholder,
    prompt_from,
    shown,
    text_of,
    user_turn,
)

USUAL_LABELS = ("label", "labels", "class", "category", "target", "y")
"""Names of label columns that say nothing about the labels."""
MOST_NAMED = 30
"""The most labels that an instruction names: each row reads all of them."""
WHOLE_NUMBER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")
TRUTH = {"true": "1", "false": "0"}
TYPOGRAPHY = str.maketrans("_‐‑‒–—−‘’“”„", ' ------\'\'"""')
VARIATIONS = frozenset(map(chr, range(0xFE00, 0xFE10)))
"""They choose the colour or the shape of the character before them."""


class TextTask(Task):
    """A task that reads a text of each row, from one column or several (``text``).

    Subclasses have the fields ``text`` and ``prompt``, and ``instruction`` if they have ``chat``.
    """

    text: str | tuple[str, ...]
    prompt: str | None
    instruction: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def question(self) -> str | None:
        """The instruction of a chat template where the task declares none, and no prompt."""
        return None

    @cached_property
    def content(self) -> str:
        """The template of what a head reads, and of the user's turn in a chat template."""
        if self.prompt is not None:
            return self.prompt
        return placeholder(self.texts[0]) if len(self.texts) == 1 else prompt_from(self.texts)

    @cached_property
    def template(self) -> str:
        bare = self.head or self.prompt is not None
        return self.content if bare else prompt_from(self.texts, self.answer_column)

    def with_chat(self, chat: bool, thinking: bool | None = False) -> Self:
        return super().with_chat(chat and not self.head and self.prompt is None, thinking)

    def turns(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        if self.head or self.chat is False:
            return ()
        question = self.question if self.prompt is None else None
        return user_turn(self.instruction or question, fill(self.content, row))

    def with_head(self) -> Self | None:
        asked_in_chat = self.chat or self.instruction
        has_heads = any(field.name == "head" for field in fields(self))
        return self.with_options(head=True) if has_heads and not asked_in_chat else None

    def with_options(self, **options: Any) -> Self:
        """This task with fields replaced; other columns drop ``prompt``, which names the former."""
        reset = {"prompt": None} if options.keys() & {"text", "label", "answer"} else {}
        return super().with_options(**(reset | options))


@register
@dataclass(frozen=True)
class Classification(TextTask):
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

    With ``chat`` the base's chat template renders the text as a turn of the user, after an
    ``instruction`` that names the labels unless it is given, and the label as the answer. By
    default (None) it does on a base that was trained on chats, unless there is a head or a prompt.
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
    chat: bool | None = None
    instruction: str | None = None

    kind = "classification"
    loss_unit = "label cross-entropy"
    scored_by = "choices"
    has_labels = True
    renamed: ClassVar = {"wanted_recall": "target_recall", "wanted_precision": "target_precision"}

    def __post_init__(self) -> None:
        if self.head and (self.chat or self.instruction):
            raise DomainError(
                where="classification",
                expected="a head, which reads the text alone, or a chat template",
                found="both",
                hint="Leave out head=True (--head), or chat=True and the instruction.",
            )
        targets = self.targets
        if not targets:
            return
        if self.positive is None or len(targets) > 1 or not 0 < min(targets.values()) < 1:
            raise DomainError(
                where="classification",
                expected="a positive class and one target recall or precision, above 0 and below 1",
                found=f"positive {self.positive!r}, "
                + ", ".join(f"target {name} {target:g}" for name, target in targets.items()),
                hint="For example --positive urgent --target-recall 0.9, or in Python "
                'Classification(positive="urgent", target_recall=.9).',
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

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        return cls() if {"text", "label"} <= {*columns} else None

    @cached_property
    def question(self) -> str:
        """The instruction that names the labels: "Is the text below ham or spam?"."""
        usual = self.label.lower() in USUAL_LABELS
        subject = "the text below" if usual else f"the {self.label} of the text below"
        *others, last = [text.strip() for text in self.label_texts] or [""]
        if not others or len(others) >= MOST_NAMED:
            return f"What is {'the label of ' * usual}{subject}? Answer with the label."
        return f"Is {subject} {', '.join(others)} or {last}?"

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
        targets, positive = ("target_recall", "target_precision"), self.positive
        changed = options.get("positive", positive) is None or options.keys() & {*targets}
        reset = dict.fromkeys(targets) if changed else {}
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
                else "Correct the row, or declare every class: --set 'task.labels=[…]' with the "
                "names as a JSON list, or labels=(…) in a recipe.",
            )
        return replace(self.unlabelled(row), answer=self.label_texts[target], target=target)


# ── Spellings of labels ─────────────────────────────────────────────────────────────────────────
#
# Labels are the same to a reader in another case, with other accents, spaces or number form.


def plain_label(label: str) -> str:
    """``label``, whole numbers and truth values in one form: ``1`` of 1.0, ``01`` and True.

    A column of 0 and 1 becomes 0.0 and 1.0 where one cell is empty, or where pandas reads it.
    """
    if not label[:1].isdigit() and label[:1] not in ("+", "-", "t", "T", "f", "F"):
        return label
    number = WHOLE_NUMBER.fullmatch(label)
    if number is None:
        return TRUTH.get(label.lower(), label)
    return ("-" if number[1] == "-" and number[2] != "0" else "") + number[2]


def label_key(label: str) -> str:
    """What two spellings of one label share.

    Only Latin letters lose their accents: in other scripts marks make another letter. An underscore
    is a space, and there is one kind of dash and of apostrophe.
    """
    kept: list[str] = []
    for letter in unicodedata.normalize("NFKD", label).translate(TYPOGRAPHY):
        base = next((one for one in reversed(kept) if not unicodedata.combining(one)), "")
        accent = unicodedata.combining(letter) and "LATIN" in unicodedata.name(base or " ", "")
        # The tags of Unicode, which tell the flags of regions apart, are invisible too.
        hidden = unicodedata.category(letter) == "Cf" and letter < "\U000e0000"
        if not accent and not hidden and letter not in VARIATIONS:
            kept.append(letter)
    folded = "".join(unicodedata.normalize("NFC", "".join(kept)).casefold().split())
    number = WHOLE_NUMBER.fullmatch(folded)
    return ("-" if number[1] == "-" and number[2] != "0" else "") + number[2] if number else folded


def twins(labels: Iterable[str]) -> list[list[str]]:
    """The labels that share a key with another, in lists, in the order of ``labels``."""
    by_key: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        by_key.setdefault(label_key(label), []).append(label)
    return [several for several in by_key.values() if len(several) > 1]


def merged(counts: Mapping[str, int]) -> dict[str, str]:
    """label → the most frequent of its spellings, the first in order among equals."""
    return {
        label: min(several, key=lambda one: (-counts[one], one))
        for several in twins(sorted(counts))
        for label in several
    }


def spellings(labels: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """label → as ``known`` spells it, where exactly one of them shares its key."""
    by_key: dict[str, list[str]] = {}
    for one in known:
        by_key.setdefault(label_key(one), []).append(one)
    same = {label: by_key.get(label_key(label), []) for label in labels}
    return {label: few[0] if len(few) == 1 else label for label, few in same.items()}


def spelling(label: str, known: Iterable[str]) -> str:
    """``label`` as ``known`` spells it, where exactly one of them shares its key."""
    return spellings([label], known)[label]
