"""What the layers below an adapter give for its rows, computed once for all epochs.

From vectors text can be guessed: they are in a file without a name, which is gone when the run ends
or is killed, and which counts among those of ``inference.cache``.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_domains import distributed
from lora_domains.errors import BaseModelError
from lora_domains.inference.batches import Progress, in_batches, no_progress
from lora_domains.inference.cache import nameless_file, room_for
from lora_domains.inference.choice_tree import whole_prompts
from lora_domains.inference.memory import TRIAL
from lora_domains.modeling.base import Base
from lora_domains.modeling.base_check import layers_of
from lora_domains.modeling.heads import base_output
from lora_domains.modeling.routing import entered
from lora_domains.tokenization.encoded import EncodedExample

Tokens = tuple[int, ...]


@dataclass
class _Entry:
    """How a pass of this thread goes through the layers: up to the first that is adapted, or from
    there on with these ``states`` (rows, length, width)."""

    inputs: "LayerInputs"
    states: Tensor | None = None
    repeated: bool = False
    """Whether the pass may be made again: it has ``states`` from the second time on."""
    call: bytes = b""
    """Which pass that is; empty for one that must be whole."""


_entry: ContextVar[_Entry | None] = ContextVar("lora_domains_entry", default=None)


class _Reached(Exception):
    """The input of the first layer that is adapted."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


