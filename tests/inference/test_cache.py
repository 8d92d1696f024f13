"""What the base computes is kept, and read by those alone who ask for the very same."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save, save_file
from support.models import QUIET, clear_rows, declared, make_run

from lora_domains.errors import UsageError
from lora_domains.evaluation.scorer import Part, Scorer
from lora_domains.inference import cache as cache_files
from lora_domains.inference.memory import reuse_pass_limit
from lora_domains.inference.reference import Pairs, Prediction, Reference
from lora_domains.inference.scores import TEXT, model_scores, without_text
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.probes.instructions import Answers
from lora_domains.probes.lm_eval import Documents
from lora_domains.tasks import Classification, Example, Generation
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.tokenization.tokenization import Tokenization

SECRET = "Zyrconia"
LABELS = (" ham", " spam")
TEXTS = ("alpha river", "green cloud stone", "call now")


@contextmanager
def passes(base: Base) -> Iterator[list[int]]:
    """The number of rows of each pass through ``base`` inside."""
    counts: list[int] = []
    hook = base.model.base_model.register_forward_pre_hook(
        lambda _module, _args, options: counts.append(len(options["input_ids"])), with_kwargs=True
    )
    yield counts
    hook.remove()


def rows_of(base: Base, texts: Sequence[str] = TEXTS) -> list[EncodedRow]:
    tokenization = Tokenization(base.tokenizer, 32)
    examples = [Example(f"row:{n}", text, LABELS[n % 2], LABELS, n % 2)
                for n, text in enumerate(texts)]  # fmt: skip
    return tokenization.encode_rows(examples)


def scores(base: Base, rows: Sequence[EncodedRow]) -> list[dict[str, Any]]:
    """Those of the base."""
    task = Classification(labels=("ham", "spam"))
    return Scorer(Bank(base), QUIET).scores(Part("rows", task, rows), [None])[None]


def predictions(base: Base, rows: Sequence[EncodedRow]) -> list[Prediction]:
    """Those of the base, on public texts."""
    texts = [EncodedExample(row.encoded.id, (1,), row.encoded.prompt[1:]) for row in rows]
    reference = Reference(Bank(base), texts, public=True)
    return [reference._base[text.id] for text in texts]


def log_odds(base: Base, rows: Sequence[EncodedRow]) -> list[float]:
    """Those of the base between two answers."""
    pairs = Pairs(Bank(base), "none", 0.1)
    pairs.read([row.encoded for row in rows])
    return [*pairs.margins.values()]


Computed = Callable[[Base, Sequence[EncodedRow]], list[Any]]


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Prediction):
        assert one.ids is other.ids is None
        return torch.equal(one.logprobs, other.logprobs) and torch.equal(one.nats, other.nats)
    return bool(one == other)


@pytest.mark.parametrize("computed", [scores, predictions, log_odds], ids=lambda f: f.__name__)
def test_what_the_base_computes_is_read_by_the_next_that_asks(
    cache: Path, tiny_base: Path, computed: Computed
) -> None:
    base = load_base(tiny_base)
    rows = rows_of(base)
    first = computed(base, rows)
    (path,) = (path for path in cache.rglob("*") if path.is_file())
    assert path.stat().st_mode & 0o077 == 0
    again = load_base(tiny_base)
    with passes(again) as counts:
        second = computed(again, rows_of(again))
    assert counts == []
    assert all(map(equal, first, second))


def one_row(folder: Path) -> Sequence[str]:
    return (*TEXTS[:2], "call now now")


def one_byte_of_the_tokenizer(folder: Path) -> Sequence[str]:
    path = folder / "tokenizer.json"
    state = json.loads(path.read_text())
    # A merge that no row needs; the rows have the same tokens as before.
    state["model"]["merges"].pop()
    path.write_text(json.dumps(state))
    return TEXTS


def one_weight(folder: Path) -> Sequence[str]:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, path, metadata={"format": "pt"})
    return TEXTS


@pytest.mark.parametrize("computed", [scores, predictions, log_odds], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "change", [one_row, one_byte_of_the_tokenizer, one_weight], ids=lambda f: f.__name__
)
def test_nothing_stale_is_read(
    cache: Path, tiny_base: Path, tmp_path: Path, computed: Computed,
    change: Callable[[Path], Sequence[str]],
) -> None:  # fmt: skip
    before = load_base(tiny_base)
    old = computed(before, rows_of(before))
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    texts = change(folder)
    base = load_base(folder)
    with passes(base) as counts:
        found = computed(base, rows_of(base, texts))
    assert sum(counts) >= len(TEXTS)
    if change is not one_byte_of_the_tokenizer:  # which these rows do not use
        assert not all(map(equal, old, found))


@pytest.mark.parametrize("computed", [scores, predictions, log_odds], ids=lambda f: f.__name__)
def test_what_another_version_of_the_code_computed_is_not_read(
    cache: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, computed: Computed
) -> None:
    base = load_base(tiny_base)
    computed(base, rows_of(base))
    monkeypatch.setattr("lora_domains.evaluation.store.code_version", lambda: "another")
    monkeypatch.setattr("lora_domains.inference.reference._code", lambda: "another")
    with passes(base) as counts:
        computed(base, rows_of(base))
    assert sum(counts) >= len(TEXTS)


def test_a_weight_that_changes_in_memory_is_noticed(cache: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base)
    rows = rows_of(base)
    before = scores(base, rows)
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.25
    assert scores(base, rows) != before


def test_what_was_computed_in_other_batches_is_not_read(cache: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base)
    rows = rows_of(base)
    scores(base, rows)
    reuse_pass_limit(base.model, 2**20, pytest.fail)
    with passes(base) as counts:
        scores(base, rows)
    assert sum(counts) >= len(TEXTS)


def test_what_was_computed_in_another_precision_is_not_read(cache: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base)
    found = [cache_files.circumstances(base)]
    try:
        torch.set_float32_matmul_precision("medium")
        found.append(cache_files.circumstances(base))
        torch.use_deterministic_algorithms(True)
        found.append(cache_files.circumstances(base))
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.use_deterministic_algorithms(False)
    assert [found.count(one) for one in found] == [1, 1, 1]
    assert cache_files.circumstances(base) == found[0]


def test_the_file_of_another_number_of_rows_is_not_read(cache: Path, tiny_base: Path) -> None:
    base = load_base(tiny_base)
    rows = rows_of(base)
    assert scores(base, []) == []
    assert not cache.exists()
    before = scores(base, rows)
    (path,) = cache.rglob("*.json")
    cache_files.keep_records(path, before[:2])
    assert scores(base, rows) == before
    assert cache_files.read_records(path) == before


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("computed", [scores, predictions, log_odds], ids=lambda f: f.__name__)
def test_a_damaged_file_is_not_used_and_written_again(
    cache: Path, tiny_base: Path, tmp_path: Path, computed: Computed
) -> None:
    base = load_base(tiny_base)
    rows = rows_of(base)
    before = computed(base, rows)
    (path,) = (path for path in cache.rglob("*.*"))
    whole = path.read_bytes()
    computed(base, rows_of(base, ("river stone", "call alpha", "now")))
    (other,) = (other for other in cache.rglob("*.*") if other != path)
    if computed is scores:
        older = json.dumps(json.loads(whole)["records"]).encode()
        damaged = [b"null", b"3", b"[1]", b'{"sha256": 1, "records": [1]}', older]
    else:
        tensors = load_file(path)
        swapped = [{f"{name}s": tensor for name, tensor in tensors.items()},
                   {name: tensor[1:] for name, tensor in tensors.items()}, tensors]  # fmt: skip
        damaged = [save(tensors) for tensors in swapped]
    draw = random.Random(0)
    bits = [flipped(whole, draw.randrange(8 * len(whole))) for _ in range(6)]
    for content in (b"", whole[:-1], whole + b"0", other.read_bytes(), *damaged, *bits):
        path.write_bytes(content)
        assert all(map(equal, computed(base, rows), before))
        assert path.read_bytes() == whole


def test_no_flipped_bit_goes_unnoticed(cache: Path) -> None:
    tensors = {"nats": torch.tensor([42.43, 0.5]), "top": torch.tensor([[3]], dtype=torch.int32)}
    records: list[dict[str, Any]] = [{"nats": 42.43, "correct": 1}]
    json_path, path = entry("a"), cache_files.cache_path("predictions", {})
    cache_files.keep_tensors(path, tensors)
    cache_files.keep_records(json_path, records)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        path.write_bytes(flipped(whole, bit))
        read = cache_files.read_tensors(path)
        assert read is None or all(torch.equal(read[name], tensors[name]) for name in tensors)
    whole = json_path.read_bytes()
    for bit in range(0, 8 * len(whole), 13):
        json_path.write_bytes(flipped(whole, bit))
        assert cache_files.read_records(json_path) in (None, records)


def test_domains_share_what_the_base_predicts_on_public_text_alone(
    cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    # So many steps that they read all public texts.
    spam = declared(clear_rows(60), retention="kl", epochs=40)
    one = make_run(tmp_path, tiny_base, spam)
    assert one.general.reference.top is None
    other = make_run(
        tmp_path, tiny_base, declared(clear_rows(90), name="other", retention="kl", epochs=40)
    )
    with passes(other.bank.base) as counts:
        assert other.general.texts == one.general.texts
        assert other.general.reference.top is None
    assert counts == []
    files = set(cache.rglob("*.*"))
    own = [{"text": f"{SECRET} {n} {word}"} for n in range(4) for word in WORDS.split()[:8]]
    run = make_run(tmp_path, tiny_base, replace(spam, data=replace(spam.data, general=own)))
    with passes(run.bank.base) as counts:
        assert run.general.reference.top is run.validation.reference.top is None
    assert counts
    assert set(cache.rglob("*.*")) == files


def test_no_text_is_kept_of_rows(cache: Path, tiny_base: Path) -> None:
    """Only numbers, and not where someone reads the answers that are generated."""
    base = load_base(tiny_base)
    rows = [f"{text} {SECRET}" for text in TEXTS]
    scores(base, rows_of(base, rows))
    (path,) = cache.rglob("*.json")
    records = json.loads(path.read_text())["records"]
    assert all(isinstance(value, int | float) for record in records for value in record.values())
    task = Generation(prompt="{text}", answer="text", max_new_tokens=2)
    tokenization = Tokenization(base.tokenizer, 32)
    asked = tokenization.encode_rows([Example("row:1", "alpha", " river")])
    for read, files in ((True, 1), (False, 2)):
        part = Part("rows", task, asked, read=read)
        (record,) = Scorer(Bank(base), QUIET).scores(part, [None])[None]
        assert TEXT in record
        assert len([*cache.rglob("*.json")]) == files
    (again,) = Scorer(Bank(base), QUIET).scores(part, [None])[None]
    assert again == without_text(record)
    (again,) = Scorer(Bank(base), QUIET).scores(replace(part, read=True), [None])[None]
    assert again == record


@dataclass(frozen=True)
class OwnTask(Classification):
    """A kind of task that a user wrote."""


def own_score(*args: Any) -> list[dict[str, Any]]:
    """How a user's suite scores its questions."""
    return model_scores(*args)


