"""Seed variance apart from item variance."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import f1_score

from lora_domains.stats.classes import class_counts, macro
from lora_domains.stats.comparisons import ratio
from lora_domains.stats.seeds import influence, seed_variance


def test_planted_variances_are_found_apart() -> None:
    rng = np.random.default_rng(0)
    figures = [
        seed_variance(0.1 + rng.normal(0, 0.05, (8, 1)) + rng.normal(0, 0.4, (1, 300))
              + rng.normal(0, 0.2, (8, 300)))
        for _ in range(60)
    ]  # fmt: skip
    assert np.mean([f["sd_seed"] ** 2 for f in figures]) ** 0.5 == pytest.approx(0.05, rel=0.15)
    assert np.mean([f["se_items"] for f in figures]) == pytest.approx(0.4 / 300**0.5, rel=0.05)
    assert np.mean([f["se_residual"] for f in figures]) == pytest.approx(0.2 / 2400**0.5, rel=0.05)
    # Where seeds make no difference, almost no variance is attributed to them.
    alike = seed_variance(0.1 + rng.normal(0, 0.4, (1, 300)) + rng.normal(0, 0.2, (8, 300)))
    assert alike["sd_seed"] < 0.02


def test_more_items_do_not_make_up_for_few_seeds() -> None:
    rng = np.random.default_rng(1)
    offsets = np.array([[-0.05], [0.0], [0.05]])
    widths = []
    for n in (200, 20_000):
        figures = seed_variance(
            0.1 + offsets + rng.normal(0, 0.4, (1, n)) + rng.normal(0, 0.1, (3, n))
        )
        widths.append(figures["upper"] - figures["lower"])
        assert figures["each"] == pytest.approx([figures["difference"] + o for o in offsets[:, 0]],
                                              abs=0.02)  # fmt: skip
    # Three seeds alone: t with 2 degrees of freedom, .05/sqrt 3 on each side.
    assert widths[1] == pytest.approx(2 * stats.t.ppf(0.95, 2) * 0.05 / 3**0.5, rel=0.1)
    assert widths[0] < 2 * widths[1]


def test_identical_runs_have_the_items_alone() -> None:
    values = np.random.default_rng(2).normal(0.1, 0.4, 500)
    figures = seed_variance(np.stack([values] * 3))
    half = stats.t.ppf(0.95, 499) * values.std(ddof=1) / 500**0.5
    assert figures["sd_seed"] == 0
    assert figures["upper"] - figures["difference"] == pytest.approx(half, rel=1e-3)


def test_one_run_says_nothing_of_seeds() -> None:
    with pytest.raises(ValueError, match="at least two runs"):
        seed_variance(np.zeros((1, 20)))


def test_influence_adds_up_to_the_figure_and_to_its_spread() -> None:
    rng = np.random.default_rng(3)
    truth, said = rng.integers(0, 2, 400), rng.integers(0, 2, 400)
    parts = influence(macro("f1", [1]), class_counts(truth, said, 2))
    assert parts.mean() == pytest.approx(f1_score(truth, said))
    # Leaving one item out moves F1 by its part: the jackknife says the same.
    left = [f1_score(np.delete(truth, i), np.delete(said, i)) for i in range(0, 400, 40)]
    assert f1_score(truth, said) + 399 * (f1_score(truth, said) - np.array(left)) == pytest.approx(
        parts[::40], abs=0.01
    )
    columns = np.stack([rng.random(50), rng.integers(1, 9, 50)], axis=1)
    assert influence(ratio, columns).mean() == pytest.approx(float(ratio(columns.sum(0))))


def test_seeds_that_change_nothing_have_bounds_of_a_width() -> None:
    for change in (0.0, 1.0):
        figures = seed_variance(np.full((3, 50), change))
        assert figures["upper"] - figures["lower"] > 0.05
