"""The tables of cards, reports and analyses for a terminal or a log."""

from collections.abc import Mapping, Sequence
from textwrap import wrap
from typing import Any, Literal

from markupsafe import Markup
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lora_domains.errors import in_lines
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
from lora_domains.verdict import best_baseline, contender_label, metric_info
from lora_domains.verdict.rules import capital

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not applicable": "dim",
           "warning": "yellow", "note": "dim"}  # fmt: skip
CLASSES = 8
"""The most frequent mistakes stand for the confusion of more classes."""
LABELS = 12
"""Of more labels, those with the lowest F1 are shown."""
NARROW = 8
"""Characters of a line in a long heading, so that the table fits 80 columns."""
LONGEST = 24
"""Characters of a word that is not broken in the first column of a table."""
ROOM = 44
"""Characters of a line at least in a column of text; with fewer it goes below."""
BOUNDS = "difference (95 % bounds)"
Figures = Mapping[str, Any]


def title(console: Console, text: str) -> None:
    console.print()
    if cell_len(text) + 4 > console.width:  # a rule would cut it off
        line(console, text, style="bold")
        text = ""
    console.rule(f"[bold]{escape(text)}" if text else "", align="left", style="dim")


def line(console: Console, text: str, head: str | Text = "", style: str = "") -> None:
    """``head`` and ``text``; what does not fit is continued under ``text``.

    A word that is too long (a path) stays whole, so that it can be copied.
    """
    begin = Text(head) if isinstance(head, str) else head
    room = max(20, console.width - begin.cell_len)
    continued = f"\n{'':{begin.cell_len}}".join(in_lines(text, room, cell_len))
    console.print(Text.assemble(begin, (continued, style)), soft_wrap=True)


# ── One adapter ─────────────────────────────────────────────────────────────────────────────────


def evaluation(console: Console, entry: AdapterEntry, since: Figures | None = None) -> None:
    """The conclusion, the gates behind it, then all figures."""
    verdict(console, entry.outcome)
    line(console, conclusion(entry, since), style="bold")
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
    scores_of(entry.domain_scores).print(console)
    if entry.without_near_leaks:
        console.print()
        line(console, without_near_leaks(entry))
        scores_of(entry.without_near_leaks).print(console)
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
    scores_of(by_metric).print(console)


def scores_of(by_metric: Mapping[str, Figures]) -> "Grid":
    """Base, baselines and adapter by metric; the best baseline is the last to be left out."""
    names = list(dict.fromkeys(n for fields in by_metric.values() for n in fields["baselines"]))
    names = [name for name in names if name != "parent"]  # which has a line of its own
    labels = {name: "\n".join(wrap(contender_label(name), NARROW)) for name in names}
    metric, first = next(iter(by_metric.items()))
    best = best_baseline(metric_info(metric), {n: first["baselines"].get(n) for n in names})
    others = [labels[name] for name in names if best is None or name != best[0]]
    spare = [*([labels[best[0]]] if best else []), BOUNDS, *others]
    grid = Grid(["", "base", *labels.values(), "adapter", BOUNDS], spare)
    for metric, fields in by_metric.items():
        middle = [fields["baselines"].get(name) for name in names]
        shown = ["–" if v is None else f"{v:.3f}" for v in (fields["base"], *middle)]
        adapter = Text(f"{fields['adapter']:.3f}", "bold")
        grid.add(metric_name(metric), *shown, adapter, interval(fields))
    return grid


def confusion(console: Console, found: Figures, most: int = CLASSES) -> None:
    """The confusion matrix; its most frequent mistakes where it is too wide."""
    labels = found["labels"]
    grid = Grid(["true ↓  predicted →", *labels, "", *(f"base: {label}" for label in labels)])
    for i, label in enumerate(labels):
        row = [_cell(found["adapter"][i], j, i == j) for j in range(len(labels))]
        grid.add(label, *row, "", *map(str, found["base"][i]))
    if len(labels) <= most and grid.fits(console):
        grid.print(console)
        return
    mistakes = most_confused(found)[:6]
    if not mistakes:
        line(console, f"No row of any of the {len(labels)} classes was predicted as another class.")
        return
    line(console, f"Confusion of {len(labels)} classes, the most frequent mistakes:")
    for count, truth, predicted in mistakes:
        line(console, f"{truth} predicted as {predicted}", f"  {count:>4} × ")