def test_scores_made_by_code_that_may_change_are_not_kept(cache: Path, tiny_base: Path) -> None:
    base, task = load_base(tiny_base), Classification(labels=("ham", "spam"))
    part = Part("rows", task, rows_of(base))
    own, harness = OwnTask(labels=task.labels), Documents("", None, {}, "acc").scores
    for other in (replace(part, task=own), replace(part, score=own_score)):
        Scorer(Bank(base), QUIET).scores(other, [None])
        assert not other.shared
        assert not cache.exists()
    assert part.shared
    assert not replace(part, score=harness).shared
    assert replace(part, score=Answers(()).scores).shared


# ── Room ────────────────────────────────────────────────────────────────────────────────────────


def entry(name: str) -> Path:
    return cache_files.cache_path("scores", {"name": name}, "json")


def test_the_file_that_was_not_used_for_longest_makes_room(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache_files.CACHE_LIMIT, "1e-6")  # 1,000 bytes
    other = cache / "scores" / "notes.json"
    other.parent.mkdir(parents=True)
    other.write_text("x" * 5000)
    for age, name in ((300, "a"), (200, "b"), (100, "c")):
        assert cache_files.keep_in_cache(entry(name), b"x" * 300) is None
        then = time.time() - age
        os.utime(entry(name), (then, then))
    cache_files.mark_used(entry("a"))
    assert cache_files.keep_in_cache(entry("d"), b"x" * 300) is None
    assert [entry(name).exists() for name in "abcd"] == [True, False, True, True]
    refused = cache_files.keep_in_cache(entry("e"), b"x" * 1001)
    assert refused == "1.0 kB are more than LORA_DOMAINS_CACHE_GB allows"
    assert [entry(name).exists() for name in "acde"] == [True, True, True, False]
    assert other.exists()  # not ours
    assert cache_files.cache_bytes() == 900


