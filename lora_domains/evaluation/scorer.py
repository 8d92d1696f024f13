"""The one scorer of contenders: base and adapters on the same encoded examples, part by part.

Without a store each contender is scored on all examples of a part in turn, as ``evaluate`` does it,
and the base's scores are kept in the cache for all adapters on it. With one, contenders share mixed
batches and scores are written block by block, as ``benchmark`` does it: a killed run continues
where it was. Several processes share the batches and get the scores that one process gets.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lora_domains import distributed
from lora_domains.adapters.folder import fingerprint
from lora_domains.console import EVALUATION, Clock, Display, estimated_phases
from lora_domains.evaluation.store import BaseScores, Store
from lora_domains.inference.batches import Progress, no_progress, padded_tokens
from lora_domains.inference.choice_tree import saved_tokens
from lora_domains.inference.likelihoods import drift, text_features
from lora_domains.inference.scores import (
    TEXT,
    Score,
    Scores,
    add_won,
    model_scores,
    without_text,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import own_layout
from lora_domains.probes.features import base_features
from lora_domains.tasks import Task, task_record, without_reasoning
from lora_domains.tasks.answers import unfinished
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow

BLOCK = 512
"""Scores between two writes to the store; a killed run loses no more than these."""

OWN, HARNESS = "lora_domains.", "lora_domains.probes.lm_eval"
"""What the names of this package's modules begin with, and that which runs code of others."""

R = TypeVar("R")
Cell = tuple[int, str | None]
"""The number of an example in its part, and the contender that it is scored by."""
ByContender = dict[str | None, dict[int, dict[str, float]]]


@dataclass(frozen=True)
class Part:
    """Encoded rows that one task scores in one way."""

    name: str
    task: Task
    rows: Sequence[EncodedRow]
    score: Score = model_scores
    read: bool = True
    """Whether someone reads the answers that are generated, beside their scores."""

    @property
    def own(self) -> bool:
        """Whether code of this package makes the scores. That of a user's task or suite may change
        while the rows stay the same, and no digest would tell: they are not stored."""
        return all(name.startswith(OWN) for name in (self.task.__module__, self.score.__module__))

    @property
    def shared(self) -> bool:
        """Whether the base's scores are kept for other adapters: where nobody reads its answers,
        and code of this package alone makes them, not that of the harness."""
        harness = HARNESS in (self.task.__module__, self.score.__module__)
        return self.own and not harness and not (self.read and self.task.scored_by == "text")

    @property
    def encoded(self) -> list[EncodedExample]:
        return [row.encoded for row in self.rows]

    def digest(self) -> str:
        """sha256 of the task and of the tokens that are scored: another tokenizer changes it."""
        digest = sha256(json.dumps(task_record(self.task), sort_keys=True).encode())
        for example, encoded in self.rows:
            tokens = (encoded.prompt, encoded.answer, encoded.choices, encoded.target)
            digest.update(repr((*tokens, *encoded.unsupervised, *encoded.truth)).encode())
            digest.update(example.answer.encode())
        return digest.hexdigest()


def reference_of(row: EncodedRow, tokenizer: Any) -> str:
    """The expected answer without its reasoning: of a chat, the last one, as it is rendered."""
    example, encoded = row
    if example.messages and example.messages[-1]["role"] == "assistant":
        answer = str(tokenizer.decode(encoded.last_answer, skip_special_tokens=True))
    else:
        answer = example.answer
    return without_reasoning(answer).strip()


