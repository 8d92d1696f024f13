"""A report as one HTML page: the verdict, the reasons, then everything that was measured.

The page holds its styles and charts, loads nothing and runs nothing. It works in light and dark, on
a phone, with a keyboard and with a screen reader. All text of a report is escaped.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lora_domains.report import charts, terminal
from lora_domains.report import text as wording
from lora_domains.report.card import AdapterEntry, Report
from lora_domains.report.conclusion import conclusion, standing
from lora_domains.verdict import best_baseline, contender_label, metric_info
from lora_domains.verdict.rules import capital

ASSETS = Path(__file__).parent / "assets"
CLASSES = 12
"""With more classes, only the most frequent confusions are listed."""


def page(report: Report) -> str:
    """The page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(ASSETS),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "number": wording.number,
        "percent": wording.percent,
        "interval": wording.interval,
        "how_scored": wording.how_scored,
        "without_near_leaks": wording.without_near_leaks,
        "metric": wording.metric_name,
        "chosen_among": wording.chosen_among,
        "contender": contender_label,
        "evaluations_of": wording.evaluations_of,
        "calibrated": wording.calibrated,
        "memorised": wording.memorised,
        "decided_by": wording.decided_by,
        "precision_elsewhere": wording.precision_elsewhere,
        "capital": capital,
    }
    adapters = list(_adapters(report))
    chart, left_out = _scatter(adapters)
    written = environment.get_template("report.html").render(
        report=report,
        style=(ASSETS / "report.css").read_text(encoding="utf-8"),
        outcome=wording.outcome(report),
        headline=wording.headline(report),
        counted=wording.counted(report),
        since=report.since,
        worsened=wording.worsened(report.since) if report.since else [],
        adapters=adapters,
        differing={key for a in report.adapters for key in a.environment},
        chart=chart,
        left_out=left_out,
        matrix=_matrix(report.matrix) if report.matrix else None,
        signs=wording.SIGNS,
        informs=wording.INFORMS,
    )
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", written)


# ── What the template shows of each adapter ─────────────────────────────────────────────────────


def _adapters(report: Report) -> Iterator[dict[str, Any]]:
    entries = wording.ranked(report)
    changes = [(wording.gained(entry), wording.kept(entry)) for entry in entries]
    # One scale for each column, so that the bars of adapters can be compared.
    shares = [f for gained, _ in changes if gained and metric_info(gained[0]).higher_is_better
              for f in [gained[1]]]  # fmt: skip
    gain_scale = _domain(shares, [0.0])
    kept_scale = _domain([kept for _, kept in changes if kept], [0.0, -0.03])
    for place, (entry, (gained, kept)) in enumerate(zip(entries, changes, strict=True), start=1):
        shown: dict[str, Any] = {
            "number": place,
            "anchor": f"adapter-{place}",
            "entry": entry,
            "name": entry.path,
            "verdict": entry.outcome,
            "conclusion": conclusion(entry, report.since),
            "standing": standing(entry),
            "reasons": wording.reasons(entry),
            "gates": [
                [(gate, _gate_bar(gate)) for gate in part] for part in wording.decisive(entry.gates)
            ],
            "gained": None,
            "kept": None,
        }
        if gained:
            metric, fields = gained
            rival = best_baseline(metric_info(metric), fields["baselines"])
            ahead = 0.0 if rival is None else rival[1] - fields["base"]
            # The threshold is the base, or the best baseline where that is better.
            higher = metric_info(metric).higher_is_better
            threshold = max(ahead, 0.0) if higher else min(ahead, 0.0)
            alone = _domain([fields], [0.0, threshold])
            domain = gain_scale if higher else alone
            shown["gained"] = {
                "metric": metric,
                "fields": fields,
                "rival": rival,
                "bar": charts.bar(fields, domain, threshold, _verdict(entry, "gain")),
                "change": wording.change(metric, fields),
                "ladder": _ladder(metric, fields),
            }
        if kept:
            margin = _margin(entry)
            shown["kept"] = {
                "fields": kept,
                "bar": charts.bar(kept, kept_scale, -(margin or 0.0), _verdict(entry, "retention")),
                "change": wording.points(kept),
            }
        yield shown | _scores(entry) | _curves(entry) | _confusion(entry) | _reliability(entry)


