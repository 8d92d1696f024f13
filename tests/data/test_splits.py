"""Splits and samples: sizes, proportions, whole groups and reproducibility."""

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import SECRET
from support.tables import SPAM, quick, refused, refuses, table

from lora_domains.data.identity import identity
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.source import Data
from lora_domains.data.splits import folds, together
from lora_domains.tasks import Classification, Example, MultiLabel


def everyone(prepared: Prepared) -> list[Example]:
    """The rows of all splits."""
    return [*prepared.train, *prepared.validation, *prepared.test]


@pytest.mark.parametrize(
    ("n", "validation", "test"), [(8, 1, 1), (100, 16, 20), (1000, 80, 200), (9000, 500, 1800)]
)
def test_sizes_of_the_splits(n: int, validation: int, test: int) -> None:
    prepared = prepare(SPAM, Data(table(n)))
    assert (len(prepared.validation), len(prepared.test)) == (validation, test)
    assert sorted(row.id for row in everyone(prepared)) == sorted(f"train:{i}" for i in range(n))
    if n >= 1000:
        assert len({row.id[-1] for row in prepared.test}) == 10
    for rows in (prepared.validation, prepared.test):
        spam = sum(row.answer == " spam" for row in rows)
        assert abs(spam - len(rows) / 3) <= 1


def test_given_splits_are_kept_in_order() -> None:
    prepared = prepare(SPAM, Data(table(50), table(20, start=100), table(20, start=200)))
    assert [row.id for row in prepared.validation] == [f"validation:{i}" for i in range(20)]
    assert [row.id for row in prepared.train] == [f"train:{i}" for i in range(50)]
    assert prepared.row_counts.read == 90
    assert [stage.rows_out for stage in prepared.stages] == [90] * 4


