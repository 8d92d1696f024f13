"""The ledger of test sets: append-only, chained, shared by processes; and its rule."""

import json
import multiprocessing
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.errors import AdapterError
from lora_domains.verdict import ledger
from lora_domains.verdict.ledger import (
    HEAD,
    LEDGER,
    PriorEvaluations,
    begin_evaluation,
    end_evaluation,
    level,
    prior_evaluations,
    set_digest,
)

ITEMS = [{"set": "test", "digest": f"d{n}", "target": n % 2} for n in range(5)]


def evaluate(
    folder: Path, adapter: str, test_set: str = "rows", verdict: str = "fail"
) -> PriorEvaluations:
    prior = begin_evaluation(folder, test_set=test_set, adapter=adapter, domain="spam", rows=5)
    end_evaluation(folder, test_set=test_set, adapter=adapter, verdict=verdict)
    return prior


def test_the_rule_stays_within_its_budget_and_never_relaxes() -> None:
    spent = [1 - level(k) for k in range(10_000)]
    assert sum(spent) <= 0.05
    assert spent[:4] == pytest.approx([0.04, 0.003, 0.0015, 0.00075])
    assert all(one >= two for one, two in pairwise(spent))
    assert all(0.95 < level(k) < 1 for k in (0, 49, 10**6))


def test_each_other_adapter_evaluated_before_tightens_the_level(tmp_path: Path) -> None:
    prior = [evaluate(tmp_path, name) for name in ("a", "b", "c")]
    assert [(s.before, s.adapters) for s in prior] == [(0, 0), (1, 1), (2, 2)]
    assert [s.level for s in prior] == [level(0), level(1), level(2)]
    assert all(s.broken is None for s in prior)
    # Another test set counts by itself, and the same adapter evaluated again is not a new one.
    assert evaluate(tmp_path, "d", "others").adapters == 0
    again = evaluate(tmp_path, "b")
    assert (again.before, again.adapters, again.level) == (3, 1, level(1))
    assert prior_evaluations(tmp_path, "rows", "c").adapters == 2


def test_every_evaluation_says_who_what_and_which_verdict(tmp_path: Path) -> None:
    evaluate(tmp_path, "a", verdict="inconclusive")
    opened, settled = map(json.loads, (tmp_path / LEDGER).read_text().splitlines())
    assert opened.keys() == {"look", "at", "who", "domain", "adapter", "test_set", "rows",
                             "previous"}  # fmt: skip
    assert (opened["adapter"], opened["domain"], opened["rows"]) == ("a", "spam", 5)
    assert (settled["verdict"], settled["of"]) == ("inconclusive", 1)
    # It counts from its beginning: a process that dies before the verdict has seen the rows.
    begin_evaluation(tmp_path, test_set="rows", adapter="b", domain="spam", rows=5)
    assert evaluate(tmp_path, "c").adapters == 2


@given(st.permutations(ITEMS))
def test_a_test_set_is_known_by_its_rows_in_any_order(items: list[dict[str, object]]) -> None:
    assert set_digest(items) == set_digest(ITEMS)
    assert set_digest([*items, {"set": "general", "digest": "x", "target": 0}]) == set_digest(ITEMS)
    assert set_digest(items[1:]) != set_digest(ITEMS)
    assert set_digest([items[0] | {"target": 7}, *items[1:]]) != set_digest(ITEMS)


@pytest.mark.parametrize("line", range(6))
@pytest.mark.parametrize("kind", ["removed", "changed"])
def test_a_removed_or_changed_line_is_noticed_from_then_on(
    tmp_path: Path, line: int, kind: str
) -> None:
    for name in ("a", "b", "c"):
        evaluate(tmp_path, name)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    lines[line] = "" if kind == "removed" else lines[line].replace("fail", "pass").replace(
        '"spam"', '"ham"')  # fmt: skip
    path.write_text("".join(lines))
    assert prior_evaluations(tmp_path, "rows", "c").broken
    for name in ("d", "e"):
        assert evaluate(tmp_path, name).broken


def test_removing_the_whole_ledger_is_noticed(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    (tmp_path / LEDGER).unlink()
    assert "lines are missing" in str(evaluate(tmp_path, "b").broken)
    assert evaluate(tmp_path, "c").broken


def test_half_a_line_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"look": 2, "at": "20')
    assert evaluate(tmp_path, "b").broken is None
    # Killed between the line and its head: the head lags behind and nothing is lost.
    head = (tmp_path / HEAD).read_text()
    begin_evaluation(tmp_path, test_set="rows", adapter="c", domain="spam", rows=5)
    (tmp_path / HEAD).write_text(head)
    assert evaluate(tmp_path, "d") == PriorEvaluations("rows", 3, 3, level(3), None)


def test_garbage_in_the_ledger_or_its_head_does_not_crash(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    (tmp_path / HEAD).write_text("many lines")
    assert evaluate(tmp_path, "b").broken
    (tmp_path / LEDGER).write_bytes(b"\xff\xfe\n[1]\n")
    assert evaluate(tmp_path, "c").broken


def test_a_full_disk_is_an_error_and_nothing_is_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(tmp_path, "a")
    before = (tmp_path / LEDGER).read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lora_domains.atomic.os.fsync", full)
        with pytest.raises(AdapterError, match="No space left"):
            evaluate(tmp_path, "b")
    assert (tmp_path / LEDGER).read_bytes().startswith(before)
    assert evaluate(tmp_path, "c").broken is None


def climb(folder: Path, name: str) -> None:
    for step in range(5):
        evaluate(folder, f"{name}{step}")


def test_processes_write_one_after_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=climb, args=(tmp_path, name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    prior = evaluate(tmp_path, "last")
    assert (prior.before, prior.adapters, prior.broken) == (20, 20, None)
    assert len((tmp_path / LEDGER).read_text().splitlines()) == 2 * 21


def test_it_works_without_locks_and_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(ledger, "fcntl", None)
    monkeypatch.setattr(ledger.getpass, "getuser", nobody)
    evaluate(tmp_path, "a")
    assert '"who": "unknown"' in (tmp_path / LEDGER).read_text()
