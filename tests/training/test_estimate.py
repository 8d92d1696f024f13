"""A dry run: an estimate measured on one step, and nothing left behind."""

import time
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from support.models import declared, make_run

from lora_domains.console import Display
from lora_domains.model import DomainModel
from lora_domains.training.estimate import estimate


def test_a_dry_run_estimates_and_changes_nothing(
    tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = DomainModel.from_pretrained(tiny_base, out=tmp_path / "out", display=Display(),
                                        device="cpu")  # fmt: skip
    digest, state = model.base.state_digest(), torch.get_rng_state()
    assert model.fit(declared(make_rows(60), epochs=2, retention="none"), dry_run=True) is None
    output = capsys.readouterr().out
    for part in ("about ", "for the base, of", "of training", "of memory", "measured on one step",
                 "supervised tokens", "nothing was trained or written"):  # fmt: skip
        assert part in output, part
    assert not (tmp_path / "out").exists()
    assert model.domains == ()
    assert model.base.state_digest() == digest
    assert torch.equal(torch.get_rng_state(), state)


def test_the_estimate_is_about_the_duration_of_the_run(tmp_path: Path, tiny_base: Path) -> None:
    spam = declared(make_rows(200), epochs=6, retention="none", patience=99)
    run = make_run(tmp_path, tiny_base, spam)
    rows = run.validation.rows
    estimated = estimate(run)
    assert run.validation.rows is rows
    started = time.monotonic()
    make_run(tmp_path / "run", tiny_base, spam).fit()
    took = time.monotonic() - started
    assert took / 8 < estimated.seconds < 8 * took  # wide, since the machine may be busy
    assert estimated.peak_bytes > 50e6
