"""Small neutral labelling habits: 'call: gas leak in the kitchen.\\ntriage: urgent'.

They teach the base the form 'field: text / attribute: label', negation, time, agency and contrast,
and they use the label words of the domains in other senses. None of them is the task of a domain:
alarms in buildings are not symptoms, reviews of chairs are not market news.
"""

# ruff: noqa: E501 (lines of the tables are alternatives, one to a line)

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from lora_domains.embedded.grammar import Grammar
from lora_domains.embedded.prose import (
    CHAT,
    COMMON,
    LETTERS,
    STORIES,
    TOPIC_NAMES,
    TOPICS,
    WIDER,
    line,
)

_TABLE = """
@hazard = gas leak, fire, smoke, flood, burst pipe, broken lift with people inside, live wire, fallen tree on a car,
 collapsed wall, burglar, explosion, chemical spill, child locked in a car, intruder, carbon monoxide alarm, bomb threat
@nuisance = dripping tap, flickering lamp, squeaky door, lost key, noisy neighbour, full bin, torn curtain, stained carpet,
 slow lift, blocked letter box, missing parcel, stiff window, dusty shelf, loose handle, empty printer, late newspaper
@inplace = in the kitchen, on the third floor, at the school, near the station, in flat {1-40}, in the cellar, at the mall,
 behind the church, in the warehouse, on {city} Road, at {last} Street {1-90}, in the garage
@now = right now, since a minute ago, as we speak, and it is getting worse, at this moment, just started,
 since {2-15} minutes ago, again and still going on, this very minute
@gone = {2-20} years ago, last year, in {1990-2023}, long ago, last winter, but it was put out {2-9} hours ago,
 but that was settled {when}, and it is all over
@nothing = no, there is no, we see no sign of, it is not, nobody found, nothing like, the guard ruled out, without any,
 he denies, they checked and there was never any
@elsewhere = my {relative} in {city} once had, the neighbours used to have, the film shows, we practised for,
 {first} read about, in another town there was, the poster warns of, she asks what to do in case of, he is afraid of
@calm
{nothing} {hazard} {inplace}
{hazard} {inplace} {gone}
{elsewhere} a {hazard}
only a {nuisance} {inplace}
a {nuisance} {inplace}, no hurry
{nothing} {hazard} or {hazard}, just a {nuisance}
@alarm
{hazard} {inplace} {now}
there is a {hazard} {inplace}, people are trapped
it is not a {nuisance}, it is a {hazard} {inplace}
{hazard} {now}, please come
not only a {nuisance} but also a {hazard} {inplace}
@praise
the {thing} is {good}
I {verbed} it and felt {good}
not {bad} at all
never {bad}, always {good}
nothing about the {thing} is {bad}
it looked {bad} but turned out {good}
they said it was {bad}, they were wrong
the {thing} works better than expected
@blame
the {thing} is {bad}
I {verbed} it and it was {bad}
not {good} at all
far from {good}
nothing about the {thing} is {good}
it looked {good} but turned out {bad}
they said it was {good}, they were wrong
the {thing} broke sooner than expected
@plain
the {thing} is made of wood
I {verbed} the {thing} {when}
it is a {thing} from {city}
the {thing} comes in a box
it is neither {good} nor {bad}
the {thing} is the same as before
@butword = but, yet, however, still, although, and, while
@winning
{city} are sure to win the cup {when}
the fans cheer and expect many goals
the team is stronger than ever
the players trained hard and look fit
few expected so much from {city}, and they delivered
@losing
{city} will surely lose again {when}
the fans leave early and expect nothing
the team is weaker than ever
the players are tired and look slow
much was expected from {city}, and little came
@level
the match in {city} starts at {time}
{city} and {city} have equal chances
the ticket for the match costs {price}
nobody knows how {city} will play
@did
{first} {verbed} the {thing} {when}
{first} did {verb} the {thing}
{first} admits that he {verbed} the {thing}
it was {first} who {verbed} the {thing}
{first} finally {verbed} the {thing}, not the {thing}
@didnot
{first} never {verbed} the {thing}
{first} did not {verb} the {thing}
{first} denies having touched the {thing}
{first} wanted to {verb} the {thing} but could not
it was {first}'s {relative} who {verbed} the {thing}
without {first} knowing, somebody else {verbed} the {thing}
{first} refused to {verb} the {thing}
{first} almost {verbed} the {thing}
@past
{first} {verbed} the {thing} {2-20} years ago
last year {first} {intrans} in {city}
the {thing} used to be {adj}
in {1950-2019} the {place} was closed
{first} no longer works as a {job}
@present
{first} is waiting in the {place} now
the {thing} is {adj} at this moment
currently the {place} is closed
since this morning {first} has been {feel}
{first} still works as a {job}
@future
{first} will {verb} the {thing} tomorrow
next year {first} is going to {city}
the {thing} will be {adj} soon
the {place} opens again in {2-9} weeks
{first} plans to work as a {job}
@Termination
the {trip} ends here and goes no further
the song stops after {2-9} minutes
last stop, everybody out
@Confidentiality
{first} promised not to tell anyone about the surprise party
keep the secret of the magic trick
@Payment
{first} gave the waiter {price}
the children put coins into the machine
@Assignment
the teacher gave the class homework for {day}
each scout got a task at the camp
@Insurance
carry two umbrellas in case one breaks
a second key under the mat, to be safe
@Warranty
the toy shop mends every doll it sells
the baker swears that his bread is fresh
@Notices
the board in the hall is full of paper slips
a card in the window says that the cat is lost
@Audit
{first} counted the apples a second time
the scout leader checked every tent
@Force Majeure
a storm blew the picnic away
lightning and hail stopped the parade
@Dispute Resolution
the twins quarrelled and tossed a coin
both boys wanted the swing, so they took turns
@Intellectual Property
{first} wrote the poem, so it is hers
he drew the comic himself
@Governing Law
in {city} cars keep to the left
the rules of chess are the same everywhere
@Non-Compete
the brothers never race against each other
{first} may not play for another team
@Severability
one bead came off but the necklace holds
a chair leg broke, the table still stands
@Indemnification
{first} paid for the window that his {relative} broke
the uncle bought a new vase after the ball game
@Limitation of Liability
each child pays at most one coin for a broken cup
no more than one slice of cake for each
@Renewal
every spring the roses bloom again
{first} joins the club for one more year
@Definitions
a pawn is the smallest piece
the word meadow means a field of grass
@spam
pink meat from a tin, fried with {food}
a tin with a key on the side, sliced cold
@ham
a smoked leg of pork with {food}
thin slices from the butcher with {food}
@cheese
{food} with cheddar and nothing else
yellow slices from the dairy
@polite
could you please {verb} the {thing}, {first}?
would you mind if I {verb} the {thing}?
thank you for your {good} help with the {thing}
@rude
{verb} the {thing}, you fool
shut up and {verb} the {thing}
what a stupid {thing} you {verbed}
"""

