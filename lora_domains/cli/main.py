"""``lora-domains …`` and what every recipe runs: verbs, the order of steps, exit codes.

Exit codes of the verbs: 0 pass, 1 fail, 2 wrong usage or an error, 3 inconclusive, 130 interrupted.
A recipe exits 0 once training and evaluation are finished, whatever the verdict.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_domains import __version__
from lora_domains.analysis.compare import compare_adapters, compare_seeds, save_seeds
from lora_domains.analysis.reproduce import base_of, card_at, domain_of, same_bytes
from lora_domains.cli.commands import add_questions
from lora_domains.cli.flags import Parser, add_run_flags, configured, quantization
from lora_domains.console import Display
from lora_domains.data.source import Data
from lora_domains.domain import Domain, check_name, load_domain
from lora_domains.errors import (
    AdapterError,
    LoraDomainsError,
    TrainingInterrupted,
    UsageError,
    did_you_mean,
)
from lora_domains.report import terminal
from lora_domains.report.card import CARD, Card, Report, read_items
from lora_domains.report.regressions import older_adapters, regressions
from lora_domains.report.report import Evaluation, combine, rebuild, save_report
from lora_domains.report.text import outcome
from lora_domains.tasks import Classification

EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
USAGE, INTERRUPTED = 2, 130
ABOUT = "One LoRA adapter per domain on one frozen base, and proof of what each gained and kept."


# ── Recipes, and `fit` ──────────────────────────────────────────────────────────────────────────


def run_recipe(sources: Mapping[str, Domain], arguments: Sequence[str] | None = None) -> None:
    """Train and evaluate a recipe's domain as the command line says; the last line of a recipe.

    ``sources`` are the sets of rows it knows by name, the first being the default (`embedded`,
    `hub`). Exits 0 once training and evaluation are finished, 2 on an error.
    """
    parser = Parser(description=_recipe_doc())
    names = list(sources)
    parser.add_argument("--source", choices=names, default=names[0], help="which rows to use")
    add_run_flags(parser)

    def run() -> int:
        flags = parser.read(arguments)
        fit_and_evaluate(configured(sources[flags.source], flags), flags)
        return 0

    code = guarded(run)
    if code:
        sys.exit(code)


def _recipe_doc() -> str | None:
    return getattr(sys.modules.get("__main__"), "__doc__", None)


def fit_and_evaluate(
    domain: Domain,
    flags: argparse.Namespace,
    display: Display | None = None,
    card: Card | None = None,
) -> str | None:
    """The main job, shown as it goes; the verdict, or None after a dry run.

    ``card`` is of the run that this one repeats.
    """
    from lora_domains.modeling.base import quiet_imports

    quiet_imports()
    from lora_domains import distributed
    from lora_domains.model import DomainModel

    display = display or Display(quiet=not distributed.is_main())
    _use_cores(distributed.state(), card)
    display.title(f"{domain.name}")
    bits = quantization(flags)
    place: dict[str, Any] = {"path_or_id": flags.base, "quantization": bits}
    if card is not None:
        place = _base_of(card, flags, bits)
    model = DomainModel.from_pretrained(**place, out=flags.out, display=display)
    base = model.base
    count = sum(p.numel() for p in base.model.parameters())
    display.stage(
        "base loaded",
        None,
        None,
        f"{base.id}: {count / 1e6:.1f} M parameters, {bits or base.record()['dtype']}, "
        f"{base.resident_bytes() / 1e6:.1f} MB on {base.device}, frozen",
    )
    made = model.fit(
        domain, resume=flags.resume, dry_run=flags.dry_run, init_from=flags.init_from,
        tracker=flags.tracker,
    )  # fmt: skip
    if made is None:  # a dry run
        return None
    if card is not None:
        same, said = same_bytes(card, made)
        (display.line if same else display.warn)(said)
    evaluation = model.evaluate(domain)
    entry = evaluation.entry
    n = next(iter(entry.domain_scores.values()))["n"]
    display.stage("evaluated", n, n, "base, adapter and baselines on the same unseen rows")
    evaluation.show(display.console)
    size = sum(p.stat().st_size for p in (model.out / domain.name).glob("adapter_*"))
    display.line(
        f"Adapter: {model.out / domain.name} ({size / 1e6:.1f} MB, "
        f"sha256 {str(made.adapter.sha256)[:12]}); all of this is in its card.json."
    )
    return evaluation.verdict


def _base_of(card: Card, flags: argparse.Namespace, bits: str | None) -> dict[str, Any]:
    """The base of a card, as it was loaded then, unless flags say otherwise."""
    path, revision = (flags.base, None) if flags.base else base_of(card)
    return {
        "path_or_id": path,
        "revision": revision,
        "quantization": bits or card.base.quantization,
        "dtype": card.base.dtype,
    }


def _use_cores(state: Any, card: Card | None = None) -> None:
    """Give a CPU process its share of the cores: `accelerate launch` gives each one thread.

    A run that is repeated has as many threads as it had: sums depend on them in the last bit.
    """
    import torch

    if card is not None:
        torch.set_num_threads(int(card.environment.get("threads") or torch.get_num_threads()))
        return
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ
    if state.device.type == "cpu" and launched and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))


def guarded(run: Any) -> int:
    """Run, turning the package's own errors into a message and an exit code."""
    from rich.console import Console
    from rich.markup import escape

    try:
        return int(run())
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted.\n")
        return INTERRUPTED
    except TrainingInterrupted as error:
        code: int = INTERRUPTED
        problem: LoraDomainsError = error
    except LoraDomainsError as error:
        code, problem = USAGE, error
    # Every process of a launch finds the same; the first of each machine says it.
    quiet = os.environ.get("LOCAL_RANK", "0") != "0"
    console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
    where = f" {escape(problem.where)}" if problem.where else ""
    console.print(f"[bold red]{type(problem).__name__}[/][bold]{where}[/]")
    console.print(f"  expected  {escape(problem.expected)}")
    console.print(f"  found     {escape(problem.found)}")
    console.print(f"  hint      {escape(problem.hint)}")
    return code


