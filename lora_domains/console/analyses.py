"""What analyses of an adapter or its rows found, for a terminal or a log."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev

from rich.console import Console
from rich.text import Text

from lora_domains.report.terminal import (
    BOUNDS,
    Figures,
    Grid,
    bar,
    line,
    scores_of,
    signed_bar,
    title,
)
from lora_domains.report.text import (
    interval,
    metric_name,
    number,
    percent,
    setting_name,
    setting_value,
)
from lora_domains.verdict import metric_info


def trace(console: Console, found: Figures, most_moved: Sequence[int]) -> None:
    """One text through base and adapter (see ``analysis.trace.Trace``, as a mapping)."""
    labels, answer = found["labels"], found["answer"]
    title(console, f"{found['domain']} answers {answer!r}")
    console.print(_tokens(found))
    read = len(found["before"]) + len(found["after"])
    line(console, f"{read} tokens read, {len(found['cut'])} cut from the middle.")
    if not found["layers"]:
        line(console, f"Base and adapter write the same: {answer}")
        return
    console.print()
    grid = Grid(["label", "base", "adapter"])
    for label, base, adapter in zip(labels, found["base"], found["adapter"], strict=True):
        grid.add(label, percent(base), percent(adapter), bold=label == answer)
    grid.print(console)
    title(console, f"Layer by layer: log-odds of {answer!r}, in nats")
    heads = ["layer", "base", "adapter", "adapter up to here", "change", " "]
    grid = Grid(heads, ["adapter up to here", "base", " "])
    widest = max(abs(layer["moved"]) for layer in found["layers"]) or 1.0
    for layer in found["layers"]:
        figures = [f"{layer[k]:+.2f}" for k in ("base", "adapter", "upto", "moved")]
        grid.add(str(layer["number"]), *figures, signed_bar(layer["moved"] / widest))
    grid.print(console)
    end = found["start"] + sum(layer["moved"] for layer in found["layers"])
    at = labels.index(answer)
    line(
        console,
        f"The adapter moved {answer!r} from {percent(found['base'][at])} to "
        f"{percent(found['adapter'][at])} (log-odds {found['start']:+.2f} to {end:+.2f}), "
        f"half of it in layer{'s' * (len(most_moved) > 1)} {', '.join(map(str, most_moved))}.",
    )


def _tokens(found: Figures) -> Text:
    """The tokens read, and those that were cut from the middle."""
    cut = [("✂ ", "red")] + [(token, "red strike") for token in found["cut"]]
    shown = [(token, "") for token in found["before"]] + (cut if found["cut"] else [])
    shown += [(token, "") for token in found["after"]]
    text = Text()
    for at, (token, style) in enumerate(shown):
        text.append("│" if at else "", style="dim")
        text.append(token.replace("\n", "⏎"), style=style)
    return text


def scale_curve(console: Console, curve: Figures) -> None:
    """Gain and retention at each scale (see ``analysis.scale_curve``)."""
    metric = metric_name(curve["metric"])
    title(console, f"Scale of the adapter: {metric} on {curve['rows']} validation rows")
    heads = ["scale", metric, " ", BOUNDS, "nats per token", "KL", "  "]
    grid = Grid(heads, [BOUNDS, "nats per token", "  ", " "])
    tops = {
        k: max((abs(point[k]) for point in curve["points"]), default=0) for k in ("score", "kl")
    }
    for point in curve["points"]:
        grid.add(
            f"{point['scale']:g}", f"{point['score']:.3f}",
            bar(point["score"] / (tops["score"] or 1)), interval(point),
            f"{point['nats']:.3f}", f"{point['kl']:.4f}", bar(point["kl"] / (tops["kl"] or 1)),
            bold=point["scale"] == curve["best"],
        )  # fmt: skip
    grid.print(console)
    base = curve["base"]
    line(
        console,
        f"Base: {metric} {base['score']:.3f}, {base['nats']:.3f} nats per token of "
        f"{curve['texts']} general texts that no gate reads.",
    )
    line(console, f"Best on these rows: scale {curve['best']:g}.")
    if curve["least"] is not None and curve["least"] < 1:
        less = f"{metric} is less than {curve['loss']:g} below its value at scale 1 (95 % bound)"
        line(console, f"At scale {curve['least']:g}, {less}.")


def learning_curve(console: Console, curve: Figures) -> None:
    """The metric over the number of training rows (see ``analysis.learning_curve``)."""
    metric = metric_name(curve["metric"])
    on = f"{metric} on {curve['validation_rows']} validation rows, by training rows"
    title(console, f"{curve['domain']}: {on}")
    named = [("base", curve["base"]), ("few-shot base", curve["few_shot"])]
    named = [(name, score) for name, score in named if score is not None]
    named += [(f"{point['rows']} rows", point["score"]) for point in curve["points"]]
    if "augmented" in curve:
        named.append(("all rows, and edited copies", curve["augmented"]["score"]))
    top = max(abs(score) for _, score in named) or 1.0
    grid = Grid(["", metric, " "], [" "])
    for name, score in named:
        grid.add(name, f"{score:.3f}", bar(score / top))
    grid.print(console)
    if "augmented" in curve:
        line(console, f"Edited copies against none: {interval(curve['augmented'])}.")
    line(console, f"Would more data help? {curve['answer']}")


def cross_validation(console: Console, found: Figures) -> None:
    """Base, adapter and baselines over all folds (see ``analysis.cross_validation``)."""
    title(console, f"{found['domain']}: {found['folds']} folds of {found['rows']:,} rows")
    scores_of(found["scores"]).print(console)
    line(console, found["answer"])


def seeds(console: Console, found: Mapping[str, Figures]) -> None:
    """Trainings from several seeds (see ``verdict.summary.over_seeds``): their figures, and the
    variance of the gain between seeds and between items.
    """
    first = next(iter(found.values()))
    title(console, f"{first['runs']} seeds on the same {first['n']} {first['rows']} rows")
    heads = ["", "base", "each seed", "mean", "sd", "lowest", "highest"]
    grid = Grid(heads, ["lowest", "highest", "each seed", "base"])
    for metric, fields in found.items():
        values = fields["adapter"]
        each = "  ".join(f"{value:.3f}" for value in values)
        shown = [f"{one:.3f}" for one in (fmean(values), stdev(values), min(values), max(values))]
        grid.add(metric_name(metric), f"{fields['base']:.3f}", each, *shown)
    grid.print(console)
    console.print()
    heads = ["adapter − base", "each seed", "mean, 95 % bounds\nover seeds and items",
             "sd between\nseeds", "s.e. by\nitems"]  # fmt: skip
    grid = Grid(heads, [heads[3], heads[4], heads[1]])
    for metric, fields in found.items():
        each = "  ".join(f"{value:+.3f}" for value in fields["each"])
        spread = [number(fields[key], 4) for key in ("sd_seed", "se_items")]
        grid.add(metric_name(metric), each, interval(fields), *spread)
    grid.print(console)


def sweep(console: Console, name: str, found: Figures) -> None:
    """The runs of a sweep (see ``joint.sweep``), the best first: it is saved as ``name``."""
    runs = found["runs"]
    title(console, f"{name}: {len(runs)} runs on the same {found['rows']:,} validation rows")
    settings, behind = list(runs[0]["settings"]), "difference from the best,\n95 % bounds"
    heads = ["run", *map(setting_name, settings), metric_name(found["metric"]), behind, "loss",
             "epoch"]  # fmt: skip
    grid = Grid(heads, [behind, "loss", "epoch"])
    for at, run in enumerate(runs):
        shown = [str(run["run"]), *(setting_value(run["settings"][name]) for name in settings)]
        if run["score"] is None:
            grid.add(*shown, "–", "its loss exploded", "–", "–")
            continue
        against = "kept" if not at else interval(run) if "difference" in run else "–"
        mark = "" if run["within_drift"] else " †"
        grid.add(*shown, f"{run['score']:.3f}{mark}", against, f"{run['loss']:.3f}",
                 f"{run['best_epoch']:g}", bold=not at)  # fmt: skip
    grid.print(console)
    if any(run["score"] is not None and not run["within_drift"] for run in runs):
        line(console, "† beyond the drift limit: kept only where every run is.")
    for sentence in advice(found):
        line(console, sentence)


def advice(found: Figures) -> list[str]:
    """What the runs of a sweep tell, and what they do not."""
    runs, metric = found["runs"], metric_info(found["metric"])
    others = [run for run in runs[1:] if run.get("upper") is not None]
    alike = sum(
        metric.sign * run["upper" if metric.higher_is_better else "lower"] >= 0
        for run in others if run["lower"] is not None
    )  # fmt: skip
    one = len(others) == 1
    sentences = []
    if alike:
        which = "The other run" if one else f"{alike} of the {len(others)} other runs"
        sentences.append(
            f"{which} cannot be told from the best on these rows: the bounds of the difference "
            "include 0."
        )
    elif others:
        which = "the other run" if one else "each of the other runs"
        sentences.append(f"The best is clearly better than {which} on these rows.")
    sentences.append(
        "The bounds are for other rows. Another seed moves each figure, too: fit --seeds 3 shows "
        f"how much. As the best of {len(runs)} on these rows, the figure of the best is optimistic."
    )
    return sentences
