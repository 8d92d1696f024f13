"""A domain's rows as training and evaluation use them: read, checked, split and tokenised once."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from lora_domains.adapters.parent import Parent
from lora_domains.console import Display
from lora_domains.data.general_text import GeneralText, general_text
from lora_domains.data.identity import digest_of, normalised_once
from lora_domains.data.prepare import Prepared, prepare
from lora_domains.data.readers import file_of
from lora_domains.data.tokenization import (
    EncodedRow,
    Tokenization,
    check_choices,
    with_token_counts,
)
from lora_domains.domain import Domain
from lora_domains.errors import DataError
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import check_embedded, row_limit
from lora_domains.modeling.heads import check_task
from lora_domains.tasks import Example, Task


@dataclass(frozen=True)
class Dataset:
    """A domain whose labels are known, and its rows, each tokenised once for one base."""

    domain: Domain
    prepared: Prepared
    tokenization: Tokenization
    train: list[EncodedRow]
    validation: list[EncodedRow]
    test: list[EncodedRow]
    general: GeneralText
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


@normalised_once()
def load_dataset(domain: Domain, base: Base, display: Display) -> Dataset:
    """Read, check, split and tokenise the rows of ``domain`` for ``base``, and show each stage.

    Raises DataError for rows that cannot be used, LeakError for test rows among training rows and
    DomainError where the task or ``max_length`` does not fit the base.
    """
    check_task(base, domain.task)
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    for stage in prepared.stages:
        display.stage(stage.name, stage.rows_in, stage.rows_out, stage.what)
    domain = replace(domain, task=prepared.task)
    tokenization = _tokenization(domain, base, prepared)
    train, validation, test = (
        _encoded(tokenization, examples, prepared.task)
        for examples in (prepared.train, prepared.validation, prepared.test)
    )
    for rows in (train, validation, test):
        check_embedded(base, (row.encoded for row in rows))
    prepared = replace(
        prepared, row_counts=with_token_counts(prepared.row_counts, [row.encoded for row in train])
    )
    splits = {n: len(getattr(prepared, n)) for n in ("train", "validation", "test")}
    display.row_counts(asdict(prepared.row_counts), splits)
    for split, rows in (("training", train), ("validation", validation), ("test", test)):
        if truncated := sum(row.encoded.truncated for row in rows):
            display.warn(
                f"{truncated} of {len(rows)} {split} rows are longer than "
                f"{tokenization.max_length} tokens; the middle of their prompt is left out."
            )
    for warning in prepared.warnings:
        display.warn(warning)
    # A base without a language head cannot score text.
    general = _general_text(domain, prepared.test, display) if base.language_head else GeneralText()
    digests = {**prepared.digests, "general": digest_of(general.used)}
    prepared = replace(prepared, digests=digests)
    return Dataset(domain, prepared, tokenization, train, validation, test, general)


def _tokenization(domain: Domain, base: Base, prepared: Prepared) -> Tokenization:
    """The tokenisation of the domain's rows; raises DataError for labels it cannot tell apart."""
    task, limit = domain.task, row_limit(base, domain.training.max_length)
    tokenization = Tokenization(
        base.tokenizer, limit, head=task.head, bidirectional=base.bidirectional
    )
    if task.has_labels and not task.head:
        first = (prepared.train or prepared.test)[0]
        where = f"{file_of(first.place)}, column {task.answer_column!r}"
        check_choices(tokenization, task.label_texts, where)
    return tokenization


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


def _general_text(domain: Domain, test: Sequence[Example], display: Display) -> GeneralText:
    """The domain's general text; of its own text, what contains a test row is left out."""
    general = general_text(domain.data.general)
    if domain.data.general is None:
        return general
    kept = general.without_texts_containing(test)
    if left_out := len(general) - len(kept):
        display.warn(f"{left_out} general texts contain a test row and are left out.")
    return kept
