"""Preparation from reading to splits: row counts, warnings and leaks."""

import json
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.rows import SECRET
from support.tables import SPAM, refused, table

from lora_domains.data.identity import normalise
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.domain import Domain
from lora_domains.errors import LeakError
from lora_domains.tasks import Chat, Classification, Generation, MultipleChoice


def test_embedded_rows_keep_their_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    def domain_rows(name: str, split: str) -> list[dict[str, str]]:
        assert name == "medical"
        return table(200, start={"train": 0, "validation": 300, "test": 600}[split])

    world = types.SimpleNamespace(domain_rows=domain_rows)
    monkeypatch.setitem(sys.modules, "lora_domains.embedded.world", world)
    prepared = prepare(SPAM, Data.embedded("medical"))
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (200, 200, 200)
    assert prepared.train[3].place == "embedded:medical, index 3"
    assert prepared.warnings == ()


def test_test_rows_alone_are_prepared() -> None:
    prepared = prepare(Generation(), Data(test=[{"question": "why", "answer": "so"}]))
    assert (prepared.train, prepared.validation, len(prepared.test)) == ((), (), 1)


def test_a_class_of_one_row_among_many_causes_a_warning() -> None:
    rows = [{"text": f"row {i}", "label": f"c{i % 10}"} for i in range(200)]
    rows.append({"text": "the odd one", "label": "rare"})
    prepared = prepare(Classification(), Data(rows))
    assert any("rare" in warning for warning in prepared.warnings)
    assert any(row.answer == " rare" for row in prepared.train)


def test_few_rows_cause_warnings() -> None:
    words = " ".join(prepare(SPAM, Data(table(40), test=table(12, start=60))).warnings)
    assert "training rows" in words
    assert "only 12 test rows" in words
    assert "only 4 test rows are 'spam'" in words


def test_duplicates_are_counted_and_kept() -> None:
    rows = [*table(60), {"text": "Message  NUMBER 3", "label": "ham"}]
    prepared = prepare(SPAM, Data(rows, test=table(20, start=90)))
    assert prepared.row_counts.duplicates == 1
    assert len(prepared.train) + len(prepared.validation) == 61
    assert "1 training texts have more than one label" in prepared.warnings


def test_repeated_test_rows_cause_a_warning() -> None:
    test = table(20, start=90)
    prepared = prepare(SPAM, Data(table(60), test=[*test, test[0], test[0]]))
    assert any(line.startswith("2 test rows repeat another test row") for line in prepared.warnings)
    assert prepared.row_counts.duplicates == 0


def test_exact_leaks_are_refused_with_locations_and_without_text() -> None:
    test = table(20, start=100)
    test[4]["text"] = f" {SECRET.upper()}."
    train = [*table(40), {"text": SECRET, "label": "ham"}]
    data = Data(train, validation=table(20, start=200), test=test)
    parts = ("found 1:", "train:40", "test:4", "index 40", "--drop-leaks")
    refused(lambda: prepare(SPAM, data), *parts, kind=LeakError)


def test_a_test_file_that_is_the_training_file_is_not_to_be_dropped_from_training() -> None:
    refused(lambda: prepare(SPAM, Data(table(30), test=table(30))), "Give other test rows, or none")


def test_dropped_leaks_are_counted_and_never_dropped_from_test() -> None:
    train, validation = table(40), table(20, start=200)
    test = [*table(20, start=100), train[3], validation[5], train[3]]
    prepared = prepare(SPAM, Data(train, validation, test, drop_leaks=True))
    assert (len(prepared.train), len(prepared.validation), len(prepared.test)) == (39, 19, 23)
    assert (prepared.row_counts.refused, prepared.leaks.exact) == (2, 0)
    assert "2 rows dropped" in prepared.stages[-1].what
    assert prepared.stages[-1].rows_in - prepared.stages[-1].rows_out == 2


def test_dropping_leaks_must_leave_enough_training_rows() -> None:
    data = Data(table(40), test=table(40), validation=table(20, start=90), drop_leaks=True)
    refused(lambda: prepare(SPAM, data), "train without the rows of test", "found 0 rows")


def test_importing_a_domain_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'datasets', 'pandas', 'pyarrow', 'sklearn', 'scipy', 'evaluate'}"
    code = f"import sys, lora_domains.domain; print({heavy} & set(sys.modules))"
    root = str(Path(__file__).parents[2])
    prepared = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": root}, capture_output=True, check=True
    )
    assert prepared.stdout.strip() == b"set()"


def test_public_multiple_choice_rows_are_prepared(real_data: Path) -> None:
    prepared = prepare(MultipleChoice(), Data(test=real_data / "probe_openbookqa" / "test.jsonl"))
    assert len(prepared.test) == 500


def test_each_text_is_normalised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: Counter[str] = Counter()

    def counting(text: str) -> str:
        counted[text] += 1
        return normalise(text)

    monkeypatch.setattr("lora_domains.data.identity.normalise", counting)
    test = [*table(20, start=100), *table(5)]
    prepare(SPAM, Data([*table(60), *table(3)], test=test, drop_leaks=True))
    assert len(counted) == 2 * 80  # the prompt, and the row's own text in it
    assert set(counted.values()) == {1}


def test_rows_that_fit_are_looked_up_once_for_all_near_pairs() -> None:
    words = [" ".join(f"w{n}{k}" for k in range(12)) for n in range(40)]
    rows = [{"text": text, "label": "ab"[n % 2]} for n, text in enumerate(words)]
    test = [{"text": f"{row['text']} again", "label": row["label"]} for row in rows]
    prepared = prepare(Classification(), Data(rows, test=test))
    assert prepared.leaks.near == 40
    passes = []

    class Ids(list[str]):
        def __iter__(self) -> Iterator[str]:
            passes.append(1)
            return super().__iter__()

    parts = (*prepared.train, *prepared.validation, *prepared.test)
    kept = prepared.only(Ids(row.id for row in parts if row.id != "test:3"))
    assert kept.leaks.near < 40
    assert len(passes) == 1


def test_the_repr_of_data_shows_no_row() -> None:
    data = Data([{"text": "a secret", "label": "ham"}], test="test.csv", group="patient")
    assert repr(data) == "Data(train='1 rows in memory', test='test.csv', group='patient')"
    assert "secret" not in repr(Domain("spam", Classification(), data))


ASKED = {"role": "user", "content": "why are there fewer stones than leaves"}


@pytest.mark.parametrize("messages", [
    [ASKED, {"role": "assistant", "content": [{"type": "text", "text": "so"}]}],
    [ASKED, {"role": "assistant", "content": ["so"]}],
    [ASKED, {"role": "assistant", "function_call": {"name": "say", "arguments": "{}"}}],
    [ASKED, {"role": None, "from": "gpt", "content": None, "value": "so"}],
    {"from": ["human", "gpt"], "value": [ASKED["content"], "so"]},
], ids=str)  # fmt: skip
def test_rows_of_chats_in_every_shape_are_prepared(messages: object) -> None:
    """Not only read: they are told apart, and known again as test rows."""
    rows = [
        {"messages": json.loads(json.dumps(messages).replace("stones", f"{n} stones")),
         "tools": [{"name": "say", "parameters": {}}]}
        for n in range(30)
    ]  # fmt: skip
    prepared = prepare(Chat(tools="tools"), Data(rows))
    assert len(prepared.train) + len(prepared.validation) + len(prepared.test) == 30
    assert len({texts for by_id in prepared.test_source for texts in by_id.values()}) == 30
