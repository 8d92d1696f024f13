"""The memory of training on SmolLM2: measured on a few tokens, and as the system counts it."""

import gc
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_rows
from support.models import declared, make_run

from lora_domains.inference import batches, memory
from lora_domains.inference.batches import micro_batches
from lora_domains.inference.memory import TensorBytes, pass_limit
from lora_domains.tokenization.encoded import EncodedExample

pytestmark = [pytest.mark.slow, pytest.mark.long]
GIB = 2**30
MANY = 16_384
"""Tokens of a pass, so that memory limits it."""
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(name: str) -> int:
    """Bytes that the system counts: ``VmRSS`` now, ``VmHWM`` at the peak since ``forget_peak``."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    gc.collect()
    try:
        CLEAR.write_text("5")
    except OSError:
        pytest.skip("this system does not forget the peak of a process")


def test_a_step_takes_the_memory_that_was_estimated_and_no_more_than_is_free(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 rows of 150 tokens with general text beside them, where 4 GiB are free."""
    monkeypatch.setattr(memory, "free_bytes", lambda _: 4 * GIB)
    monkeypatch.setattr(batches, "MICRO_TOKENS", {True: MANY, False: MANY})
    spam = declared(make_rows(60), retention="kl", rank=16)
    run = make_run(tmp_path, smollm2, spam)
    gradients, limit = run.gradients, pass_limit(run.model)
    assert limit == 2 * GIB
    assert gradients.cost is not None
    rows = [EncodedExample(f"{n}", (n, *range(100, 247)), (300, 2), target=0) for n in range(24)]
    vocabulary = run.bank.base.vocabulary
    arguments = (torch.device("cpu"), None, vocabulary)
    parts = list(micro_batches(rows, *arguments, gradients.cost, limit))
    assert 1 < len(parts) < 24
    assert len(list(micro_batches(rows, *arguments))) == 1
    run.general.texts = run.general.texts[:12]
    _ = run.general.reference
    part = parts[0]
    estimated = gradients.cost(len(part), 150, len(part) * 2 * vocabulary)
    forget_peak()
    before = resident("VmRSS")
    with TensorBytes() as counted:
        gradients._domain_gradients([part], 1)
    assert counted.peak == pytest.approx(estimated, rel=0.15)
    gradients.compute(rows, 48)
    peak = resident("VmHWM") - before
    sys.stdout.write(
        f"per token {gradients.cost.token / 1e6:.2f} MB; a pass of {len(part)} rows of 150 tokens: "
        f"estimated {estimated / 1e9:.2f} GB, tensors {counted.peak / 1e9:.2f} GB; the step: "
        f"{peak / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB; {MANY} tokens would take "
        f"{gradients.cost(109, 150, 109 * 2 * vocabulary) / 1e9:.1f} GB\n"
    )
    # What is freed in small pieces stays with the process, which is why a pass takes half at most.
    assert 0.8 * estimated < peak < 4 * GIB
