"""Several domains at once: recipes that are trained together, and evaluated one by one."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from lora_domains.cli.flags import add_run_flags, configured
from lora_domains.cli.parser import EXIT, Parser, guarded, wrapped
from lora_domains.cli.recipes import (
    judged,
    named_suite,
    open_model,
    quantization,
    show_validation,
    suite_of,
    with_base,
)
from lora_domains.data.prepare import prepare
from lora_domains.domain import Domain, load_domain
from lora_domains.errors import UsageError, listed
from lora_domains.probes.general_text import general_text

OF_ONE = ("name", "train", "validation", "test", "text", "label", "task", "from_card")
"""Flags that describe the rows of a single domain."""
WORST = ("fail", "inconclusive", "pass")


def add_together_flag(parser: argparse.ArgumentParser) -> None:
    """The flag of several domains."""
    parser.add_argument_group("several recipes").add_argument(
        "--together", type=int, metavar="N", help="train so many in one pass, 1 for one after "
        "another; default: what the tokens of their steps favour")  # fmt: skip


def run_recipes(
    domains: Sequence[Domain], arguments: Sequence[str] | None = None, *, base: str | None = None
) -> None:
    """Train several domains together and evaluate each, with the flags of the command line.

    The last line of a recipe of several, which changes the settings of all. Exits 0 once training
    and evaluation are finished, 2 on an error.
    """
    doc = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
    parser = Parser(usage="%(prog)s [options]", description=wrapped(doc))
    add_run_flags(parser)
    add_together_flag(parser)
    parser.set_defaults(base=base)

    def run() -> int:
        flags = parser.read(arguments)
        _check_flags(flags)
        fit_and_evaluate_all([configured(domain, flags) for domain in domains], flags)
        return 0

    code = guarded(run)
    if code:
        sys.exit(code)


def fit_recipes(paths: Sequence[str], flags: argparse.Namespace) -> int:
    """Train the domains of the recipes ``paths`` together and evaluate each; the exit code."""
    others = [path for path in paths if not path.endswith(".py")]
    if others:
        raise UsageError(
            where="lora-domains fit",
            expected="recipes only, files ending in .py, where there is one",
            found=others[0],
            hint="Fit the rows of a file by themselves, or write a recipe for them: "
            f"lora-domains init {others[0]}",
        )
    _check_flags(flags)
    domains = [configured(load_domain(path), flags) for path in paths]
    verdicts = fit_and_evaluate_all(domains, flags)
    return next((EXIT[verdict] for verdict in WORST if verdict in verdicts), 0)


def _check_flags(flags: argparse.Namespace) -> None:
    """Raise UsageError for flags that describe the rows of one domain."""
    given = ["--" + name.replace("_", "-") for name in OF_ONE if getattr(flags, name, None)]
    if given:
        raise UsageError(
            where=given[0],
            expected="flags for all recipes, such as --epochs, --base and --out",
            found=listed(given),
            hint="Change it in the recipe that it concerns, or run that recipe by itself.",
        )
    if flags.together is not None and flags.together < 1:
        raise UsageError(
            where="--together",
            expected="at least 1",
            found=str(flags.together),
            hint="Leave it out: how many share a pass is then chosen.",
        )


def fit_and_evaluate_all(domains: Sequence[Domain], flags: argparse.Namespace) -> list[str]:
    """Train ``domains`` together, and evaluate each that has test rows; the verdicts.

    With --no-evaluate validation rows are shown instead.
    """
    from lora_domains.inference.memory import base_in_words

    quantization(flags)
    named = named_suite(flags)
    domains, why = _with_base(domains, flags)
    # Before the base is loaded, which takes a while; a wrong file or judge is found at once.
    for domain in domains:
        if not flags.dry_run:
            domain.check_judge()
        if domain.data.general is not None:
            general_text(domain.data.general)
    prepared = [prepare(one.task, one.data, one.training.seed) for one in domains]
    model = open_model(flags, title=", ".join(domain.name for domain in domains))
    model.display.stage("base loaded", None, None, f"{base_in_words(model.base)}, frozen")
    if why:
        model.display.stage("base", None, None, why)
    evaluated = flags.evaluate is not False
    suite = suite_of(flags, model.base, named) if evaluated else None
    model.fit(
        domains, resume=flags.resume, dry_run=flags.dry_run, init_from=flags.init_from,
        tracker=flags.tracker, prepared=prepared, no_evaluate=not evaluated, suite=suite,
        together=flags.together,
    )  # fmt: skip
    if flags.dry_run:
        return []
    verdicts = []
    for domain in domains:
        model.display.title(domain.name)
        if evaluated and (flags.evaluate or domain.data.test is not None):
            verdicts.append(judged(model, domain, suite))
        else:
            show_validation(model, domain)
    return verdicts


def _with_base(domains: Sequence[Domain], flags: argparse.Namespace) -> tuple[list[Domain], str]:
    """The domains on one base, found for all of them by ``recipes.with_base``."""
    # What has no head needs an instruct model, on which all others work too.
    first = next((one for one in domains if one.task.with_head() is None), domains[0])
    found, why = with_base(first, flags)
    if not (found.task.head and not first.task.head):
        return list(domains), why
    headed = [(one, one.task.with_head()) for one in domains]
    return [replace(one, task=task) for one, task in headed if task is not None], why
