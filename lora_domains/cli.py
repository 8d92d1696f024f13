"""``lora-domains …`` and what every recipe runs: flags, the order of steps, exit codes.

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
from typing import Any, Literal, NoReturn

from lora_domains import __version__
from lora_domains.comparison import compare_adapters, compare_seeds, save_seeds
from lora_domains.data import Data
from lora_domains.display import Display
from lora_domains.domain import Domain, with_settings
from lora_domains.errors import (
    AdapterError,
    LoraDomainsError,
    TrainingInterrupted,
    UsageError,
    did_you_mean,
)
from lora_domains.report import CARD, read_card, rebuild
from lora_domains.tasks import Classification

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
    add("--wanted-recall", type=float, metavar="P", help="of --positive: validation rows choose "
        "the probability from which it is named")  # fmt: skip
    add("--wanted-precision", type=float, metavar="P", help="the same for a precision")
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
    wishes = flags.wanted_recall is not None or flags.wanted_precision is not None
    if flags.text or flags.label or flags.positive or wishes:
        if not isinstance(task, Classification):
            raise UsageError(
                expected="a classification recipe for --text, --label, --positive and --wanted-…",
                found=task.kind,
                mend="Change the recipe instead.",
            )
        if flags.text or flags.label:
            columns = tuple(flags.text.split(",")) if flags.text else task.text
            task = replace(task, text=columns, label=flags.label or task.label, prompt=None)
        if flags.positive:
            named = None if flags.positive == "none" else flags.positive
            kept = task.wanted_recall if named else None, task.wanted_precision if named else None
            task = replace(task, positive=named, wanted_recall=kept[0], wanted_precision=kept[1])
        if wishes:
            # One wish replaces the other that a recipe may have.
            task = replace(
                task,
                wanted_recall=flags.wanted_recall,
                wanted_precision=flags.wanted_precision,
            )
    given = {k: getattr(flags, k) for k in ("epochs", "lr", "rank", "seed")}
    settings = {k: v for k, v in given.items() if v is not None}
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
    if flags.load_in_8bit and flags.load_in_4bit:
        raise UsageError(
            expected="one of --load-in-8bit and --load-in-4bit",
            found="both",
            mend="Leave one out.",
        )
    bits: Literal["8bit", "4bit"] | None = (
        "8bit" if flags.load_in_8bit else "4bit" if flags.load_in_4bit else None
    )
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
        mend=did_you_mean(adapter, names) if names else "Train one first.",
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
        Display().comparison(found)
    return EXIT[found["verdict"]]


def _seeds(flags: argparse.Namespace) -> int:
    """Several seeds of one adapter: what the seed does, apart from what the items do."""
    if len(flags.adapters) < 2:
        raise UsageError(
            where="lora-domains seeds",
            expected="several seeds of one adapter",
            found="one",
            mend="Train it again with another --seed and another --name.",
        )
    folders = [_folder(flags, name) for name in flags.adapters]
    found = compare_seeds(folders)
    if flags.save:
        save_seeds(folders, found)
    if flags.json:
        sys.stdout.write(json.dumps({"seeds": found}, indent=1) + "\n")
    else:
        Display().seeds(found)
    return 0


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
    doctor = verbs.add_parser("doctor", help="what is installed and what the machine offers")
    doctor.set_defaults(run=_doctor)
    for verb in (listing, show, predict, compare, seeds):
        verb.add_argument("--out", default="adapters", metavar="DIR", help="where adapters lie")

    def run() -> int:
        flags = parser.read(arguments)
        return int(flags.run(flags))

    sys.exit(guarded(run))


if __name__ == "__main__":
    main()
