"""Stored scores: which changes of the code make them unusable, and what a kill leaves behind."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lora_domains.evaluation.store import (
    ENTRIES,
    NOT_SCORING,
    PACKAGE,
    Store,
    code_version,
    scoring_files,
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's source files in a folder of their own."""
    return Path(
        shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=lambda _, names: [
            name for name in names if "." in name and not name.endswith(".py")
        ])
    )  # fmt: skip


def test_a_changed_normaliser_of_the_choice_tree_changes_the_key(copy: Path) -> None:
    before, path = code_version(copy), copy / "inference" / "choice_tree.py"
    assert before == code_version()
    text = path.read_text(encoding="utf-8")
    assert text.count("logsumexp(-1)") == 1
    path.write_text(text.replace("logsumexp(-1)", "logsumexp(-1).mul(2)"), encoding="utf-8")
    code_version.cache_clear()
    assert code_version(copy) != before


def test_the_key_covers_files_that_make_a_score_and_no_others() -> None:
    covered = {path.relative_to(PACKAGE).as_posix() for path in scoring_files()}
    assert covered >= {
        "evaluation/scorer.py", "inference/scores.py", "inference/likelihoods.py",
        "inference/choice_tree.py", "modeling/heads.py", "modeling/routing.py", "modeling/base.py",
        "tokenization/tokenization.py", "probes/lm_eval_model.py", "tasks/generation.py",
        "__init__.py",
    }  # fmt: skip
    assert not covered & {
        "report/html.py",
        "training/loop.py",
        "analysis/trace.py",
        "cli/main.py",
        "model.py",
        "console/display.py",
        "report/card.py",
        "report/terminal.py",
        "verdict/gates.py",
        "stats/intervals.py",
    }


@pytest.mark.slow
def test_every_module_that_the_scorer_loads_is_covered() -> None:
    modules = [".".join((PACKAGE.name, *Path(name).with_suffix("").parts)) for name in ENTRIES]
    code = (
        f"import sys\nfrom importlib import import_module\nfor name in {modules!r}:\n"
        "    import_module(name)\n"
        f"print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == "
        f"{PACKAGE.name!r}), sep='\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {Path(line) for line in done.stdout.splitlines()}
    assert PACKAGE / "inference" / "choice_tree.py" in loaded
    # Verdicts are loaded with the settings of a domain and with cards, and use the statistics.
    others = {path.relative_to(PACKAGE).parts[0] for path in loaded - scoring_files()}
    assert others <= {*NOT_SCORING, "stats"}


def test_a_line_that_a_kill_cut_off_is_ignored_and_ended(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path("base", "part")
    store.append(path, {0: {"nats": 1.5}})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"item": 1, "sc')
    store.append(path, {2: {"nats": 2.5}})
    assert store.read(path) == {0: {"nats": 1.5}, 2: {"nats": 2.5}}


def test_a_flipped_bit_in_a_stored_score_is_noticed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path, scores = store.path("base", "part"), {0: {"nats": 1.5}, 1: {"nats": 42.43}}
    store.append(path, scores)
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 3):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert store.read(path).items() <= scores.items()
    path.write_text('null\n3\n[1]\n{"item": [], "score": 2}\n', encoding="utf-8")
    assert store.read(path) == {}
