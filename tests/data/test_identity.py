"""What makes two rows the same, and the digests of rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import SPAM, examples, table

from lora_domains.data.identity import digest_key, digest_of, identity, keyed_digest, normalise
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.errors import AdapterError
from lora_domains.tasks import Example


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What is the top-up limit?", "what is the TOP UP limit", True),
        ("costs of$14", "costs of $14", True),
        ("ﬁne\u00a0print", "fine print", True),
        ("3 * 4", "3 / 4", False),
        ("C#", "C", False),
        ("if (a != b)", "if (a == b)", False),
        ("if !done", "if done", False),
        ("no!", "no?", True),
        ("par\u034fcel", "parcel", True),
        ("par\u200dcel", "parcel", True),
        ("👩\u200d👧", "👩👧", False),
        ("می\u200cخواهم", "میخواهم", False),
        ("is -5 small", "is 5 small", False),
        ("great 👍", "great 👎", False),
        ("की", "का", False),
    ],
)
def test_what_makes_two_rows_the_same(one: str, other: str, same: bool) -> None:
    a, b = examples([one, other], "t")
    assert (identity(a) == identity(b)) is same


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_normalise_is_idempotent(text: str) -> None:
    once = normalise(text)
    assert normalise(once) == once
    assert normalise(f"  {text}\n") == normalise(text)


def test_the_digest_key_is_complete_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = digest_key(tmp_path / "out")
    assert len(key) == 32
    assert digest_key(tmp_path / "out") == key
    path = tmp_path / "out" / ".digest-key"
    assert path.stat().st_mode & 0o077 == 0
    for broken in ("", "abcd", "no key at all"):
        path.write_text(broken)
        with pytest.raises(AdapterError, match="a key of 32 bytes"):
            digest_key(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_domains.atomic.os.fsync", full)
    with pytest.raises(AdapterError, match="No space left"):
        digest_key(tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_a_keyed_digest_depends_on_text_and_key() -> None:
    assert keyed_digest("a", b"k") != keyed_digest("a", b"l")
    assert keyed_digest("a", b"k") != keyed_digest("b", b"k")
    assert keyed_digest("a", b"k") == keyed_digest("a", b"k")
    assert len(keyed_digest("\ud800", b"")) == 64


@pytest.mark.parametrize("change", [{"weight": 0}, {"reasoning_content": "well"}])
def test_a_digest_depends_on_what_is_learned_of_a_chat(change: dict[str, Any]) -> None:
    turns = ({"role": "user", "content": "why"}, {"role": "assistant", "content": "so"})
    row = Example("1", "user: why\nassistant:", " so", messages=turns)
    changed = replace(row, messages=(turns[0], turns[1] | change))
    with_tools = replace(row, tools=({"name": "say"},))
    assert len({digest_of([one]) for one in (row, changed, with_tools)}) == 3
    assert digest_of([row]) == digest_of([replace(row, messages=())])


def test_digests_depend_on_rows_and_their_order() -> None:
    rows = table(60)
    parts = {"validation": table(20, start=100), "test": table(20, start=200)}
    one = prepare(SPAM, Data(rows, **parts)).digests  # type: ignore[arg-type]
    two = prepare(SPAM, Data(rows[::-1], **parts)).digests  # type: ignore[arg-type]
    assert one["train"] != two["train"]
    assert one["test"] == two["test"]
