"""The ledger of a project: which adapters were evaluated on which test rows.

Evaluating adapter after adapter on one test set and keeping the best one climbs on chance. A test
set therefore has a budget of error, ``ALPHA``, for a number of adapters that is fixed when it is
first evaluated: each of k adapters is held to one-sided bounds at 1 - ALPHA / k (Bonferroni), and
after them none can pass. ``benchmarks/verdict/budget.py`` simulates what this covers.

``evaluations.jsonl`` is append-only, one JSON object a line: one for a set of rows, one for each
evaluation, written before its figures are shown, and one for its verdict:

    {"test_set": id, "rows": "DIGEST DIGEST …", "key": fingerprint, "budget": 5, "previous": …}
    {"adapter": sha256, "test_set": id, "scored": digest, "declared": digest, "domain": …,
     "at": …, "who": …, "previous": …}
    {"verdict": "fail", "of": hash of the line of the evaluation, "previous": …}

Rows are keyed digests of text and label, so that the file holds no text and can be committed. Sets
that share half of the rows of the smaller one are one test set, also where rows were added.
``previous`` is the hash of the line that was last when a line was written: a line that was changed
or removed breaks that chain, while branches of a repository can be merged by keeping the lines of
both. ``evaluations.head`` holds the hashes of the last lines, to notice when these are removed.
Removing both files is not noticed: the ledger keeps honest people honest.
"""

import getpass
import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there one process writes at a time
    fcntl = None  # type: ignore[assignment]

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

    rows: frozenset[str]
    key: str | None
    """Fingerprint of the key of the digests; None without the key of an existing ledger."""

    @cached_property
    def id(self) -> str:
        return digest_of_rows(self.rows)


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
    declared: str
    """Digest of gates and metric."""


@dataclass(frozen=True)
class Standing:
    """An evaluation among all those of its test set; a card stores it as ``evaluations``."""

    test_set: str
    number: int
    """This adapter is the ``number``-th evaluated on these rows. The same bytes on the same rows
    count once."""
    budget: int
    """Number of adapters that the test set allows, fixed at its first evaluation."""
    level: float
    """Confidence level of the bounds by which an adapter may pass."""
    post_hoc: bool = False
    """Whether gates or metric differ from those of the adapter's first evaluation."""
    declared_verdict: str | None = None
    """Where ``post_hoc``, the verdict by the gates and metric of the first evaluation."""
    recognised: bool = True
    """False where the key of the ledger is missing, so that no earlier row can be recognised."""
    broken: str | None = None
    """What is wrong with the ledger; None where it is intact."""

    @property
    def used_up(self) -> bool:
        """Whether as many other adapters were evaluated on these rows as they allow."""
        return self.number > self.budget

    @property
    def may_pass(self) -> bool:
        """Whether the adapter can pass here; gates that were changed cannot make it pass."""
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
                f"{self.number - 1} adapters were evaluated on these test rows before, and "
                f"{self.budget} may be: these test rows are used up; collect a new test set."
            )
        sentence = (
            f"Evaluation {self.number} of {self.budget} on these test rows: an adapter passes by "
            f"bounds of {100 * self.level:.6g} % confidence."
        )
        if self.post_hoc:
            before = self.declared_verdict or "unfinished"
            sentence += (
                " Post hoc: gates or metric were changed after the first evaluation of this "
                f"adapter, which was {before}"
            )
            sentence += "." if before == "pass" else "; changed gates cannot make it pass."
        return sentence


def standing(folder: Path, test: RowSet, subject: Subject, budget: int) -> Standing:
    """The standing that an evaluation would have now; nothing is written.

    ``budget`` is that of the domain's gates, for a test set that was never evaluated.
    """
    if not (folder / LEDGER).exists():
        return _standing([], None, test, subject, budget)
    with _opened(folder) as file:
        lines = _lines(file)
        return _standing(lines, _broken(folder, lines), test, subject, budget)


def begin_evaluation(folder: Path, test: RowSet, subject: Subject, budget: int) -> Standing:
    """Record that ``subject`` is evaluated on ``test`` now; returns its standing.

    Nothing is recorded where the key of the ledger is missing. Raises AdapterError when the ledger
    cannot be written.
    """
    with _opened(folder) as file:
        lines = _lines(file)
        broken = _broken(folder, lines)
        found = _standing(lines, broken, test, subject, budget)
        if not found.recognised:
            return found
        if test.id not in {entry["test_set"] for entry in _row_sets(lines)}:
            rows = {"rows": " ".join(sorted(test.rows)), "key": test.key, "budget": found.budget}
            _append(folder, file, lines, {"test_set": test.id, **rows})
        entry = {
            "adapter": subject.adapter,
            "test_set": test.id,
            "scored": subject.scored,
            "declared": subject.declared,
            "domain": subject.domain,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "who": _who(),
        }
        _append(folder, file, lines, entry)
    return found


