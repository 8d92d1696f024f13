"""The base of an adapter with a head: a classifier on its features."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.heads import headed, headed_domain
from support.models import QUIET, model_in

from lora_domains.evaluation.baselines import BaselineInputs, frozen_features
from lora_domains.evaluation.scorer import Scorer
from lora_domains.tokenization.encoded import EncodedRow


def test_the_base_is_scored_by_a_classifier_on_its_features(
    tmp_path: Path, tiny_base: Path
) -> None:
    """It is fitted on training rows and does not depend on loaded adapters; scikit-learn agrees."""
    model = model_in(tmp_path, tiny_base)
    dataset = model.dataset(headed_domain("colours", 5))
    test = [row.encoded for row in dataset.test]

    def scores(**changes: Any) -> list[dict[str, float]]:
        scorer = Scorer(model.bank, QUIET)
        found = frozen_features(BaselineInputs(scorer, replace(dataset, **changes), dataset.test))
        assert found is not None
        return found

    alone = scores()
    model.bank.add(headed(model.base, "colours", 5))
    with model.bank.routed("colours"):
        assert scores() == alone
    right = [s["prediction"] == item.target for s, item in zip(alone, test, strict=True)]
    assert sum(right) / len(right) > 0.5  # five classes
    shuffled = [
        EncodedRow(replace(row.example, target=(row.example.target * 3 + i) % 5), row.encoded)
        for i, row in enumerate(dataset.train)
    ]
    lost = [s["prediction"] == i.target for s, i in zip(scores(train=shuffled), test, strict=True)]
    assert sum(lost) < sum(right)
    assert all(s["nll"] > 0 and 0 <= s["brier"] <= 2 for s in alone)


def test_features_of_the_base_are_computed_once_while_it_stays_as_it_is(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the probe of a head and by all evaluations; those of an adapter, each time."""
    model = model_in(tmp_path, tiny_base)
    rows = model.dataset(headed_domain("colours", 5)).train
    model.bank.add(headed(model.base, "colours", 5))
    scorer, passes = Scorer(model.bank, QUIET), list[int]()
    model.base.model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))

    def computed(rows: Sequence[EncodedRow], domain: str | None = None) -> bool:
        before = len(passes)
        with model.bank.routed(domain):
            found.append(scorer.features(rows, "first"))
        return len(passes) > before

    found: list[torch.Tensor] = []
    assert computed(rows)
    assert not computed(rows)
    assert torch.equal(*found)
    assert computed(rows, "colours")
    assert not torch.equal(found[0], found[-1])
    assert computed(rows, "colours")
    assert computed(rows[:-1])
    with torch.no_grad():
        model.base.model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    assert computed(rows)
    monkeypatch.setattr("lora_domains.probes.features.KEPT", found[0].nbytes)
    assert computed(rows[1:])
    assert computed(rows)  # the others made room
