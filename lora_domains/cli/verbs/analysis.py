"""Verbs that analyse an adapter or its rows: trace, curve, learning-curve, cross-validate."""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_domains.adapters.folder import find_adapter, own_folder
from lora_domains.analysis.reproduce import domain_of
from lora_domains.atomic import check_writable, write_files
from lora_domains.cli.flags import (
    add_base_flags,
    add_column_flags,
    add_metric_flag,
    add_quiet_flag,
    add_row_flags,
    add_task_flag,
    add_training_flags,
    configured,
    domain_name,
    run_flag_defaults,
)
from lora_domains.cli.machine import with_base
from lora_domains.cli.parser import (
    ADAPTERS,
    Parser,
    Verbs,
    add_adapter_argument,
    add_out_flag,
    add_verb,
    check_no_file,
)
from lora_domains.cli.proposal import proposed
from lora_domains.cli.recipes import open_model, own_base
from lora_domains.console import Display, analyses
from lora_domains.data.source import Data
from lora_domains.domain import Domain, load_domain, with_settings
from lora_domains.report.card import CARD, Card
from lora_domains.tasks import task_from_record

if TYPE_CHECKING:
    from lora_domains.model import DomainModel

MOST_WORDS = 6
"""Words that ``trace`` names."""
FOLDS = 5
"""Folds of ``cross-validate``."""


def add_verbs(verbs: Verbs) -> None:
    """Add these verbs to the parser."""
    _add_trace(verbs)
    _add_curve(verbs)
    _add_learning_curve(verbs)
    _add_cross_validate(verbs)


# ── trace ───────────────────────────────────────────────────────────────────────────────────────


def _add_trace(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "trace", trace,
        usage="ADAPTER TEXT [options]",
        description="Show one text token by token, the probabilities of base and adapter, the "
        "contribution of each layer, and the words without which the answer is less likely. Writes "
        "nothing: the text appears on the screen only.",
        example='lora-domains trace triage "Sudden weakness of the left arm."',
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs)
    inputs.add_argument("text", metavar="TEXT", help="a text, or a row as JSON")
    add_base_flags(inputs, sharded=False)
    add_out_flag(inputs)
    add_quiet_flag(parser.add_argument_group("output"))


def trace(flags: argparse.Namespace) -> int:
    """Show one text in base and adapter."""
    check_no_file([flags.text], flags.adapter)
    model = open_model(flags, adapter=flags.adapter)
    name = model.load_adapter(flags.adapter)
    from lora_domains.analysis import trace as analysis

    row: Any = flags.text
    if row.lstrip().startswith("{"):
        with suppress(ValueError):
            row = json.loads(row)
    traced = analysis.trace(model, row, name)
    analyses.trace(model.display.console, asdict(traced), traced.most_moved)
    (answer,) = model.predict([row], domain=name)
    effects = analysis.word_effects(model, row, name, answer)
    words = [(word.strip(), effect) for column in effects.values() for word, effect in column]
    words.sort(key=lambda pair: -abs(pair[1]))
    if words:
        most = ", ".join(f"{word!r} {effect:+.2f}" for word, effect in words[:MOST_WORDS])
        model.display.line(f"Words that mattered most for this answer, in nats: {most}.")
    return 0


# ── curve ───────────────────────────────────────────────────────────────────────────────────────


def _add_curve(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "curve", curve,
        usage="ADAPTER [RECIPE_OR_FILE] [options]",
        description="Measure gain and general knowledge of an adapter at several scales, on its "
        "validation rows. Writes the curve into its card.\n\n"
        "With --scale, apply one: lora_alpha in adapter_config.json is changed, which PEFT reads, "
        "and the adapter as it was becomes a version. Its verdict was for the other scale, so that "
        "it has none until it is evaluated again. A curve in its card is not measured again.",
        example="lora-domains curve triage --scales 0,0.5,1\n"
        "  lora-domains curve triage --scale best",
    )  # fmt: skip
    inputs = parser.add_argument_group("input")
    add_adapter_argument(inputs)
    inputs.add_argument("rows", metavar="RECIPE_OR_FILE", nargs="?", help="a recipe, or the "
                        "training rows; default: those in its card")  # fmt: skip
    add_row_flags(inputs)
    inputs.add_argument("--seed", type=int, metavar="N", help="seed of the splits")
    add_base_flags(inputs)
    add_out_flag(inputs)
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--scales", type=numbers, metavar="S,S,…", help="scales from 0 (the "
                            "base) over 1 (the adapter) to 4; default: "
                            "0,0.25,0.5,0.75,1,1.25")  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--scale", type=_scale, metavar="S", help="give the adapter this scale, or "
                        "best; 1 is as trained")  # fmt: skip
    add_quiet_flag(output)
    # For ``configured``, which reads every flag of a run.
    parser.set_defaults(name=None, **run_flag_defaults())


