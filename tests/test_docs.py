"""README and docs: every block of Python runs, and every command is one that the package takes."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from lora_domains.cli.main import make_parser

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHERS = [ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
"""Pages without Python to run; their commands, flags and links are tested."""
MOST_WORDS, MOST_LINES = 1500, 200
FEWER = """
import pytest
from dataclasses import replace
from lora_domains import Data
from lora_domains.probes import suite as suites
from lora_domains.training import plan

from support.general_text import use_few_texts

use_few_texts(pytest.MonkeyPatch())
suite = replace(suites.embedded(), limit=40, text=lambda: suites.embedded_texts("test")[:20])
suites.default_suite = lambda *_: suite
plan.STEPS = 20
Data.embedded = lambda name: Data(*[f"embedded:{name}"] * 3, limit=64)
"""
"""What runs before the blocks: fewer embedded rows, questions, texts and steps, for speed."""


def blocks(page: Path) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each ``lora-domains`` command; "…" stands for flags shown elsewhere."""
    for page in [*PAGES, *OTHERS]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^ {4}lora-domains (.+)$", text, re.M):
            words = shlex.split(line, comments=True)
            yield page.name, [word for word in words if word != "…"]


def test_there_is_python_to_run() -> None:
    assert len(blocks(PAGES[0])) == 1
    assert sum(len(blocks(page)) for page in PAGES) >= 8


@pytest.mark.slow
def test_the_python_blocks_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    # README first: it trains the adapter that the other pages use.
    code = "\n".join([FEWER, *(block for page in PAGES for block in blocks(page))])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Verdict" in done.stdout
    assert "label='urgent'" in done.stdout or "label='routine'" in done.stdout
    assert (tmp_path / "adapters" / "medical" / "card.json").exists()


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_a_command_of_the_docs_is_understood(page: str, words: list[str]) -> None:
    make_parser().read(words)


def test_the_readme_is_read_in_one_sitting() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert len(text.splitlines()) <= MOST_LINES


def test_the_readme_links_every_page_and_links_lead_somewhere() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in text
    for page in [*PAGES, *OTHERS]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tree_names_every_room_of_the_package() -> None:
    tree = PAGES[0].read_text(encoding="utf-8").split("## The tree")[1]
    assert len(tree.split("\n\n")[1].splitlines()) <= 25
    for path in (ROOT / "lora_domains").iterdir():
        if path.suffix in (".py", "") and path.name[0] not in "_.":
            assert f" {path.name}{'' if path.suffix else '/'} " in tree, path.name


def test_the_make_targets_and_flags_that_are_named_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    sources = [*(ROOT / "lora_domains" / "cli").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    code = "".join(path.read_text(encoding="utf-8") for path in sources)
    elsewhere = {"--strict", "--help", "--config_file", "--multi_gpu", "--num_processes", "--cpu",
                 "--num_cpu_threads_per_process", "--no-index", "--find-links",
                 "--constraint"}  # fmt: skip
    for page in [*PAGES, *OTHERS]:
        text = page.read_text(encoding="utf-8")
        for target in set(re.findall(r"\bmake ([a-z-]+)", text)):
            assert re.search(rf"^{target}:", makefile, re.M), f"{page.name}: make {target}"
        for flag in set(re.findall(r"(?<![\w-])(--[a-z][a-z0-9_-]+)", text)) - elsewhere:
            negated = flag.replace("--no-", "--") + '", action=argparse.BooleanOptionalAction'
            assert f'"{flag}"' in code or f'"{negated}' in code, f"{page.name}: {flag}"


def test_the_scripts_and_results_of_the_benchmarks_exist() -> None:
    folder = ROOT / "benchmarks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([a-z_/]+\.py)` ", text, re.M)
    assert len(named) >= 10
    named += re.findall(r"`(results/[a-z_]+\.(?:json|svg))`", text)
    for name in named:
        assert (folder / name).is_file(), name


def test_the_readme_shows_the_table_of_the_benchmark() -> None:
    script = ROOT / "benchmarks" / "evaluation" / "domains.py"
    done = subprocess.run([sys.executable, script, "--table"], capture_output=True, text=True,
                          check=True)  # fmt: skip
    assert done.stdout.strip() in PAGES[0].read_text(encoding="utf-8")
