"""The tables of cards, reports and analyses for a terminal or a log."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_domains.report.card import AdapterEntry, Report
from lora_domains.report.conclusion import conclusion, standing
from lora_domains.report.text import (
    INFORMS,
    SIGNS,
    decisive,
    headline,
    how_scored,
    interval,
    metric_name,
    most_confused,
    nats_of,
    number,
    percent,
    points,
    precision_elsewhere,
    ranked,
    without_near_leaks,
    worsened,
)
from lora_domains.verdict.rules import capital
from lora_domains.verdict.scores import contender_label

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not applicable": "dim",
           "warning": "yellow", "note": "dim"}  # fmt: skip
CLASSES = 8
"""The most frequent mistakes stand for the confusion of more classes."""
LABELS = 12
"""Of more labels, those with the lowest F1 are shown."""
NARROW = 8
"""Characters of a line in the heading of a baseline, so that the table fits 80 columns."""
BOUNDS = "difference (95 % bounds)"
Figures = Mapping[str, Any]


def title(console: Console, text: str) -> None:
    console.print()
    console.rule(f"[bold]{escape(text)}", align="left", style="dim")


def line(console: Console, text: str) -> None:
    console.print(escape(text))


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


def evaluation(console: Console, entry: AdapterEntry, since: Figures | None = None) -> None:
    """The conclusion, the gates behind it, then all figures."""
    verdict(console, entry.outcome)
    console.print(f"[bold]{escape(conclusion(entry, since))}[/]")
    if scored := standing(entry):
        line(console, scored)
    gates(console, entry.gates)
    scores(console, entry)
    general(console, entry)


def verdict(console: Console, outcome: str) -> None:
    """A heading with the verdict."""
    console.print()
    words = f"[bold]Verdict: [{COLOURS[outcome]}]{outcome}[/][/]"
    console.rule(words, align="left", style="dim")


def scores(console: Console, entry: AdapterEntry) -> None:
    """Base, adapter and baselines on the same test rows."""
    if not entry.domain_scores:
        return
    title(console, f"On {next(iter(entry.domain_scores.values()))['n']:,} test rows")
    _print(console, _scores(entry.domain_scores))
    if entry.without_near_leaks:
        console.print()
        line(console, without_near_leaks(entry))
        _print(console, _scores(entry.without_near_leaks))
    line(console, how_scored(entry))
    if entry.curve and (elsewhere := precision_elsewhere(entry.curve)):
        line(console, f"{capital(elsewhere)}.")
    if entry.over_parent:
        parent = entry.parent.name if entry.parent else "the parent"
        metric = entry.judged["metric"]
        over = entry.over_parent[metric]
        what = f"Parent {parent}: {metric_name(metric)} {over['parent']:.3f}"
        line(console, f"{what}; adapter − parent {interval(over)}")
    if entry.confusion:
        console.print()
        confusion(console, entry.confusion)
    elif entry.per_class:
        console.print()
        per_label(console, entry.per_class)


def validation(console: Console, by_metric: Mapping[str, Figures], rows: int) -> None:
    """Base, adapter and baselines on the rows that chose the adapter's epoch."""
    title(console, f"On {rows:,} validation rows, which chose the epoch: no verdict")
    _print(console, _scores(by_metric))


def _scores(by_metric: Mapping[str, Figures]) -> Table:
    names = list(dict.fromkeys(n for fields in by_metric.values() for n in fields["baselines"]))
    names = [name for name in names if name != "parent"]  # which has a line of its own
    labels = ["\n".join(wrap(contender_label(name), NARROW)) for name in names]
    table = _table(["", "base", *labels, "adapter", BOUNDS])
    for metric, fields in by_metric.items():
        middle = [fields["baselines"].get(name) for name in names]
        shown = ["–" if v is None else f"{v:.3f}" for v in (fields["base"], *middle)]
        adapter = f"[bold]{fields['adapter']:.3f}[/]"
        table.add_row(metric_name(metric), *shown, adapter, interval(fields))
    return table


def confusion(console: Console, found: Figures, most: int = CLASSES) -> None:
    """The confusion matrix; its most frequent mistakes where it is too wide."""
    labels = found["labels"]
    table = _table(["true ↓  predicted →", *labels, "", *(f"base: {label}" for label in labels)])
    for i, label in enumerate(labels):
        row = [_cell(found["adapter"][i], j, i == j) for j in range(len(labels))]
        table.add_row(escape(label), *row, "", *map(str, found["base"][i]))
    if len(labels) <= most and _fits(console, table):
        console.print(table)
        return
    line(console, f"Confusion of {len(labels)} classes, the most frequent mistakes:")
    for count, truth, predicted in most_confused(found)[:6]:
        line(console, f"  {count:>4} × {truth} predicted as {predicted}")


