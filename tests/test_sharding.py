"""A base shared out to two processes computes what it computes whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from support.architectures import make_architecture
from support.launches import launch

KINDS = ("llama", "untied", "gpt2", "bert", "deberta-v2")


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, bases: Callable[[str], Path], gpt2_base: Path
) -> list[dict[str, Any]]:
    """What each of two processes found, by kind of base."""
    out = tmp_path_factory.mktemp("sharded")
    untied = make_architecture(out / "untied", "qwen2", tie_word_embeddings=False)
    folders = {"untied": untied, "gpt2": gpt2_base}
    named = [f"{kind}={folders.get(kind) or bases(kind)}" for kind in KINDS]
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


@pytest.mark.slow
def test_a_sharded_base_computes_what_the_whole_one_does(found: list[dict[str, Any]]) -> None:
    """Logits, features, gradients and decoded texts, of other numbers of passes on each process;
    and each process holds its share of the base. One test: each worker would launch its own."""
    for seen in found:
        assert seen["threads left"] == 0  # which could abort Python at its exit
        assert {*KINDS} <= seen.keys()
        for kind in KINDS:
            assert len(seen[kind]["differences"]) >= 3
            for name, difference in seen[kind]["differences"].items():
                assert difference <= 1e-5, (kind, name)
            assert seen[kind]["digests"] == 1  # before, after, and of the whole base
            assert seen[kind]["record"]
            assert seen[kind]["resident"] <= 0.6, kind
