"""Memory: limits of containers, and passes that keep within what is free."""

import math
from pathlib import Path

import pytest
import torch
from support.adapters import strong

from lora_domains.inference import batches, memory
from lora_domains.inference.batches import (
    LOGIT_BYTES,
    Budget,
    Size,
    cached_bytes,
    scoring_cost,
    trial_examples,
)
from lora_domains.inference.generation import generate, generate_in_batches
from lora_domains.inference.likelihoods import answer_nats, choice_logprobs, drift, text_features
from lora_domains.inference.memory import (
    PassCost,
    TensorBytes,
    allowance,
    free_bytes,
    pass_limit,
    reuse_pass_limit,
)
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import load_base
from lora_domains.tokenization.encoded import EncodedExample

CPU = torch.device("cpu")
GIB = 2**30


# ── Containers ──────────────────────────────────────────────────────────────────────────────────


def containers(patch: pytest.MonkeyPatch, root: Path, own: str, files: dict[str, str]) -> None:
    """Let this process be in the control groups ``own``, with ``files`` below their mount."""
    for name, content in {"own": own, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    patch.setattr(memory, "CGROUPS", root)
    patch.setattr(memory, "OWN_CGROUPS", root / "own")


@pytest.mark.parametrize(
    ("own", "files", "free"),
    [
        pytest.param(
            "0::/job/one\n",
            {"job/one/memory.max": "max\n", "job/one/memory.high": "max\n",
             "job/memory.max": f"{3 * GIB}\n", "job/memory.current": f"{2 * GIB}\n",
             "job/memory.stat": f"anon {GIB}\ninactive_file {GIB // 2}\nactive_file 7\n"},
            1.5 * GIB,
            id="version 2, limited by the group above",
        ),
        pytest.param(
            "0::/\n",
            {"memory.max": f"{4 * GIB}\n", "memory.high": f"{2 * GIB}\n",
             "memory.current": f"{GIB}\n", "memory.stat": "inactive_file 0\n"},
            GIB,
            id="version 2 inside a container, which is slowed down before it is killed",
        ),
        pytest.param(
            "4:memory,cpu:/docker/abc\n3:cpuset:/\n0::/\n",
            {"memory/memory.limit_in_bytes": f"{2 * GIB}\n",
             "memory/memory.usage_in_bytes": f"{GIB}\n",
             "memory/memory.stat": f"cache 9\ntotal_inactive_file {GIB // 4}\n"},
            1.25 * GIB,
            id="version 1, whose path is the host's",
        ),
        pytest.param(
            "0::/full\n",
            {"full/memory.max": f"{GIB}\n", "full/memory.current": f"{2 * GIB}\n"},
            0,
            id="more in use than allowed",
        ),
    ],
)  # fmt: skip
def test_a_container_limits_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], free: float
) -> None:
    containers(monkeypatch, tmp_path, own, files)
    assert free_bytes(CPU) == free


def test_without_a_limit_the_machine_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 5 * GIB}))
    unlimited = {"memory/memory.limit_in_bytes": "9223372036854771712\n",
                 "memory/memory.usage_in_bytes": "123\n"}  # fmt: skip
    containers(monkeypatch, tmp_path, "4:memory:/\n0::/\n", unlimited)
    assert free_bytes(CPU) == 5 * GIB
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "not Linux")
    assert free_bytes(CPU) == 5 * GIB


