"""``lora-domains …`` and what every recipe runs: flags, the order of steps, exit codes.

Exit codes of the verbs: 0 pass, 1 fail, 2 wrong usage or an error, 3 inconclusive, 130 interrupted.
A recipe exits 0 once training and evaluation are finished, whatever the verdict.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from lora_domains import __version__
from lora_domains.data import Data
from lora_domains.display import Display
from lora_domains.domain import Domain, load_domain, with_settings
from lora_domains.errors import (
    AdapterError,
    LoraDomainsError,
    TrainingInterrupted,
    UsageError,
    did_you_mean,
)
from lora_domains.report import CARD, read_card, rebuild
from lora_domains.tasks import Classification, Task, task_from_record

EXIT = {"pass": 0, "fail": 1, "inconclusive": 3}
USAGE, INTERRUPTED = 2, 130
ABOUT = "One LoRA adapter per domain on one frozen base, and proof of what each gained and kept."


# ── Flags ───────────────────────────────────────────────────────────────────────────────────────


class Parser(argparse.ArgumentParser):
    """argparse that suggests the flag that was meant."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs["allow_abbrev"] = False
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(
            where=self.prog,
            expected="flags as --help lists them",
            found=message,
            mend=f"See {self.prog} --help.",
        )

    def read(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The parsed flags; raises UsageError for an unknown one."""
        flags, unknown = self.parse_known_args(arguments)
        if getattr(flags, "texts", None) is not None:
            # argparse takes no texts after an option once it has met none before it.
            flags.texts += [word for word in unknown if not word.startswith("-")]
            unknown = [word for word in unknown if word.startswith("-")]
        if unknown:
            # A verb's flags belong to its own parser.
            known = set(self._option_string_actions)
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    verb = action.choices.get(getattr(flags, "verb", ""))
                    known |= set(verb._option_string_actions) if verb else set()
            word = unknown[0].split("=")[0]
            raise UsageError(
                where=self.prog,
                expected="known flags",
                found=repr(word),
                mend=did_you_mean(word, known),
            )
        return flags


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `fit` and every recipe share."""
    add = parser.add_argument
    add("--base", metavar="PATH_OR_ID", help="base model; default: the embedded one")
    add("--train", help="training rows: CSV, JSONL, Parquet, or hub:OWNER/NAME@REVISION/SPLIT")
    add("--validation", help="validation rows; default: carved from the training rows")
    add("--test", help="test rows; default: carved from the training rows")
    add("--text", metavar="COLUMN", help="column of the text, or several: context,question")
    add("--label", metavar="COLUMN", help="column of the label")
    add("--positive", metavar="LABEL", help="the class whose recall and precision matter, or none")
    add("--out", default="adapters", metavar="DIR", help="the adapter lands in DIR/NAME")
    add("--epochs", type=int, help="passes over the training rows at most")
    add("--lr", type=float, help="peak learning rate; default: derived from the base's width")
    add("--rank", type=int, help="LoRA rank; default: derived from the supervised tokens")
    add("--seed", type=int, help="of splits, batches and initialisation")
    add("--resume", action="store_true", help="continue an interrupted run")
    add("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
    add("--load-in-4bit", action="store_true", help="quantise the base to 4 bits (nf4)")
    add("--limit", type=int, metavar="N", help="a sample of at most N rows of each split")
    add("--group", metavar="COLUMN", help="rows that share it (a patient) stay in one split")
    add("--slice", metavar="COLUMNS", help="report scores for each value of these columns")
    add("--drop-leaks", action="store_true", help="take training rows that are test rows out")
    add("--show-text", action="store_true", help="allow row text in items.jsonl")
    add("--dry-run", action="store_true", help="read, check and plan; train and write nothing")


def configured(domain: Domain, flags: argparse.Namespace) -> Domain:
    """``domain`` with what the flags say."""
    data, task = domain.data, domain.task
    if flags.train:
        # Rows of one's own replace all of the recipe's: a foreign test set would prove nothing.
        data = Data(flags.train, flags.validation, flags.test)
    elif flags.test or flags.validation:
        data = replace(data, **{k: v for k in ("validation", "test") if (v := getattr(flags, k))})
    changes: dict[str, Any] = {"drop_leaks": flags.drop_leaks or data.drop_leaks}
    if flags.group:
        changes["group"] = flags.group
    if flags.slice:
        changes["slices"] = tuple(flags.slice.split(","))
    if flags.limit is not None:
        changes["limit"] = flags.limit
    data = replace(data, **changes)
    if flags.text or flags.label or flags.positive:
        if not isinstance(task, Classification):
            raise UsageError(
                expected="a classification recipe for --text, --label and --positive",
                found=task.kind,
                mend="Change the recipe instead.",
            )
        if flags.text or flags.label:
            columns = tuple(flags.text.split(",")) if flags.text else task.text
            task = replace(task, text=columns, label=flags.label or task.label, prompt=None)
        if flags.positive:
            task = replace(task, positive=None if flags.positive == "none" else flags.positive)
    named = {k: getattr(flags, k) for k in ("epochs", "lr", "rank", "seed")}
    settings = {k: v for k, v in named.items() if v is not None}
    # A recipe speaks for the rows it ships, not for one's own.
    own = flags.train or flags.validation or flags.test
    show = flags.show_text or (domain.show_text and not own)
    return replace(with_settings(domain, **settings), data=data, task=task, show_text=show)


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
    domain: Domain, flags: argparse.Namespace, display: Display | None = None
) -> str | None:
    """The main job, shown as it goes; the verdict, or None after a dry run."""
    from lora_domains.base import quiet_imports

    quiet_imports()
    from accelerate import PartialState

    from lora_domains.model import DomainModel

    display = display or Display(quiet=not PartialState().is_main_process)
    _use_cores(PartialState())
    display.title(f"{domain.name}")
    bits = _bits(flags)
    model = DomainModel.from_pretrained(
        flags.base, quantization=bits, out=flags.out, display=display
    )
    base = model.base
    count = sum(p.numel() for p in base.model.parameters())
    display.stage(
        "base loaded",
        None,
        None,
        f"{base.id}: {count / 1e6:.1f} M parameters, {bits or base.record()['dtype']}, "
        f"{base.device}, frozen",
    )
    card = model.fit(domain, resume=flags.resume, dry_run=flags.dry_run)
    if flags.dry_run:
        return None
    evaluation = model.evaluate(domain)
    entry = evaluation.entry
    n = next(iter(entry["domain_scores"].values()))["n"]
    display.stage("evaluated", n, n, "base, adapter and baselines on the same unseen rows")
    evaluation.show(display)
    size = sum(p.stat().st_size for p in (model.out / domain.name).glob("adapter_*"))
    display.line(
        f"Adapter: {model.out / domain.name} ({size / 1e6:.1f} MB, "
        f"sha256 {card['adapters'][0]['sha256'][:12]}); all of this is in its card.json."
    )
    return evaluation.verdict


def _use_cores(state: Any) -> None:
    """Give a CPU process its share of the cores: `accelerate launch` gives each one thread."""
    import torch

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
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    where = f" {escape(problem.where)}" if problem.where else ""
    console.print(f"[bold red]{type(problem).__name__}[/][bold]{where}[/]")
    console.print(f"  expected  {escape(problem.expected)}")
    console.print(f"  found     {escape(problem.found)}")
    console.print(f"  mend      {escape(problem.mend)}")
    return code


# ── Verbs ───────────────────────────────────────────────────────────────────────────────────────


def _fit(flags: argparse.Namespace) -> int:
    missing = [f"--{name}" for name in ("name", "train") if not getattr(flags, name)]
    if missing:
        raise UsageError(
            where="lora-domains fit",
            expected="a name and training rows",
            found="no " + " and no ".join(missing),
            mend="lora-domains fit --name spam --train train.csv --text text --label label",
        )
    domain = Domain(flags.name, Classification(), Data(flags.train))
    verdict = fit_and_evaluate(configured(domain, flags), flags)
    return EXIT[verdict] if verdict else 0


def _list(flags: argparse.Namespace) -> int:
    out, display = Path(flags.out), Display()
    # Hidden folders are what a killed process left of an unfinished save.
    folders = sorted(p.parent for p in out.glob(f"[!.]*/{CARD}")) if out.is_dir() else []
    if not folders:
        display.line(f"No adapters in {out}. Train one: accelerate launch recipes/medical.py")
    for folder in folders:
        card = read_card(folder)
        entry = card["adapters"][0]
        scores = entry.get("domain_scores", {})
        metric = entry.get("judged", {}).get("metric")
        gained = ""
        if metric in scores:
            gained = f"{metric} {scores[metric]['base']:.3f} → {scores[metric]['adapter']:.3f}"
        verdict = entry.get("verdict", "not evaluated")
        display.line(f"{folder.name:<20} {verdict:<13} {gained:<32} base {card['base']['id']}")
    return 0


def _folder(flags: argparse.Namespace) -> Path:
    for candidate in (Path(flags.adapter), Path(flags.out) / flags.adapter):
        if (candidate / CARD).exists():
            return candidate
    out = Path(flags.out)
    names = [p.parent.name for p in out.glob(f"[!.]*/{CARD}")]
    raise AdapterError(
        where=flags.adapter,
        expected="an adapter with a card",
        found=f"none there, nor in {out}",
        mend=did_you_mean(flags.adapter, names) if names else "Train one first.",
    )


def _show(flags: argparse.Namespace) -> int:
    folder, display = _folder(flags), Display()
    card = rebuild(folder) if flags.rebuild else read_card(folder)
    if flags.json:
        sys.stdout.write(json.dumps(card, indent=1) + "\n")
        return 0
    show_card(card, display)
    return EXIT[card["adapters"][0].get("verdict", "inconclusive")]


def show_card(card: Mapping[str, Any], display: Display) -> None:
    """What a card says, as it was shown when the adapter was made."""
    entry = card["adapters"][0]
    display.title(f"{entry['domain']} on {card['base']['id']}")
    if "verdict" not in entry:
        display.line("Not evaluated yet.")
        return
    for record in entry["training"]["history"]:
        display.epoch(record, entry["judged"]["metric"])
    display.scores(entry)
    display.general(entry)
    display.gates(entry)


def _predict(flags: argparse.Namespace) -> int:
    from lora_domains.base import quiet_imports

    quiet_imports()
    from lora_domains.model import DomainModel

    model = DomainModel.from_pretrained(flags.base, out=flags.out)
    name = model.load_adapter(flags.adapter)
    texts = flags.texts or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for found in model.predict(texts, domain=name):
        if isinstance(found, str):
            sys.stdout.write(found + "\n")
        else:
            sys.stdout.write(f"{found.label}\t{found.probability:.4f}\n")
    return 0


def _benchmark(flags: argparse.Namespace) -> int:
    """Every adapter on the same questions, and on each other's domains; the worst verdict."""
    from lora_domains.base import quiet_imports

    quiet_imports()
    from accelerate import PartialState

    from lora_domains.model import DomainModel
    from lora_domains.suites import load_suite

    display = Display(quiet=not PartialState().is_main_process)
    _use_cores(PartialState())
    suite = load_suite(flags.suite, flags.limit, flags.seed)
    model = DomainModel.from_pretrained(
        flags.base, quantization=_bits(flags), out=flags.adapters_in, display=display
    )
    for path in flags.adapters:
        model.load_adapter(path)
    found = model.benchmark(suite, [load_domain(path) for path in flags.domains], flags.out)
    for entry in found.report["adapters"]:
        display.title(f"{entry['domain']}: {entry['verdict']}")
        display.general(entry)
        display.gates(entry)
    if PartialState().is_main_process:
        display.line(f"Report: {found.save(flags.out)}")
    return EXIT[found.verdict]


def _loaded(flags: argparse.Namespace) -> Any:
    """The base of the flags as a DomainModel, with the cores it should use."""
    from lora_domains.base import quiet_imports

    quiet_imports()
    from accelerate import PartialState

    from lora_domains.model import DomainModel

    _use_cores(PartialState())
    return DomainModel.from_pretrained(
        flags.base, quantization=_bits(flags), out=flags.out,
        display=Display(quiet=not PartialState().is_main_process),
    )  # fmt: skip


def _trace(flags: argparse.Namespace) -> int:
    """One text through base and adapter, on the screen and nowhere else."""
    model = _loaded(flags)
    name = model.load_adapter(flags.adapter)
    row: Any = flags.text
    if row.lstrip().startswith("{"):
        with suppress(ValueError):
            row = json.loads(row)
    found = model.trace(row, name)
    model.display.trace(asdict(found), found.most_moved)
    return 0


def _curve(flags: argparse.Namespace) -> int:
    """Gain and retention over the adapter's scale; into its card."""
    model = _loaded(flags)
    name = model.load_adapter(flags.adapter)
    from lora_domains.scale import SCALES, curve

    entry = (model.bank[name].card or {"adapters": [{}]})["adapters"][0]
    settings = entry.get("settings", {})
    domain = _asked_about(flags, task_from_record(settings["task"]) if settings else None)
    if flags.seed is None and settings:
        domain = with_settings(domain, seed=settings["training"]["seed"])
    model.display.scale_curve(curve(model, name, domain, flags.scales or SCALES))
    return 0


def _learning_curve(flags: argparse.Namespace) -> int:
    """Would more data help? A table, and a JSON file."""
    model = _loaded(flags)
    from lora_domains.learning import SHARES, learning_curve

    domain = _asked_about(flags, None)
    found = learning_curve(model, domain, flags.sizes or SHARES)
    model.display.learning_curve(found)
    if not model.display.quiet:
        path = Path(flags.reports) / f"{domain.name}-learning-curve.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        model.display.line(f"All of it: {path}")
    return 0


def _asked_about(flags: argparse.Namespace, task: Task | None) -> Domain:
    """The domain of a recipe, or of rows in a file read by ``task``, as the flags say."""
    if Path(flags.rows).suffix == ".py":
        return configured(load_domain(flags.rows), flags)
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(flags.rows).stem).strip("-_") or "rows"
    domain = Domain(flags.name or name, task or Classification(), Data(flags.rows))
    own = argparse.Namespace(**vars(flags) | {"train": flags.rows})
    return configured(domain, own)


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _add_questions(verbs: Any) -> None:
    """The verbs that answer what people ask of an adapter, and of their rows."""
    trace = verbs.add_parser("trace", help="why it answers so: one text, token by token and layer")
    trace.add_argument("adapter")
    trace.add_argument("text", help="a text, or a row as JSON; shown on the screen only")
    trace.set_defaults(run=_trace)
    curve = verbs.add_parser("curve", help="gain and retention over the adapter's scale")
    curve.add_argument("adapter")
    curve.add_argument("--scales", type=_numbers, metavar="S,S,…", help="0 the base, 1 the adapter")
    curve.set_defaults(run=_curve)
    learning = verbs.add_parser("learning-curve", help="would more data help?")
    learning.set_defaults(run=_learning_curve)
    for verb in (curve, learning):
        add = verb.add_argument
        add("rows", metavar="RECIPE_OR_DATA", help="a recipe, or a file of training rows")
        add("--validation", help="validation rows; default: carved from the training rows")
        add("--test", help="test rows; default: carved from the training rows")
        add("--group", metavar="COLUMN", help="rows that share it stay together")
        add("--limit", type=int, metavar="N", help="a sample of at most N rows of each split")
        add("--drop-leaks", action="store_true", help="take training rows that are test rows out")
        add("--seed", type=int, help="of splits and training")
        verb.set_defaults(
            train=None, text=None, label=None, positive=None, slice=None, show_text=False,
            name=None, epochs=None, lr=None, rank=None,
        )  # fmt: skip
    add = learning.add_argument
    add("--sizes", type=_numbers, metavar="S,S,…", help="shares of the training rows")
    add("--reports", default="reports", metavar="DIR", help="where the JSON lands")
    add("--name", help="of the domain; default: that of the file")
    add("--text", metavar="COLUMN", help="column of the text, or several: context,question")
    add("--label", metavar="COLUMN", help="column of the label")
    add("--positive", metavar="LABEL", help="the class whose F1 counts")
    add("--epochs", type=int, help="passes over all the training rows at most")
    add("--lr", type=float, help="peak learning rate; default: derived from the base's width")
    add("--rank", type=int, help="LoRA rank; default: derived from the supervised tokens")
    for verb in (trace, curve, learning):
        add = verb.add_argument
        add("--base", metavar="PATH_OR_ID", help="base model; default: the embedded one")
        add("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
        add("--load-in-4bit", action="store_true", help="quantise the base to 4 bits (nf4)")
        add("--out", default="adapters", metavar="DIR", help="where adapters lie")


def _bits(flags: argparse.Namespace) -> Literal["8bit", "4bit"] | None:
    if flags.load_in_8bit and flags.load_in_4bit:
        raise UsageError(
            expected="one of --load-in-8bit and --load-in-4bit",
            found="both",
            mend="Leave one out.",
        )
    return "8bit" if flags.load_in_8bit else "4bit" if flags.load_in_4bit else None


def _doctor(_: argparse.Namespace) -> int:
    """What is installed, what the machine offers, and what would not work."""
    from importlib.metadata import PackageNotFoundError, version

    display = Display()
    for package in ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets",
                    "evaluate", "scikit-learn"):  # fmt: skip
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
    add_run_flags(fit)
    fit.set_defaults(run=_fit)
    listing = verbs.add_parser("list", help="the adapters of a folder with their verdicts")
    listing.set_defaults(run=_list)
    show = verbs.add_parser("show", help="an adapter's scores, gates and verdict")
    show.add_argument("adapter")
    show.add_argument("--rebuild", action="store_true", help="compute the figures anew from items")
    show.add_argument("--json", action="store_true", help="print the card")
    show.set_defaults(run=_show)
    predict = verbs.add_parser("predict", help="labels for texts (arguments, or lines on stdin)")
    predict.add_argument("adapter")
    predict.add_argument("texts", nargs="*")
    predict.add_argument("--base", metavar="PATH_OR_ID")
    predict.set_defaults(run=_predict)
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
    _add_questions(verbs)
    doctor = verbs.add_parser("doctor", help="what is installed and what the machine offers")
    doctor.set_defaults(run=_doctor)
    for verb in (listing, show, predict):
        verb.add_argument("--out", default="adapters", metavar="DIR", help="where adapters lie")

    def run() -> int:
        flags = parser.read(arguments)
        return int(flags.run(flags))

    sys.exit(guarded(run))


if __name__ == "__main__":
    main()