def test_a_disk_without_room_keeps_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(cache.parent)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=cache_files.SPARE + 100))
    assert cache_files.keep_in_cache(entry("a"), b"x" * 50) is None
    assert "are free on the disk" in str(cache_files.keep_in_cache(entry("b"), b"x" * 101))
    assert entry("a").exists()
    assert not entry("b").exists()


def test_a_size_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache_files.CACHE_LIMIT, "2 GB")
    assert cache_files.cache_limit() == 2e9
    for given in ("much", "-1", "nan"):
        monkeypatch.setenv(cache_files.CACHE_LIMIT, given)
        with pytest.raises(UsageError, match="gigabytes that the cache may take"):
            cache_files.cache_limit()


def test_nothing_is_kept_where_nothing_may_be(tiny_base: Path, cache: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv(cache_files.CACHE_LIMIT, "0")
    base = load_base(tiny_base)
    scores(base, rows_of(base))
    predictions(base, rows_of(base))
    assert not cache.exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from lora_domains.inference import cache as cache_files
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
cache_files.keep_in_cache(Path(sys.argv[1]), b"half of it")
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="has no SIGKILL")
def test_a_killed_writer_leaves_nothing_that_is_read(cache: Path) -> None:
    writer = subprocess.run([sys.executable, "-c", KILLED, entry("a")], check=False)
    assert writer.returncode == -signal.SIGKILL
    (left,) = (path for path in cache.rglob("*") if path.is_file())
    assert left.name.startswith(".")
    assert not entry("a").exists()
    cache_files.make_room(0)  # it may still be written
    assert left.exists()
    os.utime(left, (1, 1))
    assert cache_files.keep_in_cache(entry("b"), b"all of it") is None
    assert [path.read_bytes() for path in cache.rglob("*") if path.is_file()] == [b"all of it"]


