"""Less general text and fewer questions than there are, so that a tiny base reads them in no time.

Random bases read it too, in place of what they would write; see ``own_texts``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from lora_domains.modeling.base import Base
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.own_text import writes_own_text
from lora_domains.probes.suite import Suite, default_suite

DEFAULT = "lora_domains.probes.suite.default_suite"

TRAINING = [f"a {word} cloud is green" for word in ("alpha", "beta", "gamma")] * 4
FEW: Mapping[str, int] = {"train": 40, "validation": 10}
"""How many embedded texts of a split the tests train with, unless they ask for ``all_texts``."""
QUESTIONS = 60
"""How many questions of the default suite are asked, and texts of it read, unless likewise."""
CHARACTERS = 60
"""How much of each: nearly as many tokens of a random base, which knows few words."""


def use_general_text(
    patch: pytest.MonkeyPatch, training: Sequence[str] = TRAINING, selection: Sequence[str] = ()
) -> None:
    """Let training read these texts as the embedded general text; those of evaluations stay."""
    splits = {"train": tuple(training), "validation": tuple(selection)}
    patch.setattr(
        "lora_domains.probes.general_text.embedded_texts",
        lambda split: splits[split] if split in splits else embedded_texts(split),
    )


def use_own_texts(patch: pytest.MonkeyPatch, cache: Path) -> None:
    """Let causal bases write a few short texts, and keep them in ``cache``."""
    patch.setenv("LORA_DOMAINS_CACHE", str(cache))
    patch.setenv("LORA_DOMAINS_CACHE_GB", "1")
    patch.setattr("lora_domains.probes.own_text.writes_own_text", writes_own_text)
    counts = {"training": 24, "selection": 10, "test": 8}
    for name, value in {"COUNTS": counts, "LENGTH": 12, "TURN": 6, "TOP": 20}.items():
        patch.setattr(f"lora_domains.probes.own_text.{name}", value)


def use_few_texts(patch: pytest.MonkeyPatch) -> None:
    """Let training read the first ``FEW`` of the embedded general texts, and evaluation ask
    ``QUESTIONS`` of the default suite."""
    train, validation = (
        [text[:CHARACTERS] for text in embedded_texts(split)[:count]]
        for split, count in FEW.items()
    )
    use_general_text(patch, train, validation)
    patch.setattr("lora_domains.probes.own_text.writes_own_text", lambda _: False)

    def few_questions(base: Base, before: str | None = None) -> Suite:
        suite = default_suite(base, before)
        limit = min(QUESTIONS, suite.limit or QUESTIONS)
        return replace(suite, limit=limit, text=lambda: suite.text()[:QUESTIONS])

    patch.setattr(DEFAULT, few_questions)


def use_all_texts(patch: pytest.MonkeyPatch) -> None:
    """Let training read the embedded general text, and evaluation ask the default suite, as
    they are shipped."""
    patch.setattr("lora_domains.probes.general_text.embedded_texts", embedded_texts)
    patch.setattr(DEFAULT, default_suite)
