"""Memory: the bytes that a base takes are known before it is loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base

from lora_domains.inference.memory import memory_warning
from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.modeling.quantization import estimated_bytes


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_memory_is_estimated_before_a_base_is_loaded(tmp_path: Path, quantization: Any) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    folder = make_base(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    told: list[int] = []
    base = load_base(folder, device="cpu", quantization=quantization,
                     announce=lambda needed, _: told.append(needed))  # fmt: skip
    (needed,) = told
    # The files hold neither rotary buffers nor quantisation constants.
    assert needed == pytest.approx(base.resident_bytes(), rel=0.03)
    if quantization:
        plain = estimated_bytes(base.checkpoint.tensors, torch.float32, None)
        assert needed < 0.5 * plain


def test_from_pretrained_warns_of_a_base_that_will_not_fit(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_domains.inference.memory.free_bytes", lambda _: 1000)
    DomainModel.from_pretrained(tiny_base, device="cpu")
    output = "".join(capsys.readouterr())
    assert "are free" in output


def test_the_warning_of_a_base_that_will_not_fit() -> None:
    assert memory_warning(4_000_000_000, 5_000_000_000, None) is None
    warning = memory_warning(14_000_000_000, 5_000_000_000, None)
    assert warning is not None
    assert "about 14.0 GB and 5.0 GB are free; --load-in-4bit" in warning
    assert "4bit" not in str(memory_warning(14_000_000_000, 5_000_000_000, "4bit"))


@pytest.mark.long
@pytest.mark.slow
def test_only_a_quantised_base_imports_bitsandbytes(tiny_base: Path, tmp_path: Path) -> None:
    """Fit, save and load on a plain base, then load a quantised one in the same process."""
    pytest.importorskip("bitsandbytes")
    folder = make_base(tmp_path / "wide", hidden_size=64, intermediate_size=128)
    code = f"""
import sys
from lora_domains import DomainModel
rows = [{{"text": f"{{w}} {{n}}", "label": w}} for n in range(40) for w in ("spam", "ham")]
model = DomainModel.from_pretrained({str(tiny_base)!r}, out={str(tmp_path / "out")!r}, device="cpu")
model.fit(rows, name="x", epochs=1, retention="none", rank=4)
model.load_adapter("x", name="again")
assert "peft" in sys.modules
assert "bitsandbytes" not in sys.modules, "imported unasked"
quantised = DomainModel.from_pretrained({str(folder)!r}, quantization="4bit", device="cpu")
assert "bitsandbytes" in sys.modules
from peft.import_utils import is_bnb_available
assert is_bnb_available()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
