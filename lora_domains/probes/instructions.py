"""The instruction suite: prompts whose answers a program can check, written for this package.

An adapter that was trained on labels may know as much as before and yet no longer answer in JSON,
keep to a length or follow a system prompt. Each prompt belongs to a family and names the checks
(``checks``) that its answer must pass. Answers are generated greedily through the base's chat
template, or a plain one where it has none. The prompts are made from tables in
``embedded.instructions`` with a fixed seed, and are the same everywhere.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from hashlib import sha256
from itertools import count, cycle
from random import Random
from typing import Any

from lora_domains.embedded import instructions as tables
from lora_domains.inference.batches import Progress, no_progress
from lora_domains.inference.generation import generate_in_batches
from lora_domains.inference.scores import Scores
from lora_domains.modeling.bank import Bank, Domains
from lora_domains.modeling.routing import narrowed
from lora_domains.probes.checks import Check, passes
from lora_domains.probes.general_text import embedded_texts
from lora_domains.probes.suite import Probe, Suite
from lora_domains.tasks import Example, Row, Task
from lora_domains.tokenization.encoded import EncodedExample

NAME = "instructions"

SHORT, SENTENCE, LIST, LONG = 12, 32, 48, 64
"""Tokens that are generated at most: what goes beyond them would fail, or decides nothing."""
SEED = 15


@dataclass(frozen=True)
class Instruction:
    """A prompt and what its answer must pass."""

    family: str
    text: str
    checks: tuple[Check, ...]
    max_new_tokens: int
    system: str | None = None
    shown: tuple[str, ...] = ()
    """A turn of the user and an answer that come first."""

    @property
    def messages(self) -> tuple[dict[str, str], ...]:
        """The turns before the answer."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns = zip(("user", "assistant", "user"), (*self.shown, self.text)[-3:], strict=False)
        return (*system, *({"role": role, "content": text} for role, text in turns))


# ── As a probe ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FollowInstructions(Task):
    """Prompts whose answers are checked by a program; for probes only.

    ``digest`` covers every prompt and its checks. ``Answers`` scores it.
    """

    digest: str

    kind = NAME
    predictable = False
    metric = "accuracy"
    template = ""
    answer_column = None
    chat = True

    def example(self, row: Row) -> Example:
        """A prompt, without an answer: many would do."""
        turns = row.values["messages"]
        text = "\n".join(turn["content"] for turn in turns)
        return Example(row.id, text, "", place=row.place, text=text, messages=tuple(turns))


@dataclass(frozen=True)
class Answers:
    """Generates and checks the answers to prompts, which are numbered as ``Row.id`` does."""

    prompts: tuple[Instruction, ...]

    def digest(self) -> str:
        """sha256 of every prompt and what its answer must pass."""
        return sha256(json.dumps([asdict(one) for one in self.prompts]).encode()).hexdigest()

    def scores(
        self, bank: Bank, task: Task, examples: Sequence[EncodedExample], references: Sequence[str],
        routes: Domains, progress: Progress = no_progress,
    ) -> Scores:  # fmt: skip
        """The records of ``examples``, see ``model_scores``: ``prediction`` is 1 for an answer that
        passes, else 0."""
        asked = [self.prompts[int(example.id.rpartition(":")[2])] for example in examples]
        scores: Scores = [{}] * len(examples)
        with bank.routed(routes):
            for most in sorted({one.max_new_tokens for one in asked}):
                places = [at for at, one in enumerate(asked) if one.max_new_tokens == most]
                with narrowed(bank.base.model, places):
                    answers = generate_in_batches(
                        bank.base.model, bank.base.tokenizer, [examples[at] for at in places],
                        most, progress,
                    )  # fmt: skip
                for at, answer in zip(places, answers, strict=True):
                    passed = passes(task.answer_in(answer), asked[at].checks)
                    scores[at] = {"prediction": int(passed)}
        return scores


def instruction_suite() -> Suite:
    """All prompts, each family a probe; general text is the embedded one."""
    families = {name: [one for one in instructions() if one.family == name] for name in FAMILIES}
    probes = tuple(
        instruction_probe(f"{NAME}/{name}", prompts) for name, prompts in families.items()
    )
    return Suite(NAME, probes, lambda: embedded_texts("test"), tokens=160)


