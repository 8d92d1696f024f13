"""Tasks: how a row becomes a prompt and an answer, and how an answer is scored. No torch."""

from lora_domains.tasks.answers import last_number, without_reasoning
from lora_domains.tasks.base import (
    KINDS,
    LossUnit,
    Outputs,
    ScoredBy,
    Task,
    hashed_record,
    positive_index,
    register,
    task_from_record,
    task_record,
    upgraded_record,
)
from lora_domains.tasks.classification import (
    Classification,
    merged,
    plain_label,
    spelling,
    spellings,
    twins,
)
from lora_domains.tasks.generation import Chat, Generation, LanguageModelling
from lora_domains.tasks.multi_label import MultiLabel
from lora_domains.tasks.multiple_choice import MultipleChoice, Preference
from lora_domains.tasks.number import Number
from lora_domains.tasks.rows import (
    Example,
    Row,
    columns_in,
    fill,
    is_null,
    plain_text,
    shown,
    text_of,
)

__all__ = [
    "KINDS",
    "Chat",
    "Classification",
    "Example",
    "Generation",
    "LanguageModelling",
    "LossUnit",
    "MultiLabel",
    "MultipleChoice",
    "Number",
    "Outputs",
    "Preference",
    "Row",
    "ScoredBy",
    "Task",
    "columns_in",
    "fill",
    "hashed_record",
    "is_null",
    "last_number",
    "merged",
    "plain_label",
    "plain_text",
    "positive_index",
    "register",
    "shown",
    "spelling",
    "spellings",
    "task_from_record",
    "task_record",
    "text_of",
    "twins",
    "upgraded_record",
    "without_reasoning",
]
