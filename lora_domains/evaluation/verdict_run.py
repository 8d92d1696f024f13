"""One evaluation of an adapter: score its test rows, record that in the ledger, apply its gates.

Every verdict on test rows comes from ``judge``, so that no evaluation is missing from the ledger
and each is tested at the level that earlier evaluations leave (``verdict.ledger``).
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.folder import rewrite_card
from lora_domains.adapters.parent import loaded_parent
from lora_domains.console import Display
from lora_domains.data.identity import digest_key, normalised_once
from lora_domains.data.prepare import Prepared
from lora_domains.dataset import Dataset
from lora_domains.domain import Domain, as_record
from lora_domains.errors import AdapterError, UsageError
from lora_domains.evaluation.contenders import (
    general_knowledge,
    largest_feature_move,
    score_domain,
    score_general,
    scored_rows,
)
from lora_domains.evaluation.items import Items
from lora_domains.evaluation.leak_search import every_leak
from lora_domains.evaluation.scorer import Scorer
from lora_domains.inference.predict import length_of
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.heads import check_head
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry, Card
from lora_domains.report.markdown import readme
from lora_domains.report.report import figures
from lora_domains.verdict.ledger import begin_evaluation, end_evaluation, set_digest
from lora_domains.verdict.rules import finite


@normalised_once()
def evaluate(
    bank: Bank,
    dataset: Dataset,
    suite: Suite,
    out: Path,
    display: Display,
    base_changed: Callable[[], bool],
) -> Card:
    """Score the adapter of the dataset's domain, apply its gates and rewrite its card.

    ``out`` holds the ledger and the key of the rows' digests. ``base_changed`` is called once
    everything is scored. Returns the card. Raises AdapterError for an adapter without one,
    UsageError for other training rows than it was trained on.
    """
    name = dataset.domain.name
    card = _checked_card(bank, dataset, display)
    entry = card.adapter
    leaks = every_leak(dataset, suite, with_questions=not bank.base.bidirectional)
    key, scorer = distributed.on_main(lambda: digest_key(out)), Scorer(bank, display)
    continued_from = loaded_parent(bank, name, dataset.parent, out, display.warn)
    with continued_from as parent, distributed.sharing():
        own = score_domain(scorer, dataset, [name], key, parent=parent)[name]
        length = dataset.tokenization.max_length
        general = score_general(scorer, suite, length, [name], key)[name]
        largest_move = general.largest_move
        if not bank.base.language_head:
            largest_move = largest_feature_move(bank, name, scored_rows(dataset))
    use_settings(entry, dataset.domain)
    entry.leaks = asdict(leaks)
    entry.judged = {
        **_rules(dataset.domain),
        "base_changed": base_changed(),
        "largest_move": finite(largest_move),
        "suite": suite.name,
        "knowledge": general_knowledge(bank.base),
        "embedded_base": bank.base.id == "embedded",
        "threshold": own.threshold,
    }
    items = own.items + general.items
    judge(entry, items, out)
    path = bank[name].path
    if path is not None:
        distributed.on_main(lambda: rewrite_card(path, card, readme, items))
    return card


def _checked_card(bank: Bank, dataset: Dataset, display: Display) -> Card:
    """The card of the dataset's adapter; raises an error unless ``dataset`` fits its training."""
    name = dataset.domain.name
    card = bank[name].card
    if card is None:
        raise AdapterError(
            where=name,
            expected="an adapter trained here, with a card",
            found="a folder of plain PEFT",
            hint="Its base and training rows are unknown, so it cannot be given a verdict.",
        )
    check_fits(bank, name, card.adapter, dataset, display)
    return card


def _rules(domain: Domain) -> dict[str, Any]:
    """The part of ``judged`` that says how figures are computed from items."""
    task = domain.task
    return {
        "metric": domain.primary_metric,
        "labels": list(task.labels or ()),
        "positive": task.positive,
        "loss": task.loss_unit,
        "prevalence": domain.prevalence,
    }


def use_settings(entry: AdapterEntry, domain: Domain) -> None:
    """Give ``entry`` the task, gates and metric of ``domain``; those at training are kept."""
    now = {key: as_record(domain)[key] for key in ("task", "gates", "metric", "prevalence")}
    before = {key: entry.settings.get(key) for key in now}
    if before != now and not entry.trained_with:
        entry.trained_with = before
    entry.settings |= now


def check_fits(
    bank: Bank, name: str, entry: AdapterEntry, dataset: Dataset, display: Display
) -> None:
    """Raise an error unless ``dataset`` fits the training of the adapter ``name``.

    Its head must have the same classes, and the training rows and their length must be the same.
    Warns of other general text.
    """
    check_head(bank[name].head, dataset.domain.task, entry.declared_task, name)
    check_same_rows(name, entry, dataset.prepared, "train")
    check_same_length(name, length_of(bank, name), dataset.tokenization.max_length)
    if entry.data.get("general") not in (None, dataset.prepared.digests["general"]):
        display.warn(
            f"the general text differs from that in the training of {name}: leaks are searched for "
            "in the text given now."
        )


def check_same_rows(name: str, entry: AdapterEntry, prepared: Prepared, split: str) -> None:
    """Raise UsageError unless ``split`` is what the adapter of ``entry`` was trained with."""
    if entry.data.get(split) != prepared.digests[split]:
        raise UsageError(
            where=name,
            expected=f"the {split} rows of its training: leaks, overfitting, baselines and scales "
            "are measured on them",
            found="other rows, or another split or sample of them",
            hint="Give the rows, the seed and the limit of its training.",
        )


def check_same_length(name: str, trained: int, now: int) -> None:
    """Raise UsageError where rows are truncated at another length than in training."""
    if trained != now:
        raise UsageError(
            where=name,
            expected=f"rows of at most {trained} tokens, as it was trained and is used",
            found=f"at most {now}",
            hint="Give the max_length of its training.",
        )


def judge(entry: AdapterEntry, items: Items, out: Path) -> None:
    """Figures, gates and verdict of ``entry`` from ``items`` that were just scored.

    The ledger of ``out`` is written before and after: an evaluation that is stopped in between
    counts all the same. Every process calls this; the first one writes.
    """
    test_set = {"test_set": set_digest(items), "adapter": str(entry.sha256)}
    rows = sum(item["set"] == "test" for item in items)
    prior = distributed.on_main(
        lambda: begin_evaluation(out, **test_set, domain=entry.domain, rows=rows)
    )
    entry.seeds = {}  # of an earlier evaluation
    entry.looks = asdict(prior)
    entry.update(figures(entry, items))
    distributed.on_main(lambda: end_evaluation(out, **test_set, verdict=entry.outcome))
