"""The verb that labels texts or the rows of a file: one answer a row, in the order of the rows."""

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice, tee
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

from rich.console import Console

from lora_domains import __version__
from lora_domains.adapters.folder import check_one_base, find_adapter
from lora_domains.atomic import adapter_name, folders_with
from lora_domains.cli.flags import (
    add_base_flags,
    add_quiet_flag,
    add_reading_flags,
    columns,
    reading,
)
from lora_domains.cli.parser import (
    Verbs,
    add_adapter_argument,
    add_out_flag,
    add_verb,
    check_no_file,
)
from lora_domains.cli.recipes import open_model
from lora_domains.console import Display
from lora_domains.console.files import AnswerFile, Questions, StandardOutput, Target, check_free
from lora_domains.console.forms import (
    Cells,
    Columns,
    Lines,
    Printed,
    answer_columns,
    check_form,
    dialect_for,
)
from lora_domains.console.rows import read_blocks, read_stream
from lora_domains.data.readers import RowsRead
from lora_domains.data.source import Data
from lora_domains.errors import UsageError, listed
from lora_domains.report.card import CARD, Card
from lora_domains.stats.thresholds import check_referral
from lora_domains.tasks import Row, Task, task_from_record

if TYPE_CHECKING:
    from lora_domains.inference.predict import Answer
    from lora_domains.model import DomainModel

STREAM = "-"
"""The name of the standard input, and of the standard output."""
SPOOLED = 1 << 24
"""Bytes of the standard input that are held in memory; more wait in an unnamed temporary file."""
PULSE = 60.0
"""Seconds between two lines of progress in a log."""


def add_verbs(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs, "predict", predict,
        usage="ADAPTER [TEXT ...] [options]\n"
        "       lora-domains predict ADAPTER --input FILE --output FILE [options]\n"
        "       lora-domains predict --domain-column COLUMN --input FILE --output FILE",
        description="Label texts with an adapter, or every row of a file of any form that fit "
        "reads. Writes one line for each row to the standard output: the label and its "
        "probability, separated by a tab, or the generated answer. With --output the rows are "
        "written to a file (.csv, .tsv, .jsonl or .parquet) in their order, with all of their "
        "columns, the label and the probability of every label. Everything else goes to the "
        "standard error."
        "\n\nA .csv has the separator of a CSV input; semicolons go with decimal commas. It is "
        "UTF-8, with a byte order mark for Excel where the input has one, is a workbook or is in "
        "another encoding."
        "\n\nAnswers are written as they come. After a kill or with a full disk, the same command "
        "goes on where it stopped."
        "\n\nThe standard input is read as JSON lines, JSON or CSV where it is one of these, and "
        "otherwise as one text a line.",
        example='lora-domains predict triage "Chest pain since this morning."\n'
        "  lora-domains predict triage --input new.csv --output answers.csv\n"
        "  lora-domains predict triage --refer-below 0.8 < notes.txt",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, nargs="?")
    add = inputs.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts, or rows as JSON "
        "where several columns are read; default: --input")  # fmt: skip
    add("--input", metavar="FILE", help="rows to answer; default: -, the standard input")
    add("--text", metavar="COLUMN", help="column of the text, or several, if it has another name "
        "than in training")  # fmt: skip
    add("--domain-column", metavar="COLUMN", help="column with the name of the adapter in --out "
        "that answers the row; ADAPTER answers those with an empty cell")  # fmt: skip
    add("--drop-empty", action="store_true", help="leave the answer of rows without a text empty, "
        "instead of refusing them")  # fmt: skip
    add_reading_flags(inputs)
    add_base_flags(inputs, quantised=False, mapped=True)
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output", metavar="FILE", help="write the rows with their answers to this file (.csv, "
        ".tsv, .jsonl, .parquet); -: as CSV to the standard output")  # fmt: skip
    add("--overwrite", action="store_true", help="replace a file that exists")
    add("--json", action="store_true", help="write an object for each row or text to the standard "
        "output")  # fmt: skip
    add("--refer-below", type=float, default=0.0, metavar="P", help="answer 'refer' where the "
        "probability of the label is below P")  # fmt: skip
    add_quiet_flag(output)