class Scorer:
    """Scores parts by the base and the adapters of a bank. A contender of None is the base."""

    in_part = False
    """Whether some general text stands for what a base would write first."""
    shares = True
    """Whether the base's scores and features are kept for other adapters."""

    def __init__(self, bank: Bank, display: Display, store: Store | None = None) -> None:
        self.bank, self.display, self.store = bank, display, store
        self.of_base = BaseScores(bank.base) if store is None and self.shares else None
        self._keys: dict[str | None, str] = {}

    @property
    def judges(self) -> bool:
        """Whether a domain's judge is asked: stored scores have no text to judge."""
        return self.store is None

    def scores(self, part: Part, contenders: Sequence[str | None]) -> dict[str | None, Scores]:
        """The records of every row of ``part``, by contender."""
        paths = self._paths(part, contenders)
        scored = self._stored(paths, contenders)
        if kept := self._kept(part) if None in contenders else None:
            scored[None] = kept
        blocks = list(self._blocks(part, contenders, scored))
        with self.display.progress(f"scoring {part.name}", sum(map(len, blocks))) as advance:
            for block in blocks:
                rows = [part.rows[i] for i, _ in block]
                references = [reference_of(row, self.bank.base.tokenizer) for row in rows]
                records = part.score(
                    self.bank, part.task, [encoded for _, encoded in rows], references,
                    [name for _, name in block], advance,
                )  # fmt: skip
                for (i, name), record in zip(block, records, strict=True):
                    scored[name][i] = record
                self._keep(paths, block, scored)
        scores = {name: [scored[name][i] for i in range(len(part.rows))] for name in contenders}
        if None in contenders and not kept:
            self._keep_base(part, scores[None])
        self._warn_of_reasoning(scores)
        if part.task.beta is not None:
            base = scores[None] if None in scores else self.scores(part, [None])[None]
            for records in scores.values():
                add_won(records, base)
        return scores

    def _warn_of_reasoning(self, scores: Mapping[str | None, Scores]) -> None:
        for name, records in scores.items():
            cut = sum(unfinished(record.get(TEXT, "")) for record in records)
            if cut:
                self.display.warn(
                    f"{cut} of {len(records)} answers of {name or 'the base'} end within their "
                    "reasoning, before the answer: raise --set task.max_new_tokens."
                )

    def features(
        self, rows: Sequence[EncodedRow], pooling: str, progress: Progress = no_progress
    ) -> Tensor:
        """The features of ``rows`` under the current route (see ``likelihoods.text_features``)."""
        base, encoded = self.bank.base, [row.encoded for row in rows]
        if self.shares and self.bank.current() is None:
            return base_features(base, encoded, pooling, progress)
        return text_features(base.model, encoded, base.pad, progress, pooling)

    def largest_move(self, rows: Sequence[EncodedRow], adapter: str) -> float:
        """The largest change of a feature of ``rows`` by the adapter."""
        features, pooling = [], own_layout(self.bank.base).pooling
        for route in (None, adapter):
            with self.bank.routed(route):
                features.append(self.features(rows, pooling))
        return float((features[0] - features[1]).abs().max())

    def drift(self, part: Part, adapters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        """For each adapter the fields of ``likelihoods.drift`` of every row of ``part``."""
        paths = self._paths(part, adapters, "/drift")
        scored = self._stored(paths, adapters)
        encoded, pad = part.encoded, self.bank.base.pad
        missing = [i for i in range(len(encoded)) if any(i not in scored[n] for n in adapters)]
        size = BLOCK // 8 if self.store else max(1, len(missing))
        with self.display.progress(f"drift on {part.name}", len(missing)) as advance:
            for start in range(0, len(missing), size):
                block = missing[start : start + size]
                names = [n for n in adapters if any(i not in scored[n] for i in block)]
                moved = drift(self.bank, [encoded[i] for i in block], pad, names, advance)
                for name, fields in moved.items():
                    for at, i in enumerate(block):
                        scored[name][i] = {k: float(v[at]) for k, v in fields.items()}
                self._keep(paths, [(i, n) for i in block for n in names], scored)
        return {name: [scored[name][i] for i in range(len(encoded))] for name in adapters}

    def _blocks(
        self, part: Part, contenders: Sequence[str | None], scored: ByContender
    ) -> Iterator[list[Cell]]:
        """What is still to be scored, in the blocks that are scored at once."""
        if self.store is None:
            for name in contenders:
                if missing := [(i, name) for i in range(len(part.rows)) if i not in scored[name]]:
                    yield missing
            return
        # Examples of one length follow each other, and so do the contenders of one example.
        order = sorted(range(len(part.rows)), key=lambda i: (len(part.rows[i].encoded), i))
        missing = [(i, name) for i in order for name in contenders if i not in scored[name]]
        for start in range(0, len(missing), BLOCK):
            yield missing[start : start + BLOCK]

    # ── The store ───────────────────────────────────────────────────────────────────────────────

    def _paths(
        self, part: Part, contenders: Sequence[str | None], kind: str = ""
    ) -> dict[str | None, Path]:
        """The stored file of each contender; none without a store, or where nothing is stored."""
        if self.store is None or not part.own:
            return {}
        digest = part.digest()
        return {n: self.store.path(self._key(n) + kind, digest) for n in contenders}

    def _key(self, contender: str | None) -> str:
        """What identifies a contender's scores: base, precision, and the adapter's bytes."""
        if contender not in self._keys:
            record = self.bank.base.record()
            key = "/".join(str(record[name]) for name in ("identity", "dtype", "quantization"))
            if contender is not None:
                key += f"/{fingerprint(self.bank[contender].folder)}"
            self._keys[contender] = key
        return self._keys[contender]

    def _stored(
        self, paths: Mapping[str | None, Path], contenders: Sequence[str | None]
    ) -> ByContender:
        if self.store is None or not paths:
            return {name: {} for name in contenders}
        stored: ByContender = {name: self.store.read(path) for name, path in paths.items()}
        # On a shared disk a process may see less of a file: all use what the main one read.
        return distributed.same_everywhere(stored)

    def _keep(
        self, paths: Mapping[str | None, Path], block: Sequence[Cell], scored: ByContender
    ) -> None:
        if self.store is None or not distributed.is_main():
            return
        for name, path in paths.items():
            if records := {i: without_text(scored[name][i]) for i, n in block if n == name}:
                self.store.append(path, records)

    def _kept(self, part: Part) -> dict[int, dict[str, float]]:
        """The scores of the base on all rows of ``part``, if they are kept; otherwise none."""
        if self.of_base is None or not part.shared:
            return {}
        found: Scores | None = None
        if distributed.is_main():
            found = self.of_base.read(part.digest(), len(part.rows))
        found = distributed.same_everywhere(found)
        return dict(enumerate(found or ()))

    def _keep_base(self, part: Part, records: Scores) -> None:
        if self.of_base is not None and part.shared and records and distributed.is_main():
            self.of_base.keep(part.digest(), [without_text(record) for record in records])


class TimedScorer(Scorer):
    """Scores a part of the rows, to tell how long all of them take.

    The records of the other rows are copies, so that what follows takes as long as it would.
    """

    judges = False  # no text leaves the run for an estimate
    in_part = True
    shares = False  # what is only read would take no time
    unspent = 0.0
    """Seconds that all rows would have taken beyond those that were spent."""

    def scores(self, part: Part, contenders: Sequence[str | None]) -> dict[str | None, Scores]:
        score = super().scores

        def some(rows: list[EncodedRow], name: str | None) -> Scores:
            return score(replace(part, rows=rows), [name])[name]

        model = self.bank.base.model

        def size(rows: Sequence[EncodedRow]) -> float:
            # What all prompts begin with is read once.
            return self._padded(rows) - saved_tokens(model, [row.encoded for row in rows])

        return {name: self._some(part.rows, partial(some, name=name), size) for name in contenders}

    def features(
        self, rows: Sequence[EncodedRow], pooling: str, progress: Progress = no_progress
    ) -> Tensor:
        read = super().features
        if not rows:
            return read(rows, pooling)
        return torch.stack(self._some(rows, lambda rows: list(read(rows, pooling))))

    def drift(self, part: Part, adapters: Sequence[str]) -> dict[str, list[dict[str, float]]]:
        measure = super().drift

        def some(rows: list[EncodedRow]) -> list[dict[str, dict[str, float]]]:
            moved = measure(replace(part, rows=rows), adapters)
            return [{name: moved[name][at] for name in adapters} for at in range(len(rows))]

        records = self._some(part.rows, some)
        return {name: [record[name] for record in records] for name in adapters}

    def _some(
        self, rows: Sequence[EncodedRow], score: Callable[[list[EncodedRow]], list[R]],
        size: Callable[[Sequence[EncodedRow]], float] | None = None,
    ) -> list[R]:  # fmt: skip
        scored: list[R] = []

        def timed(part: list[EncodedRow], clock: Clock) -> None:
            with clock.phase(EVALUATION):
                scored[:] = score(part)

        spent: dict[str, float] = {}
        with Clock(spent).phase(EVALUATION):
            whole = estimated_phases(rows, timed, size or self._padded)
        self.unspent += whole.get(EVALUATION, 0.0) - spent[EVALUATION]
        return [scored[at * len(scored) // len(rows)] for at in range(len(rows))]

    def _padded(self, rows: Sequence[EncodedRow]) -> int:
        return padded_tokens(self.bank.base.model, [row.encoded for row in rows])
