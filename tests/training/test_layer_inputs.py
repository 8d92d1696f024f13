"""Layers below an adapter read each row once: gradients, resuming, and what is left on the disk."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_base, make_rows
from support.architectures import make_architecture
from support.heads import headed_domain
from support.models import (
    SUITE,
    clear_rows,
    declared,
    in_float64,
    make_run,
    model_in,
    stopped_after,
)

from lora_domains import distributed
from lora_domains.adapters.folder import fingerprint
from lora_domains.console import STEPS, Display, clock
from lora_domains.domain import Domain, with_settings
from lora_domains.inference.cache import CACHE_LIMIT, cache_path, keep_in_cache
from lora_domains.inference.choice_tree import begun
from lora_domains.modeling.base import load_base
from lora_domains.modeling.base_check import layers_of
from lora_domains.tasks import Preference
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training.estimate import estimate
from lora_domains.training.layer_inputs import LayerInputs
from lora_domains.training.loop import Run

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers."""
    return make_base(tmp_path_factory.mktemp("bases") / "deep", num_hidden_layers=4)


def far_from_the_base(run: Run) -> Run:
    weights = run.bank.weights(run.adapter_name)
    generator = torch.Generator().manual_seed(0)
    moved = {name: (a, torch.randn(b.shape, generator=generator) / 20)
             for name, (a, b) in weights.items()}  # fmt: skip
    run.bank.set_weights(run.adapter_name, moved)
    return run


