"""What makes two rows the same, and the digests by which rows are recognised later. No torch."""

import hmac
import json
import os
import re
import secrets
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any, TypeVar

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterError
from lora_domains.tasks import Example, Row, Task, columns_in, plain_label, plain_text
from lora_domains.verdict.ledger import LEDGER

T = TypeVar("T")
KEY, KEY_BYTES = "key", 32
FOLDER = ".lora-domains"
"""The folder of the ledger and its key in the project folder."""
GIT = {".gitignore": f"{KEY}\n.*.lock\n", ".gitattributes": "evaluations.* merge=union\n"}
"""Files for git: the key stays secret, and branches are merged by keeping the lines of both."""
PROJECT_VARIABLE, KEY_VARIABLE = "LORA_DOMAINS_PROJECT", "LORA_DOMAINS_KEY"
EMOTICON = (
    r"[:;=][-o^'’]?(?:[()\[\]{}|\\*@<>]|/(?!/))|[()\[\]{}|][-o^'’]?[:;=](?!\w)|</?3|\^_*\^|-_+-"
)
MARKS = re.compile(
    rf"(?P<kept>{EMOTICON}|(?<!\w)-(?=\d)|(?<=\d)[-.,:'’](?=\d)|!=|(?<![\w!?])!(?=\w))"
    r"|(?P<mark>[^\w\s])"
)
"""What stays a word of its own (an emoticon, a minus sign, a mark between digits, the negations of
programs), and every other character that is neither white space nor in a word."""
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\u3164"
    "\ufe00-\ufe0f\ufeff]|(?<=[A-Za-z\u00c0-\u024f])[\u200c\u200d]+"
)
"""Characters without a glyph: soft hyphens, zero-width spaces, directions, variants of emoji.
Joiners have a meaning in emoji and in some scripts, and none after a Latin letter."""
RAISED_DIGITS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
RAISED = re.compile("[⁰¹²³⁴-⁹]+|[₀-₉]+")
BREAK = re.compile(r"</?(?:br|p|div|span|li|ul|ol|hr|td|tr)\b[^<>]*>", re.IGNORECASE)
TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
SAMPLED, LETTERS = 1000, 12
"""A column is judged by this many rows; its texts identify rows if they have so many letters on
average and most are different."""

# ── Normalised text ─────────────────────────────────────────────────────────────────────────────


def normalise(text: str) -> str:
    """``text`` in NFKC, case-folded, with single spaces. Idempotent."""
    if text.isascii():
        return " ".join(text.lower().split())
    while True:  # case folding can undo NFKC and the reverse: repeat until nothing changes
        folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        if folded == text:
            return folded
        text = folded


_known: ContextVar[dict[str, str] | None] = ContextVar("known", default=None)


@contextmanager
def normalised_once() -> Iterator[None]:
    """In the block each text is normalised once; the results are dropped at its end.

    A search for leaks compares each row several times.
    """
    outer = _known.get()
    token = _known.set({} if outer is None else outer)
    try:
        yield
    finally:
        _known.reset(token)


def words(text: str) -> str:
    """The words of ``text``, normalised, without punctuation, separated by single spaces.

    Characters that carry meaning remain words: a minus sign, ``* / % # & @``, currencies, emoji and
    emoticons, marks between digits. What no reader sees is left out: soft hyphens, tags that break
    a line, the writing of ``&`` as ``&amp;``.
    """
    known = _known.get()
    if known is None:
        return _unpunctuated(normalise(visible(text)))
    if text not in known:
        known[text] = _unpunctuated(normalise(visible(text)))
    return known[text]


def visible(text: str) -> str:
    """``text`` as a reader sees it, raised digits written as ``^2``, lowered ones as ``_2``."""
    if "&" in text:
        text = unescape(text)
    if "<" in text:
        text = BREAK.sub(" ", text)
    if text.isascii():
        return text
    text = RAISED.sub(lambda m: ("^" if m[0][0] in RAISED_DIGITS else "_") + m[0], text)
    return INVISIBLE.sub("", text).replace("−", "-")


def _unpunctuated(text: str) -> str:
    return " ".join(MARKS.sub(_mark, text).split())


def _mark(match: re.Match[str]) -> str:
    if match["kept"]:
        return f" {match['kept']} "
    category = unicodedata.category(match[0])[0]
    if category == "M":  # an accent or vowel sign belongs to its letter
        return match[0]
    return f" {match[0]} " if category != "P" or match[0] in "*/%#&@" else " "


