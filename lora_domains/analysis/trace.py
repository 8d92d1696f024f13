"""Trace of one text: its tokens, the probabilities of base and adapter, and each layer's part.

Layers are shown by two log-odds of the answer against the other labels, in nats. The logit lens
applies the model's last norm and output layer after each layer (nostalgebraist 2020, "interpreting
GPT: the logit lens", lesswrong.com). The ablation lets the adapter act in the first layers only
(Vig et al. 2020, arXiv 2004.12265): its steps add up to the whole change, and the step of a layer
depends on the layers before it.

The words that mattered are those without which the answer is less likely: each is left out in turn
(occlusion, Zeiler and Fergus 2014, arXiv 1311.2901).
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from lora_domains.errors import BaseModelError, UsageError
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.likelihoods import choice_logprobs
from lora_domains.inference.predict import Answer, Labels, Prediction, length_of, task_of
from lora_domains.inference.scores import renormalise
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.batching import tokenization_of
from lora_domains.modeling.routing import Single, entered
from lora_domains.tasks import Example, Task
from lora_domains.tasks.messages import columns_beside
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization


@dataclass(frozen=True)
class Layer:
    """Log-odds of the answer against the other labels, in nats, at one layer."""

    number: int
    """From 1."""
    base: float
    """Logit lens on the base after this layer."""
    adapter: float
    """Logit lens on the adapter after this layer."""
    upto: float
    """Output of the model with the adapter acting in the layers up to this one."""
    moved: float
    """Change of ``upto`` from the layer before."""


@dataclass(frozen=True)
class Trace:
    """One text in base and adapter. It contains the text: show it, do not save it."""

    domain: str
    before: tuple[str, ...]
    """Tokens of the prompt as text, up to the cut."""
    cut: tuple[str, ...]
    """Tokens cut from the middle of a prompt that is too long."""
    after: tuple[str, ...]
    """Tokens after the cut."""
    labels: tuple[str, ...]
    """The labels; for a task without labels, the generated answers of adapter and base."""
    base: tuple[float, ...]
    """Probabilities of ``labels`` by the base."""
    adapter: tuple[float, ...]
    """Probabilities of ``labels`` by the adapter."""
    answer: str
    """The label that the adapter predicts."""
    start: float
    """Log-odds of ``answer`` by the base."""
    layers: tuple[Layer, ...]
    """Empty where base and adapter generate the same answer, the only label."""

    @property
    def most_moved(self) -> tuple[int, ...]:
        """Numbers of the fewest layers that account for half of the change."""
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
    """Trace ``text`` in the base and in the loaded adapter ``name``.

    ``text`` is a string, or a row with the columns of the domain's prompt. Raises UsageError for an
    adapter without a card, and what ``trace_example`` does.
    """
    bank = model.bank
    task = task_of(bank, name)
    tokenization = tokenization_of(bank.base, task, length_of(bank, name))
    return trace_example(bank, name, task, task.to_predict(text, 0), tokenization)


def trace_example(
    bank: Bank, name: str, task: Task, example: Example, tokenization: Tokenization
) -> Trace:
    """Trace ``example`` in the base and in the loaded adapter ``name``.

    Raises UsageError if the adapter is not loaded or has a trained head, to which the logit lens
    does not apply, and BaseModelError if the base has no list of layers.
    """
    if bank[name].head is not None:
        raise UsageError(
            where=name,
            expected="an adapter without a trained head",
            found="one with a head",
            hint="Use predict, which answers with its head.",
        )
    item = tokenization.encode(example)
    labels = (task.labels or ()) if item.choices else ()
    if item.choices and task.own_choices:
        labels = tuple(choice.strip() for choice in example.choices)
    if not labels:
        labels, item = _generated(bank, name, task, item, tokenization)
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


# ── Words ───────────────────────────────────────────────────────────────────────────────────────

WORD = re.compile(r"\s*(?:[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+)")
"""A word with the space before it. Japanese and Chinese have no spaces: a character each."""
MOST_PIECES = 60
"""Pieces of a text that are left out in turn; of a longer text, each is several words."""
LEAST_ODDS = 1e-12


def words_of(text: str) -> list[str]:
    """The words of ``text``, or ``MOST_PIECES`` runs of them, which joined are the text again, but
    for spaces at its end."""
    words = WORD.findall(text)
    size = math.ceil(len(words) / MOST_PIECES) or 1
    return ["".join(words[at : at + size]) for at in range(0, len(words), size)]


def word_effects(
    model: DomainModel, text: str | Mapping[str, Any], name: str, answer: Answer
) -> dict[str, list[tuple[str, float]]]:
    """Each word of ``text`` and how much less ``answer`` is supported without it, by column.

    ``answer`` is what the loaded adapter ``name`` predicts of ``text``. An effect is a difference
    of the log-odds of the label in nats (of several labels, the mean), of the number that is
    predicted, or of the log-likelihood of a generated answer in nats. Of a row, the columns of text
    count that the adapter reads and that have several words; a plain text is the column "".
    """
    row = {"": text} if isinstance(text, str) else dict(text)
    read = {""}
    if not isinstance(text, str):
        task = task_of(model.bank, name)
        read = {*task.input_columns} - columns_beside(task)
    pieces = {
        column: words
        for column, value in row.items()
        if column in read and isinstance(value, str) and len(words := words_of(value)) > 1
    }
    without = [
        {**row, column: "".join([*words[:at], *words[at + 1 :]])}
        for column, words in pieces.items()
        for at in range(len(words))
    ]
    if not without:
        return {}
    texts = [text, *(one[""] if isinstance(text, str) else one for one in without)]
    support = _support(model, texts, name, answer)
    effects = (support[0] - less for less in support[1:])
    return {column: [(word, next(effects)) for word in words] for column, words in pieces.items()}


def _support(
    model: DomainModel, texts: Sequence[str | Mapping[str, Any]], name: str, answer: Answer
) -> list[float]:
    """How much each of ``texts`` supports ``answer``, in the unit of ``word_effects``."""
    bank, written = model.bank, answer.joined if isinstance(answer, Labels) else answer
    if isinstance(written, str) and not (isinstance(answer, Labels) and answer.probabilities):
        task = task_of(bank, name)
        tokenization = tokenization_of(bank.base, task, length_of(bank, name))
        choice = (*tokenization.answer_tokens(" " + written), *tokenization.end)
        items = [
            replace(tokenization.encode(task.to_predict(text, n)), choices=(choice,))
            for n, text in enumerate(texts)
        ]
        with bank.routed(name):
            rows = choice_logprobs(bank.base.model, items, bank.base.pad)
        return [float(row[0]) for row in rows]
    return [_odds(one, answer) for one in model.predict(list(texts), domain=name)]


def _odds(found: Answer, answer: Answer) -> float:
    """Log-odds in ``found`` of the label or labels of ``answer``; a number as it is."""
    if isinstance(found, Prediction) and isinstance(answer, Prediction):
        # The label that was predicted, also where it was too improbable to be named.
        label = max(answer.probabilities, key=answer.probabilities.__getitem__)
        label = answer.label if answer.label in answer.probabilities else label
        others = sum(p for other, p in found.probabilities.items() if other != label)
        return _log_ratio(found.probabilities[label], others)
    if isinstance(found, Labels) and isinstance(answer, Labels):
        chances = answer.probabilities
        labels = answer.labels or (max(chances, key=chances.__getitem__),)
        odds = [_log_ratio(p, 1 - p) for p in (found.probabilities[one] for one in labels)]
        return sum(odds) / len(odds)
    assert isinstance(found, float)
    return found


def _log_ratio(part: float, rest: float) -> float:
    return math.log(max(part, LEAST_ODDS) / max(rest, LEAST_ODDS))


def log_odds(logprobs: np.ndarray, index: int) -> float:
    """Log-odds of one choice against all others together, in nats."""
    others = np.delete(logprobs, index)
    return float(logprobs[index] - np.logaddexp.reduce(others))


def _label_logprobs(
    bank: Bank, route: str | None, item: EncodedExample, model: Any = None
) -> np.ndarray:
    """Log-probabilities over the labels, (labels,), by the base's model or a view of it."""
    with bank.routed(route):
        return _scored(bank, item, model)