def step(run: Run, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats and gradients of the first rows and general texts."""
    rows, texts = run.train[:count], [*run.general.texts[:5]]
    nats = run.gradients.compute(rows, run.gradients.units(rows), texts)
    return nats, torch.cat([p.grad.flatten() for p in run.parameters if p.grad is not None])


@contextmanager
def computed(model: Any, layer: int) -> Iterator[list[object]]:
    """Calls of the parts of a layer inside that have weights."""
    calls: list[object] = []
    _, layers = layers_of(model)
    leaves = (module for module in layers[layer].modules() if not list(module.children()))
    parts = [leaf for leaf in leaves if list(leaf.parameters())]
    hooks = [part.register_forward_hook(lambda *_: calls.append(layer)) for part in parts]
    yield calls
    for hook in hooks:
        hook.remove()


def check_step(run: Run, passes: float = 2) -> None:
    """A step computes nothing below the adapter, and has the gradients of a whole pass."""
    run.gradients.read_below(run.train, passes)
    assert run.gradients.inputs is not None
    assert run.state.read_below
    step(run)  # measures the memory of a pass, and lets the base read the general texts
    first = run.gradients.inputs.first
    with computed(run.model, first - 1) as below, computed(run.model, first) as above:
        nats, gradients = step(run)
    assert below == []
    assert above
    run.gradients.close()
    with computed(run.model, first - 1) as below:
        whole, wanted = step(run)
    assert below
    assert not any("forward" in vars(layer) for layer in layers_of(run.model)[1])
    torch.testing.assert_close(nats, whole, rtol=1e-6, atol=0)
    assert float((gradients - wanted).norm()) <= 1e-6 * float(wanted.norm())
    assert float(wanted.norm()) > 0


SETTINGS: list[dict[str, Any]] = [
    {"retention": "kl"},
    {"retention": "replay", "dora": True},
    {"retention": "none", "gradient_checkpointing": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_those_of_whole_passes(
    tmp_path: Path, deep: Path, settings: dict[str, Any]
) -> None:
    domain = declared(clear_rows(60), top_layers=2, **settings)
    check_step(far_from_the_base(make_run(tmp_path, deep, domain)))


@pytest.mark.parametrize("kind", ["gpt2", "gemma3_text", "jamba", "bloom"])
def test_gradients_on_other_causal_bases(tmp_path: Path, kind: str) -> None:
    folder = make_architecture(tmp_path / "base", kind)
    domain = declared(clear_rows(60), top_layers=1, retention="kl")
    check_step(far_from_the_base(make_run(tmp_path, folder, domain)))


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert"])
def test_gradients_of_a_head_on_an_encoder(
    tmp_path: Path, bases: Callable[[str], Path], kind: str
) -> None:
    """Rows and texts with masked tokens.

    In float64: what float32 rounds here, which depends on where a tensor lies in memory, reaches
    1.3e-6 of the gradients.
    """
    domain = with_settings(headed_domain(), top_layers=1, retention="kl")
    run = far_from_the_base(make_run(tmp_path, bases(kind), domain))
    with in_float64([run]):
        check_step(run)


def test_gradients_of_pairs(tmp_path: Path, deep: Path) -> None:
    pairs = [{"prompt": row["text"], "chosen": "blue stone", "rejected": f"red {row['label']}"}
             for row in make_rows(60)]  # fmt: skip
    task = Preference(beta=0.3)
    run = make_run(tmp_path, deep, declared(pairs, "pairs", task, top_layers=2, retention="none"))
    run = far_from_the_base(run)
    run.validation.compare_with_base(run.gradients.pairs, run.train)
    run.gradients.read_below(run.train, 2)
    nats, gradients = step(run)
    assert run.gradients.pairs is not None
    answers, _ = run.gradients.pairs.weighted(run.train[:4])
    with computed(run.model, 1) as below:
        run.gradients._domain_gradients([answers], 4)
    assert below == []
    run.gradients.close()
    whole, wanted = step(run)
    torch.testing.assert_close(nats, whole, rtol=1e-6, atol=0)
    assert float((gradients - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_validations_read_each_batch_below_once(
    tmp_path: Path, deep: Path, gpt2_base: Path, bases: Callable[[str], Path], kind: str
) -> None:
    """Rows with their choices, and texts that drift is measured on: the same to the last bit."""
    folder = {"llama": deep, "gpt2": gpt2_base}.get(kind) or bases(kind)
    domain = headed_domain() if kind == "bert" else declared(clear_rows(90))
    run = make_run(tmp_path, folder, with_settings(domain, top_layers=1, retention="kl"))
    far_from_the_base(run)
    run.gradients.read_below(run.train, 2)
    assert run.gradients.inputs is not None
    lowest = run.gradients.inputs.first - 1
    whole = run.validation.evaluate()
    for rounds in range(2):
        with computed(run.model, lowest) as below, run.gradients.repeated():
            assert run.validation.evaluate() == whole
        assert bool(below) == (rounds == 0)
    far_from_the_base(run)
    moved = run.bank.weights(run.adapter_name)
    run.bank.set_weights(run.adapter_name, {name: (a, 2 * b) for name, (a, b) in moved.items()})
    with computed(run.model, lowest) as below, run.gradients.repeated():
        further = run.validation.evaluate()
    assert below == []
    assert further != whole
    run.gradients.close()
    assert run.validation.evaluate() == further


def test_prompts_that_begin_alike_are_read_whole_where_layers_below_read_them(
    tmp_path: Path, deep: Path
) -> None:
    run = make_run(tmp_path, deep, declared(clear_rows(60), top_layers=1, retention="none"))
    rows = [EncodedExample(str(n), (*range(5, 35), 40 + n), (3,)) for n in range(40)]
    run.gradients.read_below(run.train, 2)
    assert begun(run.model, rows)[1] is not None
    with run.gradients.repeated():
        assert begun(run.model, rows)[1] is None
    run.gradients.close()


def test_another_batch_of_the_same_shape_is_read_whole(tmp_path: Path, deep: Path) -> None:
    run = make_run(tmp_path, deep, declared(clear_rows(60), top_layers=1, retention="none"))
    ids = torch.arange(3, 40)[None]
    masks = torch.ones_like(ids), (ids > 8).long()
    batches = [(ids, masks[0]), (ids.flip(1), masks[0]), (ids, masks[1])]

    def read(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = run.model(input_ids=batch[0], attention_mask=batch[1]).logits
        return logits

    with torch.no_grad():
        whole = [read(batch) for batch in batches]
        run.gradients.read_below(run.train, 2)
        with run.gradients.repeated():
            for _ in range(2):
                assert all(map(torch.equal, map(read, batches), whole))
    run.gradients.close()


def test_batches_without_room_are_read_whole_each_time(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, deep, declared(clear_rows(90), top_layers=1, retention="none"))
    run.gradients.read_below(run.train, 2)
    assert run.gradients.inputs is not None
    monkeypatch.setenv(CACHE_LIMIT, str(run.gradients.inputs.size / 1e9))
    whole = run.validation.evaluate()
    for _ in range(2):
        with computed(run.model, 0) as below, run.gradients.repeated():
            assert run.validation.evaluate() == whole
        assert below
    run.gradients.close()


@pytest.mark.skipif(os.name == "nt", reason="limits no size of files")
def test_a_disk_that_fills_up_ends_no_run(tmp_path: Path, deep: Path) -> None:
    """Neither while the layers read the rows nor in a validation: they are read whole then."""
    import resource

    run = make_run(tmp_path, deep, declared(clear_rows(90), top_layers=1, retention="none"))
    before, whole = step(run)[1], run.validation.evaluate()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # Less than a buffer, which would be written when the file is closed.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        run.gradients.read_below(run.train, 2)
        assert run.state.read_below is False
        assert torch.equal(step(run)[1], before)
        run.gradients.close()
        run.state.read_below = None
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        run.gradients.read_below(run.train, 2)
        assert run.state.read_below
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        for _ in range(2):
            with run.gradients.repeated():
                assert run.validation.evaluate() == whole
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run.gradients.close()


def test_no_gradient_goes_below_the_adapter(tmp_path: Path, deep: Path) -> None:
    """Neither with what the layers gave before, nor without."""
    run = make_run(tmp_path, deep, declared(clear_rows(60), top_layers=2, retention="none"))
    asked: list[bool] = []
    step(run)
    _, layers = layers_of(run.model)
    for layer in layers[:2]:
        layer.register_forward_hook(lambda _m, _a, output: asked.append(output.requires_grad))
    step(run)
    assert asked == [False, False]


def test_other_threads_see_the_whole_base(tmp_path: Path, deep: Path) -> None:
    run = make_run(tmp_path, deep, declared(clear_rows(60), top_layers=2, retention="none"))
    run.gradients.read_below(run.train, 2)
    inputs = run.gradients.inputs
    assert inputs is not None
    texts = [row.prompt + row.answer for row in run.train[:2]]
    ids = torch.arange(3, 40)[None]
    found: list[torch.Tensor] = []

    def ask() -> None:
        with torch.no_grad():
            found.append(run.model(input_ids=ids).logits)

    ask()
    with inputs.of(texts):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
    assert torch.equal(*found)
    run.gradients.close()


# ── A whole run ─────────────────────────────────────────────────────────────────────────────────


def top(**settings: Any) -> Domain:
    return declared(make_rows(100), **{"top_layers": 1, "epochs": 3, "dropout": 0.3} | settings)


@pytest.mark.parametrize("steps", [2, 8])
def test_a_resumed_run_ends_with_the_same_bytes(
    tmp_path: Path, tiny_base: Path, steps: int
) -> None:
    """Stopped in the first epoch, when layers have read the rows once, and in the second."""
    model_in(tmp_path / "whole", tiny_base).fit(top())
    stopped_after(steps, top(), tmp_path / "stopped", tiny_base)
    model_in(tmp_path / "stopped", tiny_base).fit(top(), resume=True)
    one, other = (fingerprint(tmp_path / name / "spam") for name in ("whole", "stopped"))
    assert one == other


def test_nothing_of_the_rows_is_left_on_the_disk(
    tmp_path: Path, tiny_base: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has no name while the run lasts, so that not even a killed one leaves it."""
    model = model_in(tmp_path, tiny_base)
    model.display = Display()
    seen: list[list[Path]] = []
    read = LayerInputs.read

    def reading(self: LayerInputs, *args: Any) -> str | None:
        refused = read(self, *args)
        seen.append([path for path in cache.rglob("*") if path.is_file()])
        return refused

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerInputs, "read", reading)
        model.fit(top(retention="none"))
    assert all(path.parent.name == "predictions" for path in seen[0])  # of public text
    output = " ".join(capsys.readouterr().out.split())
    assert "1 below the adapter read each row once: " in output
    assert not any("forward" in vars(layer) for layer in layers_of(model.base.model)[1])
    assert model.evaluate(top(retention="none"), suite=SUITE)


