"""The ledger of a project: which adapters were evaluated on which test rows.

Evaluating adapter after adapter on one test set and keeping the best one climbs on chance. A test
set therefore has a budget of error, ``ALPHA``, for a number of adapters that is fixed when it is
first evaluated: each of k adapters is held to one-sided bounds at 1 - ALPHA / k (Bonferroni), and
after them none can pass. ``benchmarks/verdict/budget.py`` simulates what this covers.

``evaluations.jsonl`` is append-only, one JSON object a line: one for a set of rows, one for each
evaluation, written before its figures are shown, and one for its verdict:

    {"test_set": id, "rows": ["DIGEST DIGEST …", …], "key": fingerprint, "budget": 5, "previous": …}
    {"adapter": sha256, "test_set": id, "scored": digest, "asked": digest,
     "declared": {"gates": digest, …}, "domain": …, "at": …, "who": …, "previous": …}
    {"verdict": "fail", "of": hash of the line of the evaluation, "previous": …}

Rows are keyed digests of a text and the label, for each of their texts, so that the file holds no
text and can be committed. Sets that share half of the rows of the smaller one, by any of the texts,
are one test set, also where rows were added. In older lines "rows" has one text, a string, and
"declared" is the digest of the gates.
``previous`` is the hash of the line that was last when a line was written: a line that was changed
or removed breaks that chain, while branches of a repository can be merged by keeping the lines of
both. ``evaluations.head`` holds the hashes of the last lines, to notice when these are removed.
Removing both files is not noticed: the ledger keeps honest people honest.
"""

import getpass
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from lora_domains.atomic import add_line, locked, whole_lines, write_text
from lora_domains.errors import AdapterError, listed

LEDGER, HEAD = "evaluations.jsonl", "evaluations.head"
ALPHA = 0.05
"""The error that all evaluations of a test set may have together."""
START = "0" * 64


def level(budget: int) -> float:
    """The confidence level of the bounds by which each of ``budget`` adapters may pass."""
    return 1 - ALPHA / budget


@dataclass(frozen=True)
class RowSet:
    """Test rows by their keyed digests."""

    views: tuple[frozenset[str], ...]
    """The digests of all rows by each of the texts that tell them apart."""
    key: str | None
    """Fingerprint of the key of the digests; None without the key of an existing ledger."""

    @cached_property
    def id(self) -> str:
        return digest_of_rows(frozenset().union(*self.views))


