"""Many adapters on one base, on the same items at once: what each kept, and what it does to others.

Every contender is scored on every item once. Scores are kept beside the report by contender and
items, block by block: a killed run goes on where it was, and a base is not scored again for the
next adapter. Several processes share the blocks and get what one process gets.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.peft import fingerprint
from lora_domains.console import Display
from lora_domains.data.tokenization import EncodedExample, EncodedRow, Tokenization
from lora_domains.dataset import Dataset
from lora_domains.errors import UsageError, listed
from lora_domains.evaluation.contenders import (
    decided,
    frozen_scores,
    general_records,
    item_records,
    judged_rows,
    model_scores,
    nats_only,
    text_scores,
    training_sample,
    trivial_scores,
)
from lora_domains.evaluation.leak_search import every_leak
from lora_domains.evaluation.shots import SHOTS, with_shots
from lora_domains.evaluation.verdict_run import check_same_rows, hold_to, judge
from lora_domains.inference.likelihoods import drift
from lora_domains.inference.scores import Scores
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import check_head
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry, read_items
from lora_domains.report.report import figures
from lora_domains.tasks import LanguageModelling, Task, task_record

EMBEDDED = {"embedded", "quick"}
"""Suites that ask the same: the second some of it."""
BLOCK = 512
"""Scores made between two writes: what a kill can cost."""
CODE = (
    "data/tokenization",
    "modeling/batching",
    "evaluation/contenders",
    "modeling/routing",
    "inference/likelihoods",
    "modeling/lora",
    "tasks/base",
    "tasks/classification",
    "tasks/generation",
    "tasks/language_modelling",
    "tasks/multiple_choice",
    "tasks/rows",
)
"""Files whose change makes stored scores worthless."""


@dataclass(frozen=True)
class Part:
    """Items of one kind, asked by one task."""

    name: str
    task: Task
    rows: list[EncodedRow]

    @property
    def items(self) -> list[EncodedExample]:
        return [item for _, item in self.rows]

    def digest(self) -> str:
        """sha256 of the tokens that are scored and the task: another tokenizer changes it."""
        digest = sha256(json.dumps(task_record(self.task), sort_keys=True).encode())
        for example, item in self.rows:
            digest.update(repr((item.prompt, item.answer, item.choices, item.target)).encode())
            digest.update(example.answer.encode())
        return digest.hexdigest()


class Store:
    """Scores on disk, one file for each contender and part, one line for each item."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, contender: str, part: str) -> Path:
        name = sha256(f"{contender} {part} {code_version()}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.jsonl"

    def read(self, path: Path) -> dict[int, dict[str, float]]:
        """What is there already; a line that a kill cut off is left out."""
        if not path.exists():
            return {}
        found = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                stored = json.loads(line)
                found[int(stored["item"])] = stored["score"]
            except (ValueError, KeyError, TypeError):
                continue
        return found

    def append(self, path: Path, scores: Mapping[int, dict[str, float]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"item": i, "score": score}) + "\n" for i, score in scores.items()]
        with path.open("a", encoding="utf-8") as file:
            # A cut line gets an end, so that it does not swallow the next one.
            file.write("\n" if file.tell() else "")
            file.writelines(lines)


@cache
def code_version() -> str:
    """sha256 of the files that make a score."""
    digest = sha256()
    for name in CODE:
        digest.update((Path(__file__).parents[1] / f"{name}.py").read_bytes())
    return digest.hexdigest()


