"""The verb that labels texts or the rows of a file: one answer a row, in the order of the rows."""

import argparse
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lora_domains.adapters.folder import find_adapter
from lora_domains.atomic import new_file
from lora_domains.cli.flags import (
    add_adapter_argument,
    add_base_flags,
    add_out_flag,
    add_reading_flags,
    columns,
    reading,
)
from lora_domains.cli.parser import Verbs, add_verb, check_no_file
from lora_domains.cli.recipes import open_model
from lora_domains.console import Display
from lora_domains.data.checks import all_errors, check_present
from lora_domains.data.readers import read_noted, read_unnamed
from lora_domains.data.source import Data
from lora_domains.errors import DataError, EmptyCell, UsageError, listed
from lora_domains.report.card import CARD, Card
from lora_domains.tasks import Row, Task, is_null, task_from_record

if TYPE_CHECKING:
    from lora_domains.inference.predict import Answer
    from lora_domains.model import DomainModel

BLOCK = 1024
"""Rows that are answered before their answers are written."""
WRITTEN = (".csv", ".tsv", ".jsonl")
"""File forms of ``--output``."""


@dataclass(frozen=True)
class Question:
    """A row to answer: what is written of it, and what the task reads; None for an empty text."""

    values: Mapping[str, Any]
    text: str | Mapping[str, Any] | None


def add_predict(verbs: Verbs) -> None:
    """Add the verb to the parser."""
    parser = add_verb(
        verbs, "predict", predict,
        group="everyday",
        summary="label texts, or the rows of a file, with an adapter",
        usage="ADAPTER [TEXT ...] [options]\n"
        "       lora-domains predict ADAPTER --input FILE --output FILE [options]",
        description="Label texts with an adapter, or every row of a file of any form that fit "
        "reads. Writes one line for each row to the standard output: the label and its "
        "probability, separated by a tab, or the generated answer. With --output the rows are "
        "written to a file (.csv, .tsv or .jsonl) in their order, with all of their columns, the "
        "label and the probability of every label. Everything else goes to the standard error."
        "\n\nThe standard input is read as JSON lines, JSON or CSV where it is one of these, and "
        "otherwise as one text a line.",
        example='lora-domains predict triage "Chest pain since this morning."\n'
        "  lora-domains predict triage --input new.csv --output answers.csv\n"
        "  lora-domains predict triage --refer-below 0.8 < notes.txt",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs)
    add = inputs.add_argument
    add("texts", nargs="*", metavar="TEXT", help="texts; default: --input")
    add("--input", metavar="FILE", help="rows to answer; default: the standard input")
    add("--text", metavar="COLUMN", help="column of the text, or several, if it has another name "
        "than in training")  # fmt: skip
    add("--drop-empty", action="store_true", help="leave the answer of rows without a text empty, "
        "instead of refusing them")  # fmt: skip
    add_reading_flags(inputs)
    add_base_flags(inputs, quantised=False)
    add_out_flag(inputs)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--output", metavar="FILE", help="write the rows with their answers to this file")
    add("--refer-below", type=float, default=0.0, metavar="P", help="answer 'refer' where the "
        "probability of the label is below P")  # fmt: skip


def predict(
    flags: argparse.Namespace, display: Display | None = None, model: "DomainModel | None" = None
) -> int:
    """Answer texts, or the rows of a file or of the standard input.

    ``model`` has the adapter loaded, under the name of its folder; by default one is opened.
    """
    check_no_file(flags.texts)
    display = display or Display(console=Console(stderr=True, highlight=False))
    task = _task(flags)
    # Before the base is loaded, which takes a while.
    questions = _questions(task, flags, display)
    _check_places(flags.input, flags.output)
    answer_columns = _answer_columns(task, questions, flags.output)
    name = Path(flags.adapter).name
    if model is None:
        model = open_model(flags, display=display, adapter=flags.adapter)
        name = model.load_adapter(flags.adapter)

    def answers() -> Iterator[tuple[Question, "Answer | None"]]:
        for start in range(0, len(questions), BLOCK):
            block = questions[start : start + BLOCK]
            texts = [one.text for one in block if one.text is not None]
            found = iter(
                model.predict(texts, domain=name, refer_below=flags.refer_below) if texts else ()
            )
            for one in block:
                yield one, None if one.text is None else next(found)

    opened = _written(flags.output, questions, answer_columns) if flags.output else nullcontext()
    with opened as write:
        for question, answer in answers():
            if write is not None:
                write(question, answer)
            else:
                sys.stdout.write(_line(answer) + "\n")
    if flags.output:
        display.line(f"{len(questions)} rows: {flags.output}")
    sys.stdout.flush()
    return 0


def _task(flags: argparse.Namespace) -> Task | None:
    """The task in the adapter's card; None where loading the adapter says what is wrong with it."""
    folder = find_adapter(flags.adapter, Path(flags.out))
    if not (folder / CARD).is_file():
        return None
    return task_from_record(Card.read(folder).adapter.task)


# ── Rows ────────────────────────────────────────────────────────────────────────────────────────


def _questions(
    task: Task | None, flags: argparse.Namespace, display: Display
) -> Sequence[Question]:
    """The rows to answer. Raises DataError for rows that cannot be answered, all in one error."""
    if flags.texts and flags.input:
        raise UsageError(
            where="lora-domains predict",
            expected="texts or --input",
            found="both",
            hint="Omit one.",
        )
    if task is None:
        return [Question({"text": text}, text) for text in flags.texts]
    if flags.texts:
        for n, text in enumerate(flags.texts):
            task.to_predict(text, n)  # refuses what cannot be answered
        return [Question({"text": text}, text) for text in flags.texts]
    task.check_predictable()
    if flags.input:
        found = read_noted(flags.input, "input", reading(flags))
    else:
        found = read_unnamed(_standard_input(), "input", task.input_columns, reading(flags))
    for note in found.notes:
        display.line(f"{flags.input or 'standard input'}: {note}")
    return _checked(task, found.rows, _columns(task, found.rows, flags), flags.drop_empty)


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        raise UsageError(
            where="lora-domains predict",
            expected="texts, --input FILE, or rows on the standard input",
            found="none of these",
            hint='lora-domains predict ADAPTER "a text"',
        )
    stream = getattr(sys.stdin, "buffer", None)
    return stream.read() if stream is not None else sys.stdin.read().encode()


