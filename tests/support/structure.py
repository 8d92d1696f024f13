"""Measures of the package's structure, and what they may be. Run as a script, it prints them."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "lora_domains"
FILES = sorted(PACKAGE.rglob("*.py"))

LIGHT = ["errors", "atomic", "schema", "embedded", "stats", "tasks", "tokenization", "verdict",
         "data", "domain", "report", "console"]  # fmt: skip
"""Rooms that import no torch. A room is a folder, or a module at the root."""
TORCH_ROOMS = ["distributed", "placement", "modeling", "adapters", "inference", "probes",
               "dataset", "training", "evaluation", "joint", "model", "analysis", "serving",
               "cli"]  # fmt: skip
ORDER = LIGHT + TORCH_ROOMS
"""A room imports only rooms before it, and itself."""
SIDE_BY_SIDE = {"training": {"evaluation"}, "evaluation": {"training"}}
"""Rooms of one rank: neither imports the other."""
MOST_FOLDERS, MOST_FILES, MOST_MODULES = 19, 9, 8
MOST_LINES, MOST_FUNCTION, MOST_CLASS = 400, 60, 330


def name_of(path: Path) -> str:
    """``report/card.py``."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    """``lora_domains/report/card.py`` is in ``report``, ``lora_domains/model.py`` in ``model``."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> set[str]:
    """Every module that a file imports anywhere, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names.add(node.module or "")
            if node.module == "lora_domains":
                names |= {f"lora_domains.{alias.name}" for alias in node.names}
    return names


@cache
def imports_of(path: Path) -> frozenset[str]:
    """Every module that the file imports; each file is parsed once."""
    return frozenset(imported(parsed(path)))


def rooms_imported(path: Path) -> set[str]:
    """The rooms that a file imports."""
    names = {n.split(".")[1] for n in imports_of(path) if n.startswith("lora_domains.")}
    return names & set(ORDER)


def out_of_order(path: Path) -> set[str]:
    """The rooms that a file imports and may not."""
    room = room_of(path)
    if room not in ORDER:
        return set()
    above = set(ORDER[: ORDER.index(room) + 1]) - SIDE_BY_SIDE.get(room, set())
    return rooms_imported(path) - above


@cache
def kinds_of_task() -> tuple[frozenset[str], frozenset[str]]:
    """The kinds of task that the package declares: their names, and those of their classes."""
    classes = [
        node for path in FILES for node in ast.walk(parsed(path))
        if isinstance(node, ast.ClassDef)
        and {"Task", "TextTask"} & {_last_name(base) for base in node.bases}
    ]  # fmt: skip
    names = [
        part.value.value for node in classes for part in node.body
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant)
        and _last_name(part.targets[0]) == "kind"
    ]  # fmt: skip
    return frozenset(map(str, names)), frozenset(node.name for node in classes)


def asks_the_kind(tree: ast.AST) -> Iterator[int]:
    """Lines that branch on the kind of a task, instead of using the interface ``Task``."""
    kinds, classes = kinds_of_task()
    for node in ast.walk(tree):
        match node:
            case ast.Call(ast.Name("isinstance" | "getattr" | "hasattr" | "type"), [first, *rest]):
                names = {name for part in rest for name in _names(part)}
                if _last_name(first).endswith("task") or names & classes:
                    yield node.lineno
            case ast.Compare():
                parts = [node.left, *node.comparators]
                if any((_last_name(part) == "kind" and isinstance(part, ast.Attribute)) or
                       _texts(part) & kinds for part in parts):  # fmt: skip
                    yield node.lineno
            case ast.MatchClass():
                if _names(node.cls) & classes:
                    yield node.lineno


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _names(node: ast.expr) -> set[str]:
    return {_last_name(part) for part in ast.walk(node) if isinstance(part, ast.expr)}


def _texts(node: ast.expr) -> set[object]:
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


@dataclass(frozen=True)
class Definition:
    """A function or a class and its length in lines."""

    path: Path
    name: str
    lines: int
    is_class: bool


@cache
def definitions(path: Path) -> tuple[Definition, ...]:
    return tuple(
        Definition(
            path, node.name, (node.end_lineno or node.lineno) - node.lineno + 1,
            isinstance(node, ast.ClassDef),
        )
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    )  # fmt: skip


def folders() -> dict[str, list[Path]]:
    """The files of each folder beside ``__init__.py``, whatever their kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for path in PACKAGE.rglob("*") if path.is_file()):
        in_folder = path.parent != PACKAGE and path.parent.name != "__pycache__"
        if in_folder and path.name != "__init__.py":
            found.setdefault(path.parent.relative_to(PACKAGE).as_posix(), []).append(path)
    return found


def rooms() -> list[str]:
    """The folders that hold code; ``embedded/base`` and ``report/assets`` hold files only."""
    return [name for name, paths in folders().items() if any(p.suffix == ".py" for p in paths)]


def modules() -> list[Path]:
    """The modules at the root beside ``__init__.py``."""
    return [path for path in FILES if path.parent == PACKAGE and path.name != "__init__.py"]


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def report() -> tuple[str, bool]:
    """A table of the measures, and whether each is within its limit."""
    code = [path for path in FILES if room_of(path) != "embedded"]
    longest = max(code, key=length)
    every = [definition for path in code for definition in definitions(path)]
    function = max((d for d in every if not d.is_class), key=lambda d: d.lines)
    largest = max((d for d in every if d.is_class), key=lambda d: d.lines)
    fullest = max(folders(), key=lambda name: len(folders()[name]))
    disordered = [name_of(path) for path in FILES if out_of_order(path)]
    rows = [
        ("folders of code", len(rooms()), MOST_FOLDERS, ""),
        ("modules at the root", len(modules()), MOST_MODULES, ""),
        ("most files in a folder", len(folders()[fullest]), MOST_FILES, fullest),
        ("longest file, lines", length(longest), MOST_LINES, name_of(longest)),
        ("longest function, lines", function.lines, MOST_FUNCTION,
         f"{name_of(function.path)}: {function.name}"),
        ("longest class, lines", largest.lines, MOST_CLASS,
         f"{name_of(largest.path)}: {largest.name}"),
        ("files importing against the order", len(disordered), 0, ", ".join(disordered)),
    ]  # fmt: skip
    lines = [f"{'measure':<36} {'value':>5} {'most':>5}  where"]
    lines += [f"{what:<36} {value:>5} {most:>5}  {where}" for what, value, most, where in rows]
    total = sum(map(length, code))
    lines.append(f"{len(code)} files, {total:,} lines; {len(FILES) - len(code)} files of tables")
    return "\n".join(lines), all(value <= most for _, value, most, _ in rows)


if __name__ == "__main__":
    text, within = report()
    sys.stdout.write(text + "\n")
    sys.exit(0 if within else 1)
