"""Labels that are one and the same to a reader: other case, accents, spaces or number form."""

import re
import unicodedata
from collections.abc import Iterable, Mapping

WHOLE_NUMBER = re.compile(r"([+-]?)0*(\d+)(?:\.0*)?")

TRUTH = {"true": "1", "false": "0"}


def plain_label(label: str) -> str:
    """``label``, whole numbers and truth values in one form: ``1`` of 1.0, ``01`` and True.

    A column of 0 and 1 becomes 0.0 and 1.0 where one cell is empty, or where pandas reads it.
    """
    if not label[:1].isdigit() and label[:1] not in ("+", "-", "t", "T", "f", "F"):
        return label
    number = WHOLE_NUMBER.fullmatch(label)
    if number is None:
        return TRUTH.get(label.lower(), label)
    return ("-" if number[1] == "-" and number[2] != "0" else "") + number[2]


def label_key(label: str) -> str:
    """What two spellings of one label share.

    Only Latin letters lose their accents: in other scripts marks make another letter.
    """
    kept: list[str] = []
    for letter in unicodedata.normalize("NFKD", label):
        base = next((one for one in reversed(kept) if not unicodedata.combining(one)), "")
        accent = unicodedata.combining(letter) and "LATIN" in unicodedata.name(base or " ", "")
        if not accent:
            kept.append(letter)
    folded = "".join(unicodedata.normalize("NFC", "".join(kept)).casefold().split())
    number = WHOLE_NUMBER.fullmatch(folded)
    return ("-" if number[1] == "-" and number[2] != "0" else "") + number[2] if number else folded


def twins(labels: Iterable[str]) -> list[list[str]]:
    """The labels that share a key with another, in lists, in the order of ``labels``."""
    by_key: dict[str, list[str]] = {}
    for label in dict.fromkeys(labels):
        by_key.setdefault(label_key(label), []).append(label)
    return [several for several in by_key.values() if len(several) > 1]


def merged(counts: Mapping[str, int]) -> dict[str, str]:
    """label → the most frequent of its spellings, the first in order among equals."""
    return {
        label: min(several, key=lambda one: (-counts[one], one))
        for several in twins(sorted(counts))
        for label in several
    }


def spellings(labels: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """label → as ``known`` spells it, where exactly one of them shares its key."""
    by_key: dict[str, list[str]] = {}
    for one in known:
        by_key.setdefault(label_key(one), []).append(one)
    same = {label: by_key.get(label_key(label), []) for label in labels}
    return {label: few[0] if len(few) == 1 else label for label, few in same.items()}


def spelling(label: str, known: Iterable[str]) -> str:
    """``label`` as ``known`` spells it, where exactly one of them shares its key."""
    return spellings([label], known)[label]
