"""The metrics against scikit-learn and by hand; offline, in memory, without a warning."""

import json
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

from lora_domains.evaluation.metrics import (
    Calibration,
    Classification,
    LabelLoss,
    expected_calibration_error,
    label_losses,
)
from lora_domains.stats.intervals import wilson


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder evaluate would write to, were it allowed to."""
    cache = tmp_path / "cache"
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", cache)
    return cache


def test_classification_by_hand() -> None:
    metric = Classification(["routine", "urgent"], positive="urgent")
    truth = [1] * 100 + [0] * 100
    predicted = [1] * 85 + [0] * 15 + [1] * 10 + [0] * 90
    found = metric.compute(predictions=predicted, references=truth)
    assert found["n"] == 200
    assert found["accuracy"] == 0.875
    assert found["precision"] == pytest.approx(85 / 95)
    assert found["recall"] == 0.85
    assert found["f1"] == pytest.approx(2 * 85 / (100 + 95))
    assert found["confusion"] == {"labels": ["routine", "urgent"], "matrix": [[90, 10], [15, 85]]}
    urgent = found["per_class"]["urgent"]
    assert urgent["support"] == 100
    assert urgent["recall_lower"] == wilson(85, 100).lower
    json.dumps(found, allow_nan=False)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_classification_is_scikit_learns(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    truth = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    predicted = data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n))
    found = Classification(list("abcd")).compute(predictions=predicted, references=truth)
    kept = {"labels": np.unique(truth), "average": "macro", "zero_division": 0.0}
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(truth, predicted, **kept))
    assert found["macro_recall"] == pytest.approx(recall_score(truth, predicted, **kept))
    assert np.sum(found["confusion"]["matrix"]) == n
    assert "f1" not in found


def test_batches_add_up_and_metrics_do_not_mix() -> None:
    one, other = Classification(["a", "b"]), Classification(["a", "b"])
    one.add_batch(predictions=[0, 1], references=np.array([0, 0]))
    other.add_batch(predictions=[1], references=[1])
    one.add_batch(predictions=[1, 1], references=[1, 1])
    assert one.compute()["confusion"]["matrix"] == [[1, 1], [0, 2]]
    assert other.compute()["n"] == 1
    assert one.compute(predictions=[0], references=[0])["n"] == 1
    assert one.experiment_id != other.experiment_id


def test_an_answer_without_a_class_is_wrong_and_counted() -> None:
    found = Classification(["a", "b"]).compute(predictions=[-1, 0, 1], references=[0, 0, 1])
    assert found["unanswered"] == 1
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["per_class"]["a"]["recall"] == 0.5


def test_a_class_never_predicted_or_never_there_gives_zeros_without_a_warning() -> None:
    found = Classification(["a", "b", "c"], positive="b").compute(
        predictions=[0, 0, 0], references=[0, 0, 1]
    )
    assert (found["precision"], found["recall"], found["f1"]) == (0.0, 0.0, 0.0)
    assert found["per_class"]["c"]["support"] == 0
    assert found["macro_recall"] == 0.5


def test_classification_refuses_numbers_without_a_label() -> None:
    with pytest.raises(ValueError, match="found 'x'"):
        Classification(["a", "b"], positive="x")
    for predicted, truth in (([2], [0]), ([0], [-1]), ([-2], [0])):
        with pytest.raises(ValueError, match="class numbers 0 to 1"):
            Classification(["a", "b"]).compute(predictions=predicted, references=truth)
    with pytest.raises(ValueError, match="found none"):
        Classification(["a", "b"]).compute(predictions=[], references=[])


def test_label_loss_renormalises() -> None:
    log_probabilities = np.log([[0.2, 0.1], [0.05, 0.15]])
    losses = label_losses(log_probabilities, [0, 0])
    assert losses == pytest.approx([-np.log(2 / 3), -np.log(1 / 4)])
    found = LabelLoss().compute(predictions=log_probabilities, references=[0, 0])
    assert found == {"label_loss": pytest.approx(losses.mean()), "n": 2}


def test_label_loss_is_log_loss() -> None:
    rng = np.random.default_rng(0)
    shares, truth = rng.dirichlet(np.ones(4), 50), rng.integers(0, 4, 50)
    shifted = np.log(shares) - rng.random((50, 1)) * 9
    assert label_losses(shifted, truth).mean() == pytest.approx(
        log_loss(truth, shares, labels=range(4))
    )


def test_an_impossible_label_costs_36_nats_not_infinity() -> None:
    losses = label_losses([[-np.inf, 0.0], [-2000.0, -1000.0]], [0, 0])
    assert losses == pytest.approx([36.04, 36.04], abs=0.01)


def test_losses_refuse_what_has_no_value() -> None:
    for broken in ([[np.nan, 0.0]], [[-np.inf, -np.inf]], [[np.inf, 0.0]]):
        with pytest.raises(ValueError, match="item 0 is"):
            label_losses(broken, [0])
    with pytest.raises(ValueError, match="label numbers 0 to 1; found 2"):
        label_losses([[0.0, 0.0]], [2])
    with pytest.raises(ValueError, match=r"found shapes \(1, 2\) and \(2,\)"):
        label_losses([[0.0, 0.0]], [0, 1])


def test_calibration_by_hand() -> None:
    # Ten answers at .8, eight right; five at .6, one right: gaps 0 and .4, a third of the items.
    log_probabilities = np.log([[0.8, 0.2]] * 10 + [[0.6, 0.4]] * 5)
    truth = [0] * 8 + [1] * 2 + [0] + [1] * 4
    found = Calibration().compute(predictions=log_probabilities, references=truth)
    assert found["ece"] == pytest.approx(0.4 / 3)
    brier = (8 * 2 * 0.04 + 2 * 2 * 0.64 + 2 * 0.16 + 4 * 2 * 0.36) / 15
    assert found["brier"] == pytest.approx(brier)
    json.dumps(found, allow_nan=False)


def test_calibration_of_one_class_only() -> None:
    found = Calibration().compute(predictions=np.log([[0.5, 0.3, 0.2]]), references=[0])
    assert found["ece"] == pytest.approx(0.5)
    assert found["brier"] == pytest.approx(0.25 + 0.09 + 0.04)


def test_calibration_bins_are_of_equal_width_with_edges_below() -> None:
    # .19 and .20 share the bin (.1, .2]; .21 has its own: gaps .195 - 1/2 and .21 - 0.
    found = expected_calibration_error([0.19, 0.20, 0.21], [0, 1, 0], bins=10)
    assert found == pytest.approx((2 * abs(0.195 - 0.5) + 0.21) / 3)
    assert expected_calibration_error([0.0, 1.0], [0, 1]) == 0.0
    with pytest.raises(ValueError, match="at least one item"):
        expected_calibration_error([], [])


def test_nothing_is_written(no_cache: Path) -> None:
    Classification(["a", "b"]).compute(predictions=[0], references=[1])
    LabelLoss().compute(predictions=[[0.0, 0.0]], references=[1])
    Calibration().compute(predictions=[[0.0, 0.0]], references=[1])
    assert not no_cache.exists()


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(3)
    expected = np.random.RandomState(3).random()
    Classification(["a", "b"]).compute(predictions=[0], references=[1])
    assert np.random.random() == expected
