"""Planted canaries and their exposure."""

import math

import numpy as np
import pytest
from support.scripts import script

memory = script("canaries", "evaluation")


def test_canaries_differ_and_are_reproducible() -> None:
    made = memory.canaries(200, seed=3)
    assert len(set(made)) == 200
    assert made == memory.canaries(200, seed=3) != memory.canaries(200, seed=4)
    assert all(len(secret) == 7 and secret[3] == " " for secret in made)
    with pytest.raises(ValueError, match="1 to 10"):
        memory.canaries(11, digits=1)


def test_exposure_is_carlinis() -> None:
    others = [float(n) for n in range(1, 256)]
    assert memory.exposure(0.5, others) == 8.0  # the easiest of 256
    assert memory.exposure(999.0, others) == 0.0  # the hardest
    assert memory.exposure(127.5, others) == pytest.approx(1.0)  # in the middle
    # A tie counts against it.
    assert memory.exposure(1.0, others) == pytest.approx(8 - math.log2(2))
    rng = np.random.default_rng(0)
    by_chance = [memory.exposure(*_one_of(rng.random(256))) for _ in range(4000)]
    assert np.mean(by_chance) == pytest.approx(1 / math.log(2), abs=0.08)


def _one_of(nats: np.ndarray) -> tuple[float, list[float]]:
    return float(nats[0]), nats[1:].tolist()