def identity(example: Example, with_choices: bool = False) -> str:
    """What makes two rows the same: the words of the prompt, or of the whole plain text.

    "What is the top-up limit?" and "what is the top up limit" are the same row; "C" and "C#" are
    not. ``with_choices`` adds the candidate answers, for rows that have their own: "Which of these
    is true?" alone identifies no row.
    """
    text = example.prompt or example.answer
    if with_choices:
        text = " ".join([text, *sorted(example.choices)])
    return words(text)


def own_words(example: Example, with_choices: bool = False) -> str:
    """The words of the row's own text, without the template of its prompt and without tags.

    Near rows are found by them, so that another template finds the same.
    """
    text = example.text or example.prompt or example.answer
    if with_choices:
        text = " ".join([text, *sorted(example.choices)])
    return words(TAG.sub("", BREAK.sub(" ", text)) if "<" in text else text)


def has_own_choices(examples: Sequence[Example]) -> bool:
    """Whether rows have candidate answers of their own, not one list of labels."""
    return len({example.choices for example in examples if example.choices}) > 1


def texts_and_labels(
    task: Task, rows: Sequence[Row], examples: Sequence[Example], raw: Sequence[Row]
) -> tuple[dict[str, tuple[str, ...]], ...]:
    """{id of a row: a text, its label and candidate answers}, for each text that identifies a row.

    By them a ledger knows test rows again. They depend on neither the prompt nor the order of
    columns and labels. The first text is that of the longest column of ``raw``, the rows as read;
    the others are those of the columns of the prompt. Each must tell the rows apart: a title or a
    category does not. Where none does, all columns of the prompt are one text. The label is the
    one that was read, whole numbers and truth values in one form, or else as the task spells it, so
    that rows are known by either.
    """
    kept = {example.id for example in examples}
    rows, raw = ([row for row in part if row.id in kept] for part in (rows, raw))
    columns = sorted(set(columns_in(task.template)) or set(task.input_columns))
    inputs = [[_text_in(row, column) for row in rows] for column in columns]
    texts: list[Sequence[str]] = []
    for of_column in [_longest(task, raw), *inputs]:
        if _tells_apart(of_column) and of_column not in texts:
            texts.append(of_column)
    texts = texts or [["\n".join(row) for row in zip(*inputs, strict=True)]]
    read, spelled = _labels(task, examples, raw)
    choices = [() if task.labels else example.choices for example in examples]
    ids = [example.id for example in examples]
    return tuple(
        {name: (text, label, *c) for name, text, label, c in
         zip(ids, of_column, labels, choices, strict=True)}
        for of_column in texts
        for labels in ([read] if read == spelled else [read, spelled])
    )  # fmt: skip


def _longest(task: Task, raw: Sequence[Row]) -> list[str]:
    """The texts of the column that holds most, repeats counted once; never that of the answer."""
    columns = columns_in(task.template)
    others = {task.answer_column, *(c for c in task.input_columns if c not in columns)}
    sample = _sample(raw)
    names = sorted({name for row in sample for name in row.values} - others, key=str)
    if not names:
        return []
    longest = max(names, key=lambda n: sum(map(len, {_plain(row, n) for row in sample})))
    return [_plain(row, longest) for row in raw]


def _tells_apart(texts: Sequence[str]) -> bool:
    """Whether most texts are different and long enough not to be numbers or names of a category."""
    if 2 * len(set(texts)) <= len(texts):
        return False
    sample = _sample(texts)
    letters = sum(map(str.isalpha, "".join(text[:100] for text in sample)))
    return letters >= LETTERS * len(sample)


