"""Generation: rows with a free-text answer; and language modelling: plain text without one."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from lora_domains.errors import DomainError, listed
from lora_domains.tasks.answers import answer_scores, number_score
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.rows import (
    Example,
    Row,
    fill,
    filled,
    literal_text,
    placeholder,
    prompt_from,
    text_of,
    user_turn,
)

Judge = Literal["text", "number"]


@register
@dataclass(frozen=True)
class Generation(Task):
    """Rows with a free-text answer, generated greedily and compared with the reference.

    A generated answer ends before ``until``. ``judge`` says what is compared: the words, or the
    last number in each text (for calculations whose steps may differ). With ``chat`` the base's
    chat template renders the text as a turn of the user, after an ``instruction`` if one is given;
    by default (None) it does on a base that was trained on chats, unless there is a prompt.
    """

    text: str | tuple[str, ...] = "question"
    answer: str = "answer"
    prompt: str | None = None
    max_new_tokens: int = 64
    judge: Judge = "text"
    until: str = ""
    chat: bool | None = None
    instruction: str | None = None

    kind = "generation"
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
    def template(self) -> str:
        if self.prompt is not None:
            return self.prompt
        return prompt_from(self.texts, self.answer)

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the text."""
        return (self.text,) if isinstance(self.text, str) else tuple(self.text)

    @property
    def answer_column(self) -> str:
        return self.answer

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        needed = {"question", "answer"}
        return cls() if needed <= {*columns} and "choices" not in columns else None

    def with_options(self, **options: Any) -> Self:
        """This task with fields replaced; ``label`` is the column of the answer.

        Other columns drop ``prompt``, which names the former.
        """
        if "label" in options:
            options["answer"] = options.pop("label")
        reset = {"prompt": None} if options.keys() & {"text", "answer"} else {}
        return super().with_options(**(reset | options))

    def with_chat(self, chat: bool) -> Self:
        return super().with_chat(chat and self.prompt is None)

    def turns(self, row: Row) -> tuple[Mapping[str, Any], ...]:
        if self.chat is False:
            return ()
        one = len(self.texts) == 1
        content = placeholder(self.texts[0]) if one else prompt_from(self.texts)
        return user_turn(self.instruction, fill(self.prompt or content, row))

    def example(self, row: Row) -> Example:
        answer = " " + text_of(row, self.answer).strip()
        prompt, text = filled(self.template, row)
        literal = literal_text(self.template)
        return Example(
            row.id, prompt, answer, place=row.place, text=text, literal=literal,
            messages=self.turns(row),
        )  # fmt: skip

    @property
    def score_keys(self) -> frozenset[str]:
        if self.judge == "number":
            return frozenset({"f1", "exact", "number", "judge", "nats", "tokens"})
        return super().score_keys

    def answer_in(self, text: str) -> str:
        """What comes before ``until``."""
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
