"""The search for leaks: exact and near rows, and rows contained in plain text."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tables import SPAM, examples

from lora_domains.data.leaks import COMMON, COVERED, WORDS, contained, find_leaks
from lora_domains.data.prepare import prepare
from lora_domains.data.source import Data
from lora_domains.errors import LeakError
from lora_domains.tasks import Classification, Example, Generation, Task


def test_planted_leaks_are_found_among_rows_made_from_a_template() -> None:
    draw = random.Random(0)
    names = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(900)]
    places = ["".join(draw.choices("klmnopqrst", k=6)) for _ in range(900)]

    def row() -> str:
        words = [draw.choice(names), draw.choice(places), draw.choice(names), draw.choice(places)]
        return (
            f"the patient {words[0]} {words[1]} was seen at the clinic in {words[2]} near "
            f"{words[3]} and denies pain since {draw.choice(names)} came {draw.choice(places)}"
        )

    train = [row() for _ in range(1000)]
    clean = [row() for _ in range(450)]
    exact = [text.upper().replace(" ", "  ") + "." for text in train[:25]]
    near = [text.replace("denies", "reports", 1) + " again" for text in train[25:50]]
    leaks = find_leaks(examples(train, "train"), examples([*clean, *exact, *near], "test"))
    assert leaks.exact == 25
    assert all(a == f"train:{int(b[5:]) - 450}" for a, b, _ in leaks.pairs if int(b[5:]) >= 450)
    false = sum(int(b[5:]) < 450 for _, b, _ in leaks.pairs)
    assert false <= 2
    assert leaks.near - false >= 18


def grams(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[n : n + WORDS]) for n in range(len(words) - WORDS + 1)}


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_near_rows_are_those_of_the_definition(seed: int) -> None:
    """Texts of few words, so that n-grams recur: in templates, in several rows, in one row."""
    draw = random.Random(seed)
    pieces = [" ".join(draw.choices("abcdef", k=draw.randint(1, 9))) for _ in range(12)]

    def texts(count: int) -> list[str]:
        made = (" ".join(draw.choices(pieces, k=draw.randint(1, 4))) for _ in range(count))
        return list(dict.fromkeys(made))

    train, other = texts(draw.randint(1, 25)), texts(draw.randint(1, 25))
    rows_with = Counter(gram for text in {*train, *other} for gram in grams(text))
    expected = {}
    for text in other:
        own = {gram for gram in grams(text) if rows_with[gram] <= COMMON}
        covered = {one: len(own & grams(one)) for one in train}
        best = max(covered.values())
        if text not in train and len(own) >= 2 and best >= COVERED * len(own):
            expected[text] = min(one for one, count in covered.items() if count == best)
    pairs = find_leaks(examples(train, "train"), examples(other, "test")).pairs
    found = {other[int(b[5:])]: train[int(a[6:])] for a, b, how in pairs if how == "near"}
    assert found == expected


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_a_text_contains_the_rows_in_it_and_no_others(seed: int) -> None:
    """A question with its answer, and a row without its template; none if one word differs."""
    draw = random.Random(seed)

    def words(count: int) -> list[str]:
        return ["".join(draw.choices("abcdefghij", k=7)) for _ in range(count)]

    probes = [
        Example(f"q:{n}", f"The {' '.join(words(draw.randint(1, 4)))} is", f" {words(1)[0]}")
        for n in range(6)
    ]
    rows = [
        Example(f"t:{n}", f"text: {' '.join(words(draw.randint(8, 20)))}\nlabel:", " yes")
        for n in range(6)
    ]
    texts = [
        Example(
            f"g:{n}", "",
            f"{' '.join(words(5))}. {probes[n].prompt.upper()}{probes[n].answer}! "
            f"{' '.join(words(9))}; {rows[n].prompt[6:-7]}, {' '.join(words(3))}",
        )
        for n in range(3)
    ]  # fmt: skip
    for kind in (probes, rows):
        assert contained(texts, kind) == [(f"g:{n}", kind[n].id) for n in range(3)]
    assert contained(texts, [replace(one, answer=" another") for one in probes]) == []
    longer = [replace(row, prompt=row.prompt.replace("\n", f" {row.id}\n")) for row in rows]
    assert contained(texts, longer) == []


@settings(max_examples=100)
@given(
    texts=st.lists(st.text("ab ", max_size=30), max_size=4),
    rows=st.lists(st.text("ab ", max_size=40), max_size=4),
)
def test_containment_agrees_with_a_naive_search(texts: list[str], rows: list[str]) -> None:
    plain = [Example(f"g:{n}", "", text) for n, text in enumerate(texts)]
    other = [Example(f"t:{n}", "", row) for n, row in enumerate(rows)]
    found = contained(plain, other)
    for text in plain:
        for row in other:
            one, two = text.answer.split(), row.answer.split()
            within = len(two) >= 8 and any(
                one[at : at + len(two)] == two for at in range(len(one) - len(two) + 1)
            )
            same = len(two) >= 3 and one == two
            assert ((text.id, row.id) in found) == (within or same)


def test_a_short_row_is_contained_in_a_text_only_if_it_is_all_of_it() -> None:
    rows = [Example(f"t:{n}", f"text: {text}\nlabel:", " ham") for n, text in
            enumerate(["Ok, see you!", "call me later today", "France", "!!!"])]  # fmt: skip
    texts = [Example(f"g:{n}", "", text) for n, text in
             enumerate(["ok see you", "please call me later today", "France", "..."])]  # fmt: skip
    assert contained(texts, rows) == [("g:0", "t:0")]


def test_the_search_is_fast_for_rows_that_begin_alike() -> None:
    """20,000 of them in 300 texts that begin so too: looked up, not compared one by one."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=6)) for _ in range(count))

    rows = [Example(f"t:{n}", "", f"The patient was admitted with {words(30)}")
            for n in range(20_000)]  # fmt: skip
    texts = [Example(f"g:{n}", "", f"The patient was admitted with {words(100)}")
             for n in range(300)]  # fmt: skip
    texts.append(replace(rows[77], id="copy"))
    assert contained(texts, rows) == [("copy", "t:77")]


