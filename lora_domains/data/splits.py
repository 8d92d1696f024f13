"""Splits: rows of ``train`` set apart for validation and test, and samples of a split. No torch.

All choices follow from the seed and the rows' ids, so they are the same on every machine.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256

from lora_domains.data.identity import has_own_choices, identity
from lora_domains.data.leaks import copies
from lora_domains.data.source import file_of
from lora_domains.errors import DataError
from lora_domains.tasks import Example


def split_off(
    rows: Sequence[Example], split: str, seed: int, left: int
) -> tuple[list[Example], list[Example]]:
    """(rows that remain, rows of ``split``), with groups whole and classes in proportion.

    The test split takes a fifth of the rows. Validation takes a tenth, or 20 rows if these are at
    most a fifth, and at most 500. At least ``left`` units (``together``) remain. Raises DataError
    when there are not enough units.
    """
    fifth = max(1, len(rows) // 5)
    size = fifth if split == "test" else min(500, max(round(len(rows) / 10), min(20, fifth)))
    units = together(rows)
    if len(units) <= left:
        raise DataError(
            where=file_of(rows[0].place),
            expected=f"at least {left + 1} groups of rows, or different texts, to split",
            found=str(len(units)),
            hint=f"Give the rows: Data({split}=…) or --{split}.",
        )
    chosen = _choose(units, rows, size, f"{seed}/{split}", spare=1, left=left)
    remaining = [row for i, row in enumerate(rows) if i not in chosen]
    return remaining, [row for i, row in enumerate(rows) if i in chosen]


def sample(rows: list[Example], size: int, seed: int) -> list[Example]:
    """At most ``size`` of ``rows``, in order, classes in proportion and each represented."""
    if len(rows) <= size:
        return rows
    chosen = _choose([[i] for i in range(len(rows))], rows, size, f"{seed}/limit")
    return [row for i, row in enumerate(rows) if i in chosen]


def folds(rows: Sequence[Example], count: int, seed: int) -> list[list[int]]:
    """Positions of ``rows`` in ``count`` folds, groups and repeated texts whole, classes in
    proportion.

    Units of one class are dealt in an order drawn by ``seed``, each to the fold with the fewest
    rows of that class, and of such folds to the smallest.
    """
    parts: list[list[int]] = [[] for _ in range(count)]
    classes = [Counter[int]() for _ in range(count)]
    strata = strata_of(rows)

    def draw(unit: list[int]) -> tuple[int, int, bytes]:
        # The largest units come first: the small ones even out the folds.
        digest = sha256(f"{seed}/folds/{rows[unit[0]].id}".encode()).digest()
        return -len(unit), strata[unit[0]], digest

    for unit in sorted(together(rows), key=draw):
        stratum = strata[unit[0]]
        fold = min(range(count), key=lambda f: (classes[f][stratum], len(parts[f])))
        parts[fold] += unit
        classes[fold].update(strata[i] for i in unit)
    return [sorted(part) for part in parts]


def strata_of(rows: Sequence[Example]) -> list[int]:
    """The class of each row whose share is kept: the target, and of several labels the rarest.

    Rare labels are so in proportion, as by iterative stratification (Sechidis et al. 2011), and
    frequent ones, of which there are enough anyway, nearly. Rows without any label are a class too.
    """
    several = [row.target < 0 and len(row.truth) > 1 for row in rows]
    counts = Counter(n for row, many in zip(rows, several, strict=True) if many for n in row.labels)
    return [
        min(row.labels, key=lambda n: (counts[n], n), default=row.target) if many else row.target
        for row, many in zip(rows, several, strict=True)
    ]


def overlaps(parts: Mapping[str, Sequence[Example]]) -> list[str]:
    """Warnings for groups in two splits, and for validation rows that are training rows too."""
    groups = {split: {row.group for row in rows if row.group} for split, rows in parts.items()}
    warnings = []
    for one, other in (("train", "test"), ("validation", "test"), ("train", "validation")):
        if shared := len(groups[one] & groups[other]):
            warnings.append(f"{shared} groups have rows in both {one} and {other}")
    if repeated := len(copies(parts["validation"], parts["train"])):
        warnings.append(
            f"{repeated} validation rows are also training rows: the checkpoint that they select "
            "may be overfitted"
        )
    return warnings


def together(rows: Sequence[Example]) -> list[list[int]]:
    """Positions of rows that stay together: rows that share a group or a text, and so on."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    with_choices = has_own_choices(rows)
    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for key in (("text", identity(row, with_choices)), ("group", row.group or "")):
            if key != ("group", ""):
                parent[root(i)] = root(first.setdefault(key, i))
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
    """About ``size`` positions, whole units, classes in proportion.

    ``spare`` rows of each class and ``left`` units remain. In an order drawn by ``salt``, a unit is
    taken when it brings the classes nearer to their shares; units of one row meet them exactly.
    """
    strata = strata_of(rows)
    available = Counter(strata)
    shares = _shares(available, min(size, len(rows)), spare)
    taken = Counter[int]()
    chosen: set[int] = set()
    most = len(units) - left
    order = sorted(units, key=lambda u: sha256(f"{salt}/{rows[u[0]].id}".encode()).digest())
    for unit in order:
        adds = Counter(strata[i] for i in unit)
        gain = sum(abs(shares[c] - taken[c]) - abs(shares[c] - taken[c] - adds[c]) for c in adds)
        if most and gain > 0 and all(taken[c] + adds[c] <= available[c] - spare for c in adds):
            most -= 1
            taken.update(adds)
            chosen.update(unit)
    return chosen if chosen else {*min(order, key=len)}


def _shares(available: Mapping[int, int], size: int, spare: int) -> dict[int, int]:
    """Rows of each class among ``size``, by largest remainder; ``spare`` rows of a class remain.

    Without ``spare`` (a sample) each class has at least one row if there is room for all.
    """
    total = sum(available.values())
    least = 1 if not spare and size >= len(available) else 0
    shares = {c: max(least, min(n - spare, size * n // total)) for c, n in available.items()}
    by_remainder = sorted(available, key=lambda c: (-(size * available[c] % total), c))
    while sum(shares.values()) < size:
        growing = [c for c in by_remainder if shares[c] < available[c] - spare]
        if not growing:
            break
        for c in growing[: size - sum(shares.values())]:
            shares[c] += 1
    while sum(shares.values()) > size:
        shares[max(shares, key=lambda c: (shares[c], c))] -= 1
    return shares