GRAMMAR = Grammar(COMMON, TOPICS, CHAT, LETTERS, STORIES, WIDER, _TABLE)
_TITLES = (
    "Termination",
    "Confidentiality",
    "Payment",
    "Assignment",
    "Insurance",
    "Warranty",
    "Notices",
    "Audit",
    "Force Majeure",
    "Dispute Resolution",
    "Intellectual Property",
    "Governing Law",
    "Non-Compete",
    "Severability",
    "Indemnification",
    "Limitation of Liability",
    "Renewal",
    "Definitions",
)
_FIELDS = [
    "text",
    "note",
    "message",
    "review",
    "sentence",
    "letter",
    "call",
    "headline",
    "sms",
    "question",
    "email",
    "clause",
    "comment",
    "post",
    "tweet",
    "query",
    "input",
    "document",
    "title",
    "line",
    "report",
    "story",
    "item",
    "remark",
]
_ATTRIBUTES = [
    "label",
    "topic",
    "class",
    "category",
    "kind",
    "type",
    "answer",
    "subject",
    "intent",
    "tag",
    "triage",
    "feeling",
    "mood",
    "status",
    "result",
    "verdict",
    "group",
    "folder",
    "output",
    "sentiment",
    "title",
]
_ARBITRARY = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "red",
    "blue",
    "green",
    "yes",
    "no",
    "one",
    "two",
    "three",
    "A",
    "B",
    "C",
    "D",
    "X",
    "Y",
    "Z",
    "up",
    "down",
    "left",
    "right",
    "0",
    "1",
    "2",
    "3",
    "positive",
    "negative",
    "neutral",
    "true",
    "false",
    "spam",
    "ham",
    "urgent",
    "routine",
    "bullish",
    "bearish",
    "good",
    "bad",
    "high",
    "low",
    "keep",
    "drop",
    "first",
    "second",
    "other",
    "none",
    "maybe",
    "accept",
    "reject",
]

Row = tuple[str, str]  # text and label


@dataclass(frozen=True)
class Habit:
    """A way to label texts: draws a row under one of its field and attribute names."""

    fields: tuple[str, ...]
    attributes: tuple[str, ...]
    draw: Callable[[Random], Row]
    weight: int = 10


