"""Metrics against scikit-learn; one that is registered from outside is reported everywhere."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as oracle
from support.folders import folder
from support.items import Item, row

from lora_domains.errors import UsageError
from lora_domains.report.card import read_items
from lora_domains.report.report import Evaluation, combine, rebuild, save_report
from lora_domains.stats.bootstrap import FloatArray
from lora_domains.stats.comparisons import compare_accuracy, compare_f1
from lora_domains.stats.intervals import wilson
from lora_domains.verdict import INFO
from lora_domains.verdict.metrics import METRICS, ClassMetric, metric_named, register, reported
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import confusion, per_class, per_label


def drawn(classes: int, count: int = 300, seed: int = 0) -> list[Item]:
    """Items on which the base is right in three of ten cases and the adapter in eight."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, classes, count)
    predicted = {
        name: np.where(random.random(count) < right, truth, random.integers(0, classes, count))
        for name, right in (("base", 0.3), ("adapter", 0.8))
    }
    return [
        row(int(target), number=n, **{name: int(each[n]) for name, each in predicted.items()})
        for n, target in enumerate(truth)
    ]


def arrays(items: Sequence[Item], contender: str) -> tuple[list[int], list[int]]:
    """Targets and predictions."""
    return (
        [item["target"] for item in items],
        [item["scores"][contender]["prediction"] for item in items],
    )


# ── Against scikit-learn ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("contender", ["base", "adapter"])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_two_classes_equal_scikit_learn(contender: str, seed: int) -> None:
    items = drawn(2, seed=seed)
    truth, predicted = arrays(items, contender)
    expected = {
        "accuracy": oracle.accuracy_score(truth, predicted),
        "precision": oracle.precision_score(truth, predicted, pos_label=1),
        "recall": oracle.recall_score(truth, predicted, pos_label=1),
        "f1": oracle.f1_score(truth, predicted, pos_label=1),
        "macro_f1": oracle.f1_score(truth, predicted, average="macro"),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, predicted),
        "mcc": oracle.matthews_corrcoef(truth, predicted),
    }
    table = ScoreTable(items)
    for name, value in expected.items():
        assert METRICS[name].value(table, contender, 1) == pytest.approx(value), name


def test_metrics_of_many_classes_equal_scikit_learn() -> None:
    labels = ["a", "b", "c", "d", "e"]
    items = [i for i in drawn(5, seed=4) if i["target"] != 4]  # a class without a test row
    table = ScoreTable(items)
    truth, predicted = arrays(items, "adapter")
    # Macro means run over the classes with a test row.
    macro = {"labels": np.unique(truth), "average": "macro", "zero_division": 0.0}
    expected = {
        "accuracy": oracle.accuracy_score(truth, predicted),
        "macro_precision": oracle.precision_score(truth, predicted, **macro),
        "balanced_accuracy": oracle.recall_score(truth, predicted, **macro),
        "mcc": oracle.matthews_corrcoef(truth, predicted),
        "macro_f1": oracle.f1_score(truth, predicted, **macro),
    }
    for name, value in expected.items():
        assert METRICS[name].value(table, "adapter") == pytest.approx(value), name
    columns = oracle.precision_recall_fscore_support(
        truth, predicted, labels=range(5), zero_division=0.0
    )
    hits = np.diag(oracle.confusion_matrix(truth, predicted, labels=range(5)))
    for at, (label, fields) in enumerate(per_class(table, labels).items()):
        assert label == labels[at]
        precision, recall, f1, support = (column[at] for column in columns)
        lower = wilson(int(hits[at]), int(support)).lower
        assert fields == pytest.approx(
            {"precision": precision, "recall": recall, "f1": f1, "support": support,
             "recall_lower": lower}
        )  # fmt: skip
    tables = confusion(table, labels)
    assert tables["adapter"] == oracle.confusion_matrix(truth, predicted, labels=range(5)).tolist()
    assert tables["base"] != tables["adapter"]


def test_comparisons_are_those_of_the_statistics() -> None:
    items = drawn(2)
    table = ScoreTable(items)
    truth, base, adapter = (
        np.array(part) for part in (*arrays(items, "base"), arrays(items, "adapter")[1])
    )
    expected = {
        "accuracy": compare_accuracy(base == truth, adapter == truth),
        "f1": compare_f1(truth, base, adapter, 1),
        "macro_f1": compare_f1(truth, base, adapter),
        "recall": compare_accuracy(base[truth == 1] == 1, adapter[truth == 1] == 1),
    }
    for name, comparison in expected.items():
        assert METRICS[name].compare(table, positive=1) == comparison, name


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("balanced_accuracy", oracle.balanced_accuracy_score),
        pytest.param("mcc", oracle.matthews_corrcoef, marks=pytest.mark.long),
    ],
)
def test_bounds_of_a_difference_are_those_of_paired_resamples(
    name: str, figure: Callable[..., float]
) -> None:
    """scikit-learn on resampled rows, both contenders on the same ones, has the same percentiles.

    The bounds are the widest of three, so they are never inside those percentiles.
    """
    items = drawn(3, count=400, seed=1)
    truth, base, adapter = map(np.array, (*arrays(items, "base"), arrays(items, "adapter")[1]))
    compared = METRICS[name].compare(ScoreTable(items))
    assert compared is not None
    random = np.random.default_rng(9)
    changes = []
    for _ in range(500):
        at = random.integers(0, len(truth), len(truth))
        changes.append(figure(truth[at], adapter[at]) - figure(truth[at], base[at]))
    lower, upper = np.quantile(changes, [0.05, 0.95])
    assert compared.difference == pytest.approx(figure(truth, adapter) - figure(truth, base))
    assert compared.lower == pytest.approx(lower, abs=0.01)
    assert compared.upper == pytest.approx(upper, abs=0.01)
    assert upper - lower > 0.05


