"""Classification heads: trained beside the LoRA weights, from a text's features to its classes.

A head is never a module of the base. It is applied to the features that base and adapter compute,
so that one base serves heads of any size together with adapters that have none. Its layers have
the names of the architecture's ``…ForSequenceClassification``, so that plain PEFT can load it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterUnsupported,
    UsageError,
    listed,
)
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import is_bidirectional
from lora_domains.modeling.batching import padded
from lora_domains.tasks import Task
from lora_domains.tokenization.encoded import EncodedExample


class Layer(NamedTuple):
    """A linear layer of a head, or a layer norm."""

    name: str
    activation: str = ""
    """Applied to its output; ``@hidden_act`` is the one that the base's config names there."""
    norm: bool = False
    bias: str = ""
    """The option of the base's config that says whether it has a bias; without, it has one."""


@dataclass(frozen=True)
class Layout:
    """An architecture's head."""

    layers: tuple[Layer, ...]
    saved: tuple[str, ...]
    """The modules that PEFT saves whole (``modules_to_save``)."""
    pooling: str = "first"
    """Which state of an encoder is a text's: that of the "first" token or the "mean" of all."""
    task: str = "SEQ_CLS"
    """PEFT's word for a model with this head; a head that transformers lacks is saved beside a
    bare encoder (``FEATURES``)."""


def _after_pooler(pooler: str, activation: str = "tanh") -> Layout:
    return Layout((Layer(pooler, activation), Layer("classifier")), ("classifier", "pooler"))


def _two_layers(activation: str) -> Layout:
    layers = (Layer("classifier.dense", activation), Layer("classifier.out_proj"))
    return Layout(layers, ("classifier",))


FEATURES = "FEATURE_EXTRACTION"
SENTENCE = Layout((Layer("classifier"),), (), "mean", FEATURES)
"""On a sentence encoder: the mean over the tokens, which it was trained for, and one layer."""
CAUSAL = Layout((Layer("score", bias="no_bias"),), ("score",))
LAYOUTS = {
    "albert": _after_pooler("albert.pooler"),
    "bert": _after_pooler("bert.pooler.dense"),
    "camembert": _two_layers("tanh"),
    "data2vec-text": _two_layers("tanh"),
    "deberta": _after_pooler("pooler.dense", "@pooler_hidden_act"),
    "deberta-v2": _after_pooler("pooler.dense", "@pooler_hidden_act"),
    "distilbert": Layout(
        (Layer("pre_classifier", "relu"), Layer("classifier")), ("classifier", "pre_classifier")
    ),
    "electra": _two_layers("gelu"),
    "ernie": _after_pooler("ernie.pooler.dense"),
    "megatron-bert": _after_pooler("bert.pooler.dense"),
    "modernbert": Layout(
        (Layer("head.dense", "@classifier_activation", bias="classifier_bias"),
         Layer("head.norm", norm=True, bias="norm_bias"), Layer("classifier")),
        ("classifier", "head"),
    ),
    "mpnet": _two_layers("tanh"),
    "rembert": _after_pooler("rembert.pooler.dense"),
    "roberta": _two_layers("tanh"),
    "roformer": _two_layers("@hidden_act"),
    "xlm-roberta": _two_layers("tanh"),
    "xlm-roberta-xl": _two_layers("tanh"),
}  # fmt: skip
"""By kind of encoder; causal models have ``CAUSAL``."""


@dataclass(frozen=True)
class Head:
    """Linear layers in float32, without dropout: weight (out, in), bias (out,) on encoders."""

    layout: Layout
    weights: dict[str, Tensor]
    """By name in the architecture with a head, such as ``classifier.weight``."""
    eps: float = 1e-5
    """Of its layer norm."""

    @property
    def classes(self) -> int:
        return int(self.weights[f"{self.layout.layers[-1].name}.weight"].shape[0])

    def to(self, device: torch.device | str) -> "Head":
        """A copy on ``device`` that shares nothing with this one."""
        copies = {name: t.detach().float().clone().to(device) for name, t in self.weights.items()}
        return replace(self, weights=copies)

    def trainable(self, device: torch.device) -> tuple["Head", list[torch.nn.Parameter]]:
        """Such a copy whose tensors are parameters, and these in a list for an optimiser."""
        trained = {n: torch.nn.Parameter(t) for n, t in self.to(device).weights.items()}
        return replace(self, weights=dict(trained)), list(trained.values())


def own_layout(base: Base) -> Layout:
    """The head of new adapters: that of a sentence encoder, or of the base's architecture."""
    if base.pooling == "mean":
        return SENTENCE
    return layout_of(base)


