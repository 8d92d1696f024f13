"""What each column of a table holds, by its cells, and which of them a text tells.

Columns are described by their names and by counts, never by a cell.
"""

import datetime
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lora_domains.data.source import file_of
from lora_domains.errors import DataError, EmptyCell, UsageError
from lora_domains.tasks import Number, Preference, Row, Task, is_null, plain_text
from lora_domains.tasks.classification import USUAL_LABELS
from lora_domains.tasks.messages import are_messages
from lora_domains.tasks.number import GROUPED, PLAIN, number_in
from lora_domains.tasks.rows import parsed

Holds = Literal["nothing", "one value", "messages", "lists", "dates", "ids", "numbers",
                "categories", "free text", "names"]  # fmt: skip

MOST = 0.95
"""The share of cells of one form that makes it the form of a column."""
WORDS = 4.0
"""Words of a cell, on average, from which on it is free text."""
REPEATED = 3.0
"""Rows for each value, on average, from which on values are categories."""
FEW_NUMBERS, MOST_CATEGORIES = 20, 300
"""The most distinct numbers that are categories, and the most categories."""
FEWEST_OWNERS = 10
"""The fewest patients or customers whose rows are worth keeping together."""
SAMPLED, FOLDS = 1000, 3
"""Texts by which columns are compared, and the parts of them that are predicted in turn."""
DATE = re.compile(
    r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2})( .*)?"
    r"|\d{1,2}:\d{2}(:\d{2})?"
)
RATINGS, TRUTHS = ("label", "kto_tag", "kto_label", "desirable"), {"true", "false"}
"""Columns that say whether an answer is good, and what they then hold."""
OWNER = re.compile(
    r"(.*[\W_])?id[\W_]*|id[\W_].+"
    r"|(patient(en|in)?|pat|person|subject|customer|client|user|author|thread|session|account"
    r"|household|kunden?|pid|mrn|fall|case|conversation|vertrags?|contract)"
    r"[\W_]*(id|nr|no|num|number|nummer|key|code|name)?[\W_]*", re.IGNORECASE
)  # fmt: skip
"""Names of columns that say to whom a row belongs."""
ATTRIBUTES = """
sex gender geschlecht sexe sexo age alter ward station department abteilung site clinic hospital
klinik country land city language lang sprache source quelle split year month
"""
"""Names of columns that say of whom or whence a row is, which a text often gives away."""


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str
    holds: Holds
    filled: int
    """Cells that are not empty."""
    distinct: int
    words: float = 0.0
    """Words of a cell, on average."""
    named_as_a_cell: bool = False

    @property
    def in_words(self) -> str:
        """``free text, 41 words on average``."""
        if self.holds == "free text":
            return f"free text, {self.words:.0f} words on average"
        what = {"names": "texts", "numbers": "numbers"}.get(self.holds, "values")
        return f"{self.distinct} different {what} in {self.filled} rows"

    @property
    def repeats(self) -> bool:
        """Whether its values say whose a row is, and one of them has several rows."""
        owners = self.holds in ("ids", "numbers", "names", "categories")
        many = FEWEST_OWNERS <= self.distinct < self.filled
        return owners and many and OWNER.fullmatch(self.name) is not None

    @property
    def standing(self) -> float:
        """What its name says for it as labels, added to how far the text tells them."""
        first = re.split(r"[\W_\d]|(?<=[a-z])(?=[A-Z])", self.name)[0].lower()
        usual, attribute = self.name.lower() in USUAL_LABELS, first in ATTRIBUTES.split()
        # Numbers are often of whom a row is, or counted afterwards.
        return 0.3 * usual - 1.0 * attribute - 0.3 * (self.holds == "numbers")


def columns_of(rows: Sequence[Row]) -> dict[str, Column]:
    """The columns of ``rows`` by name, in order."""
    names = dict.fromkeys(name for row in rows for name in row.values)
    return {name: _column(name, [row.values.get(name) for row in rows]) for name in names}


