"""What a base is asked where no suite is named: what is at hand, as many as it can answer."""

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lora_domains.cli.recipes import suite_of
from lora_domains.data.source import Hub
from lora_domains.errors import DataError
from lora_domains.probes import standard
from lora_domains.probes.standard import at_hand
from lora_domains.probes.suite import Suite, affordable, default_suite, facts, load_suite


def base(
    *, name: str = "theirs", chats: bool = False, bidirectional: bool = False,
    device: str = "cpu", parameters: int = 1000,
) -> Any:  # fmt: skip
    """What the choice depends on."""
    tensor = torch.empty(parameters, device="meta")
    model = SimpleNamespace(parameters=lambda: [tensor])
    return SimpleNamespace(id=name, chats=chats, bidirectional=bidirectional, model=model,
                           device=SimpleNamespace(type=device))  # fmt: skip


@pytest.mark.parametrize(("given", "name"), [
    ({"name": "embedded"}, "embedded"), ({}, "facts"), ({"chats": True}, "facts+instructions"),
    ({"bidirectional": True}, "embedded"),
])  # fmt: skip
def test_a_base_is_asked_in_its_own_form(given: dict[str, Any], name: str) -> None:
    assert default_suite(base(**given)).name == name


def test_an_adapter_keeps_the_suite_of_its_last_evaluation() -> None:
    chats = base(chats=True, parameters=135_000_000)
    assert default_suite(chats, "quick").name == "quick"
    assert default_suite(chats, "embedded").name == "embedded"
    assert default_suite(chats, "my own file").name == "facts+instructions"
    again, first = (
        [example for _, _, example in default_suite(chats, before).questions()]
        for before in ("facts+instructions", None)
    )
    assert again == first
    assert len(default_suite(chats, "facts").questions()) < len(facts().questions())


def test_a_sample_depends_on_the_cost_of_a_question_and_is_told() -> None:
    suite = load_suite("facts+instructions")
    small, large = base(), base(parameters=10**10)
    accelerated = base(device="cuda", parameters=10**10)
    counts = [len(default_suite(base(chats=True, parameters=size), suite.name).questions())
              for size in (1000, 135_000_000)]  # fmt: skip
    assert counts[0] == len(suite.questions())
    assert 600 <= counts[1] < counts[0]
    assert len(affordable(facts(), large).questions()) == 300
    for fast in (small, accelerated):
        assert len(affordable(facts(), fast).questions()) == len(facts().questions())
    small = default_suite(base(chats=True, parameters=135_000_000))
    told = small.describe()
    assert told == "facts (740 of 1,319 questions), instructions (347 of 1,180 questions)"
    assert replace(small, limit=50).describe() == "facts+instructions (50 of 2,499 questions)"
    assert suite.describe() == "facts (all 1,319 questions), instructions (all 1,180 questions)"
    assert replace(suite, limit=50).describe() == "facts+instructions (50 of 2,499 questions)"


ROWS = [{"question": f"q{n}", "choices": ["a", "b"], "answer": 0, "subject": "sums"}
        for n in range(40)]  # fmt: skip


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for local files, on a machine without the Hub whose cache is empty."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(standard.FOLDER, str(tmp_path))
    monkeypatch.setattr(standard, "_hub_answers", lambda: False)
    return tmp_path


def test_standard_questions_are_taken_from_local_files(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at_hand() is None
    (offline / "gsm8k.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert at_hand() is None  # the worked examples before its questions are not there
    (offline / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    suite = at_hand()
    assert suite is not None
    assert [probe.name for probe in suite.probes] == ["mmlu"]
    assert len(suite.questions()) == 40
    assert suite.texts()[0].answer == facts().texts()[0].answer
    paragraph = "A river runs through the valley. " * 10
    (offline / "wikitext.txt").write_text(f"{paragraph}\n = Title = \n")
    (offline / "gsm8k_train.jsonl").write_text('{"question": "1 + 2?", "answer": "3"}\n' * 4)
    suite = at_hand()
    assert suite is not None
    assert [probe.name for probe in suite.probes] == ["mmlu", "gsm8k"]
    assert [text.answer for text in suite.texts()] == [paragraph.strip()]
    monkeypatch.setattr(standard, "at_hand", at_hand)
    chosen = default_suite(base(chats=True))
    assert chosen.name == "standard+instructions"
    assert {part.split("/")[0] for _, part, _ in chosen.questions()} == {
        "mmlu", "gsm8k", "instructions"
    }  # fmt: skip
    (offline / "mmlu.jsonl").write_text("[]\n")
    assert default_suite(base()).name == "facts"


def test_suites_by_name_are_what_can_be_had(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard, "at_hand", at_hand)
    with pytest.raises(DataError, match="cais/mmlu"):
        load_suite("standard").questions()
    (offline / "mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name in ("standard", "mmlu"):
        suite = load_suite(name)
        assert [probe.name for probe in suite.probes] == ["mmlu"]
        assert len(suite.questions()) == 40
        assert suite.texts()[0].answer == facts().texts()[0].answer
    (offline / "wikitext.txt").write_text("A river runs through the valley. " * 10)
    assert len(load_suite("mmlu").texts()) == 1


def test_more_questions_than_by_default_are_asked_if_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chats = base(chats=True, parameters=10**10)
    assert len(default_suite(chats).questions()) == 600
    for count in (90, 1200):
        suite = suite_of(Namespace(questions=count), cast(Any, SimpleNamespace(base=chats)), None)
        assert len(suite.questions()) == count


def test_questions_of_a_file_are_told_from_others(tmp_path: Path) -> None:
    contents = []
    for answer in (0, 1):
        rows = [row | {"answer": answer} for row in ROWS]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "own.py").write_text(
            "from lora_domains.probes.suite import load_suite\n"
            f"suite = load_suite({str(tmp_path / 'own.jsonl')!r})\n"
        )
        whole, part = (load_suite(tmp_path / "own.jsonl", limit) for limit in (None, 7))
        assert whole.content() == part.content()
        joined = load_suite(f"{tmp_path / 'own.jsonl'}+facts")
        contents += [
            *whole.content(),
            *joined.content(),
            *load_suite(tmp_path / "own.py").content(),
        ]
    assert len({*contents[:3]}) == len({*contents[3:]}) == 1
    assert contents[0] != contents[3]
    assert load_suite("facts+instructions").content() == []


def test_standard_questions_are_those_of_the_hub_or_its_cache(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (offline / "cache" / "cais___mmlu").mkdir(parents=True)
    suite = at_hand()
    assert suite is not None
    assert isinstance(suite.probes[0].rows, Hub)
    assert len(suite.probes) == 1
    monkeypatch.setattr(standard, "_hub_answers", lambda: True)
    everything = at_hand()
    assert everything is not None
    assert len(everything.probes) == 7

    def refused(self: Suite) -> None:
        raise DataError(where="mmlu", expected="a data set", found="none", hint="Go online.")

    monkeypatch.setattr(standard, "at_hand", at_hand)
    monkeypatch.setattr(Suite, "texts", refused)
    monkeypatch.setattr(Suite, "questions", lambda self: [None])
    assert default_suite(base()).name == "facts"


def test_the_hub_is_not_asked_offline_and_given_up_on_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import constants

    asked = []

    def connect(address: tuple[str, int], timeout: float) -> None:
        asked.append((address, timeout))
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not standard._hub_answers.__wrapped__()
    assert not asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert not standard._hub_answers.__wrapped__()
    assert asked[0][1] <= 5
