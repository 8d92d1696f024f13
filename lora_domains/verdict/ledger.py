"""The ledger of test sets: each evaluation on the same rows leaves less confidence for the next.

Evaluating adapter after adapter on one test set and keeping the best one climbs on chance: 50
adapters that are truly harmful, each a change to the best so far, pass a 95 % gate almost surely.
So every evaluation is written down before its figures are shown, and each adapter after the first
has to pass at a stricter level. ``DIR/.looks.jsonl`` is append-only, one JSON object a line:

    {"look": 3, "at": …, "who": …, "domain": …, "adapter": sha256, "test_set": digest, "rows": …,
     "previous": sha256 of the line before}
    {"verdict": "fail", "of": 3, "previous": …}

(The keys of these files and of a card call an evaluation a "look".)

A test set is identified by the digest of its rows' keyed digests; the file holds no row's text. A
line that was changed or removed breaks the chain, and ``.looks.head`` (the number of lines, and the
hash of the last) shows when lines were removed from the end. Removing both files is not noticed:
the ledger keeps honest people honest. Nor is a test set recognised after one of its rows changed.

**The rule** (``level``): of the 5 % error that a verdict may have, the first adapter spends 4 %,
the second .3 %, and each one after it half of the one before; together 4.6 %. That alone keeps
verdicts honest where adapters do not follow from one another (alpha spending: Lan & DeMets 1983,
Biometrika 70:659). Where each adapter is chosen by the evaluation of the one before, the number of
possible adapters doubles with each evaluation, and so must the evidence (Blum & Hardt 2015, The
Ladder, ICML; Dwork et al. 2015, Science 349:636): with a spending of α/(k(k+1)), adapters tuned on
the test set passed in far more than 5 % of simulated runs.
The simulation is ``benchmarks/verdict/simulation.py``. The first evaluation keeps most of its
power: a harmless adapter passes the retention gate in 84 % of runs, not 87 % (700 items, 8 %
changing).
"""

import getpass
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from lora_domains.atomic import write_text
from lora_domains.errors import AdapterError

try:
    import fcntl
except ImportError:  # Windows has no advisory locks; there one process writes at a time
    fcntl = None  # type: ignore[assignment]

LEDGER, HEAD = ".looks.jsonl", ".looks.head"
ALPHA, FIRST, SECOND = 0.05, 0.8, 0.06
"""The error that verdicts may have in all, and the shares of it for the first two adapters."""
LEAST = 1e-9
"""No evaluation spends less: a float could not hold the level, and no adapter could pass."""
START = "0" * 64


def level(adapters_before: int) -> float:
    """The confidence level of an adapter's bounds, after ``adapters_before`` others."""
    share = FIRST if adapters_before == 0 else SECOND * 0.5 ** (adapters_before - 1)
    return 1 - max(LEAST, ALPHA * share)


def set_digest(items: Sequence[Mapping[str, Any]]) -> str:
    """The identity of a test set: sha256 over its rows' keyed digests and targets, in any order.

    The target of free text is always -1, so there the digests alone decide.
    """
    rows = sorted(f"{item['digest']} {item['target']}" for item in items if item["set"] == "test")
    return sha256("\n".join(rows).encode()).hexdigest()


@dataclass(frozen=True)
class PriorEvaluations:
    """What came before an evaluation on the same test set; stored in a card as "looks"."""

    test_set: str
    before: int
    """Earlier evaluations on the same rows, of any adapter."""
    adapters: int
    """Other adapters evaluated on them before this one was for the first time."""
    level: float
    broken: str | None
    """What is wrong with the ledger; None where it is intact."""


def begin_evaluation(
    folder: Path, *, test_set: str, adapter: str, domain: str, rows: int
) -> PriorEvaluations:
    """Record that ``adapter`` is evaluated on ``test_set`` now; returns what came before."""
    with _opened(folder) as file:
        lines = _lines(file)
        number = 1 + sum('"look"' in line for line in lines)
        entry = {
            "look": number,
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "who": _who(),
            "domain": domain,
            "adapter": adapter,
            "test_set": test_set,
            "rows": rows,
        }
        _append(folder, file, lines, entry)
    return prior_evaluations(folder, test_set, adapter)


def end_evaluation(folder: Path, *, test_set: str, adapter: str, verdict: str) -> None:
    """Record the verdict of the adapter's last evaluation."""
    with _opened(folder) as file:
        lines = _lines(file)
        own = [e["look"] for e in _evaluations(lines, test_set) if e["adapter"] == adapter]
        _append(folder, file, lines, {"verdict": verdict, "of": own[-1] if own else None})


def prior_evaluations(folder: Path, test_set: str, adapter: str) -> PriorEvaluations:
    """What came before the adapter's last evaluation on ``test_set``; every process may ask."""
    with _opened(folder) as file:
        lines = _lines(file)
        broken = _broken(folder, lines)
    adapters = [entry["adapter"] for entry in _evaluations(lines, test_set)]
    before, others = len(adapters), adapters
    if adapter in adapters:
        before = len(adapters) - 1 - adapters[::-1].index(adapter)
        others = adapters[: adapters.index(adapter)]
    count = len(set(others))
    return PriorEvaluations(test_set, before, count, level(count), broken)


# ── Inside ──────────────────────────────────────────────────────────────────────────────────────


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
            where=LEDGER,
            expected="a writable ledger: every evaluation of a test set is recorded",
            found=error.strerror or str(error),
            hint="Free some space and evaluate again; the adapter itself is safe.",
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
    file.write(line.encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())
    if _broken(folder, lines) is None:
        # Keep a head that does not match, so that the damage stays visible.
        write_text(folder / HEAD, f"{len(lines) + 1} {_hash(line)}\n")


def _broken(folder: Path, lines: Sequence[str]) -> str | None:
    """What is wrong with the ledger, in words; None where it is intact."""
    previous = START
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        if entry.get("previous") != previous:
            return f"line {number} of {LEDGER} does not follow the line before it"
        previous = _hash(line)
    head = folder / HEAD
    if head.exists():
        count, _, last = head.read_text().strip().partition(" ")
        known = int(count) if count.isdecimal() else -1
        if known > len(lines):
            return f"lines are missing at the end of {LEDGER}"
        if known < 1 or _hash(lines[known - 1]) != last:
            return f"{HEAD} does not fit {LEDGER}"
    return None


def _evaluations(lines: Sequence[str], test_set: str) -> list[dict[str, Any]]:
    entries = map(_parsed, lines)
    return [e for e in entries if e.get("test_set") == test_set and "look" in e and "adapter" in e]


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
