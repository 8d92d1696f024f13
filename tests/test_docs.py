"""README and docs: blocks of Python run; commands run, or are understood by what they start.

What only trains for minutes, or needs a network, is read by the parser that would read it.
"""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from support.commands import fork

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


PROGRAMS = {
    "accelerate", "benchmarks/gpu.sh", "cat", "curl", "echo", "export", "for", "hf", "lora-domains",
    "lora/bin/lora-domains", "lora/bin/pip", "make", "mkdir", "pip", "python", "python3.11",
    "serve",
}  # fmt: skip
"""What a line of a shell block begins with."""
RUN = ("first-five-minutes.md", "own-data.md")
"""Pages whose commands run in the order of the page, on a part of their rows. Those of other pages
stand for the reader's own files and adapters: the parser reads them."""
PARSED = {
    "cross-validate": "trains an adapter for each fold (tests/analysis/test_cross_validation.py)",
    "learning-curve": "trains several adapters (tests/analysis/test_learning_curve.py)",
    "playground": "runs until it is stopped (tests/serving/test_playground.py)",
}
"""Verbs on these pages that do not run here, and why."""


def shell_blocks(page: Path) -> list[str]:
    """The blocks of a page that hold commands: indented by four spaces, or fenced as ``sh``."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.S | re.M)
    plain = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    indented = re.findall(r"(?:^\n|\A)((?:^ {4}.*\n)+)", plain, re.M)
    return fenced + [re.sub(r"^ {4}", "", block, flags=re.M) for block in indented]


def lines_of(block: str) -> list[str]:
    """The commands of a block, continued lines joined, comments and redirections left out."""
    joined = block.replace("\\\n", " ").splitlines()
    parts = [re.split(r" [|<]| >>? | && ", line) for line in joined if line.strip()]
    return [
        part.strip() for line in parts for part in line if part.strip().split(" ")[0] in PROGRAMS
    ]


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, words) of each ``lora-domains`` command; "…" stands for flags shown elsewhere."""
    for page in [*PAGES, *OTHERS]:
        for block in shell_blocks(page):
            for line in lines_of(block):
                program, *words = shlex.split(line, comments=True)
                if program.endswith("lora-domains"):
                    yield page.name, [word for word in words if word != "…"]


def run_in_docs(code: str, folder: Path) -> tuple[int, str, str]:
    """The exit code, output and errors of ``code`` in a process of its own in ``folder``, which
    has the tables that the pages give to readers."""
    for table in (ROOT / "docs" / "assets").glob("*.csv"):
        lines = table.read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / table.name).write_text("".join(lines[:100]), encoding="utf-8")
    return fork(lambda: exec(code, {"__name__": "__main__"}), folder).ended()


def test_there_is_python_to_run() -> None:
    assert len(blocks(PAGES[0])) == 1
    assert sum(len(blocks(page)) for page in PAGES) >= 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "rows"), [(1, 32), pytest.param(len(PAGES), 64, marks=pytest.mark.long)]
)
def test_the_python_blocks_run(tmp_path: Path, count: int, rows: int) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    fewer = FEWER.replace("limit=64", f"limit={rows}")
    # README first: it trains the adapter that the other pages use.
    code = "\n".join([fewer, *(block for page in PAGES[:count] for block in blocks(page))])
    exit_code, output, errors = run_in_docs(code, tmp_path)
    assert exit_code == 0, errors
    assert "Verdict" in output
    assert "label='urgent'" in output or "label='routine'" in output
    assert (tmp_path / "adapters" / "medical" / "card.json").exists()


@pytest.mark.parametrize(("page", "words"), list(commands()))
def test_a_command_of_the_docs_is_understood(page: str, words: list[str]) -> None:
    make_parser().read(words)


@pytest.mark.long
def test_the_commands_of_the_first_pages_run(tmp_path: Path) -> None:
    shown = [words for name in RUN for page, words in commands() if page == name]
    assert {words[0] for words in shown} > PARSED.keys()
    code = [FEWER, "from lora_domains.cli.main import main\nimport sys"]
    for words in shown:
        if words[0] in PARSED:
            continue
        quick = ["--epochs", "1", "--questions", "40"] if words[0] == "fit" else []
        call = [*words, *quick]
        code.append(f"""
try:
    main({call!r})
except SystemExit as left:
    # A verdict of pass, fail or inconclusive; an error is 2.
    assert left.code in {(0, 1, 3) if words[0] == "fit" else (0,)}, ({call!r}, left.code)
""")
    exit_code, output, errors = run_in_docs("\n".join(code), tmp_path)
    assert exit_code == 0, errors + output
    assert "inconclusive" in output
    answers = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert answers[0].startswith("patient,sex,site,note,prediction,probability")
    assert len(answers) == 21


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=lambda page: page.name)
def test_every_shell_block_is_understood_by_the_shell(page: Path) -> None:
    blocks_of_page = shell_blocks(page)
    for block in blocks_of_page:
        if block.startswith("lora_domains/\n"):  # README's tree
            continue
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, f"{block}: {done.stderr}"
        for line in block.replace("\\\n", " ").splitlines():
            assert not line.strip() or line.split(" ")[0] in PROGRAMS, f"{page.name}: {line}"


def test_every_launched_recipe_takes_its_flags() -> None:
    from accelerate.commands.launch import launch_command_parser

    from lora_domains.cli.flags import add_run_flags
    from lora_domains.cli.parser import Parser

    launched = [line for page in [*PAGES, *OTHERS] for block in shell_blocks(page)
                for line in lines_of(block) if line.startswith("accelerate ")]  # fmt: skip
    assert len(launched) >= 3
    for line in launched:
        flags = launch_command_parser().parse_args(shlex.split(line, comments=True)[2:])
        assert (ROOT / flags.training_script).is_file(), line
        if flags.config_file is not None:
            assert (ROOT / flags.config_file).is_file(), line
        recipe = Parser()
        add_run_flags(recipe)
        recipe.read(flags.training_script_args)


def test_what_is_made_and_installed_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    seen = 0
    for page in [*PAGES, *OTHERS]:
        for line in (line for block in shell_blocks(page) for line in lines_of(block)):
            program, *words = shlex.split(line, comments=True)
            if program == "make":
                done = subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=False,
                                      capture_output=True, text=True)  # fmt: skip
                assert done.returncode == 0, done.stderr
            elif program.endswith("pip"):
                for extra in re.findall(r"\[([a-z,]+)\]", line):
                    assert {*extra.split(",")} <= project["optional-dependencies"].keys(), line
            elif program == "python" and words[0].endswith(".py"):
                # Scripts of benchmarks run for hours; that they take their flags is tested below.
                assert (ROOT / words[0].replace("$name", "swap")).is_file(), line
            seen += 1
    assert seen > 50


def test_the_readme_is_read_in_one_sitting() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert len(text.split()) <= MOST_WORDS
    assert len(text.splitlines()) <= MOST_LINES


def test_the_site_has_every_page_and_links_lead_somewhere() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    for page in PAGES[1:]:
        assert re.search(rf"[ :] ?{page.name}$", nav, re.M), f"add {page.name} to mkdocs.yml"
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
                 "--constraint", "--local-dir", "--lora"}  # fmt: skip
    for page in [*PAGES, *OTHERS]:
        text = page.read_text(encoding="utf-8")
        # In code: a sentence may "make room".
        for target in set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.M)):
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
