"""``predict``, ``generate`` and ``stream``: mixed batches, threads, adapters loaded meanwhile."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import logits, save, strong, token_ids
from support.device import base_on

from lora_domains import Classification, DomainModel, Generation
from lora_domains.errors import AdapterCorrupt, DataError, UsageError
from lora_domains.inference.predict import Prediction
from lora_domains.modeling.routing import RoutedLinear

PROMPTS = ["the red", "the blue river of", "stone", "call now to win", "meet later today", "a"]
NAMES = ["a", "b", None, "c", "a", "b"]


def make(folder: Path, tiny_base: Path, slots: int | None = None) -> DomainModel:
    """Four adapters, saved in ``folder`` and loaded from there."""
    base = base_on(tiny_base)
    model = DomainModel(base, slots=slots, out=folder)
    for seed, name in enumerate("abcd", start=1):
        if not (folder / name).exists():
            save(folder / name, strong(base, name, seed, rank=2 + 2 * seed), base)
        model.load_adapter(name)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture
def model(folder: Path, tiny_base: Path) -> DomainModel:
    return make(folder, tiny_base)


# ── Mixed lists ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=str,
)
def test_generate_uses_the_domain_of_each_prompt(
    model: DomainModel, options: dict[str, Any]
) -> None:
    several = options.get("num_return_sequences", 1)
    together = model.generate(PROMPTS, domains=NAMES, max_new_tokens=6, **options)
    assert len(together) == several * len(PROMPTS)
    different = 0
    for i, (prompt, name) in enumerate(zip(PROMPTS, NAMES, strict=True)):
        with model.using(name):
            alone = model.generate([prompt], max_new_tokens=6, **options)
        assert together[i * several : (i + 1) * several] == alone
        with model.using(None):
            different += model.generate([prompt], max_new_tokens=6, **options) != alone
    assert different >= 4, "the adapters hardly change the text"


def test_sampled_return_sequences_come_in_the_order_of_the_prompts(model: DomainModel) -> None:
    texts = model.generate(
        ["the red", "the blue"], domains=["b", "a"], max_new_tokens=4, do_sample=True, top_k=1,
        num_return_sequences=2,
    )  # fmt: skip
    alone = [
        model.generate(p, d, max_new_tokens=4) for p, d in (("the red", "b"), ("the blue", "a"))
    ]
    assert texts == [alone[0], alone[0], alone[1], alone[1]]


@pytest.mark.contract
def test_the_model_is_called_with_a_domain_for_each_row(model: DomainModel) -> None:
    with torch.no_grad():
        found = model(input_ids=token_ids(), domains=["b", None]).logits
        assert torch.equal(model(input_ids=token_ids(), domain="a").logits, logits(model.bank, "a"))
        with pytest.raises(UsageError, match="3 for 2 rows"):
            model(input_ids=token_ids(), domains=["a", "a", "a"])
    torch.testing.assert_close(found[0], logits(model.bank, "b")[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], logits(model.bank)[1], atol=1e-5, rtol=0)


def test_contradictory_domains_are_refused(model: DomainModel) -> None:
    with pytest.raises(UsageError, match="either one domain"):
        model.generate("a", "a", domains=["b"])
    with pytest.raises(UsageError, match="1 for 2 rows"):
        model.generate(["a", "b"], domains=["b"])
    with pytest.raises(UsageError, match="either one domain"):
        model.generate(["a"], domains="a")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="a loaded adapter"):
        model.generate(["a", "b"], domains=["b", "e"])


def test_predict_prompts_each_text_as_its_domain_does(
    model: DomainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = Classification("text", "label", labels=("ham", "spam"))
    tasks = {"a": label, "b": Generation("text", "label", max_new_tokens=3), "c": label}
    monkeypatch.setattr("lora_domains.inference.predict.task_of", lambda _, name: tasks[name])
    texts, names = ["alpha red", "stone", "beta blue cloud", "win"], ["a", "b", "c", "a"]
    together = model.predict(texts, domains=names)
    for text, name, found in zip(texts, names, together, strict=True):
        alone = model.predict(text, name)[0]
        assert isinstance(alone, Prediction) is (name != "b")
        if isinstance(alone, Prediction) and isinstance(found, Prediction):
            assert found.label == alone.label
            assert found.probability == pytest.approx(alone.probability, abs=1e-5)
        else:
            assert found == alone
    with pytest.raises(UsageError, match="a domain to predict for"):
        model.predict(texts, domains=["a", None, "c", "a"])


def assert_alike(answers: Sequence[Any], expected: Sequence[Any]) -> None:
    """The batches of a block are others, which changes rounding."""
    assert [one.label for one in answers] == [one.label for one in expected]
    found, wanted = ([one.probability for one in part] for part in (answers, expected))
    assert found == pytest.approx(wanted, abs=1e-6)


def test_a_generator_of_texts_is_answered_in_blocks(
    model: DomainModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = Classification("text", "label", labels=("ham", "spam"))
    monkeypatch.setattr("lora_domains.inference.predict.task_of", lambda *_: label)
    monkeypatch.setattr("lora_domains.inference.batches.BLOCK", 4)
    texts, names, read = [f"alpha red {n}" for n in range(10)], list("abcabcabca"), list[str]()

    def coming() -> Iterator[str]:
        for text in texts:
            read.append(text)
            yield text

    answers = model.predict(coming(), domains=iter(names))
    assert not read
    first = next(answers)
    assert len(read) == 4
    assert_alike([first, *answers], model.predict(texts, domains=names))
    # The adapter is the one in use when predict is called, wherever the answers are read.
    with model.using("b"):
        answers = model.predict({"text": text} for text in texts)
    assert_alike(list(answers), model.predict(texts, "b"))
    for wrong in (None, {"note": "alpha"}):
        rows: list[Any] = [*texts[:5], wrong]
        answers = model.predict(iter(rows), "b")
        assert_alike([next(answers) for _ in range(4)], model.predict(texts[:4], "b"))
        with pytest.raises(DataError, match="input 5"):
            next(answers)


def test_the_domains_of_a_generator_are_checked(model: DomainModel) -> None:
    for given, part in ({"domain": "a", "domains": iter("a")}, "both"), ({"domain": "e"}, "loaded"):
        with pytest.raises(UsageError, match=part):
            model.predict(iter(["a", "b"]), **given)
    with pytest.raises(UsageError, match="a domain to predict for"):
        model.predict(iter(["a"]))
    for domains, part in (("a", "1 domains, and more texts"), ("aab", "2 texts, and more domains")):
        with pytest.raises(UsageError, match=part):
            list(model.predict(iter(["a", "b"]), domains=iter(domains)))


# ── Streams ─────────────────────────────────────────────────────────────────────────────────────


def test_a_stream_uses_the_domain_of_its_call(model: DomainModel) -> None:
    wanted = {name: model.generate("the red", name, max_new_tokens=8) for name in ("a", "b")}
    with model.using("a"):
        bare = model.stream("the red", max_new_tokens=8)
    named = model.stream("the red", "b", max_new_tokens=8)
    model.unload("a")
    assert "".join(bare) == wanted["a"] != wanted["b"] == "".join(named)
    assert model.bank.current() is None


def test_closing_a_stream_ends_its_thread(model: DomainModel) -> None:
    before = threading.active_count()
    pieces = model.stream("the red", "a", max_new_tokens=100, min_new_tokens=100)
    assert isinstance(pieces, Iterator)
    next(pieces)
    started = time.monotonic()
    pieces.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before
    assert time.monotonic() - started < 5


def test_an_error_in_the_thread_is_raised_where_the_stream_is_read(model: DomainModel) -> None:
    with pytest.raises(ValueError, match="nonsense"):
        list(model.stream("the red", "a", nonsense=True))
    with pytest.raises(UsageError, match="a loaded adapter"):
        model.stream("the red", "e")


# ── Coming and going while calls run ────────────────────────────────────────────────────────────


@pytest.fixture
def in_the_middle(model: DomainModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``run(change)``: logits under "a" where ``change`` happens after half of the linears."""

    def run(change: Any) -> torch.Tensor:
        calls = 0
        forward = RoutedLinear.forward

        def watched(self: RoutedLinear, x: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 7:
                thread = threading.Thread(target=change)
                thread.start()
                thread.join()
            return forward(self, x)

        with monkeypatch.context() as patch, torch.no_grad(), model.using("a"):
            patch.setattr(RoutedLinear, "forward", watched)
            return model(input_ids=token_ids()).logits

    return run


def test_unloading_and_loading_again_do_not_affect_calls_in_flight(
    model: DomainModel, in_the_middle: Any, folder: Path, tmp_path: Path
) -> None:
    wanted, other = logits(model.bank, "a"), logits(model.bank, "b")
    assert torch.equal(in_the_middle(lambda: model.unload("a")), wanted)
    assert model.domains == ("b", "c", "d")
    model.load_adapter("a")
    assert torch.equal(in_the_middle(lambda: model.load_adapter(folder / "b", "a")), wanted)
    assert torch.equal(logits(model.bank, "a"), other)
    assert torch.equal(in_the_middle(lambda: model.load_adapter(folder / "a", "a")), other)
    assert torch.equal(logits(model.bank, "a"), wanted)


def test_eviction_does_not_affect_a_call_in_flight(
    tiny_base: Path, folder: Path, in_the_middle: Any, model: DomainModel
) -> None:
    wanted = logits(model.bank, "a")
    model.bank.slots = 1
    assert torch.equal(in_the_middle(lambda: logits(model.bank, "b")), wanted)
    assert model.bank.on_device == ("b",)


def test_loading_again_replaces_an_adapter_unless_the_folder_is_broken(
    model: DomainModel, tmp_path: Path
) -> None:
    base = model.base
    save(tmp_path / "own", strong(base, "own", 7), base)
    model.load_adapter(tmp_path / "own")
    before = logits(model.bank, "own")
    save(tmp_path / "own", strong(base, "own", 8), base)
    assert model.load_adapter(tmp_path / "own") == "own"
    after = logits(model.bank, "own")
    assert not torch.equal(before, after)
    with (tmp_path / "own" / "adapter_model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(AdapterCorrupt):
        model.load_adapter(tmp_path / "own")
    assert torch.equal(logits(model.bank, "own"), after)


# ── A budget of slots ───────────────────────────────────────────────────────────────────────────


@pytest.mark.contract
def test_the_least_recently_used_adapters_move_to_host_memory(
    model: DomainModel, folder: Path, tiny_base: Path
) -> None:
    wanted = {name: logits(model.bank, name) for name in "abcd"}
    small = make(folder, tiny_base, slots=2)
    assert small.domains == ("a", "b", "c", "d")
    assert small.bank.on_device == ("c", "d")
    for name in "cab":
        assert torch.equal(logits(small.bank, name), wanted[name])
    assert small.bank.on_device == ("a", "b")
    small.unload("a")
    assert small.bank.on_device == ("b",)
    with pytest.raises(UsageError, match="at least one adapter on the device"):
        make(folder, tiny_base, slots=0)


def test_more_domains_in_one_call_than_slots(
    model: DomainModel, folder: Path, tiny_base: Path
) -> None:
    small = make(folder, tiny_base, slots=2)
    names = ["a", "d", None, "c", "b", "a"]
    wanted = model.generate(PROMPTS, domains=names, max_new_tokens=5)
    assert small.generate(PROMPTS, domains=names, max_new_tokens=5) == wanted
    assert len(small.bank.on_device) == 2
    ids = token_ids()[[0, 1, 0, 1]]
    with torch.no_grad():
        found = small(input_ids=ids, domains=list("abcd")).logits
        wanted_logits = model(input_ids=ids, domains=list("abcd")).logits
    assert torch.equal(found, wanted_logits)
    assert len(small.bank.on_device) == 2


def test_rows_are_sorted_by_domain_those_with_a_slot_first(folder: Path, tiny_base: Path) -> None:
    bank = make(folder, tiny_base, slots=2).bank
    assert bank.parts(["a", "d", None, "b", "c", "a"]) == [[1, 2], [4, 0, 5], [3]]
    seen = sorted(row for part in bank.parts(["a"] * 3) for row in part)
    assert seen == [0, 1, 2]


# ── Threads ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "slots"),
    [
        pytest.param(2, None, marks=pytest.mark.long),
        (8, None),
        pytest.param(4, 2, marks=pytest.mark.long),
    ],
)
def test_a_thousand_calls_from_threads_give_the_right_logits(
    folder: Path, tiny_base: Path, threads: int, slots: int | None
) -> None:
    """Each thread has its own domains, while adapters are loaded, unloaded and evicted."""
    model = make(folder, tiny_base, slots)
    names = ["a", "b", None, "c"]
    wanted = {name: logits(model.bank, name) for name in names}
    mixed = {
        (a, b): model(input_ids=token_ids(), domains=[a, b]).logits for a in names for b in names
    }
    over = threading.Event()

    def calls(thread: int) -> int:
        right = 0
        with torch.no_grad():
            for i in range(1000 // threads):
                one, other = names[(thread + i) % 4], names[(thread + i // 4) % 4]
                if i % 3:
                    with model.using(one):
                        right += torch.equal(model(input_ids=token_ids()).logits, wanted[one])
                else:
                    found = model(input_ids=token_ids(), domains=[one, other]).logits
                    right += torch.equal(found, mixed[one, other])
        return right

    def change() -> int:
        changes = 0
        while not over.is_set():
            model.unload("d")
            model.load_adapter("d")
            model.load_adapter("c")
            changes += 1
        return changes

    with ThreadPoolExecutor(threads + 1) as pool:
        changed = pool.submit(change)
        found = [pool.submit(calls, thread) for thread in range(threads)]
        right = [part.result() for part in found]
        over.set()
        assert changed.result() > 3
    assert right == [1000 // threads] * threads
