"""How often a verdict is wrong: a light simulation that can fail, and the figures committed."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import ndtri
from support.scripts import script

from lora_domains.stats.intervals import tango
from lora_domains.verdict.ledger import level

simulation = script("simulation", "verdict")


@given(st.integers(0, 60), st.integers(0, 60), st.integers(120, 900), st.floats(0.9, 0.9999))
def test_vectorised_passes_agree_with_single_ones(
    won: int, lost: int, n: int, level: float
) -> None:
    lower = tango(won, lost, n, level).lower
    if abs(lower + simulation.MARGIN) > 1e-9:
        at_once = simulation.passes(np.array([won]), np.array([lost]), n, float(ndtri(level)))
        assert at_once[0] == (lower >= -simulation.MARGIN)


def test_a_truly_harmful_adapter_rarely_passes() -> None:
    assert simulation.share_passing(200, 0.08, -0.03, 500, seed=1) <= 0.065


@pytest.mark.parametrize("at", [0.95, level(0)], ids=["95 %", "first evaluation"])
def test_a_harmless_adapter_mostly_passes(at: float) -> None:
    assert simulation.share_passing(700, 0.08, 0.0, 500, at, seed=1) >= 0.80
    assert simulation.share_passing(700, 0.20, 0.0, 500, at, seed=1) >= 0.48  # 50 %, 1 sd below


@pytest.mark.parametrize("redrawn", [1.0, 0.5, 0.2, 0.05])
def test_a_climb_through_50_harmful_adapters_rarely_ends_in_a_pass(redrawn: float) -> None:
    assert simulation.climb(700, 0.2, redrawn, level, 3000, seed=3) <= 0.05 + 0.008  # + 2 sd
    # Without the rule: a 95 % gate lets almost every climb through, α/(k(k+1)) too many.
    assert simulation.climb(700, 0.2, redrawn, simulation.RULES["uncorrected"], 1000) > 0.85
    if redrawn == 0.2:
        assert simulation.climb(700, 0.2, redrawn, simulation.RULES["alpha/(k(k+1))"], 1000) > 0.2


def test_a_climb_on_f1_through_50_adapters_that_are_no_better_rarely_ends_in_a_pass() -> None:
    # Percentiles alone let 47 % of them pass.
    assert simulation.climb_f1(0.1, level, 60, seed=1) <= 0.05 + 0.06  # + 2 sd


@pytest.mark.parametrize("name", sorted(simulation.INTERVALS))
def test_intervals_cover(name: str) -> None:
    assert 0.91 <= simulation.covered(simulation.INTERVALS[name], 300) <= 0.99  # 2.5 sd of 93–97 %


def test_the_committed_figures_support_the_claims() -> None:
    figures = json.loads(simulation.RESULTS.read_text())
    assert max(figures["harmful_passes"].values()) <= 0.065
    for name, share in figures["harmless_passes"].items():
        if name.endswith(("95 %", "first evaluation")):
            assert share >= (0.8 if "8% flip" in name else 0.5), name
    assert figures["climb_at_worst"]["ours"] <= 0.05
    assert max(figures["f1_climb_of_50_passes"].values()) < 0.05
    assert figures["climb_at_worst"]["alpha/(k(k+1))"] > 0.05
    assert all(0.93 <= share <= 0.97 for share in figures["two_sided_95_covers"].values())
