"""Verbs that load a base: fit, benchmark, export; and doctor. torch is imported late."""

import argparse
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

from lora_domains.analysis.regressions import comparison_with
from lora_domains.analysis.reproduce import card_at, domain_of
from lora_domains.cli.flags import (
    ADAPTERS,
    SETTINGS,
    add_adapter_argument,
    add_base_flags,
    add_report_flags,
    add_run_flags,
    add_suite_flags,
    configured,
    domain_name,
    reading,
)
from lora_domains.cli.parser import EXIT, add_verb
from lora_domains.cli.predict import add_predict
from lora_domains.cli.recipes import fit_and_evaluate, named_suite, open_model, suite_of
from lora_domains.console import Display
from lora_domains.data.readers import read
from lora_domains.data.source import FEWEST_READ, Data
from lora_domains.domain import Domain, load_domain
from lora_domains.errors import DataError, UsageError
from lora_domains.report import terminal
from lora_domains.report.card import CARD, Card
from lora_domains.tasks import KINDS, Classification, Task

LABELS = ("label", "labels")
"""Columns of labels whose cells are looked at where no --label is given."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
            "scikit-learn")  # fmt: skip


def add_commands(verbs: Any) -> None:
    """Add these verbs to the parser."""
    _add_fit(verbs)
    add_predict(verbs)
    _add_benchmark(verbs)
    _add_export(verbs)


# ── fit ─────────────────────────────────────────────────────────────────────────────────────────


def _add_fit(verbs: Any) -> None:
    parser = add_verb(
        verbs, "fit", fit,
        summary="train an adapter on labelled rows, and evaluate it on test rows",
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
    task, proposed = proposed_task(flags)
    name = domain_name(Path(flags.train)) if flags.name is None else flags.name
    domain = Domain(name, task, Data(flags.train))
    return _fit(configured(domain, flags), flags, proposed=proposed)


def proposed_task(flags: argparse.Namespace) -> tuple[Task, str]:
    """The task of the training rows, and why; "" where nothing was chosen.

    It is of the kind of --task, or of one whose first rows have such labels or such columns.
    """
    try:
        given = read(flags.train, "train", replace(reading(flags), most=FEWEST_READ))
    except DataError:  # which is raised again when the rows are read
        given = []
    columns = {name for row in given for name in row.values}
    kinds = [KINDS[flags.task]] if flags.task else _kinds_with(flags)
    named = [flags.label] if flags.label else [n for n in LABELS if n in columns]
    for label, kind in product(named, kinds):
        if (of_cells := kind.from_cells(given, label)) is not None:
            why = f"{kind.kind.replace('_', ' ')}, as {of_cells[1]}; --task names another"
            return of_cells[0], "" if flags.task else why
    if len(kinds) > 1 and (flags.text or flags.label or flags.head):
        return Classification(), ""
    only = kinds[0]() if len(kinds) == 1 and not flags.task else None
    if only is not None and (flags.text or flags.label or {*only.columns} <= columns):
        why = f"{only.kind.replace('_', ' ')}, which alone has these settings; --task names another"
        return only, why
    for kind in kinds if flags.task else KINDS.values():
        if (task := kind.from_columns(columns)) is not None:
            why = f"{task.kind.replace('_', ' ')}, by the columns of the rows; --task names another"
            return task, "" if flags.task or task == Classification() else why
    return (kinds[0]() if len(kinds) == 1 else Classification()), ""


def _kinds_with(flags: argparse.Namespace) -> list[type[Task]]:
    """The kinds to propose: all, or the only one with the settings in ``flags`` (--decimal)."""
    kinds = [*KINDS.values()]
    given = {name.removeprefix("task.") for flag, name in SETTINGS.items()
             if name.startswith("task.") and getattr(flags, flag)} - {"text", "label"}  # fmt: skip
    able = [kind for kind in kinds if given <= {field.name for field in fields(kind)}]
    return able if len(able) == 1 else kinds


def _fit(
    domain: Domain, flags: argparse.Namespace, card: Card | None = None, proposed: str = ""
) -> int:
    # By default, test rows taken from the training rows are kept for the adapter that is chosen in
    # the end.
    if flags.evaluate is None:
        flags.evaluate = domain.data.test is not None
    verdict = fit_and_evaluate(domain, flags, card, proposed)
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


# ── benchmark ───────────────────────────────────────────────────────────────────────────────────


def _add_benchmark(verbs: Any) -> None:
    parser = add_verb(
        verbs, "benchmark", benchmark,
        summary="measure what adapters gained and what they kept",
        usage="ADAPTER [ADAPTER ...] [options]",
        description="Score adapters and their base on general questions, and on the test rows of "
        "the recipes in --domains: each adapter on every domain. Writes a report (see "
        "lora-domains report) into --out, and keeps scores there, so that an interrupted run "
        "continues.\n\n"
        "Exit codes, of the worst adapter: 0 pass, 1 fail, 2 error, 3 inconclusive.",
        example="lora-domains benchmark adapters/* --domains recipes/medical.py",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter folders")
    add_base_flags(inputs)
    evaluation = parser.add_argument_group("evaluation")
    add = evaluation.add_argument
    add_suite_flags(evaluation, "--limit")
    add("--domains", nargs="*", default=[], metavar="RECIPE", help="also score their test rows")
    add("--seed", type=int, default=0, metavar="N", help="seed of that sample; default: 0")
    add_report_flags(parser, evaluation)


def benchmark(flags: argparse.Namespace) -> int:
    """Score adapters on general questions and on each other's domains."""
    compare_with_older = comparison_with(flags.against)
    from lora_domains import distributed

    named = named_suite(flags, flags.seed)
    model = open_model(flags, out=ADAPTERS, adapter=flags.adapters[0])
    for path in flags.adapters:
        model.load_adapter(path)
    domains = [load_domain(path) for path in flags.domains]
    suite = suite_of(flags, model.base, named, seed=flags.seed)
    measured = model.benchmark(suite, domains, flags.out, show_text=flags.show_text)
    compare_with_older(measured.report, measured.items.__getitem__)
    distributed.on_main(lambda: measured.save(flags.out, flags.junit))
    terminal.report(model.display.console, measured.report)
    model.display.line(f"The report: {Path(flags.out) / 'report.html'}")
    return EXIT[measured.verdict]


