"""Checks of answers: each can pass and can fail, and none raises whatever it reads."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_domains.probes.checks import CHECKS, WORD, passes

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("words", {"least": 2, "most": 3}, ["a well-known cat", "it's here.", "a_b"],
     ["one", "a b c d", "…"]),
    ("sentences", {"least": 2, "most": 2}, ["It rains. I sleep!", 'He said "no." Then he left.'],
     ["It rains.", "It rains. I sleep. Good.", "It rains. I sleep. And", "It costs 3.5 euros"]),
    ("sentences", {"least": 1, "most": 1},
     ["Dr. Smith lives here.", "J. R. R. Tolkien wrote it, e.g. In Oxford.", "He met Mr. X.",
      "The U.S. Senate meets at 5 p.m. today.", "See no. 5, fig. 2, etc. there.", "1. It rains."],
     ["Is it so? No. It is not.", "Eat vitamin C. It helps.", "At 5 p.m. We sleep.",
      "It was I. Bob knew.", "Go to the U.S. They sleep."]),
    ("sentences", {"least": 1, "most": 1}, ["**It rains.**", "It rains. 🌧"], ["It rains. 🌧 And"]),
    ("json_object", {"keys": {"title": "string"}},
     ['{"title": "the “staff of life”"}', '{"title": "it’s"}'], ["{“title”: “Bread”}"]),
    ("sentences", {"least": 2}, ["It rains. I sleep. And then", "A. B. C."], ["It rains", "A."]),
    ("comma_list", {"count": 3}, ["sail, anchor, wave", "red, dark blue, green."],
     ["sail, anchor", "sail, anchor, ", "sail, anchor,\nwave", "a list of three words, b, c",
      "sail anchor wave"]),
    ("varied", {"share": 0.5}, ["one two three", "a a b b"], ["a a a a b", "the The the"]),
    ("bullets", {"least": 2, "most": 2}, ["- one\n- two", "Two:\n* one\n\n* two", "• a\n• b"],
     ["- one", "- one\n- two\n- three", "1. one\n2. two", "one\n- two", "-one\n-two", "Here:"]),
    ("numbered", {"least": 2, "most": 3}, ["1. one\n2. two", "Facts:\n1) a\n2) b\n3) c"],
     ["1. one", "1. one\n3. two", "2. one\n3. two", "- one\n- two", "1. one\nand\n2. two"]),
    ("upper", {}, ["RAIN FALLS, 3 TIMES."], ["RAIN falls", "3."]),
    ("lower", {}, ["rain falls on b 3"], ["Rain falls", "3"]),
    ("colon", {}, ["Bread: it is baked.", "The old mill: a story"],
     ["Bread is baked", "Bread:", "This is a much longer beginning: no", ": x"]),
    ("quoted", {}, ['"It rains."', "“It rains.”"], ["It rains.", '"It" and "rains"', '"It', '""']),
    ("tagged", {"tag": "note"}, ["<note>It rains.</note>", "<note>\na\n</note>"],
     ["It rains.", "<note>It rains.", "So: <note>a</note>", "<note> </note>",
      "<note><note>a</note></note>"]),
    ("one_line", {}, ["one line"], ["two\nlines"]),
    ("json_object", {"keys": {"name": "string", "age": "number"}, "values": {"name": "Ann"}},
     ['{"name": "ann", "age": 3}', '```json\n{"name": "Ann", "age": 1.0}\n```',
      '{\n "age": 0, "name": "Ann"}'],
     ['{"name": "Ann"}', '{"name": "Ann", "age": "3"}', '{"name": "Ben", "age": 3}',
      '{"name": "Ann", "age": true}', '{"name": "Ann", "age": 3, "x": 1}', '["Ann", 3]',
      'So: {"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3,}', '{"name": "Ann", "age": NaN}',
      "{'name': 'Ann', 'age': 3}"]),
    ("json_object", {"keys": {"true": "boolean"}}, ['{"true": false}'],
     ['{"true": 0}', '{"true": "false"}', "{}"]),
    ("json_object", {"keys": {"a": "number"}, "inside": True},
     ['{"a": 1}', 'Here it is:\n```json\n{"a": 1}\n```\nIt has a key.', 'So {"a": 1} it is'],
     ['{"a": 1', "{a: 1}", "nothing", '["a"]', '{"b": 2} {"a": 1}', '[{"a": 1}]', '[x {"a": 1}']),
    ("json_object", {"keys": {"a": "number"}, "inside": True},
     ['Here [as asked]: {"a": 1}', 'Here [1]: {"a": 1} {of course}'], ["[as asked] {a}"]),
    ("json_array", {"count": 2, "kind": "number", "inside": True},
     ["As {asked}: [1, 2]", "[a list]\n[1, 2]"], ['{"a": [1, 2]}', "[1] [1, 2]", "[[1, 2]"]),
    ("json_array", {"count": 2, "kind": "string"}, ['["a", "b"]', '```\n["a", "b"]\n```'],
     ['["a"]', '["a", "A "]', '["a", 2]', '["a", ""]', '{"a": "b"}', "a, b", "[" * 5000]),
    ("includes", {"words": ["stone", "river"]}, ["Stones in a river", "RIVER. Stone"],
     ["stone", "stony rivers", "riverstone"]),
    ("includes", {"words": ["go"], "times": 2}, ["go, go"], ["go"]),
    ("avoids", {"words": ["the"]}, ["There is bread.", "other"], ["In the sea", "THE end"]),
    ("starts", {"text": "In my opinion"}, ["In my opinion, yes", '"in my opinion" it is'],
     ["Yes, in my opinion", "In my opinions"]),
    ("ends", {"text": "STOP"}, ["Yes. STOP", "yes stop."], ["STOP now", "STOP?"]),
    ("ends", {"text": "?"}, ["Why?", 'He asks "why?"'], ["Why", "Why? No."]),
    ("one_of", {"choices": ["a river", "mountain"]}, ["River.", "the mountain", '"Mountain"'],
     ["It is a river", "river or mountain", "hill"]),
    ("names_one", {"choices": ["true", "false"]}, ["True.", "It is false, false!"],
     ["neither", "true or false", "untrue"]),
    ("says", {"phrases": ["there is no", "did not"], "first": True},
     ["I think there is no king.", "He DID NOT."],
     ["The king is Bob. There is no other.", "The king\nThere is no king"]),
    ("says", {"phrases": ["is no doctor"], "first": True}, ["Dr. Bob is no doctor."],
     ["It is. Bob is no doctor."]),
    ("says_none", {"phrases": ["i can't"]}, ["Boil it."], ["I can’t help.", "Sorry, I CAN'T"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "right", "wrong"), CASES)
def test_a_check_tells_right_answers_from_wrong_ones(
    name: str, arguments: dict[str, Any], right: list[str], wrong: list[str]
) -> None:
    for answer in right:
        assert passes(answer, [(name, arguments)]), answer
    for answer in wrong:
        assert not passes(answer, [(name, arguments)]), answer


def test_every_check_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)


def test_all_checks_must_hold_and_nothing_passes_none() -> None:
    assert passes("two words", [])
    assert passes("two words", [("words", {"least": 2}), ("lower", {})])
    assert not passes("Two words", [("words", {"least": 2}), ("lower", {})])
    assert not passes(" \n", [])


@given(st.text(), st.sampled_from(CASES))
def test_a_check_decides_on_any_text(
    answer: str, case: tuple[str, dict[str, Any], Any, Any]
) -> None:
    assert passes(answer, [case[:2]]) in (True, False)


WORDS = st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=8)


@given(st.lists(WORDS, min_size=1, max_size=12))
def test_words_and_lists_are_counted(found: list[str]) -> None:
    n = len(found)
    assert passes(" ".join(found), [("words", {"least": n, "most": n})])
    assert passes("\n".join(f"- {word}" for word in found), [("bullets", {"least": n, "most": n})])
    lines = "\n".join(f"{i}. {word}" for i, word in enumerate(found, 1))
    assert passes(lines, [("numbered", {"least": n, "most": n})])
    assert passes(", ".join(found), [("comma_list", {"count": n})])
    assert passes(" ".join(f"{word.title()}ing." for word in found),
                  [("sentences", {"least": n, "most": n})])  # fmt: skip


@given(st.lists(WORDS, min_size=1, max_size=6), WORDS)
def test_a_word_is_either_included_or_avoided(found: list[str], word: str) -> None:
    answer = " ".join(found)
    included = passes(answer, [("includes", {"words": [word]})])
    assert included != passes(answer, [("avoids", {"words": [word]})])
    assert not included or any(one.startswith(word) for one in WORD.findall(answer))