def test_splits_depend_on_the_seed_and_not_on_hash_order(tmp_path: Path) -> None:
    code = (
        "from lora_domains.data.prepare import *; from lora_domains.tasks import *\n"
        "rows = [{'text': f'a{i} b c d e f g{i % 40}', 'label': 'xy'[i % 2], 'who': str(i % 31)}"
        " for i in range(200)]\n"
        "prepared = prepare(Classification(), Data(rows, group='who', limit=90), seed=3)\n"
        "print(sorted(prepared.digests.items()), prepared.leaks, prepared.warnings)"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(outputs) == 1
    one, other = (prepare(SPAM, Data(table(100)), seed=seed).digests for seed in (0, 1))
    assert one != other


rows_with_groups = st.lists(
    st.tuples(st.integers(0, 25), st.integers(0, 12), st.sampled_from("ab")),
    min_size=12,
    max_size=80,
).filter(lambda rows: all(Counter(label for _, _, label in rows)[c] > 3 for c in "ab"))


def linked_units(rows: list[tuple[int, int, str]]) -> int:
    """How many units the rows form when shared texts and groups link them."""
    units: list[set[str]] = []
    for text, group, _ in rows:
        linked = {f"text {text}", f"group {group}"}
        apart = [unit for unit in units if not unit & linked]
        units = [*apart, linked.union(*(unit for unit in units if unit & linked))]
    return len(units)


@quick
@given(rows_with_groups, st.integers(0, 5))
def test_no_group_or_text_is_in_two_splits(rows: list[tuple[int, int, str]], seed: int) -> None:
    values = [{"text": f"No. {t}", "label": c, "who": f"p{g}"} for t, g, c in rows]
    task, data = Classification(labels=("a", "b")), Data(values, group="who")
    if linked_units(rows) < 3:  # one unit each for test and validation, one to train on
        refused(lambda: prepare(task, data, seed), "at least 3 groups")
        return
    prepared = prepare(task, data, seed)
    assert sorted(row.id for row in everyone(prepared)) == sorted(
        f"train:{i}" for i in range(len(rows))
    )
    parts = (prepared.train, prepared.validation, prepared.test)
    assert all(parts)
    for mine in ({row.group for row in part} for part in parts):
        assert sum(bool(mine & {row.group for row in part}) for part in parts) == 1
    for texts in ({identity(row) for row in part} for part in parts):
        assert sum(bool(texts & {identity(row) for row in part}) for part in parts) == 1
    assert prepared.leaks.exact == 0


def test_splits_of_whole_groups_are_near_their_size() -> None:
    rows = [row | {"who": str(i // 5)} for i, row in enumerate(table(1000))]
    prepared = prepare(SPAM, Data(rows, group="who"))
    assert abs(len(prepared.test) - 200) <= 10
    assert abs(len(prepared.validation) - 80) <= 10


def test_each_of_several_labels_is_split_in_proportion() -> None:
    # 2 % of the rows have the label "rare", always beside a frequent one; a tenth have none.
    def labels(i: int) -> list[str]:
        if i % 10 == 0:
            return []
        return ["often", *["rare"] * (i % 25 == 1)] if i % 2 else ["half"]

    rows = [{"text": f"note {i} on case {i * 7}", "labels": labels(i)} for i in range(1000)]
    prepared = prepare(MultiLabel(), Data(rows))
    names = prepared.task.labels
    assert names is not None
    for split in (prepared.train, prepared.validation, prepared.test):
        share = {n: sum(k in row.labels for row in split) for k, n in enumerate(names)}
        share["none"] = sum(not row.labels for row in split)
        whole = {n: sum(k in row.labels for row in everyone(prepared)) for k, n in enumerate(names)}
        whole["none"] = 100
        for name, count in share.items():
            assert abs(count - whole[name] * len(split) / 1000) <= 2, (name, count)
    parts = folds(everyone(prepared), 5, seed=0)
    rare = names.index("rare")
    counts = [sum(rare in everyone(prepared)[i].labels for i in part) for part in parts]
    assert counts == [4] * 5


def test_one_group_cannot_be_split() -> None:
    refuses(
        [row | {"who": SECRET} for row in table(30)],
        "at least 3 groups",
        "found 1",
        "--test",
        group="who",
    )


def test_shared_groups_are_counted() -> None:
    train = [row | {"who": str(i)} for i, row in enumerate(table(60))]
    test = [row | {"who": str(i + 50)} for i, row in enumerate(table(30, start=100))]
    prepared = prepare(SPAM, Data(train, in_other_groups(train, 200), test, group="who"))
    assert "10 groups have rows in both train and test" in prepared.warnings


def in_other_groups(rows: list[dict[str, str]], start: int) -> list[dict[str, str]]:
    """As many rows with other texts and groups."""
    return [row | {"text": f"other {start + i}", "who": f"v{i}"} for i, row in enumerate(rows)]


@pytest.mark.parametrize("limit", [2, 10, 31, 1000])
def test_limit_samples_every_class(limit: int) -> None:
    rows = sorted(table(300, spam_every=10), key=lambda row: row["label"])
    prepared = prepare(SPAM, Data(rows, test=table(50, start=500), limit=limit))
    assert len(prepared.train) == min(limit, 270)
    assert len(prepared.test) == min(limit, 50)
    assert {row.answer for row in prepared.train} == {" ham", " spam"}
    assert [row.id for row in prepared.train] != [f"train:{i}" for i in range(len(prepared.train))]
    last = prepared.stages[-1]
    assert (last.name, last.rows_out) == ("limit", len(everyone(prepared)))


def test_validation_rows_that_are_training_rows_cause_a_warning() -> None:
    prepared = prepare(SPAM, Data(table(40), table(25, start=35), table(20, start=90)))
    assert any(warning.startswith("5 validation rows") for warning in prepared.warnings)


@settings(max_examples=60)
@given(st.data())
def test_folds_hold_each_row_once_and_groups_whole(data: st.DataObject) -> None:
    count = data.draw(st.integers(10, 60))
    groups = data.draw(st.lists(st.sampled_from([None, None, "a", "b"]),
                                min_size=count, max_size=count))  # fmt: skip
    texts = [f"text {i // 2 if i < 6 else i}" for i in range(count)]
    rows = [Example(f"train:{i}", text, " a", (" a", " b"), i % 2, group)
            for i, (text, group) in enumerate(zip(texts, groups, strict=True))]  # fmt: skip
    parts = folds(rows, 3, seed=data.draw(st.integers(0, 3)))
    assert sorted(i for part in parts for i in part) == list(range(count))
    where = {i: fold for fold, part in enumerate(parts) for i in part}
    for unit in together(rows):
        assert len({where[i] for i in unit}) == 1


def test_folds_keep_the_classes_in_proportion_and_the_seed_draws() -> None:
    rows = [Example(f"train:{i}", f"text {i}", " a", (" a", " b"), int(i < 50)) for i in range(200)]
    parts = folds(rows, 5, seed=0)
    assert [len(part) for part in parts] == [40] * 5
    assert [sum(rows[i].target for i in part) for part in parts] == [10] * 5
    assert folds(rows, 5, seed=1) != parts == folds(rows, 5, seed=0)


@pytest.mark.parametrize(("rows", "few"), [(299, True), (300, False)])
def test_few_rows_are_told_of_cross_validation(rows: int, few: bool) -> None:
    warnings = prepare(SPAM, Data(table(rows))).warnings
    assert any("lora-domains cross-validate" in warning for warning in warnings) == few
