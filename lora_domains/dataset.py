"""A domain's rows made ready for one base: read, checked, split and encoded, shown as it goes."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from lora_domains.adapters.versions import Parent
from lora_domains.console import Display
from lora_domains.data.leaks import held, identity
from lora_domains.data.prepare import Prepared, digest_of, prepare
from lora_domains.data.readers import Source, read
from lora_domains.data.tokenization import EncodedRow, Tokenization, check_choices, supervised
from lora_domains.domain import Domain
from lora_domains.errors import DataError, DomainError
from lora_domains.modeling.base import Base
from lora_domains.modeling.heads import check_task
from lora_domains.probes.suite import embedded
from lora_domains.tasks import Example, LanguageModelling, Task

LONGEST = 2048
"""Tokens of a row at most, unless a domain's ``max_length`` says otherwise."""


FEWEST = 20
"""General texts at least: some to train by, some to choose a checkpoint by."""
POOL = 480
"""General texts that a run is held to, at most. Each comes again and again, and the base is asked
once; benchmarks/training/retention.py says what it keeps by them."""
SELECTION = 200
"""General texts that a checkpoint is chosen by, at most; a fifth of them at most."""


@dataclass(frozen=True)
class General:
    """General texts: those an adapter is held to, and apart from them those it is watched on."""

    training: Sequence[Example] = ()
    selection: Sequence[Example] = ()

    @property
    def used(self) -> list[Example]:
        """Those that a run may read."""
        return [*self.training[:POOL], *self.selection]


@dataclass(frozen=True)
class Dataset:
    """A domain whose labels are known, and its rows, each tokenised once for one base."""

    domain: Domain
    prepared: Prepared
    tokenization: Tokenization
    train: list[EncodedRow]
    validation: list[EncodedRow]
    test: list[EncodedRow]
    general: General = General()
    parent: Parent | None = None

    def for_domain(self, domain: Domain) -> "Dataset | None":
        """The same rows with the gates and settings of ``domain``; None if it reads other rows."""
        task = domain.task.with_default_labels(self.domain.task.labels)
        seed, length = domain.training.seed, domain.training.max_length
        own = self.domain.training
        if (task, domain.data, seed, length) != (
            self.domain.task, self.domain.data, own.seed, own.max_length
        ):  # fmt: skip
            return None
        return replace(self, domain=replace(domain, task=task))


def row_limit(base: Base, asked: int | None) -> int:
    """Tokens of a row at most; raises DomainError for more than the base can read."""
    if asked is not None and asked > base.context:
        raise DomainError(
            where="setting 'max_length'",
            expected=f"at most the {base.context} tokens of context that {base.id} has",
            found=str(asked),
            hint="Set a smaller one, or leave it out.",
        )
    return asked or min(base.context, LONGEST)


def load_dataset(domain: Domain, base: Base, display: Display) -> Dataset:
    """Stage by stage; raises DataError or LeakError where rows cannot be taken as they are."""
    check_task(base, domain.task)
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    for stage in prepared.stages:
        display.stage(stage.name, stage.rows_in, stage.rows_out, stage.what)
    limit = row_limit(base, domain.training.max_length)
    task = prepared.task
    tokenization = Tokenization(base.tokenizer, limit, head=task.head, framed=base.bidirectional)
    domain = replace(domain, task=task)
    if task.has_labels and not task.head:
        first = (prepared.train or prepared.test)[0]
        where = f"{first.place.rsplit(', ', 1)[0]}, column {task.answer_column!r}"
        check_choices(tokenization, task.label_texts, where)
    train, validation, test = (
        _encoded(tokenization, rows, task)
        for rows in (prepared.train, prepared.validation, prepared.test)
    )
    ledger = supervised(prepared.ledger, [row.encoded for row in train])
    prepared = replace(prepared, ledger=ledger)
    splits = {n: len(getattr(prepared, n)) for n in ("train", "validation", "test")}
    display.ledger(asdict(ledger), splits)
    if ledger.truncated:
        display.warn(
            f"{ledger.truncated} of {len(train)} training rows were longer than {limit} tokens "
            "and lost tokens from the middle of their prompt."
        )
    for split, rows in (("validation", validation), ("test", test)):
        if cut := sum(row.encoded.truncated for row in rows):
            display.warn(
                f"{cut} of {len(rows)} {split} rows are longer than {limit} tokens, and are read "
                "without the middle of their prompt."
            )
    for warning in prepared.warnings:
        display.warn(warning)
    # A base without a language head has nothing to say of a text.
    general = General()
    if base.language_head:
        general = general_texts(domain.data.general)
        if domain.data.general is not None:
            general = _without_tests(general, prepared.test, display)
    digests = {**prepared.digests, "general": digest_of(general.used)}
    prepared = replace(prepared, digests=digests)
    return Dataset(domain, prepared, tokenization, train, validation, test, general)


def _encoded(
    tokenization: Tokenization, examples: Sequence[Example], task: Task
) -> list[EncodedRow]:
    """The encoded rows; a DataError names the column of the answer that is too long."""
    try:
        return tokenization.encode_rows(examples)
    except DataError as error:
        column = task.answer_column
        where = f"{error.where}, column {column!r}" if column else error.where
        raise DataError(
            where=where, expected=error.expected, found=error.found, hint=error.hint
        ) from None


def _without_tests(general: General, test: Sequence[Example], display: Display) -> General:
    """One's own general text without what holds a test row; how many do is said."""
    holding = {text for text, _ in held([*general.training, *general.selection], test)}
    if holding:
        display.warn(f"{len(holding)} general texts hold a test row, and are left out.")
    return General(
        [text for text in general.training if text.id not in holding],
        [text for text in general.selection if text.id not in holding],
    )


def general_texts(source: Source | None) -> General:
    """The embedded world's, or those in the column ``text`` of ``source``, each text once.

    Training needs a few hundred only: those of ``source`` come in a random order, always the same,
    since a file may go from one subject to the next.
    Raises DataError for rows without that column, and for fewer than ``FEWEST`` texts.
    """
    if source is None:
        suite = embedded()
        return General(suite.training_texts(), suite.selection_texts())
    texts: dict[str, Example] = {}
    for row in read(source, "general"):
        example = LanguageModelling().example(row)
        texts.setdefault(identity(example), example)
    if len(texts) < FEWEST:
        raise DataError(
            where="general text",
            expected=f"at least {FEWEST} different texts in the column 'text'",
            found=str(len(texts)),
            hint="Add ordinary text, a line or a paragraph a row, or leave --general out.",
        )
    found = list(texts.values())
    found = [found[at] for at in np.random.default_rng(0).permutation(len(found))]
    every = max(5, len(found) // SELECTION)
    watched = set(range(0, len(found), every)[:SELECTION])
    selection = [text for at, text in enumerate(found) if at in watched]
    training = [text for at, text in enumerate(found) if at not in watched]
    holding = {text for text, _ in held(training, selection)}
    return General([text for text in training if text.id not in holding], selection)