def _scale(text: str) -> float | str:
    """An argument of ``--scale``: a number, or a word that ``scale_curve.chosen`` checks."""
    with suppress(ValueError):
        return float(text)
    return text


def curve(flags: argparse.Namespace) -> int:
    """Measure an adapter at several scales, and apply one."""
    from lora_domains.analysis import scale_curve

    folder, wanted = find_adapter(flags.adapter, Path(flags.out)), flags.scale
    card = Card.read(folder) if (folder / CARD).is_file() else None
    known = card.adapter.scale_curve if card else {}
    scales = flags.scales or list(scale_curve.SCALES)
    scale_curve.check_scales(scales)
    display = Display()
    found = None if wanted is None else scale_curve.chosen(known, wanted)
    if found is None or flags.rows or flags.scales:
        if isinstance(wanted, float) and wanted not in scales:
            scales = [*scales, wanted]
        display = _measure_curve(flags, folder, scales)
    if wanted is not None:
        place = own_folder(folder, Path(flags.out) / card.adapter.domain) if card else folder
        if not place.exists():  # the curve in the Hub's cache was measured before
            shutil.copytree(folder, place)
        _apply_scale(place, wanted, display)
    return 0


def _measure_curve(flags: argparse.Namespace, folder: Path, scales: Sequence[float]) -> Display:
    from lora_domains.analysis import scale_curve

    model = open_model(flags, adapter=folder)
    name = model.load_adapter(folder)
    card = scale_curve.check_adapter(model.bank[name])
    if flags.rows is None:
        domain = configured(domain_of(card, vars(flags)), flags)
    else:
        domain = _domain(flags, card.adapter.settings)
    measured = scale_curve.curve(model, name, domain, scales)
    display = model.display
    analyses.scale_curve(display.console, measured)
    if flags.scale is None and measured["best"] not in (0, card.adapter.scale):
        best = f"lora-domains curve {flags.adapter} --scale {measured['best']:g}"
        display.line(f"To apply it: {best}")
    return display


def _apply_scale(folder: Path, wanted: float | str, display: Display) -> None:
    from lora_domains import distributed
    from lora_domains.analysis.scale_curve import apply_scale

    card, saved = distributed.on_main(lambda: apply_scale(folder, wanted))
    scale = f"scale {card.adapter.scale:g}"
    if saved is None:
        display.line(f"{folder.name} has {scale} already.")
        return
    name, before = folder.name, saved.name
    display.line(
        f"{name} has {scale} now, as lora_alpha in adapter_config.json, which PEFT reads. It is "
        f"not evaluated at this scale: lora-domains evaluate {name}. The adapter as it was is "
        f"version {before}: lora-domains rollback {name} {before}"
    )


# ── learning-curve, cross-validate ──────────────────────────────────────────────────────────────


def _add_learning_curve(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "learning-curve", learning_curve,
        usage="RECIPE_OR_FILE [options]",
        description="Train on growing shares of the rows, from two seeds each, and score them on "
        "the validation rows. Writes DIR/NAME-learning-curve.json; no adapter is saved and no "
        "test row scored.",
        example="lora-domains learning-curve train.csv --label priority --sizes 0.25,0.5,1",
    )  # fmt: skip
    _add_flags_of_trainings(parser).add_argument(
        "--sizes", type=numbers, metavar="S,S,…", help="shares of the training rows; default: "
        "0.125,0.25,0.5,1")  # fmt: skip
    parser.set_defaults(name=None, **run_flag_defaults())


def _add_cross_validate(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "cross-validate", cross_validate,
        usage="RECIPE_OR_FILE [options]",
        description="Divide the rows for training and validation into folds, and score each fold "
        "with an adapter trained on the others. For fewer than 300 rows in all. Writes "
        "DIR/NAME-folds.json; no adapter is saved and no test row scored.",
        example="lora-domains cross-validate train.csv --label priority --folds 5",
    )  # fmt: skip
    _add_flags_of_trainings(parser).add_argument(
        "--folds", type=int, default=FOLDS, metavar="N", help="number of folds; default: "
        "%(default)s")  # fmt: skip
    parser.set_defaults(name=None, **run_flag_defaults())


