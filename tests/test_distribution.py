"""Wheel, sdist and wheelhouse: what they hold, and that they work in an empty environment."""

import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT


def make(target: str, folder: Path) -> None:
    """``make TARGET``, with all that it writes in ``folder``."""
    places = [f"{name}={folder / name.lower()}" for name in ("DIST", "WHEELHOUSE", "BUILD")]
    done = subprocess.run(
        ["make", "--assume-old=.venv/.installed", target, *places],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.long
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    make("dist", tmp_path)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"lora_domains"}
    for part in ("base/model.safetensors", "general_text.jsonl"):
        assert f"lora_domains/embedded/{part}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any("__pycache__" in name for name in names)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {Path(name).parts[1] for name in archive.getnames() if len(Path(name).parts) > 1}
    assert {"lora_domains", "tests", "recipes", "pyproject.toml", "README.md", "LICENSE"} <= held
    assert not held & {".venv", ".bases", "adapters", "reports", "wheelhouse", "build"}


@pytest.mark.long
def test_a_machine_without_an_index_installs_from_the_wheelhouse(tmp_path: Path) -> None:
    make("wheelhouse", tmp_path)
    names = {path.name.split("-")[0] for path in (tmp_path / "wheelhouse").glob("*.whl")}
    assert {"lora_domains", "torch", "transformers", "peft", "rouge_score"} <= names
    assert not [*(tmp_path / "wheelhouse").glob("*.tar.gz")]