def end_evaluation(folder: Path, test: RowSet, subject: Subject, verdict: str) -> None:
    """Record the verdict of the last evaluation of ``subject`` on ``test``."""
    with _opened(folder) as file:
        lines = _lines(file)
        own = [
            line
            for line in lines
            if _evaluation(line) == (test.id, subject.adapter, subject.scored, subject.declared)
        ]
        if own:
            _append(folder, file, lines, {"verdict": verdict, "of": _hash(own[-1])})


# ── Which test set, which standing ──────────────────────────────────────────────────────────────


@dataclass
class _TestSet:
    """Recorded sets of rows that are one test set."""

    name: str
    """The id of the first of them."""
    budget: int
    ids: set[str] = field(default_factory=set)
    sets: list[frozenset[str]] = field(default_factory=list)
    rows: set[str] = field(default_factory=set)

    def shares(self, rows: frozenset[str]) -> bool:
        """Whether half of the rows of the smaller set are in both."""
        if rows.isdisjoint(self.rows):
            return False
        return 2 * len(rows & self.rows) >= len(rows) or any(
            2 * len(rows & one) >= min(len(rows), len(one)) for one in self.sets
        )


def _joined(known: list[_TestSet], name: str, rows: frozenset[str], budget: int) -> _TestSet:
    """The test set of ``rows``, which are added to ``known`` and may join sets in it."""
    same = [one for one in known if one.shares(rows)]
    first = same[0] if same else _TestSet(name, budget)
    if not same:
        known.append(first)
    for other in same[1:]:
        first.ids |= other.ids
        first.sets += other.sets
        first.rows |= other.rows
        known.remove(other)
    first.ids.add(name)
    first.sets.append(rows)
    first.rows |= rows
    return first


def _standing(
    lines: Sequence[str], broken: str | None, test: RowSet, subject: Subject, budget: int
) -> Standing:
    row_sets = _row_sets(lines)
    if test.key is None or any(entry["key"] != test.key for entry in row_sets):
        return Standing("", 0, budget, level(budget), recognised=False, broken=broken)
    known: list[_TestSet] = []
    for entry in row_sets:
        rows = frozenset(entry["rows"].split())
        _joined(known, entry["test_set"], rows, entry["budget"])
    test_set = _joined(known, test.id, test.rows, budget)
    verdicts = {entry.get("of"): entry.get("verdict") for entry in map(_parsed, lines)}
    evaluations = [(_hash(line), *one) for line in lines if (one := _evaluation(line))]
    evaluations = [one for one in evaluations if one[1] in test_set.ids]
    charged = list(dict.fromkeys((adapter, scored) for _, _, adapter, scored, _ in evaluations))
    own = (subject.adapter, subject.scored)
    number = charged.index(own) if own in charged else len(charged)
    # An adapter declares its gates and metric when it is first evaluated.
    rules = [(line, declared) for line, _, adapter, _, declared in evaluations
             if adapter == subject.adapter]  # fmt: skip
    declared = rules[0][1] if rules else subject.declared
    post_hoc = declared != subject.declared
    decided = [verdicts.get(line) for line, by in rules if by == declared] if post_hoc else []
    return Standing(
        test_set.name,
        number + 1,
        test_set.budget,
        level(test_set.budget),
        post_hoc=post_hoc,
        declared_verdict=decided[-1] if decided else None,
        broken=broken,
    )


def _row_sets(lines: Sequence[str]) -> list[dict[str, Any]]:
    entries = map(_parsed, lines)
    return [entry for entry in entries if _complete(entry) and "rows" in entry]


def _evaluation(line: str) -> tuple[str, str, str, str] | None:
    """(test set, adapter, rows scored, rules) of the line of an evaluation; else None."""
    entry = _parsed(line)
    if "adapter" not in entry or not _complete(entry):
        return None
    return entry["test_set"], entry["adapter"], entry["scored"], entry["declared"]


# ── The file ────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _opened(folder: Path) -> Iterator[IO[bytes]]:
    """The ledger, locked for this process until the block ends.

    Raises AdapterError when it cannot be written; half a line is removed at the next opening.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LEDGER).open("a+b") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield file  # closing the file releases the lock
    except OSError as error:
        raise AdapterError(
            where=str(folder / LEDGER),
            expected="a writable ledger: every evaluation of a test set is recorded",
            found=error.strerror or str(error),
            hint="Free some space, or make it writable, and evaluate again; the adapter is safe.",
        ) from error


def _lines(file: IO[bytes]) -> list[str]:
    """Every whole line; half a line that a killed process left is removed."""
    file.seek(0)
    content = file.read()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)
    return content[:whole].decode("utf-8", "replace").splitlines()


def _append(folder: Path, file: IO[bytes], lines: list[str], entry: dict[str, Any]) -> None:
    line = json.dumps(entry | {"previous": _hash(lines[-1]) if lines else START})
    intact = _broken(folder, lines) is None
    file.write(line.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
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
    kinds = (
        {"test_set": str, "rows": str, "key": str, "budget": int},
        {"adapter": str, "test_set": str, "scored": str, "declared": str},
        {"verdict": str, "of": str},
    )
    return any(all(isinstance(entry.get(k), t) for k, t in kind.items()) for kind in kinds)


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
