"""From rows as read to rows that can be trusted: check → split → leaks → ledger. No torch.

No message here ever quotes a row's text: it names the file, the line and the column.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from hashlib import sha256
from typing import Any

from lora_domains.data.leaks import Leaks, copies, find_leaks, identity, own_choices
from lora_domains.data.readers import SHOWN, SPLITS, Source, read
from lora_domains.errors import DataError, LeakError, UsageError, did_you_mean, listed
from lora_domains.tasks import Example, Row, Task, is_null, text_of

FEWEST = 8
"""Training rows below which nothing is trained."""


@dataclass(frozen=True)
class Data:
    """Where a domain's rows come from; a split that is not given is carved from ``train``."""

    train: Source | None = None
    validation: Source | None = None
    test: Source | None = None
    general: Source | None = None
    """General text that the adapter is held to, in a column ``text``; else the embedded world's."""
    group: str | None = None
    """Column whose rows belong together (a patient, a thread): a group never spans splits."""
    slices: tuple[str, ...] = ()
    """Columns by whose values the scores are reported too."""
    drop_leaks: bool = False
    limit: int | None = None
    """At most this many rows of each split, sampled by the seed, classes in proportion."""
    row: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """A pure function from a row as read to the columns that the task names."""

    @staticmethod
    def embedded(name: str) -> "Data":
        """The rows written for the embedded base: ``medical``, ``spam``, …"""
        source = f"embedded:{name}"
        return Data(source, source, source)


@dataclass(frozen=True)
class Ledger:
    """What became of the rows; encoding fills the last three."""

    read: int
    """Rows of all given splits."""
    refused: int
    """Training and validation rows dropped because the test set holds them."""
    duplicates: int
    """Training rows that repeat an earlier one; they are kept."""
    truncated: int = 0
    masked: int = 0
    supervised_tokens: int = 0


@dataclass(frozen=True)
class Stage:
    """One line of the data flow a person sees."""

    name: str
    rows_in: int
    rows_out: int
    what: str


@dataclass(frozen=True)
class Prepared:
    """Checked rows, ready to encode, and the account of how they came about."""

    task: Task
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    ledger: Ledger
    leaks: Leaks
    stages: tuple[Stage, ...]
    digests: Mapping[str, str]
    """split → sha256 of what its rows say, to the letter and in order."""
    warnings: tuple[str, ...]


# ---- check, split, leaks, ledger


def prepare(task: Task, data: Data, seed: int = 0) -> Prepared:
    """The rows of all three splits, checked, split and free of leaks; the same for the same seed.

    Raises DataError for rows that cannot be used, LeakError for test rows among training rows.
    Without ``data.train`` (a probe, which nobody fits) there are test rows alone.
    """
    _check_declared(data)
    given = {s: read(source, s) for s in SPLITS if (source := getattr(data, s)) is not None}
    if data.row is not None:
        given = {split: [_mapped(row, data.row) for row in rows] for split, rows in given.items()}
    count = sum(map(len, given.values()))
    stages = [Stage("read", count, count, ", ".join(f"{s} {len(r)}" for s, r in given.items()))]
    warnings: list[str] = []

    _check_columns(task, data, given)
    task = _with_labels(task, given)
    examples = _examples(task, data, given)
    parts = {split: examples.get(split, []) for split in SPLITS}
    labels = f"one of {len(task.labels or ())} labels" if task.has_labels else ""
    what = "every row has its text" + (f" and {labels}" if labels else "")
    stages.append(Stage("check", count, count, what))
    duplicates, conflicts = _duplicates(task, parts["train"])
    if conflicts:
        warnings.append(f"{conflicts} training texts stand under more than one label")
    if again := _duplicates(task, examples.get("test", []))[0]:
        warnings.append(
            f"{again} given test rows repeat another one: bounds count each as a row of its own"
        )

    carved = []
    absent = [split for split in ("test", "validation") if split not in given]
    for n, split in enumerate(absent if parts["train"] else ()):
        parts["train"], parts[split] = _carve(parts["train"], split, seed, len(absent) - n)
        carved.append(f"{len(parts[split])} carved from train for {split}")
    by = ", groups whole" if data.group else ""
    what = "; ".join(carved) + f", classes in proportion{by}" if carved else "as given"
    stages.append(Stage("split", count, count, what))
    warnings += _overlaps(parts)

    whole = len(parts["train"])
    leaks, refused = _without_leaks(parts, data.drop_leaks, warnings)
    if len(parts["train"]) < whole:
        classes = Counter(row.answer for row in parts["train"])
        known = classes if task.has_labels else None
        _check_enough("train without the rows of test", len(parts["train"]), known)
    what = f"{refused} rows dropped that the test set holds" if refused else "no exact ones"
    stages.append(Stage("leaks", count, count - refused, f"{what}; {leaks.near} near"))

    if data.limit is not None:
        for split, rows in parts.items():
            if len(rows) > data.limit:
                chosen = _choose([[i] for i in range(len(rows))], rows, data.limit, f"{seed}/limit")
                parts[split] = [row for i, row in enumerate(rows) if i in chosen]
        left = sum(map(len, parts.values()))
        stages.append(Stage("limit", count - refused, left, f"at most {data.limit} of each split"))
        ids = {row.id for rows in parts.values() for row in rows}
        pairs = tuple(pair for pair in leaks.pairs if ids.issuperset(pair[:2]))
        leaks = Leaks(0, len(pairs), pairs)

    warnings += _too_little(task, parts, "train" in given)
    return Prepared(
        task,
        train=tuple(parts["train"]),
        validation=tuple(parts["validation"]),
        test=tuple(parts["test"]),
        ledger=Ledger(read=count, refused=refused, duplicates=duplicates),
        leaks=leaks,
        stages=tuple(stages),
        digests={split: digest_of(rows) for split, rows in parts.items()},
        warnings=tuple(warnings),
    )


