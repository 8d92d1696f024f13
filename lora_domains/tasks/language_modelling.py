"""Language modelling: plain text, all of it supervised."""

from dataclasses import dataclass

from lora_domains.tasks.base import Task, register
from lora_domains.tasks.rows import Example, Row, text_of


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
