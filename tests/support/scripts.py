"""Load a benchmark script as a module."""

import importlib.util
from pathlib import Path
from types import ModuleType

from conftest import ROOT


def script(name: str, folder: str | Path) -> ModuleType:
    """``name``.py of a folder of ``benchmarks/`` as a module; scripts import each other by name."""
    path = ROOT / "benchmarks" / folder / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