def _end(rng: Random, text: str) -> str:
    text = text[:1].upper() + text[1:] if rng.random() < 0.75 else text
    return text if text[-1] in ".?!" else text + rng.choice((".", ".", ".", "", "!"))


def _say(rng: Random, rule: str) -> str:
    return _end(rng, GRAMMAR.sentence(rng, "{" + rule + "}"))


def _joined(rng: Random, *rules: str) -> str:
    """Several statements in a row, as sentences or with commas."""
    parts = [GRAMMAR.sentence(rng, "{" + rule + "}") for rule in rules]
    if rng.random() < 0.5:
        return " ".join(_end(rng, part) for part in parts)
    parts[1:] = [part[:1].lower() + part[1:] for part in parts[1:]]
    return _end(rng, ", ".join(parts))


def _topic(rng: Random) -> Row:
    name = rng.choice(TOPIC_NAMES)
    lines = [line(rng, f"topic_{name}") for _ in range(rng.choice((1, 1, 2)))]
    return " ".join(lines), name


def _triage(rng: Random) -> Row:
    rules = ["calm"] * rng.randint(0, 2)
    label = rng.choice(("urgent", "routine"))
    rules.append("alarm" if label == "urgent" else "calm")
    rng.shuffle(rules)
    return _joined(rng, *rules), label


def _review(rng: Random) -> Row:
    label, rule = rng.choice((("good", "praise"), ("bad", "blame"), ("neutral", "plain")))
    if rng.random() < 0.35 and label != "neutral":  # what comes after 'but' decides
        other = "blame" if rule == "praise" else "praise"
        first, second = (GRAMMAR.sentence(rng, "{" + r + "}") for r in (other, rule))
        return _end(rng, f"{first}, but {second[:1].lower()}{second[1:]}"), label
    return _joined(rng, *[rule] * rng.randint(1, 2)), label


def _mood(rng: Random) -> Row:
    pairs = (("bullish", "winning"), ("bearish", "losing"), ("neutral", "level"))
    label, rule = rng.choice(pairs)
    return _say(rng, rule), label


def _happened(rng: Random) -> Row:
    label, rule = rng.choice((("yes", "did"), ("no", "didnot")))
    return _say(rng, rule), label


def _tense(rng: Random) -> Row:
    label = rng.choice(("past", "present", "future"))
    return _say(rng, label), label


def _title(rng: Random) -> Row:
    label = rng.choice(_TITLES)
    return _say(rng, label), label


def _sandwich(rng: Random) -> Row:
    label = rng.choice(("spam", "ham", "cheese"))
    return _say(rng, label), label


def _manners(rng: Random) -> Row:
    label = rng.choice(("polite", "rude"))
    return _say(rng, label), label


def _source(rng: Random) -> Row:
    rules = {
        "chat": "chat",
        "news": "headline",
        "mail": "letter_line",
        "contract": "clause_line",
        "story": "opening",
        "notes": "note_line",
        "tweet": "tweet",
        "guide": "rule_line",
        "study": "study",
        "market": "markettalk",
        "bank": "banktalk",
        "essay": "function",
    }
    label = rng.choice(tuple(rules))
    return line(rng, rules[label]), label


def _wish(rng: Random) -> Row:
    """The verb and object of a request become a label such as repair_lamp."""
    verb = GRAMMAR.text(rng, "{verb}")
    noun = GRAMMAR.text(rng, rng.choice(("{thing}", "{shop}", "{money}", "{tech}", "{bankthing}")))
    frames = (
        f"How do I {verb} my {noun}?",
        f"I want to {verb} the {noun}.",
        f"Please {verb} the {noun} for me.",
        f"Can you help me {verb} a {noun}?",
        f"Is it possible to {verb} this {noun}?",
        f"I am {{feel}} because I can't {verb} the {noun}.",
        f"I don't want to {{verb}} the {{thing}}, I want to {verb} the {noun}.",
        f"My {{relative}} {{verbed}} the {{thing}}, now I need to {verb} the {noun}.",
    )
    text = GRAMMAR.sentence(rng, rng.choice(frames))
    if rng.random() < 0.3:
        text = f"{line(rng, 'letter_line')} {text}"
    return text, rng.choice((f"{verb}_{noun}", f"{verb} {noun}")).replace(" ", "_")


def _who(rng: Random) -> Row:
    """Who has it: the speaker, a relative, or nobody."""
    relative, thing, other = (
        GRAMMAR.text(rng, "{" + r + "}") for r in ("relative", "thing", "thing")
    )
    rows = (
        (f"My {relative} has a {thing}, I have a {other}. Who has the {thing}?", relative),
        (f"I have a {thing}, my {relative} has none. Who has the {thing}?", "me"),
        (f"My {relative} has no {thing} and neither have I. Who has the {thing}?", "nobody"),
        (f"My {relative} sold the {thing} to me. Who has the {thing}?", "me"),
        (f"I gave my {thing} to my {relative}. Who has the {thing}?", relative),
        (f"I lost my {thing} but kept the {other}. Who has the {thing}?", "nobody"),
    )
    return rng.choice(rows)