def per_label(console: Console, found: Mapping[str, Figures], most: int = LABELS) -> None:
    """Figures of each label where rows may have several; of many, those with the lowest F1."""
    weakest = sorted(found, key=lambda label: float(found[label]["f1"]))[:most]
    tuned = any("threshold" in figures for figures in found.values())
    heads = ["label", "precision", "recall (at least)", "F1", "rows"]
    table = _table([*heads, *(["from"] if tuned else [])])
    for label in (name for name in found if name in weakest):
        row = found[label]
        recall = f"{row['recall']:.3f} ({row['recall_lower']:.3f})"
        shown = [f"{row['precision']:.3f}", recall, f"{row['f1']:.3f}", str(row["support"])]
        table.add_row(escape(label), *shown, *([number(row.get("threshold"))] if tuned else []))
    _print(console, table)
    if len(found) > most:
        line(console, f"Of {len(found)} labels, the {most} with the lowest F1.")


def general(console: Console, entry: AdapterEntry) -> None:
    """General knowledge before and after, with its bounds."""
    if not entry.general:
        return
    title(console, "General knowledge")
    table = _table(["", "before", "after", "points (95 % bounds)", "items"])
    for suite, fields in entry.general.items():
        if "difference" not in fields:
            continue
        is_text = suite == "nats"
        name = f"{nats_of(entry)} of general text" if is_text else suite
        show = "{:.3f}".format if is_text else percent
        change = f"{interval(fields)} nats" if is_text else points(fields)
        row = [name, show(fields["base"]), show(fields["adapter"]), change, str(fields["n"])]
        table.add_row(*row, style=_bold(suite == "pooled"))
    _print(console, table)
    if "kl" in entry.general:
        kl = entry.general["kl"]
        low, high = ("?" if kl[k] is None else f"{kl[k]:.4f}" for k in ("lower", "upper"))
        between = f"{kl['general']:.4f} nats per token ({low} to {high})"
        line(console, f"KL from the base on general text: {between}")


def gates(console: Console, found: Sequence[Figures]) -> None:
    """The gates that decide with their reasons, then those that inform."""
    title(console, "Gates")
    for heading, part in zip((None, INFORMS), decisive(found), strict=True):
        if not part:
            continue
        if heading:
            console.print(f"\n{heading}")
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for gate in part:
            colour = COLOURS[gate["verdict"]]
            sign = f"[{colour}]{SIGNS[gate['verdict']]} {gate['verdict']}[/]"
            table.add_row(sign, gate["name"], escape(gate["why"]))
        console.print(table)


# ── Several adapters ────────────────────────────────────────────────────────────────────────────


def report(console: Console, found: Report) -> None:
    """What to do, the conclusion on each adapter, and what got worse."""
    console.print(f"[bold]{escape(headline(found))}.[/]")
    for entry in ranked(found):
        line(console, f"{SIGNS[entry.outcome]} {conclusion(entry, found.since)}")
    if found.since:
        for sentence in worsened(found.since):
            line(console, f"  since {found.since['report']}: {sentence}")


def comparison(console: Console, found: Figures) -> None:
    """Two adapters on the same items (see ``analysis.compare.compare_adapters``)."""
    n = found["scores"][found["metric"]]["n"]
    title(console, f"{found['b']} against {found['a']} on the same {n} rows")
    table = _table(["", found["a"], found["b"], BOUNDS, "won", "lost"])
    parts = [*found["scores"].items()]
    parts += [("general knowledge", found["general"])] if found["general"] else []
    for name, fields in parts:
        counts = ["–" if fields[k] is None else str(fields[k]) for k in ("won", "lost")]
        values = [f"{fields[k]:.3f}" for k in ("base", "adapter")]
        table.add_row(metric_name(name), *values, interval(fields), *counts)
    _print(console, table)
    gates(console, found["gates"])
    verdict(console, found["verdict"])


def seeds(console: Console, found: Mapping[str, Figures], rows: str) -> None:
    """Runs from several seeds (see ``stats.seeds``): variance between seeds and between items.

    ``rows`` says which rows they were scored on.
    """
    first = next(iter(found.values()))
    title(console, f"{first['runs']} seeds on the same {first['n']} {rows} rows")
    table = _table(["adapter − base", "each seed", "mean, 95 % bounds over seeds and items",
                    "sd between seeds", "s.e. by items"])  # fmt: skip
    for metric, fields in found.items():
        each = "  ".join(f"{value:+.3f}" for value in fields["each"])
        spread = [f"{fields[key]:.4f}" for key in ("sd_seed", "se_items")]
        table.add_row(metric_name(metric), each, interval(fields), *spread)
    _print(console, table)