# ── Verbs ───────────────────────────────────────────────────────────────────────────────────────


def _fit(flags: argparse.Namespace) -> int:
    if flags.from_card:
        card = card_at(Path(flags.from_card))
        flags.init_from = flags.init_from or _parent_of(card, flags)
        domain = domain_of(card)
        if flags.name:
            domain = replace(domain, name=flags.name)
        verdict = fit_and_evaluate(configured(domain, flags, again=True), flags, card=card)
        return EXIT[verdict] if verdict else 0
    missing = [f"--{name}" for name in ("name", "train") if not getattr(flags, name)]
    if missing:
        raise UsageError(
            where="lora-domains fit",
            expected="a name and training rows",
            found="no " + " and no ".join(missing),
            hint="lora-domains fit --name spam --train train.csv --text text --label label",
        )
    domain = Domain(flags.name, Classification(), Data(flags.train))
    verdict = fit_and_evaluate(configured(domain, flags), flags)
    return EXIT[verdict] if verdict else 0


def _parent_of(card: Card, flags: argparse.Namespace) -> Path | None:
    """The folder of the adapter that a card's went on from; None where it went on from none."""
    record = card.adapter.parent
    if record is None:
        return None
    from lora_domains.adapters.versions import parent_folder

    given = Path(flags.from_card)
    beside = (given.parent if given.name == CARD else given).absolute().parent
    found = parent_folder(record, beside) or parent_folder(record, Path(flags.out))
    if found is None:
        raise UsageError(
            where=str(given),
            expected=f"its parent {record.name} (sha256 {record.sha256[:12]})",
            found=f"none in {beside} or {flags.out}, nor among the versions kept there",
            hint="Give it: --init-from ADAPTER",
        )
    return found


