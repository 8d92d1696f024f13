"""Several seeds of one domain: how much of a figure is the seed's, on the validation rows."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from lora_domains import distributed
from lora_domains.adapters.folder import rewrite_card
from lora_domains.adapters.readme import readme
from lora_domains.console import Display, analyses
from lora_domains.data.identity import digest_key, normalised_once
from lora_domains.dataset import Dataset
from lora_domains.evaluation.contenders import score_validation
from lora_domains.evaluation.items import make_items
from lora_domains.evaluation.scorer import Scorer
from lora_domains.joint.grid import of_seeds
from lora_domains.modeling.bank import Bank
from lora_domains.report.card import Card
from lora_domains.verdict.metrics import reported
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import over_seeds


def seed_datasets(dataset: Dataset, count: int) -> list[Dataset]:
    """The same rows for each of ``count`` seeds; the first one is ``dataset``."""
    return [replace(dataset, domain=domain) for domain in of_seeds(dataset.domain, count)]


@normalised_once()
def score_seeds(bank: Bank, datasets: Sequence[Dataset], out: Path, display: Display) -> list[Card]:
    """The cards of the adapters of ``datasets`` with their spread on the validation rows.

    The adapters are loaded under the names of their domains. Base and baselines are scored once.
    The scores of the rows are stored with each adapter, as ``analysis.compare`` reads them, and the
    spread is written into each card and shown. ``out`` holds the key of the rows' digests.
    """
    first, names = datasets[0], [one.domain.name for one in datasets]
    task, rows = first.domain.task, first.validation
    key = distributed.on_main(lambda: digest_key(out))
    with distributed.sharing():
        contenders = score_validation(Scorer(bank, display), first, names)
    items = {
        name: make_items("validation", rows, contenders[name], key, first.domain.show_text)
        for name in names
    }
    metrics = reported(task.labels or (), task.positive_index)
    tables = [ScoreTable(items[name]) for name in names]
    spread = over_seeds(tables, metrics, task.positive_index, "validation")

    cards = []
    for name in names:
        card = bank[name].card
        if card is not None:  # as each that was fitted here has
            card.adapter.seeds = spread
            distributed.on_main(partial(rewrite_card, out / name, card, readme, items[name]))
            cards.append(card)
    if not display.quiet:
        analyses.seeds(display.console, spread)
    return cards