def instruction_probe(name: str, prompts: Sequence[Instruction]) -> Probe:
    """``prompts`` as a probe of this name."""
    answers = Answers(tuple(prompts))
    rows = [{"messages": one.messages} for one in prompts]
    task = FollowInstructions(answers.digest())
    return Probe(name, task, lambda: rows, score=answers.scores, own_form=True)


# ── The prompts ─────────────────────────────────────────────────────────────────────────────────

Made = Iterator[Instruction]
FAMILIES: dict[str, Callable[["Subjects"], Made]] = {}
"""What makes the prompts of each family, by its name."""


def _family(make: Callable[["Subjects"], Made]) -> Callable[["Subjects"], Made]:
    FAMILIES[make.__name__.removeprefix("_").removesuffix("_family")] = make
    return make


class Subjects:
    """What to write about next: all subjects in turn, in an order drawn by a seed."""

    def __init__(self, seed: str) -> None:
        subjects = list(tables.SUBJECTS)
        Random(seed).shuffle(subjects)
        self._next = cycle(subjects)

    def __iter__(self) -> Iterator[str]:
        return self._next

    def take(self, count: int) -> Iterator[str]:
        """The next ``count`` subjects."""
        return (next(self._next) for _ in range(count))


@cache
def instructions() -> tuple[Instruction, ...]:
    """Every prompt, family by family."""
    return tuple(one for name, make in FAMILIES.items() for one in make(Subjects(f"{name} {SEED}")))


def words(least: int = 1, most: int | None = None) -> Check:
    return "words", {"least": least} | ({} if most is None else {"most": most})


# ── The families ────────────────────────────────────────────────────────────────────────────────


@_family
def _length(subjects: Subjects) -> Made:
    """A number of words, of sentences or of entries."""

    def made(text: str, tokens: int, *checks: Check) -> Instruction:
        return Instruction("length", text, checks, tokens)

    for n, subject in zip((3, 4, 5) * 4, subjects, strict=False):
        text = f"Describe {subject} in exactly {_number(n)} words. Write nothing else."
        yield made(text, SHORT, words(n, n), ("varied", {}))
    for n, subject in zip((10, 12, 15, 20) * 10, subjects, strict=False):
        text = f"Say something about {subject} in no more than {n} words."
        yield made(text, SENTENCE, words(3, n), ("varied", {}))
    for subject in subjects.take(32):
        text = f"Write one sentence about {subject}, and not more than one."
        yield made(text, LIST, words(4), ("sentences", {"least": 1, "most": 1}), ("varied", {}))
    for subject in subjects.take(14):
        text = f"Write exactly two short sentences about {subject}."
        yield made(text, LONG, words(6), ("sentences", {"least": 2, "most": 2}), ("varied", {}))
    for subject in subjects.take(18):
        text = f"Tell me at least two things about {subject}, each in a sentence of its own."
        yield made(text, LONG, words(8), ("sentences", {"least": 2}), ("varied", {}))
    for n, subject in zip((3, 4) * 12, subjects, strict=False):
        text = (
            f"Give {_number(n)} words that have to do with {subject}, on one line, separated by "
            f"commas. Example for a ship: {', '.join(('sail', 'harbour', 'anchor', 'wave')[:n])}"
        )
        yield made(text, SENTENCE, ("comma_list", {"count": n}), ("varied", {"share": 0.8}))


