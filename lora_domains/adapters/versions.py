"""An adapter's past: the versions that were replaced, going back to one, and going on from one.

``out/.versions/NAME/0001`` is the oldest version kept of ``out/NAME``: a whole adapter folder.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.peft import CONFIG, WEIGHTS, fingerprint, replacing
from lora_domains.atomic import new_folder, restored
from lora_domains.domain import Lora
from lora_domains.errors import AdapterCorrupt, AdapterError, did_you_mean
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import check_head
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import AdapterEntry, Card, ParentRecord
from lora_domains.tasks import Task

VERSIONS = ".versions"
KEPT = 5
"""Versions kept of one adapter; beyond them the oldest goes."""


def versions(folder: Path) -> list[Path]:
    """The kept versions of the adapter in ``folder``, oldest first."""
    kept = folder.parent / VERSIONS / folder.name
    found = [p for p in kept.glob("[0-9]*") if p.name.isdigit() and _is_adapter(p)]
    return sorted(found, key=lambda path: int(path.name))


def keep_version(folder: Path, instead: AdapterEntry | None = None) -> Path | None:
    """Copy the adapter in ``folder`` to its versions before it is replaced; the copy.

    Nothing is kept where there is no adapter, one that is the newest version already, or one that
    an interrupted run left meanwhile and that run goes on: ``instead`` is the card's entry of what
    replaces it. Versions that were finished must not go for those. A process killed at any moment
    leaves a whole version or none. Raises AdapterError when the disk refuses.
    """
    folder = restored(folder)
    if not _is_adapter(folder) or _goes_on(folder, instead):
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
            expected="a disk that takes a copy of the adapter that is replaced",
            found=error.strerror or str(error),
            hint="Free some space, or delete old versions in "
            f"{VERSIONS}/{folder.name}. The adapter is untouched.",
        ) from error
    for old in [*kept, place][:-KEPT]:
        shutil.rmtree(old)
    return place


def rollback(folder: Path, number: str | None = None) -> tuple[Path, Path | None]:
    """Put a version (the newest, or the one called ``number``) in the place of ``folder``.

    What stood there becomes a version itself, so that a rollback can be rolled back. Returns the
    version taken and the one made. Raises AdapterError when there is none.
    """
    folder = restored(folder)
    kept = versions(folder)
    if not kept:
        raise AdapterError(
            where=folder.name,
            expected="an earlier version",
            found="none",
            hint="Versions are kept when an adapter is trained again under its name.",
        )
    # The newest that is not what stands there already.
    here = fingerprint(folder) if _is_adapter(folder) else None
    other = [path for path in kept if fingerprint(path) != here]
    names = [path.name for path in kept]
    if number is None:
        chosen = (other or kept)[-1]
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
        made = keep_version(folder)
    return chosen, made


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


# ── Going on from another adapter ───────────────────────────────────────────────────────────────


def _goes_on(folder: Path, instead: AdapterEntry | None) -> bool:
    """Whether the run of ``instead`` left it unfinished, and nobody judged it since."""
    try:
        entry = Card.read(folder).adapter
    except AdapterCorrupt:
        return False
    if instead is None or entry.judged or entry.training.get("finished", True):
        return False
    same = ("recipe_digest", "data", "parent")
    return all(getattr(entry, name) == getattr(instead, name) for name in same)


@dataclass(frozen=True)
class Parent:
    """A saved adapter that another goes on from, and how the other's card names it."""

    adapter: Adapter
    sha256: str

    def record(self) -> ParentRecord:
        return ParentRecord(self.adapter.name, self.sha256)


def load_parent(folder: Path, base: Base) -> Parent:
    """The adapter in ``folder``, as strictly read as any; a version has its adapter's name."""
    kept = folder.absolute().parent
    name = kept.name if kept.parent.name == VERSIONS else None
    return Parent(load_adapter(folder, base, name), fingerprint(folder))


def parent_folder(record: ParentRecord, out: Path) -> Path | None:
    """Where a card's parent lies: in ``out`` still, or among the versions kept there."""
    folder = out / record.name
    for path in (folder, *reversed(versions(folder))):
        if _is_adapter(path) and fingerprint(path) == record.sha256:
            return path
    return None


def find_parent(record: ParentRecord, base: Base, out: Path) -> Parent | None:
    """A card's parent, read; None where it cannot be found."""
    folder = parent_folder(record, out)
    return None if folder is None else load_parent(folder, base)


def going_on(parent: Adapter, task: Task) -> Task:
    """``task`` for an adapter that goes on from ``parent``: over the classes of its head.

    Narrower rows may lack some of them. Raises AdapterError where one has a head and the other has
    none, or where ``task`` declares other labels.
    """
    where = f"{parent.name}, to go on from"
    if parent.head is not None and parent.card is None:
        raise AdapterError(
            where=where,
            expected="a card that says which classes its head has, in which order",
            found="a folder of plain PEFT",
            hint="Train on the base itself: leave --init-from out.",
        )
    task = over_classes(task, parent.card)
    check_head(parent.head, task, parent.card.adapter.task if parent.card else {}, where)
    return task


def over_classes(task: Task, card: Card | None) -> Task:
    """``task`` over the classes of the head that ``card`` is of, where it declares none itself.

    A head knows its classes by number, and rows may lack one of them.
    """
    trained = card.adapter.task if card else {}
    labels = tuple(trained.get("labels") or ()) if trained.get("head") else ()
    return task.with_default_labels(labels) if labels and task.head else task


def continued(parent: Adapter, name: str, lora: Lora) -> Adapter:
    """A new adapter with the weights, rank, scale and targets of ``parent``; dropout is its own."""
    config = deepcopy(parent.config)
    config.lora_dropout = lora.dropout
    return replace(parent, name=name, config=config, card=None, path=None, notes=())


@contextmanager
def parent_resident(
    bank: Bank, name: str, known: Parent | None, out: Path, warn: Callable[[str], None]
) -> Iterator[str | None]:
    """The adapter that ``name`` went on from, resident inside under the name yielded.

    None where there was none, or where it cannot be found any more, which is said.
    """
    card = bank[name].card
    record = card.adapter.parent if card else None
    if record is None:
        yield None
        return
    if known is None or known.sha256 != record.sha256:
        known = find_parent(record, bank.base, out)
    if known is None:
        warn(f"{record.name}, which {name} went on from, is not there to be compared with.")
        yield None
        return
    slot = f"{name}__parent"
    bank.add(replace(known.adapter, name=slot))
    try:
        yield slot
    finally:
        bank.remove(slot)
