"""Edited copies of training texts that keep their label. No torch.

An edit changes case, a space or the final full stop, and adds rare typing mistakes inside longer
words: two adjacent letters swapped, or one replaced by its neighbour on the keyboard (the noise of
Belinkov & Bisk 2018, arXiv 1711.02173). Unlike in EDA (Wei & Zou 2019, arXiv 1901.11196), no word
is removed, replaced or moved: "no chest pain" without "no" has another label. Digits and words of
fewer than five letters (no, not, mg) keep their letters.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random

from lora_domains.data.leaks import copies
from lora_domains.data.readers import read
from lora_domains.data.source import Data
from lora_domains.tasks import Example, Task
from lora_domains.tasks.messages import columns_beside

TYPOS = 0.03
"""Share of the longer words with a typing mistake."""
ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
LONG = re.compile(r"[a-zA-Z]{5,}")


def noisy(text: str, random: Random) -> str:
    """``text`` with one edit, and typing mistakes in a few longer words."""
    text = LONG.sub(lambda word: _mistyped(word.group(), random, TYPOS), text)
    return random.choice((_lower, _capital, _space, _stop, _typo))(text, random)


def _lower(text: str, _: Random) -> str:
    return text.lower()


def _capital(text: str, _: Random) -> str:
    return text[:1].upper() + text[1:]


def _space(text: str, random: Random) -> str:
    """Double one space."""
    places = [at for at, letter in enumerate(text) if letter == " "]
    at = random.choice(places) if places else 0
    return text[:at] + " " + text[at:] if places else text


def _stop(text: str, _: Random) -> str:
    """Remove the final full stop, or add one."""
    return text.rstrip().removesuffix(".") if text.rstrip().endswith(".") else text + "."


def _typo(text: str, random: Random) -> str:
    """Make one typing mistake in a longer word."""
    words = list(LONG.finditer(text))
    if not words:
        return text
    word = random.choice(words)
    return text[: word.start()] + _mistyped(word.group(), random, 1.0) + text[word.end() :]


def _mistyped(word: str, random: Random, rate: float) -> str:
    """Swap a letter inside the word with the next, or replace it by a neighbour on the keyboard."""
    if random.random() >= rate:
        return word
    at = random.randrange(1, len(word) - 2)
    if random.random() < 0.5:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    letter = word[at]
    keys = next(row for row in ROWS if letter.lower() in row)
    place = keys.index(letter.lower())
    near = random.choice([keys[i] for i in (place - 1, place + 1) if 0 <= i < len(keys)])
    return word[:at] + (near.upper() if letter.isupper() else near) + word[at + 1 :]


def augmented(
    task: Task, data: Data, train: Sequence[Example], test: Sequence[Example], seed: int
) -> list[Example]:
    """An edited copy of each of ``train``, drawn by ``seed``; its id ends in ``~``.

    Empty for a task whose input is more than text. Copies that equal a test row are left out.
    """
    if not task.predictable or task.own_choices or data.train is None:
        return []
    rows = {row.id: row for row in read(data.train, "train")}
    beside = columns_beside(task)
    columns = [name for name in dict.fromkeys(task.input_columns) if name not in beside]
    edited = []
    for example in train:
        row = rows[example.id]
        values = dict(data.row(row.values) if data.row else row.values)
        if any(isinstance(values.get(column), list | tuple) for column in columns):
            return []  # the turns of a chat
        random = Random(f"{seed}/{row.id}")
        for column in columns:
            values[column] = noisy(str(values[column]), random)
        copy = task.example(replace(row, values=values))
        edited.append(replace(copy, id=f"{row.id}~", group=example.group))
    leaked = copies(edited, test)
    return [example for example in edited if example.id not in leaked]
