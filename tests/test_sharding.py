"""A base shared out to two processes computes what it computes whole."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.architectures import make_architecture
from support.launches import launch


def found_on(out: Path, folders: Mapping[str, Path]) -> list[dict[str, Any]]:
    """What each of two processes found, by kind of base."""
    named = [f"{kind}={folder}" for kind, folder in folders.items()]
    done = launch(
        "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml", "--main_process_port", 0,
        ROOT / "tests" / "support" / "sharded.py", out, *named, OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((out / f"rank{n}.json").read_text()) for n in (0, 1)]
    return [
        seen | {"threads left": int((out / f"threads{n}").read_text())}
        for n, seen in enumerate(ranks)
    ]


@pytest.mark.long  # test_distributed.py trains, scores and resumes on a sharded base in make test
@pytest.mark.slow
@pytest.mark.parametrize(
    "kinds", [("llama", "bert"), ("untied", "gpt2", "deberta-v2")], ids=["common", "others"]
)
def test_a_sharded_base_computes_what_the_whole_one_does(
    tmp_path: Path, bases: Callable[[str], Path], gpt2_base: Path, kinds: tuple[str, ...]
) -> None:
    """Logits, features, gradients and decoded texts, of other numbers of passes on each process;
    and each process holds its share of the base."""
    folders = {kind: bases(kind) for kind in kinds if kind not in ("untied", "gpt2")}
    if "gpt2" in kinds:
        untied = make_architecture(tmp_path / "untied", "qwen2", tie_word_embeddings=False)
        folders |= {"untied": untied, "gpt2": gpt2_base}
    for seen in found_on(tmp_path, folders):
        assert seen["threads left"] == 0  # which could abort Python at its exit
        assert {*kinds} <= seen.keys()
        for kind in kinds:
            assert len(seen[kind]["differences"]) >= 3
            for name, difference in seen[kind]["differences"].items():
                assert difference <= 1e-5, (kind, name)
            assert seen[kind]["digests"] == 1  # before, after, and of the whole base
            assert seen[kind]["record"]
            assert seen[kind]["resident"] <= 0.6, kind
