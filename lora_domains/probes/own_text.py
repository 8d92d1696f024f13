"""General text that a base writes itself: self-synthesised rehearsal (Huang et al. 2024, SSR).

A causal base that did not come with this package is kept close to what it says when nobody asks it
for anything: texts that it continues from the token with which a text begins, and, for a base
trained on chats, answers in its template to questions that it writes too (Xu et al. 2024, Magpie).
They are drawn at temperature 1 with a fixed seed and written once for each base, with what the base
predicts at each token, into a file that all domains share (``inference.cache``). A large base
writes fewer of them on a CPU. A dry run reads what is written, or times a part.
"""

import json
import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lora_domains import distributed
from lora_domains.console import GENERAL, Clock, Display, format_duration
from lora_domains.data.source import Source
from lora_domains.inference.batches import no_progress
from lora_domains.inference.cache import (
    CACHE,
    cache_path,
    config_digest,
    keep_tensors,
    read_tensors,
)
from lora_domains.inference.generation import sample
from lora_domains.inference.likelihoods import start_of_text
from lora_domains.inference.reference import Prediction, base_predictions, packed, unpacked
from lora_domains.modeling.base import Base
from lora_domains.modeling.routing import entered
from lora_domains.probes.general_text import GeneralText, embedded_texts, general_text
from lora_domains.probes.suite import Suite, operations
from lora_domains.tasks import Example
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow, shared
from lora_domains.tokenization.tokenization import Tokenization

COUNTS = {"training": 320, "selection": 64, "test": 128}
"""Texts of each split, at most."""
CPU_WORK = 1e13
"""Floating-point operations by which a base may write them on a CPU: about two minutes at 100
GFLOP/s."""
FEWEST = 96
"""Texts of all splits, at the least."""
TOKENS = 80
"""What a text costs, about: its tokens, written and read again, and half a question."""
PART = 32
"""Texts that a dry run writes."""
CONTINUED = 2
"""One in so many texts of a base trained on chats is a continuation, the others are answers."""
LENGTH = 24
"""The most tokens of a text or an answer. An adapter's answers differ from the base's in how they
begin and how soon they end (benchmarks/training/general.py)."""
TURN = 48
"""The most tokens of a user's turn."""
TOP = 128
"""The most likely tokens of each position whose probability is stored."""
SEED = 0
FORMAT = 1
"""Raised when the same settings give other texts."""


class Written(NamedTuple):
    """Texts of a base with what it predicts on those that a run reads."""

    texts: dict[str, EncodedExample]
    predictions: dict[str, Prediction]


@dataclass(frozen=True)
class OwnText(GeneralText):
    """The texts that ``base`` writes when they are needed for the first time."""

    base: Base = field(kw_only=True)
    display: Display = field(kw_only=True)

    @property
    def counts(self) -> tuple[int, int]:
        counts = counts_of(self.base)
        return counts["training"], counts["selection"]

    @property
    def own(self) -> bool:
        return True

    @property
    def origin(self) -> str:
        chats = ", every second one an answer in its chat template" if self.base.chats else ""
        every, most = sum(counts_of(self.base).values()), sum(COUNTS.values())
        fewer = f" ({every} in all, by its size; {most} on an accelerator)" if every < most else ""
        return f"written by the base itself{chats}{fewer}"

    @property
    def digest(self) -> str:
        """sha256 of what decides the texts."""
        return sha256(json.dumps(_settings(self.base), sort_keys=True).encode()).hexdigest()

    @property
    def predictions(self) -> Mapping[str, Prediction]:
        return self._written.predictions

    def windows(
        self, split: Literal["training", "selection", "test"], tokenization: Tokenization, most: int
    ) -> list[EncodedExample]:
        """The first ``most`` texts of ``split``, none longer than a window of ``tokenization``."""
        names = _names({split: counts_of(self.base)[split]})[:most]
        cut = (_cut(self._written.texts[name], tokenization.window) for name in names)
        return [text for text in cut if text.answer]

    def test_rows(self, tokenization: Tokenization) -> list[EncodedRow]:
        """The texts on which drift is measured, which no training reads."""
        texts = self.windows("test", tokenization, counts_of(self.base)["test"])
        tokenizer, place = self.base.tokenizer, f"text of {self.base.id}"
        return [
            EncodedRow(Example(text.id, "", tokenizer.decode(text.answer), place=place), text)
            for text in texts
        ]

    def in_part(self) -> "OwnText":
        there = distributed.on_main(self._path.exists)
        return self if there else PartOfOwnText(base=self.base, display=self.display)

    @property
    def _path(self) -> Path:
        return cache_path("general_text", _settings(self.base))

    @cached_property
    def _written(self) -> Written:
        counts = counts_of(self.base)
        with distributed.sharing(False):  # the other processes wait
            return distributed.on_main(lambda: _read(self._path, counts) or self._write(counts))

    def _write(self, counts: Mapping[str, int]) -> Written:
        path, every, spent = self._path, sum(counts.values()), dict[str, float]()
        self.display.pulse(f"The base writes {every} texts, once for all domains.")
        progress = self.display.progress("base writes general text", every)
        with Clock(spent).phase(GENERAL), progress as advance:
            written = _write(self.base, counts, advance)
        took = format_duration(spent[GENERAL])
        told = f"{every} texts {self.origin}, once for all domains, in {took}"
        if refused := keep_tensors(path, _packed(written)):
            self.display.warn(
                f"the texts that the base wrote could not be kept in {path.parent} ({refused}): "
                f"the next run writes them again. {CACHE} names another folder."
            )
        self.display.stage("general text", None, None, told)
        return written


