"""A domain's rows as training and evaluation use them: read, checked, split and tokenised once."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain

from lora_domains.adapters.parent import Parent
from lora_domains.console import Display
from lora_domains.data.checks import all_errors
from lora_domains.data.identity import normalised_once
from lora_domains.data.prepare import Prepared, RowCounts, prepare, with_test_rows
from lora_domains.data.source import SPLITS, Source, file_of
from lora_domains.domain import Domain, domain_from
from lora_domains.errors import (
    AnswerTooLong,
    DataError,
    DomainError,
    TrainingError,
    UsageError,
    did_you_mean,
)
from lora_domains.inference.likelihoods import start_of_text
from lora_domains.modeling.base import Base
from lora_domains.modeling.batching import (
    check_embedded,
    check_spelled,
    row_limit,
    tokenization_of,
    window_limit,
)
from lora_domains.modeling.heads import check_task
from lora_domains.probes.general_text import GeneralText
from lora_domains.probes.own_text import text_of
from lora_domains.report.card import Card
from lora_domains.tasks import Example
from lora_domains.tasks.answers import reasons
from lora_domains.tokenization.encoded import EncodedExample, EncodedRow
from lora_domains.tokenization.tokenization import Tokenization

LISTED = 40
"""The most rows that one error lists."""


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

    @property
    def chat(self) -> dict[str, str]:
        """The ``chat`` entry of a card; {} where no chat template renders the rows."""
        template = self.tokenization.template
        return template.record() if template is not None else {}

    def __repr__(self) -> str:
        counts = f"{len(self.train)} training, {len(self.validation)} validation"
        return f"<Dataset {self.domain.name}: {counts} and {len(self.test)} test rows>"

    def for_domain(self, domain: Domain) -> "Dataset | None":
        """The same rows with the gates and settings of ``domain``; None if it reads other rows."""
        own_task = self.domain.task
        task = domain.task.with_default_labels(own_task.labels).with_scale(own_task.scale)
        declared = self.prepared.declared[0]
        if declared.chat is None or declared.thinking is None:
            task = task.with_chat(bool(own_task.chat), bool(own_task.thinking))
        seed, length = domain.training.seed, domain.training.max_length
        own = self.domain.training
        if (task, domain.data, seed, length) != (
            own_task, self.domain.data, own.seed, own.max_length
        ):  # fmt: skip
            return None
        return replace(self, domain=replace(domain, task=task))


@normalised_once()
def load_dataset(
    domain: Domain, base: Base, display: Display, prepared: Prepared | None = None
) -> Dataset:
    """Read, check, split and tokenise the rows of ``domain`` for ``base``, and show each stage.

    ``prepared`` are its rows where they were read before the base was loaded.

    Raises DataError for rows that cannot be used, LeakError for test rows among training rows and
    DomainError where the task or ``max_length`` does not fit the base.
    """
    check_task(base, domain.task)
    if prepared is None or not prepared.made_from(domain.task, domain.data, domain.training.seed):
        prepared = prepare(domain.task, domain.data, domain.training.seed)
    for stage in prepared.stages:
        display.stage(stage.name, stage.rows_in, stage.rows_out, stage.what)
    learned = prepared.train or prepared.test
    thinking = prepared.task.thinking is None and 2 * sum(map(reasoned, learned)) > len(learned)
    domain = replace(domain, task=prepared.task.with_chat(base.chats, thinking))
    _check_floors(domain)
    tokenization = _tokenization(domain, base, prepared)
    encoded = {s: tokenization.encode_fitting(getattr(prepared, s)) for s in SPLITS}
    failed = [error for _, errors in encoded.values() for error in errors]
    errors = [error for error in failed if isinstance(error, AnswerTooLong)]
    if refused := [error for error in failed if not isinstance(error, AnswerTooLong)]:
        raise all_errors(refused)
    if errors:
        _drop_long(errors, domain, display)
        prepared = prepared.only({row.example.id for rows, _ in encoded.values() for row in rows})
    train, validation, test = (encoded[split][0] for split in SPLITS)
    if domain.task.beta is not None:
        _check_pairs([*train, *validation, *test])
    for rows in (train, validation, test):
        check_spelled(base, (row.example for row in rows))
        check_embedded(base, ((row.example.place, row.encoded) for row in rows))
    if domain.data.train is not None:
        supervised = [row.encoded for row in train]
        counts = with_token_counts(prepared.row_counts, supervised, len(errors))
        prepared = replace(prepared, row_counts=counts)
    splits = {n: len(getattr(prepared, n)) for n in ("train", "validation", "test")}
    display.row_counts(asdict(prepared.row_counts), splits)
    for split, rows in (("training", train), ("validation", validation), ("test", test)):
        if truncated := sum(row.encoded.truncated for row in rows):
            display.warn(
                f"{truncated} of {len(rows)} {split} rows are longer than "
                f"{tokenization.max_length} tokens; the middle of their prompt is left out."
            )
    read = chain(prepared.train, prepared.validation, prepared.test)
    for warning in (*prepared.warnings, *_chat_warnings(tokenization, read)):
        display.warn(warning)
    general = text_of(base, domain.data.general, display)
    if domain.data.general is not None and base.language_head:
        given = {**prepared.given, "general text": general.digest[:16]}
        prepared = replace(prepared, given=given)
        general = _without_test_rows(general, prepared.test, display)
    digests = {**prepared.digests, "general": general.digest}
    prepared = replace(prepared, digests=digests)
    return Dataset(domain, prepared, tokenization, train, validation, test, general)


def declared_domain(
    domain: Domain | str, known: Dataset | None, card: Card | None, test: Source | None
) -> Domain:
    """The domain that is asked for, with the rows ``test`` in place of its test rows.

    One that goes by its name is that of the rows ``known``, or of the adapter with the ``card``.
    Raises UsageError where neither says what it is.
    """
    if isinstance(domain, str):
        if known is not None:
            domain = known.domain
        elif card is not None:
            settings = card.adapter.settings | card.adapter.trained_with
            domain = domain_from(domain, settings, f"the card of {domain}", {"test": test})
        else:
            raise UsageError(
                expected="a domain fitted in this process, or a Domain",
                found=repr(domain),
                hint="Pass the Domain itself: evaluate(load_domain('recipes/medical.py')).",
            )
    if test is None:
        return domain
    prepared = known.prepared if known is not None and known.for_domain(domain) else None
    seed = domain.training.seed
    task, data = with_test_rows(domain.task, domain.data, seed, test, prepared)
    return replace(domain, task=task, data=data)


def _check_floors(domain: Domain) -> None:
    """Raise DomainError for floors of labels that the task, whose labels are known, lacks."""
    labels = domain.task.labels or ()
    for label in domain.gates.floors or ():
        if label not in labels:
            raise DomainError(
                where=f"domain {domain.name!r}, setting 'floors'",
                expected="labels of the rows" if labels else "a task with labels",
                found=repr(label),
                hint=did_you_mean(label, labels),
            )


def _tokenization(domain: Domain, base: Base, prepared: Prepared) -> Tokenization:
    """The tokenisation of the domain's rows; raises DataError for labels it cannot tell apart."""
    task, length = domain.task, domain.training.max_length
    tokenization = tokenization_of(
        base, task, row_limit(base, length), window_limit(base, length), start_of_text(base)
    )
    if tokenization.template is not None:  # the base's, which rendered other rows before
        tokenization.template.adapted = 0
    if task.scored_by == "choices" and task.has_labels and not task.head:
        first = (prepared.train or prepared.test)[0]
        where = f"{file_of(first.place)}, column {task.answer_column!r}"
        check_choices(tokenization, task.label_texts, where)
    return tokenization


