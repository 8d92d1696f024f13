"""The plan: what is derived where a domain leaves a setting open."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fits import clear_rows, domain, make_run
from support.models import model_in

from lora_domains.domain import with_settings
from lora_domains.training.plan import make_plan


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return clear_rows()


def test_a_run_too_short_is_warned_about_with_the_number(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, domain(rows, epochs=1), None)
    (warning,) = run.plan.warnings
    assert "only 19 optimiser steps (301 rows, batches of 16, 1 epoch)" in warning
    assert "--epochs 4 gives 76" in warning
    assert make_run(tmp_path, tiny_base, domain(rows, epochs=4), None).plan.warnings == ()


def test_what_is_derived_is_derived_from_width_and_tokens(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    declared = replace(domain(rows), lora=replace(domain(rows).lora, rank=None))
    plan = make_run(tmp_path, tiny_base, with_settings(declared, lr=None), None).plan
    assert plan.lr == pytest.approx(5e-4 * (2000 / 32) ** 0.78, rel=0.05)
    assert plan.rank == 16
    rate, _, kept, general = plan.reasons
    assert "width 32" in rate
    assert "retention kl: auto" in kept
    assert re.fullmatch(r"general text: 480 of \d+ texts to train by, 200 others .*", general)
    assert plan.batch_size == 16  # as asked


@pytest.mark.parametrize(
    ("count", "epochs", "batch", "steps"),
    [(430, 8, 8, 304), (430, 40, 32, 400), (430, 12, 16, 228), (40, 8, 8, 32)],
)
def test_a_batch_is_small_enough_for_the_steps_a_run_wants(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]],
    count: int, epochs: int, batch: int, steps: int,
) -> None:  # fmt: skip
    declared = with_settings(domain(rows[:count], epochs=epochs), batch_size=None)
    plan = make_run(tmp_path, tiny_base, declared, None).plan
    assert (plan.batch_size, plan.steps) == (batch, steps)
    assert any(f"batches of {batch} rows: {steps} steps" in reason for reason in plan.reasons)


@pytest.mark.parametrize("given", [True, False])
def test_auto_depends_on_whose_text_it_is(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], given: bool
) -> None:
    texts = [{"text": f"number {n} of the stone river"} for n in range(50)] if given else None
    model = model_in(tmp_path, tiny_base)
    planned = {}
    for way in ("auto", "replay"):
        declared = domain(rows[:60], retention=way)
        declared = replace(declared, data=replace(declared.data, general=texts))
        planned[way] = make_plan(model.base, model.dataset(declared))
    assert planned["auto"].keeping.method == ("replay" if given else "kl")
    warned = ["teaches" in warning for warning in planned["replay"].warnings]
    assert any(warned) is not given
    assert not any("teaches" in warning for warning in planned["auto"].warnings)
