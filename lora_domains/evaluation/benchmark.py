"""Many adapters on one base: what each gained and kept, and what it scores on other domains.

All adapters are scored on the same rows in mixed batches, and the scores are stored (``scorer``):
a stopped run continues, and the base is scored once for all adapters.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_domains import distributed
from lora_domains.adapters.foreign import foreign_card, is_foreign
from lora_domains.console import Display
from lora_domains.data.identity import digest_key
from lora_domains.dataset import Dataset
from lora_domains.distributed import environment
from lora_domains.domain import JUDGE, Domain
from lora_domains.errors import UsageError, listed
from lora_domains.evaluation.contenders import (
    DomainScores,
    GeneralScores,
    general_knowledge,
    rules,
    score_domain,
    score_general,
    scored_rows,
)
from lora_domains.evaluation.items import Items
from lora_domains.evaluation.leak_search import leaks_of, with_inherited
from lora_domains.evaluation.scorer import Scorer
from lora_domains.evaluation.store import Store
from lora_domains.evaluation.verdict_run import (
    Evaluated,
    check_fits,
    judge,
    use_settings,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import row_limit
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry, BaseRecord, read_items
from lora_domains.report.report import Benchmark, assemble, figures, summed_up
from lora_domains.verdict.rules import finite

EMBEDDED = {"embedded", "quick"}
"""Suites of the same questions: ``quick`` has some of those of ``embedded``."""


def benchmark(
    bank: Bank,
    datasets: Sequence[Dataset],
    suite: Suite,
    out: Path,
    display: Display,
    base_changed: Callable[[], bool],
    *,
    reports: Path,
    show_text: bool = False,
) -> Benchmark:
    """``measure`` every adapter in ``bank`` and make a report of it.

    Scores are stored in the folder ``reports``, so that a stopped run continues. ``show_text``
    includes the text of wrongly answered rows. Raises UsageError for an empty bank.
    """
    if not bank:
        raise UsageError(
            expected="at least one loaded adapter",
            found="none",
            hint="Load some: model.load_adapter('adapters/medical').",
        )
    scorer = Scorer(bank, display, Store(reports / ".scores"))
    measured = measure(scorer, suite, datasets, out, base_changed)
    report = assemble(
        BaseRecord(**bank.base.record()),
        environment(bank.base.device, bank.base.quantization, suite.seed),
        {n: summed_up(n, entry, items, show_text) for n, (entry, items) in measured.items()},
    )
    return Benchmark(report, {name: items for name, (_, items) in measured.items()})


def measure(
    scorer: Scorer,
    suite: Suite,
    datasets: Sequence[Dataset],
    out: Path,
    base_changed: Callable[[], bool],
) -> dict[str, tuple[AdapterEntry, Items]]:
    """(report entry, items) of every adapter in the bank, by name.

    General knowledge is measured on ``suite``. An adapter whose domain is in ``datasets`` is
    evaluated on its test rows, which the ledger of the project records; otherwise the items in its
    folder are kept. One that others trained belongs to the domain of its name, or to the only one.
    ``out`` holds the key of the rows' digests. ``base_changed`` is called once everything is
    scored. Raises UsageError for an adapter that was never evaluated, for a dataset without an
    adapter of its domain, and for one that does not fit an adapter's training.
    """
    datasets = [without_judge(dataset) for dataset in datasets]
    names = tuple(scorer.bank)
    by_domain = {dataset.domain.name: dataset for dataset in datasets}
    entries = {name: _entry(scorer.bank, name, by_domain) for name in names}
    # Whatever can be refused is refused before anything is scored.
    own = {domain: _adapters_of(dataset, entries) for domain, dataset in by_domain.items()}
    for domain, dataset in by_domain.items():
        for name in own[domain]:
            if not entries[name].trained_elsewhere:
                check_fits(scorer.bank, name, entries[name], dataset, scorer.display)
    leaks = _leaks(scorer, suite, by_domain, own, entries)
    scored: dict[str, DomainScores] = {}
    key = distributed.on_main(lambda: digest_key(out))
    evaluated: dict[str, Evaluated] = {}
    for domain, dataset in by_domain.items():
        for name in own[domain]:
            one = Evaluated(dataset, entries[name], suite, scorer.bank.base, out,
                            before=tuple(evaluated.values()))  # fmt: skip
            one.announce(scorer.display)
            evaluated[name] = one
    with distributed.sharing():
        general = score_general(scorer, suite, row_limit(scorer.bank.base, None), names, key)
        for domain, dataset in by_domain.items():
            # A head answers for its own classes only.
            others = own[domain] if dataset.tokenization.head else names
            scored |= score_domain(scorer, dataset, own[domain], key, others=others)
    changed = base_changed()
    measured = {}
    for name, entry in entries.items():
        if name in scored:
            items = scored[name].items
            _set_domain(entry, by_domain[entry.domain].domain, scored[name], scorer.bank.base)
            entry.leaks = leaks[name]
        else:
            items = _stored_items(scorer, name, entry, suite)
        _set_general(entry, scorer.bank.base, suite, general[name], changed)
        items = items + general[name].items
        if name in scored:
            judge(entry, items, evaluated[name])
        else:
            entry.update(figures(entry, items))
        measured[name] = (entry, items)
    return measured


def without_judge(dataset: Dataset) -> Dataset:
    """``dataset`` without its judge; raises UsageError where that decides."""
    domain = dataset.domain
    if domain.primary_metric == JUDGE:
        raise UsageError(
            where=domain.name,
            expected="a metric that is computed from stored scores",
            found="judge, for which a program reads the answers",
            hint=f"Evaluate it by itself: lora-domains evaluate {domain.name}",
        )
    return replace(dataset, domain=replace(domain, judge=None))


def _entry(bank: Bank, name: str, datasets: Mapping[str, Dataset]) -> AdapterEntry:
    """The entry of an adapter, that of its card or a new one for an adapter that others trained.

    Raises UsageError for an adapter that was never evaluated and belongs to none of ``datasets``.
    """
    dataset = datasets.get(name) or (next(iter(datasets.values())) if len(datasets) == 1 else None)
    if dataset is not None and is_foreign(bank[name]):
        domain = dataset.domain
        entry = foreign_card(bank[name], bank.base, domain, dataset.prepared).adapter
        # Of use where no text is scored (``_set_general``).
        scorer = Scorer(bank, Display(quiet=True))
        move = scorer.largest_move(scored_rows(dataset), name)
        entry.judged = {"base_changed": False, "largest_move": finite(move)}
        return entry
    card = bank[name].card
    if card is None or not card.adapter.judged:
        raise UsageError(
            where=name,
            expected="an adapter with a card that was evaluated",
            found="no card" if card is None else "one without a verdict",
            hint="Train or evaluate it here first, or pass its recipe with --domains: its rows and "
            "its gates are unknown.",
        )
    return deepcopy(card.adapter)


def _leaks(
    scorer: Scorer,
    suite: Suite,
    by_domain: Mapping[str, Dataset],
    own: Mapping[str, Sequence[str]],
    entries: Mapping[str, AdapterEntry],
) -> dict[str, dict[str, Any]]:
    """The leaks of each adapter; searched once for all adapters of a domain."""
    leaks: dict[str, dict[str, Any]] = {}
    for domain, dataset in by_domain.items():
        found = {
            elsewhere: leaks_of(dataset, suite, scorer.bank.base, elsewhere=elsewhere)
            for elsewhere in {entries[name].trained_elsewhere for name in own[domain]}
        }
        for name in own[domain]:
            entry = entries[name]
            leaks[name] = with_inherited(
                found[entry.trained_elsewhere], entry, dataset, scorer.display
            )
    return leaks


def _adapters_of(dataset: Dataset, entries: Mapping[str, AdapterEntry]) -> list[str]:
    """The adapters of the dataset's domain; raises UsageError when there is none."""
    domain = dataset.domain.name
    own = [name for name, entry in entries.items() if entry.domain == domain]
    if not own:
        raise UsageError(
            where=domain,
            expected="at least one adapter of this domain",
            found=f"only adapters of other domains: {listed(entries)}",
            hint=f"Load its adapter too, or leave {domain} out.",
        )
    return own


