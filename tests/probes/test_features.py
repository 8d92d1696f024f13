"""Linear probes of an encoder's features: what they tell apart, and what an adapter destroys."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from support.encoders import make_encoder
from support.heads import headed
from support.judged import gate, judged
from support.models import QUIET, SUITE

from lora_domains.adapters.peft import new_adapter
from lora_domains.domain import Lora
from lora_domains.evaluation.contenders import general_knowledge, score_general
from lora_domains.evaluation.scorer import Scorer
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.probes.features import FOLDS, FeatureSet, feature_sets, probed


def test_the_sets_are_many_and_no_text_has_two_classes() -> None:
    assert sum(len(one.texts) for one in feature_sets()) >= 1000
    for one in feature_sets():
        assert len(set(one.texts)) == len(one.texts) == len(one.targets) == len(one.units)
        assert set(one.targets) == set(range(max(one.targets) + 1))
        assert min(Counter(one.targets).values()) >= 2
        assert all(text == text.strip() for text in one.texts)
        examples = one.examples()
        assert [example.target for example in examples] == list(one.targets)
    assert feature_sets.__wrapped__() == feature_sets()


def test_the_forms_of_a_word_share_a_fold_and_folds_are_alike() -> None:
    for one in feature_sets():
        of_unit = defaultdict(set)
        for unit, fold in zip(one.units, one.folds(), strict=True):
            of_unit[unit].add(fold)
        assert all(len(folds) == 1 for folds in of_unit.values())
        sizes = Counter(one.folds().tolist())
        assert len(sizes) == FOLDS
        assert max(sizes.values()) <= 1.4 * min(sizes.values())


def test_a_text_is_predicted_by_a_regression_that_was_not_fitted_on_it() -> None:
    """Random features fit their own classes perfectly, and say nothing of others."""
    one = feature_sets()[3]
    random = np.random.default_rng(0).normal(size=(len(one.texts), 200))
    right = np.mean(np.array(one.predicted(random)) == one.targets)
    assert 0.3 < right < 0.7
    told = np.stack([one.targets, np.ones(len(one.texts))], axis=1)
    assert one.predicted(told) == list(one.targets)
    assert isinstance(one, FeatureSet)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    folder = make_encoder(tmp_path_factory.mktemp("encoders") / "bare", saved="bare")
    bank = Bank(load_base(folder, device="cpu"))
    bank.add(new_adapter(bank.base, "fresh", Lora(), 4, 8, 0, 2))
    bank.add(headed(bank.base, "headed"))
    return bank


def test_an_encoder_without_a_masked_token_head_is_probed(bank: Bank) -> None:
    assert general_knowledge(bank.base) == "features"
    scored = score_general(Scorer(bank, QUIET), SUITE, 64, ["fresh", "headed"], b"key")
    items = scored["fresh"].items
    assert len(items) == sum(len(one.texts) for one in feature_sets())
    assert [item["target"] for item in items] == [t for one in feature_sets() for t in one.targets]
    assert {item["set"] for item in items} == {"general"}
    for item in items:
        assert item["scores"]["adapter"] == item["scores"]["base"]
    same = gate(judged(items, knowledge="features"), "retention")
    assert (same["verdict"], same["observed"]) == ("pass", 0.0)
    moved = [item["scores"] for item in scored["headed"].items]
    assert sum(scores["adapter"] != scores["base"] for scores in moved) > 100


def test_features_that_an_adapter_destroyed_fail_retention() -> None:
    generator = torch.Generator().manual_seed(0)
    sets = feature_sets()
    told = [np.eye(40)[list(one.targets)] for one in sets]
    noise = [torch.randn(len(one.texts), 40, generator=generator).numpy() for one in sets]
    items = [
        {"set": "general", "id": f"{one.name}:{n}", "target": target,
         "suite": f"features/{one.name}",
         "scores": {"base": {"prediction": base}, "adapter": {"prediction": adapter}}}
        for one, before, after in zip(sets, probed(told), probed(noise), strict=True)
        for n, (target, base, adapter) in enumerate(zip(one.targets, before, after, strict=True))
    ]  # fmt: skip
    made = judged(items, knowledge="features")
    assert gate(made, "retention")["verdict"] == "fail"
    assert made["general"]["features/number"]["adapter"] < 0.8
    assert gate(made, "drift")["verdict"] == "not applicable"
