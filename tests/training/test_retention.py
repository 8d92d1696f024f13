"""Retention methods: which texts a step reads, what each method does, what auto chooses."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import make_rows
from hypothesis import given
from hypothesis import strategies as st
from support import retention as outside
from support.models import declared, forgetful, make_run, model_in

from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import RETENTION, Domain, Training, with_settings
from lora_domains.errors import DomainError
from lora_domains.inference.batches import micro_batches
from lora_domains.inference.likelihoods import saved_in_training
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification
from lora_domains.tokenization.encoded import EncodedExample
from lora_domains.training import retention
from lora_domains.training.retention import METHODS, Retention, choose_retention, positions


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 3), st.integers(1, 30))
def test_every_text_is_read_once_before_any_is_read_again(
    count: int, batch: int, seed: int, steps: int
) -> None:
    drawn: list[int] = []
    for step in range(steps):
        rows = positions(count, batch, seed, step)
        assert len(rows) == min(batch, count)
        assert rows == positions(count, batch, seed, step)
        drawn += rows
    times = Counter(drawn)
    assert max(times.values()) - min(times.get(i, 0) for i in range(count)) <= 1


def planned(retention: str, familiar: bool = True, batch: int = 32) -> tuple[Retention, str]:
    settings = Training(retention=retention)
    return choose_retention(settings, texts=100, familiar=familiar, batch=batch)


def test_a_method_is_planned_from_its_settings_and_describes_itself() -> None:
    replay, kl, none = (planned(name) for name in ("replay", "kl", "none"))
    assert vars(replay[0]) == {"rows": 11, "batch": 32}
    assert vars(kl[0]) == {"rows": 6, "weight": 0.5}
    assert vars(none[0]) == {"rows": 0, "monitored": True}
    for name, (method, why) in zip(("replay", "kl", "none"), (replay, kl, none), strict=True):
        assert (method.name, why) == (name, "")


@pytest.mark.parametrize(
    ("batch", "kl", "replay"), [(64, 6, 21), (32, 6, 11), (8, 6, 3), (2, 6, 1)]
)
def test_replay_reads_a_share_of_the_batch_and_kl_the_same_number_beside_any(
    batch: int, kl: int, replay: int
) -> None:
    assert [planned(name, batch=batch)[0].rows for name in ("kl", "replay")] == [kl, replay]


@pytest.mark.parametrize(("familiar", "name"), [(True, "replay"), (False, "kl")])
def test_auto_says_what_it_chose_and_why(familiar: bool, name: str) -> None:
    method, reason = planned("auto", familiar)
    assert method == planned(name, familiar)[0]
    assert reason.startswith("chosen by auto")
    assert ("benchmarks/training/retention.py" if familiar else "--general") in reason
    nothing, reason = choose_retention(Training(), texts=0, familiar=familiar, batch=32)
    assert (nothing.name, nothing.rows, reason) == ("none", 0, "")
    assert "no language head" in nothing.describe()


def test_declarations_know_every_method() -> None:
    assert sorted(RETENTION) == sorted(["auto", *METHODS])


@pytest.mark.parametrize(
    "wrong", [{"retention": "ewc"}, {"retention": "both"}, {"kl": 0.0}, {"replay": 1.0}]
)
def test_invalid_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DomainError, match=next(iter(wrong))):
        with_settings(Domain("x", Classification(), Data([])), **wrong)


def test_a_method_from_outside_the_package_trains(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything a method does is in its class (``support/retention.py``)."""
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path, device="cpu", display=Display())
    spam = declared(make_rows(60), epochs=1, retention="blend", general_rows=3, kl=2.0,
                    general_cost=1000.0)  # fmt: skip
    run = make_run(tmp_path / "run", tiny_base, spam)
    assert run.plan.retention == outside.Blend(3, 2.0)
    assert run.drift_limit == 2 * 0.23
    record = model.fit(spam).adapter.training
    assert record["retention"] == "blend"
    output = " ".join(capsys.readouterr().out.split())
    assert "retention blend: 3 texts, weight 2" in output
    assert "general text: 9 of" in output  # 3 texts in each of 3 steps
    assert "blend trains" in output
    plain = forgetful(tmp_path / "none", tiny_base, retention="none", lr=0.005)["history"][-1]
    blend = forgetful(tmp_path / "blend", tiny_base, retention="blend", lr=0.005, kl=10.0)
    for name in ("general_kl", "general_nats"):
        assert blend["history"][-1][name] < plain[name]


def test_kl_preserves_what_plain_training_loses(tmp_path: Path, tiny_base: Path) -> None:
    settings = {"drift": 1e9, "kl": 1000.0, "lr": 0.005, "general_cost": 1000.0}
    last = {
        name: forgetful(tmp_path / name, tiny_base, retention=name, **settings)["history"][-1]
        for name in ("none", "kl", "replay")
    }
    assert last["kl"]["general_kl"] < 0.5 * last["none"]["general_kl"]
    # Replay learns the texts themselves: a random base knows none of them before.
    nats = {name: record["general_nats"] for name, record in last.items()}
    assert nats["replay"] < nats["none"]


def test_general_text_that_is_given_is_trained_with_and_never_saved(
    tmp_path: Path, tiny_base: Path
) -> None:
    secret = "zqgeneraltext"
    texts = [{"text": f"{secret} number {n} of the stone river"} for n in range(50)]
    plain = declared(make_rows(60), epochs=1, retention="kl")  # the same method on other texts
    spam = replace(plain, data=replace(plain.data, general=texts))
    model = model_in(tmp_path, tiny_base)
    card = model.fit(spam)
    dataset = model.dataset("spam")
    assert {len(dataset.general.training), len(dataset.general.selection)} == {40, 10}
    assert card.adapter.settings["data"]["general"] == "50 rows in memory"
    own, ours = (card, model_in(tmp_path / "b", tiny_base).fit(plain))
    assert own.adapter.sha256 != ours.adapter.sha256
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def test_the_cost_of_a_step_counts_a_beginning_once_for_each_of_its_passes(
    tmp_path: Path, tiny_base: Path
) -> None:
    model = model_in(tmp_path, tiny_base)
    dataset = model.dataset(declared(make_rows(60), retention="none"))
    begins, ends = range(10, 74), range(100, 161)
    own = [EncodedExample(f"{n}", (*begins, n, *ends), (1, 2), target=0) for n in range(16)]
    passes = list(micro_batches(own, model.base.device))
    saved = [saved_in_training(model.base.model, part) for part in passes]
    assert saved == [64.0 * 7] * 2
    assert retention._read_once(model.base, dataset, own, len(own)) == sum(saved)
