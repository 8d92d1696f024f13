"""From rows to a file of answers: what is asked, and a file that an interrupted run goes on with.

All rows are checked before a base is loaded, then they are read again. No torch.

Answers are appended block by block to ``answers.csv.partial``, which holds whole rows only;
``answers.csv.progress`` says how many, and of which run. When all are written, the file takes its
name. What a killed process wrote after its last whole block is cut off by the run that goes on.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

from filelock import lock_descriptor

from lora_domains.atomic import write_text
from lora_domains.console.forms import Answered, Decimals, Lines, Types
from lora_domains.data.checks import all_errors, check_present
from lora_domains.data.readers import RowsRead
from lora_domains.data.source import COMMAS, Dialect, file_of, runs
from lora_domains.errors import DataError, EmptyCell, UsageError, did_you_mean, listed
from lora_domains.tasks import Row, Task, plain_text
from lora_domains.tasks.messages import columns_beside
from lora_domains.tasks.rows import parsed, shown

MOST_ERRORS = 10_000
"""Rows that cannot be answered whose errors are kept."""

MOST_UNKNOWN = 100
"""Names of no adapter that are kept: the column may be one of free text."""


@dataclass(frozen=True)
class Question:
    """A row to answer: what is written of it, and what the task reads; None for an empty text."""

    values: Mapping[str, Any]
    text: str | Mapping[str, Any] | None
    adapter: str


@dataclass
class Questions:
    """The rows that ``blocks`` reads, each answered by ``adapter``, or by that which its cell in
    ``column`` names. ``check`` fills the other fields."""

    blocks: Callable[[], Iterator[RowsRead]]
    task_of: Callable[[str], Task | None]
    """The task of an adapter; None where there is no adapter of that name."""
    adapter: str | None
    known: Sequence[str] = ()
    """The names that cells may have, for a hint."""
    column: str | None = None
    text: Callable[[Row], tuple[str, ...]] | None = None
    """The columns that hold the text, if they have other names than in training."""
    plain: bool = False
    """Whether the rows are texts, in a column that is not one of the task."""
    drop_empty: bool = False
    typed: bool = False
    """Whether the types of all columns are found, for a file that needs them first."""
    count: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    digest: str = ""
    """sha256 of all rows."""
    dialect: Dialect = COMMAS
    """How a table of answers is written, like that of the rows."""
    types: Types = field(default_factory=Types)
    tasks: dict[str, Task] = field(default_factory=dict)
    """The task of each adapter that a row needs."""
    _texts: tuple[str, ...] | None = None
    _unknown: dict[str, list[int]] = field(default_factory=dict)
    """Rows, by the name that their cell has of an adapter."""

    def check(self, note: Callable[[str], None]) -> None:
        """Read all rows; raise DataError for those that cannot be answered, all in one error.

        ``note`` is told what was detected in the files.
        """
        digest, first, errors = sha256(), None, list[DataError]()
        notes, decimals = dict[str, None](), Decimals()
        for block in self.blocks():
            for text in block.notes:
                if text not in notes:
                    note(text)
                notes[text] = None
            if first is None:
                first, self.dialect = block.rows[0], block.dialect
            if self.dialect.delimiter == ";":
                decimals.add(row.values for row in block.rows)
            if self.text is not None and self._texts is None:
                self._texts = self.text(first)
            for row in block.rows:
                self.count += 1
                self.columns |= dict.fromkeys(row.values)
                digest.update(json.dumps(row.values, default=str).encode() + b"\n")
                try:
                    self._question(row)
                except EmptyCell as error:
                    errors += [error] if not self.drop_empty else []
                except DataError as error:
                    errors.append(error)
                del errors[MOST_ERRORS:]
            if self.typed:
                self.types.add([row.values for row in block.rows])
        self.digest = digest.hexdigest()
        self.dialect = replace(self.dialect, decimal=decimals.of(self.dialect.delimiter))
        if first is not None:
            every = [replace(first, values=self.columns)]
            check_present([self.column] if self.column else [], every)
            self._check_known(first)
            for task in () if self.plain else self.tasks.values():
                named, beside = self._named(task), columns_beside(task)
                check_present([own for name, own in named.items() if name not in beside], every)
        if errors:
            found = all_errors(errors)
            if isinstance(found, EmptyCell):  # no row is left out of the answers
                hint = "Fill it, or leave the answers of such rows empty: --drop-empty"
                found = EmptyCell(
                    where=found.where, expected=found.expected, found=found.found, hint=hint
                )
            raise found

    def __iter__(self) -> Iterator[Question]:
        for block in self.blocks():
            for row in block.rows:
                try:
                    yield self._question(row)
                except EmptyCell:
                    yield Question(row.values, None, "")

    def _question(self, row: Row) -> Question:
        """The question of a row. Raises EmptyCell without a text, DataError if it is unusable."""
        name = self._adapter_of(row)
        if name not in self.tasks:
            task = self.task_of(name)
            if task is None:
                if name in self._unknown or len(self._unknown) < MOST_UNKNOWN:
                    self._unknown.setdefault(name, []).append(row.number + 1)
                return Question(row.values, None, name)
            task.check_predictable()
            self.tasks[name] = task
        task = self.tasks[name]
        if self.plain:
            text = row.values["text"]
            if len({*task.input_columns}) > 1 and isinstance(values := parsed(text), dict):
                text = values  # a row as JSON
            task.to_predict(text, row.number)
            return Question(row.values, text, name)
        values = {column: row.values.get(own) for column, own in self._named(task).items()}
        task.unlabelled(replace(row, values=values))
        return Question(row.values, values, name)

    def _adapter_of(self, row: Row) -> str:
        cell = plain_text(row.values.get(self.column)) if self.column is not None else ""
        name = (cell or "").strip() or self.adapter
        if name is None:
            raise DataError(
                where=f"{row.place}, column {self.column!r}",
                expected="the name of an adapter",
                found="an empty cell",
                hint="Name the adapter of such rows: lora-domains predict ADAPTER --domain-column "
                f"{self.column}",
            )
        return name

    def _named(self, task: Task) -> dict[str, str]:
        """Column of the task → column of the rows."""
        needed = list(dict.fromkeys(task.input_columns))
        given = tuple(needed) if self._texts is None else self._texts
        if len(given) != len(needed):
            raise UsageError(
                where="--text",
                expected=f"{len(needed)} columns, for {listed(needed)}",
                found=listed(given),
                hint="Name one for each, in this order.",
            )
        return dict(zip(needed, given, strict=True))

    def _check_known(self, first: Row) -> None:
        if self._unknown:
            found = [f"{shown(name)} in row {runs(at, 3)}" for name, at in self._unknown.items()]
            raise DataError(
                where=f"{file_of(first.place)}, column {self.column!r}",
                expected="the name of an adapter in each cell",
                found=listed(found),
                hint=did_you_mean(next(iter(self._unknown)), self.known),
            )


# ── Answers ─────────────────────────────────────────────────────────────────────────────────────


class Target(Protocol):
    """Where answers go; ``rows`` of them are there already."""

    rows: int

    def open(self, overwrite: bool) -> Any: ...
    def write(self, block: Sequence[Answered]) -> None: ...
    def finish(self) -> None: ...


@dataclass
class AnswerFile:
    """A file of answers that is being written; ``rows`` of them are."""

    output: Path
    form: Lines
    run: Mapping[str, Any]
    """What the answers depend on, by what a message calls it; as JSON."""
    rows: int = 0
    _size: int = 0
    _file: FileIO | None = None

    @property
    def partial(self) -> Path:
        return self.output.with_name(self.output.name + ".partial")

    @property
    def progress(self) -> Path:
        return self.output.with_name(self.output.name + ".progress")

    @contextmanager
    def open(self, overwrite: bool) -> Iterator[None]:
        """Go on with what an interrupted run wrote, or begin; call ``finish`` at the end.

        Raises UsageError where the output exists, or another run wrote a part of it (unless
        ``overwrite``), where a process is writing it now, and where the disk refuses.
        """
        check_free(self.output, overwrite)
        with self._writing():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self.partial, "a")
        with self._file:
            with self._writing():
                alone = lock_descriptor(self._file.fileno(), blocking=False)
            if not alone:
                raise UsageError(
                    where=str(self.output),
                    expected="a file that no other process is writing",
                    found=f"another one at work on {self.partial.name}",
                    hint="Wait for it, or name another file.",
                )
            self._continue(self._file, overwrite)
            yield

    def _continue(self, file: FileIO, overwrite: bool) -> None:
        """Cut off what is not to be kept; raises UsageError where that is not known."""
        known = self._known() or {"rows": 0, "bytes": 0, "run": None, "form": self.form}
        run = known["run"] or {}
        changed = [
            f"{name} (was {run.get(name)})" if name.startswith("--") else name
            for name in {**self.run, **run}
            if self.run.get(name) != run.get(name)
        ]
        kept = f"{known['rows']} answers of a run that differs in {listed(changed)}"
        if known["run"] is None and self.partial.stat().st_size:
            kept = f"another file, or one without {self.progress.name}"
        elif not known["rows"]:
            kept = ""
        if changed and kept and not overwrite:
            raise UsageError(
                where=str(self.partial),
                expected="the first part of these answers",
                found=kept,
                hint="Repeat that run, name another file, or begin again: --overwrite",
            )
        if not changed:
            self.rows, self._size, self.form = known["rows"], known["bytes"], known["form"]
        with self._writing():
            file.truncate(self._size)
            if not self._size:
                self._append(b"", 0)
                self._append(self.form.head(), 0)

    def _known(self) -> Any:
        """The progress of the run that wrote the partial file; None where that is not known."""
        try:
            known = json.loads(self.progress.read_text(encoding="utf-8"))
            # A file that an older version began has commas.
            known["form"] = self.form.begun(known.get("form", {}))
            whole = 0 <= known["bytes"] <= self.partial.stat().st_size and known["rows"] >= 0
            return known if whole and isinstance(known["run"], dict) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, block: Sequence[Answered]) -> None:
        """Append the answers to some rows. Raises UsageError where the disk refuses."""
        with self._writing():
            self._append(self.form.rows(block), len(block))

    def _append(self, content: bytes, rows: int) -> None:
        if self._file is None:
            raise ValueError("write is called inside open")
        try:
            left = memoryview(content)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
            size, count = self._size + len(content), self.rows + rows
            record = {"rows": count, "bytes": size, "run": self.run, "form": self.form.record}
            write_text(self.progress, json.dumps(record) + "\n")
        except OSError:
            # Half a row may have been written, and whole rows that are not counted.
            self._file.truncate(self._size)
            raise
        self._size, self.rows = size, count

    def finish(self) -> None:
        """Give the file its name. Raises UsageError where the disk refuses."""
        if self._file is not None:
            self._file.close()
        with self._writing():
            self.form.finish(self.partial, self.output)
            self.progress.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = "Free some space, or choose another place."
            if self.rows:
                hint = (
                    f"Free some space and run the same command again: {self.partial.name} holds "
                    f"the first {self.rows} answers, and it goes on after them."
                )
            raise UsageError(
                where=str(self.output),
                expected="a disk that takes the answers",
                found=error.strerror or str(error),
                hint=hint,
            ) from error


def check_free(output: Path, overwrite: bool) -> None:
    """Raise UsageError where there is a file already that may not be replaced."""
    if output.exists() and not overwrite:
        raise UsageError(
            where=f"--output {output}",
            expected="no such file",
            found="one that exists",
            hint="Name another one, or replace it: --overwrite",
        )


class StandardOutput:
    """Answers on the standard output, in some form."""

    rows = 0

    def __init__(self, form: Lines) -> None:
        self.form = form

    @contextmanager
    def open(self, overwrite: bool) -> Iterator[None]:
        self._write(self.form.head())
        yield

    def write(self, block: Sequence[Answered]) -> None:
        self._write(self.form.rows(block))
        self.rows += len(block)

    def finish(self) -> None: ...

    def _write(self, content: bytes) -> None:
        """Raises UsageError where a disk is full, and BrokenPipeError for a reader that left."""
        stream = sys.stdout
        try:
            stream.flush()
            if stream.isatty() or not hasattr(stream, "buffer"):
                stream.write(content.decode("utf-8-sig"))
            else:  # in UTF-8, whatever the encoding of the system
                stream.buffer.write(content)
            stream.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            # What is still buffered goes nowhere: it would fail again when Python ends.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise UsageError(
                where="standard output",
                expected="a place that takes the answers",
                found=error.strerror or str(error),
                hint="Free some space. A file goes on where it stopped: --output answers.csv",
            ) from error
