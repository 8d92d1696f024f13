"""Special tokens, and texts in which their names are text like any other."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

GUARD = "\ufdd0"
"""Breaks the name of a special token in a text. A noncharacter: no text of a language has it."""


def special_names(tokenizer: Any) -> re.Pattern[str]:
    """What the names of special tokens match, the longest first; without any, nothing."""
    return re.compile("|".join(map(re.escape, _names(tokenizer))) or "(?!)")


class SpecialTokens:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.names = special_names(tokenizer)
        self.ids = frozenset(
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        ) | frozenset(tokenizer.all_special_ids)
        guarded = "|".join(re.escape(_broken(name)) for name in _names(tokenizer)) or "(?!)"
        self._tokenizer, self._pieces = tokenizer, re.compile(f"({guarded})|{GUARD}")

    def guarded(self, value: Any) -> Any:
        """``value`` with the names of special tokens broken by ``GUARD`` in all of its texts."""
        if isinstance(value, str):
            return self.names.sub(lambda m: _broken(m[0]), value.replace(GUARD, ""))
        if isinstance(value, Mapping):
            return {self.guarded(key): self.guarded(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.guarded(part) for part in value]
        return value

    def encode(self, *texts: str) -> list[tuple[int, ...]]:
        """The token ids of each text; a broken name is text, whatever it spells."""
        if not any(GUARD in text for text in texts):
            return [tuple(ids) for ids in self._tokenised(list(texts), special=True)]
        return [tuple(self._guarded_ids(text)) for text in texts]

    def _guarded_ids(self, text: str) -> Iterator[int]:
        for n, piece in enumerate(self._pieces.split(text)):
            if piece:  # every second one is a broken name
                name = piece.replace(GUARD, "")
                yield from self._piece(name, special=n % 2 == 0, first=n == 0)

    def _piece(self, piece: str, *, special: bool, first: bool) -> list[int]:
        """A part of a text. Where it is not the ``first``, no space is put before it, as
        sentencepiece does at the beginning of a text."""
        newline, after, alone = self._tokenised(["\n", "\n" + piece, piece], special=special)
        return after[len(newline) :] if not first and after[: len(newline)] == newline else alone

    def _tokenised(self, texts: list[str], *, special: bool) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(
            texts, add_special_tokens=False, split_special_tokens=not special
        )["input_ids"]
        return ids


def _names(tokenizer: Any) -> list[str]:
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(filter(None, added | {*tokenizer.all_special_tokens}), key=len, reverse=True)


def _broken(name: str) -> str:
    return name[0] + GUARD + name[1:]
