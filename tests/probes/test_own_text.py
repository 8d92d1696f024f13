"""General text that a base writes itself: drawn once, kept for all domains, read by training."""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_base, make_rows
from safetensors.torch import load_file, save
from support.chat_templates import CHATML, chat_tokenizer
from support.models import QUIET, declared, model_in

from lora_domains.console import Display
from lora_domains.console import clock as clocks
from lora_domains.inference.generation import sample
from lora_domains.inference.likelihoods import start_of_text
from lora_domains.inference.reference import Prediction, Reference, base_predictions
from lora_domains.model import DomainModel
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base, load_base
from lora_domains.probes import own_text
from lora_domains.probes.general_text import embedded_texts, general_text
from lora_domains.probes.own_text import (
    COUNTS,
    OwnText,
    PartOfOwnText,
    counts_of,
    drift_rows,
    text_of,
)
from lora_domains.probes.suite import Suite, embedded, operations
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization


@pytest.fixture(scope="module")
def base(tiny_base: Path) -> Base:
    return load_base(tiny_base, device="cpu")


def all_of(text: OwnText) -> list[Any]:
    tokenization = Tokenization(text.base.tokenizer, 128)
    return [one for split in ("training", "selection", "test")
            for one in text.windows(split, tokenization, 999)]  # fmt: skip


# ── Drawing ─────────────────────────────────────────────────────────────────────────────────────


def test_a_drawn_text_follows_its_own_numbers_whatever_the_batch(base: Base) -> None:
    draws = np.random.default_rng(5).random((6, 9))
    prompts = [[1, *range(10, 10 + n)] for n in range(6)]
    together = sample(base.model, base.pad, prompts, draws, [2])
    alone = [sample(base.model, base.pad, [p], draws[[n]], [2])[0] for n, p in enumerate(prompts)]
    shorter = sample(base.model, base.pad, prompts, draws[:, :4], [2])
    assert together == alone
    assert [text[:4] for text in together] == shorter


def test_tokens_are_drawn_with_the_probabilities_of_the_base(base: Base) -> None:
    """The token is the one in whose share of the cumulated probabilities its number lies."""
    with torch.no_grad():
        chances = F.softmax(base.model(torch.tensor([[1]])).logits[0, -1].double(), -1).numpy()
    numbers = (np.arange(2000) + 0.5) / 2000
    drawn = [text[0] for text in
             sample(base.model, base.pad, [[1]] * 2000, numbers[:, None], [])]  # fmt: skip
    shares = np.bincount(drawn, minlength=len(chances)) / 2000
    assert np.abs(shares - chances).max() <= 1 / 2000


def test_a_text_ends_with_the_first_end(base: Base) -> None:
    draws = np.random.default_rng(1).random((20, 8))
    free = sample(base.model, base.pad, [[1]] * 20, draws, [])
    end = free[0][2]
    ended = sample(base.model, base.pad, [[1]] * 20, draws, [end])
    assert ended == [text[: text.index(end) + 1] if end in text else text for text in free]


# ── The start of a text ─────────────────────────────────────────────────────────────────────────


def test_a_tokenizer_with_bos_begins_texts_with_it(base: Base) -> None:
    assert start_of_text(base) is None
    text = OwnText(base=base, display=QUIET)
    assert Tokenization(base.tokenizer, 128).bos == (1,)
    assert text.own


def test_without_bos_the_start_is_the_token_after_which_the_base_predicts_best(
    tmp_path: Path,
) -> None:
    """A chat tokenizer renames EOS; what the base was pretrained with is another special token."""
    folder = make_base(tmp_path / "base")
    tokenizer = chat_tokenizer(CHATML)
    tokenizer._tokenizer.post_processor = None
    tokenizer.save_pretrained(folder)
    other = load_base(folder, device="cpu")
    end = other.tokenizer.eos_token_id
    assert Tokenization(other.tokenizer, 64).bos == ()
    from lora_domains.inference import likelihoods

    ids = other.tokenizer(likelihoods.NEUTRAL, add_special_tokens=False)["input_ids"][:127]
    nats = {}
    for token, added in other.tokenizer.added_tokens_decoder.items():
        if added.special:
            row = torch.tensor([[token, *ids]])
            with torch.no_grad():
                logits = other.model(row).logits[0, :-1]
            nats[token] = float(F.cross_entropy(logits, row[0, 1:]))
    best = min(nats, key=nats.__getitem__)
    expected = best if nats[best] < nats[end] - likelihoods.CLEARLY else end
    assert start_of_text(other) == expected
    lead = Tokenization(other.tokenizer, 64, start=expected).lead
    assert lead == (expected,)


# ── Texts and their file ────────────────────────────────────────────────────────────────────────