def _column(name: str, values: Sequence[object]) -> Column:
    cells = [cell for cell in values if not (is_null(cell) or cell in ("", [], ()))]
    if are_messages(_decoded(cells[0]) if cells else None):
        cells = [_decoded(cell) for cell in cells]  # conversations as JSON, in a table
    if any(isinstance(cell, list | tuple | Mapping) for cell in cells):
        turns = all(are_messages(cell) for cell in cells)
        return Column(name, "messages" if turns else "lists", len(cells), len(cells))
    texts = [text for cell in cells if (text := (plain_text(cell) or "").strip())]
    if not texts:
        return Column(name, "nothing", 0, 0)
    words, distinct = sum(len(text.split()) for text in texts) / len(texts), len({*texts})
    holds = _held(cells, texts, distinct, words)
    form = {"dates": DATE, "numbers": PLAIN, "ids": PLAIN}.get(holds)
    like = name in texts or (form is not None and form.fullmatch(name) is not None)
    return Column(name, holds, len(texts), distinct, words, named_as_a_cell=like)


def _decoded(cell: object) -> object:
    return parsed(cell) if isinstance(cell, str) and cell.lstrip().startswith("[") else cell


def _held(cells: Sequence[object], texts: Sequence[str], distinct: int, words: float) -> Holds:
    """What a column of ``texts``, none of them empty, holds."""
    if distinct == 1:
        return "one value"
    dates = (isinstance(cell, datetime.date | datetime.time) for cell in cells)
    if _most(dates) or _most(DATE.fullmatch(text) for text in texts):
        return "dates"
    if _most(PLAIN.fullmatch(text) or GROUPED.fullmatch(text) for text in texts):
        if distinct == len(texts) > FEW_NUMBERS and all(text.isdecimal() for text in texts):
            return "ids"
        return "categories" if distinct <= min(FEW_NUMBERS, len(texts) / 2) else "numbers"
    if distinct <= MOST_CATEGORIES and len(texts) / distinct >= REPEATED:
        return "categories"
    if words >= WORDS:
        return "free text"
    with_digits = _most(any(letter.isdigit() for letter in text) for text in texts)
    return "ids" if with_digits and _most(" " not in text for text in texts) else "names"


def _most(found: Iterable[object]) -> bool:
    """Whether nearly all of ``found`` are true."""
    flags = [bool(one) for one in found]
    return sum(flags) >= MOST * len(flags)


def without_header(columns: Mapping[str, Column]) -> bool:
    """Whether a name is one of the cells below it, and not all of them are numbers from 0 on."""
    counted = [*columns] == [str(at) for at in range(len(columns))]
    return not counted and any(column.named_as_a_cell for column in columns.values())


def check_rated(task: Task, given: Sequence[Row]) -> None:
    """Raise DataError where a column says that some answers are bad, and ``task`` would learn them:
    rated ones (KTO), or the rejected ones of pairs, but for those chosen over them."""
    if not given or task.beta is not None or not (task.converses or task.scored_by == "text"):
        return
    others = [name for name in given[0].values if name not in task.columns]
    pairs = Preference.from_columns([*given[0].values])
    if pairs is not None and pairs.chosen in task.columns and pairs.rejected not in task.columns:
        return
    rejected = [name for name in given[0].values if name.casefold().startswith("rejected")]
    cells = {name: {(plain_text(row.values.get(name)) or "").casefold() for row in given}
             for name in others if name.casefold() in RATINGS}  # fmt: skip
    rated = [name for name, held in cells.items() if held & TRUTHS and held <= TRUTHS | {""}]
    if not (rejected or rated):
        return
    raise DataError(
        where=file_of(given[0].place),
        expected="answers that are all to be learned, or pairs of a chosen and a rejected one",
        found=f"a column {(rejected or rated)[0]!r} " + (
            "of rejected answers" if rejected
            else "that says which answers are good"),
        hint="Write pairs of answers to one prompt as columns prompt, chosen and rejected "
        "(--task preference); or keep the rows with good answers and name their columns: "
        "--text COLUMN --label COLUMN",
    )  # fmt: skip