# ── export, doctor ──────────────────────────────────────────────────────────────────────────────


def _add_export(verbs: Any) -> None:
    parser = add_verb(
        verbs, "export", export,
        summary="merge an adapter into its base and save the model",
        usage="ADAPTER --out DIR [options]",
        description="Merge an adapter into its base. Writes a plain transformers model with its "
        "tokenizer into --out, and shows how far its logits are from those of the adapter.",
        example="lora-domains export triage --out merged/triage --dtype bfloat16",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, help=f"its folder, or its name in {ADAPTERS}/")
    add_base_flags(inputs, quantised=False)
    output = parser.add_argument_group("output")
    add = output.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the merged model (required)")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), metavar="DTYPE",
        help="dtype of the merged weights: float32 (default), bfloat16 or float16")  # fmt: skip


def export(flags: argparse.Namespace) -> int:
    """Merge an adapter into its base."""
    # On the CPU in float32, so that the reported error is that of the saved weights.
    model = open_model(flags, out=ADAPTERS, adapter=flags.adapter, device="cpu", dtype="float32")
    model.export(model.load_adapter(flags.adapter), flags.out, dtype=flags.dtype)
    return 0


def add_doctor(verbs: Any) -> None:
    add_verb(
        verbs, "doctor", doctor,
        summary="show installed packages and devices",
        usage="",
        description="Show the versions of the packages that matter, and the devices. Writes "
        "nothing.",
        example="lora-domains doctor",
    )  # fmt: skip


def doctor(_: argparse.Namespace) -> int:
    """Show the versions of packages, and the devices."""
    from importlib.metadata import PackageNotFoundError, version

    display = Display()
    for package in PACKAGES:
        try:
            display.line(f"{package:<14} {version(package)}")
        except PackageNotFoundError:
            display.line(f"{package:<14} missing: pip install {package}")
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            memory = torch.cuda.get_device_properties(index).total_memory / 2**30
            display.line(f"{'device':<14} {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")
    else:
        display.line(f"{'device':<14} CPU only, {torch.get_num_threads()} threads")
    return 0
