"""Memory: what a base takes is known before it is loaded."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_base

from lora_domains.model import DomainModel
from lora_domains.modeling.base import load_base
from lora_domains.modeling.memory import duration, estimated_bytes, too_little, words


@pytest.mark.parametrize("quantization", [None, "8bit", "4bit"])
def test_what_a_base_takes_is_known_before_it_is_loaded(tmp_path: Path, quantization: Any) -> None:
    if quantization:
        pytest.importorskip("bitsandbytes")
    folder = make_base(tmp_path / "wide", hidden_size=256, intermediate_size=512)
    told: list[int] = []
    base = load_base(folder, device="cpu", quantization=quantization,
                     announce=lambda needed, _: told.append(needed))  # fmt: skip
    (needed,) = told
    # Buffers of the rotary embedding and constants of the quantisation are not in the files.
    assert needed == pytest.approx(base.resident_bytes(), rel=0.03)
    if quantization:
        plain = estimated_bytes([folder / "model.safetensors"], torch.float32, None)
        assert needed < 0.5 * plain


def test_a_base_that_will_not_fit_is_said_in_python_too(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lora_domains.model.free_bytes", lambda _: 1000)
    DomainModel.from_pretrained(tiny_base, device="cpu")
    said = "".join(capsys.readouterr())
    assert "are free" in said


def test_a_base_that_will_not_fit_is_said_before() -> None:
    assert too_little(4_000_000_000, 5_000_000_000, None) is None
    said = too_little(14_000_000_000, 5_000_000_000, None)
    assert said is not None
    assert "about 14.0 GB and 5.0 GB are free; --load-in-4bit" in said
    assert "4bit" not in str(too_little(14_000_000_000, 5_000_000_000, "4bit"))


def test_words_and_durations() -> None:
    assert [words(n) for n in (900, 2.5e6, 1.4e9)] == ["0.9 kB", "2.5 MB", "1.4 GB"]
    assert [duration(s) for s in (4.4, 59.6, 200, 7500)] == [
        "4 s", "1 min 0 s", "3 min 20 s", "2 h 5 min"
    ]  # fmt: skip


@pytest.mark.slow
def test_nothing_imports_bitsandbytes_unless_it_is_asked_for(
    tiny_base: Path, tmp_path: Path
) -> None:
    """Fit, save and load on a plain base; then a quantised one in the same process."""
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
