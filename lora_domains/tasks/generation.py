"""Generation: rows with a free-text answer; and language modelling: plain text without one."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self, get_args

from lora_domains.errors import DomainError, listed
from lora_domains.tasks.answers import answer_scores, number_score
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.classification import TextTask
from lora_domains.tasks.rows import (
    Example,
    Row,
    text_of,
)

Judge = Literal["text", "number"]


@register
@dataclass(frozen=True)
class Generation(TextTask):
    """Rows with a free-text answer, generated greedily and compared with the reference.

    A generated answer ends before ``until``. ``judge`` says what is compared: the words, or the
    last number in each text (for calculations whose steps may differ). With ``chat`` the base's
    chat template renders the text as a turn of the user, after an ``instruction`` if one is given;
    by default (None) it does on a base that was trained on chats, unless there is a prompt. With
    ``thinking`` it may think first, where the template has a switch for that; by default (None)
    where most answers to learn do.
    """

    text: str | tuple[str, ...] = "question"
    answer: str = "answer"
    prompt: str | None = None
    max_new_tokens: int = 64
    judge: Judge = "text"
    until: str = ""
    chat: bool | None = None
    instruction: str | None = None
    thinking: bool | None = None

    kind = "generation"
    aliases: ClassVar = {"label": "answer"}
    scored_by = "text"
    metric = "token_f1"

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("judge", self.judge in get_args(Judge), listed(get_args(Judge))),
        ):
            if not holds:
                raise DomainError(
                    where=f"generation, setting {name!r}",
                    expected=expected,
                    found=repr(getattr(self, name)),
                    hint="Change it in the recipe or on the command line.",
                )

    @property
    def answer_column(self) -> str:
        return self.answer

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        needed = {"question", "answer"}
        return cls() if needed <= {*columns} and "choices" not in columns else None

    def example(self, row: Row) -> Example:
        answer = " " + text_of(row, self.answer).strip()
        return replace(self.unlabelled(row), answer=answer)

    @property
    def score_keys(self) -> frozenset[str]:
        if self.judge == "number":
            return frozenset({"f1", "exact", "number", "judge", "nats", "tokens"})
        return super().score_keys

    @property
    def ends(self) -> tuple[str, ...]:
        return (self.until,) if self.until else ()

    def answer_in(self, text: str) -> str:
        """What follows the reasoning and comes before ``until``."""
        text = super().answer_in(text)
        return text.split(self.until)[0].strip() if self.until else text

    def score_text(self, text: str, reference: str) -> dict[str, float]:
        """See ``answers``. Where ``judge`` is "number", ``f1`` and ``exact`` are 1 if the last
        numbers are equal, else 0."""
        text = self.answer_in(text)
        if self.judge == "text":
            return answer_scores(text, reference)
        number = number_score(text, reference)
        right = number.get("number", 0.0)
        return {"f1": right, "exact": right, **number}


@register
@dataclass(frozen=True)
class LanguageModelling(Task):
    """Plain text; every token is supervised. Long texts are read in windows, none is truncated."""

    text: str = "text"

    kind = "language_modelling"
    predictable = False
    metric = "nats_per_token"
    template = ""
    answer_column = None

    @property
    def input_columns(self) -> tuple[str, ...]:
        return (self.text,)

    def example(self, row: Row) -> Example:
        return Example(row.id, "", text_of(row, self.text), place=row.place)