def test_a_pass_may_take_a_coarse_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory differs a little from run to run, which must not change the passes."""
    assert allowance(8 * GIB) == allowance(15 * GIB) == 4 * GIB
    assert allowance(16 * GIB) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert allowance(16 * GIB) == 4 * GIB
    assert allowance(0) == 1


# ── Measured memory ─────────────────────────────────────────────────────────────────────────────


def test_bytes_of_tensors_are_counted_while_they_live() -> None:
    given = torch.ones(1000)
    with TensorBytes() as counted:
        view = given[10:]  # takes nothing
        doubled = view * 2
        assert counted.now == counted.peak == 990 * 4
        doubled.add_(1)
        del doubled
        kept = given + given
        assert (counted.now, counted.peak) == (4000, 4000)
        both = torch.stack([kept, kept])
        assert counted.peak == 4000 + 8000
    del both
    assert counted.now == 4000


def test_gradients_are_counted() -> None:
    a = torch.ones(100, 100, requires_grad=True)
    with TensorBytes() as counted:
        b = (a * a).exp()
        b.sum().backward()
    assert counted.peak >= 3 * 40_000


@pytest.fixture(scope="module")
def bank(tiny_base: Path) -> Bank:
    bank = Bank(load_base(tiny_base, device="cpu"))
    bank.add(strong(bank.base, "a"))
    return bank


def tracked(bank: Bank, rows: list[EncodedExample]) -> int:
    with TensorBytes() as counted, torch.no_grad(), bank.routed("a"):
        text_features(bank.base.model, rows, bank.base.pad)
    return counted.peak


@pytest.mark.parametrize(("rows", "length"), [(2, 100), (30, 20), (7, 64)])
def test_the_memory_of_a_pass_is_known_from_a_few_tokens(
    bank: Bank, rows: int, length: int
) -> None:
    estimated = scoring_cost(bank.base.model)(rows, length, 0)
    assert tracked(bank, trial_examples(rows, length)) == pytest.approx(estimated, rel=0.15)


def test_no_scoring_takes_more_for_a_logit(bank: Bank) -> None:
    """Measured where base and adapter are held at once, with a vocabulary that outweighs all."""
    rows = [EncodedExample(f"{n}", (1,), (2,) * 99) for n in range(20)]
    logits = 20 * 99 * bank.base.vocabulary
    for score in (
        lambda: drift(bank, rows, 0, ["a", "a"]),
        lambda: answer_nats(bank.base.model, rows, 0),
    ):
        with TensorBytes() as counted:
            score()
        assert counted.peak < LOGIT_BYTES * logits * 1.2
    assert counted.peak > LOGIT_BYTES * logits * 0.2


def test_costs_are_fitted_exactly_to_what_they_describe() -> None:
    cost = PassCost(1000, 50, 3, 8)
    fitted = PassCost.measured(lambda r, n, a: round(cost(r, n, r * a * 97)), 97)
    assert vars(fitted) == pytest.approx(vars(cost), rel=1e-6)


def test_keys_and_values_are_measured(bank: Bank) -> None:
    # Two layers, two heads of width 8 for keys and for values, in float32.
    assert cached_bytes(bank.base.model) == 2 * 2 * 2 * 8 * 4


# ── Passes within it ────────────────────────────────────────────────────────────────────────────


def texts(*lengths: int) -> list[EncodedExample]:
    return [EncodedExample(f"{n}", tuple(range(3, 3 + length)), (5, 6, 2), ((7,), (8, 9)), 0)
            for n, length in enumerate(lengths)]  # fmt: skip


def test_scores_do_not_depend_on_memory_and_passes_keep_within_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = texts(*range(4, 60, 3), 90)
    found, sizes = [], []
    for free in (GIB, 2**19):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        bank = Bank(load_base(tiny_base, device="cpu"))
        bank.add(strong(bank.base, "a"))
        model, pad = bank.base.model, bank.base.pad
        scoring_cost(model), cached_bytes(model)  # measured first
        calls: list[int] = []
        model.register_forward_pre_hook(
            lambda _m, _a, kw, calls=calls: calls.append(kw["input_ids"].numel()), with_kwargs=True
        )
        with bank.routed("a"):
            nats, _ = answer_nats(model, rows, pad)
            choices = choice_logprobs(model, rows, pad)
            answers = generate_in_batches(model, bank.base.tokenizer, rows, 8)
            together = generate(model, bank.base.tokenizer, [row.prompt for row in rows],
                                max_new_tokens=8)  # fmt: skip
        found.append((nats.tolist(), [row.tolist() for row in choices], answers, together))
        sizes.append(max(calls))
        assert pass_limit(model) == free // 2
        weights = Budget(model)
        assert weights.bytes(Size(sizes[-1], 4)) < 1.3 * free // 2
    assert sizes[1] < sizes[0] / 4
    assert found[1][0] == pytest.approx(found[0][0], abs=1e-4)
    for one, other in zip(found[1][1], found[0][1], strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    assert found[1][2:] == found[0][2:]


def test_where_memory_is_ample_tokens_and_logits_decide(bank: Bank) -> None:
    budget = Budget(bank.base.model)
    assert budget.weight(Size(100, 3)) == 100
    budget.limit = budget.bytes(Size(100, 3))
    assert budget.weight(Size(100, 3)) == budget.tokens  # one fills a pass
    budget.limit, budget.vocabulary = math.inf, 600_000
    assert budget.weight(Size(101, 100)) == 100 * 600_000 * 4096 // batches.LOGITS


def test_an_earlier_limit_is_used_again_unless_it_is_no_longer_free(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_base(tiny_base, device="cpu").model
    warnings: list[str] = []
    monkeypatch.setattr(memory, "free_bytes", lambda _: 6 * GIB)
    assert pass_limit(model) == 2 * GIB
    reuse_pass_limit(model, 4 * GIB, warnings.append)  # less than is free in all
    assert pass_limit(model) == 4 * GIB
    reuse_pass_limit(model, GIB, warnings.append)
    assert (pass_limit(model), warnings) == (GIB, [])
    monkeypatch.setattr(memory, "free_bytes", lambda _: 3 * GIB)
    reuse_pass_limit(model, 4 * GIB, warnings.append)
    assert pass_limit(model) == GIB
    assert "no longer free" in warnings[0]


def test_an_accelerator_has_no_limit() -> None:
    class Model:
        device = torch.device("cuda")

    assert math.isinf(pass_limit(Model()))
