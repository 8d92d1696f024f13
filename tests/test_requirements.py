"""Requirements: every import is declared, and two files pin the oldest and the newest versions."""

import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from support.structure import imports_of

FILES = {"newest": ROOT / "constraints.txt", "oldest": ROOT / "constraints-oldest.txt"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOOLS = {canonicalize_name(name) for name in EXTRAS["check"]}
"""Of ``make check``: no test imports them."""
LOADED_BY_NAME = {
    "mkdocs": "make",
    "mkdocs-material": "mkdocs",
    "mkdocstrings": "mkdocs",
    "mkdocstrings-python": "mkdocstrings",
    "bitsandbytes": "transformers",
    "ipykernel": "nbclient",
    "pandas": "datasets",
    "pytest-xdist": "pytest",
    "tensorboardx": "accelerate",
    "trackio": "accelerate",
    "wandb": "accelerate",
}
"""Requirements that the package may use without an import, and the library that imports them."""


def declared(*extras: str) -> dict[str, Requirement]:
    """Requirements by name: those of the package and those of ``extras``."""
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in EXTRAS[extra])]
    return {canonicalize_name(found.name): found for found in map(Requirement, lines)}


@cache
def pins(path: Path) -> dict[str, Version]:
    lines = path.read_text(encoding="utf-8").splitlines()
    found = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): Version(version) for name, version in found.items()}


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = [s.version for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    return Version(bound)


@pytest.mark.parametrize("which", FILES)
def test_every_requirement_is_pinned_within_its_range(which: str) -> None:
    for name, requirement in declared(*EXTRAS).items():
        assert name in pins(FILES[which]), f"{FILES[which].name} does not pin {name}"
        version = pins(FILES[which])[name]
        assert version in requirement.specifier, f"{name} {version} is not {requirement.specifier}"


def test_the_oldest_pins_are_the_lower_bounds() -> None:
    requirements = declared(*EXTRAS)
    bounds = {name: lower_bound(requirements[name]) for name in requirements.keys() - TOOLS}
    assert bounds == {name: pins(FILES["oldest"])[name] for name in bounds}
    # An extra may state the bound of another one again.
    lines = map(Requirement, (line for extra in EXTRAS.values() for line in extra))
    for line in lines:
        assert line.specifier == requirements[canonicalize_name(line.name)].specifier, line


@pytest.mark.parametrize(
    ("folders", "extras"),
    [
        (
            ["lora_domains", "recipes"],
            ["excel", "gguf", "harness", "notebook", "playground", "ray", "serve"],
        ),
        (["tests"], ["test", "harness"]),
        (["benchmarks"], ["benchmarks"]),
    ],
    ids=lambda names: names[0],
)
def test_every_import_is_declared(folders: list[str], extras: list[str]) -> None:
    assert distributions(folders) <= declared(*extras).keys()


def test_every_requirement_is_used() -> None:
    used = distributions(["lora_domains"]) | LOADED_BY_NAME.keys()
    optional = [extra for extra in EXTRAS if extra not in ("test", "benchmarks", "check")]
    assert declared(*optional).keys() <= used
    everything = used | distributions(["tests", "benchmarks"])
    assert declared(*EXTRAS).keys() - TOOLS == everything
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    used = {t for t in TOOLS if f"$(BIN)/{t}" in makefile or f"python -m {t}" in makefile}
    assert used == TOOLS - {"pre-commit"}
    assert "pre-commit" in hooks


@cache
def distributions_of_packages() -> Mapping[str, list[str]]:
    return packages_distributions()


def distributions(folders: list[str]) -> set[str]:
    """The packages that the code in ``folders`` imports, and that are not part of Python."""
    own = {path.stem for glob in ("*", "tests/*", "benchmarks/*/*.py") for path in ROOT.glob(glob)}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    modules = {name.split(".")[0] for path in files for name in imports_of(path)}
    modules -= own | sys.stdlib_module_names
    known = distributions_of_packages()
    return {canonicalize_name(known.get(module, [module])[0]) for module in modules}


def test_a_job_runs_the_tests_with_each_file() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert job["strategy"]["matrix"]["constraints"] == [path.name for path in FILES.values()]
    assert job["env"]["CONSTRAINTS"] == "${{ matrix.constraints }}"
    runs = [step for step in job["steps"] if step.get("run") in ("make setup", "make test")]
    assert len(runs) == 2
    assert not any("if" in step for step in runs)
    command = ["make", "--dry-run", "--always-make", "test", f"CONSTRAINTS={FILES['oldest'].name}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert ".venv-oldest/bin/pip install" in shown
    assert f"--constraint {FILES['oldest'].name}" in shown
    assert ".venv-oldest/bin/python -m pytest" in shown