def digest_of_rows(rows: Collection[str]) -> str:
    """The identity of exactly these rows, in any order."""
    return sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and by which rules."""

    adapter: str
    """sha256 of the adapter."""
    domain: str
    scored: str
    """``digest_of_rows`` of the rows that are scored, which may be a sample of a test set."""
    declared: Mapping[str, str | int]
    """What decides the verdict besides the answers, by name: digests of gates and metric, of the
    suite, of the training rows. A later evaluation may add to it; a number may grow."""
    asked: str = ""
    """Digest of what the answers depend on besides the adapter: prompt, base, seed. Another one is
    another evaluation of the test set; "" in older lines."""


@dataclass(frozen=True)
class Standing:
    """An evaluation among all those of its test set; a card stores it as ``evaluations``."""

    test_set: str
    number: int
    """This evaluation is the ``number``-th on these rows. The same bytes on the same rows, prompted
    in the same way, count once."""
    budget: int
    """Number of evaluations that the test set allows, fixed at its first one."""
    level: float
    """Confidence level of the bounds by which an adapter may pass."""
    post_hoc: bool = False
    """Whether what an earlier evaluation of the adapter declared was changed or removed."""
    declared_verdict: str | None = None
    """Where ``post_hoc``, the verdict by what was declared, on the same rows."""
    recognised: bool = True
    """False where the key of the ledger is missing, so that no earlier row can be recognised."""
    broken: str | None = None
    """What is wrong with the ledger; None where it is intact."""
    changed: str = ""
    """Where ``post_hoc``, what was changed."""

    @property
    def used_up(self) -> bool:
        """Whether as many others were evaluated on these rows as they allow."""
        return self.number > self.budget

    @property
    def may_pass(self) -> bool:
        """Whether the adapter can pass here; what was changed later cannot make it pass."""
        changed = self.post_hoc and self.declared_verdict != "pass"
        return self.recognised and not (self.used_up or changed or self.broken)

    def __str__(self) -> str:
        if self.broken:
            return (
                f"The ledger of evaluations is damaged ({self.broken}), so the number of earlier "
                "evaluations is unknown. Restore it, or use a new test set."
            )
        if not self.recognised:
            return (
                "The key of the ledger of evaluations is missing, so the number of earlier "
                "evaluations is unknown. Restore .lora-domains/key, or set LORA_DOMAINS_KEY."
            )
        if self.used_up:
            return (
                f"{self.number - 1} evaluations were made on these test rows before, and "
                f"{self.budget} may be: these test rows are used up; collect a new test set."
            )
        sentence = (
            f"Evaluation {self.number} of {self.budget} on these test rows: an adapter passes by "
            f"bounds of {100 * self.level:.6g} % confidence."
        )
        if self.post_hoc:
            before = self.declared_verdict  # None of one that ended early, or read rows otherwise
            sentence += f" Post hoc: {self.changed or 'gates'} changed after an evaluation of this "
            sentence += f"adapter, which was {before}" if before else "adapter"
            sentence += "." if before == "pass" else "; what is changed later cannot make it pass."
        return sentence


def standing(
    folder: Path, test: RowSet, subject: Subject, budget: int,
    before: Sequence[tuple[RowSet, Subject, int]] = (),
) -> Standing:  # fmt: skip
    """The standing that an evaluation would have now, after those of ``before``.

    ``budget`` is that of the domain's gates, for a test set that was never evaluated. Nothing is
    written.
    """
    lines: list[str] = []
    if (folder / LEDGER).exists():
        with _opened(folder) as file:
            lines = whole_lines(file)
    broken = _broken(folder, lines)
    for earlier in before:
        lines += map(json.dumps, _records(*earlier))  # as if they had been written
    return _standing(lines, broken, test, subject, budget)


def begin_evaluation(folder: Path, test: RowSet, subject: Subject, budget: int) -> Standing:
    """Record that ``subject`` is evaluated on ``test`` now; returns its standing.

    Nothing is recorded where the key of the ledger is missing. Raises AdapterError when the ledger
    cannot be written.
    """
    with _opened(folder) as file:
        lines = whole_lines(file)
        broken = _broken(folder, lines)
        found = _standing(lines, broken, test, subject, budget)
        if not found.recognised:
            return found
        rows, evaluation = _records(test, subject, found.budget)
        if test.id not in {entry["test_set"] for entry in _row_sets(lines)}:
            _append(folder, file, lines, rows)
        now = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "who": _who()}
        _append(folder, file, lines, evaluation | now)
    return found


def end_evaluation(folder: Path, test: RowSet, subject: Subject, verdict: str) -> None:
    """Record the verdict of the last evaluation of ``subject`` on ``test``."""
    with _opened(folder) as file:
        lines = whole_lines(file)
        own = [line for line in lines if _evaluation(line) == (test.id, subject)]
        if own:
            _append(folder, file, lines, {"verdict": verdict, "of": _hash(own[-1])})


def _records(test: RowSet, subject: Subject, budget: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The lines of the test rows and of the evaluation, without what belongs to the moment."""
    views = [" ".join(sorted(view)) for view in test.views]
    rows = {"test_set": test.id, "rows": views, "key": test.key, "budget": budget}
    return rows, {**asdict(subject), "test_set": test.id}


# ── Which test set, which standing ──────────────────────────────────────────────────────────────


Views = Sequence[frozenset[str]]


@dataclass
class _TestSet:
    """Recorded sets of rows that are one test set."""

    name: str
    """The id of the first of them."""
    budget: int
    ids: set[str] = field(default_factory=set)
    sets: list[frozenset[str]] = field(default_factory=list)
    rows: set[str] = field(default_factory=set)

    def shares(self, views: Views) -> bool:
        """Whether half of the rows of the smaller set are in both, by one of their texts."""
        return any(map(self._shares, views))

    def _shares(self, rows: frozenset[str]) -> bool:
        if rows.isdisjoint(self.rows):
            return False
        return 2 * len(rows & self.rows) >= len(rows) or any(
            2 * len(rows & one) >= min(len(rows), len(one)) for one in self.sets
        )


def _joined(known: list[_TestSet], name: str, views: Views, budget: int) -> _TestSet:
    """The test set of the rows of ``views``, which are added to ``known`` and may join its sets."""
    same = [one for one in known if one.shares(views)]
    first = same[0] if same else _TestSet(name, budget)
    if not same:
        known.append(first)
    for other in same[1:]:
        first.ids |= other.ids
        first.sets += other.sets
        first.rows |= other.rows
        known.remove(other)
    first.ids.add(name)
    first.sets += views
    first.rows.update(*views)
    return first


