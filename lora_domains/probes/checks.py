"""Checks of answers: whether a text has the length, the form or the words that were asked for.

A check is a pure function of an answer and its arguments, which are JSON, so that a prompt can name
its checks. An answer passes when all of its checks hold. Case never matters unless it is what is
checked; typographic quotes and dashes count as plain ones. Imports no torch.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = tuple[str, Mapping[str, Any]]
"""The name of a check and its arguments."""
CHECKS: dict[str, Callable[..., bool]] = {}
"""By name; the first argument of each is the answer."""
TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str, "number": (int, float), "boolean": bool, "array": list
}  # fmt: skip
PLAIN = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "–": "-", "—": "-", "•": "-"})
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
END = re.compile(r"[.!?]+[\"')*_]*(?=\s|$)")
FIRST = (
    "(?:The|An?|It|Its|This|That|These|Those|There|They|He|She|We|You|I|In|On|At|As|For|But|And|So"
    r"|If|When|Then|However|Because)\b"
)
"""Words that begin sentences, and are no names."""
WITHIN = re.compile(
    rf"""
    \b(?:dr|mr|mrs|ms|prof|st|mt|vs|cf|approx|e\.g|i\.e)\.(?=\s)
    | \b(?:no|fig|vol|pp?)\.(?=\s+\d)
    | \b(?:etc|inc|ltd|corp|co|jr|sr|a\.m|p\.m)\.(?=\s+(?-i:[a-z]))
    | (?-i: \b[A-HJ-Z]\.(?=\s+(?:[A-Z]\.\s+)*(?!{FIRST})[A-Z]\w))
    | (?-i: \b[A-Z](?:\.[A-Z])+\.(?=\s+(?!{FIRST})\w))
    | ^[^\S\n]*\d\d?\.(?=\s)
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
"""Full stops that end no sentence: of usual abbreviations, of initials before a name ("J. R. R.
Tolkien", "the U.S. Senate"), and of numbers of a list."""
BRACKET, ENCLOSED = re.compile(r"[{\[]"), re.compile(r"[{\[][^{}\[\]]*[}\]]")
BULLET, NUMBER = re.compile(r"\s*[-*]\s+\S"), re.compile(r"\s*(\d+)[.)]\s+\S")
FENCE = re.compile(r"\A```(?:json|JSON)?\s*\n(.*?)\n?```\Z", re.DOTALL)


def passes(answer: str, checks: Sequence[Check]) -> bool:
    """Whether ``answer`` passes all ``checks``; an empty one passes none."""
    written = answer.strip()
    text = written.translate(PLAIN)
    # JSON has plain quotes around its texts, and any within them.
    given = {name: written if name.startswith("json") else text for name, _ in checks}
    return bool(text) and all(CHECKS[name](given[name], **more) for name, more in checks)


def _check(function: Callable[..., bool]) -> Callable[..., bool]:
    CHECKS[function.__name__] = function
    return function


def _within(count: int, least: int, most: int | None) -> bool:
    return least <= count and (most is None or count <= most)


# ── Length ──────────────────────────────────────────────────────────────────────────────────────


@_check
def words(answer: str, least: int = 1, most: int | None = None) -> bool:
    """Between ``least`` and ``most`` words."""
    return _within(len(WORD.findall(answer)), least, most)


@_check
def sentences(answer: str, least: int = 1, most: int | None = None) -> bool:
    """At least ``least`` sentences; with ``most`` not more than these, the last one finished."""
    ends = _ends(answer)
    finished = bool(ends) and not WORD.search(answer, ends[-1])  # a picture may follow
    return _within(len(ends), least, most) and (finished or most is None)


def _ends(answer: str) -> list[int]:
    """Where the sentences end."""
    within = {stop.end() for stop in WITHIN.finditer(answer)}
    return [end.end() for end in END.finditer(answer) if end.end() not in within]


@_check
def comma_list(answer: str, count: int) -> bool:
    """``count`` entries on one line, separated by commas, each of at most three words."""
    entries = [entry.strip(" .") for entry in answer.split(",")]
    short = all(1 <= len(WORD.findall(entry)) <= 3 for entry in entries)
    return len(entries) == count and short and "\n" not in answer


@_check
def varied(answer: str, share: float = 0.4) -> bool:
    """At least ``share`` of the words are different ones: it does not repeat itself."""
    found = [word.lower() for word in WORD.findall(answer)]
    return len(set(found)) >= share * len(found)


# ── Form ────────────────────────────────────────────────────────────────────────────────────────


@_check
def bullets(answer: str, least: int = 1, most: int | None = None) -> bool:
    """Lines that begin with a dash or a star, and no others but one that introduces them."""
    lines = _items(answer)
    return all(map(BULLET.match, lines)) and _within(len(lines), least, most)


@_check
def numbered(answer: str, least: int = 1, most: int | None = None) -> bool:
    """Lines numbered from 1, and no others but one that introduces them."""
    numbers = [int(match[1]) if (match := NUMBER.match(line)) else 0 for line in _items(answer)]
    return numbers == [*range(1, len(numbers) + 1)] and _within(len(numbers), least, most)


def _items(answer: str) -> list[str]:
    """The lines that are not blank, without a first one that ends in a colon."""
    lines = [line for line in answer.splitlines() if line.strip()]
    return lines[lines[0].rstrip().endswith(":") :]


@_check
def upper(answer: str) -> bool:
    """Letters, all of them capitals."""
    return answer.isupper()