# ── Analyses of one adapter ─────────────────────────────────────────────────────────────────────


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
    table = _table(["label", "base", "adapter"])
    for label, base, adapter in zip(labels, found["base"], found["adapter"], strict=True):
        row = [escape(label), percent(base), percent(adapter)]
        table.add_row(*row, style=_bold(label == answer))
    _print(console, table)
    title(console, f"Layer by layer: log-odds of {answer!r}, in nats")
    columns = ["layer", "base", "adapter", "adapter up to here", "change"]
    table = _table([*columns, ""])
    widest = max(abs(layer["moved"]) for layer in found["layers"]) or 1.0
    for layer in found["layers"]:
        figures = [f"{layer[k]:+.2f}" for k in ("base", "adapter", "upto", "moved")]
        table.add_row(str(layer["number"]), *figures, signed_bar(layer["moved"] / widest))
    _print(console, table)
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
    table = _table(["scale", metric, "", BOUNDS, "nats per token", "KL", ""])
    tops = {
        k: max((abs(point[k]) for point in curve["points"]), default=0) for k in ("score", "kl")
    }
    for point in curve["points"]:
        table.add_row(
            f"{point['scale']:g}", f"{point['score']:.3f}",
            bar(point["score"] / (tops["score"] or 1)), interval(point),
            f"{point['nats']:.3f}", f"{point['kl']:.4f}", bar(point["kl"] / (tops["kl"] or 1)),
            style=_bold(point["scale"] == curve["best"]),
        )  # fmt: skip
    _print(console, table)
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
    table = _table(["", metric, ""])
    for name, score in named:
        table.add_row(name, f"{score:.3f}", bar(score / top))
    _print(console, table)
    if "augmented" in curve:
        line(console, f"Edited copies against none: {interval(curve['augmented'])}.")
    console.print(escape(f"Would more data help? {curve['answer']}"), soft_wrap=True)


def cross_validation(console: Console, found: Figures) -> None:
    """Base, adapter and baselines over all folds (see ``analysis.cross_validation``)."""
    title(console, f"{found['domain']}: {found['folds']} folds of {found['rows']:,} rows")
    _print(console, _scores(found["scores"]))
    console.print(escape(found["answer"]), soft_wrap=True)


# ── Parts of tables ─────────────────────────────────────────────────────────────────────────────


def bar(share: float, width: int = 20) -> str:
    """A bar of ``share`` (0 to 1) of ``width`` cells, left-justified, to an eighth of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()).ljust(width)


def signed_bar(share: float, width: int = 10) -> str:
    """A bar to the left of its axis for negative shares, to the right for others (-1 to 1)."""
    cells = round(abs(max(-1.0, min(1.0, share))) * width)
    left, right = ("█" * cells, "") if share < 0 else ("", "█" * cells)
    return f"{left:>{width}}│{right:<{width}}"


def _bold(on: bool) -> str | None:
    return "bold" if on else None


def _table(columns: Sequence[str]) -> Table:
    table = Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0),
        header_style="bold", border_style="dim",
    )  # fmt: skip
    for index, name in enumerate(columns):
        # In a narrow terminal the first column wraps, never a figure.
        justify: Literal["right", "left"] = "right" if index and name else "left"
        table.add_column(escape(name), justify=justify, no_wrap=index > 0, overflow="fold")
    return table


def _print(console: Console, table: Table) -> None:
    _fits(console, table)
    console.print(table)


def _fits(console: Console, table: Table) -> bool:
    """Whether no word must be broken; the columns come closer together where that helps."""
    names = [*map(str, table.columns[0].cells)]  # only these may wrap
    spare = max(map(len, names)) - max(len(word) for name in names for word in name.split(" "))
    wide = console.options.update(max_width=10_000)
    for gap in (1, 0):
        table.padding = (0, gap, 0, 0)
        if console.measure(table, options=wide).maximum - spare <= console.width:
            return True
    return False


def _cell(row: Sequence[int], j: int, right: bool) -> Text:
    """A count with a bar of its share of the row, green on the diagonal, red off it."""
    share = row[j] / max(sum(row), 1)
    level = "▏▎▍▌▋▊▉█"[min(7, int(share * 8))] if row[j] else " "
    return Text(f"{row[j]} {level}", style="green" if right else "red" if row[j] else "dim")
