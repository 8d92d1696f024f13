"""One text or conversation answered by the base and by an adapter, side by side, as HTML."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from lora_domains.analysis.trace import word_effects
from lora_domains.data.readers import read
from lora_domains.data.source import Reading
from lora_domains.errors import LoraDomainsError
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.predict import Answer, Labels, Prediction, length_of, task_of
from lora_domains.inference.scores import renormalise
from lora_domains.model import DomainModel
from lora_domains.modeling.batching import tokenization_of
from lora_domains.report.conclusion import conclusion
from lora_domains.serving.answers import label_text
from lora_domains.tasks import Example

ASSETS = Path(__file__).parent / "assets"
MOST_ROWS = 10
"""Answered rows that are shown; all are in the file."""
MOST_LABELS = 8
"""Labels that are shown of a text, the most likely ones."""
SENTENCE_END = re.compile(r"(?<=[.]) (?=[A-Z])")
Message = Mapping[str, str]


@dataclass(frozen=True)
class Bar:
    """A label and its probability by the base (None: it has none) and by the adapter."""

    label: str
    base: float | None
    adapter: float
    answered: bool


@dataclass(frozen=True)
class Comparison:
    """What the base and an adapter answer to one text. It contains the text: show it only."""

    name: str
    base: str | None
    """The answer of the base; None where only a trained head can answer."""
    adapter: str
    bars: tuple[Bar, ...]
    more: int
    """Labels that are not among the ``bars``."""
    words: Mapping[str, Sequence[tuple[str, float]]]
    """By column, the words of the text and their effects, as shares of the largest one."""
    swap: float
    """Seconds that switching to the adapter took."""
    seconds: float
    """Seconds of the adapter's answer."""


def compare(model: DomainModel, text: str | Mapping[str, Any], name: str) -> Comparison:
    """``text`` answered by the base and by the loaded adapter ``name``.

    Raises what ``DomainModel.predict`` raises.
    """
    start = time.perf_counter()
    with model.using(name):
        swapped = time.perf_counter()
        (answer,) = model.predict(text)
        ended = time.perf_counter()
    base = _base_answer(model, text, name)
    chances = base.probabilities if isinstance(base, Prediction) else {}
    bars = _bars(answer, chances)
    effects = word_effects(model, text, name, answer)
    sizes = [abs(effect) for words in effects.values() for _, effect in words]
    largest = max(sizes, default=0.0) or 1.0
    return Comparison(
        name=name,
        base=None if base is None else label_text(base),
        adapter=label_text(answer),
        bars=tuple(bars[:MOST_LABELS]),
        more=len(bars[MOST_LABELS:]),
        words={
            column: [(word, effect / largest) for word, effect in words]
            for column, words in effects.items()
        },
        swap=swapped - start,
        seconds=ended - swapped,
    )


def _base_answer(model: DomainModel, text: str | Mapping[str, Any], name: str) -> Answer | None:
    """The answer of the base to the prompt of the adapter ``name``; None without its head."""
    bank = model.bank
    task = task_of(bank, name)
    if bank[name].head is not None:
        return None
    example = task.to_predict(text, 0)
    if task.max_new_tokens:
        return _generated(model, None, example, name)
    item = tokenization_of(bank.base, task, length_of(bank, name)).encode(example)
    with bank.routed(None):
        (scores,) = choice_logprobs(bank.base.model, [item], bank.base.pad)
    labels, shares = task.labels or (), np.exp(renormalise(scores)).tolist()
    best = int(np.argmax(shares))
    return Prediction(labels[best], shares[best], dict(zip(labels, shares, strict=True)))


def _generated(model: DomainModel, route: str | None, example: Example, name: str) -> str:
    """What ``route`` generates for ``example``, prompted as the adapter ``name`` is."""
    bank = model.bank
    task = task_of(bank, name)
    item = tokenization_of(bank.base, task, length_of(bank, name)).encode(example)
    with bank.routed(route):
        (text,) = generate_in_batches(
            bank.base.model, bank.base.tokenizer, [item], task.max_new_tokens
        )
    return task.answer_in(text)