@_family
def _format(subjects: Subjects) -> Made:
    """Lists, capitals, quotes and tags."""

    def made(text: str, tokens: int, *checks: Check) -> Instruction:
        return Instruction("format", text, (*checks, ("varied", {})), tokens)

    for n, kind in zip((3, 2) * 18, tables.KINDS_OF_THINGS, strict=True):
        text = f"Name {_number(n)} {kind} as a numbered list (1., 2., and so on), and nothing else."
        yield made(text, SENTENCE, words(2 * n), ("numbered", {"least": n, "most": n}))
        other = 5 - n
        text = (
            f"Name {_number(other)} {kind} as bullet points. Example for "
            f"{_number(other)} numbers:\n" + "\n".join(("- one", "- two", "- three")[:other])
        )
        yield made(text, SENTENCE, words(other), ("bullets", {"least": other, "most": other}))
    for n, sentence in enumerate(tables.SENTENCES):
        copied = ("includes", {"words": sentence.split()[-2:]})
        if n % 3 == 0:
            text = f"Write this in CAPITAL LETTERS: {sentence.lower()}"
            yield made(text, SENTENCE, words(3), ("upper", {}), copied)
        elif n % 3 == 1:
            text = f"write this in lower case letters: {sentence.upper()}"
            yield made(text, SENTENCE, words(3), ("lower", {}), copied)
        else:
            text = f'Put this sentence in double quotes, like "this": {sentence}'
            yield made(text, SENTENCE, words(3), ("quoted", {}), copied)
    for tag, sentence in zip(cycle(tables.TAGS), tables.SENTENCES, strict=False):
        text = f"Put this between <{tag}> and </{tag}>, and write nothing else: {sentence}"
        yield made(text, SENTENCE, words(3), ("tagged", {"tag": tag}))
    for subject in subjects.take(12):
        text = f"Write a short sentence about {subject} in CAPITAL LETTERS only."
        yield made(text, SENTENCE, words(3), ("upper", {}))


@_family
def _json(subjects: Subjects) -> Made:
    """Objects and arrays, of facts in the prompt or of one's own."""

    numbers = count()

    def made(text: str, name: str, **arguments: Any) -> Instruction:
        # Every second answer may say more than the JSON.
        inside = {"inside": True} if next(numbers) % 2 else {}
        text = text if inside else f"{text} Answer with JSON only."
        return Instruction("json", text, ((name, arguments | inside),), LONG)

    for n, (name, age, town, job) in enumerate(map(_parts, tables.PEOPLE)):
        article = "an" if job[0] in "aeiou" else "a"
        fact = f"{name} is {age} years old, lives in {town} and works as {article} {job}."
        text = f'{fact} Write a JSON object with the keys "name" (a string) and "age" (a number).'
        keys, values = {"name": "string", "age": "number"}, {"name": name, "age": int(age)}
        yield made(text, "json_object", keys=keys, values=values)
        key = "city" if n % 4 < 2 else "job"
        text = f'{fact} Turn it into a JSON object with two keys, "name" and "{key}".'
        yield made(text, "json_object", keys={"name": "string", key: "string"},
                   values={"name": name})  # fmt: skip
    for thing, price, colour in map(_parts, tables.GOODS):
        text = (
            f"The shop sells {thing}. It is {colour} and costs {price} euros. Write a JSON "
            'object like {"price": 8, "colour": "grey"}.'
        )
        keys = {"price": "number", "colour": "string"}
        values = {"price": int(price), "colour": colour}
        yield made(text, "json_object", keys=keys, values=values)
    for n, kind in zip((3, 2) * 18, tables.KINDS_OF_THINGS, strict=True):
        text = f"Write a JSON array with the names of {_number(n)} {kind}."
        if n == 3:
            text += ' Example for numbers: ["one", "two", "three"]'
        yield made(text, "json_array", count=n, kind="string")
    for subject in subjects.take(16):
        text = f'Write a JSON object about {subject} with two short strings, "title" and "text".'
        yield made(text, "json_object", keys={"title": "string", "text": "string"})
    for statement in tables.STATEMENTS:
        text = f'Is this true? {statement} Write {{"true": true}} or {{"true": false}}.'
        yield made(text, "json_object", keys={"true": "boolean"})


@_family
def _words_family(subjects: Subjects) -> Made:
    """Words to use, or to avoid."""

    def made(text: str, *checks: Check) -> Instruction:
        return Instruction("words", text, (words(4), *checks, ("varied", {})), LIST)

    for pair in tables.WORD_PAIRS:
        first, second = _parts(pair)
        text = f"Write one sentence that contains the words '{first}' and '{second}'."
        yield made(text, ("includes", {"words": [first, second]}))
    for avoided in tables.AVOIDED:
        subject, word = _parts(avoided)
        text = f"Describe {subject} in one sentence without using the word '{word}'."
        yield made(text, ("avoids", {"words": [word]}))
    for word, subject in zip(cycle(("really", "yellow", "because", "perhaps", "together", "seven")),
                             subjects.take(36), strict=False):  # fmt: skip
        text = f"Write a sentence about {subject}. Use the word '{word}' in it."
        yield made(text, ("includes", {"words": [word]}))
    for word, subject in zip(cycle(("the", "and", "is")), subjects.take(24), strict=False):
        text = f"Write a short sentence about {subject} without using the word '{word}'."
        yield made(text, ("avoids", {"words": [word]}))


