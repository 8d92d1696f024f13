"""Bases shared out to processes, beside the same bases held whole.

Run as a script: sharded.py OUT KIND=BASE…. Each process writes what it found to OUT/rankN.json.
"""

import atexit
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_domains import distributed
from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.inference.generation import generate_in_batches
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.modeling.heads import features
from lora_domains.modeling.lora import Adapter
from lora_domains.modeling.routing import RoutedLinear
from lora_domains.placement import recover
from lora_domains.tasks import Example
from lora_domains.tokenization.tokenization import Tokenization
from lora_domains.training.gradients import recomputing

IDS = torch.arange(3, 51).reshape(4, 12)
"""(4 rows, 12 tokens) of no meaning."""


def passes() -> int:
    """Each process makes another number of passes."""
    return 3 - 2 * distributed.state().process_index


def gradients(bank: Bank, *, twice: bool = False, again: bool = False, **lora: Any) -> list[Tensor]:
    """Of a new adapter, summed over the passes of this process; ``twice``: two in one graph."""
    bank.add(adapter(bank.base, "a", **lora))
    name = "trained"
    parameters = bank.add(adapter(bank.base, name, **lora), trainable=True)
    with recomputing(bank.base.model) if again else nullcontext():
        for number in range(passes()):
            rows = [IDS[number : number + 1], IDS[-1:]][: 1 + twice]
            with bank.routed(name):
                losses = [output(bank.base, row).float().logsumexp(-1).sum() for row in rows]
            torch.autograd.backward(sum(losses))
            with torch.no_grad(), bank.routed("a"):
                output(bank.base, IDS)
    found = [p.grad.clone() for p in parameters if p.grad is not None]
    assert len(found) == len(parameters)
    bank.remove(name)
    return found


def adapter(base: Base, name: str, seed: int = 1, **lora: Any) -> Adapter:
    """A random adapter with an effect, for a head on encoders."""
    made = new_adapter(base, name, Lora(**lora), 4, 8, seed, 2 if base.bidirectional else None)
    generator = torch.Generator().manual_seed(seed)
    for _, b in made.weights.values():
        b.normal_(std=0.5, generator=generator)
    return made


def output(base: Base, ids: Tensor) -> Tensor:
    """Logits, or the states of an encoder."""
    if not base.bidirectional:
        logits: Tensor = base.model(input_ids=ids).logits
        return logits
    states: Tensor = base.model.base_model(input_ids=ids).last_hidden_state
    return states


def after_an_error(bank: Bank, *, backward: bool) -> list[Tensor]:
    """Gradients once more after memory ran out on one process, in a layer."""
    name, here = "failing", distributed.is_main()
    parameters = bank.add(adapter(bank.base, name), trainable=True)

    def fail(*_: Any) -> None:
        if here:
            raise torch.OutOfMemoryError("no more")

    target = next(m for m in bank.base.model.modules() if isinstance(m, RoutedLinear))
    hook = None if backward else target.register_forward_pre_hook(fail)
    try:
        with bank.routed(name):
            states = output(bank.base, IDS[:1])
        if backward:
            lora = bank.trainable(name)[target.linear]
            lora.b.register_hook(fail)
        states.float().logsumexp(-1).sum().backward()
    except torch.OutOfMemoryError:
        recover(bank.base.model)
    if hook is not None:
        hook.remove()
    bank.remove(name)
    del parameters
    return gradients(bank)


def served(bank: Bank, **lora: Any) -> list[Tensor]:
    bank.add(adapter(bank.base, "served", **lora))
    with torch.no_grad(), bank.routed("served"):
        return [output(bank.base, IDS[:2]) for _ in range(passes())]


def in_threads(bank: Bank) -> list[Tensor]:
    """Two adapters, each in a thread of its own."""
    names = ("a", "b")
    for number, name in enumerate(names):
        bank.add(adapter(bank.base, name, seed=number))

    def call(name: str) -> Tensor:
        with torch.no_grad(), bank.routed(name):
            return output(bank.base, IDS[:2])

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(call, names * passes()))


def magnitudes(bank: Bank) -> list[Tensor]:
    return [*adapter(bank.base, "dora", dora=True).magnitudes.values()]


def of_prompts(bank: Bank) -> list[Tensor]:
    """Features of as many prompts as this process makes passes; they need no output layer."""
    base = bank.base
    tokens = Tokenization(base.tokenizer, 64)
    items = [tokens.encode(Example(f"{n}", "red " * (n + 2), "beta")) for n in range(passes())]
    with torch.no_grad():
        return [features(base.model, items, base.pad)]


def texts(bank: Bank) -> list[str]:
    """Decoding takes another number of steps on each process."""
    base = bank.base
    tokens = Tokenization(base.tokenizer, 64)
    items = [tokens.encode(Example("0", "red blue", "beta"))]
    return generate_in_batches(base.model, base.tokenizer, items, 2 * passes())


def differences(whole: Bank, parts: Bank) -> dict[str, Any]:
    tried: dict[str, Callable[[Bank], list[Tensor]]] = {
        "features": of_prompts,
        "served": served,
        "served, DoRA": lambda bank: served(bank, dora=True),
        "magnitudes": magnitudes,
        "gradients": gradients,
        "gradients of two passes": lambda bank: gradients(bank, twice=True),
        "gradients, DoRA": lambda bank: gradients(bank, dora=True),
        "gradients, recomputed": lambda bank: gradients(bank, again=True),
        "after an error": lambda bank: after_an_error(bank, backward=False),
        "after an error, backward": lambda bank: after_an_error(bank, backward=True),
        "threads": in_threads,
    }
    found = {name: largest(measure(parts), measure(whole)) for name, measure in tried.items()}
    if whole.base.language_head:
        with torch.no_grad():
            logits = [bank.base.model(input_ids=IDS).logits for bank in (parts, whole)]
        found["logits of the base"] = largest(logits[:1], logits[1:])
    if not whole.base.bidirectional:
        found["texts"] = float(texts(parts) != texts(whole))
    return found


def largest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor."""
    assert len(found) == len(wanted) > 0
    pairs = zip(found, wanted, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


@contextmanager
def only_here() -> Iterator[bool]:
    """Whether this is the main process; the others wait, as where it alone writes a file."""
    yield distributed.is_main()
    distributed.same_everywhere(None)


def note_threads(out: Path) -> None:
    """Write how many threads of process groups are left, at the exit of Python."""
    names = [place.read_text().strip() for place in Path("/proc/self/task").glob("*/comm")]
    (out / f"threads{os.environ['RANK']}").write_text(
        str(sum(name.startswith("pt_gloo") for name in names))
    )


def main() -> None:
    out, found = Path(sys.argv[1]), {}
    atexit.register(note_threads, out)  # before the package: called after its own handlers
    for kind, folder in (part.split("=") for part in sys.argv[2:]):
        whole, parts = Bank(load_base(folder)), Bank(load_base(folder, sharded=True))
        before = parts.base.state_digest()
        found[kind] = {
            "differences": differences(whole, parts),
            "resident": parts.base.resident_bytes() / whole.base.resident_bytes(),
            "record": parts.base.record() == whole.base.record(),
        }
        with only_here() as here:
            after = parts.base.state_digest() if here else before
        found[kind]["digests"] = len({before, after, whole.base.state_digest()})
    (out / f"rank{distributed.state().process_index}.json").write_text(json.dumps(found))
    if distributed.is_main():
        # After the last exchange of results: at its exit the other process still helps.
        of_prompts(parts)


if __name__ == "__main__":
    main()
