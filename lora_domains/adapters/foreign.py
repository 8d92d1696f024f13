"""Adapters that others trained: what an evaluation can say of one, and where it is saved.

Such an adapter is a folder of plain PEFT. It has no card, so neither its base nor its training rows
can be verified. The training rows of the domain, where it has some, are taken for those of the
adapter.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import (
    CONFIG,
    README,
    WEIGHTS,
    card_files,
    fingerprint,
    replacing,
    write_card,
)
from lora_domains.atomic import write_text
from lora_domains.data.prepare import Prepared
from lora_domains.distributed import environment
from lora_domains.domain import Domain, as_record
from lora_domains.errors import AdapterError, UsageError
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import template_of
from lora_domains.modeling.lora import Adapter
from lora_domains.report.card import CARD, AdapterEntry, BaseRecord, Card
from lora_domains.tasks import Task


def is_foreign(adapter: Adapter) -> bool:
    """Whether an adapter was trained elsewhere: it has no card, or one that only evaluates it."""
    return adapter.card is None or adapter.card.adapter.trained_elsewhere


def foreign_card(adapter: Adapter, base: Base, domain: Domain, prepared: Prepared) -> Card:
    """The card of an adapter without one, before its evaluation on ``domain``.

    Raises UsageError where the rows lack what the task needs, AdapterError for an adapter that was
    never saved, and for one whose head has another number of classes.
    """
    _check(adapter, domain, prepared)
    settings = as_record(domain)
    kept = ("task", "data", "gates", "show_text", "metric", "prevalence")
    entry = AdapterEntry(
        domain=domain.name,
        path=adapter.name,
        sha256=fingerprint(adapter.folder),
        trained_elsewhere=True,
        chat=template_of(base, domain.task).record() if domain.task.chat else {},
        settings={key: settings[key] for key in kept},
        data={split: prepared.digests[split] for split in ("train", "validation", "test")
              if getattr(prepared, split)},
        ledger=asdict(prepared.row_counts),
    )  # fmt: skip
    shown = environment(base.device, base.quantization, domain.training.seed)
    return Card(base=BaseRecord(**base.record()), environment=shown, adapter=entry)


def check_labels(adapter: Adapter, task: Task, found: Collection[str] = ()) -> None:
    """Raise UsageError where nothing says which class of a foreign head is which label.

    ``found`` are the labels of the rows.
    """
    head = adapter.head
    if adapter.card is not None or head is None:
        return
    if head.classes == 1:
        raise UsageError(
            where=adapter.name,
            expected="a head of two classes or more",
            found="one of a single number, whose scale its folder does not say",
            hint="Train it here: lora-domains fit --task number.",
        )
    if task.head and task.labels is None:
        raise UsageError(
            where=adapter.name,
            expected=f"the labels of its {head.classes} classes, in the order of its head",
            found="none: its folder does not name them",
            hint="Declare labels=(…) or give --labels, in the order in which it was trained."
            + (f" If that is the order of the alphabet: --labels {','.join(sorted(found))}"
               if len(found) == head.classes else ""),
        )  # fmt: skip


def save_evaluation(
    adapter: Adapter, out: Path, card: Card, readme: Callable[[Card], str],
    items: list[dict[str, Any]],
) -> Path:  # fmt: skip
    """Save the evaluation of a foreign adapter as ``out``/NAME; returns that folder.

    The folder is a whole adapter: a copy of PEFT's two files, card, README and items. The adapter's
    own folder is not touched, unless it is that very folder: then card and items are added to it,
    and nothing else in it changes. Raises AdapterError where another adapter has that name.
    """
    source, target = adapter.folder, out / adapter.name
    if target.resolve() == source.resolve():
        for name, text in card_files(card, readme, items).items():
            if name != README:  # its author may have written one
                write_text(target / name, text)
        return target
    if (target / CARD).exists() and not Card.read(target, measured=False).adapter.trained_elsewhere:
        raise AdapterError(
            where=str(target),
            expected=f"a free place for the evaluation of {source.name}",
            found="another adapter, which was trained here",
            hint="Load it under another name (--name), or choose another --out.",
        )
    with replacing(target, CARD) as fresh:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, fresh / name)
        write_card(fresh, card, readme, items)
    return target


def _check(adapter: Adapter, domain: Domain, prepared: Prepared) -> None:
    head, task = adapter.head, domain.task
    if (task.head_classes or 0) != (head.classes if head else 0):
        raise AdapterError(
            where=adapter.name,
            expected=f"a head of {task.head_classes} classes" if task.head else "no head",
            found=f"one of {head.classes}" if head else "none",
            hint="Declare the task for which it was trained: head=True and its labels, or neither.",
        )
    for needs, split, what in (
        (
            task.head,
            "train",
            "training rows: without a head, the base has nothing to compare with",
        ),
        (task.tuned, "validation", "validation rows, which choose the threshold"),
    ):
        if needs and not getattr(prepared, split):
            raise UsageError(
                where=adapter.name, expected=what, found="none", hint=f"Give them: --{split} FILE."
            )