def per_label(console: Console, found: Mapping[str, Figures], most: int = LABELS) -> None:
    """Figures of each label where rows may have several; of many, those with the lowest F1."""
    weakest = sorted(found, key=lambda label: float(found[label]["f1"]))[:most]
    tuned = any("threshold" in figures for figures in found.values())
    heads = ["label", "precision", "recall (at least)", "F1", "rows"]
    grid = Grid([*heads, *(["from"] if tuned else [])], ["rows", "from"])
    for label in (name for name in found if name in weakest):
        row = found[label]
        recall = f"{row['recall']:.3f} ({row['recall_lower']:.3f})"
        shown = [f"{row['precision']:.3f}", recall, f"{row['f1']:.3f}", str(row["support"])]
        grid.add(label, *shown, *([number(row.get("threshold"))] if tuned else []))
    grid.print(console)
    if len(found) > most:
        line(console, f"Of {len(found)} labels, the {most} with the lowest F1.")


def general(console: Console, entry: AdapterEntry) -> None:
    """General knowledge before and after, with its bounds."""
    if not entry.general:
        return
    title(console, "General knowledge")
    general_of(entry).print(console)
    if "kl" in entry.general:
        kl = entry.general["kl"]
        low, high = ("?" if kl[k] is None else f"{kl[k]:.4f}" for k in ("lower", "upper"))
        between = f"{kl['general']:.4f} nats per token ({low} to {high})"
        line(console, f"KL from the base on general text: {between}")


def general_of(entry: AdapterEntry) -> "Grid":
    """Each suite of general questions, and nats on general text, before and after."""
    grid = Grid(["", "before", "after", "points (95 % bounds)", "items"], ["before", "items"])
    for suite, fields in entry.general.items():
        if "difference" not in fields:
            continue
        is_text = suite == "nats"
        name = f"{nats_of(entry)} of general text" if is_text else suite
        show = "{:.3f}".format if is_text else percent
        change = interval(fields) if is_text else points(fields)
        row = [name, show(fields["base"]), show(fields["adapter"]), change, str(fields["n"])]
        grid.add(*row, bold=suite == "pooled")
    return grid


def gates(console: Console, found: Sequence[Figures]) -> None:
    """The gates that decide with their reasons, then those that inform."""
    title(console, "Gates")
    for heading, part in zip((None, INFORMS), decisive(found), strict=True):
        if not part:
            continue
        if heading:
            console.print(f"\n{heading}")
        _reasons(console, part)


def _reasons(console: Console, part: Sequence[Figures]) -> None:
    """Verdict, name and reason of each gate, in columns where the reasons have room."""
    signs = [f"{SIGNS[gate['verdict']]} {gate['verdict']}" for gate in part]
    widths = max(map(cell_len, signs)), max(cell_len(gate["name"]) for gate in part)
    columns = console.width - sum(widths) - 4 >= ROOM
    for gate, sign in zip(part, signs, strict=True):
        head = Text(f"{sign:<{widths[0]}}  " if columns else f"{sign} ")
        head.stylize(COLOURS[gate["verdict"]])
        if columns:
            line(console, gate["why"], head.append(f"{gate['name']:<{widths[1]}}  ", "default"))
        else:
            console.print(head.append(gate["name"], "default"), soft_wrap=True)
            line(console, gate["why"], "  ")


# ── Several adapters ────────────────────────────────────────────────────────────────────────────


def report(console: Console, found: Report) -> None:
    """What to do, the conclusion on each adapter, and what got worse."""
    line(console, f"{headline(found)}.", style="bold")
    for entry in ranked(found):
        sign = Text(f"{SIGNS[entry.outcome]} ", COLOURS[entry.outcome])
        line(console, conclusion(entry, found.since), sign)
    if found.since:
        for sentence in worsened(found.since):
            line(console, f"since {found.since['report']}: {sentence}", "  ")


def comparison(console: Console, found: Figures) -> None:
    """Two adapters on the same items (see ``analysis.compare.compare_adapters``)."""
    n = found["scores"][found["metric"]]["n"]
    names = [found["a"], found["b"]]
    title(console, f"{names[1]} against {names[0]} on the same {n} rows")
    if max(map(cell_len, names)) > 2 * NARROW:
        for letter, name in zip("AB", names, strict=True):
            line(console, name, f"{letter}: ")
        names = ["A", "B"]
    grid = Grid(["", *names, BOUNDS, "won", "lost"], ["lost", "won"])
    parts = [*found["scores"].items()]
    parts += [("general knowledge", found["general"])] if found["general"] else []
    for name, fields in parts:
        counts = ["–" if fields[k] is None else str(fields[k]) for k in ("won", "lost")]
        values = [f"{fields[k]:.3f}" for k in ("base", "adapter")]
        grid.add(metric_name(name), *values, interval(fields), *counts)
    grid.print(console)
    gates(console, found["gates"])
    verdict(console, found["verdict"])


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