def _ladder(metric: str, fields: Mapping[str, Any]) -> list[tuple[str, float, float]]:
    """Base, baselines and adapter on one metric, worst first: (name, value, width in %)."""
    values = {"base": fields["base"], **fields["baselines"], "adapter": fields["adapter"]}
    lower = not metric_info(metric).higher_is_better
    whole = (max(values.values()) if lower else 1.0) or 1.0
    order = sorted(values.items(), key=lambda pair: -pair[1] if lower else pair[1])
    return [(name, value, round(100 * value / whole, 1)) for name, value in order]


def _verdict(entry: AdapterEntry, name: str) -> str:
    """The verdict of the gate called ``name``; inconclusive where there is none."""
    return next((g["verdict"] for g in entry.gates if g["name"] == name), "inconclusive")


def _margin(entry: AdapterEntry) -> float | None:
    """The largest loss of general knowledge that the retention gate allows."""
    return next((-g["threshold"] for g in entry.gates if g["name"] == "retention"), None)


def _domain(rows: Sequence[Mapping[str, Any]], also: Sequence[float]) -> tuple[float, float]:
    """The range of all figures and bounds of ``rows``, and of ``also``."""
    keys = ("difference", "lower", "upper")
    return charts.span([*also, *(row[k] for row in rows for k in keys if row[k] is not None)])


def _gate_bar(gate: Mapping[str, Any]) -> Any:
    """A gate's figure and its threshold as a bar; None where it has no bounds or no threshold."""
    if None in (gate["observed"], gate["lower"], gate["upper"], gate["threshold"]):
        return None
    fields = {"difference": gate["observed"], "lower": gate["lower"], "upper": gate["upper"]}
    domain = _domain([fields], [gate["threshold"]])
    return charts.bar(fields, domain, gate["threshold"], gate["verdict"])


def _scores(entry: AdapterEntry) -> dict[str, Any]:
    """The table of metrics; suites and slices with bars on one scale."""
    scores = entry.domain_scores
    names = list(dict.fromkeys(n for fields in scores.values() for n in fields["baselines"]))
    suites = {k: v for k, v in entry.general.items() if k not in ("nats", "kl")}
    domain = _domain(list(suites.values()), [0.0])
    slices = [
        (column, value, metric, fields)
        for column, values in entry.slices.items()
        for value, found in values.items()
        for metric, fields in found.items()
    ]
    whole = _domain([fields for *_, fields in slices], [0.0])
    return {
        "baselines": names,
        "scores": _rows_of_scores(scores, names),
        "clean_scores": _rows_of_scores(entry.without_near_leaks, names),
        "suites": [
            (suite, f, charts.bar(f, domain, 0.0, "plain"), wording.points(f))
            for suite, f in suites.items()
        ],
        "slices": [
            (column, value, metric, f, charts.bar(f, whole, 0.0, "plain"))
            for column, value, metric, f in slices
        ],
    }  # fmt: skip


def _rows_of_scores(
    scores: Mapping[str, Mapping[str, Any]], baselines: Sequence[str]
) -> list[tuple[str, Mapping[str, Any], list[float | None]]]:
    """(metric, fields, the baselines' values) of each metric."""
    return [
        (metric, fields, [fields["baselines"].get(name) for name in baselines])
        for metric, fields in scores.items()
    ]