def _list(flags: argparse.Namespace) -> int:
    out, display = Path(flags.out), Display()
    # Hidden folders are what a killed process left of an unfinished save.
    folders = sorted(p.parent for p in out.glob(f"[!.]*/{CARD}")) if out.is_dir() else []
    if not folders:
        display.line(f"No adapters in {out}. Train one: accelerate launch recipes/medical.py")
    for folder in folders:
        card = Card.read(folder)
        entry = card.adapter
        scores, metric = entry.domain_scores, entry.judged.get("metric", "")
        gained = ""
        if metric in scores:
            gained = f"{metric} {scores[metric]['base']:.3f} → {scores[metric]['adapter']:.3f}"
        verdict = entry.verdict or "not evaluated"
        display.line(f"{folder.name:<20} {verdict:<13} {gained:<32} base {card.base.id}")
    return 0


def _folder(flags: argparse.Namespace, adapter: str | None = None) -> Path:
    adapter = adapter or flags.adapter
    for candidate in (Path(adapter), Path(flags.out) / adapter):
        if (candidate / CARD).exists():
            return candidate
    out = Path(flags.out)
    names = [p.parent.name for p in out.glob(f"[!.]*/{CARD}")]
    raise AdapterError(
        where=adapter,
        expected="an adapter with a card",
        found=f"none there, nor in {out}",
        hint=did_you_mean(adapter, names) if names else "Train one first.",
    )


def _show(flags: argparse.Namespace) -> int:
    folder, display = _folder(flags), Display()
    card = rebuild(folder) if flags.rebuild else Card.read(folder)
    if flags.json:
        sys.stdout.write(card.dumps())
        return 0
    show_card(card, display)
    return EXIT[card.adapter.outcome]


def show_card(card: Card, display: Display) -> None:
    """What a card says, as it was shown when the adapter was made."""
    entry = card.adapter
    display.title(f"{entry.domain} on {card.base.id}")
    if entry.verdict is None:
        display.line("Not evaluated yet.")
        return
    for record in entry.training["history"]:
        display.epoch(record, entry.judged["metric"])
    Evaluation(card).show(display.console)


def _report(flags: argparse.Namespace) -> int:
    display, out = Display(), Path(flags.out)
    older = older_adapters(Path(flags.against)) if flags.against else None
    folders = {folder.resolve().name: folder for folder in map(Path, flags.adapters)}
    report = combine([Path(folder) for folder in flags.adapters], show_text=flags.show_text)
    if older is not None:
        name = Path(flags.against).resolve().name
        report.since = regressions(report, lambda path: read_items(folders[path]), older, name)
    save_report(report, out, Path(flags.junit) if flags.junit else None)
    rows = [row for entry in report.adapters for row in entry.mistakes or []]
    if flags.show_text and rows and not any("text" in row for row in rows):
        display.warn("These items hold no text: evaluate with --show-text to have it in a report.")
    _show_report(report, display, out)
    return EXIT[outcome(report)]


def _show_report(report: Report, display: Display, out: Path) -> None:
    terminal.report(display.console, report)
    display.line(f"The report: {out / 'report.html'}")


def _rollback(flags: argparse.Namespace) -> int:
    from lora_domains.adapters.versions import rollback

    folder = Path(flags.out) / check_name(flags.adapter)
    taken, kept = rollback(folder, flags.to)
    was = f"; what stood there is version {kept.name}" if kept else ""
    Display().line(f"{folder} is version {taken.name} again{was}.")
    return 0


def _predict(flags: argparse.Namespace) -> int:
    from lora_domains.modeling.base import quiet_imports

    quiet_imports()
    from lora_domains.model import DomainModel

    model = DomainModel.from_pretrained(flags.base, out=flags.out)
    name = model.load_adapter(flags.adapter)
    texts = flags.texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for found in model.predict(texts, domain=name, refer_below=flags.refer_below):
        if isinstance(found, str):
            sys.stdout.write(found + "\n")
        else:
            sys.stdout.write(f"{found.label}\t{found.probability:.4f}\n")
    return 0