class LayerInputs:
    """The inputs of the ``first`` of the layers that an adapter changes, by the tokens of a text.

    The layers below give the same for a row in each epoch, and no gradient reaches them: they read
    it once. Passes inside ``of`` run the embedding and the layers from the first on, and so do
    those inside ``repeated`` that were made before; all others run whole. What is kept has the
    base's precision, and for ``of`` no padding. That is computed in batches which depend on the
    texts only, so that a resumed run ends with the same bytes.
    """

    def __init__(self, base: Base, linears: Iterable[str]) -> None:
        self.base, self.model = base, base.model
        self.layers, self.first = _below(self.model, linears)
        self._places: dict[bytes, tuple[int, int]] = {}
        self._states = torch.empty(0)
        self._others: int | None = None
        """What layers give beside their output; None where they do not give tuples."""
        self._calls: dict[bytes, tuple[int, torch.Size]] = {}
        """Where the states of a pass that may be made again begin in their file, and their shape.
        """
        self._opened = ExitStack()

    @property
    def size(self) -> int:
        """Bytes of what is kept of the rows."""
        return self._states.nbytes

    def read(self, texts: Sequence[Tokens], progress: Progress = no_progress) -> str | None:
        """Let the layers below the first read ``texts``; why they are not kept, if they are not."""
        texts = list(dict.fromkeys(texts))
        reason = self._unsuitable(sum(map(len, texts)))
        with ExitStack() as opened:
            if reason is None:
                opened.callback(self.close)
                self._install()
                reason = self._fill(texts, progress) if self._agrees() else (
                    f"{self.model.config.model_type} calls its layers in another way"
                )  # fmt: skip
                if reason is None:
                    opened.pop_all()
        return reason

    def of(self, texts: Sequence[Tokens]) -> AbstractContextManager[None]:
        """Inside, a pass over ``texts``, in this order, begins at the first adapted layer."""
        places = [place for text in texts if (place := self._places.get(_key(text)))]
        if len(places) < len(texts):
            return nullcontext()
        longest = max(size for _, size in places)
        states = self._states.new_zeros((len(texts), longest, self._states.shape[1]))
        for row, (start, size) in zip(states, places, strict=True):
            row[self._columns(longest, size)] = self._states[start : start + size]
        return _entered(_Entry(self, states.to(self.model.device)))

    def repeated(self) -> AbstractContextManager[None]:
        """Inside, a pass over the very batch of an earlier one, such as those of each validation,
        begins at the first adapted layer."""
        return _entered(_Entry(self, repeated=True)) if self.size else nullcontext()

    def close(self) -> None:
        """Delete the files, and leave the layers as they were."""
        self._places, self._states, self._calls = {}, torch.empty(0), {}
        self._opened.close()

    # The file

    def _unsuitable(self, tokens: int) -> str | None:
        needed = tokens * self.base.width * self.base.dtype.itemsize
        if distributed.state().num_processes > 1:
            return "processes share the rows"
        if self.base.quantization == "8bit":
            return "products of 8 bits depend on the batch"
        return room_for(needed)

    def _fill(self, texts: Sequence[Tokens], progress: Progress) -> str | None:
        """Write what the layers give for ``texts`` into a file; why the disk refused, if it did."""
        self._places = places = dict[bytes, tuple[int, int]]()
        width, end = self.base.width, 0

        def read(batch: list[EncodedExample]) -> list[None]:
            nonlocal end
            for example, states in zip(batch, self._given([e.prompt for e in batch]), strict=True):
                _append(file, states)
                places[_key(example.prompt)] = (end, len(states))
                end += len(states)
            return [None] * len(batch)

        try:
            file, self._batches = (self._opened.enter_context(nameless_file()) for _ in range(2))
            in_batches(self.model, _examples(texts), read, progress)
        except OSError as error:
            return error.strerror or str(error)
        mapped = np.memmap(file, np.uint8, "c", shape=(end * width * self.base.dtype.itemsize,))
        self._states = torch.from_numpy(mapped).view(self.base.dtype).view(end, width)
        return None

    def _remember(self, call: bytes, states: Tensor) -> None:
        """Keep the ``states`` of a pass that may be made again, if there is room."""
        start = self._batches.seek(0, os.SEEK_END)
        if room_for(states.nbytes) is not None:
            return
        with suppress(OSError):
            _append(self._batches, states)
            self._calls[call] = start, states.shape

    def _recalled(self, call: bytes) -> Tensor | None:
        if call not in self._calls:
            return None
        start, shape = self._calls[call]
        self._batches.seek(start)
        content = bytearray(self._batches.read(shape.numel() * self.base.dtype.itemsize))
        states = torch.frombuffer(content, dtype=self.base.dtype).view(shape)
        return states.to(self.model.device)

    @torch.no_grad()
    def _given(self, texts: Sequence[Tokens]) -> list[Tensor]:
        """The input of the first adapted layer for each text, (tokens, width)."""
        try:
            with entered(self.model, None, None), _entered(_Entry(self)):
                base_output(self.model, _examples(texts), self.base.pad)
        except _Reached as reached:
            rows = zip(reached.states, texts, strict=True)
            return [row[self._columns(len(row), len(text))] for row, text in rows]
        raise RuntimeError("the model does not call its layers one after another")

    def _columns(self, longest: int, size: int) -> slice:
        """The columns of a text of ``size`` tokens in a batch."""
        return slice(size) if self.base.bidirectional else slice(longest - size, longest)

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether a pass that begins at the first adapted layer gives what a whole one does."""
        length = min(TRIAL, self.base.context)
        ids = [7 * number % self.base.vocabulary for number in range(1, length + 1)]
        texts, outputs = [tuple(ids), tuple(ids[3:])], []
        try:
            given = self._given(texts)
            self._states = torch.cat(given).cpu()
            self._places = {_key(texts[0]): (0, length), _key(texts[1]): (length, length - 3)}
            for way in (nullcontext(), self.of(texts)):
                with entered(self.model, None, None), way:
                    output, mask = base_output(self.model, _examples(texts), self.base.pad)
                outputs.append(output.last_hidden_state[mask.bool()].float())
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return False  # layers that are called in another way
        one, other = outputs
        within = 2 * torch.finfo(self.base.dtype).eps * float(one.abs().max())
        return torch.allclose(one, other, rtol=0, atol=within)

    # The layers

    def _install(self) -> None:
        for layer in self.layers[: self.first]:
            self._opened.callback(_restore, layer, vars(layer).get("forward"))
            layer.forward = partial(self._through, layer.forward)
        first, model = self.layers[self.first], self.model.base_model
        for module, hook in ((first, self._enter), (model, self._begin)):
            self._opened.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def _begin(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a pass that may be made again: what it gave the first time."""
        entry = _entry.get()
        if entry is None or entry.inputs is not self or not entry.repeated:
            return
        entry.states, entry.call = None, b""
        if kwargs.get("past_key_values") is not None:  # which lower layers fill
            return
        call = blake2b(digest_size=16)
        for name, value in (*enumerate(args), *sorted(kwargs.items())):
            if isinstance(value, Tensor):
                call.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() + _bytes(value))
        entry.call = call.digest()
        entry.states = self._recalled(entry.call)

    def _through(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a layer below the first gives: its input, where that is replaced later."""
        entry = _entry.get()
        if entry is None or entry.inputs is not self or entry.states is None:
            output = forward(*args, **kwargs)
            self._others = len(output) - 1 if isinstance(output, tuple) else None
            return output
        states = args[0] if args else kwargs["hidden_states"]
        return states if self._others is None else (states, *(None,) * self._others)

    def _enter(self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments of the first adapted layer."""
        entry = _entry.get()
        if entry is None or entry.inputs is not self:
            return None
        if entry.states is None:
            states = args[0] if args else kwargs["hidden_states"]
            if not entry.repeated:
                raise _Reached(states)
            if entry.call:
                self._remember(entry.call, states)
            return None
        if args:
            return (entry.states, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": entry.states}


def _below(model: Any, linears: Iterable[str]) -> tuple[list[Any], int]:
    """The layers of ``model``, and the number of those below all of ``linears``."""
    try:
        path, layers = layers_of(model)
    except BaseModelError:  # one layer that is read several times
        return [], 0
    numbers = [re.match(rf"{re.escape(path)}\.(\d+)\.", name) for name in linears]
    return list(layers), min((int(one[1]) if one else 0 for one in numbers), default=0)


def _restore(layer: Any, forward: Any) -> None:
    del layer.forward  # the method of its class is visible again
    if forward is not None:
        layer.forward = forward


@contextmanager
def _entered(entry: _Entry) -> Iterator[None]:
    token = _entry.set(entry)
    try:
        with whole_prompts():  # the layers below read a text once, with all that it begins with
            yield
    finally:
        _entry.reset(token)


def _append(file: Any, states: Tensor) -> None:
    rest = memoryview(_bytes(states))
    while rest:
        rest = rest[file.write(rest) :]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


def _examples(texts: Sequence[Tokens]) -> list[EncodedExample]:
    return [EncodedExample("", text, ()) for text in texts]


def _key(text: Tokens) -> bytes:
    return blake2b(np.array(text, np.int64).tobytes(), digest_size=16).digest()
