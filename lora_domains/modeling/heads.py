"""Trained heads: from a text's features to its classes, beside the LoRA weights of an adapter.

A head is never a module of the base. It is applied to the features that base and adapter compute,
so that heads of any size, and adapters without one, stand side by side on one base. Its layers and
their names are those of the architecture's own ``…ForSequenceClassification``: plain PEFT opens
what is saved here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_domains.data.tokenization import EncodedExample
from lora_domains.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterUnsupported,
    UsageError,
    listed,
)
from lora_domains.modeling.base import Base, is_bidirectional
from lora_domains.modeling.batching import prompts
from lora_domains.tasks import Task


@dataclass(frozen=True)
class Layout:
    """An architecture's head. ``layers``: each linear's name, and the function that follows it."""

    layers: tuple[tuple[str, str], ...]
    saved: tuple[str, ...]
    """The modules that PEFT stores whole (``modules_to_save``)."""


_DENSE = Layout((("classifier.dense", "tanh"), ("classifier.out_proj", "")), ("classifier",))
CAUSAL = Layout((("score", ""),), ("score",))
LAYOUTS = {
    "bert": Layout((("bert.pooler.dense", "tanh"), ("classifier", "")), ("classifier", "pooler")),
    "distilbert": Layout(
        (("pre_classifier", "relu"), ("classifier", "")), ("classifier", "pre_classifier")
    ),
    "roberta": _DENSE,
    "xlm-roberta": _DENSE,
}
"""By kind of encoder; a causal model has ``CAUSAL``."""
_FOLLOWING = {"": lambda x: x, "tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Head:
    """Linear layers in float32, without dropout: weight (out, in), bias (out,) on encoders."""

    layout: Layout
    weights: dict[str, Tensor]
    """By the name in the architecture with a head: ``classifier.weight``."""

    @property
    def classes(self) -> int:
        return int(self.weights[f"{self.layout.layers[-1][0]}.weight"].shape[0])

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.weights.values())

    def to(self, device: torch.device | str) -> "Head":
        """A copy on ``device`` that shares nothing with this one."""
        copies = {name: t.detach().float().clone().to(device) for name, t in self.weights.items()}
        return replace(self, weights=copies)

    def trainable(self, device: torch.device) -> tuple["Head", list[torch.nn.Parameter]]:
        """Such a copy whose tensors are parameters, and these in a list for an optimiser."""
        trained = {n: torch.nn.Parameter(t) for n, t in self.to(device).weights.items()}
        return replace(self, weights=dict(trained)), list(trained.values())


def layout_of(base: Base) -> Layout:
    return LAYOUTS[base.model.config.model_type] if base.bidirectional else CAUSAL


def head_shapes(base: Base, classes: int) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of a head with ``classes`` classes on ``base``."""
    shapes: dict[str, tuple[int, ...]] = {}
    layers = layout_of(base).layers
    for name, _ in layers:
        out = classes if name == layers[-1][0] else base.width
        shapes[f"{name}.weight"] = (out, base.width)
        if base.bidirectional:
            shapes[f"{name}.bias"] = (out,)
    return shapes


