"""Rows for tests of the data room, and the check of an error's message."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from support.rows import SECRET

from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.errors import DataError, LoraDomainsError
from lora_domains.tasks import Classification, Example, Task

SPAM = Classification(positive="spam")
quick = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def table(n: int, spam_every: int = 3, start: int = 0) -> list[dict[str, str]]:
    """``n`` rows, every third one spam."""
    return [
        {"text": f"message number {i}", "label": "spam" if i % spam_every == 0 else "ham"}
        for i in range(start, start + n)
    ]


def write(path: Path, content: str | bytes) -> Path:
    """``path``, with ``content`` written to it."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(
    step: Callable[[], object], *parts: str, kind: type[LoraDomainsError] = DataError
) -> str:
    """The message of the error that ``step`` raises, with all ``parts`` and without the secret."""
    with pytest.raises(kind) as caught:
        step()
    message = str(caught.value)
    assert SECRET not in message
    for part in parts:
        assert part in message, f"{part!r} is not in {message!r}"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def refuses(rows: Iterable[dict[str, Any]], *parts: str, task: Task = SPAM, **data: Any) -> str:
    """The message of the error that preparing ``rows`` raises."""
    return refused(lambda: prepare(task, Data(list(rows), **data)), *parts)


def examples(texts: Iterable[str], split: str) -> list[Example]:
    """An example for each text, all with the same answer."""
    return [Example(f"{split}:{i}", text, " x") for i, text in enumerate(texts)]
