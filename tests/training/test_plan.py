"""The plan: settings derived where a domain leaves them open, with reasons and warnings."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import declared, make_run, model_in

from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.tasks import Classification
from lora_domains.training.plan import make_plan


def test_a_short_run_is_warned_about_with_the_epochs_it_needs(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, declared(rows, epochs=1))
    (warning,) = run.plan.warnings
    assert "only 19 optimiser steps (301 rows, batches of 16, 1 epoch)" in warning
    assert "--epochs 4 gives 76" in warning
    assert make_run(tmp_path, tiny_base, declared(rows, epochs=4)).plan.warnings == ()


@pytest.mark.usefixtures("all_texts")
def test_rate_and_rank_follow_from_width_and_tokens(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows, epochs=8, lr=None, rank=None)
    plan = make_run(tmp_path, tiny_base, spam).plan
    assert plan.lr == pytest.approx(5e-4 * (2000 / 32) ** 0.78, rel=0.05)
    assert plan.rank == 16
    rate, _, retention, general = plan.reasons
    assert "width 32" in rate
    assert "retention kl: chosen by auto" in retention
    assert re.fullmatch(
        r"general text: 480 of \d+ texts for training, 200 others for monitoring", general
    )
    assert plan.batch_size == 16  # as given


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"),
    [(430, 8, 8, 304), (430, 40, 32, 400), (430, 12, 16, 228), (40, 8, 8, 32)],
)
def test_the_batch_is_small_enough_for_the_target_number_of_steps(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]],
    count: int, epochs: int, batch: int, steps: int,
) -> None:  # fmt: skip
    spam = declared(rows[:count], epochs=epochs, batch_size=None)
    plan = make_run(tmp_path, tiny_base, spam).plan
    assert (plan.batch_size, plan.steps) == (batch, steps)
    assert any(f"batches of {batch} rows: {steps} steps" in reason for reason in plan.reasons)


@pytest.mark.parametrize("given", [True, False])
def test_auto_depends_on_whether_general_text_is_given(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], given: bool
) -> None:
    texts = [{"text": f"number {n} of the stone river"} for n in range(50)] if given else None
    model = model_in(tmp_path, tiny_base)
    planned = {}
    for method in ("auto", "replay"):
        spam = declared(rows[:60], retention=method)
        spam = replace(spam, data=replace(spam.data, general=texts))
        planned[method] = make_plan(model.base, model.dataset(spam))
    assert planned["auto"].retention.name == ("replay" if given else "kl")
    warned = ["embedded world's text" in warning for warning in planned["replay"].warnings]
    assert any(warned) is not given
    assert not any("embedded world's text" in warning for warning in planned["auto"].warnings)


@pytest.mark.parametrize("head", [True, False])
def test_labels_that_are_slow_to_score_are_warned_about(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, head: bool
) -> None:
    monkeypatch.setattr("lora_domains.training.plan.MANY_TOKENS", 60)
    labels = [f"{n} topic {n}" for n in range(30)]
    many = [{"text": f"mail {n}", "label": labels[n % 30]} for n in range(90)]
    model = model_in(tmp_path, tiny_base)
    for count, warned in ((3, False), (30, not head)):
        rows = [row for row in many if row["label"] in labels[:count]]
        domain = Domain("topics", Classification(head=head), Data(rows))
        warnings = make_plan(model.base, model.dataset(domain)).warnings
        assert any(f"{count} labels" in one and "--head" in one for one in warnings) is warned
