"""What a recipe runs: train an adapter, evaluate it, show both. ``fit`` runs the same parts.

A recipe exits 0 once training and evaluation are finished, whatever the verdict, since a launcher
reports other exit codes as a crash.
"""

import argparse
import ast
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lora_domains.adapters.folder import find_adapter
from lora_domains.analysis.compare import compare_seeds
from lora_domains.analysis.regressions import since_replaced
from lora_domains.analysis.reproduce import base_named_by, base_of, local_base, same_bytes
from lora_domains.cli.flags import add_run_flags, configured, given_settings
from lora_domains.cli.machine import with_base
from lora_domains.cli.parser import ADAPTERS, Parser, guarded, swept_values, wrapped
from lora_domains.console import Display, analyses
from lora_domains.data.prepare import prepare
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.joint.grid import check_variants, of_seeds
from lora_domains.probes.general_text import general_text
from lora_domains.report import terminal
from lora_domains.report.card import Card, read_items
from lora_domains.report.conclusion import replaced
from lora_domains.verdict.scores import ScoreTable
from lora_domains.verdict.summary import every_metric

if TYPE_CHECKING:
    from lora_domains.model import DomainModel
    from lora_domains.probes.suite import Suite
    from lora_domains.report.report import Evaluation


RUN = ("run_recipe", "run_recipes", "lora_domains.run_recipe", "lora_domains.run_recipes")
"""What the last line of a recipe calls."""


def run_recipe(
    sources: Mapping[str, Domain], arguments: Sequence[str] | None = None, *,
    base: str | None = None,
) -> None:  # fmt: skip
    """Train and evaluate a recipe's domain with the flags of the command line.

    The last line of a recipe. ``sources`` are its variants by name, each with other rows; the first
    one is the default. ``base`` is the recipe's own, where --base names none. Exits 0 once training
    and evaluation are finished, 2 on an error.
    """
    doc = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
    example = f"example:\n  python {sys.argv[0]} --limit 200 --epochs 2 --out adapters"
    parser = Parser(usage="%(prog)s [options]", description=wrapped(doc), epilog=example)
    names = list(sources)
    parser.add_argument("--source", choices=names, default=names[0], help="which rows to use; "
                        "default: %(default)s")  # fmt: skip
    add_run_flags(parser)
    parser.set_defaults(base=base)

    def run() -> int:
        flags = parser.read(arguments)
        domain = configured(sources[flags.source], flags)
        fit_and_evaluate(domain, flags, evaluated=flags.evaluate is not False)
        return 0

    code = guarded(run)
    if code:
        sys.exit(code)


def own_base(paths: Sequence[str]) -> str | None:
    """The base that recipes name for themselves, ``run_recipe(…, base=…)``; None without one.

    Importing a recipe does not run that line, so it is read. Raises UsageError where recipes name
    different bases, or one that is not written out.
    """
    named: dict[str | None, str] = {}
    for path in paths:
        for call in ast.walk(ast.parse(Path(path).read_bytes())):
            if not isinstance(call, ast.Call) or ast.unparse(call.func) not in RUN:
                continue
            given = [option.value for option in call.keywords if option.arg == "base"]
            try:
                named[ast.literal_eval(given[0]) if given else None] = path
            except ValueError:
                raise UsageError(
                    where=path,
                    expected="a base that is written out in run_recipe(…, base=…)",
                    found=ast.unparse(given[0]),
                    hint="Name it on the command line: --base PATH_OR_ID",
                ) from None
    if len(named) > 1:
        bases = ", ".join(f"{base or 'none'} in {path}" for base, path in named.items())
        raise UsageError(
            where="lora-domains fit",
            expected="recipes on one base",
            found=bases,
            hint="Name one for all of them: --base PATH_OR_ID",
        )
    return next(iter(named), None)


def fit_and_evaluate(
    domain: Domain,
    flags: argparse.Namespace,
    card: Card | None = None,
    reasons: Mapping[str, str] | None = None,
    *,
    evaluated: bool,
) -> str | None:
    """Train an adapter, evaluate it, and show both; returns the verdict.

    Unless it is ``evaluated``, validation rows are shown instead; then, and after a dry run, the
    result is None. Of several seeds it is the verdict of the first. ``card`` is that of the run to
    repeat; ``reasons`` say why what was proposed for the domain is as it is.
    """
    quantization(flags)  # refuses two at once, before anything slow
    variants = _variants(domain, flags, card)
    named = named_suite(flags)
    domain, why = with_base(domain, flags)
    # Before the base is loaded, which takes a while; a wrong file or judge is found at once.
    if not flags.dry_run:
        domain.check_judge()
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    if domain.data.general is not None:
        general_text(domain.data.general)
    if flags.init_from is not None:
        find_adapter(flags.init_from, Path(flags.out))
    from lora_domains.inference.memory import base_in_words

    model = open_model(flags, title=domain.name, card=card)
    display = model.display
    display.stage("base loaded", None, None, f"{base_in_words(model.base)}, frozen")
    for stage, reason in {"base": why, **(reasons or {})}.items():
        if reason:
            display.stage(stage, None, None, reason)
    # Read before training: what cannot be asked is found before hours are spent.
    suite = suite_of(flags, model, named, card) if evaluated else None
    trained: Any = model.fit(
        domain, resume=flags.resume, dry_run=flags.dry_run, init_from=flags.init_from,
        tracker=flags.tracker, prepared=prepared, no_evaluate=not evaluated, suite=suite,
        together=flags.together, **variants,
    )  # fmt: skip
    if not trained:
        return None
    if card is not None:
        same, message = same_bytes(card, trained)
        (display.line if same else display.warn)(message)
    verdict = judged(model, domain, suite) if evaluated else None
    if not evaluated:
        show_validation(model, domain, stored="seeds" in variants)
    if "seeds" in variants:
        others = of_seeds(domain, flags.seeds)[1:]
        _show_seeds(model, domain, others, suite if flags.evaluate else None)
        if evaluated and not flags.evaluate:
            display.line(
                "The adapters of the other seeds scored no test row: each would take one of the "
                f"evaluations of these rows (lora-domains evaluate {others[0].name})."
            )
    return verdict


