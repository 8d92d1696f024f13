"""The verb benchmark. torch is imported late."""

import argparse
from pathlib import Path

from lora_domains.analysis.regressions import comparison_with
from lora_domains.cli.flags import (
    ADAPTERS,
    add_base_flags,
    add_quiet_flag,
    add_report_flags,
    add_suite_flags,
)
from lora_domains.cli.parser import EXIT, Verbs, add_verb
from lora_domains.cli.recipes import named_suite, open_model, suite_of
from lora_domains.domain import load_domain
from lora_domains.report import terminal


def add_benchmark(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "benchmark", benchmark,
        group="more",
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
    add_quiet_flag(add_report_flags(parser, evaluation))


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
