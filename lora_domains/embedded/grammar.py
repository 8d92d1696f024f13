"""A small context-free grammar, with which the texts of the embedded world are written.

A rule is a name and its alternatives; an alternative is text with placeholders: {rule}, {3-20} for
a number in that range, {#4} for four digits. Expansion draws from the given `random.Random` alone,
so equal seeds give equal texts on every platform.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random

_PLACE = re.compile(r"\{([^{}]+)\}")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeio]|u[^ns]|un[^i])")
_RANGE = re.compile(r"(\d+)-(\d+)")

Rules = Mapping[str, Sequence[str]]


def parse(table: str) -> dict[str, tuple[str, ...]]:
    """Read rules: '@name = a, b, c' on one line (or several), or '@name' and one per line."""
    rules: dict[str, tuple[str, ...]] = {}
    for block in re.split(r"(?m)^@", table)[1:]:
        head, _, body = block.partition("\n")
        name, equals, words = head.partition("=")
        if equals:
            alternatives = [" ".join(w.split()) for w in f"{words} {body}".split(",")]
        else:
            alternatives = [line.strip() for line in body.splitlines()]
        found = tuple(a for a in alternatives if a)
        if not found or name.strip() in rules:
            raise ValueError(f"rule @{name.strip()} is empty or defined twice; give it one body")
        rules[name.strip()] = found
    return rules


class Grammar:
    """Rules and how to expand them."""

    def __init__(self, *tables: str) -> None:
        self.rules: dict[str, tuple[str, ...]] = {}
        for table in tables:
            self.rules.update(parse(table))

    def text(self, rng: Random, template: str, **fixed: str) -> str:
        """Expand `template`; `fixed` gives the text of placeholders that are not drawn."""

        def fill(match: re.Match[str]) -> str:
            place = match[1]
            if place in fixed:
                return fixed[place]
            if place.startswith("#"):
                return "".join(str(rng.randrange(10)) for _ in range(int(place[1:])))
            if span := _RANGE.fullmatch(place):
                return str(rng.randint(int(span[1]), int(span[2])))
            alternative = rng.choice(self.rules[place])
            return _PLACE.sub(fill, alternative) if "{" in alternative else alternative

        return _PLACE.sub(fill, template)

    def sentence(self, rng: Random, template: str, **fixed: str) -> str:
        """Expand, correct 'a apple' to 'an apple', and begin with a capital."""
        text = _ARTICLE.sub(r"\1n ", self.text(rng, template, **fixed))
        return text[:1].upper() + text[1:]