def _sample(rows: Sequence[T]) -> Sequence[T]:
    """About ``SAMPLED`` of the rows, evenly spaced."""
    return rows[:: max(1, len(rows) // SAMPLED)]


def _labels(
    task: Task, examples: Sequence[Example], raw: Sequence[Row]
) -> tuple[list[str], list[str]]:
    """The label, or answer, of each row as it was read, in its plain form, and as it is used."""
    labels, column = task.labels, task.answer_column
    used = [labels[e.target] if labels and e.target >= 0 else e.answer.strip() for e in examples]
    read = [_plain(row, column) for row in raw] if labels and column else used
    return [plain_label(a.strip() or b) for a, b in zip(read, used, strict=True)], used


def _plain(row: Row, column: str) -> str:
    """The text in ``column``; "" where there is none."""
    return plain_text(row.values.get(column)) or ""


def _text_in(row: Row, column: str) -> str:
    """The text in ``column``; "" where there is none, as one of several columns may be empty. A
    chat also reads lists and objects (tools, parts of a message): of these it is their JSON."""
    value = row.values.get(column)
    text = plain_text(value)
    if text is None:
        return json.dumps(value, sort_keys=True, default=str)
    return text if text.strip() else ""


# ── Digests ─────────────────────────────────────────────────────────────────────────────────────


def digest_of(rows: Sequence[Example]) -> str:
    """sha256 of the exact text of the rows, in order: other tokens train another adapter.

    Of a chat, tools, reasoning and answers that are not learned count beside the text of its turns.
    """
    state, with_choices = sha256(), has_own_choices(rows)
    for row in rows:
        texts: list[Any] = [row.prompt, row.answer, *(row.choices if with_choices else ())]
        beside = [[turn.get(key) for key in ("weight", "reasoning_content")]
                  for turn in row.messages]  # fmt: skip
        texts += [row.tools] if row.tools else []
        texts += [beside] if any(any(part is not None for part in turn) for turn in beside) else []
        state.update(json.dumps(texts, default=str).encode() + b"\n")
    return state.hexdigest()


def source_digest(rows: Iterable[Example]) -> str:
    """sha256 of the texts and answers of the rows, in order, without the template of the prompt."""
    state = sha256()
    for row in rows:
        state.update(json.dumps([row.text or row.prompt, row.answer]).encode() + b"\n")
    return state.hexdigest()[:16]


def keyed_digest(text: str, key: bytes) -> str:
    """HMAC-SHA256 of ``text`` in hex: nobody without ``key`` can confirm a guess of the text."""
    return hmac.new(key, text.encode("utf-8", "surrogatepass"), sha256).hexdigest()


def row_digest(parts: Sequence[str], key: bytes) -> str:
    """A short keyed digest of a row in ``texts_and_labels``: of its words, choices in any order.

    48 bits: two sets of 10,000 rows have one in common by chance once in 2.8 million cases.
    """
    text, label, *choices = map(words, parts)
    return keyed_digest("\n".join([text, label, *sorted(choices)]), key)[:12]


def digest_key(folder: Path) -> bytes:
    """The key of the rows' digests: written once per output folder, never part of an adapter.

    Raises what ``secret_key`` raises.
    """
    return secret_key(folder / ".digest-key")


def project_folder() -> Path:
    """The working folder or its nearest parent with ``.git`` or ``pyproject.toml``.

    Where there is none, the working folder. LORA_DOMAINS_PROJECT names another.
    """
    if named := os.environ.get(PROJECT_VARIABLE):
        return Path(named)
    here = Path.cwd()
    marked = (
        folder
        for folder in (here, *here.parents)
        if (folder / ".git").exists() or (folder / "pyproject.toml").exists()
    )
    return next(marked, here)


def open_project() -> tuple[Path, bytes | None]:
    """The folder of the project's ledger, with its files for git, and the key; see ``project_key``.

    A key that is written is never committed: ``.gitignore`` names it.
    """
    folder = project_folder() / FOLDER
    key = project_key(folder, known=(folder / LEDGER).exists())
    for name, text in GIT.items():
        if key is not None and not (folder / name).exists():
            write_text(folder / name, text)
    return folder, key


def project_key(folder: Path, known: bool) -> bytes | None:
    """The key of the ledger in ``folder``, which git ignores; LORA_DOMAINS_KEY replaces the file.

    None where a ledger is ``known`` and its key is missing; else a new one is written. Raises
    AdapterError for a damaged key.
    """
    if given := os.environ.get(KEY_VARIABLE):
        return key_from(given.strip(), KEY_VARIABLE)
    if known and not (folder / KEY).exists():
        return None
    return secret_key(folder / KEY)


def secret_key(path: Path) -> bytes:
    """The key in the file ``path``, which is written with a new one where it is missing.

    Raises AdapterError where it cannot be written or read completely; with an empty key the text
    behind a digest could be guessed.
    """
    try:
        if not path.exists():
            # If another process has written a key meanwhile, that one is kept.
            write_text(path, secrets.token_hex(KEY_BYTES), private=True, overwrite=False)
        return key_from(path.read_text(), str(path))
    except OSError as error:
        raise _bad_key(str(path), error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _bad_key(str(path), "something else") from error


def key_from(text: str, where: str) -> bytes:
    """The key that ``text`` writes in hexadecimal; raises AdapterError, naming ``where``."""
    try:
        key = bytes.fromhex(text)
    except ValueError:
        raise _bad_key(where, "something else") from None
    if len(key) != KEY_BYTES:
        raise _bad_key(where, "another length")
    return key


def _bad_key(where: str, found: str) -> AdapterError:
    return AdapterError(
        where=where,
        expected=f"a key of {KEY_BYTES} bytes in hexadecimal",
        found=found,
        hint="Restore it, or free some space. With a new key, the rows of older cards and ledgers "
        "can no longer be recognised.",
    )
