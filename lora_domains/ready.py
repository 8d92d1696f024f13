"""A domain's rows made ready for one base: read, checked, split and encoded, shown as it goes."""

from dataclasses import asdict, dataclass, replace

from lora_domains.base import Base
from lora_domains.data import Prepared, prepare
from lora_domains.display import Display
from lora_domains.domain import Domain
from lora_domains.encoding import Encoder, Item, check_choices, supervised
from lora_domains.heads import check_task
from lora_domains.tasks import Classification
from lora_domains.versions import Parent

LONGEST = 2048
"""Tokens of a row at most, unless a domain's ``max_length`` says otherwise."""


@dataclass(frozen=True)
class Ready:
    """A domain whose labels are known, and its rows."""

    domain: Domain
    prepared: Prepared
    encoder: Encoder
    train: list[Item]
    validation: list[Item]
    parent: Parent | None = None


def read_domain(domain: Domain, base: Base, display: Display) -> Ready:
    """Stage by stage; raises DataError or LeakError where rows cannot be taken as they are."""
    check_task(base, domain.task)
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    for stage in prepared.stages:
        display.stage(stage.name, stage.rows_in, stage.rows_out, stage.what)
    limit = domain.training.max_length or min(base.context, LONGEST)
    head = getattr(prepared.task, "head", False)
    encoder = Encoder(base.tokenizer, limit, head=head, framed=base.encoder)
    domain = replace(domain, task=prepared.task)
    if isinstance(prepared.task, Classification) and not head:
        where = f"domain {domain.name!r}, column {prepared.task.label!r}"
        check_choices(encoder, prepared.task.choices, where)
    train = encoder.encode_all(prepared.train)
    validation = encoder.encode_all(prepared.validation)
    ledger = supervised(prepared.ledger, train)
    prepared = replace(prepared, ledger=ledger)
    splits = {n: len(getattr(prepared, n)) for n in ("train", "validation", "test")}
    display.ledger(asdict(ledger), splits)
    if ledger.truncated:
        display.warn(
            f"{ledger.truncated} of {len(train)} training rows were longer than {limit} tokens "
            "and lost tokens from the middle of their prompt."
        )
    for warning in prepared.warnings:
        display.warn(warning)
    return Ready(domain, prepared, encoder, train, validation)
