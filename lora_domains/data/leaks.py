"""The search for leaks: rows that training reads and that are scored too. No torch.

A leak is exact when two rows are the same (``identity``), and near when their own text, without
the template of the prompt, shares most of its word 5-grams. In plain text a row also leaks by being
contained in it.
"""

import re
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
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
BASE = 0x9E3779B97F4A7C15
"""Base of the rolling hash; odd, so that it has an inverse modulo 2^64."""
INVERSE = pow(BASE, -1, 2**64)

DIGEST = 6
"""Bytes of the digest of a row: 10,000 test rows have one in common by chance with a million rows
once in 28,000 cases."""

Words = tuple[str, ...]


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

    Only n-grams of ``other`` are indexed, so memory does not grow with the training rows.
    """
    grams = {text: _grams(text) for text in other}
    rows_with = Counter(gram for of_text in grams.values() for gram in of_text)
    containing: dict[str, list[str]] = {}
    for text in train:
        for gram in _grams(text):
            if gram in rows_with:
                rows_with[gram] += text not in grams
                if rows_with[gram] <= COMMON:
                    containing.setdefault(gram, []).append(text)
    nearest = {}
    for text, of_text in grams.items():
        own = [gram for gram in of_text if rows_with[gram] <= COMMON]
        covered = Counter(one for gram in own for one in containing.get(gram, ()))
        if len(own) >= 2 and covered:
            most = max(covered.values())
            if most >= COVERED * len(own):
                # The order of a set changes from run to run: of equal texts take the least.
                nearest[text] = min(one for one, n in covered.items() if n == most)
    return nearest


def _grams(text: str) -> set[str]:
    tokens = re.findall(r"\w+", text)
    return {" ".join(tokens[i : i + WORDS]) for i in range(len(tokens) - WORDS + 1)}


# ── Rows contained in plain text ────────────────────────────────────────────────────────────────


def contained(texts: Sequence[Example], rows: Sequence[Example]) -> list[tuple[str, str]]:
    """(id of a plain text, id of one of ``rows`` that it contains), each pair once.

    ``rows`` are of one kind: what all their prompts begin and end with is their template. A text
    contains a row if the row's prompt with its correct answer, or its own words without the
    template, are in it without interruption, or if its own words are the whole text.
    """
    phrases: dict[Words, set[str]] = {}
    wholes: dict[Words, set[str]] = {}
    for row, own, answered in _phrases(rows):
        if len(own) >= WHOLE_WORDS:
            wholes.setdefault(own, set()).add(row.id)
        for phrase, fewest in ((own, OWN_WORDS), (answered, ANSWERED_WORDS)):
            if len(phrase) >= fewest:
                phrases.setdefault(phrase, set()).add(row.id)
    split = [_words(text.answer) for text in texts]
    pairs = {(at, row) for at, whole in enumerate(split) for row in wholes.get(whole, ())}
    pairs |= {(at, row) for at, phrase in _occurrences(split, phrases) for row in phrases[phrase]}
    return sorted((texts[at].id, row) for at, row in pairs)


def _words(text: str) -> Words:
    return tuple(words(text).split())


def _phrases(rows: Sequence[Example]) -> list[tuple[Example, Words, Words]]:
    """Each row with its own words and, where it has a prompt, all its words with the answer."""
    prompts = list({_words(row.prompt) for row in rows if row.prompt})
    lead, tail = _shared(prompts), _shared([prompt[::-1] for prompt in prompts])
    phrases = []
    for row in rows:
        whole = _words(row.prompt or row.answer)
        own = whole[lead : len(whole) - tail] if row.prompt else whole
        phrases.append((row, own, _words(row.prompt + row.answer) if row.prompt else ()))
    return phrases


def _shared(texts: Sequence[Words]) -> int:
    """How many words all texts begin with; 0 for a single text, whose template is unknown."""
    if len(texts) < 2:
        return 0
    least, most = min(texts), max(texts)  # all others lie between
    return next(
        (n for n, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), len(least)
    )


def _occurrences(texts: Sequence[Words], phrases: Collection[Words]) -> Iterator[tuple[int, Words]]:
    """(index of a text, phrase in it), by the rolling hash of Karp and Rabin (1987).

    The cost does not grow with the number of phrases that begin alike.
    """
    numbers: dict[str, int] = {}
    for phrase in phrases:
        for word in phrase:
            numbers.setdefault(word, len(numbers) + 1)
    tokens = [word for text in texts for word in text]
    ends = np.cumsum([len(text) for text in texts])
    powers, inverses = (
        np.cumprod(np.full(len(tokens) + 1, base, np.uint64)) for base in (BASE, INVERSE)
    )
    coded = np.array([numbers.get(word, 0) for word in tokens], dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(coded * powers[: len(tokens)])])
    by_length: dict[int, dict[int, list[Words]]] = {}
    for phrase in phrases:
        value = sum(numbers[word] * pow(BASE, n, 2**64) for n, word in enumerate(phrase))
        by_length.setdefault(len(phrase), {}).setdefault(value % 2**64, []).append(phrase)
    for length, by_hash in by_length.items():
        if length > len(tokens):
            continue
        windows = (sums[length:] - sums[:-length]) * inverses[: len(tokens) - length + 1]
        hits = np.flatnonzero(np.isin(windows, np.array(list(by_hash), dtype=np.uint64)))
        for start in hits.tolist():
            at = int(np.searchsorted(ends, start, side="right"))
            run = tuple(tokens[start : start + length])
            # Within one text, and no collision of hashes.
            if start + length <= ends[at] and run in by_hash[int(windows[start])]:
                yield at, run
