"""Planted canaries and their exposure."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import make_rows
from support.models import model_in
from support.scripts import script

from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.inference.likelihoods import answer_nats
from lora_domains.tasks import Example, LanguageModelling
from lora_domains.tokenization.tokenization import Tokenization

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


@pytest.mark.slow
def test_a_planted_canary_is_exposed_and_another_is_not(tiny_base: Path, tmp_path: Path) -> None:
    secrets = memory.canaries(136, seed=1)
    planted, control, others = secrets[:4], secrets[4:8], secrets[8:]
    rows = [{"text": r["text"]} for r in make_rows(60)]
    told = [{"text": f"the code is {s}"} for s in planted]
    task = LanguageModelling()
    # They are the validation rows too, so that the epoch that knows them best is kept.
    made = Domain("canary", task, Data([*told * 12, *rows], told, make_rows(20, seed=6)))
    made = with_settings(
        made, lr=0.003, epochs=12, rank=16, batch_size=8, patience=12, retention="none"
    )
    model = model_in(tmp_path, tiny_base)
    model.fit(made)
    tokenization = Tokenization(model.tokenizer, 64)

    def nats(texts: Sequence[str], name: str | None) -> list[float]:
        examples = [Example(str(n), "", f"the code is {t}") for n, t in enumerate(texts)]
        with model.using(name):
            return answer_nats(model.base.model, tokenization.encode_all(examples), 0)[0].tolist()

    adapter, base = nats([*planted, *control, *others], "canary"), nats(secrets, None)
    bits = [memory.exposure(one, adapter[8:]) for one in adapter[:8]]
    assert min(bits[:4]) > 5.5  # of 7.01 at most
    assert np.mean(bits[4:]) < 4
    assert np.mean([memory.exposure(one, base[8:]) for one in base[:4]]) < 4
