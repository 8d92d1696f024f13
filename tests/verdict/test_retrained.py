"""Adapters that were trained again: false flags against a release, and losses that creep."""

import json

from support.scripts import script

retrained = script("retrained", "verdict")


def test_five_unchanged_adapters_are_rarely_called_worse() -> None:
    flagged = retrained.flagged(0.3, 60)
    assert flagged["holm"] <= 0.05 + 0.06  # + 2 sd
    assert flagged["each at 95 %"] > 0.15


def test_a_large_loss_of_one_of_five_is_found() -> None:
    assert retrained.flagged(0.3, 20, lost=0.3)["holm"] > 0.6


def test_the_committed_figures_of_retrained_adapters_support_the_claims() -> None:
    figures = json.loads(retrained.RESULTS.read_text())
    for redrawn, rules in figures["unchanged_flagged"].items():
        assert rules["holm"] <= 0.05, redrawn
    assert max(rules["each at 95 %"] for rules in figures["unchanged_flagged"].values()) > 0.3
    # Why sampled gates that turned to fail are listed and make no report worse.
    turned = figures["unchanged_gates_listed_as_failing"]
    assert max(turned.values()) == 0.14  # as docs/reports.md says
    assert turned["above floors and rival"] <= 0.05
    noticed = figures["creeping_loss_noticed"]
    assert noticed["pinned"] > noticed["last"]
