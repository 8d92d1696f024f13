"""The ledger of looks at a test set: each look at the same rows leaves less trust in the next.

Whoever tries adapter after adapter on one test set and keeps what scores best climbs on chance: 50
truly harmful adapters, each a change to the best so far, pass a 95 % gate almost surely. So every
look is written down before its figures are shown, and each adapter after the first is held to a
stricter level. ``DIR/.looks.jsonl`` is append-only, one JSON object a line:

    {"look": 3, "at": …, "who": …, "domain": …, "adapter": sha256, "test_set": digest, "rows": …,
     "previous": sha256 of the line before}
    {"verdict": "fail", "of": 3, "previous": …}

A test set is known by the digest of its rows' keyed digests; no row's text is here. A line that was
changed or taken out breaks the chain, and ``.looks.head`` (how many lines, and the hash of the
last) betrays lines taken off the end. Removing both files is not seen: this keeps honest people
honest. Nor is a test set changed by a row the same test set.

**The rule** (``level``): of the 5 % that a verdict may err, the first adapter spends 4 %, the
second .3 %, and each one after it half of the one before; together 4.6 %. That alone keeps
verdicts honest where adapters do not follow from one another (alpha spending: Lan & DeMets 1983,
Biometrika 70:659). Where they do, the number of adapters one could have come to doubles with each
look that told which to keep, and so must the evidence (Blum & Hardt 2015, The Ladder, ICML; Dwork
et al. 2015, Science 349:636): spending α/(k(k+1)) instead let climbers through far above 5 %. The
simulation is ``benchmarks/verdict/simulation.py``. The first evaluation keeps most of its power: a
harmless adapter passes the retention gate in 84 % of runs, not 87 % (700 items, 8 % flipping).
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
"""What a verdict may err in all, and the shares of it that the first two adapters spend."""
LEAST = 1e-9
"""No look spends less: beyond it no adapter could pass, and a float could not hold the level."""
START = "0" * 64


def level(adapters_before: int) -> float:
    """The confidence level of an adapter's bounds, after ``adapters_before`` others."""
    share = FIRST if adapters_before == 0 else SECOND * 0.5 ** (adapters_before - 1)
    return 1 - max(LEAST, ALPHA * share)


def set_digest(items: Sequence[Mapping[str, Any]]) -> str:
    """What a test set is known by: sha256 over its rows' keyed digests and targets, in any order.

    Free text has no target: there the digest alone tells.
    """
    rows = sorted(f"{item['digest']} {item['target']}" for item in items if item["set"] == "test")
    return sha256("\n".join(rows).encode()).hexdigest()


@dataclass(frozen=True)
class Standing:
    """Where a look stands among all looks at its test set, as the card keeps it (``looks``)."""

    test_set: str
    before: int
    """Looks at the same rows before this one, by any adapter."""
    adapters: int
    """Other adapters judged on them before this one was for the first time."""
    level: float
    broken: str | None
    """What is wrong with the ledger; None where it is whole."""


def look(folder: Path, *, test_set: str, adapter: str, domain: str, rows: int) -> Standing:
    """Write down that ``adapter`` is judged on ``test_set`` now; where that look stands."""
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
    return standing(folder, test_set, adapter)


def settle(folder: Path, *, test_set: str, adapter: str, verdict: str) -> None:
    """Write down the verdict of the adapter's last look."""
    with _opened(folder) as file:
        lines = _lines(file)
        mine = [e["look"] for e in _looks(lines, test_set) if e["adapter"] == adapter]
        _append(folder, file, lines, {"verdict": verdict, "of": mine[-1] if mine else None})


def standing(folder: Path, test_set: str, adapter: str) -> Standing:
    """Where the adapter's last look at ``test_set`` stands; every process may ask."""
    with _opened(folder) as file:
        lines = _lines(file)
        broken = _broken(folder, lines)
    looks = [entry["adapter"] for entry in _looks(lines, test_set)]
    before = len(looks) - 1 - looks[::-1].index(adapter) if adapter in looks else len(looks)
    others = looks[: looks.index(adapter)] if adapter in looks else looks
    count = len(set(others))
    return Standing(test_set, before, count, level(count), broken)


# ── inside ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _opened(folder: Path) -> Iterator[IO[bytes]]:
    """The ledger, held by this process alone until the block ends.

    Raises AdapterError when the disk refuses it; a line it took half of is taken off next time.
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
            expected="a disk that takes a line: every look at a test set is written down",
            found=error.strerror or str(error),
            hint="Free some space and evaluate again; the adapter itself is safe.",
        ) from error


def _lines(file: IO[bytes]) -> list[str]:
    """Every whole line; what a killed process left of one is taken off."""
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
        # A head that no longer fits stays as it is: what was done to the ledger stays seen.
        write_text(folder / HEAD, f"{len(lines) + 1} {_hash(line)}\n")


def _broken(folder: Path, lines: Sequence[str]) -> str | None:
    """What is wrong with the ledger, in words; None where it is whole."""
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


def _looks(lines: Sequence[str], test_set: str) -> list[dict[str, Any]]:
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
