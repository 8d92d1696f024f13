"""How often a verdict is wrong: a light simulation that can fail, and the figures committed."""

import json

import pytest
from support.scripts import script

simulation = script("simulation", "verdict")


def test_a_truly_harmful_adapter_rarely_passes() -> None:
    assert simulation.share_passing(200, 0.08, -0.03, 500, seed=1) <= 0.065


def test_a_harmless_adapter_mostly_passes() -> None:
    assert simulation.share_passing(700, 0.08, 0.0, 500, seed=1) >= 0.80
    assert simulation.share_passing(700, 0.20, 0.0, 500, seed=1) >= 0.48  # 50 %, 1 sd below


@pytest.mark.parametrize("name", sorted(simulation.INTERVALS))
def test_intervals_cover(name: str) -> None:
    assert 0.91 <= simulation.covered(simulation.INTERVALS[name], 300) <= 0.99  # 2.5 sd of 93–97 %


def test_the_committed_figures_support_the_claims() -> None:
    figures = json.loads(simulation.RESULTS.read_text())
    assert max(figures["harmful_passes"].values()) <= 0.065
    for name, share in figures["harmless_passes"].items():
        if name.endswith("95 %"):
            assert share >= (0.8 if "8% flip" in name else 0.5), name
    for patients, passes in figures["recall_at_the_floor_passes"].items():
        for case, share in passes.items():
            nominal = 0.04 if "0.96" in case else 0.01
            most = 1.5 if patients in ("40 of 5", "40 of 10") else 2.0  # as docs/verdict.md says
            assert share <= most * nominal, (patients, case)
    assert all(0.93 <= share <= 0.97 for share in figures["two_sided_95_covers"].values())