def _bars(answer: Answer, base: Mapping[str, float]) -> list[Bar]:
    """The labels of an answer, the most likely ones first."""
    if not isinstance(answer, Prediction | Labels):
        return []
    named = answer.labels if isinstance(answer, Labels) else (answer.label,)
    bars = [
        Bar(label, base.get(label), chance, label in named)
        for label, chance in answer.probabilities.items()
    ]
    return sorted(bars, key=lambda bar: -max(bar.adapter, bar.base or 0.0))


# ── Conversations ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Talk:
    """A conversation with the base or an adapter, and the seconds of its last answer."""

    name: str | None
    """The adapter; None is the base."""
    messages: tuple[Message, ...] = ()
    seconds: float = 0.0


def turn(model: DomainModel, talk: Talk, text: str, like: str) -> Talk:
    """``talk`` with the turn ``text`` of the user and the answer to it.

    ``like`` is the adapter whose prompts the base gets. Raises DataError for a conversation that
    the base's chat template cannot render.
    """
    messages = (*talk.messages, {"role": "user", "content": text})
    example = task_of(model.bank, like).to_answer(messages)
    start = time.perf_counter()
    said = _generated(model, talk.name, example, like)
    turns = (*messages, {"role": "assistant", "content": said})
    return replace(talk, messages=turns, seconds=time.perf_counter() - start)


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────


def headings(model: DomainModel, names: Sequence[str]) -> dict[str, dict[str, str]]:
    """The verdict of each adapter, and the first sentence of its card."""
    found = {}
    for name in names:
        card = model.bank[name].card
        known = card is not None and card.adapter.verdict is not None
        sentence = "Its folder has no card: it was not evaluated here."
        if card is not None:
            sentence = SENTENCE_END.split(conclusion(card.adapter))[0]
        verdict = card.adapter.verdict if card is not None and known else None
        found[name] = {"verdict": verdict or "not evaluated", "sentence": sentence}
    return found


def comparisons_html(model: DomainModel, texts: Mapping[str, str | Mapping[str, Any]]) -> str:
    """The comparison of each adapter on its text; where there is none, the error instead."""
    panels: list[tuple[str, Comparison | LoraDomainsError]] = []
    for name, text in texts.items():
        try:
            panels.append((name, compare(model, text, name)))
        except LoraDomainsError as error:
            panels.append((name, error))
    return _template("answers.html").render(panels=panels, headings=headings(model, list(texts)))


def talks_html(
    model: DomainModel, talks: Sequence[Talk], error: LoraDomainsError | None = None
) -> str:
    """Conversations side by side."""
    names = [talk.name for talk in talks if talk.name is not None]
    return _template("talks.html").render(
        talks=talks, headings=headings(model, names), base=model.base.id, error=error
    )


def error_html(error: LoraDomainsError) -> str:
    """An error in the page."""
    return _template("error.html").render(found=error)


def rows_html(path: Path, note: str) -> str:
    """The first rows of a file, and what was noted about it."""
    rows = [row.values for row in read(str(path), "input", Reading(most=MOST_ROWS))]
    columns = list(dict.fromkeys(name for row in rows[:MOST_ROWS] for name in row))
    return _template("rows.html").render(rows=rows[:MOST_ROWS], columns=columns, note=note)


@cache
def _template(name: str) -> jinja2.Template:
    loader = jinja2.FileSystemLoader(ASSETS)
    environment = jinja2.Environment(
        autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters["time"] = _time
    return environment.get_template(name)


def _time(seconds: float) -> str:
    """``0.04 ms``, ``35 ms``, ``2.1 s``."""
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.2g} ms" if seconds < 0.01 else f"{1000 * seconds:.0f} ms"
