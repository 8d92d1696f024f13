"""The search for leaks: rows that training reads and that are scored too. No torch.

A leak is exact when two rows are the same (``identity``), and near when their own text, without
the template of the prompt, shares most of its word 5-grams. In plain text a row also leaks by being
contained in it.
"""

import re
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lora_domains.data.identity import has_own_choices, identity, keyed_digest, own_words, words
from lora_domains.tasks import Example

WORDS = 5
"""Words in an n-gram. On rows made from templates, 5 with ``COMMON`` found 18 of 25 planted near
leaks with 2 false ones in 450 rows; plain 8-grams gave 139 false ones."""
COMMON = 3
"""An n-gram in more rows than this, on both sides together, belongs to a template."""
COVERED = 0.5
"""A row is near a training row that contains at least this share of its own n-grams."""
OWN_WORDS, ANSWERED_WORDS, WHOLE_WORDS = 8, 4, 3
"""The fewest consecutive words of a row that a text must contain: of its own words (PaLM's test
sets were checked by 8-grams, Chowdhery et al. 2022), of these and the answer, or of all text."""
TEXTS = 10_000
"""Training texts whose n-grams are looked up at once."""
BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash; odd, so that it has an inverse modulo 2^64."""
INVERSE = pow(BASE, -1, 2**64)

DIGEST = 6
"""Bytes of the digest of a row: 10,000 test rows have one in common by chance with a million rows
once in 28,000 cases."""

Words = tuple[str, ...]
Codes = tuple[int, ...]
"""Words as numbers."""


@dataclass(frozen=True)
class Leaks:
    """Scored rows that training reads, each counted once."""

    exact: int
    near: int
    pairs: tuple[tuple[str, str, str], ...]
    """(id of the training row, id of the scored row, "exact" or "near")."""


def copies(rows: Sequence[Example], other: Sequence[Example]) -> set[str]:
    """Ids of the ``rows`` that are also in ``other``."""
    with_choices = has_own_choices(rows) and has_own_choices(other)
    known = {identity(row, with_choices) for row in other}
    return {row.id for row in rows if identity(row, with_choices) in known}


def find_leaks(train: Sequence[Example], other: Sequence[Example]) -> Leaks:
    """The rows of ``other`` (test rows, or probes) that are exactly or nearly training rows.

    A row is near when one training row contains at least ``COVERED`` of its word 5-grams, those of
    templates left out. A row with fewer than two n-grams of its own is never near, so that only
    exact leaks are found in text without spaces between words.
    """
    with_choices = has_own_choices(train) and has_own_choices(other)
    first: dict[str, str] = {}
    by_words: dict[str, str] = {}
    for row in train:
        first.setdefault(identity(row, with_choices), row.id)
        by_words.setdefault(own_words(row, with_choices), row.id)
    exact, rest = [], []
    for row in other:
        copy = first.get(identity(row, with_choices))
        if copy is not None:
            exact.append((copy, row.id, "exact"))
        else:
            rest.append((row, own_words(row, with_choices)))
    covering = _nearest(list(by_words), [text for _, text in rest])
    near = [
        (by_words[text if text in by_words else covering[text]], row.id, "near")
        for row, text in rest
        if text in covering or (text and text in by_words)
    ]
    return Leaks(len(exact), len(near), (*exact, *near))


def leaks_in_texts(texts: Sequence[Example], kinds: Sequence[Sequence[Example]]) -> Leaks:
    """The rows of each kind that a plain text contains, repeats or nearly repeats."""
    exact: dict[str, str] = {}
    near: dict[str, str] = {}
    for rows in kinds:
        for text, row in contained(texts, rows):
            exact.setdefault(row, text)
        for text, row, how in find_leaks(texts, rows).pairs:
            (exact if how == "exact" else near).setdefault(row, text)
    pairs = [(text, row, "exact") for row, text in exact.items()]
    pairs += [(text, row, "near") for row, text in near.items() if row not in exact]
    return Leaks(len(exact), len(pairs) - len(exact), tuple(pairs))


# ── Rows of earlier trainings ───────────────────────────────────────────────────────────────────


def trained_rows(
    rows: Sequence[Example], key: bytes | None, parent: Mapping[str, str]
) -> dict[str, str]:
    """What a card remembers of the rows read in training: {"key", "own", "inherited"}.

    Each row is a keyed digest of its own words. ``parent`` is what the card of the adapter it
    continues from remembers; its rows are inherited. Empty where there is no key, or where the
    parent's rows are unknown or were digested with another one.
    """
    mark = _mark_of(key)
    if not mark or parent.get("key", mark) != mark or key is None:
        return {}
    before = _unpacked(parent.get("own", "")) | _unpacked(parent.get("inherited", ""))
    own = set(_row_digests(rows, key))
    return {"key": mark, "own": _packed(own), "inherited": _packed(before)}


def inherited_leaks(
    rows: Sequence[Example], known: Mapping[str, str], key: bytes | None
) -> list[str] | None:
    """Ids of the ``rows`` on which an adapter was trained before; None where that is unknown.

    ``known`` is what its card remembers (``trained_rows``).
    """
    if key is None or known.get("key") != _mark_of(key):
        return None
    before = _unpacked(known["inherited"])
    return [
        row.id
        for row, digest in zip(rows, _row_digests(rows, key), strict=True)
        if digest in before
    ]


def _row_digests(rows: Sequence[Example], key: bytes) -> list[bytes]:
    with_choices = has_own_choices(rows)
    texts = (own_words(row, with_choices) for row in rows)
    return [bytes.fromhex(keyed_digest(text, key)[: 2 * DIGEST]) for text in texts]


def _mark_of(key: bytes | None) -> str:
    """What tells keys apart."""
    return "" if key is None else keyed_digest("trained rows", key)[:8]


def _packed(digests: Collection[bytes]) -> str:
    return b64encode(b"".join(sorted(digests))).decode()


def _unpacked(text: str) -> set[bytes]:
    raw = b64decode(text)
    return {raw[at : at + DIGEST] for at in range(0, len(raw), DIGEST)}


# ── Near rows ───────────────────────────────────────────────────────────────────────────────────


def _nearest(train: Sequence[str], other: Sequence[str]) -> dict[str, str]:
    """Each near text of ``other``, with the training text that contains most of its n-grams.

    Only n-grams of ``other`` are kept, so memory does not grow with the training rows. An n-gram is
    known by a hash: of ten million in 100 million, two have one in common once in 18,000 cases.
    """
    other, within = list(dict.fromkeys(other)), {*other}
    numbers: dict[str, int] = {}
    texts, hashes = _grams(other, lambda word: numbers.setdefault(word, len(numbers) + 1))
    known, grams, rows_with = np.unique(hashes, return_inverse=True, return_counts=True)
    hits = [np.empty((2, 0), dtype=np.int64)]
    for start in range(0, len(train), TEXTS):
        part = train[start : start + TEXTS]
        found_in, hashes = _grams(part, lambda word: numbers.get(word, 0))
        at = np.searchsorted(known, hashes)
        # Beyond the last is 0, which no n-gram is.
        same = np.append(known, np.uint64(0))[at] == hashes
        found_in, at = found_in[same], at[same]
        new = np.array([text not in within for text in part])
        rows_with += np.bincount(at[new[found_in]], minlength=len(known))
        rare = rows_with[at] <= COMMON
        hits.append(np.stack([at[rare], found_in[rare] + start]))
    own = rows_with <= COMMON
    return _covering(train, other, (texts, grams), own, np.concatenate(hits, axis=1))


def _covering(
    train: Sequence[str], other: Sequence[str], grams: tuple[np.ndarray, np.ndarray],
    own: np.ndarray, hits: np.ndarray,
) -> dict[str, str]:  # fmt: skip
    """The result of ``_nearest``: of the training texts that hold most of a text's own n-grams.

    ``grams`` are the text and the n-gram of each n-gram of ``other``, ``own`` (n-grams,) says which
    belong to no template, and ``hits`` (2, hits) are n-grams and the training texts that hold them.
    """
    texts, numbers = (part[own[grams[1]]] for part in grams)
    owned = np.bincount(texts, minlength=len(other))
    gram, holder = hits[:, np.argsort(hits[0], kind="stable")]
    begins = np.searchsorted(gram, numbers)
    counts = np.searchsorted(gram, numbers, side="right") - begins
    # Each n-gram of a text once for each training text that holds it.
    step = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    pairs = np.repeat(texts, counts) * len(train) + holder[np.repeat(begins, counts) + step]
    pairs, covered = np.unique(pairs, return_counts=True)
    text, holder = np.divmod(pairs, max(1, len(train)))
    near = (owned[text] >= 2) & (covered >= COVERED * owned[text])
    best: dict[str, tuple[int, str]] = {}
    for at, row, count in zip(text[near], holder[near], covered[near], strict=True):
        # Of several that hold as many, the least text.
        candidate = -int(count), train[row]
        best[other[at]] = min(best.get(other[at], candidate), candidate)
    return {text: row for text, (_, row) in best.items()}


def _grams(texts: Sequence[str], number: Callable[[str], int]) -> tuple[np.ndarray, np.ndarray]:
    """(index of the text, hash) of its n-grams, each once a text; none with a word numbered 0."""
    coded, lengths = array("Q"), array("q")
    for text in texts:
        tokens = re.findall(r"\w+", text)
        coded.extend(map(number, tokens))
        lengths.append(len(tokens))
    codes, of = np.array(coded), np.repeat(np.arange(len(texts)), np.array(lengths))
    count = max(0, len(codes) - WORDS + 1)
    parts = [codes[n : n + count] for n in range(WORDS)]
    hashes = sum(
        (part * np.uint64(pow(BASE, n, 2**64)) for n, part in enumerate(parts)),
        np.zeros(count, dtype=np.uint64),
    )
    whole = np.all(parts, axis=0) & (of[:count] == of[len(of) - count :])
    of, hashes = of[:count][whole], hashes[whole]
    order = np.lexsort((hashes, of))
    of, hashes = of[order], hashes[order]
    first = np.append(True, (of[1:] != of[:-1]) | (hashes[1:] != hashes[:-1]))[: len(of)]
    return of[first], hashes[first]


# ── Rows contained in plain text ────────────────────────────────────────────────────────────────


def contained(texts: Sequence[Example], rows: Sequence[Example]) -> list[tuple[str, str]]:
    """(id of a plain text, id of one of ``rows`` that it contains), each pair once.

    ``rows`` are of one kind: what all their prompts begin and end with is their template. A text
    contains a row if the row's prompt with its correct answer, or its own words without the
    template, are in it without interruption, or if its own words are the whole text.
    """
    wholes: dict[str, list[int]] = {}
    numbers: dict[str, int] = {}
    coded, ends = array("Q"), array("Q")
    for at, text in enumerate(texts):
        whole = words(text.answer)
        wholes.setdefault(whole, []).append(at)
        coded.extend(numbers.setdefault(word, len(numbers) + 1) for word in whole.split())
        ends.append(len(coded))
    pairs: set[tuple[int, str]] = set()
    phrases: dict[int, dict[Codes, set[str]]] = {}
    for row, own, answered in _phrases(rows):
        if len(own) >= WHOLE_WORDS:
            pairs.update((at, row.id) for at in wholes.get(" ".join(own), ()))
        for phrase, fewest in ((own, OWN_WORDS), (answered, ANSWERED_WORDS)):
            codes = tuple(numbers.get(word, 0) for word in phrase)
            if len(codes) >= fewest and all(codes):  # a word that is in no text has no number
                phrases.setdefault(len(codes), {}).setdefault(codes, set()).add(row.id)
    for at, codes in _occurrences(np.array(coded), np.array(ends), phrases):
        pairs.update((at, row) for row in phrases[len(codes)][codes])
    return sorted((texts[at].id, row) for at, row in pairs)


def _phrases(rows: Sequence[Example]) -> Iterator[tuple[Example, Words, Words]]:
    """Each row with its own words and, where it has a prompt, all its words with the answer."""
    prompts = [row.prompt for row in rows if row.prompt]
    lead = _shared(_words(prompt) for prompt in prompts)
    tail = _shared(_words(prompt)[::-1] for prompt in prompts)
    for row in rows:
        whole = _words(row.prompt or row.answer)
        own = whole[lead : len(whole) - tail] if row.prompt else whole
        yield row, own, _words(row.prompt + row.answer) if row.prompt else ()


def _words(text: str) -> Words:
    return tuple(words(text).split())


def _shared(texts: Iterable[Words]) -> int:
    """How many words all texts begin with; 0 if all are one text, whose template is unknown."""
    least = most = None
    for text in texts:
        least = text if least is None or text < least else least
        most = text if most is None or text > most else most
    if least is None or most is None or least == most:
        return 0
    # All others lie between these two.
    return next(
        (n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least)
    )


def _occurrences(
    coded: np.ndarray, ends: np.ndarray, phrases: Mapping[int, Collection[Codes]]
) -> Iterator[tuple[int, Codes]]:
    """(index of a text, phrase in it), by the rolling hash of Karp and Rabin (1987).

    ``coded`` (words,) are the texts' words as numbers, ``ends`` (texts,) the position after each
    text, and ``phrases`` are grouped by length. The cost does not grow with the number of phrases
    that begin alike.
    """
    powers, inverses = (
        np.cumprod(np.full(len(coded) + 1, base, np.uint64)) for base in (BASE, INVERSE)
    )
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(coded * powers[: len(coded)])])
    for length, of_length in phrases.items():
        if length > len(coded):
            continue
        by_hash: dict[int, list[Codes]] = {}
        for codes in of_length:
            by_hash.setdefault(_hash(codes), []).append(codes)
        windows = (sums[length:] - sums[:-length]) * inverses[: len(coded) - length + 1]
        hits = np.flatnonzero(np.isin(windows, np.array(list(by_hash), dtype=np.uint64)))
        for start in hits.tolist():
            at = int(np.searchsorted(ends, start, side="right"))
            run = tuple(coded[start : start + length].tolist())
            # Within one text, and no collision of hashes.
            if start + length <= ends[at] and run in by_hash[int(windows[start])]:
                yield at, run


def _hash(codes: Codes) -> int:
    """Their sum, the n-th times the n-th power of ``BASE``, modulo 2^64."""
    value = 0
    for code in reversed(codes):
        value = (value * BASE + code) % 2**64
    return value
