"""What several runs of one domain may differ in: seeds, and a grid of settings."""

import re
import subprocess
import sys
from typing import Any

import pytest

from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import DomainError, UsageError
from lora_domains.joint.grid import MOST_RUNS, check_variants, grid, in_words, of_grid, of_seeds
from lora_domains.tasks import Classification

SPAM = Domain("spam", Classification(), Data("rows.csv"))


def test_seeds_follow_that_of_the_domain_and_share_its_rows() -> None:
    domain = with_settings(SPAM, seed=7)
    first, second, third = of_seeds(domain, 3)
    assert first == domain
    assert [one.name for one in (second, third)] == ["spam-seed8", "spam-seed9"]
    assert [one.training.seed for one in (second, third)] == [8, 9]
    assert second.data == third.data == Data("rows.csv", seed=7)
    again = of_seeds(second, 2)[1]
    assert (again.training.seed, again.data.seed) == (9, 7)


def test_the_seed_of_the_rows_decides_their_splits() -> None:
    rows = [{"text": f"word {n}", "label": "ab"[n % 2]} for n in range(60)]
    one, two, other = (
        prepare(Classification(), Data(rows, seed=seed), training)
        for seed, training in ((None, 3), (3, 8), (None, 8))
    )
    assert one.digests == two.digests
    assert one.digests["train"] != other.digests["train"]


def test_a_long_name_has_room_for_its_end() -> None:
    long = Domain("x" * 64, Classification(), Data("rows.csv"))
    names = [one.name for one in (*of_seeds(long, 3), *of_grid(long, grid(long, {"rank": [1, 2]})))]
    assert len(set(names)) == 5
    assert names[1] == f"{'x' * 58}-seed1"


@pytest.mark.parametrize("end", ["-seed1", "__2"])
def test_a_run_that_would_have_the_name_of_its_domain_is_refused(end: str) -> None:
    domain = Domain("x" * (64 - len(end)) + end, Classification(), Data("rows.csv"))
    with pytest.raises(UsageError, match=f"found one that ends in '{end}'"):
        (of_seeds(domain, 2), of_grid(domain, [{}, {}]))


def test_the_grid_has_all_combinations() -> None:
    found = grid(SPAM, {"rank": [8, None], "training.warmup": [0.1, 0.2]})
    assert found == [
        {"lora.rank": rank, "training.warmup": warmup}
        for rank in (8, None) for warmup in (0.1, 0.2)
    ]  # fmt: skip
    assert [in_words(one) for one in found][:3:2] == [
        "rank 8, warmup 0.1", "rank derived, warmup 0.1"
    ]  # fmt: skip
    runs = of_grid(SPAM, found)
    assert [run.name for run in runs] == [f"spam__{n}" for n in (1, 2, 3, 4)]
    assert (runs[2].lora.rank, runs[3].training.warmup) == (None, 0.2)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"rnak": [1, 2]}, "found 'rnak'. Did you mean 'rank'?"),
        ({"base": ["a", "b"]}, "found 'base'. It is the same for all runs of a sweep"),
        ({"label": ["a", "b"]}, "found 'label'. It is the same for all runs of a sweep"),
        ({"gates.recall": [0.1, 0.2]}, "found 'gates.recall'"),
        ({"seed": [1, 2]}, "found 'seed'. Several seeds are trained with --seeds N"),
        ({"max-length": [64, 128]}, "found 'max-length'. It decides how the rows are read"),
        ({"rank": []}, "--sweep rank: expected its values; found none"),
        ({"rank": "8,16"}, "--sweep rank: expected its values"),
        ({"rank": [8, 8]}, "expected different values; found"),
        ({"rank": [8]}, "expected 2 to 64 runs, of all combinations of the values; found 1"),
        ({"rank": [8, 16], "lora.rank": [2, 4]}, "expected lora.rank once; found it twice"),
        ({"lr": [n / 100 for n in range(1, 10)], "rank": [*range(1, 9)]}, "found 72"),
    ],
)
def test_a_sweep_that_cannot_be_trained_is_refused(sweep: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        grid(SPAM, sweep)
    assert MOST_RUNS == 64


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(DomainError, match="setting 'rank'"):
        grid(SPAM, {"rank": [8, 5000]})


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (1, {"seeds": 1}, "--seeds: expected 2 to 16 seeds; found 1"),
        (1, {"seeds": 99}, "found 99"),
        (2, {"seeds": 3}, "--seeds: expected one domain; found 2 domains"),
        (1, {"seeds": 3, "sweep": {"rank": [1, 2]}}, "expected one of them; found both"),
        (1, {"sweep": {"lr": [0.1, 0.2]}, "lr": 0.1}, "a value of its own as well"),
        (1, {"sweep": {"lr": [0.1, 0.2]}, "training.lr": 0.1}, "a value of its own as well"),
        (1, {"sweep": {"rank": [1, 2]}, "continued": True}, "has its rank, scale and targets"),
        (2, {"together": 0}, "--together: expected at least 1; found 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    count: int, options: dict[str, Any], message: str
) -> None:
    given = {"seeds": None, "sweep": None} | options
    with pytest.raises(UsageError, match=re.escape(message)):
        check_variants([SPAM] * count, **given)


def test_the_check_needs_no_torch() -> None:
    code = "import sys, lora_domains.joint.grid; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
