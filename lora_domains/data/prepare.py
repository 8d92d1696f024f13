"""Preparing a domain's rows: read, check, split, remove leaks, sample. No torch."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_domains.data.checks import (
    Given,
    check_columns,
    check_declared,
    check_enough,
    check_order,
    check_spellings,
    left_empty,
    mapped,
    to_examples,
    with_labels,
    with_merged_labels,
    with_own_label,
)
from lora_domains.data.identity import (
    digest_of,
    has_own_choices,
    identity,
    normalised_once,
    source_digest,
    texts_and_labels,
)
from lora_domains.data.leaks import Leaks, copies, find_leaks
from lora_domains.data.readers import read_noted
from lora_domains.data.source import FEWEST_READ, SHOWN, SPLITS, Data, Source
from lora_domains.data.splits import overlaps, sample, split_off
from lora_domains.errors import DataError, LeakError, listed, number_of
from lora_domains.tasks import Example, Task, shown

USUAL_TRAINING, USUAL_TEST = 100, 20
"""Fewer training or test rows than this cause a warning."""
FEW = 300
"""Fewer rows in all are worth the trainings of a cross-validation."""


@dataclass(frozen=True)
class RowCounts:
    """How many rows were read, dropped and repeated; tokenisation counts `truncated` to
    `supervised_tokens`, and `too_long`."""

    read: int
    """Rows of all given splits."""
    refused: int
    """Training and validation rows dropped because they are also test rows."""
    duplicates: int
    """Training rows that repeat an earlier one; they are kept."""
    truncated: int = 0
    """Training rows whose prompt was shortened to the length limit."""
    masked: int = 0
    """Training rows without a supervised token."""
    supervised_tokens: int = 0
    """Tokens of all training rows that training predicts; the label of a head counts as one."""
    empty: int = 0
    """Rows of all given splits dropped for an empty cell."""
    too_long: int = 0
    """Rows of all splits dropped because their answer does not fit."""


@dataclass(frozen=True)
class Stage:
    """One step of the preparation, as it is displayed."""

    name: str
    rows_in: int
    rows_out: int
    what: str


@dataclass(frozen=True)
class Prepared:
    """Examples ready to tokenise, and an account of how they came about."""

    task: Task
    """The task with its labels known."""
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    row_counts: RowCounts
    leaks: Leaks
    stages: tuple[Stage, ...]
    digests: Mapping[str, str]
    """split → sha256 of the exact text of its rows, in order."""
    given: Mapping[str, str]
    """Digests of the training and validation rows as they were given: before any is dropped or
    taken for a sample, by what they are called ("training rows")."""
    test_source: tuple[Mapping[str, tuple[str, ...]], ...]
    """``texts_and_labels`` of every row from which the test rows were taken: those of their file,
    or of that of the training rows where no test rows are given."""
    warnings: tuple[str, ...]
    declared: tuple[Task, Data, int]
    """The task, data and seed that these rows were made from."""

    def made_from(self, task: Task, data: Data, seed: int) -> bool:
        """Whether ``prepare`` would give the same."""
        return self.declared == (task, data, seed)

    def only(self, ids: Collection[str]) -> "Prepared":
        """The same with the rows of ``ids`` alone."""
        ids = frozenset(ids)
        parts = {s: tuple(row for row in getattr(self, s) if row.id in ids) for s in SPLITS}
        for split, rows in parts.items():
            if getattr(self, split) and not rows:
                raise DataError(
                    where=split,
                    expected="at least one row whose answer fits",
                    found="none",
                    hint="Shorten the answers, or choose a base with a longer context.",
                )
        pairs = tuple(pair for pair in self.leaks.pairs if ids.issuperset(pair[:2]))
        return replace(
            self,
            train=parts["train"],
            validation=parts["validation"],
            test=parts["test"],
            leaks=Leaks(self.leaks.exact, len(pairs), pairs),
            digests={split: digest_of(rows) for split, rows in parts.items()},
        )


@normalised_once()
def prepare(task: Task, data: Data, seed: int = 0) -> Prepared:
    """The rows of all splits, checked and free of exact leaks; the same for the same seed.

    Without ``data.train`` (a probe) there are test rows alone. Raises DataError for rows that
    cannot be used, LeakError for test rows among training or validation rows, and UsageError for a
    limit below 1.
    """
    preparation = Preparation(task, data, seed)
    preparation.read()
    preparation.check()
    preparation.split()
    preparation.remove_leaks()
    preparation.sample()
    return preparation.finished()


def with_test_rows(
    task: Task, data: Data, seed: int, test: Source, known: Prepared | None = None
) -> tuple[Task, Data]:
    """``task`` and ``data`` with other test rows: where the training split off its own, its other
    rows stay what they were, as rows in memory. ``known`` are its rows, if they were read."""
    if data.test is not None or data.train is None:
        return task, replace(data, test=test)
    prepared = known or prepare(task, data, seed)
    given = {row.id: row.values for row in read_noted(data.train, "train", data.reading).rows}
    train = [given[row.id] for row in prepared.train]
    split_off = [given[row.id] for row in prepared.validation if row.id in given]
    validation = split_off if data.validation is None else data.validation
    return prepared.task, replace(data, train=train, validation=validation, test=test)


class Preparation:
    """The rows of a domain on their way through the stages, whose methods ``prepare`` calls."""

    def __init__(self, task: Task, data: Data, seed: int) -> None:
        check_declared(data)
        self.declared = (task, data, seed)
        self.task, self.data = task, data
        self.seed = seed if data.seed is None else data.seed
        self.parts: dict[str, list[Example]] = {}
        self.stages: list[Stage] = []
        self.warnings: list[str] = []
        self.rows_read = self.duplicates = self.refused = self.empty = 0
        self.leaks = Leaks(0, 0, ())
        self.test_source: tuple[Mapping[str, tuple[str, ...]], ...] = ()
        self.given: Given = {}
        """The rows of each given split, until they are checked."""
        self.raw: Given = {}
        """The same as they were read, before the recipe's row function."""
        self.unread: set[str] = set()
        """Splits of which rows were left unread because of the limit."""
        self.digests: dict[str, str] = {}

    def read(self) -> None:
        """Read the given splits, with a limit as far as a sample needs."""
        sizes = []
        for split in SPLITS:
            if (source := getattr(self.data, split)) is None:
                continue
            found = read_noted(source, split, self.data.reading)
            rows = found.rows
            if self.data.row is not None:
                rows = [mapped(row, self.data.row) for row in rows]
            self.given, self.raw = {**self.given, split: rows}, {**self.raw, split: found.rows}
            notes = list(found.notes)
            if found.more:
                self.unread.add(split)
                notes.append("the first rows, because of the limit")
                self.warnings += check_order(self.task, rows)
            sizes.append(f"{split} {len(rows)}" + (f" ({'; '.join(notes)})" if notes else ""))
        self.rows_read = sum(map(len, self.given.values()))
        self._stage("read", ", ".join(sizes))

    def check(self) -> None:
        """Turn the rows that were read into examples, or raise an error for all bad ones."""
        given, raw, self.given, self.raw = self.given, self.raw, {}, {}
        check_columns(self.task, self.data, given)
        if self.data.merge_labels:
            given, note = with_merged_labels(self.task, given)
            self._stage("labels", f"merged: {note}" if note else "none to merge")
        check_spellings(self.task, given)
        self.task = with_labels(self.task, given)
        examples, dropped = to_examples(self.task, self.data, given)
        self.empty = sum(dropped.values())
        self.parts = {split: examples.get(split, []) for split in SPLITS}
        source = "test" if "test" in given else "train"
        parts = given[source], examples[source], raw[source]
        self.test_source = texts_and_labels(self.task, *parts)
        self.digests = self._digests(examples)
        self._stage("check", self._checked(dropped), self.rows_read)
        self.warnings += left_empty(self.task, given) + with_own_label(
            self.task, self.parts["train"]
        )
        self.duplicates, conflicts = _duplicates(self.parts["train"])
        if conflicts and self.task.has_labels:
            one = self.task.outputs == "classes"
            what = "have more than one label" if one else "occur with different labels"
            self.warnings.append(f"{conflicts} training texts {what}")
        if repeated := _duplicates(self.parts["test"])[0]:
            self.warnings.append(
                f"{repeated} test {'row repeats' if repeated == 1 else 'rows repeat'} another test "
                "row: bounds count repeats as one group"
            )

    def _digests(self, examples: Mapping[str, Sequence[Example]]) -> dict[str, str]:
        """Digests of the training and validation rows; of all only where all were read."""
        digests = {}
        for split, name in (("train", "training rows"), ("validation", "validation rows")):
            if rows := examples.get(split):
                digests[name] = source_digest(rows[:FEWEST_READ])
                if split not in self.unread:
                    digests[f"all {name}"] = source_digest(rows)
        return digests

    def _checked(self, dropped: Mapping[str, int]) -> str:
        """What the check found: rows dropped, and how many rows each label has."""
        parts = [f"{number_of(n, f'{split} row')} dropped for an empty cell"
                 for split, n in dropped.items()]  # fmt: skip
        if self.task.outputs == "value":
            values = [row.truth[0] for rows in self.parts.values() for row in rows]
            least, most = min(values), max(values)
            return "; ".join(
                [*parts, f"every row has its text and a number, {least:g} to {most:g}"]
            )
        if not self.task.has_labels:
            return "; ".join([*parts, "every row has its text"])
        rows = self.parts["train"] or self.parts["test"]
        counts = Counter(label for row in rows for label in row.labels).most_common()
        sizes = listed(f"{shown((self.task.labels or ())[label])} {n}" for label, n in counts)
        labels = f"{len(self.task.labels or ())} labels: {sizes}"
        if self.task.outputs == "classes":
            return "; ".join([*parts, f"every row has its text and one of {labels}"])
        none = sum(not row.labels for row in rows)
        most = max(len(row.labels) for row in rows)
        return "; ".join([*parts, f"every row has its text and up to {most} of {labels}; "
                          f"{none} rows have no label"])  # fmt: skip

    def split(self) -> None:
        """Take the splits that are not given from the training rows."""
        train, notes = self.parts["train"], []
        absent = [s for s in ("test", "validation") if getattr(self.data, s) is None]
        for n, split in enumerate(absent if train else ()):
            train, self.parts[split] = split_off(train, split, self.seed, len(absent) - n)
            notes.append(f"{len(self.parts[split])} from train for {split}")
        self.parts["train"] = train
        groups = ", groups whole" if self.data.group else ""
        classes = self.task.has_labels and self.task.outputs == "classes"
        kept = ", classes in proportion" if classes else ""
        self._stage("split", "; ".join(notes) + f"{kept}{groups}" if notes else "as given")
        self.warnings += overlaps(self.parts)

    def remove_leaks(self) -> None:
        """Drop the training and validation rows that are also test rows, or raise LeakError."""
        rows_in = self._count()
        self.leaks = _leaks(self.parts)
        if self.leaks.exact:
            if not self.data.drop_leaks:
                raise _leak_error(self.leaks, self.parts)
            self._drop_copies_of_test_rows()
            self.leaks = _leaks(self.parts)
        if self.leaks.near:
            pairs = [f"{a} ~ {b}" for a, b, _ in self.leaks.pairs]
            pairs = [*pairs[:SHOWN], *["…"] * (len(pairs) > SHOWN)]
            near = self.leaks.near
            rows = "row is nearly a training row" if near == 1 else "rows are nearly training rows"
            self.warnings.append(f"{near} test {rows}: {'; '.join(pairs)}")
        refused = number_of(self.refused, "row")
        exact = f"{refused} dropped that are also test rows" if self.refused else "0 exact"
        self._stage("leaks", f"{exact}; {self.leaks.near} near", rows_in)

    def _drop_copies_of_test_rows(self) -> None:
        before = len(self.parts["train"])
        for split in ("train", "validation"):
            dropped = copies(self.parts[split], self.parts["test"])
            self.parts[split] = [row for row in self.parts[split] if row.id not in dropped]
            self.refused += len(dropped)
        if len(self.parts["train"]) < before:
            classes = Counter(label for row in self.parts["train"] for label in row.labels)
            place = "train without the rows of test"
            named = Counter({str(label): count for label, count in classes.items()})
            check_enough(place, len(self.parts["train"]), named if self.task.has_labels else None)

    def sample(self) -> None:
        """Keep at most ``data.limit`` rows of each split."""
        if self.data.limit is None:
            return
        rows_in = self._count()
        self.parts = {s: sample(rows, self.data.limit, self.seed) for s, rows in self.parts.items()}
        self._stage("limit", f"at most {self.data.limit} of each split", rows_in)
        ids = {row.id for rows in self.parts.values() for row in rows}
        pairs = tuple(pair for pair in self.leaks.pairs if ids.issuperset(pair[:2]))
        self.leaks = Leaks(0, len(pairs), pairs)

    def finished(self) -> Prepared:
        self.warnings += _too_few(self.task, self.parts, self.data.train is not None)
        return Prepared(
            self.task.fitted_to(self.parts["train"]),
            train=tuple(self.parts["train"]),
            validation=tuple(self.parts["validation"]),
            test=tuple(self.parts["test"]),
            row_counts=RowCounts(self.rows_read, self.refused, self.duplicates, empty=self.empty),
            leaks=self.leaks,
            stages=tuple(self.stages),
            digests={split: digest_of(rows) for split, rows in self.parts.items()},
            given=self.digests,
            test_source=self.test_source,
            warnings=tuple(self.warnings),
            declared=self.declared,
        )

    def _count(self) -> int:
        return sum(map(len, self.parts.values())) if self.parts else self.rows_read

    def _stage(self, name: str, what: str, rows_in: int | None = None) -> None:
        count = self._count()
        self.stages.append(Stage(name, count if rows_in is None else rows_in, count, what))


