"""General text: ordinary text by which an adapter is kept close to its base.

Training is regularised on some of it and a checkpoint is selected on the rest. A domain may give
its own (``Data.general``). The embedded general text is a file of the package; other causal bases
write theirs (``own_text``). A third split, ``test``, is what drift is measured on, and no training
reads it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from lora_domains.data.identity import digest_of, identity, normalised_once
from lora_domains.data.leaks import contained
from lora_domains.data.readers import read
from lora_domains.data.source import Source
from lora_domains.embedded import GENERAL_TEXT_PATH
from lora_domains.errors import DataError
from lora_domains.tasks import Example, LanguageModelling
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.tokenization.tokenization import Tokenization

if TYPE_CHECKING:
    from lora_domains.inference.reference import Prediction

FEWEST = 20
"""The fewest texts that a domain's own general text may have."""
POOL = 480
"""The most texts that one run trains on. Each is used several times, and the base scores it once;
``benchmarks/training/retention.py`` reports how much knowledge is kept with this many."""
SELECTION = 200
"""The most texts that a checkpoint is selected on; also at most a fifth of a domain's own texts."""


@dataclass(frozen=True)
class GeneralText:
    """Texts for training, and disjoint from them texts for selecting a checkpoint."""

    training: Sequence[Example] = ()
    selection: Sequence[Example] = ()

    def __len__(self) -> int:
        return len(self.training) + len(self.selection)

    @property
    def counts(self) -> tuple[int, int]:
        """How many texts there are for training, and for selecting a checkpoint."""
        return len(self.training), len(self.selection)

    @property
    def own(self) -> bool:
        """Whether the base wrote the texts itself."""
        return False

    @property
    def origin(self) -> str:
        """Where the texts come from, if it is to be said."""
        return ""

    @property
    def digest(self) -> str:
        """sha256 of the texts that a run may read."""
        return digest_of(self.used)

    @property
    def predictions(self) -> "Mapping[str, Prediction] | None":
        """What the base predicts on the texts, by their ids, where that is stored."""
        return None

    def windows(
        self, split: Literal["training", "selection"], tokenization: Tokenization, most: int
    ) -> list[EncodedExample]:
        """At most ``most`` windows of the texts of ``split``."""
        texts = self.training if split == "training" else self.selection
        return tokenization.sample_windows(texts, most)

    def in_part(self) -> "GeneralText":
        """These texts, or where the base would write them first, some that stand for all of them in
        a dry run."""
        return self

    @property
    def seconds(self) -> float:
        """What the base will take to write the texts that these stand for."""
        return 0.0

    @property
    def used(self) -> list[Example]:
        """The texts that a run may read."""
        return [*self.training[:POOL], *self.selection]

    def without_texts_containing(self, rows: Sequence[Example]) -> "GeneralText":
        """The texts that contain none of ``rows``."""
        containing = {text for text, _ in contained([*self.training, *self.selection], rows)}
        return GeneralText(
            [text for text in self.training if text.id not in containing],
            [text for text in self.selection if text.id not in containing],
        )


@cache
def embedded_texts(split: Literal["train", "validation", "test"]) -> tuple[str, ...]:
    """The embedded general text of ``split``, as ``benchmarks/embedded/general_text.py`` drew it.

    No validation text is contained in a training text, and no test text in either.
    """
    with GENERAL_TEXT_PATH.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return tuple(row["text"] for row in rows if row["split"] == split)


@normalised_once()
def general_text(source: Source | None) -> GeneralText:
    """The embedded general text, or the column ``text`` of ``source``, each different text once.

    The texts of ``source`` are shuffled with a fixed seed, because a file may be sorted by subject
    and training uses a few hundred of them only. Raises DataError when the column is missing or
    there are fewer than ``FEWEST`` texts.
    """
    if source is None:
        return GeneralText(
            _examples("embedded-training-text", embedded_texts("train")),
            _examples("embedded-selection-text", embedded_texts("validation")),
        )
    by_identity: dict[str, Example] = {}
    for row in read(source, "general"):
        example = LanguageModelling().example(row)
        by_identity.setdefault(identity(example), example)
    if len(by_identity) < FEWEST:
        raise DataError(
            where="general text",
            expected=f"at least {FEWEST} different texts in the column 'text'",
            found=str(len(by_identity)),
            hint="Add ordinary text, one line or paragraph per row, or leave --general out.",
        )
    texts = list(by_identity.values())
    texts = [texts[at] for at in np.random.default_rng(0).permutation(len(texts))]
    every = max(5, len(texts) // SELECTION)
    selected = set(range(0, len(texts), every)[:SELECTION])
    selection = [text for at, text in enumerate(texts) if at in selected]
    training = [text for at, text in enumerate(texts) if at not in selected]
    containing = {text for text, _ in contained(training, selection)}
    return GeneralText([text for text in training if text.id not in containing], selection)


def _examples(name: str, texts: Sequence[str]) -> list[Example]:
    return [
        Example(f"{name}:{number}", "", text, place="embedded general text")
        for number, text in enumerate(texts)
    ]
