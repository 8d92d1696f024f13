"""Verbs that need no model: list, show, report, compare, rollback, doctor.

They import no torch; doctor asks it for devices. A verb imports what the others do not need.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_domains.adapters.folder import CONFIG, find_adapter
from lora_domains.atomic import adapter_name
from lora_domains.cli.parser import (
    ADAPTERS,
    EXIT,
    Parser,
    Verbs,
    add_adapter_argument,
    add_out_flag,
    add_report_flags,
    add_verb,
)
from lora_domains.cli.verbs import listing
from lora_domains.cli.verbs.listing import adapter_folders, summary_of
from lora_domains.console import Display
from lora_domains.errors import UsageError
from lora_domains.report.card import CARD, Card


def add_verbs(verbs: Verbs) -> None:
    """Add these verbs to the parser."""
    _add_list(verbs)
    _add_show(verbs)
    _add_report(verbs)
    _add_compare(verbs)
    _add_rollback(verbs)
    _add_doctor(verbs)


# ── list, show ──────────────────────────────────────────────────────────────────────────────────


def _add_list(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "list", list_adapters,
        usage="[options]",
        description="List the adapters of a folder: verdict, base, date of training, number of "
        "earlier versions and gain, as far as the terminal is wide enough. Writes nothing.",
        example="lora-domains list --out adapters",
    )  # fmt: skip
    add_out_flag(parser.add_argument_group("input"))
    _add_json_flag(parser, "all that is known of each")


def list_adapters(flags: argparse.Namespace) -> int:
    """A row for each adapter of a folder."""
    out, display = Path(flags.out), Display()
    adapters = [summary_of(folder) for folder in adapter_folders(out)]
    if flags.json:
        sys.stdout.write(json.dumps(adapters, indent=1) + "\n")
    elif not adapters:
        display.line(f"No adapters in {out}. Train one with lora-domains fit.")
    else:
        listing.adapters(display.console, adapters)
    return 0


def _add_show(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "show", show,
        usage="ADAPTER [options]",
        description="Show the scores, gates and verdict of an adapter, its training, its scale "
        "curve and the spread over seeds, from its card. Writes nothing.",
        example="lora-domains show triage",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs)
    add_out_flag(inputs)
    parser.add_argument_group("evaluation").add_argument(
        "--rebuild", action="store_true", help="compute the figures again from items.jsonl"
    )
    _add_json_flag(parser, "the card")


def _add_json_flag(parser: Parser, what: str) -> Any:
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help=f"print {what} as JSON")
    return output


def show(flags: argparse.Namespace) -> int:
    """Print an adapter's card."""
    from lora_domains.adapters.versions import versions

    folder = find_adapter(flags.adapter, Path(flags.out), CARD)
    card = _rebuilt(folder) if flags.rebuild else Card.read(folder)
    if flags.json:
        sys.stdout.write(card.dumps())
        return 0
    show_card(card, Display(), len(versions(folder)))
    return 0


def _rebuilt(folder: Path) -> Card:
    from lora_domains.report.report import rebuild

    return rebuild(folder)


def show_card(card: Card, display: Display, earlier: int = 0) -> None:
    """Print a card: the verdict and the tables, the epochs of its training, its scale curve,
    and the spread over the seeds that were trained with it.

    ``earlier`` is the number of its earlier versions.
    """
    from lora_domains.console import analyses
    from lora_domains.report import terminal
    from lora_domains.report.text import chosen_among

    entry = card.adapter
    display.title(f"{entry.domain} on {card.base.id}")
    if date := card.environment.get("date"):
        done = "Evaluated" if entry.trained_elsewhere else "Trained"
        display.line(f"{done} {listing.local_time(str(date))}.")
    if earlier:
        count = f"{earlier} earlier version{'s' * (earlier > 1)}"
        display.line(f"{count}: lora-domains rollback {entry.path} lists them.")
    if entry.verdict is None:
        at = "" if entry.scale == 1 else f" at this scale ({entry.scale:g} of its trained effect)"
        display.line(f"Not evaluated{at} yet.")
    else:
        terminal.evaluation(display.console, entry)
    if history := entry.training.get("history"):
        display.title("Training")
        if chosen := chosen_among(entry.training):
            display.line(f"{chosen}.")
        for record in history:
            display.epoch(record, str(entry.metric))
    if entry.scale_curve:
        analyses.scale_curve(display.console, entry.scale_curve)
    if entry.seeds:
        analyses.seeds(display.console, entry.seeds)