def _standing(
    lines: Sequence[str], broken: str | None, test: RowSet, subject: Subject, budget: int
) -> Standing:
    row_sets = _row_sets(lines)
    if test.key is None or any(entry["key"] != test.key for entry in row_sets):
        return Standing("", 0, budget, level(budget), recognised=False, broken=broken)
    known: list[_TestSet] = []
    for entry in row_sets:
        texts = [entry["rows"]] if isinstance(entry["rows"], str) else entry["rows"]
        rows = [frozenset(text.split()) for text in texts]
        _joined(known, entry["test_set"], rows, entry["budget"])
    test_set = _joined(known, test.id, test.views, budget)
    evaluations = [(line, *found) for line in lines if (found := _evaluation(line))]
    history = [(line, one) for line, rows_id, one in evaluations if rows_id in test_set.ids]
    charged: dict[Any, None] = {}
    declared: dict[str, dict[str, str | int]] = {}
    by_declared: list[tuple[str, Subject]] = []
    for line, one in [*history, ("", subject)]:
        own = declared.setdefault(one.adapter, {})
        changed = _changed(own, one.declared)
        if not changed:
            own |= one.declared
            by_declared.append((line, one))
        # More questions are another chance; fewer or others cannot make it pass.
        charge = (one.adapter, one.scored, one.asked, own.get("general questions"))
        charged[charge] = None
    # What the loop leaves is what holds for ``subject``, the last one.
    verdicts = {entry.get("of"): entry.get("verdict") for entry in map(_parsed, lines)}
    decided = [
        verdicts.get(_hash(line))
        for line, one in by_declared
        if (one.adapter, one.scored, one.declared) == (subject.adapter, subject.scored, own)
        and one.asked in ("", subject.asked)
    ]
    return Standing(
        test_set.name,
        list(charged).index(charge) + 1,
        test_set.budget,
        level(test_set.budget),
        post_hoc=bool(changed),
        declared_verdict=decided[-1] if changed and decided else None,
        broken=broken,
        changed=listed(changed),
    )


def _changed(known: Mapping[str, str | int], now: Mapping[str, str | int]) -> list[str]:
    """What was ``known`` to be declared and is ``now`` another or missing; numbers may grow."""
    return [
        name
        for name, value in known.items()
        if now.get(name) != value
        and not (isinstance(value, int) and isinstance(new := now.get(name), int) and new > value)
    ]


def _row_sets(lines: Sequence[str]) -> list[dict[str, Any]]:
    entries = map(_parsed, lines)
    return [entry for entry in entries if _complete(entry) and "rows" in entry]


def _evaluation(line: str) -> tuple[str, Subject] | None:
    """The test set and the subject of the line of an evaluation; else None."""
    entry = _parsed(line)
    if "adapter" not in entry or not _complete(entry):
        return None
    if isinstance(entry["declared"], str):
        entry["declared"] = {"gates": entry["declared"]}
    return entry["test_set"], Subject(**{f.name: entry.get(f.name, "") for f in fields(Subject)})


# ── The file ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _opened(folder: Path) -> Iterator[IO[bytes]]:
    """The ledger, locked for this process until the block ends.

    Raises AdapterError when it cannot be written; half a line is removed at the next opening.
    """
    try:
        with locked(folder / LEDGER) as file:
            yield file
    except OSError as error:
        raise AdapterError(
            where=str(folder / LEDGER),
            expected="a writable ledger: every evaluation of a test set is recorded",
            found=error.strerror or str(error),
            hint="Free some space, or make it writable, and evaluate again; the adapter is safe.",
        ) from error


def _append(folder: Path, file: IO[bytes], lines: list[str], entry: dict[str, Any]) -> None:
    line = json.dumps(entry | {"previous": _hash(lines[-1]) if lines else START})
    intact = _broken(folder, lines) is None
    add_line(file, line)
    lines.append(line)
    if intact:
        # Keep a head that does not match, so that the damage stays visible.
        followed = {_parsed(line).get("previous") for line in lines}
        last = [own for line in lines if (own := _hash(line)) not in followed]
        write_text(folder / HEAD, "".join(f"{own}\n" for own in last))


def _broken(folder: Path, lines: Sequence[str]) -> str | None:
    """What is wrong with the ledger, in words; None where it is intact."""
    known = {START}
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        if entry.get("previous") not in known or not _complete(entry):
            return f"line {number} of {LEDGER} was changed, or a line before it is missing"
        known.add(_hash(line))
    head = folder / HEAD
    if head.exists() and not known.issuperset(head.read_text(errors="replace").split()):
        return f"lines that {HEAD} names are missing in {LEDGER}"
    return None


def _complete(entry: dict[str, Any]) -> bool:
    """Whether a line has the keys of its kind."""
    kinds: tuple[dict[str, Any], ...] = (
        {"test_set": str, "rows": str | list, "key": str, "budget": int},
        {"adapter": str, "test_set": str, "scored": str, "declared": str | dict},
        {"verdict": str, "of": str},
    )
    texts = entry["rows"] if isinstance(entry.get("rows"), list) else []
    return all(isinstance(text, str) for text in texts) and any(
        all(isinstance(entry.get(k), t) for k, t in kind.items()) for kind in kinds
    )


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _hash(line: str) -> str:
    return sha256(line.encode("utf-8", "surrogatepass")).hexdigest()


def _who() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a container without users
        return "unknown"
