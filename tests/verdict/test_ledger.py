"""The ledger of evaluations: which rows are one test set, its budget, and the file."""

import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains import atomic
from lora_domains.errors import AdapterError
from lora_domains.verdict import ledger
from lora_domains.verdict.ledger import (
    HEAD,
    LEDGER,
    RowSet,
    Standing,
    Subject,
    begin_evaluation,
    digest_of_rows,
    end_evaluation,
    level,
    standing,
)


def rows(*ranges: Iterable[int], key: str | None = "k") -> RowSet:
    return RowSet((frozenset(f"r{n}" for part in ranges for n in part),), key)


ROWS = rows(range(60))


def told(
    adapter: str, declared: str | dict[str, str | int] = "gates", scored: str = ROWS.id,
    asked: str = "prompt",
) -> Subject:  # fmt: skip
    declared = {"gates": declared} if isinstance(declared, str) else declared
    return Subject(adapter, "spam", scored, declared, asked)


def evaluate(
    folder: Path, adapter: str, test: RowSet = ROWS, verdict: str = "fail", *,
    budget: int = 5, declared: str | dict[str, str | int] = "gates", scored: str | None = None,
    asked: str = "prompt",
) -> Standing:  # fmt: skip
    subject = told(adapter, declared, scored or test.id, asked)
    expected = standing(folder, test, subject, budget)
    found = begin_evaluation(folder, test, subject, budget)
    assert found == expected  # what is shown before scoring is what counts
    end_evaluation(folder, test, subject, verdict)
    return found


# ── The budget ──────────────────────────────────────────────────────────────────────────────────


def test_the_budget_spends_five_percent_in_all() -> None:
    assert level(5) == pytest.approx(0.99)
    assert level(1) == pytest.approx(0.95)
    assert all(k * (1 - level(k)) == pytest.approx(0.05) for k in (1, 2, 5, 50))


def test_every_adapter_has_the_same_level_until_the_rows_are_used_up(tmp_path: Path) -> None:
    found = [evaluate(tmp_path, f"a{n}") for n in range(7)]
    assert [one.number for one in found] == [1, 2, 3, 4, 5, 6, 7]
    assert {one.level for one in found} == {level(5)}
    assert [one.may_pass for one in found] == [True] * 5 + [False] * 2
    assert "these test rows are used up; collect a new test set" in str(found[5])
    # Another test set has a budget of its own.
    assert evaluate(tmp_path, "a6", rows(range(100, 160))).number == 1


def test_the_same_bytes_on_the_same_rows_are_charged_once(tmp_path: Path) -> None:
    for name in "abcde":
        evaluate(tmp_path, name)
    again = evaluate(tmp_path, "b")
    assert (again.number, again.may_pass) == (2, True)
    # On more rows the same bytes get another chance, so they are charged for it.
    assert evaluate(tmp_path, "b", rows(range(90))).number == 6
    # So are they on a sample of the same rows.
    assert evaluate(tmp_path, "b", scored="a sample").number == 7


def test_the_first_evaluation_of_a_test_set_fixes_its_budget(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "a", budget=2).level == level(2)
    assert [evaluate(tmp_path, name, budget=50).budget for name in "bc"] == [2, 2]
    assert not evaluate(tmp_path, "c", budget=50).may_pass


# ── The same test rows ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("later", "same"),
    [
        (rows(range(59)), True),  # one row less
        (rows(range(200)), True),  # rows were added
        (rows(range(30)), True),
        (rows(range(30, 90)), True),  # half of the rows of both
        (rows(range(31, 91)), False),
        (rows(range(29), range(100, 131)), False),
        (rows(range(30), range(100, 1000)), True),  # half of the smaller set
        (rows(range(100, 160)), False),
    ],
)
def test_sets_that_share_half_of_the_smaller_one_are_the_same(
    tmp_path: Path, later: RowSet, same: bool
) -> None:
    evaluate(tmp_path, "a")
    assert evaluate(tmp_path, "b", later).number == (2 if same else 1)


@given(st.permutations(range(12)))
def test_the_order_of_rows_says_nothing(order: list[int]) -> None:
    assert rows(order).id == rows(range(12)).id == digest_of_rows([f"r{n}" for n in order])