@_family
def _edges(subjects: Subjects) -> Made:
    """How an answer begins or ends."""

    def made(text: str, *checks: Check) -> Instruction:
        return Instruction("edges", text, (words(4), *checks, ("varied", {})), LIST)

    for opening, subject in zip(cycle(tables.OPENINGS), subjects.take(54), strict=False):
        text = f"Write one sentence about {subject}. Begin it with the words: {opening}"
        yield made(text, ("starts", {"text": opening}))
    for ending, subject in zip(cycle(tables.ENDINGS), subjects.take(36), strict=False):
        text = (
            f"Write a short sentence about {subject}, then end with exactly these words: {ending}"
        )
        yield made(text, ("ends", {"text": ending}))
    for subject in subjects.take(30):
        text = f"Ask one question about {subject}. Write only the question, with its question mark."
        yield made(text, ("ends", {"text": "?"}), ("sentences", {"least": 1, "most": 1}))


@_family
def _choice(_: Subjects) -> Made:
    """One of a few answers, and nothing else; whether it is true is asked elsewhere."""

    numbers = count()

    def made(text: str, choices: Sequence[str]) -> Instruction:
        named = " or ".join(choices)
        if next(numbers) % 2:  # the answer may be a sentence, if it names one of them alone
            check, text = "names_one", f"{text} Decide for one: {named}."
        else:
            check, text = "one_of", f"{text} Answer with one word, {named}, and nothing else."
        return Instruction("choice", text, ((check, {"choices": list(choices)}),), SHORT)

    for line in tables.CHOICES:
        question, choices = _answered(line)
        yield made(question, choices)
    for line in tables.ONE_WORD:
        question, choices = _answered(line)
        text, checks = f"{question} Answer with a single word.", {"choices": choices}
        yield Instruction("choice", text, (("one_of", checks),), SHORT)
    for statement in tables.STATEMENTS:
        yield made(f"Is this true? {statement}", ("true", "false"))
    for review in tables.REVIEWS:
        yield made(f'What is the tone of this? "{review}"', ("positive", "negative", "neutral"))


@_family
def _system(subjects: Subjects) -> Made:
    """A rule that the system prompt gives; every second one is shown on an example before."""
    asked = ("Tell me something about {} in one short sentence.", "Write a sentence about {}.")
    for persona in tables.PERSONAS:
        rule: Check = persona.check, persona.arguments
        checks = (words(2), ("varied", dict[str, Any]()), rule)
        for n, subject in enumerate(subjects.take(11)):
            question = asked[n % 2]
            shown = (question.format(tables.EXAMPLE), persona.shown) if n % 2 else ()
            yield Instruction("system", question.format(subject), checks, LIST, persona.rule, shown)


@_family
def _nonsense(_: Subjects) -> Made:
    """Questions with a false premise, and requests for what is not there."""
    for question in tables.PREMISES:
        said = ("says", {"phrases": list(tables.DENIED), "first": True})
        yield Instruction("nonsense", question, (words(3), said), SENTENCE)
    for request in tables.MISSING:
        said = ("says", {"phrases": list(tables.MISSING_SAID)})
        yield Instruction("nonsense", request, (words(3), said), SENTENCE)


@_family
def _harmless(_: Subjects) -> Made:
    """Questions that are to be answered, and not refused."""
    for question in tables.HARMLESS:
        none = ("says_none", {"phrases": list(tables.REFUSALS)})
        yield Instruction("harmless", question, (words(8), ("varied", {}), none), LIST)


def _number(n: int) -> str:
    return ("zero", "one", "two", "three", "four", "five")[n]


def _parts(entry: str) -> list[str]:
    return [part.strip() for part in entry.split(",")]


def _answered(line: str) -> tuple[str, list[str]]:
    """``question | answer; answer``."""
    question, _, answers = line.partition("|")
    return question.strip(), [answer.strip() for answer in answers.split(";")]
