"""Several seeds of one domain: the adapters of separate fits, and their spread."""

import json
from pathlib import Path
from statistics import fmean

import pytest
from conftest import make_rows
from support.commands import run
from support.models import declared, model_in

from lora_domains.adapters.folder import fingerprint
from lora_domains.analysis.compare import compare_seeds
from lora_domains.domain import Domain, with_settings
from lora_domains.evaluation import contenders
from lora_domains.joint.run import JointRun
from lora_domains.model import DomainModel
from lora_domains.report.card import Card, read_items
from lora_domains.verdict.metrics import METRICS
from lora_domains.verdict.scores import ScoreTable

NAMES = ("spam", "spam-seed1", "spam-seed2")


def domain() -> Domain:
    return declared(make_rows(200), epochs=2, rank=4, patience=99, retention="none", lr=0.005)


Fitted = tuple[DomainModel, list[Card], list[str]]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Fitted:
    """The model, its cards, and the names of what was scored."""
    scored = []
    with pytest.MonkeyPatch.context() as patch:
        scores = contenders.Scorer.scores

        def noted(self, part, names):  # type: ignore[no-untyped-def]
            scored.extend(map(str, names))
            return scores(self, part, names)

        patch.setattr(contenders.Scorer, "scores", noted)
        model = model_in(tmp_path_factory.mktemp("seeds"), tiny_base)
        return model, model.fit(domain(), seeds=3, together=3), scored


def test_adapters_are_those_of_separate_fits(
    fitted: Fitted, tmp_path: Path, tiny_base: Path
) -> None:
    model, cards, _ = fitted
    assert tuple(card.adapter.domain for card in cards) == NAMES == model.domains
    alone = model_in(tmp_path, tiny_base)
    for seed, card in enumerate(cards):
        one = alone.fit(domain(), seed=seed)
        assert one is not None
        assert (card.adapter.recipe_digest == one.adapter.recipe_digest) is (seed == 0)
        assert card.adapter.training["steps"] == one.adapter.training["steps"]
        assert card.adapter.settings["training"]["seed"] == seed
        for linear, pair in alone.bank["spam"].weights.items():
            for a, b in zip(pair, model.bank[card.adapter.domain].weights[linear], strict=True):
                assert (a - b).norm() <= 1e-3 * b.norm(), (seed, linear)


def test_each_card_has_the_spread_that_compare_finds(fitted: Fitted) -> None:
    model, cards, scored = fitted
    assert scored.count("None") == 2  # the base itself, and with examples in its prompt
    kind, found = compare_seeds([model.out / name for name in NAMES])
    assert kind == "validation"
    assert all(card.adapter.seeds == found for card in cards)
    f1 = found["f1"]
    for name, value in zip(NAMES, f1["adapter"], strict=True):
        table = ScoreTable(read_items(model.out / name))
        assert value == METRICS["f1"].value(table, "adapter", cards[0].adapter.positive_index)
    assert f1["rows"] == "validation"
    gains = [value - f1["base"] for value in f1["adapter"]]
    assert fmean(gains) == pytest.approx(f1["difference"])
    assert len(set(f1["adapter"])) > 1


def test_show_tells_the_spread(fitted: Fitted, capsys: pytest.CaptureFixture[str]) -> None:
    model, cards, _ = fitted
    found = cards[0].adapter.seeds
    assert run("show", "spam-seed1", "--out", str(model.out)) == 0
    shown = capsys.readouterr().out
    assert f"3 seeds on the same {found['f1']['n']} validation rows" in shown
    assert "  ".join(f"{value:.3f}" for value in found["f1"]["adapter"]) in shown
    assert run("show", "spam-seed1", "--out", str(model.out), "--json") == 0
    assert json.loads(capsys.readouterr().out)["adapters"][0]["seeds"] == found


def test_an_evaluation_keeps_the_spread_on_validation_rows(
    fitted: Fitted, small_suite: None
) -> None:
    model, cards, _ = fitted
    evaluated = model.evaluate(domain())
    assert evaluated.entry.seeds == cards[0].adapter.seeds
    assert evaluated.card.adapter.verdict is not None
    assert compare_seeds([model.out / name for name in NAMES])[0] == "validation"
    # The data of another seed is known by its name, and read again gives the same rows.
    assert with_settings(domain(), seed=1) != model.dataset("spam-seed1").domain
    assert model.dataset("spam-seed1").prepared.digests == model.dataset("spam").prepared.digests


def test_resumed_when_all_seeds_were_trained_none_is_trained_again(
    fitted: Fitted, tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: fingerprint(fitted[0].out / name) for name in NAMES}
    monkeypatch.setattr(JointRun, "fit", lambda _: pytest.fail("trained"))
    model = model_in(fitted[0].out, tiny_base)
    cards = model.fit(domain(), seeds=3, resume=True)
    assert [card.adapter.sha256 for card in cards] == [*before.values()]
    assert not (fitted[0].out / ".versions").exists()
