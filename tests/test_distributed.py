"""Several processes: the same run as in one, a single writer, launches that are refused."""

import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, make_rows
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.launched import (
    curve,
    declared,
    interrupted,
    pairs,
    resumed,
    scored,
    several,
    take_part,
    variants,
)
from support.launches import fork_launch, fork_run, free_port, launch

from lora_domains import distributed
from lora_domains.adapters.folder import fingerprint
from lora_domains.domain import Domain
from lora_domains.errors import UsageError

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))


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
    interrupted(tiny_base, rows, out / "begun_alone", validating=False, resume=False)
    outputs = fork_run(2, partial(take_part, tiny_base, rows, out), out / "processes")
    seen = [json.loads((out / f"rank{n}.json").read_text()) for n in (0, 1)]
    return out, seen, "".join(output for output, _ in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "domain", "records"), [("curve", declared, 2 * 7 + 2), ("pairs", pairs, 2 * 4 + 2)]
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
def test_two_processes_train_two_domains_together_like_one_and_resume_to_the_same_bytes(
    two: tuple[Path, list[dict[str, Any]], str], tiny_base: Path, rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    out, seen, _ = two
    alone = several(tiny_base, rows, tmp_path, stop=False)
    assert seen[0]["several"] == seen[1]["several"] == seen[0]["resumed"]
    for name, losses in alone.items():
        assert seen[0]["several"][name] == pytest.approx(losses, abs=1e-4)
        assert fingerprint(out / "several" / name) == fingerprint(out / "resumed" / name)
    assert not list((out / "resumed").glob(".joint*"))


@pytest.mark.slow
def test_two_processes_train_seeds_and_a_sweep_like_one(
    two: tuple[Path, list[dict[str, Any]], str], tiny_base: Path, rows: list[dict[str, Any]],
    tmp_path: Path,
) -> None:  # fmt: skip
    _, seen, _ = two
    alone = variants(tiny_base, rows, tmp_path)
    found = seen[0]["variants"]
    assert found == seen[1]["variants"]
    assert found["left"] == alone["left"] == []
    for key, value in alone["seeds"].items():
        assert found["seeds"][key] == pytest.approx(value, abs=1e-4)
    for (settings, loss), (known, expected) in zip(found["runs"], alone["runs"], strict=True):
        assert settings == known
        assert loss == pytest.approx(expected, abs=1e-4)


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


def assert_same_adapter(folder: Path, other: Path, name: str = "spam") -> None:
    """The weights saved in both, within 1e-5."""
    path = Path(name, "adapter_model.safetensors")
    one, two = load_file(folder / path), load_file(other / path)
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_a_sharded_base_is_trained_and_scored_like_a_whole_one(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    out, seen, _ = two
    assert_same_adapter(out / "curve", out / "sharded")
    for found in seen:
        whole, parts = found["curve"], found["sharded"]["curve"]
        # The CPU's sums depend on where in memory a tensor lies.
        assert parts["steps"] == pytest.approx(whole["steps"], abs=1e-5)
        assert parts["verdict"] == whole["verdict"]
        for mine, theirs in zip(whole["items"], parts["items"], strict=True):
            for contender, scores in mine["scores"].items():
                assert theirs["scores"][contender] == pytest.approx(scores, abs=1e-5)
        assert found["sharded"]["scored"]["texts"] == found["scored"]["texts"]
        for kind in ("nats", "choices"):
            pairs = zip(found["scored"][kind], found["sharded"]["scored"][kind], strict=True)
            for mine, theirs in pairs:
                assert theirs == pytest.approx(mine, abs=1e-5)


@pytest.mark.slow
def test_a_sharded_run_resumes_to_the_same_bytes(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    out, seen, _ = two
    assert {found["sharded"]["interrupted"]["where"] for found in seen} == {"spam, epoch 2, step 2"}
    runs = ("sharded", "sharded_interrupted")
    assert len({fingerprint(out / name / "spam") for name in runs}) == 1


@pytest.mark.slow
def test_domains_trained_together_are_the_same_on_a_sharded_base(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    for name in ("spam", "chosen"):
        assert_same_adapter(two[0] / "several", two[0] / "sharded_several", name)


@pytest.mark.slow
def test_a_run_resumed_by_another_number_of_processes_agrees(
    two: tuple[Path, list[dict[str, Any]], str], tiny_base: Path, rows: list[dict[str, Any]]
) -> None:
    out, _, _ = two
    resumed(tiny_base, rows, out / "left")
    assert_same_adapter(out / "curve", out / "left")
    assert_same_adapter(out / "curve", out / "begun_alone")


@pytest.mark.slow
def test_the_main_process_writes_and_prints_and_its_errors_reach_all(
    two: tuple[Path, list[dict[str, Any]], str],
) -> None:
    out, seen, output = two
    assert sorted(p.name for p in (out / "curve").iterdir()) == [
        ".digest-key", "spam"
    ]  # fmt: skip
    assert output.count("printed once") == 1
    assert output.count("fine-tuned") == 13  # of all runs that were finished
    assert re.search(
        r"^ +1( +\d+\.\d{3,4}){6}  \S.*\(.+ left, [\d,]+ tokens/s, .+ [MG]B\)$", output, re.M
    )
    # Three runs, each in two processes.
    assert len(list(out.glob("*/.runs/spam/events.out.tfevents.*"))) == 3
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
    done = fork_launch(
        "--cpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no",
        "--dynamo_backend", "no", script,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Accelerate starts a single process" in done.stderr
    assert "--multi_gpu --num_processes 2" in done.stderr
    assert "state" not in done.stdout.split()


TOTAL = """import torch
from lora_domains import distributed
state = distributed.state()
total = distributed.summed(torch.ones(1) * (1 + state.process_index))
if distributed.is_main():
    print("total", int(total), "of", state.num_processes)
"""
"""A script that prints the sum of what its processes contribute."""


@pytest.mark.slow
def test_a_launch_on_one_machine_forms_one_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOTAL)
    done = fork_launch("--config_file", ROOT / "recipes" / "accelerate" / "ddp.yaml",
                       "--main_process_port", 0, script, OMP_NUM_THREADS="1")  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "total 3 of 2\n"), done.stderr


@pytest.mark.long
@pytest.mark.slow
def test_launches_on_two_machines_form_one_run(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOTAL)
    port = free_port()

    def started(rank: int) -> str:
        done = launch("--config_file", ROOT / "recipes" / "accelerate" / "multi_node.yaml",
                      "--machine_rank", rank, "--main_process_port", port, script)  # fmt: skip
        return done.stdout

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(started, (0, 1))) == ["", "total 3 of 2\n"]


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
        pytest.param("1", (), 1, id="asked for by the environment", marks=pytest.mark.long),
        pytest.param(
            "",
            ("--num-cpu-threads-per-process", 1),
            1,
            id="asked for by a flag",
            marks=pytest.mark.long,
        ),
        pytest.param("", (), os.cpu_count(), id="not asked for", marks=pytest.mark.long),
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
    assert arguments.multi_gpu
    text = path.read_text()
    assert "Run and tested" in text
    assert "Not run: GPUs" in text


def test_every_kind_of_launch_has_a_file() -> None:
    assert [path.stem for path in CONFIGS] == ["ddp", "multi_node", "sharded"]
