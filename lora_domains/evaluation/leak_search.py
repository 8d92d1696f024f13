"""Every leak that counts against an adapter: among its rows, general texts and probe questions."""

from lora_domains.data.identity import normalised_once
from lora_domains.data.leaks import Leaks, find_leaks, leaks_in_texts
from lora_domains.dataset import Dataset
from lora_domains.probes.suite import Suite


@normalised_once()
def every_leak(
    dataset: Dataset, suite: Suite, *, with_questions: bool, elsewhere: bool = False
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
        leaks_in_texts(
            [] if elsewhere else dataset.general.used, [prepared.test, *by_probe, suite.texts()]
        ),
    )
    dropped = prepared.row_counts.refused if elsewhere else 0
    return Leaks(
        dropped + sum(leaks.exact for leaks in searches),
        sum(leaks.near for leaks in searches),
        tuple(pair for leaks in searches for pair in leaks.pairs),
    )
