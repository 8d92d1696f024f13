"""Training that continues from another adapter, the parent; and comparing with it afterwards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lora_domains.adapters.folder import fingerprint, is_adapter
from lora_domains.adapters.loading import load_adapter
from lora_domains.adapters.versions import VERSIONS, versions
from lora_domains.domain import Lora
from lora_domains.errors import AdapterError
from lora_domains.modeling.bank import Bank
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import check_head
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import Card, ParentRecord
from lora_domains.tasks import Task


@dataclass(frozen=True)
class Parent:
    """A saved adapter that another one continues from."""

    adapter: Adapter
    sha256: str

    def record(self) -> ParentRecord:
        """How the card of the other adapter names it."""
        return ParentRecord(self.adapter.name, self.sha256)


def load_parent(folder: Path, base: Base) -> Parent:
    """The adapter in ``folder``, loaded strictly; a version has the name of its adapter."""
    kept = folder.absolute().parent
    name = kept.name if kept.parent.name == VERSIONS else None
    return Parent(load_adapter(folder, base, name), fingerprint(folder))


def parent_folder(record: ParentRecord, out: Path) -> Path | None:
    """The folder of a card's parent, in ``out`` or among the versions kept there."""
    folder = out / record.name
    for path in (folder, *reversed(versions(folder))):
        if is_adapter(path) and fingerprint(path) == record.sha256:
            return path
    return None


def find_parent(record: ParentRecord, base: Base, out: Path) -> Parent | None:
    """A card's parent, loaded; None when it cannot be found."""
    folder = parent_folder(record, out)
    return None if folder is None else load_parent(folder, base)


def continued_task(parent: Adapter, task: Task) -> Task:
    """``task`` for an adapter that continues from ``parent``; see ``as_trained``.

    Raises AdapterError when only one of the two has a head,
    and when ``task`` declares other labels.
    """
    where = f"{parent.name}, to continue from"
    if parent.head is not None and parent.card is None:
        raise AdapterError(
            where=where,
            expected="a card with the labels of its head, in order",
            found="a folder of plain PEFT",
            hint="Train on the base itself: leave --init-from out.",
        )
    task = as_trained(parent.card, task)
    trained = parent.card.adapter.declared_task if parent.card else None
    check_head(parent.head, task, trained, where)
    return task


def as_trained(card: Card | None, task: Task) -> Task:
    """``task`` with what it leaves open as in the training of ``card``.

    That is whether a chat template renders the prompts, and the labels of a head: it numbers its
    classes, and rows may lack one of them. Of a head that predicts numbers it is their scale.
    """
    trained = card.adapter.declared_task if card else None
    if trained is None:
        return task
    told = any(field.name == "thinking" for field in fields(trained))
    task = task.with_chat(bool(trained.chat), trained.thinking if told else None)
    if not trained.head or not task.head:
        return task
    return task.with_default_labels(trained.labels).with_scale(trained.scale)


def continued_adapter(parent: Adapter, name: str, lora: Lora) -> Adapter:
    """A new adapter with the weights, rank, scale and targets of ``parent``; not its dropout."""
    config = deepcopy(parent.config)
    config.lora_dropout = lora.dropout
    return replace(parent, name=name, config=config, card=None, path=None, notes=())


@contextmanager
def loaded_parent(
    bank: Bank, name: str, known: Parent | None, out: Path, warn: Callable[[str], None]
) -> Iterator[str | None]:
    """Load the adapter that ``name`` continues from inside the block; yields its name in the bank.

    Yields None when there is none, and with a warning when it cannot be found any more.
    """
    card = bank[name].card
    record = card.adapter.parent if card else None
    if record is None:
        yield None
        return
    if known is None or known.sha256 != record.sha256:
        known = find_parent(record, bank.base, out)
    if known is None:
        warn(f"{record.name}, which {name} continues from, was not found to compare with.")
        yield None
        return
    loaded = f"{name}__parent"
    bank.add(replace(known.adapter, name=loaded))
    try:
        yield loaded
    finally:
        bank.remove(loaded)
