"""The verb fit."""

import argparse
from dataclasses import replace
from pathlib import Path

from lora_domains.analysis.reproduce import card_at, domain_of
from lora_domains.cli.flags import add_run_flags, configured
from lora_domains.cli.parser import EXIT, Verbs, add_verb
from lora_domains.cli.proposal import Reasons, proposed
from lora_domains.cli.recipes import fit_and_evaluate
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.report.card import CARD, Card


def add_fit(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "fit", fit,
        group="everyday",
        summary="train an adapter on the rows of a file, and evaluate it",
        usage="FILE [options]\n"
        "       lora-domains fit --from-card CARD [options]",
        description="Train an adapter on labelled rows or conversations and choose its epoch on "
        "validation rows. "
        "With --test, also evaluate it: base, adapter and baselines on the same test rows, then "
        "the gates; --evaluate does so on test rows that are split from the training rows. Without "
        "either, no test row is scored and validation rows are shown instead. "
        "Writes adapters/NAME: adapter_model.safetensors and adapter_config.json "
        "(PEFT's format), card.json, items.jsonl and README.md.\n\n"
        "Exit codes: 0 pass or not evaluated, 1 fail, 2 error, 3 inconclusive, 130 interrupted.",
        example="lora-domains fit --name triage --train train.csv --test test.csv \\\n"
        "      --text note --label priority --positive urgent",
    )  # fmt: skip
    add_run_flags(parser, recipe=False)


def fit(flags: argparse.Namespace) -> int:
    """Train an adapter on rows, or repeat the run of a card; evaluate it on given test rows."""
    if flags.from_card:
        flags.train = flags.train or flags.rows
        card = card_at(Path(flags.from_card))
        flags.init_from = flags.init_from or _parent_of(card, flags)
        domain = domain_of(card)
        if flags.name:
            domain = replace(domain, name=flags.name)
        return _fit(configured(domain, flags, repeated=True), flags, card)
    if bool(flags.train) == bool(flags.rows):
        raise UsageError(
            where="lora-domains fit",
            expected="training rows",
            found="both FILE and --train" if flags.train else "no FILE and no --train",
            hint="lora-domains fit train.csv --name spam --text text --label label",
        )
    flags.train = flags.train or flags.rows
    proposal = proposed(flags)
    return _fit(proposal.domain, flags, reasons=proposal.reasons)


def _fit(
    domain: Domain,
    flags: argparse.Namespace,
    card: Card | None = None,
    reasons: Reasons | None = None,
) -> int:
    # By default, test rows taken from the training rows are kept for the adapter that is chosen in
    # the end.
    if flags.evaluate is None:
        flags.evaluate = domain.data.test is not None
    verdict = fit_and_evaluate(domain, flags, card, reasons)
    return EXIT[verdict] if verdict else 0


def _parent_of(card: Card, flags: argparse.Namespace) -> Path | None:
    """The folder of the adapter from which the card's training continued; None without one."""
    record = card.adapter.parent
    if record is None:
        return None
    from lora_domains.adapters.parent import parent_folder

    given = Path(flags.from_card)
    beside = (given.parent if given.name == CARD else given).absolute().parent
    folder = parent_folder(record, beside) or parent_folder(record, Path(flags.out))
    if folder is None:
        raise UsageError(
            where=str(given),
            expected=f"its parent {record.name} (sha256 {record.sha256[:12]})",
            found=f"none in {beside} or {flags.out}, nor among the versions kept there",
            hint="Give it: --init-from ADAPTER",
        )
    return folder