def predict(
    flags: argparse.Namespace, display: Display | None = None, model: "DomainModel | None" = None
) -> int:
    """Answer texts, or the rows of a file or of the standard input.

    ``model`` has the adapter loaded, under the name of its folder; by default one is opened.
    """
    check_no_file(flags.texts, flags.adapter)
    _check_places(flags)
    stderr = Console(stderr=True, highlight=False, emoji=False)
    display = display or Display(console=stderr, brief=flags.quiet)
    adapters = _Adapters(flags, model)
    with _rows(flags, adapters) as blocks:
        # All is checked before the base is loaded, which takes a while.
        questions = Questions(
            blocks, adapters.task, flags.adapter, adapters.names, flags.domain_column,
            _text_columns(flags), bool(flags.texts), flags.drop_empty,
            typed=_suffix(flags) == ".parquet",
        )  # fmt: skip
        named = flags.input if flags.input not in (None, STREAM) else "standard input"
        questions.check(lambda note: display.note(f"{named}: {note}"))
        adapters.check(questions.tasks, flags.refer_below)
        target = _target(flags, questions, adapters)
        with target.open(flags.overwrite):
            if target.rows:
                display.note(f"{flags.output}: going on after {target.rows} answers")
            _answer(questions, target, adapters, display)
            target.finish()
    if flags.output not in (None, STREAM):
        display.line(f"{questions.count} rows: {flags.output}")
    return 0


def _answer(questions: Questions, target: Target, adapters: "_Adapters", display: Display) -> None:
    """Answer what is not answered yet, in blocks that are the same in every run."""
    from lora_domains.inference.batches import in_blocks

    if target.rows == questions.count:
        return
    model = adapters.opened(display, questions.tasks)
    below, told = adapters.flags.refer_below, time.monotonic()
    rows, asked = tee(islice(questions, target.rows, None))
    texts = (
        None if one.text is None else (one.text, adapters.loaded[one.adapter]) for one in asked
    )

    def answer(texts: list[Any], names: list[str], _before: int) -> "Sequence[Answer]":
        return model.predict(texts, domains=names, refer_below=below) if texts else ()

    with display.progress("answering", questions.count) as advance:
        advance(target.rows)
        for answers in in_blocks(answer, texts):
            target.write([(next(rows).values, answer) for answer in answers])
            advance(len(answers))
            if time.monotonic() - told > PULSE:
                told = time.monotonic()
                display.pulse(f"{target.rows} of {questions.count} rows answered")


# ── Adapters ────────────────────────────────────────────────────────────────────────────────────


class _Adapters:
    """The adapter that is given, and those in --out that cells name."""

    def __init__(self, flags: argparse.Namespace, model: "DomainModel | None" = None) -> None:
        self.flags, self._model, out = flags, model, Path(flags.out)
        self.loaded: dict[str, str] = {}
        """The name under which each is loaded."""
        self._cards: dict[str, Card] = {}
        self._folders: dict[str, Path] = {}
        if flags.domain_column is not None:
            self._folders = {folder.name: folder for folder in folders_with(out, CARD)}
        if flags.adapter is not None:
            given = find_adapter(flags.adapter, out)
            self._folders |= {given.name: given, flags.adapter: given}
        elif flags.domain_column is None:
            raise UsageError(
                where="lora-domains predict",
                expected="an adapter, or --domain-column",
                found="neither",
                hint='For example: lora-domains predict triage "a text"',
            )

    @property
    def names(self) -> list[str]:
        return list(self._folders)

    def task(self, name: str) -> Task | None:
        """The task of an adapter; None where there is none of that name.

        Raises UsageError without a card that holds it.
        """
        folder = self._folders.get(name)
        if folder is None:
            return None
        if not (folder / CARD).is_file():
            # Loading says what is wrong with the folder, and else that its task is not known.
            self.opened(Display(quiet=True), [name]).predict("", domain=self.loaded[name])
        self._cards[name] = card = Card.read(folder, measured=False)
        return task_from_record(card.adapter.task)

    def needed(self) -> list[str]:
        """The columns by which a table is known on the standard input."""
        if self.flags.domain_column is not None:
            return [self.flags.domain_column]
        task = self.task(self.flags.adapter)
        own = list(task.input_columns) if task is not None else []
        return [name.strip() for name in self.flags.text.split(",")] if self.flags.text else own

    def check(self, tasks: dict[str, Task], refer_below: float) -> None:
        """Raise UsageError or AdapterMismatch where these cannot answer on one base."""
        for task in tasks.values():
            check_referral(refer_below, (task.labels or ()) if task.outputs == "classes" else ())
        check_one_base(
            (self._folders[name] for name in tasks), f"--domain-column {self.flags.domain_column}",
            lambda ours: f"the rows of {listed(map(adapter_name, ours), 5)}",
            "Answer the rows of each base in a file of their own, with one command each:",
        )  # fmt: skip

    def opened(self, display: Display, names: Iterable[str]) -> "DomainModel":
        """The base with these adapters."""
        folders = {name: self._folders[name] for name in names}
        if self._model is not None:
            self.loaded = {name: folder.name for name, folder in folders.items()}
            return self._model
        model = open_model(self.flags, display=display, adapter=next(iter(folders.values()), None))
        for name, folder in folders.items():
            known = None if name == self.flags.adapter else name
            self.loaded[name] = model.load_adapter(folder, known)
        return model

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """A digest of each adapter and of its thresholds."""
        return {
            name: sha256((self._folders[name] / CARD).read_bytes()).hexdigest() for name in names
        }


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


