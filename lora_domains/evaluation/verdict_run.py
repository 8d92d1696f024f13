"""From scored items to the verdict of a card's entry; the look at the test set comes first.

Whatever gives an adapter a verdict on test rows goes through here, so that no look is forgotten and
every verdict is held to the level that the looks before it leave (``looks``).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.peft import rewrite_card
from lora_domains.adapters.versions import parent_resident
from lora_domains.console import Display
from lora_domains.data.identity import digest_key
from lora_domains.data.prepare import Prepared
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, as_record
from lora_domains.errors import AdapterError, UsageError
from lora_domains.evaluation.contenders import Scored, general_knowledge, score_items
from lora_domains.evaluation.leak_search import every_leak
from lora_domains.inference.predict import length_of
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import check_head
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry, Card
from lora_domains.report.markdown import readme
from lora_domains.report.report import figures
from lora_domains.verdict.ledger import look, set_digest, settle


def evaluate(
    bank: Bank,
    dataset: Dataset,
    suite: Suite,
    out: Path,
    display: Display,
    base_changed: Callable[[], bool],
) -> Card:
    """Score the adapter of ``dataset``, compute its figures and gates, and rewrite its card.

    ``out`` holds the ledger and the key of the rows' digests. ``base_changed`` is called once
    everything is scored. Returns the card. Raises AdapterError for an adapter without one,
    UsageError for other training rows than it was trained on.
    """
    name, prepared = dataset.domain.name, dataset.prepared
    adapter = bank[name]
    card = adapter.card
    if card is None:
        raise AdapterError(
            where=name,
            expected="an adapter trained here, with a card",
            found="a folder of plain PEFT",
            hint="Its base and training rows are unknown, so it cannot be given a verdict.",
        )
    entry = card.adapter
    check_head(adapter.head, dataset.domain.task, entry.task, name)
    check_same_rows(name, entry, prepared, "train")
    check_same_length(name, length_of(bank, name), dataset.tokenization.max_length)
    if entry.data.get("general") not in (None, prepared.digests["general"]):
        display.warn(
            f"the general text differs from that in the training of {name}: leaks are searched for "
            "in the text given now."
        )
    leaks = every_leak(dataset, suite, with_questions=not bank.base.bidirectional)
    key = distributed.on_main(lambda: digest_key(out))
    parent = parent_resident(bank, name, dataset.parent, out, display.warn)
    with parent as parent_name, distributed.sharing():
        scored = score_items(bank, name, dataset, suite, key, display, parent_name)
    changed = base_changed()
    hold_to(entry, dataset.domain)
    entry.leaks = asdict(leaks)
    knowledge = general_knowledge(bank.base)
    entry.judged = judged_by(dataset.domain, scored, changed, suite.name, knowledge)
    judge(entry, scored.items, out)
    if adapter.path is not None:
        folder = adapter.path
        distributed.on_main(lambda: rewrite_card(folder, card, readme, scored.items))
    return card


def judged_by(
    domain: Domain, scored: Scored, base_changed: bool, suite: str, knowledge: str
) -> dict[str, Any]:
    """What a card keeps beside its items so that its figures can be computed anew (``judged``)."""
    task = domain.task
    return {
        "metric": task.metric,
        "labels": list(task.labels or ()),
        "positive": task.positive,
        "base_changed": base_changed,
        "largest_move": scored.largest_move if isfinite(scored.largest_move) else None,
        "loss": task.loss_unit,
        "suite": suite,
        "knowledge": knowledge,
        "threshold": scored.threshold,
    }


def hold_to(entry: AdapterEntry, domain: Domain) -> None:
    """Judge by task and gates of ``domain``: today's. Those it was trained with are kept."""
    now = {key: as_record(domain)[key] for key in ("task", "gates")}
    before = {key: entry.settings[key] for key in now}
    if before != now and not entry.trained_with:
        entry.trained_with = before
    entry.settings |= now


def check_same_rows(name: str, entry: AdapterEntry, prepared: Prepared, split: str) -> None:
    """Raise UsageError where ``split`` is not what the adapter of ``entry`` was trained with."""
    if entry.data.get(split) != prepared.digests[split]:
        raise UsageError(
            where=name,
            expected=f"the {split} rows of its training: leaks, overfitting, baselines and scales "
            "are judged by them",
            found="other rows, or another split or sample of them",
            hint="Give the rows, the seed and the limit of its training.",
        )


def check_same_length(name: str, trained: int, now: int) -> None:
    """Raise UsageError where rows are cut elsewhere than when the adapter ``name`` was trained."""
    if trained != now:
        raise UsageError(
            where=name,
            expected=f"rows of at most {trained} tokens, as it was trained and is used",
            found=f"at most {now}",
            hint="Give the max_length of its training.",
        )


def judge(entry: AdapterEntry, items: Sequence[dict[str, Any]], out: Path) -> None:
    """Figures, gates and verdict of ``entry`` from ``items`` that were scored just now.

    Written down in the ledger of ``out`` before and after: a run that is stopped in between has
    looked all the same. Every process calls this; the first one writes.
    """
    tests = {"test_set": set_digest(items), "adapter": str(entry.sha256)}
    rows = sum(item["set"] == "test" for item in items)
    found = distributed.on_main(lambda: look(out, **tests, domain=entry.domain, rows=rows))
    entry.seeds = {}  # of an evaluation before this one
    entry.looks = asdict(found)
    entry.update(figures(entry, items))
    distributed.on_main(lambda: settle(out, **tests, verdict=entry.outcome))