def test_a_dry_run_reads_the_rows_below_once_too(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    """It computes the lowest layer less often than without room for what it gives."""
    monkeypatch.setattr("lora_domains.console.clock.ENOUGH", 0.0)  # the first parts are enough
    counts = []
    for gigabytes in ("1", "0"):
        monkeypatch.setenv(CACHE_LIMIT, gigabytes)
        run = make_run(tmp_path / gigabytes, deep, top(top_layers=2, retention="kl"))
        with computed(run.model, 0) as below, computed(run.model, 3) as above:
            assert set(estimate(run).phases) <= {"steps", "validation", "general_text"}
        counts.append(len(above) - len(below))
        assert run.gradients.inputs is run.state.read_below is None
    assert counts[0] > counts[1] == 0
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_an_estimate_counts_the_time_of_the_layers_below(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, deep, top(top_layers=2, retention="none"))
    now = [0.0]

    def passed(*_: Any) -> None:
        now[0] += 1.0

    layers_of(run.model)[1][0].mlp.register_forward_hook(passed)  # the steps do not compute it
    monkeypatch.setattr(clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    assert estimate(run).phases[STEPS] > 0


def test_rows_that_are_read_once_are_not_kept(tmp_path: Path, deep: Path) -> None:
    run = make_run(tmp_path, deep, top())
    run.gradients.read_below(run.train, 1.5)
    assert run.gradients.inputs is not None
    assert run.gradients.inputs.size == 0
    every = make_run(tmp_path, deep, declared(clear_rows(60)))
    every.gradients.read_below(every.train, 8)
    assert every.gradients.inputs is not None
    assert every.gradients.inputs.size == 0
    assert every.gradients.inputs.first == 0


def test_without_room_layers_read_the_rows_in_each_epoch(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A run that is resumed then says that rounding differs; one without room stays so."""
    whole = model_in(tmp_path / "whole", tiny_base).fit(top())
    stopped_after(7, top(), tmp_path / "stopped", tiny_base)
    monkeypatch.setenv(CACHE_LIMIT, "1e-6")
    model = model_in(tmp_path / "stopped", tiny_base)
    model.display = Display()
    assert (
        model.fit(top(), resume=True).adapter.training["steps"] == whole.adapter.training["steps"]
    )
    output = " ".join(capsys.readouterr().out.split())
    assert "read the rows in each epoch: " in output
    assert "are more than LORA_DOMAINS_CACHE_GB allows" in output
    assert "from here on the result is the same up to rounding" in output
    stopped_after(7, top(), tmp_path / "small", tiny_base)
    monkeypatch.delenv(CACHE_LIMIT)
    run = make_run(tmp_path / "small", tiny_base, top())
    trained = run.fit(resume=True)
    assert trained.adapter.weights
    assert run.state.read_below is False


def test_all_that_is_kept_has_one_limit(
    deep: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(deep)
    linears = [name for name, _ in base.model.named_modules() if ".3." in name]
    inputs, text = LayerInputs(base, linears), (5, 6, 7)
    needed = len(text) * base.width * base.dtype.itemsize
    monkeypatch.setenv(CACHE_LIMIT, str((needed + 100.5) / 1e9))
    path = cache_path("scores", {}, "json")
    assert keep_in_cache(path, b"x" * 200) is None
    assert inputs.read([text]) is None
    assert inputs.size == needed
    assert not path.exists()
    assert keep_in_cache(path, b"x" * 100) is None
    assert "CACHE_GB allows" in str(keep_in_cache(path, b"x" * 101))
    inputs.close()
    assert keep_in_cache(path, b"x" * 200) is None


def test_processes_and_a_base_in_8_bits_read_rows_whole(
    deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load_base(deep)
    top = [name for name, _ in base.model.named_modules() if ".3." in name]
    eight = replace(base, quantization="8bit")
    refused = LayerInputs(eight, top).read([(5, 6, 7)])
    assert refused == "products of 8 bits depend on the batch"
    monkeypatch.setattr(distributed, "state", lambda: SimpleNamespace(num_processes=2))
    assert LayerInputs(base, top).read([(5, 6, 7)]) == "processes share the rows"


def test_layers_that_hand_on_more_are_read_whole(
    tmp_path: Path, deep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An architecture whose upper layers read what a lower one left elsewhere."""
    run = make_run(tmp_path, deep, declared(clear_rows(60), top_layers=2, retention="none"))
    _, layers = layers_of(run.model)
    left: list[torch.Tensor] = []
    layers[1].register_forward_hook(lambda _m, args, _o: left.append(args[0]))
    layers[3].register_forward_hook(lambda _m, _a, output: output + left.pop().mean())
    before = step(run)[1]
    run.gradients.read_below(run.train, 2)
    assert run.state.read_below is False
    assert torch.equal(step(run)[1], before)
    assert not any("forward" in vars(layer) for layer in layers)
