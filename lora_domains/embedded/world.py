"""The embedded world: the base's corpus, general questions and text, and the domains' rows.

Everything is drawn from `random.Random` with fixed seeds, the same on every machine. A checksum of
its text assigns each document to one of sixteen parts; three parts are kept out of the corpus as
general train, validation and test text, so the splits are disjoint by construction.
"""

from collections.abc import Iterator
from random import Random
from typing import Any
from zlib import crc32

from lora_domains.embedded.domains import domain_rows
from lora_domains.embedded.facts import RELATIONS, Relation
from lora_domains.embedded.habits import labelled
from lora_domains.embedded.prose import line, paragraph

__all__ = ["domain_rows", "general_questions", "general_text", "pretraining_documents"]

CHOICES = 4
DOCUMENTS = 180_000
_PARTS = 16
PLAIN = 1
"""The wording of every relation that is a plain question, "Question: …\nAnswer: …"."""
_HELD_OUT = {"train": 0, "validation": 1, "test": 2}
_SEEDS = {"train": 11, "validation": 12, "test": 13}


def asked_wording(relation: Relation, index: int) -> int:
    """The wording in which the fact at `index` is asked; it is taught in all the others."""
    return (index + len(relation.name)) % len(relation.wordings)


def _fill(wording: str, x: str, y: str) -> str:
    text = wording.replace("{x}", x).replace("{y}", y)
    if text[0].islower() and not wording[0].islower():  # a wording that begins with {x}
        text = text[0].upper() + text[1:]
    for vowel in "aeioAEIO":
        text = text.replace(f" a {vowel}", f" an {vowel}").replace(f"A {vowel}", f"An {vowel}")
    return text


def question_and_answer(relation: Relation, index: int, wording: int) -> tuple[str, str]:
    """A fact in one wording, split before the answer: (prompt, answer)."""
    x, y = relation.pairs[index]
    text = _fill(relation.wordings[wording], x, y)
    return text[: -len(y)].rstrip(), y


def _near_numbers(rng: Random, answer: int) -> list[str]:
    near = [n for n in range(max(0, answer - 4), answer + 5) if n != answer]
    far = [n for n in (answer + 10, answer - 10, answer + 5, answer - 6) if n >= 0]
    return [str(n) for n in rng.sample(near, 2) + rng.sample(far, 1)]


def general_questions(plain: bool = False) -> list[dict[str, Any]]:
    """The general questions, with four choices each, in wordings not used to teach the fact.

    The ``plain`` ones, for other bases, are questions without what frames them in a wording.
    """
    rng = Random(20)
    rows = []
    for relation in RELATIONS:
        answers = list(dict.fromkeys(y for _, y in relation.pairs))
        indices = list(range(len(relation.pairs)))
        for index in sorted(rng.sample(indices, min(relation.asked, len(indices)))):
            x, y = relation.pairs[index]
            wording = PLAIN if plain else asked_wording(relation, index)
            question, _ = question_and_answer(relation, index, wording)
            if plain:
                question = question.removeprefix("Question: ").split("\n")[0]
                question = question[0].upper() + question[1:]
            if relation.numeric:
                wrong = _near_numbers(rng, int(y))
            else:
                true = {b for a, b in relation.pairs if a == x}
                wrong = rng.sample([a for a in answers if a not in true], CHOICES - 1)
            rows.append((relation, question, y, wrong))
    places = [i % CHOICES for i in range(len(rows))]
    rng.shuffle(places)
    questions = []
    for (relation, question, y, wrong), place in zip(rows, places, strict=True):
        choices = [*wrong[:place], y, *wrong[place:]]
        questions.append(
            {
                "field": relation.field,
                "relation": relation.name,
                "question": question,
                "choices": choices,
                "answer": place,
            }
        )
    return questions


def _taught(rng: Random, relation: Relation, index: int) -> str:
    kept = [w for w in range(len(relation.wordings)) if w != asked_wording(relation, index)]
    x, y = relation.pairs[index]
    return _fill(relation.wordings[rng.choice(kept)], x, y)


_ALL_FACTS = tuple((r, i) for r in RELATIONS for i in range(len(r.pairs)))


def _facts(rng: Random) -> str:
    """A few facts of one relation or of any, sometimes followed by another sentence."""
    if rng.random() < 0.35:
        relation = rng.choice(RELATIONS)
        chosen = [
            (relation, rng.randrange(len(relation.pairs)))
            for _ in range(rng.choice((1, 2, 3, 4, 5, 6)))
        ]
    else:
        chosen = [rng.choice(_ALL_FACTS) for _ in range(rng.choice((1, 2, 3, 4, 5, 6)))]
    lines = []
    for relation, index in chosen:
        text = _taught(rng, relation, index)
        plain = "\n" not in text and " = " not in text
        lines.append(text + "." if plain and rng.random() < 0.9 else text)
    if rng.random() < 0.1:
        lines.append(line(rng, "topic"))
    return "\n".join(lines)


def _document(rng: Random) -> str:
    kind = rng.random()
    if kind < 0.5:
        return _facts(rng)
    return labelled(rng) if kind < 0.75 else paragraph(rng)


def pretraining_documents(seed: int, count: int = DOCUMENTS) -> Iterator[str]:
    """The corpus: `count` documents, without their EOS."""
    rng = Random(f"corpus {seed}")
    while count:
        text = _document(rng)
        if crc32(text.encode()) % _PARTS not in _HELD_OUT.values():
            count -= 1
            yield text


def general_text(split: str, count: int) -> list[str]:
    """`count` general texts of the kinds that the base was trained on, none in its corpus.

    No text is in two splits, but one may be part of another: see `benchmarks/embedded`.
    """
    rng = Random(_SEEDS[split])
    texts: dict[str, None] = {}
    while len(texts) < count:
        text = _document(rng)
        if crc32(text.encode()) % _PARTS == _HELD_OUT[split]:
            texts[text] = None
    return list(texts)