def _columns(task: Task, rows: Sequence[Row], flags: argparse.Namespace) -> dict[str, str]:
    """Column of the task → column of the rows, which all of them together have."""
    needed = list(dict.fromkeys(task.input_columns))
    given = tuple(needed)
    if flags.text:
        named = columns(flags.text, Data(test=[dict(rows[0].values)]))
        given = (named,) if isinstance(named, str) else named
    if len(given) != len(needed):
        raise UsageError(
            where="--text",
            expected=f"{len(needed)} columns, for {listed(needed)}",
            found=listed(given),
            hint="Name one for each, in this order.",
        )
    check_present(given, rows)
    return dict(zip(needed, given, strict=True))


def _checked(
    task: Task, rows: Sequence[Row], names: Mapping[str, str], drop_empty: bool
) -> list[Question]:
    questions: list[Question] = []
    errors: list[DataError] = []
    for row in rows:
        values = {column: row.values.get(name) for column, name in names.items()}
        try:
            task.unlabelled(replace(row, values=values))
        except EmptyCell as error:
            if not drop_empty:
                errors.append(error)
            questions.append(Question(row.values, None))
        except DataError as error:
            errors.append(error)
        else:
            questions.append(Question(row.values, values))
    if errors:
        raise all_errors(errors)
    return questions


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


def _check_places(rows: str | None, output: str | None) -> None:
    """Raise UsageError where the answers would replace the rows."""
    if rows and output and Path(rows).resolve() == Path(output).resolve():
        raise UsageError(
            where=f"--output {output}",
            expected="another file than --input",
            found="the same",
            hint="The rows in it would be replaced: choose another name.",
        )


def _answer_columns(
    task: Task | None, questions: Sequence[Question], output: str | None
) -> list[str]:
    """The columns that ``output`` has beside those of the rows.

    Raises UsageError for another file form, or where the rows have such a column already.
    """
    if output is None:
        return []
    if Path(output).suffix.lower() not in WRITTEN:
        raise UsageError(
            where=f"--output {output}",
            expected="a file ending in .csv, .tsv or .jsonl",
            found=repr(Path(output).suffix),
            hint="For example --output answers.csv",
        )
    labels = (task.labels or ()) if task and (task.head or task.outputs == "classes") else ()
    names = ["prediction", *(["probability"] if task and task.outputs == "classes" and labels
                             else [])]  # fmt: skip
    names += ["probabilities"] if output.lower().endswith(".jsonl") and labels else [
        f"probability_{label}" for label in labels
    ]  # fmt: skip
    taken = sorted({name for one in questions for name in one.values} & {*names})
    if taken:
        raise UsageError(
            where=f"--output {output}",
            expected="rows without the columns of the answers",
            found="the columns " + listed(map(repr, taken)),
            hint="Rename or drop them; they would be replaced.",
        )
    return names


def _line(answer: "Answer | None") -> str:
    """The answer on one line."""
    if answer is None:
        return ""
    if isinstance(answer, str | float):
        return _one_line(_number(answer))
    named, chance = answer.line
    return f"{_one_line(named)}\t{chance}".rstrip("\t")


def _number(answer: str | float) -> str:
    """A text as it is, and a number in six digits."""
    return answer if isinstance(answer, str) else f"{answer:.6g}"


def _one_line(text: str) -> str:
    """``text`` with its line breaks written as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\n", r"\n")


Write = Callable[[Question, "Answer | None"], None]


@contextmanager
def _written(output: str, questions: Sequence[Question], names: Sequence[str]) -> Iterator[Write]:
    """A function that writes one row with its answer; the file appears when all are written."""
    suffix = Path(output).suffix.lower()
    own = list(dict.fromkeys(name for one in questions for name in one.values))
    with new_file(Path(output)) as raw:
        file = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        table = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",", lineterminator="\n")

        def row(question: Question, answer: "Answer | None") -> None:
            values = [_cell(question.values.get(name)) for name in own]
            table.writerow([*values, *_cells(answer, len(names))])

        def line(question: Question, answer: "Answer | None") -> None:
            record = {**question.values, **_record(answer)}
            file.write(json.dumps(record, ensure_ascii=False, default=_json) + "\n")

        if suffix != ".jsonl":
            table.writerow([*own, *names])
        yield line if suffix == ".jsonl" else row
        file.detach()


def _cells(answer: "Answer | None", count: int) -> list[str]:
    if answer is None:
        return [""] * count
    if isinstance(answer, str | float):
        return [_number(answer)]
    return [cell if isinstance(cell, str) else f"{cell:.6f}" for cell in answer.cells]


def _record(answer: "Answer | None") -> dict[str, Any]:
    if answer is None or isinstance(answer, str | float):
        return {"prediction": answer}
    return answer.record


def _cell(value: Any) -> str:
    """A value of a row in a table: "" for null, and JSON for a list or an object."""
    if is_null(value):
        return ""
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False, default=_json)
    return str(value)


def _json(value: Any) -> Any:
    """What JSON has no form for: null values of pandas, and else as people write it."""
    return None if is_null(value) else str(value)