def test_texts_are_written_once_and_read_by_all(own_texts: Path, base: Base) -> None:
    first = OwnText(base=base, display=QUIET)
    texts = all_of(first)
    counts = own_text.COUNTS
    assert len(texts) == sum(counts.values()) == len({text.id for text in texts})
    assert all(text.prompt == (1,) and 1 <= len(text.answer) <= 12 for text in texts)
    (path,) = own_texts.rglob("*.safetensors")
    assert path.stem == first.digest
    before = path.stat().st_mtime_ns
    again = OwnText(base=base, display=QUIET)
    assert all_of(again) == texts
    assert path.stat().st_mtime_ns == before
    for name, prediction in first.predictions.items():
        for part, stored in zip(prediction, again.predictions[name], strict=True):
            assert torch.equal(part, stored)


def test_what_other_processes_get_is_no_larger_than_the_file(own_texts: Path, base: Base) -> None:
    """Whether it was just written or read."""
    for _ in range(2):
        sent = pickle.dumps(OwnText(base=base, display=QUIET)._written)
        (path,) = own_texts.rglob("*.safetensors")
        assert len(sent) < 4 * path.stat().st_size + 100_000


def test_a_damaged_file_is_written_again(own_texts: Path, base: Base) -> None:
    texts = all_of(OwnText(base=base, display=QUIET))
    (path,) = own_texts.rglob("*.safetensors")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    without_digest = save(load_file(path))
    for damaged in (whole[: len(whole) // 2], bytes(flipped), without_digest):
        path.write_bytes(damaged)
        assert all_of(OwnText(base=base, display=QUIET)) == texts
        assert path.read_bytes() == whole


def test_other_bases_and_settings_have_other_files(
    own_texts: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load_base(make_base(tmp_path / "other", seed=1), device="cpu")
    digests = {OwnText(base=one, display=QUIET).digest for one in (base, other)}
    half = load_base(tmp_path / "other", device="cpu", dtype="bfloat16")
    digests.add(OwnText(base=half, display=QUIET).digest)
    for name, value in (("SEED", 1), ("LENGTH", 11), ("TOP", 3), ("COUNTS", {**COUNTS, "test": 9})):
        monkeypatch.setattr(own_text, name, value)
        digests.add(OwnText(base=base, display=QUIET).digest)
    assert len(digests) == 7


def test_a_large_base_writes_the_first_of_the_texts_on_a_cpu(
    own_texts: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = OwnText(base=base, display=QUIET)
    texts, phrase, digest = all_of(every), every.origin, every.digest
    monkeypatch.setattr(own_text, "FEWEST", 4)
    monkeypatch.setattr(own_text, "CPU_WORK", operations(base) * own_text.TOKENS * 21)
    few = OwnText(base=base, display=QUIET)
    assert counts_of(base) == {"training": 12, "selection": 4, "test": 4}
    assert few.counts == (12, 4)
    assert all_of(few) == [*texts[:12], *texts[24:28], *texts[34:38]]
    assert (few.origin, few.digest) != (phrase, digest)
    assert "20 in all, by its size; 42 on an accelerator" in few.origin
    monkeypatch.setattr(own_text, "CPU_WORK", 1.0)
    monkeypatch.setattr(own_text, "FEWEST", 21)
    assert sum(counts_of(base).values()) == 20
    monkeypatch.setattr(Base, "device", torch.device("cuda"))
    assert counts_of(base) == own_text.COUNTS


def test_a_folder_that_cannot_be_written_costs_only_time(
    own_texts: Path, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LORA_DOMAINS_CACHE", str(blocked))
    assert len(all_of(OwnText(base=base, display=QUIET))) == sum(own_text.COUNTS.values())


def test_a_chat_base_answers_questions_that_it_writes(own_texts: Path, tmp_path: Path) -> None:
    folder = make_base(tmp_path / "base", max_position_embeddings=256)
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(folder)
    chats = load_base(folder, device="cpu")
    assert chats.chats
    texts = all_of(OwnText(base=chats, display=QUIET))
    answers = [text for text in texts if len(text.prompt) > 1]
    assert len(answers) == len(texts) // 2
    for text in answers:
        prompt = tokenizer.decode(text.prompt)
        before, _, after = prompt.partition("user\n")
        assert before.endswith("<|im_start|>")
        assert after.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert len(text.answer) <= 12


def test_texts_fit_into_a_domains_windows(own_texts: Path, base: Base) -> None:
    text = OwnText(base=base, display=QUIET)
    windows = text.windows("training", Tokenization(base.tokenizer, 7), 999)
    assert max(map(len, windows)) == 7
    reference = Reference(Bank(base), windows, stored=text.predictions)
    kl, _ = reference.kl_and_nats(windows, None)
    assert len(kl) == sum(len(window.answer) for window in windows)


def test_stored_predictions_are_those_of_the_base(own_texts: Path, base: Base) -> None:
    text = OwnText(base=base, display=QUIET)
    windows = text.windows("selection", Tokenization(base.tokenizer, 128), 999)
    bank = Bank(base)
    stored, fresh = Reference(bank, windows, stored=text.predictions), Reference(bank, windows)
    (own_kl, own_nats), (kl, nats) = (one.kl_and_nats(windows, None) for one in (stored, fresh))
    assert stored.top == 20
    assert fresh.top is None
    assert torch.allclose(own_nats, nats)
    assert own_kl.abs().max() < 1e-5 > kl.abs().max()


# ── In a dry run ────────────────────────────────────────────────────────────────────────────────


def test_a_part_stands_for_all_texts_in_a_dry_run(
    own_texts: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its time is estimated from a part, and no file is written; what is written costs no time."""
    monkeypatch.setattr(own_text, "PART", 8)
    now, text = [0.0], OwnText(base=base, display=QUIET)

    def passed(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        now[0] += options["input_ids"].numel()

    hook = base.model.model.register_forward_pre_hook(passed, with_kwargs=True)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now[0]))
    part = text.in_part()
    stand_ins, estimated, spent = all_of(part), part.seconds, now[0]
    assert 0 < spent < estimated
    assert not own_texts.exists()
    texts, (first, *_) = all_of(text), stand_ins
    hook.remove()
    assert estimated == pytest.approx(now[0] - spent, rel=0.3)
    assert first == texts[0]
    assert [one.id for one in stand_ins] == [one.id for one in texts]
    assert part.predictions.keys() == text.predictions.keys()
    assert len({one.answer for one in stand_ins}) <= 12 < len({one.answer for one in texts})
    assert text.seconds == 0
    assert OwnText(base=base, display=QUIET).in_part().seconds == 0
    assert drift_rows(base, embedded(), Tokenization(base.tokenizer, 128), QUIET, in_part=True)


def test_a_dry_run_tells_how_long_the_base_will_write(
    own_texts: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    small_suite: None, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(PartOfOwnText, "seconds", 750.0)
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path / "out", display=Display(),
                                        device="cpu")  # fmt: skip
    model.fit(declared(make_rows(60), epochs=1), dry_run=True)
    output = capsys.readouterr().out
    assert "the base writes it first, once for all domains, in about 12 min 30 s" in output
    assert "general text 12 min" in output.rpartition("estimate ")[2]
    assert not own_texts.exists()


# ── In training ─────────────────────────────────────────────────────────────────────────────────


def test_training_reads_what_the_base_wrote_without_asking_it_again(
    own_texts: Path, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_in(tmp_path / "out", tiny_base)
    spam = declared(make_rows(60), epochs=1)
    written = model.dataset(spam).general
    _ = written.predictions
    asked: list[str] = []

    def asking(base: Base, texts: Sequence[EncodedExample], *rest: Any) -> dict[str, Prediction]:
        asked.extend(text.id for text in texts)
        return base_predictions(base, texts, *rest)

    monkeypatch.setattr("lora_domains.inference.reference.base_predictions", asking)
    card = model.fit(spam)
    assert card is not None
    record = card.adapter
    assert {name.partition(" ")[0] for name in asked} <= {"trial"}  # which measures memory
    assert record.training["retention"] == "kl"
    assert record.training["history"][-1]["general_kl"] > 0
    assert record.data["general"] == written.digest
    other = model.fit(declared(make_rows(60, seed=2), name="other", epochs=1))
    assert other is not None
    assert other.adapter.data["general"] == record.data["general"]
    assert len([*own_texts.rglob("*.safetensors")]) == 1
    json.dumps(record.training)


def test_drift_is_measured_on_texts_of_the_base_that_no_training_reads(
    own_texts: Path, base: Base
) -> None:
    tokenization = Tokenization(base.tokenizer, 128)
    rows = drift_rows(base, embedded(), tokenization, QUIET)
    own = OwnText(base=base, display=QUIET)
    read = {text.answer for split in ("training", "selection")
            for text in own.windows(split, tokenization, 999)}  # fmt: skip
    assert len(rows) == own_text.COUNTS["test"]
    assert not read & {row.encoded.answer for row in rows}
    assert rows[0].example.answer == base.tokenizer.decode(rows[0].encoded.answer)
    suite = Suite("mine", (), lambda: ["a river is red"])  # which brings text of its own
    (row,) = drift_rows(base, suite, tokenization, QUIET)
    assert row.example.answer == "a river is red"
    of_embedded = load_base(device="cpu")
    tokenization = Tokenization(of_embedded.tokenizer, 128)
    rows = drift_rows(of_embedded, embedded(), tokenization, QUIET)
    assert {row.example.answer for row in rows} == {*embedded_texts("test")}


def test_the_embedded_base_reads_its_own_world(own_texts: Path) -> None:
    embedded = load_base(device="cpu")
    assert text_of(embedded, None, QUIET) == general_text(None)
    rows = [{"text": f"number {n} of the stone river"} for n in range(30)]
    assert text_of(embedded, rows, QUIET).used == general_text(rows).used
    assert not own_texts.exists()
