"""The verbs that answer what people ask of an adapter and of their rows; light until one runs."""

import argparse
import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from lora_domains.analysis.reproduce import domain_of
from lora_domains.atomic import write_text
from lora_domains.cli.flags import run_flag_defaults
from lora_domains.data.source import Data
from lora_domains.domain import Domain, load_domain, with_settings
from lora_domains.report import terminal
from lora_domains.tasks import Classification, task_from_record

Opened = Callable[[argparse.Namespace], Any]
"""Flags → a ``DomainModel``."""
Configured = Callable[[Domain, argparse.Namespace], Domain]
"""A domain, and the flags that change it."""


def _trace(opened: Opened, flags: argparse.Namespace) -> int:
    """One text through base and adapter, on the screen and nowhere else."""
    model = opened(flags)
    name = model.load_adapter(flags.adapter)
    from lora_domains.analysis.trace import trace

    row: Any = flags.text
    if row.lstrip().startswith("{"):
        with suppress(ValueError):
            row = json.loads(row)
    traced = trace(model, row, name)
    terminal.trace(model.display.console, asdict(traced), traced.most_moved)
    return 0


def _curve(opened: Opened, configured: Configured, flags: argparse.Namespace) -> int:
    """Gain and retention over the adapter's scale; into its card."""
    model = opened(flags)
    name = model.load_adapter(flags.adapter)
    from lora_domains.analysis.scale_curve import SCALES, curve

    card = model.bank[name].card
    if card is None or flags.rows is not None:
        settings = card.adapter.settings if card else None
        domain = _about(flags, configured, settings)
    else:
        domain = configured(domain_of(card), flags)
    terminal.scale_curve(model.display.console, curve(model, name, domain, flags.scales or SCALES))
    return 0


def _learning_curve(opened: Opened, configured: Configured, flags: argparse.Namespace) -> int:
    """Would more data help? A table, and a JSON file."""
    model = opened(flags)
    from lora_domains.analysis.learning_curve import SHARES, learning_curve

    domain = _about(flags, configured)
    found = learning_curve(model, domain, flags.sizes or SHARES)
    terminal.learning_curve(model.display.console, found)
    if not model.display.quiet:
        path = Path(flags.reports) / f"{domain.name}-learning-curve.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(found, indent=1) + "\n")
        model.display.line(f"All of it: {path}")
    return 0


def _about(
    flags: argparse.Namespace, configured: Configured, settings: Mapping[str, Any] | None = None
) -> Domain:
    """The domain of a recipe, or of rows in a file, as the flags say.

    ``settings`` are those of the card of an adapter that was trained on the rows.
    """
    path = Path(flags.rows)
    if path.suffix == ".py":
        return configured(load_domain(path), flags)
    task = task_from_record(settings["task"]) if settings else Classification()
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_") or "rows"
    domain = Domain(flags.name or name, task, Data(flags.rows))
    if settings:
        domain = with_settings(domain, seed=settings["training"]["seed"])
    return configured(domain, argparse.Namespace(**vars(flags) | {"train": flags.rows}))


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def add_questions(verbs: Any, opened: Opened, configured: Configured) -> None:
    """Add the verbs to a parser's; how flags become a model and a domain is the caller's."""
    trace = verbs.add_parser("trace", help="why it answers so: one text, token by token and layer")
    trace.add_argument("adapter")
    trace.add_argument("text", help="a text, or a row as JSON; shown on the screen only")
    trace.set_defaults(run=partial(_trace, opened))
    curve = verbs.add_parser("curve", help="gain and retention over the adapter's scale")
    curve.add_argument("adapter")
    curve.add_argument("--scales", type=_numbers, metavar="S,S,…", help="0 the base, 1 the adapter")
    curve.set_defaults(run=partial(_curve, opened, configured))
    learning = verbs.add_parser("learning-curve", help="would more data help?")
    learning.set_defaults(run=partial(_learning_curve, opened, configured))
    for verb in (curve, learning):
        verb.set_defaults(**run_flag_defaults(), name=None)
        add = verb.add_argument
        what = "a recipe, or a file of training rows"
        if verb is curve:
            add(
                "rows",
                metavar="RECIPE_OR_DATA",
                nargs="?",
                help=f"{what}; default: as its card says",
            )
        else:
            add("rows", metavar="RECIPE_OR_DATA", help=what)
        add("--validation", help="validation rows; default: carved from the training rows")
        add("--test", help="test rows; default: carved from the training rows")
        add("--group", metavar="COLUMN", help="rows that share it stay together")
        add("--limit", type=int, metavar="N", help="a sample of at most N rows of each split")
        add("--drop-leaks", action="store_true", help="take training rows that are test rows out")
        add("--seed", type=int, help="of splits and training")
    add = learning.add_argument
    add("--sizes", type=_numbers, metavar="S,S,…", help="shares of the training rows")
    add("--reports", default="reports", metavar="DIR", help="where the JSON lands")
    add("--name", help="of the domain; default: that of the file")
    add("--text", metavar="COLUMN", help="column of the text, or several: context,question")
    add("--label", metavar="COLUMN", help="column of the label")
    add("--positive", metavar="LABEL", help="the class whose F1 counts")
    add("--head", action="store_true", help="train a head over the labels (needed on encoders)")
    add("--epochs", type=int, help="passes over all the training rows at most")
    add("--lr", type=float, help="peak learning rate; default: derived from the base's width")
    add("--rank", type=int, help="LoRA rank; default: derived from the supervised tokens")
    for verb in (trace, curve, learning):
        add = verb.add_argument
        add("--base", metavar="PATH_OR_ID", help="base model; default: the embedded one")
        add("--load-in-8bit", action="store_true", help="quantise the base to 8 bits")
        add("--load-in-4bit", action="store_true", help="quantise the base to 4 bits (nf4)")
        add("--out", default="adapters", metavar="DIR", help="where adapters lie")