def _curves(entry: AdapterEntry) -> dict[str, Any]:
    """Training and validation loss, and the validation score, epoch by epoch."""
    training = entry.training
    history = training.get("history") or []
    if not history:
        return {"history": [], "columns": {}, "loss_curve": None, "score_curve": None,
                "score_name": ""}  # fmt: skip
    epochs, best = [record["epoch"] for record in history], training.get("best_epoch")
    name, scored = wording.metric_name(entry.judged.get("metric") or "score"), None
    if history[0]["higher_is_better"]:
        values = {f"validation {name}": [record["score"] for record in history]}
        title = f"Validation {name} of {entry.path} by epoch; the figures are in the table below"
        scored = charts.curves(values, epochs, best, name, title)
    lines = {f"{part} loss": [record[f"{part}_loss"] for record in history]
             for part in ("training", "validation")}  # fmt: skip
    title = f"Training and validation loss of {entry.path} by epoch; figures in the table below"
    loss = charts.curves(lines, epochs, best, "loss", title)
    first = history[0]
    columns = {
        "accuracy": first["accuracy"] is not None and name != "accuracy",
        "score": first["higher_is_better"] or first["score"] != first["validation_loss"],
        "general": all("general_kl" in record for record in history),
    }
    return {
        "history": history, "columns": columns, "loss_curve": loss, "score_curve": scored,
        "score_name": name,
    }  # fmt: skip


def _confusion(entry: AdapterEntry) -> dict[str, Any]:
    """Two shaded tables for few classes; the most frequent confusions for many."""
    matrices = entry.confusion
    if not matrices:
        return {"confusion": None, "confused": []}
    labels = matrices["labels"]
    if len(labels) > CLASSES:
        return {"confusion": None, "confused": wording.most_confused(matrices)[:CLASSES]}
    tables = {
        who: [
            (label, [(count, count / max(sum(row), 1), i == j) for j, count in enumerate(row)])
            for i, (label, row) in enumerate(zip(labels, matrices[who], strict=True))
        ]
        for who in ("base", "adapter")
    }
    return {"confusion": {"labels": labels, **tables}, "confused": []}


def _reliability(entry: AdapterEntry) -> dict[str, Any]:
    """Charts of risk against coverage, and of precision against recall and prevalence."""
    risk, named = entry.calibration.get("risk_coverage"), entry.curve
    fields: dict[str, Any] = {"risk_chart": None, "curve_chart": None,
                              "prevalence_chart": None}  # fmt: skip
    if risk:
        lines = {name: [(p["coverage"], p[key]) for p in risk]
                 for name, key in (("share wrong", "risk"), ("at most", "upper"))}  # fmt: skip
        title = f"Share of wrong answers against share answered by {entry.path}; table below"
        fields["risk_chart"] = charts.traces(lines, "share answered", "share wrong", title)
    lines = {f"{rows} rows": [(p["recall"], p["precision"]) for p in named[rows]]
             for rows in ("test", "validation") if named.get(rows)}  # fmt: skip
    if lines:
        title = f"Precision against recall of {entry.path}; the figures are in the table below"
        fields["curve_chart"] = charts.traces(lines, "recall", "precision", title)
    points = [
        p for p in named.get("prevalence", {}).get("points", ()) if p["precision"] is not None
    ]
    if points:
        lines = {name: [(p["prevalence"], p[key]) for p in points]
                 for name, key in (("precision", "precision"), ("at least", "lower"))}  # fmt: skip
        title = f"Precision of {entry.path} against the share of positives; table below"
        fields["prevalence_chart"] = charts.traces(lines, "share of positives", "precision", title)
    return fields


# ── All adapters together ───────────────────────────────────────────────────────────────────────


def _scatter(adapters: Sequence[Mapping[str, Any]]) -> tuple[Any, list[str]]:
    """The chart of gain against retention, and the adapters that it cannot show."""
    marks, left_out, margins = [], [], set()
    for shown in adapters:
        gained, kept = shown["gained"], shown["kept"]
        if not gained or not kept or not metric_info(gained["metric"]).higher_is_better:
            left_out.append(shown["name"])
            continue
        mark = {k: shown[k] for k in ("number", "name", "verdict", "anchor")}
        for key, fields in (("gain", gained["fields"]), ("kept", kept["fields"])):
            mark[key] = tuple(
                None if fields[k] is None else 100 * fields[k]
                for k in ("difference", "lower", "upper")
            )
        marks.append(mark)
        margins.add(_margin(shown["entry"]))
    if not marks:
        return None, left_out
    # One line for all adapters only where they have one margin.
    margin = margins.pop() if len(margins) == 1 else None
    title = (
        "Gain in the domain against change in general knowledge for each adapter, with 95 % "
        "bounds; the figures are in the table of adapters"
    )
    return charts.gain_and_retention(
        marks, None if margin is None else 100 * margin, title
    ), left_out


