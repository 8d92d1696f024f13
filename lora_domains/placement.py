"""Where a base lies: on a device, spread over device, memory and disk, or shared out to processes.

A frozen base whose weights are shared out, with ``fully_shard`` of FSDP2, is kept in part by each
process. A piece of it (the embedding, a layer, the output layer) is gathered when it is called,
forward or backward, and given up afterwards. Whoever reads its weights otherwise does so inside
``gathered``, and so where a device map keeps layers on the disk.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from lora_domains.distributed import new_mesh, register_turns, state, take_turn
from lora_domains.errors import BaseModelError, UsageError, listed

DeviceMap = str | Mapping[str, str | int | torch.device]
"""Where each module of a base lies: on a device, in memory ("cpu") or on the "disk"; or "auto"."""


@dataclass(frozen=True)
class Placement:
    """Where a base is wanted, and in which precision."""

    device: torch.device
    dtype: torch.dtype
    device_map: DeviceMap | None = None
    sharded: bool = False

    @property
    def shares(self) -> int:
        """How many processes have a part of it each."""
        return int(state().num_processes) if self.sharded else 1

    def map_options(self) -> dict[str, Any]:
        """The options of ``from_pretrained`` for the device map.

        "auto" fills ``device``, then the memory of the machine, and leaves the rest on the disk.
        """
        if self.device_map is None:
            return {}
        if not isinstance(self.device_map, str):
            return {"device_map": dict(self.device_map)}
        from accelerate.utils import get_max_memory

        here = 0 if self.device.index is None else self.device.index
        sizes = {place: size for place, size in get_max_memory().items() if place in (here, "cpu")}
        return {"device_map": "auto", "max_memory": sizes}


# ── Device maps ─────────────────────────────────────────────────────────────────────────────────


def check_mapped(model: Any, where: str) -> None:
    """Raise BaseModelError for a base that is spread in a way in which it cannot be called.

    Adapters compute on one device, and texts are sent to that of the embedding.
    """
    devices = {p.device for p in model.parameters() if not p.is_meta}
    embedded = model.get_input_embeddings().weight.device
    if embedded.type == "meta":
        raise BaseModelError(
            where=where,
            expected="a device map with the embedding on a device",
            found="an embedding that is loaded anew for each call",
            hint="Map it to the device that computes, and layers to the disk.",
        )
    if len(devices) > 1:
        raise BaseModelError(
            where=where,
            expected="one device that computes, beside memory and disk",
            found=listed(map(str, sorted(devices, key=str))),
            hint="Start several processes with --shard-base to share the base.",
        )


def check_trainable(model: nn.Module, where: str) -> None:
    """Raise UsageError for a base with offloaded layers, through which gradients take too long."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError(
            where=where,
            expected="a base whose layers stay on its device, to train on",
            found="a device map with layers in memory or on the disk",
            hint="Leave the device map out, or share the base out with --shard-base; "
            "--load-in-4bit makes it smaller.",
        )


# ── Shards ──────────────────────────────────────────────────────────────────────────────────────

_pieces: "WeakKeyDictionary[nn.Module, Piece | Tied]" = WeakKeyDictionary()
_shards: "WeakKeyDictionary[nn.Module, list[Piece | Tied]]" = WeakKeyDictionary()
"""The pieces by the modules in them, and by model."""