class _Blocks(Protocol):
    def __call__(self) -> Iterator[RowsRead]: ...


@contextmanager
def _rows(flags: argparse.Namespace, adapters: _Adapters) -> Iterator[_Blocks]:
    """What reads the rows to answer from their beginning."""
    if flags.texts and (flags.input or flags.domain_column):
        raise UsageError(
            where="lora-domains predict",
            expected="texts or --input" if flags.input else "rows with a --domain-column",
            found="both" if flags.input else "texts",
            hint="Omit one.",
        )
    how = reading(flags)
    if flags.texts:
        rows = [Row({"text": t}, "input", n, f"text {n + 1}") for n, t in enumerate(flags.texts)]
        yield lambda: iter([RowsRead(rows)])
    elif flags.input not in (None, STREAM):
        yield lambda: read_blocks(flags.input, "input", how)
    else:
        needed = adapters.needed()
        with _spooled() as stream:
            yield lambda: read_stream(stream, "input", needed, how)


@contextmanager
def _spooled() -> Iterator[BinaryIO]:
    """The standard input to read more than once. Raises UsageError if there is none, or no room."""
    if sys.stdin.isatty():
        raise UsageError(
            where="lora-domains predict",
            expected="texts, --input FILE, or rows on the standard input",
            found="none of these",
            hint='lora-domains predict ADAPTER "a text"',
        )
    with SpooledTemporaryFile(SPOOLED) as stream:
        try:
            if hasattr(sys.stdin, "buffer"):
                shutil.copyfileobj(sys.stdin.buffer, stream)
            else:
                stream.write(sys.stdin.read().encode())
        except OSError as error:
            raise UsageError(
                where="standard input",
                expected=f"room for it in {gettempdir()}",
                found=error.strerror or str(error),
                hint="Save the rows as a file, and name it: --input FILE",
            ) from error
        yield cast(BinaryIO, stream)


def _text_columns(flags: argparse.Namespace) -> Callable[[Row], tuple[str, ...]] | None:
    """What finds the columns of --text in a row, some of which may have commas in their names."""
    if not flags.text:
        return None

    def found(row: Row) -> tuple[str, ...]:
        named = columns(flags.text, Data(test=[dict(row.values)]))
        return (named,) if isinstance(named, str) else named

    return found


# ── Places ──────────────────────────────────────────────────────────────────────────────────────


def _suffix(flags: argparse.Namespace) -> str:
    """The form of the answers; "" for lines to read."""
    if flags.output not in (None, STREAM):
        return check_form(flags.output)
    return ".jsonl" if flags.json else ".csv" if flags.output else ""


def _check_places(flags: argparse.Namespace) -> None:
    """Raise UsageError where the answers cannot go, or would replace the rows."""
    if flags.output in (None, STREAM):
        return
    if flags.json:
        raise UsageError(
            where="--json",
            expected="the standard output",
            found=f"--output {flags.output}",
            hint="Name a file ending in .jsonl, or leave --output out.",
        )
    _suffix(flags)
    rows, output = flags.input, Path(flags.output)
    if rows not in (None, STREAM) and Path(rows).resolve() == output.resolve():
        raise UsageError(
            where=f"--output {output}",
            expected="another file than --input",
            found="the same",
            hint="The rows in it would be replaced: choose another name.",
        )
    check_free(output, flags.overwrite)


def _target(flags: argparse.Namespace, questions: Questions, adapters: _Adapters) -> Target:
    """Where the answers go. Raises UsageError where rows have such columns already."""
    suffix, tasks = _suffix(flags), list(questions.tasks.values())
    if not suffix:
        return StandardOutput(Printed())
    names = answer_columns(tasks, suffix)
    taken = sorted({*questions.columns} & {*names})
    if taken:
        raise UsageError(
            where=f"--output {flags.output}" if flags.output else "--json",
            expected="rows without the columns of the answers",
            found="the columns " + listed(map(repr, taken)),
            hint="Rename or drop them; they would be replaced.",
        )
    form: Lines = Lines()
    if suffix == ".parquet":
        types = {name: questions.types.of(name) for name in questions.columns}
        form = Columns(types, names, all(task.outputs == "value" for task in tasks))
    elif suffix != ".jsonl":
        form = Cells(list(questions.columns), names, dialect_for(suffix, questions.dialect))
    if flags.output in (None, STREAM):
        return StandardOutput(form)
    run = {
        "the rows": questions.digest,
        "the adapters": adapters.digests(questions.tasks),
        "--base": flags.base,
        "--domain-column": flags.domain_column,
        "--text": flags.text,
        "--drop-empty": flags.drop_empty,
        "--refer-below": flags.refer_below,
        "the version of lora-domains": __version__,
    }
    return AnswerFile(Path(flags.output), form, run)