def test_short_rows_are_never_near() -> None:
    train, other = examples(["z a b c d e"], "train"), examples(["a b c d e"], "test")
    assert find_leaks(train, other).near == 0


def test_repeated_rows_do_not_hide_a_near_leak() -> None:
    text = "one two three four five six seven eight nine ten"
    other = examples([text + " eleven"] * 5, "test")
    assert find_leaks(examples([text] * 9, "train"), other).near == 5


def test_rows_that_share_only_their_template_are_not_near() -> None:
    rows = [f"{i} was seen at the clinic in the morning by the same doctor {i}" for i in range(20)]
    assert find_leaks(examples(rows[:18], "train"), examples(rows[18:], "test")).near == 0


def test_an_exact_copy_counts_once_among_the_rows_with_an_n_gram() -> None:
    text = "one two three four five six seven eight nine ten"
    other = examples([text, text + " eleven", text + " twelve"], "test")
    leaks = find_leaks(examples([text], "train"), other)
    assert (leaks.exact, leaks.near) == (1, 2)


def test_the_same_question_with_other_choices_is_no_leak() -> None:
    def row(id_: str, *choices: str) -> Example:
        return Example(id_, "Which is true?", choices[0], choices, 0)

    train = [row("train:0", " a", " b"), row("train:1", " c", " d")]
    other = [row("test:0", " e", " f"), row("test:1", " d", " c")]
    assert find_leaks(train, other).pairs == (("train:1", "test:1", "exact"),)


def test_large_sets_are_searched_in_seconds() -> None:
    from time import process_time

    draw = random.Random(1)
    words = [f"w{i}" for i in range(3000)]
    texts = [" ".join(draw.choices(words, k=12)) for _ in range(13_000)]
    start = process_time()
    assert find_leaks(examples(texts[:10_000], "a"), examples(texts[10_000:], "b")).near == 0
    assert process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "task", "exact"),
    [
        ("banking77", Classification(), 25),
        ("twitter_financial_news", Classification(), 12),
        ("bitext_support", Classification(), 13),
        ("medquad", Generation(), 46),
        ("sms_spam", SPAM, 0),
    ],
)
def test_known_leaks_of_public_data_sets_are_found(
    real_data: Path, name: str, task: Task, exact: int
) -> None:
    data = Data(real_data / name / "train.jsonl", test=real_data / name / "test.jsonl")
    if exact:
        with pytest.raises(LeakError, match=f"found {exact}:"):
            prepare(task, data)
    else:
        assert prepare(task, data).leaks.exact == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rain again :)", "rain again :("), ("rain again ;-)", "rain again :-("),
        ("I <3 it", "I 3 it"), ("it grew by +5", "it grew by -5"), ("5² is known", "52 is known"),
        ("a value of 1.5 mm", "a value of 15 mm"), ("a value of 1.5 mm", "a value of 1 5 mm"),
        ("H₂O", "H2O"), ("it is ^_^ here", "it is -_- here"), ("room 12-3", "room 123"),
    ],
)  # fmt: skip
def test_rows_that_differ_in_a_sign_are_not_the_same(one: str, other: str) -> None:
    assert find_leaks(examples([one], "train"), examples([other], "test")).exact == 0


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("fish & chips here", "fish &amp; chips here"), ("one two three", "one two<br />three"),
        ("one two three", "one t\u00adwo three"), ("one two three", "one two\u200b three"),
        ("one <b>two</b> three", "one two three"), ("one two three", "<p>one two three</p>"),
        ("a −5 here now", "a -5 here now"), ("I ❤ it all", "I ❤\ufe0f it all"),
        ("caf\u00e9 au lait", "cafe\u0301 au lait"), ("caf&eacute; au lait", "café au lait"),
    ],
)  # fmt: skip
def test_nothing_hides_behind_what_no_reader_sees(one: str, other: str) -> None:
    leaks = find_leaks(examples([one], "train"), examples([other], "test"))
    assert leaks.exact + leaks.near == 1


@pytest.mark.parametrize("template", [
    None, "{text}\nlabel:", "Read this note, written by a nurse in haste, and sort it: {text}\nSo:",
])  # fmt: skip
def test_near_leaks_do_not_depend_on_the_template(template: str | None) -> None:
    draw = random.Random(0)

    def words() -> str:
        return " ".join("".join(draw.choices("abcdefgh", k=4)) for _ in range(draw.randint(3, 12)))

    train = [{"text": words(), "label": "ab"[n % 2]} for n in range(60)]
    test = [{"text": f"{train[n]['text']} {words()}", "label": "ab"[n % 2]} for n in range(30)]
    test += [{"text": words(), "label": "ab"[n % 2]} for n in range(30)]
    near = prepare(Classification(prompt=template), Data(train, test=test)).leaks.pairs
    plain = prepare(Classification(), Data(train, test=test)).leaks.pairs
    assert near == plain
    assert near