def _chat_warnings(tokenization: Tokenization, rows: Iterable[Example]) -> list[str]:
    """Warnings about the chat template that renders the rows."""
    template, warnings = tokenization.template, []
    if template is not None and not template.own:
        warnings.append("the base has no chat template: a plain one renders the turns.")
    if template is not None and template.adapted:
        warnings.append(
            f"{template.adapted} conversations were changed, because the chat template does not "
            "take them as they are: the system's text is put before the user's, turns of one role "
            "are joined, an opening turn of the assistant is left out, or calls of functions and "
            "tools are written as JSON in the text."
        )
    left_out = 0
    if template is not None and template.thinking is False:
        left_out = sum(map(reasoned, rows))
    if left_out:
        warnings.append(
            f"reasoning is left out (rows: {left_out}), since answers are asked for without it. "
            "With --set task.thinking=true it is learned, and base and adapter may think first."
        )
    return warnings


def reasoned(row: Example) -> bool:
    """Whether the answer to learn has reasoning before it."""
    last = row.messages[-1] if row.messages else {}
    return "reasoning_content" in last or any(
        reasons(text.strip()) for text in (row.answer, *row.choices[:1])
    )


def _check_pairs(rows: Sequence[EncodedRow]) -> None:
    """Raise DataError for answers that differ in what is left out only."""
    same = [row.example.place for row in rows if len({*row.encoded.choices}) < 2]
    if same:
        raise DataError(
            where=f"{len(same)} rows, the first: {same[0]}",
            expected="a chosen and a rejected answer that differ beside their reasoning",
            found="the same answer",
            hint="Delete the rows, or learn the reasoning too: --set task.thinking=true.",
        )


