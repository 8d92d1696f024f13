"""Every leak that counts against an adapter: among its rows, general texts and probe questions."""

from collections.abc import Sequence

from lora_domains.data.identity import normalised_once
from lora_domains.data.leaks import Leaks, find_leaks, leaks_in_texts
from lora_domains.dataset import Dataset
from lora_domains.modeling.base import Base
from lora_domains.probes.suite import Suite
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
    """Test rows and probes in the general text.

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
