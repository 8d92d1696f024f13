"""Scores on disk: a stopped benchmark continues, a finished one scores nothing again, and the base
is scored once for all adapters.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from lora_domains.inference.cache import (
    cache_path,
    circumstances,
    json_digest,
    keep_records,
    keeps,
    read_records,
)
from lora_domains.modeling.base import Base

PACKAGE = Path(__file__).parents[1]
ENTRIES = ("evaluation/scorer.py", "probes/lm_eval.py")
"""Files from which every file that makes a score is imported."""
NOT_SCORING = ("console", "schema.py", "report", "stats", "verdict")
"""Files and rooms that show, record or judge scores; scoring imports them but no score depends on
them."""


class Store:
    """One file for each contender and part, one line for each example."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, contender: str, part: str) -> Path:
        """The file of a contender's scores on a part; another version of the code, another file."""
        name = sha256(f"{contender} {part} {code_version()}".encode()).hexdigest()[:32]
        return self.folder / f"{name}.jsonl"

    def read(self, path: Path) -> dict[int, dict[str, float]]:
        """The stored scores by the number of their example; damaged lines are ignored."""
        if not path.exists():
            return {}
        scores = {}
        for line in path.read_bytes().splitlines():
            try:
                stored = json.loads(line)
            except (ValueError, RecursionError):
                continue
            match stored:
                case {"item": item, "score": score, "sha256": kept} if kept == json_digest(
                    path, [item, score]
                ):
                    scores[item] = score
        return scores

    def append(self, path: Path, scores: Mapping[int, dict[str, float]]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        digests = {i: json_digest(path, [i, score]) for i, score in scores.items()}
        lines = [json.dumps({"item": i, "score": score, "sha256": digests[i]}) + "\n"
                 for i, score in scores.items()]  # fmt: skip
        with path.open("a", encoding="utf-8") as file:
            # End a line that a kill cut off, so that it does not swallow the next one.
            file.write("\n" if file.tell() else "")
            file.writelines(lines)


class BaseScores:
    """The scores of a base, which all adapters on it are compared with: a file for each part in the
    cache of what it computes (``inference.cache``)."""

    def __init__(self, base: Base) -> None:
        self.base = base

    @cached_property
    def _circumstances(self) -> dict[str, Any]:
        return {**circumstances(self.base), "code": code_version()}

    def read(self, part: str, rows: int) -> list[dict[str, Any]] | None:
        """The records of all ``rows`` of the part whose digest this is; None where there are
        none."""
        if (path := self._path(part)) is None:
            return None
        records = read_records(path)
        return records if records is not None and len(records) == rows else None

    def keep(self, part: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Write ``records``, if there is room: otherwise they are computed again."""
        if (path := self._path(part)) is not None:
            keep_records(path, records)

    def _path(self, part: str) -> Path | None:
        if not keeps(self.base):
            return None
        return cache_path("scores", {**self._circumstances, "part": part}, "json")


@cache
def code_version(package: Path = PACKAGE) -> str:
    """sha256 of every file of ``package`` that scoring imports, by name and content."""
    digest = sha256()
    for path in sorted(scoring_files(package)):
        digest.update(f"{path.relative_to(package).as_posix()}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def scoring_files(package: Path = PACKAGE) -> set[Path]:
    """The files of ``package`` that ``ENTRIES`` import, directly or not, and these themselves.

    ``NOT_SCORING`` is left out, with what only these files import.
    """
    files: set[Path] = set()
    waiting = [package / name for name in ENTRIES]
    while waiting:
        path = waiting.pop()
        if path not in files and path.relative_to(package).parts[0] not in NOT_SCORING:
            files.add(path)
            waiting += _imported(path, package)
    return files


def _imported(path: Path, package: Path) -> Iterator[Path]:
    """The files of ``package`` that the file at ``path`` imports, inside functions too."""
    for node in _statements(ast.parse(path.read_bytes())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # A name imported from a package may be a module of it.
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            first, *parts = module.split(".")
            if first != PACKAGE.name:
                continue
            # Importing a module runs the ``__init__`` of each package around it.
            places = [package.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
            candidates = [place / "__init__.py" for place in places]
            candidates.append(places[-1].with_suffix(".py"))
            yield from (candidate for candidate in candidates if candidate.is_file())


def _statements(module: ast.Module) -> Iterator[ast.stmt]:
    """The statements of ``module``, nested ones too, except those under ``if TYPE_CHECKING:``."""
    waiting: list[ast.AST] = [module]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            if isinstance(node, ast.stmt):
                yield node
            if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case):
                waiting.append(node)