def _scored(bank: Bank, item: EncodedExample, model: Any = None) -> np.ndarray:
    pad = bank.base.pad
    (scores,) = choice_logprobs(model or bank.base.model, [item], pad)
    return renormalise(scores)


def _generated(
    bank: Bank, name: str, task: Task, item: EncodedExample, tokenization: Tokenization
) -> tuple[tuple[str, ...], EncodedExample]:
    """The answers of adapter and base (one if equal), and ``item`` with them as its choices."""
    texts = []
    for route in (name, None):
        with bank.routed(route):
            model, tokenizer = bank.base.model, bank.base.tokenizer
            texts += generate_in_batches(model, tokenizer, [item], task.max_new_tokens)
    answers = tuple(dict.fromkeys(texts))
    # With an end token, since an answer that is a prefix of the other would always be likelier.
    choices = tuple((*tokenization.answer_tokens(" " + t), *tokenization.end) for t in answers)
    return answers, replace(item, choices=choices)


def _tokens(
    tokenization: Tokenization, example: Example, item: EncodedExample
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The tokens of the prompt as text: before the cut, cut, and after it."""
    body = tokenization.prompt_tokens(example)
    kept = len(item.prompt) - len(tokenization.start)
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
    layers = []
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
        layers.append(Layer(number, base, adapter, upto, upto - before))
        before = upto
    return tuple(layers)


def layer_list(model: nn.Module) -> tuple[str, int]:
    """(name, length) of the model's list of layers; raises BaseModelError without one."""
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
    # The outermost list, since a mixture of experts may have as many experts as layers.
    return min(lists, key=lambda name: name.count(".")), count


def layer_of(linear: str, path: str, count: int) -> int:
    """Number of the layer that contains ``linear``, from 1; the last one for what follows them."""
    if not linear.startswith(f"{path}."):
        return count
    return int(linear.removeprefix(f"{path}.").split(".")[0]) + 1


def ended_after(model: nn.Module, path: str, count: int) -> Any:
    """A view of ``model`` with its first ``count`` layers, its last norm and its output layer.

    It shares all tensors and leaves ``model`` unchanged for other threads. ``path`` names the list
    of layers.
    """
    view = parent = _copied(model)
    *names, last = path.split(".")
    for name in names:
        child = parent._modules[name]
        assert child is not None
        parent._modules[name] = _copied(child)
        parent = parent._modules[name]  # type: ignore[assignment]
    layers = parent._modules[last]
    assert isinstance(layers, nn.ModuleList)
    parent._modules[last] = nn.ModuleList(list(layers)[:count])
    return view


def _copied(module: nn.Module) -> nn.Module:
    """A shallow copy whose children can be replaced."""
    copied = copy.copy(module)
    copied.__dict__["_modules"] = dict(module._modules)
    # Accelerate binds the forward of a dispatched model to that model; use that of the class.
    copied.__dict__.pop("forward", None)
    return copied