@dataclass(frozen=True)
class PartOfOwnText(OwnText):
    """As many texts as ``base`` would write, but only ``PART`` different ones, kept in no file."""

    @property
    def seconds(self) -> float:
        return _part_of(self.base)[1]

    @cached_property
    def _written(self) -> Written:
        return _part_of(self.base)[0]


def text_of(base: Base, source: Source | None, display: Display) -> GeneralText:
    """The general text of ``source``, or that of the kind that ``base`` was trained on.

    There is none for a base without a language head.
    """
    if not base.language_head:
        return GeneralText()
    if source is None and writes_own_text(base):
        return OwnText(base=base, display=display)
    return general_text(source)


def drift_rows(
    base: Base, suite: Suite, tokenization: Tokenization, display: Display, *, in_part: bool = False
) -> list[EncodedRow]:
    """The general text of ``suite`` on which drift is measured, in windows.

    The embedded text is of another kind than that of a base which writes its own: there it is what
    the base wrote and no training reads. ``in_part``: what stands for it in a dry run.
    """
    if not base.language_head:
        return []
    if writes_own_text(base) and tuple(suite.text()) == embedded_texts("test"):
        own = OwnText(base=base, display=display)
        return (own.in_part() if in_part else own).test_rows(tokenization)
    return tokenization.encode_rows(suite.texts())


def writes_own_text(base: Base) -> bool:
    """Whether the general text of ``base`` is its own: of causal bases but the embedded one, whose
    world is that of the embedded text. An encoder writes no text."""
    return base.id != "embedded" and not base.bidirectional


def counts_of(base: Base) -> Mapping[str, int]:
    """How many texts of each split ``base`` writes: ``COUNTS``, or on a CPU as many as ``CPU_WORK``
    suffices for, of ``FEWEST`` at least.

    It depends on the size of the base alone, so that all its runs read the same texts.
    """
    most = sum(COUNTS.values())
    every = max(FEWEST, CPU_WORK / (operations(base) * TOKENS))
    if base.device.type != "cpu" or every >= most:
        return COUNTS
    # Even numbers: every second text is an answer.
    return {split: 2 * round(every / most * count / 2) for split, count in COUNTS.items()}


def _settings(base: Base) -> dict[str, Any]:
    """What decides the texts and the stored predictions."""
    return {
        "base": base.identity, "config": config_digest(base),
        "template": str(base.tokenizer.chat_template),
        "dtype": str(base.dtype), "quantization": base.quantization,
        "texts": dict(counts_of(base)), "length": LENGTH, "turn": TURN, "continued": CONTINUED,
        "top": TOP, "seed": SEED, "format": FORMAT,
    }  # fmt: skip


def _names(counts: Mapping[str, int]) -> list[str]:
    return [f"own-{split}-text:{n}" for split, count in counts.items() for n in range(count)]


def _predicted(counts: Mapping[str, int]) -> list[str]:
    """The names of the texts that a run reads."""
    return _names({split: count for split, count in counts.items() if split != "test"})


def _cut(text: EncodedExample, most: int) -> EncodedExample:
    """``text`` with at most ``most`` tokens."""
    room = max(0, most - len(text.prompt))
    return EncodedExample(text.id, text.prompt, text.answer[:room])


# ── Writing ─────────────────────────────────────────────────────────────────────────────────────