def _add_flags_of_trainings(parser: Parser) -> Any:
    """The flags of a verb that trains several adapters; returns the group on training."""
    inputs = parser.add_argument_group("input")
    inputs.add_argument("rows", metavar="RECIPE_OR_FILE", help="a recipe, or the training rows")
    inputs.add_argument("--name", metavar="NAME", help="name of the domain; default: that of the "
                        "file")  # fmt: skip
    add_task_flag(inputs)
    add_row_flags(inputs)
    add_column_flags(inputs)
    add_base_flags(inputs, trained=True)
    training = parser.add_argument_group("training")
    add_training_flags(training)
    training.add_argument("--seed", type=int, metavar="N", help="seed of splits and training")
    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--positive", metavar="LABEL", help="the class whose F1 is measured")
    add_metric_flag(evaluation)
    output = parser.add_argument_group("output")
    output.add_argument("--reports", default="reports", metavar="DIR", help="folder of the JSON "
                        "file; default: %(default)s")  # fmt: skip
    output.add_argument("--out", default=ADAPTERS, metavar="DIR", help="folder of adapters, for "
                        "checkpoints during training; default: %(default)s")  # fmt: skip
    add_quiet_flag(output)
    return training


def learning_curve(flags: argparse.Namespace) -> int:
    """Train on growing shares of the rows."""
    model, domain = _opened(flags)
    from lora_domains.analysis import learning_curve as analysis

    def measure() -> dict[str, Any]:
        return analysis.learning_curve(model, domain, flags.sizes or analysis.SHARES)

    name = f"{domain.name}-learning-curve"
    return _measured(flags, model, name, measure, analyses.learning_curve)


def cross_validate(flags: argparse.Namespace) -> int:
    """Train and score each fold."""
    model, domain = _opened(flags)
    from lora_domains.analysis.cross_validation import cross_validate as analysis

    def measure() -> dict[str, Any]:
        return analysis(model, domain, flags.folds)

    return _measured(flags, model, f"{domain.name}-folds", measure, analyses.cross_validation)


def _opened(flags: argparse.Namespace) -> "tuple[DomainModel, Domain]":
    """A model on the base in ``flags``, on that of the recipe or on one at hand; and the domain."""
    domain = _domain(flags)  # a file that is no recipe, or has no such column, is found first
    if not flags.base and Path(flags.rows).suffix == ".py":
        flags.base = own_base([flags.rows])
    domain, why = with_base(domain, flags)
    model = open_model(flags)
    if why:
        model.display.stage("base", None, None, why)
    return model, domain


def _measured(
    flags: argparse.Namespace, model: "DomainModel", name: str,
    measure: Callable[[], dict[str, Any]], show: Callable[[Any, Mapping[str, Any]], None],
) -> int:  # fmt: skip
    """Measure, show, and write the figures to ``NAME.json``."""
    path = Path(flags.reports) / f"{name}.json"
    check_writable(path)  # before hours of training
    measured = measure()
    show(model.display.console, measured)
    if not model.display.quiet:
        write_files({path: json.dumps(measured, indent=1) + "\n"})
        model.display.line(f"The figures: {path}")
    return 0


# ── The domain of a curve ───────────────────────────────────────────────────────────────────────


def _domain(flags: argparse.Namespace, settings: Mapping[str, Any] | None = None) -> Domain:
    """The domain of a recipe or of rows in a file, with the changes in ``flags``.

    ``settings`` are those in the card of an adapter that was trained on the rows.
    """
    if Path(flags.rows).suffix == ".py":
        return configured(load_domain(flags.rows), flags)
    flags.train = flags.rows
    if settings is None:
        return proposed(flags).domain
    task, training = task_from_record(settings["task"]), settings["training"]
    domain = Domain(flags.name or domain_name(Path(flags.rows)), task, Data(flags.rows))
    split_by = settings.get("data", {}).get("seed", training["seed"])
    domain = with_settings(domain, seed=split_by, max_length=training["max_length"])
    return configured(domain, flags)


def numbers(text: str) -> list[float]:
    """An argument like ``0.5,1``."""
    return [float(part) for part in text.split(",")]
