"""The shape of the package: rooms in one order, sizes a reader can take in, light imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from support.structure import (
    FILES,
    LIGHT,
    MOST_CLASS,
    MOST_FILES,
    MOST_FOLDERS,
    MOST_FUNCTION,
    MOST_LINES,
    MOST_MODULES,
    ORDER,
    PACKAGE,
    asks_the_kind,
    definitions,
    folders,
    imports_of,
    length,
    modules,
    name_of,
    out_of_order,
    parsed,
    report,
    room_of,
    rooms,
)

import lora_domains

TORCH = {"torch", "transformers", "peft", "accelerate", "evaluate", "datasets", "bitsandbytes"}
# Inside a function, and only there: rows from the Hub need `datasets`, marked templates the class
# that renders them.
LAZY = {"data/readers.py": {"datasets"}, "tokenization/chat_template.py": {"transformers"}}


def test_every_file_is_in_a_room() -> None:
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_rooms_above_it(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            wrong = out_of_order(path)
            assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_rooms_are_few_and_small() -> None:
    assert len(rooms()) <= MOST_FOLDERS
    assert len(modules()) <= MOST_MODULES
    for folder, paths in folders().items():
        assert len(paths) <= MOST_FILES, folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert ast.get_docstring(parsed(path))
    if room_of(path) != "embedded":  # its tables of facts and sentences are data
        assert length(path) <= MOST_LINES
    for definition in definitions(path):
        most = MOST_CLASS if definition.is_class else MOST_FUNCTION
        assert definition.lines <= most, f"{definition.name}: {definition.lines} lines"


def test_the_measures_are_printed() -> None:
    text, _ = report()
    assert "longest function" in text


@pytest.mark.parametrize("room", LIGHT)
def test_rooms_above_the_line_name_no_torch(room: str) -> None:
    for path in FILES:
        if room_of(path) == room:
            heavy = {name.split(".")[0] for name in imports_of(path)} & TORCH
            assert heavy <= LAZY.get(str(path.relative_to(PACKAGE)), set()), path


@pytest.mark.slow
def test_rooms_above_the_line_import_no_torch() -> None:
    light = [path for path in FILES if room_of(path) in LIGHT]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in light]
    names = [name.removesuffix(".__init__") for name in names] + ["lora_domains.cli.main"]
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


def test_nobody_outside_tasks_asks_what_kind_a_task_is() -> None:
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in FILES if room_of(path) not in ("tasks", "embedded")  # which has kinds of prose
        for line in asks_the_kind(parsed(path))
    ]  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("code", [
    "isinstance(task, Other)", "getattr(domain.task, 'labels', None)", "hasattr(own_task, 'x')",
    "type(task) is Other", "isinstance(value, tasks.Generation)", "task.kind == other",
    "kind in ('generation', 'classification')", "match task:\n case Classification(): pass",
])  # fmt: skip
def test_asking_the_kind_of_a_task_is_seen(code: str) -> None:
    assert list(asks_the_kind(ast.parse(code))) == [1 + code.count("\n")]


def test_the_public_names() -> None:
    assert sorted(lora_domains.__all__) == [
        "Chat", "Classification", "Data", "Domain", "DomainModel", "Gates", "Generation", "Hub",
        "Judge", "LanguageModelling", "Lora", "LoraDomainsError", "MultiLabel", "MultipleChoice",
        "Number", "Preference", "Training", "load_domain", "run_recipe", "run_recipes",
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


def test_float64_is_for_the_cpu() -> None:
    """Apple's Metal has none: a tensor that may be on a device goes to the CPU first."""
    on_cpu = {"inference/reference.py": 1}  # stored predictions, which lie there
    for path in FILES:
        calls = [
            node for node in ast.walk(parsed(path))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            and node.func.attr == "double"
        ]  # fmt: skip
        elsewhere = [call for call in calls if ".cpu()" not in ast.unparse(call.func)]
        assert len(elsewhere) == on_cpu.get(name_of(path), 0), path