def _write(base: Base, counts: Mapping[str, int], advance: Any) -> Written:
    names = _names(counts)
    # One row of numbers for each text: it does not depend on the others.
    seeds = [[SEED, at, n] for at, split in enumerate(COUNTS) for n in range(counts[split])]
    draws = np.array([np.random.default_rng(seed).random(TURN + LENGTH) for seed in seeds])
    ends = {base.tokenizer.eos_token_id, *_listed(base.model.generation_config.eos_token_id)}
    with entered(base.model, None, None):
        frame = _frame(base)
        answered = [at for at in range(len(names)) if frame is not None and at % CONTINUED]
        plain = [at for at in range(len(names)) if at not in set(answered)]
        texts = dict.fromkeys(names, EncodedExample("", (), ()))
        start = start_of_text(base)
        lead = (int(base.tokenizer.bos_token_id) if start is None else start,)
        length = min(LENGTH, base.context - 1)
        continued = sample(
            base.model, base.pad, [lead] * len(plain), draws[plain, TURN : TURN + length],
            [*ends, *lead], advance,
        )  # fmt: skip
        for at, text in zip(plain, continued, strict=True):
            texts[names[at]] = EncodedExample(names[at], lead, text)
        if frame is not None:
            prompts = _questions(base, frame, draws[answered, :TURN], ends)
            answers = sample(
                base.model, base.pad, prompts, draws[answered, TURN:], [*ends], advance
            )
            for at, prompt, answer in zip(answered, prompts, answers, strict=True):
                texts[names[at]] = EncodedExample(names[at], prompt, answer)
        read = [texts[name] for name in _predicted(counts)]
        predictions = base_predictions(base, read, min(TOP, base.vocabulary - 1))
    return Written(texts, predictions)


_parts: "weakref.WeakKeyDictionary[nn.Module, tuple[Written, float]]" = weakref.WeakKeyDictionary()


def _part_of(base: Base) -> tuple[Written, float]:
    """``PART`` texts of ``base`` under the names of all that it would write, again and again; and
    the seconds that all of them would take."""
    if base.model not in _parts:
        counts, spent = counts_of(base), dict[str, float]()
        every = sum(counts.values())
        few = {
            split: min(count, 2 * math.ceil(PART * count / every / 2))
            for split, count in counts.items()
        }
        with distributed.sharing(False), Clock(spent).phase(GENERAL):
            part = _write(base, few, no_progress)
        texts, predictions = dict[str, EncodedExample](), dict[str, Prediction]()
        for split, count in counts.items():
            written = _names({split: few[split]})
            for n, name in enumerate(_names({split: count})):
                like = written[n % len(written)]
                texts[name] = replace(part.texts[like], id=name)
                if like in part.predictions:
                    predictions[name] = part.predictions[like]
        # On an accelerator a batch takes as long as one text of it.
        share = every / sum(few.values()) if base.device.type == "cpu" else 1.0
        _parts[base.model] = Written(texts, predictions), share * spent[GENERAL]
    return _parts[base.model]


class _Frame(NamedTuple):
    """What a chat template writes before a user's turn, and between it and the answer."""

    before: tuple[int, ...]
    after: tuple[int, ...]


def _frame(base: Base) -> _Frame | None:
    """That of the base's own chat template; None where a base was not trained on chats, or where
    turns and answers do not fit into its context."""
    if not base.chats:
        return None
    template = base.chat_template.asked(thinking=False)
    one, other = (template.prompt([{"role": "user", "content": text}])
                  for text in ("yes", "no"))  # fmt: skip
    before, after = shared(one, other), shared(one[::-1], other[::-1])
    frame = _Frame(one[:before], one[len(one) - after :])
    return frame if before + TURN + after + LENGTH <= base.context else None


def _questions(
    base: Base, frame: _Frame, draws: np.ndarray, ends: set[int]
) -> list[tuple[int, ...]]:
    """Prompts whose user's turn the base writes, as many as ``draws`` has rows."""
    stops = {*ends, *frame.after[:1]}
    turns = sample(base.model, base.pad, [frame.before] * len(draws), draws, [*stops])
    spoken = (tuple(token for token in turn if token not in stops) for turn in turns)
    return [(*frame.before, *turn, *frame.after) for turn in spoken]


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ── The file ────────────────────────────────────────────────────────────────────────────────────


def _packed(written: Written) -> dict[str, Tensor]:
    texts, predictions = list(written.texts.values()), list(written.predictions.values())
    flat = [token for text in texts for token in (*text.prompt, *text.answer)]
    sizes = [[len(text.prompt), len(text.answer)] for text in texts]
    return {
        "tokens": torch.tensor(flat, dtype=torch.int32),
        "sizes": torch.tensor(sizes, dtype=torch.int32),
        **packed(predictions),
    }


def _read(path: Path, counts: Mapping[str, int]) -> Written | None:
    """The texts of a file; None where there is none, or it is damaged."""
    tensors = read_tensors(path)
    if tensors is None:
        return None
    texts: dict[str, EncodedExample] = {}
    tokens, sizes = tensors["tokens"].tolist(), tensors["sizes"].tolist()
    at = 0
    for name, (prompt, answer) in zip(_names(counts), sizes, strict=True):
        middle, end = at + prompt, at + prompt + answer
        texts[name] = EncodedExample(name, tuple(tokens[at:middle]), tuple(tokens[middle:end]))
        at = end
    lengths = {name: len(texts[name].answer) for name in _predicted(counts)}
    # Copies: a part of a tensor is sent to other processes with the whole of it.
    return Written(texts, unpacked(tensors, lengths, copied=True))
