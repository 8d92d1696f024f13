"""The plan: settings derived where a domain leaves them open, with reasons and warnings."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.models import QUIET, declared, make_run, model_in

from lora_domains.data.source import Data
from lora_domains.domain import Domain, Training, with_settings
from lora_domains.model import DomainModel
from lora_domains.tasks import Classification
from lora_domains.training.plan import derived_epochs, make_plan


def test_a_short_run_is_warned_about_with_the_epochs_it_needs(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    run = make_run(tmp_path, tiny_base, declared(rows, epochs=1))
    (warning,) = run.plan.warnings
    assert "only 19 optimiser steps (301 rows, batches of 16, 1 epoch)" in warning
    assert "--epochs 4 gives 76" in warning
    assert make_run(tmp_path, tiny_base, declared(rows, epochs=4)).plan.warnings == ()
    for most, said in ((10, True), (76, False)):
        run = make_run(tmp_path / str(most), tiny_base, declared(rows, epochs=4, max_steps=most))
        assert ("10 of 76 steps (--max-steps)" in run.plan.reasons) == said


@pytest.mark.usefixtures("all_texts")
def test_rate_and_rank_follow_from_width_and_tokens(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    spam = declared(rows, epochs=8, lr=None, rank=None, general_cost=1000.0)
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


@pytest.mark.parametrize(("words", "batch"), [(3, 8), (3, 32), (40, 8), (40, 32)])
def test_general_text_costs_at_most_two_fifths_of_the_domains_tokens(
    tmp_path: Path, tiny_base: Path, own_texts: Path, words: int, batch: int
) -> None:
    rows = [{"text": f"{n} " + "river " * words, "label": "ab"[n % 2]} for n in range(160)]
    spam = declared(rows, task=Classification(), batch_size=batch, epochs=3)
    run = make_run(tmp_path, tiny_base, spam)
    plan, every = run.plan, run.plan.general_every
    read = [run.gradients.texts_of(step) for step in range(plan.steps)]
    assert [bool(texts) for texts in read] == [step % every == 0 for step in range(plan.steps)]
    assert sum(map(len, read)) == plan.general_reads
    general = sum(len(text) for texts in read for text in texts)
    assert general <= 0.4 * plan.epochs * sum(map(len, run.train)) + max(map(len, run.train))
    assert any(f"1 of {every} steps" in reason for reason in plan.reasons) is (every > 1)
    costly = make_run(tmp_path, tiny_base, with_settings(spam, general_cost=1000.0))
    assert costly.plan.general_every == 1
    if every > 1:  # a little more often would cost more
        cheaper = make_run(tmp_path, tiny_base, with_settings(spam, general_cost=0.2))
        assert cheaper.plan.general_every > every


def test_kl_reads_as_many_general_texts_as_a_step_can_afford(
    tmp_path: Path, tiny_base: Path, own_texts: Path
) -> None:
    model = model_in(tmp_path, tiny_base)

    def read(words: int, **settings: Any) -> tuple[int, int]:
        rows = [{"text": f"{n} " + "river " * words, "label": "ab"[n % 2]} for n in range(160)]
        domain = declared(rows, task=Classification(), batch_size=8, retention="kl", **settings)
        plan = make_plan(model.base, model.dataset(domain))
        texts = plan.retention.rows
        assert f"on {texts} general texts per step" in " ".join(plan.reasons)
        return texts, plan.general_every

    short, long = read(3), read(100)
    assert 2 <= short[0] < long[0] == 6
    assert short[1] > long[1] == 1
    assert read(100, general_rows=3) == (3, 1)
    assert read(3, general_rows=1)[0] == 1


def test_what_prompts_begin_with_counts_once_wherever_the_run_goes_on(
    tmp_path: Path, tiny_base: Path, own_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run may be resumed on other processes, or on a base that is sharded: its plan may not
    change."""
    rows = [{"text": "river " * 40 + f"{n}", "label": "ab"[n % 2]} for n in range(160)]
    domain = declared(rows, task=Classification(), batch_size=16)
    model = model_in(tmp_path, tiny_base)

    def every(**settings: Any) -> int:
        dataset = model.dataset(with_settings(domain, general_cost=0.1, **settings))
        return make_plan(model.base, dataset).general_every

    once = every()
    assert once > every(gradient_checkpointing=True)  # which reads whole prompts
    with monkeypatch.context() as patch:
        patch.setattr("lora_domains.inference.likelihoods.is_sharded", lambda _: True)
        assert every() == once
    with monkeypatch.context() as patch:
        patch.setattr("lora_domains.distributed.state", lambda: SimpleNamespace(
            num_processes=2, process_index=0, is_main_process=True))  # fmt: skip
        assert every() == once


def test_the_embedded_base_reads_general_text_in_every_step(tmp_path: Path) -> None:
    rows = [{"text": f"mail {n}", "label": "ab"[n % 2]} for n in range(90)]
    model = DomainModel.from_pretrained(out=tmp_path, device="cpu", display=QUIET)
    domain = Domain("mails", Classification(), Data(rows))
    assert make_plan(model.base, model.dataset(domain)).general_every == 1
    limited = with_settings(domain, general_cost=0.1)
    assert make_plan(model.base, model.dataset(limited)).general_every > 1


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(40, 8), (10_003, 8), (13_000, 8), (20_000, 5), (33_000, 3), (99_520, 1), (10**6, 1)],
)
def test_many_rows_are_read_in_fewer_epochs(rows: int, epochs: int) -> None:
    derived, reason = derived_epochs(rows, Training())
    assert derived == epochs
    assert bool(reason) is (epochs < 8)
    assert derived_epochs(rows, Training(epochs=6)) == (6, "")


def test_a_long_epoch_is_validated_in_equal_parts(
    tmp_path: Path, tiny_base: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_domains.training.plan.VALIDATED", 4)
    spam = declared(rows, epochs=1, retention="none")
    few = replace(spam, data=replace(spam.data, validation=rows[301:305]))  # type: ignore[arg-type]
    plan = make_run(tmp_path, tiny_base, few).plan
    assert (plan.steps_per_epoch, plan.validate_every, plan.validations(plan.steps)) == (19, 5, 4)
    assert "validation after every 5 of 19 steps" in plan.reasons
    # Validation rows that take longer than a tenth of the steps between are read less often.
    many = make_run(tmp_path, tiny_base, spam).plan
    assert many.validate_every == 10
    given = make_run(tmp_path, tiny_base, with_settings(spam, validate_every=3)).plan
    assert (given.validate_every, given.validations(given.steps)) == (3, 7)


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
