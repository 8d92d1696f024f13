"""The shape of the package: imports run one way, files stay readable, reading stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import lora_domains

PACKAGE = ROOT / "lora_domains"
FILES = sorted(PACKAGE.rglob("*.py"))

# DESIGN.md's table, top to bottom. `leaks`, `reading` and `figures` are halves of `data` and
# `report`, whose views are the files from `wording` to `pages`; `display` shows what it holds.
LIGHT = ["errors", "bootstrap", "statistics", "seeds", "calibration", "thresholds",
         "memorisation", "looks", "items", "gates", "slices", "tasks", "leaks", "reading", "data",
         "augmentation", "domain", "figures", "wording", "since", "markdown", "junit", "charts",
         "pages", "report", "comparison", "rerun", "display", "results", "flags"]  # fmt: skip
HEAVY = ["metrics", "processes", "memory", "base", "environment", "encoding", "choices", "slots",
         "routing", "recompute", "heads", "adapter", "loading", "bank", "compiled", "merging",
         "versions", "ready", "scoring", "shots", "evaluation", "judging", "benchmark", "serving",
         "retention", "plan", "checkpoint", "gradients", "tracking", "training", "rehearsal",
         "trace", "model", "scale", "learning", "questions", "cli"]  # fmt: skip
# Light too, until a verb runs.
VERBS = ["questions", "cli"]
ORDER = LIGHT + HEAVY
# Leaves that declare data; `build` makes the embedded base, and nothing imports it.
LEAVES = {"embedded": {"errors", "tasks"}, "suites": {"errors", "tasks", "reading", "embedded"}}
# The bridge to lm-evaluation-harness scores by itself: a leaf of `evaluation` instead.
BRIDGE = {"harness": {"bank", "encoding", "routing", "scoring"}}
TORCH = {"torch", "transformers", "peft", "accelerate", "evaluate", "datasets", "bitsandbytes"}
# Inside a function, and only there: rows from the Hub need `datasets`; `doctor` asks what torch is.
LAZY = {"data": {"datasets"}, "reading": {"datasets"}, "cli": {"torch"}}


def imported(tree: ast.AST) -> set[str]:
    """Every module that a file imports anywhere, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            if node.module == "lora_domains":
                found |= {f"lora_domains.{alias.name}" for alias in node.names}
    return found


def ours(tree: ast.AST) -> set[str]:
    names = {name.split(".")[1] for name in imported(tree) if name.startswith("lora_domains.")}
    return {
        name for name in names if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()
    }


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_every_file_has_its_place_in_the_order() -> None:
    stems = {p.stem for p in PACKAGE.glob("*.py")} - {"__init__"}
    assert stems <= set(ORDER)
    assert stems >= set(ORDER)


@pytest.mark.parametrize("stem", [name for name in ORDER if (PACKAGE / f"{name}.py").exists()])
def test_a_file_imports_only_files_above_it(stem: str) -> None:
    above = set(ORDER[: ORDER.index(stem)]) | LEAVES.keys()
    assert ours(parsed(PACKAGE / f"{stem}.py")) <= above


@pytest.mark.parametrize("folder", LEAVES)
def test_leaves_lean_on_little(folder: str) -> None:
    for path in (PACKAGE / folder).glob("*.py"):
        if path.stem not in ("build", *BRIDGE):
            assert ours(parsed(path)) <= LEAVES[folder] | {folder}, path


@pytest.mark.parametrize("stem", BRIDGE)
def test_the_bridge_leans_on_what_it_needs(stem: str) -> None:
    leaves = LEAVES["suites"] | {"suites"}
    assert ours(parsed(PACKAGE / "suites" / f"{stem}.py")) <= leaves | BRIDGE[stem]


@pytest.mark.parametrize("stem", [*LIGHT, *VERBS, "__init__"])
def test_light_files_name_torch_nowhere_that_import_reaches(stem: str) -> None:
    tree = parsed(PACKAGE / f"{stem}.py")
    heavy = {name for name in imported(tree) if name.split(".")[0] in TORCH}
    assert {name.split(".")[0] for name in heavy} <= LAZY.get(stem, set())
    top = ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)],
                     [])  # fmt: skip
    assert not {name.split(".")[0] for name in imported(top)} & TORCH
    assert not ours(top) & (set(HEAVY) - set(VERBS))


@pytest.mark.slow
def test_light_files_import_no_torch() -> None:
    names = [f"lora_domains.{stem}" for stem in [*LIGHT, *VERBS, "suites", "embedded.world"]]
    code = (
        "import sys\n"
        "from importlib import import_module\n"
        f"for name in {names!r}:\n"
        "    import_module(name)\n"
        f"    assert not {TORCH!r} & sys.modules.keys(), name\n"
        "from lora_domains import Classification, Data, Domain, load_domain, LoraDomainsError\n"
        f"load_domain({str(ROOT / 'recipes' / 'medical.py')!r})\n"
        f"assert not {TORCH!r} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_and_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    # Tables of facts and sentences are data; code is held to what a reader takes in.
    tables = path.parent.name == "embedded"
    assert len(text.splitlines()) <= (1500 if tables else 600)


def test_no_file_is_called_helpers() -> None:
    assert not {p.stem for p in FILES} & {"utils", "helpers", "manager", "common", "misc"}


def test_nothing_is_swallowed() -> None:
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (
                    isinstance(node.type, ast.Name) and node.type.id == "BaseException"
                )
                silent = all(isinstance(part, ast.Pass) for part in node.body)
                assert not broad, f"{path.name}:{node.lineno}"
                assert not silent, f"{path.name}:{node.lineno}"


def test_the_public_names() -> None:
    assert sorted(lora_domains.__all__) == [
        "Classification", "Data", "Domain", "DomainModel", "Gates", "Generation", "Hub",
        "LanguageModelling", "Lora", "LoraDomainsError", "MultipleChoice", "Training",
        "load_domain", "run_recipe",
    ]  # fmt: skip
    assert set(lora_domains.__all__) < set(dir(lora_domains))
    for name in lora_domains.__all__:
        assert getattr(lora_domains, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        lora_domains.Nonsense  # noqa: B018 (the attribute access is the test)


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").exists()


def test_every_error_is_drawn_in_the_tree() -> None:
    from lora_domains import errors

    named = [
        name for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.LoraDomainsError)
    ]  # fmt: skip
    assert len(named) >= 13
    assert errors.__doc__ is not None
    assert all(f" {name}" in errors.__doc__ for name in named)
