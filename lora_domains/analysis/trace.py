"""Why an adapter answers as it does on one text: what it read, how sure it is, which layers did it.

Two views of the layers, both in log-odds of the answer against the other labels (nats). *Read off
after each layer*: what the model would say if it ended there, by its own last norm and output layer
(the logit lens: nostalgebraist 2020, "interpreting GPT: the logit lens", lesswrong.com). *Adapter
up to a layer*: what it does say when the adapter acts in the first layers alone, the rest being the
base's (an ablation, as in Vig et al. 2020, arXiv 2004.12265; the steps add up to the whole change,
and what a layer is worth depends on the ones before it).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lora_domains.data.tokenization import EncodedExample, Tokenization
from lora_domains.errors import BaseModelError, UsageError
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.predict import length_of, task_of
from lora_domains.inference.scores import renormalise
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.routing import Single, entered
from lora_domains.tasks import Example, Task


@dataclass(frozen=True)
class Layer:
    """Log-odds of the answer against the other labels, in nats, at one layer (counted from 1)."""

    number: int
    base: float
    """Read off the base after this layer,"""
    adapter: float
    """and off the adapter."""
    upto: float
    """At the end, with the adapter acting in the layers up to this one."""
    moved: float
    """What this layer's share of the adapter added to that."""


@dataclass(frozen=True)
class Trace:
    """One text through base and adapter. It holds the text: for the screen, never for a file."""

    domain: str
    before: tuple[str, ...]
    """The tokens that were read, as text, left to right,"""
    cut: tuple[str, ...]
    """those cut from the middle because the text was too long,"""
    after: tuple[str, ...]
    """and those read after them."""
    labels: tuple[str, ...]
    base: tuple[float, ...]
    """Probabilities of ``labels``, and the adapter's."""
    adapter: tuple[float, ...]
    answer: str
    """The adapter's label."""
    start: float
    """Log-odds of ``answer`` without the adapter."""
    layers: tuple[Layer, ...]
    """None where there is one label only: base and adapter wrote the same words."""

    @property
    def most_moved(self) -> tuple[int, ...]:
        """The fewest layers that together made half of the whole change, by their number."""
        whole = sum(layer.moved for layer in self.layers)
        sign = math.copysign(1.0, whole)
        picked: list[int] = []
        left = abs(whole) / 2
        for layer in sorted(self.layers, key=lambda layer: -sign * layer.moved):
            if left <= 0:
                break
            picked.append(layer.number)
            left -= sign * layer.moved
        return tuple(sorted(picked))


def trace(model: DomainModel, text: str | Mapping[str, Any], name: str) -> Trace:
    """One text through the base and the loaded adapter ``name``: tokens, probabilities, layers.

    ``text`` is a string, or a row with the columns of the domain's prompt. Raises UsageError for an
    adapter without a card, and what ``trace_example`` does.
    """
    bank = model.bank
    task = task_of(bank, name)
    tokenization = Tokenization(bank.base.tokenizer, length_of(bank, name))
    return trace_example(bank, name, task, task.to_predict(text, 0), tokenization)


def trace_example(
    bank: Bank, name: str, task: Task, example: Example, tokenization: Tokenization
) -> Trace:
    """How the resident adapter ``name`` comes to its answer on ``example``, beside the base.

    Of a task without labels, what base and adapter write are the labels. Raises UsageError when
    it is not resident or has a trained head (the base's output layer, which is what layers are read
    by, has no part in its labels), BaseModelError when the layers of the base cannot be told.
    """
    if bank[name].head is not None:
        raise UsageError(
            where=name,
            expected="an adapter that answers in words",
            found="one with a trained head",
            hint="predict gives its labels with their probabilities.",
        )
    item = tokenization.encode(example)
    labels = task.labels or ()
    if not labels:
        labels, item = _written(bank, name, task, item, tokenization)
    before, cut, after = _tokens(tokenization, example, item)
    base, adapter = (_label_logprobs(bank, route, item) for route in (None, name))
    best = int(adapter.argmax())
    several = len(labels) > 1
    return Trace(
        domain=name,
        before=before,
        cut=cut,
        after=after,
        labels=labels,
        base=tuple(np.exp(base).tolist()),
        adapter=tuple(np.exp(adapter).tolist()),
        answer=labels[best],
        start=log_odds(base, best) if several else 0.0,
        layers=_layers(bank, name, item, best) if several else (),
    )


def log_odds(logprobs: np.ndarray, index: int) -> float:
    """Of one choice against all others together, in nats."""
    others = np.delete(logprobs, index)
    return float(logprobs[index] - np.logaddexp.reduce(others))