@_check
def lower(answer: str) -> bool:
    """Letters, none of them a capital."""
    return answer.islower()


@_check
def colon(answer: str) -> bool:
    """At most five words, a colon, and something after it."""
    before, _, after = answer.partition(":")
    return 1 <= len(WORD.findall(before)) <= 5 and bool(after.strip()) and "\n" not in before


@_check
def quoted(answer: str) -> bool:
    """All of it in one pair of double quotes."""
    return len(answer) > 2 and answer[0] == answer[-1] == '"' and '"' not in answer[1:-1]


@_check
def tagged(answer: str, tag: str) -> bool:
    """Text between ``<tag>`` and ``</tag>``, and nothing outside."""
    match = re.fullmatch(rf"<{tag}>(.*)</{tag}>", answer, re.DOTALL)
    return match is not None and bool(match[1].strip()) and f"<{tag}>" not in match[1]


@_check
def one_line(answer: str) -> bool:
    """No line break."""
    return "\n" not in answer


# ── JSON ────────────────────────────────────────────────────────────────────────────────────────


@_check
def json_object(
    answer: str, keys: Mapping[str, str], values: Mapping[str, Any] | None = None,
    inside: bool = False,
) -> bool:  # fmt: skip
    """A JSON object with exactly these ``keys`` (key → type), and ``values`` where given.

    It may be in a fenced block of code, with nothing around it; with ``inside``, between other
    text. Numbers are equal as numbers, texts whatever their case.
    """
    value = _json(answer, dict, inside)
    if not isinstance(value, dict) or value.keys() != keys.keys():
        return False
    return all(_is(value[key], kind) for key, kind in keys.items()) and all(
        _folded(value[key]) == _folded(expected) for key, expected in (values or {}).items()
    )


@_check
def json_array(answer: str, count: int, kind: str, inside: bool = False) -> bool:
    """A JSON array of ``count`` values of one type, no two of them the same."""
    value = _json(answer, list, inside)
    if not isinstance(value, list) or len(value) != count:
        return False
    different = len({json.dumps(_folded(one)) for one in value}) == count
    return different and all(_is(one, kind) for one in value)


def _json(answer: str, kind: type, inside: bool) -> Any:
    """The value that ``answer`` is, or the first of its ``kind`` ``inside`` it; None without."""
    fenced = FENCE.match(answer)
    text = fenced[1] if fenced else answer
    decoder = json.JSONDecoder(parse_constant=_no_number)
    try:
        return _first_inside(text, kind, decoder) if inside else decoder.decode(text)
    except (ValueError, RecursionError):
        return None


def _first_inside(text: str, kind: type, decoder: json.JSONDecoder) -> Any:
    """The first value of ``kind``. Raises ValueError where none is before a broken one."""
    at = 0
    while start := BRACKET.search(text, at):
        try:
            value, at = decoder.raw_decode(text, start.start())
        except ValueError:
            words = ENCLOSED.match(text, start.start())  # [as asked]
            if words is None:
                raise
            at = words.end()
        else:
            if isinstance(value, kind):
                return value
    return None


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool) != (kind == "boolean"):  # True is a number of Python's too
        return False
    return isinstance(value, TYPES[kind]) and value not in ("", [])


def _folded(value: Any) -> Any:
    return value.strip().casefold() if isinstance(value, str) else value


# ── Words ───────────────────────────────────────────────────────────────────────────────────────


@_check
def includes(answer: str, words: Sequence[str], times: int = 1) -> bool:
    """Each of ``words``, or its plural, at least so many ``times``."""
    return all(_count(answer, word) >= times for word in words)


@_check
def avoids(answer: str, words: Sequence[str]) -> bool:
    """None of ``words`` nor their plurals."""
    return not any(_count(answer, word) for word in words)


def _count(answer: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?:e?s)?(?!\w)", answer, re.IGNORECASE))


@_check
def starts(answer: str, text: str) -> bool:
    """It begins with ``text``."""
    return re.match(rf"{re.escape(text)}(?!\w)", answer.lstrip('"'), re.IGNORECASE) is not None


@_check
def ends(answer: str, text: str) -> bool:
    """It ends with ``text``; a full stop or a quote may follow a word."""
    rest = answer.rstrip('"')
    loose = rest.rstrip(".!") if text[-1].isalnum() else rest
    return loose.casefold().endswith(text.casefold())


@_check
def one_of(answer: str, choices: Sequence[str]) -> bool:
    """One of ``choices`` and nothing else; punctuation, case and an article do not matter."""
    text = re.sub(r"^(?:an?|the)\s+", "", answer.strip(" .!*\"'`").casefold())
    return text in {re.sub(r"^(?:an?|the)\s+", "", choice.casefold()) for choice in choices}


@_check
def names_one(answer: str, choices: Sequence[str]) -> bool:
    """Exactly one of ``choices``, among other words."""
    return sum(_count(answer, choice) > 0 for choice in choices) == 1


@_check
def says(answer: str, phrases: Sequence[str], first: bool = False) -> bool:
    """Some of ``phrases``; with ``first`` in the first sentence or line."""
    text = answer[: min([*_ends(answer), len(answer)])].split("\n")[0] if first else answer
    return any(phrase in text.casefold() for phrase in phrases)


@_check
def says_none(answer: str, phrases: Sequence[str]) -> bool:
    """None of ``phrases``."""
    return not says(answer, phrases)
