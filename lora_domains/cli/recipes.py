"""What a recipe runs: train an adapter, evaluate it, show both. ``fit`` runs the same parts.

A recipe exits 0 once training and evaluation are finished, whatever the verdict, since a launcher
reports other exit codes as a crash.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lora_domains.analysis.regressions import since_replaced
from lora_domains.analysis.reproduce import base_of, same_bytes
from lora_domains.cli.flags import add_run_flags, configured
from lora_domains.cli.parser import Parser, guarded, wrapped
from lora_domains.console import Display
from lora_domains.data.prepare import prepare
from lora_domains.domain import Domain
from lora_domains.errors import UsageError
from lora_domains.probes.general_text import general_text
from lora_domains.report import terminal
from lora_domains.report.card import Card

if TYPE_CHECKING:
    from lora_domains.model import DomainModel


def run_recipe(sources: Mapping[str, Domain], arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate a recipe's domain with the flags of the command line.

    The last line of a recipe. ``sources`` are its variants by name, each with other rows; the first
    one is the default. Exits 0 once training and evaluation are finished, 2 on an error.
    """
    doc = getattr(sys.modules.get("__main__"), "__doc__", None) or ""
    example = f"example:\n  python {sys.argv[0]} --limit 200 --epochs 2 --out adapters"
    parser = Parser(usage="%(prog)s [options]", description=wrapped(doc), epilog=example)
    names = list(sources)
    parser.add_argument("--source", choices=names, default=names[0], help="which rows to use; "
                        "default: %(default)s")  # fmt: skip
    add_run_flags(parser)

    def run() -> int:
        flags = parser.read(arguments)
        fit_and_evaluate(configured(sources[flags.source], flags), flags)
        return 0

    code = guarded(run)
    if code:
        sys.exit(code)


def fit_and_evaluate(
    domain: Domain, flags: argparse.Namespace, card: Card | None = None, proposed: str = ""
) -> str | None:
    """Train an adapter, evaluate it, and show both; returns the verdict.

    With ``no_evaluate`` in ``flags``, validation rows are shown instead; then, and after a dry run,
    the result is None. ``card`` is that of the run to repeat; ``proposed`` says why the task of the
    domain is what it is.
    """
    quantized = quantization(flags)
    # Before the base is loaded, which takes a while; a wrong file or judge is found at once.
    if not flags.dry_run:
        domain.check_judge()
    prepared = prepare(domain.task, domain.data, domain.training.seed)
    if domain.data.general is not None:
        general_text(domain.data.general)
    model = open_model(flags, title=domain.name, card=card)
    display, base = model.display, model.base
    parameters = sum(p.numel() for p in base.model.parameters())
    display.stage(
        "base loaded",
        None,
        None,
        f"{base.id}: {parameters / 1e6:.1f} M parameters, "
        f"{quantized or base.record()['dtype']}, "
        f"{base.resident_bytes() / 1e6:.1f} MB on {base.device}, frozen",
    )
    if proposed:
        display.stage("task", None, None, proposed)
    trained = model.fit(
        domain, resume=flags.resume, dry_run=flags.dry_run, init_from=flags.init_from,
        tracker=flags.tracker, prepared=prepared, no_evaluate=flags.no_evaluate,
    )  # fmt: skip
    if trained is None:
        return None
    if card is not None:
        same, message = same_bytes(card, trained)
        (display.line if same else display.warn)(message)
    if flags.no_evaluate:
        show_validation(model, domain)
        return None
    evaluation = model.evaluate(domain)
    rows = next(iter(evaluation.entry.domain_scores.values()))["n"]
    display.stage("evaluated", rows, rows, "base, adapter and baselines on the same test rows")
    folder = model.out / domain.name
    since = None if display.quiet else since_replaced(evaluation.card, folder)
    evaluation.show(display.console, since)
    size = sum(path.stat().st_size for path in folder.glob("adapter_*"))
    display.line(
        f"Adapter: {folder} ({size / 1e6:.1f} MB, sha256 {str(trained.adapter.sha256)[:12]}); "
        "its card.json holds all of this."
    )
    return evaluation.verdict


def show_validation(model: "DomainModel", domain: Domain) -> None:
    """Show base, adapter and baselines on the validation rows of a domain that was just fitted."""
    from lora_domains.evaluation.verdict_run import validation_scores

    dataset = model.dataset(domain)
    scores = validation_scores(model.bank, dataset, model.out, model.display)
    terminal.validation(model.display.console, scores, len(dataset.validation))
    model.display.line(
        f"No test row was scored, so {domain.name} has no verdict. Choose on validation rows, then "
        f"evaluate the adapter that you chose: lora-domains evaluate {domain.name}"
    )


def open_model(
    flags: argparse.Namespace, *, out: str | None = None, display: Display | None = None,
    title: str = "", card: Card | None = None, **options: Any,
) -> "DomainModel":  # fmt: skip
    """A DomainModel on the base in ``flags``, or on that of ``card``; torch is imported here.

    ``out`` is the folder of the adapters, by default that of ``flags``; ``title`` is shown first.
    ``options`` are others of ``DomainModel.from_pretrained``.
    """
    from lora_domains import distributed
    from lora_domains.inference.memory import reuse_pass_limit
    from lora_domains.model import DomainModel

    display = display or Display(quiet=not distributed.is_main())
    # Rounding depends on the number of threads: a repeated run gets that of the first.
    threads = card.environment.get("threads") if card is not None else None
    distributed.use_cores(None if threads is None else int(threads))
    if title:
        display.title(title)
    options |= {"path_or_id": flags.base, "quantization": quantization(flags)}
    if card is not None:
        options |= _base_of(card, flags)
    model = DomainModel.from_pretrained(**options, out=out or flags.out, display=display)
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
