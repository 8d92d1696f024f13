"""Every leak that counts against an adapter: among its rows, general texts and probe questions."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_domains import distributed
from lora_domains.console import Display
from lora_domains.data.identity import normalised_once, open_project
from lora_domains.data.leaks import Leaks, find_leaks, inherited_leaks, leaks_in_texts
from lora_domains.dataset import Dataset
from lora_domains.modeling.base import Base
from lora_domains.probes.suite import Suite
from lora_domains.report.card import AdapterEntry
from lora_domains.tasks import Example

OWN_SUITES = ("embedded", "quick")
"""Suites of the embedded world."""


@normalised_once()
def every_leak(
    dataset: Dataset, suite: Suite, base: Base, *, with_questions: bool, elsewhere: bool = False
) -> Leaks:
    """Test rows among training rows, and test rows and probes in all that training may read.

    ``with_questions`` says whether the suite's questions are scored: an encoder answers none.
    ``elsewhere`` is for an adapter that others trained: it never read the general text, and it did
    read the training rows that were dropped because they are also test rows.
    """
    scored = suite.by_probe() if with_questions else []
    by_probe = [[example for _, example in questions] for _, questions in scored]
    questions = [example for probe in by_probe for example in probe]
    prepared = dataset.prepared
    searches = (
        prepared.leaks,
        find_leaks(prepared.train, questions),
        _in_general_text(dataset, suite, base, by_probe) if not elsewhere else Leaks(0, 0, ()),
    )
    dropped = prepared.row_counts.refused if elsewhere else 0
    return Leaks(
        dropped + sum(leaks.exact for leaks in searches),
        sum(leaks.near for leaks in searches),
        tuple(pair for leaks in searches for pair in leaks.pairs),
    )


def _in_general_text(
    dataset: Dataset, suite: Suite, base: Base, by_probe: Sequence[Sequence[Example]]
) -> Leaks:
    """Test rows and probes in the general text; what a base wrote itself tells it nothing new.

    The embedded base was trained on texts that state what its own questions ask, in other words:
    that such a text resembles a question is no finding there. A text that contains one is.
    """
    rows = [dataset.prepared.test, *by_probe, suite.texts()]
    leaks = leaks_in_texts(dataset.general.used, rows)
    if base.id != "embedded" or dataset.domain.data.general or suite.name not in OWN_SUITES:
        return leaks
    test = {row.id for row in dataset.prepared.test}
    pairs = [pair for pair in leaks.pairs if pair[2] == "exact" or pair[1] in test]
    return Leaks(leaks.exact, len(pairs) - leaks.exact, tuple(pairs))


def leaks_of(dataset: Dataset, suite: Suite, base: Base, *, elsewhere: bool) -> dict[str, Any]:
    """The leaks that count against an adapter, as its card holds them.

    Empty where it was trained ``elsewhere`` and no training rows are given.
    """
    if elsewhere and not dataset.train:
        return {}
    questions = not base.bidirectional
    return asdict(every_leak(dataset, suite, base, with_questions=questions, elsewhere=elsewhere))


def with_inherited(
    leaks: dict[str, Any], entry: AdapterEntry, dataset: Dataset, display: Display
) -> dict[str, Any]:
    """``leaks`` and the test rows that the adapters it continues from were trained on.

    Warns where those rows are not known.
    """
    if entry.parent is None:
        return leaks
    _, key = distributed.on_main(open_project)
    found = inherited_leaks(dataset.prepared.test, entry.trained_rows, key)
    if found is None:
        display.warn(
            f"test rows on which {entry.parent.name} was trained are not found: its card holds no "
            "digests of its rows, or digests by the key of another project."
        )
        return leaks
    pairs = [(entry.parent.name, row, "exact") for row in found]
    return {**leaks, "exact": leaks["exact"] + len(found), "pairs": (*leaks["pairs"], *pairs)}
