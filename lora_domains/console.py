"""What a run looks like: the stages, the ledger, a row per epoch, the scores, the verdict.

In a terminal with colour, boxes and progress bars; elsewhere (a log, a pipe, CI) as plain lines.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lora_domains.report.text import SIGNS, interval, losses, nats_of, percent

COLOURS = {"pass": "green", "fail": "red", "inconclusive": "yellow", "not applicable": "dim"}


class Advance(Protocol):
    """Moves a progress bar on, with a note beside it."""

    def __call__(self, done: int, note: str = "", /) -> None: ...


class Display:
    """Prints for people; ``quiet`` prints nothing (other ranks, tests)."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or Console(highlight=False, quiet=quiet)
        if not self.console.is_terminal:
            # A log has no width; wrapping at 80 would break lines in the middle of a figure.
            self.console = Console(
                file=self.console.file, highlight=False, quiet=quiet, width=160, no_color=True
            )
        self._epochs_shown = False

    def title(self, text: str) -> None:
        self.console.print()
        self.console.rule(f"[bold]{escape(text)}", align="left", style="dim")

    def line(self, text: str) -> None:
        self.console.print(escape(text))

    def pulse(self, text: str) -> None:
        """A sign of life for a log, where no bar is drawn."""
        if not self.console.is_terminal:
            self.line(text)

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]Warning:[/] {escape(text)}")

    def stage(self, name: str, rows_in: int | None, rows_out: int | None, what: str) -> None:
        """One stage of the data flow: its name, rows in → rows out, what it did."""
        if rows_in is None and rows_out is None:
            flow = ""
        else:
            flow = f"{'' if rows_in is None else rows_in} → {'' if rows_out is None else rows_out}"
        self.console.print(f"[bold cyan]{escape(name):<12}[/]{flow:>14}  {escape(what)}")

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Advance]:
        """A bar that the yielded function advances; a silent counter where there is no terminal."""
        if self.quiet or not self.console.is_terminal:
            yield lambda _done, _note="": None
            return
        bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            transient=True,
        )
        with bar:
            task = bar.add_task(what, total=total, note="")

            def advance(done: int, note: str = "", /) -> None:
                bar.update(task, advance=done, note=note)

            yield advance

    def ledger(self, ledger: Mapping[str, int], splits: Mapping[str, int]) -> None:
        rows = "  ".join(f"{name} {count}" for name, count in splits.items())
        self.stage("ledger", None, None, f"{rows}")
        parts = [f"{name.replace('_', ' ')} {count}" for name, count in ledger.items()]
        self.stage("", None, None, "  ".join(parts))

    def epoch(self, record: Mapping[str, Any], metric: str, note: str = "") -> None:
        """One line of the table of epochs, under its heading the first time."""
        if not record["higher_is_better"]:
            metric = "nats per token"  # answers are not generated every epoch
        columns = ["epoch", "training loss", "validation loss", "accuracy", metric]
        widths = [5, 13, 15, 8, max(8, len(metric))]
        watched = "general_kl" in record
        if watched:
            columns += ["general nats", "KL"]
            widths += [12, 5]
        if not self._epochs_shown:
            self._epochs_shown = True
            head = "  ".join(f"{c:>{w}}" for c, w in zip(columns, widths, strict=True))
            self.console.print(f"[bold]{head}  observation[/]")
        cells = [
            str(record["epoch"]),
            f"{record['training_loss']:.4f}",
            f"{record['validation_loss']:.4f}",
            "–" if record["accuracy"] is None else f"{record['accuracy']:.3f}",
            f"{record['score']:.3f}",
        ]
        if watched:
            cells += [f"{record['general_nats']:.3f}", f"{record['general_kl']:.3f}"]
        line = "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))
        said = record["observation"] + (f" ({note})" if note else "")
        self.console.print(f"{line}  {escape(said)}")

    def scores(self, entry: Mapping[str, Any]) -> None:
        """Base, adapter and baselines on the same unseen rows."""
        scores = entry["domain_scores"]
        if not scores:
            return
        names = list(dict.fromkeys(n for fields in scores.values() for n in fields["baselines"]))
        n = next(iter(scores.values()))["n"]
        self.title(f"On {n} rows that were not trained on")
        table = _table(["", "base", *names, "adapter", "adapter − base, 95 % bounds"])
        for metric, fields in scores.items():
            middle = [fields["baselines"].get(name) for name in names]
            shown = ["–" if v is None else f"{v:.3f}" for v in (fields["base"], *middle)]
            table.add_row(
                metric.replace("_", " "), *shown, f"[bold]{fields['adapter']:.3f}[/]",
                interval(fields),
            )  # fmt: skip
        self.console.print(table)
        self.line(losses(entry))
        if "over_parent" in entry:
            parent = (entry.get("parent") or {}).get("name", "the parent")
            metric = entry["judged"]["metric"]
            self.line(
                f"adapter − {parent}, which it went on from: "
                f"{metric.replace('_', ' ')} {interval(entry['over_parent'][metric])}"
            )
        if "confusion" in entry:
            self.console.print()
            self.confusion(entry["confusion"])

    def confusion(self, confusion: Mapping[str, Any], most: int = 8) -> None:
        """The confusion matrix drawn; of many classes only the commonest confusions are listed."""
        labels, counts = confusion["labels"], confusion["adapter"]
        if len(labels) > most:
            pairs = sorted(
                (
                    (counts[i][j], labels[i], labels[j])
                    for i in range(len(labels))
                    for j in range(len(labels))
                    if i != j and counts[i][j]
                ),
                key=lambda pair: (-pair[0], pair[1]),
            )
            self.line(f"Confusion of {len(labels)} classes, the most frequent mistakes:")
            for count, truth, said in pairs[:6]:
                self.line(f"  {count:>4} × {truth} taken for {said}")
            return
        table = _table(["true ↓  said →", *labels, "", *(f"base: {label}" for label in labels)])
        for i, label in enumerate(labels):
            row = [_cell(counts[i], j, i == j) for j in range(len(labels))]
            before = [str(v) for v in confusion["base"][i]]
            table.add_row(escape(label), *row, "", *before)
        self.console.print(table)

    def general(self, entry: Mapping[str, Any]) -> None:
        """General knowledge before and after, with its interval."""
        general = entry["general"]
        if not general:
            return
        self.title("General knowledge, which nobody trained on")
        table = _table(["", "before", "after", "difference, 95 % bounds", "items"])
        for suite, fields in general.items():
            if "difference" not in fields:
                continue
            is_text = suite == "nats"
            name = f"{nats_of(entry)} of general text" if is_text else suite
            show = "{:.3f}".format if is_text else percent
            change = interval(fields) if is_text else interval(fields, 100, 1) + " points"
            style = "bold" if suite == "pooled" else None
            row = [name, show(fields["base"]), show(fields["adapter"]), change, str(fields["n"])]
            table.add_row(*row, style=style)
        self.console.print(table)
        if "kl" in general:
            kl = general["kl"]
            low, high = ("?" if kl[k] is None else f"{kl[k]:.4f}" for k in ("lower", "upper"))
            self.line(
                f"KL from the base on general text: {kl['general']:.4f} nats per token "
                f"({low} to {high})"
            )

    def comparison(self, found: Mapping[str, Any]) -> None:
        """Two adapters on the same items (see ``comparison.compare_adapters``)."""
        n = found["scores"][found["metric"]]["n"]
        self.title(f"{found['b']} against {found['a']} on the same {n} rows")
        table = _table(["", found["a"], found["b"], "difference, 95 % bounds", "won", "lost"])
        parts = [*found["scores"].items()]
        parts += [("general knowledge", found["general"])] if found["general"] else []
        for name, fields in parts:
            counts = ["–" if fields[k] is None else str(fields[k]) for k in ("won", "lost")]
            table.add_row(
                name.replace("_", " "), f"{fields['base']:.3f}", f"{fields['adapter']:.3f}",
                interval(fields), *counts,
            )  # fmt: skip
        self.console.print(table)
        self.gates(found)

    def seeds(self, found: Mapping[str, Mapping[str, Any]]) -> None:
        """Runs from several seeds (see ``seeds.seeds``): their figures, seed and items apart."""
        first = next(iter(found.values()))
        self.title(f"{first['runs']} seeds on the same {first['n']} rows")
        table = _table(["adapter − base", "each seed", "mean, 95 % bounds over seeds and items",
                        "sd between seeds", "s.e. by items"])  # fmt: skip
        for metric, fields in found.items():
            each = "  ".join(f"{value:+.3f}" for value in fields["each"])
            spread = [f"{fields[key]:.4f}" for key in ("sd_seed", "se_items")]
            table.add_row(metric.replace("_", " "), each, interval(fields), *spread)
        self.console.print(table)

    def gates(self, entry: Mapping[str, Any]) -> None:
        """The gates with their reasons, then the verdict."""
        self.title("Gates")
        table = Table(box=None, show_header=False, padding=(0, 1), pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for gate in entry["gates"]:
            colour = COLOURS[gate["verdict"]]
            sign = f"[{colour}]{SIGNS[gate['verdict']]} {gate['verdict']}[/]"
            table.add_row(sign, gate["name"], escape(gate["why"]))
        self.console.print(table)
        colour = COLOURS[entry["verdict"]]
        self.console.print()
        self.console.print(f"Verdict: [bold {colour}]{entry['verdict']}[/]")

    # What people ask of an adapter

    def trace(self, found: Mapping[str, Any], most_moved: Sequence[int]) -> None:
        """One text through base and adapter (see ``trace.Trace``, as a mapping)."""
        labels, answer = found["labels"], found["answer"]
        at = labels.index(answer)
        self.title(f"{found['domain']} says {answer!r}")
        cut = [("✂ ", "red")] + [(token, "red strike") for token in found["cut"]]
        shown = [(token, "") for token in found["before"]] + (cut if found["cut"] else [])
        shown += [(token, "") for token in found["after"]]
        text = Text()
        for n, (token, style) in enumerate(shown):
            text.append("│" if n else "", style="dim")
            text.append(token.replace("\n", "⏎"), style=style)
        self.console.print(text)
        read = len(found["before"]) + len(found["after"])
        self.line(f"{read} tokens read, {len(found['cut'])} cut from the middle.")
        if not found["layers"]:
            self.line(f"Base and adapter write the same: {answer}")
            return
        self.console.print()
        table = _table(["label", "base", "adapter"])
        for label, base, adapter in zip(labels, found["base"], found["adapter"], strict=True):
            table.add_row(
                escape(label), percent(base), percent(adapter), style=_bold(label == answer)
            )
        self.console.print(table)
        self.title(f"Where in the layers: log-odds of {answer!r}, in nats")
        columns = ["layer", "base read off", "adapter read off", "adapter up to here", "moved by"]
        table = _table([*columns, ""])
        widest = max(abs(layer["moved"]) for layer in found["layers"]) or 1.0
        for layer in found["layers"]:
            figures = [f"{layer[k]:+.2f}" for k in ("base", "adapter", "upto", "moved")]
            table.add_row(str(layer["number"]), *figures, signed_bar(layer["moved"] / widest))
        self.console.print(table)
        end = found["start"] + sum(layer["moved"] for layer in found["layers"])
        self.line(
            f"The adapter moved {answer!r} from {percent(found['base'][at])} to "
            f"{percent(found['adapter'][at])} (log-odds {found['start']:+.2f} to {end:+.2f}), "
            f"half of it in layer{'s' * (len(most_moved) > 1)} {', '.join(map(str, most_moved))}."
        )

    def scale_curve(self, curve: Mapping[str, Any]) -> None:
        """Gain and what was kept at each scale (see ``scale.scale_curve``)."""
        metric = curve["metric"].replace("_", " ")
        self.title(f"Scale of the adapter: {metric} on {curve['rows']} validation rows")
        table = _table(["scale", metric, "", "− base, 95 % bounds", "nats per token", "KL", ""])
        points = curve["points"]
        tops = {k: max((abs(point[k]) for point in points), default=0) for k in ("score", "kl")}
        for point in points:
            best = point["scale"] == curve["best"]
            table.add_row(
                f"{point['scale']:g}", f"{point['score']:.3f}",
                bar(point["score"] / (tops["score"] or 1)), interval(point),
                f"{point['nats']:.3f}", f"{point['kl']:.4f}", bar(point["kl"] / (tops["kl"] or 1)),
                style=_bold(best),
            )  # fmt: skip
        self.console.print(table)
        base = curve["base"]
        self.line(
            f"Base: {metric} {base['score']:.3f}, {base['nats']:.3f} nats per token of "
            f"{curve['texts']} general texts that no gate reads."
        )
        self.line(f"Best on these rows: scale {curve['best']:g}.")
        if curve["least"] is not None and curve["least"] < 1:
            self.line(
                f"Scale {curve['least']:g} loses less than {curve['loss']:g} of it against scale 1 "
                "(95 % bound)."
            )

    def learning_curve(self, curve: Mapping[str, Any]) -> None:
        """The metric over the training rows (see ``learning.learning_curve``)."""
        metric = curve["metric"].replace("_", " ")
        self.title(
            f"{curve['domain']}: {metric} on {curve['test_rows']} test rows, by training rows"
        )
        before = {"base": curve["base"], "base with a few rows in its prompt": curve["few_shot"]}
        named = [(name, score) for name, score in before.items() if score is not None]
        named += [(f"{point['rows']} rows", point["score"]) for point in curve["points"]]
        if "augmented" in curve:
            named.append(("all rows, and edited copies", curve["augmented"]["score"]))
        top = max(abs(score) for _, score in named) or 1.0
        table = _table(["", metric, ""])
        for name, score in named:
            table.add_row(name, f"{score:.3f}", bar(score / top))
        self.console.print(table)
        if "augmented" in curve:
            self.line(f"Edited copies against none: {interval(curve['augmented'])}.")
        self.console.print(escape(f"Would more data help? {curve['answer']}"), soft_wrap=True)


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
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", border_style="dim"
    )
    for index, name in enumerate(columns):
        table.add_column(escape(name), justify="right" if index and name else "left")
    return table


def _cell(row: Sequence[int], j: int, right: bool) -> Text:
    """A count with a bar of its share of the row, green on the diagonal, red off it."""
    share = row[j] / max(sum(row), 1)
    bar = "▏▎▍▌▋▊▉█"[min(7, int(share * 8))] if row[j] else " "
    return Text(f"{row[j]} {bar}", style="green" if right else "red" if row[j] else "dim")