# ── report ──────────────────────────────────────────────────────────────────────────────────────


def _add_report(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "report", report,
        usage="ADAPTER [ADAPTER ...] [options]",
        description="Compute the figures of evaluated adapters again from their items, and write "
        "one report: report.html, report.md, comment.md, report.json and junit.xml in --out.\n\n"
        "Exit codes, of the worst adapter: 0 pass, 1 fail, 2 error, 3 inconclusive.",
        example="lora-domains report adapters/* --out reports --against main",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    where = f"their folders, names in {ADAPTERS}/, or OWNER/NAME@REVISION on the Hub"
    add_adapter_argument(inputs, "adapters", nargs="+", help=where)
    add_report_flags(parser, parser.add_argument_group("evaluation"))


def report(flags: argparse.Namespace) -> int:
    """Write one report of several adapters."""
    from lora_domains.analysis.regressions import comparison_with
    from lora_domains.report import terminal
    from lora_domains.report.card import read_items
    from lora_domains.report.report import combine, save_report
    from lora_domains.report.text import outcome

    display, out = Display(), Path(flags.out)
    compare_with_older = comparison_with(flags.against)
    folders = [find_adapter(name, Path(ADAPTERS), CARD) for name in flags.adapters]
    from lora_domains.cli.machine import check_bases

    check_bases("report", folders, out=flags.out)
    combined = combine(folders, show_text=flags.show_text)
    by_name = {adapter_name(folder): folder for folder in folders}
    compare_with_older(combined, lambda name: read_items(by_name[name]))
    save_report(combined, out, Path(flags.junit) if flags.junit else None)
    rows = [row for entry in combined.adapters for row in entry.mistakes or []]
    if flags.show_text and rows and not any("text" in row for row in rows):
        display.warn("these items hold no text; evaluate with --show-text to have it in a report.")
    terminal.report(display.console, combined)
    display.line(f"The report: {out / 'report.html'}")
    return EXIT[outcome(combined)]


# ── compare, rollback ────────────────────────────────────────────────────────────────────


def _add_compare(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "compare", compare,
        usage="A B [options]\n"
        "       lora-domains compare --seeds ADAPTER ADAPTER [ADAPTER ...] [options]",
        description="Compare two evaluated adapters or versions item by item, without a model: is "
        "B better than A, and does it keep general knowledge?\n\n"
        "With --seeds, or for three adapters and more, separate the variance of seeds from that "
        "of rows, over several trainings of one domain on the same rows (fit --seeds): validation "
        "rows, which cost no evaluation of the test rows, where all were scored on them.\n\nWrites "
        "nothing; with --save, the figures of seeds into their cards.\n\n"
        "Exit codes: 0 B is better, 1 it is not, 2 error, 3 inconclusive; of seeds: 0 or 2.",
        example="lora-domains compare triage triage-v2\n"
        "  lora-domains compare --seeds triage triage-seed1 triage-seed2",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs, "adapters", nargs="+")
    inputs.add_argument("--seeds", action="store_true", help="two adapters are seeds of one domain")
    add_out_flag(inputs)
    output = _add_json_flag(parser, "the figures")
    output.add_argument("--save", action="store_true", help="write the figures of seeds into their "
                        "cards")  # fmt: skip


def compare(flags: argparse.Namespace) -> int:
    """Compare two adapters by their items, or several seeds of one."""
    from lora_domains.analysis.compare import compare_adapters
    from lora_domains.report import terminal

    if len(flags.adapters) < 2:
        raise UsageError(
            where="lora-domains compare",
            expected="two adapters, or several seeds of one",
            found="one",
            hint="Several seeds are trained together: lora-domains fit … --seeds 3",
        )
    folders = [find_adapter(name, Path(flags.out), CARD) for name in flags.adapters]
    if flags.seeds or len(folders) > 2:
        return _compare_seeds(folders, flags)
    if flags.save:
        raise UsageError(
            where="lora-domains compare --save",
            expected="seeds of one domain, whose figures are saved",
            found="two adapters to compare",
            hint="Add --seeds, or leave --save out.",
        )
    compared = compare_adapters(*folders)
    if flags.json:
        sys.stdout.write(json.dumps(compared, indent=1) + "\n")
    else:
        terminal.comparison(Display().console, compared)
    return EXIT[compared["verdict"]]


def _compare_seeds(folders: Sequence[Path], flags: argparse.Namespace) -> int:
    from lora_domains.analysis.compare import compare_seeds, save_seeds
    from lora_domains.console import analyses

    rows, variances = compare_seeds(folders)
    if flags.save:
        save_seeds(folders, variances)
    if flags.json:
        sys.stdout.write(json.dumps({"rows": rows, "seeds": variances}, indent=1) + "\n")
    else:
        analyses.seeds(Display().console, variances)
    return 0


def _add_rollback(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "rollback", rollback,
        usage="ADAPTER [VERSION] [options]",
        description="List the earlier versions of an adapter, or restore one. Writes the folder of "
        "the adapter, and keeps the replaced one as a version, so that a rollback can be undone. "
        "Without VERSION it writes nothing.",
        example="lora-domains rollback triage\n  lora-domains rollback triage 0002",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    inputs.add_argument("adapter", metavar="ADAPTER", help="its folder, or its name in --out")
    inputs.add_argument("version", metavar="VERSION", nargs="?", help="number of the version to "
                        "restore; without one they are listed")  # fmt: skip
    add_out_flag(inputs)


def rollback(flags: argparse.Namespace) -> int:
    """Restore an earlier version of an adapter, or list them all."""
    from lora_domains.adapters.versions import find_versioned, versions
    from lora_domains.adapters.versions import rollback as restore

    display = Display()
    folder = find_versioned(flags.adapter, Path(flags.out))
    if flags.version is None:
        kept = versions(folder)
        if not kept:
            display.line(f"No earlier versions of {folder}. The adapter is kept as one when it is "
                         "trained again under its name.")  # fmt: skip
            return 0
        display.title(f"Earlier versions of {folder.name}")
        listing.versions(display.console, [*map(summary_of, kept), *_current(folder)])
        display.line(f"To restore one: lora-domains rollback {flags.adapter} {kept[-1].name}")
        return 0
    restored, saved = restore(folder, flags.version)
    replaced = f"; the replaced one was saved as {saved.name}" if saved else ""
    display.line(f"Restored version {restored.name} of {folder}{replaced}.")
    return 0


def _current(folder: Path) -> list[dict[str, Any]]:
    """The adapter that a rollback would replace; none where its folder is gone."""
    return [summary_of(folder) | {"name": "now"}] if (folder / CONFIG).is_file() else []


# ── doctor ──────────────────────────────────────────────────────────────────────────────────────


def _add_doctor(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "doctor", doctor,
        usage="[options]",
        description="Show the versions of packages, the extras that are missing and how to install "
        "them, devices, threads, memory, the bases at hand, and whether the Hub can be reached. "
        "Writes nothing.",
        example="lora-domains doctor\n  lora-domains doctor --json > machine.json",
    )  # fmt: skip
    _add_json_flag(parser, "it")


def doctor(flags: argparse.Namespace) -> int:
    """Show packages, devices, bases, and the way to the Hub."""
    from lora_domains.cli.machine import in_lines, machine

    found, display = machine(), Display()
    if flags.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        for name, line in in_lines(found):
            display.stage(name, None, None, line)
    return 0