def _compare(flags: argparse.Namespace) -> int:
    """Two adapters or versions on the same items, from their items alone."""
    folders = [_folder(flags, name) for name in (flags.adapter, flags.other)]
    found = compare_adapters(*folders)
    if flags.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        terminal.comparison(Display().console, found)
    return EXIT[found["verdict"]]


def _seeds(flags: argparse.Namespace) -> int:
    """Several seeds of one adapter: what the seed does, apart from what the items do."""
    if len(flags.adapters) < 2:
        raise UsageError(
            where="lora-domains seeds",
            expected="several seeds of one adapter",
            found="one",
            hint="Train it again with another --seed and another --name.",
        )
    folders = [_folder(flags, name) for name in flags.adapters]
    found = compare_seeds(folders)
    if flags.save:
        save_seeds(folders, found)
    if flags.json:
        sys.stdout.write(json.dumps({"seeds": found}, indent=1) + "\n")
    else:
        terminal.seeds(Display().console, found)
    return 0


def _benchmark(flags: argparse.Namespace) -> int:
    """Every adapter on the same questions, and on each other's domains; the worst verdict."""
    from lora_domains.modeling.base import quiet_imports

    quiet_imports()
    from lora_domains import distributed
    from lora_domains.model import DomainModel
    from lora_domains.probes.suite import load_suite

    display = Display(quiet=not distributed.is_main())
    _use_cores(distributed.state())
    older = older_adapters(Path(flags.against)) if flags.against else None
    suite = load_suite(flags.suite, flags.limit, flags.seed)
    model = DomainModel.from_pretrained(
        flags.base, quantization=quantization(flags), out=flags.adapters_in, display=display
    )
    for path in flags.adapters:
        model.load_adapter(path)
    domains = [load_domain(path) for path in flags.domains]
    found = model.benchmark(suite, domains, flags.out, show_text=flags.show_text)
    if older is not None:
        name = Path(flags.against).resolve().name
        found.report.since = regressions(found.report, found.items.__getitem__, older, name)
    distributed.on_main(lambda: found.save(flags.out, flags.junit))
    _show_report(found.report, display, Path(flags.out))
    return EXIT[found.verdict]


def _opened(flags: argparse.Namespace) -> Any:
    """A DomainModel of the flags' base, with the cores it should use."""
    from lora_domains.modeling.base import quiet_imports

    quiet_imports()
    from lora_domains import distributed
    from lora_domains.model import DomainModel

    _use_cores(distributed.state())
    display = Display(quiet=not distributed.is_main())
    return DomainModel.from_pretrained(
        flags.base, quantization=quantization(flags), out=flags.out, display=display
    )


def _export(flags: argparse.Namespace) -> int:
    from lora_domains.modeling.base import quiet_imports

    quiet_imports()
    from lora_domains.model import DomainModel

    # In main memory and float32, so that the stated error is that of what is written.
    model = DomainModel.from_pretrained(flags.base, device="cpu", dtype="float32")
    model.export(model.load_adapter(flags.adapter), flags.out, dtype=flags.dtype)
    return 0


