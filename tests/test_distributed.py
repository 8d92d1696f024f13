"""Several processes: the same run as in one, a single writer, launches that are refused."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, make_rows
from hypothesis import given
from hypothesis import strategies as st
from support.launched import curve, declared, pairs, scored

from lora_domains import distributed
from lora_domains.adapters.folder import fingerprint
from lora_domains.domain import Domain
from lora_domains.errors import UsageError

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


def launch(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OMP_NUM_THREADS", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, arguments)]
    return subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


# ── Two processes ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return make_rows(100)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path, rows: list[dict[str, Any]]
) -> tuple[Path, list[dict[str, Any]], str]:
    """(folder, the results of each of two processes, their output)."""
    out = tmp_path_factory.mktemp("two")
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = launch(
        "--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml", "--main_process_port", 0,
        ROOT / "tests" / "support" / "launched.py", tiny_base, out / "rows.jsonl", out,
        OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    seen = [json.loads((out / f"rank{n}.json").read_text()) for n in (0, 1)]
    return out, seen, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "domain", "records"), [("curve", declared, 3 * 7 + 3), ("pairs", pairs, 2 * 4 + 2)]
)
def test_two_processes_run_like_one(
    two: tuple[Path, list[dict[str, Any]], str], tiny_base: Path, rows: list[dict[str, Any]],
    tmp_path: Path, run: str, domain: Callable[[Sequence[dict[str, Any]]], Domain], records: int,
) -> None:  # fmt: skip
    _, seen, _ = two
    alone = curve(domain(rows), tiny_base, tmp_path)
    assert [found["ranks"] for found in seen] == [2, 2]
    assert (alone["world_size"], seen[0][run]["world_size"]) == (1, 2)
    assert len(alone["steps"]) == records
    for found in seen:
        assert found[run]["steps"] == pytest.approx(alone["steps"], abs=1e-4)
        for mine, theirs in zip(found[run]["history"], alone["history"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-4)
        assert found[run]["verdict"] == alone["verdict"]
    # The loss changes, or equality would prove nothing.
    assert abs(alone["steps"][0] - alone["steps"][-2]) > 0.01
    one, other = (found["items"] for found in (alone, seen[0][run]))
    assert [(i["set"], i["id"]) for i in one] == [(i["set"], i["id"]) for i in other]
    assert seen[1][run] == seen[0][run]
    for mine, theirs in zip(one, other, strict=True):
        for contender, scores in mine["scores"].items():
            assert theirs["scores"][contender] == pytest.approx(scores, abs=2e-4)


@pytest.mark.slow
def test_shared_scores_are_those_of_one_process(
    two: tuple[Path, list[dict[str, Any]], str], tiny_base: Path
) -> None:
    alone = scored(tiny_base, shared=False)
    assert len(set(map(tuple, alone["choices"]))) == 7
    assert max(alone["drift"]["kl"]) > 0.01
    for found in two[1]:
        # The same batches: the CPU's sums still depend on where in memory a tensor lies.
        for kind in ("nats", "choices"):
            for mine, theirs in zip(alone[kind], found["scored"][kind], strict=True):
                assert theirs == pytest.approx(mine, abs=1e-5)
        for name, values in alone["drift"].items():
            assert found["scored"]["drift"][name] == pytest.approx(values, abs=1e-5)
        assert found["scored"]["texts"] == alone["texts"]
    assert two[1][0]["scored"] == two[1][1]["scored"]


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_both_resume(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    out, seen, _ = two
    assert {found["interrupted"]["where"] for found in seen} == {"spam, epoch 2, step 2"}
    assert {found["validating"]["where"] for found in seen} == {"spam, after the last epoch"}
    runs = ("curve", "interrupted", "validating")
    assert len({fingerprint(out / name / "spam") for name in runs}) == 1


@pytest.mark.slow
def test_the_main_process_writes_and_prints_and_its_errors_reach_all(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    out, seen, output = two
    assert sorted(p.name for p in (out / "curve").iterdir()) == [
        ".digest-key", "spam"
    ]  # fmt: skip
    assert output.count("printed once") == 1
    assert output.count("fine-tuned") == 4  # of both curves, and of the resumed runs
    assert output.count("general nats     KL  observation") == 4
    assert re.search(
        r"^ +1( +\d+\.\d{3,4}){6}  \S.*\([\d,]+ tokens/s, .+ [MG]B, .+ left\)$", output, re.M
    )
    # Two runs, each in two processes.
    assert len(list(out.glob("*/.runs/spam/events.out.tfevents.*"))) == 2
    for found in seen:
        assert found["refused"] == "expected a disk; found none. Buy one."


# ── Shares ──────────────────────────────────────────────────────────────────────────────────────


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_every_piece_belongs_to_one_process(work: list[int], ranks: int) -> None:
    pieces = list(enumerate(work))
    found = []
    patch = pytest.MonkeyPatch()
    for rank in range(ranks):

        class Fake:
            process_index, num_processes = rank, ranks

        patch.setattr(distributed, "state", Fake)
        left: list[Any] = []
        with distributed.sharing():
            own = list(distributed.own_share(pieces, left.append))
        assert sorted(own + left) == pieces
        found += own
        assert list(distributed.own_share(pieces, left.append)) == pieces  # outside: all of it
    patch.undo()
    assert sorted(found) == pieces


# ── Launches ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_launch_that_starts_one_process_instead_of_two_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lora_domains import distributed\nprint('state', distributed.state().num_processes)\n"
    )
    done = launch("--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no",
                  "--dynamo_backend", "no", script)  # fmt: skip
    assert done.returncode != 0
    assert "Accelerate starts a single process" in done.stderr
    assert "--multi_gpu --num_processes 2" in done.stderr
    assert "state" not in done.stdout.split()


def test_processes_in_separate_groups_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert distributed.state().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 separate processes, each in a group of 1"):
        distributed.state()


@pytest.mark.parametrize(
    ("variable", "value", "text"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP is not used; on a CPU Accelerate runs plain data"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "ZeRO is not used"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision fp16 is not used"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulation steps are not used"),
    ],
)
def test_options_of_a_launch_without_effect_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, text: str
) -> None:
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)
    assert distributed.launch_warnings() == []
    monkeypatch.setenv(variable, value)
    (warning,) = distributed.launch_warnings()
    assert text in warning


@pytest.mark.slow
@pytest.mark.parametrize(
    ("threads", "flags", "cores"),
    [
        pytest.param("1", (), 1, id="asked for by the environment"),
        pytest.param("", ("--num-cpu-threads-per-process", 1), 1, id="asked for by a flag"),
        pytest.param("", (), os.cpu_count(), id="not asked for"),
    ],
)
def test_a_launch_computes_with_the_threads_it_was_told(
    tmp_path: Path, threads: str, flags: tuple[object, ...], cores: int
) -> None:
    """Accelerate sets OMP_NUM_THREADS=1 where nobody asked for it; then all cores are used."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\nfrom lora_domains import distributed\n"
        "distributed.use_cores()\nprint('threads', torch.get_num_threads())\n"
    )
    variables = {"OMP_NUM_THREADS": threads} if threads else {}
    done = launch("--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no",
                  "--dynamo_backend", "no", *flags, script, **variables)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["threads", str(cores)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_files_and_they_name_what_was_tested(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    config = load_config_from_file(str(path))
    assert config.num_processes >= 2
    parser = launch_command_parser()
    arguments, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(path), "recipes/medical.py"])
    )
    kind = {"ddp": "multi_gpu", "multi_node": "multi_gpu", "fsdp2": "use_fsdp"}
    assert getattr(arguments, kind.get(path.stem, "use_deepspeed"))
    if path.stem.startswith("zero"):
        assert arguments.zero_stage == int(path.stem[-1])
    text = path.read_text()
    assert "Not run" in text
    assert ("Run and tested" in text) == (path.stem == "ddp")


def test_every_kind_of_launch_has_a_file() -> None:
    assert [path.stem for path in CONFIGS] == ["ddp", "fsdp2", "multi_node", "zero2", "zero3"]
