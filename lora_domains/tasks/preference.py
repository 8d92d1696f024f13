"""Preference: two answers to a prompt, of which one is better, learned by DPO."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any, Self

from lora_domains.errors import DataError, DomainError
from lora_domains.tasks.base import Task, register
from lora_domains.tasks.chat import Chat
from lora_domains.tasks.rows import Example, Row


@register
@dataclass(frozen=True)
class Preference(Task):
    """Pairs of answers, the chosen and the rejected one, in columns of text or of messages.

    The adapter learns to prefer the chosen answer more than the base does (direct preference
    optimisation, Rafailov et al. 2023, arXiv 2305.18290); the frozen base is the reference. The
    smaller ``beta``, the further it may move from the base. Without a ``prompt`` both columns hold
    whole conversations that differ in their last answer. ``system`` and ``tools`` are as in
    ``Chat``, and ``max_new_tokens`` are those of a predicted answer.
    """

    prompt: str | tuple[str, ...] | None = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    system: str | None = None
    tools: str | None = None
    beta: float = 0.1
    max_new_tokens: int = 256

    kind = "preference"
    loss_unit = "nats per answer token"
    trained_unit = "the DPO loss of a pair"
    scored_by = "choices"
    metric = "win_rate"
    template = ""
    chat = True
    score_keys = frozenset({"won", "ranked", "margin", "nats", "tokens"})

    def __post_init__(self) -> None:
        if not 0 < self.beta < inf:
            raise DomainError(
                where="preference, setting 'beta'",
                expected="above 0, and finite",
                found=repr(self.beta),
                hint="Usual values are 0.01 to 0.5.",
            )

    @property
    def answer_column(self) -> str:
        return self.chosen

    @property
    def input_columns(self) -> tuple[str, ...]:
        return self._conversation(self.chosen).input_columns if self.prompt is not None else ()

    @property
    def columns(self) -> tuple[str, ...]:
        return (*self.input_columns, self.chosen, self.rejected)

    @classmethod
    def from_columns(cls, columns: Collection[str]) -> Self | None:
        if not {"chosen", "rejected"} <= {*columns}:
            return None
        more: dict[str, Any] = {name: name for name in ("system", "tools") if name in columns}
        return cls(prompt="prompt" if "prompt" in columns else None, **more)

    def with_options(self, **options: Any) -> Self:
        """This task with fields replaced; ``text`` is the prompt, ``label`` the chosen answer."""
        names = {"text": "prompt", "label": "chosen"}
        return super().with_options(**{names.get(name, name): v for name, v in options.items()})

    def example(self, row: Row) -> Example:
        """The chosen answer is the first choice, and the correct one."""
        chosen, rejected = (
            self._conversation(column).example(row) for column in (self.chosen, self.rejected)
        )
        expected, found = "", ""
        if chosen.messages[:-1] != rejected.messages[:-1]:
            expected, found = "answers to the same turns", "turns before them that differ"
        elif chosen.answer == rejected.answer:
            expected, found = "two different answers", "the same one twice"
        if expected:
            raise DataError(
                where=f"{row.place}, columns {self.chosen!r} and {self.rejected!r}",
                expected=expected,
                found=found,
                hint="Delete the row.",
            )
        return replace(
            chosen, messages=chosen.messages[:-1], choices=(chosen.answer, rejected.answer),
            target=0, ended=True,
        )  # fmt: skip

    def unlabelled(self, row: Row) -> Example:
        return self._conversation(self.chosen).unlabelled(row)

    def to_predict(self, text: str | Mapping[str, Any], number: int) -> Example:
        return self._conversation(self.chosen).to_predict(text, number)

    def _conversation(self, answer: str) -> Chat:
        """The rows with the answer in one column, as a chat."""
        if self.prompt is None:
            return Chat(messages=answer, system=self.system, tools=self.tools)
        return Chat(user=self.prompt, assistant=answer, system=self.system, tools=self.tools)