def shard(model: Any, dtype: torch.dtype | None, device: torch.device, where: str) -> None:
    """Share the weights of ``model`` out to the processes, piece by piece.

    Each piece is first moved to ``device``, in ``dtype`` if one is given: a model whose weights lie
    in files that are mapped into memory is never held whole. All processes must call this. Raises
    BaseModelError for a model without layers that transformers knows.
    """
    modules, output = _modules(model, where)
    mesh = new_mesh(device.type)
    pieces: list[Piece | Tied] = []
    for module in modules:
        _move(module, dtype, device)
        pieces.append(Piece(module, mesh))
    if output is not None:
        # Its weight is that of the embedding.
        pieces.append(Tied(output, modules[0]))
    _move(model, dtype, device, copy=True)  # the mapped file can be closed
    forward = register_turns([piece.helper() for piece in pieces])
    backward = register_turns([piece.helper() for piece in reversed(pieces)])
    for piece, *numbers in zip(pieces, forward, reversed(backward), strict=True):
        piece.forward_turn, piece.backward_turn = numbers
    _shards[model] = pieces
    one_call_at_a_time(model)

    def after(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if output is None or not torch.is_grad_enabled():
            recover(model)

    for module in {model, model.base_model}:
        module.register_forward_hook(after, always_call=True)


def recover(model: nn.Module) -> None:
    """Give up all pieces of ``model``, and what FSDP noted for a backward pass.

    After a call without gradients, whose notes nobody would delete, and after an error.
    """
    for piece in _shards.get(model, ()):
        piece.recover()


def one_call_at_a_time(model: Any) -> None:
    """Let threads wait for each other's calls: weights that come and go are of the whole model."""
    lock = RLock()

    def before(*_: Any) -> None:
        lock.acquire()

    def after(*_: Any) -> None:
        lock.release()

    # Features are read from the model below the head.
    for module in {model, model.base_model}:
        module.register_forward_pre_hook(before, prepend=True)
        module.register_forward_hook(after, always_call=True)


def is_sharded(model: nn.Module) -> bool:
    return model in _shards


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Inside, ``module``, a part of a base, has its weights whole, gathered from other processes
    (which only help) or loaded from where a device map keeps them."""
    piece = _pieces.get(module)
    if piece is None:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            yield
        return
    if piece.whole:
        yield
        return
    piece.gather(piece.forward_turn)
    try:
        yield
    finally:
        piece.give_up()


def each_gathered(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """``modules``, each one ``gathered``; pieces of the base stay so while their modules last."""
    piece = None
    with ExitStack() as held:
        for module in modules:
            if piece is None or _pieces.get(module) is not piece:
                held.close()  # and open for the next
                piece = _pieces.get(module)
                held.enter_context(gathered(module))
            yield module


def resident(tensor: Tensor) -> Tensor:
    """What this process holds of ``tensor``."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Piece:
    """A module that is gathered and given up as a whole."""

    forward_turn = backward_turn = -1

    def __init__(self, module: nn.Module, mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        # Tensor hooks run in the order in which they were registered, and this one comes first.
        module.register_forward_hook(self._after)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.register_forward_pre_hook(self._before, prepend=True)
        self._module, self._called = ref(module), False
        _pieces.update(dict.fromkeys(module.modules(), self))

    @property
    def module(self) -> Any:
        """The module, with the methods of ``FSDPModule``."""
        return self._module()

    @property
    def whole(self) -> bool:
        """Whether this process has it gathered."""
        from torch.distributed.tensor import DTensor

        return not any(isinstance(p, DTensor) for p in self.module.parameters())

    def gather(self, turn: int) -> None:
        """Gather it, once it is the ``turn`` of all processes; nothing where it is whole."""
        if not self.whole:
            take_turn(turn)
            self.module.unshard()

    def give_up(self) -> None:
        """Keep this process's part only."""
        self.module.reshard()

    def recover(self) -> None:
        if self._called:  # before its first call, FSDP has no state to reset
            # Versions of torch that cannot reset it keep the notes.
            getattr(self.module, "reset_iter_state", self.module.reshard)()
        self._called = False

    def helper(self) -> Callable[[], None]:
        return self._help

    def _help(self) -> None:
        """Take part while another process gathers it."""
        kept = self.whole
        if kept:
            self.give_up()
        self.module.unshard()
        if not kept:
            self.give_up()

    def _before(self, _module: nn.Module, _inputs: Any) -> None:
        self._called = True
        self.gather(self.forward_turn)  # then FSDP's own hook has nothing to gather

    def _after(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        for tensor in _with_gradients(output):
            _call_before_backward(tensor, partial(self.gather, self.backward_turn))


class Tied:
    """An output layer whose weight is that of the embedding, another piece."""

    forward_turn = backward_turn = -1

    def __init__(self, output: nn.Module, embedding: nn.Module) -> None:
        self._output, self._source = ref(output), _pieces[embedding]
        output.register_forward_pre_hook(self._before)
        output.register_forward_hook(self._after)
        self._follow()
        _pieces[output] = self

    @property
    def whole(self) -> bool:
        return self._source.whole

    def gather(self, turn: int) -> None:
        self._source.gather(turn)
        self._follow()

    def give_up(self) -> None:
        self._source.give_up()
        self._follow()

    def recover(self) -> None:
        self._source.recover()
        self._follow()

    def helper(self) -> Callable[[], None]:
        return self._source.helper()

    def _follow(self) -> None:
        """Hold the embedding's weight as it is now: whole, or a part."""
        output: Any = self._output()
        output.weight = self._source.module.weight

    @property
    def module(self) -> Any:
        return self._source.module

    def _before(self, _module: nn.Module, inputs: Any) -> Any:
        self.gather(self.forward_turn)
        (states,) = inputs
        then: Any = _Then.apply
        return (then(states, self.give_up),) if states.requires_grad else inputs

    def _after(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.give_up()
        for tensor in _with_gradients(output):
            _call_before_backward(tensor, partial(self.gather, self.backward_turn))


class _Then(torch.autograd.Function):
    """The identity; backward, it calls a function once what follows it is done."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.call()
        return gradients[0], None


# ── The pieces of a model ───────────────────────────────────────────────────────────────────────


def _modules(model: Any, where: str) -> tuple[list[nn.Module], nn.Module | None]:
    """The pieces of ``model`` in the order of their calls, and an output layer that shares the
    weight of the first, its embedding."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    inner = {
        child
        for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
        for child in module.modules() if child is not module
    }  # fmt: skip
    layers = [
        module for module in model.modules()
        if isinstance(module, GradientCheckpointingLayer) and module not in inner
    ]  # fmt: skip
    if not layers:
        raise BaseModelError(
            where=where,
            expected="a base to shard, made of layers as most in transformers are",
            found=type(model).__name__,
            hint="Leave --shard-base out; --load-in-4bit saves memory too.",
        )
    embedding, output = model.get_input_embeddings(), output_layer(model)
    tied = output is not None and output.weight is embedding.weight
    modules = [embedding, *layers, *([] if tied or output is None else [output])]
    return modules, output if tied else None


def output_layer(model: Any) -> Any:
    """The output layer of ``model``; None for an encoder whose untrained one was left out."""
    try:
        return model.get_output_embeddings()
    except AttributeError:
        return None


def _move(
    module: nn.Module, dtype: torch.dtype | None, device: torch.device, copy: bool = False
) -> None:
    """Move what is not sharded yet, in place, so that weights that are shared stay so."""
    from torch.distributed.tensor import DTensor

    for parameter in module.parameters():
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device, dtype or parameter.dtype, copy=copy)
    for buffer in module.buffers():
        buffer.data = buffer.data.to(device)


def _call_before_backward(tensor: Any, call: Callable[[], None]) -> None:
    """Call ``call`` once the gradient of ``tensor``, the output of a module, is known."""
    tensor.register_hook(lambda _: call())


def _with_gradients(output: Any) -> Iterator[Tensor]:
    """The tensors in the output of a module whose gradients will be computed."""
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from _with_gradients(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _with_gradients(part)