def _variants(domain: Domain, flags: argparse.Namespace, card: Card | None) -> dict[str, Any]:
    """What several trainings of ``domain`` differ in, as ``DomainModel.fit`` takes it.

    Raises UsageError or DomainError for what cannot be trained so.
    """
    found: dict[str, Any] = {}
    if flags.seeds is not None:
        found["seeds"] = flags.seeds
    if flags.sweep is not None:
        found["sweep"] = swept_values(domain, flags.sweep)
    if found and card is not None:
        raise UsageError(
            where="--from-card",
            expected="one training, which is repeated",
            found=f"--{' and --'.join(found)} as well",
            hint="Give the rows and settings by their flags, or a recipe.",
        )
    given = given_settings(domain, domain.data, flags) if found else {}
    check_variants(
        [domain], found.get("seeds"), found.get("sweep"),
        continued=flags.init_from is not None, together=flags.together, **given,
    )  # fmt: skip
    return found


def _show_seeds(
    model: "DomainModel", domain: Domain, others: Sequence[Domain], suite: "Suite | None"
) -> None:
    """Say what to do with the adapters of other seeds; with a ``suite`` they are evaluated, too."""
    display, names = model.display, [one.name for one in others]
    for other in others if suite is not None else ():
        display.title(other.name)
        judged(model, other, suite)
    if suite is not None:
        found = compare_seeds([model.out / name for name in (domain.name, *names)], "test")[1]
        analyses.seeds(display.console, found)
    display.line(
        f"{domain.name} has the first seed, whatever the figures. To compare them again: "
        f"lora-domains compare --seeds {' '.join([domain.name, *names])}"
    )


def load_finished(model: "DomainModel", domains: Sequence[Domain]) -> list[Domain]:
    """Those of ``domains`` whose training is over where that of others failed, with the adapters
    loaded."""
    from lora_domains import distributed
    from lora_domains.joint.fit import over

    finished = []
    for domain in domains:
        dataset = model.dataset(domain.name)
        if distributed.on_main(partial(over, model.out, dataset, model.base)):
            model.load_adapter(model.out / domain.name)
            finished.append(domain)
    return finished


def judged(model: "DomainModel", domain: Domain, suite: "Suite | None") -> str:
    """Evaluate the adapter of a domain that was just fitted, and show it; the verdict."""
    display = model.display
    evaluation = model.evaluate(domain, suite=suite)
    folder = model.out / domain.name
    rows = next(iter(evaluation.entry.domain_scores.values()))["n"]
    display.stage("evaluated", rows, rows, "base, adapter and baselines on the same test rows")
    show_evaluation(model, evaluation)
    size = sum(path.stat().st_size for path in folder.glob("adapter_*"))
    display.line(
        f"Adapter: {folder} ({size / 1e6:.1f} MB, sha256 {str(evaluation.entry.sha256)[:12]}); "
        "its card.json holds all of this."
    )
    return evaluation.verdict


def show_evaluation(model: "DomainModel", evaluation: "Evaluation") -> None:
    """Show an evaluation, and whether the adapter is worse than the version that it replaced."""
    display, entry = model.display, evaluation.entry
    since = None
    if not display.quiet:
        since = since_replaced(evaluation.card, model.out / entry.domain)
    evaluation.show(display.console, since)
    if since is not None:
        display.line(replaced(entry, since))


def named_suite(flags: argparse.Namespace, seed: int = 0) -> "Suite | None":
    """The general questions that ``flags`` name; None where the base decides (``suite_of``)."""
    from lora_domains.probes.suite import load_suite

    return None if flags.suite == "auto" else load_suite(flags.suite, flags.questions, seed)