class Grid:
    """A table that breaks no figure: where it is too wide, its columns come closer together, and
    then some are left out.

    Figures are right-justified. Only the first column may wrap, between words.
    """

    def __init__(self, heads: Sequence[str], spare: Sequence[str] = ()) -> None:
        """``spare`` names the columns that may be left out, the most important first."""
        self.heads = list(heads)
        self.spare = [head for head in spare if head in self.heads]
        self.rows: list[tuple[tuple[str | Text, ...], bool]] = []

    def add(self, *cells: str | Text, bold: bool = False) -> None:
        self.rows.append((cells, bold))

    def print(self, console: Console) -> None:
        """Print what fits, and name the columns that do not."""
        left_out: list[str] = []
        while not self.fits(console, left_out) and len(left_out) < len(self.spare):
            left_out = self.spare[len(self.spare) - len(left_out) - 1 :]
        gap = 1 if self.fits(console, left_out, gaps=(1,)) else 0
        for segments in console.render_lines(self._table(left_out, gap), pad=False):
            parts = Text.assemble(*((part.text, part.style or "") for part in segments))
            parts.rstrip()
            console.print(parts, soft_wrap=True)
        if named := ", ".join(" ".join(head.split()) for head in left_out if head.strip()):
            line(console, f"Too narrow for: {named}.", style="dim")

    def html(self) -> Markup:
        """The table for a notebook, all text escaped."""
        columns = zip(*(cells for cells, _ in self.rows), strict=True) if self.rows else self.heads
        text = [any(str(cell)[:1].isalpha() for cell in column) for column in columns]
        sides = ["left" if words or not at else "right" for at, words in enumerate(text)]
        heads = [" ".join(head.split()) for head in self.heads]
        rows = [(Markup("<tr>{}</tr>"), "th", heads)]
        for cells, bold in self.rows:
            line = Markup('<tr style="font-weight:bold">{}</tr>' if bold else "<tr>{}</tr>")
            rows.append((line, "td", [str(cell) for cell in cells]))
        cell = Markup('<{0} style="text-align:{1}">{2}</{0}>')
        lines = [
            line.format(
                Markup("").join(
                    cell.format(Markup(tag), side, text)
                    for side, text in zip(sides, cells, strict=True)
                )
            )
            for line, tag, cells in rows
        ]
        return Markup("<table>{}</table>").format(Markup("").join(lines))

    def fits(
        self, console: Console, left_out: Sequence[str] = (), gaps: Sequence[int] = (1, 0)
    ) -> bool:
        """Whether no word must be broken without the columns ``left_out``."""
        names = [str(cells[0]) for cells, _ in self.rows] + [self.heads[0]]
        words = [word for name in names for word in name.split(" ")]
        # A longer word, such as a label, is broken where that keeps the figures.
        longest = min(max(map(cell_len, words)), LONGEST)
        spare = max(map(cell_len, names)) - longest
        wide = console.options.update(max_width=10_000)
        return any(
            console.measure(self._table(left_out, gap), options=wide).maximum - spare
            <= console.width
            for gap in gaps
        )

    def _table(self, left_out: Sequence[str], gap: int) -> Table:
        kept = [at for at, head in enumerate(self.heads) if head not in left_out]
        table = Table(
            box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0),
            header_style="bold", border_style="dim",
        )  # fmt: skip
        for at in kept:
            name = self.heads[at]
            justify: Literal["right", "left"] = "right" if at and name.strip() else "left"
            table.add_column(escape(name), justify=justify, no_wrap=at > 0, overflow="fold")
        for cells, bold in self.rows:
            shown = [escape(c) if isinstance(c, str) else c for c in (cells[at] for at in kept)]
            table.add_row(*shown, style="bold" if bold else None)
        return table


def _cell(row: Sequence[int], j: int, right: bool) -> Text:
    """A count with a bar of its share of the row, green on the diagonal, red off it."""
    share = row[j] / max(sum(row), 1)
    level = "▏▎▍▌▋▊▉█"[min(7, int(share * 8))] if row[j] else " "
    return Text(f"{row[j]} {level}", style="green" if right else "red" if row[j] else "dim")
