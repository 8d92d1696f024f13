"""A small general text in place of the embedded one, so that a tiny base reads it in no time."""

from collections.abc import Sequence

import pytest

TRAINING = [f"a {word} cloud is green" for word in ("alpha", "beta", "gamma")] * 4


def use_general_text(
    patch: pytest.MonkeyPatch, training: Sequence[str] = TRAINING, selection: Sequence[str] = ()
) -> None:
    """Let training read these texts as the embedded general text."""
    splits = {"train": tuple(training), "validation": tuple(selection)}
    patch.setattr("lora_domains.probes.general_text.embedded_texts", lambda split: splits[split])