def _stored_items(scorer: Scorer, name: str, entry: AdapterEntry, suite: Suite) -> Items:
    """The adapter's items on its own rows from an earlier evaluation.

    Warns where leaks of the suite were not searched for then.
    """
    suites = {suite.name, entry.judged["suite"]}
    if len(suites) > 1 and suites != EMBEDDED:
        scorer.display.warn(
            f"{name}: {suite.name} was not checked for leaks into its training rows; pass its "
            "recipe with --domains."
        )
    items = read_items(scorer.bank[name].folder)
    return [item for item in items if item["set"] in ("validation", "test", "train")]


def _set_domain(entry: AdapterEntry, domain: Domain, scored: DomainScores, base: Base) -> None:
    """Let ``entry`` be judged by the settings of ``domain``."""
    entry.judged |= rules(domain, base) | {"threshold": scored.threshold}
    use_settings(entry, domain)


def _set_general(
    entry: AdapterEntry, base: Base, suite: Suite, general: GeneralScores, base_changed: bool
) -> None:
    judged = entry.judged
    judged |= {"suite": suite.name, "embedded_base": base.id == "embedded"}
    judged["knowledge"] = general_knowledge(base)
    # Without texts, the largest move on the adapter's own rows is kept.
    if general.largest_move:
        judged["largest_move"] = finite(general.largest_move)
    judged["base_changed"] = judged["base_changed"] or base_changed