def test_the_folder_of_a_base_is_remembered(
    tmp_path: Path, cache: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_base, folder)
    monkeypatch.chdir(folder.parent)
    base = load_base("tiny", device="cpu")
    monkeypatch.setenv("LORA_DOMAINS_CACHE_GB", "0")
    cache_files.remember_folder(base)
    assert not cache.exists()
    monkeypatch.setenv("LORA_DOMAINS_CACHE_GB", "1")
    assert cache_files.folder_of_base(base.identity) is None
    cache_files.remember_folder(base)
    monkeypatch.chdir("/")
    assert cache_files.folder_of_base(base.identity) == str(folder.resolve())
    monkeypatch.chdir(folder.parent)
    cache_files.remember_folder(replace(base, revision="ab12", identity="0" * 64))
    cache_files.remember_folder(replace(base, id="embedded", identity="1" * 64))
    shutil.rmtree(folder)
    assert cache_files.folder_of_base(base.identity) is None
    assert [path.stem for path in (cache / "bases").iterdir()] == [base.identity]


def test_what_a_base_with_another_config_or_template_gave_is_not_read(
    cache: Path, tiny_base: Path, tmp_path: Path
) -> None:
    """With the same weights and tokenizer."""
    from lora_domains.probes.own_text import _settings

    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    first, same, other = load_base(tiny_base), load_base(tiny_base), load_base(folder)
    assert cache_files.circumstances(first) == cache_files.circumstances(same)
    assert cache_files.circumstances(first) != cache_files.circumstances(other)
    assert _settings(first) == _settings(same)
    assert _settings(first) != _settings(other)
    same.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert _settings(first) != _settings(same)
    moved = load_base(shutil.copytree(tiny_base, tmp_path / "moved"))
    assert cache_files.config_digest(moved) == cache_files.config_digest(first)