def _label_logprobs(
    bank: Bank, route: str | None, item: EncodedExample, model: Any = None
) -> np.ndarray:
    """Log-probabilities over the labels alone, (labels,); ``model`` is the base's, or a view."""
    with bank.routed(route):
        return _scored(bank, item, model)


def _scored(bank: Bank, item: EncodedExample, model: Any = None) -> np.ndarray:
    pad = bank.base.tokenizer.pad_token_id
    (scores,) = choice_logprobs(model or bank.base.model, [item], pad)
    return renormalise(scores)


def _written(
    bank: Bank, name: str, task: Task, item: EncodedExample, tokenization: Tokenization
) -> tuple[tuple[str, ...], EncodedExample]:
    """What base and adapter write, as the labels, the adapter's first; once if it is the same."""
    texts = []
    for route in (name, None):
        with bank.routed(route):
            model, tokenizer = bank.base.model, bank.base.tokenizer
            texts += generate_in_batches(model, tokenizer, [item], task.max_new_tokens)
    said = tuple(dict.fromkeys(texts))
    # With its end, or an answer that begins the other would always be the likelier one.
    coded = tuple((*tokenization.answer_tokens(" " + text), tokenization.eos) for text in said)
    return said, replace(item, choices=coded)


def _tokens(
    tokenization: Tokenization, example: Example, item: EncodedExample
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The prompt's tokens as text: before the cut, cut, after it (see ``Encoder.encode``)."""
    body = tokenization.tokens(example.prompt)
    kept = len(item.prompt) - len(tokenization.bos)
    head = kept // 2 if item.truncated else len(body)
    tail = head + len(body) - kept
    texts = [tokenization.tokenizer.decode([token]) for token in body]
    return tuple(texts[:head]), tuple(texts[head:tail]), tuple(texts[tail:])


# ── Layers ──────────────────────────────────────────────────────────────────────────────────────


def _layers(bank: Bank, name: str, item: EncodedExample, best: int) -> tuple[Layer, ...]:
    model = bank.base.model
    path, count = layer_list(model)
    whole = bank.route(name)
    assert isinstance(whole, Single)
    before = log_odds(_label_logprobs(bank, None, item), best)
    found = []
    for number in range(1, count + 1):
        view = ended_after(model, path, number)
        base, adapter = (
            log_odds(_label_logprobs(bank, route, item, view), best) for route in (None, name)
        )
        weights = {
            linear: lora
            for linear, lora in whole.adapter.weights.items()
            if layer_of(linear, path, count) <= number
        }
        with entered(model, Single(replace(whole.adapter, weights=weights)), None):
            upto = log_odds(_scored(bank, item), best)
        found.append(Layer(number, base, adapter, upto, upto - before))
        before = upto
    return tuple(found)


def layer_list(model: nn.Module) -> tuple[str, int]:
    """(name, length) of the list of the model's layers; raises BaseModelError without one."""
    config: Any = model.config
    count = int(config.get_text_config().num_hidden_layers)
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise BaseModelError(
            where=type(model).__name__,
            expected=f"a list of {count} layers in the model",
            found="none",
            hint="Trace an adapter of a decoder such as Llama, Qwen or GPT-2.",
        )
    # The outermost: a mixture of experts may have as many experts as layers.
    return min(lists, key=lambda name: name.count(".")), count


def layer_of(linear: str, path: str, count: int) -> int:
    """The layer that ``linear`` lies in, from 1; the last for what comes after all of them."""
    if not linear.startswith(f"{path}."):
        return count
    return int(linear.removeprefix(f"{path}.").split(".")[0]) + 1


def ended_after(model: nn.Module, path: str, count: int) -> Any:
    """A view of ``model`` that ends after ``count`` layers, then its own last norm and output.

    It shares every tensor and every layer; ``model`` itself is not touched, so that other threads
    can go on with it. ``path`` names the list of layers.
    """
    view = parent = _opened(model)
    *names, last = path.split(".")
    for name in names:
        child = parent._modules[name]
        assert child is not None
        parent._modules[name] = _opened(child)
        parent = parent._modules[name]  # type: ignore[assignment]
    layers = parent._modules[last]
    assert isinstance(layers, nn.ModuleList)
    parent._modules[last] = nn.ModuleList(list(layers)[:count])
    return view


def _opened(module: nn.Module) -> nn.Module:
    """A shallow copy whose children can be replaced."""
    made = copy.copy(module)
    made.__dict__["_modules"] = dict(module._modules)
    # Accelerate ties the forward of a dispatched model to that model: back to the class's own.
    made.__dict__.pop("forward", None)
    return made