def suite_of(
    flags: argparse.Namespace, model: "DomainModel", named: "Suite | None",
    card: Card | None = None, seed: int = 0,
) -> "Suite":  # fmt: skip
    """``named``, or by default the general questions of ``card`` or the base; read, if asked."""
    from lora_domains.probes import suite as suites

    base, suite = model.base, named
    if suite is None:
        before = card.adapter.judged.get("suite") if card is not None else None
        suite = suites.default_suite(base, before)
        if flags.questions is not None:
            parts = tuple(replace(part, limit=None) for part in suite.parts)
            suite = replace(suite, limit=flags.questions, seed=seed, parts=parts)
    if not base.bidirectional:
        suite.questions()
    elif named is not None or flags.questions is not None:
        model.display.warn(
            "an encoder answers no general questions, so that none of --suite is asked: linear "
            "probes of its features measure what it keeps"
        )
    return suite


def show_validation(model: "DomainModel", domain: Domain, *, stored: bool = False) -> None:
    """Show base, adapter and baselines on the validation rows of a domain that was just fitted.

    ``stored`` says that they were scored, and the scores stored with the adapter.
    """
    from lora_domains.evaluation.verdict_run import validation_scores

    dataset, task = model.dataset(domain), model.dataset(domain).domain.task
    if stored:
        items = ScoreTable(read_items(model.out / domain.name)).where("set", "validation")
        scores = every_metric(items, task.labels or (), task.positive_index)
    else:
        scores = validation_scores(model.bank, dataset, model.out, model.display)
    terminal.validation(model.display.console, scores, len(dataset.validation))
    card = model.bank[domain.name].card
    if card is not None and not model.display.quiet:
        since = since_replaced(card, model.out / domain.name, validation=True)
        if since is not None:
            model.display.line(f"On validation rows, {replaced(card.adapter, since)}")
    model.display.line(
        f"No test row was scored, so {domain.name} has no verdict. Choose on validation rows, then "
        f"evaluate the adapter that you chose: {_evaluation_of(domain.name, model)}"
    )


def _evaluation_of(name: str, model: "DomainModel") -> str:
    """The command that evaluates an adapter, with a base to which its card does not lead."""
    base, folder = model.base, model.out / name
    words = [name if model.out == Path(ADAPTERS) else str(folder)]
    named = base.id == "embedded" or base.revision or local_base(base.id, base.identity)
    words += [] if named else ["--base", base.checkpoint.source]
    return shlex.join(["lora-domains", "evaluate", *words])


def open_model(
    flags: argparse.Namespace, *, out: str | None = None, display: Display | None = None,
    title: str = "", card: Card | None = None, adapter: str | Path | None = None, **options: Any,
) -> "DomainModel":  # fmt: skip
    """A DomainModel on the base in ``flags``, or on that of ``card`` or ``adapter``; torch is
    imported here.

    ``out`` is the folder of the adapters, by default that of ``flags``; ``title`` is shown first.
    ``options`` are others of ``DomainModel.from_pretrained``.
    """
    from lora_domains import distributed
    from lora_domains.inference.cache import remember_folder
    from lora_domains.inference.memory import reuse_pass_limit
    from lora_domains.model import DomainModel

    # The plan is what a dry run is for.
    brief = getattr(flags, "quiet", False) and not getattr(flags, "dry_run", False)
    display = display or Display(quiet=not distributed.is_main(), brief=brief)
    # Rounding depends on the number of threads: a repeated run gets that of the first.
    threads = card.environment.get("threads") if card is not None else None
    distributed.use_cores(None if threads is None else int(threads))
    if title:
        display.title(title)
    options |= {"path_or_id": flags.base, "quantization": quantization(flags)}
    if getattr(flags, "shard_base", False):
        options["sharded"] = True
    if getattr(flags, "device_map", None) is not None:
        options["device_map"] = flags.device_map
    if getattr(flags, "revision", None):
        options["revision"] = flags.revision
    if card is not None:
        options |= _base_of(card, flags)
    elif adapter is not None and not flags.base:
        folder = find_adapter(adapter, Path(out or flags.out))
        options["path_or_id"], options["revision"] = base_named_by(folder)
    model = DomainModel.from_pretrained(**options, out=out or flags.out, display=display)
    if distributed.is_main():
        remember_folder(model.base)
    if card is not None and (limit := card.adapter.training.get("pass_bytes")) is not None:
        reuse_pass_limit(model.base.model, limit, display.warn)
    return model


def quantization(flags: argparse.Namespace) -> Literal["8bit", "4bit"] | None:
    """The quantisation in ``flags``; raises UsageError for both flags."""
    if flags.load_in_8bit and flags.load_in_4bit:
        raise UsageError(
            expected="one of --load-in-8bit and --load-in-4bit",
            found="both",
            hint="Omit one.",
        )
    return "8bit" if flags.load_in_8bit else "4bit" if flags.load_in_4bit else None


def _base_of(card: Card, flags: argparse.Namespace) -> dict[str, Any]:
    """The base of ``card``, loaded as it was then, unless ``flags`` name another."""
    path, revision = (flags.base, None) if flags.base else base_of(card)
    return {
        "path_or_id": path,
        "revision": revision,
        "quantization": quantization(flags) or card.base.quantization,
        "dtype": card.base.dtype,
    }
