"""The linear probe from whose weights the head on a sentence encoder starts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.encoders import make_encoder, make_sentence_encoder
from support.heads import headed_domain
from support.models import make_run, model_in

from lora_domains.domain import with_settings
from lora_domains.evaluation.linear import STRENGTHS
from lora_domains.inference.likelihoods import head_scores, text_features
from lora_domains.modeling.heads import SENTENCE, head_logits, new_head, own_layout
from lora_domains.probes.features import HEAD_STRENGTH, logistic_regression, probe, probe_head
from lora_domains.training import loop
from lora_domains.training.plan import PROBED, derived_rate, make_plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentence_encoder(tmp_path_factory.mktemp("encoders") / "sentence")


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_is_logistic_regression_on_frozen_features(
    tmp_path: Path, folder: Path, classes: int
) -> None:
    model = model_in(tmp_path, folder)
    dataset = model.dataset(headed_domain(classes=classes))
    rows = [row.encoded for row in dataset.train]
    # One class more than there are rows of.
    head = new_head(model.base, SENTENCE, classes + 1)
    task = dataset.domain.task
    probe = probe_head(head, model.bank, rows, model.display, task)
    with model.bank.routed(None):
        features = text_features(model.base.model, rows, model.base.pad, pooling="mean")
    oracle = logistic_regression(HEAD_STRENGTH).fit(features.numpy(), [row.target for row in rows])
    shares = head_logits(replace(probe, layout=SENTENCE), features)[:, :classes].softmax(-1)
    np.testing.assert_allclose(shares, oracle.predict_proba(features.numpy()), atol=1e-4)
    weight, bias = (probe.weights[f"classifier.{name}"] for name in ("weight", "bias"))
    assert (weight[classes].tolist(), float(bias[classes])) == ([0.0] * 32, float(bias.min()))
    of_one_class = [replace(row, target=1) for row in rows]
    assert probe_head(head, model.bank, of_one_class, model.display, task) is head


def test_training_starts_from_the_probe(tmp_path: Path, folder: Path) -> None:
    domain = headed_domain(classes=4)
    run = make_run(tmp_path, folder, domain)
    assert run.head is not None
    started = {name: tensor.clone() for name, tensor in run.head.weights.items()}
    assert run.adapter.head is not None
    probe = probe_head(run.adapter.head, run.bank, run.train, run.display, domain.task)
    for name, tensor in probe.weights.items():
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=0)
    base, rows = run.bank.base, run.validation.rows
    with run.bank.routed(None):
        frozen = head_scores(base.model, probe, rows, base.pad)
    with run.bank.routed(run.adapter_name):  # an adapter whose B is zero
        begun = head_scores(base.model, run.head, rows, base.pad)
    np.testing.assert_allclose(np.stack(begun), np.stack(frozen), atol=1e-5)
    run.bank.remove(run.adapter_name)


def test_other_heads_start_from_random_weights(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("a probe was fitted")

    monkeypatch.setattr(loop, "probe_head", refused)
    plain = make_encoder(tmp_path / "plain", "bert")
    make_run(tmp_path / "out", plain, headed_domain())
    with pytest.raises(AssertionError, match="a probe was fitted"):
        make_run(tmp_path / "out", folder, headed_domain())


def test_the_plan_lowers_the_rate_of_a_head_that_starts_as_a_probe(
    tmp_path: Path, folder: Path
) -> None:
    plain = make_encoder(tmp_path / "plain", "bert")
    rates, reasons = [], []
    for path in (plain, folder):
        model = model_in(tmp_path / "out", path)
        plan = make_plan(model.base, model.dataset(with_settings(headed_domain(), lr=None)))
        rates.append(plan.lr)
        reasons.append("\n".join(plan.reasons))
        assert derived_rate(model.base)[0] == rates[0]
        assert (own_layout(model.base) == SENTENCE) == (path == folder)
    assert rates[1] == pytest.approx(PROBED * rates[0], rel=0.05)
    assert "logistic regression" in reasons[1]
    assert "logistic regression" not in reasons[0]
    given = make_plan(model.base, model.dataset(headed_domain(lr=0.01)))
    assert given.lr == 0.01


def test_the_probe_that_a_head_starts_as_competes_with_the_adapter() -> None:
    """Among the baselines, so that a gain over it is due to the adapter."""
    strengths = [probe(strength).steps[-1][1].C for strength in STRENGTHS]
    assert min(strengths) == pytest.approx(HEAD_STRENGTH)
    assert strengths == sorted(strengths)
