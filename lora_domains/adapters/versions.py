"""Earlier versions of an adapter: keeping them, and restoring one.

``out/.versions/NAME/0001`` is the oldest version kept of ``out/NAME``: a whole adapter folder.
"""

import shutil
from pathlib import Path

from lora_domains.adapters.folder import find_adapter, fingerprint, is_adapter, replacing
from lora_domains.atomic import NAME, new_folder, restored
from lora_domains.errors import AdapterCorrupt, AdapterError, did_you_mean
from lora_domains.report.card import AdapterEntry, Card

VERSIONS = ".versions"
KEPT = 5
"""Versions kept of one adapter; the oldest is deleted when there are more."""


def versions(folder: Path) -> list[Path]:
    """The kept versions of the adapter in ``folder``, oldest first."""
    kept = folder.parent / VERSIONS / folder.name
    numbered = [p for p in kept.glob("[0-9]*") if p.name.isdigit() and is_adapter(p)]
    return sorted(numbered, key=lambda path: int(path.name))


def keep_version(folder: Path, successor: AdapterEntry | None = None) -> Path | None:
    """Copy the adapter in ``folder`` to its versions before it is replaced; return the copy.

    ``successor`` is the card's entry of the adapter that replaces it. Nothing is kept, and None
    returned, when there is no adapter, when it is the newest version already, or when it is an
    unfinished state of the successor's own run: such states must not displace finished versions. A
    process killed at any moment leaves a whole version or none. Raises AdapterError when the disk
    refuses.
    """
    folder = restored(folder)
    if not is_adapter(folder) or _is_unfinished_state(folder, successor):
        return None
    kept = versions(folder)
    if kept and fingerprint(kept[-1]) == fingerprint(folder):
        return None
    number = int(kept[-1].name) + 1 if kept else 1
    place = folder.parent / VERSIONS / folder.name / f"{number:04d}"
    try:
        with new_folder(place) as fresh:
            for path in folder.iterdir():
                shutil.copy2(path, fresh / path.name)
    except OSError as error:
        raise AdapterError(
            where=folder.name,
            expected="a disk that takes a copy of the adapter before it is replaced",
            found=error.strerror or str(error),
            hint="Free some space, or delete old versions in "
            f"{VERSIONS}/{folder.name}. The adapter is untouched.",
        ) from error
    for old in [*kept, place][:-KEPT]:
        shutil.rmtree(old)
    return place


def find_versioned(path: str, out: Path) -> Path:
    """The folder of the adapter that ``path`` names, even where only its versions are left.

    Raises AdapterError when there is none.
    """
    for folder in (Path(path), out / path):
        if NAME.fullmatch(folder.name) and (is_adapter(restored(folder)) or versions(folder)):
            return folder
    return find_adapter(path, out)


def check_versions(folder: Path) -> list[Path]:
    """The versions of the adapter in ``folder``; raises AdapterError where there is none."""
    kept = versions(folder)
    if not kept:
        raise AdapterError(
            where=folder.name,
            expected="an earlier version",
            found="none",
            hint="Versions are kept when an adapter is trained again under its name.",
        )
    return kept


def rollback(folder: Path, number: str | None = None) -> tuple[Path, Path | None]:
    """Replace the adapter in ``folder`` by a version: the newest, or the one called ``number``.

    The replaced adapter becomes a version itself, so that a rollback can be undone. Returns the
    restored version and the new one. Raises AdapterError when there is no such version.
    """
    folder = restored(folder)
    kept = check_versions(folder)
    current = fingerprint(folder) if is_adapter(folder) else None
    others = [path for path in kept if fingerprint(path) != current]
    names = [path.name for path in kept]
    if number is None:
        chosen = (others or kept)[-1]
    elif number.zfill(4) in names:
        chosen = kept[names.index(number.zfill(4))]
    else:
        raise AdapterError(
            where=folder.name,
            expected="a version that is kept",
            found=number,
            hint=did_you_mean(number, names),
        )
    with replacing(folder) as fresh:
        for path in chosen.iterdir():
            shutil.copy2(path, fresh / path.name)
        saved = keep_version(folder)
    return chosen, saved


def _is_unfinished_state(folder: Path, successor: AdapterEntry | None) -> bool:
    """Whether an interruption of the successor's run left the adapter, never evaluated since."""
    if successor is None:
        return False
    try:
        entry = Card.read(folder).adapter
    except AdapterCorrupt:
        return False
    if entry.judged or entry.training.get("finished", True):
        return False
    same = ("recipe_digest", "data", "parent")
    return all(getattr(entry, name) == getattr(successor, name) for name in same)
