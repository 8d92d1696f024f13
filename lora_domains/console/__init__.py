"""What people see of a run in a terminal, in a log, or in a notebook, how long it takes, and the
files of rows that are answered."""

from lora_domains.console.clock import (
    EVALUATION,
    GENERAL,
    HEAD,
    STEPS,
    VALIDATION,
    Clock,
    estimated_phases,
    format_duration,
    phases_in_words,
    spread,
)
from lora_domains.console.display import Display, format_bytes

__all__ = [
    "EVALUATION", "GENERAL", "HEAD", "STEPS", "VALIDATION", "Clock", "Display", "estimated_phases",
    "format_bytes", "format_duration", "phases_in_words", "spread",
]  # fmt: skip
