"""README's code blocks run, in order, in one process of their own; its commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_there_is_python_to_run() -> None:
    assert re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)


@pytest.mark.slow
def test_the_python_blocks_run(tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.S | re.M)
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Verdict" in done.stdout
    assert "label='urgent'" in done.stdout or "label='routine'" in done.stdout
    assert (tmp_path / "adapters" / "medical" / "card.json").exists()


def test_the_tree_names_every_room_of_the_package() -> None:
    tree = README.split("## The tree")[1]
    rooms = [path for path in (ROOT / "lora_domains").iterdir() if path.name[0] not in "_."]
    for path in rooms:
        if path.suffix in (".py", "") and path.name != "py.typed":
            assert f" {path.name}{'' if path.suffix else '/'} " in tree, path.name


def test_the_make_verbs_and_flags_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for verb in set(re.findall(r"\bmake (\w+)", README)):
        assert re.search(rf"^{verb}:", makefile, re.M), verb
    sources = (ROOT / "lora_domains" / "cli").glob("*.py")
    cli = "".join(path.read_text(encoding="utf-8") for path in sources)
    scripts = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks").rglob("*.py"))
    for flag in set(re.findall(r"(--[a-z][a-z0-9-]+)", README)):
        assert f'"{flag}"' in cli or f'"{flag}"' in scripts or flag == "--help", flag