def test_rows_are_known_by_any_of_their_texts(tmp_path: Path) -> None:
    subject, body = rows(range(100, 160)).views[0], ROWS.views[0]
    evaluate(tmp_path, "a", ROWS)
    assert evaluate(tmp_path, "b", RowSet((subject, body), "k")).number == 2
    assert evaluate(tmp_path, "c", RowSet((subject,), "k")).number == 3
    # A text that no set had shares nothing.
    assert evaluate(tmp_path, "d", rows(range(200, 260))).number == 1


def test_evaluations_planned_together_are_numbered(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    other = rows(range(100, 160))
    planned = [(ROWS, told("b"), 5), (other, told("c"), 5), (rows(range(50)), told("d"), 5)]
    numbers = [
        standing(tmp_path, *one, before=planned[:at]).number for at, one in enumerate(planned)
    ]
    assert numbers == [2, 1, 3]
    assert len((tmp_path / LEDGER).read_text().splitlines()) == 3  # nothing was written


def test_a_set_that_joins_two_others_is_charged_to_both(tmp_path: Path) -> None:
    for n in range(3):
        evaluate(tmp_path, f"a{n}")
        evaluate(tmp_path, f"b{n}", rows(range(100, 160)))
    joined = evaluate(tmp_path, "c", rows(range(160)))
    assert (joined.number, joined.may_pass) == (7, False)
    assert evaluate(tmp_path, "d").number == 8
    # Half of its rows were evaluated, though no single set holds so many of them.
    assert evaluate(tmp_path, "e", rows(range(45, 60), range(100, 115), range(300, 330))).number > 8


# ── Gates that were changed later ───────────────────────────────────────────────────────────────


def test_changed_gates_cannot_make_an_adapter_pass(tmp_path: Path) -> None:
    assert not evaluate(tmp_path, "a", verdict="fail").post_hoc
    looser = evaluate(tmp_path, "a", declared="looser gates", verdict="pass")
    assert (looser.post_hoc, looser.declared_verdict, looser.may_pass) == (True, "fail", False)
    assert "Post hoc" in str(looser)
    assert "cannot make it pass" in str(looser)
    # Not even when they are evaluated again, nor on more rows.
    assert not evaluate(tmp_path, "a", declared="looser gates").may_pass
    assert evaluate(tmp_path, "a", rows(range(80)), declared="looser gates").post_hoc
    # The gates of the first evaluation are not post hoc, and a new adapter declares its own.
    assert evaluate(tmp_path, "a") == Standing(ROWS.id, 1, 5, level(5))
    assert not evaluate(tmp_path, "b", declared="looser gates").post_hoc


def test_what_passed_by_its_declared_gates_may_pass_by_others(tmp_path: Path) -> None:
    evaluate(tmp_path, "a", verdict="pass")
    stricter = evaluate(tmp_path, "a", declared="stricter gates")
    assert (stricter.post_hoc, stricter.may_pass) == (True, True)


def test_an_evaluation_that_was_stopped_declares_its_gates(tmp_path: Path) -> None:
    begin_evaluation(tmp_path, ROWS, told("a"), 5)
    assert not evaluate(tmp_path, "a", declared="looser gates").may_pass
    assert evaluate(tmp_path, "b").number == 2


def test_what_passed_on_a_sample_or_before_more_was_declared_cannot_pass_by_other_gates(
    tmp_path: Path,
) -> None:
    evaluate(tmp_path, "a", verdict="fail")
    evaluate(tmp_path, "a", scored="a sample", verdict="pass")
    looser = evaluate(tmp_path, "a", declared="looser gates")
    assert (looser.declared_verdict, looser.may_pass) == ("fail", False)
    assert not evaluate(tmp_path, "a", scored="another sample", declared="looser gates").may_pass
    # Other gates may pass where the declared ones passed: on the same rows, the same prompt.
    assert evaluate(tmp_path, "a", scored="a sample", declared="looser gates").may_pass
    other = {"scored": "a sample", "declared": "looser gates", "asked": "another prompt"}
    assert not evaluate(tmp_path, "a", **other).may_pass  # type: ignore[arg-type]


FULL: dict[str, str | int] = {
    "gates": "g",
    "suite": "s",
    "general questions": 700,
    "training rows": "t",
}


@pytest.mark.parametrize(
    ("later", "changed"),
    [
        ({"training rows": "others"}, "training rows"),
        ({"training rows": None}, "training rows"),
        ({"suite": "easier", "general questions": 900}, "suite"),
        ({"general questions": 699}, "general questions"),
        ({"gates": "looser", "training rows": None}, "gates, training rows"),
        ({"validation rows": "v"}, ""),
    ],
)
def test_what_is_declared_can_be_added_to_and_not_changed_or_removed(
    tmp_path: Path, later: dict[str, str | int | None], changed: str
) -> None:
    evaluate(tmp_path, "a", declared={"gates": "g"}, verdict="pass")
    added = evaluate(tmp_path, "a", declared=FULL, verdict="fail")
    assert not added.post_hoc
    now = {name: value for name, value in (FULL | later).items() if value is not None}
    found = evaluate(tmp_path, "a", declared=now)  # type: ignore[arg-type]
    assert (found.post_hoc, found.changed) == (bool(changed), changed)
    # The pass before the training rows were known counts no longer, on a sample neither.
    assert found.may_pass == (not changed)
    assert changed in str(found)
    assert evaluate(tmp_path, "a", declared={"gates": "g"}, scored="sample").may_pass is False


def test_another_prompt_and_more_questions_are_charged(tmp_path: Path) -> None:
    assert evaluate(tmp_path, "a", declared=FULL).number == 1
    assert evaluate(tmp_path, "a", declared=FULL, asked="another prompt").number == 2
    more = evaluate(tmp_path, "a", declared=FULL | {"general questions": 2000})
    assert (more.number, more.may_pass) == (3, True)
    assert evaluate(tmp_path, "b", declared=FULL).number == 4
    # The same again, and training rows added to it, are not.
    assert evaluate(tmp_path, "b", declared=FULL | {"validation rows": "v"}).number == 4
    # Nor is what cannot pass.
    assert evaluate(tmp_path, "b", declared=FULL | {"suite": "another"}).number == 4


# ── Older ledgers ───────────────────────────────────────────────────────────────────────────────


def test_lines_of_an_older_version_are_recognised(tmp_path: Path) -> None:
    previous = "0" * 64
    for entry in (
        {"test_set": "1" * 16, "rows": " ".join(sorted(*ROWS.views)), "key": "k", "budget": 2},
        {"adapter": "a", "test_set": "1" * 16, "scored": ROWS.id, "declared": "gates",
         "domain": "spam", "at": "2026-01-01T00:00:00+00:00", "who": "somebody"},
    ):  # fmt: skip
        with (tmp_path / LEDGER).open("a") as file:
            line = json.dumps(entry | {"previous": previous})
            file.write(line + "\n")
        previous = sha256(line.encode()).hexdigest()
    with (tmp_path / LEDGER).open("a") as file:
        file.write(json.dumps({"verdict": "fail", "of": previous, "previous": previous}) + "\n")
    looser = evaluate(tmp_path, "a", declared="looser gates", asked="prompt")
    assert (looser.broken, looser.declared_verdict, looser.may_pass) == (None, "fail", False)
    assert evaluate(tmp_path, "b").budget == 2
    assert evaluate(tmp_path, "c", rows(range(30, 90))).used_up


# ── The key ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", [None, "another"])
def test_a_ledger_whose_key_is_missing_recognises_nothing(tmp_path: Path, key: str | None) -> None:
    evaluate(tmp_path, "a")
    before = (tmp_path / LEDGER).read_bytes()
    found = evaluate(tmp_path, "b", replace(ROWS, key=key))
    assert (found.recognised, found.may_pass) == (False, False)
    assert "LORA_DOMAINS_KEY" in str(found)
    assert (tmp_path / LEDGER).read_bytes() == before


# ── The file ────────────────────────────────────────────────────────────────────────────────────


def test_every_evaluation_says_who_what_and_which_verdict(tmp_path: Path) -> None:
    evaluate(tmp_path, "a", verdict="inconclusive")
    known, opened, settled = map(json.loads, (tmp_path / LEDGER).read_text().splitlines())
    assert (known["test_set"], known["budget"], known["key"]) == (ROWS.id, 5, "k")
    assert [set(text.split()) for text in known["rows"]] == list(ROWS.views)
    assert opened.keys() == {"adapter", "test_set", "scored", "declared", "asked", "domain", "at",
                             "who", "previous"}  # fmt: skip
    assert (opened["adapter"], opened["domain"]) == ("a", "spam")
    assert settled["verdict"] == "inconclusive"
    # The rows are written once.
    evaluate(tmp_path, "b")
    assert (tmp_path / LEDGER).read_text().count('"rows"') == 1


@pytest.mark.parametrize("line", range(7))
@pytest.mark.parametrize("kind", ["removed", "changed"])
def test_a_removed_or_changed_line_is_noticed_from_then_on(
    tmp_path: Path, line: int, kind: str
) -> None:
    for name in ("a", "b", "c"):
        evaluate(tmp_path, name)
    path = tmp_path / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    changed = lines[line].replace("fail", "pass").replace('"spam"', '"ham"').replace("r7 ", "")
    assert changed != lines[line]
    lines[line] = "" if kind == "removed" else changed
    path.write_text("".join(lines))
    for name in ("c", "d", "e"):
        found = evaluate(tmp_path, name)
        assert found.broken
        assert not found.may_pass


def test_removing_the_whole_ledger_is_noticed(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    (tmp_path / LEDGER).write_text("")
    assert "are missing" in str(evaluate(tmp_path, "b").broken)
    assert evaluate(tmp_path, "c").broken


def test_removing_the_file_of_the_ledger_is_noticed_before_anything_is_scored(
    tmp_path: Path,
) -> None:
    evaluate(tmp_path, "a")
    (tmp_path / LEDGER).unlink()
    assert not standing(tmp_path, ROWS, told("b"), 5).may_pass
    assert "are missing" in str(evaluate(tmp_path, "b").broken)


def test_branches_are_merged_by_keeping_the_lines_of_both(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    names = (LEDGER, HEAD)
    common = {name: (tmp_path / name).read_text() for name in names}
    branches = []
    for adapters in ("bc", "d"):
        for name in names:
            (tmp_path / name).write_text(common[name])
        for adapter in adapters:
            evaluate(tmp_path, adapter)
        branches.append({name: (tmp_path / name).read_text() for name in names})
    ours, theirs = branches
    (tmp_path / LEDGER).write_text(ours[LEDGER] + theirs[LEDGER].removeprefix(common[LEDGER]))
    (tmp_path / HEAD).write_text(ours[HEAD] + theirs[HEAD])
    found = evaluate(tmp_path, "e")
    assert (found.number, found.broken) == (5, None)
    # Lines that either branch wrote cannot be removed from the end.
    lines = (tmp_path / LEDGER).read_text().splitlines(keepends=True)
    (tmp_path / LEDGER).write_text("".join(lines[:-1]))
    assert evaluate(tmp_path, "f").broken


def test_half_a_line_of_a_killed_process_is_removed(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"adapter": "b", "at": "20')
    assert evaluate(tmp_path, "b").broken is None
    # Killed between the line and its head: the head lags behind and nothing is lost.
    head = (tmp_path / HEAD).read_text()
    begin_evaluation(tmp_path, ROWS, told("c"), 5)
    (tmp_path / HEAD).write_text(head)
    assert evaluate(tmp_path, "d") == Standing(ROWS.id, 4, 5, level(5))


def test_garbage_in_the_ledger_or_its_head_does_not_crash(tmp_path: Path) -> None:
    evaluate(tmp_path, "a")
    (tmp_path / HEAD).write_bytes(b"many lines \xff")
    assert evaluate(tmp_path, "b").broken
    garbage = b'\xff\xfe\n[1]\n{"rows": 1}\n{"adapter": "a"}\n'
    garbage += b'{"test_set": "a", "rows": [1], "key": "k", "budget": 5}\n'
    (tmp_path / LEDGER).write_bytes(garbage)
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
        adapter = told(f"{name}{step}")
        begin_evaluation(folder, ROWS, adapter, 5)
        end_evaluation(folder, ROWS, adapter, "fail")


def test_processes_write_one_after_another(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=climb, args=(tmp_path, name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    last = evaluate(tmp_path, "last")
    assert (last.number, last.broken) == (21, None)
    assert len((tmp_path / LEDGER).read_text().splitlines()) == 1 + 2 * 21


def test_it_works_on_windows_and_without_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody() -> str:
        raise KeyError("uid")

    monkeypatch.setattr(atomic, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.setattr(ledger.getpass, "getuser", nobody)
    evaluate(tmp_path, "a")
    assert '"who": "unknown"' in (tmp_path / LEDGER).read_text()