def _mapped(row: Row, function: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Row:
    try:
        values = function(row.values)
    except Exception as error:  # whatever a recipe's function raises; its message may hold text
        raise DataError(
            where=row.place,
            expected="a row that the recipe's row function can read",
            found=type(error).__name__,
            hint="Check the columns it uses.",
        ) from None
    if not isinstance(values, Mapping):
        raise DataError(
            where=row.place,
            expected="a row from the recipe's row function, with named columns",
            found=type(values).__name__,
            hint='Return a dict: {**row, "text": …}.',
        )
    return replace(row, values=values)


def _check_declared(data: Data) -> None:
    if data.train is None and data.test is None:
        raise DataError(
            where="data",
            expected="training rows, or test rows alone for a domain that nobody fits",
            found="neither",
            hint="Give Data(train=…) or --train.",
        )
    if data.limit is not None and data.limit < 1:
        raise UsageError(
            where="limit", expected="at least 1 row", found=str(data.limit), hint="Leave it out."
        )


def _file_of(place: str) -> str:
    return place.rsplit(", ", 1)[0]


def _check_columns(task: Task, data: Data, given: Mapping[str, Sequence[Row]]) -> None:
    """Every named column stands in some row of each split; slices in the rows that are scored."""
    scored = "test" if "test" in given else "train"
    for split, rows in given.items():
        named = [*task.columns, *([data.group] if data.group else [])]
        needed = dict.fromkeys([*named, *(data.slices if split == scored else ())])
        present = dict.fromkeys(name for row in rows for name in row.values)
        for column in needed:
            if column in present:
                continue
            folded = [name for name in present if name.strip().casefold() == column.casefold()]
            near = folded or get_close_matches(column, present)
            # Where no name is right or near, the "names" may be a row: a table without header.
            if near or any(name in present for name in needed):
                found = "columns " + listed(present)
                hint = f"Did you mean {near[0]!r}?" if folded else did_you_mean(column, present)
            else:
                found = f"{len(present)} columns, none named as the domain says"
                hint = "Is the first line a header? Name the columns as it does."
            raise DataError(
                where=_file_of(rows[0].place),
                expected=f"the column {column!r}",
                found=found,
                hint=hint,
            )
    for column in data.slices:
        values = Counter(str(row.values.get(column)) for row in given[scored])
        if len(values) > 50 or len(values) > max(8, len(given[scored]) / 2):
            raise DataError(
                where=f"{_file_of(given[scored][0].place)}, column {column!r}",
                expected="a slice column with at most 50 values, each in several rows",
                found=f"{len(values)} values in {len(given[scored])} rows",
                hint="Slice by a column of categories; its values are printed in reports.",
            )


def _labels(task: Task, rows: Iterable[Row]) -> list[str]:
    """The labels of the rows that have one."""
    found = (row.values.get(task.answer_column or "") for row in rows)
    return [label for value in found if not is_null(value) and (label := str(value).strip())]


def _check_enough(place: str, rows: int, classes: Counter[str] | None) -> None:
    """``FEWEST`` rows, two of a class on average, and in two classes at least. A class with one
    row is left to a warning. No label is named: the column may hold text by mistake."""
    usual = [label for label, n in (classes or {}).items() if n > 1]
    if rows < FEWEST or (classes and (len(usual) < 2 or 2 * len(classes) > rows)):
        sizes = f", {len(classes)} classes, {len(usual)} with 2 or more" if classes else ""
        raise DataError(
            where=_file_of(place),
            expected=f"at least {FEWEST} training rows"
            + (", and 2 rows of each of at least 2 classes" if classes else ""),
            found=f"{rows} rows{sizes}",
            hint="Add rows" + (", or name the column that holds the labels." if classes else "."),
        )


def _with_labels(task: Task, given: Mapping[str, Sequence[Row]]) -> Task:
    """The task with its labels, from the rows that have one; bad rows are gathered after this."""
    rows = given.get("train") or given["test"]
    if task.has_labels:
        labelled = [row for row in rows if _labels(task, [row])]
        classes = Counter(_labels(task, labelled))
        # One class alone is left to with_labels, which names it.
        if "train" in given and (len(classes) != 1 or task.labels):
            _check_enough(rows[0].place, len(rows), classes)
        return task.with_labels(labelled or rows)
    if "train" in given:
        _check_enough(rows[0].place, len(rows), None)
    return task


def _examples(
    task: Task, data: Data, given: Mapping[str, Sequence[Row]]
) -> dict[str, list[Example]]:
    """Each split's items; raises ONE DataError for all bad rows of all files."""
    examples: dict[str, list[Example]] = {split: [] for split in given}
    errors: list[DataError] = []
    for split, rows in given.items():
        if task.has_labels:
            _check_labels(task, rows)
        for row in rows:
            try:
                group = text_of(row, data.group).strip() if data.group else None
                slices = {c: _slice(row.values.get(c)) for c in data.slices}
                examples[split].append(replace(task.example(row), group=group, slices=slices))
            except DataError as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        first = errors[:SHOWN]
        raise DataError(
            where=f"{len(errors)} rows",
            expected="; ".join(dict.fromkeys(error.expected for error in first)),
            found="; ".join(f"{e.where}: {e.found}" for e in first)
            + (f"; and {len(errors) - SHOWN} more" if len(errors) > SHOWN else ""),
            hint=" ".join(dict.fromkeys(error.hint for error in first)),
        )
    return examples


def _check_labels(task: Task, rows: Sequence[Row]) -> None:
    """Where most labels are unknown the column is the wrong one, and must not be quoted."""
    unknown = sum(label not in (task.labels or ()) for label in _labels(task, rows))
    if unknown > max(SHOWN, len(rows) / 2):
        raise DataError(
            where=f"{_file_of(rows[0].place)}, column {task.answer_column!r}",
            expected="one of the labels " + listed(task.labels or ()),
            found=f"something else in {unknown} of {len(rows)} rows",
            hint="Name the column that holds the labels.",
        )


def _slice(value: object) -> str:
    text = "" if is_null(value) else str(value).strip()
    return text or "(missing)"


def _duplicates(task: Task, rows: Sequence[Example]) -> tuple[int, int]:
    """Rows that repeat an earlier one, and texts that stand under several labels."""
    with_choices = own_choices(rows)
    answers: dict[str, set[str]] = {}
    for row in rows:
        answers.setdefault(identity(row, with_choices), set()).add(row.answer)
    conflicts = sum(len(labels) > 1 for labels in answers.values())
    return len(rows) - len(answers), conflicts if task.has_labels else 0


def _carve(
    rows: list[Example], split: str, seed: int, left: int
) -> tuple[list[Example], list[Example]]:
    """(the rest, the new split): test a fifth; validation a tenth, 20 rows at least where that is
    no more than a fifth, 500 at most. ``left`` units or more remain, for train and what follows."""
    fifth = max(1, len(rows) // 5)
    size = fifth if split == "test" else min(500, max(round(len(rows) / 10), min(20, fifth)))
    units = _units(rows)
    if len(units) <= left:
        raise DataError(
            where=_file_of(rows[0].place),
            expected=f"at least {left + 1} groups of rows, or different texts, to split",
            found=str(len(units)),
            hint=f"Give the rows: Data({split}=…) or --{split}.",
        )
    chosen = _choose(units, rows, size, f"{seed}/{split}", spare=1, left=left)
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [row for i, row in enumerate(rows) if i in chosen]


def _units(rows: Sequence[Example]) -> list[list[int]]:
    """Positions that stay on one side: rows of one group, or of one text, and what they link."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    with_choices = own_choices(rows)
    seen: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for key in (("text", identity(row, with_choices)), ("group", row.group or "")):
            if key != ("group", ""):
                parent[root(i)] = root(seen.setdefault(key, i))
    units: dict[int, list[int]] = {}
    for i in range(len(rows)):
        units.setdefault(root(i), []).append(i)
    return list(units.values())


def _choose(
    units: Sequence[Sequence[int]],
    rows: Sequence[Example],
    size: int,
    salt: str,
    spare: int = 0,
    left: int = 0,
) -> set[int]:
    """About ``size`` positions, whole units, classes in proportion; ``spare`` rows of each class
    and ``left`` units remain.

    A unit is taken, in an order drawn by the salt, when it brings the classes nearer their share.
    Units of one row meet the shares exactly.
    """
    have = Counter(row.target for row in rows)
    wanted = _shares(have, min(size, len(rows)), spare)
    taken = Counter[int]()
    chosen: set[int] = set()
    most = len(units) - left
    order = sorted(units, key=lambda u: sha256(f"{salt}/{rows[u[0]].id}".encode()).digest())
    for unit in order:
        adds = Counter(rows[i].target for i in unit)
        gain = sum(abs(wanted[c] - taken[c]) - abs(wanted[c] - taken[c] - adds[c]) for c in adds)
        if most and gain > 0 and all(taken[c] + adds[c] <= have[c] - spare for c in adds):
            most -= 1
            taken.update(adds)
            chosen.update(unit)
    return chosen if chosen else {*min(order, key=len)}


def _shares(have: Mapping[int, int], size: int, spare: int) -> dict[int, int]:
    """``size`` over the classes by largest remainder; a sample (no spare) has each class once."""
    total = sum(have.values())
    least = 1 if not spare and size >= len(have) else 0
    shares = {c: max(least, min(n - spare, size * n // total)) for c, n in have.items()}
    by_remainder = sorted(have, key=lambda c: (-(size * have[c] % total), c))
    while sum(shares.values()) < size:
        open_ = [c for c in by_remainder if shares[c] < have[c] - spare]
        if not open_:
            break
        for c in open_[: size - sum(shares.values())]:
            shares[c] += 1
    while sum(shares.values()) > size:
        shares[max(shares, key=lambda c: (shares[c], c))] -= 1
    return shares


def _overlaps(parts: Mapping[str, Sequence[Example]]) -> list[str]:
    """Warnings for groups on two sides, and for validation rows that are training rows."""
    groups = {s: {row.group for row in rows if row.group} for s, rows in parts.items()}
    found = []
    for one, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
        if shared := len(groups[one] & groups[other]):
            found.append(f"{shared} groups have rows in both {one} and {other}")
    if both := len(copies(parts["validation"], parts["train"])):
        found.append(f"{both} validation rows are training rows too: it cannot choose well")
    return found


def _without_leaks(
    parts: dict[str, list[Example]], drop: bool, warnings: list[str]
) -> tuple[Leaks, int]:
    """The leaks left, and how many rows were dropped from train and validation for the others."""
    leaks, refused = find_leaks([*parts["train"], *parts["validation"]], parts["test"]), 0
    if leaks.exact and not drop:
        places = {row.id: row.place for rows in parts.values() for row in rows}
        shown = leaks.pairs[: min(SHOWN, leaks.exact)]
        pairs = [f"{a} ({places[a]}) = {b} ({places[b]})" for a, b, _ in shown]
        raise LeakError(
            where="test",
            expected="no test row among the rows used for training or validation",
            found=f"{leaks.exact}: " + "; ".join(pairs) + ("; …" if leaks.exact > SHOWN else ""),
            hint="Drop them from those (never from test): Data(drop_leaks=True) or --drop-leaks.",
        )
    if leaks.exact:
        for split in ("train", "validation"):
            gone = copies(parts[split], parts["test"])
            parts[split] = [row for row in parts[split] if row.id not in gone]
            refused += len(gone)
        leaks = find_leaks([*parts["train"], *parts["validation"]], parts["test"])
    if leaks.near:
        near = "; ".join(f"{a} ~ {b}" for a, b, _ in leaks.pairs[:SHOWN])
        warnings.append(f"{leaks.near} test rows are nearly training rows: {near}")
    return leaks, refused


def _too_little(task: Task, parts: Mapping[str, Sequence[Example]], trained: bool) -> list[str]:
    found = []
    if trained and len(parts["train"]) < 100:
        found.append(f"only {len(parts['train'])} training rows: another seed may end elsewhere")
    if len(parts["test"]) < 20:
        found.append(f"only {len(parts['test'])} test rows: hardly any gate can be decided")
    if not task.labels:
        return found
    if task.positive_index is not None:
        positives = sum(row.target == task.positive_index for row in parts["test"])
        if positives < 20:
            found.append(f"only {positives} test rows are {task.positive!r}: recall is uncertain")
    counts = Counter(row.target for row in parts["train"])
    rare = [label for i, label in enumerate(task.labels) if counts[i] < 2]
    if trained and rare:
        found.append(f"{len(rare)} classes have fewer than 2 training rows: {listed(rare)}")
    return found


def digest_of(rows: Sequence[Example]) -> str:
    """sha256 of what the rows say, in order, to the letter: other tokens train another adapter."""
    state, own = sha256(), own_choices(rows)
    for row in rows:
        said = [row.prompt, row.answer, *(row.choices if own else ())]
        state.update(json.dumps(said).encode() + b"\n")
    return state.hexdigest()