def _duplicates(rows: Sequence[Example]) -> tuple[int, int]:
    """(rows that repeat an earlier one, texts with several answers)."""
    with_choices = has_own_choices(rows)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(identity(row, with_choices), set()).add(row.answer)
    return len(rows) - len(answers), sum(len(several) > 1 for several in answers.values())


def _leaks(parts: Mapping[str, Sequence[Example]]) -> Leaks:
    return find_leaks([*parts["train"], *parts["validation"]], parts["test"])


def _leak_error(leaks: Leaks, parts: Mapping[str, Sequence[Example]]) -> LeakError:
    places = {row.id: row.place for rows in parts.values() for row in rows}
    first = leaks.pairs[: min(SHOWN, leaks.exact)]
    pairs = "; ".join(f"{a} ({places[a]}) = {b} ({places[b]})" for a, b, _ in first)
    hint = "Drop them there (never from test): Data(drop_leaks=True) or --drop-leaks."
    if len(copies(parts["train"], parts["test"])) == len(parts["train"]):
        hint = "Give other test rows, or none: then some are split off the training rows."
    return LeakError(
        where="test", expected="no test row among the rows used for training or validation",
        found=f"{leaks.exact}: {pairs}" + ("; …" if leaks.exact > SHOWN else ""), hint=hint,
    )  # fmt: skip


def _too_few(task: Task, parts: Mapping[str, Sequence[Example]], trained: bool) -> list[str]:
    """Warnings for few rows."""
    train, test = parts["train"], parts["test"]
    warnings = []
    if trained and len(train) < USUAL_TRAINING:
        warnings.append(
            f"only {len(train)} training rows: the result may depend on the seed, and fit --seeds "
            "3 shows how far"
        )
    if trained and (total := sum(map(len, parts.values()))) < FEW:
        warnings.append(
            f"only {total} rows in all: lora-domains cross-validate estimates the scores before a "
            "test set is spent"
        )
    if len(test) < USUAL_TEST:
        warnings.append(f"only {len(test)} test rows: too few to decide most gates")
    if not task.labels:
        return warnings
    positive = task.positive_index
    if positive is not None:
        positives = sum(positive in row.labels for row in test)
        if positives < USUAL_TEST:
            warnings.append(
                f"only {positives} test rows are {task.positive!r}: recall is uncertain"
            )
    counts = Counter(label for row in train for label in row.labels)
    rare = [label for i, label in enumerate(task.labels) if counts[i] < 2]
    if trained and rare:
        warnings.append(f"{len(rare)} classes have fewer than 2 training rows: {listed(rare)}")
    return warnings