def new_head(base: Base, classes: int) -> Head:
    """A fresh head, drawn from torch's current random state as transformers draws one.

    A layer that stands in the base's checkpoint (BERT's pooler) begins as it is there.
    """
    deviation = float(getattr(base.model.config.get_text_config(), "initializer_range", 0.02))
    weights: dict[str, Tensor] = {}
    for name, shape in head_shapes(base, classes).items():
        stored = base.stored_tensor(name)
        if stored is not None and tuple(stored.shape) == shape:
            weights[name] = stored
        elif name.endswith(".bias"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = torch.empty(shape).normal_(std=deviation)
    return Head(layout_of(base), weights)


# ── Forward ─────────────────────────────────────────────────────────────────────────────────────


def features(model: Any, items: Sequence[EncodedExample], pad: int) -> Tensor:
    """What a head reads of each prompt: (rows, hidden), with gradient where adapters are trained.

    The last layer's state, after the final norm, of the last token (causal) or the first (an
    encoder's [CLS]), by whichever adapter is routed.
    """
    bidirectional = is_bidirectional(model.config)
    longest = max(len(item.prompt) for item in items)
    # Left-padded, every prompt of a causal model ends in the last column.
    padded = prompts(items, pad, longest, left=not bidirectional)
    ids, mask, positions = (part.to(model.device) for part in padded)
    options = {} if bidirectional else {"position_ids": positions, "use_cache": False}
    state: Tensor = model.base_model(
        input_ids=ids, attention_mask=mask, **options
    ).last_hidden_state
    return state[:, 0 if bidirectional else -1]


def head_logits(head: Head, read: Tensor) -> Tensor:
    """(rows, classes) from ``read`` (rows, hidden), in float32 whatever the base's precision."""
    x = read.float()
    for name, following in head.layout.layers:
        weight, bias = head.weights[f"{name}.weight"], head.weights.get(f"{name}.bias")
        x = F.linear(x, weight.to(x.device), None if bias is None else bias.to(x.device))
        x = _FOLLOWING[following](x)
    return x


def head_logprobs(head: Head, read: Tensor) -> Tensor:
    """Log-probabilities (rows, classes) of the classes, from features ``read`` (rows, hidden)."""
    return F.log_softmax(head_logits(head, read), dim=-1)


def label_nats(model: Any, head: Head, items: Sequence[EncodedExample], pad: int) -> Tensor:
    """Cross-entropy of the labels in nats, summed over ``items``, with gradient."""
    logits = head_logits(head, features(model, items, pad))
    targets = torch.tensor([item.target for item in items], device=logits.device)
    return F.cross_entropy(logits, targets, reduction="sum")


# ── Checks ──────────────────────────────────────────────────────────────────────────────────────


def check_task(base: Base, task: Task) -> None:
    """Raise UsageError for a task that an encoder cannot do: all but classification by a head."""
    if base.bidirectional and not task.head:
        raise UsageError(
            where=base.id,
            expected="classification with a trained head, the one task of an encoder",
            found=task.kind.replace("_", " ") + " without a head",
            hint="Declare Classification(…, head=True) or give --head; for any other task choose a "
            "causal language model.",
        )


def check_head(head: Head | None, task: Task, trained: Mapping[str, Any], where: str) -> None:
    """Raise AdapterError unless ``task`` asks for what ``head`` was ``trained`` on (a record).

    A head knows its classes by number, so other labels, or another order, would be told wrongly.
    """
    wanted = list(task.labels or ()) if task.head else None
    found = list(trained.get("labels") or ()) if head is not None else None
    if wanted != found:
        raise AdapterError(
            where=where,
            expected="no head" if wanted is None else f"a head over {listed(wanted)}",
            found="an adapter without one" if found is None else f"one over {listed(found)}",
            hint="Ask of it what it was trained for, or fit the domain anew.",
        )


def check_generates(base: Base) -> None:
    """Raise UsageError where ``base`` is an encoder, which writes no text."""
    if base.bidirectional:
        raise UsageError(
            where=base.id,
            expected="a causal language model, to generate text",
            found=f"an encoder of kind {base.model.config.model_type}",
            hint="Use predict(), or choose a causal language model as the base.",
        )


def stored_classes(base: Base, stored: Mapping[str, tuple[int, ...]], where: str) -> int:
    """The number of classes of a stored head, by name and shape of its tensors.

    Raises AdapterCorrupt when its last layer is missing or misshapen, before anything of its size
    is allocated.
    """
    name = f"{layout_of(base).layers[-1][0]}.weight"
    shape = stored.get(name)
    if shape is None or len(shape) != 2 or shape[0] < 2 or shape[1] != base.width:
        raise AdapterCorrupt(
            where=where,
            expected=f"a head {name} of shape (classes, {base.width}), of at least two classes",
            found="none" if shape is None else str(shape),
            hint="Copy the adapter again, or load the base it was made on.",
        )
    return shape[0]


def complete(base: Base, found: Mapping[str, Tensor], classes: int, where: str) -> Head:
    """The head from the tensors ``found`` in an adapter and, where it has none, from the base.

    Plain PEFT saves BERT's pooler only when told to; then it is the checkpoint's. Raises
    AdapterUnsupported where that has none either: PEFT's was random, and cannot be had again.
    """
    weights = dict(found)
    for name, shape in head_shapes(base, classes).items():
        if name not in weights:
            stored = base.stored_tensor(name)
            if stored is None or tuple(stored.shape) != shape:
                raise AdapterUnsupported(
                    where=where,
                    expected=f"{name} in the adapter or in the base's checkpoint",
                    found="neither: it was random, and saved nowhere",
                    hint="Train it again in PEFT with modules_to_save="
                    f"[{listed(map(repr, layout_of(base).saved))}].",
                )
            weights[name] = stored
    return Head(layout_of(base), weights)
