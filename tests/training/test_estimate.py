"""A dry run: an estimate of every phase from parts of it, and nothing left behind."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import WORDS, make_rows
from support.general_text import TRAINING, use_general_text
from support.models import SUITE, clear_rows, declared, model_in
from support.models import make_run as make_quiet_run

from lora_domains.console import EVALUATION, GENERAL, STEPS, VALIDATION, Clock, Display
from lora_domains.console import clock as clocks
from lora_domains.evaluation.verdict_run import evaluation_seconds
from lora_domains.inference.reference import Reference
from lora_domains.model import DomainModel
from lora_domains.probes.general_text import embedded_texts
from lora_domains.tasks import Classification
from lora_domains.training.estimate import estimate
from lora_domains.training.fit import make_run
from lora_domains.training.plan import make_plan

TOKEN = 0.001
"""Seconds that a token takes in a forward pass, where time is counted by tokens."""


def test_a_dry_run_estimates_and_changes_nothing(
    tmp_path: Path, tiny_base: Path, small_suite: None, cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path / "out", display=Display(),
                                        device="cpu")  # fmt: skip
    digest, state = model.base.state_digest(), torch.get_rng_state()
    assert model.fit(declared(make_rows(60), epochs=2, retention="kl"), dry_run=True) is None
    output = capsys.readouterr().out
    for part in ("about ", "for the base, of", "of memory at most; measured on parts of it",
                 "per token in training, measured", "supervised tokens",
                 "nothing was trained or written"):  # fmt: skip
        assert part in output, part
    assert not (tmp_path / "out").exists()
    assert not cache.exists()
    assert model.domains == ()
    assert model.base.state_digest() == digest
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dry_run_says_once_how_general_text_is_compared(
    tmp_path: Path, tiny_base: Path, small_suite: None, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Reference, "approximation", lambda _: "nearly KL")
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path / "out", display=Display(),
                                        device="cpu")  # fmt: skip
    model.fit(declared(make_rows(60), epochs=2, retention="kl"), dry_run=True)
    output = capsys.readouterr().out
    assert output.count("trained with nearly KL") == 1
    assert output.count("nearly KL") <= 2  # the monitored texts


def count_tokens(monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
    """Let time pass by tokens, three times as fast in training: what a quiet machine does."""
    now = [0.0]

    def passed(_module: Any, _arguments: Any, options: dict[str, Any]) -> None:
        now[0] += options["input_ids"].numel() * TOKEN * (3 if torch.is_grad_enabled() else 1)

    model.base_model.register_forward_pre_hook(passed, with_kwargs=True)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: now[0]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "task"),
    [
        pytest.param({"retention": "kl", "kl": 0.5, "general_rows": 4}, None, id="kl"),
        pytest.param(
            {"retention": "replay"},
            Classification(positive="spam", head=True),
            id="replay, head",
            marks=pytest.mark.long,
        ),
    ],
)
def test_the_estimate_of_each_phase_is_within_30_percent(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch, small_suite: None,
    settings: dict[str, Any], task: Classification | None,
) -> None:  # fmt: skip
    use_general_text(monkeypatch, TRAINING, [f"a {word} river is red" for word in WORDS.split()])
    spam = declared(clear_rows(300), task=task, epochs=3, patience=9, **settings)
    model = model_in(tmp_path, tiny_base)
    count_tokens(monkeypatch, model.base.model)
    dataset = model.dataset(spam)
    run = make_run(model.bank, dataset, make_plan(model.base, dataset), model.out, model.display)
    rows, texts = run.validation.rows, run.validation.monitored
    evaluation = partial(evaluation_seconds, model.bank, dataset, SUITE, test=True,
                         base_changed=lambda: False)  # fmt: skip
    estimated = estimate(run, evaluation)
    assert (run.validation.rows, run.validation.monitored) == (rows, texts)
    assert run.adapter_name not in model.bank
    card = model.fit(spam)
    assert card is not None
    measured = dict(card.adapter.training["phases"])
    with Clock(measured).phase(EVALUATION):
        model.evaluate(spam, suite=SUITE)
    assert measured.keys() == estimated.phases.keys() == {STEPS, GENERAL, VALIDATION, EVALUATION}
    for name, seconds in measured.items():
        assert estimated.phases[name] == pytest.approx(seconds, rel=0.3), name
    assert estimated.seconds == pytest.approx(sum(measured.values()), rel=0.15)
    assert estimated.peak_bytes > 50e6


def test_validation_rows_are_estimated_without_test_rows(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spam = declared(clear_rows(100), epochs=1, retention="none")
    run = make_quiet_run(tmp_path, tiny_base, spam)
    count_tokens(monkeypatch, run.model)
    model = model_in(tmp_path, tiny_base)
    dataset = model.dataset(spam)
    seconds = [
        evaluation_seconds(run.bank, dataset, SUITE, run.adapter_name, lambda: False, test=test)
        for test in (False, True)
    ]
    assert 0 < seconds[0] < seconds[1]


def test_reading_general_text_is_part_of_neither_speed_nor_time_left(
    tmp_path: Path, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base reads hundreds of texts in the first step, which no later step does."""
    use_general_text(monkeypatch, embedded_texts("train")[:40], embedded_texts("validation")[:10])
    spam = declared(clear_rows(200), epochs=2, kl=0.5, retention="kl", general_rows=2,
                    general_cost=1000.0)  # fmt: skip
    run = make_quiet_run(tmp_path, tiny_base, spam)
    count_tokens(monkeypatch, run.model)
    _ = run.gradients.cost, run.gradients.general_cost
    batch = run.train[:16]
    read = sum(map(len, batch)) + sum(map(len, run.gradients.texts()))
    with run.clock.phase(STEPS):
        run.train_step(batch)
    state = run.state
    assert state.phases[GENERAL] >= TOKEN * sum(map(len, run.general.texts))
    assert state.phases[GENERAL] > 2 * state.phases[STEPS]  # which would triple the time left
    padded = state.phases[STEPS] / (3 * TOKEN)
    assert read <= padded < 1.5 * read
    assert state.tokens_per_second == pytest.approx(read / state.phases[STEPS])
    steps = (run.plan.steps - 1) * state.phases[STEPS]
    rows, monitored = (sum(map(len, part)) for part in
                       (run.validation.rows, run.validation.monitored))  # fmt: skip
    # Two validations, and the texts that the base has still to read; a token of a step is padded.
    validations = TOKEN * (2 * (rows + monitored) + monitored)
    assert steps + validations <= run.seconds_left() < 1.5 * (steps + validations)
    run.state.history = [{}]
    state.phases[VALIDATION] = 5.0
    assert run.seconds_left() == pytest.approx(steps + 5.0)