def test_a_prediction_of_no_class_is_one_more_class_for_mcc() -> None:
    items = [row(n % 2, number=n, base=0, adapter=(n % 2, -1)[n % 5 == 0]) for n in range(40)]
    assert METRICS["mcc"].value(ScoreTable(items), "adapter") == pytest.approx(
        oracle.matthews_corrcoef(*arrays(items, "adapter"))
    )
    assert METRICS["mcc"].value(ScoreTable(items), "base") == 0.0


@pytest.mark.parametrize(
    "name", ["accuracy", "macro_f1", "f1", "balanced_accuracy", "mcc", "loss", "nats_per_token"]
)
def test_bounds_contain_the_value_and_widen_in_groups(name: str) -> None:
    items = drawn(2)
    for n, item in enumerate(items):
        item["scores"]["adapter"]["nats"] = 1.0 + n // 30 % 3
    grouped = [item | {"group": n // 30} for n, item in enumerate(items)]
    metric = METRICS[name]
    value = metric.value(ScoreTable(items), "adapter", 1)
    assert value is not None
    for table in (ScoreTable(items), ScoreTable(grouped)):
        lower, upper = metric.bounds(table, "adapter", 1)
        assert lower <= value <= upper
    contributions = metric.contributions(ScoreTable(items), "adapter", 1)
    assert contributions is not None
    assert contributions.mean() == pytest.approx(value)


# ── The registry ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("positive", [0, 1])
@pytest.mark.parametrize("target", [0, 1])
def test_bounds_on_rows_of_one_class_have_a_width(target: int, positive: int) -> None:
    for base, adapter in ((0, 0), (0, 1), (1, 1)):
        items = [row(target, number=n, base=base, adapter=adapter) for n in range(81)]
        for metric in reported(["a", "b"], positive):
            comparison = metric.compare(ScoreTable(items), positive=positive, level=0.99)
            if comparison is not None:
                assert comparison.lower < comparison.upper - 0.01, metric.name
                bounds = metric.bounds(ScoreTable(items), "adapter", positive, 0.99)
                assert metric.nats or bounds.lower < bounds.upper - 0.01, metric.name


def test_a_metric_that_is_described_is_computed() -> None:
    assert list(INFO) == list(METRICS)


def test_which_metrics_a_task_has() -> None:
    def names(labels: Sequence[str], positive: int | None) -> set[str]:
        return {metric.name for metric in reported(labels, positive)}

    rates = {"precision", "recall", "f1"}
    of_classes = {"macro_f1", "macro_precision", "balanced_accuracy", "mcc"}
    assert names(["a", "b"], 1) == METRICS.keys() - {"macro_precision"}
    assert names(["a", "b"], None) == METRICS.keys() - rates
    assert names([], None) == METRICS.keys() - rates - of_classes
    # Of these only metrics whose scores exist have a value.
    text = [{"target": -1, "scores": {"base": {"nats": 3.0, "tokens": 2}}}]
    valued = {n for n in names([], None) if METRICS[n].value(ScoreTable(text), "base") is not None}
    assert valued == {"nats_per_token"}


def test_unknown_and_taken_names() -> None:
    with pytest.raises(UsageError, match="macro_f1"):
        metric_named("macro_f2")
    with pytest.raises(ValueError, match="already"):
        register(METRICS["f1"])


def kappa(sums: FloatArray) -> FloatArray:
    """Cohen's kappa from sums of class counts (Cohen 1960, EPM 20:37)."""
    correct, true, predicted = np.split(sums, 3, axis=-1)
    n = true.sum(-1)
    chance = (true * predicted).sum(-1) / n**2
    agreement: FloatArray = (correct.sum(-1) / n - chance) / (1 - chance)
    return agreement


@pytest.fixture
def _kappa() -> Iterator[None]:
    register(ClassMetric("kappa", "Cohen's kappa", lambda _: kappa, limits=(-1.0, 1.0)))
    yield
    assert INFO["kappa"].label == METRICS["kappa"].label
    del METRICS["kappa"], INFO["kappa"]


@pytest.mark.usefixtures("_kappa")
def test_a_registered_metric_is_reported_with_bounds(tmp_path: Path) -> None:
    made = folder(tmp_path)
    card = rebuild(made)
    fields = card.adapter.domain_scores["kappa"]
    items = [item for item in read_items(made) if item["set"] == "test"]
    assert fields["adapter"] == pytest.approx(oracle.cohen_kappa_score(*arrays(items, "adapter")))
    assert fields["lower"] < fields["difference"] < fields["upper"]
    assert "Cohen's kappa" in str(Evaluation(card))
    save_report(combine([made]), tmp_path / "out")
    for view in ("report.html", "report.md", "report.json"):
        assert "kappa" in (tmp_path / "out" / view).read_text(), view


# ── Rows with several labels ────────────────────────────────────────────────────────────────────


def labelled(truth: Sequence[int], number: int = 0, **predicted: Sequence[int]) -> Item:
    """One item of a row with several labels; ``predicted`` by each contender."""
    scores = {
        name: {"predicted": [*each], "probabilities": [0.9 if one else 0.2 for one in each]}
        for name, each in predicted.items()
    }
    return {"set": "test", "id": f"test:{number}", "target": -1, "truth": [*truth],
            "scores": scores}  # fmt: skip


def rows_with_labels(seed: int, count: int = 80, labels: int = 4) -> list[Item]:
    random = np.random.default_rng(seed)
    truth = random.random((count, labels)) < [0.6, 0.3, 0.1, 0.05]
    predicted = {
        name: truth ^ (random.random(truth.shape) < wrong)
        for name, wrong in (("base", 0.3), ("adapter", 0.1))
    }
    return [labelled(row.astype(int), n, **{k: v[n].astype(int) for k, v in predicted.items()})
            for n, row in enumerate(truth)]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_several_labels_equal_scikit_learn(seed: int) -> None:
    items = rows_with_labels(seed)
    truth = np.array([item["truth"] for item in items])
    predicted = np.array([item["scores"]["adapter"]["predicted"] for item in items])
    present = np.flatnonzero(truth.any(0))
    expected = {
        "micro_f1": oracle.f1_score(truth, predicted, average="micro"),
        "label_macro_f1": oracle.f1_score(truth, predicted, average="macro", labels=present),
        "micro_precision": oracle.precision_score(truth, predicted, average="micro"),
        "micro_recall": oracle.recall_score(truth, predicted, average="micro"),
        # scikit-learn's per-row F1 of a row without labels that are predicted is an option.
        "row_f1": oracle.f1_score(truth, predicted, average="samples", zero_division=1),
        "subset_accuracy": oracle.accuracy_score(truth, predicted),
    }
    table = ScoreTable(items)
    for name, value in expected.items():
        assert METRICS[name].value(table, "adapter") == pytest.approx(value)
        lower, upper = METRICS[name].bounds(table, "adapter")
        assert lower < value < upper
        compared = METRICS[name].compare(table)
        assert compared is not None
        assert compared.lower < compared.difference < compared.upper
        assert compared.lower > 0
        assert METRICS[name].value(ScoreTable([*items, row(1, adapter=1)]), "adapter") is None
    found = per_label(table, ["a", "b", "c", "d"], {"b": 0.4})
    recall = oracle.recall_score(truth, predicted, average=None, zero_division=0)
    assert [one["recall"] for one in found.values()] == pytest.approx(recall)
    assert [one["support"] for one in found.values()] == truth.sum(0).tolist()
    assert [one.get("threshold") for one in found.values()] == [None, 0.4, None, None]


def test_perfect_and_empty_rows_have_bounds_of_some_width() -> None:
    """Resamples of rows that are all right do not vary."""
    right = ScoreTable(labelled([1, 0], n, base=[0, 1], adapter=[1, 0]) for n in range(40))
    none = ScoreTable(labelled([0, 0], n, base=[0, 0], adapter=[0, 0]) for n in range(40))
    for name in ("micro_f1", "label_macro_f1", "row_f1", "subset_accuracy"):
        for table, value in ((right, 1.0), (none, float(name in ("row_f1", "subset_accuracy")))):
            assert METRICS[name].value(table, "adapter") == value
            lower, upper = METRICS[name].bounds(table, "adapter")
            assert upper - lower > 0.03
            compared = METRICS[name].compare(table)
            assert compared is not None
            assert compared.upper - compared.lower > 0.03


def test_bounds_of_several_labels_cover_the_truth() -> None:
    """95 % one-sided bounds of micro F1, for rows drawn again."""
    random = np.random.default_rng(1)
    chance, misses, runs = [0.5, 0.2, 0.05], 0, 200
    wrong = 0.15
    big = random.random((200_000, 3)) < chance
    flipped = big ^ (random.random(big.shape) < wrong)
    truth = oracle.f1_score(big, flipped, average="micro")
    for _ in range(runs):
        rows = random.random((60, 3)) < chance
        predicted = rows ^ (random.random(rows.shape) < wrong)
        pairs = zip(rows.astype(int), predicted.astype(int), strict=True)
        table = ScoreTable(labelled(r, n, adapter=p) for n, (r, p) in enumerate(pairs))
        misses += METRICS["micro_f1"].bounds(table, "adapter").lower > truth
    assert misses <= 0.05 * runs + 2 * (0.05 * 0.95 * runs) ** 0.5