def layout_of(base: Base, task: str = "SEQ_CLS") -> Layout:
    """The head of an adapter for PEFT's ``task``, with the activations that the config names."""
    if not base.bidirectional:
        return CAUSAL
    if task == FEATURES:
        return SENTENCE
    config = base.model.config
    layout = LAYOUTS[config.model_type]
    layers = [
        layer._replace(activation=str(getattr(config, layer.activation[1:])))
        if layer.activation.startswith("@")
        else layer
        for layer in layout.layers
    ]
    # ModernBERT's config names the pooling of its classifier.
    mean = getattr(config, "classifier_pooling", "cls") == "mean"
    return replace(layout, layers=tuple(layers), pooling="mean" if mean else "first")


def head_shapes(base: Base, layout: Layout, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a head with ``classes`` classes on ``base``."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = layout.layers
    for layer in layers:
        out = classes if layer is layers[-1] else base.width
        shapes[f"{layer.name}.weight"] = (out,) if layer.norm else (out, base.width)
        if not layer.bias or getattr(base.model.config, layer.bias, False):
            shapes[f"{layer.name}.bias"] = (out,)
    return shapes


def new_head(base: Base, layout: Layout, classes: int) -> Head:
    """A new head, initialised from torch's current random state like that of transformers.

    A layer that the base's checkpoint holds (BERT's pooler) starts from the stored weights.
    """
    deviation = float(getattr(base.model.config.get_text_config(), "initializer_range", 0.02))
    weights: dict[str, Tensor] = {}
    for name, shape in head_shapes(base, layout, classes).items():
        stored = base.stored_tensor(name)
        if stored is not None and tuple(stored.shape) == shape:
            weights[name] = stored
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        elif len(shape) == 1:
            weights[name] = torch.ones(shape)
        else:
            weights[name] = torch.empty(shape).normal_(std=deviation)
    return _head(base, layout, weights)


def _head(base: Base, layout: Layout, weights: dict[str, Tensor]) -> Head:
    return Head(layout, weights, float(getattr(base.model.config, "norm_eps", 1e-5)))


# ── Forward ─────────────────────────────────────────────────────────────────────────────────────


def features(
    model: Any, items: Sequence[EncodedExample], pad: int, pooling: str = "first"
) -> Tensor:
    """The input of a head for each prompt: (rows, hidden), with gradients in training.

    It is the last layer's state, after the final norm, of the last token (causal), or an encoder's
    state of the first token ([CLS]) or the ``pooling`` "mean" of all, computed with the current
    route.
    """
    output, mask = base_output(model, items, pad)
    state: Tensor = output.last_hidden_state
    bidirectional = is_bidirectional(model.config)
    if not bidirectional:
        back = [_padding_at_the_end(item.prompt, model.config) for item in items]
        return state[:, -1] if not any(back) else state[range(len(items)), [-1 - n for n in back]]
    if pooling == "mean":
        weights = mask[..., None].to(state.dtype)
        return (state * weights).sum(1) / weights.sum(1)
    return state[:, 0]


def base_output(model: Any, items: Sequence[EncodedExample], pad: int) -> tuple[Any, Tensor]:
    """What the model below its output layer gives for each prompt, and the attention mask."""
    bidirectional = is_bidirectional(model.config)
    # Left-padded, every prompt of a causal model ends in the last column.
    parts = padded([item.prompt for item in items], pad, left=not bidirectional)
    ids, mask, positions = (part.to(model.device) for part in parts)
    options = {} if bidirectional else {"position_ids": positions, "use_cache": False}
    return model.base_model(input_ids=ids, attention_mask=mask, **options), mask


def _padding_at_the_end(prompt: Sequence[int], config: Any) -> int:
    """How many tokens at the end of ``prompt`` transformers takes for padding.

    A config may name an ordinary token as padding; transformers' classifiers then read the last
    token before it, and of a text of nothing else the first.
    """
    pad, count = getattr(config.get_text_config(), "pad_token_id", None), 0
    while count < len(prompt) and prompt[-1 - count] == pad:
        count += 1
    return min(count, len(prompt) - 1)


def head_logits(head: Head, inputs: Tensor) -> Tensor:
    """(rows, classes) from features (rows, hidden), in float32 whatever the base's precision."""
    from transformers.activations import ACT2FN

    x = inputs.float()
    for layer in head.layout.layers:
        weight, bias = head.weights[f"{layer.name}.weight"], head.weights.get(f"{layer.name}.bias")
        weight, bias = weight.to(x.device), None if bias is None else bias.to(x.device)
        if layer.norm:
            x = F.layer_norm(x, weight.shape, weight, bias, head.eps)
        else:
            x = F.linear(x, weight, bias)
        if layer.activation:
            x = ACT2FN[layer.activation](x)
    return x


def head_logprobs(head: Head, inputs: Tensor) -> Tensor:
    """Log-probabilities of the classes, (rows, classes), from features (rows, hidden)."""
    return F.log_softmax(head_logits(head, inputs), dim=-1)


def head_nats(
    model: Any,
    head: Head,
    items: Sequence[EncodedExample],
    pad: int,
    task: Task,
    weights: Tensor | None = None,
    inputs: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of what the head predicts in nats, summed over ``items``, with gradients.

    Of several labels it is that of each, summed over a row's labels. Of a number it is half the
    squared error in standard deviations, the cross-entropy of a normal distribution but for a
    constant. ``weights`` are those of ``batching.class_weights``; ``inputs`` are the ``features``
    of ``items``, if they were computed before.
    """
    if inputs is None:
        inputs = features(model, items, pad, head.layout.pooling)
    logits = head_logits(head, inputs)
    weights = None if weights is None else weights.to(logits)
    if task.outputs == "classes":
        targets = torch.tensor([item.target for item in items], device=logits.device)
        return F.cross_entropy(logits, targets, weights, reduction="sum")
    truth = torch.zeros_like(logits)
    for row, item in zip(truth, items, strict=True):
        if item.truth:  # trials, which measure the memory of a pass, have none
            row.copy_(torch.tensor(item.truth))
    if task.outputs == "value":
        mean, sd = task.scale or (0.0, 1.0)
        return ((logits - (truth - mean) / sd) ** 2).sum() / 2
    of_each = None if weights is None else torch.where(truth > 0, weights[1], weights[0])
    return F.binary_cross_entropy_with_logits(logits, truth, of_each, reduction="sum")


# ── Checks ──────────────────────────────────────────────────────────────────────────────────────


def check_task(base: Base, task: Task) -> None:
    """Raise UsageError if ``base`` is an encoder and ``task`` has no trained head."""
    if base.bidirectional and not task.head:
        raise UsageError(
            where=base.id,
            expected="classification with a trained head, the only task of an encoder",
            found=task.kind.replace("_", " ") + " without a head",
            hint="Declare Classification(…, head=True) or give --head; for any other task choose a "
            "causal language model.",
        )


def check_head(head: Head | None, task: Task, trained: Task | None, where: str) -> None:
    """Raise AdapterError unless ``task`` has the labels that ``head`` was trained on.

    ``trained`` is the task in training, None where unknown. A head numbers its classes, so other
    labels, or another order, would give wrong predictions.
    """
    if head is not None and task.head and trained and trained.outputs != task.outputs:
        raise AdapterError(
            where=where,
            expected=f"a head for a {task.kind.replace('_', ' ')} task",
            found=f"one for a {trained.kind.replace('_', ' ')} task",
            hint="Use it for the task it was trained for, or fit the domain again.",
        )
    declared = list(task.labels or ()) if task.head else None
    known = (trained.labels if trained else None) or ()
    labels = list(known) if head is not None else None
    if declared != labels:
        raise AdapterError(
            where=where,
            expected="no head" if declared is None else f"a head over {listed(declared)}",
            found="an adapter without one" if labels is None else f"one over {listed(labels)}",
            hint="Use it for the task it was trained for, or fit the domain again.",
        )


def check_generates(base: Base) -> None:
    """Raise UsageError if ``base`` is an encoder, which generates no text."""
    if base.bidirectional:
        raise UsageError(
            where=base.id,
            expected="a causal language model, to generate text",
            found=f"an encoder of kind {base.model.config.model_type}",
            hint="Use predict(), or choose a causal language model as the base.",
        )


def stored_classes(
    base: Base, layout: Layout, stored: Mapping[str, tuple[int, ...]], where: str
) -> int:
    """The number of classes of a stored head, from the shapes of its tensors.

    Raises AdapterCorrupt when its last layer is missing or has another shape, before anything of
    its size is allocated.
    """
    name = f"{layout.layers[-1].name}.weight"
    shape = stored.get(name)
    if shape is None or len(shape) != 2 or shape[0] < 1 or shape[1] != base.width:
        raise AdapterCorrupt(
            where=where,
            expected=f"a head {name} of shape (classes, {base.width})",
            found="none" if shape is None else str(shape),
            hint="Copy the adapter again, or load the base it was made on.",
        )
    return shape[0]


def complete_head(
    base: Base, layout: Layout, stored: Mapping[str, Tensor], classes: int, where: str
) -> Head:
    """The head from the tensors ``stored`` in an adapter, completed from the base's checkpoint.

    Plain PEFT saves BERT's pooler only when told to; otherwise it is the checkpoint's. Raises
    AdapterUnsupported when neither holds a tensor, which was random then and is lost.
    """
    weights = dict(stored)
    for name, shape in head_shapes(base, layout, classes).items():
        if name not in weights:
            tensor = base.stored_tensor(name)
            if tensor is None or tuple(tensor.shape) != shape:
                raise AdapterUnsupported(
                    where=where,
                    expected=f"{name} in the adapter or in the base's checkpoint",
                    found="it in neither: it was random and was not saved",
                    hint="Train it again in PEFT with modules_to_save="
                    f"[{listed(map(repr, layout.saved))}].",
                )
            weights[name] = tensor
    return _head(base, layout, weights)