def alone(columns: Mapping[str, Column], asked: Sequence[str], answer: str) -> bool:
    """Whether there are no texts but those of the columns that ask, and the ``answer``."""
    return not any(column.holds in ("free text", "names") for name, column in columns.items()
                   if name not in (*asked, answer))  # fmt: skip


def check_text(task: Task, row: Row) -> None:
    """Raise UsageError where a ``task`` of plain texts would read messages."""
    cells = [_decoded(row.values.get(name)) for name in task.columns]
    if not task.converses and any(are_messages(cell) for cell in cells):
        raise UsageError(
            where=f"--task {task.kind}",
            expected="answers that are text",
            found="messages",
            hint="Learn the chosen ones as chats: --task chat",
        )


def from_cells(
    kind: type[Task], given: Sequence[Row], label: str, decimal: str | None
) -> tuple[Task, str] | None:
    """The task of ``kind`` for such labels, numbers with that ``decimal`` sign; and why."""
    told = kind is Number and decimal
    return Number.from_cells(given, label, decimal) if told else kind.from_cells(given, label)


def check_numbers(given: Sequence[Row], columns: Mapping[str, Column], decimal: str | None) -> None:
    """Raise the DataError of the first cell that is no number in the only column of numbers."""
    numbers = [column.name for column in columns.values() if column.holds == "numbers"]
    for row in given if len(numbers) == 1 else ():
        with suppress(EmptyCell):
            number_in(row, numbers[0], decimal or ".")


def told(task: Task, given: Sequence[Row]) -> float:
    """How far the texts of ``given`` tell its answers (``told_by``); of several labels, whether the
    most frequent one is among them."""
    rows = [row for row in given if any(plain_text(row.values.get(c)) for c in task.input_columns)]
    texts = [" ".join(plain_text(row.values.get(c)) or "" for c in task.input_columns)
             for row in rows]  # fmt: skip
    if task.outputs == "value":
        return told_by(texts, [_number(task, row) for row in rows])
    labels = [task.row_labels(row) for row in rows]
    if task.outputs == "labels":
        ((most, _),) = Counter(label for several in labels for label in several).most_common(1)
        return told_by(texts, [str(most in several) for several in labels])
    return told_by(texts, [one[0] if one else "" for one in labels])


def _number(task: Task, row: Row) -> float:
    """The number of a row, 0 where it has none."""
    try:
        return task.example(row).truth[0]
    except DataError:
        return 0.0


def told_by(texts: Sequence[str], values: Sequence[str] | Sequence[float]) -> float:
    """How far a linear model on the words of ``texts`` tells ``values`` of other rows, 0 to 1.

    Of names it is Cohen's kappa, of numbers the correlation with those predicted.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.metrics import cohen_kappa_score
    from sklearn.model_selection import KFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    pairs = list(dict(zip(texts, values, strict=True)).items())
    chosen = np.random.default_rng(0).permutation(len(pairs))[:SAMPLED]
    numbers = isinstance(pairs[0][1], float)
    if not numbers:
        counts = Counter(pairs[at][1] for at in chosen)
        chosen = np.array([at for at in chosen if counts[pairs[at][1]] >= FOLDS], dtype=int)
    known = np.array([pairs[at][1] for at in chosen])
    if len(chosen) < 4 * FOLDS or len({*known.tolist()}) < 2:
        return 0.0
    model = make_pipeline(
        TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+"),
        Ridge() if numbers else LinearSVC(),
    )
    try:
        told = cross_val_predict(model, [pairs[at][0] for at in chosen], known, cv=KFold(FOLDS))
    except ValueError:  # one class alone in two of the folds
        return 0.0
    if numbers:
        return max(0.0, float(np.corrcoef(known, told)[0, 1])) if np.ptp(told) else 0.0
    return max(0.0, float(cohen_kappa_score(known, told)))