class Scorer:
    """The contenders of one benchmark, scored part by part through the store."""

    def __init__(self, bank: Bank, names: Sequence[str], store: Store, display: Display) -> None:
        self.bank, self.names, self.store, self.display = bank, tuple(names), store, display
        base = bank.base.record()
        self._base = "/".join(str(base[k]) for k in ("identity", "dtype", "quantization"))

    def key(self, contender: str | None) -> str:
        """What makes a contender's scores its own: base, precision, and the adapter's bytes."""
        if contender is None:
            return self._base
        path = self.bank[contender].path
        if path is None:
            raise UsageError(
                where=contender,
                expected="an adapter from a folder",
                found="one that was never saved",
                hint="Save it first; its scores are kept by what the folder holds.",
            )
        return f"{self._base}/{fingerprint(path)}"

    def scores(self, part: Part, contenders: Sequence[str | None]) -> dict[str | None, Scores]:
        """The scores of ``contenders`` on every item of ``part``, all in mixed batches."""
        digest = part.digest()
        paths = {name: self.store.path(self.key(name), digest) for name in contenders}
        found = self._stored(paths)
        items = part.items
        # Items of one length side by side, and an item's contenders beside each other.
        order = sorted(range(len(items)), key=lambda i: (len(items[i]), i))
        missing = [(i, name) for i in order for name in contenders if i not in found[name]]
        with self.display.progress(f"scoring {part.name}", len(missing)) as advance:
            for start in range(0, len(missing), BLOCK):
                block = missing[start : start + BLOCK]
                rows = [part.rows[i] for i, _ in block]
                references = [example.answer.strip() for example, _ in rows]
                scores = model_scores(
                    self.bank, part.task, [item for _, item in rows], references,
                    [name for _, name in block],
                )  # fmt: skip
                for (i, name), score in zip(block, scores, strict=True):
                    found[name][i] = score
                self._keep(paths, block, found)
                advance(len(block))
        return {name: [found[name][i] for i in range(len(items))] for name in contenders}

    def drift(self, part: Part) -> dict[str, list[dict[str, float]]]:
        """For each adapter and text: KL from the base, nats of both, tokens, the largest move."""
        digest = part.digest()
        paths: dict[str | None, Path] = {
            name: self.store.path(f"{self.key(name)}/drift", digest) for name in self.names
        }
        found = self._stored(paths)
        items, pad = part.items, self.bank.base.tokenizer.pad_token_id
        missing = [i for i in range(len(items)) if any(i not in found[n] for n in self.names)]
        with self.display.progress(f"drift on {part.name}", len(missing)) as advance:
            for start in range(0, len(missing), BLOCK // 8):
                block = missing[start : start + BLOCK // 8]
                names = [n for n in self.names if any(i not in found[n] for i in block)]
                moved = drift(self.bank, [items[i] for i in block], pad, names)
                for name, fields in moved.items():
                    for at, i in enumerate(block):
                        found[name][i] = {k: float(v[at]) for k, v in fields.items()}
                self._keep(paths, [(i, n) for i in block for n in names], found)
                advance(len(block))
        return {name: [found[name][i] for i in range(len(items))] for name in self.names}

    def _stored(self, paths: Mapping[str | None, Path]) -> dict[str | None, dict[int, Any]]:
        read = {n: self.store.read(path) for n, path in paths.items()}
        # Another rank might see less of a file on a shared disk; one reading holds for all.
        return distributed.same_everywhere(read)

    def _keep(
        self, paths: Mapping[str | None, Path], block: Sequence[tuple[int, str | None]],
        found: Mapping[str | None, Mapping[int, dict[str, float]]],
    ) -> None:  # fmt: skip
        if not distributed.is_main():
            return
        for name, path in paths.items():
            made = {i: found[name][i] for i, n in block if n == name}
            if made:
                self.store.append(path, made)


# ── From scores to items, entries and the matrix ────────────────────────────────────────────────


def measure(
    scorer: Scorer,
    suite: Suite,
    datasets: Sequence[Dataset],
    tokenization: Tokenization,
    key: bytes,
    out: Path,
    base_changed: Callable[[], bool],
) -> dict[str, tuple[AdapterEntry, list[dict[str, Any]]]]:
    """(report entry, items) of every adapter of ``scorer``, by name.

    General knowledge is measured on ``suite``. Where an adapter's own domain is in ``datasets``
    its test rows are scored here, which is a look at them (in the ledger of ``out``); else the
    items of its folder are taken as they stand. ``base_changed`` is asked once everything is
    scored.
    """
    names = scorer.names
    by_domain = {dataset.domain.name: dataset for dataset in datasets}
    with distributed.sharing():
        general = _general(scorer, suite, tokenization, key)
        scored = {name: _own_rows(scorer, dataset, key) for name, dataset in by_domain.items()}
    changed = base_changed()
    found = {}
    for name in names:
        adapter = scorer.bank[name]
        if adapter.card is None or not adapter.card.adapter.judged:
            raise UsageError(
                where=name,
                expected="an adapter with a card that was evaluated",
                found="no card" if adapter.card is None else "one without a verdict",
                hint="Train or evaluate it here first: its rows and its gates are unknown.",
            )
        entry = deepcopy(adapter.card.adapter)
        dataset = by_domain.get(entry.domain)
        if dataset is not None:
            mine, threshold = scored[dataset.domain.name][name]
            entry.judged["threshold"] = threshold
            hold_to(entry, dataset.domain)
            with_questions = not scorer.bank.base.bidirectional
            entry.leaks = asdict(every_leak(dataset, suite, with_questions=with_questions))
        else:
            suites = {suite.name, entry.judged["suite"]}
            if len(suites) > 1 and suites != EMBEDDED:
                scorer.display.warn(
                    f"{name}: nobody has looked for the questions of {suite.name} in its training "
                    "rows. --domains with its recipe does."
                )
            assert adapter.path is not None
            kept = ("validation", "test", "train")
            mine = [item for item in read_items(adapter.path) if item["set"] in kept]
        asked, largest = general[name]
        entry.judged |= {
            "suite": suite.name,
            # Where nothing is read, the move on the domain's own rows stands.
            "largest_move": largest or entry.judged["largest_move"],
            "base_changed": entry.judged["base_changed"] or changed,
        }
        if dataset is not None:
            judge(entry, mine + asked, out)
        else:
            entry.update(figures(entry, mine + asked))
        found[name] = (entry, mine + asked)
    return found


def _general(
    scorer: Scorer, suite: Suite, tokenization: Tokenization, key: bytes
) -> dict[str, tuple[list[dict[str, Any]], float]]:
    """For each adapter its items on general questions and text, and the largest move of a logit."""
    found: dict[str, tuple[list[dict[str, Any]], float]] = {n: ([], 0.0) for n in scorer.names}
    base = scorer.bank.base
    for probe in suite.probes if not base.bidirectional else ():
        asked = [(part, example) for p, part, example in suite.asked() if p is probe]
        if not asked:
            continue
        rows = [EncodedRow(example, tokenization.encode(example)) for _, example in asked]
        scores = scorer.scores(Part(f"{probe.name} questions", probe.task, rows),
                               [None, *scorer.names])  # fmt: skip
        parts = [part for part, _ in asked]
        for name in scorer.names:
            pair = {"base": scores[None], "adapter": scores[name]}
            found[name][0].extend(general_records(rows, parts, pair, key))
    texts = tokenization.encode_rows(suite.texts()) if base.language_head else []
    if texts:
        part = Part("general text", LanguageModelling(), texts)
        for name, moved in scorer.drift(part).items():
            both = [text_scores(fields) for fields in moved]
            pair = {who: [score[who] for score in both] for who in ("base", "adapter")}
            made = item_records("text", texts, pair, key, show_text=False)
            largest = max(fields["largest"] for fields in moved)
            found[name] = (found[name][0] + [r | {"suite": suite.name} for r in made], largest)
    return found


def _own_rows(
    scorer: Scorer, dataset: Dataset, key: bytes
) -> dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None]]:
    """For each adapter of this domain its items on the domain's rows, and its threshold.

    ``others`` of an item holds every other adapter's score on it. Raises UsageError when the domain
    has no adapter here.
    """
    domain, prepared, tokenization = dataset.domain, dataset.prepared, dataset.tokenization
    task = prepared.task
    own = [name for name in scorer.names if _domain_of(scorer.bank, name) == domain.name]
    if not own:
        raise UsageError(
            where=domain.name,
            expected="domains of the adapters that are measured",
            found=f"none of {listed(scorer.names)} is of this domain",
            hint=f"Load its adapter too, or leave {domain.name} out.",
        )
    for name in own:
        card = scorer.bank[name].card
        assert card is not None  # it names its domain
        entry = card.adapter
        check_head(scorer.bank[name].head, task, entry.task, name)
        check_same_rows(name, entry, prepared, "train")
    rows = judged_rows(dataset)
    cut = len(rows) - len(dataset.test)
    part = Part(f"{domain.name} rows", task, rows)
    if tokenization.head:
        # A head answers for its own classes only; the base's own score is a head on it as it is.
        names: tuple[str, ...] = tuple(own)
        scores = scorer.scores(part, own)
        scores[None] = frozen_scores(scorer.bank, dataset, part.items)
    else:
        names = scorer.names
        scores = scorer.scores(part, [None, *names])
    baselines = trivial_scores(prepared, [example for example, _ in rows])
    seed = domain.training.seed
    prompted = with_shots(tokenization, dataset.train, rows, seed, scorer.display.warn)
    if prompted:
        shown = [EncodedRow(row.example, item) for row, item in zip(rows, prompted, strict=True)]
        part = Part(f"{domain.name} rows with {SHOTS} examples", task, shown)
        baselines[f"{SHOTS}_shot"] = scorer.scores(part, [None])[None]
    seen = training_sample(dataset)
    learned = scorer.scores(Part(f"{domain.name} training rows", task, seen), own)
    if not tokenization.head:
        part = Part(f"{domain.name} training rows, in nats", nats_only(task), seen)
        learned |= scorer.scores(part, [None])
    found = {}
    for name in own:
        # No contender's name holds a slash.
        others = {f"others/{o}": scores[o] for o in names if o != name}
        contenders = {"base": scores[None], "adapter": scores[name], **baselines}
        train = {"base": learned[None]} if None in learned else {}
        made, train, threshold = decided(
            task, contenders | others, train | {"adapter": learned[name]}, rows[:cut],
            scorer.display,
        )  # fmt: skip
        items = []
        for kind, places in (("validation", slice(cut)), ("test", slice(cut, None))):
            shown_here = {who: made[who][places] for who in contenders}
            items += item_records(kind, rows[places], shown_here, key, domain.show_text)
        for at, item in enumerate(items[cut:], cut):
            item["others"] = {who.split("/")[1]: made[who][at] for who in others}
        items += item_records("train", seen, train, key, domain.show_text)
        found[name] = items, threshold
    return found


def _domain_of(bank: Bank, name: str) -> str | None:
    card = bank[name].card
    return card.adapter.domain if card else None
