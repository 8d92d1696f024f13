"""Rows on both sides of a split: exactly the same after normalising, or nearly so. No torch.

And how rows are recognised later by those who hold the key, and by nobody else.
"""

import hmac
import re
import secrets
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterError
from lora_domains.tasks import Example

WORDS = 5
"""Words in an n-gram. In a trial on template-heavy rows 5 with ``COMMON`` found 18 of 25 planted
near leaks with 2 false of 450; plain 8-grams gave 139 false."""
COMMON = 3
"""An n-gram in more rows than this (both sides together) is a template's, not a row's."""
COVERED = 0.5
"""Share of a row's own n-grams found in ONE training row, from which it is called near."""
SPAN, ANSWERED, LEAST = 8, 4, 3
"""Words of a row that a text must hold in one run to repeat it: 8 of its own, as PaLM's test sets
were checked by 8-grams (Chowdhery and others 2022), 4 with its answer, 3 where it is the text."""
BASE = 0x9E3779B97F4A7C15
"""Odd, so that it has an inverse modulo 2^64."""
INVERSE = pow(BASE, -1, 2**64)
KEY = 32
"""Bytes of the key of the rows' digests."""
MARKS = re.compile(r"((?<!\w)-(?=\d))|[^\w\s]")
"""A sign before a digit (group 1), and whatever else is neither of a word nor white space."""


@dataclass(frozen=True)
class Leaks:
    """Rows of the other side that a training row repeats; each is counted once."""

    exact: int
    near: int
    pairs: tuple[tuple[str, str, str], ...]
    """(training row id, other row id, "exact" or "near")."""


def normalise(text: str) -> str:
    """``text`` under NFKC and case folding, white space folded to single spaces. Idempotent."""
    if text.isascii():
        return " ".join(text.lower().split())
    while True:  # folding can undo NFKC and the reverse: repeat until nothing changes
        folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if folded == text:
            return folded
        text = folded


def digest_key(folder: Path) -> bytes:
    """The key of the rows' digests: made once per output folder, never part of an adapter.

    Raises AdapterError where it cannot be written or read whole: with an empty key a digest could
    be guessed.
    """
    path = folder / ".digest-key"
    try:
        if not path.exists():
            # Where another run writes its key first, that key holds.
            write_text(path, secrets.token_hex(KEY), private=True, overwrite=False)
        key, found = bytes.fromhex(path.read_text()), "another length"
    except ValueError:
        key, found = b"", "something else"
    except OSError as error:
        key, found = b"", error.strerror or str(error)
    if len(key) != KEY:
        raise AdapterError(
            where=str(path),
            expected=f"a key of {KEY} bytes in hexadecimal, written once",
            found=found,
            hint="Free some space, or delete the file: with a new key, rows can no longer be "
            "recognised in older cards.",
        )
    return key


def keyed_digest(text: str, key: bytes) -> str:
    """HMAC-SHA256 of ``text`` in hex: without ``key`` a published digest cannot be guessed."""
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), sha256).hexdigest()


def own_choices(examples: Sequence[Example]) -> bool:
    """Whether the rows have candidates of their own (multiple choice), not one list of labels."""
    return len({example.choices for example in examples if example.choices}) > 1


def identity(example: Example, with_choices: bool = False) -> str:
    """What makes two rows the same: the normalised prompt (plain text: all of it), unpunctuated.

    "What is the top-up limit?" and "what is the top up limit" are one row; "C#", "3 * 4", "-5", a
    currency or an emoji stay what they are. Candidates count where rows have their own: "Which
    of these is true?" is no leak by itself.
    """
    text = example.prompt or example.answer
    if with_choices:
        text = " ".join([text, *sorted(example.choices)])
    return " ".join(_words(text))


def _words(text: str) -> list[str]:
    return MARKS.sub(_mark, normalise(text)).split()


def _mark(match: re.Match[str]) -> str:
    kind = unicodedata.category(match[0])[0]
    if kind == "M":  # an accent or vowel sign belongs to its letter
        return match[0]
    return f" {match[0]} " if match[1] or kind != "P" or match[0] in "*/%#&@" else " "


def find_leaks(train: Sequence[Example], other: Sequence[Example]) -> Leaks:
    """The rows of ``other`` (test rows, or probes) that ``train`` holds exactly or nearly.

    Near is the share, at least ``COVERED``, of the row's word 5-grams that stand in one training
    row, n-grams of templates left out; rows with fewer than two of their own are never near. Text
    written without spaces between words has hardly any n-grams: only exact leaks are found there.
    """
    with_choices = own_choices(train) and own_choices(other)
    first: dict[str, str] = {}
    for row in train:
        first.setdefault(identity(row, with_choices), row.id)
    texts = [identity(row, with_choices) for row in other]
    exact = [(first[t], row.id, "exact") for row, t in zip(other, texts, strict=True) if t in first]
    holder = _near(list(first), texts)
    near = [
        (first[holder[t]], row.id, "near")
        for row, t in zip(other, texts, strict=True)
        if t not in first and t in holder
    ]
    return Leaks(len(exact), len(near), (*exact, *near))


def copies(rows: Sequence[Example], other: Sequence[Example]) -> set[str]:
    """Ids of the ``rows`` that ``other`` holds exactly."""
    with_choices = own_choices(rows) and own_choices(other)
    known = {identity(row, with_choices) for row in other}
    return {row.id for row in rows if identity(row, with_choices) in known}


