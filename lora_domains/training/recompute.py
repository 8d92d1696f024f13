"""Gradient checkpointing that keeps the route: layers are computed twice, memory is saved.

The second computation happens inside ``backward``, which may run in another thread, and a thread
inherits no ContextVar: without the route restored there, a layer would be computed as the bare
base's and the gradients would be wrong with nothing to show for it.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch.utils.checkpoint import checkpoint

from lora_domains.errors import TrainingError
from lora_domains.modeling.routing import current_route, entered


@contextmanager
def recomputing(model: Any) -> Iterator[None]:
    """Inside, each layer of ``model`` keeps only its input for the backward pass.

    The layers' modules stay in evaluation mode, which transformers' own switch would not allow.
    Raises TrainingError for a model without layers that transformers can checkpoint.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise TrainingError(
            where=type(model).__name__,
            expected="layers that can be computed again, for gradient_checkpointing",
            found="none that transformers marks as such",
            hint="Leave gradient_checkpointing out, or set a smaller max_length.",
        )
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_twice, model, layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.forward  # the class's own is seen again
            if own is not None:
                layer.forward = own


def _twice(model: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    route = current_route(model)

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), entered(model, route, None)

    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, context_fn=contexts)