def _doctor(_: argparse.Namespace) -> int:
    """What is installed, what the machine offers, and what would not work."""
    from importlib.metadata import PackageNotFoundError, version

    display = Display()
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
                    "scikit-learn"):  # fmt: skip
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The ``lora-domains`` command."""
    parser = Parser(prog="lora-domains", description=ABOUT)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    fit = verbs.add_parser("fit", help="train and evaluate an adapter on rows of your own")
    fit.add_argument("--name", help="name of the domain and of its adapter")
    fit.add_argument("--from-card", metavar="CARD", help="repeat the run of a card.json")
    add_run_flags(fit)
    fit.set_defaults(run=_fit)
    listing = verbs.add_parser("list", help="the adapters of a folder with their verdicts")
    listing.set_defaults(run=_list)
    show = verbs.add_parser("show", help="an adapter's scores, gates and verdict")
    show.add_argument("adapter")
    show.add_argument("--rebuild", action="store_true", help="compute the figures anew from items")
    show.add_argument("--json", action="store_true", help="print the card")
    show.set_defaults(run=_show)
    report = verbs.add_parser("report", help="many adapters as a page, Markdown, JSON and JUnit")
    report.add_argument("adapters", nargs="+", metavar="ADAPTER", help="adapter folders")
    report.add_argument("--out", default="reports", metavar="DIR", help="where the report lands")
    report.set_defaults(run=_report)
    back = verbs.add_parser("rollback", help="put an earlier version of an adapter in its place")
    back.add_argument("adapter")
    back.add_argument("--to", metavar="VERSION", help="which; default: the newest that differs")
    back.set_defaults(run=_rollback)
    predict = verbs.add_parser("predict", help="labels for texts (arguments, or lines on stdin)")
    predict.add_argument("adapter")
    predict.add_argument("texts", nargs="*")
    predict.add_argument("--base", metavar="PATH_OR_ID")
    predict.add_argument(
        "--refer-below", type=float, default=0.0, metavar="P",
        help="answer 'refer' where the label's probability is below P",
    )  # fmt: skip
    predict.set_defaults(run=_predict)
    compare = verbs.add_parser("compare", help="is B better than A? two adapters, the same items")
    compare.add_argument("adapter", metavar="A")
    compare.add_argument("other", metavar="B")
    compare.add_argument("--json", action="store_true", help="print the figures")
    compare.set_defaults(run=_compare)
    seeds = verbs.add_parser("seeds", help="several seeds of one adapter: does the seed matter?")
    seeds.add_argument("adapters", nargs="+", metavar="ADAPTER")
    seeds.add_argument("--json", action="store_true", help="print the figures")
    seeds.add_argument("--save", action="store_true", help="put the figures into their cards too")
    seeds.set_defaults(run=_seeds)
    bench = verbs.add_parser("benchmark", help="what adapters gained and kept, as a report")
    add = bench.add_argument
    add("adapters", nargs="+", metavar="ADAPTER", help="adapter folders: adapters/*")
    add("--suite", default="embedded", help="embedded, quick, standard, mmlu, …, or a file")
    add("--domains", nargs="*", default=[], metavar="RECIPE", help="score their test rows as well")
    add("--out", default="reports", metavar="DIR", help="where the report and the scores are kept")
    add("--limit", type=int, metavar="N", help="at most N questions, drawn by --seed")
    add("--seed", type=int, default=0, help="of that sample")
    add("--base", metavar="PATH_OR_ID", help="base model; default: the embedded one")
    add("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    add("--load-in-4bit", action="store_true", help="quantise the base to 4 bits (nf4)")
    bench.set_defaults(run=_benchmark, adapters_in="adapters")
    for verb in (report, bench):
        add = verb.add_argument
        add("--junit", metavar="FILE", help="default: junit.xml beside the report")
        add("--against", "--baseline", metavar="DIR", help="older adapters: what got worse since")
        add("--show-text", action="store_true", help="show the text of wrong rows")
    export = verbs.add_parser("export", help="the base with an adapter in it, as a plain model")
    export.add_argument("adapter", help="its folder, or its name under adapters/")
    export.add_argument("--out", required=True, metavar="DIR", help="folder of the merged model")
    export.add_argument("--base", metavar="PATH_OR_ID")
    export.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16", "float16"),
        help="of the merged weights; default: %(default)s",
    )  # fmt: skip
    export.set_defaults(run=_export)
    add_questions(verbs, _opened, configured)
    doctor = verbs.add_parser("doctor", help="what is installed and what the machine offers")
    doctor.set_defaults(run=_doctor)
    for verb in (listing, show, back, predict, compare, seeds):
        verb.add_argument("--out", default="adapters", metavar="DIR", help="where adapters lie")

    def run() -> int:
        flags = parser.read(arguments)
        return int(flags.run(flags))

    sys.exit(guarded(run))


if __name__ == "__main__":
    main()