def held(texts: Sequence[Example], rows: Sequence[Example]) -> list[tuple[str, str]]:
    """(id of a plain text, id of one of ``rows`` that it holds), each pair once.

    ``rows`` are of one kind: what all of their prompts begin and end with is their template. A text
    holds a row's prompt with its right answer, a row's own words in one run, or is these words.
    """
    wanted: dict[tuple[str, ...], set[str]] = {}
    whole: dict[tuple[str, ...], set[str]] = {}
    for row, own, answered in _phrases(rows):
        if len(own) >= LEAST:
            whole.setdefault(own, set()).add(row.id)
        for words, least in ((own, SPAN), (answered, ANSWERED)):
            if len(words) >= least:
                wanted.setdefault(words, set()).add(row.id)
    said = [tuple(_words(text.answer)) for text in texts]
    pairs = {(at, row) for at, words in enumerate(said) for row in whole.get(words, ())}
    pairs |= {(at, row) for at, words in _runs(said, list(wanted)) for row in wanted[words]}
    return sorted((texts[at].id, row) for at, row in pairs)


def leaks_in_texts(texts: Sequence[Example], kinds: Sequence[Sequence[Example]]) -> Leaks:
    """The rows of each kind that a plain text repeats or contains, exactly or nearly."""
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    for rows in kinds:
        for text, row in held(texts, rows):
            exact.setdefault(row, text)
        for text, row, how in find_leaks(texts, rows).pairs:
            (exact if how == "exact" else near).setdefault(row, text)
    pairs = [(text, row, "exact") for row, text in exact.items()]
    pairs += [(text, row, "near") for row, text in near.items() if row not in exact]
    return Leaks(len(exact), len(pairs) - len(exact), tuple(pairs))


def _phrases(
    rows: Sequence[Example],
) -> list[tuple[Example, tuple[str, ...], tuple[str, ...]]]:
    """Of each row its own words, and all of it with the answer where something is asked."""
    asked = list({tuple(_words(row.prompt)) for row in rows if row.prompt})
    lead, tail = _shared(asked), _shared([words[::-1] for words in asked])
    found = []
    for row in rows:
        words = tuple(_words(row.prompt or row.answer))
        own = words[lead : len(words) - tail] if row.prompt else words
        found.append((row, own, tuple(_words(row.prompt + row.answer)) if row.prompt else ()))
    return found


def _shared(texts: Sequence[tuple[str, ...]]) -> int:
    """How many words all begin with: a template's; of a single text it cannot be known."""
    if len(texts) < 2:
        return 0
    least, most = min(texts), max(texts)  # all others lie between
    return next(
        (n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least)
    )


def _runs(
    texts: Sequence[tuple[str, ...]], phrases: Sequence[tuple[str, ...]]
) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(index of a text, phrase that stands in it in one run), by the rolling hash of Karp and Rabin
    (1987): what it costs does not grow with how many phrases begin alike."""
    import numpy as np  # here alone, and only where there is general text

    numbers: dict[str, int] = {}
    for phrase in phrases:
        for word in phrase:
            numbers.setdefault(word, len(numbers) + 1)
    words = [word for text in texts for word in text]
    ends = np.cumsum([len(text) for text in texts])
    powers, inverses = (
        np.cumprod(np.full(len(words) + 1, base, np.uint64)) for base in (BASE, INVERSE)
    )
    coded = np.array([numbers.get(word, 0) for word in words], dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(coded * powers[: len(words)])])
    by_length: dict[int, dict[int, list[tuple[str, ...]]]] = {}
    for phrase in phrases:
        value = sum(numbers[word] * pow(BASE, n, 2**64) for n, word in enumerate(phrase))
        by_length.setdefault(len(phrase), {}).setdefault(value % 2**64, []).append(phrase)
    for length, known in by_length.items():
        if length > len(words):
            continue
        windows = (sums[length:] - sums[:-length]) * inverses[: len(words) - length + 1]
        hits = np.flatnonzero(np.isin(windows, np.array(list(known), dtype=np.uint64)))
        for start in hits.tolist():
            at = int(np.searchsorted(ends, start, side="right"))
            run = tuple(words[start : start + length])
            # Within one text, and no accident of the hash.
            if start + length <= ends[at] and run in known[int(windows[start])]:
                yield at, run


def _grams(text: str) -> set[str]:
    words = re.findall(r"\w+", text)
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def _near(train: Sequence[str], other: Sequence[str]) -> dict[str, str]:
    """Each near text of ``other`` with the training text that covers it best.

    Only n-grams of ``other`` are indexed, so memory does not grow with the training rows.
    """
    grams = {text: _grams(text) for text in other}
    rows_with = Counter(gram for found in grams.values() for gram in found)
    holders: dict[str, list[str]] = {}
    for text in train:
        for gram in _grams(text):
            if gram in rows_with:
                rows_with[gram] += text not in grams
                if rows_with[gram] <= COMMON:
                    holders.setdefault(gram, []).append(text)
    near = {}
    for text, found in grams.items():
        own = [gram for gram in found if rows_with[gram] <= COMMON]
        covered = Counter(holder for gram in own for holder in holders.get(gram, ()))
        if len(own) >= 2 and covered:
            most = max(covered.values())
            if most >= COVERED * len(own):
                # Sets are walked in an order that changes from run to run: the least text wins.
                near[text] = min(holder for holder, n in covered.items() if n == most)
    return near