def _matrix(matrix: Mapping[str, Any]) -> dict[str, Any] | None:
    """Rows of (adapter, cells); a cell is (value, change from the base, shade, better, own domain).

    None where no adapter was scored on another's rows.
    """
    rows = []
    crossed = False
    for name, values in zip(matrix["rows"], matrix["values"], strict=True):
        cells: list[Any] = []
        for value, domain, base, metric in zip(
            values, matrix["columns"], matrix["base"], matrix["metrics"], strict=True
        ):
            crossed |= value is not None and name != domain
            if value is None:
                cells.append(None)
                continue
            better = (value - base) * metric_info(metric).sign
            # The square root makes small changes visible; the shade is darkest from 50 points on.
            shade = round(55 * min(1.0, abs(better) / 0.5) ** 0.5)
            cells.append((value, value - base, shade, better >= 0, name == domain))
        rows.append((name, cells))
    if not crossed:
        return None
    return {**matrix, "rows": rows}


# ── In a notebook ───────────────────────────────────────────────────────────────────────────────

INKS = {"pass": "#1f8a4c", "fail": "#d6453d", "inconclusive": "#a07000"}
"""Colours of verdicts that are readable on a light and on a dark page."""


def notebook_card(entry: AdapterEntry, base: str) -> str:
    """A card in a notebook: the verdict and its reasons, and tables to unfold."""
    parts = [_heading(entry.outcome if entry.judged else None, f"{entry.path} on {base}")]
    if not entry.judged:
        training = entry.training
        kept = f", epoch {training['best_epoch']} kept" if "best_epoch" in training else ""
        parts.append(
            Markup("<p>Not evaluated: {} epochs{}.</p>").format(training.get("epochs", "–"), kept)
        )
        return _framed(parts)
    parts.append(Markup("<p>{}<br>{}</p>").format(conclusion(entry), standing(entry)))
    gates = terminal.Grid(["gate", "verdict", "why"])
    for gate in entry.gates:
        gates.add(gate["name"], gate["verdict"], gate["why"])
    tables = {"Gates": gates}
    if entry.domain_scores:
        parts.append(terminal.scores_of(entry.domain_scores).html())
    if entry.general:
        tables["General knowledge"] = terminal.general_of(entry)
    unfold = Markup("<details><summary>{}</summary>{}</details>")
    return _framed([*parts, *(unfold.format(name, grid.html()) for name, grid in tables.items())])


def notebook_report(report: Report) -> str:
    """A report of several adapters in a notebook."""
    grid = terminal.Grid(["adapter", "verdict", "metric", "base", "adapter", "general knowledge"])
    for entry in wording.ranked(report):
        found, general = wording.gained(entry), wording.kept(entry)
        metric, fields = found or ("–", {"base": None, "adapter": None})
        shares = "–" if general is None else " → ".join(
            wording.percent(general[key]) for key in ("base", "adapter")
        )  # fmt: skip
        figures = [wording.number(fields[key]) for key in ("base", "adapter")]
        grid.add(entry.path, entry.outcome, wording.metric_name(metric), *figures, shares)
    heading = _heading(wording.outcome(report), f"{wording.headline(report)}, on {report.base.id}")
    return _framed([heading, grid.html()])


def _heading(outcome: str | None, text: str) -> Markup:
    badge = Markup("")
    if outcome is not None:
        badge = Markup('<b style="color:{}">{} {}</b> · ').format(
            INKS[outcome], wording.SIGNS[outcome], outcome
        )
    return Markup("<p>{}<b>{}</b></p>").format(badge, text)


def _framed(parts: Sequence[Markup]) -> str:
    return str(Markup("<div>{}</div>").format(Markup("").join(parts)))