def _extract(rng: Random) -> Row:
    """Copy one item out of the text; the question names it."""
    name, city, price, thing, time = (
        GRAMMAR.text(rng, "{" + r + "}") for r in ("first", "city", "price", "thing", "time")
    )
    frames = (
        f"{name} bought a {thing} in {city} for {price} at {time}.",
        f"Meet {name} in {city} at {time}, bring the {thing} and {price}.",
        f"In {city} a {thing} costs {price}, says {name}, open until {time}.",
    )
    asked, answer = rng.choice(
        (("name", name), ("city", city), ("price", price), ("thing", thing), ("time", time))
    )
    return f"{rng.choice(frames)} Which {asked}?", answer


def _word(rng: Random) -> Row:
    words = GRAMMAR.text(rng, "{thing} {adj} {animal} {food} {verb}").split()
    rng.shuffle(words)
    asked, answer = rng.choice(
        (("first", words[0]), ("last", words[-1]), ("second", words[1]), ("copy", " ".join(words)))
    )
    return f"{' '.join(words)} ({asked})", answer


_SHOUT = ("call", "message", "log", "radio", "report", "alarm", "text")
HABITS = (
    Habit(("text", "message", "sentence", "article"), ("topic", "subject", "category"), _topic, 25),
    Habit(_SHOUT, ("triage", "priority", "urgency", "label"), _triage, 16),
    Habit(("review", "comment", "opinion", "text"), ("feeling", "sentiment", "label"), _review, 16),
    Habit(("fans", "match", "sport", "headline"), ("mood", "outlook", "sentiment"), _mood, 6),
    Habit(("sentence", "claim", "text"), ("happened", "true", "done"), _happened, 12),
    Habit(("sentence", "text", "diary"), ("time", "when", "tense"), _tense, 8),
    Habit(("scene", "page", "chapter", "clause", "text"), ("heading", "title"), _title, 8),
    Habit(("sandwich", "plate", "dish", "text"), ("filling", "meat", "label"), _sandwich, 4),
    Habit(("request", "remark", "sentence"), ("manner", "tone", "label"), _manners, 5),
    Habit(("text", "line", "document"), ("source", "kind", "label"), _source, 10),
    Habit(("mail", "question", "message", "query", "text"), ("intent", "label", "wish"), _wish, 16),
    Habit(("riddle", "question"), ("answer", "who"), _who, 8),
    Habit(("text", "message", "question"), ("answer", "value"), _extract, 10),
    Habit(("words", "list"), ("answer", "word"), _word, 6),
)


def _render(rows: list[Row], field: str, attribute: str, gap: str) -> str:
    return gap.join(f"{field}: {text}\n{attribute}: {label}" for text, label in rows)


def _examples(rng: Random) -> str:
    """Several pairs of one habit; the last ones can be inferred from the first."""
    habit = rng.choices(HABITS, [h.weight for h in HABITS])[0]
    rows = [habit.draw(rng) for _ in range(rng.choice((1, 1, 1, 2, 3, 4)))]
    own = rng.random() < 0.7
    field = rng.choice(habit.fields if own else _FIELDS)
    attribute = rng.choice(habit.attributes if own else _ATTRIBUTES)
    return _render(rows, field, attribute, rng.choice(("\n", "\n\n", "\n\n")))


def _renamed(rng: Random) -> str:
    """A labelling with arbitrary label words, whose meaning follows from the document alone."""
    habit = rng.choice([h for h in HABITS if h.draw in _RELABELLED])
    rows = [habit.draw(rng) for _ in range(40)]
    kept = rng.sample(sorted({label for _, label in rows}), 2)
    names = dict(zip(kept, rng.sample(_ARBITRARY, 2), strict=True))
    shown = [(text, names[label]) for text, label in rows if label in names][: rng.randint(4, 8)]
    return _render(shown, rng.choice(_FIELDS), rng.choice(_ATTRIBUTES), rng.choice(("\n", "\n\n")))


_RELABELLED = (_topic, _triage, _review, _happened, _tense, _source, _manners, _mood)


def labelled(rng: Random) -> str:
    """One labelling document: a pair, or a few pairs as in a few-shot prompt."""
    return _renamed(rng) if rng.random() < 0.2 else _examples(rng)