def _drop_long(errors: Sequence[AnswerTooLong], domain: Domain, display: Display) -> None:
    """Raise one DataError for all rows whose answer does not fit, unless they are to be dropped."""
    column = domain.task.answer_column
    if not domain.data.drop_long:
        raise all_too_long(errors, column)
    files: dict[str, int] = {}
    for error in errors:
        file = error.where.rsplit(", ", 1)[0]
        files[file] = files.get(file, 0) + 1
    where = ", ".join(f"{n} of {file}" for file, n in files.items())
    display.warn(f"rows dropped because their answer does not fit: {where}.")


def _without_test_rows(
    general: GeneralText, test: Sequence[Example], display: Display
) -> GeneralText:
    """The domain's own general text without what contains a test row."""
    kept = general.without_texts_containing(test)
    if left_out := len(general) - len(kept):
        display.warn(f"{left_out} general texts contain a test row and are left out.")
    return kept


def with_token_counts(
    counts: RowCounts, encoded: Sequence[EncodedExample], too_long: int = 0
) -> RowCounts:
    """``counts`` with what tokenisation found in the training rows, and the rows it dropped.

    Raises TrainingError when no token is supervised, because training would teach nothing.
    """
    tokens = sum(one.supervised for one in encoded)
    if tokens == 0:
        raise TrainingError(
            where="tokenisation",
            expected="at least one supervised token",
            found=f"none in {len(encoded)} rows",
            hint="Check that the answer column holds text.",
        )
    return replace(
        counts,
        truncated=sum(one.truncated for one in encoded),
        masked=sum(not one.supervised for one in encoded),
        supervised_tokens=tokens,
        too_long=too_long,
    )


# ── Rows and labels that cannot be encoded ──────────────────────────────────────────────────────


def all_too_long(errors: Sequence[AnswerTooLong], column: str | None) -> AnswerTooLong:
    """One error for all rows whose answer, in ``column``, does not fit."""
    first = errors[0]
    at = f", column {column!r}" if column else ""
    if len(errors) == 1:
        where, found = f"{first.where}{at}", first.found
    else:
        where = f"{len(errors)} rows{at}"
        found = "; ".join(f"{error.where}: {error.found}" for error in errors[:LISTED])
        found += f"; and {len(errors) - LISTED} more" if len(errors) > LISTED else ""
    return AnswerTooLong(where=where, expected=first.expected, found=found, hint=first.hint)


def check_choices(tokenization: Tokenization, choices: Sequence[str], where: str) -> None:
    """Raise DataError when a label has no tokens, or two labels have the same."""
    known: dict[tuple[int, ...], str] = {}
    for choice in choices:
        tokens, name = tokenization.answer_tokens(choice), choice.strip()
        if not tokens:
            raise DataError(
                where=where,
                expected="labels with text",
                found=f"label {name!r}, which has no token",
                hint="Give it a wording: Classification(…, wording={…}).",
            )
        if tokens in known:
            raise DataError(
                where=where,
                expected="labels whose tokens differ",
                found=f"{known[tokens]!r} and {name!r}, which are the same tokens",
                hint="Reword one of them in the data, or in the recipe: "
                f"Classification(…, wording={{{name!r}: 'another text'}}).",
            )
        known[tokens] = name
